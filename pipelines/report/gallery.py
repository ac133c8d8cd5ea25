"""The gallery: a few test images with the tokens that several trials kept and the answers they gave.

Where a model sees an image in several views, its crops (LLaVA-NeXT's local grid, InternVL3's tiles) are drawn large in one
picture, the view of the whole small beside it.

Cases are chosen by rule from the examples that every shown trial answered. Boxes: two that Nüwa gets right and
others miss, two the other way round; questions: two with the most different answers. Ties fall to the lower example id.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
from PIL import Image, ImageDraw

from nuwa.benchmarks.boxes import parse_box, unpad_box
from nuwa.benchmarks.grounding import FRAME, ON_FRAME
from nuwa.grid import PatchGrid
from nuwa.images import read_image
from pipelines.data.datasets import parse_name
from pipelines.data.image_keys import shows_several
from pipelines.report.inputs import ReportInputs
from pipelines.report.outcomes import Outcomes, TrialRow
from pipelines.report.places import Size, TokenPlaces
from pipelines.report.style import benchmark_name

SHOWN = (
    ("nuwa", "pesp"), ("visionzip", "perc"), ("visionzip", "rpme"), ("learnpruner", "pesp"), ("random", "pesp"),
    ("fastv", "pesp"), ("divprune", "pesp"), ("uniform", "pesp"),
)  # fmt: skip
MOST_TRIALS = 5
BOX_CASES, ANSWER_CASES = 2, 2
SIDE = 288  # pixels of a picture's longer side, about
SMALL, GAP = 0.5, 6  # scale of the other views, and pixels around them
FINE = 12  # pixels of a patch, below which outlines are thin
FADE, PAPER = 0.80, 255  # dropped patches: this share of the way to white
TRUTH, ANSWER = (255, 255, 255), (255, 92, 0)
PILLAR, COLLECTOR, CASING = (86, 180, 233), (240, 228, 66), (20, 20, 22)


@dataclass(frozen=True)
class Picture:
    """``png`` shows one trial's patches and box over the image; ``tokens`` and ``answer`` belong under it. ``size``: its
    width and height."""

    title: str
    tokens: str
    answer: str
    right: bool
    png: bytes
    size: Size


@dataclass(frozen=True)
class Case:
    """``views``: how many the model has of the image."""

    example_id: str
    benchmark: str
    question: str
    truth: str
    views: int
    pictures: list[Picture]


@dataclass(frozen=True)
class _Answers:
    """All that the shown trials have to say on the examples they share: one row an example, one column a trial."""

    trials: list[TrialRow]
    examples: pd.DataFrame
    texts: pd.DataFrame
    last: pd.DataFrame  # slots alive in the last layer


def gallery(inputs: ReportInputs, outcomes: Outcomes, budget: float) -> list[Case]:
    """Up to six cases on different images; none where it is not known where tokens lie, or no trial can be shown."""
    places = places_on_images(inputs, outcomes)
    trials = _shown_trials(outcomes, budget)
    if not trials or places is None:
        return []
    answers = _answers(inputs, trials, square=not outcomes.dynamic)
    chosen = _choose(answers)
    images = rows_of(inputs.images, "image", {answers.examples.at[name, "image"] for name in chosen})
    encoded = {row["image"]: row["bytes"] for row in images.to_dict("records")}
    kept = kept_rows(inputs, trials, set(encoded))
    return [_case(outcomes, answers, name, encoded, kept, places) for name in chosen]


def places_on_images(inputs: ReportInputs, outcomes: Outcomes) -> Callable[[Size], TokenPlaces] | None:
    """Where tokens lie in an image of a size; null where that is not known."""
    return inputs.places if outcomes.dynamic else _on_one_grid(inputs.trials["image_grid"].iloc[0])


def _on_one_grid(grid: str) -> Callable[[Size], TokenPlaces] | None:
    """A square grid over square images, the same for all."""
    height, width = map(int, grid.split("x"))
    return None if height != width else lambda size: TokenPlaces.of_grid(PatchGrid(height, width))


def _shown_trials(outcomes: Outcomes, budget: float) -> list[TrialRow]:
    """The first trials of ``SHOWN`` at this budget, in that order; a method's first preset."""
    at_budget = outcomes.at_budget(budget)
    choices = [
        next((trial for trial in at_budget if (trial.method, trial.position) == wanted), None) for wanted in SHOWN
    ]
    return [trial for trial in choices if trial is not None][:MOST_TRIALS]


