"""Published Parquet tables: checking their schema and reading their rows.

An image column is a struct ``{bytes: binary, path: string}``, as the ``datasets`` library writes it. Types are compared
by kind: ``string`` and ``large_string`` count as the same, so do ``binary`` and ``large_binary``, every sort of list,
a dictionary-encoded column and a plain one.
"""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
from PIL import Image, UnidentifiedImageError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXTS = pa.list_(pa.string())


class SchemaError(ValueError):
    """A file's columns are not the published ones."""


class RecordError(ValueError):
    """A row of a file with the right columns cannot be a question."""


def columns(**types: pa.DataType) -> pa.Schema:
    """A schema of the named columns, in order."""
    return pa.schema(list(types.items()))


def type_name(kind: pa.DataType) -> str:
    """``kind`` in one spelling for all types that count as the same; struct fields in alphabetical order."""
    if pa.types.is_dictionary(kind):
        return type_name(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "string"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "binary"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return f"list<{type_name(kind.value_type)}>"
    if pa.types.is_struct(kind):
        fields = sorted((field.name, type_name(field.type)) for field in kind)
        return "struct{" + ", ".join(f"{name}: {inner}" for name, inner in fields) + "}"
    return str(kind)


def check_columns(found: pa.Schema, expected: pa.Schema, benchmark: str, path: str) -> None:
    """Refuse a table without the ``expected`` columns; further columns are fine.

    Raises:
        SchemaError: names the file, the first wrong column, the expected and the found type.
    """
    for field in expected:
        found_name = type_name(found.field(field.name).type) if field.name in found.names else "missing"
        if found_name != type_name(field.type):
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


def image_size(encoded: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header alone.

    Raises:
        RecordError: the bytes are no image that PIL knows.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return image.size
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RecordError(f"its {len(encoded)} image bytes cannot be opened ({type(error).__name__})") from None
