"""Questions and images: each image once, subsets seeded, faults by name."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import tracemalloc

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import forked
from PIL import Image

from nuwa.benchmarks import RecordError, get_benchmark
from pipelines.data.datasets import choose_questions, image_line, write_examples
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


def test_subsets_are_nested(examples):
    """A larger number keeps what a smaller one had, of every benchmark and whatever other images there are."""
    names = ["pope", "gqa", "textvqa"]
    before: set[str] = set()
    for images in range(1, 13):
        chosen = set(choose_questions(examples, names, images, seed=1).examples["example_id"])
        assert before < chosen
        before = chosen
    assert before == set(choose_questions(examples, names, None, seed=1).examples["example_id"])

    half = examples[examples["image"].isin(sorted(set(examples["image"]))[::2])]
    of_half, of_all = (image_line(table["image"], 1) for table in (half, examples))
    assert of_half == [image for image in of_all if image in set(half["image"])]


def test_images_are_counted_by_benchmark(examples):
    chosen = choose_questions(examples, ["pope", "gqa", "textvqa"], {"pope": 2, "gqa": 5}, seed=1).examples
    assert chosen.groupby("benchmark")["image"].nunique().to_dict() == {"gqa": 5, "pope": 2, "textvqa": 12}
    few, more = (set(chosen.loc[chosen["benchmark"] == name, "image"]) for name in ("pope", "gqa"))
    assert few < more, "benchmarks on the same images share them, so that features and prefixes are shared too"
    with pytest.raises(SettingsError) as raised:
        choose_questions(examples, ["pope", "gqa"], {"gqa": 13}, 0)
    assert str(raised.value) == "sweep.images.gqa = 13: the prepared data has 12 images of it"


def test_faults_are_named(examples):
    with pytest.raises(SettingsError) as raised:
        choose_questions(examples, ["mme"], None, 0)
    assert str(raised.value) == (
        "sweep.benchmarks: 'mme' is not in the prepared data; it holds gqa, pope, refcoco, refcocoplus, textvqa"
    )
    with pytest.raises(SettingsError) as raised:
        choose_questions(examples, ["pope"], 13, 0)
    assert str(raised.value) == "sweep.images = 13: no benchmark of the prepared data has more than 12 images"


def pope_table(path, contents: list[bytes]) -> None:
    """A question about each of ``contents``, in that order."""
    rows = [
        {
            "id": str(number),
            "question_id": str(number),
            "question": "what is on the left ?",
            "answer": "yes",
            "image": {"bytes": content, "path": ""},
            "category": "random",
        }
        for number, content in enumerate(contents)
    ]
    pq.write_table(pa.Table.from_pylist(rows, get_benchmark("pope").schema), path / "pope.parquet", row_group_size=50)


def noise(number: int, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 90).point(lambda value: value ^ (number % 256)).save(buffer, "PNG")
    return buffer.getvalue()


SIZES = [(60, 40), (30, 70), (48, 48), (100, 30), (41, 57)]


@pytest.fixture
def many(tmp_path) -> list[bytes]:
    """Three hundred images of five sizes, mixed, some asked about twice."""
    contents = [noise(number, SIZES[number * 7 % 5]) for number in range(300)]
    pope_table(tmp_path, contents + contents[::9])
    return contents


def area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def written(folder, order) -> tuple[bytes, pq.ParquetFile]:
    write_examples({"pope": folder}, "testbed", folder / "e.parquet", folder / "i.parquet", order=order)
    return (folder / "e.parquet").read_bytes(), pq.ParquetFile(folder / "i.parquet")


def test_images_stand_in_the_order_asked_for_each_value_in_row_groups_of_its_own(many, tmp_path):
    plain, held = written(tmp_path, lambda size: ())
    digests = held.read(["image"])["image"].to_pylist()
    assert digests == sorted(hashlib.sha256(content).hexdigest() for content in many)
    assert [held.metadata.row_group(number).num_rows for number in range(held.num_row_groups)] == [64] * 4 + [44]
    by_area, held = written(tmp_path, area)
    assert by_area == plain, "the order of images is no matter of the questions"
    rows = held.read().to_pylist()
    assert [(area((row["width"], row["height"])), row["image"]) for row in rows] == sorted(
        (area((row["width"], row["height"])), row["image"]) for row in rows
    )
    assert {row["image"]: row["bytes"] for row in rows} == {hashlib.sha256(one).hexdigest(): one for one in many}
    for number in range(held.num_row_groups):
        group = held.read_row_group(number, ["width", "height"]).to_pylist()
        assert len({area((row["width"], row["height"])) for row in group}) == 1 and len(group) <= 64
    assert held.num_row_groups == 5, "sixty of each size"


def test_memory_holds_a_batch_of_images_not_all(tmp_path):
    """What Python and Arrow hold at most, on tables of one and of five times as many images."""
    peaks = []
    for count in (150, 750):
        folder = tmp_path / str(count)
        folder.mkdir()
        pope_table(folder, [noise(number, (150, 150)) for number in range(count)])
        tracemalloc.start()
        written(folder, area)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        size = (folder / "i.parquet").stat().st_size
    assert peaks[1] < size / 2 and peaks[1] < 2.5 * peaks[0], peaks


def test_a_size_that_no_model_takes_is_named_by_its_row_and_nothing_half_is_left(many, tmp_path):
    good = written(tmp_path, area)[0]
    before = (tmp_path / "i.parquet").read_bytes()
    pope_table(tmp_path, [*many, noise(1, (300, 1))])

    def order(size):
        if size[0] > 200 * size[1]:
            raise ValueError("too wide")
        return area(size)

    with pytest.raises(RecordError) as raised:
        written(tmp_path, order)
    assert str(raised.value) == (
        f"{tmp_path} (pope): pope:random/300: an image of 300x1 pixels: the model takes no such image (too wide); take its "
        "rows out of the table"
    )
    assert (tmp_path / "e.parquet").read_bytes() == good and (tmp_path / "i.parquet").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.parquet", "i.parquet", "pope.parquet"]


def test_a_killed_prepare_leaves_what_was_there(many, tmp_path):
    """Killed while images wait on disk: neither file has changed, and no other is left."""
    good = written(tmp_path, area)[0]
    before = (tmp_path / "i.parquet").read_bytes()
    seen = []

    def order(size: tuple[int, int]) -> tuple[()]:
        seen.append(size)
        if len(seen) == 200:
            os.kill(os.getpid(), signal.SIGKILL)
        return ()

    files = (tmp_path / "e.parquet", tmp_path / "i.parquet")
    done = forked(lambda: write_examples({"pope": tmp_path}, "testbed", *files, order=order))
    assert done.code == -signal.SIGKILL
    assert (tmp_path / "e.parquet").read_bytes() == good and (tmp_path / "i.parquet").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.parquet", "i.parquet", "pope.parquet"]
