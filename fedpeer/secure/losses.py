"""What boosted trees minimize: per row a margin F, the sum of what its leaves say, and a target y of the loss.

Rules
* Everything has one column for each group of trees: a class, one against the rest, or a single one.
* g and h keep within `bound`, whatever labels and margins are: what is packed beside them has room for no more, and
  a bound of the data's own would tell how far training got.
* Margins and labels are the guest's, so exp and log may differ between processors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from fedpeer.errors import DataError

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Objective = Literal["binary:bce", "multi:ce", "regression:l2"]

CLIP: Final = 2.0
"""Margins of scaled labels, which are within ±1, count as no further out."""


@dataclass(frozen=True)
class Loss:
    """One of the objectives; for "regression:l2" labels are middle + half·y, |y| ≤ 1."""

    objective: Objective
    classes: int = 2
    middle: float = 0.0
    half: float = 1.0

    @classmethod
    def of(cls, objective: Objective, classes: int, labels: Floats) -> Loss:
        """The loss for these labels. DataError for labels that it is not for."""
        if objective == "regression:l2":
            if not np.isfinite(labels).all() or not len(labels) or labels.min() == labels.max():
                raise DataError("all rows have the same label, or one is not finite: there is nothing to learn")
            low, high = float(labels.min()), float(labels.max())
            return cls(objective, classes, low / 2 + high / 2, high / 2 - low / 2)
        return cls(objective, 2 if objective == "binary:bce" else classes)

    @property
    def groups(self) -> int:
        """Trees of one iteration."""
        return self.classes if self.objective == "multi:ce" else 1

    @property
    def bound(self) -> float:
        """No |g| or h is larger."""
        return 4.0 if self.objective == "regression:l2" else 1.0

    def targets(self, labels: Floats) -> Floats:
        """y, (rows, groups). DataError for a label that there is no target for."""
        if self.objective == "regression:l2":
            scaled: Floats = (labels - self.middle) / self.half
            if not (np.abs(scaled) <= 1 + 1e-9).all():
                raise DataError("a label outside of the range that the model was first trained on")
            return np.asarray(np.clip(scaled, -1.0, 1.0)[:, None])
        known = np.arange(float(self.classes))
        wrong = np.flatnonzero(~np.isin(labels, known))
        if wrong.size:
            raise DataError(f"labels are 0 to {self.classes - 1} here; the one of row {wrong[0]} (from 0) is not")
        if self.objective == "binary:bce":
            return labels.reshape(-1, 1)
        return np.asarray(labels[:, None] == known[None, :], dtype=np.float64)

    def base(self, targets: Floats, weights: Floats) -> Floats:
        """The best constant margin of each group, (groups,). DataError if a class has no row with weight."""
        total = weights.sum()
        if not total > 0:
            raise DataError("no row has weight")
        mean = (targets * weights[:, None]).sum(axis=0) / total
        if self.objective == "regression:l2":
            return np.asarray(mean)
        if not ((mean > 0) & (mean < 1)).all():
            raise DataError("the rows with weight have one class only, or not all of num_class")
        odds: Floats = np.log(mean / (1 - mean))
        return odds

    def derivatives(self, margins: Floats, targets: Floats) -> tuple[Floats, Floats]:
        """g and h of one group's rows."""
        if self.objective == "regression:l2":
            return np.clip(margins, -CLIP, CLIP) - targets, np.ones_like(margins)
        p = _sigmoid(margins)
        return p - targets, p * (1 - p)

    def mean(self, margins: Floats, targets: Floats, weights: Floats) -> float:
        """The mean loss of rows with these weights, summed over the groups."""
        if self.objective == "regression:l2":
            each = (np.clip(margins, -CLIP, CLIP) - targets) ** 2
        else:
            each = np.logaddexp(0.0, np.where(targets == 1, -margins, margins))
        return float((each.sum(axis=1) * weights).sum() / weights.sum())

    def scores(self, margins: Floats) -> dict[str, Floats]:
        """What is predicted, by the name of its column: the value, or the probability of 1 or of each class."""
        if self.objective == "regression:l2":
            return {"score": self.middle + self.half * np.clip(margins[:, 0], -CLIP, CLIP)}
        p = _sigmoid(margins)
        if self.objective == "binary:bce":
            return {"score": p[:, 0]}
        p = np.maximum(p, np.finfo(np.float64).tiny)
        p /= p.sum(axis=1, keepdims=True)
        named = {f"score_{number}": p[:, number] for number in range(self.classes)}
        return {"class": np.argmax(margins, axis=1).astype(np.float64), **named}


def _sigmoid(margins: Floats) -> Floats:
    with np.errstate(over="ignore"):
        p: Floats = 1 / (1 + np.exp(-margins))
    return p
