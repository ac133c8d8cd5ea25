"""Adapters over stock transformers classes: one file a model family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from nuwa.vlm.adapter import Adapter, EncodedImage, EncodedPrompt, view_signals
from nuwa.vlm.llava import LlavaAdapter
from nuwa.vlm.llava_next import LlavaNextAdapter
from nuwa.vlm.qwen2_5_vl import Qwen2_5VLAdapter

# By the model_type of a model's configuration.
ADAPTERS: dict[str, type[Adapter]] = {
    "llava": LlavaAdapter,
    "llava_next": LlavaNextAdapter,
    "qwen2_5_vl": Qwen2_5VLAdapter,
}


def adapter_class(model_type: str) -> type[Adapter]:
    """The adapter of a model type; raises ``ValueError`` naming what exists."""
    if model_type not in ADAPTERS:
        raise ValueError(f"model type {model_type!r} is not supported; supported: {', '.join(ADAPTERS)}")
    return ADAPTERS[model_type]


def load_adapter(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> Adapter:
    """Load a model of any supported family; ``options`` as for :meth:`Adapter.load`."""
    return adapter_class(AutoConfig.from_pretrained(path).model_type).load(path, device, dtype, **options)


def adapt(model: PreTrainedModel, processor: Any, **framing: str) -> Adapter:
    """The adapter around a model that is already loaded; ``framing`` as of :class:`Adapter`."""
    return adapter_class(model.config.model_type)(model, processor, **framing)


__all__ = [
    "ADAPTERS",
    "Adapter",
    "EncodedImage",
    "EncodedPrompt",
    "LlavaAdapter",
    "LlavaNextAdapter",
    "Qwen2_5VLAdapter",
    "adapt",
    "adapter_class",
    "load_adapter",
    "view_signals",
]
