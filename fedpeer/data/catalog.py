"""The datasets this peer offers by name: where they lie, and what their columns are.

Rules
* A dataset is read when it is added, and refused then if anything in it is wrong: the message names the file, the row
  (in CSV the line, the header being line 1) and the column, and never repeats a value.
* What each column holds (number, text, boolean) is found once, when it is added, and holds from then on: a source
  that says otherwise later is refused, not read differently.
* Ids are text, present in every row, and each occurs once. Numbers are float64 and finite; a missing value is null.
* A job never sees the source. It gets a snapshot: the content at one time, kept in the store under its digest, which
  is the dataset's version. Equal content is kept once.
* Reading happens in a thread. A dataset has to fit in memory when it is read.
"""

from __future__ import annotations

import difflib
import json
import re
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol
from urllib.parse import unquote, urlsplit

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedpeer import artifact
from fedpeer.data import csv, parquet
from fedpeer.data.columns import TEXT, TYPES, BadCell, refuse
from fedpeer.errors import DataError, NotFound, UsageError
from fedpeer.stage import Table
from fedpeer.store import Record, RunInThread, Schema, Store, Transaction, unrecorded

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class DatasetView(msgspec.Struct, kw_only=True):
    """What an operator sees of a dataset; the shape of the admin API's answer."""

    name: str
    uri: str
    id: str | None
    label: str | None
    rows: int
    columns: list[list[str]]
    """[name, kind] with kind number | text | boolean, in the owner's order"""


Views = list[DatasetView]


@dataclass(frozen=True)
class Snapshot:
    """The content of a dataset at one time: an Arrow IPC file in the store, named by its digest `version`."""

    version: bytes
    rows: int
    columns: list[list[str]]
    id: str | None
    label: str | None


class Catalog:
    """The datasets in this peer's store."""

    SCHEMAS: ClassVar[list[Schema]] = [
        Schema(
            "data",
            [
                """
                CREATE TABLE dataset (
                    name TEXT PRIMARY KEY,
                    uri TEXT NOT NULL,
                    id TEXT,
                    label TEXT,
                    rows INTEGER NOT NULL,
                    columns TEXT NOT NULL  -- JSON: [[name, kind], ...] in the source's order
                ) STRICT;
                """
            ],
        )
    ]

    def __init__(self, store: Store, run_in_thread: RunInThread) -> None:
        self._store = store
        self._run = run_in_thread

    async def add(
        self,
        name: str,
        uri: str,
        id: str | None,  # noqa: A002 - the word people and the command line use
        label: str | None,
        *,
        text: Collection[str] = (),
        record: Record = unrecorded,
    ) -> DatasetView:
        """Offer the source at `uri` by this name, after reading it once. Columns named in `text` are read as text.

        `uri` is an absolute path or file:///…, ending in .csv or .parquet. Raises UsageError for a name that is taken
        or ill-formed, DataError for bad data.
        """
        if not NAME.fullmatch(name):
            raise UsageError(f"{name!r} cannot name a dataset", hint="letters, digits, dot, - and _; at most 64")
        if await self._store.read(lambda tx: _find(tx, name)) is not None:
            raise _taken(name)
        table = await self._run(lambda: read(uri, id, label, text=text))
        view = DatasetView(name=name, uri=uri, id=id, label=label, rows=table.n_samples, columns=_columns(table))

        def insert(tx: Transaction) -> None:
            if _find(tx, name) is not None:
                raise _taken(name)
            row = (view.name, view.uri, view.id, view.label, view.rows, json.dumps(view.columns))
            tx.execute("INSERT INTO dataset VALUES (?, ?, ?, ?, ?, ?)", row)
            record(tx, {"dataset": name, "rows": view.rows, "columns": len(view.columns), "id": id, "label": label})

        await self._store.write(insert)
        return view

    async def list(self) -> Views:
        """All datasets by name."""
        return [_view(row) for row in await self._store.read(lambda tx: tx.all("SELECT * FROM dataset ORDER BY name"))]

    async def get(self, name: str) -> DatasetView:
        """One dataset. Raises NotFound, with the nearest name."""
        return await self._store.read(lambda tx: _get(tx, name))

    async def remove(self, name: str, *, record: Record = unrecorded) -> None:
        """Offer it no longer; the source and snapshots that jobs hold stay. Raises NotFound."""

        def delete(tx: Transaction) -> None:
            _get(tx, name)
            tx.execute("DELETE FROM dataset WHERE name = ?", (name,))
            record(tx, {"dataset": name})

        await self._store.write(delete)

    async def snapshot(self, name: str) -> Snapshot:
        """Read the source again and keep its content. Raises NotFound, DataError if it is not as it was declared."""
        view = await self.get(name)
        kinds = dict(view.columns)

        def work() -> tuple[bytes, int]:
            table = read(view.uri, view.id, view.label, kinds=kinds)
            return artifact.dump(table)[1], table.n_samples

        data, rows = await self._run(work)
        version = await self._store.put_file(data)
        return Snapshot(version, rows, view.columns, view.id, view.label)


