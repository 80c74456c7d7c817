"""Which rows go into a stage: told from the files, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fedpeer import artifact
from fedpeer.crypto import hash_
from fedpeer.errors import DataError, PolicyError
from fedpeer.governance.answered import Cohort, difference
from fedpeer.jobs.cohorts import Source, cohorts_of
from fedpeer.stage import Rows, Table


def table(first: int, last: int, *, ids: bool = True) -> Table:
    numbers = pa.array([float(i) for i in range(first, last)])
    columns = {"id": pa.array([f"p{i}" for i in range(first, last)])} if ids else {}
    return Table(pa.table({**columns, "x": numbers}), "id" if ids else None)


class Files:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, output: Table | Rows, datasets: Sequence[str] = ("rows",), *, whole: bool = False) -> Source:
        kind, data = artifact.dump(output)
        digest = hash_("fp.file", data)
        path = self.folder / digest.hex()
        path.write_bytes(data)
        return Source(kind, path, digest, datasets, whole)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def one(sources: Sequence[Source], snapshots: dict[str, Source]) -> Cohort:
    (cohort,) = cohorts_of(sources, snapshots)
    return cohort


def test_a_dataset_is_all_its_rows(files: Files) -> None:
    rows = files.put(table(0, 100), whole=True)
    cohort = one([rows], {"rows": rows})
    assert (cohort.dataset, cohort.version, cohort.rows) == ("rows", rows.digest, 100)


def test_a_table_that_was_made_is_the_rows_whose_ids_it_has(files: Files) -> None:
    rows, made = files.put(table(0, 100), whole=True), files.put(table(1, 100))
    cohort = one([made], {"rows": rows})
    assert (cohort.version, cohort.rows) == (made.digest, 99)
    assert difference(cohort, one([rows], {"rows": rows})) == 1


def test_values_that_an_earlier_stage_changed_are_those_of_the_dataset(files: Files) -> None:
    was, now = table(0, 100), table(0, 100)
    x = now.data.column("x").to_pylist()
    now = Table(now.data.set_column(1, "x", pa.array([*x[:7], 700.0, *x[8:]])), "id")

    def scaled(given: Table) -> Cohort:
        values = given.column("x")
        made = Table(given.data.set_column(1, "x", pa.array((values - values.mean()) / values.std())), "id")
        return one([files.put(made)], {"rows": files.put(given, whole=True)})

    assert difference(scaled(was), scaled(was)) == 0
    assert difference(scaled(was), scaled(now)) == 2  # the row as it was, and as it is


def test_of_a_repeated_id_another_row_is_another_row(files: Files) -> None:
    twice = Table(pa.concat_tables([table(0, 100).data, table(0, 1).data.set_column(1, "x", pa.array([7.5]))]), "id")
    rows = files.put(twice, whole=True)
    first, last = (files.put(Table(twice.data.slice(start, 100), "id")) for start in (0, 1))
    assert difference(one([first], {"rows": rows}), one([last], {"rows": rows})) == 2


def test_an_alignment_beside_a_dataset_chooses_its_rows(files: Files) -> None:
    rows, some = files.put(table(0, 100), whole=True), files.put(Rows(np.arange(5, 100)))
    cohort = one([rows, some], {"rows": rows})
    assert cohort.rows == 95
    assert cohort.version not in (rows.digest, some.digest)  # it is neither the dataset nor anything that has a file
    assert difference(cohort, one([rows], {"rows": rows})) == 5
    again = files.put(Rows(np.arange(6, 100)))
    assert one([rows, again], {"rows": rows}).version != cohort.version


def test_rows_that_are_not_there_are_refused(files: Files) -> None:
    rows, some = files.put(table(0, 100), whole=True), files.put(Rows(np.array([0, 100])))
    with pytest.raises(DataError, match="100 rows does not have"):
        cohorts_of([rows, some], {"rows": rows})


def test_without_ids_only_as_many_rows_are_the_same_rows(files: Files) -> None:
    rows = files.put(table(0, 100, ids=False), whole=True)
    whole = one([files.put(table(50, 150, ids=False))], {"rows": rows})
    assert (whole.version, whole.rows) == (rows.digest, 100)
    with pytest.raises(PolicyError, match="cannot be told which rows of 'rows'"):
        cohorts_of([files.put(table(0, 99, ids=False))], {"rows": rows})


def test_ids_that_are_none_of_the_datasets_tell_nothing(files: Files) -> None:
    rows = files.put(table(0, 100), whole=True)
    with pytest.raises(PolicyError, match="cannot be told"):
        cohorts_of([files.put(table(1, 101))], {"rows": rows})


def test_a_table_of_two_datasets_counts_for_both(files: Files) -> None:
    rows, more = files.put(table(0, 100), whole=True), files.put(table(0, 200), ["more"], whole=True)
    made = files.put(table(0, 90), ["rows", "more"])
    assert [cohort.dataset for cohort in cohorts_of([made], {"rows": rows, "more": more})] == ["more", "rows"]


def test_models_and_reports_bring_no_rows(files: Files) -> None:
    rows = files.put(table(0, 100), whole=True)
    assert cohorts_of([Source("model", rows.path, rows.digest, ["rows"], whole=False)], {"rows": rows}) == []
