"""What a model is, from its files."""

from __future__ import annotations

import functools
import json
import operator
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor

from nuwa.vlm import checkpoint
from nuwa.vlm.checkpoint import PROVENANCE, CheckpointError, StoredTensors, canonical_name, read_checkpoint


@pytest.fixture(scope="module")
def saved(tiny_vlm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    tiny_vlm.model.save_pretrained(folder)
    tiny_vlm.processor.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "repetition_penalty": 1.0}))
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def parts(folder, memory):
    return read_checkpoint(folder, memory)


def changed(before, after):
    """The names of the parts that differ, the encoder's and the others'."""
    return tuple(
        {name for name in {*one, *other} if one.get(name) != other.get(name)}
        for one, other in zip(before, after, strict=True)
    )


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def reweigh(folder, name, change):
    """Change one tensor in the file."""
    path = folder / "model.safetensors"
    state = load_file(path)
    (key,) = [one for one in state if canonical_name(one) == name]
    state[key] = change(state[key].clone()).contiguous()
    save_file(state, path, {"format": "pt"})


CONFIG = {
    "rope_theta": lambda config: config["text_config"]["rope_parameters"].update(rope_theta=123.0),
    "hidden_act": lambda config: config["text_config"].update(hidden_act="gelu"),
    "rms_norm_eps": lambda config: config["text_config"].update(rms_norm_eps=1e-2),
    "projector": lambda config: config.update(projector_hidden_act="relu"),
}
VISION = {
    "activation": lambda config: config["vision_config"].update(hidden_act="relu"),
    "layer": lambda config: config.update(vision_feature_layer=-1),
}


@pytest.mark.parametrize("key", CONFIG)
def test_the_language_models_configuration_decides_answers(copy, tmp_path, key):
    before = parts(copy, tmp_path)
    edit(copy / "config.json", CONFIG[key])
    assert changed(before, parts(copy, tmp_path)) == (set(), {"config.json"})


@pytest.mark.parametrize("key", VISION)
def test_the_encoders_configuration_decides_features(copy, tmp_path, key):
    before = parts(copy, tmp_path)
    edit(copy / "config.json", VISION[key])
    assert changed(before, parts(copy, tmp_path)) == ({"config.json (vision)"}, set())


@pytest.mark.parametrize(("key", "value"), [("repetition_penalty", 1.3), ("eos_token_id", 7)])
def test_the_generation_configuration_decides_answers(copy, tmp_path, key, value):
    before = parts(copy, tmp_path)
    edit(copy / "generation_config.json", lambda config: config.update({key: value}))
    assert changed(before, parts(copy, tmp_path)) == (set(), {"generation_config.json"})


def test_tokenizer_and_template_decide_answers(copy, tmp_path):
    before = parts(copy, tmp_path)
    edit(copy / "tokenizer.json", lambda content: content["model"]["vocab"].update(new=9999))
    assert changed(before, parts(copy, tmp_path)) == (set(), {"tokenizer.json"})
    edit(copy / "tokenizer_config.json", lambda content: content.update(add_bos_token=True))
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert changed(before, parts(copy, tmp_path)) == (set(), names)


def test_the_image_processor_decides_features_and_the_rest_of_the_processor_answers(copy, tmp_path):
    before = parts(copy, tmp_path)
    edit(copy / "processor_config.json", lambda content: content["image_processor"].update(resample=2))
    assert changed(before, parts(copy, tmp_path)) == ({"preprocessor_config.json"}, set())
    edit(copy / "processor_config.json", lambda content: content.update(num_additional_image_tokens=2))
    assert changed(before, parts(copy, tmp_path)) == ({"preprocessor_config.json"}, {"processor_config.json"})


