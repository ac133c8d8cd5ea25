"""Published Parquet tables: checking their schema and reading their rows.

An image column is a struct ``{bytes: binary, path: string}``, as the ``datasets`` library writes it; the encoded bytes alone,
with or without a struct around them, mean the same to it and here. Types are compared by kind (:func:`same_kind`), since
tools differ in how they write what means the same.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from nuwa import images
from nuwa.errors import UserError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXTS = pa.list_(pa.string())
STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
BINARIES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
LISTS = (
    *(pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
    *(pa.types.is_list_view, pa.types.is_large_list_view),
)
NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)


class SchemaError(UserError, ValueError):
    """A file's columns are not the published ones."""


class RecordError(UserError, ValueError):
    """A row of a file with the right columns cannot be a question."""


def columns(**types: pa.DataType) -> pa.Schema:
    """A schema of the named columns, in order."""
    return pa.schema(list(types.items()))


def same_kind(actual: pa.DataType, expected: pa.DataType) -> bool:
    """Whether values of type ``actual`` can mean what ``expected`` says.

    Strings, bytes and lists of every layout are alike, so are integers of every width and floats of every width;
    dictionary or run-end encoding does not count. A column or list without values has type ``null``. pandas writes whole
    numbers beside a missing one as floats, and many tools whole floats as integers: rows are checked where they are read.
    """
    if pa.types.is_dictionary(actual) or pa.types.is_run_end_encoded(actual):
        return same_kind(actual.value_type, expected)
    if pa.types.is_null(actual):
        return True

    if _is_any(expected, LISTS):
        return _is_any(actual, LISTS) and same_kind(actual.value_type, expected.value_type)
    if expected.equals(IMAGE):
        return is_image(actual)
    if pa.types.is_struct(expected):
        if not pa.types.is_struct(actual):
            return False
        held = {field.name: field.type for field in actual}
        return held.keys() == {field.name for field in expected} and all(
            same_kind(held[field.name], field.type) for field in expected
        )

    for kinds in (STRINGS, BINARIES, NUMBERS):
        if _is_any(expected, kinds):
            return _is_any(actual, kinds)
    return actual.equals(expected)


def is_image(actual: pa.DataType) -> bool:
    """Whether values of type ``actual`` hold encoded images: bytes, or a struct of them and whatever else."""
    if _is_any(actual, BINARIES):
        return True
    held = {field.name: field.type for field in actual} if pa.types.is_struct(actual) else {}
    path = held.get("path", pa.null())
    return "bytes" in held and same_kind(held["bytes"], pa.binary()) and same_kind(path, pa.string())


def _is_any(kind: pa.DataType, tests: tuple[Callable[[pa.DataType], bool], ...]) -> bool:
    return any(test(kind) for test in tests)


def type_name(kind: pa.DataType) -> str:
    """``kind`` in one spelling for all types that count as the same; struct fields in alphabetical order."""
    if pa.types.is_dictionary(kind):
        return type_name(kind.value_type)
    if _is_any(kind, STRINGS):
        return "string"
    if _is_any(kind, BINARIES):
        return "binary"
    if _is_any(kind, LISTS):
        return f"list<{type_name(kind.value_type)}>"
    if pa.types.is_struct(kind):
        fields = sorted((field.name, type_name(field.type)) for field in kind)
        return "struct{" + ", ".join(f"{name}: {inner}" for name, inner in fields) + "}"
    return str(kind)


def check_columns(actual: pa.Schema, expected: pa.Schema, benchmark: str, path: str) -> None:
    """Refuse a table without the ``expected`` columns; further columns are fine.

    Raises:
        SchemaError: names the file, the first wrong column, the expected and the found type.
    """
    for field in expected:
        if actual.names.count(field.name) > 1:
            raise SchemaError(
                f"{path}: column {field.name!r} of {benchmark} stands there twice; leave out one of the two"
            )
        held = actual.field(field.name).type if field.name in actual.names else None
        if held is None or not same_kind(held, field.type):
            found_name = "missing" if held is None else type_name(held)
            raise SchemaError(
                f"{path}: column {field.name!r} of {benchmark} should be {type_name(field.type)}, found {found_name}; "
                f"give the table as published, or name the benchmark this file belongs to"
            )


def text(row: dict[str, Any], column: str) -> str:
    """A text that must be there; ids of integer columns come as text too."""
    value = row[column]
    if value is None or not str(value).strip():
        raise RecordError(f"column {column!r} is empty")
    return str(value)


def optional_text(row: dict[str, Any], column: str) -> str:
    """A text or ``""``; several published tables write a missing text as ``nan``."""
    value = row[column]
    return "" if value is None or value.strip().lower() in ("", "nan") else value


def texts(row: dict[str, Any], column: str) -> list[str]:
    """A list with at least one entry and no empty one."""
    values = row[column]
    if not values:
        raise RecordError(f"column {column!r} is empty")
    for position, value in enumerate(values):
        if value is None or not value.strip():
            raise RecordError(f"column {column!r} has an empty entry at position {position}")
    return list(values)


def one_of(row: dict[str, Any], column: str, allowed: tuple[str, ...], lower: bool = False) -> str:
    """A text that must be one of ``allowed``."""
    value = text(row, column).strip()
    value = value.lower() if lower else value
    if value not in allowed:
        raise RecordError(f"column {column!r} is {value!r}, allowed are {', '.join(allowed)}")
    return value


def image_bytes(value: dict[str, Any] | None, column: str) -> bytes:
    """The encoded image of an image struct."""
    if value is None:
        raise RecordError(f"column {column!r} holds no image")
    if not value["bytes"]:
        hint = f" but only the path {value['path']!r}" if value["path"] else ""
        raise RecordError(f"column {column!r} holds no image bytes{hint}")
    return value["bytes"]


def content_id(image: bytes, *words: str) -> str:
    """An id for a row of a table without ids: sixteen hex digits of what is asked."""
    digest = hashlib.sha256(image)
    for word in words:
        digest.update(b"\0" + word.encode())
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=4)  # in most tables rows about one image stand together, and each holds it
def image_size(encoded: bytes, column: str | None = None) -> tuple[int, int]:
    """Width and height in pixels of the picture as people see it, from the header alone; ``column``: what it stands in.

    Raises:
        RecordError: the bytes are no image that :mod:`nuwa.images` reads.
    """
    try:
        return images.image_size(encoded)
    except images.ImageError as error:
        raise RecordError(f"column {column!r}: {error}" if column else str(error)) from None
