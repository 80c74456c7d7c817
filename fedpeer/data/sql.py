"""Any other database, through SQLAlchemy: sqlite:////path?table=NAME, mysql+pymysql://USER@HOST/DATABASE?query=SELECT …

Rules
* The scheme is a dialect of SQLAlchemy and its driver, which the owner installs. SQLite is opened read-only; of others
  give a user who may only read: nothing is written, but not every database can promise that.
* With an id column rows come in its order, so that equal content is an equal snapshot however the server keeps it.
* What a column holds is what its first value is: int, float and Decimal are numbers, str is text, bool is boolean. A
  value of another kind later is an error. Dates, times and bytes are refused: a query casts them.
* What the server or the driver says is never shown: it quotes addresses, queries and values.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa

from fedpeer.crypto import Secret
from fedpeer.data import files
from fedpeer.data.columns import BOOLEAN, NUMBER, TEXT, TYPES, BadCell, check_names, numbers, texts
from fedpeer.data.database import Address
from fedpeer.errors import DataError

OPTIONS = ("charset", "driver", "encrypt", "service_name", "ssl_ca", "unix_socket")
FETCH_ROWS = 10_000


class Source:
    """An open connection; source.py says what a Source offers. Raises DataError."""

    def __init__(self, address: Address, password: Secret | None, id: str | None) -> None:  # noqa: A002
        try:
            import sqlalchemy
        except ImportError:
            raise DataError(
                f"{address.place}: SQLAlchemy is not installed",
                hint="pip install 'fedpeer[sql]'; fedpeer itself reads files and postgresql://",
            ) from None
        self.place = address.place
        self._id = id
        self._sql = sqlalchemy
        self._file = Path("/" + address.database.lstrip("/")) if address.base.startswith("sqlite") else None
        if self._file is not None and not address.database.startswith("/"):
            raise DataError(f"{address.base} is not an absolute path", hint="sqlite:////path/of/it?table=NAME")
        if self._file is not None:
            files.check(self._file)
        with self._told("the database cannot be reached, or refuses this user"):
            self._engine = self._make_engine(address, password)
            self._connection = self._engine.connect().execution_options(stream_results=True)
        try:
            with self._told("there is no such table, or the query is not one that the database understands"):
                self._rows = self._select(address)
                self.names: list[str] = [column.name for column in self._rows.c]
            check_names(self.place, self.names)
        except BaseException:
            self.close()
            raise

    def kinds(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for rows in self._partitions(self.names):
            for name, values in zip(self.names, zip(*rows, strict=True), strict=True):
                value = next((value for value in values if value is not None), None)
                if name not in found and value is not None:
                    found[name] = self._kind(name, value)
            if len(found) == len(self.names):
                break
        return {name: found.get(name, NUMBER) for name in self.names}

    def batches(self, kinds: Mapping[str, str], size: int) -> Iterator[pa.RecordBatch]:
        count = 0
        for rows in self._partitions(list(kinds)):
            columns = []
            for (name, kind), values in zip(kinds.items(), zip(*rows, strict=True), strict=True):
                try:
                    columns.append(_column(values, kind))
                except BadCell as bad:
                    bad.column, bad.index = name, bad.index + count
                    raise
            yield pa.record_batch(columns, names=list(kinds))
            count += len(rows)

    def row(self, index: int) -> int:
        return index + 1

    def fingerprint(self) -> str:
        """One query sees one state; of SQLite's file it is known, too."""
        return files.fingerprint(self._file) if self._file is not None else ""

    def close(self) -> None:
        with suppress(Exception):
            self._connection.close()
        with suppress(Exception):
            self._engine.dispose()

    def _make_engine(self, address: Address, password: Secret | None) -> Any:
        url = self._sql.make_url(address.base).update_query_dict(dict(address.options))
        if password is not None:
            url = url.set(password=password.reveal().decode())
        more = {}
        if self._file is not None:
            name = f"file:{quote(str(self._file))}?mode=ro"
            more["creator"] = lambda: sqlite3.connect(name, uri=True, check_same_thread=False)
        return self._sql.create_engine(url, poolclass=self._sql.NullPool, hide_parameters=True, **more)

    def _select(self, address: Address) -> Any:
        """Something to select from, whose columns are known."""
        sql = self._sql
        if address.table:
            schema, _, table = address.table.rpartition(".")
            found = sql.Table(table, sql.MetaData(), schema=schema or None, autoload_with=self._connection)
            return sql.select(found).subquery("t")
        asked = self._connection.execute(sql.text(f"SELECT * FROM ({address.query}\n) t WHERE 1 = 0"))  # noqa: S608
        names = list(asked.keys())
        asked.close()
        check_names(self.place, names)
        return sql.text(address.query).columns(*map(sql.column, names)).subquery("t")

    def _partitions(self, names: Sequence[str]) -> Iterator[Sequence[Sequence[Any]]]:
        chosen = self._sql.select(*(self._rows.c[name] for name in names))
        if self._id is not None:
            chosen = chosen.order_by(self._rows.c[self._id])
        with self._told("the query failed"):
            result = self._connection.execute(chosen)
            try:
                yield from result.partitions(FETCH_ROWS)
            finally:
                result.close()

    def _kind(self, name: str, value: Any) -> str:
        found = _kind_of(value)
        if found is None:
            raise DataError(
                f"{self.place}: the column {name!r} holds {type(value).__name__}; fedpeer knows numbers, text and"
                " booleans",
                hint="take ?query=SELECT … with CAST(… AS …) for it, or without it",
            )
        return found

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """What fails in SQLAlchemy or in a driver is told in our words."""
        try:
            yield
        except (DataError, BadCell):
            raise
        except self._sql.exc.NoSuchModuleError:
            raise DataError(
                f"{self.place}: its scheme is known neither to fedpeer nor to SQLAlchemy",
                hint="a path, postgresql://, or a dialect of SQLAlchemy that is installed",
            ) from None
        except ImportError as error:
            raise DataError(
                f"{self.place}: the driver {error.name} is not installed", hint=f"pip install {error.name}"
            ) from None
        except Exception as error:  # drivers raise what they like
            raise DataError(
                f"{self.place}: {what} ({type(error).__name__})", hint="the database's own log or shell says why"
            ) from None


def _kind_of(value: Any) -> str | None:
    if isinstance(value, bool):
        return BOOLEAN
    if isinstance(value, int | float | Decimal):
        return NUMBER
    return TEXT if isinstance(value, str) else None


def _column(values: Sequence[Any], kind: str) -> pa.Array:
    cells = [None if value is None else _cell(index, value, kind) for index, value in enumerate(values)]
    column = pa.array(cells, TYPES[kind])
    return numbers(column) if kind == NUMBER else texts(column) if kind == TEXT else column


def _cell(index: int, value: Any, kind: str) -> Any:
    found = _kind_of(value)
    if kind == TEXT and found == NUMBER:
        try:
            whole = int(value)
        except (ValueError, OverflowError):  # NaN, infinity
            raise BadCell(index, "not a finite number") from None
        if whole != value:
            raise BadCell(index, "numbers with fractions where text is wanted")
        return str(whole)
    if found != kind:
        columns = {NUMBER: "numbers", TEXT: "text", BOOLEAN: "truth values"}
        raise BadCell(index, f"{type(value).__name__} in a column of {columns[kind]}")
    try:
        return float(value) if kind == NUMBER else value
    except (ValueError, OverflowError):
        raise BadCell(index, "infinite, or too large for a 64-bit float") from None