def rows_of(dataset: ds.Dataset, column: str, values: set[str]) -> pd.DataFrame:
    """Rows whose ``column`` is one of ``values``."""
    return dataset.to_table(filter=one_of(column, values)).to_pandas()


def one_of(column: str, values: Iterable[str]) -> ds.Expression:
    """Whether ``column`` is one of ``values``, which may be none: Arrow does not see that these would be texts."""
    return ds.field(column).isin(pa.array(sorted(values), pa.string()))


def _answers(inputs: ReportInputs, trials: list[TrialRow], square: bool) -> _Answers:
    """``square``: only on square images; on others one fixed grid's place depends on the model's own padding."""
    ids = [trial.trial_id for trial in trials]
    # Where tokens lie is known on an image, not on several of one question.
    alone = ~inputs.examples["image"].map(shows_several)
    examples = inputs.examples[alone].set_index("example_id")
    if square:
        examples = examples[examples["width"] == examples["height"]]
    rows = rows_of(inputs.predictions, "trial_id", set(ids))
    texts = rows.pivot(index="example_id", columns="trial_id", values="prediction").reindex(columns=ids).dropna()
    last = rows.pivot(index="example_id", columns="trial_id", values="kept_final")
    shared = sorted(set(texts.index) & set(examples.index))
    return _Answers(trials, examples.loc[shared], texts.loc[shared], last.loc[shared])


def _choose(answers: _Answers) -> list[str]:
    """Example ids; every image at most once."""
    scores = {
        name: [_score(example.benchmark, text, example.truth) for text in answers.texts.loc[name]]
        for name, example in answers.examples[answers.examples["family"] == "grounding"].iterrows()
    }
    overlaps = {name: [score["iou"] for score in of_method] for name, of_method in scores.items()}
    lead = {name: ious[0] - float(np.mean(ious[1:] or [0.0])) for name, ious in overlaps.items()}
    right = {
        name: [_is_right(answers.examples.at[name, "benchmark"], score) for score in of_method]
        for name, of_method in scores.items()
    }
    won = [name for name, marks in right.items() if marks[0] and not all(marks)]
    lost = [name for name, marks in right.items() if not marks[0] and any(marks)]
    questions = answers.examples.index[answers.examples["family"] == "vqa"]
    variety = {name: len({text.strip().lower() for text in answers.texts.loc[name]}) for name in questions}

    rankings = (
        (sorted(won, key=lambda name: (-lead[name], name)), BOX_CASES),
        (sorted(lost, key=lambda name: (lead[name], name)), BOX_CASES),
        (sorted(variety, key=lambda name: (-variety[name], name)), ANSWER_CASES),
    )
    chosen: list[str] = []
    images: set[str] = set()
    for ranking, count in rankings:
        wanted = len(chosen) + count
        for name in ranking:
            image = answers.examples.at[name, "image"]
            if len(chosen) < wanted and image not in images:
                chosen.append(name)
                images.add(image)
    return chosen


def _score(benchmark: str, text: str, truth: str) -> dict[str, float]:
    rules, told = parse_name(benchmark), json.loads(truth)
    if rules.graded is not None and rules.graded(text, told):
        return {}  # a judge's word stands in no table
    return rules.score(text, told)


def _is_right(benchmark: str, score: dict[str, float]) -> bool:
    return score.get(parse_name(benchmark).right, 0) >= 0.5  # a benchmark without a judge knows no right answer


