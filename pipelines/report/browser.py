"""Questions to browse: picture, truth, and every headline trial's answer over the tokens it kept.

Which questions: of every benchmark, those whose ids come first by the digest of the id, benchmarks by turns, each image once.
That is a sample nobody chose, so what it shows is what is usual, where the gallery shows disagreement. How many: as many as
fit into ``BYTES`` of page, ``FEWEST`` at least.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
from PIL import Image

from nuwa.images import read_image
from pipelines.data.image_keys import shows_several
from pipelines.report.gallery import (
    Tokens,
    accepted,
    judged,
    kept_rows,
    one_of,
    places_on_images,
    predicted_box,
    rows_of,
    true_box,
)
from pipelines.report.inputs import ReportInputs
from pipelines.report.outcomes import Outcomes, TrialRow
from pipelines.report.places import Size, TokenPlaces
from pipelines.report.style import benchmark_name

BYTES, FEWEST, MOST = 600_000, 3, 24
SIDE, QUALITY = 160, 80  # of the longer side, in pixels at most; of the JPEG
CARD = 230  # bytes of one trial's markup beside its tokens and answer
LONGEST = 80  # characters of an answer


@dataclass(frozen=True)
class Answer:
    """``dropped``: the path, in pixels of the picture, of all that stage 1 dropped; ``box``: left, top, width and height."""

    trial: str
    tokens: str
    text: str
    right: bool
    dropped: str
    box: tuple[float, ...] | None


@dataclass(frozen=True)
class Question:
    """``picture``: a data URI of ``size`` pixels."""

    example_id: str
    benchmark: str
    text: str
    truth: str
    box: tuple[float, ...] | None
    picture: str
    size: Size
    answers: list[Answer]

    @property
    def right(self) -> int:
        return sum(answer.right for answer in self.answers)

    @property
    def bytes(self) -> int:
        """About what it takes on the page."""
        cards = sum(CARD + len(a.trial) + len(a.text) + len(a.dropped) for a in self.answers)
        return len(self.picture) + cards


def questions(inputs: ReportInputs, outcomes: Outcomes, budget: float) -> list[Question]:
    """The sample at ``budget``; none where it is not known where tokens lie."""
    trials = outcomes.at_budget(budget)
    places = places_on_images(inputs, outcomes)
    if not trials or places is None:
        return []
    trials = [outcomes.unpruned, *trials]
    chosen = _sample(inputs, outcomes)
    if chosen.empty:  # no image is square
        return []
    texts = _answers(inputs, trials, chosen["example_id"].tolist())
    images = rows_of(inputs.images, "image", set(chosen["image"]))
    encoded = dict(zip(images["image"], images["bytes"], strict=True))
    kept = kept_rows(inputs, trials, set(encoded))
    shown: list[Question] = []

    for example in chosen.to_dict("records"):
        if len(shown) >= FEWEST and sum(question.bytes for question in shown) > BYTES:
            break
        if example["example_id"] not in texts.index.get_level_values("example_id"):
            continue
        pixels = read_image(encoded[example["image"]])
        there = places(pixels.size)
        size = _extent(pixels.size)
        answers = [
            _answer(
                outcomes, trial, pd.Series(example), texts, kept.get((trial.trial_id, example["image"])), there, size
            )
            for trial in trials
            if (example["example_id"], trial.trial_id) in texts.index
        ]
        is_box = example["family"] == "grounding"
        shown.append(
            Question(
                example["example_id"], benchmark_name(example["benchmark"]), example["question"],
                "box in white" if is_box else accepted(example["truth"])[0],
                _rectangle(true_box(example["truth"]), size) if is_box else None, _data_uri(pixels, size), size, answers,
            )
        )  # fmt: skip
    return shown


def _sample(inputs: ReportInputs, outcomes: Outcomes) -> pd.DataFrame:
    """By turns of benchmarks, in the order of the page's columns; on one fixed grid of square images only, as there it is
    not known where tokens lie on others."""
    examples = inputs.examples[~inputs.examples["image"].map(shows_several)]
    if not outcomes.dynamic:
        examples = examples[examples["width"] == examples["height"]]
    digests = examples["example_id"].map(lambda name: hashlib.sha256(name.encode()).hexdigest())
    ordered = examples.assign(digest=digests).sort_values("digest")
    known = [column.benchmark for column in outcomes.columns]
    turns = [ordered[ordered["benchmark"] == name].to_dict("records") for name in known]
    chosen: list[dict] = []
    images: set[str] = set()
    for example in _by_turns(turns):
        if example["image"] not in images and len(chosen) < MOST:
            images.add(example["image"])
            chosen.append(example)
    return pd.DataFrame(chosen, columns=ordered.columns)


def _by_turns(turns: list[list[dict]]) -> Iterator[dict]:
    for round_ in itertools.zip_longest(*turns):
        yield from (example for example in round_ if example is not None)


def _answers(inputs: ReportInputs, trials: list[TrialRow], examples: list[str]) -> pd.DataFrame:
    """By example and trial: ``prediction`` and ``kept_final``."""
    wanted = one_of("example_id", examples) & one_of("trial_id", (trial.trial_id for trial in trials))
    columns = ["example_id", "trial_id", "prediction", "kept_final"]
    return inputs.predictions.to_table(columns=columns, filter=wanted).to_pandas().set_index(columns[:2]).sort_index()


def _answer(
    outcomes: Outcomes,
    trial: TrialRow,
    example: pd.Series,
    texts: pd.DataFrame,
    row: dict | None,
    places: TokenPlaces,
    size: Size,
) -> Answer:
    given = texts.loc[(example["example_id"], trial.trial_id)]
    tokens = Tokens.of(places, row, given["kept_final"], trial.stage1_keep < trial.image_tokens)
    said, right = judged(given["prediction"], example)
    is_box = example["family"] == "grounding"
    box = predicted_box(given["prediction"], example["truth"], example["benchmark"]) if is_box else None

    first, last = len(tokens.kept), len(tokens.last)
    ids = f" {trial.position.upper()}" if trial.pruned else ""
    return Answer(
        f"{outcomes.name(trial)}{ids}", f"{first}" if first == last else f"{first} → {last}",
        said if len(said) <= LONGEST else f"{said[: LONGEST - 1]}…", right, _dropped(places, set(tokens.kept), size),
        _rectangle(box, size) if box is not None and box[2] >= box[0] and box[3] >= box[1] else None,
    )  # fmt: skip


def _extent(size: Size) -> Size:
    scale = min(1.0, SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _dropped(places: TokenPlaces, kept: set[int], size: Size) -> str:
    """Cells of the crops that were dropped, neighbours of a row in one rectangle."""
    runs: list[list[int]] = []
    for slot, (left, top, right, bottom) in places.cells_by_slot(places.panels[-1], *size).items():
        if slot in kept or left >= right or top >= bottom:
            continue
        if runs and runs[-1][1:] == [top, left, bottom]:  # it begins where the last one ends
            runs[-1][2] = right
        else:
            runs.append([left, top, right, bottom])
    return "".join(f"M{left} {top}h{right - left}v{bottom - top}h{left - right}z" for left, top, right, bottom in runs)


def _rectangle(box: list[float] | tuple[float, ...], size: Size) -> tuple[float, ...]:
    """Left, top, width and height in pixels of a box in shares."""
    left, top, right, bottom = (value * extent for value, extent in zip(box, 2 * size, strict=True))
    return tuple(round(value, 1) for value in (left, top, right - left, bottom - top))


def _data_uri(pixels: Image.Image, size: Size) -> str:
    buffer = io.BytesIO()
    pixels.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(buffer, format="JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
