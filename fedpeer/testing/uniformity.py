"""Do bytes look like chance? For tests that must fail when a mask is missing.

Each place of an element is looked at by itself (a missing mask shows in the high byte long before it shows in the
mean). The test is Pearson's chi-square with 255 degrees of freedom: for uniform bytes a statistic above LIMIT has
probability 10^-6. It needs some 2·10^4 elements to see a small bias, and 1280 at the least to be exact.
"""

from __future__ import annotations

from typing import Final

import numpy as np

LIMIT: Final = 377.1  # scipy.stats.chi2.isf(1e-6, 255)
LEAST: Final = 1280  # five expected in each of the 256 cells


def chi_square(data: bytes | bytearray | memoryview, width: int = 3) -> list[float]:
    """The statistic for each of the `width` places of the elements in `data`; 255 is expected, above LIMIT is biased.

    Raises ValueError for fewer than 1280 elements or a length that is not whole elements.
    """
    elements = np.frombuffer(data, np.uint8)
    if elements.size % width or elements.size < LEAST * width:
        raise ValueError(f"{elements.size} bytes are not {LEAST} or more elements of {width}")
    expected = elements.size / width / 256
    return [
        float(((np.bincount(place, minlength=256) - expected) ** 2 / expected).sum())
        for place in elements.reshape(-1, width).T
    ]


def looks_uniform(data: bytes | bytearray | memoryview, width: int = 3) -> bool:
    """Whether no place of the elements is biased."""
    return max(chi_square(data, width)) <= LIMIT


def correlation(a: object, b: object) -> float:
    """|r|·√d of two vectors of d numbers: for independent ones above 5 has probability 10^-6."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(abs(np.corrcoef(x, y)[0, 1]) * np.sqrt(x.size))
