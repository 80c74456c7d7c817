"""Splits of decision trees over gradients that one participant knows and the others have under encryption.

A row has a gradient g and a second derivative h, integers in units of 2^-20. A feature is cut into bins; a candidate
is a feature, a bin t and a side for missing values: rows of the bins up to t go left. Candidates come in the order of
feature, t, missing right before missing left, FEATURES × (bins - 1) × 2, whatever the data is.

Rules
* All that decides is computed from exact integers, in float64, by + - * / in one order: who has the rows in one table
  finds the same splits to the bit. Equal gains are a tie, and the first candidate wins it.
* A candidate that would show few rows is not offered (`offered`): it, and the next one that is, have MIN_ROWS rows or
  more on each side and between them. Under encryption it is the sum of nothing, (0, 0), as is one of an unused bin.
* Sums under encryption stay with who computed them until packing.readable has made them fit to be returned.

Source: Chen, Guestrin, XGBoost, 2016; Cheng et al., SecureBoost, 2019 (arXiv 1901.08755); Chen et al., SecureBoost+,
2021 (arXiv 2110.10927) for packed pairs and the difference to a sibling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedpeer.errors import RemoteProtocolError
from fedpeer.peers import Peers
from fedpeer.secure import residues
from fedpeer.secure.packing import Slots
from fedpeer.secure.paillier import Ciphertexts, PublicKey, spread

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

FRACTION_BITS: Final = 20
"""Lower than floats have: a difference of sums that covers few rows shall not say which ones."""
UNIT: Final = 2.0**-FRACTION_BITS
MIN_ROWS: Final = 20


# bins


def edges(column: Floats, max_bin: int) -> Floats:
    """Upper ends of the bins but the last, ascending, (max_bin - 1,): values of the column, then infinity.

    Each value has a bin of its own where there are at most max_bin; else they are quantiles. NaN is a missing value.
    """
    values, counts = np.unique(column[~np.isnan(column)], return_counts=True)
    if len(values) > max_bin:
        ranks = np.arange(1, max_bin) * int(counts.sum()) // max_bin
        values = np.unique(values[np.searchsorted(np.cumsum(counts), ranks)])
        values = np.append(values, np.inf)
    found = np.full(max_bin - 1, np.inf)
    found[: max(len(values) - 1, 0)] = values[:-1]
    return found


def binned(column: Floats, ends: Floats) -> Ints:
    """The bin of each value, 0 … max_bin - 1, and max_bin for a missing one."""
    return np.where(np.isnan(column), len(ends) + 1, np.searchsorted(ends, column))


def offered(counts: Ints) -> Bools:
    """Which candidates of a feature may be shown, (bins - 1, 2). `counts`: a node's rows by bin, the last one missing.

    From the left, each is one that has MIN_ROWS rows more than the last one. Fewer missing values than that go right.
    """
    *present, missing = counts.tolist()
    rest = sum(present) + missing
    found = np.zeros((len(present) - 1, 2), dtype=np.bool_)
    between = 0
    for t, rows in enumerate(present[:-1]):
        between += rows
        rest -= rows
        if between >= MIN_ROWS:
            found[t] = rest >= MIN_ROWS, missing >= MIN_ROWS and rest - missing >= MIN_ROWS
            between = 0 if found[t].any() else between
    return found


def left_of(bins: Ints, t: int, missing_left: bool, max_bin: int) -> Bools:
    """Which rows a candidate sends left."""
    left: Bools = (bins <= t) | ((bins == max_bin) & missing_left)
    return left


# gains


@dataclass(frozen=True)
class Sums:
    """Σg and Σh of each candidate's left side, in its order; integers, exact."""

    g: Ints
    h: Ints


@dataclass(frozen=True)
class Rules:
    """What a split is judged by."""

    reg_lambda: float
    gamma: float
    min_child_weight: float

    def gains(self, left: Sums, g: int, h: int) -> Floats:
        """By how much each candidate lowers the loss of a node with Σg = g and Σh = h; -infinity where it may not.

        It may if both sides have weight, no less than min_child_weight, and the gain is positive.
        """
        gl, hl = left.g * UNIT, left.h * UNIT
        gr, hr = (g - left.g) * UNIT, (h - left.h) * UNIT
        allowed = (left.h > 0) & (left.h < h) & (hl >= self.min_child_weight) & (hr >= self.min_child_weight)
        with np.errstate(all="ignore"):
            whole = (g * UNIT) * (g * UNIT) / (h * UNIT + self.reg_lambda) if h > 0 else 0.0
            gain = 0.5 * (gl * gl / (hl + self.reg_lambda) + gr * gr / (hr + self.reg_lambda) - whole) - self.gamma
        return np.where(allowed & (gain > 0), gain, -np.inf)

    def value(self, g: int, h: int) -> float:
        """What the rows of a leaf are moved by, before the learning rate."""
        return -(g * UNIT) / (h * UNIT + self.reg_lambda) if h > 0 else 0.0


