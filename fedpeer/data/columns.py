"""What a column may hold: numbers (float64), text (string) or truth values (bool); a missing value is null.

A source (csv.py, parquet.py, postgresql.py, sql.py) turns what it holds into one of these kinds, or raises `BadCell`
with the place and the reason. A reason never repeats the cell: errors are shown and logged, data is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as types

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

    def __init__(self, index: int, reason: str, *, column: str = "", same_as: int | None = None) -> None:
        super().__init__(reason)
        self.index = index
        self.reason = reason
        self.column = column
        self.same_as = same_as


def converted(
    raw: Iterable[pa.RecordBatch], kinds: Mapping[str, str], convert: Callable[[pa.Array, str], pa.Array]
) -> Iterator[pa.RecordBatch]:
    """The columns of `kinds` (name → kind) of each batch, as `convert` makes them of the raw ones.

    A BadCell that it raises gets its column, and the rows before it are counted in.
    """
    rows = 0
    for batch in raw:
        columns = []
        for name, kind in kinds.items():
            try:
                columns.append(convert(batch.column(name), kind))
            except BadCell as bad:
                bad.column, bad.index = name, bad.index + rows
                raise
        yield pa.record_batch(columns, names=list(kinds))
        rows += batch.num_rows


def refuse(wrong: pa.Array, reason: str) -> None:
    """Raise BadCell for the first row for which `wrong` (bool; null means no) is true."""
    index = pc.index(wrong, True).as_py()
    if index >= 0:
        raise BadCell(index, reason)


def numbers(column: pa.Array) -> pa.Array:
    """The float64 column itself, when every value in it is finite."""
    refuse(pc.is_nan(column), "NaN is not a number")
    refuse(pc.is_inf(column), "infinite, or too large for a 64-bit float")
    return column


def texts(column: pa.Array) -> pa.Array:
    """The string column itself, when no cell is too large."""
    refuse(pc.greater(pc.binary_length(column), MAX_CELL_BYTES), f"more than {MAX_CELL_BYTES // 1024} KiB in one cell")
    return column


# columns that have a type already


def kind_of(held: pa.DataType) -> str | None:
    """Integers, floats and decimals are numbers; text, dates and times are text; of others nothing is known."""
    if types.is_dictionary(held):
        held = held.value_type
    if types.is_integer(held) or types.is_floating(held) or types.is_decimal(held) or types.is_null(held):
        return NUMBER
    if types.is_boolean(held):
        return BOOLEAN
    if types.is_string(held) or types.is_large_string(held) or types.is_string_view(held) or types.is_temporal(held):
        return TEXT
    return None


def typed(column: pa.Array, kind: str) -> pa.Array:
    """A column of a known type as float64, string or bool; BadCell for the first value that cannot be."""
    if kind == TEXT:
        if types.is_floating(column.type):  # integers with gaps are floats in pandas: 17, not 17.0
            whole = pc.equal(pc.floor(column), column)
            refuse(pc.invert(whole), "numbers with fractions where text is wanted")
            refuse(pc.greater_equal(pc.abs(column), 2.0**63), "a number that is too large to be text")
            column = column.cast(pa.int64(), safe=False)
        return texts(column.cast(pa.string()))
    if kind_of(column.type) != kind:
        raise changed(str(column.type), kind)
    return column.cast(pa.bool_()) if kind == BOOLEAN else numbers(column.cast(pa.float64(), safe=False))


def changed(held: str, kind: str) -> BadCell:
    """The refusal of a column that holds something else now."""
    return BadCell(0, f"the column is of {held} now, and was a {kind} when the dataset was added")
