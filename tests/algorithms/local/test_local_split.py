"""A table in two parts, alike at all participants."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from fedpeer.algorithms.local import split
from fedpeer.algorithms.local.split import Split
from fedpeer.errors import ContractError, DataError
from fedpeer.jobs.contract import canonical_params
from fedpeer.stage import Table
from fedpeer.testing.stages import check_stage, run_stage

N = 1000
PINNED = ["P-0007", "P-0008", "P-0010", "P-0013", "P-0015", "P-0017"]


def table(ids: list[str | None], offset: float = 0.0) -> Table:
    x = offset + np.arange(float(len(ids)))
    return Table(pa.table({"id": pa.array(ids, pa.string()), "x": x, "y": np.arange(len(ids)) % 2 == 0}), "id", "y")


def parts(given: Table, params: Split | None = None) -> tuple[Table, Table]:
    outputs = run_stage(split.run, params or Split(), [{"table": given}]).outputs["alice"]
    train, test = outputs["train"], outputs["test"]
    assert isinstance(train, Table)
    assert isinstance(test, Table)
    return train, test


IDS: list[str | None] = [f"P-{i:04d}" for i in range(N)]


def test_aligned_tables_with_other_columns_are_split_alike_and_keep_their_order() -> None:
    def right(outputs: dict) -> None:  # type: ignore[type-arg]
        for port in ("train", "test"):
            assert len({tuple(output[port].ids()) for output in outputs.values()}) == 1
        for k, output in enumerate(outputs.values()):
            train, test = output["train"], output["test"]
            rows = [np.array(part.column("x") - 1000 * k, int) for part in (train, test)]
            for part, chosen in zip((train, test), rows, strict=True):
                assert (np.diff(chosen) > 0).all()
                assert part.ids() == [IDS[i] for i in chosen]
                assert (part.labels() == (chosen % 2 == 0)).all()
                assert (part.id, part.label) == ("id", "y")
                assert part.data.schema.equals(table(IDS).data.schema)
            assert sorted(np.concatenate(rows)) == list(range(N))

    check_stage(split.run, Split(), lambda n: [{"table": table(IDS, 1000.0 * k)} for k in range(n)], right)


@pytest.mark.parametrize("test_size", [0.1, 0.3, 0.9])
def test_a_part_is_about_as_large_as_asked_for(test_size: float) -> None:
    for random_state in range(3):
        size = parts(table(IDS), Split(test_size=test_size, random_state=random_state))[1].n_samples
        assert abs(size - N * test_size) < 4 * math.sqrt(N * test_size * (1 - test_size))


def test_an_id_falls_on_one_side_whatever_other_rows_there_are_and_however_they_are_ordered() -> None:
    whole = set(parts(table(IDS))[1].ids())
    assert set(parts(table(IDS[::-1]))[1].ids()) == whole
    assert set(parts(table(IDS[::3]))[1].ids()) == whole & set(IDS[::3])


def test_rows_of_one_id_stay_together() -> None:
    train, test = parts(table([*IDS, *IDS]))
    assert not set(train.ids()) & set(test.ids())
    assert test.ids()[: test.n_samples // 2] == test.ids()[test.n_samples // 2 :]


def test_ids_that_an_alignment_takes_for_the_same_fall_on_the_same_side() -> None:
    written = [f" p-{i:04d} " if i % 2 else f"Ｐ-{i:04d}" for i in range(N)]
    assert (parts(table(written))[1].column("x") == parts(table(IDS))[1].column("x")).all()


def test_another_random_state_is_another_split() -> None:
    numbers = [parts(table(IDS), Split(random_state=state))[1].ids() for state in (0, 1, "spring")]
    assert numbers[0] != numbers[1] != numbers[2] != numbers[0]
    overlap = len(set(numbers[0]) & set(numbers[1]))
    assert abs(overlap - 0.09 * N) < 4 * math.sqrt(0.09 * 0.91 * N)


def test_the_split_is_the_same_in_every_release() -> None:
    assert parts(table(IDS[:20]), Split(random_state="spring"))[1].ids() == PINNED


def test_without_an_id_column_rows_are_split_by_number_and_the_operator_is_told() -> None:
    x = pa.table({"x": np.arange(float(N))})
    run = run_stage(split.run, Split(), [{"table": Table(x)}, {"table": Table(x)}])
    one, other = (run.outputs[alias]["test"] for alias in ("alice", "bob"))
    assert isinstance(one, Table)
    assert isinstance(other, Table)
    assert one.data.equals(other.data)
    told = run.progress["alice"][-1].metrics
    assert told == {"train": N - one.n_samples, "test": one.n_samples, "by_row_number": 1.0}
    assert run_stage(split.run, Split(), [{"table": table(IDS)}]).progress["alice"][-1].metrics["by_row_number"] == 0.0


@pytest.mark.parametrize("missing", [None, "", "  "])
def test_a_row_without_an_id_is_refused_by_its_number(missing: str | None) -> None:
    with pytest.raises(DataError, match=r"row 2 \(from 0\) has no id in the column 'id'"):
        parts(table(["a", "b", missing, "d"]))


@pytest.mark.parametrize("test_size", [1e-9, 1 - 1e-9])
@pytest.mark.parametrize("count", [0, 3])
def test_a_part_without_rows_is_refused(count: int, test_size: float) -> None:
    with pytest.raises(DataError, match=f"all {count} rows fall into one part"):
        parts(table(IDS[:count]), Split(test_size=test_size))


def test_to_stratify_is_refused_by_name() -> None:
    with pytest.raises(ContractError, match=r"'local.split:run' has no parameter 'stratify'"):
        canonical_params({"stratify": "y"}, split.run, "stage 'split'")


@pytest.mark.parametrize("wrong", [{"test_size": 0.0}, {"test_size": 1.0}, {"random_state": -1}])
def test_parameters_have_bounds(wrong: dict) -> None:  # type: ignore[type-arg]
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, Split)
