"""Arithmetic modulo m², m odd, with many numbers at a time: what Paillier is made of. Integers are gmpy2's.

How it works
    A unit c modulo m² is x·(1 + m·t) for exactly one pair x, t below m, and (1 + m·s)·(1 + m·t) = 1 + m·(s + t). So a
    product of many units is the product of their x, which have half the length, and of 1 + m·Σt, a plain sum. One
    product modulo m² of a long and a short factor takes 0.6 of the time of two long ones; splitting costs as much as
    four products, once. Where a number is used again and again it is split first.

Rules
* Nothing here knows a key, a plaintext or chance; `Noise` alone draws, from the `Chance` that it is given.
* What is given are units modulo m. Whoever reads numbers of others checks that before (paillier.Ciphertexts).
* Noise is of the law of u^m mod m², u uniform among the units modulo m, within 2^-64 (`Noise`). It never has a short
  exponent, and never a single base: the owner of m knows the order of the group, and would read from the noise which
  numbers went into a product, whatever mask lies on their sum.

Source: Paillier (1999); Montgomery's simultaneous inversion (1987); Pippenger (1976) in the form with buckets of
Bernstein, Doumen, Lange, Oosterwijk (2012); Lim and Lee (1994) for products of fixed bases.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import gmpy2
import numpy as np
import numpy.typing as npt

from fedpeer.peers import Chance

Index = npt.NDArray[np.integer[Any]]
Split = tuple[list[int], list[int]]
"""(x, t) of some numbers x·(1 + m·t)"""

ONE: Final[int] = gmpy2.mpz(1)


def inverses(values: Sequence[int], modulus: int) -> list[int]:
    """1/v modulo `modulus` for each v: three products each, and one inversion. ZeroDivisionError if one has none."""
    before, product = [], ONE
    for value in values:
        before.append(product)
        product = product * value % modulus
    inverse = gmpy2.invert(product, modulus)
    found = []
    for value, earlier in zip(reversed(values), reversed(before), strict=True):
        found.append(inverse * earlier % modulus)
        inverse = inverse * value % modulus
    return found[::-1]


def inverses_squared(values: Sequence[int], m: int) -> list[int]:
    """1/v modulo m²: from those modulo m by one step of Newton's, y·(2 - v·y)."""
    square = m * m
    short = inverses([value % m for value in values], m)
    return [y * (2 - value * y % square) % square for value, y in zip(values, short, strict=True)]


def split(values: Sequence[int], m: int) -> Split:
    """x and t of each value."""
    high, x = [], []
    for value in values:
        quotient, remainder = gmpy2.f_divmod(value, m)
        high.append(quotient)
        x.append(remainder)
    return x, [quotient * y % m for quotient, y in zip(high, inverses(x, m), strict=True)]


def join(x: Iterable[int], t: Iterable[int], m: int) -> list[int]:
    """x·(1 + m·t) modulo m², for any x and t (not only short ones)."""
    square = m * m
    return [a * (1 + m * (b % m)) % square for a, b in zip(x, t, strict=True)]


def product(factors: Sequence[int], square: int) -> int:
    """Of units modulo m², long or short: two short ones are taken at a time."""
    total = factors[-1] if len(factors) % 2 else ONE
    for a, b in zip(factors[:-1:2], factors[1::2], strict=True):
        total = total * (a * b) % square
    return total


def groups(index: Index, count: int) -> list[list[int]]:
    """The places of 0, of 1, … of count - 1 in `index`; what is negative is in no group."""
    order = np.argsort(index, kind="stable")
    bounds = np.searchsorted(index[order], np.arange(count + 1))
    places = order.tolist()
    return [places[start:stop] for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]


def products(values: Sequence[int], index: Index, count: int, m: int) -> list[int]:
    """The product modulo m² of each group of long values; 1 where there is none."""
    square, take = m * m, values.__getitem__
    found = []
    for group in groups(index, count):
        total = ONE
        for value in map(take, group):
            total = total * value % square
        found.append(total)
    return found


