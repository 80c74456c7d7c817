"""Where rows come from: a source is opened by its URI, and read in batches that are checked as they come.

Rules
* The scheme of the URI names the module: a path or file:/// by the file's ending (csv.py, parquet.py), postgresql://
  (postgresql.py), any other is a dialect of SQLAlchemy (sql.py). A database's library is loaded when it is needed.
* A URI never holds a password; it would be in shell histories, logs and the store. Errors do not repeat one.
* No source has to fit in memory: a batch of rows does, and for a column of ids 8 bytes of each (their 64-bit hashes;
  equal ones are then compared as they are, so that the answer is exact).
* A source that changed while it was read is refused. A database is read in one transaction, which sees one state.
"""

from __future__ import annotations

import difflib
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedpeer.artifact import BATCH_ROWS
from fedpeer.crypto import Secret
from fedpeer.data import csv, files, parquet
from fedpeer.data.columns import TEXT, BadCell
from fedpeer.data.database import Address
from fedpeer.errors import DataError

FORMATS: Mapping[str, Callable[[Path], Source]] = {".csv": csv.Source, ".parquet": parquet.Source}
MANY = 1 << 16
"""repeated hashes that are looked at together, so that they fit in memory however many there are"""


class Source(Protocol):
    """An open source. Everything blocks; raises DataError, BadCell, and OSError for files."""

    place: str
    """what errors call it"""
    names: list[str]
    """its columns, in its order"""

    def kinds(self) -> dict[str, str]:
        """What each column holds now: name → kind of columns.py."""

    def batches(self, kinds: Mapping[str, str], size: int) -> Iterator[pa.RecordBatch]:
        """These columns as float64, string or bool, in batches of about `size` rows. Can be read again."""

    def row(self, index: int) -> int:
        """The number by which its owner knows row `index` (from 0)."""

    def fingerprint(self) -> str:
        """Another text when the content may be another one."""

    def close(self) -> None: ...


@contextmanager
def opened(uri: str, secret: Secret | None = None, *, id: str | None = None) -> Iterator[Source]:  # noqa: A002
    """The source that a URI names, closed at the end. A database gives its rows in the order of the column `id`.

    `secret` is the password of a database. Raises DataError.
    """
    check_no_password(uri)
    source = _open(uri, secret, id)
    try:
        yield source
    except OSError as error:
        raise files.unreadable(source.place, error) from None
    finally:
        source.close()


def _open(uri: str, secret: Secret | None, id: str | None) -> Source:  # noqa: A002
    scheme = uri.partition("://")[0].lower() if "://" in uri and not uri.startswith("/") else ""
    if scheme in ("", "file"):
        if secret is not None:
            raise DataError("a file needs no secret", hint="leave out --secret")
        path = files.locate(uri)
        open_file = FORMATS.get(path.suffix.lower())
        if open_file is None:
            raise DataError(f"{path} ends in none of {', '.join(FORMATS)}", hint="rename or convert it")
        files.check(path)
        try:
            return open_file(path)
        except OSError as error:
            raise files.unreadable(path, error) from None
    if scheme in ("postgresql", "postgres"):
        from fedpeer.data import postgresql

        return postgresql.Source(Address.parse(uri, postgresql.OPTIONS), secret, id)
    from fedpeer.data import sql

    return sql.Source(Address.parse(uri, sql.OPTIONS), secret, id)


def identity(uri: str) -> str:
    """The same text for all URIs of one table, file or query, whoever reads it and by whatever name. Raises DataError.

    A copy of a file, and another query over the same table, are other ones.
    """
    scheme, is_uri, _ = uri.partition("://")
    kind = scheme.lower().partition("+")[0]
    if not is_uri or uri.startswith("/") or kind == "file":
        return str(files.locate(uri).resolve())
    if kind in ("postgresql", "postgres"):
        from fedpeer.data import postgresql

        kind, address, port = "postgresql", Address.parse(uri, postgresql.OPTIONS), 5432
        table = address.table.removeprefix("public.")
    else:
        from fedpeer.data import sql

        address, port = Address.parse(uri, sql.OPTIONS), 0
        table = address.table
    at = address.host or address.options.get("host", "") or address.options.get("unix_socket", "")
    if kind == "sqlite":
        at, database = "", str(Path("/" + address.database.lstrip("/")).resolve())
    else:
        database = address.database
    return f"{kind}://{at.lower()}:{address.port or port}/{database}?{table or address.query}"


