"""Statistics of the columns of all participants together, as if their rows lay in one table."""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedpeer.errors import DataError
from fedpeer.peers import Peers
from fedpeer.secure import cells, dp, exact
from fedpeer.stage import Params, Report, Sum, Table, at_least, stage

DIGITS = 8
"""A float64 as eight digits of eight bits, the most significant first."""
WIDTH = 3.0
"""The inner edges of a histogram lie within so many standard deviations of the mean."""


class Statistics(Params, frozen=True):
    bins: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 20
    """Cells of a histogram, of equal width about the mean; the first and the last one have no outer edge."""
    min_cell: Annotated[int, msgspec.Meta(ge=1)] = 10
    """What a participant adds to any count is 0 or at least so many rows."""


@stage(
    version=2,
    params=Statistics,
    roles={"member": at_least(3)},
    inputs={"table": Table},
    outputs={"report": Report},
    messages={
        "moments": Sum(
            "of each column: how many values, how many are missing, the exact sum and sum of squares; reported are "
            "count, mean and standard deviation over the rows of all participants. Of a column a participant counts "
            "no values and no missing ones, or at least min_cell of each",
            group="data",
        ),
        "extremes": Sum(
            "of each column: the smallest of the participants' means of their min_cell smallest values, and the "
            "largest of their largest; whose they are is not told. They are found eight bits at a time: how many "
            "participants go on with which eight bits after those found so far",
            group="data",
        ),
        "histogram": Sum(
            "of each column with values: counts of rows in equal cells about the mean, the outer ones open. What a "
            "participant adds to a cell is 0 or at least min_cell rows: groups of neighbours count in one cell",
            group="data",
        ),
    },
)
async def run(peers: Peers, params: Statistics, table: Table) -> dict[str, Any]:
    """Count, missing, mean, std, min, max and a histogram of every column but the id, over the rows of all.

    ```
    turn    who    what                                              shape
    -       all    moments: count, missing, Σx, Σx² of each column   d × (2 + 46 + 89) integers
    0 … 7   all    extremes: participants by next digit, both ends   2 × d × 256 integers
    -       all    histogram: rows by cell                           d × bins integers
    ```
    All are sums of counts and exact sums: mean and std (population, divided by n) are those of the pooled values that
    count, rounded once, for any finite values. Nothing that is computed is one participant's, and the totals, which
    every participant sees, are no finer than the report.

    What comes out small, at each participant by itself (secure/cells.py): fewer than `min_cell` values of a column
    count as missing; where fewer than `min_cell` are missing, some more count as missing; in a histogram, rows count
    in groups of `min_cell` neighbours or a few more. So the numbers differ from those of the pooled rows by less than
    a group of each participant. Fewer than `min_cell` rows are none.

    The smallest and the largest value are values of single rows, and are not told. `min` is the smallest mean that a
    participant's `min_cell` smallest values have, `max` the largest one of its largest values; they are the pooled
    extremes for min_cell = 1. The `bins` - 1 edges lie between mean - 3 std and mean + 3 std, `counts` has one more
    cell than there are edges, and the outer ones are open. A
    value that is not finite counts as missing. A column of text has counts of values and of missing ones. Booleans are
    0 and 1, and their mean tells how many are 1 even if those are few: leave out a column where that matters.

    Source: the long accumulator of secure/exact.py; extremes by radix search over the bits of floats in their order
    (IEEE 754 totalOrder).
    """
    names = sorted(name for name in table.data.column_names if name != table.id)
    numeric = {name for name in names if is_numeric(table, name)}
    values = {
        name: cells.counted(numbers(table, name) if name in numeric else _present(table, name), params.min_cell)
        for name in names
    }
    rows = table.n_samples if table.n_samples >= params.min_cell else 0
    sums = {
        f"column {name}": exact.moments(column) if name in numeric else _counts(column)
        for name, column in values.items()
    }
    total = await peers.sum("moments", {"rows": np.array([rows], dtype=np.int64), **sums})
    moments = {name: exact.moments_of(total[f"column {name}"]) for name in names if name in numeric}

    shown = [name for name, told in moments.items() if told.count]
    ends = [cells.extremes(values[name], params.min_cell) for name in shown]
    keys = [_ordered(np.array([] if end is None else end, dtype=np.float64)) for end in ends]
    found = {"low": np.zeros(len(shown), dtype=np.uint64), "high": np.zeros(len(shown), dtype=np.uint64)}
    for turn in peers.rounds(DIGITS, shared=found):
        digits = np.zeros((2, len(shown), 256), dtype=np.int64)
        for j, key in enumerate(keys):
            digits[0, j] = _next_digits(key[:1], found["low"][j], turn)
            digits[1, j] = _next_digits(key[1:], found["high"][j], turn)
        held = (await peers.sum("extremes", digits))["values"] > 0
        found["low"] = (found["low"] << np.uint64(8)) + held[0].argmax(axis=1).astype(np.uint64)
        found["high"] = (found["high"] << np.uint64(8)) + (255 - held[1][:, ::-1].argmax(axis=1)).astype(np.uint64)
        peers.progress(turn + 1, DIGITS)
    low, high = _value(found["low"]), _value(found["high"])

    mean, std = (np.array([getattr(moments[name], what) for name in shown]) for what in ("mean", "std"))
    edges = _around(mean, std, params.bins)
    told = np.zeros((len(shown), params.bins), dtype=np.int64)
    for j, name in enumerate(shown):
        column = values[name][~np.isnan(values[name])]
        told[j] = cells.grouped(np.searchsorted(edges[j], column, side="right"), params.bins, params.min_cell)
    counts = (await peers.sum("histogram", told))["values"]

    columns: dict[str, Any] = {}
    for name in names:
        if name not in numeric:
            count, missing = total[f"column {name}"].tolist()
            columns[name] = {"count": count, "missing": missing}
            continue
        columns[name] = {"count": moments[name].count, "missing": moments[name].missing}
        if name in shown:
            j = shown.index(name)
            columns[name] |= {"mean": moments[name].mean, "std": moments[name].std}
            columns[name] |= {"min": float(low[j]), "max": float(high[j])}
            columns[name]["histogram"] = {"edges": edges[j].tolist(), "counts": counts[j].tolist()}
    return {"report": Report({"n_samples": int(total["rows"][0]), "columns": columns})}


