"""How large the published benchmarks are, to price a sweep before their tables are at hand.

Questions are as :mod:`nuwa.benchmarks` asks them: every expression of a RefCOCO row is one. Where a count rests on
others, the sum stands there. Images are distinct ones within a table; ``at most`` says that only a bound is known, which
makes the feature store look larger than it will be. Photo sizes are typical and, like lengths that no source states,
matter little beside counts: see docs/models.md.

Sources: the cards of ``lmms-lab/*`` (rows); TensorFlow Datasets' ``ref_coco`` (objects, images and words of the RefCOCO
family; the splits of ``lmms-lab`` join Google's split to UNC's and UMD's); EvalScope's pages on the same tables (lengths
of prompts, from which its own instruction is taken off); the benchmarks' papers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from nuwa.benchmarks import Example
from pipelines.tables import BenchmarkName

COCO = (640, 480)
REFCOCO_GOOGLE = round(5000 * 142_209 / 50_000)  # expressions of 5,000 objects, as of RefCOCO on average
REFCOCOG_GOOGLE = round(5000 * 95_010 / 49_822)  # likewise of RefCOCOg
SHORT, LONG = 19, 46  # characters of 3.5 and of 8.4 words
FILLER = "word "  # stands for words that are not known yet


@dataclass(frozen=True)
class PublishedSize:
    """One table: its ``questions`` and ``images``, width and height of a typical ``photo``, and the mean ``characters``
    of what a prompt shows beside its benchmark's instruction: question or expression, options."""

    questions: int
    images: int
    photo: tuple[int, int]
    characters: int


SIZES = {
    "refcoco/val": PublishedSize(10_834 + REFCOCO_GOOGLE, 1500 + 4559, COCO, SHORT),  # at most: splits may share images
    "refcoco/test": PublishedSize(REFCOCO_GOOGLE, 4527, COCO, SHORT),
    "refcoco/testA": PublishedSize(5657, 750, COCO, SHORT),
    "refcoco/testB": PublishedSize(5095, 750, COCO, SHORT),
    "refcocoplus/val": PublishedSize(10_758, 1500, COCO, SHORT),
    "refcocoplus/testA": PublishedSize(5726, 750, COCO, SHORT),
    "refcocoplus/testB": PublishedSize(4889, 750, COCO, SHORT),
    "refcocog/val": PublishedSize(4896 + REFCOCOG_GOOGLE, 1300 + 4650, COCO, LONG),  # at most: splits may share images
    "refcocog/test": PublishedSize(9602, 2600, COCO, LONG),
    "gqa/testdev": PublishedSize(12_578, 398, (500, 375), 40),
    "pope/test": PublishedSize(9000, 500, COCO, 31),
    "pope/adversarial": PublishedSize(3000, 500, COCO, 31),
    "pope/popular": PublishedSize(3000, 500, COCO, 31),
    "pope/random": PublishedSize(3000, 500, COCO, 31),
    "scienceqa/test": PublishedSize(2017, 2017, (500, 350), 150),  # at most; hints are not counted
    "textvqa/validation": PublishedSize(5000, 3166, (1024, 768), 40),  # OCR words are not counted
    "vqav2/validation": PublishedSize(214_354, 40_504, COCO, 34),
    "mme/test": PublishedSize(2374, 1187, COCO, 60),
    "mmbench/dev": PublishedSize(4329, 1164, (400, 300), 210),  # each of 1,164 questions in several copies
    "mmbench_cn/dev": PublishedSize(4329, 1164, (400, 300), 70),  # the same in Chinese, a third of the characters
    "seedbench/test": PublishedSize(14_233, 14_233, COCO, 140),  # at most; the image questions only
    "mmmu/validation": PublishedSize(900, 900, (800, 500), 310),  # at most: those about several images are left out
    "mmvet/test": PublishedSize(218, 200, COCO, 70),
}


def expected_examples(names: Sequence[str], style: str) -> tuple[pd.DataFrame, list[str]]:
    """Stand-ins for the questions of benchmarks ``names``, and the names whose size is not known.

    The table has what planning reads of ``examples.parquet``. Questions are dealt out evenly to a table's images, and
    those of an image begin to differ behind the instruction. Variants of a table share its images.
    """
    parts, unknown = [], []
    for text in names:
        name = BenchmarkName.parse(text)
        if (size := SIZES.get(name.table)) is None:
            unknown.append(text)
            continue
        benchmark = name.benchmark()
        turns, image = np.divmod(np.arange(size.questions), size.images)
        prompts = [
            benchmark.prompt(_blank(f"{turn} {FILLER * size.characters}"[: size.characters]), style)
            for turn in range(turns[-1] + 1)
        ]
        parts.append(
            pd.DataFrame(
                {
                    "benchmark": text,
                    "family": benchmark.family,
                    "image": pd.Series([f"{name.table} {number:06d}" for number in range(size.images)])[image].values,
                    "prompt": pd.Series(prompts)[turns].values,
                    "width": size.photo[0],
                    "height": size.photo[1],
                    "max_new_tokens": benchmark.max_new_tokens,
                }
            )
        )
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(), unknown


def _blank(question: str) -> Example:
    """A question with nothing around it that differs from question to question."""
    truth = {"options": {}, "type": "multiple-choice"}
    return Example("", question, truth, "", b"", {"hint": "", "ocr_tokens": ()})
