"""Statistics of the columns of all participants together, as if their rows lay in one table."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedpeer.errors import DataError
from fedpeer.peers import Peers
from fedpeer.secure import exact
from fedpeer.stage import Params, Report, Sum, Table, at_least, stage

DIGITS = 8
"""A float64 as eight digits of eight bits, the most significant first."""


class Statistics(Params, frozen=True):
    bins: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 20
    """Cells of a histogram, of equal width from minimum to maximum, before small ones are merged."""
    min_cell: Annotated[int, msgspec.Meta(ge=1)] = 10
    """No cell of the report has fewer rows; of a column with fewer values the report has the counts only."""


@stage(
    version=1,
    params=Statistics,
    roles={"member": at_least(3)},
    inputs={"table": Table},
    outputs={"report": Report},
    messages={
        "moments": Sum(
            "of each column: how many values, how many are missing, the exact sum and sum of squares; reported are "
            "count, mean and standard deviation over all rows of all participants",
            group="data",
        ),
        "extremes": Sum(
            "of each column with at least min_cell values: its minimum and maximum over all rows of all participants, "
            "which are values of single rows (whose is not told), found eight bits at a time: the counts of rows by "
            "their next eight bits, of those rows that share the bits found so far",
            group="data",
        ),
        "histogram": Sum(
            "of each column with at least min_cell values: counts of rows in equal cells from minimum to maximum; in "
            "the report, cells below min_cell are merged",
            group="data",
        ),
    },
)
async def run(peers: Peers, params: Statistics, table: Table) -> dict[str, Any]:
    """Count, missing, mean, std, min, max and a histogram of every column but the id, over the rows of all.

    ```
    turn    who    what                                              shape
    -       all    moments: count, missing, Σx, Σx² of each column   d × (2 + 46 + 89) integers
    0 … 7   all    extremes: rows by their next digit, min and max   2 × d × 256 integers
    -       all    histogram: rows by cell                           d × bins integers
    ```
    All are sums of counts and exact sums, so every number is that of the pooled rows: mean and std (population, divided
    by n) rounded once, min and max exactly, for any finite values. Nothing that is computed is one participant's.

    What comes out small: a column with fewer than `min_cell` values is asked for its moments only and reported with its
    counts; cells of a histogram are merged with their right neighbours until each has `min_cell` rows. A column of text
    has counts of values and of missing ones. Booleans are 0 and 1.

    Source: the long accumulator of secure/exact.py; minimum and maximum by radix search over the bits of the values in
    their order (IEEE 754 totalOrder).
    """
    names = sorted(name for name in table.data.column_names if name != table.id)
    values = {name: numbers(table, name) for name in names if is_numeric(table, name)}
    missing = {name: table.data.column(name).null_count for name in names if name not in values}
    sums = {f"column {name}": exact.moments(column) for name, column in values.items()}
    sums |= {f"text {name}": np.array([table.n_samples - n, n], dtype=np.int64) for name, n in missing.items()}
    total = await peers.sum("moments", {"rows": np.array([table.n_samples], dtype=np.int64), **sums})
    moments = {name: exact.moments_of(total[f"column {name}"]) for name in values}

    shown = [name for name in values if moments[name].count >= params.min_cell]
    keys = [_ordered(values[name]) for name in shown]
    found = {"low": np.zeros(len(shown), dtype=np.uint64), "high": np.zeros(len(shown), dtype=np.uint64)}
    for turn in peers.rounds(DIGITS, shared=found):
        counts = np.zeros((2, len(shown), 256), dtype=np.int64)
        for j, key in enumerate(keys):
            counts[0, j] = _next_digits(key, found["low"][j], turn)
            counts[1, j] = _next_digits(key, found["high"][j], turn)
        rows = (await peers.sum("extremes", counts))["values"] > 0
        found["low"] = (found["low"] << np.uint64(8)) + rows[0].argmax(axis=1).astype(np.uint64)
        found["high"] = (found["high"] << np.uint64(8)) + (255 - rows[1][:, ::-1].argmax(axis=1)).astype(np.uint64)
        peers.progress(turn + 1, DIGITS)

    low, high = _value(found["low"]), _value(found["high"])
    edges = _edges(low, high, params.bins)
    cells = np.zeros((len(shown), params.bins), dtype=np.int64)
    for j, name in enumerate(shown):
        column = values[name][~np.isnan(values[name])]
        cells[j] = np.bincount(np.searchsorted(edges[j, 1:-1], column, side="right"), minlength=params.bins)
    counts = (await peers.sum("histogram", cells))["values"]

    columns: dict[str, Any] = {}
    for name in names:
        if name not in values:
            count, absent = total[f"text {name}"].tolist()
            columns[name] = {"count": count, "missing": absent}
            continue
        told = moments[name]
        columns[name] = {"count": told.count, "missing": told.missing}
        if name in shown:
            j = shown.index(name)
            columns[name] |= {"mean": told.mean, "std": told.std, "min": float(low[j]), "max": float(high[j])}
            columns[name]["histogram"] = _merged(edges[j], counts[j], params.min_cell)
    return {"report": Report({"n_samples": int(total["rows"][0]), "columns": columns})}


def is_numeric(table: Table, name: str) -> bool:
    kind = table.data.schema.field(name).type
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def numbers(table: Table, name: str) -> npt.NDArray[np.float64]:
    """A numeric column with NaN for missing values; DataError, naming it, for text or infinity."""
    if not is_numeric(table, name):
        raise DataError(f"the column {name!r} is not numeric", hint="leave it out, or encode it as numbers first")
    column = table.column(name) + 0.0  # -0.0 becomes 0.0
    if np.isinf(column).any():
        raise DataError(f"the column {name!r} has a value that is not finite")
    return column


def _ordered(column: npt.NDArray[np.float64]) -> npt.NDArray[np.uint64]:
    """The values that are not missing as integers in the same order."""
    bits = column[~np.isnan(column)].view(np.uint64)
    return np.where(bits >> np.uint64(63), ~bits, bits | np.uint64(1 << 63))


def _value(key: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """The floats of `_ordered`."""
    return np.where(key >> np.uint64(63), key ^ np.uint64(1 << 63), ~key).view(np.float64)


def _next_digits(key: npt.NDArray[np.uint64], prefix: np.uint64, turn: int) -> npt.NDArray[np.int64]:
    """How many of the keys that begin with `turn` digits `prefix` have each next digit, shape (256,)."""
    digits = key >> np.uint64(8 * (DIGITS - 1 - turn))
    alike = digits[digits >> np.uint64(8) == prefix]
    return np.bincount((alike & np.uint64(255)).astype(np.int64), minlength=256).astype(np.int64)


def _edges(low: npt.NDArray[np.float64], high: npt.NDArray[np.float64], bins: int) -> npt.NDArray[np.float64]:
    """Edges of equal cells, shape (columns, bins + 1), ascending; no difference that could overflow."""
    part = np.arange(bins + 1) / bins
    edges = low[:, None] * (1 - part) + high[:, None] * part
    return np.maximum.accumulate(np.clip(edges, low[:, None], high[:, None]), axis=1)


def _merged(edges: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], least: int) -> dict[str, list[Any]]:
    """Neighbouring cells together until each has `least` rows; the last ones join the cell before them."""
    kept, rows, open_rows = [float(edges[0])], [], 0
    for edge, count in zip(edges[1:].tolist(), counts.tolist(), strict=True):
        open_rows += count
        if open_rows >= least:
            kept.append(edge)
            rows.append(open_rows)
            open_rows = 0
    if rows:
        rows[-1] += open_rows
        kept[-1] = float(edges[-1])
    return {"edges": kept, "counts": rows}
