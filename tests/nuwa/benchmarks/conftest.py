"""One row of every published table, typed out here from the tables' documentation and not from the code under test."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


def encode(width: int, height: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (width, height, 7)).save(buffer, kind)
    return buffer.getvalue()


PNG = encode(20, 10)
IMAGE = {"bytes": PNG, "path": "a.png"}

STRING, STRINGS, FLOATS = pa.string(), pa.list_(pa.string()), pa.list_(pa.float32())
IMAGE_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
VOTES_TYPE = pa.list_(pa.struct({"answer": STRING, "answer_confidence": STRING, "answer_id": pa.int64()}))


def referring() -> dict[str, tuple[pa.DataType, Any]]:
    return {
        "question_id": (STRING, "17"),
        "image": (IMAGE_TYPE, IMAGE),
        "question": (STRING, "Please carefully observe the area circled in the image."),
        "answer": (STRINGS, ["left dog", "the brown dog"]),
        "segmentation": (FLOATS, [1.0, 2.0, 3.0, 4.0]),
        "bbox": (FLOATS, [5.0, 2.5, 10.0, 5.0]),
        "iscrowd": (pa.int8(), 0),
        "file_name": (STRING, "COCO_train2014_1.jpg"),
    }


# column → (published type, value)
PUBLISHED: dict[str, dict[str, tuple[pa.DataType, Any]]] = {
    "refcoco": referring(),
    "refcocoplus": referring(),
    "refcocog": referring(),
    "gqa": {
        "id": (STRING, "2011"),
        "imageId": (STRING, "n1"),
        "question": (STRING, "What color is the sky?"),
        "answer": (STRING, "blue"),
        "image": (IMAGE_TYPE, IMAGE),
    },
    "pope": {
        "id": (STRING, "3"),
        "question_id": (STRING, "1"),
        "question": (STRING, "Is there a dog in the image?"),
        "answer": (STRING, "yes"),
        "image": (IMAGE_TYPE, IMAGE),
        "category": (STRING, "popular"),
    },
    "scienceqa": {
        "image": (IMAGE_TYPE, IMAGE),
        "question": (STRING, "Which is north?"),
        "choices": (STRINGS, ["Ohio", "Utah", "Iowa"]),
        "answer": (pa.int8(), 1),
        "hint": (STRING, "Look at the map."),
        "task": (STRING, "closed choice"),
        "grade": (STRING, "grade2"),
        "subject": (STRING, "social science"),
        "topic": (STRING, "geography"),
        "category": (STRING, "Geography"),
        "skill": (STRING, "Read a map"),
        "lecture": (STRING, ""),
        "solution": (STRING, None),
    },
    "textvqa": {
        "image_id": (STRING, "003a8ae2ef43b901"),
        "question_id": (pa.int32(), 34602),
        "question": (STRING, "what is the brand of this CAMERA?"),
        "question_tokens": (STRINGS, ["what", "is"]),
        "image": (IMAGE_TYPE, IMAGE),
        "image_width": (pa.int32(), 20),
        "image_height": (pa.int32(), 10),
        "flickr_original_url": (STRING, "http://a"),
        "flickr_300k_url": (STRING, None),
        "answers": (STRINGS, ["Nous", "nous les gosses", "", *["dakota"] * 7]),
        "image_classes": (STRINGS, ["Cassette deck"]),
        "set_name": (STRING, "val"),
        "ocr_tokens": (STRINGS, ["DAKOTA", "DIGITAL"]),
    },
    "vqav2": {
        "question_type": (STRING, "how many"),
        "multiple_choice_answer": (STRING, "2"),
        "answers": (
            VOTES_TYPE,
            [{"answer": "2", "answer_confidence": "yes", "answer_id": number} for number in range(1, 11)],
        ),
        "image_id": (pa.int64(), 262148),
        "answer_type": (STRING, "number"),
        "question_id": (pa.int64(), 262148000),
        "question": (STRING, "How many dogs?"),
        "image": (IMAGE_TYPE, IMAGE),
    },
    "mme": {
        "question_id": (STRING, "count/0001.png"),
        "image": (IMAGE_TYPE, IMAGE),
        "question": (STRING, "Are there two dogs? Please answer yes or no."),
        "answer": (STRING, "Yes"),
        "category": (STRING, "count"),
    },
    "mmbench": {
        "index": (pa.int64(), 2000241),
        "question": (STRING, "Which is a fruit?"),
        "hint": (STRING, "nan"),
        "answer": (STRING, "B"),
        "A": (STRING, "stone"),
        "B": (STRING, "banana"),
        "C": (STRING, "nan"),
        "D": (STRING, None),
        "category": (STRING, "identity_reasoning"),
        "image": (IMAGE_TYPE, IMAGE),
        "source": (STRING, "scienceqa"),
        "L2-category": (STRING, "attribute_reasoning"),
        "comment": (STRING, "nan"),
        "split": (STRING, "dev"),
    },
    "seedbench": {
        "answer": (STRING, "C"),
        "choice_a": (STRING, "One"),
        "choice_b": (STRING, "Two"),
        "choice_c": (STRING, "Three"),
        "choice_d": (STRING, "Four"),
        "data_type": (STRING, "image"),
        "question": (STRING, "How many towels are there?"),
        "question_id": (STRING, "101669"),
        "image": (pa.list_(IMAGE_TYPE), [IMAGE]),
    },
    "mmmu": {
        "id": (STRING, "validation_Art_Theory_3"),
        "question": (STRING, "<image 1> Who painted this?"),
        "options": (STRING, "['Claude Monet', 'Max Ernst', \"O'Keeffe\"]"),
        "explanation": (STRING, ""),
        "image_1": (IMAGE_TYPE, IMAGE),
        **{f"image_{number}": (IMAGE_TYPE, None) for number in range(2, 8)},
        "img_type": (STRING, "['Paintings']"),
        "answer": (STRING, "B"),
        "topic_difficulty": (STRING, "Easy"),
        "question_type": (STRING, "multiple-choice"),
        "subfield": (STRING, "Art Theory"),
    },
    "mmvet": {
        "question_id": (STRING, "v1_0"),
        "image": (IMAGE_TYPE, IMAGE),
        "question": (STRING, "What is x in the equation?"),
        "answer": (STRING, "-1<AND>-5"),
        "image_source": (STRING, "https://a"),
        "capability": (STRING, "ocr,math"),
    },
}
PUBLISHED["docvqa"] = {
    "questionId": (STRING, "49153"),
    "question": (STRING, "What is the date?"),
    "question_types": (STRINGS, ["handwritten"]),
    "image": (IMAGE_TYPE, IMAGE),
    "docId": (pa.int64(), 14465),
    "ucsf_document_id": (STRING, "pybv0228"),
    "ucsf_document_page_no": (STRING, "81"),
    "answers": (STRINGS, ["Jan 8", "January 8"]),
    "data_split": (STRING, "val"),
}
PUBLISHED["infovqa"] = {
    "questionId": (STRING, "98313"),
    "question": (STRING, "What is the date?"),
    "answers": (STRINGS, ["Jan 8", "January 8"]),
    "answer_type": (STRINGS, ["single span"]),
    "image": (IMAGE_TYPE, IMAGE),
    "image_url": (STRING, "https://a"),
    "operation/reasoning": (STRINGS, ["none"]),
    "ocr": (STRING, "[]"),
    "data_split": (STRING, "val"),
}
PUBLISHED["ocrbench"] = {
    "dataset": (STRING, "IIIT5K"),
    "question": (STRING, " what is written in the image? "),
    "question_type": (STRING, "Regular Text Recognition"),
    "answer": (STRINGS, ["CENTRE"]),
    "image": (IMAGE_TYPE, IMAGE),
}
PUBLISHED["chartqa"] = {
    "type": (STRING, "human_test"),
    "question": (STRING, "How many bars are there?"),
    "answer": (STRING, "14"),
    "image": (IMAGE_TYPE, IMAGE),
}
PUBLISHED["mmstar"] = {
    "index": (pa.int64(), 7),
    "question": (STRING, "Is it red? Please answer yes or no.\nOptions: A: Yes, B: No, C: Both, D: Neither"),
    "image": (IMAGE_TYPE, IMAGE),
    "answer": (STRING, "A"),
    "category": (STRING, "coarse perception"),
    "l2_category": (STRING, "image style & quality"),
    "meta_info": (
        pa.struct({"source": STRING, "split": STRING, "image_path": STRING}),
        {"source": "MMBench", "split": "val", "image_path": "images/0.jpg"},
    ),
}
PUBLISHED["hallusionbench"] = {
    "category": (STRING, "VD"),
    "subcategory": (STRING, "illusion"),
    "visual_input": (STRING, "1"),
    "set_id": (STRING, "0"),
    "figure_id": (STRING, "2"),
    "sample_note": (STRING, "circle"),
    "question_id": (STRING, "1"),
    "question": (STRING, "Is the left circle smaller?"),
    "gt_answer_details": (STRING, "They are of one size."),
    "gt_answer": (STRING, "0"),
    "filename": (STRING, "./hallusion_bench/VD/illusion/0_2.png"),
    "image": (IMAGE_TYPE, IMAGE),
}
PUBLISHED["realworldqa"] = {
    "image": (IMAGE_TYPE, IMAGE),
    "question": (STRING, "Which way?\n\nA. Left\nB. Right\nPlease answer directly with only the letter."),
    "answer": (STRING, "B"),
}
PUBLISHED["ai2d"] = {
    "question": (STRING, "Which stage comes after the egg?"),
    "options": (STRINGS, ["larva", "adult", "pupa", "none"]),
    "answer": (STRING, "2"),
    "image": (IMAGE_TYPE, IMAGE),
}
PUBLISHED["vizwiz"] = {
    "question_id": (STRING, "VizWiz_val_00000000.jpg"),
    "image": (IMAGE_TYPE, IMAGE),
    "question": (STRING, "what IS this?"),
    "answers": (STRINGS, ["unanswerable", *["can of soup"] * 9]),
    "category": (STRING, "other"),
}
PUBLISHED["mmbench_cn"] = {
    **PUBLISHED["mmbench"],
    "question": (STRING, "哪一个是水果？"),
    "A": (STRING, "石头"),
    "B": (STRING, "香蕉"),
}


@dataclass(frozen=True)
class Published:
    """Tables of the published schema of one benchmark."""

    name: str
    folder: Path

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([(column, kind) for column, (kind, _) in PUBLISHED[self.name].items()])

    @property
    def row(self) -> dict[str, Any]:
        return {column: value for column, (_, value) in PUBLISHED[self.name].items()}

    def table(self, *changes: dict[str, Any]) -> pa.Table:
        """One row a change, each the sample row with the changed values."""
        return pa.Table.from_pylist([self.row | change for change in changes or ({},)], schema=self.schema)

    def read(self, table: pa.Table) -> pa.Table:
        """``table`` by way of a Parquet file."""
        path = self.folder / f"{self.name}.parquet"
        pq.write_table(table, path)
        return pq.read_table(path)


@pytest.fixture
def published(tmp_path: Path) -> Callable[[str], Published]:
    return lambda name: Published(name, tmp_path)
