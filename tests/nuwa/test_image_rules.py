"""Pixel limits and layouts as protocols pin them: token counts typed out from the harnesses' own runs."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from nuwa.grid import PatchGrid
from nuwa.image_rules import PINS, ImageRules, ImageRulesError
from nuwa.vlm import adapt, adapter_class, usual_image_processor
from nuwa.vlm.processors import check_torchvision, load_processor
from nuwa.vlm.shapes import model_shape

QWEN, NEXT = "Qwen/Qwen2.5-VL-7B-Instruct", "llava-hf/llava-v1.6-vicuna-7b-hf"
QWEN2, QWEN3 = "Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"


def layout(path: str, rules: ImageRules, size: tuple[int, int]):
    config = model_shape(path)
    processor = rules.framed(usual_image_processor(config), config.model_type)
    return adapter_class(config.model_type).layout_for(config, processor, size)


def seen(path: str, rules: ImageRules, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of what the model sees."""
    config = model_shape(path)
    processor = rules.framed(usual_image_processor(config), config.model_type)
    return adapter_class(config.model_type).seen_size(config, processor, size)


# Photo, what lmms-eval 0.7.3 makes of it for Qwen2-VL and Qwen3-VL, typed out from its own calls: qwen_vl_utils 0.0.14's
# fetch_image, then transformers' processor with what its class hands over. Behind them what the checkpoint's own limits make.
BY_THE_HARNESS = [
    ((250, 200), (252, 196), (256, 192), (252, 196), (288, 256)),
    ((300, 200), (308, 196), (288, 192), (308, 196), (320, 224)),
    ((96, 96), (84, 84), (96, 96), (84, 84), (256, 256)),
    ((640, 480), (644, 476), (640, 480), (644, 476), (640, 480)),
    ((1280, 720), (1008, 560), (1280, 704), (1288, 728), (1280, 704)),
    ((4000, 3000), (896, 672), (4000, 3008), (4004, 2996), (4000, 3008)),
    ((40, 1000), (28, 1008), (32, 992), (28, 1008), (64, 1280)),
    ((10, 300), (28, 308), (32, 288), (28, 308), (64, 1408)),
    ((13, 13), (56, 56), (64, 64), (56, 56), (256, 256)),
    ((8000, 6000), (896, 672), (4704, 3520), (4116, 3080), (4704, 3520)),
    ((28, 20), (84, 56), (96, 64), (84, 56), (320, 224)),
]


@pytest.mark.parametrize(("photo", "second", "third", "own_second", "own_third"), BY_THE_HARNESS)
def test_qwen2_and_qwen3_see_what_the_harness_shows_them(photo, second, third, own_second, own_third):
    harness, usual = ImageRules("lmms_eval"), ImageRules()
    assert (seen(QWEN2, harness, photo), seen(QWEN3, harness, photo)) == (second, third)
    assert (seen(QWEN2, usual, photo), seen(QWEN3, usual, photo)) == (own_second, own_third)


@pytest.mark.parametrize(
    ("path", "rules", "photo", "size"),
    [
        (QWEN2, ImageRules(min_pixels=200_704), (250, 200), (504, 420)),
        (QWEN2, ImageRules("lmms_eval", min_pixels=200_704), (250, 200), (504, 420)),
        (QWEN2, ImageRules("lmms_eval", min_pixels=200_704), (4000, 3000), (896, 672)),  # the most is as pinned
        (QWEN2, ImageRules("lmms_eval", max_pixels=12_845_056), (4000, 3000), (4004, 2996)),
        (QWEN2, ImageRules(max_pixels=100_352), (4000, 3000), (364, 252)),
        # As the harness' other class of Qwen3-VL does it, by its own call.
        (QWEN3, ImageRules("lmms_eval", 200_704, 1_605_632), (250, 200), (512, 416)),
        (QWEN3, ImageRules(min_pixels=200_704, max_pixels=1_605_632), (4000, 3000), (1440, 1088)),
    ],
)
def test_limits_of_ones_own_hold_for_every_qwen_beside_a_protocols_too(path, rules, photo, size):
    assert seen(path, rules, photo) == size


@pytest.mark.parametrize(
    ("rules", "tokens"),
    [
        (ImageRules(), 63),
        (ImageRules("vscan"), 63),
        (ImageRules("lmms_eval"), 285),  # two resizes, see below
        (ImageRules("lmms_eval_0_3"), 270),
        (ImageRules("lmms_eval_0_3", min_pixels=3136), 63),
        (ImageRules(min_pixels=200_704), 270),
    ],
)
def test_a_small_photo_is_shown_larger_by_the_harness(rules, tokens):
    assert layout(QWEN, rules, (250, 200)).tokens == tokens


