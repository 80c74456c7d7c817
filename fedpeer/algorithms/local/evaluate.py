"""How good scores are, at who has the label: the numbers of scikit-learn, from counts that are exact.

Rules
* A row is found by its id, never by luck: every row has one score and every score one row, else an error.
* Rows of equal score are one step of every curve, so no number depends on the order of the rows.
* A threshold predicts label 1 where the score is at least that high.
* What has no value (precision where nothing is predicted) is 0 as in scikit-learn; the report has no list that grows
  with the rows.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedpeer.errors import DataError
from fedpeer.peers import Peers
from fedpeer.stage import Params, Report, Table, at_least, stage

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

DECILES = 10
POINTS = 100
"""Points of the precision-recall curve at most."""
MAX_CLASSES = 100
"""The confusion matrix has the square of it."""


class Evaluate(Params, frozen=True):
    task: Literal["binary", "multi", "regression"] = "binary"
    """binary: labels 0 and 1, `score` is the probability of 1. multi: any numbers as labels, `class` is the predicted
    one. regression: `score` is the predicted value."""


@stage(
    version=1,
    params=Evaluate,
    roles={"member": at_least(1)},
    inputs={"scores": Table, "table": Table},
    outputs={"report": Report},
    messages={},
)
async def run(peers: Peers, params: Evaluate, scores: Table, table: Table) -> dict[str, Any]:
    """A report at a participant whose table has a label, None at others. No message; it stays where it is made.

    Rows are matched by id. A table without an id column has the row numbers, from 0, as its ids, as in the scores of a
    `predict`; scores without an id column are in the order of the table. Where one participant alone has scores, it
    alone takes part: `roles = { member = ["bank"] }`.

    binary: `auc`; `log_loss`; `average_precision`; `ks` = the largest TPR - FPR; `confusion` at the threshold 0.5 and
    at that of `ks`, with accuracy, precision, recall and F1; `pr_curve`, [threshold, precision, recall] where the
    recall reaches each hundredth; `lift`, for each tenth of the rows, best scores first: `min_score`, the `rate` of
    label 1 in it, and of all down to it `gain`, the share of the labels 1, and `lift`, how many times as many as among
    as many rows of chance. A tenth that ends inside equal scores has its part of each of them.
    multi: `accuracy`, `macro_f1`, `classes`, and `confusion`, its lines the labels and its columns the predictions.
    regression: `rmse`, `mae`, `r2` (None where all labels are the same).

    DataError, by name, for ids without a partner or repeated, missing scores or labels, labels of one class only.

    Source: Fawcett, An introduction to ROC analysis, 2006 (ties); scikit-learn 1.x, metrics.
    """
    if table.label is None:
        return {"report": None}
    y = table.labels()
    predicted = _column(scores, "class" if params.task == "multi" else "score")[_places(scores, table)]
    report = {"binary": _binary, "multi": _multi, "regression": _regression}[params.task](y, predicted)
    return {"report": Report({"task": params.task, "n_samples": y.size, **report})}


# which score belongs to which row


def _places(scores: Table, table: Table) -> Ints:
    """Of each row of the table, the row of its score."""
    if scores.n_samples != table.n_samples:
        raise DataError(
            f"{scores.n_samples} scores for {table.n_samples} rows", hint="give the table that was scored, whole"
        )
    names = _names(table)
    given = names if scores.id is None else _names(scores)
    if given == names:
        return np.arange(table.n_samples)
    place = {name: row for row, name in enumerate(given)}
    for what, listed in (("the scores have", given), ("the table has", names)):
        if len(set(listed)) < len(listed):
            raise DataError(f"{what} an id twice, and their orders differ", hint="keep one row for each id")
    if unmatched := [row for row, name in enumerate(names) if name not in place]:
        raise DataError(
            f"{len(unmatched)} of {len(names)} rows have no score, the first is row {unmatched[0]} (from 0)",
            hint="give the table that was scored, with the same ids",
        )
    return np.array([place[name] for name in names], dtype=np.int64)


def _names(table: Table) -> list[str]:
    return table.ids() if table.id is not None else [str(row) for row in range(table.n_samples)]


def _column(scores: Table, name: str) -> Floats:
    column = scores.column(name)
    missing = np.flatnonzero(np.isnan(column))
    if missing.size:
        raise DataError(f"{missing.size} scores have no {name!r}, the first is in row {missing[0]} (from 0)")
    return column


# what is reported


def _binary(y: Floats, score: Floats) -> dict[str, Any]:
    if (wrong := np.flatnonzero((y != 0) & (y != 1))).size:
        raise DataError(f"a label is neither 0 nor 1, in row {wrong[0]} (from 0)", hint='task = "multi"?')
    if (wrong := np.flatnonzero((score < 0) | (score > 1))).size:
        raise DataError(f"the score of row {wrong[0]} (from 0) is not a probability", hint='task = "regression"?')
    positives, negatives = int(np.count_nonzero(y)), int(np.count_nonzero(y == 0))
    if not positives or not negatives:
        raise DataError(f"all {y.size} labels are the same: there is nothing to tell apart")
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))  # of each group of equal scores
    thresholds = score[order][last]
    true, taken = np.cumsum(y[order]).astype(np.int64)[last], (last + 1).astype(np.int64)
    false = taken - true
    stepped, others = np.diff(true, prepend=0), np.diff(false, prepend=0)  # labels 1 and 0 of each group
    pairs = positives * negatives
    won = int((stepped * (2 * (negatives - false) + others)).sum())  # in half pairs
    ahead = true * negatives - false * positives
    best = int(np.argmax(ahead))
    precision, recall = true / taken, true / positives
    reached = np.unique(np.searchsorted(true, -(-np.arange(1, POINTS + 1) * positives // POINTS)))
    at_half = int(np.count_nonzero(thresholds >= 0.5))
    p = np.clip(score, np.finfo(np.float64).eps, 1 - np.finfo(np.float64).eps)
    return {
        "positives": positives,
        "auc": won / (2 * pairs),
        "log_loss": -math.fsum(np.where(y == 1, np.log(p), np.log1p(-p)).tolist()) / y.size,
        "average_precision": math.fsum((precision * stepped).tolist()) / positives,
        "ks": int(ahead[best]) / pairs,
        "confusion": {
            "half": _confusion(0.5, int(stepped[:at_half].sum()), int(others[:at_half].sum()), positives, negatives),
            "ks": _confusion(float(thresholds[best]), int(true[best]), int(false[best]), positives, negatives),
        },
        "pr_curve": np.column_stack([thresholds, precision, recall])[reached].tolist(),
        "lift": _lift(thresholds, true, taken),
    }


def _confusion(threshold: float, tp: int, fp: int, positives: int, negatives: int) -> dict[str, Any]:
    fn, tn = positives - tp, negatives - fp
    return {
        "threshold": threshold,
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
        "accuracy": (tp + tn) / (positives + negatives),
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tp / positives,
        "f1": 2 * tp / (2 * tp + fp + fn),
    }


def _lift(thresholds: Floats, true: Ints, taken: Ints) -> list[dict[str, float]]:
    rows, positives = int(taken[-1]), int(true[-1])
    shares = np.arange(1, DECILES + 1) / DECILES
    depth = np.arange(1, DECILES + 1) * rows / DECILES
    found = np.interp(depth, np.append(0, taken), np.append(0, true))
    lowest = thresholds[np.searchsorted(taken, depth)]
    columns = {
        "share": shares,
        "min_score": lowest,
        "rate": np.diff(found, prepend=0) / (rows / DECILES),
        "gain": found / positives,
        "lift": found / positives / shares,
    }
    return [dict(zip(columns, line, strict=True)) for line in zip(*(c.tolist() for c in columns.values()), strict=True)]


def _multi(y: Floats, predicted: Floats) -> dict[str, Any]:
    if np.unique(y).size < 2:
        raise DataError(f"all {y.size} labels are the same: there is nothing to tell apart")
    classes, codes = np.unique(np.concatenate([y, predicted]), return_inverse=True)
    if classes.size > MAX_CLASSES:
        raise DataError(
            f"{classes.size} classes, and at most {MAX_CLASSES} are told apart", hint='task = "regression"?'
        )
    k = classes.size
    confusion = np.bincount(codes[: y.size] * k + codes[y.size :], minlength=k * k).reshape(k, k)
    right = np.diag(confusion)
    f1 = 2 * right / (confusion.sum(axis=0) + confusion.sum(axis=1))  # each class is in one of them
    return {
        "accuracy": int(right.sum()) / y.size,
        "macro_f1": math.fsum(f1.tolist()) / k,
        "classes": classes.tolist(),
        "confusion": confusion.tolist(),
    }


def _regression(y: Floats, predicted: Floats) -> dict[str, Any]:
    if not y.size:
        raise DataError("the table has no row")
    error = y - predicted
    squares = math.fsum((error * error).tolist())
    about = y - math.fsum(y.tolist()) / y.size
    spread = math.fsum((about * about).tolist())
    return {
        "rmse": math.sqrt(squares / y.size),
        "mae": math.fsum(np.abs(error).tolist()) / y.size,
        "r2": 1 - squares / spread if y.min() < y.max() and spread > 0 else None,
    }
