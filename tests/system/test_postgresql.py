"""Datasets in a real PostgreSQL, which the tests start for themselves: on a unix socket, with nothing shared."""

from __future__ import annotations

import logging
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import trio

from fedpeer.crypto import Secret
from fedpeer.data import postgresql, secrets, source
from fedpeer.data.catalog import Catalog
from fedpeer.errors import DataError
from fedpeer.store import Store

pytestmark = pytest.mark.system

PASSWORD = "hunter2 'and\\ more"
SQL = f"""
CREATE ROLE reader LOGIN PASSWORD '{PASSWORD.replace("'", "''")}';
CREATE ROLE nobody LOGIN PASSWORD '{PASSWORD.replace("'", "''")}';
CREATE TYPE ward AS ENUM ('north', 'south');
CREATE DOMAIN grade AS integer CHECK (VALUE > 0);
CREATE SCHEMA "odd Schema";
CREATE TABLE patient (
    id bigint, age int, weight numeric(6, 2), smokes boolean, city text, code varchar(9), pad char(3), part ward,
    level grade, ratio real, dose double precision, mark uuid
);
INSERT INTO patient VALUES
    (9007199254740993, 40, 80.25, true, 'Ulm', 'x', 'a', 'north', 1, 0.5, 1e300,
     '00000000-0000-0000-0000-000000000001'),
    (10, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
    (2, 35, 70, false, 'Bonn', 'ä', 'bc', 'south', 2, 0.25, -1.5, '00000000-0000-0000-0000-000000000002');
CREATE TABLE "odd Schema"."odd ""table" ("odd ""column" int);
INSERT INTO "odd Schema"."odd ""table" VALUES (7);
CREATE TABLE stay (id int, admitted timestamptz, discharged date, notes json);
INSERT INTO stay VALUES (1, now(), now(), '{{}}');
CREATE TABLE empty (x int);
CREATE TABLE ill (id text, n numeric, d double precision, t text);
INSERT INTO ill VALUES ('a', 1, 1, 'cancer'), ('b', 'NaN', 'Infinity', '5');
GRANT USAGE ON SCHEMA "odd Schema" TO reader;
GRANT SELECT ON ALL TABLES IN SCHEMA public, "odd Schema" TO reader;
"""