class Private(Params, frozen=True):
    epsilon: Annotated[float, msgspec.Meta(ge=0.01, le=100)]
    """What a run costs of the privacy budget: less is more private, and noisier."""
    columns: Annotated[dict[str, tuple[float, float]], msgspec.Meta(min_length=1, max_length=1000)]
    """The columns, each with the bounds that its values are cut off at. Choose them without looking at the data."""
    delta: Annotated[float, msgspec.Meta(ge=1e-15, le=1e-3)] = 1e-8
    """How likely more is told than epsilon says; owners allow 1 / (10 · rows) in a year."""
    bins: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 20
    """Cells of a histogram, of equal width between the bounds."""

    def __post_init__(self) -> None:
        for name, (low, high) in self.columns.items():
            if not (low < high and math.isfinite(high - low)):
                raise ValueError(
                    f"the bounds of the column {name!r} are [{low:g}, {high:g}]: the lower one comes first"
                )


@stage(
    version=1,
    params=Private,
    roles={"member": at_least(3)},
    inputs={"table": Table},
    outputs={"report": Report},
    messages={
        "noisy": Sum(
            "of each named column, over all rows of all participants and with noise on every number: how many values, "
            "how many are missing, the sums of the values and of their squares (cut off at the bounds of the "
            "contract), the counts of rows in equal cells between the bounds. The noise is such that all of it "
            "together is (epsilon, delta) differentially private for any one row",
            group="data",
        )
    },
    cost=lambda params: (params.epsilon, params.delta),
    extra="dp",
)
async def private(peers: Peers, params: Private, table: Table) -> dict[str, Any]:
    """Count, missing, mean, std and a histogram of the named columns, with differential privacy.

    ```
    turn  who    what                                                                       shape
    0     all    noisy: count, missing, Σz, Σz², rows by cell of each column, all noised    d × (4 + bins) integers
    ```
    z is the value, cut off at its bounds, as a place from -1 to 1 between them. Everything is one sum of whole numbers
    in steps of 1 / dp.GRID, so there is one noise and nothing to compose. There is no exact number in it: no minimum
    and maximum, but bounds that were known before.

    Sensitivity: a row has, in each column, a missing value, which adds 1 to one number; or a value, which adds 1 to the
    count, 1 to one cell, |z| ≤ 1 and z² ≤ 1, each rounded to a step. In steps, and over d columns, a row more or less
    moves the sum by at most √(d · 4 · GRID²): `squared_sensitivity`.

    The report says the standard error that the noise gives each number; what the rows themselves vary comes on top of
    it. A column whose count is lost in the noise is reported with its counts only. A row is what is hidden: a person
    with many rows is hidden less. A value that is not finite counts as missing: no value makes the stage fail, for
    that it failed would be told without noise.

    Source: secure/dp.py. Errors of mean and std by the delta method.
    """
    names = sorted(params.columns)
    own_sums = np.stack([_cells(numbers(table, name), *params.columns[name], params.bins) for name in names])
    thousandths = dp.multiplier(params.epsilon, params.delta)
    scale = dp.scale(thousandths, squared_sensitivity(len(names)), peers.honest)
    told: dict[str, Any] = {}
    own = {"noise": dp.discrete_gaussian(own_sums.shape, scale)}
    for _ in peers.rounds(1, shared=told, own=own):
        total = await peers.sum("noisy", own_sums + own["noise"])
        told |= {"sums": total["values"], "contributors": len(total.survivors)}

    error = scale * math.sqrt(told["contributors"]) / dp.GRID
    columns = {
        name: _estimates(sums, *params.columns[name], error)
        for name, sums in zip(names, told["sums"] / dp.GRID, strict=True)
    }
    privacy = {
        "epsilon": params.epsilon,
        "delta": params.delta,
        "unit": "one row, added or removed",
        "noise_multiplier": thousandths / dp.THOUSAND,
        "contributors": told["contributors"],
    }
    return {"report": Report({"columns": columns, "privacy": privacy})}


