"""The plugin by itself: nothing but ``nuwa`` and this package are at hand."""

from __future__ import annotations

import importlib.util
import io
import os
from pathlib import Path

import numpy as np
import nuwa_loudest
import pyarrow as pa
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import nuwa
from nuwa.benchmarks import get_benchmark
from nuwa.benchmarks.own_tables import JsonLines
from nuwa.grid import PatchGrid
from nuwa.signals import VisionSignals

MODEL = Path(os.environ.get("NUWA_MODEL", "models/testbed"))


def picture() -> Image.Image:
    drawn = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    return Image.fromarray(drawn)


def test_only_the_library_is_here():
    assert importlib.util.find_spec("pipelines") is None, "this test is to be run beside the wheel alone"


def test_the_longest_features_are_kept():
    features = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [6.0, 8.0], [5.0, 0.0]]])
    absent = {"cls_attention": None, "keys": None, "similarity": None}
    signals = VisionSignals(grid=PatchGrid(2, 2), features=features, **absent, image_ids=("image",))
    selection = nuwa_loudest.select(signals, 2, nuwa_loudest.Loudest())
    assert selection.indices.tolist() == [[0, 2]], "of equal ones the lower index"


def test_method_and_scorer_work_from_generate_at_once():
    model = LlavaForConditionalGeneration.from_pretrained(MODEL).eval()
    processor = AutoProcessor.from_pretrained(MODEL)
    options = {"average_tokens": 32, "max_new_tokens": 3}
    (answer,) = nuwa.generate(
        model, processor, [picture()], ["how many digits are there?"], method="loudest", **options
    )
    assert len(answer.kept.slots) == 32

    (ranked,) = nuwa.generate(
        model,
        processor,
        [picture()],
        ["how many digits are there?"],
        method="fastv",
        stage2={"scorer": "loudest_value"},
        **options,
    )
    assert len(ranked.kept_last) == ranked.schedule.cuts[-1][1]
    assert {one.name for one in nuwa.methods()} >= {"loudest", "nuwa"}
    assert next(one for one in nuwa.methods() if one.name == "loudest").parameters == {"power": 2.0}


def test_the_benchmark_reads_parquet_and_json_lines_alike(tmp_path):
    encoded = io.BytesIO()
    picture().save(encoded, "PNG")
    (tmp_path / "clock.png").write_bytes(encoded.getvalue())
    (tmp_path / "clocks.jsonl").write_text(
        '{"image": "clock.png", "question": "What time is it?", "answers": ["10:45", "a quarter to eleven"]}\n'
    )
    benchmark = get_benchmark("clocks")
    rows = pa.table(
        {
            "image": [{"bytes": encoded.getvalue(), "path": "clock.png"}],
            "question": ["What time is it?"],
            "answers": [["10:45", "a quarter to eleven"]],
        }
    )
    (one,), (other,) = (list(benchmark.examples(table)) for table in (rows, JsonLines(tmp_path / "clocks.jsonl")))
    assert one == other and one.truth == {"answers": ["10:45", "a quarter to eleven"]}
    assert benchmark.score("A quarter to eleven.", one.truth)["accuracy"] == 1
    assert benchmark.score("noon", one.truth)["accuracy"] == 0


def test_what_the_plugin_refuses_is_told():
    with pytest.raises(ValueError, match=r"loudest\.power -1 must be positive"):
        nuwa.methods.specify("loudest", budget=16, parameters={"power": -1.0})