def test_an_image_processor_in_a_file_of_its_own_is_the_same(copy, tmp_path):
    before = parts(copy, tmp_path)
    content = json.loads((copy / "processor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps(content.pop("image_processor")))
    (copy / "processor_config.json").write_text(json.dumps(content))
    assert parts(copy, tmp_path) == before


def test_of_two_image_processors_the_one_counts_that_transformers_obeys(copy, tmp_path):
    """The one inside ``processor_config.json``; what is asked is transformers itself."""
    content = json.loads((copy / "processor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps(content["image_processor"]))
    before, mean = parts(copy, tmp_path), AutoImageProcessor.from_pretrained(copy).image_mean
    edit(copy / "preprocessor_config.json", lambda own: own.update(image_mean=[0.1, 0.2, 0.3]))
    assert AutoImageProcessor.from_pretrained(copy).image_mean == mean and parts(copy, tmp_path) == before
    edit(copy / "processor_config.json", lambda whole: whole["image_processor"].update(image_mean=[0.1, 0.2, 0.3]))
    assert list(AutoImageProcessor.from_pretrained(copy).image_mean) == [0.1, 0.2, 0.3]
    assert changed(before, parts(copy, tmp_path)) == ({"preprocessor_config.json"}, set())


def places(value, path=()):
    """Every value that holds no other, as keys from the outermost on."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [place for key, one in inner for place in places(one, (*path, key))]
    return found if found or not path else [path]


def test_of_all_that_is_touched_in_a_model_nothing_stale_stays_and_nothing_is_remade_in_vain(family, tmp_path):
    """Every value of every file, one at a time, in a folder with all that tokenizers and processors of any age have: stale
    answers 0. Every file in another order of keys and layout, and a README: remade answers 0."""
    folder, memory = tmp_path / "model", tmp_path / "memory"
    family.model.save_pretrained(folder)
    getattr(family.processor, "save_pretrained", family.processor.image_processor.save_pretrained)(folder)
    for name in ("vocab.json", "added_tokens.json", "special_tokens_map.json"):
        (folder / name).write_text(json.dumps({"<s>": 1, "dtype": 2}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    for name in ("merges.txt", "tokenizer.model"):
        (folder / name).write_text("a b")

    before = read_checkpoint(folder, memory)
    touched, stale, remade = 0, [], []
    for path in sorted(folder.glob("*.json")):
        text = path.read_text()
        for place in places(json.loads(text)):
            if path.name not in checkpoint.VOCABULARIES and PROVENANCE & set(place):
                continue
            content = json.loads(text)
            section = functools.reduce(operator.getitem, place[:-1], content)
            section[place[-1]] = "another" if section[place[-1]] != "another" else 1
            path.write_text(json.dumps(content))
            stale += [f"{path.name}: {place}"] * (read_checkpoint(folder, memory) == before)
            touched += 1
        path.write_text(json.dumps(reorder(json.loads(text)), indent=5))
        remade += [path.name] * (read_checkpoint(folder, memory) != before)
        path.write_text(text)
    for path in (*folder.glob("*.jinja"), folder / "merges.txt", folder / "tokenizer.model"):
        text = path.read_text()
        path.write_text(text + " ")
        stale += [path.name] * (read_checkpoint(folder, memory) == before)
        path.write_text(text)
    (folder / "README.md").write_text("about this model")
    remade += ["README.md"] * (read_checkpoint(folder, memory) != before)
    assert touched > 50
    assert (stale, remade) == ([], [])


def test_every_single_tensor_counts(copy, tmp_path):
    """One bit of each, where the file holds it."""
    before, path = parts(copy, tmp_path), copy / "model.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    tensors = {name: one for name, one in json.loads(content[8:start]).items() if name != "__metadata__"}
    assert len(tensors) > 100
    for place, tensor in tensors.items():
        name, at = canonical_name(place), start + tensor["data_offsets"][0]
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(bytes([content[at] ^ 1]))
        after = parts(copy, tmp_path)
        encoder = name.startswith("vision_tower.")
        assert changed(before, after) == (
            {"weights of the encoder"} if encoder else set(),
            set() if encoder else {"weights"},
        ), name
        before = after


def test_a_projector_before_the_features_is_the_encoders(tiny_onevision, tmp_path):
    """LLaVA-OneVision's features stand behind it, so features of another are others."""
    folder = tmp_path / "model"
    tiny_onevision.model.save_pretrained(folder)
    tiny_onevision.processor.save_pretrained(folder)
    before = parts(folder, tmp_path)
    reweigh(folder, "multi_modal_projector.linear_1.weight", lambda tensor: tensor + 1)
    edit(folder / "config.json", lambda config: config.update(vision_aspect_ratio="anyres_max_9"))
    assert changed(before, parts(folder, tmp_path)) == ({"weights of the encoder", "config.json (vision)"}, set())


def test_a_tensor_of_other_precision_or_shape_is_another(copy, tmp_path):
    before = parts(copy, tmp_path)
    name = "multi_modal_projector.linear_1.bias"
    reweigh(copy, name, lambda value: value.bfloat16())
    halved = parts(copy, tmp_path)
    reweigh(copy, name, lambda value: value[None])
    assert len({before.language["weights"], halved.language["weights"], parts(copy, tmp_path).language["weights"]}) == 3


def rename_old(name):
    """Names as transformers wrote them before version 5."""
    name = re.sub(r"^(model\.)?vision_tower\.", "vision_tower.vision_model.", name.replace("vision_model.", ""))
    return re.sub(r"^model\.(language_model)\.", r"\1.model.", name).removeprefix("model.")


def rename_new(name):
    return name if name.startswith("lm_head") else f"model.{canonical_name(name)}"


@pytest.mark.parametrize("rename", [rename_old, rename_new])
def test_names_and_files_have_no_meaning(copy, tmp_path, rename):
    """Older and newer names, and two files in place of one."""
    before = parts(copy, tmp_path)
    state = {rename(name): value for name, value in load_file(copy / "model.safetensors").items()}
    (copy / "model.safetensors").unlink()
    names = sorted(state)
    for number, some in enumerate((names[::2], names[1::2])):
        save_file({name: state[name] for name in some}, copy / f"model-{number}.safetensors")
    assert parts(copy, tmp_path) == before


def reorder(value):
    if isinstance(value, dict):
        return {key: reorder(value[key]) for key in reversed(value)}
    return [reorder(one) for one in value] if isinstance(value, list) else value


def test_what_has_no_meaning_changes_nothing(copy, tmp_path):
    before = parts(copy, tmp_path)
    for path in copy.glob("*.json"):
        path.write_text(json.dumps(reorder(json.loads(path.read_text())), indent=7))
    edit(copy / "config.json", lambda content: content.update(transformers_version="9.9", _name_or_path="elsewhere"))
    (copy / "README.md").write_text("about this model")
    (copy / ".gitattributes").write_text("*.safetensors lfs")
    os.utime(copy / "model.safetensors")
    assert parts(copy, tmp_path) == before


def test_weights_are_read_once(copy, tmp_path, monkeypatch):
    """Again only where size or time stamp of a file have changed."""
    before, read = parts(copy, tmp_path), []
    monkeypatch.setattr(checkpoint, "_read_digests", lambda path: read.append(path) or iter(()))
    assert parts(copy, tmp_path) == before and not read
    os.utime(copy / "model.safetensors", (1, 1))
    parts(copy, tmp_path)
    assert read == [copy / "model.safetensors"]


def test_faults_are_named(copy, tmp_path):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no readable safetensors \(tensor .* is cut off\)"):
        parts(copy, tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"copy: no \*\.safetensors and no pytorch_model\*\.bin"):
        parts(copy, tmp_path)


def test_the_fingerprint_of_an_encoder_is_the_same_from_its_files(family, tmp_path):
    """Of all families, in the dtype of the files and in another."""
    family.model.save_pretrained(tmp_path)
    stored = StoredTensors(tmp_path)
    with torch.device("meta"):
        shape = type(family)(family.model_class(family.model.config), family.processor)
    assert shape.encoder_fingerprint(stored) == family.encoder_fingerprint()


def test_a_checkpoint_without_a_tensor_of_the_encoder_is_refused(tiny_vlm, copy):
    state = load_file(copy / "model.safetensors")
    gone = next(name for name in state if canonical_name(name).startswith("vision_tower.encoder"))
    save_file({name: value for name, value in state.items() if name != gone}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lack the tensor model\.vision_tower\..*; fetch the checkpoint again"):
        tiny_vlm.encoder_fingerprint(StoredTensors(copy))
