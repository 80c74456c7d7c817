"""How much noise there is, and that it is what it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from fedpeer.aggregation.names import profile
from fedpeer.secure import dp

ALPHA = 1e-6  # the draws are from the system's chance: a test fails without a cause once in a million runs


def exact_delta(epsilon: float, sigma: float) -> float:
    """delta(epsilon) of a Gaussian of sensitivity 1 (Balle and Wang, 2018, theorem 8): no account can say less."""
    a, b = 1 / (2 * sigma), epsilon * sigma
    return float(stats.norm.cdf(a - b) - math.exp(epsilon) * stats.norm.cdf(-a - b))


@pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 1e-8), (1.0, 1e-8), (1.0, 1e-5), (3.0, 1e-6), (20.0, 1e-10)])
def test_the_multiplier_is_the_least_that_is_private_enough(epsilon: float, delta: float) -> None:
    least = dp.multiplier(epsilon, delta)
    assert dp.epsilon_of(least, delta) <= epsilon < dp.epsilon_of(least - 1, delta)
    sigma = least / dp.THOUSAND
    assert exact_delta(epsilon, sigma) <= delta
    truly = optimize.brentq(lambda s: exact_delta(epsilon, s) - delta, 0.01, 1000)
    assert sigma <= 1.2 * truly, "the account wastes more than a fifth"


@pytest.mark.parametrize("n", range(3, 12))
@pytest.mark.parametrize("name", ["byz", "crash"])
def test_the_honest_survivors_alone_reach_the_noise_and_no_step_less_would_do(n: int, name: str) -> None:
    if (n, name) == (3, "byz"):
        return
    parties = profile(n, name)
    thousandths, squared = dp.multiplier(1.0, 1e-8), 4 * 7 * dp.GRID**2
    scale = dp.scale(thousandths, squared, parties.honest)
    wanted = thousandths**2 * squared
    assert (parties.m_min - parties.t_c) * scale**2 * dp.THOUSAND**2 >= wanted
    assert (parties.m_min - parties.t_c) * (scale - 1) ** 2 * dp.THOUSAND**2 < wanted


def test_the_sum_of_the_least_contributors_without_the_colluders_has_the_variance_it_should() -> None:
    parties, n = profile(5), 20_000
    thousandths, squared = 5392, 8 * dp.GRID**2
    scale = dp.scale(thousandths, squared, parties.honest)
    total = sum(dp.discrete_gaussian((n,), scale) for _ in range(parties.m_min - parties.t_c))
    sigma = thousandths / dp.THOUSAND * math.sqrt(squared)
    ratio = float(np.square(total / sigma).sum())
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], n)
    print(f"Σ(x/σ)² = {ratio:.1f} of {n} draws, {low:.1f} to {high:.1f}")
    assert low <= ratio <= high


@pytest.mark.parametrize("scale", [1, 3, 10])
def test_the_sampler_draws_the_discrete_gaussian(scale: int) -> None:
    n = 20_000
    drawn = dp.discrete_gaussian((n // 4, 4), scale)
    assert (drawn.shape, drawn.dtype) == ((n // 4, 4), np.int64)
    places = np.arange(-40 * scale, 40 * scale + 1)
    chance = np.exp(-(places.astype(float) ** 2) / (2 * scale**2))
    expected = n * chance / chance.sum()
    kept = expected >= 20
    counts = np.array([(drawn == place).sum() for place in places[kept]])
    observed = np.append(counts, n - counts.sum())
    wanted = np.append(expected[kept], n - expected[kept].sum())
    p = stats.chisquare(observed, wanted).pvalue
    print(f"scale {scale}: chi-square p = {p:.3g}, {observed.size} cells, {n} draws")
    assert p > ALPHA


def test_no_draw_is_like_another() -> None:
    first, second = dp.discrete_gaussian((100,), dp.GRID), dp.discrete_gaussian((100,), dp.GRID)
    assert (first != second).sum() > 90
