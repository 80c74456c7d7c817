"""Logistic regression over the rows of all participants, trained by Newton's method on secure sums.

The model minimizes, over all n rows of all participants, each weighing the same,

    1/n Σ log(1 + exp(-s·m)) + reg_lambda/2 · |coef|²        m = z·coef + intercept, s = +1 for label 1, -1 for label 0

where z are the features standardized by mean and standard deviation over all rows, with a missing value at the mean.
That is scikit-learn's LogisticRegression(C=1 / (reg_lambda · n)) after its StandardScaler.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedpeer.algorithms.horizontal.statistics import numbers
from fedpeer.errors import DataError
from fedpeer.peers import Peers
from fedpeer.secure import cells, exact
from fedpeer.stage import Model, Params, Report, Sum, Table, at_least, stage

Floats = npt.NDArray[np.float64]

ALGORITHM = "horizontal.logistic"
CELLS = 4096
"""Cells of the histogram of scores that the AUC is computed from."""
Z_LIMIT = 2.0**20
"""A value further than this many standard deviations from the mean counts as that far; no training row can be."""
FLAT = 1e-14
"""The objective is known to about this part: near the optimum a step may rise by it."""


class Fit(Params, frozen=True):
    reg_lambda: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.01
    """Strength of the L2 penalty, relative to the mean loss of a row. 0: none, and no optimum for separable classes."""
    max_iter: Annotated[int, msgspec.Meta(ge=1, le=100)] = 25
    """Turns at most. Each opens other sums of the same rows, so there are no more than training can need."""
    tol: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1e-8
    """Training ends when no partial derivative of the objective is larger."""


def _opened(params: Fit, n_features: int) -> int:
    """What the policy counts for each row: weights, or numbers that a turn opens for each value of a row, if more.

    A turn opens (d + 1) + (d + 1)(d + 2) / 2 numbers, and a row has d + 1 values, its label among them. So it is d + 1
    from two features on: what one turn says of the rows is fewer numbers than those they fit, for each that they have.
    Mean and scale are moments of all rows, not fitted.
    """
    return max(n_features + 1, math.ceil((n_features + 4) / 2))


@stage(
    version=3,
    params=Fit,
    roles={"member": at_least(3)},
    inputs={"table": Table},
    outputs={"model": Model},
    messages={
        "moments": Sum(
            "how many rows, and how many with label 1; of each feature: how many values, how many are missing, the "
            "exact sum and sum of squares. Their mean and standard deviation are in the model",
            group="data",
        ),
        "start": Sum("the same as newton, at the model that all begin with (all weights 0)", group="data"),
        "newton": Sum(
            "at the current model, over the rows of those who take part: their number, the sum of the losses, their "
            "gradient, and their Hessian (d + 1 by d + 1, symmetric)"
        ),
    },
    parameters=_opened,
    memory=lambda params, rows, n_features: 8 * rows * n_features,  # a matrix of them
)
async def fit(peers: Peers, params: Fit, table: Table) -> dict[str, Any]:
    """Train one model on the rows of all participants; all get the same bytes.

    ```
    turn    who    what                                                                   shape
    -       all    moments: rows, positives; count, missing, Σx, Σx² of each feature      2 + d × 137 integers
    0       all    start: as newton                                                       as newton
    1 …     all    newton: gradient, upper triangle of the Hessian, exact sum of losses   (d + 1) + (d + 1)(d + 2)/2
                   and how many rows                                                      1
    ```
    A turn evaluates the objective at a trial point. If it fell enough the point is taken and Newton's direction is
    computed there; else the step is halved. About eight turns for ordinary data. When others take part than in the
    turn before it is another objective: the point is taken, for there is nothing to compare it with.

    Each peer's part is scaled by a power of two so that it fits the fixed point of a sum whatever the data: with
    Σz² ≤ n per feature no entry exceeds n. What is summed differs from the true sum by at most 2^-52·n a peer. The
    shared state comes from totals by + - * / and square roots alone, hence the own Cholesky and no BLAS.

    What is opened: in a turn d / 2 + 2 numbers for each value of a row, which the policy's parameters for each row
    bound (at 0.33 they are about a sixth of the values of one owner's rows at most). All turns together may open more
    numbers than the rows have values; they are sums over other weights, and a participant that lies in a sum can
    choose these. Nothing but noise would bound what can be computed from them.

    Source: Boyd and Vandenberghe, Convex Optimization, 2004, section 9.5 (damped Newton, backtracking line search).
    """
    if not table.features:
        raise DataError("the table has no feature column")
    columns = sorted(table.features)
    x, y = matrix(table, columns), _labels(table)
    total = await peers.sum(
        "moments",
        {
            "rows": np.array([y.size, int(y.sum())], dtype=np.int64),
            **{f"column {name}": exact.moments(x[:, j]) for j, name in enumerate(columns)},
        },
    )
    rows, positives = total["rows"].tolist()
    if positives in (0, rows):
        raise DataError(f"all {rows} rows of all participants have the same label: there is nothing to tell apart")
    moments = [exact.moments_of(total[f"column {name}"]) for name in columns]
    mean = np.array([column.mean for column in moments])
    scale = np.array([column.std if column.std > 0 else 1.0 for column in moments])
    z = standardized(x, mean, scale)

    d = len(columns)
    unit = 2.0 ** (20 - (rows - 1).bit_length())  # so that no entry of a peer's part exceeds 2^20
    upper = np.triu_indices(d + 1)
    lower = upper[::-1]
    penalty = np.append(np.full(d, params.reg_lambda), 0.0)  # the intercept, the last of the weights, is free
    state: dict[str, Any] = {
        "turns": 0,
        "weights": np.zeros(d + 1),  # the best point so far: its objective, the largest partial derivative there,
        "objective": math.inf,
        "gradient": math.inf,
        "direction": np.zeros(d + 1),  # Newton's direction, the slope along it, and the part of it that is tried
        "slope": 0.0,
        "step": 1.0,
        "trial": np.zeros(d + 1),
        "survivors": [],
    }
    for turn in peers.rounds(params.max_iter, shared=state):
        trial = state["trial"]
        losses, gradient, hessian = _derivatives(z, y, trial)
        total = await peers.sum(
            "newton" if turn else "start",  # where all begin does not depend on anything but the data
            {
                "rows": np.array([y.size]),
                "losses": exact.sum_limbs(losses),
                "gradient": gradient * unit,
                "hessian": hessian[upper] * unit,
            },
        )
        summed, survivors = int(total["rows"][0]), list(total.survivors)
        if not summed:
            raise DataError(f"{', '.join(survivors)} have no row")
        objective = exact.sum_of(total["losses"]) / summed + math.fsum((penalty * trial * trial).tolist()) / 2
        best = state["objective"] if survivors == state["survivors"] else math.inf
        state["survivors"] = survivors
        if objective <= best + 1e-4 * state["step"] * state["slope"] + FLAT * (1 + best):
            slopes = total["gradient"] / (unit * summed) + penalty * trial
            curvature = np.diag(penalty)
            curvature[lower] += total["hessian"] / (unit * summed)
            direction = -solve(curvature, slopes)
            state["weights"], state["objective"], state["gradient"] = trial, objective, float(np.abs(slopes).max())
            state["direction"], state["slope"] = direction, math.fsum((slopes * direction).tolist())
            state["step"] = 1.0
        else:
            state["step"] /= 2
        state["trial"] = state["weights"] + state["step"] * state["direction"]
        state["turns"] = turn + 1
        peers.progress(turn + 1, params.max_iter, objective=state["objective"], gradient=state["gradient"])
        if state["gradient"] <= params.tol:
            break

    facts = {
        "columns": columns,
        "label": table.label,
        "n_samples": rows,
        "positives": positives,
        "reg_lambda": params.reg_lambda,
        "iterations": state["turns"],
        "converged": state["gradient"] <= params.tol,
        "objective": state["objective"],
    }
    arrays = {"coef": state["weights"][:d], "intercept": state["weights"][d:], "mean": mean, "scale": scale}
    return {"model": Model(ALGORITHM, facts, arrays)}


@stage(
    version=1,
    roles={"member": at_least(1)},
    inputs={"model": Model, "table": Table},
    outputs={"scores": Table},
    messages={},
)
async def predict(peers: Peers, params: Params, model: Model, table: Table) -> dict[str, Any]:
    """For each row the id and the score, the probability of label 1. No message: it runs at one peer alone.

    Columns are found by name; what the model does not know is ignored, what it misses is an error. A row without an id
    column is named by its number, from 0.
    """
    margin = _margins(model, table)
    name = table.id if table.id not in (None, "score") else "row"
    ids = table.ids() if table.id is not None else [str(row) for row in range(table.n_samples)]
    score = _sigmoid(margin)
    return {"scores": Table(pa.table({name: pa.array(ids, pa.string()), "score": pa.array(score)}), id=name)}


class Evaluate(Params, frozen=True):
    min_cell: Annotated[int, msgspec.Meta(ge=1)] = 10
    """What a participant adds to any count is 0 or at least so many rows."""


@stage(
    version=3,
    params=Evaluate,
    roles={"member": at_least(3)},
    inputs={"model": Model, "table": Table},
    outputs={"report": Report},
    messages={
        "scores": Sum(
            "of the model on the rows of all participants together: counts of rows by score (4096 cells) and label, "
            "and the sum of the losses; reported are AUC, accuracy, log loss and how many are right and wrong. What a "
            "participant adds to a cell is 0 or at least min_cell rows: groups of neighbours count in one cell",
            group="data",  # with the same model it is the same again: over others it would tell who is gone
        ),
    },
)
async def evaluate(peers: Peers, params: Evaluate, model: Model, table: Table) -> dict[str, Any]:
    """How well a model does on labelled rows of all participants, nearly as on one table.

    ```
    turn    who    what                                                     shape
    -       all    rows by cell of their score, one line per label          2 × 4096 integers
                   exact sum of the log losses                              46 integers
    ```
    Cells are of equal width in m / (1 + |m|), m the log odds. At each participant the rows of a label count in groups
    of `min_cell` that follow each other by score, each group in one cell (secure/cells.py); of a
    label with fewer rows none are counted, and their losses neither. So a participant tells at most one cell for every
    `min_cell` of its rows. AUC, accuracy and `counts` (at 0.5) are those of the rows in these places: a participant's
    right and wrong ones of a label are off by less than a group. Rows of one cell count as ties; half the pairs of
    both labels in one cell are `auc_error`. The log loss is exact. `auc` is None when all rows have one label.
    """
    y = _labels(table)
    margin = _margins(model, table)
    cell = np.maximum(np.ceil((1 + margin / (1 + np.abs(margin))) / 2 * CELLS).astype(np.int64) - 1, 0)
    enough = [bool(np.count_nonzero(y == label) >= params.min_cell) for label in (0, 1)]
    counted = np.where(y == 1, enough[1], enough[0])
    total = await peers.sum(
        "scores",
        {
            "cells": np.stack([cells.grouped(cell[y == label], CELLS, params.min_cell) for label in (0, 1)]),
            "losses": exact.sum_limbs(_losses(margin, y)[counted]),
        },
    )
    negative, positive = total["cells"]
    (tn, fp), (fn, tp) = total["cells"].reshape(2, 2, CELLS // 2).sum(axis=2).tolist()
    rows, pairs = tn + fp + fn + tp, (tn + fp) * (fn + tp)
    if rows == 0:
        raise DataError(f"no participant has {params.min_cell} rows of one label to evaluate on")
    below = np.cumsum(negative) - negative
    won, tied = int((positive * below).sum()), int((positive * negative).sum())
    report = {
        "n_samples": rows,
        "positives": fn + tp,
        "auc": (2 * won + tied) / (2 * pairs) if pairs else None,
        "auc_error": tied / (2 * pairs) if pairs else None,
        "accuracy": (tn + tp) / rows,
        "log_loss": exact.sum_of(total["losses"]) / rows,
        "counts": {"tp": tp, "fp": fp, "tn": tn, "fn": fn},
    }
    return {"report": Report(report)}


def solve(a: Floats, b: Floats) -> Floats:
    """x with a·x = b for a symmetric, positive semidefinite `a` (its lower triangle is read), by Cholesky.

    Elementwise + - * / and square roots only: the same bits on every processor. A pivot that vanishes in rounding (a
    constant feature, or one that others determine, without penalty) gives x = 0 there.
    """
    low, n = np.tril(a), len(b)
    x = b.copy()
    kept = np.ones(n, dtype=bool)
    smallest = 1e-12 * np.diag(a)
    for k in range(n):
        if low[k, k] <= smallest[k]:
            kept[k] = False
            low[k:, k] = 0.0
            x[k] = 0.0
            continue
        low[k:, k] /= np.sqrt(low[k, k])
        low[k + 1 :, k + 1 :] -= low[k + 1 :, k, None] * low[None, k + 1 :, k]
        x[k] /= low[k, k]
        x[k + 1 :] -= low[k + 1 :, k] * x[k]
    for k in np.flatnonzero(kept)[::-1]:
        x[k] /= low[k, k]
        x[:k] -= low[k, :k] * x[k]
    return np.where(kept, x, 0.0)


# a peer's own rows


def _labels(table: Table) -> Floats:
    y = table.labels()
    wrong = np.flatnonzero((y != 0) & (y != 1))
    if wrong.size:
        raise DataError(
            f"the label column {table.label!r} has values other than 0 and 1, the first in row {wrong[0]} (from 0)"
        )
    return y


def matrix(table: Table, columns: list[str]) -> Floats:
    """The named columns, shape (n, d), NaN where a value is missing."""
    return np.array([numbers(table, name) for name in columns]).T.reshape(table.n_samples, len(columns))


def standardized(x: Floats, mean: Floats, scale: Floats) -> Floats:
    """(x - mean) / scale with 0 for missing values, within ±Z_LIMIT; safe for values near the ends of float64."""
    exponent = np.frexp(scale)[1]
    with np.errstate(over="ignore"):
        z = (np.ldexp(x, -exponent) - np.ldexp(mean, -exponent)) / np.ldexp(scale, -exponent)
    return np.clip(np.where(np.isnan(z), 0.0, z), -Z_LIMIT, Z_LIMIT)


def _derivatives(z: Floats, y: Floats, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """Each row's loss, and the gradient (d + 1,) and the Hessian (d + 1, d + 1) of their sum."""
    wide = np.column_stack([z, np.ones(len(z))])
    margin = wide @ weights
    p = _sigmoid(margin)
    return _losses(margin, y), wide.T @ (p - y), wide.T @ (wide * (p * (1 - p))[:, None])


def _sigmoid(margin: Floats) -> Floats:
    return (1 + np.tanh(margin / 2)) / 2


def _losses(margin: Floats, y: Floats) -> Floats:
    return np.logaddexp(0.0, np.where(y == 1, -margin, margin))


def _margins(model: Model, table: Table) -> Floats:
    """The log odds of label 1 for each row; DataError for another model or missing columns."""
    if model.algorithm != ALGORITHM:
        raise DataError(f"the model is of {model.algorithm!r}, not of {ALGORITHM!r}")
    columns = list(model.facts["columns"])
    missing = [name for name in columns if name not in table.data.column_names]
    if missing:
        raise DataError(f"the table lacks what the model was trained on: {', '.join(map(repr, missing))}")
    z = standardized(matrix(table, columns), model.arrays["mean"], model.arrays["scale"])
    margins: Floats = z @ model.arrays["coef"] + model.arrays["intercept"]
    return margins
