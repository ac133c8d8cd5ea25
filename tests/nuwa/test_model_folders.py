"""Model folders that are not whole or not supported: real files, each refused in one line before anything is loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from nuwa.versions import UnsupportedVersion, check_transformers
from nuwa.vlm import PromptError, adapter, adapter_class, load_adapter
from nuwa.vlm.adapter import render_question
from nuwa.vlm.checkpoint import CheckpointError
from nuwa.vlm.folder import check_folder
from nuwa.vlm.generation_settings import check_generation

TESTBED = Path(__file__).parents[2] / "models/testbed"


def change(name: str, **values) -> Callable[[Path], None]:
    """Keys of a JSON file set anew; ``None`` takes them out."""

    def apply(folder: Path) -> None:
        held = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps({key: value for key, value in held.items() if value is not None}))

    return apply


def tower(**values) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        held = json.loads((folder / "config.json").read_text())
        held["vision_config"] |= values
        (folder / "config.json").write_text(json.dumps(held))

    return apply


def tensors(edit: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        edit(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def cut(name: str, share: float) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(len(whole) * share)])

    return apply


def copy(name: str, to: str) -> Callable[[Path], None]:
    return lambda folder: shutil.copy(folder / name, folder / to) and None


def tokenizer(edit: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        held = json.loads((folder / "tokenizer.json").read_text())
        edit(held)
        (folder / "tokenizer.json").write_text(json.dumps(held))

    return apply


def sharded(folder: Path) -> dict[str, str]:
    """The weights in two files and an index, as large checkpoints are published; tensor → file."""
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {f"model-0000{n}-of-00002.safetensors": sorted(held)[n - 1 :: 2] for n in (1, 2)}
    for part, names in parts.items():
        save_file({name: held[name] for name in names}, folder / part, metadata={"format": "pt"})
    index = {name: part for part, names in parts.items() for name in names}
    write_index(folder, index)
    return index


def write_index(folder: Path, index: dict[str, str], **held) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index} | held))


def lose_a_part(folder: Path) -> None:
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def name_too_much(folder: Path) -> None:
    write_index(folder, sharded(folder) | {"model.more": "model-00001-of-00002.safetensors"})


def lead_outside(folder: Path) -> None:
    write_index(folder, dict.fromkeys(sharded(folder), "../elsewhere.safetensors"))


def say_nothing_else(folder: Path) -> None:
    write_index(folder, sharded(folder), metadata=None)


def hold_twice(folder: Path) -> None:
    """A tensor in both parts, with other values each."""
    index = sharded(folder)
    other = (
        "model-00002-of-00002.safetensors"
        if index[NORM].startswith("model-00001")
        else "model-00001-of-00002.safetensors"
    )
    save_file(load_file(folder / other) | {NORM: torch.ones(128)}, folder / other, metadata={"format": "pt"})


def leave_others_beside(folder: Path) -> None:
    save_file({NORM: torch.ones(128)}, folder / "old.safetensors")


def leave_others_beside_pickled(folder: Path) -> None:
    pickled(lambda held: held)(folder)
    save_file({"other": torch.ones(3)}, folder / "old.safetensors")


def pipe(name: str) -> Callable[[Path], None]:
    """Nothing will ever write to it."""

    def apply(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return apply


def cut_a_part(folder: Path) -> None:
    sharded(folder)
    cut("model-00002-of-00002.safetensors", 0.9)(folder)


def header(**entry) -> Callable[[Path], None]:
    """What the header of the weights says of one tensor, set anew."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        whole = path.read_bytes()
        length = int.from_bytes(whole[:8], "little")
        held = json.loads(whole[8 : 8 + length])
        held[NORM] |= entry
        changed = json.dumps(held).encode()
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + whole[8 + length :])

    return apply


