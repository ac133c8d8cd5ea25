"""Which question is asked about which image, and in what shape the answers go back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from nuwa.library.conversations import Question, is_conversation, read_question
from nuwa.library.pictures import TAKEN, is_image
from nuwa.library.refusal import CallError, counted, kind_of, shown

Answered = TypeVar("Answered")


@dataclass(frozen=True)
class Asked:
    """One question of a call: ``image`` and ``question``, its numbers in the call, and what was given for both.

    ``pictures``: the image, or those that it is about together.
    """

    image: int
    question: int
    pictures: tuple[Any, ...]
    asked: Question


@dataclass(frozen=True)
class Pairing:
    """All questions of a call, image by image.

    ``counts``: questions of each image; null: one that stands for itself, whose answer does, too. ``one``: whether a
    single image was given, not a list.
    """

    asked: tuple[Asked, ...]
    counts: tuple[int | None, ...]
    one: bool

    def shaped(self, answers: Sequence[Answered]) -> Any:
        """``answers``, in the order of ``asked``, in the shape of the call's images and questions."""
        waiting: Iterator[Answered] = iter(answers)
        of_images = [next(waiting) if count is None else [next(waiting) for _ in range(count)] for count in self.counts]
        return of_images[0] if self.one else of_images


def pair(images: Any, questions: Any) -> Pairing:
    """Images and questions as :func:`nuwa.generate` takes them; raises :class:`CallError`."""
    if images is None:
        return _pair_embedded(questions)
    if is_image(images):
        return _paired([images], [questions], one=True)
    pictures = _several(images)
    if pictures is None:
        raise CallError(f"images is of type {kind_of(images)}; give {TAKEN}, or a list of them")

    _check_length(pictures, questions)
    return _paired(pictures, questions, one=False)


def _check_length(pictures: Sequence[Any], questions: Any) -> None:
    wanted = f"give a list of {len(pictures)}: a question, or a list of questions, for each image"
    if isinstance(questions, str):
        raise CallError(f"questions is one text for {_counted(pictures)}; {wanted}")
    if is_conversation(questions):
        raise CallError(f"questions is one conversation for {_counted(pictures)}; {wanted}")
    if not isinstance(questions, (list, tuple)):
        raise CallError(f"questions is of type {kind_of(questions)}; {wanted}")
    if len(pictures) != len(questions):
        raise CallError(f"{len(pictures)} images but {len(questions)} questions; give one, or a list, for each image")


def _together(given: Any, number: int) -> tuple[Any, ...]:
    """What stands for one image in ``images``: itself, or a list of several that questions are about together."""
    if not isinstance(given, (list, tuple)):
        return (given,)
    if not given:
        raise CallError(f"images[{number}] is an empty list; give an image, or a list of images")
    return tuple(given)


def _counted(pictures: Sequence[Any]) -> str:
    return "a list of one image" if len(pictures) == 1 else counted(len(pictures), "image")


def _several(images: Any) -> list[Any] | None:
    """Several images as a list; null where ``images`` is nothing of the kind."""
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return list(images) if images.ndim == 4 else None
    if isinstance(images, Mapping) or not isinstance(images, Sequence):
        return None
    return list(images)


def _pair_embedded(questions: Any) -> Pairing:
    """Questions that hold their images themselves."""
    one = is_conversation(questions)
    conversations = [questions] if one else questions
    if isinstance(questions, str) or not isinstance(conversations, (list, tuple)):
        raise CallError("there is no image: give images, or conversations that hold theirs")

    asked = []
    for number, given in enumerate(conversations):
        place = f"questions[{number}]: " if len(conversations) > 1 else ""
        question = _placed(place, read_question, given)
        if not question.images:
            raise CallError(f"{place}there is no image: give images, or put it into the messages")
        asked.append(Asked(number, 0, question.images, question))
    return Pairing(tuple(asked), (None,) * len(asked), one)


def _paired(pictures: Sequence[Any], questions: Sequence[Any], one: bool) -> Pairing:
    asked: list[Asked] = []
    counts: list[int | None] = []
    for number, (shown_together, given) in enumerate(zip(pictures, questions, strict=True)):
        together = _together(shown_together, number)
        single = isinstance(given, str) or is_conversation(given)
        listed = [given] if single else given
        if not isinstance(listed, (list, tuple)):
            raise CallError(f"{shown(given)} is no question; give a text, or messages with role and content")
        if not listed:
            raise CallError("every image needs at least one question")

        counts.append(None if single else len(listed))
        for rank, one_question in enumerate(listed):
            place = "" if one and single else f"questions[{number}]: " if single else f"questions[{number}][{rank}]: "
            question = _placed(place, read_question, one_question)
            if question.images:
                raise CallError(f"{place}the messages hold an image, and images has one, too; leave one of the two out")
            if question.messages is not None and question.places != len(together):
                raise CallError(
                    f"{place}the conversation speaks of {counted(question.places, 'image')}, and {len(together)} "
                    f"{'is' if len(together) == 1 else 'are'} given; give one image for each part of type image"
                )
            asked.append(Asked(number, rank, together, question.of(len(together))))
    return Pairing(tuple(asked), tuple(counts), one)


def _placed(place: str, read: Callable[[Any], Question], given: Any) -> Question:
    try:
        return read(given)
    except CallError as error:
        raise CallError(f"{place}{error}") from None
