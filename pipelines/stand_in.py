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
LLAVA_TURN = f"<s>{{system}}USER: {IMAGE}\n{{text}} ASSISTANT:"
TURNS = {  # as the published chat templates render one question
    "llava": LLAVA_TURN,
    "llava_next": LLAVA_TURN,
    "qwen2_5_vl": (
        "<|im_start|>system\n{system}<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{IMAGE}<|vision_end|>{{text}}<|im_end|>\n<|im_start|>assistant\n"
    ),
}
SYSTEM = {"qwen2_5_vl": "You are a helpful assistant."}  # where no message says otherwise


class StandInProcessor:
    """What :class:`nuwa.vlm.Adapter` asks of a processor to lay out images and split prompts; it reads no file."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.image_processor = usual_image_processor(config)
        self._turn, self._system = TURNS[config.model_type], SYSTEM.get(config.model_type, "")
        self._ids = {IMAGE: config.image_token_id}

    def apply_chat_template(self, turns: list[dict[str, Any]], **_: Any) -> str:
        """One question about one image, in the family's turn, behind a system prompt where there is one."""
        *system, text = [part["text"] for turn in turns for part in turn["content"] if part["type"] == "text"]
        return self._turn.format(system="".join(f"{one} " for one in system) or self._system, text=text)

    def tokenizer(self, text: str, **_: Any) -> SimpleNamespace:
        """``input_ids``: one number a piece, equal for equal pieces."""
        first = self._ids[IMAGE] + 1
        return SimpleNamespace(
            input_ids=[self._ids.setdefault(piece, first + len(self._ids)) for piece in PIECE.findall(text)]
        )
