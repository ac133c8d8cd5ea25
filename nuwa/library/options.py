"""What a call may ask for beside model, images and questions: every keyword once, with its meaning and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from nuwa import UNPRUNED
from nuwa.allowed import check_share, check_word
from nuwa.budget import budget_on
from nuwa.layout import VisualLayout
from nuwa.library.refusal import CallError, shown
from nuwa.methods import RECIPES, MethodSpec, check_stage2, specify
from nuwa.positions import NAMES
from nuwa.registry import unknown

# The preset that a method's authors released for a model family, or for the one nearest to it: model_type → its name.
RELEASED = {
    "llava_next": "released_next",
    "llava_onevision": "released_next",
    "qwen2_vl": "released_qwen",
    "qwen2_5_vl": "released_qwen",
    "qwen3_vl": "released_qwen",
}
ON_ERROR = ("raise", "return")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Keywords of :func:`nuwa.generate` and :func:`nuwa.stream`.

    ``method``: see ``nuwa.methods()``. ``average_tokens``: visual tokens, mean over the language model's layers; an
    image that has fewer keeps all. ``retention``: the same as a share of each image's own tokens, for models of dynamic
    grids. One of the two is needed, except by ``unpruned``. ``preset``: of the method's hyper-parameters; null: the one
    released for the model's family, or else the method's first. ``position``, ``stage2`` (``layer``, ``scorer``,
    ``ratio``, ``recycling``), ``without_stage2``, ``parameters``, ``seed``: see :func:`nuwa.methods.specify`.

    ``max_new_tokens``: of every answer. ``batch_images``: images that are encoded and asked together. ``pass_tokens``: about
    how many tokens pass the language model's layers at once, which bounds memory; null: by device and width.
    ``conversation``, ``image_aspect_ratio``: see :class:`nuwa.vlm.Adapter`; the papers' LLaVA-1.5 is ``vicuna_v1`` and
    ``pad``. ``text_tower``: folder of the CLIP model that the encoder is a half of, for methods that read the question
    before the language model (CDPruner); it is read once a model. Weights that a method was trained with and ``parameters``
    does not name are found by the model's encoder (:mod:`nuwa.stage1.found_weights`).

    ``on_error``: ``raise`` ends the call at the first image or question that fails; ``return`` puts a
    :class:`nuwa.library.Failure` in the place of its answer and goes on. ``progress``: true shows a bar; or a function
    that is told ``(done, of how many)`` answers.

    Raises :class:`nuwa.library.refusal.CallError` naming the keyword, its value and what is allowed.
    """

    method: str = "nuwa"
    average_tokens: float | None = None
    retention: float | None = None
    preset: str | None = None
    position: str = "pesp"
    stage2: Mapping[str, Any] | None = None
    without_stage2: bool = False
    parameters: Mapping[str, Any] | None = None
    seed: int = 0
    max_new_tokens: int = 128
    batch_images: int = 8
    pass_tokens: int | None = None
    conversation: str = "template"
    image_aspect_ratio: str = "processor"
    text_tower: str | Path | None = None
    on_error: str = "raise"
    progress: bool | Callable[[int, int], object] = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """From a call's keywords; one that does not exist is refused with the nearest that does."""
        known = [item.name for item in fields(cls)]
        for name in given:
            if name not in known:
                raise CallError(unknown("argument", name, known))
        return cls(**given)

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or self.method not in RECIPES:
            raise CallError(unknown("method", self.method, RECIPES))
        check_word("position", self.position, NAMES)
        check_word("on_error", self.on_error, ON_ERROR)
        _check_whole("max_new_tokens", self.max_new_tokens, 1)
        _check_whole("batch_images", self.batch_images, 1)
        if self.pass_tokens is not None:
            _check_whole("pass_tokens", self.pass_tokens, 1)
        _check_whole("seed", self.seed, 0)
        _check_kind("without_stage2", self.without_stage2, "true or false", bool)
        _check_kind("parameters", self.parameters, "a dictionary of hyper-parameters by name", Mapping, type(None))
        _check_kind("preset", self.preset, "a preset's name", str, type(None))
        if self.preset == "":
            raise CallError("preset='' must be a preset's name")
        _check_kind("text_tower", self.text_tower, "a folder", str, Path, type(None))
        if not callable(self.progress):
            _check_kind("progress", self.progress, "true, false, or a function of (done, all)", bool)

        self._check_budget()
        self._check_stage2()

    def _check_budget(self) -> None:
        tokens, share = self.average_tokens, self.retention
        if self.method == UNPRUNED:
            if tokens is not None or share is not None:
                raise CallError("method 'unpruned' takes neither average_tokens nor retention; leave them out")
            return
        if (tokens is None) == (share is None):
            raise CallError(f"method {self.method!r} needs average_tokens or retention, one of the two")
        if share is not None:
            _check_number("retention", share)
            check_share(f"retention {share:g}", share, "(0, 1]")
        if tokens is not None:
            _check_number("average_tokens", tokens)
            if tokens <= 0:
                raise CallError(f"average_tokens={tokens!r} must be above 0")

    def _check_stage2(self) -> None:
        _check_kind("stage2", self.stage2, "a dictionary", Mapping, type(None))
        if self.stage2 and self.method == UNPRUNED:
            raise CallError(f"method 'unpruned' has no stage 2; leave stage2={shown(dict(self.stage2))} out")
        if self.stage2 and self.without_stage2:
            raise CallError(
                f"without_stage2=True leaves nothing for stage2={shown(dict(self.stage2))} to do; give one of the two"
            )
        if self.without_stage2 and self.method != UNPRUNED and RECIPES[self.method].stage1 == UNPRUNED:
            raise CallError(
                f"method {self.method!r} prunes in stage 2 only; without_stage2=True would leave nothing of it"
            )
        check_stage2(self.stage2 or {})

    @property
    def configured(self) -> dict[str, Any]:
        """The arguments of :func:`nuwa.methods.specify` but budget and preset."""
        return {
            "position": self.position,
            "stage2": dict(self.stage2) if self.stage2 else None,
            "without_stage2": self.without_stage2,
            "parameters": dict(self.parameters) if self.parameters else None,
            "seed": self.seed,
        }

    def preset_on(self, model_type: str) -> str | None:
        """The preset on models of a family: the one that is asked for, or the family's own; null: the method's first."""
        released = RELEASED.get(model_type)
        return self.preset or (released if released in RECIPES[self.method].presets else None)

    def budget_on(self, layout: VisualLayout) -> float | None:
        """Average tokens of an image of ``layout``; null: all."""
        if self.retention is not None:
            return budget_on(layout, self.retention, "share", dynamic=True)
        return None if self.average_tokens is None else budget_on(layout, self.average_tokens, "tokens", dynamic=True)

    def spec_on(self, model_type: str, layout: VisualLayout) -> MethodSpec:
        """The configured method on images of ``layout``; raises ``ValueError`` as :func:`nuwa.methods.specify`."""
        return self.spec_of(model_type, self.budget_on(layout))

    def spec_of(self, model_type: str, budget: float | None) -> MethodSpec:
        """The configured method at ``budget`` average tokens."""
        return specify(self.method, preset=self.preset_on(model_type), budget=budget, **self.configured)


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise CallError(f"{name}={shown(value)} must be a whole number of {least} or more")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise CallError(f"{name}={shown(value)} must be a number")


def _check_kind(name: str, value: Any, allowed: str, *kinds: type) -> None:
    if not isinstance(value, kinds):
        raise CallError(f"{name}={shown(value)} must be {allowed}")
