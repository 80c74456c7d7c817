from __future__ import annotations

import os
import threading
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from fedpeer import artifact
from fedpeer.data import columns, csv, offers, source
from fedpeer.data.catalog import Catalog
from fedpeer.data.source import nearest
from fedpeer.errors import DataError, NotFound, UsageError
from fedpeer.stage import Table
from fedpeer.store import Store


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(Store(tmp_path / "state", Catalog.SCHEMAS), trio.to_thread.run_sync)


@pytest.fixture
def write(tmp_path: Path):
    """Write text or bytes as a file and return its path as text."""

    def write(content: str | bytes, name: str = "data.csv") -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def read(uri: str, id_column: str | None, label: str | None, text=()) -> Table:
    """The source as a table in memory."""
    with source.opened(uri) as opened:
        kinds = source.choose_kinds(opened, id_column, label, text)
        return Table(pa.Table.from_batches(source.rows(opened, kinds, id_column)), id_column, label)


def refused(uri: str, id_column: str | None = None, label: str | None = None) -> DataError:
    with pytest.raises(DataError) as caught:
        read(uri, id_column, label)
    assert Path(uri).name in caught.value.message
    return caught.value


GOOD = "id,age,smokes,city,sick\na1,40,true,Ulm,0\na2,,FALSE,,1\na3,3.5e1,,Bonn,1\n"


# what is read


async def test_a_dataset_is_added_shown_and_removed(catalog: Catalog, write) -> None:
    view = await catalog.add("ward", write(GOOD), "id", "sick")
    assert (view.rows, view.id, view.label) == (3, "id", "sick")
    kinds = [["id", "text"], ["age", "number"], ["smokes", "boolean"], ["city", "text"], ["sick", "number"]]
    assert view.columns == kinds
    assert await catalog.list() == [view] == [await catalog.get("ward")]
    await catalog.remove("ward")
    assert await catalog.list() == []


async def test_what_is_offered_can_be_changed_and_nothing_else_of_it_is(catalog: Catalog, write) -> None:
    added = await catalog.add("ward", write(GOOD), "id", "sick")
    assert await catalog.offers() == offers.of([])
    told: list[object] = []
    view = await catalog.offer("ward", True, record=lambda _, facts: told.append(facts))
    assert view == msgspec.structs.replace(added, offered=True) == await catalog.get("ward")
    assert [offer.name for offer in (await catalog.offers()).datasets] == ["ward"]
    await catalog.offer("ward", False)
    assert (await catalog.offers(), await catalog.get("ward")) == (offers.of([]), added)
    assert told == [{"dataset": "ward", "offered": True}]
    with pytest.raises(NotFound, match="there is no dataset"):
        await catalog.offer("word", True)


def test_cells_are_numbers_texts_truth_values_and_nulls(write) -> None:
    table = read(write(GOOD), "id", "sick")
    assert table.data.to_pydict() == {
        "id": ["a1", "a2", "a3"],
        "age": [40.0, None, 35.0],
        "smokes": [True, False, None],
        "city": ["Ulm", None, "Bonn"],
        "sick": [0.0, 1.0, 1.0],
    }
    assert table.features == ["age", "smokes", "city"]
    assert table.ids() == ["a1", "a2", "a3"]


def test_a_byte_order_mark_windows_lines_blank_lines_and_spaces_change_nothing(write) -> None:
    plain = read(write(GOOD), "id", "sick")
    dressed = "\ufeff" + GOOD.replace(",", " , ").replace("\n", "\r\n\r\n")
    assert read(write(dressed), "id", "sick").data.equals(plain.data)


