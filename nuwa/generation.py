"""The method without the pipeline: answers to questions about images, and what was kept of the images.

answers = nuwa.generate(model, processor, images, questions, method="nuwa", average_tokens=64)
answers[0].text, answers[0].kept.slots, answers[0].timings
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from transformers import PreTrainedModel

from nuwa import UNPRUNED
from nuwa.allowed import check_share
from nuwa.budget import budget_on
from nuwa.decoder import Trunk
from nuwa.images import upright_rgb
from nuwa.layout import VisualLayout
from nuwa.methods import LayoutPlan, MethodSpec, check_encoder, select_views, specify
from nuwa.positions import visual_positions
from nuwa.schedule import TokenSchedule
from nuwa.selection import Selection
from nuwa.signals import OPTIONAL_SIGNALS, SIGNAL_NAMES
from nuwa.stage1 import get_method
from nuwa.vlm import Adapter, EncodedImage, adapt, view_signals

PILLAR, COLLECTOR, NEWLINE = "pillar", "collector", "newline"


@dataclass(frozen=True)
class Kept:
    """The visual tokens of an image that entered the language model, in the order of its sequence.

    ``slots``: each token's place among all visual tokens of the unpruned image (on LLaVA-1.5 the patch's index).
    ``places``: its view, row and column on that view's grid; a newline token stands one column behind its row.
    ``positions``: its position ids, one a token, on Qwen2.5-VL three (time, row, column).
    ``roles``: ``pillar`` (exactly as the encoder gave it), ``collector`` (merged with others) or ``newline``.
    """

    slots: tuple[int, ...]
    places: tuple[tuple[int, int, int], ...]
    positions: tuple[tuple[int, ...], ...]
    roles: tuple[str, ...]


@dataclass(frozen=True)
class Generation:
    """One answer.

    ``kept_last``: slots alive in the last layer, after stage 2. ``schedule``: visual tokens entering each layer.
    ``timings``: seconds of ``encode``, ``select`` and ``answer`` for the batch the image was in.
    """

    text: str
    tokens: tuple[int, ...]
    kept: Kept
    kept_last: tuple[int, ...]
    schedule: TokenSchedule
    timings: dict[str, float]


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    processor: Any,
    images: Sequence[Image.Image],
    questions: Sequence[str] | Sequence[Sequence[str]],
    *,
    method: str = "nuwa",
    average_tokens: float | None = None,
    retention: float | None = None,
    preset: str | None = None,
    position: str = "pesp",
    stage2: dict[str, Any] | None = None,
    without_stage2: bool = False,
    parameters: dict[str, Any] | None = None,
    seed: int = 0,
    max_new_tokens: int = 128,
    batch_images: int = 8,
    conversation: str = "template",
    image_aspect_ratio: str = "processor",
    text_tower: str | Path | None = None,
) -> list[Generation] | list[list[Generation]]:
    """Greedy answers to ``questions`` about ``images`` under a pruning method.

    ``model``, ``processor``: any ``LlavaForConditionalGeneration``, ``LlavaNextForConditionalGeneration`` or
    ``Qwen2_5_VLForConditionalGeneration`` in evaluation mode, and its processor; neither is changed.
    ``questions``: one for each image, or a list for each image, which then share its prefix; the result has the same
    shape. ``average_tokens``: visual tokens, mean over the language model's layers; an image that has fewer keeps all.
    ``retention``: the same as a share of each image's own tokens, for models of dynamic grids. One of the two is
    needed, except by ``method="unpruned"``. Images are read as :mod:`nuwa.images` says: turned upright, transparency on
    white; an animation at the frame where it stands. ``conversation``, ``image_aspect_ratio``: see :class:`nuwa.vlm.Adapter`; the
    papers' LLaVA-1.5 is ``vicuna_v1`` and ``pad``. ``text_tower``: folder of the CLIP model that the encoder is a half of,
    for methods that read the question before the language model (CDPruner). The other arguments are those of :func:`nuwa.methods.specify`.

    Raises ``ValueError`` naming the argument and what is allowed, and
    :class:`nuwa.schedule.UnreachableBudget` where no schedule of the method has that average.
    """
    _check_call(model, images, questions)
    budget_of = _budget(method, average_tokens, retention)
    configured: dict[str, Any] = {"preset": preset, "position": position, "stage2": stage2, "seed": seed}
    configured |= {"without_stage2": without_stage2, "parameters": parameters}
    framing: dict[str, Any] = {"conversation": conversation, "image_aspect_ratio": image_aspect_ratio}
    vlm = adapt(model, processor, **framing, text_tower=text_tower)

    def spec_of(layout: VisualLayout) -> MethodSpec:
        return specify(method, budget=budget_of(layout), **configured)

    generations = []
    for start in range(0, len(images), batch_images):
        batch = slice(start, start + batch_images)
        listed = [[of_image] if isinstance(of_image, str) else list(of_image) for of_image in questions[batch]]
        generations += _answer_batch(vlm, images[batch], listed, spec_of, max_new_tokens)

    shaped = [
        of_image[0] if isinstance(given, str) else of_image
        for of_image, given in zip(generations, questions, strict=True)
    ]
    return cast("list[Generation] | list[list[Generation]]", shaped)  # as the questions were


def _check_call(
    model: PreTrainedModel, images: Sequence[Image.Image], questions: Sequence[str] | Sequence[Sequence[str]]
) -> None:
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    if len(images) != len(questions):
        raise ValueError(f"{len(images)} images but {len(questions)} questions; give one, or a list, for each image")
    if any(not isinstance(of_image, str) and not of_image for of_image in questions):
        raise ValueError("every image needs at least one question")


def _answer_batch(
    vlm: Adapter,
    images: Sequence[Image.Image],
    questions: Sequence[Sequence[str]],
    spec_of: Callable[[VisualLayout], MethodSpec],
    max_new_tokens: int,
) -> list[list[Generation]]:
    """Answers about images as people have them, which are read, encoded and asked together."""
    began = time.perf_counter()
    pictures = [upright_rgb(image) for image in images]
    # Which signals a method reads is the same on every layout: the first image's specification stands for all.
    encoded = vlm.encode_images(pictures, spec_of(vlm.layout_of(pictures[0].size)).further_signals)
    encoding = {"encode": _seconds(vlm, began)}

    batch = ImageBatch(
        encoded=encoded, names=[image_id(picture) for picture in pictures], questions=questions, pictures=pictures
    )
    return [
        [replace(answer, timings=encoding | answer.timings) for answer in of_image]
        for of_image in answer_encoded(vlm, batch, spec_of, max_new_tokens)
    ]


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Encoded images, and what is asked about them.

    ``names`` seed what is random. ``questions``: of each image; empty where nothing reads them. ``pictures``: the images
    themselves, for methods that encode them anew; null: not at hand.
    """

    encoded: Sequence[EncodedImage]
    names: Sequence[str]
    questions: Sequence[Sequence[str]] = ()
    pictures: Sequence[Image.Image] | None = None

    def of(self, numbers: Sequence[int]) -> ImageBatch:
        """Some of its images, by their places."""
        return ImageBatch(
            encoded=[self.encoded[number] for number in numbers],
            names=[self.names[number] for number in numbers],
            questions=[self.questions[number] for number in numbers],
            pictures=None if self.pictures is None else [self.pictures[number] for number in numbers],
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
    plans = {layout: plan(vlm, spec_of(layout), layout) for layout in groups}  # refuses before anything is computed

    generations: list[list[Generation]] = [[] for _ in batch.encoded]
    for layout, numbers in groups.items():
        answers = _answer_layout(vlm, plans[layout], layout, batch.of(numbers), max_new_tokens)
        for number, of_image in zip(numbers, answers, strict=True):
            generations[number] = of_image
    return generations


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
    vlm: Adapter, planned: LayoutPlan, layout: VisualLayout, batch: ImageBatch, max_new_tokens: int
) -> list[list[Generation]]:
    spec, schedule = planned.spec, planned.schedule
    began = time.perf_counter()
    selection = select(vlm, planned, layout, batch)
    select_seconds = _seconds(vlm, began)

    # Sequences are rows of the selection: an image's questions share one, unless stage 1 keeps other tokens for each.
    names, rows = batch.names, batch.questions
    if spec.reads_question:
        names = [name for name, questions in zip(names, rows, strict=True) for _ in questions]
        rows = [[question] for questions in rows for question in questions]

    began = time.perf_counter()
    prompts = [[vlm.encode_prompt(question) for question in row] for row in rows]
    trunk = Trunk(vlm, selection, prompts, spec.position, names, layout)
    limits = [max_new_tokens] * sum(map(len, rows))
    answers = trunk.answer(spec.running_cuts(schedule), limits, spec.seed)
    timings = {"select": select_seconds, "answer": _seconds(vlm, began)}

    kept = _kept(selection, layout, spec, len(trunk.before))
    kept_of_answers = [kept[number] for number, row in enumerate(rows) for _ in row]
    generations = iter(
        Generation(vlm.decode_text(list(answer.tokens)), answer.tokens, entered, answer.kept, schedule, timings)
        for answer, entered in zip(answers, kept_of_answers, strict=True)
    )
    return [[next(generations) for _ in questions] for questions in batch.questions]


