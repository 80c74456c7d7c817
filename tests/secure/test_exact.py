"""Exact sums against Fraction, for any finite values."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeer.errors import DataError
from fedpeer.secure import exact, fixedpoint

finite = st.floats(allow_nan=False, allow_infinity=False)
columns = st.lists(st.lists(finite, max_size=6), min_size=1, max_size=5)


def total_of(parts):
    """The total as a secure sum gives it."""
    encoded = [fixedpoint.encode({"m": part}) for part in parts]
    vector = np.sum([v for _, v in encoded], axis=0, dtype=np.uint64).astype(np.uint32) & np.uint32(2**24 - 1)
    return fixedpoint.decode(encoded[0][0], vector, len(parts))["m"]


@given(columns)
def test_mean_and_deviation_are_those_of_the_pooled_rows_rounded_once(rows: list[list[float]]):
    pooled = [Fraction(x) for part in rows for x in part]
    got = exact.moments_of(total_of([exact.moments(np.array(part, dtype=np.float64)) for part in rows]))
    assert (got.count, got.missing) == (len(pooled), 0)
    if pooled:
        mean = sum(pooled) / len(pooled)
        variance = sum((x - mean) ** 2 for x in pooled) / len(pooled)
        assert got.mean == float(mean)
        scale = 2 ** (2 * 1074 + 128)
        assert got.std == math.isqrt(math.floor(variance * scale * len(pooled) ** 2)) / (len(pooled) << (1074 + 64))


@given(columns)
def test_a_sum_is_the_pooled_one_rounded_once(rows: list[list[float]]):
    total = sum((Fraction(x) for part in rows for x in part), Fraction(0))
    got = exact.sum_of(total_of([exact.sum_limbs(np.array(part, dtype=np.float64)) for part in rows]))
    try:
        assert got == float(total)
    except OverflowError:
        assert got == (math.inf if total > 0 else -math.inf)


def test_a_small_spread_around_a_large_mean_is_not_lost():
    column = 1e9 + np.arange(1000) * 1e-6
    got = exact.moments_of(exact.moments(column))
    assert got.std == pytest.approx(float(np.std(column - 1e9)), rel=1e-9)
    assert exact.moments_of(exact.moments(np.full(7, 0.1))) == exact.Moments(7, 0, 0.1, 0.0)


def test_missing_values_are_counted_and_left_out():
    got = exact.moments_of(exact.moments(np.array([1.0, np.nan, 3.0])))
    assert got == exact.Moments(2, 1, 2.0, 1.0)
    assert exact.moments_of(exact.moments(np.array([np.nan]))) == exact.Moments(0, 1, 0.0, 0.0)


def test_the_extremes_of_float64_fit_in_the_limbs_of_a_secure_sum():
    for value in (np.finfo(float).max, -np.finfo(float).max, 5e-324, -5e-324):
        got = exact.moments_of(total_of([exact.moments(np.full(3, value))] * 200))
        assert (got.mean, got.std) == (value, 0.0)


def test_many_rows_are_summed_as_by_numpy():
    column = np.random.default_rng(1).normal(3, 10, 200_000)
    got = exact.moments_of(exact.moments(column))
    assert got.mean == pytest.approx(column.mean(), rel=1e-12)
    assert got.std == pytest.approx(column.std(), rel=1e-12)


def test_infinity_is_refused():
    with pytest.raises(DataError):
        exact.moments(np.array([1.0, np.inf]))