def test_lines_within_quotes_may_fall_on_any_boundary(write) -> None:
    cells = ["line\n" * n for n in range(300)]
    uri = write("t,n\n" + "".join(f'"{cell}x",{n}\n' for n, cell in enumerate(cells)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv, "BLOCK_BYTES", 2000)
        assert read(uri, None, None).data.column("t").to_pylist() == [cell + "x" for cell in cells]


def test_na_is_missing_among_numbers_and_a_word_among_texts(write) -> None:
    table = read(write("x,country\n1,NA\nNA,DE\nNULL,FR\n2,NA\n4,IT\n"), None, None)
    assert table.data.to_pydict() == {"x": [1.0, None, None, 2.0, 4.0], "country": ["NA", "DE", "FR", "NA", "IT"]}


def test_ids_that_look_like_numbers_keep_their_zeros(write) -> None:
    assert read(write("id,x\n007,1\n7,2\n"), "id", None).ids() == ["007", "7"]


def test_a_column_can_be_declared_as_text(write) -> None:
    uri = write("grade,x\n1,1\n2,1\n3+,1\n")
    assert "--text grade" in refused(uri).hint
    assert read(uri, None, None, text=["grade"]).data.column("grade").to_pylist() == ["1", "2", "3+"]


def test_parquet_is_read_by_its_types(write, tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": pa.array([17.0, 18.0]),
            "n": pa.array([1, None], pa.int32()),
            "f": pa.array([0.5, 1.5], pa.float32()),
            "b": [True, None],
            "t": pa.array(["a", "b"]).dictionary_encode(),
            "d": pa.array([0, 1], pa.date32()),
        }
    )
    pa.parquet.write_table(table, tmp_path / "x.parquet")
    got = read((tmp_path / "x.parquet").as_uri(), "id", None)
    assert got.data.to_pydict() == {
        "id": ["17", "18"],
        "n": [1.0, None],
        "f": [0.5, 1.5],
        "b": [True, None],
        "t": ["a", "b"],
        "d": ["1970-01-01", "1970-01-02"],
    }
    assert set(got.data.schema.types) <= set(columns.TYPES.values())


def test_csv_and_parquet_of_one_content_are_one_version(write, tmp_path: Path) -> None:
    table = read(write(GOOD), "id", "sick")
    pa.parquet.write_table(table.data, tmp_path / "x.parquet")
    assert artifact.dump(read(str(tmp_path / "x.parquet"), "id", "sick")) == artifact.dump(table)


# what is refused, and how


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("id,x\n", "no rows"),
        ("id,x,x\n1,2,3\n", "two columns are named 'x'"),
        ("id, id\n1,2\n", "two columns are named 'id'"),
        (",x\n1,2\n", "column 1 has no name"),
        ("id,a\x1bb\n1,2\n", "column 2 is too long or holds control"),
        ("id;x\n1;2\n", "one column"),
        ("id,x\n1,2\n3\n", "row 3 has 1 cells, the header has 2"),
        ('id,x\n1,"2\n2"\n\n3,4,5\n', "row 5 has 3 cells"),
        ('id,x\n1,2\n3,"4\n5,6\n', "row 3: unexpected end of data"),
        ("id,x\n1,2\n3,é\n".encode("latin-1"), "row 3 is not UTF-8"),
        ("id,x\n1,2\n".encode("utf-16"), "is UTF-16"),
        ("id,x\n1,2\n2," + "y" * 70_000 + "\n3,4\n", "row 3, column 'x': not a number"),
        ("id,x\n1,2\n2," + "y" * 9_000_000 + "\n", "row 3: field larger than field limit"),
        ("id,x\n1,a\n2," + "y" * 70_000 + "\n", "row 3, column 'x': more than 64 KiB in one cell"),
        ("id,x\n1,2\n2,3\n3,old\n", "row 4, column 'x': not a number"),
        ('id,x\n"1\n1",2\n2,3\n\n3,old\n', "row 6, column 'x': not a number"),
        ("id,x\n1,2\n2,NaN\n", "row 3, column 'x': NaN"),
        ("id,x\n1,-Infinity\n2,1\n", "row 2, column 'x': infinite"),
        ("id,x\n1,1\n2,1e400\n", "row 3, column 'x': infinite, or too large"),
        ("id,x\n1,true\n2,false\n3,yes\n", "row 4, column 'x': neither true nor false"),
        ("id,x\n1,2\n2,3\n\n1,4\n", "row 5, column 'id': the same id as in row 2"),
        ("id,x\n1,2\n ,3\n", "row 3, column 'id': a row without id"),
    ],
)
def test_bad_csv_is_refused_with_its_place(write, content: str | bytes, says: str) -> None:
    assert says in refused(write(content), "id").message


