"""How the small tables of this folder were made: the same rows by five tools, each with its defaults.

    python -m venv /tmp/writers && /tmp/writers/bin/pip install pandas polars pyarrow duckdb datasets pillow
    /tmp/writers/bin/python tests/tables/write.py

The suite reads the files and needs none of the tools. ``rows.json`` says what every reader must find.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import datasets
import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

HERE = Path(__file__).parent


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), (shade, 0, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def pope() -> list[dict]:
    """Flat columns and an image whose path no row has."""
    return [
        {
            "id": str(number),
            "question_id": str(number // 2),
            "question": f"Is there a dög in picture {number}?",
            "answer": ("yes", "no")[number % 2],
            "image": {"bytes": png(number), "path": None},
            "category": ("random", "popular", "adversarial")[number],
        }
        for number in range(3)
    ]


def refcoco() -> list[dict]:
    """Lists of words, lists of numbers of which none or all are there, small integers."""
    return [
        {
            "question_id": str(number),
            "image": {"bytes": png(number), "path": f"{number}.png"},
            "question": "where?",
            "answer": ["left dog", "the brown dog"][: number + 1],
            "segmentation": [],
            "bbox": [1.0, 2.0, 8.0, 4.5 + number],
            "iscrowd": 0,
            "file_name": f"{number}.jpg",
        }
        for number in range(2)
    ]


def textvqa() -> list[dict]:
    """Lists of words that are empty in every row, and numbers of which some are missing."""
    return [
        {
            "image_id": str(number),
            "question_id": 34_600 + number,
            "question": "what does it say?",
            "question_tokens": ["what", "does"],
            "image": {"bytes": png(number), "path": None},
            "image_width": None if number else 20,
            "image_height": 10,
            "flickr_original_url": None,
            "flickr_300k_url": "",
            "answers": ["stop"] * 10,
            "image_classes": [],
            "set_name": "val",
            "ocr_tokens": [],
        }
        for number in range(2)
    ]


def write_pandas(rows: list[dict], path: Path) -> None:
    pd.DataFrame(rows).to_parquet(path)


def write_polars(rows: list[dict], path: Path) -> None:
    pl.DataFrame(rows).write_parquet(path)


def write_pyarrow(rows: list[dict], path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_duckdb(rows: list[dict], path: Path) -> None:
    table = pa.Table.from_pylist(rows)  # duckdb reads the variable by its name
    connection = duckdb.connect()
    connection.register("held", table)
    connection.execute(f"COPY (SELECT * FROM held) TO '{path}' (FORMAT parquet)")


def write_datasets(rows: list[dict], path: Path) -> None:
    held = datasets.Dataset.from_list(rows)
    held.cast_column("image", datasets.Image()).to_parquet(path)


WRITERS = {
    "pandas": write_pandas,
    "polars": write_polars,
    "pyarrow": write_pyarrow,
    "duckdb": write_duckdb,
    "datasets": write_datasets,
}

if __name__ == "__main__":
    tables = {"pope": pope(), "refcoco": refcoco(), "textvqa": textvqa()}
    for tool, write in WRITERS.items():
        (HERE / tool).mkdir(exist_ok=True)
        for name, rows in tables.items():
            write(rows, HERE / tool / f"{name}.parquet")
            print(tool, name, pq.read_schema(HERE / tool / f"{name}.parquet").remove_metadata(), sep="\n")
    shown = json.dumps(tables, indent=1, default=lambda held: base64.b64encode(held).decode())
    (HERE / "rows.json").write_text(shown + "\n")
