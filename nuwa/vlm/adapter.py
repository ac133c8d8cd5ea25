"""What the decoder and stage 1 need of a vision-language model, over a stock transformers class.

An adapter uses its model as it is: nothing is patched, hooked, subclassed or replaced, and no state is kept outside
it, so several adapters and plain ``generate`` may share a process and even a model.
"""

from __future__ import annotations

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, PreTrainedModel

from nuwa.grid import PatchGrid
from nuwa.layout import VisualLayout
from nuwa.selection import Selection
from nuwa.signals import SIGNAL_NAMES, VisionSignals

# The system prompt by name of the conversation; ``template``: what the model's own chat template says.
CONVERSATIONS = {
    "template": None,
    "vicuna_v1": (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
}
ASPECT_RATIOS = ("processor", "pad")  # of images, see Adapter


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids before and after the image placeholder; the part before is the same for every question."""

    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class EncodedImage:
    """What the encoder says of one image: everything that must be cached to answer without its pixels.

    ``signals``: the tensors of ``SIGNAL_NAMES``, each with ``layout.patches`` tokens first, view behind view.
    """

    layout: VisualLayout
    signals: dict[str, Tensor]

    def to(self, *args: Any, **kwargs: Any) -> EncodedImage:
        """The same on another device or in another dtype, as ``torch.Tensor.to``."""
        return EncodedImage(self.layout, {name: value.to(*args, **kwargs) for name, value in self.signals.items()})


def view_signals(
    layout: VisualLayout,
    signals: Mapping[str, Tensor],
    image_ids: Sequence[str],
    resized: Callable[[PatchGrid], Tensor] | None = None,
    encoder: str | None = None,
) -> list[VisionSignals]:
    """Every view of several images of one layout, as stage 1 reads it; ``signals`` ``(images, layout.patches, ...)``."""
    counts = [view.grid.tokens for view in layout.views]
    parts = {
        name: signals[name].split(counts, dim=1) if name in signals else [None] * len(counts) for name in SIGNAL_NAMES
    }
    found = []
    for number, view in enumerate(layout.views):
        # What is random must not draw alike in two views of an image.
        ids = tuple(f"{image} view {number}" if number else image for image in image_ids)
        own = {name: parts[name][number] for name in SIGNAL_NAMES}
        found.append(VisionSignals(view.grid, **own, image_ids=ids, encoder=encoder, resized=resized))
    return found


class Adapter(ABC):
    """One loaded model.

    ``offers_cls``: whether the encoder has a CLS token whose attention ranks patches. Where it has none,
    ``cls_attention`` of the signals is the attention a token receives, which only methods that say so may read.
    ``resizes``: whether images can be encoded at a smaller size (:meth:`encode_resized`).
    ``dynamic``: whether images differ in layout.
    ``layout``: the layout of every image where all images have the same, else null.

    ``conversation``: a key of ``CONVERSATIONS``. ``image_aspect_ratio``: ``processor`` hands images to the processor as
    they are; ``pad`` first makes them square with bars of the processor's mean colour, as LLaVA-1.5's own code does. The
    processors of its published conversions cut the middle out instead. Only an encoder of square images (``pads``) asks.
    """

    model_class: ClassVar[type[PreTrainedModel]]
    encoder: ClassVar[str]  # what messages call it
    offers_cls: ClassVar[bool]
    resizes: ClassVar[bool] = False
    dynamic: ClassVar[bool] = True
    pads: ClassVar[bool] = False
    layout: VisualLayout | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        *,
        conversation: str = "template",
        image_aspect_ratio: str = "processor",
    ) -> None:
        check_framing(type(self), conversation, image_aspect_ratio)
        window = _sliding_window(model.config.text_config)
        if window is not None:
            raise ValueError(
                f"model.text_config.sliding_window = {window}: sliding-window attention is not supported; "
                "set it to null where prompt and answer are shorter than the window"
            )
        self.model = model.eval()
        self.processor = processor
        self.language = model.model.language_model
        self.image_token = model.config.image_token_id
        self.end_tokens = _end_tokens(model)
        self.repetition_penalty = float(model.generation_config.repetition_penalty or 1.0)
        self.image_aspect_ratio = image_aspect_ratio
        system = CONVERSATIONS[conversation]
        # Messages that stand before the first question.
        self.opening = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        attention: str = "sdpa",
        device_map: str | dict | None = None,
        **framing: str,
    ) -> Self:
        """Model and processor from a folder or hub id, with plain ``from_pretrained``.

        ``attention``: ``sdpa``, ``eager``, or ``flash_attention_2`` where it is installed. ``device_map`` spreads the
        layers with Accelerate and replaces ``device``. ``framing``: ``conversation`` and ``image_aspect_ratio``.
        """
        model = cls.model_class.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, device_map=device_map
        ).requires_grad_(False)
        model = model if device_map is not None else model.to(device)
        return cls(model, AutoProcessor.from_pretrained(path), **framing)

    @property
    def device(self) -> torch.device:
        """Where token ids and masks are kept: the device of the word embeddings, offloaded or not."""
        hook = getattr(self.language.embed_tokens, "_hf_hook", None)
        execution = getattr(hook, "execution_device", None)
        return torch.device(execution) if execution is not None else self.language.embed_tokens.weight.device

    @property
    def layers(self) -> int:
        return len(self.language.layers)

    @property
    def flash_attention(self) -> bool:
        """Whether the language model's kernels take key lengths instead of masks."""
        return "flash" in self.language.config._attn_implementation

    @classmethod
    @abstractmethod
    def layout_for(cls, config: Any, image_processor: Any, size: tuple[int, int]) -> VisualLayout:
        """The layout of an image of ``size`` (width, height), from a model's configuration; nothing is encoded."""

    @classmethod
    @abstractmethod
    def signal_widths(cls, config: Any) -> dict[str, int]:
        """How many numbers each signal has a token."""

    def layout_of(self, size: tuple[int, int]) -> VisualLayout:
        """The layout of an image of ``size`` (width, height)."""
        return self.layout_for(self.model.config, self.processor.image_processor, size)

    @abstractmethod
    def encode_images(self, images: Sequence[Image.Image]) -> list[EncodedImage]:
        """Preprocess and encode; images may differ in size and, where the model allows it, in layout."""

    def encode_resized(self, images: Sequence[Image.Image], grid: PatchGrid) -> Tensor:
        """Features of images made smaller so that they have ``grid``, ``(batch, grid.tokens, dim)``."""
        raise NotImplementedError(f"{self.encoder} encodes images at their own size only")

    @abstractmethod
    def project(self, features: Tensor) -> Tensor:
        """Encoder features ``(batch, kept, vision_dim)`` → language embeddings ``(batch, kept, dim)``."""

    def embed_visual(self, selection: Selection, layout: VisualLayout) -> Tensor:
        """Language embeddings of a selection over slots, ``(batch, kept, dim)``."""
        return self.project(selection.features)

    def rotation(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What the model's layers take as ``position_embeddings``; ``positions`` ``(axes, batch, tokens)``."""
        return self.language.rotary_emb(hidden, position_ids=positions[0].to(hidden.device))

    def head_rotation(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for one attention head, ``(batch, tokens, head_dim)`` each."""
        return self.rotation(hidden, positions)

    def encode_prompt(self, text: str) -> EncodedPrompt:
        """The model's own chat template around ``text`` and one image, split at the image placeholder.

        Raises ``ValueError`` where the template hides the conversation's system prompt.
        """
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        full = self.processor.apply_chat_template([*self.opening, turn], add_generation_prompt=True, tokenize=False)
        for message in self.opening:
            (system,) = message["content"]
            if system["text"] not in full:
                raise ValueError("the model's chat template shows no system prompt: use conversation 'template'")
        ids = self.processor.tokenizer(full).input_ids
        if ids.count(self.image_token) != 1:
            raise ValueError(f"the prompt {full!r} must hold exactly one image placeholder")
        at = ids.index(self.image_token)
        return EncodedPrompt(tuple(ids[:at]), tuple(ids[at + 1 :]))

    def decode_text(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    @property
    @abstractmethod
    def encoder_modules(self) -> dict[str, torch.nn.Module]:
        """The parts of the model that decide the signals, by name."""

    @property
    @abstractmethod
    def encoder_settings(self) -> list[Any]:
        """What decides the signals beside weights and preprocessing: layers read and averaged."""

    def encoder_fingerprint(self) -> str:
        """Digest of what decides the signals: encoder weights, layers read and image preprocessing."""
        preprocessing = self.processor.image_processor.to_dict()
        digest = hashlib.sha256(json.dumps(preprocessing, sort_keys=True, default=str).encode())
        digest.update(json.dumps(self.encoder_settings).encode())
        for name, module in self.encoder_modules.items():
            digest.update(name.encode())
            _digest_weights(digest, module.state_dict())
        return digest.hexdigest()

    @functools.cached_property
    def encoder_identity(self) -> str:
        """The encoder's fingerprint when it was first needed: to read all weights for every batch would be slow."""
        return self.encoder_fingerprint()

    def fingerprint(self) -> str:
        """Digest of all weights and of the prompt format."""
        digest = hashlib.sha256(self.encoder_fingerprint().encode())
        digest.update(json.dumps(self.encode_prompt("?").__dict__).encode())
        _digest_weights(digest, self.model.state_dict())
        return digest.hexdigest()


def check_framing(family: type[Adapter], conversation: str, image_aspect_ratio: str) -> None:
    """Raises ``ValueError`` that names the argument and what is allowed for models of ``family``."""
    if conversation not in CONVERSATIONS:
        raise ValueError(f"conversation {conversation!r} is unknown; allowed: {', '.join(CONVERSATIONS)}")
    allowed = ASPECT_RATIOS if family.pads else ASPECT_RATIOS[:1]
    if image_aspect_ratio not in allowed:
        raise ValueError(
            f"image_aspect_ratio {image_aspect_ratio!r} is not for {family.encoder}; allowed: {', '.join(allowed)}"
        )


def _digest_weights(digest: Any, state: dict[str, Tensor]) -> None:
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())


def _end_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    end = model.generation_config.eos_token_id
    end = end if end is not None else model.config.text_config.eos_token_id
    return tuple(end) if isinstance(end, (list, tuple)) else (end,)


def _sliding_window(config: Any) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)