def test_bad_parquet_is_refused_with_its_place(write, tmp_path: Path) -> None:
    def parquet(**data) -> str:
        pa.parquet.write_table(pa.table(data), tmp_path / "x.parquet")
        return str(tmp_path / "x.parquet")

    assert "row 2, column 'x': NaN" in refused(parquet(x=pa.array([1.0, float("nan")]))).message
    assert "row 1, column 'x': infinite" in refused(parquet(x=pa.array([-np.inf, 1.0]))).message
    assert "column 'x' holds list" in refused(parquet(x=[[1.0]])).message
    assert "row 3, column 'i': the same id as in row 1" in refused(parquet(i=["a", "b", "a"]), "i").message
    assert "fractions" in refused(parquet(i=[1.5, 2.0]), "i").message
    assert "not a Parquet file" in refused(write(b"PAR1 no", "y.parquet")).message
    whole = Path(parquet(x=list(range(1000)))).read_bytes()
    assert "not a Parquet file" in refused(write(whole[:-40], "z.parquet")).message


def test_an_error_never_repeats_a_value(write) -> None:
    for content in ("id,x\n1,2\nsecret,secret\nsecret,3\n", "id,x\nsecret,1,2\n", 'id,x\n1,"secret\n'):
        error = refused(write(content), "id")
        assert "secret" not in error.message + error.hint


@pytest.mark.parametrize(
    ("id_column", "label", "says", "hint"),
    [("aeg", None, "no column 'aeg' (id)", "'age'"), (None, "sickk", "(label)", "'sick'"), ("id", "id", "both", "")],
)
def test_an_unknown_column_is_refused_with_the_nearest_name(write, id_column, label, says: str, hint: str) -> None:
    error = refused(write(GOOD), id_column, label)
    assert says in error.message
    assert hint in error.hint


def test_sources_that_are_no_files_are_refused(write, tmp_path: Path) -> None:
    write("x\n1\n", "data.txt")
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    for uri, says in [
        ("postgresql://host/data.csv", "which table"),
        ("nonsense://host/data.csv?table=t", "known neither"),
        ("file://host/data.csv", "only files"),
        ("data.csv", "not an absolute path"),
        (f"{tmp_path}/data.txt", "ends in none of .csv, .parquet"),
        (f"{tmp_path}/gone.csv", "No such file"),
        (f"{tmp_path}/folder.csv", "is not a file"),
        (f"{tmp_path}/pipe.csv", "is not a file"),
    ]:
        assert says in refused(uri).message


async def test_names_are_unique_well_formed_and_the_nearest_is_offered(catalog: Catalog, write) -> None:
    uri = write(GOOD)
    await catalog.add("ward", uri, "id", "sick")
    with pytest.raises(UsageError, match="already"):
        await catalog.add("ward", uri, "id", "sick")
    for name in ("", "a b", "../x", "x" * 65):
        with pytest.raises(UsageError, match="cannot name"):
            await catalog.add(name, uri, "id", "sick")
    for call in (catalog.get, catalog.remove, catalog.snapshot):
        with pytest.raises(NotFound) as caught:
            await call("wrad")
        assert "'ward'" in caught.value.hint


async def test_bad_data_is_not_added(catalog: Catalog, write) -> None:
    with pytest.raises(DataError):
        await catalog.add("ward", write("id,x\n1,2\n1,3\n"), "id", None)
    assert await catalog.list() == []


async def test_two_that_add_one_name_at_once_do_not_both_succeed(catalog: Catalog, write) -> None:
    uri, refusals = write(GOOD), []

    async def add() -> None:
        try:
            await catalog.add("ward", uri, "id", "sick")
        except UsageError as error:
            refusals.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(add)
        nursery.start_soon(add)
    assert len(refusals) == 1
    assert len(await catalog.list()) == 1


# snapshots


