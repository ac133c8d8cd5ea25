"""The LPM's training data as published: conversations about images in LLaVA's form (``llava_v1_5_mix665k.json``).

A JSON list of ``{"image": "coco/train2017/1.jpg", "conversations": [{"from": "human", "value": "<image>\\n..."},
{"from": "gpt", "value": "..."}, ...]}``; other keys are ignored. Entries without ``image`` are text only and are left
out. Entries are counted from 0.

:func:`read_instructions` reads the whole file once, checks it and remembers where the entries of the seeded share lie.
Conversations and images are read when a batch is drawn, so memory does not grow with the file.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from nuwa.errors import UserError
from nuwa.images import ImageError, read_image
from nuwa.pruner.conversations import draw_subset
from nuwa.testbed.instruction import IGNORE, Packed, collate
from nuwa.vlm.adapter import Adapter, tokenize_prompt

PLACEHOLDER = "<image>"
ROLES = ("human", "gpt")
CHUNK = 2**24  # bytes
WHITESPACE = re.compile(r"[ \t\n\r]*")
SHOWN = 80  # characters of a wrong value in a message
LLAVA_FORM = "instruction data in LLaVA's form, such as llava_v1_5_mix665k.json"


class InstructionDataError(UserError, ValueError):
    """Data that cannot be taught; the message names file, entry and key, and says what is expected."""


@dataclass(frozen=True)
class Conversation:
    """``turns``: what is asked and answered, one after the other, without the image's placeholder."""

    entry: int
    image: Path
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Instructions:
    """A checked file of conversations about the images of ``folder``.

    ``entries``: of those with an image, number, first byte and the byte behind the last, ``(conversations, 3)``.
    ``taught``: the rows of the share. ``text_only``: how many entries are left out. ``digest``: SHA-256 of the file.
    """

    path: Path
    folder: Path
    entries: np.ndarray
    taught: np.ndarray
    text_only: int
    digest: str

    @property
    def held_out(self) -> np.ndarray:
        """The rows that are never taught."""
        return np.setdiff1d(np.arange(len(self.entries)), self.taught)

    def __str__(self) -> str:
        return (
            f"{self.path}: {len(self.taught):,} of {len(self.entries):,} conversations about images are taught; "
            f"{self.text_only:,} entries without an image are left out"
        )

    def conversation(self, row: int) -> Conversation:
        """Conversation ``row``, from the disk."""
        number, begin, end = (int(value) for value in self.entries[row])
        try:
            with self.path.open("rb") as file:
                file.seek(begin)
                entry = json.loads(file.read(end - begin))
            if not _check(entry, f"{self.path}: entry {number}"):
                raise InstructionDataError("its image is gone")
        except (OSError, ValueError) as error:
            raise InstructionDataError(
                f"{self.path}: entry {number} is not what it was when the training began ({type(error).__name__})"
            ) from None
        said = [turn["value"].replace(PLACEHOLDER, "").strip() for turn in entry["conversations"]]
        turns = tuple(zip(said[::2], said[1::2], strict=True))
        return Conversation(number, self.folder / entry["image"], turns)


def read_instructions(path: Path, folder: Path, seed: int, share: float) -> Instructions:
    """Check ``path`` and choose the ``share`` of its conversations about images; a larger share contains a smaller one.

    Images lie in ``folder``. Raises :class:`InstructionDataError` for the first fault of the file, and for an image of
    the share that is not there; whether an image can be read shows when it is drawn.
    """
    reader, places, text_only = _ListReader(path), array("q"), 0
    for number, (entry, begin, end) in enumerate(reader):
        if _check(entry, f"{path}: entry {number}"):
            places.extend((number, begin, end))
        else:
            text_only += 1

    if not places:
        raise InstructionDataError(f"{path}: none of its {text_only} entries has an image: there is nothing to teach")
    entries = np.asarray(places, dtype=np.int64).reshape(-1, 3)
    taught = draw_subset(seed, len(entries), share)
    instructions = Instructions(path, folder, entries, taught, text_only, reader.digest.hexdigest())
    for conversation in map(instructions.conversation, taught):
        if not conversation.image.is_file():
            raise InstructionDataError(
                f"{path}: entry {conversation.entry}: image: no such file {conversation.image}; "
                "pruner.images_folder is where image paths begin"
            )
    return instructions


