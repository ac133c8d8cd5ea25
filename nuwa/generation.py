"""Encoded images and questions → answers, and what was kept of the images; :mod:`nuwa.library` makes a call of it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image

from nuwa.decoder import Answer, Trunk
from nuwa.layout import InterleavedLayout, VisualLayout, images_of, interleave
from nuwa.methods import LayoutPlan, MethodSpec, check_encoder, select_views
from nuwa.positions import visual_positions
from nuwa.schedule import TokenSchedule, joined
from nuwa.selection import Selection
from nuwa.signals import OPTIONAL_SIGNALS, SIGNAL_NAMES
from nuwa.stage1 import get_method
from nuwa.vlm import Adapter, EncodedImage, EncodedPrompt, view_signals

PILLAR, COLLECTOR, NEWLINE, NAME = "pillar", "collector", "newline", "name"
STOP, LENGTH = "stop", "length"


@dataclass(frozen=True)
class Kept:
    """The visual tokens of a sequence that entered the language model, in their order.

    ``slots``: each token's place among all visual tokens of the unpruned image (on LLaVA-1.5 the patch's index); of
    several images, counted on from image to image. ``images``: the number of the image that each is of, 0 where there is
    one. ``places``: its view, row and column on that view's grid; a newline token stands one column behind its row,
    a token that names a tile before its first column.
    ``positions``: its position ids, one a token, on Qwen2.5-VL three (time, row, column).
    ``roles``: ``pillar`` (exactly as the encoder gave it), ``collector`` (merged with others), ``newline`` or
    ``name`` (of a tile).
    """

    slots: tuple[int, ...]
    places: tuple[tuple[int, int, int], ...]
    positions: tuple[tuple[int, ...], ...]
    roles: tuple[str, ...]
    images: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """One answer.

    ``kept_last``: slots alive in the last layer, after stage 2. ``schedule``: visual tokens entering each layer.
    ``timings``: seconds of ``encode``, ``select``, ``prefill`` and ``decode`` for the batch the image was in.
    ``finish``: ``stop`` (the model ended the answer) or ``length`` (``max_new_tokens`` did).
    """

    text: str
    tokens: tuple[int, ...]
    kept: Kept
    kept_last: tuple[int, ...]
    schedule: TokenSchedule
    timings: dict[str, float]
    finish: str


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Encoded images, and what is asked about them.

    ``names`` seed what is random. ``questions``: of each image; empty where nothing reads them. ``pictures``: the images
    themselves, for methods that encode them anew; null: not at hand. ``prompts``: the questions as tokens, which begin
    alike; null: each in the model's own chat template.
    """

    encoded: Sequence[EncodedImage]
    names: Sequence[str]
    questions: Sequence[Sequence[str]] = ()
    pictures: Sequence[Image.Image] | None = None
    prompts: Sequence[Sequence[EncodedPrompt]] | None = None

    def of(self, numbers: Sequence[int]) -> ImageBatch:
        """Some of its images, by their places."""
        return ImageBatch(
            encoded=[self.encoded[number] for number in numbers],
            names=[self.names[number] for number in numbers],
            questions=[self.questions[number] for number in numbers],
            pictures=None if self.pictures is None else [self.pictures[number] for number in numbers],
            prompts=None if self.prompts is None else [self.prompts[number] for number in numbers],
        )


@torch.inference_mode()
def answer_encoded(
    vlm: Adapter, batch: ImageBatch, spec_of: Callable[[VisualLayout], MethodSpec], max_new_tokens: int
) -> list[list[Generation]]:
    """Answers about images that are encoded already; images of one layout are answered together.

    ``spec_of``: the configured method for images of a layout; their budgets may differ.
    """
    groups: dict[VisualLayout, list[int]] = {}
    for number, image in enumerate(batch.encoded):
        groups.setdefault(image.layout, []).append(number)
    plans = {layout: (plan(vlm, spec_of(layout), layout),) for layout in groups}  # refuses before anything is computed

    generations: list[list[Generation]] = [[] for _ in batch.encoded]
    for layout, numbers in groups.items():
        answers = _answer_layout(vlm, plans[layout], layout, [batch.of(numbers)], max_new_tokens)
        for number, of_image in zip(numbers, answers, strict=True):
            generations[number] = of_image
    return generations


@torch.inference_mode()
def answer_interleaved(
    vlm: Adapter,
    columns: Sequence[ImageBatch],
    spec_of: Callable[[VisualLayout], MethodSpec],
    max_new_tokens: int,
) -> list[list[Generation]]:
    """Answers to questions about several images each; rows of one layout are answered together.

    ``columns``: the first image of every row, the second, and so on, as :meth:`Adapter.encode_among` encodes them. The first has the rows' questions and prompts, which
    begin alike and agree in a row on the texts between images. Stage 1 prunes each image as if it were alone, by the
    budget that ``spec_of`` gives for its own layout; cuts in the language model act on what is left of all.
    """
    first, groups = columns[0], dict[InterleavedLayout, list[int]]()
    if first.prompts is None:
        raise ValueError("questions about several images come as prompts")
    for row, prompts in enumerate(first.prompts):
        texts = [len(text) for text in prompts[0].between]
        layout = InterleavedLayout.of([column.encoded[row].layout for column in columns], texts)
        groups.setdefault(layout, []).append(row)
    plans = {layout: plan_interleaved(vlm, spec_of, layout) for layout in groups}

    generations: list[list[Generation]] = [[] for _ in first.encoded]
    for layout, rows in groups.items():
        parts = [column.of(rows) for column in columns]
        answers = _answer_layout(vlm, plans[layout], layout, parts, max_new_tokens)
        for row, of_row in zip(rows, answers, strict=True):
            generations[row] = of_row
    return generations


