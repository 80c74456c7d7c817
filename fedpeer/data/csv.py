"""CSV as RFC 4180 has it: UTF-8 with or without a byte order mark, commas, a header, quotes around what needs them.

Rules
* Spaces around names and cells are dropped. An empty cell is a missing value; so are NA, N/A, null and NULL outside
  text columns. Empty lines are skipped.
* A column is of numbers (of truth values: true, false, in any case) when more than half of its cells are; the first
  cell that is not is then an error, not a reason to read the column as text. An empty column is of numbers.
* It is read in blocks of `BLOCK_BYTES`: once for its encoding, once for what its columns hold, once for the rows.
* pyarrow reads; when it refuses, or a quote is left open, the standard library's slower reader finds out where.
  Rows are named by their line in the file, the header being line 1.
"""

from __future__ import annotations

import codecs
import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow

from fedpeer.data import files
from fedpeer.data.columns import (
    BOOLEAN,
    MAX_CELL_BYTES,
    NUMBER,
    TEXT,
    check_names,
    converted,
    numbers,
    refuse,
    texts,
)
from fedpeer.errors import DataError

MISSING = pa.array(["NA", "N/A", "null", "NULL"])
NUMBER_CELL = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$|^[+-]?(?i:nan|inf|infinity)$"
BOOLEAN_CELL = r"^(?i:true|false)$"
BLOCK_BYTES = 1 << 20
"""pyarrow holds up to 32 blocks; a row has to fit in one"""
ROW_PER_HEADER = 16
"""a row may be so many times as long as the header, if that is more than a block's size"""


class Source:
    """An open CSV file; source.py says what a Source offers. Raises DataError, OSError."""

    def __init__(self, path: Path) -> None:
        self.place = str(path)
        self._path = path
        self._odd_quotes = _check_text(path)
        self._header = next(_records(path), (0, []))[1]
        if not self._header:
            raise DataError(f"{path} is empty: it has not even a header")
        self.names = [name.strip() for name in self._header]
        if len(self.names) == 1 and any(sign in self.names[0] for sign in ";\t|"):
            raise DataError(
                f"{path}: the header is one column, {self.names[0]!r}", hint="separate the columns by commas"
            )
        check_names(self.place, self.names)

    def kinds(self) -> dict[str, str]:
        """What the columns hold, by the majority of their cells."""
        cells, numbers, booleans = Counter[str](), Counter[str](), Counter[str]()
        for batch in self._raw(self.names):
            for name, cells_of in zip(self.names, batch.columns, strict=True):
                column = _trim(cells_of)
                there = pc.filter(column, pc.invert(_missing(column)))
                cells[name] += len(there)
                numbers[name] += _count(there, NUMBER_CELL)
                booleans[name] += _count(there, BOOLEAN_CELL)
        return {
            name: NUMBER
            if 2 * numbers[name] > cells[name] or cells[name] == 0
            else BOOLEAN
            if 2 * booleans[name] > cells[name]
            else TEXT
            for name in self.names
        }

    def batches(self, kinds: Mapping[str, str], size: int) -> Iterator[pa.RecordBatch]:
        return converted(self._raw(list(kinds)), kinds, _convert)

    def row(self, index: int) -> int:
        """The line of the file on which row `index` (from 0) begins."""
        for number, (begins, _) in enumerate(_records(self._path)):
            if number == index + 1:
                return begins
        raise IndexError(index)

    def fingerprint(self) -> str:
        return files.fingerprint(self._path)

    def close(self) -> None:
        """Nothing is open between two readings."""

    def _raw(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Cells as text. Raises DataError naming the row; OSError."""
        if self._odd_quotes:  # a quote left open swallows the rest of the file, and pyarrow does not mind
            self._inspect()
        size = max(BLOCK_BYTES, ROW_PER_HEADER * sum(len(name) + 1 for name in self._header))
        title = dict(zip(self.names, self._header, strict=True))
        try:
            with arrow.open_csv(
                self._path,
                read_options=arrow.ReadOptions(block_size=size, use_threads=False),
                parse_options=arrow.ParseOptions(newlines_in_values=True),
                convert_options=arrow.ConvertOptions(
                    include_columns=[title[name] for name in names],
                    column_types=dict.fromkeys(self._header, pa.string()),
                ),
            ) as reader:
                for batch in reader:
                    yield batch.rename_columns(list(names))
        except pa.ArrowException:
            self._inspect()
            raise DataError(f"{self.place} is not a CSV file, or has rows of more than {size} bytes") from None

    def _inspect(self) -> None:
        """Read slowly and raise DataError where the file is not CSV; nothing when it is."""
        width = 0
        for begins, record in _records(self._path):
            width = width or len(record)
            if len(record) != width:
                raise DataError(f"{self.place}: row {begins} has {len(record)} cells, the header has {width}")
            for name, cell in enumerate(record, start=1):
                if len(cell.encode()) > MAX_CELL_BYTES:
                    raise DataError(
                        f"{self.place}: row {begins}, column {name}: more than {MAX_CELL_BYTES // 1024} KiB"
                    )


def _check_text(path: Path) -> bool:
    """Refuse what is not UTF-8, naming the row; whether the number of quotes is odd."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    rows = quotes = 0
    with path.open("rb") as file:
        while True:
            data = file.read(BLOCK_BYTES)
            if not rows and not quotes and data.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError(f"{path} is UTF-16", hint="save it as UTF-8")
            try:
                decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                row = rows + error.object.count(b"\n", 0, error.start) + 1
                raise DataError(f"{path}: row {row} is not UTF-8", hint="save the file as UTF-8") from None
            if not data:
                return quotes % 2 == 1
            rows += data.count(b"\n")
            quotes += data.count(b'"')


def _convert(column: pa.Array, kind: str) -> pa.Array:
    """The cells as float64, string or bool; BadCell for the first one that is not."""
    column = _trim(column)
    if kind == TEXT:
        return texts(column)
    cells = pc.if_else(_missing(column), pa.scalar(None, pa.string()), column)
    if kind == NUMBER:
        refuse(pc.invert(pc.match_substring_regex(cells, NUMBER_CELL)), "not a number, in a column of numbers")
        return numbers(cells.cast(pa.float64()))
    refuse(pc.invert(pc.match_substring_regex(cells, BOOLEAN_CELL)), "neither true nor false, in a column of these")
    return pc.equal(pc.utf8_lower(cells), "true")


def _trim(column: pa.Array) -> pa.Array:
    """Without spaces around it; an empty cell is null."""
    trimmed = pc.utf8_trim_whitespace(column)
    return pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, pa.string()), trimmed)


def _missing(column: pa.Array) -> pa.Array:
    return pc.or_(pc.is_null(column), pc.is_in(column, value_set=MISSING))


def _count(cells: pa.Array, pattern: str) -> int:
    return int(pc.sum(pc.match_substring_regex(cells, pattern)).as_py() or 0)


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, cells) of each record that is not an empty line, the header first."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        while True:
            begins = reader.line_num + 1
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(f"{path}: row {begins}: {error}", hint="look for a quote that is left open") from None
            except UnicodeDecodeError:
                raise DataError(f"{path} changed while it was read", hint="try again") from None
            if record:
                yield begins, record