def sums(bins: Ints, g: Ints, h: Ints, max_bin: int) -> Sums:
    """Of all candidates of features in the clear, over the rows of one node. `bins`: (features, rows)."""
    found: list[list[Ints]] = []
    for column in bins:
        allowed = offered(np.bincount(column, minlength=max_bin + 1))
        both = []
        for values in (g, h):
            by_bin = np.bincount(column, values, minlength=max_bin + 1)  # exact: integers below 2^53
            prefix = np.cumsum(by_bin[: max_bin - 1])
            both.append(np.where(allowed, np.column_stack([prefix, prefix + by_bin[max_bin]]), 0).astype(np.int64))
        found.append(both)
    shape = (len(found), max_bin - 1, 2)
    return Sums(*(np.array([both[i] for both in found], dtype=np.int64).reshape(shape).ravel() for i in (0, 1)))


# under encryption


@dataclass(frozen=True)
class Pairs:
    """(g, h) as one number, g·2^bits + h, and how they lie in what is returned: sums of them still fit."""

    bits: int
    slots: Slots

    @classmethod
    def of(cls, public: PublicKey, rows: int, bound: float) -> Pairs:
        """For sums of `rows` pairs, each of them |g|, h ≤ bound (1.0, not the integer); the bound is at least 2^-10."""
        bits = FRACTION_BITS + (math.ceil(rows * bound) - 1).bit_length() + 2
        return cls(bits, Slots.read(public, 2 * bits))

    def join(self, g: Ints, h: Ints) -> list[int]:
        return [(a << self.bits) + b for a, b in zip(g.tolist(), h.tolist(), strict=True)]

    def part(self, values: Sequence[int]) -> Sums:
        """What was joined. RemoteProtocolError: a number that is no pair."""
        half, size = 1 << (self.bits - 1), 1 << self.bits
        h = [(value + half) % size - half for value in values]
        g = [(value - low) >> self.bits for value, low in zip(values, h, strict=True)]
        if any(abs(value) > half for value in g):
            raise RemoteProtocolError("a sum that no rows can have")
        return Sums(np.array(g, dtype=np.int64), np.array(h, dtype=np.int64))

    def ciphertexts(self, candidates: int) -> int:
        """How many are returned for so many candidates."""
        return -(-candidates // self.slots.count)


def histograms(
    peers: Peers, gradients: Ciphertexts, bins: Ints, node: Ints, before: Ints, kept: list[Ciphertexts], max_bin: int
) -> list[Ciphertexts]:
    """Σ of the pairs of each node's rows by feature and bin: for each node features × (max_bin + 1) of them.

    `bins`: (features, rows). `node`: of each row its place among the nodes of a level, or -1. `before` and `kept`: the
    same of the level above, and what came out for it; nothing for a root. Of two siblings the smaller is added up from
    its rows, and the other one is the difference to their parent, of which they are all rows. All cores.
    """
    count = int(node.max()) + 1
    if not kept:
        return _summed(peers, gradients, bins, node, count, max_bin)
    group_of: dict[int, int] = {}
    small, from_parent = np.full(len(node), -1), []
    for at in range(count):
        rows = np.flatnonzero(node == at)
        parent = int(before[rows[0]])
        sibling = np.flatnonzero((before == parent) & (node != at))
        is_small = (len(rows), rows[0]) < (len(sibling), sibling[0])
        small[rows if is_small else sibling] = group_of.setdefault(parent, len(group_of))
        from_parent.append((parent, is_small))
    groups = _summed(peers, gradients, bins, small, len(group_of), max_bin)
    return [
        groups[group_of[parent]] if is_small else kept[parent] - groups[group_of[parent]]
        for parent, is_small in from_parent
    ]


def _summed(
    peers: Peers, gradients: Ciphertexts, bins: Ints, node: Ints, count: int, max_bin: int
) -> list[Ciphertexts]:
    width = max_bin + 1
    by_feature = spread(
        peers,
        gradients.public,
        lambda column: gradients.sums(np.where(node < 0, -1, node * width + column), count * width),
        list(bins),
    )
    order = np.arange(len(by_feature)).reshape(len(bins), count, width).transpose(1, 0, 2).reshape(count, -1)
    return [by_feature[places] for places in order]


def candidates(histogram: Ciphertexts, allowed: Bools, max_bin: int) -> Ciphertexts:
    """The left side of each candidate of a node, the sum of nothing where it is not `allowed`, (features, bins - 1, 2).

    Not yet fit to be returned.
    """
    square, found = histogram.public.square, []
    for number, may in enumerate(allowed.tolist()):
        part = histogram[number * (max_bin + 1) : (number + 1) * (max_bin + 1)]
        missing = part.values[max_bin]
        for value, (right, left) in zip(part[: max_bin - 1].prefix_sums().values, may, strict=True):
            found.append(value if right else residues.ONE)
            found.append(value * missing % square if left else residues.ONE)
    return Ciphertexts(histogram.public, found)
