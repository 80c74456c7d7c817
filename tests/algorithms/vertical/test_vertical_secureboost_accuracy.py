"""How good the trees are on real tables, beside scikit-learn's of the same bins.

That participants with parts of a table grow the trees of the joined one is test_vertical_secureboost.py's; here they
are grown on the joined one, where nothing needs to be encrypted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.metrics import accuracy_score, mean_squared_error, roc_auc_score
from threadpoolctl import threadpool_limits

from fedpeer.secure import trees
from fedpeer.secure.forest import OWN, Growing, empty, goes_left, margins
from fedpeer.secure.losses import Loss

Array = Any
TREES = 20


def read(path: Path) -> dict[str, list[float]]:
    """Numbers by id."""
    lines = [line.split(",") for line in path.read_text().splitlines()[1:]]
    return {name: [float(value) for value in values] for name, *values in lines}


def joined(folder: Path, name: str, chance: Any) -> tuple[Array, Array]:
    """Features (columns, rows) and labels of what both sides have; each lacks a fifth of the rows."""
    guest, host = (read(folder / "data" / f"{name}_hetero_{side}.csv") for side in ("guest", "host"))
    held = [{each for each in sorted(side) if chance.random() < 0.8} for side in (guest, host)]
    rows = np.array([guest[each] + host[each] for each in sorted(held[0] & held[1])]).T
    return rows[1:], rows[0]


def grown(loss: Loss, bins: Array, ends: Array, y: Array, depth: int) -> tuple[dict[str, Any], Array]:
    """The forest, and its base."""
    targets, weights = loss.targets(y), np.ones(len(y))
    base = loss.base(targets, weights)
    state: dict[str, Any] = {"tree": 0, "open": [], "node": np.zeros(len(y), np.int16), "records": [0], "best": [0, 0]}
    state |= {"margins": np.repeat(base[None, :], len(y), axis=0), **{name: [] for name in OWN}}
    state |= empty(TREES * loss.groups, depth)
    growing = Growing(bins, ends, targets, weights, loss, trees.Rules(0.1, 0.0, 0.0), 0.3, depth, state)
    while growing.tree < TREES * loss.groups:
        growing.grow_alone(np.ones(len(y), np.bool_), np.arange(len(bins)))
    return state, base


def predicted(state: dict[str, Any], x: Array, depth: int) -> Array:
    """The leaf of each row in each tree."""
    feature, threshold, missing = (np.array(state[name]) for name in OWN)
    tree, row = np.arange(len(state["owner"]))[:, None], np.arange(x.shape[1])[None, :]
    node = np.zeros((len(tree), x.shape[1]), np.int64)
    for _ in range(depth):
        record = state["record"][tree, node]
        left = goes_left(x[feature[record], row], threshold[record], missing[record])
        node = np.where(state["owner"][tree, node] < 0, node, 2 * node + np.where(left, 1, 2))
    return node


@pytest.mark.system  # half a minute of one core
@pytest.mark.parametrize(
    ("name", "objective", "classes", "depth", "splits", "within"),
    [
        ("breast", "binary:bce", 2, 3, 3, 0.002),
        ("vehicle_scale", "multi:ce", 4, 3, 3, 0.01),
        ("student", "regression:l2", 2, 3, 3, 0.1),
        ("default_credit", "binary:bce", 2, 5, 1, 0.002),
    ],
)
def test_on_real_tables_they_are_as_good_as_others(
    name: str, objective: Any, classes: int, depth: int, splits: int, within: float, shared: Path
) -> None:
    ours, theirs = [], []
    for seed in range(splits):
        chance = np.random.default_rng(seed)
        x, y = joined(shared, name, chance)
        test = chance.random(len(y)) < 0.3
        ends = np.array([trees.edges(column, 32) for column in x])
        bins = np.array([trees.binned(column, end) for column, end in zip(x, ends, strict=True)])
        loss = Loss.of(objective, classes, y)
        state, base = grown(loss, bins[:, ~test], ends, y[~test], depth)
        scores = loss.scores(margins(state, base, predicted(state, x[:, test], depth)))
        kind = HistGradientBoostingRegressor if objective == "regression:l2" else HistGradientBoostingClassifier
        other = kind(
            max_iter=TREES, max_depth=depth, max_leaf_nodes=None, learning_rate=0.3, l2_regularization=0.1,
            early_stopping=False,
        )  # fmt: skip
        with threadpool_limits(1):  # threads cost more than they bring here
            other.fit(bins[:, ~test].T, y[~test])
        if objective == "binary:bce":
            ours.append(roc_auc_score(y[test], scores["score"]))
            theirs.append(roc_auc_score(y[test], other.predict_proba(bins[:, test].T)[:, 1]))
        elif objective == "multi:ce":
            ours.append(accuracy_score(y[test], scores["class"]))
            theirs.append(accuracy_score(y[test], other.predict(bins[:, test].T)))
        else:
            ours.append(-(mean_squared_error(y[test], scores["score"]) ** 0.5))
            theirs.append(-(mean_squared_error(y[test], other.predict(bins[:, test].T)) ** 0.5))
    print(name, np.mean(ours), np.mean(theirs))
    assert np.mean(ours) > np.mean(theirs) - within
