"""horizontal.statistics against NumPy on the pooled rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fedpeer.algorithms.horizontal.statistics import Statistics, run
from fedpeer.errors import SumError
from fedpeer.secure import cells
from fedpeer.stage import Sum, Table
from fedpeer.testing.stages import check_stage, run_stage

N = 120


def columns(seed: int = 1) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(seed)
    x = chance.normal(50, 10, N)
    gaps = np.where(chance.random(N) < 0.2, np.nan, chance.exponential(3, N))
    huge = chance.choice([-1.7e308, -1e-300, -0.0, 0.0, 5e-324, 1.7e308], N)
    return {
        "x": x,
        "shifted": 1e9 + chance.normal(0, 1e-3, N),
        "gaps": gaps,
        "huge": huge,
        "constant": np.full(N, 0.1),
        "negative": -chance.exponential(1, N),
        "flag": chance.integers(0, 2, N).astype(np.float64),
    }


def split(n: int, given: dict[str, np.ndarray] | None = None) -> list[dict[str, Table]]:
    """Rows dealt out in parts of unequal size; each peer has its columns in another order."""
    whole = columns() if given is None else given
    cuts = [0, *sorted(len(whole["x"]) * (i * i + 1) // (n * n) for i in range(1, n)), len(whole["x"])]
    tables = []
    for i in range(n):
        rows = {name: pa.array(column[cuts[i] : cuts[i + 1]], from_pandas=True) for name, column in whole.items()}
        rows["who"] = pa.array([f"p{row}" for row in range(cuts[i], cuts[i + 1])])
        rows["town"] = pa.array([None if row % 5 == 0 else "here" for row in range(cuts[i], cuts[i + 1])], pa.string())
        names = [*rows][i:] + [*rows][:i]
        tables.append(
            {
                "table": Table(
                    pa.table({name: rows[name] for name in names}), id="who", label="flag" if "flag" in whole else None
                )
            }
        )
    return tables


def as_numpy(outputs: Any, k: int = 1) -> None:
    """The report is that of the values that count, pooled; with k = 1 all of them do."""
    told = outputs["alice"]["report"].values
    parts = split(len(outputs))
    assert told["n_samples"] == N
    assert told["columns"].keys() == {*columns(), "town"}
    for name in columns():
        own = [cells.counted(part["table"].column(name), k) for part in parts]
        column, pooled = told["columns"][name], np.concatenate(own)
        values = pooled[~np.isnan(pooled)]
        low, high = zip(*(cells.extremes(part, k) for part in own), strict=True)
        assert (column["min"], column["max"]) == (min(low), max(high))
        assert k > 1 or (column["min"], column["max"]) == (values.min(), values.max())
        assert (column["count"], column["missing"]) == (values.size, N - values.size)
        scaled = values / 16  # numpy's own sums overflow on the huge ones
        assert column["mean"] == pytest.approx(16 * scaled.mean(), rel=1e-14)
        if name != "huge":
            assert column["std"] == pytest.approx((values - values.mean()).std(), rel=1e-7, abs=0)
        edges, counts = column["histogram"]["edges"], column["histogram"]["counts"]
        assert (len(edges), len(counts), sum(counts)) == (19, 20, values.size)
        assert edges == sorted(edges)
        if name not in ("constant", "huge"):
            assert edges[9] == pytest.approx(column["mean"], rel=1e-12)
            assert edges[0] == pytest.approx(column["mean"] - 2.7 * column["std"], rel=1e-12)
        if k == 1:
            assert counts == np.bincount(np.searchsorted(edges, values, side="right"), minlength=20).tolist()


def test_statistics_are_those_of_the_pooled_rows_and_stand_every_kill():
    check_stage(run, Statistics(min_cell=1), split, as_numpy)


def test_with_small_cells_hidden_they_are_those_of_the_values_that_count():
    for n in (3, 5):
        as_numpy(run_stage(run, Statistics(min_cell=4), split(n)).outputs, 4)


def test_the_deviation_of_huge_values_is_right():
    told = run_stage(run, Statistics(), split(3)).outputs["bob"]["report"].values["columns"]["huge"]
    assert told["std"] == pytest.approx(float(np.std(columns()["huge"] / 2**600)) * 2.0**600, rel=1e-12)
    assert run_stage(run, Statistics(), split(3)).outputs["bob"]["report"].values["columns"]["constant"]["std"] == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_whoever_takes_the_other_parts_out_of_a_total_finds_no_cell_of_fewer_than_k_rows(seed: int):
    chance = np.random.default_rng(seed)
    few = np.where(np.arange(N) % 13 == 0, chance.normal(size=N), np.nan)  # nobody has 10 values
    gaps = np.where(np.arange(N) % 13 == 0, np.nan, chance.normal(size=N))  # nobody has 10 missing ones
    tables = split(
        3, {"x": chance.standard_cauchy(N), "few": few, "gaps": gaps, "rare": (np.arange(N) % 40 == 0) * 1.0}
    )
    said = [message for message in run_stage(run, Statistics(), tables).said if message.tag in run.messages]
    assert {message.sender for message in said} == {"alice", "bob", "carol"}
    for message in said:
        if message.tag == "extremes":
            counts = message.value["values"]
            assert counts.sum(axis=2).max() <= 1, "one mean for each end, and no row"
            continue
        if message.tag == "moments":
            small = [array[:2] for array in message.value.values()]
            assert message.value["column few"][0] == 0, "no value of a column of which it holds few"
            assert not message.value["column few"][2:].any()
        else:
            small = list(message.value.values())
        for counts in small:
            assert not ((counts > 0) & (counts < 10)).any(), f"{message.tag} of {message.sender}"


def test_what_is_hidden_does_not_depend_on_the_order_of_the_rows():
    column = np.where(np.arange(50) % 13 == 0, np.nan, np.random.default_rng(0).normal(size=50))
    one, other = cells.counted(column, 10), cells.counted(column[::-1], 10)
    assert np.isnan(one).sum() == 10
    assert np.sort(one).tolist()[:40] == np.sort(other).tolist()[:40]


def test_rows_in_groups_of_k_are_where_they_were_within_their_group():
    where = np.array([0] * 25 + [3] * 4 + [9] * 40)
    told = cells.grouped(where, 10, 10)
    assert told.tolist() == [23, 0, 0, 0, 0, 11, 0, 0, 0, 35]  # 2 of 0, 4 of 3 and 5 of 9 are a group: 5 is their mean
    assert cells.grouped(where, 10, 1).tolist() == np.bincount(where, minlength=10).tolist()
    assert cells.grouped(where[:9], 10, 10).tolist() == [0] * 10


@pytest.mark.parametrize("rows", [0, 9])
def test_a_peer_with_fewer_rows_than_k_counts_none_and_columns_without_values_are_fine(rows: int):
    given = {"x": np.arange(90.0), "empty": np.full(90, np.nan)}
    tables = split(3, given)
    tables[1] = {"table": Table(tables[1]["table"].data.slice(0, rows), id="who")}
    told = run_stage(run, Statistics(), tables).outputs["carol"]["report"].values
    assert told["columns"]["empty"]["count"] == 0
    assert told["n_samples"] == sum(tables[i]["table"].n_samples for i in (0, 2))


def test_zero_has_no_sign():
    given = {"x": np.where(np.arange(30) % 2, 0.0, -0.0)}
    told = run_stage(run, Statistics(bins=2), split(3, given)).outputs["alice"]["report"].values["columns"]["x"]
    assert str(told["mean"]) == str(told["histogram"]["edges"][0]) == str(told["min"]) == str(told["max"]) == "0.0"


def test_an_extreme_is_of_k_rows():
    column = np.array([np.nan, 1.0, 2.0, 3.0, 50.0, 60.0, 70.0, 1000.0])
    assert cells.extremes(column, 1) == (1.0, 1000.0)
    assert cells.extremes(column, 3) == (2.0, (60 + 70 + 1000) / 3)
    assert cells.extremes(column, 8) is None
    assert cells.extremes(np.full(4, 1.7e308), 4) == (1.7e308, 1.7e308)


def test_infinity_counts_as_missing():
    given = {"x": np.concatenate([np.arange(30.0), np.full(30, np.inf), np.arange(60.0)])}
    told = run_stage(run, Statistics(min_cell=1), split(3, given)).outputs["alice"]["report"].values["columns"]["x"]
    assert (told["count"], told["missing"]) == (90, 30)


def test_other_columns_at_one_peer_are_found_before_anything_is_known():
    tables = split(3)
    data = tables[2]["table"].data
    tables[2] = {"table": Table(data.rename_columns(["y" if n == "x" else n for n in data.column_names]), id="who")}
    with pytest.raises(SumError, match="do not agree"):
        run_stage(run, Statistics(), tables)


def test_all_that_is_said_is_sums_of_the_data():
    assert all(isinstance(message, Sum) and message.group == "data" for message in run.messages.values())


def test_what_is_said_is_counts_and_exact_sums_that_the_pooled_rows_determine():
    totals = [run_stage(run, Statistics(min_cell=1), split(n)).totals for n in (3, 5)]
    for place in totals[0]:
        for name, total in totals[0][place].items():
            if total.ndim == 3:  # of extremes: how many participants, not how many rows
                assert total.sum(axis=2).max() <= 3
            elif place != (0, 0):  # of moments the carries between limbs may differ, not the sums
                assert total.tolist() == totals[1][place][name].tolist()
