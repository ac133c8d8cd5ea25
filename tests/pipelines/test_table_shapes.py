"""Tables of the published meaning in whatever shape tools write them: the same examples; others told by file and row."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nuwa.benchmarks import RecordError, SchemaError, get_benchmark
from nuwa.benchmarks.own_tables import JsonLines, own_benchmark
from nuwa.benchmarks.rows import ParquetFiles, UnreadableTable, large
from pipelines.addresses import BenchmarkName
from pipelines.data.datasets import write_examples
from pipelines.data.tables import MissingTables, read_benchmark
from pipelines.files.digests import DigestMemo

TABLES = Path(__file__).parents[1] / "tables"
ROWS = json.loads((TABLES / "rows.json").read_text())
for rows in ROWS.values():
    for row in rows:
        row["image"]["bytes"] = base64.b64decode(row["image"]["bytes"])


def expected(name: str) -> list:
    """What the rows mean, without any file: handed to the benchmark's own reader one by one."""
    return [example for row in ROWS[name] for example in get_benchmark(name).read(dict(row))]


def read(folder: Path, name: str) -> list:
    table = read_benchmark(folder, BenchmarkName.parse(name))
    return list(BenchmarkName.parse(name).benchmark().examples(table, str(folder), whole=True))


@pytest.mark.parametrize("name", list(ROWS))
@pytest.mark.parametrize("tool", ["pandas", "polars", "pyarrow", "duckdb", "datasets"])
def test_tables_of_five_tools_are_the_same_examples(tool, name):
    assert read(TABLES / tool, name) == expected(name)


def published(name: str = "pope") -> pa.Table:
    return pa.Table.from_pylist(ROWS[name], get_benchmark(name).schema)


def viewed(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string(kind):
        return pa.string_view()
    if pa.types.is_list(kind):
        return pa.list_(viewed(kind.value_type))
    return kind


def cast(table: pa.Table, change: Callable[[pa.DataType], pa.DataType]) -> pa.Table:
    return table.cast(pa.schema([field.with_type(change(field.type)) for field in table.schema]))


def encoded(table: pa.Table) -> pa.Table:
    for number, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            table = table.set_column(number, field.name, table[field.name].dictionary_encode())
    return table


def pictures(table: pa.Table, **further: pa.Array) -> pa.Table:
    """The image column as a struct of its bytes and ``further`` fields; as bytes alone without any."""
    content = table["image"].combine_chunks().field("bytes")
    held = pa.StructArray.from_arrays([content, *further.values()], ["bytes", *further]) if further else content
    return table.set_column(table.column_names.index("image"), "image", held)


SHAPES: dict[str, Callable[[pa.Table], pa.Table]] = {
    "images as bytes": pictures,
    "images as views of bytes": lambda table: pictures(table).cast(
        pa.schema(
            [
                pa.field(one.name, pa.binary_view() if one.name == "image" else one.type)
                for one in pictures(table).schema
            ]
        )
    ),
    "images without a path": lambda table: pictures(table, sha256=pa.nulls(len(table), pa.string())),
    "images with more than a path": lambda table: pictures(
        table, width=pa.array(range(len(table))), path=pa.array(["a.png"] * len(table))
    ),
    "large": lambda table: cast(table, large),
    "views": lambda table: cast(table, viewed),
    "dictionaries": encoded,
    "chunked": lambda table: pa.concat_tables([table.slice(number, 1) for number in range(len(table))]),
    "further columns in another order": lambda table: table.select(table.column_names[::-1]).append_column(
        "note", pa.nulls(len(table))
    ),
}


@pytest.mark.parametrize("name", list(ROWS))
@pytest.mark.parametrize("shape", list(SHAPES))
def test_shapes_of_arrow(shape, name, tmp_path):
    pq.write_table(SHAPES[shape](published(name)), tmp_path / f"{name}.parquet", row_group_size=2)
    assert read(tmp_path, name) == expected(name)


def test_a_column_that_stands_there_twice_is_named(tmp_path):
    pq.write_table(published().append_column("answer", published()["answer"]), tmp_path / "pope.parquet")
    with pytest.raises(SchemaError) as caught:
        read(tmp_path, "pope")
    assert str(caught.value) == (
        f"{tmp_path}/pope.parquet: column 'answer' of pope stands there twice; leave out one of the two"
    )


def test_a_table_without_a_question_is_refused_before_anything_is_written(tmp_path):
    pq.write_table(published().slice(0, 0), tmp_path / "pope.parquet")
    with pytest.raises(RecordError) as caught:
        write_examples({"pope": tmp_path}, "llava_v1", tmp_path / "out/e.parquet", tmp_path / "out/i.parquet")
    assert str(caught.value) == f"{tmp_path} (pope): no question of pope in it; fetch the table again"
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("ids", [["a", "a", "a#2"], ["a#2", "a", "a"]])
def test_ids_that_repeat_stay_apart_from_those_that_look_so(ids, tmp_path):
    table = published()
    for name, values in {"question_id": ids, "category": ["random"] * 3}.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, tmp_path / "pope.parquet")
    found = [one.example_id for one in read(tmp_path, "pope")]
    assert len(set(found)) == 3 and found[0] == f"pope:random/{ids[0]}"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("test-00000-of-00001.parquet", "test.parquet"),
        ("test-00000-of-00001-0123456789abcdef.parquet", "test-00000-of-00001-fedcba9876543210.parquet"),
    ],
)
def test_two_files_of_one_part_are_named(one, other, tmp_path):
    for name in (one, other):
        pq.write_table(published(), tmp_path / name)
    with pytest.raises(MissingTables) as caught:
        read(tmp_path, "pope/test")
    assert str(caught.value) == f"{tmp_path}: {one} and {other} both are part 0 of pope/test; keep one of them"


