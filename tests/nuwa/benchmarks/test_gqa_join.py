"""GQA's two published tables become the one that ``examples`` takes."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nuwa.benchmarks import RecordError, SchemaError, get_benchmark
from nuwa.benchmarks.gqa import join_images

STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def instructions(*image_ids: str) -> pa.Table:
    rows = [
        {"id": str(number), "imageId": image, "question": f"question {number}?", "answer": "yes", "isBalanced": True}
        for number, image in enumerate(image_ids)
    ]
    return pa.Table.from_pylist(rows)


def images(*ids: str) -> pa.Table:
    rows = [{"id": one, "image": {"bytes": one.encode(), "path": None}} for one in ids]
    return pa.Table.from_pylist(rows, schema=pa.schema({"id": pa.string(), "image": STRUCT}))


def shown(table: pa.Table) -> list[tuple[str, bytes]]:
    return [(one.example_id, one.image) for one in get_benchmark("gqa").examples(table)]


def test_every_question_gets_its_image_in_order():
    joined = join_images(instructions("b", "a", "b"), images("a", "b", "unused"))
    assert shown(joined) == [("gqa:0", b"b"), ("gqa:1", b"a"), ("gqa:2", b"b")]


def test_chunked_and_large_tables_from_files(tmp_path):
    for name, table in (("instructions", instructions("b", "a", "b")), ("images", images("a", "b"))):
        pq.write_table(table, tmp_path / name, row_group_size=1)
    parts = [pq.read_table(tmp_path / name) for name in ("instructions", "images")]
    chunked = join_images(pa.concat_tables([parts[0], parts[0]]), parts[1])
    assert [image for _, image in shown(chunked)] == [b"b", b"a", b"b"] * 2
    wide = parts[1].cast(
        pa.schema(
            {"id": pa.large_string(), "image": pa.struct({"bytes": pa.large_binary(), "path": pa.large_string()})}
        )
    )
    assert shown(join_images(parts[0], wide)) == shown(join_images(*parts))


def test_images_are_referred_to_and_not_copied():
    heavy = pa.Table.from_pylist([{"id": "a", "image": {"bytes": bytes(100_000), "path": None}}], images("a").schema)
    assert join_images(instructions(*"a" * 50), heavy).nbytes < 200_000


def test_lost_and_repeated_images_are_refused():
    message = r"^gqa instructions: 2 of 3 have no image, first imageId 'c'; give all images files of the same split$"
    with pytest.raises(RecordError, match=message):
        join_images(instructions("a", "c", "d"), images("a", "b"))
    with pytest.raises(RecordError, match=r"^gqa images: id 'b' occurs more than once; keep one row an image$"):
        join_images(instructions("a"), images("a", "b", "b"))


def test_wrong_tables_are_refused():
    with pytest.raises(
        SchemaError, match=r"^gqa instructions: column 'imageId' of gqa should be string, found missing"
    ):
        join_images(instructions("a").drop_columns("imageId"), images("a"))
    with pytest.raises(
        SchemaError, match=r"^gqa images: column 'image' of gqa should be struct{bytes: binary, path: s"
    ):
        join_images(instructions("a"), images("a").drop_columns("image"))
    with pytest.raises(SchemaError, match=r"^the table: column 'image' of gqa should be .*, found missing"):
        shown(instructions("a"))
