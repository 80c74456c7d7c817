"""Cuckoo hashing: a table in which each id lies in one of its three bins, and at most one id in a bin.

Rules
* The three bins of an id are different: with that the smallest set of ids that do not fit in fewer bins than they are
  has four, and 10,000 ids fail to fit with probability 2^-69. There is no stash.
* The number of bins follows from the padded number of ids alone.
* In which of its bins an id ended tells something of the other ids: it never leaves.

Source: Pagh, Rodler (2004); Fotakis, Pagh, Sanders, Spirakis (2005) for three bins, which fill up to 0.918 (0.818 where
ids must find their place without moving others). The parallel rounds are a random walk of all homeless ids at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from fedpeer.errors import StageError

Words = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

STEP: Final = 4096
ROUNDS: Final = 1000
TRIES: Final = 8


def count(padded: int) -> int:
    """Bins for so many ids: 1.31 times as many, at least 4096, a multiple of 4096."""
    return max(STEP, -(-131 * padded // (100 * STEP)) * STEP)


def of(blocks: Words, bins: int) -> Places:
    """The three different bins of each block, shape (3, n), uniform among all such triples."""
    low = np.uint64(0xFFFFFFFF)
    parts = (blocks[:, 0] >> np.uint64(32), blocks[:, 0] & low, blocks[:, 1] >> np.uint64(32))
    first, second, third = (
        ((part * np.uint64(bins - i)) >> np.uint64(32)).astype(np.int64) for i, part in enumerate(parts)
    )
    second += second >= first
    smaller, larger = np.minimum(first, second), np.maximum(first, second)
    third += third >= smaller
    third += third >= larger
    return np.stack([first, second, third])


def table(places: Places, bins: int, steps: Callable[[int], Places]) -> tuple[Places, Places]:
    """Which id is in each bin (-1: none), shape (bins,), and in which of its three bins each id is, shape (n,).

    `steps(m)` draws m numbers, 1 or 2: how far homeless ids move on among their bins. Raises StageError if eight walks
    come to no end.
    """
    for _ in range(TRIES):
        if (found := _walk(places, bins, steps)) is not None:
            return found
    raise StageError("the ids do not fit into their bins", hint="run the job again: it draws other bins")


def _walk(places: Places, bins: int, steps: Callable[[int], Places]) -> tuple[Places, Places] | None:
    n = places.shape[1]
    held, which = np.full(bins, -1, np.int64), np.zeros(n, np.int64)
    homeless = np.arange(n)
    for _ in range(ROUNDS):
        if not len(homeless):
            return held, which
        wanted = places[which[homeless], homeless]
        before = held[wanted]
        held[wanted] = homeless  # of several that want one bin, the last has it
        won = held[wanted] == homeless
        homeless = np.concatenate([homeless[~won], before[won & (before >= 0)]])
        which[homeless] = (which[homeless] + steps(len(homeless))) % 3
    return None
