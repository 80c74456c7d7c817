"""Exact sums of any finite float64 values, however large, small or mixed, as integers that a secure sum takes.

A fixed-point sum needs to know the range of its values beforehand, and finding it out costs rounds and tells more
than the sum. Here the sum of a peer's values is computed exactly, as one big integer in units of 2^-1074 (the
smallest float64; squares in units of 2^-2148), and handed to `Peers.sum` as limbs of 48 bits. The total is exact, so
means and deviations are those of the pooled rows, rounded once, whatever the split and the order of the rows, and
the same bits at every peer. There is no cancellation: the variance is n·Σx² - (Σx)² in integers.

What the total of the limbs tells beyond the sum is the carries between limbs: a few bits, none of them a row's.

Source: Kulisch's long accumulator (U. Kulisch, Computer Arithmetic and Validity, 2013, chapter 8), kept as a Python
integer, with the values binned by exponent first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedpeer.errors import DataError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

UNIT: Final = 1074
"""Sums are in units of 2^-UNIT, sums of squares in units of 2^(-2·UNIT)."""
LIMB_BITS: Final = 48
SUM_LIMBS: Final = 46
"""For |x| < 2^1024 and 2^64 rows: 1024 + 1074 + 64 bits."""
SQUARE_LIMBS: Final = 89
"""2048 + 2148 + 64 bits."""
MOMENTS: Final = 2 + SUM_LIMBS + SQUARE_LIMBS

_CHUNK: Final = 1 << 24  # rows whose bins cannot overflow: 2^24 · 2^38 < 2^63
_PIECE: Final = 18  # a mantissa of 53 bits in three pieces


@dataclass(frozen=True)
class Moments:
    """Of a column over all rows of all peers; population statistics (divided by n, as in NumPy and scikit-learn)."""

    count: int
    missing: int
    mean: float
    """0 if there is no value."""
    std: float


def sum_limbs(x: Floats) -> Ints:
    """The exact sum of finite values of any shape, int64 of shape (SUM_LIMBS,)."""
    return _limbs(_sums(x)[0], SUM_LIMBS)


def sum_of(total: Ints) -> float:
    """The sum that a total of `sum_limbs` says, rounded once; infinite if no float64 is so large."""
    whole = _integer(total)
    try:
        return whole / (1 << UNIT)
    except OverflowError:
        return math.inf if whole > 0 else -math.inf


def moments(x: Floats) -> Ints:
    """Counts, sum and sum of squares of a column with NaN for missing values, int64 of shape (MOMENTS,)."""
    missing = np.isnan(x)
    first, second = _sums(x[~missing])
    counts = np.array([x.size - missing.sum(), missing.sum()], dtype=np.int64)
    return np.concatenate([counts, _limbs(first, SUM_LIMBS), _limbs(second, SQUARE_LIMBS)])


def moments_of(total: Ints) -> Moments:
    """What a total of `moments` says, each number rounded once."""
    count, missing = int(total[0]), int(total[1])
    if count == 0:
        return Moments(0, missing, 0.0, 0.0)
    first, second = _integer(total[2 : 2 + SUM_LIMBS]), _integer(total[2 + SUM_LIMBS :])
    root = math.isqrt((count * second - first * first) << 128)  # of n²·variance, with 64 more bits
    return Moments(count, missing, first / (count << UNIT), root / (count << (UNIT + 64)))


def _sums(x: Floats) -> tuple[int, int]:
    """Σx·2^UNIT and Σx²·2^(2·UNIT), exactly."""
    if not np.isfinite(x).all():
        raise DataError("a value that is not finite cannot be summed")
    first = second = 0
    flat = x.ravel()
    for start in range(0, flat.size, _CHUNK):
        values = flat[start : start + _CHUNK]
        exponent = np.maximum(np.frexp(values)[1], -1021)  # x = mantissa · 2^(exponent - 53), exactly
        mantissa = np.ldexp(values, 53 - exponent).astype(np.int64)
        shift = exponent + (UNIT - 53)
        a, b, c = mantissa >> 2 * _PIECE, (mantissa >> _PIECE) & _MASK, mantissa & _MASK
        first += _binned(shift, (a, 2), (b, 1), (c, 0))
        second += _binned(2 * shift, (a * a, 4), (2 * a * b, 3), (2 * a * c + b * b, 2), (2 * b * c, 1), (c * c, 0))
    return first, second


_MASK: Final = (1 << _PIECE) - 1


def _binned(shift: Ints, *terms: tuple[Ints, int]) -> int:
    """Σ over rows and terms of term · 2^(shift + _PIECE·power), for |term| < 2^38."""
    total = 0
    places, place = np.unique(shift, return_inverse=True)
    for term, power in terms:
        bins = np.zeros(places.size, dtype=np.int64)
        np.add.at(bins, place, term)
        total += sum(int(value) << (int(at) + _PIECE * power) for value, at in zip(bins, places, strict=True))
    return total


def _limbs(value: int, count: int) -> Ints:
    """`value` in limbs of 48 bits, least significant first, each with the sign of the value."""
    size, sign = abs(value), (-1 if value < 0 else 1)
    mask = (1 << LIMB_BITS) - 1
    return np.array([sign * ((size >> (LIMB_BITS * place)) & mask) for place in range(count)], dtype=np.int64)


def _integer(limbs: Ints) -> int:
    return sum(int(limb) << (LIMB_BITS * place) for place, limb in enumerate(limbs.tolist()))