def split_products(values: Split, index: Index, count: int, m: int) -> list[int]:
    """The same for values that have been split."""
    x, t = values
    of = groups(index, count)
    return join(
        [product(list(map(x.__getitem__, group)), m * m) for group in of],
        [sum(map(t.__getitem__, group)) for group in of],
        m,
    )


# a row of integers times a vector of exponents


def power_products(values: Split, rows: Sequence[Sequence[int]], m: int) -> list[int]:
    """∏ valueᵢ^(row[i]) modulo m² for each row of signed integers, by buckets."""
    x, t = values
    above, below, sums = [], [], []
    for row in rows:
        positive, negative = _fraction(x, row, m * m)
        above.append(positive)
        below.append(negative)
        sums.append(sum(map(gmpy2.mul, t, row)))
    square = m * m
    fractions = [a * b % square for a, b in zip(above, inverses_squared(below, m), strict=True)]
    return join(fractions, sums, m)


def _fraction(x: Sequence[int], row: Sequence[int], square: int) -> tuple[int, int]:
    """A numerator and a denominator of ∏ x^row. Neither the order nor the number of products depends on x."""
    width, digits = signed_digits(row)
    positive = negative = ONE
    for digit in reversed(digits):
        if positive != 1 or negative != 1:
            positive = gmpy2.powmod(positive, 1 << width, square)
            negative = gmpy2.powmod(negative, 1 << width, square)
        half = 1 << (width - 1)
        buckets = [product(list(map(x.__getitem__, group)), square) for group in groups(digit + half, 2 * half)]
        positive = positive * _weighted(buckets[half + 1 :], square) % square
        negative = negative * _weighted(buckets[half - 1 :: -1], square) % square
    return positive, negative


def _weighted(buckets: Sequence[int], square: int) -> int:
    """buckets[0]¹ · buckets[1]² · buckets[2]³ …"""
    running = total = ONE
    for bucket in reversed(buckets):
        running = running * bucket % square
        total = total * running % square
    return total


def signed_digits(row: Sequence[int]) -> tuple[int, list[Index]]:
    """A width w and digits from -2^(w-1) up to 2^(w-1) - 1, least significant first, so that row = Σ 2^(w·k)·digits[k].

    The width is the one that costs least: a product for each element, and two for each bucket, of each digit.
    """
    low, high = min(row, default=0), max(row, default=0)

    def bias(width: int) -> tuple[int, int]:
        """How many digits it takes, and what makes all of them positive."""
        count, offset = 1, 1 << (width - 1)
        while low + offset < 0 or (high + offset) >> (width * count):
            offset = offset << width | 1 << (width - 1)
            count += 1
        return count, offset

    width = min(range(2, 17), key=lambda width: bias(width)[0] * (len(row) + (3 << width)))
    count, offset = bias(width)
    wide = (high + offset).bit_length() > 62
    shifted = np.array([int(value) + offset for value in row], dtype=object if wide else np.int64)
    mask, half = (1 << width) - 1, 1 << (width - 1)
    return width, [((shifted >> width * k) & mask).astype(np.int64) - half for k in range(count)]


# noise