def true_box(truth: str) -> list[float]:
    """In shares of the image."""
    return json.loads(truth)["box"]


def predicted_box(text: str, truth: str, benchmark: str) -> list[float] | None:
    """As the benchmark reads it: in pixels where the truth carries a size, on a frame of its own where it asks for that, else
    in shares of the image or of the square it is padded to."""
    told = json.loads(truth)
    size = FRAME if parse_name(benchmark).variant in ON_FRAME else told.get("size")
    box = parse_box(text, "pixels" if size else "normalized", tuple(size) if size else None)
    return unpad_box(box, tuple(told["padded"])) if box and "padded" in told else box


def accepted(truth: str) -> list[str]:
    """The answers of a question, most frequent first."""
    decoded = json.loads(truth)
    answers = decoded.get("answers") or [decoded["answer"]]
    return sorted(dict.fromkeys(map(str, answers)), key=lambda answer: -answers.count(answer))


def kept_rows(inputs: ReportInputs, trials: list[TrialRow], images: set[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """Stage 1's tokens of every shown trial and image."""
    wanted = one_of("trial_id", (trial.trial_id for trial in trials)) & one_of("image", images)
    rows = inputs.kept.to_table(filter=wanted).to_pylist()
    return {(row["trial_id"], row["image"]): row for row in rows}


def _case(
    outcomes: Outcomes,
    answers: _Answers,
    name: str,
    encoded: dict[str, bytes],
    kept: dict[tuple[str, str], dict[str, Any]],
    places: Callable[[Size], TokenPlaces],
) -> Case:
    example = answers.examples.loc[name]
    pixels = read_image(encoded[example["image"]])
    there = places(pixels.size)
    is_box = example["family"] == "grounding"
    truth = true_box(example["truth"]) if is_box else None
    said = "box in white" if is_box else accepted(example["truth"])[0]
    plain = _with_boxes(_enlarge(pixels, _extent(there.size)), truth, None)
    pictures = [Picture("Image", "", "", False, _png(plain), plain.size)]

    for trial in answers.trials:
        text = answers.texts.at[name, trial.trial_id]
        row = kept.get((trial.trial_id, example["image"]))
        tokens = Tokens.of(there, row, answers.last.at[name, trial.trial_id], trial.stage1_keep < trial.image_tokens)
        box = predicted_box(text, example["truth"], example["benchmark"]) if is_box else None
        drawn = _drawn(pixels, there, tokens, truth, box)
        answer, right = judged(text, example)
        stage1, last = len(tokens.kept), len(tokens.last)
        count = f"{stage1} tokens" if stage1 == last else f"{stage1} → {last} tokens"
        title = f"{outcomes.name(trial)} {trial.position.upper()}"
        pictures.append(Picture(title, count, answer, right, _png(drawn), drawn.size))
    views = len(there.layout.views)
    return Case(name, benchmark_name(example["benchmark"]), example["question"], said, views, pictures)


def judged(text: str, example: pd.Series) -> tuple[str, bool]:
    """What stands under a picture, and whether it is right by the benchmark's own score."""
    score = _score(example["benchmark"], text, example["truth"])
    right = _is_right(example["benchmark"], score)
    if example["family"] != "grounding":
        return text, right
    return f"no box: {text}" if score["parse_failure"] else f"IoU {score['iou']:.2f}", right


@dataclass(frozen=True)
class Tokens:
    """Slots of one trial on one image. ``kept``: by stage 1, with whether each is as the encoder gave it."""

    kept: dict[int, bool]
    last: frozenset[int]

    @classmethod
    def of(cls, places: TokenPlaces, row: dict[str, Any] | None, last: Sequence[int], by_question: bool) -> Tokens:
        """``row``: of ``kept.parquet``; null where stage 1 keeps everything, or (``by_question``) what a question asks for,
        of which the answer tells what was left in the end."""
        if row is None:
            whole = last if by_question else range(places.layout.tokens)
            return cls(dict.fromkeys(map(int, whole), True), frozenset(map(int, last)))
        return cls(dict(zip(map(int, row["indices"]), row["pillar"], strict=True)), frozenset(map(int, last)))

    @property
    def merges(self) -> bool:
        return not all(self.kept.values())


def _extent(size: Size) -> Size:
    """Of a picture with the shape of ``size``: enlarged by a whole factor, so that small images keep their pixels."""
    scale = SIDE / max(size)
    scale = round(scale) if scale > 1 else scale
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _enlarge(pixels: Image.Image, extent: Size) -> Image.Image:
    """Nearest neighbour where every pixel becomes a block of its own."""
    whole = all(there % here == 0 for here, there in zip(pixels.size, extent, strict=True))
    return pixels.resize(extent, Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def _drawn(
    pixels: Image.Image, places: TokenPlaces, tokens: Tokens, truth: list[float] | None, box: list[float] | None
) -> Image.Image:
    """The crops with both boxes; smaller, below them or at the right of a tall picture, the other views."""
    width, height = extent = _extent(places.size)
    *others, main = places.panels
    canvas = _with_boxes(_with_patches(pixels, extent, places, main, tokens), truth, box)
    small = (max(1, round(SMALL * width)), max(1, round(SMALL * height)))
    for views in others:
        beside = _with_patches(pixels, small, places, views, tokens)
        tall = height > width
        at = (canvas.width + GAP, 0) if tall else (0, canvas.height + GAP)
        sheet = Image.new("RGB", (max(canvas.width, at[0] + small[0]), max(canvas.height, at[1] + small[1])), "white")
        sheet.paste(canvas, (0, 0))
        sheet.paste(beside, at)
        canvas = sheet
    return canvas


def _with_patches(
    pixels: Image.Image, extent: Size, places: TokenPlaces, views: Sequence[int], tokens: Tokens
) -> Image.Image:
    """Kept patches of views that lie side by side as they are, the others faded to paper; outlines tell roles apart, dots
    mark the last layer's."""
    image = np.array(_enlarge(pixels, extent), dtype=np.float32)
    kept = {slot: cell for slot, cell in places.cells_by_slot(views, *extent).items() if slot in tokens.kept}
    mask = np.zeros((*image.shape[:2], 1), dtype=bool)
    for left, top, right, bottom in kept.values():
        mask[top:bottom, left:right] = True
    image = np.where(mask, image, image * (1 - FADE) + PAPER * FADE)
    canvas = Image.fromarray(image.round().astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    visible = {slot: cell for slot, cell in kept.items() if cell[0] < cell[2] and cell[1] < cell[3]}

    if tokens.merges:
        for slot in sorted(visible, key=lambda slot: tokens.kept[slot]):
            left, top, right, bottom = visible[slot]
            color = PILLAR if tokens.kept[slot] else COLLECTOR
            width = 2 if min(right - left, bottom - top) >= FINE else 1
            draw.rectangle((left, top, right - 1, bottom - 1), outline=color, width=width)
    if len(tokens.last) < len(tokens.kept):
        for slot in tokens.last & visible.keys():
            left, top, right, bottom = visible[slot]
            middle, radius = ((left + right) / 2, (top + bottom) / 2), min(right - left, bottom - top) / 6
            draw.circle(middle, radius, fill=(255, 255, 255), outline=CASING, width=1)
    return canvas


def _with_boxes(canvas: Image.Image, truth: list[float] | None, answer: list[float] | None) -> Image.Image:
    draw = ImageDraw.Draw(canvas)
    for box, color in ((truth, TRUTH), (answer, ANSWER)):
        if box is None or box[2] < box[0] or box[3] < box[1]:
            continue
        corners = [value * extent for value, extent in zip(box, 2 * canvas.size, strict=True)]
        draw.rectangle(
            [corners[0] - 1.5, corners[1] - 1.5, corners[2] + 1.5, corners[3] + 1.5], outline=CASING, width=6
        )
        draw.rectangle(corners, outline=color, width=3)
    return canvas


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