def squared_sensitivity(columns: int) -> int:
    """How far one row moves the sum of `private`, squared, in steps of the grid."""
    return 4 * columns * dp.GRID**2


def _cells(column: npt.NDArray[np.float64], low: float, high: float, bins: int) -> npt.NDArray[np.int64]:
    """What one column adds to the sum of `private`, without noise, int64 of shape (4 + bins,)."""
    values = np.clip(column[~np.isnan(column)], low, high)
    z = 2.0 * ((values - low) / (high - low)) - 1.0
    edges = _edges(np.array([low]), np.array([high]), bins)[0]
    rows = np.bincount(np.searchsorted(edges[1:-1], values, side="right"), minlength=bins)
    counts = np.array([values.size, column.size - values.size], dtype=np.int64)
    sums = [np.rint(power * dp.GRID).astype(np.int64).sum() for power in (z, z * z)]
    return np.concatenate([counts * dp.GRID, sums, rows * dp.GRID]).astype(np.int64)


def _estimates(sums: npt.NDArray[np.float64], low: float, high: float, error: float) -> dict[str, Any]:
    """What the noisy sums of a column say, each number with its standard error; `error` is that of a sum.

    With noises e of the sums, to the first order: mean of z: (e1 - z̄·e0) / n; variance of z, that is m - z̄²:
    (e2 - m·e0 - 2z̄·(e1 - z̄·e0)) / n; its root: half of that, divided by the root.
    """
    count, missing, first, second = sums[:4].tolist()
    edges = _edges(np.array([low]), np.array([high]), sums.size - 4)[0].tolist()
    rows = [round(number) for number in sums[4:].tolist()]
    told: dict[str, Any] = {
        "count": round(count),
        "missing": round(missing),
        "histogram": {"edges": edges, "counts": rows},
    }
    errors: dict[str, float] = dict.fromkeys(("count", "missing", "histogram"), error)
    if count > 4 * error:
        half = (high - low) / 2
        z, m = min(max(first / count, -1.0), 1.0), min(max(second / count, 0.0), 1.0)
        variance = max(m - z * z, 0.0)
        of_variance = error / count * math.sqrt(1 + 4 * z * z + (2 * z * z - m) ** 2)
        of_std = of_variance / (2 * math.sqrt(variance)) if variance > of_variance else math.sqrt(of_variance)
        told |= {"mean": low + half * (z + 1), "std": half * math.sqrt(variance)}
        errors |= {"mean": half * error / count * math.sqrt(1 + z * z), "std": half * of_std}
    return told | {"standard_error": errors}


