"""The datasets of this peer by name: where they lie, and what their columns are.

Rules
* A dataset is read when it is added, and refused then if anything in it is wrong: the message names the file, the row
  (in CSV the line, the header being line 1) and the column, and never repeats a value.
* What each column holds (number, text, boolean) is found once, when it is added, and holds from then on: a source
  that says otherwise later is refused, not read differently.
* Ids are text, present in every row, and each occurs once. Numbers are float64 and finite; a missing value is null.
* A job never sees the source. It gets a snapshot: the content at one time, kept in the store under its digest, which
  is the dataset's version. Equal content is kept once.
* Of a database's password only the name is kept; it is read when it is needed (secrets.py).
* Reading happens in a thread, batch by batch: a dataset does not have to fit in memory.
* Partners are told of a dataset if its owner said so, and then of its form only (offers.py). Jobs name any.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pyarrow as pa

from fedpeer import artifact
from fedpeer.crypto import Secret
from fedpeer.data import offers, secrets, source
from fedpeer.data.columns import TYPES
from fedpeer.data.source import nearest
from fedpeer.errors import DataError, KeyFileError, NotFound, UsageError
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
    secret: str | None = None
    """the name of the database's password; never itself"""
    offered: bool = False
    """whether partners who ask are told of it"""


Views = list[DatasetView]


@dataclass(frozen=True)
class Snapshot:
    """The content of a dataset at one time: an Arrow IPC file in the store, named by its digest `version`."""

    version: bytes
    rows: int
    columns: list[list[str]]
    id: str | None
    label: str | None
    source: str = ""
    """what it was read from, whatever the dataset is called (source.identity)"""


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
                """,
                """
                ALTER TABLE dataset ADD COLUMN secret TEXT;  -- its name
                ALTER TABLE dataset ADD COLUMN offered INTEGER NOT NULL DEFAULT 0;
                """,
            ],
        )
    ]

    def __init__(self, store: Store, run_in_thread: RunInThread, secrets: Path | None = None) -> None:
        """`secrets` is the folder of the passwords of databases; None: there are none."""
        self._store = store
        self._secrets = secrets
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
        secret: str | None = None,
        offered: bool = False,
    ) -> DatasetView:
        """Keep the source at `uri` under this name, after reading it once. Columns named in `text` are read as text.

        `uri` is an absolute path or file:///…, ending in .csv or .parquet, or that of a table or query in a database
        (source.py); `secret` names its password. `offered`: partners may be told of it. Raises UsageError for a name
        that is taken or ill-formed, KeyFileError for the secret, DataError for bad data.
        """
        if not NAME.fullmatch(name):
            raise UsageError(f"{name!r} cannot name a dataset", hint="letters, digits, dot, - and _; at most 64")
        if await self._store.read(lambda tx: _find(tx, name)) is not None:
            raise _taken(name)

        def look() -> tuple[dict[str, str], int]:
            with source.opened(uri, self._secret(secret), id=id) as opened:
                kinds = source.choose_kinds(opened, id, label, text)
                return kinds, sum(batch.num_rows for batch in source.rows(opened, kinds, id))

        kinds, rows = await self._run(look)
        columns = [[column, kind] for column, kind in kinds.items()]
        view = DatasetView(
            name=name, uri=uri, id=id, label=label, rows=rows, columns=columns, secret=secret, offered=offered
        )

        def insert(tx: Transaction) -> None:
            if _find(tx, name) is not None:
                raise _taken(name)
            row = (name, uri, id, label, rows, json.dumps(columns), secret, offered)
            tx.execute("INSERT INTO dataset VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            told = {"dataset": name, "rows": rows, "columns": len(columns), "id": id, "label": label}
            record(tx, {**told, "offered": offered})

        await self._store.write(insert)
        return view

    async def list(self) -> Views:
        """All datasets by name."""
        return [_view(row) for row in await self._store.read(lambda tx: tx.all("SELECT * FROM dataset ORDER BY name"))]

    async def offers(self) -> offers.Offers:
        """What partners are told of the datasets here."""
        return offers.of(await self.list())

    async def get(self, name: str) -> DatasetView:
        """One dataset. Raises NotFound, with the nearest name."""
        return await self._store.read(lambda tx: _get(tx, name))

    async def offer(self, name: str, offered: bool, *, record: Record = unrecorded) -> DatasetView:
        """From now on partners who ask are told of it, or not any more. Raises NotFound."""

        def change(tx: Transaction) -> DatasetView:
            _get(tx, name)
            tx.execute("UPDATE dataset SET offered = ? WHERE name = ?", (offered, name))
            record(tx, {"dataset": name, "offered": offered})
            return _get(tx, name)

        return await self._store.write(change)

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
            count = 0

            def counted(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
                nonlocal count
                for batch in batches:
                    count += batch.num_rows
                    yield batch

            try:
                with source.opened(view.uri, self._secret(view.secret), id=view.id) as opened:
                    source.check_names(opened, kinds)
                    batches = counted(source.rows(opened, kinds, view.id))
                    pieces = artifact.table_pieces(_schema(kinds), batches, view.id, view.label)
                    return self._store.put_stream(pieces), count
            except KeyFileError as error:
                raise DataError(error.message, hint=error.hint) from None

        version, rows = await self._run(work)
        return Snapshot(version, rows, view.columns, view.id, view.label, source.identity(view.uri))

    def _secret(self, name: str | None) -> Secret | None:
        """The password of this name: a systemd credential, else a file in the folder of secrets. KeyFileError."""
        return None if name is None else secrets.load(self._secrets, name)


def _schema(kinds: Mapping[str, str]) -> pa.Schema:
    return pa.schema([(name, TYPES[kind]) for name, kind in kinds.items()])


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
    name, uri, id_, label, rows, columns, secret, offered = row
    return DatasetView(
        name=name,
        uri=uri,
        id=id_,
        label=label,
        rows=rows,
        columns=json.loads(columns),
        secret=secret,
        offered=bool(offered),
    )


def _taken(name: str) -> UsageError:
    return UsageError(f"there is a dataset {name!r} already", hint=f"fedpeer dataset remove {name}")
