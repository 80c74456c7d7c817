"""What both sides of bench_secagg.py are given: the case, the vectors, who is whose neighbour. NumPy alone.

The numbers are Flower's: values of 22 bits in [-8, 8] in the ring of 2^32, k neighbours (a client is one of its own)
of whom two thirds open a secret.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CLIP = 8.0
BITS = 22


@dataclass(frozen=True)
class Case:
    """n parties, d values of each, of whom `drop` vanish after they have dealt their shares."""

    n: int
    d: int
    drop: int

    @property
    def k(self) -> int:
        """Neighbours of a client, itself included; odd, about 2·log2(n)."""
        k = min(self.n - 1, 2 * round(math.log2(self.n)))
        return k | 1

    @property
    def threshold(self) -> int:
        """So many of the k open a secret."""
        return 2 * self.k // 3

    @property
    def alive(self) -> range:
        return range(self.n - self.drop)

    @property
    def name(self) -> str:
        millions = self.d % 1_000_000 == 0
        size = f"{self.d // 1_000_000}M" if millions else f"{self.d // 1000}k"
        return f"n={self.n} d={size}" + (f" drop={self.drop}" if self.drop else "")

    def neighbours(self, party: int) -> list[int]:
        """A ring; it is itself in its midst. The parties that vanish stand far from each other in it."""
        half, step = self.k // 2, self._step
        return sorted((party * step + offset) * pow(step, -1, self.n) % self.n for offset in range(-half, half + 1))

    @property
    def _step(self) -> int:
        """Party i stands at place i·step of the ring."""
        return next(step for step in range(self.n // 3, self.n) if math.gcd(step, self.n) == 1)


def values(case: Case, party: int) -> npt.NDArray[np.float32]:
    """What this party has: normal, float32 of shape (d,), the same in every process."""
    return np.random.Generator(np.random.PCG64(party)).standard_normal(case.d, np.float32)


def fingerprint(case: Case) -> str:
    """Names the values of all parties: both sides must have had the same."""
    return hashlib.blake2b(b"".join(values(case, party)[:1000].tobytes() for party in range(case.n))).hexdigest()[:16]


def check(case: Case, mean: npt.NDArray[np.floating]) -> None:
    """Raise AssertionError unless this is the mean of the values of those that are left."""
    true = sum(np.clip(values(case, party), -CLIP, CLIP).astype(np.float64) for party in case.alive) / len(case.alive)
    error = float(np.abs(mean - true).max())
    assert error < 2 * CLIP / ((1 << BITS) - 1) + 1e-6, f"the mean is off by {error}"
