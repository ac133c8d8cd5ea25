"""Published tables in folders and on a hub: layouts, splits, variants; every fault by name before anything is written."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nuwa.benchmarks import ProtocolError
from nuwa.layout import layout_order
from nuwa.vlm import LlavaNextAdapter, usual_image_processor
from nuwa.vlm.shapes import model_shape
from pipelines.addresses import BenchmarkName, hub_address
from pipelines.data.datasets import write_examples
from pipelines.data.tables import MissingTables, read_benchmark
from pipelines.settings import Settings
from stages.prepare import reading_order, seen_size

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def published(prepared, tmp_path_factory) -> Path:
    """The testbed's tables as a hub lays them out: parts of a split in ``data``, GQA in two configurations."""
    folder = tmp_path_factory.mktemp("published")
    table = pq.read_table(prepared / "benchmarks" / "refcoco.parquet")
    (folder / "RefCOCO" / "data").mkdir(parents=True)
    for part, start in enumerate(range(0, len(table), 5)):
        name = f"testA-{part:05}-of-{-(-len(table) // 5):05}.parquet"
        pq.write_table(table.slice(start, 5), folder / "RefCOCO" / "data" / name)
    pq.write_table(table.slice(0, 4), folder / "RefCOCO" / "data" / "val-00000-of-00001.parquet")
    for part in ("instructions", "images"):
        home = folder / "GQA" / f"testdev_balanced_{part}"
        home.mkdir(parents=True)
        pq.write_table(
            pq.read_table(prepared / "benchmarks" / f"gqa_{part}.parquet"), home / "testdev-00000-of-00001.parquet"
        )
    (folder / "POPE").mkdir()
    pq.write_table(pq.read_table(prepared / "benchmarks" / "pope.parquet"), folder / "POPE" / "test.parquet")
    return folder


def written(sources: dict[str, Path], folder: Path) -> pd.DataFrame:
    write_examples(sources, "llava_v1", folder / "examples.parquet", folder / "images.parquet")
    return pd.read_parquet(folder / "examples.parquet")


def test_names_have_split_and_variant():
    assert BenchmarkName.parse("textvqa/validation:ocr") == BenchmarkName("textvqa", "validation", "ocr")
    assert BenchmarkName.parse("pope") == BenchmarkName("pope", None, None)
    assert BenchmarkName.parse("refcoco/testA").table == "refcoco/testA"


def test_parts_of_a_split_read_as_the_whole_table(published, prepared, tmp_path):
    sources = {
        "refcoco/testA": published / "RefCOCO",
        "gqa/testdev": published / "GQA",
        "pope/test": published / "POPE",
    }
    split = written(sources, tmp_path / "split" / "x")
    whole = written(dict.fromkeys(["refcoco", "gqa", "pope"], prepared / "benchmarks"), tmp_path / "whole" / "x")
    assert split["example_id"].str.match(r"(refcoco/testA|gqa/testdev|pope/test):").all()
    for frame in (split, whole):
        frame["example_id"] = frame["example_id"].str.replace(r"^(\w+)(/\w+)?:", r"\1:", regex=True)
        frame["benchmark"] = frame["benchmark"].str.partition("/")[0]
    pd.testing.assert_frame_equal(split, whole)
    images = pq.read_table(tmp_path / "split" / "x" / "images.parquet").to_pylist()
    assert all(hashlib.sha256(row["bytes"]).hexdigest() == row["image"] for row in images)
    assert len({row["image"] for row in images}) == len(images) == split["image"].nunique()


def test_two_splits_and_a_variant_stay_apart(published, tmp_path):
    sources = {
        "refcoco/testA": published / "RefCOCO",
        "refcoco/val:pixels": published / "RefCOCO",
        "pope/test:first_sentence": published / "POPE",
    }
    frame = written(sources, tmp_path)
    assert frame["example_id"].is_unique
    assert set(frame["benchmark"]) == set(sources)
    assert set(json.loads(frame[frame["benchmark"] == "refcoco/val:pixels"].iloc[0]["truth"])) == {"box", "size"}


