"""horizontal.statistics:private against NumPy on the pooled rows, its noise, and its sensitivity."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeer.algorithms.horizontal import statistics
from fedpeer.algorithms.horizontal.statistics import Private, private
from fedpeer.errors import ContractError, DataError, NotDeterministic
from fedpeer.jobs.contract import canonical_params
from fedpeer.peers import Peers
from fedpeer.secure import dp
from fedpeer.stage import Report, Sum, Table, at_least, stage
from fedpeer.testing.stages import check_stage, run_stage

N = 20_000
BOUNDS = {"age": (0.0, 100.0), "bmi": (10.0, 50.0)}
PARAMS = Private(epsilon=1.0, columns=BOUNDS, bins=10)


def columns(seed: int = 1) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(seed)
    bmi = chance.normal(25, 6, N)  # some lie outside the bounds
    return {"age": chance.uniform(18, 95, N), "bmi": np.where(chance.random(N) < 0.1, np.nan, bmi)}


def split(n: int) -> list[dict[str, Table]]:
    whole = columns()
    cuts = [0, *sorted(N * (i * i + 1) // (n * n) for i in range(1, n)), N]
    town = pa.array(["here"] * N)
    return [
        {
            "table": Table(
                pa.table(
                    {name: pa.array(column[a:b], from_pandas=True) for name, column in whole.items()}
                    | {"town": town[a:b]}
                )
            )
        }
        for a, b in pairwise(cuts)
    ]


def as_numpy(outputs: Any) -> None:
    """Each number is within six of its standard errors of that of the pooled rows, cut off at the bounds."""
    told = outputs["alice"]["report"].values
    assert told["columns"].keys() == BOUNDS.keys()
    for name, pooled in columns().items():
        column, errors = told["columns"][name], told["columns"][name]["standard_error"]
        values = np.clip(pooled[~np.isnan(pooled)], *BOUNDS[name])
        truth = {"count": values.size, "missing": N - values.size, "mean": values.mean(), "std": values.std()}
        for what, true in truth.items():
            assert abs(column[what] - true) < 6 * errors[what] + (0.5 if what in ("count", "missing") else 0), what
        edges, counts = column["histogram"]["edges"], column["histogram"]["counts"]
        assert (edges[0], edges[-1]) == BOUNDS[name]
        assert np.abs(np.histogram(values, bins=edges)[0] - counts).max() < 6 * errors["histogram"] + 0.5
    assert (told["privacy"]["epsilon"], told["privacy"]["delta"]) == (1.0, 1e-8)


@pytest.fixture
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draw at every call: runs can be compared byte by byte."""

    def draw(shape: tuple[int, ...], scale: int) -> np.ndarray:
        return np.random.default_rng(5).normal(0, scale, shape).astype(np.int64)

    monkeypatch.setattr(dp, "discrete_gaussian", draw)


@pytest.mark.usefixtures("repeatable")
def test_statistics_are_near_those_of_the_pooled_rows_and_stand_every_kill() -> None:
    check_stage(private, PARAMS, split, as_numpy, sizes=(3,))


def test_a_worker_that_is_killed_has_the_noise_it_had() -> None:
    whole = run_stage(private, PARAMS, split(3))
    killed = run_stage(private, PARAMS, split(3), kills=dict.fromkeys(("alice", "bob", "carol"), range(100)))
    as_numpy(killed.outputs)
    assert len(set(map(str, killed.digests.values()))) == 1
    assert len(killed.said) == len(whole.said) == 3
    assert killed.digests != whole.digests, "two runs have the same noise"


@stage(
    version=1,
    params=Private,
    roles={"member": at_least(3)},
    inputs={"table": Table},
    outputs={"report": Report},
    messages={"noisy": Sum("a total", group="data")},
)
async def forgetful(peers: Peers, params: Private, table: Table) -> dict[str, Any]:
    """`private`, but its noise is not in what outlives a worker."""
    total = await peers.sum("noisy", dp.discrete_gaussian((2, 3), 1000))
    return {"report": Report({"sum": int(total["values"].sum())})}


def test_noise_that_is_drawn_again_is_found() -> None:
    with pytest.raises(NotDeterministic):
        run_stage(forgetful, PARAMS, split(3), kills={"bob": range(100)})


def test_every_number_that_leaves_has_noise_of_the_right_size() -> None:
    run = run_stage(private, PARAMS, split(3))
    scale = dp.scale(dp.multiplier(1.0, 1e-8), statistics.squared_sensitivity(2), 1)
    assert {(said.kind, said.tag) for said in run.said} == {("sum", "noisy")}
    for said, inputs in zip(sorted(run.said, key=lambda said: said.sender), split(3), strict=True):
        exact = [
            statistics._cells(statistics.numbers(inputs["table"], name), *BOUNDS[name], PARAMS.bins) for name in BOUNDS
        ]
        noise = (said.value["values"] - np.stack(exact)) / scale
        assert noise.shape == (2, 14)
        assert np.count_nonzero(noise) == noise.size
        assert 0.3 < noise.std() < 1.9  # of 28 draws; wrong once in 10^8
    assert run.outputs["alice"]["report"].values["privacy"]["contributors"] == 3


