"""Qwen3-VL (``Qwen3VLForConditionalGeneration``): Qwen2-VL's grids, and encoder features that enter early layers (DeepStack).

Behind some blocks of the encoder (8, 16 and 24 of 27) a merger of their own makes a vector of every merged token, and the
language model adds the k-th of these to the token's hidden state behind its k-th layer (transformers 5.23,
``models/qwen3_vl/modeling_qwen3_vl.py``, ``Qwen3VLTextModel.forward``). Here they stand in ``features`` behind the vector
that enters the first layer, so that they follow wherever a token goes, are merged as it is, and compare with nothing
(``deep`` of :class:`nuwa.layout.VisualLayout`).

Every block sees the whole image. Position ids are Qwen2-VL's; that the language model interleaves their frequencies and
normalises queries and keys is its own affair. It tells boxes as JSON on a frame of 1000 x 1000 whatever the image's size
(github.com/QwenLM/Qwen3-VL, ``cookbooks/2d_grounding.ipynb``): the variant ``thousandths`` of a grounding benchmark.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nuwa.grid import PatchGrid
from nuwa.layout import VisualLayout
from nuwa.vlm.adapter import FromTransformers
from nuwa.vlm.qwen2_vl import Qwen2VLAdapter
from nuwa.vlm.shapes import SHAPES

if TYPE_CHECKING:
    from transformers import Qwen3VLConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

PIXELS = {
    "shortest_edge": 256 * 16 * 16,
    "longest_edge": 65536 * 16 * 16,
}  # of the checkpoints' preprocessor_config.json


class Qwen3VLAdapter(Qwen2VLAdapter):
    model_class = FromTransformers("Qwen3VLForConditionalGeneration")
    encoder = "Qwen3-VL's vision encoder"
    turn = "{system}<|im_start|>user\n<|vision_start|><image><|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    usual_system = ""

    @classmethod
    def layout_on(cls, config: Any, grid: PatchGrid) -> VisualLayout:
        layout = super().layout_on(config, grid)
        return VisualLayout(layout.views, layout.axes, deep=len(config.vision_config.deepstack_visual_indexes))

    @classmethod
    def usual_image_processor(cls, config: Any) -> Qwen2VLImageProcessorPil:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        return Qwen2VLImageProcessorPil(
            size=PIXELS,
            patch_size=config.vision_config.patch_size,
            merge_size=config.vision_config.spatial_merge_size,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )

    @classmethod
    def signal_widths(cls, config: Any) -> dict[str, int]:
        vision = config.vision_config
        merged = vision.out_hidden_size
        entering = (1 + len(vision.deepstack_visual_indexes)) * merged
        return {"features": entering, "cls_attention": 1, "keys": vision.hidden_size, "similarity": merged}

    def entering_text(self, encoded: Any) -> Tensor:
        return torch.cat([encoded.pooler_output, *encoded.deepstack_features], dim=-1)

    @property
    def encoder_settings(self) -> list[Any]:
        return [*super().encoder_settings, list(self.visual.deepstack_visual_indexes)]


@functools.partial(SHAPES.add, "Qwen/Qwen3-VL-8B-Instruct")
def _shape() -> Qwen3VLConfig:
    from transformers import Qwen3VLConfig

    return Qwen3VLConfig(
        # As config.json of the checkpoint has it; what is not named is the default of transformers.
        text_config={
            "vocab_size": 151936,
            "eos_token_id": 151645,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
        },
        vision_config={"out_hidden_size": 4096},
    )