class _ListReader:
    """A JSON list in a file, element by element, a chunk in memory at a time; ``digest`` is of all bytes read."""

    def __init__(self, path: Path) -> None:
        self.path, self.digest = path, hashlib.sha256()
        self._decoder, self._utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
        self._held, self._at, self._byte = "", 0, 0  # text; the place reached in it, and in the file

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        """Every element with its first byte and the byte behind its last."""
        try:
            with self.path.open("rb") as self._file:
                self._take("[")
                last = self._next() == "]"
                while not last:
                    yield self._element()
                    last = self._next() == "]"
                    if not last:
                        self._take(",")
                self._take("]")
                self._take("")
        except UnicodeDecodeError as error:
            raise InstructionDataError(f"{self.path}: not UTF-8 ({error.reason})") from None
        except OSError as error:
            raise InstructionDataError(f"{self.path}: {error.strerror}; expected {LLAVA_FORM}") from None

    def _more(self) -> bool:
        chunk = self._file.read(CHUNK)
        self.digest.update(chunk)
        self._held = self._held[self._at :] + self._utf8.decode(chunk, final=not chunk)
        self._at = 0
        return bool(chunk)

    def _advance(self, at: int) -> None:
        self._byte += len(self._held[self._at : at].encode())
        self._at = at

    def _next(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            blank = WHITESPACE.match(self._held, self._at)
            self._advance(blank.end() if blank else self._at)
            if self._at < len(self._held):
                return self._held[self._at]
            if not self._more():
                return ""

    def _take(self, expected: str) -> None:
        character = self._next()
        if character != expected:
            raise InstructionDataError(
                f"{self.path}: byte {self._byte}: expected {repr(expected) if expected else 'the end of the file'}, found "
                f"{repr(character) if character else 'the end of the file'}; the file must be a JSON list of entries"
            )
        self._advance(self._at + len(expected))

    def _element(self) -> tuple[Any, int, int]:
        self._next()
        while True:
            try:
                element, end = self._decoder.raw_decode(self._held, self._at)
                break
            except json.JSONDecodeError as error:
                fault = (len(self._held[self._at : error.pos].encode()), error.msg)
                if not self._more():  # else it may go on in the next chunk
                    raise InstructionDataError(f"{self.path}: byte {self._byte + fault[0]}: {fault[1]}") from None
            except RecursionError:
                raise InstructionDataError(f"{self.path}: byte {self._byte}: nested too deeply for an entry") from None
        begin = self._byte
        self._advance(end)
        return element, begin, self._byte


def _check(entry: Any, where: str) -> bool:
    """Whether ``entry`` is about an image; raises :class:`InstructionDataError` unless it is of LLaVA's form."""
    if not isinstance(entry, dict):
        raise InstructionDataError(f"{where} = {_short(entry)}: expected an object with image and conversations")
    if "image" not in entry:
        return False
    image = entry["image"]
    if not isinstance(image, str) or not image or Path(image).is_absolute():
        raise InstructionDataError(f"{where}: image = {_short(image)}: expected one path below the images' folder")
    turns = entry.get("conversations")

    if not isinstance(turns, list) or not turns:
        raise InstructionDataError(f"{where}: conversations = {_short(turns)}: expected a list of turns")
    for number, turn in enumerate(turns):
        key, role = f"conversations.{number}", ROLES[number % 2]
        if not isinstance(turn, dict):
            raise InstructionDataError(f"{where}: {key} = {_short(turn)}: expected an object with from and value")
        if turn.get("from") != role:
            raise InstructionDataError(
                f"{where}: {key}.from = {_short(turn.get('from'))}: expected {role!r}; human and gpt take turns, human first"
            )
        text = turn.get("value")
        if not isinstance(text, str):
            raise InstructionDataError(f"{where}: {key}.value = {_short(text)}: expected text")
        if number == 0 and PLACEHOLDER not in text:
            raise InstructionDataError(f"{where}: {key}.value = {_short(text)}: expected {PLACEHOLDER} in it")
        if number and PLACEHOLDER in text:
            raise InstructionDataError(
                f"{where}: {key}.value = {_short(text)}: expected {PLACEHOLDER} in the first turn only"
            )
    if len(turns) % 2:
        raise InstructionDataError(f"{where}: conversations: {len(turns)} turns: expected one of gpt at the end")
    return True


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def encode_turns(vlm: Adapter, turns: Sequence[tuple[str, str]]) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of every turn, asked and answered, as the model meets them when it is asked one after the other.

    What is asked first are the tokens of :meth:`nuwa.vlm.Adapter.encode_prompt`, with one placeholder for the image. An
    answer is what the tokenizer makes of it behind its prompt, and an end token; the next turn starts behind that, as in
    LLaVA's own training, whether or not the chat template shows it.
    """
    tokenizer, template = vlm.processor.tokenizer, vlm.processor.apply_chat_template
    messages, before = list(vlm.opening), ""

    for question, answer in turns:
        first = not before
        image = [{"type": "image"}] if first else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        prompt = template(messages, add_generation_prompt=True, tokenize=False)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        whole = template(messages, add_generation_prompt=False, tokenize=False)
        if not (prompt.startswith(before) and whole.startswith(prompt)):
            raise InstructionDataError("the model's chat template changes earlier turns when one is added")
        if first:
            encoded = vlm.encode_prompt(question)
            text, question_ids = prompt, [*encoded.before, vlm.image_token, *encoded.after]
        else:
            text = prompt.removeprefix(before).lstrip()
            question_ids = tokenizer(text, add_special_tokens=False).input_ids
        both_text = text + whole.removeprefix(prompt).rstrip()
        both = (
            tokenize_prompt(tokenizer, both_text) if first else tokenizer(both_text, add_special_tokens=False).input_ids
        )
        if both[: len(question_ids)] != question_ids:
            raise InstructionDataError(f"the model's tokenizer joins the prompt's end with the answer {answer!r}")
        answer_ids = both[len(question_ids) :]
        ended = bool(answer_ids) and answer_ids[-1] in vlm.end_tokens
        yield question_ids, answer_ids if ended else [*answer_ids, vlm.end_tokens[0]]
        before = whole


def pack_conversation(
    vlm: Adapter, turns: Sequence[tuple[str, str]], max_tokens: int, image_tokens: int | None = None
) -> Packed | None:
    """One conversation as one sequence, the answers of all turns as labels; null if not even the first turn fits.

    ``image_tokens``: tokens that its image has in the sequence; null: as many as every image of the model.
    Turns from the first on that would end beyond ``max_tokens`` (text and image) are left out.
    """
    if image_tokens is None:
        assert vlm.layout is not None  # images of this model have one layout
        image_tokens = vlm.layout.tokens
    ids: list[int] = []
    is_answer: list[bool] = []
    for question, answer in encode_turns(vlm, turns):
        if not ids:
            at = question.index(vlm.image_token)
            question = [*question[:at], *[vlm.image_token] * image_tokens, *question[at + 1 :]]
        if len(ids) + len(question) + len(answer) > max_tokens:
            break
        ids += question + answer
        is_answer += [False] * len(question) + [True] * len(answer)
    if not ids:
        return None

    # A label says what comes next: it stands one place before the token that it is.
    labels = np.full(len(ids), IGNORE)
    labels[:-1] = np.where(is_answer[1:], ids[1:], IGNORE)
    return Packed(np.asarray(ids), np.arange(len(ids)), np.zeros(len(ids), dtype=np.int64), labels)


class Conversations:
    """The share of :class:`Instructions` as :class:`nuwa.pruner.train.TrainingData`, in the words of ``vlm``.

    ``max_tokens``: of a sequence, see :func:`pack_conversation`. A conversation of which no turn fits is passed over, and
    the next of the draw takes its place.
    """

    def __init__(self, vlm: Any, instructions: Instructions, max_tokens: int) -> None:
        self.vlm, self.instructions, self.max_tokens = vlm, instructions, max_tokens

    def draw(self, rng: np.random.Generator, size: int) -> dict[str, Tensor]:
        return self._batch(rng.permutation(self.instructions.taught), size)

    def validation(self, seed: int, size: int) -> dict[str, Tensor] | None:
        held_out = self.instructions.held_out
        return self._batch(np.random.default_rng(seed).permutation(held_out), size) if len(held_out) else None

    def _batch(self, rows: np.ndarray, size: int) -> dict[str, Tensor]:
        """The first ``size`` conversations of ``rows`` that fit; from the first again where there are fewer."""
        chosen = self.chosen(rows, size)
        batch = collate([packed for _, packed, _ in chosen], pad=self.vlm.end_tokens[0])
        return {**batch, "pixels": self.vlm.pixels([image or open_image(one) for one, _, image in chosen])}

    def chosen(self, rows: np.ndarray, size: int) -> list[tuple[Conversation, Packed, Image.Image | None]]:
        """``size`` conversations as sequences, and their images where packing has opened them."""
        chosen: list[tuple[Conversation, Packed, Image.Image | None]] = []
        fewest = None
        for conversation in map(self.instructions.conversation, rows):
            packed, image, tokens = self.pack(conversation)
            fewest = tokens if fewest is None else min(fewest, tokens)
            if packed is not None:
                chosen.append((conversation, packed, image))
            if len(chosen) == size:
                break

        if not chosen:
            raise InstructionDataError(
                f"{self.instructions.path}: no conversation fits into max_tokens = {self.max_tokens}; "
                f"an image alone takes {fewest}"
            )
        return [chosen[number % len(chosen)] for number in range(size)]

    def pack(self, conversation: Conversation) -> tuple[Packed | None, Image.Image | None, int]:
        """A conversation as one sequence, where it fits, its image if that was opened, and how many tokens it has."""
        layout = self.vlm.layout
        if layout is None:
            raise ValueError("images of this model differ in layout: their conversations are LayoutConversations")
        return pack_conversation(self.vlm, conversation.turns, self.max_tokens, layout.tokens), None, layout.tokens


def open_image(conversation: Conversation) -> Image.Image:
    """The image, as a person sees it; raises :class:`InstructionDataError` where it cannot be read."""
    try:
        return read_image(conversation.image)
    except ImageError as error:
        raise InstructionDataError(
            f"{conversation.image}: the image of entry {conversation.entry} cannot be read ({error.fault})"
        ) from None
