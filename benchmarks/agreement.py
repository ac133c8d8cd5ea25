"""How many answers depend on how they are computed: against stock ``generate``, between batches, and from the cache.

Greedy decoding takes the likeliest token; where two are nearly alike, the last bits of a product decide, and they depend
on the shape of the batch. In float32 that is never seen here; in half precision it is counted. Of every dtype and model:

* ``stock``: the unpruned answer against the stock model's own ``generate``, one question at a time;
* ``batch``: pruned answers of images taken one by one against eight at a time;
* ``cache32``, ``cache16``: answers from features that went through a store of float32 or float16 against those from pixels.

Rows of a full run go to ``benchmarks/data/agreement.json``, which the figures of README and docs/architecture.md are of.

    python -m benchmarks.agreement --write          # the testbed's model and tiny random ones of every family
    python -m benchmarks.agreement --images 200 --dtypes bfloat16
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image

import nuwa
from benchmarks.gpu import families
from nuwa.budget import budget_on
from nuwa.generation import ImageBatch, answer_encoded
from nuwa.layout import VisualLayout
from nuwa.methods import MethodSpec, specify
from nuwa.testbed.benchmark import make_testbed_benchmark
from nuwa.vlm import Adapter, EncodedImage, adapt, load_adapter
from pipelines.data.datasets import write_examples
from pipelines.features.images import read_images
from pipelines.features.signals import signal_dtype

TESTBED = "models/testbed"
FIGURES = Path(__file__).parent / "data" / "agreement.json"
TINY = {"llava": families.tiny_llava, "llava_next": families.tiny_next, "qwen2_5_vl": families.tiny_qwen}
QUESTIONS = {"refcoco": 1, "pope": 1}
WORDS = ["what is on the left ?", "where is the red sign near the dog ?", "how many", "is a cat near the blue sign ?"]
SHARE = 0.33  # of the tokens, where pruned answers are compared
Answers = list[tuple[int, ...]]


@dataclass(frozen=True)
class Subject:
    """A model in float32, and what it is asked: as many ``questions`` as ``images``, one each."""

    name: str
    vlm: Adapter
    images: Sequence[Image.Image]
    questions: Sequence[str]
    limit: int  # tokens of an answer

    def stock(self) -> Answers:
        """By the stock model's own ``generate``, one at a time."""
        model, processor = self.vlm.model, self.vlm.processor
        answers = []
        for image, question in zip(self.images, self.questions, strict=True):
            parts = [{"type": "image"}, {"type": "text", "text": question}]
            turns = [{"role": "user", "content": parts}]
            text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            inputs = processor(images=[image], text=[text], return_tensors="pt")
            given = inputs["input_ids"].shape[1]
            inputs = {
                name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()
            }
            made = model.generate(**inputs, max_new_tokens=self.limit, do_sample=False)[0, given:].tolist()
            answers.append(_until_the_end(made, self.vlm.end_tokens))
        return answers

    def unpruned(self) -> Answers:
        return self._generated(8, method="unpruned")

    def pruned(self, batch: int) -> Answers:
        return self._generated(batch, method="nuwa", retention=SHARE)

    def _generated(self, batch: int, **options: Any) -> Answers:
        made = nuwa.generate(
            self.vlm.model,
            self.vlm.processor,
            self.images,
            self.questions,
            max_new_tokens=self.limit,
            batch_images=batch,
            **options,
        )
        return [_until_the_end(answer.tokens, self.vlm.end_tokens) for answer in made]

    def from_cache(self, dtype: str) -> Answers:
        """Eight at a time, from features that were kept in ``dtype``."""
        answers: Answers = []
        for start in range(0, len(self.images), 8):
            pictures = list(self.images[start : start + 8])
            # Half precision encodes image by image, as the pipeline does.
            encoded = [one for picture in pictures for one in self.vlm.encode_images([picture])]
            kept = [_through_a_store(image, dtype) for image in encoded]
            names = [f"{number:064x}" for number in range(start, start + len(pictures))]
            questions = [[question] for question in self.questions[start : start + 8]]
            batch = ImageBatch(encoded=kept, names=names, questions=questions, pictures=pictures)
            made = answer_encoded(self.vlm, batch, _spec_of, self.limit)
            answers += [_until_the_end(answer.tokens, self.vlm.end_tokens) for (answer,) in made]
        return answers


def _spec_of(layout: VisualLayout) -> MethodSpec:
    return specify("nuwa", budget=budget_on(layout, SHARE, "share", dynamic=True))


def _through_a_store(image: EncodedImage, dtype: str) -> EncodedImage:
    return EncodedImage(
        image.layout, {name: value.to(signal_dtype(name, dtype)) for name, value in image.signals.items()}
    )


def _until_the_end(tokens: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    """The answer without its end token and whatever a batch pads behind it."""
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:stop])


def testbed(images: int, dtype: torch.dtype) -> Subject:
    """The testbed's trained model on its own questions, two an image."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_testbed_benchmark(folder, images, QUESTIONS, seed=77)
        write_examples(dict.fromkeys(QUESTIONS, folder), "testbed", folder / "e.parquet", folder / "i.parquet")
        table = pd.read_parquet(folder / "e.parquet")
        pictures = read_images(folder / "i.parquet", sorted(set(table["image"])))
    image_of_each = [pictures[image] for image in table["image"]]
    return Subject("testbed", load_adapter(TESTBED, dtype=dtype), image_of_each, table["prompt"].tolist(), 16)


def tiny(name: str, images: int, dtype: torch.dtype) -> Subject:
    """A tiny random model of a family, as the tests have it, on photos of several sizes."""
    made, photos = TINY[name](), families.draw_photos()
    vlm = adapt(made.model.to(dtype), made.processor)
    pairs = [(photo, word) for word in WORDS for photo in photos][:images]
    return Subject(f"tiny {name}", vlm, [photo for photo, _ in pairs], [word for _, word in pairs], 8)


def measured(subject: Subject) -> dict[str, float]:
    """The share of answers that differ, by what is compared."""
    pruned = subject.pruned(8)
    return {
        "stock": _differing(subject.unpruned(), subject.stock()),
        "batch": _differing(subject.pruned(1), pruned),
        "cache32": _differing(subject.from_cache("float32"), pruned),
        "cache16": _differing(subject.from_cache("float16"), pruned),
    }


def _differing(some: Answers, others: Answers) -> float:
    return sum(one != other for one, other in zip(some, others, strict=True)) / len(some)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=int, default=20, help="of the testbed, two questions each; of tiny models one each"
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--models", nargs="+", default=["testbed", *TINY])
    parser.add_argument("--write", action="store_true", help=f"put the rows into {FIGURES.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)

    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        for name in options.models:
            make: Callable[[int, torch.dtype], Subject] = testbed if name == "testbed" else partial(tiny, name)
            subject = make(options.images, getattr(torch, dtype))
            rows.append({"model": subject.name, "dtype": dtype, "answers": len(subject.questions), **measured(subject)})
            shares = ", ".join(f"{key} {100 * rows[-1][key]:.1f} %" for key in ("stock", "batch", "cache32", "cache16"))
            print(f"{subject.name}, {dtype}, {len(subject.questions)} answers: {shares}", flush=True)
    if options.write:
        FIGURES.write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