async def test_a_snapshot_is_the_content_at_one_time(catalog: Catalog, write, tmp_path: Path) -> None:
    await catalog.add("ward", write(GOOD), "id", "sick")
    first = await catalog.snapshot("ward")
    assert await catalog.snapshot("ward") == first
    path = tmp_path / "state/files" / first.version.hex()
    assert path.stat().st_mode & 0o777 == 0o400
    write(GOOD.replace("40", "41"))
    second = await catalog.snapshot("ward")
    assert second.version != first.version
    kept = pa.ipc.open_file(str(path)).read_all()
    assert kept.schema.metadata == {b"fedpeer.id": b"id", b"fedpeer.label": b"sick"}
    assert kept.column("age").to_pylist() == [40.0, None, 35.0]
    assert (first.rows, first.id, first.label) == (3, "id", "sick")


async def test_a_source_that_became_another_is_refused(catalog: Catalog, write) -> None:
    await catalog.add("ward", write("id,x,y\n1,2,3\n2,3,4\n"), "id", None)
    for content, says in [
        ("id,x,z\n1,2,3\n", "(y, z)"),
        ("id,y,x\n1,2,3\n", "their order"),
        ("id,x,y\n1,2,old\n2,3,older\n", "row 2, column 'y': not a number"),
    ]:
        write(content)
        with pytest.raises(DataError) as caught:
            await catalog.snapshot("ward")
        assert says in caught.value.message


async def test_a_parquet_column_that_changed_its_type_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pa.parquet.write_table(pa.table({"x": [1, 2]}), path)
    await catalog.add("x", str(path), None, None)
    pa.parquet.write_table(pa.table({"x": ["1", "2"]}), path)
    with pytest.raises(DataError, match="the column is of string now, and was a number"):
        await catalog.snapshot("x")


@given(
    rows=st.lists(
        st.tuples(
            st.none() | st.floats(allow_nan=False, allow_infinity=False),
            st.none() | st.text(max_size=5),
            st.none() | st.booleans(),
        ),
        max_size=40,
    ),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    size=st.integers(1, 20),
)
def test_equal_content_gives_equal_bytes_however_it_lies_in_memory(rows, cuts, size: int) -> None:
    def table(rows: list, under_null: float) -> pa.Table:
        x, t, b = zip(*rows, strict=True) if rows else ((), (), ())
        numbers = np.array([under_null if value is None else value for value in x], np.float64)
        missing = np.array([value is None for value in x], bool)
        _, offsets, letters = pa.array(["" if value is None else value for value in t], pa.string()).buffers()
        if under_null:
            _, offsets, letters = pa.array(["junk" if value is None else value for value in t], pa.string()).buffers()
        bitmap = pa.array(t, pa.string()).buffers()[0]
        return pa.table(
            {
                "x": pa.array(numbers, mask=missing),
                "t": pa.StringArray.from_buffers(len(rows), offsets, letters, bitmap),
                "b": pa.array(b, pa.bool_()),
            }
        )

    whole = table(rows, 0.0)
    padded = table([(7.5, "zz", True), *rows, (None, None, None)], 3.0).slice(1, len(rows))
    edges = sorted({0, len(rows), *(cut for cut in cuts if cut <= len(rows))})
    chunked = pa.concat_tables([padded.slice(a, b - a) for a, b in pairwise(edges)] or [padded])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact, "BATCH_ROWS", size)
        _, data = artifact.dump(Table(whole, None, "b"))
        assert artifact.dump(Table(chunked, None, "b"))[1] == data
    assert pa.ipc.open_file(data).read_all().equals(whole)


async def test_reading_happens_in_a_thread(tmp_path: Path, write) -> None:
    threads: list[int] = []

    async def run_in_thread(function):
        def work():
            threads.append(threading.get_ident())
            return function()

        return await trio.to_thread.run_sync(work)

    catalog = Catalog(Store(tmp_path / "state", Catalog.SCHEMAS), run_in_thread)
    await catalog.add("x", write("x\n1\n"), None, None)
    await catalog.snapshot("x")
    assert len(threads) == 2
    assert threading.get_ident() not in threads


def test_nearest_says_nothing_when_nothing_is_near() -> None:
    assert nearest("age", ["aged", "sick"]) == "did you mean 'aged'?"
    assert nearest("age", ["sick"]) == ""


def test_the_reference_data_is_read(shared: Path) -> None:
    table = read(str(shared / "data/breast_homo_guest.csv"), "id", "y")
    assert (table.n_samples, len(table.features)) == (227, 30)
