"""Adapters over stock transformers classes: one file a model family."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nuwa.image_rules import ImageRules, ImageRulesError
from nuwa.registry import Registry
from nuwa.vlm.adapter import Adapter, EncodedImage, EncodedPrompt, PromptError, view_signals
from nuwa.vlm.checkpoint import CheckpointError
from nuwa.vlm.folder import check_folder
from nuwa.vlm.internvl import InternVLAdapter
from nuwa.vlm.llava import LlavaAdapter
from nuwa.vlm.llava_next import LlavaNextAdapter
from nuwa.vlm.llava_onevision import LlavaOnevisionAdapter
from nuwa.vlm.qwen2_5_vl import Qwen2_5VLAdapter
from nuwa.vlm.qwen2_vl import Qwen2VLAdapter
from nuwa.vlm.qwen3_vl import Qwen3VLAdapter
from nuwa.vlm.smolvlm import Idefics3Adapter, SmolVLMAdapter

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# By the model_type of a model's configuration.
ADAPTERS: Registry[type[Adapter]] = Registry("model type")
ADAPTERS.add("idefics3", Idefics3Adapter)
ADAPTERS.add("internvl", InternVLAdapter)
ADAPTERS.add("llava", LlavaAdapter)
ADAPTERS.add("llava_next", LlavaNextAdapter)
ADAPTERS.add("llava_onevision", LlavaOnevisionAdapter)
ADAPTERS.add("qwen2_5_vl", Qwen2_5VLAdapter)
ADAPTERS.add("qwen2_vl", Qwen2VLAdapter)
ADAPTERS.add("qwen3_vl", Qwen3VLAdapter)
ADAPTERS.add("smolvlm", SmolVLMAdapter)


def adapter_class(model_type: str) -> type[Adapter]:
    """The adapter of a model type; raises ``UnknownName`` listing what exists."""
    return ADAPTERS.look_up(model_type)


def usual_image_processor(config: PretrainedConfig) -> Any:
    """The image processor of a configuration's family, with the family's defaults, where none was saved."""
    return adapter_class(config.model_type).usual_image_processor(config)


def load_adapter(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> Adapter:
    """Load a model of any supported family; ``options`` as for :meth:`Adapter.load`.

    A folder is looked over first. Raises :class:`nuwa.vlm.checkpoint.CheckpointError`: what is missing or wrong there,
    in one line; ``UnknownName`` for a model type of no family.
    """
    from transformers import AutoConfig

    if Path(path).is_dir():
        check_folder(Path(path), adapter_class)
    return adapter_class(AutoConfig.from_pretrained(path).model_type).load(path, device, dtype, **options)


def adapt(model: PreTrainedModel, processor: Any, **framing: Any) -> Adapter:
    """The adapter around a model that is already loaded; ``framing`` as of :class:`Adapter`."""
    return adapter_class(model.config.model_type)(model, processor, **framing)


__all__ = [
    "ADAPTERS",
    "Adapter",
    "CheckpointError",
    "EncodedImage",
    "EncodedPrompt",
    "Idefics3Adapter",
    "ImageRules",
    "ImageRulesError",
    "InternVLAdapter",
    "LlavaAdapter",
    "LlavaNextAdapter",
    "LlavaOnevisionAdapter",
    "PromptError",
    "Qwen2VLAdapter",
    "Qwen2_5VLAdapter",
    "Qwen3VLAdapter",
    "SmolVLMAdapter",
    "adapt",
    "adapter_class",
    "load_adapter",
    "usual_image_processor",
    "view_signals",
]