def test_two_resizes_end_at_another_size_than_one():
    """The chat class of lmms-eval 0.7.2 resizes by the checkpoint's limits and then by its own."""
    views = {name: layout(QWEN, ImageRules(name), (300, 200)).views[0].grid for name in ("lmms_eval", "lmms_eval_0_3")}
    sizes = {name: (28 * grid.width, 28 * grid.height) for name, grid in views.items()}
    assert sizes == {"lmms_eval": (588, 364), "lmms_eval_0_3": (560, 392)}


def test_large_photos_meet_the_upper_limit():
    def pixels(name: str) -> int:
        return 784 * layout(QWEN, ImageRules(name), (4000, 3000)).tokens

    assert pixels("lmms_eval") <= 1_605_632 < pixels("testbed") <= 12_845_056
    assert pixels("vscan") == pixels("testbed"), "both are the checkpoint's"


@pytest.mark.parametrize(
    ("size", "transformers", "llava"),
    [
        ((300, 200), 1464, 976),  # both sides at most 336: two pinpoints fit alike
        ((200, 300), 576 + 24 * 17, 576 + 36 * 25),
        ((336, 336), 576 + 24 * 25, 576 + 24 * 25),
        ((640, 480), 576 + 36 * 49, 576 + 36 * 49),
        ((672, 336), 576 + 24 * 49, 576 + 24 * 49),
    ],
)
def test_llavas_grid_stands_upright_on_small_images(size, transformers, llava):
    assert layout(NEXT, ImageRules(), size).tokens == layout(NEXT, ImageRules(grid="transformers"), size).tokens
    assert layout(NEXT, ImageRules(), size).tokens == transformers
    for rules in (ImageRules(grid="llava"), ImageRules("lmms_eval"), ImageRules("llava"), ImageRules("lmms_eval_0_3")):
        assert layout(NEXT, rules, size).tokens == llava
    assert layout(NEXT, ImageRules("lmms_eval", grid="transformers"), size).tokens == transformers


