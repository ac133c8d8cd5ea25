"""The gallery: a few test images with the patches that several trials kept and the answers they gave.

Cases are chosen by rule from the examples that every shown trial answered. Boxes: two that Nüwa gets right and
others miss, two the other way round; questions: two with the most different answers. Ties fall to the lower example id.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
from PIL import Image, ImageDraw

from nuwa.benchmarks.boxes import parse_box
from pipelines.datasets import parse_name
from pipelines.report.inputs import ReportInputs
from pipelines.report.outcomes import Outcomes, Trial
from pipelines.report.style import benchmark_name

SHOWN = (
    ("nuwa", "pesp"), ("visionzip", "perc"), ("visionzip", "rpme"), ("learnpruner", "pesp"), ("random", "pesp"),
    ("fastv", "pesp"), ("divprune", "pesp"), ("uniform", "pesp"),
)  # fmt: skip
MOST_TRIALS = 5
BOX_CASES, ANSWER_CASES = 2, 2
RIGHT = ("acc@0.5", "accuracy", "correct")  # an answer is right when the first its benchmark knows is at least a half
SIDE = 288  # pixels of a picture, at least
FADE, PAPER = 0.80, 255  # dropped patches: this share of the way to white
TRUTH, ANSWER = (255, 255, 255), (255, 92, 0)
PILLAR, COLLECTOR, CASING = (86, 180, 233), (240, 228, 66), (20, 20, 22)


@dataclass(frozen=True)
class Picture:
    """``png`` shows one trial's patches and box over the image; ``tokens`` and ``answer`` belong under it."""

    title: str
    tokens: str
    answer: str
    right: bool
    png: bytes


@dataclass(frozen=True)
class Case:
    example_id: str
    benchmark: str
    question: str
    truth: str
    pictures: list[Picture]


@dataclass(frozen=True)
class _Answers:
    """All that the shown trials have to say on the examples they share: one row an example, one column a trial."""

    trials: list[Trial]
    examples: pd.DataFrame
    texts: pd.DataFrame
    last: pd.DataFrame  # patches alive in the last layer


def gallery(inputs: ReportInputs, outcomes: Outcomes, budget: float) -> list[Case]:
    """Up to six cases on different images; none where patches form no square grid or no trial can be shown."""
    (grid,) = set(inputs.trials["image_grid"])
    trials = _shown_trials(outcomes, budget)
    if not trials or grid is None:
        return []
    side, width = map(int, grid.split("x"))
    if side != width:
        return []
    answers = _answers(inputs, trials)
    chosen = _choose(answers)
    images = _rows(inputs.images, "image", {answers.examples.at[name, "image"] for name in chosen})
    encoded = {row["image"]: row["bytes"] for row in images.to_dict("records")}
    kept = _kept(inputs, trials, set(encoded))
    return [_case(outcomes, answers, name, encoded, kept, side) for name in chosen]


def _shown_trials(outcomes: Outcomes, budget: float) -> list[Trial]:
    """The first trials of ``SHOWN`` at this budget, in that order; a method's first preset."""
    at_budget = outcomes.at_budget(budget)
    found = [next((trial for trial in at_budget if (trial.method, trial.position) == wanted), None) for wanted in SHOWN]
    return [trial for trial in found if trial is not None][:MOST_TRIALS]


def _rows(dataset: ds.Dataset, column: str, values: set[str]) -> pd.DataFrame:
    return dataset.to_table(filter=ds.field(column).isin(sorted(values))).to_pandas()


def _answers(inputs: ReportInputs, trials: list[Trial]) -> _Answers:
    """Square images only: on others the patch grid's place depends on the model's own padding."""
    ids = [trial.trial_id for trial in trials]
    examples = inputs.examples[inputs.examples["width"] == inputs.examples["height"]].set_index("example_id")
    rows = _rows(inputs.predictions, "trial_id", set(ids))
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
    overlaps = {name: [score["iou"] for score in found] for name, found in scores.items()}
    lead = {name: ious[0] - float(np.mean(ious[1:] or [0.0])) for name, ious in overlaps.items()}
    won = [name for name, found in scores.items() if _is_right(found[0]) and not all(map(_is_right, found))]
    lost = [name for name, found in scores.items() if not _is_right(found[0]) and any(map(_is_right, found))]
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
    return parse_name(benchmark).score(text, json.loads(truth))


def _is_right(score: dict[str, float]) -> bool:
    return next(score[metric] for metric in RIGHT if metric in score) >= 0.5


def _true_box(truth: str) -> list[float]:
    return json.loads(truth)["box"]


def _predicted_box(text: str, truth: str) -> list[float] | None:
    """As the benchmark reads it: in pixels where the truth carries a size, else in shares of the image."""
    size = json.loads(truth).get("size")
    return parse_box(text, "pixels" if size else "normalized", tuple(size) if size else None)


