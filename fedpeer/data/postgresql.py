"""PostgreSQL, through ADBC: postgresql://USER@HOST:PORT/DATABASE?table=SCHEMA.TABLE, or ?query=SELECT …

Rules
* One read-only transaction that sees one state (repeatable read); a statement that takes longer than STATEMENT_S ends.
* With an id column rows come in its order, so that equal content is an equal snapshot however the server keeps it.
* Integers, floats and numeric are numbers, cast to float64 by the server; text, uuid and enums are text; boolean is
  boolean. Dates and times, and other types, are refused: what text or number they shall be, a query says by a cast.
* Over the network: TLS, with the server's certificate verified unless sslmode says `require`. Without a host it is the
  server's socket on this machine (?host=/run/postgresql names its folder).
* What the server or the driver says is never shown: it quotes connection strings, queries and values. Its SQLSTATE
  chooses among our own words.

The driver's DB-API module would load pandas and polars where they are installed; the layer below it does not.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa

from fedpeer.crypto import Secret
from fedpeer.data.columns import BOOLEAN, NUMBER, TEXT, BadCell, changed, check_names, converted, typed
from fedpeer.data.database import Address
from fedpeer.errors import DataError

OPTIONS = ("host", "sslmode", "sslrootcert", "sslcert", "sslkey")
TLS_MODES = ("verify-full", "verify-ca", "require")
CONNECT_S = 10
STATEMENT_S = 3600
BATCH_BYTES = 4 << 20
TYPES = {
    **dict.fromkeys(("int2", "int4", "int8", "float4", "float8", "numeric"), NUMBER),
    **dict.fromkeys(("text", "varchar", "bpchar", "name", "citext", "uuid"), TEXT),
    "bool": BOOLEAN,
}
CAST = {NUMBER: "float8", TEXT: "text", BOOLEAN: "bool"}
REFUSALS = {
    "28": ("the user or the password is refused", "--secret names the password; the user stands before the @"),
    "3D000": ("there is no such database", "its name follows the host"),
    "3F000": ("there is no such schema", "table=SCHEMA.TABLE"),
    "42P01": ("there is no such table, or none that this user sees", "table=SCHEMA.TABLE"),
    "42703": ("the query names a column that is not there", "add the dataset again with another query"),
    "42702": ("two columns have one name", "name each column of the query"),
    "42501": ("this user may not read it", "GRANT SELECT ON … TO …"),
    "57014": (f"it was not read within {STATEMENT_S} s", "a view or an index makes the query faster"),
    "22": ("a value cannot be cast to what its column shall hold", "cast it in a query, or leave it out"),
    "22012": ("the query divides by zero", "NULLIF(…, 0)"),
    "25006": ("the query would write", "only SELECT is possible"),
    "42": ("the query is not one that the server understands", "try it with psql: SELECT * FROM (…) AS t"),
    "57P": ("the server is stopping or starting", "try again later"),
    "08": ("the connection broke", "try again later"),
}
WORDS = {
    "password authentication failed": "28P01",
    "no password supplied": "28P01",
    "authentication failed": "28000",
    "no pg_hba.conf entry": "28000",
    'FATAL:  role "': "28000",
    "does not exist": "3D000",
    "the database system is": "57P03",
    "due to statement timeout": "57014",
    "terminating connection": "57P01",
    "server closed the connection": "08006",
    "in a read-only transaction": "25006",
    "invalid input syntax": "22P02",
    "out of range": "22003",
    "division by zero": "22012",
}


class Source:
    """An open transaction; source.py says what a Source offers. Raises DataError."""

    def __init__(self, address: Address, password: Secret | None, id: str | None) -> None:  # noqa: A002
        self.place = address.place
        self._id = id
        self._driver, connect = _load()
        self._open: list[Any] = []
        try:
            with self._told(connecting=True):
                self._open.append(connect(_conninfo(address, password)))
                self._open.append(self._driver.AdbcConnection(self._open[0]))
                self._open[1].set_autocommit(False)
            for setting in (
                "TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY",
                f"LOCAL statement_timeout = '{STATEMENT_S}s'",
                "LOCAL synchronize_seqscans = off",
            ):
                self._all(f"SET {setting}")
            self._from = (
                ".".join(map(_quoted, address.table.split(".", 1))) if address.table else f"({address.query}\n)"
            )
            self.names = self._all(f"SELECT * FROM {self._from} AS t LIMIT 0").schema.names  # noqa: S608
            check_names(self.place, self.names)
            self._held = self._types()
        except BaseException:
            self.close()
            raise

    def kinds(self) -> dict[str, str]:
        for name, (kind, held, category) in self._held.items():
            if kind is None:
                cast = "to_char or extract(epoch from …)" if category in "DT" else "a cast to text, numeric or boolean"
                raise DataError(
                    f"{self.place}: the column {name!r} holds {held}; fedpeer knows numbers, text and booleans",
                    hint=f"take ?query=SELECT … with {cast} for it, or without it",
                )
        return {name: kind for name, (kind, _, _) in self._held.items() if kind is not None}

    def batches(self, kinds: Mapping[str, str], size: int) -> Iterator[pa.RecordBatch]:
        for name, kind in kinds.items():
            found, held, _ = self._held[name]
            if found is None or (kind != TEXT and found != kind):
                bad = changed(held, kind)
                raise BadCell(bad.index, bad.reason, column=name)
        columns = ", ".join(f"t.{_quoted(name)}::{CAST[kind]} AS {_quoted(name)}" for name, kind in kinds.items())
        order = f' ORDER BY t.{_quoted(self._id)}::text COLLATE "C"' if self._id is not None else ""
        return converted(self._batches(f"SELECT {columns} FROM {self._from} AS t{order}"), kinds, typed)  # noqa: S608

    def row(self, index: int) -> int:
        return index + 1

    def fingerprint(self) -> str:
        """One transaction sees one state."""
        return ""

    def close(self) -> None:
        for held in reversed(self._open):
            with suppress(Exception):
                held.close()

    def _types(self) -> dict[str, tuple[str | None, str, str]]:
        """For each column its kind if fedpeer knows one, the server's name of its type, and its type's category."""
        held = ", ".join(f"pg_typeof(t.{_quoted(name)})::oid" for name in self.names)
        rows = self._all(
            "SELECT format_type(own.oid, NULL) AS held, COALESCE(base.typname, own.typname)::text AS name,"  # noqa: S608
            " own.typcategory::text AS category"
            f" FROM (SELECT 1) AS one LEFT JOIN (SELECT * FROM {self._from} AS t LIMIT 0) AS t ON true,"
            f" LATERAL unnest(ARRAY[{held}]) WITH ORDINALITY AS types (oid, number)"
            " JOIN pg_catalog.pg_type AS own ON own.oid = types.oid"
            " LEFT JOIN pg_catalog.pg_type AS base ON base.oid = own.typbasetype"
            " ORDER BY number"
        ).to_pylist()
        return {
            column: (TEXT if row["category"] == "E" else TYPES.get(row["name"]), row["held"], row["category"])
            for column, row in zip(self.names, rows, strict=True)
        }

    def _all(self, statement: str) -> pa.Table:
        with self._told():
            asked = self._driver.AdbcStatement(self._open[1])
            try:
                asked.set_sql_query(statement)
                handle, _ = asked.execute_query()
                return pa.RecordBatchReader._import_from_c(handle.address).read_all()
            finally:
                asked.close()

    def _batches(self, statement: str) -> Iterator[pa.RecordBatch]:
        with self._told():
            asked = self._driver.AdbcStatement(self._open[1])
            try:
                asked.set_options(**{"adbc.postgresql.batch_size_hint_bytes": str(BATCH_BYTES)})
                asked.set_sql_query(statement)
                handle, _ = asked.execute_query()
                with pa.RecordBatchReader._import_from_c(handle.address) as reader:
                    yield from reader
            finally:
                asked.close()

    @contextmanager
    def _told(self, *, connecting: bool = False) -> Iterator[None]:
        """What fails in the driver is told in our words."""
        try:
            yield
        except (self._driver.Error, pa.ArrowException, OSError) as error:
            raise _refusal(self.place, error, connecting=connecting) from None


def _load() -> tuple[Any, Any]:
    """The driver's module, and its way to connect. Raises DataError with the remedy."""
    try:
        import adbc_driver_manager
        import adbc_driver_postgresql
    except ImportError:
        raise DataError("the driver for PostgreSQL is not installed", hint="pip install 'fedpeer[postgres]'") from None
    return adbc_driver_manager, adbc_driver_postgresql.connect