def _kept(selection: Selection, layout: VisualLayout, spec: MethodSpec, start: int) -> list[Kept]:
    places = [
        (number, row, column)
        for number, view in enumerate(layout.views)
        for row in range(view.grid.height)
        for column in range(view.grid.width + view.newline)
    ]
    slots = selection.indices.cpu()
    positions = visual_positions(slots, spec.position, start, layout)
    newlines, pillars = layout.newlines.tolist(), selection.pillars.tolist()

    kept = []
    for row, in_row in enumerate(slots.tolist()):
        roles = [
            NEWLINE if newlines[slot] else PILLAR if pillar else COLLECTOR
            for slot, pillar in zip(in_row, pillars[row], strict=True)
        ]
        ids = positions[:, row].T.tolist()
        kept.append(Kept(tuple(in_row), tuple(places[slot] for slot in in_row), tuple(map(tuple, ids)), tuple(roles)))
    return kept


def _budget(
    method: str, average_tokens: float | None, retention: float | None
) -> Callable[[VisualLayout], float | None]:
    """Average tokens by layout."""
    if method == UNPRUNED:
        if average_tokens is not None or retention is not None:
            raise ValueError("method 'unpruned' takes neither average_tokens nor retention; leave them out")
        return lambda layout: None
    if retention is not None and average_tokens is None:
        check_share(f"retention {retention:g}", retention, "(0, 1]")
        return lambda layout: budget_on(layout, retention, "share", dynamic=True)
    if average_tokens is not None and retention is None:
        return lambda layout: budget_on(layout, average_tokens, "tokens", dynamic=True)
    raise ValueError(f"method {method!r} needs average_tokens or retention, one of the two")


def image_id(image: Image.Image) -> str:
    """Digest of an image's pixels; it seeds what is random."""
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


def _seconds(vlm: Adapter, began: float) -> float:
    """Time since ``began``, once the accelerator has done what it was asked."""
    if vlm.device.type == "cuda":
        torch.cuda.synchronize(vlm.device)
    return time.perf_counter() - began
