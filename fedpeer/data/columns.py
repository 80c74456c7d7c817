"""What a column may hold: numbers (float64), text (string) or truth values (bool); a missing value is null.

A reader (csv.py, parquet.py) turns what a file says into one of these kinds, or raises `BadCell` with the place and
the reason. A reason never repeats the cell: errors are shown and logged, data is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from fedpeer.errors import DataError

NUMBER, TEXT, BOOLEAN = "number", "text", "boolean"
TYPES = {NUMBER: pa.float64(), TEXT: pa.string(), BOOLEAN: pa.bool_()}
MAX_CELL_BYTES = 64 * 1024
MAX_NAME = 256


def check_names(source: str, names: Sequence[str]) -> None:
    """Refuse names that other peers could not use: they are shown to them and must say which column is meant."""
    for number, name in enumerate(names, start=1):
        if not name:
            raise DataError(f"{source}: column {number} has no name", hint="pandas writes one unless index=False")
        if len(name) > MAX_NAME or not name.isprintable():
            raise DataError(f"{source}: the name of column {number} is too long or holds control characters")
        if name in names[: number - 1]:
            raise DataError(f"{source}: two columns are named {name!r}")


class BadCell(Exception):
    """A cell that its column cannot hold: `index` counts the rows from 0; `same_as` is the other row of a pair."""

    def __init__(self, index: int, reason: str, *, same_as: int | None = None) -> None:
        super().__init__(reason)
        self.index = index
        self.reason = reason
        self.same_as = same_as


def refuse(wrong: pa.ChunkedArray, reason: str) -> None:
    """Raise BadCell for the first row for which `wrong` (bool; null means no) is true."""
    index = pc.index(wrong, True).as_py()
    if index >= 0:
        raise BadCell(index, reason)


def numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The float64 column itself, when every value in it is finite."""
    refuse(pc.is_nan(column), "NaN is not a number")
    refuse(pc.is_inf(column), "infinite, or too large for a 64-bit float")
    return column


def texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The string column itself, when no cell is too large."""
    refuse(pc.greater(pc.binary_length(column), MAX_CELL_BYTES), f"more than {MAX_CELL_BYTES // 1024} KiB in one cell")
    return column
