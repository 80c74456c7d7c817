"""Counts of rows that are fit to leave their owner: of each cell none, or at least k.

A secure sum hides whose rows are in a cell, not how few. Whoever takes its own rows out of a total, and those of all
who pool what they know, reads the rest. So every owner makes its own part such that nothing small can be the rest.

Rules
* What an owner adds to a cell is 0 or at least k rows. A remainder of a total, over any of the owners, is so too.
* What is done is a function of the values and of k alone, whatever their order: the same rows again give the same
  answer. With another k they would not, and the difference is of a few rows: each owner answers with one k only.
* k is `min_cell` of the contract, which the policy of each owner bounds from below.

Source: microaggregation as in Domingo-Ferrer and Mateo-Sanz, Practical data-oriented microaggregation for statistical
disclosure control, IEEE TKDE 14(1), 2002 (fixed groups of one variable); suppression in addition to what is small as in
Hundepool et al., Statistical Disclosure Control, 2012.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def grouped(cells: npt.NDArray[np.int64], n_cells: int, k: int) -> npt.NDArray[np.int64]:
    """Rows by cell, shape (n_cells,): each count is 0 or at least k, and together they are as many as the rows.

    `cells`: the cell of each row, 0 … n_cells - 1. The rows are put in order of their cells and into groups of k or a
    few more; a group counts in the cell at the mean of its rows' cells: where one row of it lies would be told by the
    middle one. Up to any edge the rows of one group at most are missing or too many. Fewer than k rows count nowhere.
    """
    counts, groups = np.zeros(n_cells, dtype=np.int64), cells.size // k
    if groups:
        starts = np.arange(groups) * cells.size // groups
        sizes = np.diff(starts, append=cells.size)
        np.add.at(counts, np.add.reduceat(np.sort(cells), starts) // sizes, sizes)
    return counts


def counted(column: npt.NDArray[np.float64], k: int) -> npt.NDArray[np.float64]:
    """The column as it counts: with 0 or at least k values, and with 0 or at least k missing ones (NaN).

    Fewer than k values count as missing. Where fewer than k are missing, the middle ones of the values are too, until
    k are; the mean changes least by these. Fewer than k rows are none: shape (0,).
    """
    if column.size < k:
        return column[:0]
    told = column.copy()
    order = np.argsort(column, kind="stable")  # NaN comes last
    values = int(np.count_nonzero(~np.isnan(column)))
    missing = column.size - values
    hidden = k - missing if 0 < missing < k else 0
    if values - hidden < k:
        hidden = values
    first = (values - hidden) // 2
    told[order[first : first + hidden]] = np.nan
    return told


def extremes(column: npt.NDArray[np.float64], k: int) -> tuple[float, float] | None:
    """The means of the k smallest and of the k largest values, NaN left out; None of fewer than k. For k = 1 the values
    themselves.
    """
    values = np.sort(column[~np.isnan(column)])
    return None if values.size < k else (_mean(values[:k]), _mean(values[-k:]))


def _mean(values: npt.NDArray[np.float64]) -> float:
    try:
        return math.fsum(values) / values.size
    except OverflowError:
        return math.fsum(values / values.size)
