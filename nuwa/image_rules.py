"""How a protocol hands images to a model where that is not the checkpoint's own affair: pixel limits and layouts.

``image_rules`` names the protocol; what it pins is stated here, family by family. Everything ends in the image processor,
of which an adapter keeps a copy, so that layouts, features and their identity follow from one place.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from nuwa.errors import UserError

LLAVA_NEXT = "llava_next"
QWEN2_VL, QWEN2_5_VL, QWEN3_VL = QWENS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # whose images have pixel limits
CHECKPOINT = "testbed"  # the protocol that leaves images to the checkpoint's processor
Limits = tuple[int, int]
GRIDS = ("transformers", "llava")
BACKENDS = ("pil", "torchvision")


class ImageRulesError(UserError, ValueError):
    """Pixel limits or a layout that a model's family does not have."""


@dataclass(frozen=True)
class Pins:
    """What a protocol pins for one family.

    Attributes:
        pixels: least and most pixels of an image as the model sees it (of :data:`QWENS`, whose processors call them
            ``shortest_edge`` and ``longest_edge`` of ``size``).
        first: the same of a resize that comes before the processor's, by ``qwen_vl_utils``; equal to ``pixels`` where one
            resize does all the work.
        grid: how LLaVA-NeXT's crops lie on images that two grids fit alike.
    """

    pixels: Limits | None = None
    first: Limits | None = None
    grid: Literal["transformers", "llava"] | None = None


PUBLISHED = (4 * 28 * 28, 16384 * 28 * 28)  # of Qwen2.5-VL's checkpoints
HARNESS = (256 * 28 * 28, 2048 * 28 * 28)  # of lmms-eval
# Its class of Qwen2-VL names limits of its own (models/simple/qwen2_vl.py). That of Qwen3-VL hands over images that
# qwen_vl_utils resized by its defaults, 4 to 16,384 tokens, and has the processor resize nothing, so that the limits
# which it names decide about films alone (models/chat/qwen3_vl.py, ``do_resize=False``).
HARNESS_2, HARNESS_3 = (4 * 28 * 28, 768 * 28 * 28), (4 * 32 * 32, 16384 * 32 * 32)
LLAVAS = Pins(grid="llava")
PINS: Mapping[str, Mapping[str, Pins]] = {
    CHECKPOINT: {},
    "lmms_eval": {
        QWEN2_VL: Pins(HARNESS_2, first=HARNESS_2),
        QWEN2_5_VL: Pins(HARNESS, first=PUBLISHED),
        QWEN3_VL: Pins(HARNESS_3, first=HARNESS_3),
        LLAVA_NEXT: LLAVAS,
    },
    "lmms_eval_0_3": {QWEN2_5_VL: Pins(HARNESS), LLAVA_NEXT: LLAVAS},
    "llava": {LLAVA_NEXT: LLAVAS},
    "vscan": {QWEN2_5_VL: Pins(PUBLISHED)},
}


@dataclass(frozen=True)
class ImageRules:
    """The rules a run asks for.

    Attributes:
        protocol: whose pins hold (a name of :mod:`nuwa.benchmarks.protocols`).
        min_pixels: least pixels of an image as a model of :data:`QWENS` sees it; None: as pinned, else as the checkpoint
            has it.
        max_pixels: the most.
        grid: LLaVA-NeXT's crops where two grids fit alike, which is so for images of at most 336 pixels a side: LLaVA's own
            code lays them one above the other, transformers side by side.
        backend: what resizes images, ``pil`` or ``torchvision``.
    """

    protocol: str = CHECKPOINT
    min_pixels: int | None = None
    max_pixels: int | None = None
    grid: Literal["transformers", "llava"] | None = None
    backend: Literal["pil", "torchvision"] = "pil"

    def pins(self, model_type: str) -> Pins:
        """What holds for models of ``model_type``.

        Raises:
            ImageRulesError: limits or a grid are named that such models do not have.
        """
        named = [name for name in ("min_pixels", "max_pixels") if getattr(self, name) is not None]
        if named and model_type not in QWENS:
            raise ImageRulesError(f"{named[0]} is not for {model_type} models; allowed: null")
        if self.grid is not None and model_type != LLAVA_NEXT:
            raise ImageRulesError(f"image_grid {self.grid!r} is not for {model_type} models; allowed: null")
        pinned = PINS[self.protocol].get(model_type, Pins())
        return replace(pinned, grid=self.grid) if self.grid else pinned

    def framed(self, image_processor: Any, model_type: str) -> Any:
        """``image_processor`` under these rules: itself where they change nothing, else a copy. Rules that have been
        applied already change nothing more.

        Raises:
            ImageRulesError: see :meth:`pins`; also limits that exclude each other.
        """
        pins = self.pins(model_type)
        changes: dict[str, Any] = {}
        if pins.pixels or self.min_pixels or self.max_pixels:
            least, most = pins.pixels or (image_processor.size["shortest_edge"], image_processor.size["longest_edge"])
            least, most = self.min_pixels or least, self.max_pixels or most
            if least > most:
                raise ImageRulesError(f"min_pixels {least} must not be above max_pixels {most}")
            changes["size"] = type(image_processor.size)(shortest_edge=least, longest_edge=most)
            if pins.first:
                changes["first_resize"] = (least, most) if pins.first == pins.pixels else pins.first
        if pins.grid == "llava" and getattr(image_processor, "grid", None) != "llava":
            # Published as width and height, read by transformers as height and width.
            turned = [list(point[::-1]) for point in image_processor.image_grid_pinpoints]
            changes |= {"image_grid_pinpoints": turned, "grid": "llava"}
        if not changes:
            return image_processor

        framed = copy.copy(image_processor)
        for name, value in changes.items():
            setattr(framed, name, value)
        return framed
