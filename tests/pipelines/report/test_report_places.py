"""Kept tokens over images of any shape: where the encoder looked, by the processor's own pixels, and what is drawn there."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextConfig, Qwen2_5_VLConfig
from transformers.models.llava_next.modeling_llava_next import unpad_image

from nuwa.image_rules import ImageRules
from nuwa.vlm import adapt, adapter_class, usual_image_processor
from pipelines.data.datasets import parse_name
from pipelines.report.browser import questions
from pipelines.report.gallery import COLLECTOR, GAP, PILLAR, TRUTH, gallery, predicted_box
from pipelines.report.inputs import ReportInputs
from pipelines.report.outcomes import Outcomes
from pipelines.report.page import build_report
from pipelines.report.places import places_of, places_of_model

FINE = 10_000  # pixels of a canvas on which rounding is of no account


def ramp(width: int, height: int) -> Image.Image:
    """Red tells how far right a pixel is, green how far down, and blue that it is of the image and no padding."""
    across = (np.arange(width) + 0.5) / width * np.ones((height, 1))
    down = (np.arange(height)[:, None] + 0.5) / height * np.ones(width)
    pixels = np.stack([across, down, np.ones((height, width))], axis=-1)
    return Image.fromarray((255 * pixels).round().astype(np.uint8))


def shown(pixels: torch.Tensor, processor) -> torch.Tensor:
    """Normalised ``(..., 3, height, width)`` back to shares of 255."""
    mean, std = (torch.tensor(getattr(processor, name))[:, None, None] for name in ("image_mean", "image_std"))
    return pixels * std + mean


def next_tokens(config, processor, image: Image.Image) -> list[torch.Tensor]:
    """What each token of the base view and of the local grid was made of, ``(3, tokens)``, as the stock model sorts it."""
    pixels = shown(processor([image], return_tensors="pt")["pixel_values"][0], processor)
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    best = max(
        config.image_grid_pinpoints,
        key=lambda point: (
            min(image.width * image.height, (_scale(image, point) ** 2) * image.width * image.height),
            -point[0] * point[1],
        ),
    )
    rows, columns = (extent // side for extent in best)
    assert len(pixels) == 1 + rows * columns
    whole = pixels[1:].view(rows, columns, 3, side, side).permute(2, 0, 3, 1, 4).reshape(3, rows * side, columns * side)
    base, local = (torch.nn.functional.avg_pool2d(part, patch) for part in (pixels[0], whole))
    return [base.flatten(1), unpad_image(local, (image.height, image.width)).flatten(1)]


def _scale(image: Image.Image, point: list[int]) -> float:
    return min(point[1] / image.width, point[0] / image.height)


def qwen_tokens(config, processor, image: Image.Image) -> list[torch.Tensor]:
    vision = config.vision_config
    flat = processor([image], return_tensors="pt")["pixel_values"]
    patches = flat.view(-1, vision.spatial_merge_size**2, 3, vision.temporal_patch_size, vision.patch_size**2)
    return [shown(patches.mean(dim=(1, 3, 4)).T[..., None], processor)[..., 0]]


# Of the last four the grid without padding ends half a cell outside the image, or within it.
SIZES = [(640, 480), (480, 640), (500, 500), (1000, 292), (1000, 291), (292, 1000), (291, 1000)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("make", "tokens"), [(LlavaNextConfig, next_tokens), (Qwen2_5_VLConfig, qwen_tokens)])
def test_a_token_is_drawn_where_the_encoder_looked(make, tokens, size):
    """The slow way: a picture whose colours say where they are, cut up by the model's own processor."""
    config = make()
    processor, family = usual_image_processor(config), adapter_class(config.model_type)
    places = places_of(family.layout_for(config, processor, size), config, size)
    found = tokens(config, processor, ramp(*size))
    assert len(found) == len(places.layout.views) == len(places.frames)
    for number, (made, view) in enumerate(zip(found, places.layout.views, strict=True)):
        cells = places.cells(number, FINE, FINE) / FINE
        assert made.shape[1] == len(cells) == view.grid.tokens
        inside = (made[2] > 0.999).numpy()
        assert inside.mean() > 0.85
        whole = cells[:, 2:] - cells[:, :2]
        cell = whole.max(axis=0)
        middle = (cells[:, :2] + cells[:, 2:]) / 2
        apart = np.abs(made[:2].T.numpy() - middle) / cell
        assert apart[inside].max() < 0.2  # a pixel of padding and eight bits of colour
        assert np.allclose(whole[inside], cell, rtol=0.01)
        if number == 0:  # one crop, or the only grid, covers the image
            assert (cells[0, :2] == 0).all() and (cells[-1, 2:] == 1).all() and inside.all()


