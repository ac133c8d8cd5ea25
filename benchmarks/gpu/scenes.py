"""Four hundred questions about forty of the testbed's scenes, from a file beside this one.

The scenes' handwriting is scikit-learn's, which a machine with a GPU need not have; so they are drawn once, where it is,
and kept as PNG files in one table. No sweep's scenes are among them: the seed is this file's own.

    python -m benchmarks.gpu.scenes     # draws them again, byte for byte
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FILE = Path(__file__).with_name("scenes.parquet")
SEED = 411
IMAGES = 40
QUESTIONS = {"refcoco": 2, "refcocoplus": 2, "refcocog": 2, "pope": 2, "gqa": 1, "textvqa": 1}  # about each image
SCHEMA = pa.schema([("image", pa.binary()), ("questions", pa.list_(pa.string()))])


@dataclass(frozen=True)
class PinnedScenes:
    """``images``, what seeds chance about each (``names``), and each image's prompts (``questions``)."""

    images: list[Image.Image]
    names: list[str]
    questions: list[list[str]]

    @property
    def count(self) -> int:
        """Questions about all images together."""
        return sum(map(len, self.questions))


def read_scenes(images: int, questions: int) -> PinnedScenes:
    """The first ``images`` of the file and the first ``questions`` about each."""
    rows = pq.read_table(FILE).slice(0, images).to_pylist()
    pictures = [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in rows]
    names = [f"scene {number}" for number in range(len(rows))]
    return PinnedScenes(pictures, names, [row["questions"][:questions] for row in rows])


def draw_scenes() -> pa.Table:
    """The table of :data:`FILE`; needs scikit-learn."""
    from nuwa.benchmarks import get_benchmark
    from nuwa.testbed.benchmark import SPLIT, ask, encode_png, popular_pairs
    from nuwa.testbed.scenes import Scene, draw_scene

    rng = np.random.default_rng(SEED)
    total = sum(QUESTIONS.values())
    scenes: list[Scene] = []
    rows: list[dict[str, Any]] = []
    while len(scenes) < IMAGES:
        scenes.append(draw_scene(rng, SPLIT))
    popular = popular_pairs(scenes)

    for scene in scenes:
        prompts: list[str] = []
        for task, count in QUESTIONS.items():
            locate = "locate " if get_benchmark(task).family == "grounding" else ""
            texts = [locate + question.text for question in ask(rng, scene, task, count, popular)]
            prompts += [text for text in texts if text not in prompts]
        # A scene may offer fewer of a kind; existence can always be asked, of another digit each time.
        while len(prompts) < total:
            (spare,) = ask(rng, scene, "pope", 1, popular)
            prompts += [spare.text] if spare.text not in prompts else []
        rows.append({"image": encode_png(scene.image), "questions": prompts})
    return pa.Table.from_pylist(rows, SCHEMA)


if __name__ == "__main__":
    pq.write_table(draw_scenes(), FILE, compression="none")
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")