def test_whole_numbers_beside_a_missing_one_come_back_whole(tmp_path):
    table = published("textvqa")
    floats = pa.array([20.0, float("nan")])
    table = table.set_column(table.column_names.index("image_width"), "image_width", floats)
    pq.write_table(table, tmp_path / "textvqa.parquet")
    assert read(tmp_path, "textvqa") == expected("textvqa")
    halves = table.set_column(table.column_names.index("question_id"), "question_id", pa.array([1.0, 2.5]))
    pq.write_table(halves, tmp_path / "textvqa.parquet")
    with pytest.raises(RecordError) as caught:
        read(tmp_path, "textvqa")
    assert str(caught.value) == (
        f"{tmp_path}/textvqa.parquet: row 1: column 'question_id' should be a whole number, found 2.5; mend or drop the row"
    )


def spark(table: pa.Table, folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in range(len(table)):
        pq.write_table(table.slice(number, 1), folder / f"part-{number:05}-6c1f-c000.snappy.parquet")
    (folder / "_SUCCESS").touch()
    (folder / ".part-00000-6c1f-c000.snappy.parquet.crc").write_bytes(b"crc")


def test_a_folder_of_parts_is_a_table(tmp_path):
    spark(published(), tmp_path / "pope.parquet")
    assert read(tmp_path, "pope") == expected("pope")
    spark(published(), tmp_path / "data" / "val.parquet")
    assert len(read(tmp_path, "pope/val")) == 3
    (tmp_path / "data/empty.parquet").mkdir()
    with pytest.raises(
        MissingTables, match=r"empty.parquet: a folder without parts; it should hold the published table"
    ):
        read(tmp_path, "pope/empty")


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a Delta table": (
        lambda folder: (folder / "_delta_log").mkdir(),
        ": a Delta table, of whose files only its own library",
    ),
    "a Hudi table": (
        lambda folder: (folder / ".hoodie").mkdir(),
        ": a Hudi table, of whose files only its own library knows",
    ),
    "an Iceberg table": (
        lambda folder: (folder / "metadata").mkdir() or (folder / "metadata/v1.metadata.json").touch(),
        ": an Iceberg table, of whose files only its own library knows which count; write the table of pope as Parquet with",
    ),
    "a job that died": (
        lambda folder: (folder / "_temporary").mkdir(),
        ": _temporary in it shows that it was not written to its end; write it again",
    ),
    "a pipe": (
        lambda folder: os.mkfifo(folder / "part-9.parquet"),
        "/part-9.parquet: no file but a folder, a pipe or a device; put the table's file there",
    ),
    "a part that is no table": (
        lambda folder: (folder / "part-9.parquet").write_text("id,question\n1,a\n"),
        "/part-9.parquet: no whole Parquet file (Parquet magic bytes not found in footer.",
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_more_than_parts_is_told(kind, tmp_path):
    add, message = FOLDERS[kind]
    spark(published(), tmp_path / "pope.parquet")
    (tmp_path / "pope.parquet/.ipynb_checkpoints").mkdir()  # an editor's copies are no parts
    pq.write_table(published(), tmp_path / "pope.parquet/.ipynb_checkpoints/part-0.parquet")
    assert read(tmp_path, "pope") == expected("pope")
    add(tmp_path / "pope.parquet")
    with pytest.raises((MissingTables, UnreadableTable)) as caught:
        read(tmp_path, "pope")
    assert str(caught.value).startswith(f"{tmp_path}/pope.parquet{message}") and "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pope.parquet")
    with pytest.raises(UnreadableTable, match=r"pope.parquet: no file but a folder, a pipe or a device; put the table"):
        read(tmp_path, "pope")


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_numbers_without_end_are_no_whole_numbers(value, tmp_path):
    table = published("textvqa")
    held = pa.array([1.0, value])
    pq.write_table(
        table.set_column(table.column_names.index("question_id"), "question_id", held), tmp_path / "textvqa.parquet"
    )
    with pytest.raises(RecordError) as caught:
        read(tmp_path, "textvqa")
    assert str(caught.value) == (
        f"{tmp_path}/textvqa.parquet: row 1: column 'question_id' should be a whole number, found {value}; mend or drop the row"
    )