def crops_of(size: tuple[int, int]) -> int:
    """Crops of LLaVA's own choice, from its rule: of pinpoints (width, height) the one that keeps most pixels of the image,
    then wastes least, then stands first."""
    width, height = size
    best, most, least = (0, 0), -1, float("inf")
    for across, down in [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]:
        scale = min(across / width, down / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = across * down - kept
        if kept > most or (kept == most and wasted < least):
            best, most, least = (across, down), kept, wasted
    return best[0] // 336 * (best[1] // 336)


def test_sixty_sizes_lie_as_the_harnesses_lay_them():
    """``layouts.json`` says by whose functions its values were made."""
    table = json.loads((Path(__file__).parent / "layouts.json").read_text(encoding="utf-8"))
    small = 0
    for photo, llava, stock, *seen_by_qwen in table["rows"]:
        size = tuple(photo)
        assert layout("llava-hf/llava-1.5-7b-hf", ImageRules("lmms_eval"), size).tokens == 576

        # The overview, then the local grid, every row of which ends in a newline.
        rows, columns = llava or (0, 0)
        for protocol in ("llava", "lmms_eval", "lmms_eval_0_3"):
            found = layout(NEXT, ImageRules(protocol), size)
            local = [(view.grid.height, view.grid.width) for view in found.views[1:]]
            assert local == ([(rows, columns)] if llava else []), (size, protocol)
            assert [view.crops for view in found.views[1:]] == ([crops_of(size)] if llava else []), (size, protocol)
            assert found.tokens == 576 + rows * (columns + 1), (size, protocol)
        if stock is None:
            with pytest.raises(ValueError, match=r"^so tall that no column"):
                layout(NEXT, ImageRules(), size)
        else:
            assert layout(NEXT, ImageRules(), size).tokens == stock, size
            small += stock != found.tokens

        for protocol, (width, height) in zip(table["columns"][3:], seen_by_qwen, strict=True):
            assert seen(QWEN, ImageRules(protocol), size) == (width, height), (size, protocol)
            assert layout(QWEN, ImageRules(protocol), size).tokens == width * height // 28**2
    assert (len(table["rows"]), small) == (60, 19)


@pytest.mark.parametrize(
    ("rules", "family", "message"),
    [
        (ImageRules(min_pixels=9), "llava", "min_pixels is not for llava models; allowed: null"),
        (ImageRules(max_pixels=9), "llava_next", "max_pixels is not for llava_next models; allowed: null"),
        (ImageRules(grid="llava"), "qwen2_5_vl", "image_grid 'llava' is not for qwen2_5_vl models; allowed: null"),
        (
            ImageRules("lmms_eval", min_pixels=2_000_000),
            "qwen2_5_vl",
            "min_pixels 2000000 must not be above max_pixels 1605632",
        ),
    ],
)
def test_rules_that_a_family_does_not_have_are_refused(rules, family, message):
    paths = {"qwen2_5_vl": QWEN, "llava_next": NEXT, "llava": "llava-hf/llava-1.5-7b-hf"}
    with pytest.raises(ImageRulesError) as caught:
        rules.framed(usual_image_processor(model_shape(paths[family])), family)
    assert str(caught.value) == message


def test_nobody_elses_processor_is_changed():
    config = model_shape(QWEN)
    processor = usual_image_processor(config)
    before = copy.deepcopy(processor.to_dict())
    framed = ImageRules("lmms_eval").framed(processor, "qwen2_5_vl")
    assert processor.to_dict() == before and framed.to_dict() != before
    assert ImageRules().framed(processor, "qwen2_5_vl") is processor
    assert ImageRules("lmms_eval").framed(processor, "llava") is processor, "nothing is pinned for LLaVA-1.5"
    assert set(PINS) == {"testbed", "lmms_eval", "lmms_eval_0_3", "llava", "vscan"}


@pytest.mark.parametrize(
    ("path", "family"), [(QWEN, "qwen2_5_vl"), (QWEN2, "qwen2_vl"), (QWEN3, "qwen3_vl"), (NEXT, "llava_next")]
)
def test_rules_that_hold_already_change_nothing_more(path, family):
    rules = ImageRules("lmms_eval")
    once = rules.framed(usual_image_processor(model_shape(path)), family)
    assert rules.framed(once, family).to_dict() == once.to_dict()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def test_the_encoder_sees_what_the_layout_says(family, tiny_qwen, tiny_qwen2, tiny_qwen3):
    """Both steps of the harness, on pictures: as many tokens as planned, and another identity of the encoder."""
    tiny = {"qwen2_5_vl": tiny_qwen, "qwen2_vl": tiny_qwen2, "qwen3_vl": tiny_qwen3}[family]
    limits = {"min_pixels": 28 * 28 * 16, "max_pixels": 28 * 28 * 40}
    plain, framed = (
        adapt(tiny.model, tiny.processor, image_rules=rules)
        for rules in (ImageRules(), ImageRules("lmms_eval", **limits))
    )
    image = Image.effect_noise((90, 61), 60).convert("RGB")
    (encoded,) = framed.encode_images([image])
    assert encoded.layout == framed.layout_of(image.size) != plain.layout_of(image.size)
    assert torch.isfinite(encoded.signals["features"]).all()
    assert framed.encoder_identity != plain.encoder_identity


def test_the_encoder_cuts_padding_away_as_llava_does(tiny_next):
    """55 rows at 6/22 are 15, and just below it as floats: LLaVA truncates to 14, transformers rounds first."""
    image = Image.effect_noise((22, 55), 60).convert("RGB")
    framed = adapt(tiny_next.model, tiny_next.processor, image_rules=ImageRules("llava"))
    rounding = copy.copy(framed.processor)  # the same crops, their padding cut away by transformers
    rounding.image_processor = copy.copy(rounding.image_processor)
    rounding.image_processor.grid = None

    encoded, rounded = (one.encode_images([image])[0] for one in (framed, adapt(tiny_next.model, rounding)))
    assert encoded.layout == framed.layout_of(image.size)
    assert [one.layout.views[1].grid for one in (encoded, rounded)] == [PatchGrid(14, 6), PatchGrid(16, 6)]
    local, wider = (one.signals["features"][6 * 6 :].unflatten(0, (-1, 6)) for one in (encoded, rounded))
    assert torch.equal(local, wider[1:-1])


def test_a_torchvision_of_another_build_is_one_line(tmp_path, monkeypatch):
    """As PyPI's wheel fails beside a torch for CPUs alone."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    check_torchvision()  # none, or a sound one
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(ImageRulesError) as caught:
        check_torchvision()
    assert str(caught.value) == (
        f"torchvision is installed, but not for this torch ({torch.__version__}): operator torchvision::nms does not exist; "
        "install the wheel of the same build, or uninstall it where no model needs it"
    )


def test_torchvision_is_refused_where_it_is_not_installed(tmp_path):
    with pytest.raises(
        ImageRulesError, match=r"^image_backend 'torchvision' needs torchvision, which is not installed"
    ):
        load_processor(tmp_path, "torchvision")
