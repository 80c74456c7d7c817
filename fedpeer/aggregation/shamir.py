"""Shamir's secret sharing over GF(2^255 − 19).

Rules
* An element is 32 bytes, little endian, below p. Whatever is not is refused, never reduced.
* Party i holds the value of the polynomial at i + 1; the secret is its value at 0. Degree t − 1: any t shares give the
  secret, fewer say nothing about it.
* No chance here: the coefficients are the caller's, uniform and used once.

Source: Shamir, How to share a secret, CACM 22 (1979); SA1, version 1, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul
from typing import Final

from fedpeer.errors import LocalProtocolError, TrustError

P: Final = 2**255 - 19
ELEMENT_BYTES: Final = 32


def is_element(raw: bytes) -> bool:
    """Whether these bytes are an element: 32 of them, below p."""
    return len(raw) == ELEMENT_BYTES and int.from_bytes(raw, "little") < P


class Polynomial:
    """secret + c_1·x + c_2·x² + …; t − 1 coefficients. Its repr says nothing."""

    __slots__ = ("_falling",)

    def __init__(self, secret: bytes, coefficients: Sequence[bytes]) -> None:
        """Raises LocalProtocolError for what is no element."""
        if not all(map(is_element, (secret, *coefficients))):
            raise LocalProtocolError("a secret or coefficient that is no element")
        self._falling = [int.from_bytes(raw, "little") for raw in (*reversed(coefficients), secret)]

    def share(self, holder: int) -> bytes:
        """The share of this party (an index). Horner; x is small, so reducing once is faster than at every step."""
        value, x = 0, holder + 1
        for coefficient in self._falling:
            value = value * x + coefficient
        return (value % P).to_bytes(ELEMENT_BYTES, "little")


def split(secret: bytes, coefficients: Sequence[bytes], holders: Sequence[int]) -> list[bytes]:
    """The share of each holder. Raises LocalProtocolError for what is no element."""
    polynomial = Polynomial(secret, coefficients)
    return [polynomial.share(holder) for holder in holders]


class Weights:
    """What the shares of these holders (parties' indices, distinct) count for; made once, used for many secrets."""

    __slots__ = ("_weights",)

    def __init__(self, holders: Sequence[int]) -> None:
        """Raises LocalProtocolError for no holders, or one twice."""
        points = [holder + 1 for holder in holders]
        if len(set(points)) != len(points) or not points or min(points) < 1:
            raise LocalProtocolError("shares come from distinct parties")
        product = math.prod(points)
        self._weights = [
            product * pow(x * math.prod(other - x for other in points if other != x), -1, P) % P for x in points
        ]

    def interpolate(self, shares: Sequence[bytes]) -> bytes:
        """The secret (32 bytes) behind the shares of all the holders, in their order.

        Raises TrustError for a share that is no element. Shares that do not belong together give some other value:
        compare the secret with what its dealer published.
        """
        if len(shares) != len(self._weights):
            raise LocalProtocolError("as many shares as holders")
        values = [int.from_bytes(share, "little") for share in shares]
        if any(len(share) != ELEMENT_BYTES for share in shares) or max(values) >= P:
            raise TrustError("a share that is no element of the field")
        total: int = sum(map(mul, self._weights, values))
        return (total % P).to_bytes(ELEMENT_BYTES, "little")
