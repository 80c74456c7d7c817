"""Databases, secrets, and what all sources have in common. PostgreSQL itself is in tests/system."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeer import artifact
from fedpeer.crypto import Secret
from fedpeer.data import csv, postgresql, secrets, source, sql
from fedpeer.data.catalog import Catalog
from fedpeer.data.database import Address
from fedpeer.errors import DataError, KeyFileError
from fedpeer.stage import Table
from fedpeer.store import Store

SQLITE = """
CREATE TABLE ward (id TEXT, age REAL, weight NUMERIC, smokes BOOLEAN, city TEXT, admitted DATE, scan BLOB);
INSERT INTO ward VALUES ('b', 41.5, 80, 1, 'Ulm', '2020-01-01', x'00'), ('a', NULL, 70.5, 0, NULL, NULL, NULL);
"""


@pytest.fixture
def database(tmp_path: Path) -> str:
    """The URI of an SQLite file, up to the question mark."""
    with sqlite3.connect(tmp_path / "ward.sqlite") as connection:
        connection.executescript(SQLITE)
    connection.close()
    return f"sqlite:///{tmp_path}/ward.sqlite"


def read(uri: str, id_column: str | None = None, text: tuple[str, ...] = ()) -> pa.Table:
    with source.opened(uri, id=id_column) as opened:
        kinds = source.choose_kinds(opened, id_column, None, text)
        return pa.Table.from_batches(source.rows(opened, kinds, id_column))


def refused(uri: str, id_column: str | None = None, text: tuple[str, ...] = ()) -> DataError:
    with pytest.raises(DataError) as caught:
        read(uri, id_column, text)
    return caught.value


# any database


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("/d/rows.csv", "file:///d/x/../rows.csv", True),
        ("/d/rows.csv", "/d/Rows.csv", False),
        ("postgresql://ann@db/ward?table=public.stay", "postgres://ben@DB:5432/ward?table=stay&sslmode=require", True),
        ("postgresql://ann@db/ward?table=stay", "postgresql://ann@db/ward?table=other.stay", False),
        ("postgresql://ann@db/ward?table=stay", "postgresql://ann@db/ward2?table=stay", False),
        ("mysql+pymysql://a@h/d?table=t", "mysql+mysqldb://b@h/d?table=t&charset=utf8", True),
        ("mysql://a@h/d?query=SELECT 1", "mysql://a@h/d?query=SELECT 2", False),
        ("sqlite:////d/x.db?table=t", "sqlite:////d/y/../x.db?table=t", True),
    ],
)  # fmt: skip
def test_one_table_has_one_identity_whoever_reads_it_and_how(one: str, other: str, same: bool) -> None:
    assert (source.identity(one) == source.identity(other)) == same


def test_a_query_is_read_in_the_order_of_its_ids(database: str) -> None:
    uri = f"{database}?query=SELECT id, age, weight, city FROM ward;"
    assert read(uri, "id").to_pydict() == {
        "id": ["a", "b"],
        "age": [None, 41.5],
        "weight": [70.5, 80.0],
        "city": [None, "Ulm"],
    }
    assert read(uri).column("id").to_pylist() == ["b", "a"]


def test_a_table_is_read_by_its_types(database: str, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "ward.sqlite") as connection:
        connection.executescript(
            "CREATE TABLE flags (n INTEGER, yes BOOLEAN); INSERT INTO flags VALUES (7, 1), (8, NULL)"
        )
    table = read(f"{database}?table=flags", "n")
    assert table.to_pydict() == {"n": ["7", "8"], "yes": [True, None]}
    assert table.schema.types == [pa.string(), pa.bool_()]


@pytest.mark.parametrize(
    ("rest", "says", "hint"),
    [
        ("?table=ward", "the column 'admitted' holds date", "CAST"),
        ("?query=SELECT scan FROM ward", "the column 'scan' holds bytes", "CAST"),
        ("?table=wrad", "no such table", "the database's own log"),
        ("?query=SELECT nothing FROM ward", "no such table, or the query", ""),
        ("?query=DELETE FROM ward", "no such table, or the query", ""),
        ("?query=SELECT id FROM ward WHERE id = 'z'", "no rows", ""),
        ("?query=SELECT 5 AS v UNION ALL SELECT 'x'", "row 2, column 'v': str in a column of numbers", ""),
        ("?query=SELECT 9e999 AS x", "row 1, column 'x': infinite", ""),
        ("", "which table or which query", ""),
        ("?table=ward%26query=SELECT 1", "no such table", ""),
        ("?table=ward&query=SELECT 1", "which table or which query", ""),
        ("?table=ward&password=hunter2", "says 'password', which is not known", "known, each once"),
        ("?table=ward&hunter2@h/d", "what is no option", "known, each once"),
        ("?table=ward&table=ward", "something twice", ""),
    ],
)
def test_what_cannot_be_read_is_named(database: str, rest: str, says: str, hint: str) -> None:
    error = refused(database + rest)
    assert says in error.message
    assert hint in error.hint
    assert "hunter2" not in error.message + error.hint


def test_ids_of_a_database_are_unique_and_there(database: str) -> None:
    assert (
        "row 2, column 'id': the same id as in row 1"
        in refused(f"{database}?query=SELECT 'x' AS id UNION ALL SELECT 'x'", "id").message
    )
    assert "a row without id" in refused(f"{database}?query=SELECT NULL AS id UNION ALL SELECT 'x'", "id").message
    assert "fractions" in refused(f"{database}?query=SELECT 1.5 AS id", "id").message


def test_a_database_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    assert "No such file" in refused(f"sqlite:///{tmp_path}/gone.sqlite?table=t").message
    assert "not an absolute path" in refused("sqlite:///gone.sqlite?table=t").message
    assert "not an absolute path" in refused("sqlite://?table=t").message
    assert list(tmp_path.iterdir()) == []
    assert "pymysql is not installed" in refused("mysql+pymysql://u@h/d?table=t").message
    assert "known neither" in refused("nonsense://h/d?table=t").message


def test_sqlite_is_opened_to_be_read_only(database: str) -> None:
    with source.opened(f"{database}?table=ward") as opened:
        assert isinstance(opened, sql.Source)
        with pytest.raises(Exception, match="readonly"):
            opened._connection.exec_driver_sql("DELETE FROM ward")


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for library in ("sqlalchemy", "adbc_driver_postgresql"):
        monkeypatch.setitem(sys.modules, library, None)
    assert "fedpeer[sql]" in refused("sqlite:////x?table=t").hint
    assert "fedpeer[postgres]" in refused("postgresql:///x?table=t").hint


def test_equal_content_is_one_version_whatever_holds_it(database: str, tmp_path: Path) -> None:
    from_database = read(f"{database}?query=SELECT id, age, city FROM ward", "id")
    path = tmp_path / "x.csv"
    path.write_text("id,age,city\na,,\nb,41.5,Ulm\n")
    assert artifact.dump(Table(read(str(path), "id"), "id", None)) == artifact.dump(Table(from_database, "id", None))


# passwords


@pytest.mark.parametrize("scheme", ["postgresql", "mysql", "sqlite", "file", "nonsense"])
async def test_a_password_in_a_uri_is_refused_and_not_repeated(tmp_path: Path, scheme: str, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    catalog = Catalog(Store(tmp_path / "state", Catalog.SCHEMAS), trio.to_thread.run_sync)
    for user in ("u:hunter2", ":hunter2", "u%40x:hunter2", "u:hun/hunter2", "u@x:hunter2"):
        with pytest.raises(DataError) as caught:
            await catalog.add("ward", f"{scheme}://{user}@host/d?table=t", None, None)
        assert "holds a password" in caught.value.message
        assert "--secret NAME" in caught.value.hint
        assert "hunter2" not in str(caught.value) + caught.value.hint + caplog.text
    assert await catalog.list() == []


async def test_only_the_name_of_a_secret_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / secrets.FOLDER
    folder.mkdir(mode=0o700)
    (folder / "clinic").touch(mode=0o600)
    (folder / "clinic").write_text("hunter2\n")
    given: list[tuple[bytes, str]] = []

    class Fake(sql.Source):
        def __init__(self, address: Address, password: Secret | None, id: str | None) -> None:  # noqa: A002
            assert password is not None
            given.append((password.reveal(), repr(password)))
            raise DataError("not today")

    monkeypatch.setattr(sql, "Source", Fake)
    catalog = Catalog(Store(tmp_path / "state", Catalog.SCHEMAS), trio.to_thread.run_sync, folder)
    with pytest.raises(DataError, match="not today"):
        await catalog.add("ward", "mysql://u@h/d?table=t", None, None, secret="clinic")
    assert given == [(b"hunter2", "<secret>")]
    for path in (tmp_path / "state").rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes()


async def test_a_file_needs_no_secret_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("x\n1\n")
    (tmp_path / secrets.FOLDER).mkdir(mode=0o700)
    (tmp_path / secrets.FOLDER / "clinic").touch(mode=0o600)
    (tmp_path / secrets.FOLDER / "clinic").write_text("hunter2")
    catalog = Catalog(Store(tmp_path / "state", Catalog.SCHEMAS), trio.to_thread.run_sync, tmp_path / secrets.FOLDER)
    with pytest.raises(DataError, match="needs no secret"):
        await catalog.add("x", str(tmp_path / "x.csv"), None, None, secret="clinic")
    with pytest.raises(KeyFileError, match="secrets/ward does not exist"):
        await catalog.add("x", str(tmp_path / "x.csv"), None, None, secret="ward")


@pytest.mark.parametrize(
    "uri",
    ["postgresql://u:1?hunter2@h/d?table=t", "postgresql://u:hunter?hunter2@h/d",
     "postgresql://[hunter2?table=t", "file://[hunter2", "data/hunter2@x.csv"],
)  # fmt: skip
def test_what_is_no_uri_is_refused_without_a_fault(uri: str) -> None:
    error = refused(uri)
    assert uri.startswith(("file", "data")) or "hunter2" not in error.message + error.hint


@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [
        (b"hunter2\n", 0o644, "0644: others may use"),
        (b"hunter2\n", 0o620, "0620: others may use"),
        (b"", 0o600, "not one line"),
        (b"\n", 0o600, "not one line"),
        (b"hunter2\nhunter3\n", 0o600, "not one line"),
        (b"hunter2\xff", 0o600, "not one line"),
        (b"x" * 1025, 0o600, "not one line"),
    ],
)
def test_a_secret_that_others_could_read_or_that_is_none_is_refused(
    tmp_path: Path, content: bytes, mode: int, says: str
) -> None:
    folder = tmp_path / secrets.FOLDER
    folder.mkdir(mode=0o700)
    (folder / "clinic").write_bytes(content)
    (folder / "clinic").chmod(mode)
    with pytest.raises(KeyFileError) as caught:
        secrets.load(folder, "clinic")
    assert says in caught.value.message
    assert "hunter" not in caught.value.message + caught.value.hint


def test_a_secret_is_in_a_folder_of_its_owner_and_no_link(tmp_path: Path) -> None:
    folder = tmp_path / secrets.FOLDER
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    (folder / "clinic").touch(mode=0o600)
    (folder / "clinic").write_text("hunter2")
    with pytest.raises(KeyFileError, match="can be read or entered by others"):
        secrets.load(folder, "clinic")
    folder.chmod(0o700)
    assert secrets.load(folder, "clinic").reveal() == b"hunter2"
    (folder / "link").symlink_to(folder / "clinic")
    with pytest.raises(KeyFileError, match="link"):
        secrets.load(folder, "link")
    for name in ("../state/x", "", "a/b", "-x"):
        with pytest.raises(KeyFileError, match="cannot name"):
            secrets.load(folder, name)


def test_a_credential_of_systemd_counts_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tmp_path / "credentials"
    given.mkdir()
    (given / "clinic").write_text("from systemd")
    (given / "clinic").chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(given))
    assert secrets.load(tmp_path / "nowhere", "clinic").reveal() == b"from systemd"
    with pytest.raises(KeyFileError, match="nowhere/other"):
        secrets.load(tmp_path / "nowhere", "other")


# the address of PostgreSQL


def conninfo(uri: str, password: bytes | None = None) -> str:
    address = Address.parse(uri, postgresql.OPTIONS)
    return postgresql._conninfo(address, Secret(password) if password is not None else None)


def test_over_the_network_a_server_must_prove_who_it_is() -> None:
    far = conninfo("postgresql://u@db.example:6432/d?table=t")
    assert "host='db.example' port='6432' dbname='d' user='u'" in far
    assert "sslmode='verify-full'" in far
    assert "sslrootcert='system'" in far
    assert "sslrootcert='/ca.pem'" in conninfo("postgresql://u@db.example/d?table=t&sslrootcert=/ca.pem")
    for mode in ("disable", "allow", "prefer", ""):
        with pytest.raises(DataError, match="would not protect it"):
            conninfo(f"postgresql://u@db.example/d?table=t&sslmode={mode}")
        with pytest.raises(DataError, match="would not protect it"):
            conninfo(f"postgresql://u@/d?table=t&host=db.example&sslmode={mode}")
    for here in ("localhost", "127.0.0.1", "[::1]"):
        assert "sslmode" not in conninfo(f"postgresql://u@{here}/d?table=t")
    assert "sslmode" not in conninfo("postgresql:///d?table=t")
    assert "host='/run/postgresql'" in conninfo("postgresql:///d?host=/run/postgresql&table=t")


def test_several_hosts_are_not_taken_for_this_one() -> None:
    for hosts in ("/run/postgresql,db.example", "localhost,db.example"):
        with pytest.raises(DataError, match="several hosts"):
            conninfo(f"postgresql:///d?table=t&host={hosts}&sslmode=disable")


@settings(deadline=None)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1))
def test_a_value_stays_within_its_quotes(value: str) -> None:
    said = conninfo("postgresql://u@/d?table=t", value.encode())
    start = said.index("password='") + len("password='")
    read_back, at = "", start
    while said[at] != "'":
        at += said[at] == "\\"
        read_back += said[at]
        at += 1
    assert read_back == value
    assert said[at + 1 :].startswith(" connect_timeout='")


def test_a_query_is_what_follows_its_name() -> None:
    address = Address.parse(
        "postgresql:///d?query=SELECT a + b AS c, d #> '{}' FROM t WHERE x%26y = 1%25 ;&host=/run", postgresql.OPTIONS
    )
    assert address.query == "SELECT a + b AS c, d #> '{}' FROM t WHERE x&y = 1%"
    assert address.options == {"host": "/run"}
    assert address.place == "postgresql:///d (its query)"


@pytest.mark.parametrize(
    "uri", ["postgresql://h:port/d?table=t", "postgresql://[::1/d?table=t", "postgresql:///d?table=%00"]
)
def test_an_address_that_is_none_is_refused(uri: str) -> None:
    with pytest.raises(DataError):
        Address.parse(uri, postgresql.OPTIONS)


# what all sources have in common


class Lines:
    """A source of ids, in batches of the sizes that are given."""

    place = "/lines"
    names: list[str] = ["id"]  # noqa: RUF012

    def __init__(self, ids: list[str], size: int) -> None:
        self.ids, self.size, self.prints = ids, size, iter(["1", "1"])

    def kinds(self) -> dict[str, str]:
        return {"id": "text"}

    def batches(self, kinds: Mapping[str, str], size: int) -> Iterator[pa.RecordBatch]:
        for start in range(0, len(self.ids), self.size):
            yield pa.record_batch([pa.array(self.ids[start : start + self.size], pa.string())], names=list(kinds))

    def row(self, index: int) -> int:
        return index + 1

    def fingerprint(self) -> str:
        return next(self.prints)

    def close(self) -> None: ...


@settings(deadline=None)
@given(
    ids=st.lists(st.text(max_size=2), min_size=1, max_size=60),
    size=st.integers(1, 7),
    clash=st.booleans(),
    many=st.integers(1, 3),
)
def test_the_same_id_is_found_however_rows_come_and_whatever_their_hashes(
    ids, size: int, clash: bool, many: int
) -> None:
    def hashed(value: str) -> int:
        return len(value) if clash else hash(value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "hash", hashed, raising=False)
        patch.setattr(source, "MANY", many)
        if len(set(ids)) == len(ids):
            assert sum(batch.num_rows for batch in source.rows(Lines(ids, size), {"id": "text"}, "id")) == len(ids)
            return
        with pytest.raises(DataError) as caught:
            list(source.rows(Lines(ids, size), {"id": "text"}, "id"))
    words = caught.value.message.replace(",", "").split()
    again, first = int(words[words.index("row") + 1]), int(words[-1])
    assert first < again
    assert ids[first - 1] == ids[again - 1]


def test_a_source_that_changed_while_it_was_read_is_refused(tmp_path: Path) -> None:
    changing = Lines(["a"], 1)
    changing.prints = iter(["1", "2"])
    with pytest.raises(DataError, match="changed while it was read"):
        list(source.rows(changing, {"id": "text"}, None))


@pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
async def test_of_a_file_that_changes_while_it_is_read_no_snapshot_is_kept(
    tmp_path: Path, name: str, monkeypatch
) -> None:
    path = tmp_path / name

    def write(value: int) -> None:
        if name.endswith("csv"):
            path.write_text(f"x\n{value}\n")
        else:
            pa.parquet.write_table(pa.table({"x": [value]}), path)

    write(1)
    catalog = Catalog(Store(tmp_path / "state", Catalog.SCHEMAS), trio.to_thread.run_sync)
    await catalog.add("x", str(path), "x", None)
    hashes = source._hashes

    def slow(ids: pa.Array) -> Iterable[int]:
        write(2)
        os.utime(path, ns=(1, 1))
        return hashes(ids)

    monkeypatch.setattr(source, "_hashes", slow)
    with pytest.raises(DataError, match="changed while it was read"):
        await catalog.snapshot("x")
    assert list((tmp_path / "state/files").iterdir()) == []


def test_places_are_right_beyond_the_first_batch(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(csv, "BLOCK_BYTES", 64)
    monkeypatch.setattr(source, "BATCH_ROWS", 10)
    lines = [f"i{n},{n}" for n in range(100)]

    def refused_with(index: int, line: str, kind: str) -> str:
        mended = [*lines[:index], line, *lines[index + 1 :]]
        path = tmp_path / f"x.{kind}"
        if kind == "csv":
            path.write_text("id,x\n" + "\n".join(mended) + "\n")
        else:
            ids, values = zip(*(cell.split(",") for cell in mended), strict=True)
            pa.parquet.write_table(pa.table({"id": [i or None for i in ids], "x": [float(v) for v in values]}), path)
        return refused(str(path), "id").message

    assert "row 72, column 'x': not a number" in refused_with(70, "i70,?", "csv")
    assert "row 72, column 'id': the same id as in row 5" in refused_with(70, "i3,1", "csv")
    assert "row 72, column 'id': a row without id" in refused_with(70, ",1", "csv")
    assert "row 72 has 3 cells" in refused_with(70, "i70,1,2", "csv")
    assert "row 71, column 'x': NaN" in refused_with(70, "i70,nan", "parquet")
    assert "row 71, column 'id': the same id as in row 4" in refused_with(70, "i3,1", "parquet")
    assert "row 71, column 'id': a row without id" in refused_with(70, ",1", "parquet")


def test_utf8_is_checked_across_blocks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(csv, "BLOCK_BYTES", 17)
    path = tmp_path / "x.csv"
    text = "name,t\n" + "\n".join(f"äöü{n},€" for n in range(50)) + "\n"
    path.write_text(text)
    assert read(str(path)).num_rows == 50
    path.write_bytes(text.encode().replace("äöü30".encode(), b"\xc3\xc3"))
    assert "row 32 is not UTF-8" in refused(str(path)).message
    path.write_bytes(text.encode() + b"\xe2\x82")
    assert "row 52 is not UTF-8" in refused(str(path)).message


def test_a_name_with_a_dot_is_the_name_of_one_column(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"a": ["x", "x"], "a.b": [1, 2], "b": [3, 4]}), tmp_path / "x.parquet")
    assert read(str(tmp_path / "x.parquet")).column_names == ["a", "a.b", "b"]
    assert "column 'a': the same id" in refused(str(tmp_path / "x.parquet"), "a").message
