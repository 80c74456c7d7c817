"""Noise of distributed differential privacy: how much is needed, and an exact draw of it.

Rules
* What is noised are whole numbers, before they are encoded for a secure sum: floating point noise tells its value by
  its low bits (Mironov, CCS 2012). Values come as multiples of 1 / GRID.
* sigma is the noise of the whole: multiplier times the L2 sensitivity, which is how far the vector that is summed moves
  when one row is added or removed. Each contributor draws sigma / √honest, where `honest` are the contributors who
  surely are in every sum and do not pool what they see: theirs alone reach sigma. More contributors make more noise.
* Numbers that all participants must compute alike are integers: a multiplier counts thousandths, and a scale is rounded
  up to one of the grid. Rounding adds noise, never takes any.
* The draw is from the system's chance and not from `peers.random`, which OpenDP's sampler does not take. So a stage
  draws before its loop over `peers.rounds` and gives the draw to `own`: it is on disk before the first sum is asked,
  and a worker that is started again has the same noise. Two noises on one value would tell their mean.

A sum of discrete Gaussians is not one, but at the scales of a grid of 2^20 nobody can tell it from one: the difference
is below exp(-2π²·scale²).

Source: Canonne, Kamath, Steinke, The Discrete Gaussian for Differential Privacy, 2020 (the sampler; its Rényi
divergence is at most the Gaussian's, so the account of a Gaussian holds); Kairouz, Liu, Steinke, The Distributed
Discrete Gaussian Mechanism, 2021 (sums of them). OpenDP has the sampler, dp-accounting the account (Rényi, Mironov
2017). Both are the extra `dp`, heavy, and imported where they are needed.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

GRID: Final = 1 << 20
"""A value of 1 as the sum has it."""
THOUSAND: Final = 1000
MOST: Final = 10**9
"""thousandths: no multiplier is larger"""


@functools.cache
def multiplier(epsilon: float, delta: float) -> int:
    """The least noise, sigma / sensitivity in thousandths, with which one sum is (epsilon, delta) private."""
    low, high = 0, MOST  # `low` is too little
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if epsilon_of(middle, delta) <= epsilon else (middle, high)
    return high


def epsilon_of(thousandths: int, delta: float) -> float:
    """What one sum with this multiplier costs at `delta`; unit: a row, added or removed."""
    import dp_accounting

    accountant = dp_accounting.rdp.RdpAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(thousandths / THOUSAND))
    return float(accountant.get_epsilon(delta))


def scale(thousandths: int, squared: int, honest: int) -> int:
    """Of one contributor's noise, in steps of the grid. `squared`: the square of the sensitivity, in its steps."""
    needed = -(-(thousandths * thousandths * squared) // (THOUSAND * THOUSAND * honest))  # its square, rounded up
    return math.isqrt(needed - 1) + 1


def discrete_gaussian(shape: tuple[int, ...], scale: int) -> Ints:
    """Exact draws x with probability in proportion to exp(-x² / (2·scale²)); other ones at every call."""
    from opendp.domains import atom_domain, vector_domain  # opendp.prelude takes ten times as long
    from opendp.measurements import make_gaussian
    from opendp.metrics import l2_distance
    from opendp.mod import enable_features

    enable_features("contrib")
    draw: Any = make_gaussian(vector_domain(atom_domain(T="i64")), l2_distance(T="i64"), scale=float(scale))
    return np.array(draw([0] * math.prod(shape)), dtype=np.int64).reshape(shape)