def folder_of(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return apply


def link(name: str, to: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(to)

    return apply


def pickled(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        torch.save(edit(load_file(folder / "model.safetensors")), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    return apply


def layers(count: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        held = json.loads((folder / "config.json").read_text())
        held["text_config"]["num_hidden_layers"] = count
        (folder / "config.json").write_text(json.dumps(held))

    return apply


NORM = "language_model.model.norm.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
FAULTS = {
    "tensor missing": (
        tensors(lambda held: held.pop(NORM)),
        "1 tensor of the model missing from its files: model.language_model.norm.weight; fetch",
    ),
    "tensor of another shape": (
        tensors(lambda held: held.update({NORM: torch.ones(3)})),
        "1 tensor of another shape than config.json says, first model.language_model.norm.weight: 3 instead of 128",
    ),
    "tensor too many": (
        tensors(lambda held: held.update({"model.foo": torch.ones(3)})),
        "1 tensor that the model of config.json does not have: model.foo",
    ),
    "quantised tensors": (
        tensors(lambda held: held.update({"model.foo.weight": torch.ones(3, dtype=torch.int8)})),
        "model.foo.weight holds I8 numbers, so the model is quantised",
    ),
    "git-lfs pointer": (write("model.safetensors", LFS), "a git-lfs pointer of 63 bytes, not the file; `git lfs pull`"),
    "cut weights": (cut("model.safetensors", 0.7), "bytes, but its header tells of"),
    "cut header": (cut("model.safetensors", 0.0005), "cut off within its header; fetch it again"),
    "a header of numbers with points": (
        header(shape=[128.0]),
        "its header is damaged at tensor language_model.model.norm",
    ),
    "a header of words": (
        header(data_offsets=["0", "512"]),
        "its header is damaged at tensor language_model.model.norm",
    ),
    "a header of negative sizes": (
        header(shape=[-128]),
        "its header is damaged at tensor language_model.model.norm.weight",
    ),
    "a header of three places": (
        header(data_offsets=[0, 1, 2]),
        "its header is damaged at tensor language_model.model",
    ),
    "a header of no type": (
        header(dtype=None),
        "its header is damaged at tensor language_model.model.norm.weight; fetch",
    ),
    "weights that are a folder": (folder_of("model.safetensors"), "model.safetensors: Is a directory"),
    "a link to nothing": (
        link("model.safetensors", "../blobs/5e1f"),
        "model.safetensors: a link to ../blobs/5e1f, which is not there; fetch it again",
    ),
    "a pickled program": (
        pickled(lambda held: torch.nn.Linear(2, 2)),
        "pytorch_model.bin: no whole file of tensors (We",
    ),
    "pickled and nested": (
        pickled(lambda held: {"state_dict": held}),
        "pytorch_model.bin: no whole file of tensors (em",
    ),
    "pickled without a tensor": (
        pickled(lambda held: {name: value for name, value in held.items() if name != NORM}),
        "1 tensor of the model missing from its files: model.language_model.norm.weight; fetch",
    ),
    "tensors under an adapter's names": (
        tensors(lambda held: held.update({f"base_model.model.{name}": held.pop(name) for name in list(held)})),
        "182 tensors of the model missing from its files: lm_head.weight, model.language_model.embed_tokens.weight, ",
    ),
    "a template's pointer": (
        write("chat_template.jinja", LFS),
        "chat_template.jinja: a git-lfs pointer of 63 bytes, not the file; `git lfs pull`",
    ),
    "a template that hides the question": (
        write("chat_template.jinja", b"<image> what is it?"),
        "the model's chat template does not show the question; fetch it again",
    ),
    "fewer layers": (
        layers(7),
        "9 tensors that the model of config.json does not have: model.language_model.layers.7.",
    ),
    "more layers": (
        layers(9),
        "9 tensors of the model missing from its files: model.language_model.layers.8.input_laye",
    ),
    "empty weights": (write("model.safetensors", b"\0" * 0 + b"x"), "1 bytes, cut off within its header"),
    "no weights": (remove("model.safetensors"), "no model.safetensors or model.safetensors.index.json; fetch"),
    "a part missing": (
        lose_a_part,
        "model-00002-of-00002.safetensors: no such file, but model.safetensors.index.json names it; fetch it again",
    ),
    "a part cut off": (cut_a_part, "model-00002-of-00002.safetensors: "),
    "an index that names more": (
        name_too_much,
        "1 tensor that model.safetensors.index.json names missing: model.more; fetch the file again",
    ),
    "an index that leads outside": (
        lead_outside,
        "model.safetensors.index.json: no index of weights (weight_map: tensor",
    ),
    "an index without metadata": (
        say_nothing_else,
        "model.safetensors.index.json: no index of weights (weight_map: tensor",
    ),
    "a tensor twice": (
        hold_twice,
        "language_model.model.norm.weight stands in model-00001-of-00002.safetensors too, with other values; move the file",
    ),
    "other weights beside": (
        leave_others_beside,
        "old.safetensors: tensor language_model.model.norm.weight stands in model.safetensors too, with other values; move",
    ),
    "other weights beside pickled ones": (
        leave_others_beside_pickled,
        "old.safetensors: transformers loads pytorch_model.bin and not this file, so which one is meant is open; move one",
    ),
    "half a file beside": (
        write("consolidated.safetensors", b"x"),
        "consolidated.safetensors: 1 bytes, cut off within its header",
    ),
    "a pipe for a configuration": (pipe("config.json"), "config.json: no file but a pipe or a device; fetch the file"),
    "a pipe for weights": (
        pipe("model.safetensors"),
        "model.safetensors: no file but a pipe or a device; fetch the file",
    ),
    "a configuration without end": (
        write("config.json", b'{"a":' + b"[" * 100_000),
        "config.json: no valid JSON (RecursionError: maximum recursion depth exceeded while",
    ),
    "an index without end": (
        lambda folder: sharded(folder) and write("model.safetensors.index.json", b"[" * 100_000)(folder),
        "model.safetensors.index.json: no index of weights (weight_map: tensor",
    ),
    "numbers of eight bits": (
        tensors(lambda held: held.update({f"{NORM}": held[NORM].to(torch.float8_e4m3fn)})),
        "model.safetensors: language_model.model.norm.weight holds F8_E4M3 numbers, so the model is quantised",
    ),
    "quantised by AWQ": (
        change("config.json", quantization_config={"quant_method": "awq"}),
        "weights (awq) are not sup",
    ),
    "quantised by bitsandbytes": (
        change("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "quantised weights (bitsandbytes) are not supported; fetch the checkpoint in bfloat16",
    ),
    "configuration of another family": (
        change("config.json", model_type="llava_next"),
        "1 tensor of the model missing from its files: model.image_newline; fetch",
    ),
    "a question before the image": (
        write("chat_template.jinja", b"{% for m in messages %}{{ m['content'][1]['text'] }} <image>:{% endfor %}"),
        "the model's chat template puts the question before the image ('what is on the left? <image>:'), and answers are",
    ),
    "an image behind which nothing stands": (
        write("chat_template.jinja", b"{% for m in messages %}{{ m['content'][1]['text'] }} <image>{% endfor %}"),
        "the model's chat template puts the question before the image ('what is on the left? <image>'), and answers are",
    ),
    "a question cut short": (
        write("chat_template.jinja", b"{% for m in messages %}<image> {{ m['content'][1]['text'][:12] }}{% endfor %}"),
        "the model's chat template does not show the question; fetch it again",
    ),
    "a template that includes files": (
        write("chat_template.jinja", b"{% include '/etc/passwd' %}"),
        "the model's chat template fails (no loader for this environment specified)",
    ),
    "a template that calls itself": (
        write("chat_template.jinja", b"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
        "the model's chat template fails (maximum recursion depth exceeded",
    ),
    "weights of another format": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model.gguf") and None,
        "no model.safetensors or model.safetensors.index.json (model.gguf is not one that transformers loads); fetch",
    ),
    "pickled rubbish": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin") and None,
        "pytorch_model.bin: no whole file of tensors (",
    ),
    "no config": (remove("config.json"), "no config.json; fetch the whole checkpoint"),
    "damaged config": (cut("config.json", 0.5), "config.json: no valid JSON (JSONDecodeError"),
    "unknown model": (
        change("config.json", model_type="bert"),
        "model type 'bert' is unknown; allowed: idefics3, internvl, llava, llava_next",
    ),
    "quantised": (
        change("config.json", quantization_config={"quant_method": "gptq"}),
        "quantised weights (gptq) are not supported; fetch",
    ),
    "original LLaVA": (
        change("config.json", model_type="llava_llama", mm_vision_tower="openai/clip"),
        "LLaVA's original format (llava_llama); take the converted checkpoint",
    ),
    "LoRA": (write("adapter_config.json", b'{"base_model_name_or_path": "a/b"}'), "a LoRA adapter of a/b, no model of"),
    "strategy full": (
        change("config.json", vision_feature_select_strategy="full"),
        "model.vision_feature_select_strategy 'full' with layer -2: only one layer",
    ),
    "several layers": (change("config.json", vision_feature_layer=[-2, -5]), "with layer [-2, -5]: only one layer"),
    "layer out of range": (
        change("config.json", vision_feature_layer=-9),
        "config.vision_feature_layer = -9: the towe",
    ),
    "language model as a word": (
        change("config.json", text_config="llama"),
        "config.json: text_config is no settings by name; fetch it again",
    ),
    "no patches": (
        tower(patch_size=0),
        "vision_config.patch_size = 0 must be a whole number of pixels, no more than image",
    ),
    "patches beyond the picture": (
        tower(patch_size=97),
        "vision_config.patch_size = 97 must be a whole number of pixels",
    ),
    "another placeholder": (
        change("config.json", image_token_id=5, image_token_index=5),
        "its processor makes room for 1 visual tokens of a picture of 64x48 pixels, config.json says 144; fetch both",
    ),
    "no preprocessor": (remove("processor_config.json"), "no preprocessor_config.json, which says how images"),
    "no tokenizer": (remove("tokenizer.json"), "no tokenizer.json or tokenizer.model; fetch"),
    "damaged tokenizer": (cut("tokenizer.json", 0.5), "tokenizer.json: no valid JSON (JSONDecodeError"),
    "no chat template": (remove("chat_template.jinja"), "the model's processor has no chat template; fetch"),
    "text-only template": (
        write("chat_template.jinja", b"{% for m in messages %}{{ m['content'][1]['text'] }}{% endfor %}"),
        "the model's chat template puts no image placeholder (token 4 of config.json) into",
    ),
    "damaged template": (write("chat_template.jinja", b"{% for %}"), "the model's chat template fails ("),
    "no token": (
        change("generation_config.json", bos_token_id={}),
        "generation_config.bos_token_id = {} is no token id; fetch generation_config.json again",
    ),
    "an end that never comes": (
        change("generation_config.json", eos_token_id=[1, 10**9]),
        "generation_config.eos_token_id = [1, 1000000000]: the model's tokens are 0 to ",
    ),
    "an end that only config.json names": (
        change("generation_config.json", eos_token_id=None),
        "generation_config.json: names no eos_token_id, so transformers would end no answer where config.json does; set it",
    ),
    "other settings in its place": (
        copy("tokenizer.json", "generation_config.json"),
        "names no eos_token_id, so trans",
    ),
    "a switch that is none": (
        change("generation_config.json", output_hidden_states=0.5),
        "generation_config.output_hidden_states = 0.5 must be true or false; set it to false",
    ),
    "processor of larger patches": (
        change("processor_config.json", patch_size=16),
        "its processor makes room for 36 visual tokens of a picture of 64x48 pixels, config.json says 144; fetch both",
    ),
    "processor that counts a token less": (
        change("processor_config.json", num_additional_image_tokens=0),
        "makes room for 143 visual tokens of a picture of 64x48 pixels, config.json says 144; fetch both files of one",
    ),
    "a token beyond the embeddings": (
        tokenizer(lambda held: held["post_processor"]["special_tokens"]["<s>"].update(ids=[10**9])),
        "its tokenizer has a token 1000000000, the model's tokens are 0 to ",
    ),
    "a token that is not there": (
        tokenizer(lambda held: held["post_processor"].update(special_tokens={})),
        "tokenizer.json: post_processor frames texts with '<s>', which its special_tokens lack; fetch it again",
    ),
    "beams": (change("generation_config.json", num_beams=4), "generation_config.num_beams = 4 is not supported"),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(TESTBED, tmp_path / "model"))


@pytest.mark.parametrize("kind", FAULTS)
def test_a_folder_is_refused_in_one_line(kind, folder):
    damage, message = FAULTS[kind]
    damage(folder)
    with pytest.raises(ValueError) as caught:
        load_adapter(folder)
    assert message in str(caught.value) and not re.search(r"[\x00-\x1f]", str(caught.value))


def test_a_template_that_does_not_end_is_refused(folder, monkeypatch):
    monkeypatch.setattr(adapter, "TEMPLATE_S", 0.05)
    many = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(many)
    with pytest.raises(
        CheckpointError, match=r"the model's chat template fails \(not done after 0.05 s\); fetch it again"
    ):
        load_adapter(folder)


def test_other_weights_may_lie_beside_a_model(folder):
    """An adapter that was merged, or the same tensors under other names."""
    save_file({"lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    save_file(
        {"model.language_model.norm.weight": load_file(folder / "model.safetensors")[NORM]}, folder / "n.safetensors"
    )
    check_folder(folder, adapter_class)


@pytest.mark.parametrize(
    ("name", "value", "neutral"),
    [
        ("no_repeat_ngram_size", 2, "0"),
        ("diversity_penalty", 0.5, "0.0"),
        ("stop_strings", ["x"], '""'),
        ("remove_invalid_values", True, "false"),
        ("max_time", 1.0, "null"),
    ],
)
def test_the_remedy_is_what_the_file_should_say(name, value, neutral, folder):
    change("generation_config.json", **{name: value})(folder)
    with pytest.raises(CheckpointError, match=f"generation_config.{name} = .* set it to {neutral}$"):
        check_folder(folder, adapter_class)


def test_a_template_may_change_the_question(folder):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("part['text']", "part['text'] | upper"))
    vlm = load_adapter(folder)
    assert "RED?" in render_question(vlm.processor, "red?")


def test_the_whole_folder_passes_under_the_names_of_every_version(folder):
    check_folder(folder, adapter_class, deep=True)
    held = load_file(folder / "model.safetensors")
    renamed = {name.replace("vision_tower.vision_model.", "vision_tower.", 1): value for name, value in held.items()}
    assert renamed.keys() != held.keys()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    check_folder(folder, adapter_class)


def test_weights_in_parts_or_of_torchs_own_format_pass(folder, tmp_path):
    held = load_file(folder / "model.safetensors")
    pickled = Path(shutil.copytree(folder, tmp_path / "pickled"))
    (pickled / "model.safetensors").unlink()
    torch.save(held, pickled / "pytorch_model.bin")
    sharded(folder)
    for one in (folder, pickled):
        check_folder(one, adapter_class, deep=True)


def test_numbers_that_are_not_finite_are_found_when_all_is_read(folder):
    tensors(lambda held: held[NORM].fill_(float("inf")))(folder)
    with pytest.raises(CheckpointError, match=f"tensor {NORM} holds numbers that are not finite"):
        check_folder(folder, adapter_class, deep=True)


def test_a_template_that_writes_the_beginning_gets_no_second(folder):
    plain = load_adapter(folder).encode_prompt("red?")
    template = folder / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + template.read_text())
    vlm = load_adapter(folder)
    stock = vlm.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "red?"}]}], tokenize=False
    )
    assert stock.startswith("<s>") and vlm.encode_prompt("red?").before.count(0) == 1
    assert vlm.encode_prompt("red?") == plain


