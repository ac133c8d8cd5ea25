"""Tables of ``experiments/nuwa_table7`` in their published schemas, on a few photographs of COCO's size, which are made."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIZES = ((640, 480), (480, 640), (640, 427), (500, 375))  # width and height; the most frequent of COCO
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
BOX = [120.0, 90.0, 200.0, 150.0]
WORDS = ("red", "blue", "left", "right", "large", "small", "near", "far")
REFERRING = {
    "question_id": pa.string(),
    "image": IMAGE,
    "question": pa.string(),
    "answer": pa.list_(pa.string()),
    "segmentation": pa.list_(pa.float32()),
    "bbox": pa.list_(pa.float32()),
    "iscrowd": pa.int8(),
    "file_name": pa.string(),
}
OPTIONS = ("A", "B", "C", "D")


def photograph(number: int) -> bytes:
    """A JPEG of smooth colours with boxes in it; no two are alike."""
    rng = np.random.default_rng(number)
    width, height = SIZES[number % len(SIZES)]
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
    for _ in range(5):
        left, top = int(rng.integers(0, width - 120)), int(rng.integers(0, height - 120))
        picture.paste(tuple(map(int, rng.integers(0, 256, 3))), (left, top, left + 100, top + 100))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_tables(folder: Path, images: int) -> None:
    """Every table of the experiment below ``folder``, all on the same ``images`` photographs."""
    pictures = [{"bytes": photograph(number), "path": f"{number}.jpg"} for number in range(images)]
    numbered = list(enumerate(pictures))

    names = {"GQA/testdev_balanced_images/testdev.parquet": {"id": pa.string(), "image": IMAGE}}
    _write(folder, names, [{"id": f"n{number}", "image": picture} for number, picture in numbered])
    asked = dict.fromkeys(("id", "imageId", "question", "answer"), pa.string())
    rows = [
        {"id": str(number), "imageId": f"n{number}", "question": f"Is it {WORDS[number % 8]}?", "answer": "yes"}
        for number, _ in numbered
    ]
    _write(folder, {"GQA/testdev_balanced_instructions/testdev.parquet": asked}, rows)

    texts = ("question", "hint", "answer", *OPTIONS, "category", "source", "L2-category", "comment", "split")
    choices = {"index": pa.int64(), **dict.fromkeys(texts, pa.string()), "image": IMAGE}
    blank = dict.fromkeys(("hint", "D", "comment"), "nan") | {"source": "made", "split": "dev"}
    kinds = {"category": "identity_reasoning", "L2-category": "attribute_reasoning"}
    rows = [
        {
            "index": number,
            "question": "Which colour?",
            "answer": OPTIONS[number % 3],
            **blank,
            **kinds,
            "image": picture,
        }
        | {option: WORDS[(number + at) % 8] for at, option in enumerate("ABC")}
        for number, picture in numbered
    ]
    _write(folder, {"MMBench/en/dev.parquet": choices}, rows)

    pairs = dict.fromkeys(("question_id", "question", "answer", "category"), pa.string()) | {"image": IMAGE}
    rows = [
        {"question_id": f"{number}.jpg", "category": "count", "image": picture, "answer": answer}
        | {"question": f"Are there {answer} boxes? Please answer yes or no."}
        for number, picture in numbered
        for answer in ("Yes", "No")
    ]
    _write(folder, {"MME/test.parquet": pairs}, rows)

    for place in ("RefCOCO/test", "RefCOCOplus/testA", "RefCOCOplus/testB", "RefCOCOg/test"):
        rows = [
            {"question_id": f"{place}{number}", "image": picture, "question": "Please carefully observe the area."}
            | {"answer": [f"{WORDS[number % 8]} box"], "segmentation": BOX, "bbox": BOX, "iscrowd": 0}
            | {"file_name": f"COCO_train2014_{number}.jpg"}
            for number, picture in numbered
        ]
        _write(folder, {f"{place}.parquet": REFERRING}, rows)


def _write(folder: Path, schemas: Mapping[str, Mapping[str, pa.DataType]], rows: Sequence[Mapping[str, Any]]) -> None:
    for name, columns in schemas.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(list(rows), schema=pa.schema(columns)), path)
