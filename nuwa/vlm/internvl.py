"""InternVL3 in transformers' form (``InternVLForConditionalGeneration``): tiles and a thumbnail, pixel shuffle.

The image is resized to the arrangement of at most twelve tiles that is closest to its shape, and cut; where there is more
than one tile a thumbnail of the whole follows. InternViT sees each on its own, and pixel shuffle lays the features of 2 x 2
patches side by side as one token: 256 a tile, tile behind tile in the sequence (transformers 5.23,
``models/internvl/modeling_internvl.py`` and ``models/got_ocr2/image_processing_pil_got_ocr2.py``). Each tile is a view
that stage 1 prunes on its own.

``features`` are shuffled, before the projector. What the encoder says patch by patch, CLS attention, keys and similarity
features, is the mean over a token's four patches. The language model tells boxes on a frame of 1000 x 1000 whatever the
image's size (internvl.readthedocs.io, grounding data): the variants ``thousandths`` and ``ref_tags`` of a grounding benchmark.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from nuwa.grid import PatchGrid
from nuwa.layout import View, VisualLayout
from nuwa.vlm.adapter import WHOLE, Adapter, EncodedImage, Frame, FromTransformers
from nuwa.vlm.checkpoint import CheckpointError
from nuwa.vlm.clip import FURTHER_LAYERS, SIMILARITY_FROM, earlier_layer
from nuwa.vlm.received import received
from nuwa.vlm.shapes import QWEN2_7B, SHAPES

if TYPE_CHECKING:
    from transformers import InternVLConfig, InternVLForConditionalGeneration
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

TILES = 16  # that pass the tower at once; an image may have 13
# What the processor puts for an image, and around it.
CONTEXT, START, END = "<IMG_CONTEXT>", "<img>", "</img>"


class InternVLAdapter(Adapter):
    model_class = FromTransformers("InternVLForConditionalGeneration")
    encoder = "InternVL's vision tower"
    offers_cls = True
    turn = "{system}<|im_start|>user\n<img><image></img>\n{text}<|im_end|>\n<|im_start|>assistant\n"

    def __init__(self, model: InternVLForConditionalGeneration, processor: Any, **framing: Any) -> None:
        self.check_config(model.config)
        for name, token in (("image_token", CONTEXT), ("start_image_token", START), ("end_image_token", END)):
            if (held := getattr(processor, name, token)) != token:
                raise CheckpointError(
                    f"the processor's {name} = {held!r}: InternVL3's is {token!r}; others are not supported"
                )
        super().__init__(model, processor, **framing)
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.grid = _grid(model.config)

    @property
    def heads(self) -> int:
        return self.tower.config.num_attention_heads

    @classmethod
    def check_config(cls, config: Any) -> None:
        vision, layer = config.vision_config, config.vision_feature_layer
        if vision.model_type != "internvl_vision":
            raise CheckpointError(
                f"config.vision_config.model_type = {vision.model_type!r}: {cls.encoder} is read as internvl_vision; "
                "other towers are not supported"
            )
        if config.vision_feature_select_strategy != "default" or not isinstance(layer, int):
            raise CheckpointError(
                f"config.vision_feature_select_strategy = {config.vision_feature_select_strategy!r} with "
                f"vision_feature_layer {layer!r}: only one layer and 'default' (no CLS) are supported"
            )

        depth = vision.num_hidden_layers
        if not -depth <= layer <= depth or layer == 0:
            raise CheckpointError(
                f"config.vision_feature_layer = {layer}: the tower has {depth} layers; "
                f"allowed: 1 to {depth} and -{depth} to -1"
            )
        sides = [size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True)]
        if sides[0] != sides[1] or sides[0] % _side(config):
            raise CheckpointError(
                f"config.vision_config has {sides[0]} x {sides[1]} patches a tile and config.downsample_ratio = "
                f"{config.downsample_ratio}: only square tiles that {_side(config)} divides are supported"
            )
        super().check_config(config)

    @classmethod
    def layout_for(cls, config: Any, image_processor: Any, size: tuple[int, int]) -> VisualLayout:
        width, height = size
        tiles = image_processor.get_number_of_image_patches(height, width, {"crop_to_patches": True})
        return VisualLayout((View(_grid(config)),) * tiles)

    @classmethod
    def signal_widths(cls, config: Any) -> dict[str, int]:
        width = config.vision_config.hidden_size
        return {"features": _side(config) ** 2 * width, "cls_attention": 1, "keys": width, "similarity": width}

    @classmethod
    def usual_image_processor(cls, config: Any) -> GotOcr2ImageProcessorPil:
        from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        height, width = config.vision_config.image_size
        return GotOcr2ImageProcessorPil(
            size={"height": height, "width": width},
            image_mean=IMAGENET_DEFAULT_MEAN,
            image_std=IMAGENET_DEFAULT_STD,
            crop_to_patches=True,
        )

    @classmethod
    def view_frames(cls, config: Any, layout: VisualLayout, size: tuple[int, int]) -> tuple[Frame, ...]:
        """Tiles row by row; the thumbnail, and a tile that is alone, show the whole."""
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        tiles, (width, height) = len(layout.views) - 1, size
        if not tiles:
            return (WHOLE,)
        columns, rows = get_optimal_tiled_canvas((height, width), tuple(config.vision_config.image_size), tiles, tiles)
        frames = [
            (column / columns, row / rows, 1 / columns, 1 / rows) for row in range(rows) for column in range(columns)
        ]
        return (*frames, WHOLE)

    def prompt_text(self, rendered: str) -> str:
        return rendered.replace(CONTEXT, f"{START}{CONTEXT}{END}")

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image], further: Collection[str] = ()) -> list[EncodedImage]:
        inputs = self.processor.image_processor(list(images), crop_to_patches=True, return_tensors="pt")
        counts = [int(count) for count in inputs["num_patches"]]
        tiles = inputs["pixel_values"].to(self.device, self.tower.dtype)
        parts = [self._encode(part, further) for part in tiles.split(TILES)]
        encoded = {name: torch.cat([part[name] for part in parts]).split(counts) for name in parts[0]}
        return [
            EncodedImage(
                VisualLayout((View(self.grid),) * count),
                {name: held[number].flatten(0, 1) for name, held in encoded.items()},
            )
            for number, count in enumerate(counts)
        ]

    def _encode(self, tiles: Tensor, further: Collection[str]) -> dict[str, Tensor]:
        """Signals of ``(tiles, 3, side, side)``, each ``(tiles, tokens, ...)``."""
        out = self.tower(tiles, output_hidden_states=True)
        states, layer = out.hidden_states, self.model.config.vision_feature_layer
        at = layer % len(states)
        # The stock model reads the last layer behind a norm that some towers have.
        read = out.last_hidden_state if layer == -1 else states[at]
        first = round(SIMILARITY_FROM * (len(states) - 1))
        signals = {
            "features": self._shuffled(read[:, 1:]),
            "cls_attention": self._mean(self._cls_attention(at, states)),
            "keys": self._mean(self._keys(at, states)[:, 1:]),
            "similarity": self._mean(torch.stack(states[first:]).mean(dim=0)[:, 1:]),
        }

        if "received_late" in further:
            signals["received_late"] = self._mean(self._received(at, states))
        for name, share in FURTHER_LAYERS.items():
            if name in further:
                early = earlier_layer(name, share, len(states) - 1, at)
                reading = self._cls_attention if name == "early_attention" else self._received
                signals[name] = self._mean(reading(early, states))
        return signals

    def _shuffled(self, patches: Tensor) -> Tensor:
        """``(tiles, patches, dim)`` → ``(tiles, tokens, 4 · dim)``, as the stock model does."""
        side = self.grid.height * _side(self.model.config)
        squares = patches.reshape(len(patches), side, side, -1)
        return self.model.model.pixel_shuffle(squares, scale_factor=self.model.config.downsample_ratio).flatten(1, 2)

    def _mean(self, patches: Tensor) -> Tensor:
        """``(tiles, patches, ...)`` → means over each token's patches, ``(tiles, tokens, ...)``."""
        side, merge = self.grid.height, _side(self.model.config)
        squares = patches.reshape(len(patches), side, merge, side, merge, -1).float().mean(dim=(2, 4))
        return squares.reshape(len(patches), side * side, *patches.shape[2:]).to(patches.dtype)

    def _keys(self, number: int, states: tuple[Tensor, ...]) -> Tensor:
        """Keys of layer ``number``, counted from 1, ``(tiles, tokens, dim)`` with CLS first."""
        layer = self.tower.encoder.layer[number - 1]
        return layer.attention.k_norm(layer.attention.k_proj(layer.layernorm_before(states[number - 1])))

    def _queries(self, number: int, states: tuple[Tensor, ...]) -> Tensor:
        layer = self.tower.encoder.layer[number - 1]
        return layer.attention.q_norm(layer.attention.q_proj(layer.layernorm_before(states[number - 1])))

    def _per_head(self, values: Tensor) -> Tensor:
        return values.view(*values.shape[:2], self.heads, -1).transpose(1, 2)

    def _cls_attention(self, number: int, states: tuple[Tensor, ...]) -> Tensor:
        """Attention from CLS to each patch, mean over heads, ``(tiles, patches)`` float32."""
        query, key = self._per_head(self._queries(number, states)[:, :1]), self._per_head(self._keys(number, states))
        scores = query @ key.transpose(2, 3) * self.tower.encoder.layer[number - 1].attention.scale
        return scores.softmax(dim=-1, dtype=torch.float32).mean(dim=1)[:, 0, 1:]

    def _received(self, number: int, states: tuple[Tensor, ...]) -> Tensor:
        """Attention that each patch receives, mean over heads and all queries, ``(tiles, patches)`` float32."""
        query, key = self._per_head(self._queries(number, states)), self._per_head(self._keys(number, states))
        return received(query, key, self.tower.encoder.layer[number - 1].attention.scale)[:, 1:]

    @torch.inference_mode()
    def project(self, features: Tensor) -> Tensor:
        return self.projector(features.to(self.device, self.language.embed_tokens.weight.dtype))

    @property
    def encoder_modules(self) -> dict[str, nn.Module]:
        return {"tower": self.tower}

    @property
    def encoder_settings(self) -> list[Any]:
        config = self.model.config
        return [config.vision_feature_layer, SIMILARITY_FROM, config.downsample_ratio]


def _side(config: Any) -> int:
    """Patches a side of what pixel shuffle makes one token."""
    return int(1 / config.downsample_ratio)


def _grid(config: Any) -> PatchGrid:
    """The tokens of one tile."""
    vision = config.vision_config
    side = vision.image_size[0] // vision.patch_size[0] // _side(config)
    return PatchGrid(side, side)


@functools.partial(SHAPES.add, "OpenGVLab/InternVL3-8B-hf")
def _shape() -> InternVLConfig:
    from transformers import InternVLConfig

    return InternVLConfig(
        # As config.json of the checkpoint has it; what is not named is the default of transformers.
        text_config=QWEN2_7B | {"vocab_size": 151674},
        vision_config={"attention_bias": True},
        tie_word_embeddings=False,
    )