def test_boxes_told_in_pixels_are_told_on_the_image_as_the_model_sees_it(published, tmp_path):
    config = model_shape("Qwen/Qwen2.5-VL-7B-Instruct")
    seen = seen_size(config, usual_image_processor(config))
    assert seen((640, 480)) == (644, 476), "to multiples of 28"
    sources = {"refcoco/val:pixels": published / "RefCOCO", "refcoco/testA": published / "RefCOCO"}
    write_examples(sources, "llava_v1", tmp_path / "e.parquet", tmp_path / "i.parquet", seen=seen)
    for row in pq.read_table(tmp_path / "e.parquet").to_pylist():
        truth = json.loads(row["truth"])
        assert truth.get("size") == (
            list(seen((row["width"], row["height"]))) if row["benchmark"].endswith("pixels") else None
        )


def test_prepare_sorts_images_as_their_model_lays_them_out(tmp_path):
    """By layout where a model has layouts of its own, with or without its files; else by digest alone."""
    sizes = [(640, 480), (200, 900), (330, 330)]
    config = model_shape("llava-hf/llava-v1.6-vicuna-7b-hf")
    layout = {size: LlavaNextAdapter.layout_for(config, usual_image_processor(config), size) for size in sizes}
    absent = str(tmp_path / "llava-hf" / "llava-v1.6-vicuna-7b-hf")
    order = reading_order(absent)
    assert [order(size) for size in sizes] == [layout_order(layout[size]) for size in sizes]
    assert sorted(sizes, key=order) == sorted(sizes, key=lambda size: layout[size].tokens)
    assert {reading_order("llava-hf/llava-1.5-7b-hf")(size) for size in sizes} == {()}
    with pytest.raises(ValueError, match="aspect ratio"):
        reading_order(str(tmp_path / "Qwen" / "Qwen2.5-VL-7B-Instruct"))((1000, 2))