def test_a_question_that_holds_the_placeholder_is_named(tiny_vlm):
    with pytest.raises(PromptError) as caught:
        tiny_vlm.encode_prompt("what is <image>?")
    assert str(caught.value) == (
        "the question 'what is <image>?' holds the model's image placeholder; reword it or take it out"
    )


@pytest.mark.parametrize(
    "values",
    [{"no_repeat_ngram_size": 2}, {"suppress_tokens": [3]}, {"bad_words_ids": [[3]]}, {"do_sample": True}],
)
def test_settings_that_change_answers_are_refused_by_name(values):
    with pytest.raises(CheckpointError, match=f"generation_config.{next(iter(values))} = "):
        check_generation(GenerationConfig(**values))
    check_generation(GenerationConfig(do_sample=True, temperature=1e-6, repetition_penalty=1.05))


@pytest.mark.parametrize("installed", ["4.57.1", "5.14.9", "5.14.0.dev0", "6.0.0", "6.0.0rc1", "3.0"])
def test_other_versions_of_transformers_are_refused(installed):
    with pytest.raises(UnsupportedVersion) as caught:
        check_transformers(installed)
    assert str(caught.value).startswith(f"transformers {installed} is installed, >=5.15,<6 is needed")
    for allowed in ("5.15.0", "5.15.1.dev0", "5.100.0+local"):
        check_transformers(allowed)


