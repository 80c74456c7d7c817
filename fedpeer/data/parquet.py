"""Parquet: the file says what its columns hold, nothing is guessed.

Integers, floats and decimals are numbers, rounded to float64 if need be; text, dates and times are text; booleans
are booleans. Columns of other types (nested, binary) are refused by name. Rows are counted from 1.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as arrow
import pyarrow.types as types

from fedpeer.data.columns import BOOLEAN, NUMBER, TEXT, BadCell, check_names, numbers, texts
from fedpeer.errors import DataError


def read(path: Path) -> pa.Table:
    """The file's columns as they are; DataError when it is not a Parquet file or holds a column of another type."""
    try:
        with arrow.ParquetFile(path) as file:
            check_names(str(path), file.schema_arrow.names)
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"{path} is not a Parquet file, or is damaged") from None
    for name, column in zip(table.column_names, table.columns, strict=True):
        if _kind(column.type) is None:
            raise DataError(
                f"{path}: the column {name!r} holds {column.type}; fedpeer knows numbers, text and booleans",
                hint="convert the column, or leave it out",
            )
    return table


def kind(column: pa.ChunkedArray) -> str:
    """What a column holds, by its type."""
    found = _kind(column.type)
    assert found is not None
    return found


def convert(column: pa.ChunkedArray, kind: str) -> pa.ChunkedArray:
    """The column as float64, string or bool; BadCell for the first value that cannot be."""
    if kind == TEXT:
        if types.is_floating(column.type):  # integers with gaps are floats in pandas: 17, not 17.0
            try:
                column = column.cast(pa.int64())
            except pa.ArrowInvalid:
                raise BadCell(0, "numbers with fractions where text is wanted") from None
        return texts(column.cast(pa.string()))
    if _kind(column.type) != kind:
        raise BadCell(0, f"the column is of {column.type} now, and was a {kind} when the dataset was added")
    return column if kind == BOOLEAN else numbers(column.cast(pa.float64(), safe=False))


def row(path: Path, index: int) -> int:
    """The number of row `index` (from 0) for people."""
    return index + 1


def _kind(held: pa.DataType) -> str | None:
    if types.is_dictionary(held):
        held = held.value_type
    if types.is_integer(held) or types.is_floating(held) or types.is_decimal(held) or types.is_null(held):
        return NUMBER
    if types.is_boolean(held):
        return BOOLEAN
    if types.is_string(held) or types.is_large_string(held) or types.is_string_view(held) or types.is_temporal(held):
        return TEXT
    return None
