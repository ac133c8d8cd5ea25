"""The processor of a published checkpoint whose files are not at hand: it sizes images and counts tokens.

Images are laid out as by the family's own image processor with its defaults. Text is cut into pieces of at most six
letters, single digits and signs, about as many as the families' vocabularies make of English; which token a piece is
means nothing.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

from transformers import PretrainedConfig

from nuwa.vlm.shapes import usual_image_processor

IMAGE = "<image>"
PIECE = re.compile(r"<[^<>\s]+>|\d|[^\W\d_]{1,6}|[^\w\s]|_|\n")
LLAVA_TURN = f"<s>USER: {IMAGE}\n{{}} ASSISTANT:"
TURNS = {  # as the published chat templates render one question
    "llava": LLAVA_TURN,
    "llava_next": LLAVA_TURN,
    "qwen2_5_vl": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{IMAGE}<|vision_end|>{{}}<|im_end|>\n<|im_start|>assistant\n"
    ),
}


class StandInProcessor:
    """What :class:`nuwa.vlm.Adapter` asks of a processor to lay out images and split prompts; it reads no file."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.image_processor = usual_image_processor(config)
        self._turn = TURNS[config.model_type]
        self._ids = {IMAGE: config.image_token_id}

    def apply_chat_template(self, turns: list[dict[str, Any]], **_: Any) -> str:
        """One question about one image, in the family's turn."""
        ((text,),) = [[part["text"] for part in turn["content"] if part["type"] == "text"] for turn in turns]
        return self._turn.format(text)

    def tokenizer(self, text: str, **_: Any) -> SimpleNamespace:
        """``input_ids``: one number a piece, equal for equal pieces."""
        first = self._ids[IMAGE] + 1
        return SimpleNamespace(
            input_ids=[self._ids.setdefault(piece, first + len(self._ids)) for piece in PIECE.findall(text)]
        )