def test_a_missing_part_is_named(published, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for part in (0, 2):
        source = next((published / "RefCOCO" / "data").glob(f"testA-{part:05}-*"))
        (folder / source.name).write_bytes(source.read_bytes())
    with pytest.raises(MissingTables) as raised:
        read_benchmark(tmp_path, BenchmarkName.parse("refcoco/testA"))
    assert str(raised.value) == f"{folder}: part 1 of 3 of refcoco/testA is missing; fetch it again"


def test_absent_and_ambiguous_splits_are_named(published, tmp_path):
    with pytest.raises(MissingTables) as raised:
        read_benchmark(published / "RefCOCO", BenchmarkName.parse("refcoco/testB"))
    assert str(raised.value) == (
        f"{published / 'RefCOCO'}/**: no testB.parquet or testB-00000-of-*.parquet for refcoco/testB; "
        "give the folder that holds the published files"
    )
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.parquet").write_bytes((published / "POPE" / "test.parquet").read_bytes())
    with pytest.raises(MissingTables) as raised:
        read_benchmark(tmp_path, BenchmarkName.parse("pope/test"))
    assert str(raised.value) == (
        f"pope/test: several folders hold the split test: {tmp_path / 'a'}, {tmp_path / 'b'}; name one, "
        "of a dataset of the hub as hub:organisation/dataset/folder@commit"
    )


def test_a_wrong_table_leaves_nothing_behind(published, tmp_path):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"question_id": ["1"]}), tmp_path / "in" / "testA.parquet")
    with pytest.raises(ValueError, match="column 'image' of refcoco should be struct"):
        written({"pope/test": published / "POPE", "refcoco/testA": tmp_path / "in"}, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


UNREADABLE = [
    "hub:lmms-lab/POPE",
    "hub:POPE@abc",
    "hub:@abc",
    "hub:lmms-lab/POPE@",
    "hub:lmms-lab/ScienceQA@abc/ScienceQA-IMG",
    "hub:lmms-lab/POPE@refs/convert/parquet",
    "hub:lmms-lab/POPE/../..@abc",
    "hub:lmms-lab/POPE//data@abc",
    "hub:lmms-lab/POPE/@abc",
    "hub:lmms-lab/POPE@abc@def",
]


@pytest.mark.parametrize("location", UNREADABLE)
def test_a_hub_dataset_needs_its_commit_last(location, params):
    expected = (
        f"{location!r} should read hub:organisation/dataset@commit, or hub:organisation/dataset/folder@commit where "
        "the dataset holds several configurations"
    )
    with pytest.raises(ValueError) as raised:
        hub_address(location)
    assert str(raised.value) == expected
    params["prepare"]["tables"] = {"pope/test": location}
    with pytest.raises(ValueError, match=re.escape(f"prepare.tables.pope/test: {expected}")):
        Settings.model_validate(params)


@pytest.mark.parametrize("folder", ["", "ScienceQA-IMG", "en/data", "one config"])
def test_a_hub_dataset_may_name_a_folder(folder):
    assert hub_address(f"hub:lmms-lab/A.b/{folder}@abc".replace("/@", "@")) == ("lmms-lab/A.b", folder, "abc")


class _Hub(BaseHTTPRequestHandler):
    """As much of a hub as a download needs: what a revision holds, and its files."""

    files: dict[str, bytes]
    commit: str

    def log_message(self, *_args):
        pass

    def _answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/lmms-lab/POPE"):
            info = {"id": "lmms-lab/POPE", "sha": self.commit, "siblings": [{"rfilename": name} for name in self.files]}
            if "/tree/" in path:
                info = [
                    {"type": "file", "path": name, "size": len(b), "oid": "0" * 40} for name, b in self.files.items()
                ]
            self._answer(json.dumps(info).encode(), Content_Type="application/json")
            return
        name = path.rpartition(f"/resolve/{self.commit}/")[2]
        if name not in self.files:
            self._answer(b"", 404)
            return
        body = self.files[name]
        self._answer(body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit=self.commit)

    do_HEAD = do_GET


ASKED_OF_THE_HUB = """
import sys
from pipelines.addresses import BenchmarkName
from pipelines.data.tables import MissingTables, fetch_tables, read_benchmark
for line in sys.stdin:
    location, written = line.split()
    name = BenchmarkName.parse(written)
    try:
        table = read_benchmark(fetch_tables(location, name), name)
        print(table.count_rows() if hasattr(table, "count_rows") else table.num_rows, flush=True)
    except MissingTables as error:
        print(error, flush=True)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Callable[[str, str], tuple[str, list[str]]]]:
    """What is read of a folder of ``_Hub.files``: the table's rows or what is wrong, and the files that were downloaded.

    In a process of its own, whose settings of the hub are those it was started with. One serves all tests: every call is
    about another commit, of which nothing is cached.
    """
    cache, commits = tmp_path_factory.mktemp("hub"), itertools.count(1)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", ASKED_OF_THE_HUB]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def fetched(folder: str, name: str) -> tuple[str, list[str]]:
        _Hub.commit = f"{next(commits):040x}"
        process.stdin.write(f"hub:lmms-lab/POPE{folder}@{_Hub.commit} {name}\n")
        process.stdin.flush()
        said = process.stdout.readline()
        assert said, f"the process ended with {process.wait()}"
        (snapshot,) = cache.glob(f"hub/datasets--lmms-lab--POPE/snapshots/{_Hub.commit}")
        files = sorted(str(path.relative_to(snapshot)) for path in snapshot.rglob("*.*"))
        return said.strip().replace(str(snapshot), "SNAPSHOT"), files

    yield fetched
    process.stdin.close()
    process.stdout.close()
    process.wait()
    server.shutdown()
    server.server_close()


FETCHED = {
    "one of several splits": ("", "pope/test", ["data/test-00000-of-00001.parquet"]),
    "one of several configurations": ("/en", "pope/dev", ["en/dev-00000-of-00001.parquet"]),
    "a nested one": ("/more/cn", "pope/dev", ["more/cn/dev.parquet"]),
    "a folder above it": ("/more", "pope/dev", ["more/cn/dev.parquet"]),
    "no split": ("", "pope", ["pope.parquet"]),
    "no split in a folder": ("/en", "pope", ["en/pope.parquet"]),
    "two tables": (
        "",
        "gqa/testdev",
        [f"testdev_balanced_{part}/testdev-00000-of-00001.parquet" for part in ("images", "instructions")],
    ),
}


@pytest.mark.parametrize("case", FETCHED)
def test_only_the_split_that_is_asked_for_is_fetched(case, published, hub):
    folder, name, expected = FETCHED[case]
    pope = (published / "POPE" / "test.parquet").read_bytes()
    gqa = {str(path.relative_to(published / "GQA")): path.read_bytes() for path in published.glob("GQA/*/*.parquet")}
    asked = gqa["testdev_balanced_instructions/testdev-00000-of-00001.parquet"]
    rows = {name: pq.read_table(pa.BufferReader(table)).num_rows for name, table in (("pope", pope), ("gqa", asked))}
    homes = ["data/test-00000-of-00001", "data/train-00000-of-00001", "en/dev-00000-of-00001", "cn/dev-00000-of-00001"]
    homes += ["en/val-00000-of-00001", "more/cn/dev", "data/latest", "data/test-mini", "pope", "en/pope"]
    others = [path.replace("testdev", "val") for path in gqa]
    _Hub.files = dict.fromkeys([*(f"{home}.parquet" for home in homes), "README.md", *others], pope) | gqa
    said, files = hub(folder, name)
    assert files == expected
    assert said == str(rows[name.partition("/")[0]])


def test_configurations_that_are_not_told_apart_are_named(published, hub):
    pope = (published / "POPE" / "test.parquet").read_bytes()
    _Hub.files = {f"{home}/dev-00000-of-00001.parquet": pope for home in ("en", "cn")}
    said, _ = hub("", "pope/dev")
    assert said == (
        "pope/dev: several folders hold the split dev: SNAPSHOT/cn, SNAPSHOT/en; name one, "
        "of a dataset of the hub as hub:organisation/dataset/folder@commit"
    )


def test_a_hub_that_does_not_answer_is_one_line(tmp_path):
    code = f"""
from pipelines.addresses import BenchmarkName
from pipelines.data.tables import MissingTables, fetch_tables
try:
    fetch_tables("hub:lmms-lab/POPE@{COMMIT}", BenchmarkName.parse("pope/test"))
except MissingTables as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"hub:lmms-lab/POPE@{COMMIT}: could not be fetched: "), done.stdout
    assert done.stdout.count("\n") == 1


def test_a_protocol_decides_words_and_limit_by_the_models_family(published, tmp_path):
    sources = {"pope/test@lmms_eval": published / "POPE", "refcoco/val@lmms_eval": published / "RefCOCO"}
    limits = {}
    for family in ("llava", "qwen2_5_vl"):
        examples = tmp_path / family / "e.parquet"
        write_examples(sources, "llava_v1", examples, tmp_path / family / "i.parquet", model_type=family)
        frame = pd.read_parquet(examples)
        assert (
            set(frame["benchmark"]) == set(sources) and frame["example_id"].str.match("(pope/test|refcoco/val):").all()
        )
        limits[family] = frame.groupby("benchmark")["max_new_tokens"].unique().map(list).to_dict()
    assert limits == {
        "llava": {"pope/test@lmms_eval": [128], "refcoco/val@lmms_eval": [1024]},
        "qwen2_5_vl": {"pope/test@lmms_eval": [128], "refcoco/val@lmms_eval": [128]},
    }
    with pytest.raises(ProtocolError, match="'vscan' is not run on llava models"):
        write_examples(
            {"refcoco/val@vscan": published / "RefCOCO"}, "llava_v1", tmp_path / "e", tmp_path / "i", model_type="llava"
        )
