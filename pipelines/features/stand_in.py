"""The processor of a published checkpoint whose files are not at hand: it sizes images and counts tokens.

Images are laid out as by the family's own image processor with its defaults. Text is cut into pieces of at most six
letters, single digits and signs, and runs of line breaks, about as many as the families' vocabularies make of English;
which token a piece is means nothing.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from nuwa.vlm import adapter_class

if TYPE_CHECKING:
    from transformers import PretrainedConfig

IMAGE = "<image>"
PIECE = re.compile(r"<[^<>\s]+>|\d|[^\W\d_]{1,6}|[^\w\s]|_|\n+")
SHOWN = re.compile(rf"(?:<[^<>\s]+>)?{IMAGE}(?:<[^<>\s]+>)?\n?")  # with the tokens that a family puts around each


class StandInProcessor:
    """What :class:`nuwa.vlm.Adapter` asks of a processor to lay out images and split prompts; it reads no file."""

    def __init__(self, config: PretrainedConfig) -> None:
        family = adapter_class(config.model_type)
        self.image_processor = family.usual_image_processor(config)
        self._turn, self._system = family.turn, family.usual_system
        self.tokenizer = StandInTokenizer(config.image_token_id)

    def apply_chat_template(self, turns: list[dict[str, Any]], **_: Any) -> str:
        """One question about one image or several, in the family's turn, behind a system prompt where there is one."""
        parts = [part for turn in turns for part in turn["content"]]
        *system, text = [part["text"] for part in parts if part["type"] == "text"]
        images = len(parts) - len(system) - 1
        turn = SHOWN.sub(lambda shown: shown[0] * images, self._turn)
        return turn.format(system="".join(f"{one} " for one in system) or self._system, text=text)


class StandInTokenizer:
    """Numbers pieces of text in the order in which they come; the image's placeholder has the model's own number."""

    def __init__(self, image_token: int) -> None:
        self._ids = {IMAGE: image_token}

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        """``input_ids``: one number a piece, equal for equal pieces."""
        first = self._ids[IMAGE] + 1
        return SimpleNamespace(
            input_ids=[self._ids.setdefault(piece, first + len(self._ids)) for piece in PIECE.findall(text)]
        )

    def convert_ids_to_tokens(self, number: int) -> str:
        """The piece that has ``number``; raises ``KeyError`` where none has it yet."""
        return {held: piece for piece, held in self._ids.items()}[number]