def test_a_column_that_folders_name_is_one(tmp_path):
    table = published()
    for row, category in enumerate(table["category"].to_pylist()):
        folder = tmp_path / "pope.parquet" / f"category={category}"
        folder.mkdir(parents=True)
        pq.write_table(table.slice(row, 1).drop_columns("category"), folder / "part-0.parquet")
    by_id = sorted(expected("pope"), key=lambda one: one.example_id)
    assert sorted(read(tmp_path, "pope"), key=lambda one: one.example_id) == by_id


def test_links_to_files_and_folders_are_followed_and_digested(tmp_path):
    far, near = tmp_path / "far", tmp_path / "near"
    far.mkdir()
    near.mkdir()
    pq.write_table(published(), far / "val.parquet")
    (near / "data").symlink_to(far)
    (far / "round").symlink_to(near)  # a circle
    assert len(read(near, "pope/val")) == 3
    memo = DigestMemo(tmp_path / "memo.json")
    before = memo.of(near)
    pq.write_table(published().slice(1), far / "val.parquet")
    assert memo.of(near) != before
    (near / "pope.parquet").symlink_to(tmp_path / "gone.parquet")
    with pytest.raises(MissingTables) as caught:
        read(near, "pope")
    assert str(caught.value) == (
        f"{near}/pope.parquet: a link to {tmp_path}/gone.parquet, which is not there; it should hold the published table "
        "of pope"
    )


def test_gqa_takes_its_two_tables_in_any_shape(tmp_path):
    questions = pa.table({"id": ["1", "2"], "imageId": ["b", "a"], "question": ["q?"] * 2, "answer": ["yes"] * 2})
    pictures = [
        {"id": name, "image": {"bytes": ROWS["pope"][at]["image"]["bytes"], "path": None}}
        for at, name in enumerate("ab")
    ]
    images = pa.Table.from_pylist(pictures)  # the path is of type null
    spark(encoded(questions), tmp_path / "gqa_instructions.parquet")
    pq.write_table(cast(images, large), tmp_path / "gqa_images.parquet")
    assert [one.image for one in read(tmp_path, "gqa")] == [row["image"]["bytes"] for row in pictures[::-1]]


