"""Who trains trees in the tests, on what: a guest, alice, and one host or three."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from paillier_keys import primes

from fedpeer.algorithms.vertical import secureboost
from fedpeer.algorithms.vertical.boosting.params import Fit
from fedpeer.stage import Stage, Table
from fedpeer.testing.stages import CAST, Run, run_stage

Array = Any


def key(n: int = 2, bits: int = 2048, number: int = 0) -> dict[str, bytes]:
    return {"alice": b"".join(prime.to_bytes(bits // 16, "big") for prime in primes("key", bits)[number])}


def roles(n: int) -> dict[str, str]:
    return {alias: "host" if i else "guest" for i, alias in enumerate(CAST[:n])}


def table(x: Array, y: Array = None, **more: Array) -> Table:
    """Columns f0, f1, …; NaN is a missing value."""
    columns = {f"f{j}": pa.array(column, pa.float64(), from_pandas=True) for j, column in enumerate(x)}
    columns |= {name: pa.array(values, pa.float64()) for name, values in more.items()}
    if y is not None:
        columns["y"] = pa.array(y, pa.float64())
    ids = pa.array([f"row {i}" for i in range(x.shape[1])], pa.string())
    return Table(pa.table({"id": ids, **columns}), id="id", label=None if y is None else "y")


def features(rows: int = 150, seed: int = 1) -> Array:
    """Columns that are alike, a constant one, one of few values, missing ones, and one that is all missing."""
    chance = np.random.default_rng(seed)
    x = chance.normal(size=(10, rows))
    x[1] = x[8] = x[0]  # ties between owners, and of one
    x[9] = x[7]
    x[2] = np.round(x[2])
    x[3, chance.random(rows) < 0.3] = np.nan
    x[4] = 7.0
    x[5] = np.nan
    x[6, :5] = np.nan  # fewer than may be told apart
    return x


def labels(x: Array, objective: str = "binary:bce") -> Array:
    score = x[0] + np.nan_to_num(x[3], nan=1.0) * np.where(x[2] > 0, 1, -1) + x[7] / 2
    if objective == "regression:l2":
        return 10 + 3 * score
    return (score > 0.2) * 1.0 if objective == "binary:bce" else np.digitize(score, [-0.7, 0.7]) * 1.0


SHARES = {2: [[0, 2, 4, 8], [1, 3, 5, 6, 7, 9]], 4: [[0, 4, 8], [1, 2], [3, 5, 6], [7, 9]]}
"""Which columns each participant has."""


def split(n: int, x: Array, y: Array, **more: Array) -> dict[str, dict[str, Any]]:
    own = [x[columns] for columns in SHARES[n]]
    tables = [table(own[0], y, **more), *(table(each) for each in own[1:])]
    return {alias: {"table": each} for alias, each in zip(CAST, tables, strict=False)}


def trained(inputs: Mapping[str, Any], params: Fit, stage: Stage = secureboost.fit, **more: Any) -> Run:
    return run_stage(stage, params, inputs, roles=roles(len(inputs)), keys=key(bits=params.key_bits), **more)
