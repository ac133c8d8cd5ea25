"""The LPM's training data on the testbed: a share of its training images, each with the questions it is always asked.

An image is a number: its scene and its questions follow from (seed, split, number), so a subset is a set of numbers and
nothing has to be stored. Prompts are the model's own (chat template and tokenizer), so any model may be taught.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

from nuwa.testbed.instruction import Packed, collate, draw_questions, lay_out, question_words
from nuwa.testbed.questions import Question
from nuwa.testbed.scenes import Scene, draw_scene
from nuwa.vlm import LlavaAdapter

QUESTIONS_PER_IMAGE = 12


def draw_subset(seed: int, images: int, share: float) -> np.ndarray:
    """The numbers of ``share`` of ``images`` training images, ascending; a larger share contains a smaller one."""
    count = max(1, round(share * images))
    return np.sort(np.random.default_rng([seed, *b"subset"]).permutation(images)[:count])


def draw_conversation(seed: int, split: str, number: int) -> tuple[Scene, list[Question]]:
    """Image ``number`` of ``split`` and its questions."""
    rng = np.random.default_rng([seed, *split.encode(), number])
    scene = draw_scene(rng, split)
    return scene, draw_questions(rng, scene, QUESTIONS_PER_IMAGE)


def pack_for(vlm: LlavaAdapter, questions: list[Question]) -> Packed:
    """One image and its questions as one sequence, in the words of the model's chat template."""
    tokenizer = vlm.processor.tokenizer
    turns = [(vlm.encode_prompt(words), answer) for words, answer in map(question_words, questions)]
    before = turns[0][0].before
    prefix = [*before, *[vlm.image_token] * vlm.grid.tokens]
    answers = [[*tokenizer(answer, add_special_tokens=False).input_ids, vlm.end_tokens[0]] for _, answer in turns]
    return lay_out(prefix, [(list(prompt.after), ids) for (prompt, _), ids in zip(turns, answers, strict=True)])


def draw_batch(vlm: LlavaAdapter, seed: int, split: str, numbers: np.ndarray) -> dict[str, Tensor]:
    """The images ``numbers``: ``pixels`` ``(batch, 3, height, width)`` and the columns of :class:`Packed`."""
    drawn = [draw_conversation(seed, split, int(number)) for number in numbers]
    batch = collate([pack_for(vlm, questions) for _, questions in drawn], pad=vlm.end_tokens[0])
    return {**batch, "pixels": vlm.pixels([Image.fromarray(scene.image) for scene, _ in drawn])}


class Scenes:
    """``share`` of ``images`` training images as :class:`nuwa.pruner.train.TrainingData`."""

    def __init__(self, vlm: LlavaAdapter, seed: int, images: int, share: float) -> None:
        self.vlm, self.seed = vlm, seed
        self.subset = draw_subset(seed, images, share)

    def draw(self, rng: np.random.Generator, size: int) -> dict[str, Tensor]:
        numbers = rng.choice(self.subset, size, replace=len(self.subset) < size)
        return draw_batch(self.vlm, self.seed, "train", numbers)

    def validation(self, seed: int, size: int) -> dict[str, Tensor]:
        return draw_batch(self.vlm, seed, "validation", np.arange(size))
