"""How large the published benchmarks are, to price a sweep before their tables are at hand.

Questions are as :mod:`nuwa.benchmarks` asks them: every expression of a RefCOCO row is one. Where a count rests on
others, the sum stands there. Images are distinct ones within a table; ``at most`` says that only a bound is known, which
makes the feature store look larger than it will be. Photo sizes are typical and, like lengths that no source states,
matter little beside counts: see docs/models.md.

The figures stand with each benchmark (:attr:`nuwa.benchmarks.Benchmark.splits`). Sources: the cards of ``lmms-lab/*``
(rows); TensorFlow Datasets' ``ref_coco`` (objects, images and words of the RefCOCO family; the splits of ``lmms-lab``
join Google's split to UNC's and UMD's); EvalScope's pages on the same tables (lengths of prompts, from which its own
instruction is taken off); the benchmarks' papers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from nuwa.benchmarks import Example, TableSize
from pipelines.addresses import BenchmarkName

FILLER = "word "  # stands for words that are not known yet


def published_size(name: BenchmarkName) -> TableSize | None:
    """How large the split that ``name`` says is; None where no source is known, or no split is named."""
    return name.benchmark().splits.get(name.split or "")


def expected_examples(names: Sequence[str], style: str, model_type: str = "") -> tuple[pd.DataFrame, list[str]]:
    """Stand-ins for the questions of benchmarks ``names``, and the names whose size is not known.

    The table has what planning reads of ``examples.parquet``. Questions are dealt out evenly to a table's images, and
    those of an image begin to differ behind the instruction. Variants of a table share its images. ``model_type``: as in
    :func:`pipelines.data.datasets.write_examples`.
    """
    parts, unknown = [], []
    for text in names:
        name = BenchmarkName.parse(text)
        if (size := published_size(name)) is None:
            unknown.append(text)
            continue

        benchmark = name.benchmark()
        images = pd.Series([f"{name.table} {number:06d}" for number in range(size.images)])
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
                    "image": images[image].values,
                    "prompt": pd.Series(prompts)[turns].values,
                    "width": size.photo[0],
                    "height": size.photo[1],
                    "max_new_tokens": benchmark.limit(model_type),
                }
            )
        )
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(), unknown


def _blank(question: str) -> Example:
    """A question with nothing around it that differs from question to question."""
    truth = {"options": {}, "type": "multiple-choice"}
    context = {"hint": "", "published_hint": "", "published_options": {}, "ocr_tokens": ()}
    return Example("", question, truth, "", b"", context)
