"""Files that others may fetch, and files that we fetch: pulled by digest, in pieces, resumable at an offset.

Rules
* What we offer is a file of the store, named by its digest. It may be fetched by the audience of its scope.
* What we fetch lies apart from the store's files, in a folder of its scope: another peer chooses these digests, and
  must neither learn by our asking what we hold already, nor have a file of ours removed when the scope is closed.
* A piece is written where it belongs and nowhere else; never a byte beyond the size that was asked for. The length of
  the partial file is the offset at which the next session, or the next start of the daemon, goes on.
* A file has its final name only when all of it is on disk and has the digest. A partial file that has not (a disk that
  lost power, a holder that lies) is thrown away.
* What we fetch for somebody who has no path to its holder passes through a file of its own, which nobody verifies here
  and which is removed when it was handed on, or given up. It is never longer than was asked for.
* Files are removed after the commit that made them needless; what a crash between leaves goes in Store.sweep.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Final

from fedpeer.crypto import hash_
from fedpeer.errors import LocalProtocolError, RemoteProtocolError, StoreError
from fedpeer.store import Schema, Store, Transaction

MAX_BLOB: Final = 1 << 32
DigestOf = Callable[[memoryview], bytes]
_DIGEST_OF: Final[DigestOf] = partial(hash_, "fp.file")

SCHEMA = Schema(
    "mesh.blobs",
    [
        """CREATE TABLE mesh_offer (scope BLOB NOT NULL, digest BLOB NOT NULL, size INTEGER NOT NULL,
            PRIMARY KEY (scope, digest));
        CREATE INDEX mesh_offer_digest ON mesh_offer (digest);
        CREATE TABLE mesh_garbage (digest BLOB PRIMARY KEY)""",
        "DROP TABLE mesh_garbage",
    ],
    files="SELECT digest FROM mesh_offer",
)


def offer(tx: Transaction, store: Store, scope: bytes, digest: bytes, size: int) -> None:
    """Let the audience of the scope fetch this file of the store."""
    path = store.path_of(digest)
    if not path.exists() or path.stat().st_size != size or size > MAX_BLOB:
        raise LocalProtocolError(f"there is no file {digest.hex()} of {size} bytes to offer")
    tx.execute("INSERT OR IGNORE INTO mesh_offer VALUES (?, ?, ?)", (scope, digest, size))
    tx.after_commit(lambda: store.claimed(digest))


def offered(tx: Transaction, scope: bytes, digest: bytes) -> bool:
    return tx.one("SELECT 1 FROM mesh_offer WHERE scope = ? AND digest = ?", (scope, digest)) is not None


def withdraw(tx: Transaction, store: Store, scope: bytes, digest: bytes | None = None) -> None:
    """End one offer of the scope, or all of them; a file that no other scope offers is removed after the commit."""
    rows = tx.all("SELECT digest FROM mesh_offer WHERE scope = ? AND digest = IFNULL(?, digest)", (scope, digest))
    tx.execute("DELETE FROM mesh_offer WHERE scope = ? AND digest = IFNULL(?, digest)", (scope, digest))
    still = [row[0] for row in rows if tx.one("SELECT 1 FROM mesh_offer WHERE digest = ?", row)]
    remove(tx, store, [row[0] for row in rows if row[0] not in still])


def remove(tx: Transaction, store: Store, digests: Iterable[bytes]) -> None:
    """Remove files of the store after this transaction."""
    for digest in digests:
        tx.after_commit(lambda digest=digest: store.remove_file(digest))  # type: ignore[misc]


class Fetched:
    """The folder of what was fetched, or is being fetched, from others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "fetched"
        self.passing = folder / "passing"
        self._numbers = count()

    def passage(self, digest: bytes, size: int, offset: int) -> Incoming:
        """A file that passes through from this offset on."""
        path = self.passing / str(next(self._numbers))
        incoming = Incoming(path, digest, size, passing=True)
        incoming.begin_at(offset)
        return incoming

    def path_of(self, scope: bytes, digest: bytes) -> Path:
        return self.folder / scope.hex() / digest.hex()

    def sweep(self, scopes: Collection[bytes]) -> None:
        """At the start: remove the folders of scopes that are closed."""
        shutil.rmtree(self.passing, ignore_errors=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        names = {scope.hex() for scope in scopes}
        for folder in self.folder.iterdir():
            if folder.name not in names:
                shutil.rmtree(folder)

    def close(self, scope: bytes) -> None:
        shutil.rmtree(self.folder / scope.hex(), ignore_errors=True)

    def remove(self, scope: bytes, digest: bytes) -> None:
        self.path_of(scope, digest).unlink(missing_ok=True)


class Incoming:
    """One file on its way to us, or through us. `offset` is where the next piece belongs.

    `digest_of` gives the digest of the whole, if it is not that of a file of the store; `writing` calls what writes
    (Store.with_reserve does it again on a full disk).
    """

    def __init__(
        self,
        path: Path,
        digest: bytes,
        size: int,
        digest_of: DigestOf | None = None,
        *,
        passing: bool = False,
        writing: Callable[[Callable[[], int]], int] = lambda write: write(),
    ) -> None:
        if not 0 <= size <= MAX_BLOB:
            raise LocalProtocolError(f"a blob of {size} bytes where at most {MAX_BLOB} are allowed")
        self.path, self.digest, self.size, self.passing = path, digest, size, passing
        self._digest_of, self._writing = digest_of or _DIGEST_OF, writing
        self._part = path.with_suffix(".part")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"{self._part}: {error.strerror}") from None
        self.offset = os.fstat(self._file).st_size
        if self.offset > size:
            self.restart()

    def write(self, digest: bytes, offset: int, piece: memoryview) -> bool:
        """Take the piece if it is the next one of this file. Raises RemoteProtocolError for one too long."""
        if digest != self.digest or offset != self.offset:
            return False  # the rest of a transfer that was given up
        if self.passing:
            piece = piece[: self.size - offset]  # who asked may have named another size than the holder's
        elif offset + len(piece) > self.size:
            raise RemoteProtocolError("a blob longer than it was said to be")
        try:
            while piece:
                written = self._writing(partial(os.pwrite, self._file, piece, self.offset))
                self.offset += written
                piece = piece[written:]
        except OSError as error:
            raise StoreError(f"{self._part}: {error.strerror}") from None
        return True

    @property
    def complete(self) -> bool:
        return self.offset == self.size

    def finish(self) -> bool:
        """Make a complete file durable under its name; False, and from the start again, if its digest is another."""
        try:
            if self.size:
                with mmap.mmap(self._file, self.size, access=mmap.ACCESS_READ) as content, memoryview(content) as view:
                    digest = self._digest_of(view)
            else:
                digest = self._digest_of(memoryview(b""))
            if digest != self.digest:
                self.restart()
                return False
            os.fsync(self._file)
            self._part.rename(self.path)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise StoreError(f"{self._part}: {error.strerror}") from None
        return True

    def restart(self) -> None:
        self.begin_at(0)

    def begin_at(self, offset: int) -> None:
        os.ftruncate(self._file, offset)
        self.offset = offset

    def read(self, offset: int, size: int) -> bytes:
        """Some of the bytes that are here from this offset on."""
        return os.pread(self._file, max(0, min(size, self.offset - offset)), offset)

    def close(self) -> None:
        os.close(self._file)
        if self.passing:
            self._part.unlink(missing_ok=True)