def check_no_password(uri: str) -> None:
    """Refuse a URI that holds a password, without repeating it. Raises DataError."""
    scheme, _, rest = uri.partition("://")
    if scheme.startswith("/") or rest.startswith("/"):  # a path, or a URI without user and host
        return
    user, at, _ = rest.partition("?")[0].rpartition("@")  # a password may hold a slash
    if at and ":" in user:
        raise DataError(
            "the URI holds a password, which would be kept and shown",
            hint="write it into secrets/NAME in the peer's home (mode 600) and say --secret NAME; and change the"
            " password, for the shell remembers it",
        )


def choose_kinds(
    source: Source,
    id: str | None,  # noqa: A002
    label: str | None,
    text: Collection[str],
) -> dict[str, str]:
    """What each column of a new dataset shall hold: what it holds now, but ids and the columns of `text` are text.

    Raises DataError for columns that are not there.
    """
    for what, name in (("id", id), ("label", label), *(("text", name) for name in text)):
        if name is not None and name not in source.names:
            raise DataError(f"{source.place} has no column {name!r} ({what})", hint=nearest(name, source.names))
    if id is not None and id == label:
        raise DataError(f"{source.place}: the column {id!r} cannot be both id and label")
    return {name: TEXT if name == id or name in text else kind for name, kind in source.kinds().items()}


def check_names(source: Source, kinds: Mapping[str, str]) -> None:
    """Refuse a source whose columns are not those of `kinds`, in this order. Raises DataError."""
    if source.names != list(kinds):
        changed = ", ".join(sorted(set(source.names) ^ set(kinds))) or "their order"
        raise DataError(
            f"{source.place}: the columns are not those it was added with ({changed})",
            hint="fedpeer dataset remove, then add it again",
        )


def rows(source: Source, kinds: Mapping[str, str], id: str | None) -> Iterator[pa.RecordBatch]:  # noqa: A002
    """All rows, in batches. What is wrong with them may be found at the end only: DataError with the place."""
    before = source.fingerprint()
    count, hashes = 0, array("q")
    try:
        for batch in source.batches(kinds, BATCH_ROWS):
            if id is not None:
                try:
                    hashes.extend(_hashes(batch.column(id)))
                except BadCell as bad:
                    raise BadCell(count + bad.index, bad.reason, column=id) from None
            yield batch
            count += batch.num_rows
        if id is not None:
            _check_unique(source, id, hashes)
    except BadCell as bad:
        raise _placed(source, kinds, bad) from None
    if count == 0:
        raise DataError(f"{source.place} has columns and no rows")
    if source.fingerprint() != before:
        raise DataError(f"{source.place} changed while it was read", hint="try again when it is written")


def _hashes(ids: pa.Array) -> Iterable[int]:
    """Python's own 64-bit hashes (SipHash under a key of this process)."""
    if ids.null_count:
        raise BadCell(pc.index(pc.is_null(ids), True).as_py(), "a row without id")
    return map(hash, ids.to_pylist())


def _check_unique(source: Source, id: str, hashes: array[int]) -> None:  # noqa: A002
    """Raise BadCell for a row whose id another row has."""
    held = np.frombuffer(hashes, np.int64)
    held.sort()
    repeated = np.unique(held[1:][held[1:] == held[:-1]])
    for start in range(0, len(repeated), MANY):
        suspects = set(repeated[start : start + MANY].tolist())
        first: dict[str, int] = {}
        index = 0
        for batch in source.batches({id: TEXT}, BATCH_ROWS):
            for value in batch.column(id).to_pylist():
                if hash(value) in suspects:
                    if value in first:
                        raise BadCell(index, "the same id", column=id, same_as=first[value])
                    first[value] = index
                index += 1


def _placed(source: Source, kinds: Mapping[str, str], bad: BadCell) -> DataError:
    where = f"{source.place}: row {source.row(bad.index)}, column {bad.column!r}"
    again = f" as in row {source.row(bad.same_as)}" if bad.same_as is not None else ""
    hint = (
        f"mend it (an empty cell is a missing value), or add the dataset with --text {bad.column}"
        if kinds.get(bad.column) != TEXT
        else ""
    )
    return DataError(f"{where}: {bad.reason}{again}", hint=hint)


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint that names the most similar of `names`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean {close[0]!r}?" if close else ""
