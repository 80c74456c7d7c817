"""horizontal.statistics against NumPy on the pooled rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fedpeer.algorithms.horizontal.statistics import Statistics, run
from fedpeer.errors import DataError, SumError
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


def as_numpy(outputs: Any) -> None:
    told = outputs["alice"]["report"].values
    assert told["n_samples"] == N
    assert told["columns"].keys() == {*columns(), "town"}
    assert told["columns"]["town"] == {"count": 96, "missing": 24}
    for name, pooled in columns().items():
        column, values = told["columns"][name], pooled[~np.isnan(pooled)]
        assert (column["count"], column["missing"]) == (values.size, N - values.size)
        assert (column["min"], column["max"]) == (values.min(), values.max())
        scaled = values / 16  # numpy's own sums overflow on the huge ones
        assert column["mean"] == pytest.approx(16 * scaled.mean(), rel=1e-14)
        if name != "huge":
            assert column["std"] == pytest.approx((values - values.mean()).std(), rel=1e-7, abs=0)
        edges, counts = column["histogram"]["edges"], column["histogram"]["counts"]
        assert min(counts) >= 10
        assert (edges[0], edges[-1]) == (values.min(), values.max())
        if name not in ("constant", "huge"):
            assert counts == np.histogram(values, bins=edges)[0].tolist()
        assert sum(counts) == values.size


def test_statistics_are_those_of_the_pooled_rows_and_stand_every_kill():
    check_stage(run, Statistics(), split, as_numpy)


def test_the_deviation_of_huge_values_is_right():
    told = run_stage(run, Statistics(), split(3)).outputs["bob"]["report"].values["columns"]["huge"]
    assert told["std"] == pytest.approx(float(np.std(columns()["huge"] / 2**600)) * 2.0**600, rel=1e-12)
    assert run_stage(run, Statistics(), split(3)).outputs["bob"]["report"].values["columns"]["constant"]["std"] == 0.0


def test_nothing_but_counts_is_told_or_asked_of_a_column_with_few_values():
    few = {**columns(), "rare": np.where(np.arange(N) < 9, 7.5, np.nan)}
    done = run_stage(run, Statistics(), split(3, few))
    assert done.outputs["alice"]["report"].values["columns"]["rare"] == {"count": 9, "missing": N - 9}
    shapes = {said.tag: {name: array.shape for name, array in said.value.items()} for said in done.said}
    assert shapes["extremes"] == {"values": (2, 7, 256)}  # seven columns, not eight
    assert shapes["histogram"] == {"values": (7, 20)}


def test_small_cells_are_merged_with_their_neighbours():
    values = np.concatenate([np.zeros(50), np.full(3, 5.0), np.full(40, 10.0)])
    given = {"x": values, "y": values}
    told = run_stage(run, Statistics(bins=10), split(3, given)).outputs["alice"]["report"].values["columns"]["x"]
    assert told["histogram"] == {"edges": [0.0, 1.0, 10.0], "counts": [50, 43]}


def test_a_peer_without_rows_and_columns_without_values_are_fine():
    given = {"x": np.arange(30.0), "empty": np.full(30, np.nan)}
    tables = split(3, given)
    tables[1] = {"table": Table(tables[1]["table"].data.slice(0, 0), id="who")}
    told = run_stage(run, Statistics(), tables).outputs["carol"]["report"].values
    assert told["columns"]["empty"]["count"] == 0
    assert told["n_samples"] == sum(table["table"].n_samples for table in tables)


def test_zero_has_no_sign():
    given = {"x": np.where(np.arange(30) % 2, 0.0, -0.0)}
    told = run_stage(run, Statistics(), split(3, given)).outputs["alice"]["report"].values["columns"]["x"]
    assert str(told["min"]) == str(told["max"]) == "0.0"


def test_infinity_is_refused_by_name():
    with pytest.raises(DataError, match=r"'x'.*not finite"):
        run_stage(run, Statistics(), split(3, {"x": np.array([1.0, np.inf, 2.0, 3.0, 4.0, 5.0])}))


def test_other_columns_at_one_peer_are_found_before_anything_is_known():
    tables = split(3)
    data = tables[2]["table"].data
    tables[2] = {"table": Table(data.rename_columns(["y" if n == "x" else n for n in data.column_names]), id="who")}
    with pytest.raises(SumError, match="do not agree"):
        run_stage(run, Statistics(), tables)


def test_all_that_is_said_is_sums_of_the_data():
    assert all(isinstance(message, Sum) and message.group == "data" for message in run.messages.values())


def test_what_is_said_is_counts_and_exact_sums_that_the_pooled_rows_determine():
    totals = [run_stage(run, Statistics(), split(n)).totals for n in (3, 5)]
    for place in totals[0]:
        for name, total in totals[0][place].items():
            if place != (0, 0):  # of moments the carries between limbs may differ, not the sums
                assert total.tolist() == totals[1][place][name].tolist()
