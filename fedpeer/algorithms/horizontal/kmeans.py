"""k-means over the rows of all participants, who have the same columns, by secure sums.

The model has centres c that make the inertia small (a local minimum), over all rows of all participants,

    Σ min_c |z - c|²

where z are the features standardized by mean and standard deviation over all rows, with a missing value at the mean.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedpeer.algorithms.horizontal.logistic import matrix, standardized
from fedpeer.errors import DataError
from fedpeer.peers import Peers
from fedpeer.secure import exact
from fedpeer.stage import Model, Params, Sum, Table, at_least, stage

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

ALGORITHM = "horizontal.kmeans"
SPLITS = 4
"""So many splits are tried for each cluster that is asked for."""
FLAT = 1e-9
"""A cluster with a smaller variance along a feature (of 1 over all rows) is not split there: it may be rounding."""
CHUNK = 1 << 14
"""Rows whose distances are computed at once."""


class Fit(Params, frozen=True):
    k: Annotated[int, msgspec.Meta(ge=2, le=256)] = 8
    """Clusters. The model has fewer if the rows do not fall into so many of `min_rows`."""
    min_rows: Annotated[int, msgspec.Meta(ge=3, le=1_000_000)] = 10
    """Of fewer rows in a cluster a participant tells nothing: they do not count. A cluster without any is given up."""
    max_iter: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100
    """Turns at most, those not counted that split a cluster."""
    tol: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1e-4
    """Training ends when no coordinate of a centre moves further, in standard deviations of its feature."""


@stage(
    version=3,
    params=Fit,
    roles={"member": at_least(3)},
    inputs={"table": Table},
    outputs={"model": Model},
    messages={
        "moments": Sum(
            "how many rows; of each feature: how many values, how many are missing, the exact sum and sum of squares. "
            "Their mean and standard deviation are in the model",
            group="data",
        ),
        "first_counts": Sum("the same as counts, at the mean of all rows", group="data"),
        "first_sums": Sum("the same as sums, at the mean of all rows", group="data"),
        "counts": Sum(
            "at the current centres: how many rows of all participants are nearest to each; of a participant none or "
            "at least min_rows"
        ),
        "sums": Sum(
            "at the current centres, of the rows that were counted: the sum and the sum of squares of each "
            "standardized feature. From one turn to the next a cluster may gain or lose a single row, and the totals "
            "of both turns then tell its values, not whose it is"
        ),
    },
    parameters=lambda params, n_features: params.k * n_features,
    memory=lambda params, rows, n_features: 8 * rows * n_features,  # a matrix of them
)
async def fit(peers: Peers, params: Fit, table: Table) -> dict[str, Any]:
    """Find clusters in the rows of all participants; all get the same bytes.

    ```
    turn    who    what                                                              shape
    -       all    moments: rows; count, missing, Σx, Σx² of each feature            1 + d × 137 integers
    0       all    first_counts, first_sums: as counts and sums                      as counts and sums
    1 …     all    counts: rows by their nearest centre                              m integers
    1 …     all    sums: Σz, Σz² of the rows that were counted, by cluster           2 × (up to m) × d
    ```
    m centres, one at first: the mean of all rows. Each turn moves every centre to the mean of the rows nearest to it.
    While there are fewer than k it then splits one cluster in two, at its mean ± one standard deviation along one
    feature, there where the sum of squares about the mean is largest. So the initial centres come from totals alone,
    without chance and without anybody's row. A centre left without rows that count is given up, and another cluster,
    the next widest, is split for it; after 4·k splits the model has as many clusters as there are.

    A participant counts and sums no rows of a cluster, or at least min_rows: what is left of a total when others take
    their parts out is never a few rows. So the centres are those of the rows that count, which are all but fewer than
    min_rows of each participant and cluster.

    Each peer's part is scaled by a power of two so that it fits the fixed point of a sum whatever the data: with
    Σz² ≤ n per feature no entry exceeds n. The shared state comes from totals by + - * / and square roots alone.

    Source: Lloyd, Least squares quantization in PCM, IEEE Trans. Information Theory 28(2), 1982; splitting as in
    Linde, Buzo and Gray, An algorithm for vector quantizer design, IEEE Trans. Communications 28(1), 1980, with the
    choice of cluster and axis of Su and Dy, In search of deterministic methods for initializing k-means and Gaussian
    mixture clustering, Intelligent Data Analysis 11(4), 2007 (Var-Part).
    """
    if not table.features:
        raise DataError("the table has no feature column")
    columns = sorted(table.features)
    x = matrix(table, columns)
    total = await peers.sum(
        "moments",
        {
            "rows": np.array([table.n_samples], dtype=np.int64),
            **{f"column {name}": exact.moments(x[:, j]) for j, name in enumerate(columns)},
        },
    )
    rows = int(total["rows"][0])
    if rows < params.k * params.min_rows:
        raise DataError(
            f"{rows} rows of all participants are too few for {params.k} clusters of at least {params.min_rows}"
        )
    moments = [exact.moments_of(total[f"column {name}"]) for name in columns]
    mean = np.array([column.mean for column in moments])
    scale = np.array([column.std if column.std > 0 else 1.0 for column in moments])
    z = standardized(x, mean, scale)

    unit = 2.0 ** (20 - (rows - 1).bit_length())  # so that no entry of a peer's part exceeds 2^20
    state: dict[str, Any] = {
        "centres": np.zeros((1, len(columns))),
        "sizes": np.array([rows], dtype=np.int64),  # rows of each cluster, and the inertia, before the last move
        "inertia": math.inf,
        "shift": math.inf,  # the furthest that a coordinate moved
        "moves": 0,  # turns that split nothing, and turns that did
        "splits": 0,
        "failed": 0,  # centres given up since the last split that lasted
        "converged": False,
    }
    most = SPLITS * params.k
    for turn in peers.rounds(most + params.max_iter, shared=state):
        first = "" if turn else "first_"  # where all begin does not depend on anything but the data
        centres = state["centres"]
        nearest = _nearest(z, centres)
        own = np.bincount(nearest, minlength=len(centres)).astype(np.int64)
        own[own < params.min_rows] = 0
        nearest[own[nearest] == 0] = -1  # few rows of ours are nobody's
        counts = (await peers.sum(f"{first}counts", own))["values"]
        kept = np.flatnonzero(counts >= params.min_rows)
        if kept.size == 0:
            raise DataError(f"no cluster has {params.min_rows} rows")
        total = await peers.sum(f"{first}sums", _sums(z, nearest, kept, unit))
        sizes = counts[kept]
        weight = unit * sizes[:, None]
        means = total["sum"] / weight
        squares = np.maximum(total["squares"] / weight - means * means, 0.0) * sizes[:, None]
        given_up = len(centres) - len(kept)
        state["sizes"], state["inertia"] = sizes, math.fsum(squares.ravel().tolist())
        state["shift"] = float(np.abs(means - centres[kept]).max())
        state["failed"] = state["failed"] + given_up if given_up else 0
        places = _places(sizes, squares, params.min_rows)
        if len(means) < params.k and state["splits"] < most and state["failed"] < len(places):
            state["centres"] = _split(means, sizes, squares, *places[state["failed"]])
            state["splits"] += 1
        else:
            state["centres"] = means
            state["moves"] += 1
            state["converged"] = given_up == 0 and state["shift"] <= params.tol
        peers.progress(
            state["splits"] + state["moves"],
            most + params.max_iter,
            clusters=len(state["centres"]),
            inertia=state["inertia"],
            shift=state["shift"],
        )
        if state["converged"] or state["moves"] == params.max_iter:
            break

    order = np.argsort(-state["sizes"], kind="stable")  # cluster 0 is the largest
    facts = {
        "columns": columns,
        "n_samples": rows,
        "k": params.k,
        "min_rows": params.min_rows,
        "clusters": len(order),
        "sizes": state["sizes"][order].tolist(),
        "inertia": state["inertia"],
        "iterations": state["splits"] + state["moves"],
        "converged": state["converged"],
    }
    return {"model": Model(ALGORITHM, facts, {"centres": state["centres"][order], "mean": mean, "scale": scale})}


@stage(
    version=1,
    roles={"member": at_least(1)},
    inputs={"model": Model, "table": Table},
    outputs={"clusters": Table},
    messages={},
)
async def predict(peers: Peers, params: Params, model: Model, table: Table) -> dict[str, Any]:
    """For each row the id and its cluster, the number of the nearest centre. No message: it runs at one peer alone.

    Columns are found by name; what the model does not know is ignored, what it misses is an error. A row without an id
    column is named by its number, from 0.
    """
    if model.algorithm != ALGORITHM:
        raise DataError(f"the model is of {model.algorithm!r}, not of {ALGORITHM!r}")
    columns = list(model.facts["columns"])
    missing = [name for name in columns if name not in table.data.column_names]
    if missing:
        raise DataError(f"the table lacks what the model was trained on: {', '.join(map(repr, missing))}")
    z = standardized(matrix(table, columns), model.arrays["mean"], model.arrays["scale"])
    nearest = _nearest(z, model.arrays["centres"]).astype(np.float64)
    name = table.id if table.id not in (None, "cluster") else "row"
    ids = table.ids() if table.id is not None else [str(row) for row in range(table.n_samples)]
    return {"clusters": Table(pa.table({name: pa.array(ids, pa.string()), "cluster": pa.array(nearest)}), id=name)}


# a peer's own rows


def _nearest(z: Floats, centres: Floats) -> Integers:
    """The number of the nearest centre of each row; of equally near ones the first."""
    half = (centres * centres).sum(axis=1) / 2
    nearest = np.empty(len(z), dtype=np.int64)
    for start in range(0, len(z), CHUNK):
        part = slice(start, start + CHUNK)
        nearest[part] = np.argmin(half - z[part] @ centres.T, axis=1)
    return nearest


def _sums(z: Floats, nearest: Integers, kept: Integers, unit: float) -> dict[str, Floats]:
    """Of each kept cluster Σz and Σz² of the own rows, times unit."""
    sums = np.zeros((2, len(kept), z.shape[1]))
    for i, cluster in enumerate(kept):
        rows = z[nearest == cluster]
        sums[0, i] = rows.sum(axis=0)
        sums[1, i] = (rows * rows).sum(axis=0)
    return {"sum": sums[0] * unit, "squares": sums[1] * unit}


# from totals, equal at all peers


def _places(sizes: Integers, squares: Floats, min_rows: int) -> list[tuple[int, int]]:
    """Where a cluster may be split, as (cluster, feature), the largest sum of squares about the mean first."""
    may = (squares > FLAT * sizes[:, None]) & (sizes >= 2 * min_rows)[:, None]
    order = np.argsort(-squares, axis=None, kind="stable")
    return [(int(at) // squares.shape[1], int(at) % squares.shape[1]) for at in order if may.flat[at]]


def _split(means: Floats, sizes: Integers, squares: Floats, cluster: int, feature: int) -> Floats:
    """The centres with one more: that of the cluster moved by a standard deviation to one side, the new one last."""
    centres = np.vstack([means, means[cluster]])
    deviation = math.sqrt(squares[cluster, feature] / sizes[cluster])
    centres[cluster, feature] -= deviation
    centres[-1, feature] += deviation
    return centres
