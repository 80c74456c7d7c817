"""Boosted trees on one table, written from the description alone: what the federated ones have to be, to the bit.

A table is given by its bins, (features, rows), `bins` for a missing value; features in the order guest, then hosts.
Nothing of fedpeer is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

LEAST = 20
Array = Any


def may_be_shown(column: Array, bins: int) -> Array:
    """(bins - 1, 2): the split after bin t with missing values right or left has 20 rows each side and to the last."""
    found, last = np.zeros((bins - 1, 2), bool), 0
    missing = int((column == bins).sum())
    for t in range(bins - 1):
        below, above = int((column <= t).sum()), int(((column > t) & (column < bins)).sum())
        if below - last >= LEAST:
            found[t] = above + missing >= LEAST, missing >= LEAST and above >= LEAST
            last = below if found[t].any() else last
    return found


def sigmoid(f: Array) -> Array:
    return 1 / (1 + np.exp(-f))


def gradient(objective: str, f: Array, y: Array) -> tuple[Array, Array]:
    if objective == "regression:l2":
        return np.clip(f, -2, 2) - y, np.ones(len(f))
    return sigmoid(f) - y, sigmoid(f) * (1 - sigmoid(f))


def tree(
    x: Array, g: Array, h: Array, features: list[int], p: Any, node: int = 0, rows: Array = None
) -> dict[int, Any]:
    """Node → its value, and of a split (value, gain, feature, t, side, rows that go left)."""
    rows = np.arange(len(g)) if rows is None else rows
    total_g, total_h = int(g[rows].sum()) / 2**20, int(h[rows].sum()) / 2**20
    found: dict[int, Any] = {node: p.learning_rate * (-total_g / (total_h + p.reg_lambda)) if total_h > 0 else 0.0}
    best: tuple[float, Any] = 0.0, None
    deep = (node + 1).bit_length() > p.max_depth
    for j in features if not deep and len(rows) >= 2 * LEAST else []:
        column = x[j, rows]
        for t, side in np.argwhere(may_be_shown(column, p.max_bin)):
            left = (column <= t) | ((column == p.max_bin) & bool(side))
            gl, hl = int(g[rows[left]].sum()) / 2**20, int(h[rows[left]].sum()) / 2**20
            gr, hr = total_g - gl, total_h - hl
            if not (hl > 0 and hr > 0 and hl >= p.min_child_weight and hr >= p.min_child_weight):
                continue
            score = gl * gl / (hl + p.reg_lambda) + gr * gr / (hr + p.reg_lambda)
            gain = 0.5 * (score - total_g * total_g / (total_h + p.reg_lambda)) - p.gamma
            if gain > best[0]:
                best = gain, (j, int(t), int(side), rows[left])
    if best[1] is not None:
        inside = np.isin(rows, best[1][3])
        found[node] = found[node], best[0], *best[1]
        found |= tree(x, g, h, features, p, 2 * node + 1, rows[inside])
        found |= tree(x, g, h, features, p, 2 * node + 2, rows[~inside])
    return found


def leaf_of(row_of: Callable[[Any], Array], grown: dict[int, Any], count: int) -> Array:
    """The leaf of each of `count` rows; `row_of` says which rows a split sends left."""
    at = np.zeros(count, int)
    for node in sorted(grown):
        if isinstance(grown[node], tuple):
            goes = np.isin(np.arange(count), row_of(grown[node]))
            at = np.where(at == node, np.where(goes, 2 * node + 1, 2 * node + 2), at)
    return at


def boost(
    x: Array, y: Array, base: Array, weights: list[Array], features: list[list[int]], p: Any
) -> tuple[Any, Array]:
    """The trees, and the margins (rows, groups). Tree i is of group i % groups, of these row weights and features."""
    margins, grown = np.repeat(np.asarray(base)[None, :], len(y), axis=0), []
    for i, (w, allowed) in enumerate(zip(weights, features, strict=True)):
        k = i % y.shape[1]
        g, h = gradient(p.objective, margins[:, k], y[:, k])
        g, h = (np.rint(w * each * 2**20).astype(np.int64) for each in (g, h))
        grown.append(tree(x, g, h, allowed, p))
        values = {node: said[0] if isinstance(said, tuple) else said for node, said in grown[-1].items()}
        margins[:, k] += np.array([values[node] for node in leaf_of(lambda said: said[5], grown[-1], len(y))])
    return grown, margins