class Server:
    """A PostgreSQL of our own, as another user when we are root, for it refuses to run as that."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.programs, self.folder = programs, folder
        self.data = folder / "data"
        self.user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
        if os.geteuid() == 0:
            shutil.chown(folder, self.user)
        self.run("initdb", "-D", self.data, "-A", "trust", "-U", "owner", "--no-sync", "-E", "UTF8", "--locale=C.UTF-8")
        (self.data / "pg_hba.conf").write_text("local all owner trust\nlocal all all scram-sha-256\n")
        self.start()
        self.sql(SQL)

    def run(self, program: str, *arguments: object, text: str = "") -> str:
        as_user = ["runuser", "-u", self.user, "--"] if os.geteuid() == 0 else []
        done = subprocess.run(
            [*as_user, self.programs / program, *map(str, arguments)],
            input=text, capture_output=True, text=True, cwd="/", timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses='' -c fsync=off"
        self.run("pg_ctl", "-D", self.data, "-l", self.data / "log", "-o", options, "-w", "start")

    def stop(self) -> None:
        self.run("pg_ctl", "-D", self.data, "-m", "immediate", "-w", "stop")

    def sql(self, text: str) -> str:
        return self.run(
            "psql", "-h", self.folder, "-U", "owner", "-d", "postgres", "-AtqX", "-v", "ON_ERROR_STOP=1", text=text
        )

    def uri(self, rest: str, *, user: str = "reader", database: str = "postgres") -> str:
        return f"postgresql://{user}@/{database}?host={self.folder}&{rest}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    program = found[-1] if found else Path(shutil.which("initdb") or "")
    if not program.name:
        pytest.skip("no PostgreSQL: apt-get install postgresql (./scripts/test system does it)")
    folder = Path(tempfile.mkdtemp(prefix="fedpeer-pg-", dir="/tmp"))  # a socket's path is short
    folder.chmod(0o755)
    server = Server(program.parent, folder)
    yield server
    server.stop()
    shutil.rmtree(folder)


def read(
    server: Server,
    rest: str,
    id_column: str | None = None,
    *,
    text: tuple[str, ...] = (),
    password: str = PASSWORD,
    **more: str,
) -> pa.Table:
    with source.opened(server.uri(rest, **more), Secret(password.encode()), id=id_column) as opened:
        kinds = source.choose_kinds(opened, id_column, None, text)
        return pa.Table.from_batches(source.rows(opened, kinds, id_column))


def refused(server: Server, rest: str, id_column: str | None = None, **more: object) -> DataError:
    with pytest.raises(DataError) as caught:
        read(server, rest, id_column, **more)
    error = caught.value
    for hidden in ("hunter2", "cancer", "LINE 1", "libpq"):
        assert hidden not in error.message + error.hint
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__, (
        "a log with the driver's own words would quote what it was given"
    )
    return error


# what is read


def test_a_table_is_read_by_the_types_of_its_columns(server: Server) -> None:
    table = read(server, "table=patient", "id")
    assert table.to_pydict() == {
        "id": ["10", "2", "9007199254740993"],
        "age": [None, 35.0, 40.0],
        "weight": [None, 70.0, 80.25],
        "smokes": [None, False, True],
        "city": [None, "Bonn", "Ulm"],
        "code": [None, "ä", "x"],
        "pad": [None, "bc", "a"],
        "part": [None, "south", "north"],
        "level": [None, 2.0, 1.0],
        "ratio": [None, 0.25, 0.5],
        "dose": [None, -1.5, 1e300],
        "mark": [None, "00000000-0000-0000-0000-000000000002", "00000000-0000-0000-0000-000000000001"],
    }


def test_a_query_may_cast_join_and_compute(server: Server) -> None:
    query = (
        "SELECT p.id, extract(epoch from s.admitted) > 0 AS later, s.discharged::text AS day FROM patient p, stay s;"
    )
    table = read(server, f"query={query}", "id")
    assert table.column("later").to_pylist() == [True] * 3
    assert read(server, "query=SELECT age FROM patient -- a remark").num_rows == 3
    assert read(server, "query=SELECT age FROM patient", text=("age",)).column("age").to_pylist() == ["40", None, "35"]


def test_names_may_be_odd(server: Server) -> None:
    assert read(server, 'table=odd Schema.odd "table').to_pydict() == {'odd "column': [7.0]}


def test_many_rows_come_in_batches(server: Server) -> None:
    query = "SELECT i AS id, sqrt(i) AS root, repeat('x', 100) AS t FROM generate_series(1, 300000) AS i"
    with source.opened(server.uri(f"query={query}"), Secret(PASSWORD.encode())) as opened:
        sizes = [batch.num_rows for batch in opened.batches(opened.kinds(), source.BATCH_ROWS)]
    assert sum(sizes) == 300_000
    assert len(sizes) > 5


def test_it_reads_in_one_transaction_that_cannot_write(server: Server) -> None:
    asked = (
        "SELECT current_setting('transaction_isolation') AS isolation, current_setting('transaction_read_only') AS ro,"
        " current_setting('statement_timeout') AS patience"
    )
    assert read(server, f"query={asked}").to_pylist() == [
        {"isolation": "repeatable read", "ro": "on", "patience": "1h"}
    ]
    server.sql("CREATE TABLE moving AS SELECT 1 AS x; GRANT ALL ON moving TO reader")
    server.sql("CREATE FUNCTION moved() RETURNS int LANGUAGE sql AS 'INSERT INTO moving VALUES (9) RETURNING x'")
    assert "would write" in refused(server, "query=SELECT moved() AS x").message
    with source.opened(server.uri("table=moving"), Secret(PASSWORD.encode())) as opened:
        server.sql("INSERT INTO moving VALUES (2)")
        assert sum(batch.num_rows for batch in opened.batches(opened.kinds(), 10)) == 1
        server.sql("DELETE FROM moving")
        assert sum(batch.num_rows for batch in opened.batches(opened.kinds(), 10)) == 1


# what is refused


@pytest.mark.parametrize(
    ("rest", "says", "hint"),
    [
        ("table=stay", "the column 'admitted' holds timestamp with time zone", "to_char or extract"),
        ("query=SELECT discharged FROM stay", "the column 'discharged' holds date", "to_char or extract"),
        ("query=SELECT notes FROM stay", "the column 'notes' holds json", "a cast to text"),
        ("query=SELECT ARRAY[1] AS a", "the column 'a' holds integer[]", "a cast to text"),
        ("table=empty", "has columns and no rows", ""),
        ("table=nowhere", "there is no such table", "SCHEMA.TABLE"),
        ("table=nowhere.patient", "there is no such table", "SCHEMA.TABLE"),
        ("query=SELECT height FROM patient", "names a column that is not there", ""),
        ("query=SELECT id, id FROM patient", "two columns are named 'id'", ""),
        ("query=SELECT 1 AS a) AS t; DROP TABLE empty; --", "not one that the server understands", ""),
        ("query=DROP TABLE empty", "not one that the server understands", ""),
        ("query=SELECT n FROM ill", "row 2, column 'n': NaN", ""),
        ("query=SELECT d FROM ill", "row 2, column 'd': infinite", ""),
        ("query=SELECT '-Infinity'::numeric AS x", "row 1, column 'x': infinite", ""),
        ("query=SELECT 1e400::numeric AS x", "cannot be cast", ""),
        ("query=SELECT t::numeric AS x FROM ill", "cannot be cast", ""),
        ("query=SELECT 1 / (i - 80000) AS x FROM generate_series(1, 100000) AS i", "divides by zero", ""),
        (
            "query=SELECT regexp_replace('a', repeat('(', i), '') AS x FROM generate_series(1, 3) AS i",
            "broke it",
            "log",
        ),
        ("query=SELECT * FROM pg_authid", "this user may not read it", "GRANT"),
    ],
)
def test_what_cannot_be_read_is_named(server: Server, rest: str, says: str, hint: str) -> None:
    error = refused(server, rest)
    assert says in error.message
    assert hint in error.hint
    assert read(server, "query=SELECT 1 AS still_there FROM empty RIGHT JOIN (SELECT 1) AS one ON true").num_rows == 1


def test_ids_are_there_and_unique(server: Server) -> None:
    assert "a row without id" in refused(server, "query=SELECT NULL::text AS id UNION ALL SELECT 'a'", "id").message
    error = refused(server, "query=SELECT i %25 99999 AS id FROM generate_series(0, 100000) AS i", "id")
    assert "the same id as in row" in error.message
    assert "no column 'di' (id)" in refused(server, "table=patient", "di").message


def test_who_cannot_come_in_is_named(server: Server) -> None:
    assert "the user or the password is refused" in refused(server, "table=patient", password="wrong").message
    assert "the user or the password is refused" in refused(server, "table=patient", user="stranger").message
    assert "no such database" in refused(server, "table=patient", user="owner", database="nowhere").message
    assert "may not read it" in refused(server, "table=patient", user="nobody").message
    with (
        pytest.raises(DataError, match="the user or the password is refused"),
        source.opened(server.uri("table=empty")),
    ):
        pass


def test_a_server_that_is_away_is_named(server: Server) -> None:
    with source.opened(server.uri("table=patient"), Secret(PASSWORD.encode())) as opened:
        kinds = opened.kinds()
        server.stop()
        try:
            with pytest.raises(DataError, match=r"stopping or starting|connection broke"):
                list(opened.batches(kinds, 10))
            assert "the server cannot be reached" in refused(server, "table=patient").message
        finally:
            server.start()


def test_what_takes_too_long_ends(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql, "STATEMENT_S", 1)
    started = time.monotonic()
    assert "not read within" in refused(server, "query=SELECT pg_sleep(20)::text AS x").message
    assert time.monotonic() - started < 10


# as datasets


async def test_a_dataset_keeps_the_name_of_its_secret_and_says_what_changed(
    server: Server, tmp_path: Path, caplog
) -> None:
    caplog.set_level(logging.DEBUG)
    folder = tmp_path / secrets.FOLDER
    folder.mkdir(mode=0o700)
    (folder / "clinic").touch(mode=0o600)
    (folder / "clinic").write_text(PASSWORD + "\n")
    server.sql(
        "CREATE TABLE changing AS SELECT i AS id, i * 1.5 AS x FROM generate_series(1, 250) AS i;"
        "GRANT SELECT ON changing TO reader"
    )
    store = Store(tmp_path / "state", Catalog.SCHEMAS)
    catalog = Catalog(store, trio.to_thread.run_sync, folder)
    view = await catalog.add("ward", server.uri("table=changing"), "id", "x", secret="clinic")
    assert (view.rows, view.columns, view.secret) == (250, [["id", "text"], ["x", "number"]], "clinic")
    first = await catalog.snapshot("ward")

    server.sql("UPDATE changing SET x = x; VACUUM FULL changing")
    assert await catalog.snapshot("ward") == first, "the same content, however the server keeps it"
    server.sql("UPDATE changing SET x = 0 WHERE id = 7")
    assert (await catalog.snapshot("ward")).version != first.version

    for change, says in [
        ("ALTER TABLE changing ALTER x TYPE text", "the column is of text now, and was a number"),
        ("ALTER TABLE changing DROP x", r"not those it was added with \(x\)"),
        ("DROP TABLE changing", "there is no such table"),
    ]:
        server.sql(change)
        with pytest.raises(DataError, match=says):
            await catalog.snapshot("ward")
    (folder / "clinic").chmod(0o644)
    with pytest.raises(DataError, match="others may use what is in it"):
        await catalog.snapshot("ward")
    for path in (tmp_path / "state").rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes()
    assert "hunter2" not in caplog.text
    assert b"hunter2" not in Path("/proc/self/cmdline").read_bytes() + Path("/proc/self/environ").read_bytes()
