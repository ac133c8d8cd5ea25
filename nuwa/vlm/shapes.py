"""Sizes of the published checkpoints, for planning and timing where their weights are not at hand.

Latency, memory and FLOPs depend on shapes only; each configuration is what the checkpoint's ``config.json`` says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

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
ANYRES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def _llava(language: dict) -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP_L_336), text_config=LlamaConfig(**language), image_token_id=32000
    )


def _llava_next() -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**CLIP_L_336),
        text_config=LlamaConfig(**VICUNA_7B),
        image_token_id=32000,
        image_grid_pinpoints=ANYRES,
    )


def _qwen2_5_vl() -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "out_hidden_size": 3584,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    )


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "llava-hf/llava-1.5-7b-hf": lambda: _llava(VICUNA_7B),
    "llava-hf/llava-1.5-13b-hf": lambda: _llava(VICUNA_13B),
    "llava-hf/llava-v1.6-vicuna-7b-hf": _llava_next,
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5_vl,
}


def model_shape(path: str) -> PretrainedConfig:
    """The configuration of a checkpoint: known ones without looking, others from their folder or the hub.

    Raises whatever ``AutoConfig.from_pretrained`` raises for a path that holds no model.
    """
    if path in SHAPES and not Path(path).exists():
        return SHAPES[path]()
    return AutoConfig.from_pretrained(path)


def usual_image_processor(config: PretrainedConfig) -> Any:
    """The image processor of a configuration's family, with the family's defaults, where none was saved."""
    vision = config.vision_config
    if config.model_type == "qwen2_5_vl":
        return Qwen2VLImageProcessorPil(patch_size=vision.patch_size, merge_size=vision.spatial_merge_size)
    side = vision.image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if config.model_type == "llava_next":
        return LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=config.image_grid_pinpoints)
    return CLIPImageProcessorPil(**sizes)