def plan_interleaved(
    vlm: Adapter, spec_of: Callable[[VisualLayout], MethodSpec], layout: InterleavedLayout
) -> tuple[LayoutPlan, ...]:
    """The plan of every image; raises as :func:`plan`, and where their cuts cannot be made together."""
    plans = tuple(plan(vlm, spec_of(image), image) for image in layout.images)
    joined([one.schedule for one in plans])
    return plans


def plan(vlm: Adapter, spec: MethodSpec, layout: VisualLayout) -> LayoutPlan:
    """Raises ``ValueError`` where the encoder lacks what the method reads or the budget is out of reach."""
    check_encoder(spec, vlm)
    check = get_method(spec.stage1).check
    if check is not None:
        check(spec.config, vlm.encoder_identity)
    return spec.on(layout, vlm.layers)


def select(vlm: Adapter, planned: LayoutPlan, layout: VisualLayout, batch: ImageBatch) -> Selection:
    """Stage 1 on every view of images of one layout, over slots.

    A row for each image, or for each question where the method reads them and the batch holds them.
    """
    pictures = batch.pictures
    resized = None if pictures is None else lambda grid: vlm.encode_resized(pictures, grid)
    signals = batch.encoded[0].signals
    stacked: dict[str, torch.Tensor] = {
        name: torch.stack([image.signals[name] for image in batch.encoded])
        for name in (*SIGNAL_NAMES, *OPTIONAL_SIGNALS)
        if name in signals
    }

    views = view_signals(layout, stacked, batch.names, resized=resized, heads=vlm.heads, project=vlm.project)
    if planned.spec.reads_question and batch.questions:
        views = vlm.read_questions(views, batch.questions)
    return select_views(planned, layout, views)


def _answer_layout(
    vlm: Adapter, plans: Sequence[LayoutPlan], layout: VisualLayout, columns: Sequence[ImageBatch], max_new_tokens: int
) -> list[list[Generation]]:
    """``columns``: the images of every row, first ones first, and a plan for each; the first has what is asked."""
    batch, spec, schedule = columns[0], plans[0].spec, joined([one.schedule for one in plans])
    began = time.perf_counter()
    selections = [
        select(vlm, planned, image, replace(column, questions=batch.questions))
        for planned, image, column in zip(plans, images_of(layout), columns, strict=True)
    ]
    selection = interleave(layout, selections) if isinstance(layout, InterleavedLayout) else selections[0]
    select_seconds = seconds_since(vlm, began)

    # Sequences are rows of the selection: an image's questions share one, unless stage 1 keeps other tokens for each.
    names, rows = (
        [" ".join(of_row) for of_row in zip(*(column.names for column in columns), strict=True)],
        batch.prompts,
    )
    if rows is None:
        rows = [[vlm.encode_prompt(question) for question in questions] for questions in batch.questions]
    if spec.reads_question:
        names = [name for name, prompts in zip(names, rows, strict=True) for _ in prompts]
        rows = [[prompt] for prompts in rows for prompt in prompts]

    timings = {"select": select_seconds, "prefill": 0.0, "decode": 0.0}
    began = time.perf_counter()
    trunk = Trunk(vlm, selection, rows, spec.position, names, layout)
    cuts, answers = spec.running_cuts(schedule), list[Answer]()
    for portion in trunk.portions(cuts):
        stretches = portion.prefill(cuts, spec.seed)
        timings["prefill"] += seconds_since(vlm, began)
        began = time.perf_counter()
        answers += portion.decode(stretches, [max_new_tokens] * len(portion.prompts))
        timings["decode"] += seconds_since(vlm, began)
        began = time.perf_counter()

    kept = _kept(selection, layout, spec, len(trunk.before))
    kept_of_answers = [kept[number] for number, row in enumerate(rows) for _ in row]
    generations = iter(
        Generation(
            text=vlm.decode_text(list(answer.tokens)),
            tokens=answer.tokens,
            kept=entered,
            kept_last=answer.kept,
            schedule=schedule,
            timings=timings,
            finish=LENGTH if len(answer.tokens) == max_new_tokens else STOP,
        )
        for answer, entered in zip(answers, kept_of_answers, strict=True)
    )
    return [[next(generations) for _ in questions] for questions in batch.questions]


def _kept(selection: Selection, layout: VisualLayout, spec: MethodSpec, start: int) -> list[Kept]:
    places = [
        (number, row, column)
        for image in images_of(layout)
        for number, view in enumerate(image.views)
        for row, column in view.places
    ]
    slots = selection.indices.cpu()
    positions = visual_positions(slots, spec.position, start, layout)
    fixed, pillars = layout.fixed.tolist(), selection.pillars.tolist()
    owners = layout.owners.tolist() if isinstance(layout, InterleavedLayout) else [0] * layout.tokens

    kept = []
    for row, in_row in enumerate(slots.tolist()):
        roles = [
            (NAME if places[slot][2] < 0 else NEWLINE) if fixed[slot] else PILLAR if pillar else COLLECTOR
            for slot, pillar in zip(in_row, pillars[row], strict=True)
        ]
        ids = positions[:, row].T.tolist()
        kept.append(
            Kept(
                slots=tuple(in_row),
                places=tuple(places[slot] for slot in in_row),
                positions=tuple(map(tuple, ids)),
                roles=tuple(roles),
                images=tuple(owners[slot] for slot in in_row),
            )
        )
    return kept


def image_id(image: Image.Image) -> str:
    """Digest of an image's pixels; it seeds what is random."""
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


def seconds_since(vlm: Adapter, began: float) -> float:
    """Seconds since ``began``, once the accelerator has done what it was asked."""
    if vlm.device.type == "cuda":
        torch.cuda.synchronize(vlm.device)
    return time.perf_counter() - began