def shift_first(name: str, keys: list[str], size: list) -> Callable[[Path], None]:
    """The first of the picture sizes of a JSON file exchanged."""

    def apply(folder: Path) -> None:
        whole = held = json.loads((folder / name).read_text())
        for key in keys:
            held = held[key]
        held["image_grid_pinpoints"][0] = size
        (folder / name).write_text(json.dumps(whole))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shift_first("config.json", [], [96]), "config.json: image_grid_pinpoints = [[96], "),
        (shift_first("config.json", [], [96, 0.5]), "config.json: image_grid_pinpoints = [[96, 0.5], "),
        (
            change("config.json", image_grid_pinpoints=[]),
            "config.json: image_grid_pinpoints = [] must be a list of heights",
        ),
        (
            shift_first("processor_config.json", ["image_processor"], [960, 96]),
            "config.json: image_grid_pinpoints differ from the image processor's, so crops and tokens would not match; fet",
        ),
    ],
)
def test_picture_sizes_of_llava_next_are_some_and_the_processors(damage, message, tiny_next, tmp_path):
    tiny_next.model.save_pretrained(tmp_path / "model")
    tiny_next.processor.save_pretrained(tmp_path / "model")
    check_folder(tmp_path / "model", adapter_class)
    damage(tmp_path / "model")
    with pytest.raises(CheckpointError) as caught:
        check_folder(tmp_path / "model", adapter_class)
    assert message in str(caught.value) and "\n" not in str(caught.value)
