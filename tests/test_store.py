"""What is written is on disk, together or not at all."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedpeer.crypto import hash_
from fedpeer.errors import StoreError
from fedpeer.store import Schema, Store, Transaction

NOTES = Schema("notes", ["CREATE TABLE note (text TEXT NOT NULL UNIQUE) STRICT"])


def texts(store: Store) -> list[str]:
    return [row[0] for row in store.write_now(lambda tx: tx.all("SELECT text FROM note ORDER BY text"))]


def add(*notes: str):
    def function(tx: Transaction) -> None:
        tx.executemany("INSERT INTO note VALUES (?)", [(note,) for note in notes])

    return function


def test_what_was_streamed_stays_until_it_is_claimed_as_often_as_it_was_put(tmp_path: Path) -> None:
    store = Store(tmp_path, [])
    digest = store.put_stream([b"rows"])
    assert store.put_stream([b"rows"]) == digest == store.put_file_now(b"rows", held=True)
    for _ in range(3):
        store.remove_file(digest)
        assert store.path_of(digest).exists()
        store.claimed(digest)
    store.remove_file(digest)
    assert not store.path_of(digest).exists()
    store.close()


async def test_a_write_is_there_after_reopening(tmp_path: Path) -> None:
    store = Store(tmp_path, [NOTES])
    await store.write(add("a", "b"))
    store.close()
    assert texts(Store(tmp_path, [NOTES])) == ["a", "b"]


async def test_an_exception_takes_back_the_whole_transaction(tmp_path: Path) -> None:
    store = Store(tmp_path, [NOTES])
    await store.write(add("a"))

    def fails(tx: Transaction) -> None:
        add("b")(tx)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await store.write(fails)
    with pytest.raises(sqlite3.IntegrityError):
        await store.write(add("c", "a"))
    assert texts(store) == ["a"]


async def test_every_commit_is_durable_at_a_power_cut(tmp_path: Path) -> None:
    store = Store(tmp_path, [NOTES])
    assert await store.read(lambda tx: tx.one("PRAGMA synchronous")) == (2,)  # FULL; NORMAL loses acknowledged rows
    assert await store.read(lambda tx: tx.one("PRAGMA journal_mode")) == ("wal",)


def test_a_second_daemon_on_one_home_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path, [NOTES])
    store.write_now(add("a"))
    program = (
        "import sys; from pathlib import Path; from fedpeer.store import Store; from fedpeer.errors import StoreError\n"
        "try: Store(Path(sys.argv[1]), [])\n"
        "except StoreError as error: print(error.message)"
    )
    said = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "in use by another fedpeer daemon" in said.stdout
    store.close()


def test_steps_of_a_schema_are_applied_once_and_in_order(tmp_path: Path) -> None:
    Store(tmp_path, [NOTES]).close()
    more = Schema("notes", [*NOTES.steps, "ALTER TABLE note ADD COLUMN author TEXT NOT NULL DEFAULT 'me'"])
    for _ in range(2):
        store = Store(tmp_path, [more])
        assert store.write_now(lambda tx: tx.one("SELECT count(author) FROM note")) == (0,)
        store.close()
    with pytest.raises(StoreError, match="newer fedpeer"):
        Store(tmp_path, [NOTES])


def test_a_step_that_fails_leaves_the_version_before_it(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        Store(tmp_path, [Schema("notes", [*NOTES.steps, "CREATE TABLE other (x INT); CREATE TABLE broken"])])
    store = Store(tmp_path, [NOTES])
    assert store.write_now(lambda tx: tx.one("SELECT count(*) FROM sqlite_master WHERE name = 'other'")) == (0,)


async def test_a_file_is_named_by_its_digest_and_kept_once(tmp_path: Path) -> None:
    store = Store(tmp_path, [])
    digest = await store.put_file(b"x" * 100_000)
    assert await store.put_file(bytearray(b"x" * 100_000)) == digest
    assert await store.put_file([b"x" * 50_000, b"", np.full(12_500, 0x78787878, "<u4").data]) == digest
    assert store.path_of(digest).read_bytes() == b"x" * 100_000
    assert [path.name for path in store.files.iterdir()] == [digest.hex()]
    assert store.path_of(digest).stat().st_mode & 0o777 == 0o400
    store.remove_file(digest)
    assert not list(store.files.iterdir())


async def test_pieces_are_written_one_after_the_other(tmp_path: Path) -> None:
    store = Store(tmp_path, [])
    numbers = np.arange(1000, dtype="<u4")
    digest = await store.put_file([b"head", b"", numbers.data, memoryview(b"tail")])
    whole = b"head" + numbers.tobytes() + b"tail"
    assert store.path_of(digest).read_bytes() == whole
    assert digest == hash_("fp.file", whole)
    named = await store.put_file([b"a", b"b"], bytes(32))
    assert named == bytes(32)
    assert store.path_of(named).read_bytes() == b"ab"


def test_a_stream_is_written_as_it_is_made_and_named_like_the_whole(tmp_path: Path) -> None:
    store = Store(tmp_path, [])
    seen: list[int] = []

    def pieces() -> Iterator[bytes]:
        for number in range(5):
            seen.append(sum(path.stat().st_size for path in store.files.iterdir()))
            yield bytes([number]) * 100_000

    whole = b"".join(bytes([number]) * 100_000 for number in range(5))
    digest = store.put_stream(pieces())
    assert seen == [0, 100_000, 200_000, 300_000, 400_000], "each piece is on its way before the next is made"
    assert digest == hash_("fp.file", whole) == store.put_stream(iter([whole])) == store.put_file_now(whole)
    assert [path.name for path in store.files.iterdir()] == [digest.hex()]
    assert store.path_of(digest).stat().st_mode & 0o777 == 0o400
    assert store.put_stream([]) == hash_("fp.file", b"")


def test_of_a_stream_that_fails_nothing_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path, [])

    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise KeyError("the source is gone")

    with pytest.raises(KeyError):
        store.put_stream(pieces())
    assert list(store.files.iterdir()) == []


async def test_two_streams_at_once_are_two_files(tmp_path: Path) -> None:
    store = Store(tmp_path, [])
    inner: list[bytes] = []

    def pieces() -> Iterator[bytes]:
        yield b"outer "
        inner.append(store.put_stream([b"inner"]))
        yield b"end"

    outer = store.put_stream(pieces())
    assert store.path_of(outer).read_bytes() == b"outer end"
    assert store.path_of(inner[0]).read_bytes() == b"inner"


def test_what_a_kill_left_of_a_file_is_in_nobodys_way(request: pytest.FixtureRequest) -> None:
    """Nobody but root may open it again, so this is seen as another user; pids repeat, as in a container."""
    program = (
        "import os, resource, signal, sys; from pathlib import Path; from fedpeer.store import Store\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "os.getpid = lambda: 7\n"
        "if sys.argv[2] == 'kill':\n"
        "    signal.signal(signal.SIGXFSZ, signal.SIG_DFL); store = Store(Path(sys.argv[1]), [])\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "else: store = Store(Path(sys.argv[1]), [])\n"
        "print(store.put_file_now(b'x' * 1000).hex())"
    )
    folder = Path(tempfile.mkdtemp())
    request.addfinalizer(lambda: shutil.rmtree(folder))
    folder.chmod(0o777)
    killed, again = (
        subprocess.run(
            [sys.executable, "-c", program, str(folder / "state"), how], capture_output=True, text=True, check=False
        )
        for how in ("kill", "go on")
    )
    assert killed.returncode == -signal.SIGXFSZ, killed.stderr
    assert again.returncode == 0, again.stderr
    assert [path.name for path in (folder / "state" / "files").iterdir()] == [again.stdout.strip()]


async def test_a_file_that_cannot_be_written_is_a_named_error_and_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path, [])
    store.files.rmdir()
    with pytest.raises(StoreError, match="files"):
        await store.put_file(b"x")


async def test_a_file_that_was_put_again_stays_until_it_is_claimed_though_another_removes_it(tmp_path: Path) -> None:
    store = Store(tmp_path, [])
    name = bytes(32)
    await store.put_file(b"a total", name)
    store.claimed(name)  # by the first of two jobs that have the same total
    await store.put_file(b"a total", name)
    store.remove_file(name)  # the first is over
    assert store.path_of(name).read_bytes() == b"a total"
    store.claimed(name)
    store.remove_file(name)
    assert not store.path_of(name).exists()
    store.close()