class Noise:
    """Draws of u^m mod m², u uniform among the units modulo m.

    Without bases each draw is just that, exactly. With B of them, of D-bit digits: g₁^d₁ · … · g_B^d_B, where gᵢ is
    such a draw itself, kept with all its powers, and dᵢ are uniform. With B·D at least 128 bits more than the group of
    these numbers the law is within 2^-64 of the uniform one, for nearly all bases (leftover hash lemma, over the
    characters of the group; one of order 2 is the worst, so a prime's first base is no square). The bases may be known
    to anybody and used as often as one likes; the digits are drawn when they are used, and kept nowhere.
    The powers lie in two arrays without an object for each: forked processes go on sharing them.
    """

    def __init__(self, m: int, random: Chance, bases: int = 0, bits: int = 0, first_is_no_square: bool = False) -> None:
        self._m, self._bits = m, bits
        self._width = -(-m.bit_length() // 64) * 8
        shape = bases, 1 << bits, self._width // 4
        self._x, self._t = np.empty(shape, "<u4"), np.empty(shape, "<u4")
        for number in range(bases):
            unit = self._unit(random)
            while number == 0 and first_is_no_square and gmpy2.jacobi(unit, m) != -1:
                unit = self._unit(random)
            powers = _powers(gmpy2.powmod(unit, m, m * m), m, 1 << bits)
            for table, column in zip((self._x, self._t), powers, strict=True):
                raw = b"".join(int(value).to_bytes(self._width, "little") for value in column)
                table[number] = np.frombuffer(raw, "<u4").reshape(shape[1:])

    def draw(self, count: int, random: Chance) -> Split:
        """`count` independent draws as x (long) and t, to be joined; what is added to t is a plaintext."""
        if not count:
            return [], []
        if not len(self._x):
            units = [self._unit(random) for _ in range(count)]
            return [gmpy2.powmod(unit, self._m, self._m**2) for unit in units], [ONE * 0] * count
        drawn = np.frombuffer(random.bytes(2 * len(self._x) * count), "<u2").reshape(-1, count)
        digits = drawn & np.uint16((1 << self._bits) - 1)
        return self._x_of(digits), self._t_of(digits)

    def _x_of(self, digits: npt.NDArray[np.uint16]) -> list[int]:
        """∏ x of digits of shape (bases, count), for each of the count; two bases at a time."""
        square, x = self._m**2, [ONE] * digits.shape[1]
        for number in range(0, len(digits) - 1, 2):
            first, second = (self._column(at, digits[at]) for at in (number, number + 1))
            x = [value * (a * b) % square for value, a, b in zip(x, first, second, strict=True)]
        if len(digits) % 2:
            x = [value * a % square for value, a in zip(x, self._column(len(digits) - 1, digits[-1]), strict=True)]
        return x

    def _column(self, base: int, digits: npt.NDArray[np.uint16]) -> list[int]:
        """x of the powers of one base, read as a single integer and cut in pieces: there is no faster way in."""
        pieces: list[int] = gmpy2.unpack(_read(self._x[base][digits]), 8 * self._width)
        return pieces

    def _t_of(self, digits: npt.NDArray[np.uint16]) -> list[int]:
        """Σ t, as long as it gets: limbs of 32 bits are added up in 64."""
        limbs = np.zeros((digits.shape[1], self._width // 4), np.uint64)
        for powers, places in zip(self._t, digits, strict=True):
            limbs += powers[places]
        return [_read(row[::2]) + (_read(row[1::2]) << 32) for row in limbs]

    def _unit(self, random: Chance) -> int:
        while True:
            unit: int = gmpy2.mpz(random.below(self._m, 1)[0])
            if gmpy2.gcd(unit, self._m) == 1:
                return unit


def _read(limbs: npt.NDArray[Any]) -> int:
    """All of it as one integer."""
    value: int = gmpy2.mpz.from_bytes(limbs.tobytes(), "little")
    return value


def _powers(value: int, m: int, count: int) -> Split:
    """value⁰ … value^(count-1), split: x·y = x' + m·k gives t' = t + k/x', and 1/x' is a power of 1/x."""
    high, base = gmpy2.f_divmod(value, m)
    inverse = gmpy2.invert(base, m)
    step = high * inverse % m
    x, t, y = ONE, ONE * 0, ONE
    powers, sums = [x], [t]
    for _ in range(count - 1):
        k, x = gmpy2.f_divmod(x * base, m)
        y = y * inverse % m
        t = (t + step + k * y) % m
        powers.append(x)
        sums.append(t)
    return powers, sums
