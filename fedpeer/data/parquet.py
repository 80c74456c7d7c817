"""Parquet: the file says what its columns hold, nothing is guessed.

Rules
* Integers, floats and decimals are numbers, rounded to float64 if need be; text, dates and times are text; booleans
  are booleans. Columns of other types (nested, binary) are refused by name. Rows are counted from 1.
* It is read in batches, and in pieces of pages: neither a file nor one of its row groups has to fit in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as arrow

from fedpeer.data import files
from fedpeer.data.columns import check_names, converted, kind_of, typed
from fedpeer.errors import DataError

BUFFER_BYTES = 1 << 20


class Source:
    """An open Parquet file; source.py says what a Source offers. Raises DataError, OSError."""

    def __init__(self, path: Path) -> None:
        self.place = str(path)
        self._path = path
        with self._whole():
            self._file = arrow.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES)
        self._schema = self._file.schema_arrow
        self.names: list[str] = self._schema.names
        check_names(self.place, self.names)
        for field in self._schema:
            if kind_of(field.type) is None:
                raise DataError(
                    f"{path}: the column {field.name!r} holds {field.type}; fedpeer knows numbers, text and booleans",
                    hint="convert the column, or leave it out",
                )

    def kinds(self) -> dict[str, str]:
        return {field.name: kind_of(field.type) or "" for field in self._schema}

    def batches(self, kinds: Mapping[str, str], size: int) -> Iterator[pa.RecordBatch]:
        return converted(self._raw(list(kinds), size), kinds, typed)

    def row(self, index: int) -> int:
        return index + 1

    def fingerprint(self) -> str:
        return files.fingerprint(self._path)

    def close(self) -> None:
        self._file.close()

    def _raw(self, names: list[str], size: int) -> Iterator[pa.RecordBatch]:
        with self._whole():
            yield from self._file.iter_batches(size, columns=names)  # and columns below one of them, which nobody has

    @contextmanager
    def _whole(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise DataError(f"{self.place} is not a Parquet file, or is damaged") from None
