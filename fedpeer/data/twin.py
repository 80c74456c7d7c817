"""A synthetic twin of a dataset: its columns and kinds, invented rows. For dry runs.

Rules
* Made from what a partner may see of the dataset, its schema and its rounded count, and from nothing else: no row is
  read, and no range, mean, category or id of the rows is in it.
* The same schema and number give the same twin. Twins of several participants have most of their ids in common.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from fedpeer.data.columns import BOOLEAN, NUMBER
from fedpeer.stage import Table

MAX_ROWS = 10_000
"""a dry run is to take seconds"""
SHIFT = 20
"""one in so many ids of a participant is not the next one's"""
WORDS = ("a", "b", "c")


def make(
    columns: Sequence[tuple[str, str]], rows: int, *, id_: str | None, label: str | None, participant: int = 0
) -> Table:
    """The twin of a dataset with these columns [(name, kind)] for one of several participants, counted from 0.

    Numbers are of a standard normal distribution, texts one of three words, labels 0 or 1 (or two words), each by
    chance; no value is missing.
    """
    rows = min(rows, MAX_ROWS)
    chance = np.random.Generator(np.random.PCG64([participant, rows]))
    made: dict[str, pa.Array] = {}
    for name, kind in columns:
        if name == id_:
            numbers = chance.permutation(rows) + participant * (rows // SHIFT)
            made[name] = pa.array(numbers, pa.float64()) if kind == NUMBER else pa.array([f"id-{n}" for n in numbers])
        elif kind == BOOLEAN:
            made[name] = pa.array(chance.integers(2, size=rows).astype(bool))
        elif kind == NUMBER:
            made[name] = pa.array(
                chance.integers(2, size=rows) if name == label else chance.normal(size=rows), pa.float64()
            )
        else:
            words = WORDS[:2] if name == label else WORDS
            made[name] = pa.array([words[n] for n in chance.integers(len(words), size=rows)], pa.string())
    return Table(pa.table(made), id_, label)
