"""One SQLite file and a folder of blobs beside it: what this peer must not forget.

Rules
* WAL with synchronous=FULL: what `write` returned from is on disk (NORMAL loses acknowledged rows at power loss).
* One writer thread, hence one writer; a function given to `write` is ONE transaction: budget, audit, outbox and
  checkpoint of one step commit together or not at all. No transaction can stay open across an await.
* Anything above `INLINE_BYTES` is a file named by its digest, fsynced (and its folder) before the row that names it.
  It is written before that row's commit and removed after that of its end; what a kill left between goes in `sweep`.
* What must happen in memory when a transaction is durable is given to `Transaction.after_commit`; it is called in the
  order of the commits, by the caller of `write` (never by the writer thread), before `write` returns.
* A failed fsync or commit is never tried again: StoreError, and the daemon ends; it is clean after a restart.
* Where the disk is full, what is running goes on for a while on a reserve (`reserve`): SQLite has rolled the
  transaction back and synced nothing, so once the reserve is given up the same function runs again. `scarce` says that
  nothing new should begin; the reserve is laid up again when there is room for twice of it.
* Each package owns its tables: it declares a `Schema`, whose numbered steps are applied once and in order. A file
  written by a newer release is refused.

The store knows no event loop: the shell passes `run_in_thread` (trio's, limited to one thread; in a simulation the
function is simply called).
"""

from __future__ import annotations

import errno
import itertools
import os
import sqlite3
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fedpeer.crypto import Buffer, Hasher
from fedpeer.errors import DiskFull, StoreError

INLINE_BYTES = 64 * 1024
READ_BYTES = 1 << 20
T = TypeVar("T")


class RunInThread(Protocol):
    def __call__(self, function: Callable[[], T], /) -> Awaitable[T]: ...


@dataclass(frozen=True)
class Schema:
    """The tables of one package: `steps[i]` is the SQL script that brings version i to i + 1.

    `files` selects the digests of all files that their rows name (x'' among them is none); empty if they name none.
    """

    name: str
    steps: Sequence[str]
    files: str = ""


