"""SmolVLM, SmolVLM2 and Idefics3 (``SmolVLMForConditionalGeneration``, ``Idefics3ForConditionalGeneration``): tiles by name.

The image is resized to the processor's longest side, stretched to whole tiles and cut; the whole, shrunk to one tile, comes
last. SigLIP sees each on its own, and pixel shuffle lays the features of 3 x 3 or 4 x 4 patches side by side as one token.
Before every tile stand tokens of text that say which it is: its row and column behind ``<fake_token_around_image>``, a line
break where a row begins, an empty line and ``<global-img>`` before the whole (transformers 5.23,
``models/smolvlm/processing_smolvlm.py``, ``image_processing_pil_smolvlm.py`` and ``modeling_smolvlm.py``).

Each tile is a view that stage 1 prunes on its own. The tokens that name tiles are put back after stage 1 and count in a
budget, as LLaVA-NeXT's newline tokens do, and a cut inside the language model treats them as visual tokens like any other.

``features`` are shuffled, before the projection. What the encoder says patch by patch is the mean over a token's patches.
SigLIP has no CLS token: ``cls_attention`` is the attention a token receives in the last layer, mean over heads and queries.
Their documentation names no form in which they tell boxes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from nuwa.grid import PatchGrid
from nuwa.layout import View, VisualLayout, images_of
from nuwa.selection import Selection
from nuwa.vlm.adapter import WHOLE, Adapter, EncodedImage, Frame, FromTransformers
from nuwa.vlm.checkpoint import CheckpointError
from nuwa.vlm.clip import FURTHER_LAYERS, SIMILARITY_FROM, earlier_layer
from nuwa.vlm.received import received
from nuwa.vlm.shapes import SHAPES

if TYPE_CHECKING:
    from transformers import SmolVLMConfig
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

TILES = 16  # that pass the tower at once; an image may have 17
TOWERS = ("smolvlm_vision", "idefics3_vision")
IMAGE, AROUND, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
# Tokens before a tile: alone or first, beside another, at the beginning of a further line.
FIRST, BESIDE, BELOW = 1, 2, 3


class SmolVLMAdapter(Adapter):
    model_class = FromTransformers("SmolVLMForConditionalGeneration")
    language_name = "text_model"
    encoder = "SmolVLM's SigLIP tower"
    offers_cls = False
    turn = "<|im_start|>{system}User:<image>{text}<end_of_utterance>\nAssistant:"

    def __init__(self, model: Any, processor: Any, **framing: Any) -> None:
        self.check_config(model.config)
        super().__init__(model, processor, **framing)
        self.tower = model.model.vision_model
        self.connector = model.model.connector
        self.grid = _grid(model.config)
        told = getattr(processor, "image_seq_len", self.grid.tokens)
        if told != self.grid.tokens:
            raise CheckpointError(
                f"the processor's image_seq_len = {told}, and the model makes {self.grid.tokens} tokens of a tile; fetch "
                "processor_config.json of the checkpoint"
            )
        self.names: dict[VisualLayout, Tensor] = {}

    @property
    def heads(self) -> int:
        return self.tower.config.num_attention_heads

    @classmethod
    def check_config(cls, config: Any) -> None:
        vision, factor = config.vision_config, config.scale_factor
        if vision.model_type not in TOWERS:
            raise CheckpointError(
                f"config.vision_config.model_type = {vision.model_type!r}: {cls.encoder} is read as {TOWERS[0]}; "
                "other towers are not supported"
            )
        if not isinstance(vision.image_size, int) or (vision.image_size // vision.patch_size) % factor:
            raise CheckpointError(
                f"config.vision_config.image_size = {vision.image_size} in patches of {vision.patch_size} with scale_factor "
                f"{factor}: only square tiles whose patches the factor divides are supported"
            )
        super().check_config(config)

    @classmethod
    def layout_for(cls, config: Any, image_processor: Any, size: tuple[int, int]) -> VisualLayout:
        tile = image_processor.max_image_size["longest_edge"]
        if tile != config.vision_config.image_size:
            raise CheckpointError(
                f"the image processor's max_image_size = {tile}, and config.vision_config.image_size = "
                f"{config.vision_config.image_size}: only tiles of the tower's own size are supported"
            )
        rows, columns = _arrangement(image_processor, size)
        leading = [FIRST]
        if rows:
            line = [BESIDE] * (columns - 1)
            leading = [FIRST, *line, *[BELOW, *line] * (rows - 1), BELOW]
        return VisualLayout(tuple(View(_grid(config), leading=count) for count in leading))

    def layout_of(self, size: tuple[int, int]) -> VisualLayout:
        layout = super().layout_of(size)
        if hasattr(self.processor, "tokenizer"):
            self._names(layout)  # refuses a tokenizer before any work
        return layout

    @classmethod
    def signal_widths(cls, config: Any) -> dict[str, int]:
        width = config.vision_config.hidden_size
        return {"features": config.scale_factor**2 * width, "cls_attention": 1, "keys": width, "similarity": width}

    @classmethod
    def usual_image_processor(cls, config: Any) -> SmolVLMImageProcessorPil:
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

        side = config.vision_config.image_size
        return SmolVLMImageProcessorPil(size={"longest_edge": 4 * side}, max_image_size={"longest_edge": side})

    @classmethod
    def view_frames(cls, config: Any, layout: VisualLayout, size: tuple[int, int]) -> tuple[Frame, ...]:
        """Tiles row by row, and the whole."""
        rows, columns = _shape_of(layout)
        tiles = [
            (column / columns, row / rows, 1 / columns, 1 / rows) for row in range(rows) for column in range(columns)
        ]
        return (*tiles, WHOLE)

    def image_ids(self, layout: VisualLayout) -> list[int]:
        return torch.where(layout.fixed, self._names(layout), self.image_token).tolist()

    def prompt_text(self, rendered: str) -> str:
        return rendered.replace(IMAGE, f"{AROUND}{IMAGE}{AROUND}")

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image], further: Collection[str] = ()) -> list[EncodedImage]:
        layouts = [self.layout_of(image.size) for image in images]
        counts = [len(layout.views) for layout in layouts]
        # To the processor a list is the images of one question, whose tiles follow one another.
        (tiles,) = self.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        parts = [self._encode(part.to(self.device, self.tower.dtype), further) for part in tiles.split(TILES)]
        encoded = {name: torch.cat([part[name] for part in parts]).split(counts) for name in parts[0]}
        return [
            EncodedImage(layout, {name: held[number].flatten(0, 1) for name, held in encoded.items()})
            for number, layout in enumerate(layouts)
        ]

    def _encode(self, tiles: Tensor, further: Collection[str]) -> dict[str, Tensor]:
        """Signals of ``(tiles, 3, side, side)``, each ``(tiles, tokens, ...)``."""
        out = self.tower(tiles, output_hidden_states=True)
        states, depth = out.hidden_states, len(self.tower.encoder.layers)
        attention, keys = self._received(depth, states)
        first = round(SIMILARITY_FROM * depth)
        signals = {
            "features": self.connector.pixel_shuffle(out.last_hidden_state, self.model.config.scale_factor),
            "cls_attention": self._mean(attention),
            "keys": self._mean(keys),
            "similarity": self._mean(torch.stack(states[first:]).mean(dim=0)),
        }

        if "received_late" in further:
            signals["received_late"] = signals["cls_attention"]
        for name, share in FURTHER_LAYERS.items():
            if name in further:
                early = earlier_layer(name, share, depth, depth)
                signals[name] = self._mean(self._received(early, states)[0])
        return signals

    def _mean(self, patches: Tensor) -> Tensor:
        """``(tiles, patches, ...)`` → means over each token's patches, ``(tiles, tokens, ...)``."""
        side, merge = self.grid.height, self.model.config.scale_factor
        squares = patches.reshape(len(patches), side, merge, side, merge, -1).float().mean(dim=(2, 4))
        return squares.reshape(len(patches), side * side, *patches.shape[2:]).to(patches.dtype)

    def _received(self, number: int, states: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Attention received in layer ``number``, counted from 1, ``(tiles, patches)``, and its keys ``(tiles, patches, dim)``."""
        layer = self.tower.encoder.layers[number - 1]
        attention, normed = layer.self_attn, layer.layer_norm1(states[number - 1])
        query, key = attention.q_proj(normed), attention.k_proj(normed)
        split = (*key.shape[:2], attention.num_heads, attention.head_dim)
        return received(query.view(split).transpose(1, 2), key.view(split).transpose(1, 2), attention.scale), key

    @torch.inference_mode()
    def project(self, features: Tensor) -> Tensor:
        return self.connector.modality_projection(features.to(self.device, self.language.embed_tokens.weight.dtype))

    @torch.inference_mode()
    def embed_visual(self, selection: Selection, layout: VisualLayout) -> Tensor:
        embedded = super().embed_visual(selection, layout)
        indices = selection.indices.to(self.device)
        ids = torch.cat([self._names(image) for image in images_of(layout)]).to(self.device)[indices]
        words = self.language.embed_tokens(ids).to(embedded)
        return torch.where(layout.fixed.to(self.device)[indices][..., None], words, embedded)

    def _names(self, layout: VisualLayout) -> Tensor:
        """``(tokens,)`` int64: of every slot that names a tile its token id, of others 0; raises ``CheckpointError``."""
        if layout not in self.names:
            ids = self.processor.tokenizer(_written(layout), add_special_tokens=False).input_ids
            # The first and the last token stand around the image in every prompt: see prompt_text.
            texts = _between(ids[1:-1], self.image_token)
            found, expected = [len(text) for text in texts], [*(view.leading for view in layout.views), 0]
            if found != expected:
                raise CheckpointError(
                    f"the tokenizer writes the names of an image's tiles with {found[:-1]} tokens, and this family's with "
                    f"{expected[:-1]}; fetch tokenizer.json of the checkpoint"
                )
            names = torch.zeros(layout.tokens, dtype=torch.long)
            names[layout.fixed] = torch.tensor([token for text in texts for token in text])
            self.names[layout] = names
        return self.names[layout]

    @property
    def encoder_modules(self) -> dict[str, nn.Module]:
        return {"tower": self.tower}

    @property
    def encoder_settings(self) -> list[Any]:
        return [SIMILARITY_FROM, self.model.config.scale_factor]


class Idefics3Adapter(SmolVLMAdapter):
    model_class = FromTransformers("Idefics3ForConditionalGeneration")
    encoder = "Idefics3's SigLIP tower"


def _grid(config: Any) -> PatchGrid:
    """The tokens of one tile."""
    side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
    return PatchGrid(side, side)


def _arrangement(image_processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tiles of an image of ``size`` (width, height); 0, 0 where it is one tile."""
    from transformers.models.smolvlm.image_processing_pil_smolvlm import get_resize_output_image_size

    if not image_processor.do_image_splitting:
        return 0, 0
    width, height = size
    tile = image_processor.max_image_size["longest_edge"]
    if image_processor.do_resize:  # which reads of the image its shape alone
        shaped: Any = SimpleNamespace(shape=(3, height, width))
        height, width = get_resize_output_image_size(shaped, image_processor.size["longest_edge"])

    # The longer side becomes whole tiles, then the shorter at the same shape.
    shape = width / height
    if width >= height:
        columns = math.ceil(width / tile)
        rows = math.ceil(int(columns * tile / shape) / tile)
    else:
        rows = math.ceil(height / tile)
        columns = math.ceil(int(rows * tile * shape) / tile)
    return (rows, columns) if max(rows, columns) > 1 else (0, 0)


def _shape_of(layout: VisualLayout) -> tuple[int, int]:
    """Rows and columns of tiles beside the view of the whole."""
    leading = [view.leading for view in layout.views]
    if len(leading) == 1:
        return 0, 0
    columns = leading.index(BELOW)
    return (len(leading) - 1) // columns, columns


def _written(layout: VisualLayout) -> str:
    """What the stock processor writes for an image, with one placeholder a tile."""
    rows, columns = _shape_of(layout)
    lines = [
        "".join(f"{AROUND}<row_{row + 1}_col_{column + 1}>{IMAGE}" for column in range(columns)) + "\n"
        for row in range(rows)
    ]
    return "".join(lines) + ("\n" if rows else "") + f"{AROUND}{GLOBAL}{IMAGE}{AROUND}"


def _between(ids: Sequence[int], placeholder: int) -> list[list[int]]:
    """``ids`` before, between and behind the placeholders."""
    texts: list[list[int]] = [[]]
    for token in ids:
        if token == placeholder:
            texts.append([])
        else:
            texts[-1].append(token)
    return texts


def _shape(vision: dict[str, Any], text: dict[str, Any], factor: int) -> SmolVLMConfig:
    """As config.json of a checkpoint has it; what is not named is the default of transformers."""
    from transformers import SmolVLMConfig

    return SmolVLMConfig(
        vision_config=vision,
        text_config={"model_type": "llama", "vocab_size": 49280, "max_position_embeddings": 8192, **text},
        scale_factor=factor,
        image_token_id=49190,
    )


SIGLIP_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
SIGLIP_B_512 = {"hidden_size": 768, "num_attention_heads": 12, "image_size": 512, "patch_size": 16}
SMOLLM2_1_7B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
SMOLLM2_360M = {
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "head_dim": 64,
}
SHAPES.add("HuggingFaceTB/SmolVLM2-2.2B-Instruct", functools.partial(_shape, SIGLIP_SO400M, SMOLLM2_1_7B, 3))
SHAPES.add("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", functools.partial(_shape, SIGLIP_B_512, SMOLLM2_360M, 4))