FLAT = (200, 40, 120)
FADED = tuple(round(0.2 * value + 0.8 * 255) for value in FLAT)
# Width and height in pixels of a tiny model; its crops and grids divide them.
SHAPES = {"wide": (60, 40), "tall": (40, 60), "square": (48, 48)}


@pytest.fixture
def drawn(synthetic, tmp_path, request):
    """One flat image of a shape under Nüwa and Random: ``(layout, kept, pillar, last)`` of both and the drawn case."""

    def make(vlm, size, box=None):
        width, height = size
        run = synthetic(images=1, pictures=lambda _: np.full((height, width, 3), FLAT, np.uint8))
        run.add("nuwa", "released", "pesp", 16, (0.5, 0.9), ("main",), layer=4, scorer="attention_last_token")
        run.add("random", "default", "pesp", 16, (0.5, 0.9), ("main",))
        layout = vlm.layout_of(size)
        rng, chosen = np.random.default_rng(3), {}
        for trial in run.trials:
            trial |= {"image_grid": None, "image_tokens": layout.tokens}
            kept = np.sort(rng.permutation(layout.tokens)[: layout.tokens // 2])
            pillar = rng.random(len(kept)) < 0.5 if trial["method"] == "nuwa" else np.ones(len(kept), bool)
            last = kept[::3] if trial["method"] == "nuwa" else kept
            chosen[trial["trial_id"]] = kept, pillar, last
        for row in run.kept:
            row["indices"], row["pillar"], _ = chosen[row["trial_id"]]
        for example in run.examples:
            example |= {"width": width, "height": height}
            truth = json.loads(example["truth"])
            if box is not None and "box" in truth:
                example["truth"] = json.dumps({"box": box})
        truths = {example["example_id"]: json.loads(example["truth"]) for example in run.examples}
        for row in run.predictions:
            row["kept_final"] = chosen[row["trial_id"]][2]
            truth = truths[row["example_id"]]
            right = "box" in truth and (box is None or row["trial_id"] == run.trials[1]["trial_id"])
            row["prediction"] = json.dumps(truth["box"]) if right else "none"
        data = run.write(tmp_path / "data")
        inputs = ReportInputs.load(data, places=lambda asked: places_of(vlm.layout_of(asked), vlm.model.config, asked))
        (case,) = gallery(inputs, Outcomes(inputs), 16)
        nuwa, random = (chosen[trial["trial_id"]] for trial in run.trials[1:])
        return layout, (nuwa, random), case, inputs

    return make


def pixels_of(picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.png)), dtype=int)


def walk(layout, width, height):
    """Every slot in order with its view and cell ``(left, top, right, bottom)`` in its panel; no cell: a newline."""
    slot = 0
    for number, view in enumerate(layout.views):
        scale = 1.0 if number == len(layout.views) - 1 else 0.5
        across, down = (
            [round(scale * extent * at / count) for at in range(count + 1)]
            for extent, count in ((width, view.grid.width), (height, view.grid.height))
        )
        for row in range(view.grid.height):
            for column in range(view.grid.width):
                yield slot, number, (across[column], down[row], across[column + 1], down[row + 1])
                slot += 1
            if view.newline:
                yield slot, number, None
                slot += 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("model", ["tiny_next", "tiny_qwen"])
