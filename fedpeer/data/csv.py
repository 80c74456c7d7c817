"""CSV as RFC 4180 has it: UTF-8 with or without a byte order mark, commas, a header, quotes around what needs them.

Rules
* Spaces around names and cells are dropped. An empty cell is a missing value; so are NA, N/A, null and NULL outside
  text columns. Empty lines are skipped.
* A column is of numbers (of truth values: true, false, in any case) when more than half of its cells are; the first
  cell that is not is then an error, not a reason to read the column as text. An empty column is of numbers.
* pyarrow reads; when it refuses, or a quote is left open, the standard library's slower reader finds out where.
  Rows are named by their line in the file, the header being line 1.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow

from fedpeer.data.columns import BOOLEAN, MAX_CELL_BYTES, NUMBER, TEXT, check_names, numbers, refuse, texts
from fedpeer.errors import DataError

MISSING = pa.array(["NA", "N/A", "null", "NULL"])
NUMBER_CELL = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$|^[+-]?(?i:nan|inf|infinity)$"
BOOLEAN_CELL = r"^(?i:true|false)$"
BLOCK_BYTES = 8 << 20


def read(path: Path) -> pa.Table:
    """All cells as text, trimmed, the empty ones null. Raises DataError naming the row; OSError."""
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16", hint="save it as UTF-8")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: row {row} is not UTF-8", hint="save the file as UTF-8") from None
    header = next(_records(path, data), (0, []))[1]
    if not header:
        raise DataError(f"{path} is empty: it has not even a header")
    names = [name.strip() for name in header]
    if len(names) == 1 and any(sign in names[0] for sign in ";\t|"):
        raise DataError(f"{path}: the header is one column, {names[0]!r}", hint="separate the columns by commas")
    check_names(str(path), names)
    try:
        table = arrow.read_csv(
            pa.BufferReader(data),
            read_options=arrow.ReadOptions(block_size=BLOCK_BYTES),
            parse_options=arrow.ParseOptions(newlines_in_values=True),
            convert_options=arrow.ConvertOptions(
                column_types=dict.fromkeys(header, pa.string()), null_values=[""], strings_can_be_null=True
            ),
        )
    except pa.ArrowInvalid:
        _inspect(path, data)
        raise DataError(f"{path} is not a CSV file") from None
    if data.count(b'"') % 2:  # a quote left open swallows the rest of the file, and pyarrow does not mind
        _inspect(path, data)
    return pa.Table.from_arrays([_trim(column) for column in table.columns], names=names)


def kind(column: pa.ChunkedArray) -> str:
    """What a column of cells holds, by the majority of its cells."""
    cells = pc.filter(column, pc.invert(_missing(column)))
    if 2 * _count(cells, NUMBER_CELL) > len(cells) or len(cells) == 0:
        return NUMBER
    return BOOLEAN if 2 * _count(cells, BOOLEAN_CELL) > len(cells) else TEXT


def convert(column: pa.ChunkedArray, kind: str) -> pa.ChunkedArray:
    """The cells as float64, string or bool; BadCell for the first one that is not."""
    if kind == TEXT:
        return texts(column)
    cells = pc.if_else(_missing(column), pa.scalar(None, pa.string()), column)
    if kind == NUMBER:
        refuse(pc.invert(pc.match_substring_regex(cells, NUMBER_CELL)), "not a number, in a column of numbers")
        return numbers(cells.cast(pa.float64()))
    refuse(pc.invert(pc.match_substring_regex(cells, BOOLEAN_CELL)), "neither true nor false, in a column of these")
    return pc.equal(pc.utf8_lower(cells), "true")


def row(path: Path, index: int) -> int:
    """The line of the file on which row `index` (from 0) begins."""
    for number, (begins, _) in enumerate(_records(path, path.read_bytes())):
        if number == index + 1:
            return begins
    raise IndexError(index)


def _trim(column: pa.ChunkedArray) -> pa.ChunkedArray:
    trimmed = pc.utf8_trim_whitespace(column)
    return pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, pa.string()), trimmed)


def _missing(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.or_(pc.is_null(column), pc.is_in(column, value_set=MISSING))


def _count(cells: pa.ChunkedArray, pattern: str) -> int:
    return int(pc.sum(pc.match_substring_regex(cells, pattern)).as_py() or 0)


def _records(path: Path, data: bytes) -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, cells) of each record that is not an empty line, the header first."""
    reader = csv.reader(io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline=""), strict=True)
    while True:
        begins = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}: row {begins}: {error}", hint="look for a quote that is left open") from None
        if record:
            yield begins, record


def _inspect(path: Path, data: bytes) -> None:
    """Read slowly and raise DataError where the file is not CSV; nothing when it is."""
    width = 0
    for begins, record in _records(path, data):
        width = width or len(record)
        if len(record) != width:
            raise DataError(f"{path}: row {begins} has {len(record)} cells, the header has {width}")
        for name, cell in enumerate(record, start=1):
            if len(cell.encode()) > MAX_CELL_BYTES:
                raise DataError(f"{path}: row {begins}, column {name}: more than {MAX_CELL_BYTES // 1024} KiB")
