"""``nuwa.generate``: what it returns, what it refuses, and that cached features and offloaded layers change nothing."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from listening import heard
from PIL import Image
from safetensors.torch import load_file, save_file

import nuwa
from nuwa import generate
from nuwa.generation import ImageBatch, answer_encoded
from nuwa.grid import PatchGrid
from nuwa.methods import specify
from nuwa.schedule import UnreachableBudget
from nuwa.stage1.learnpruner import Lpm, WeightsError, save_lpm
from nuwa.vlm import Adapter, EncodedImage, LlavaAdapter, LlavaNextAdapter, Qwen2_5VLAdapter, adapt, load_adapter

torch.set_num_threads(1)
MAX_NEW = 6
ASKED = "what is on the left ?"
TESTBED = Path(__file__).parents[2] / "models/testbed"


@pytest.fixture(scope="module")
def pictures(family, scenes, photos):
    return [Image.fromarray(scene.image) for scene in scenes] if isinstance(family, LlavaAdapter) else photos


def ask(vlm, images, **options):
    options = {"method": "nuwa", "average_tokens": 20, "max_new_tokens": MAX_NEW, **options}
    return nuwa.generate(vlm.model, vlm.processor, images, [ASKED] * len(images), **options)


# --- what comes back


def test_kept_tokens_are_told_with_place_position_and_role(family, pictures):
    for image, one in zip(pictures, ask(family, pictures), strict=True):
        kept = one.kept
        layout = family.encode_images([image])[0].layout
        lengths = {len(kept.slots), len(kept.places), len(kept.positions), len(kept.roles)}
        assert lengths == {one.schedule.stage1_keep}
        assert list(kept.slots) == sorted(set(kept.slots)) and set(one.kept_last) < set(kept.slots)
        assert len(one.kept_last) == one.schedule.entering[-1]
        assert one.schedule.average_tokens == pytest.approx(20, abs=0.5)
        assert {"pillar", "collector"} <= set(kept.roles)
        start = len(family.encode_prompt(ASKED).before)
        for slot, (view, row, column), position, role in zip(
            kept.slots, kept.places, kept.positions, kept.roles, strict=True
        ):
            grid = layout.views[view].grid
            if role == "newline":
                assert (view, column) == (1, grid.width) and layout.fixed[slot]
            else:
                assert layout.slots[view][row * grid.width + column] == slot
            expected = (start + slot,) if layout.axes == 1 else (start, start + row, start + column)
            assert position == expected
        rows = layout.views[-1].grid.height if layout.fixed.any() else 0
        assert kept.roles.count("newline") == rows
        assert set(one.timings) == {"encode", "select", "prefill", "decode"} and min(one.timings.values()) > 0
        assert one.text == family.decode_text(list(one.tokens))


def test_one_question_or_several_for_each_image(tiny_qwen, photos):
    flat = ask(tiny_qwen, photos[:2])
    nested = nuwa.generate(
        tiny_qwen.model,
        tiny_qwen.processor,
        photos[:2],
        [[ASKED, "how many red"], ["how many red", ASKED]],
        average_tokens=20,
        max_new_tokens=MAX_NEW,
    )
    assert [one.tokens for one in flat] == [nested[0][0].tokens, nested[1][1].tokens]
    assert nested[0][1].tokens != nested[0][0].tokens


def test_retention_is_a_share_of_each_images_own_tokens(tiny_qwen, photos):
    for one in ask(tiny_qwen, photos, average_tokens=None, retention=0.5):
        assert one.schedule.average_tokens == pytest.approx(0.5 * one.schedule.tokens, abs=0.5)
    assert len({one.schedule.tokens for one in ask(tiny_qwen, photos)}) > 4


def test_an_image_with_fewer_tokens_than_the_budget_keeps_all(tiny_qwen, photos):
    many = ask(tiny_qwen, photos, method="uniform", average_tokens=48)
    whole = ask(tiny_qwen, photos, method="unpruned", average_tokens=None)
    assert {one.schedule.entering[0] for one in many} >= {48} | {one.schedule.tokens for one in many[:3]}
    for one, other in zip(many, whole, strict=True):
        if one.schedule.tokens <= 48:
            assert one.tokens == other.tokens


WHOLE = ["random", "uniform", "pooling", "divprune", "fastv", "nuwa"]


@pytest.mark.parametrize("method", WHOLE)
def test_a_whole_budget_is_the_unpruned_model_under_every_strategy(family, pictures, method):
    """Every method with every strategy, each on one of the families, all of which get to each strategy twice."""
    families = [LlavaAdapter, LlavaNextAdapter, Qwen2_5VLAdapter]
    position = ["perc", "pesp", "rpme"][(WHOLE.index(method) + families.index(type(family))) % 3]
    options = {"position": position, "parameters": {"pillar_quantile": 0.0} if method == "nuwa" else None}
    whole = ask(family, pictures[:3], method="unpruned", average_tokens=None)
    full = ask(family, pictures[:3], method=method, average_tokens=None, retention=1.0, **options)
    assert [one.tokens for one in full] == [one.tokens for one in whole]


def test_neither_batches_nor_repetition_change_anything(family, pictures):
    def told(**options):
        return [(one.tokens, one.kept, one.kept_last) for one in ask(family, pictures[:4], method="random", **options)]

    first = told(seed=3)
    assert told(seed=3, batch_images=1) == first == told(seed=3, batch_images=3)
    assert told(seed=4) != first


def test_the_model_is_left_as_it_was(tiny_next, photos):
    model = copy.deepcopy(tiny_next.model).requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.model.language_model.modules()]
    generate(model, tiny_next.processor, photos[:1], [ASKED], average_tokens=30, max_new_tokens=2)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [len(module._forward_hooks) for module in model.model.language_model.modules()] == hooks
    assert "forward" not in vars(model.model.language_model)


# --- what is refused


def test_a_method_that_reads_cls_is_refused_by_name_where_there_is_none(tiny_qwen, photos):
    with pytest.raises(ValueError) as caught:
        ask(tiny_qwen, photos[:1], method="visionzip")
    message = str(caught.value)
    assert message.startswith(
        "method 'visionzip' needs the attention of a CLS token, and Qwen2.5-VL's vision encoder has none; "
        "methods that do without: "
    )
    assert "nuwa" in message and "fastv" in message and message.count("visionzip") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average_tokens": None}, "method 'nuwa' needs average_tokens or retention, one of the two"),
        ({"retention": 0.5}, "method 'nuwa' needs average_tokens or retention, one of the two"),
        ({"average_tokens": None, "retention": 1.5}, "retention 1.5 must lie in (0, 1]"),
        (
            {"method": "unpruned"},
            "method 'unpruned' takes neither average_tokens nor retention; leave them out",
        ),
        ({"position": "sparse"}, "position 'sparse' is unknown; allowed: own, perc, pesp, rpme, gap"),
    ],
)
def test_bad_arguments_are_named(tiny_qwen, photos, options, message):
    with pytest.raises(ValueError) as caught:
        ask(tiny_qwen, photos[:1], **options)
    assert str(caught.value) == message


def test_questions_must_match_images(tiny_qwen, photos):
    with pytest.raises(ValueError) as caught:
        generate(tiny_qwen.model, tiny_qwen.processor, photos[:2], [ASKED], average_tokens=20)
    assert str(caught.value) == "2 images but 1 questions; give one, or a list, for each image"
    with pytest.raises(ValueError) as caught:
        generate(tiny_qwen.model, tiny_qwen.processor, photos[:1], [[]], average_tokens=20)
    assert str(caught.value) == "every image needs at least one question"


def test_a_budget_below_the_newline_tokens_is_refused_with_the_range(tiny_next, photos):
    with pytest.raises(UnreachableBudget) as caught:
        ask(tiny_next, photos[:1], average_tokens=4, without_stage2=True)
    assert str(caught.value) == (
        "4 tokens before the first cut are out of reach on this image: allowed 10..140, 8 of them newline tokens"
    )


def test_a_model_in_training_mode_is_refused(tiny_next, photos):
    model = copy.deepcopy(tiny_next.model).train()
    with pytest.raises(ValueError) as caught:
        generate(model, tiny_next.processor, photos[:1], [ASKED], average_tokens=30)
    assert str(caught.value) == "the model is in training mode; call model.eval() first"


def test_an_unsupported_model_type_is_named(tiny_next, monkeypatch):
    monkeypatch.setattr(type(tiny_next.model.config), "model_type", "blip")
    with pytest.raises(ValueError) as caught:
        adapt(tiny_next.model, tiny_next.processor)
    assert (
        str(caught.value)
        == "model type 'blip' is unknown; allowed: idefics3, internvl, llava, llava_next, llava_onevision, qwen2_5_vl, qwen2_vl, qwen3_vl, smolvlm"
    )


def test_sliding_windows_with_several_position_ids_are_refused(tiny_qwen, monkeypatch):
    config = tiny_qwen.model.model.language_model.config
    monkeypatch.setattr(config, "sliding_window", 4096, raising=False)
    monkeypatch.setattr(config, "layer_types", ["sliding_attention"] * tiny_qwen.layers)
    with pytest.raises(ValueError) as caught:
        adapt(tiny_qwen.model, tiny_qwen.processor)
    assert str(caught.value) == (
        "text_config.model_type = qwen2_5_vl_text with text_config.sliding_window = 4096: sliding-window attention is not "
        "supported with several position ids a token; set it to null where prompt and answer are shorter than the window"
    )


# --- cached features


def logits_of(vlm, encoded) -> tuple[list, list[torch.Tensor]]:
    with heard(vlm.model.lm_head) as logits:
        names = [f"photo {number}" for number in range(len(encoded))]
        batch = ImageBatch(encoded=encoded, names=names, questions=[[ASKED]] * len(encoded))
        answers = answer_encoded(vlm, batch, lambda layout: specify("nuwa", budget=20), MAX_NEW)
    return [mine[0] for mine in answers], logits


def through_a_file(encoded, folder, dtype) -> list[EncodedImage]:
    found = []
    for number, image in enumerate(encoded):
        path = folder / f"{number}.safetensors"
        save_file({name: value.to(dtype).contiguous() for name, value in image.signals.items()}, path)
        found.append(EncodedImage(image.layout, load_file(path)))
    return found


def test_cached_features_are_as_good_as_pixels(family, pictures, tmp_path, record_property):
    if isinstance(family, LlavaAdapter):  # here there is a trained model, whose answers are no toss of a coin
        family = LlavaAdapter.load(TESTBED)
    encoded = family.encode_images(pictures)
    answers, logits = logits_of(family, encoded)
    cached, same = logits_of(family, through_a_file(encoded, tmp_path, torch.float32))
    for one, other in zip(answers, cached, strict=True):
        assert (one.tokens, one.kept, one.kept_last) == (other.tokens, other.kept, other.kept_last)
    assert all(torch.equal(one, other) for one, other in zip(logits, same, strict=True)), "bit for bit"
    halved, near = logits_of(family, through_a_file(encoded, tmp_path, torch.float16))
    assert [one.tokens for one in halved] == [one.tokens for one in answers]
    largest = max((one - other).abs().max().item() for one, other in zip(logits, near, strict=True))
    spread = logits[0].std().item()
    record_property("largest logit difference with a float16 cache", largest)
    print(f"{type(family).__name__}: largest logit difference {largest:.2g}, standard deviation {spread:.2g}")
    assert 0 < largest < 0.05 * spread


# --- layers that stand elsewhere


def test_offloaded_layers_answer_alike(family, pictures):
    """Accelerate keeps every weight elsewhere and brings it when its layer runs, as with ``device_map`` and too little memory."""
    expected = ask(family, pictures[:3])
    model = accelerate.cpu_offload(copy.deepcopy(family.model), execution_device=torch.device("cpu"))
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    found = nuwa.generate(model, family.processor, pictures[:3], [ASKED] * 3, average_tokens=20, max_new_tokens=MAX_NEW)
    for one, other in itertools.zip_longest(found, expected):
        assert (one.tokens, one.kept, one.kept_last) == (other.tokens, other.kept, other.kept_last)


def test_a_folder_is_loaded_by_its_model_type_with_or_without_a_device_map(tiny_next, photos, tmp_path):
    tiny_next.model.save_pretrained(tmp_path)
    tiny_next.processor.save_pretrained(tmp_path)
    expected = ask(tiny_next, photos[:2], average_tokens=30)
    for options in ({}, {"attention": "eager"}, {"device_map": {"": "cpu"}}):
        vlm = load_adapter(tmp_path, **options)
        assert type(vlm) is type(tiny_next)
        found = ask(vlm, photos[:2], average_tokens=30)
        assert [one.tokens for one in found] == [one.tokens for one in expected]
        assert vlm.fingerprint() == tiny_next.fingerprint()
        assert not any(parameter.requires_grad for parameter in vlm.model.parameters())


# --- imports


def test_importing_the_package_is_light_and_generating_needs_no_pipeline():
    code = (
        "import sys, nuwa; assert 'torch' not in sys.modules; "
        "assert nuwa.generate.__name__ == 'generate'; "
        "heavy = {'ray', 'mlflow', 'dvc', 'pydantic', 'pipelines', 'stages', 'sklearn'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError):
        _ = nuwa.generation_of


# --- methods that were trained


def test_a_trained_method_knows_its_encoder(tiny_next, tiny_qwen, photos, tmp_path):
    torch.manual_seed(1)
    path = tmp_path / "lpm.safetensors"
    save_lpm(Lpm(32), path, tiny_next.encoder_identity, {})
    options = {"method": "learnpruner", "average_tokens": 30, "parameters": {"weights": str(path)}}
    (answer,) = ask(tiny_next, photos[:1], **options)
    assert set(answer.kept.roles) == {"pillar", "newline"}
    with pytest.raises(WeightsError) as caught:
        ask(tiny_qwen, photos[:1], **options)
    assert "were trained on encoder" in str(caught.value)


def test_an_encoders_weights_are_read_once_and_again_when_they_changed(tiny_next, photos, tmp_path, monkeypatch):
    model, read = copy.deepcopy(tiny_next.model), []
    vlm = adapt(model, tiny_next.processor)
    path = tmp_path / "lpm.safetensors"
    save_lpm(Lpm(32), path, vlm.encoder_identity, {})
    options = {"method": "learnpruner", "average_tokens": 30, "parameters": {"weights": str(path)}}
    whole = Adapter.encoder_fingerprint
    monkeypatch.setattr(Adapter, "encoder_fingerprint", lambda *one: read.append(1) or whole(*one))
    first, again = (ask(vlm, photos[:1], **options) for _ in range(2))
    assert [one.tokens for one in first] == [one.tokens for one in again] and len(read) == 1

    vlm.tower.load_state_dict(vlm.tower.state_dict())  # written to, with what was there
    ask(vlm, photos[:1], **options)
    assert len(read) == 2
    with torch.no_grad():
        next(vlm.tower.parameters()).mul_(2)
    with pytest.raises(WeightsError, match="were trained on encoder"):
        ask(vlm, photos[:1], **options)


def test_the_released_settings_for_qwen(tiny_qwen, photos):
    """After layer 14 of 28, 0.42 of stage 1, nine tokens in ten untouched."""
    schedule = specify("nuwa", preset="released_qwen", budget=144).schedule(PatchGrid(24, 24), 28)
    ((layer, keep),) = schedule.cuts
    assert layer == 15 and keep == pytest.approx(0.42 * schedule.stage1_keep, abs=1)
    for one in ask(tiny_qwen, photos[:4], average_tokens=None, retention=0.5, preset="released_qwen"):
        assert 1 <= one.kept.roles.count("collector") <= 0.1 * len(one.kept.roles) + 1