def _conninfo(address: Address, password: Secret | None) -> str:
    """libpq's keywords and values. Raises DataError for a connection over the network without TLS."""
    given = dict(address.options)
    host = given.pop("host", address.host)
    if "," in host:
        raise DataError(f"{address.place}: it names several hosts", hint="name one")
    if host and not host.startswith("/") and not _is_here(host):
        mode = given.setdefault("sslmode", TLS_MODES[0])
        if mode not in TLS_MODES:
            raise DataError(
                f"{address.place}: sslmode={mode} would not protect it", hint=f"one of {', '.join(TLS_MODES)}"
            )
        if mode != "require":
            given.setdefault("sslrootcert", "system")
    given |= {
        "host": host,
        "port": str(address.port or ""),
        "dbname": address.database,
        "user": address.user,
        "password": password.reveal().decode() if password is not None else "",
        "connect_timeout": str(CONNECT_S),
        "application_name": "fedpeer",
    }
    escaped = {name: value.replace("\\", "\\\\").replace("'", "\\'") for name, value in given.items() if value}
    return " ".join(f"{name}='{value}'" for name, value in escaped.items())


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _refusal(place: str, error: BaseException, *, connecting: bool) -> DataError:
    """In our words. Without an SQLSTATE, which a refused connection and an end in mid-stream lack, by the server's."""
    said = str(error)
    state = str(getattr(error, "sqlstate", None) or next((code for words, code in WORDS.items() if words in said), ""))
    if connecting and not state:
        return DataError(
            f"{place}: the server cannot be reached",
            hint="is it running there, and does it take connections of this user?",
        )
    found = max((begins for begins in REFUSALS if state.startswith(begins)), key=len, default="")
    what, hint = REFUSALS.get(found, ("the server broke it off", "its own log says why"))
    return DataError(f"{place}: {what}" + (f" (SQLSTATE {state})" if state else ""), hint=hint)