def test_few_rows_are_read_at_once_where_images_are_large(tmp_path, monkeypatch):
    """More than 2 GB of a row group are no single array of Arrow: what is read at once follows from its size."""
    heavy = [
        {**row, "id": str(number), "image": {"bytes": row["image"]["bytes"] + os.urandom(100_000), "path": None}}
        for number, row in enumerate(ROWS["pope"] * 20)
    ]
    pq.write_table(pa.Table.from_pylist(heavy, get_benchmark("pope").schema), tmp_path / "pope.parquet")
    taken, iterate = [], pq.ParquetFile.iter_batches

    def watched(self, batch_size, **options):
        taken.append(batch_size)
        return iterate(self, batch_size, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    assert len(read(tmp_path, "pope")) == 60
    monkeypatch.setattr("nuwa.benchmarks.rows.BYTES_AT_ONCE", 450_000)
    assert len(read(tmp_path, "pope")) == 60
    assert taken == [32, 4]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def middle(content: bytes) -> bytes:
    """Bytes of the first page header turned over."""
    return content[:4] + bytes(byte ^ 255 for byte in content[4:40]) + content[40:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: LFS, "pope.parquet: a git-lfs pointer of 63 bytes, not the file; `git lfs pull` fetches it"),
        (lambda content: b"", "pope.parquet: an empty file; fetch it again"),
        (lambda content: content[: len(content) // 2], "pope.parquet: no whole Parquet file ("),
        (lambda content: content[2:], "pope.parquet: no whole Parquet file ("),
        (middle, "pope.parquet: no whole Parquet file ("),
        (lambda content: b"id,question\n1,what?\n", "pope.parquet: no whole Parquet file ("),
    ],
    ids=["pointer", "empty", "cut", "shifted", "page", "csv"],
)
def test_a_damaged_file_is_one_line(damage, message, tmp_path):
    pq.write_table(published(), tmp_path / "pope.parquet")
    content = (tmp_path / "pope.parquet").read_bytes()
    (tmp_path / "pope.parquet").write_bytes(damage(content))
    with pytest.raises(UnreadableTable) as caught:
        read(tmp_path, "pope")
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/{message}") and "\n" not in said and "fetch" in said


def mme(*rows: tuple[str, str]) -> pa.Table:
    picture = ROWS["pope"][0]["image"]
    held = [
        {"question_id": pair, "image": picture, "question": "q?", "answer": answer, "category": "count"}
        for pair, answer in rows
    ]
    return pa.Table.from_pylist(held, get_benchmark("mme").schema)


def test_half_a_pair_is_told_before_anything_is_written(tmp_path):
    pq.write_table(mme(("a", "yes"), ("a", "no"), ("b", "yes")), tmp_path / "mme.parquet")
    with pytest.raises(RecordError) as caught:
        write_examples({"mme": tmp_path}, "llava_v1", tmp_path / "out/e.parquet", tmp_path / "out/i.parquet")
    assert str(caught.value) == (
        f"{tmp_path}/mme.parquet: row 2 of mme: mme scores 2 questions an image together, and 'count/b' has 1; mend or "
        "drop its rows, or fetch the file again"
    )
    assert os.listdir(tmp_path / "out") == []
    pq.write_table(mme(("a", "yes"), ("b", "no"), ("b", "yes"), ("a", "no")), tmp_path / "mme.parquet")
    assert len(read(tmp_path, "mme")) == 4


def test_a_picture_that_cannot_be_opened_is_named_by_file_row_and_column(tmp_path):
    rows = [dict(row) for row in ROWS["pope"]]
    rows[1] = {**rows[1], "image": {"bytes": b"not a picture at all, no", "path": None}}
    (tmp_path / "data").mkdir()
    schema = get_benchmark("pope").schema
    pq.write_table(pa.Table.from_pylist(rows[:1], schema), tmp_path / "data/test-00000-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(rows[1:], schema), tmp_path / "data/test-00001-of-00002.parquet")
    with pytest.raises(RecordError) as caught:
        read(tmp_path, "pope/test")
    assert str(caught.value) == (
        f"{tmp_path}/data/test-00001-of-00002.parquet: row 0 of pope: column 'image': its 24 image bytes cannot be opened "
        "(UnidentifiedImageError); mend or drop the row, or fetch the file again"
    )


def test_a_later_file_of_other_columns_is_named(tmp_path):
    pq.write_table(published(), tmp_path / "test-00000-of-00002.parquet")
    pq.write_table(published().drop_columns("answer"), tmp_path / "test-00001-of-00002.parquet")
    with pytest.raises(
        SchemaError, match=r"test-00001-of-00002.parquet: column 'answer' of pope should be string, found"
    ):
        read(tmp_path, "pope/test")


def test_rows_of_a_table_of_files_are_counted_in_each(tmp_path):
    pq.write_table(published(), tmp_path / "a.parquet")
    pq.write_table(published(), tmp_path / "b.parquet")
    table = ParquetFiles([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    places = [(Path(row.place).name, row.number) for row in table.rows(get_benchmark("pope").schema)]
    assert places == [("a.parquet", 0), ("a.parquet", 1), ("a.parquet", 2), *(("b.parquet", n) for n in range(3))]
    assert table.count_rows() == 6


GOOD = '{"image": "a.png", "question": "what time?", "answers": ["10:45"]}'
LINES = {
    "no JSON": (
        "{",
        "line 2: no JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1); mend or",
    ),
    "no object": ("[1]", "line 2: no object; mend or drop it"),
    "no text": (
        "\xff",
        "line 2: no JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte; mend or",
    ),
    "half a pair": (
        GOOD.replace("what", "\\ud800"),
        "line 2: no JSON: 'utf-8' codec can't encode character '\\ud800' in",
    ),
    "nested": ("[" * 100_000, "line 2: no JSON: maximum recursion depth exceeded"),
    "a number": (
        GOOD.replace('"10:45"', "10"),
        "row 1: column 'answers' should be list<string>, found [10]; mend or drop",
    ),
    "no list": (
        GOOD.replace('["10:45"]', '"10:45"'),
        "row 1: column 'answers' should be list<string>, found \"10:45\"; men",
    ),
    "no name": (GOOD.replace('"a.png"', "7"), "row 1: column 'image' should be string, found 7; mend or drop the row"),
    "no file": (GOOD.replace("a.png", "b.png"), "row 1: column 'image' names 'b.png', and "),
    "a file elsewhere": (
        GOOD.replace("a.png", "../a.png"),
        "row 1: column 'image' names '../a.png'; images must lie below the table's folder, as files or behind a link",
    ),
    "a file anywhere": (
        GOOD.replace("a.png", "/a.png"),
        "row 1: column 'image' names '/a.png'; images must lie below the table's folder, as files or behind a link",
    ),
    "no image": (
        GOOD.replace('"image"', '"picture"'),
        "row 1 of clocks: column 'image' holds no image; mend or drop the row",
    ),
    "no answer": (
        GOOD.replace('"10:45"', ""),
        "row 1 of clocks: column 'answers' is empty; mend or drop the row, or fetch",
    ),
}


@pytest.mark.parametrize("kind", LINES)
def test_a_line_of_a_table_of_ones_own_is_told(kind, tmp_path):
    line, message = LINES[kind]
    clocks, path = own_benchmark("clocks", "Clocks", "exact"), tmp_path / "clocks.jsonl"
    (tmp_path / "a.png").write_bytes(ROWS["pope"][0]["image"]["bytes"])
    path.write_bytes(f"{GOOD}\n{line}\n".encode("latin-1"))
    with pytest.raises(RecordError) as caught:
        list(clocks.examples(JsonLines(path), str(path), whole=True))
    assert str(caught.value).startswith(f"{path}: {message}") and "\n" not in str(caught.value)
    path.write_text(f"\n{GOOD}\n")
    assert [one.truth for one in clocks.examples(JsonLines(path), "", whole=True)] == [{"answers": ["10:45"]}]


def test_a_first_line_of_no_one_type_is_told(tmp_path):
    path = tmp_path / "clocks.jsonl"
    path.write_text(GOOD.replace('["10:45"]', '["10:45", 3]'))
    with pytest.raises(SchemaError, match=r"clocks.jsonl: line 1: 'answers' is of no one type \(.*\); mend it"):
        list(own_benchmark("clocks", "Clocks", "exact").examples(JsonLines(path), "", whole=True))


def test_of_lines_the_first_and_the_last_image_are_read_for_a_plan(tmp_path):
    path, clocks = tmp_path / "clocks.jsonl", own_benchmark("clocks", "Clocks", "exact")
    for name in "ac":
        (tmp_path / f"{name}.png").write_bytes(ROWS["pope"][0]["image"]["bytes"])
    path.write_text("\n".join(GOOD.replace("a.png", f"{name}.png") for name in "abc"))  # there is no b.png
    assert [row.number for row in JsonLines(path).ends(clocks.schema)] == [0, 2]
    path.write_text(GOOD)
    assert [row.number for row in JsonLines(path).ends(clocks.schema)] == [0]
