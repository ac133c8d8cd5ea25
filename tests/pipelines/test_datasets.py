"""Questions and images: each image once, subsets seeded, faults by name."""

from __future__ import annotations

import hashlib
import json

import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipelines.datasets import choose_questions, write_examples
from pipelines.settings import SettingsError


def test_each_image_is_stored_once_under_its_digest(prepared, examples):
    images = pq.read_table(prepared / "images.parquet").to_pandas()
    assert len(images) == 12
    assert all(hashlib.sha256(row.bytes).hexdigest() == row.image for row in images.itertuples())
    assert set(examples["image"]) == set(images["image"])
    assert examples["example_id"].is_unique


def test_examples_carry_prompt_truth_and_size(examples):
    box = examples[examples["benchmark"] == "refcoco"].iloc[0]
    assert box["prompt"] == f"locate {box['question']}"
    assert box["family"] == "grounding"
    left, top, right, bottom = json.loads(box["truth"])["box"]
    assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
    assert (box["width"], box["height"]) == (96, 96)
    word = examples[examples["benchmark"] == "gqa"].iloc[0]
    assert word["prompt"] == word["question"]
    assert word["family"] == "vqa"


def test_prepared_twice_is_byte_identical(prepared, tmp_path):
    sources = dict.fromkeys(["refcoco", "refcocoplus", "pope", "gqa", "textvqa"], prepared / "benchmarks")
    write_examples(sources, "testbed", tmp_path / "e.parquet", tmp_path / "i.parquet")
    assert (tmp_path / "e.parquet").read_bytes() == (prepared / "examples.parquet").read_bytes()
    assert (tmp_path / "i.parquet").read_bytes() == (prepared / "images.parquet").read_bytes()


def test_subsets_are_seeded_whole_images(examples):
    one = choose_questions(examples, ["pope", "gqa"], 5, seed=1)
    assert len(one.images) == 5
    assert set(one.examples["image"]) == set(one.images)
    everything = examples[examples["benchmark"].isin(["pope", "gqa"]) & examples["image"].isin(one.images)]
    assert len(one.examples) == len(everything)
    assert choose_questions(examples.sample(frac=1, random_state=0), ["pope", "gqa"], 5, seed=1).images == one.images
    assert choose_questions(examples, ["pope", "gqa"], 5, seed=2).images != one.images
    (first, *_) = one.of(one.images)
    assert isinstance(first, pd.DataFrame) and set(first["image"]) == {one.images[0]}


def test_faults_are_named(examples):
    with pytest.raises(SettingsError) as raised:
        choose_questions(examples, ["mme"], None, 0)
    assert str(raised.value) == (
        "sweep.benchmarks: 'mme' is not in the prepared data; it holds gqa, pope, refcoco, refcocoplus, textvqa"
    )
    with pytest.raises(SettingsError) as raised:
        choose_questions(examples, ["pope"], 13, 0)
    assert str(raised.value) == "sweep.images = 13: the prepared data has 12 images"