def is_numeric(table: Table, name: str) -> bool:
    if name not in table.data.column_names:
        raise DataError(f"the table has no column {name!r}")
    kind = table.data.schema.field(name).type
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def numbers(table: Table, name: str) -> npt.NDArray[np.float64]:
    """A numeric column with NaN for what is missing or not finite; DataError, naming it, for text."""
    if not is_numeric(table, name):
        raise DataError(f"the column {name!r} is not numeric", hint="leave it out, or encode it as numbers first")
    column = table.column(name) + 0.0  # -0.0 becomes 0.0
    return np.where(np.isinf(column), np.nan, column)


def _present(table: Table, name: str) -> npt.NDArray[np.float64]:
    """A column of text by what is known of it here: 0 for a value, NaN for a missing one."""
    missing = table.data.column(name).is_null().to_numpy()
    return np.where(missing, np.nan, 0.0)


def _counts(column: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """How many values, and how many are missing."""
    missing = int(np.isnan(column).sum())
    return np.array([column.size - missing, missing], dtype=np.int64)


def _ordered(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint64]:
    """Floats as integers in the same order."""
    bits = (values + 0.0).view(np.uint64)
    return np.where(bits >> np.uint64(63), ~bits, bits | np.uint64(1 << 63))


def _value(key: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """The floats of `_ordered`."""
    return np.where(key >> np.uint64(63), key ^ np.uint64(1 << 63), ~key).view(np.float64)


def _next_digits(key: npt.NDArray[np.uint64], prefix: np.uint64, turn: int) -> npt.NDArray[np.int64]:
    """How many of the keys that begin with `turn` digits `prefix` have each next digit, shape (256,)."""
    digits = key >> np.uint64(8 * (DIGITS - 1 - turn))
    alike = digits[digits >> np.uint64(8) == prefix]
    return np.bincount((alike & np.uint64(255)).astype(np.int64), minlength=256).astype(np.int64)


def _around(mean: npt.NDArray[np.float64], std: npt.NDArray[np.float64], bins: int) -> npt.NDArray[np.float64]:
    """The inner edges of the cells about each mean, shape (columns, bins - 1), ascending."""
    most = np.finfo(np.float64).max
    with np.errstate(over="ignore"):
        low, high = (np.clip(mean + side * std, -most, most) for side in (-WIDTH, WIDTH))
    return _edges(low, high, bins)[:, 1:-1]


def _edges(low: npt.NDArray[np.float64], high: npt.NDArray[np.float64], bins: int) -> npt.NDArray[np.float64]:
    """Edges of equal cells, shape (columns, bins + 1), ascending; no difference that could overflow."""
    part = np.arange(bins + 1) / bins
    edges = low[:, None] * (1 - part) + high[:, None] * part
    return np.maximum.accumulate(np.clip(edges, low[:, None], high[:, None]), axis=1)
