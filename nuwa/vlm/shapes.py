"""Sizes of published checkpoints, for planning and timing where their weights are not at hand.

Latency, memory and FLOPs depend on shapes only; each configuration is what the checkpoint's ``config.json`` says. A
family's file adds its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuwa.registry import Registry

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SHAPES: Registry[Callable[[], PretrainedConfig]] = Registry("published checkpoint")  # by hub id

# What several families are made of.
CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
VICUNA_7B = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
VICUNA_13B = VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
QWEN_PATCHES = {"num_heads": 16, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}


QWEN2_7B = {
    "model_type": "qwen2",
    "eos_token_id": 151645,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


def qwen2_7b(positions: int) -> dict[str, Any]:
    """The language model of Qwen2-VL-7B and of Qwen2.5-VL-7B, which differ in how many ``positions`` they name."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    sizes = {name: size for name, size in QWEN2_7B.items() if name != "model_type"}  # each family has a type of its own
    return sizes | {"vocab_size": 152064, "max_position_embeddings": positions, "rope_parameters": rope}


def model_shape(path: str) -> PretrainedConfig:
    """The configuration of a checkpoint: known ones without looking, others from their folder or the hub.

    Raises whatever ``AutoConfig.from_pretrained`` raises for a path that holds no model.
    """
    if path in SHAPES and not Path(path).exists():
        return SHAPES[path]()
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path)
