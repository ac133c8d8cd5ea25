"""The testbed's test split as Parquet files in the published schemas of the benchmarks it mirrors."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from nuwa.benchmarks import get_benchmark
from nuwa.benchmarks.gqa import IMAGES, INSTRUCTIONS
from nuwa.testbed.questions import Description, Question, draw_question
from nuwa.testbed.readable import with_features
from nuwa.testbed.scenes import IMAGE_SIZE, Scene, draw_scene

SPLIT = "test"
POPE_CATEGORIES = ("random", "popular", "adversarial")
POPULAR_PAIRS = 15  # of 60 (digit, colour) pairs
DRAWS = 30  # tries at a question that the image was not asked yet


def encode_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def popular_pairs(scenes: list[Scene]) -> list[Description]:
    """The (digit, colour) pairs that occur most often in the split; ties in a fixed order."""
    counts = Counter((item.digit, item.color) for scene in scenes for item in scene.objects)
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return [Description(*pair) for pair, _ in ordered[:POPULAR_PAIRS]]


def ask(rng: np.random.Generator, scene: Scene, task: str, count: int, popular: list[Description]) -> list[Question]:
    """Up to ``count`` different questions of ``task``; a scene may offer fewer."""
    drawn: dict[str, Question] = {}
    for number in range(count):
        options: dict[str, Any] = {}
        if task == "pope":
            options = {
                "category": POPE_CATEGORIES[number % len(POPE_CATEGORIES)],
                "popular": popular,
                "answer": ("yes", "no")[int(rng.integers(2))],
            }

        # A question that was drawn before is drawn anew, for a while.
        for _ in range(DRAWS):
            try:
                question = draw_question(rng, scene.objects, task, **options)
            except ValueError:  # the scene offers none of this kind
                break
            if question.text not in drawn:
                drawn[question.text] = question
                break
    return list(drawn.values())


def make_testbed_benchmark(folder: Path, images: int, questions: Mapping[str, int], seed: int) -> None:
    """Write ``<folder>/<benchmark>.parquet`` (GQA: its two published tables) for ``images`` seeded test scenes.

    ``questions``: per benchmark, how many are asked of each image. Byte-identical for equal arguments.
    """
    scenes = [draw_scene(np.random.default_rng([seed, number]), SPLIT) for number in range(images)]
    encoded = [
        {"bytes": encode_png(scene.image), "path": f"scene_{number:05d}.png"} for number, scene in enumerate(scenes)
    ]
    popular = popular_pairs(scenes)
    folder.mkdir(parents=True, exist_ok=True)

    for task, count in questions.items():
        rng = np.random.default_rng([seed, *task.encode()])
        by_scene = [ask(rng, scene, task, count, popular) for scene in scenes]
        if task == "gqa":
            _write_gqa(folder, encoded, by_scene)
            continue
        rows = [
            row
            for number, about_scene in enumerate(by_scene)
            for row in ROWS[task](number, encoded[number], about_scene)
        ]
        pq.write_table(
            pa.Table.from_pylist(rows, with_features(get_benchmark(task).schema)), folder / f"{task}.parquet"
        )


def _grounding_rows(number: int, image: dict[str, Any], questions: list[Question]) -> list[dict[str, Any]]:
    """One row an object; all its expressions in ``answer``, as RefCOCO has them."""
    by_target: dict[Any, list[str]] = {}
    for question in questions:
        by_target.setdefault(question.target, []).append(question.text)
    return [
        {
            "question_id": f"{number:05d}_{order}",
            "image": image,
            "question": "Please provide the bounding box coordinate of the region this sentence describes.",
            "answer": expressions,
            "segmentation": _outline(target.bbox),
            "bbox": target.bbox,
            "iscrowd": 0,
            "file_name": image["path"],
        }
        for order, (target, expressions) in enumerate(by_target.items())
    ]


def _outline(bbox: list[float]) -> list[float]:
    x, y, w, h = bbox
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def _pope_rows(number: int, image: dict[str, Any], questions: list[Question]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{number:05d}_{order}",
            "question_id": f"{number:05d}_{order}",
            "question": question.text,
            "answer": question.answer,
            "image": image,
            "category": question.category,
        }
        for order, question in enumerate(questions)
    ]


def _textvqa_rows(number: int, image: dict[str, Any], questions: list[Question]) -> list[dict[str, Any]]:
    return [
        {
            "image_id": image["path"],
            "question_id": number * 100 + order,
            "question": question.text,
            "question_tokens": question.text.rstrip("?").split(),
            "image": image,
            "image_width": IMAGE_SIZE,
            "image_height": IMAGE_SIZE,
            "flickr_original_url": "",
            "flickr_300k_url": "",
            "answers": [question.answer] * 10,
            "image_classes": ["digit"],
            "set_name": SPLIT,
            "ocr_tokens": [],
        }
        for order, question in enumerate(questions)
    ]


def _write_gqa(folder: Path, encoded: list[dict[str, Any]], by_scene: list[list[Question]]) -> None:
    rows = [
        {
            "id": f"{number:05d}_{order}",
            "imageId": f"{number:05d}",
            "question": question.text,
            "answer": question.answer,
        }
        for number, about_scene in enumerate(by_scene)
        for order, question in enumerate(about_scene)
    ]
    images = [{"id": f"{number:05d}", "image": image} for number, image in enumerate(encoded)]
    pq.write_table(pa.Table.from_pylist(rows, with_features(INSTRUCTIONS)), folder / "gqa_instructions.parquet")
    pq.write_table(pa.Table.from_pylist(images, with_features(IMAGES)), folder / "gqa_images.parquet")


ROWS = {
    "refcoco": _grounding_rows,
    "refcocoplus": _grounding_rows,
    "refcocog": _grounding_rows,
    "pope": _pope_rows,
    "textvqa": _textvqa_rows,
}
