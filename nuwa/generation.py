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
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    if len(images) != len(questions):
        raise ValueError(f"{len(images)} images but {len(questions)} questions; give one, or a list, for each image")
    if any(not isinstance(asked, str) and not asked for asked in questions):
        raise ValueError("every image needs at least one question")
    choose = _budget(method, average_tokens, retention)

    def spec_of(layout: VisualLayout) -> MethodSpec:
        return specify(
            method,
            preset=preset,
            position=position,
            budget=choose(layout),
            stage2=stage2,
            without_stage2=without_stage2,
            seed=seed,
            parameters=parameters,
        )

    framing: dict[str, Any] = {"conversation": conversation, "image_aspect_ratio": image_aspect_ratio}
    vlm = adapt(model, processor, **framing, text_tower=text_tower)
    asked = [[mine] if isinstance(mine, str) else list(mine) for mine in questions]
    found: list[list[Generation]] = []
    for start in range(0, len(images), batch_images):
        batch = slice(start, start + batch_images)
        began = time.perf_counter()
        pictures = [upright_rgb(image) for image in images[batch]]
        encoded = vlm.encode_images(pictures, spec_of(vlm.layout_of(pictures[0].size)).further_signals)
        seconds = _seconds(vlm, began)
        names = [image_id(picture) for picture in pictures]
        answers = answer_encoded(vlm, encoded, names, asked[batch], spec_of, max_new_tokens, pictures)
        found += [[replace(one, timings={"encode": seconds, **one.timings}) for one in mine] for mine in answers]
    shaped = [mine if not isinstance(given, str) else mine[0] for mine, given in zip(found, questions, strict=True)]
    return cast("list[Generation] | list[list[Generation]]", shaped)  # as the questions were


@torch.inference_mode()
def answer_encoded(
    vlm: Adapter,
    encoded: Sequence[EncodedImage],
    image_ids: Sequence[str],
    questions: Sequence[Sequence[str]],
    spec_of: Callable[[VisualLayout], MethodSpec],
    max_new_tokens: int,
    images: Sequence[Image.Image] | None = None,
) -> list[list[Generation]]:
    """Answers about images that are encoded already; images of one layout are answered together.

    ``spec_of``: the configured method for images of a layout; their budgets may differ. ``images``: the images
    themselves, for methods that encode them anew.
    """
    groups: dict[VisualLayout, list[int]] = {}
    for number, image in enumerate(encoded):
        groups.setdefault(image.layout, []).append(number)
    plans = {layout: plan(vlm, spec_of(layout), layout) for layout in groups}  # refuses before anything is computed
    found: list[list[Generation]] = [[] for _ in encoded]

    for layout, numbers in groups.items():
        answers = _answer_layout(
            vlm,
            plans[layout],
            layout,
            [encoded[number] for number in numbers],
            [image_ids[number] for number in numbers],
            [questions[number] for number in numbers],
            max_new_tokens,
            None if images is None else [images[number] for number in numbers],
        )
        for number, mine in zip(numbers, answers, strict=True):
            found[number] = mine
    return found


def plan(vlm: Adapter, spec: MethodSpec, layout: VisualLayout) -> LayoutPlan:
    """Raises ``ValueError`` where the encoder lacks what the method reads or the budget is out of reach."""
    check_encoder(spec, vlm)
    check = get_method(spec.stage1).check
    if check is not None:
        check(spec.config, vlm.encoder_identity)
    return spec.on(layout, vlm.layers)


def select(
    vlm: Adapter,
    planned: LayoutPlan,
    layout: VisualLayout,
    encoded: Sequence[EncodedImage],
    image_ids: Sequence[str],
    images: Sequence[Image.Image] | None = None,
    questions: Sequence[Sequence[str]] | None = None,
) -> Selection:
    """Stage 1 on every view of images of one layout, over slots; ``images`` where they are at hand.

    ``questions``: of each image, for methods that read them; the selection then has a row for each question.
    """
    resized = None if images is None else lambda grid: vlm.encode_resized(images, grid)
    names = [name for name in (*SIGNAL_NAMES, *OPTIONAL_SIGNALS) if name in encoded[0].signals]
    together: dict[str, torch.Tensor] = {
        name: torch.stack([image.signals[name] for image in encoded]) for name in names
    }
    views = view_signals(layout, together, image_ids, resized, heads=vlm.heads, project=vlm.project)
    if planned.spec.reads_question and questions is not None:
        views = vlm.read_questions(views, questions)
    return select_views(planned, layout, views)


def _answer_layout(
    vlm: Adapter,
    planned: LayoutPlan,
    layout: VisualLayout,
    encoded: Sequence[EncodedImage],
    image_ids: Sequence[str],
    questions: Sequence[Sequence[str]],
    max_new_tokens: int,
    images: Sequence[Image.Image] | None,
) -> list[list[Generation]]:
    spec, schedule, asked = planned.spec, planned.schedule, questions
    began = time.perf_counter()
    selection = select(vlm, planned, layout, encoded, image_ids, images, questions)
    if spec.reads_question:  # each with a sequence of its own
        image_ids = [name for name, mine in zip(image_ids, questions, strict=True) for _ in mine]
        questions = [[text] for mine in questions for text in mine]
    selected = _seconds(vlm, began)
    began = time.perf_counter()
    prompts = [[vlm.encode_prompt(text) for text in mine] for mine in questions]
    trunk = Trunk(vlm, selection, prompts, spec.position, image_ids, layout)
    limits = [max_new_tokens] * sum(map(len, questions))
    answers = trunk.answer(spec.running_cuts(schedule), limits, spec.seed)

    timings = {"select": selected, "answer": _seconds(vlm, began)}
    kept = _kept(selection, layout, spec, len(trunk.before))
    told = iter(answers)
    found = [
        [
            Generation(vlm.decode_text(list(one.tokens)), one.tokens, kept[row], one.kept, schedule, timings)
            for one in (next(told) for _ in mine)
        ]
        for row, mine in enumerate(questions)
    ]
    if not spec.reads_question:
        return found
    each = iter([one for (one,) in found])
    return [[next(each) for _ in mine] for mine in asked]


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
    found = []
    for row, mine in enumerate(slots.tolist()):
        roles = [
            NEWLINE if newlines[slot] else PILLAR if pillar else COLLECTOR
            for slot, pillar in zip(mine, pillars[row], strict=True)
        ]
        ids = positions[:, row].T.tolist()
        found.append(Kept(tuple(mine), tuple(places[slot] for slot in mine), tuple(map(tuple, ids)), tuple(roles)))
    return found


def _budget(
    method: str, average_tokens: float | None, retention: float | None
) -> Callable[[VisualLayout], float | None]:
    """Average tokens by layout."""
    if method == UNPRUNED:
        if average_tokens is not None or retention is not None:
            raise ValueError("method 'unpruned' takes neither average_tokens nor retention; leave them out")
        return lambda layout: None
    if retention is not None and average_tokens is None:
        if not 0 < retention <= 1:
            raise ValueError(f"retention {retention:g} must lie in (0, 1]")
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