def _accepted(truth: str) -> list[str]:
    """The answers of a question, most frequent first."""
    decoded = json.loads(truth)
    answers = decoded.get("answers") or [decoded["answer"]]
    return sorted(dict.fromkeys(map(str, answers)), key=lambda answer: -answers.count(answer))


def _kept(inputs: ReportInputs, trials: list[Trial], images: set[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """Stage 1's patches of every shown trial and image."""
    wanted = ds.field("trial_id").isin([trial.trial_id for trial in trials]) & ds.field("image").isin(sorted(images))
    rows = inputs.kept.to_table(filter=wanted).to_pylist()
    return {(row["trial_id"], row["image"]): row for row in rows}


def _case(
    outcomes: Outcomes,
    answers: _Answers,
    name: str,
    encoded: dict[str, bytes],
    kept: dict[tuple[str, str], dict[str, Any]],
    side: int,
) -> Case:
    example = answers.examples.loc[name]
    pixels = np.asarray(Image.open(io.BytesIO(encoded[example["image"]])).convert("RGB"))
    is_box = example["family"] == "grounding"
    truth = _true_box(example["truth"]) if is_box else None
    said = "box in white" if is_box else _accepted(example["truth"])[0]
    pictures = [Picture("Image", "", "", False, _png(_with_boxes(_enlarge(pixels, side), truth, None)))]
    for trial in answers.trials:
        text = answers.texts.at[name, trial.trial_id]
        row = kept.get((trial.trial_id, example["image"]))
        last = list(answers.last.at[name, trial.trial_id])
        canvas = _with_patches(pixels, side, row, last)
        box = _predicted_box(text, example["truth"]) if is_box else None
        answer, right = _judged(text, example)
        stage1 = side * side if row is None else len(row["indices"])
        tokens = f"{stage1} tokens" if stage1 == len(last) else f"{stage1} → {len(last)} tokens"
        title = f"{outcomes.name(trial)} {trial.position.upper()}"
        pictures.append(Picture(title, tokens, answer, right, _png(_with_boxes(canvas, truth, box))))
    return Case(name, benchmark_name(example["benchmark"]), example["question"], said, pictures)


def _judged(text: str, example: pd.Series) -> tuple[str, bool]:
    """What stands under a picture, and whether it is right by the benchmark's own score."""
    score = _score(example["benchmark"], text, example["truth"])
    if example["family"] != "grounding":
        return text, _is_right(score)
    return f"no box: {text}" if score["parse_failure"] else f"IoU {score['iou']:.2f}", _is_right(score)


def _enlarge(pixels: np.ndarray, side: int) -> Image.Image:
    """Nearest neighbour, to a size that both the image's pixels and the patches divide."""
    extent = max(1, round(SIDE / side)) * side
    return Image.fromarray(pixels).resize((extent, extent), Image.Resampling.NEAREST)


def _with_patches(pixels: np.ndarray, side: int, row: dict[str, Any] | None, last: Sequence[int]) -> Image.Image:
    """Kept patches as they are, the others faded to paper; outlines tell roles apart, dots mark ``last``."""
    image = np.array(_enlarge(pixels, side), dtype=np.float32)
    patch = len(image) // side
    indices = list(range(side * side)) if row is None else list(row["indices"])
    mask = np.zeros(side * side, dtype=bool)
    mask[indices] = True
    mask = mask.reshape(side, side).repeat(patch, axis=0).repeat(patch, axis=1)[..., None]
    image = np.where(mask, image, image * (1 - FADE) + PAPER * FADE)
    canvas = Image.fromarray(image.round().astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    if row is not None and not all(row["pillar"]):
        for index, pillar in sorted(zip(indices, row["pillar"], strict=True), key=lambda item: item[1]):
            top, left = (place * patch for place in divmod(int(index), side))
            color = PILLAR if pillar else COLLECTOR
            draw.rectangle((left, top, left + patch - 1, top + patch - 1), outline=color, width=2)
    if len(last) < len(indices):
        for index in last:
            top, left = (place * patch + patch / 2 for place in divmod(int(index), side))
            draw.circle((left, top), patch / 6, fill=(255, 255, 255), outline=CASING, width=1)
    return canvas


def _with_boxes(canvas: Image.Image, truth: list[float] | None, answer: list[float] | None) -> Image.Image:
    draw = ImageDraw.Draw(canvas)
    for box, color in ((truth, TRUTH), (answer, ANSWER)):
        if box is None or box[2] < box[0] or box[3] < box[1]:
            continue
        corners = [value * canvas.width for value in box]
        draw.rectangle(
            [corners[0] - 1.5, corners[1] - 1.5, corners[2] + 1.5, corners[3] + 1.5], outline=CASING, width=6
        )
        draw.rectangle(corners, outline=color, width=3)
    return canvas


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
