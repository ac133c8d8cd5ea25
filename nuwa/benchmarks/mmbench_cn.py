"""MMBench in Chinese (cn, dev): the English set translated, in the same columns and with the same score.

Chinese does not put spaces between words, so a letter is an option's where no other letter touches it, and an option's
text may stand anywhere in the answer.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

from nuwa.benchmarks import mmbench
from nuwa.benchmarks.choices import Options, choice_scores
from nuwa.benchmarks.definition import Rules, Scores, TableSize, Truth

NAME = "mmbench_cn"
OPTION_LETTER = "\n请直接使用所提供的选项字母作为答案回答。"
LLAVA_LETTER = "\n请直接回答选项字母。"
LONE_LETTER = re.compile(r"(?<![A-Za-z])[A-D](?![A-Za-z])")


def named_option(answer: str, options: Options) -> str | None:
    """The one option whose letter stands alone in the answer; else the one whose text it is, or else holds."""
    letters = set(LONE_LETTER.findall(answer)) & set(options)
    if letters:
        return letters.pop() if len(letters) == 1 else None
    meant = [letter for letter, option in options.items() if option == answer.strip(" 。.")]
    meant = meant or [letter for letter, option in options.items() if option in answer]
    return meant[0] if len(meant) == 1 else None


def _score(prediction: str, truth: Truth) -> Scores:
    return choice_scores(named_option(prediction, truth["options"]), truth["answer"])


# lmms-eval shows a missing hint as it is published here: ``nan``.
_harness_prompt = partial(mmbench.harness_prompt, instruction=OPTION_LETTER, unshown=())
HARNESS = Rules("gpt_eval_score", 256, llava_v1=_harness_prompt, score=mmbench.harness_score)

VARIANTS = (
    replace(
        mmbench.VARIANTS[0],
        variant="",
        name=NAME,
        title="MMBench-CN",
        splits={"dev": TableSize(4329, 1164, (400, 300), 70)},  # a third of the characters
        read=partial(mmbench.read, name=NAME),
        llava_v1=partial(mmbench.prompt, instruction=OPTION_LETTER),
        score=_score,
        rules={
            "lmms_eval": HARNESS,
            "lmms_eval_0_3": HARNESS,
            "llava": Rules("accuracy", 1024, llava_v1=partial(mmbench.llava_prompt, instruction=LLAVA_LETTER)),
        },
    ),
)
