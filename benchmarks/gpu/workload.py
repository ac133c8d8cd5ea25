"""Models of a checkpoint's shape with random weights, and images and prompts for them.

Time, memory and kernels depend on shapes and not on the values of weights.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from benchmarks.gpu.decoding import answer_from, open_trunk
from benchmarks.gpu.scale import Lengths, Scale
from nuwa.decoder import Answer
from nuwa.generation import ImageBatch, plan, select
from nuwa.layout import VisualLayout
from nuwa.methods import LayoutPlan, MethodSpec
from nuwa.selection import Selection
from nuwa.vlm import Adapter, EncodedImage, EncodedPrompt, adapt, usual_image_processor
from nuwa.vlm.made_pixels import processor_of

DTYPE = torch.bfloat16


class Models:
    """At most one random model at a time: two of 7B need not fit beside what they compute."""

    def __init__(self, scale: Scale, device: torch.device) -> None:
        self.scale, self.device = scale, device
        self.path = ""
        self.adapter: Any = None  # an Adapter, while there is one

    def get(self, path: str) -> Adapter:
        """The model of a checkpoint's shape, its weights drawn on the device; no answer of it ever ends by itself."""
        if path != self.path:
            self.drop()
            torch.manual_seed(0)
            config = self.scale.shape(path)
            with torch.device(self.device):
                model = AutoModelForImageTextToText.from_config(config, dtype=DTYPE, attn_implementation="sdpa")
            processor = SimpleNamespace(image_processor=usual_image_processor(config))
            self.adapter, self.path = adapt(model.eval().requires_grad_(False), processor), path
            self.adapter.end_tokens = ()
        return self.adapter

    def drop(self) -> None:
        self.path, self.adapter = "", None
        release()


def release() -> None:
    """Give memory back that nothing refers to; a module refers to itself."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Workload:
    """Images of one size and questions about each, preprocessed.

    ``pixels``: what the model's image processor makes of the images, on the CPU, image by image along the first axis.
    ``prompts``: those of each image. ``limits``: tokens of each answer, question by question.
    """

    vlm: Adapter
    images: list[Image.Image]
    names: list[str]
    pixels: dict[str, Tensor]
    prompts: list[list[EncodedPrompt]]
    limits: list[int]

    @property
    def layout(self) -> VisualLayout:
        return self.vlm.layout_of(self.images[0].size)

    @property
    def questions(self) -> int:
        return len(self.limits)

    def encode(self) -> list[EncodedImage]:
        """All images through the vision encoder, with their pixels' way to the device."""
        prepared = processor_of(self.vlm.processor.image_processor, self.pixels)
        return adapt(self.vlm.model, prepared).encode_images(self.images)

    def plan(self, spec: MethodSpec) -> LayoutPlan:
        """Raises :class:`nuwa.schedule.UnreachableBudget` where no schedule has the budget."""
        return plan(self.vlm, spec, self.layout)

    def select(self, planned: LayoutPlan, encoded: Sequence[EncodedImage]) -> Selection:
        batch = ImageBatch(encoded=encoded, names=self.names, pictures=self.images)
        return select(self.vlm, planned, self.layout, batch)

    def answer(self, planned: LayoutPlan, selection: Selection, tokens: int | None = None) -> list[Answer]:
        """Prefill and decoding, of ``tokens`` tokens an answer where that is given."""
        trunk = open_trunk(self.vlm, planned, selection, self.prompts, self.names, self.layout)
        return answer_from(trunk, planned, self.limits if tokens is None else [tokens] * self.questions)

    def stock_inputs(self, start: int = 0, rows: int | None = None) -> dict[str, Tensor]:
        """What stock ``generate`` takes for ``rows`` questions from ``start``, padded at the left, on the device."""
        owners = [row for row, prompts in enumerate(self.prompts) for _ in prompts]
        prompts = [prompt for about_image in self.prompts for prompt in about_image]
        part = slice(start, start + (rows or self.questions))
        image = self.vlm.image_ids(self.layout)
        ids = [[*prompt.before, *image, *prompt.after] for prompt in prompts[part]]

        longest = max(map(len, ids))
        padding = [longest - len(row) for row in ids]
        tokens = torch.tensor([[0] * count + row for count, row in zip(padding, ids, strict=True)])
        mask = torch.tensor([[0] * count + [1] * (longest - count) for count in padding])
        model, owned = self.vlm.model, torch.tensor(owners[part])
        pixels = {name: value[owned] for name, value in self.pixels.items()}
        return {
            name: value.to(self.vlm.device, model.dtype if value.is_floating_point() else None)
            for name, value in {"input_ids": tokens, "attention_mask": mask, **pixels}.items()
        }

    def stock_generate(self, inputs: dict[str, Tensor], tokens: int) -> Tensor:
        """Exactly ``tokens`` tokens of every answer by the model's own greedy ``generate``."""
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
        return self.vlm.model.generate(**inputs, **lengths, do_sample=False)


def draw_workload(vlm: Adapter, side: int, images: int, questions: int, lengths: Lengths, seed: int = 0) -> Workload:
    """Random square images of ``side`` pixels, and ``questions`` prompts about each of random words."""
    rng = np.random.default_rng(seed)
    pictures = [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(images)]
    words = np.delete(np.arange(1, vlm.model.config.text_config.vocab_size), vlm.image_token - 1)

    draw = partial(_draw_ids, rng, words)
    before, instruction, closing = (tuple(draw(n)) for n in (lengths.before, lengths.instruction, lengths.closing))
    prompts = []
    for _ in range(images):
        counts = rng.integers(lengths.shortest, lengths.longest + 1, size=questions)
        prompts.append([EncodedPrompt(before, (*instruction, *draw(count), *closing)) for count in counts])
    least, most = lengths.answer
    limits = rng.integers(least, most + 1, size=images * questions).tolist()

    pixels = vlm.processor.image_processor(pictures, return_tensors="pt")
    names = [f"image {number}" for number in range(images)]
    return Workload(vlm, pictures, names, dict(pixels), prompts, limits)


def _draw_ids(rng: np.random.Generator, words: np.ndarray, count: Any) -> list[int]:
    return rng.choice(words, int(count)).tolist()