finite = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(st.none() | finite, max_size=4), st.none() | finite, finite, finite, st.integers(1, 9))
def test_one_row_moves_the_sum_by_the_sensitivity_at_most(
    rows: list[float | None], row: float | None, one: float, other: float, bins: int
) -> None:
    low, high = sorted([one, other])
    if not (low < high and np.isfinite(high - low)):
        return
    with_, without = (
        statistics._cells(np.array([np.nan if x is None else x for x in some], dtype=float), low, high, bins)
        for some in ([*rows, row], rows)
    )
    moved = sum(int(x) ** 2 for x in with_ - without)
    assert moved <= statistics.squared_sensitivity(1)
    if row is not None and (row <= low or row >= high):
        assert moved == statistics.squared_sensitivity(1)  # no less would do
    assert statistics.squared_sensitivity(5) == 5 * statistics.squared_sensitivity(1)


@pytest.mark.parametrize("spread", [8.0, 0.5])
def test_standard_errors_are_what_the_estimates_scatter(spread: float) -> None:
    seed = 3
    print("seed", seed)
    chance, error = np.random.default_rng(seed), 20.0
    cells = statistics._cells(chance.normal(44, spread, 3000), 10, 50, 5) / dp.GRID
    exact = statistics._estimates(cells, 10, 50, 1e-9)
    draws = [statistics._estimates(cells + chance.normal(0, error, cells.shape), 10, 50, error) for _ in range(2000)]
    for what in ("count", "missing", "mean", "std"):
        scatter = np.sqrt(np.mean([(draw[what] - exact[what]) ** 2 for draw in draws]))
        said = np.mean([draw["standard_error"][what] for draw in draws])
        assert scatter == pytest.approx(said, rel=0.1 if what != "std" or spread > 1 else 0.6), what
    scatter = np.sqrt(
        np.mean([(draw["histogram"]["counts"][2] - exact["histogram"]["counts"][2]) ** 2 for draw in draws])
    )
    assert scatter == pytest.approx(error, rel=0.1)


def test_a_column_lost_in_the_noise_is_reported_with_its_counts_only() -> None:
    told = statistics._estimates(np.array([79.0, 3, 5, 6, 40, 39]), 0, 1, 20.0)
    assert told.keys() == {"count", "missing", "histogram", "standard_error"}
    assert "mean" in statistics._estimates(np.array([81.0, 3, 5, 6, 40, 41]), 0, 1, 20.0)


@pytest.mark.parametrize("bounds", [[1, 1], [2, 1], [float("-inf"), 1], [-1.7e308, 1.7e308], [float("nan"), 1]])
def test_bounds_that_are_none_are_refused_with_the_contract(bounds: list[float]) -> None:
    with pytest.raises(ContractError, match="'age'"):
        canonical_params({"epsilon": 1.0, "columns": {"age": bounds}}, private, "stage 'x'")


@pytest.mark.parametrize(
    "wrong", [{}, {"epsilon": 0.0}, {"epsilon": 1.0, "columns": {}}, {"epsilon": 1.0, "delta": 0.1}]
)
def test_params_that_are_not_private_are_refused_with_the_contract(wrong: dict[str, Any]) -> None:
    with pytest.raises(ContractError):
        canonical_params({"columns": {"age": [0, 1]}, **wrong}, private, "stage 'x'")
    written = canonical_params({"epsilon": 1, "columns": {"b": [0, 1], "a": [0, 1]}}, private, "stage 'x'")
    assert msgspec.json.decode(written, type=Private).delta == 1e-8


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
def test_a_value_that_is_not_finite_counts_as_missing_and_fails_nothing(odd: float) -> None:
    """That a stage fails is told without noise."""
    x = np.arange(100.0)
    whole = [Table(pa.table({"x": np.where(x < 30, odd, x)}))] * 3
    gaps = [Table(pa.table({"x": pa.array(np.where(x < 30, np.nan, x), from_pandas=True)}))] * 3
    told, expected = (
        run_stage(private, Private(epsilon=1.0, columns={"x": (0.0, 100.0)}), [{"table": table} for table in tables])
        for tables in (whole, gaps)
    )
    assert told.digests == expected.digests


@pytest.mark.parametrize("name", ["town", "nobody"])
def test_a_column_that_cannot_be_measured_is_named(name: str) -> None:
    with pytest.raises(DataError, match=name):
        run_stage(private, Private(epsilon=1.0, columns={name: (0.0, 1.0)}), split(3))