class _Format(Protocol):
    """What a module of a file format offers."""

    def read(self, path: Path) -> pa.Table: ...

    def kind(self, column: pa.ChunkedArray) -> str: ...

    def convert(self, column: pa.ChunkedArray, kind: str) -> pa.ChunkedArray: ...

    def row(self, path: Path, index: int) -> int: ...


FORMATS: Mapping[str, _Format] = {".csv": csv, ".parquet": parquet}


def read(
    uri: str,
    id: str | None,  # noqa: A002
    label: str | None,
    *,
    text: Collection[str] = (),
    kinds: Mapping[str, str] | None = None,
) -> Table:
    """The whole source as a table of float64, string and bool columns; blocks.

    `kinds` (column → kind) is what was found before, and must hold; without it the kinds are found now, with the
    columns of `text` and the ids as text. Raises DataError.
    """
    path, format_ = locate(uri)
    try:
        raw = format_.read(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", hint="the daemon must be able to read it") from None
    if raw.num_rows == 0:
        raise DataError(f"{path} has a header and no rows")
    names = raw.column_names
    if kinds is not None and names != list(kinds):
        changed = ", ".join(sorted(set(names) ^ set(kinds))) or "their order"
        raise DataError(
            f"{path}: the columns are not those it was added with ({changed})",
            hint="fedpeer dataset remove, then add it again",
        )
    for what, name in (("id", id), ("label", label), *(("text", name) for name in text)):
        if name is not None and name not in names:
            raise DataError(f"{path} has no column {name!r} ({what})", hint=nearest(name, names))
    if id is not None and id == label:
        raise DataError(f"{path}: the column {id!r} cannot be both id and label")

    if kinds is None:
        kinds = {name: TEXT if name == id or name in text else format_.kind(raw.column(name)) for name in names}
    columns: dict[str, pa.ChunkedArray] = {}
    for name, column in zip(names, raw.columns, strict=True):
        kind = kinds[name]
        try:
            columns[name] = format_.convert(column, kind)
            if name == id:
                _check_ids(columns[name])
        except BadCell as bad:
            where = f"{path}: row {format_.row(path, bad.index)}, column {name!r}"
            if bad.same_as is not None:
                bad.reason += f" as in row {format_.row(path, bad.same_as)}"
            hint = (
                f"mend it (an empty cell is a missing value), or add the dataset with --text {name}"
                if kind != TEXT
                else ""
            )
            raise DataError(f"{where}: {bad.reason}", hint=hint) from None
    return Table(pa.table(columns), id, label)


def locate(uri: str) -> tuple[Path, _Format]:
    """The file that a URI names, and how to read it. Raises DataError."""
    parts = urlsplit(uri)
    if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost"):
        raise DataError(f"{uri!r}: only files can be read", hint="an absolute path, or file:///…")
    path = Path(unquote(parts.path) if parts.scheme else uri)
    if not path.is_absolute():
        raise DataError(f"{uri!r} is not an absolute path", hint="the daemon runs in a folder of its own")
    format_ = FORMATS.get(path.suffix.lower())
    if format_ is None:
        raise DataError(f"{path} ends in none of {', '.join(FORMATS)}", hint="rename or convert it")
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", hint="the daemon must be able to read it") from None
    if not stat.S_ISREG(mode):
        raise DataError(f"{path} is not a file")
    return path, format_


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint that names the most similar of `names`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def _check_ids(column: pa.ChunkedArray) -> None:
    """Every row has an id, and no other row has it."""
    refuse(pc.is_null(column), "a row without id")
    encoded = column.combine_chunks().dictionary_encode()
    if len(encoded.dictionary) < len(column):
        codes = encoded.indices.to_numpy()
        _, first = np.unique(codes, return_index=True)
        again = np.setdiff1d(np.arange(len(codes)), first, assume_unique=True)[0]
        raise BadCell(int(again), "the same id", same_as=int(first[codes[again]]))


def _columns(table: Table) -> list[list[str]]:
    kind_of = {held: kind for kind, held in TYPES.items()}
    return [[field.name, kind_of[field.type]] for field in table.data.schema]


def _find(tx: Transaction, name: str) -> tuple[Any, ...] | None:
    found: tuple[Any, ...] | None = tx.one("SELECT * FROM dataset WHERE name = ?", (name,))
    return found


def _get(tx: Transaction, name: str) -> DatasetView:
    row = _find(tx, name)
    if row is None:
        names = [other for (other,) in tx.all("SELECT name FROM dataset")]
        raise NotFound(f"there is no dataset {name!r} here", hint=nearest(name, names) or "fedpeer dataset list")
    return _view(row)


def _view(row: tuple[Any, ...]) -> DatasetView:
    name, uri, id_, label, rows, columns = row
    return DatasetView(name=name, uri=uri, id=id_, label=label, rows=rows, columns=json.loads(columns))


def _taken(name: str) -> UsageError:
    return UsageError(f"there is a dataset {name!r} already", hint=f"fedpeer dataset remove {name}")