def test_kept_tokens_stay_and_dropped_ones_fade_at_their_places(drawn, request, model, shape):
    layout, (nuwa, random), case, _ = drawn(request.getfixturevalue(model), SHAPES[shape])
    width, height = case.pictures[0].size
    assert (width > height, width < height) == (shape == "wide", shape == "tall")
    assert width * SHAPES[shape][1] == height * SHAPES[shape][0]
    several = len(layout.views) > 1
    small = (width + GAP, 0) if shape == "tall" else (0, height + GAP)
    sheet = (small[0] + width // 2, height) if shape == "tall" else (width, small[1] + height // 2)
    for picture, (kept, pillar, last) in zip(case.pictures[1:], (nuwa, random), strict=True):
        pixels = pixels_of(picture)
        assert picture.size == pixels.shape[1::-1] == (sheet if several else (width, height))
        assert picture.tokens == (
            f"{len(kept)} tokens" if len(kept) == len(last) else f"{len(kept)} → {len(last)} tokens"
        )
        roles = dict(zip(kept.tolist(), pillar.tolist(), strict=True))
        seen = 0
        for slot, view, cell in walk(layout, width, height):
            seen += 1
            if cell is None:
                continue
            left, top, right, bottom = cell
            if view < len(layout.views) - 1:
                left, top, right, bottom = left + small[0], top + small[1], right + small[0], bottom + small[1]
            inner = pixels[top + 2 : bottom - 2, left + 2 : right - 2]
            assert tuple(inner[0, 0]) == (FLAT if slot in roles else FADED)
            middle = tuple(pixels[(top + bottom) // 2, (left + right) // 2])
            if slot not in roles:
                assert (pixels[top:bottom, left:right] == FADED).all()
            elif picture is case.pictures[2]:  # nothing merged and nothing dropped later: plain
                assert (pixels[top:bottom, left:right] == FLAT).all()
            else:
                assert tuple(pixels[top, left]) == (PILLAR if roles[slot] else COLLECTOR)
                assert middle == ((255, 255, 255) if slot in last else FLAT)
        assert seen == layout.tokens


def test_tiles_lie_side_by_side_in_one_picture_and_the_thumbnail_beside_it(drawn, tiny_internvl):
    """Two tiles of 3 x 3 tokens and the thumbnail's 3 x 3."""
    layout, (_, (kept, *_)), case, inputs = drawn(tiny_internvl, (48, 24))
    assert len(layout.views) == case.views == 3
    assert case.pictures[0].size == (288, 144) and case.pictures[2].size == (288, 144 + GAP + 72)
    pixels = pixels_of(case.pictures[2])
    for slot in range(layout.tokens):
        view, (row, column) = slot // 9, divmod(slot % 9, 3)
        left, top, height = (144 * view + 48 * column, 48 * row, 48)
        if view == 2:
            left, top, height = 48 * column, 144 + GAP + 24 * row, 24
        assert (pixels[top : top + height, left : left + 48] == (FLAT if slot in kept else FADED)).all()

    for one in questions(inputs, Outcomes(inputs), 16):  # these show the tiles alone
        (answer,) = [answer for answer in one.answers if answer.trial.startswith("Random")]
        covered = {
            (int(left) // 8 + step, int(top) // 8)
            for left, top, width, _ in re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)h-\d+z", answer.dropped)
            for step in range(int(width) // 8)
        }
        places = {(slot // 9 * 3 + slot % 3, slot % 9 // 3) for slot in range(18) if slot not in kept}
        assert one.size == (48, 24) and covered == places


@pytest.mark.parametrize(
    ("benchmark", "told"),
    [
        ("refcoco/val", "[0.25, 0.5, 0.75, 1.0]"),
        ("refcoco/val:pixels", '{"bbox_2d": [20, 20, 60, 40]}'),
        ("refcoco/val:thousandths", '{"bbox_2d": [250, 500, 750, 1000]}'),
        ("refcoco/val:ref_tags", "<ref>a cup</ref><box>[[250, 500, 750, 1000]]</box>"),
        ("refcoco/val:unpadded", "[0.25, 0.5, 0.75, 0.75]"),
    ],
)
def test_a_box_is_drawn_where_the_benchmark_reads_it(benchmark, told):
    """Of a photo of 80 x 40 pixels; who scores it says it is the true one."""
    truth = {"box": [0.25, 0.5, 0.75, 1.0]}
    truth |= {"size": [80, 40]} if "pixels" in benchmark else {"padded": [80, 40]} if "unpadded" in benchmark else {}
    assert predicted_box(told, json.dumps(truth), benchmark) == truth["box"]
    assert parse_name(benchmark).score(told, truth)["iou"] == 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_keep_their_shares_of_both_sides(drawn, tiny_next, shape):
    box = [0.25, 0.5, 0.75, 0.75]
    _, _, case, _ = drawn(tiny_next, SHAPES[shape], box)
    assert case.pictures[1].answer == "IoU 1.00" and case.pictures[2].answer == "no box: none"
    width, height = case.pictures[0].size
    pixels = pixels_of(case.pictures[0])
    for x, y in ((0.25, 0.6), (0.75, 0.6), (0.5, 0.5), (0.5, 0.75)):
        assert tuple(pixels[round(y * height), round(x * width)]) == TRUTH
    assert tuple(pixels[round(0.6 * height), round(0.5 * width)]) == FLAT


@pytest.mark.parametrize("model", ["tiny_next", "tiny_qwen"])
def test_the_page_explains_two_views_where_there_are_two(drawn, request, tmp_path, model):
    *_, inputs = drawn(request.getfixturevalue(model), SHAPES["wide"])
    build_report(inputs, tmp_path / "report", 16)
    for name in ("index.html", "report.md"):
        text = (tmp_path / "report" / name).read_text()
        assert ("newline tokens are counted but have no place" in text) == (model == "tiny_next")


def test_without_places_no_tokens_of_dynamic_layouts_are_drawn(drawn, tiny_qwen, tmp_path):
    drawn(tiny_qwen, SHAPES["tall"])
    inputs = ReportInputs.load(tmp_path / "data")
    assert gallery(inputs, Outcomes(inputs), 16) == []


def test_places_come_from_a_saved_models_configuration(tiny_next, tmp_path):
    tiny_next.model.config.save_pretrained(tmp_path)
    tiny_next.processor.save_pretrained(tmp_path)
    for size in ((60, 41), (31, 70)):
        assert places_of_model(str(tmp_path), ImageRules(), size) == places_of(
            tiny_next.layout_of(size), tiny_next.model.config, size
        )


@pytest.mark.parametrize(
    ("model", "rules", "size"),
    [
        ("tiny_qwen", ImageRules(min_pixels=28 * 28 * 16, max_pixels=28 * 28 * 40), (60, 41)),
        ("tiny_next", ImageRules(grid="llava"), (18, 12)),
    ],
)
def test_places_follow_the_runs_image_rules(model, rules, size, request, tmp_path):
    """Pixel limits and grids of crops: as the sweep lays an image out, and over the picture from edge to edge."""
    plain = request.getfixturevalue(model)
    plain.model.config.save_pretrained(tmp_path)
    plain.processor.save_pretrained(tmp_path)
    layout = adapt(plain.model, plain.processor, image_rules=rules).layout_of(size)
    assert layout != plain.layout_of(size)

    places = places_of_model(str(tmp_path), rules, size)
    assert places.layout == layout
    for frame in places.frames:
        assert (frame.left, frame.width) == (0, 1)  # an image that is wider than its grid fills it across
        assert 0.9 < frame.height < 1.5 and abs(frame.top + frame.height / 2 - 0.5) < 1e-9