class Transaction:
    """What a function given to Store.write or Store.read works with; valid only during that call."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.callbacks: list[Callable[[], None]] = []

    def after_commit(self, callback: Callable[[], None]) -> None:
        """Call `callback`, which must not fail, once this transaction is on disk; never if it is rolled back."""
        self.callbacks.append(callback)

    def execute(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self._connection.execute(sql, values)

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        self._connection.executemany(sql, rows)

    def one(self, sql: str, values: Sequence[Any] = ()) -> Any:
        """The first row as a tuple, or None."""
        return self._connection.execute(sql, values).fetchone()

    def all(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        return self._connection.execute(sql, values).fetchall()


Record = Callable[[Transaction, dict[str, Any]], object]
"""Adds facts to the audit log in the transaction that they are about (governance/audit.py)."""


def unrecorded(_tx: Transaction, _facts: dict[str, Any]) -> None:
    """A Record for what nobody asked for."""


async def call_directly(function: Callable[[], T], /) -> T:
    """A RunInThread for simulations and for tests without threads."""
    return function()


class Store:
    """Open or create the store in `folder` (made 0700 by `fedpeer init`)."""

    def __init__(self, folder: Path, schemas: Sequence[Schema], run_in_thread: RunInThread = call_directly) -> None:
        self.folder = folder
        self.files = folder / "files"
        self._run = run_in_thread
        self._committed: deque[Callable[[], None]] = deque()
        self._reserve, self._reserve_bytes = folder / "reserve", 0
        self._parts = itertools.count()
        self._unclaimed: Counter[bytes] = Counter()  # files that are held, for no row names them yet
        self._claims = threading.Lock()
        try:
            self.files.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                folder / "fedpeer.sqlite", check_same_thread=False, isolation_level=None, timeout=0
            )
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{folder}: {error}") from None
        try:
            self._connection.execute("PRAGMA locking_mode=EXCLUSIVE")  # a second daemon on this home is refused
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute("PRAGMA foreign_keys=ON")
            self._migrate(schemas)
            self._checkpoint()
            _sync_folder(folder)
        except BaseException as error:
            self._connection.close()
            if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
                raise StoreError(f"{folder} is in use by another fedpeer daemon", hint="stop that one first") from None
            if isinstance(error, sqlite3.Error | OSError):
                raise StoreError(f"{folder}: {error}") from None
            raise

    def reserve(self, nbytes: int) -> None:
        """Lay up so much room on the disk, to be used when there is no other; 0 gives it up for good."""
        self._reserve_bytes = nbytes
        self._reserve.unlink(missing_ok=True)
        self._lay_up(needed=nbytes)

    @property
    def scarce(self) -> bool:
        """Whether the reserve is in use: the disk is full, or all but."""
        return self._reserve_bytes > 0 and not self._reserve.exists()

    def _lay_up(self, needed: int) -> None:
        """Take room for the reserve, if so much is free."""
        room = os.statvfs(self.folder)
        if not self._reserve_bytes or room.f_bavail * room.f_frsize < needed:
            return
        descriptor = os.open(self._reserve, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, self._reserve_bytes)
        except OSError:
            self._reserve.unlink()
        finally:
            os.close(descriptor)

    def with_reserve(self, work: Callable[[], T]) -> T:
        """Do what needs room on the disk; a second time without the reserve, if there was none."""
        if self.scarce:
            self._lay_up(needed=2 * self._reserve_bytes)
        try:
            return work()
        except (sqlite3.OperationalError, OSError) as error:
            if not _is_full(error) or self._reserve_bytes == 0 or self.scarce:
                raise
            self._reserve.unlink()
        return work()

    async def write(self, function: Callable[[Transaction], T]) -> T:
        """Run `function` in one transaction and commit it durably; its exception rolls everything back."""
        try:
            return await self._run(lambda: self._transact(function))
        finally:
            self._tell()

    async def read(self, function: Callable[[Transaction], T]) -> T:
        """Run a function that only reads."""
        return await self._run(lambda: self._guarded(function))

    async def run(self, function: Callable[[], T]) -> T:
        """Run a function on files in the writer's thread, in order with the transactions."""
        return await self._run(function)

    def write_now(self, function: Callable[[Transaction], T]) -> T:
        """`write` for callers without an event loop, while nobody else writes."""
        result = self._transact(function)
        self._tell()
        return result

    def _transact(self, function: Callable[[Transaction], T]) -> T:
        def transact(transaction: Transaction) -> T:
            transaction.execute("BEGIN IMMEDIATE")
            try:
                result = function(transaction)
                transaction.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    transaction.execute("ROLLBACK")
                raise
            self._committed.extend(transaction.callbacks)
            return result

        return self._guarded(lambda _: self.with_reserve(lambda: transact(Transaction(self._connection))))

    def _tell(self) -> None:
        while self._committed:
            self._committed.popleft()()

    async def put_file(
        self, data: Buffer | Sequence[Buffer], name: bytes | None = None, *, held: bool = False
    ) -> bytes:
        """Keep bytes, or pieces of them one after the other, as a file, durably; its name, the digest, is returned.

        The same bytes are kept once. `name` is the digest by which others know them, if it is not hash_("fp.file", of
        the whole); such a file, and one that is `held`, is not removed by anybody before it is `claimed`.
        """
        return await self._run(lambda: self.put_file_now(data, name, held=held))

    def put_file_now(self, data: Buffer | Sequence[Buffer], name: bytes | None = None, *, held: bool = False) -> bytes:
        given = [data] if isinstance(data, bytes | bytearray | memoryview) else data
        pieces = [memoryview(piece).cast("B") for piece in given]
        digest = _digest(pieces) if name is None else name
        path = self.path_of(digest)
        with self._claims:  # the same bytes may just be given up by another job
            if held or name is not None:
                self._unclaimed[digest] += 1
            if path.exists():
                return digest
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)  # what a kill left of it: being read-only, it could not be opened again
        self._write_part(part, pieces, self.with_reserve)
        self._name_part(part, path)
        return digest

    def put_stream(self, pieces: Iterable[Buffer]) -> bytes:
        """`put_file`, held, for pieces that are made while they are written; no more than one is in memory.

        It runs in the caller's thread, for the writer's may not wait for the source of the pieces. What that raises
        passes, and nothing is kept. The digest begins with the length, so the file is read once more when it is known.
        The reserve is not for this: DiskFull.
        """
        part = self.files / f"{next(self._parts)}.part"
        self._write_part(part, (memoryview(piece).cast("B") for piece in pieces), lambda write: write())
        digest = _digest_of_file(part)
        with self._claims:
            self._unclaimed[digest] += 1
        self._name_part(part, self.path_of(digest))
        return digest

    def _write_part(
        self, part: Path, pieces: Iterable[memoryview], writing: Callable[[Callable[[], int]], int]
    ) -> None:
        with _named(part):
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
        try:
            for piece in pieces:
                left = piece
                with _named(part):
                    while left:
                        left = left[writing(partial(os.write, descriptor, left)) :]
            with _named(part):
                os.fsync(descriptor)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    def _name_part(self, part: Path, path: Path) -> None:
        with _named(path):
            part.rename(path)
            _sync_folder(self.files)

    def path_of(self, digest: bytes) -> Path:
        return self.files / digest.hex()

    def claimed(self, digest: bytes) -> None:
        """A row names this file now, or none will: who removes that row removes the file. Called after the commit."""
        with self._claims:
            self._unclaimed[digest] -= 1
            self._unclaimed += Counter()  # drops what is not above zero

    def remove_file(self, digest: bytes) -> None:
        """Remove a file, unless somebody holds it who put it again, and no row names it yet."""
        with self._claims:
            if not self._unclaimed[digest]:
                self.path_of(digest).unlink(missing_ok=True)

    def sweep(self, schemas: Sequence[Schema]) -> None:
        """At the start, with the schemas of all tables: remove every file that no row names."""
        named = self.write_now(lambda tx: {row[0].hex() for schema in schemas for row in tx.all(schema.files)})
        try:
            for path in self.files.iterdir():
                if path.name not in named:
                    path.unlink()
        except OSError as error:
            raise StoreError(f"{self.files}: {error.strerror}") from None

    def close(self) -> None:
        self._connection.close()

    def _guarded(self, function: Callable[[Transaction], T]) -> T:
        try:
            return function(Transaction(self._connection))
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise StoreError(f"{self.folder}: {error}") from error

    def _checkpoint(self) -> None:
        """Write the whole log into the file, durably: while SQLite makes a database it is silent about failed syncs."""
        (busy, *_) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise StoreError(f"{self.folder} is in use by somebody else")

    def _migrate(self, schemas: Sequence[Schema]) -> None:
        self._connection.execute("CREATE TABLE IF NOT EXISTS schema (name TEXT PRIMARY KEY, version INTEGER NOT NULL)")
        for schema in schemas:
            row = self._connection.execute("SELECT version FROM schema WHERE name = ?", (schema.name,)).fetchone()
            done = row[0] if row else 0
            if done > len(schema.steps):
                raise StoreError(
                    f"{self.folder} was written by a newer fedpeer ({schema.name} version {done})",
                    hint="install that release again",
                )
            for number, script in enumerate(schema.steps[done:], start=done + 1):
                self._connection.executescript(
                    f"BEGIN IMMEDIATE; {script};"  # noqa: S608 - both are constants of the program
                    f"INSERT OR REPLACE INTO schema VALUES ('{schema.name}', {number}); COMMIT"
                )


def _digest(pieces: Sequence[memoryview]) -> bytes:
    """hash_("fp.file", of the whole)"""
    hasher = Hasher("fp.file", last=sum(map(len, pieces)))
    for piece in pieces:
        hasher.update(piece)
    return hasher.digest()


def _is_full(error: sqlite3.OperationalError | OSError) -> bool:
    if isinstance(error, sqlite3.OperationalError):
        return error.sqlite_errorcode == sqlite3.SQLITE_FULL
    return error.errno == errno.ENOSPC


def _digest_of_file(path: Path) -> bytes:
    """The same, of a file, piece by piece."""
    with _named(path), path.open("rb", buffering=0) as file:
        hasher = Hasher("fp.file", last=os.fstat(file.fileno()).st_size)
        while piece := file.read(READ_BYTES):
            hasher.update(piece)
    return hasher.digest()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """An OSError becomes a StoreError that names the file, DiskFull where that is the reason."""
    try:
        yield
    except OSError as error:
        raise (DiskFull if _is_full(error) else StoreError)(f"{path}: {error.strerror}") from None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
