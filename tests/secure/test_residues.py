"""Arithmetic modulo m²: against plain powers, and the law of noise on moduli so small that all of it can be seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import gmpy2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeer.peers import Chance
from fedpeer.secure import residues
from fedpeer.secure.residues import Noise

Ints = npt.NDArray[np.integer]
M = 1_000_003 * 998_244_353
SQUARE = M * M
SMOOTH = 9241
"""A prime: less one it is 2³ · 3 · 5 · 7 · 11."""
FACTORS = (2, 3, 5, 7, 11)
BASES, BITS = 12, 12
"""144 bits: 128 more than the 13 of the group"""


def chance(number: int) -> Chance:
    return Chance(number.to_bytes(32, "little"))


def units(count: int, seed: int = 0) -> list[int]:
    return [gmpy2.mpz(value) for value in chance(seed).below(SQUARE, count)]  # of which one in 10^6 is none


# products


def test_a_number_is_what_it_was_split_into() -> None:
    values = units(50)
    x, t = residues.split(values, M)
    assert max(x) < M
    assert max(t) < M
    assert residues.join(x, t, M) == values


def test_inverses_are_inverses() -> None:
    values = units(40)
    assert [a * b % SQUARE for a, b in zip(values, residues.inverses_squared(values, M), strict=True)] == [1] * 40
    assert [a * b % M for a, b in zip(values, residues.inverses(values, M), strict=True)] == [1] * 40
    with pytest.raises(ZeroDivisionError):
        residues.inverses([*values, gmpy2.mpz(1_000_003)], M)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 300])
def test_products_of_groups_are_those_of_their_members(count: int) -> None:
    values = units(count)
    index = chance(1).integers(-1, 9, count)
    wanted = [math.prod(values[place] for place in np.flatnonzero(index == group)) % SQUARE for group in range(11)]
    assert residues.products(values, index, 11, M) == wanted
    assert residues.split_products(residues.split(values, M), index, 11, M) == wanted


numbers = st.one_of(st.integers(-3, 3), st.integers(-(2**16), 2**16), st.integers(-(2**130), 2**130))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_power_products_are_products_of_powers(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    rows = data.draw(st.lists(st.lists(numbers, min_size=count, max_size=count), min_size=1, max_size=3))
    values = units(count)
    wanted = [math.prod(pow(int(v), k, SQUARE) for v, k in zip(values, row, strict=True)) % SQUARE for row in rows]
    assert residues.power_products(residues.split(values, M), rows, M) == wanted


@settings(max_examples=80, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=30), st.integers(1, 3000))
def test_signed_digits_add_up_to_the_numbers(row: list[int], times: int) -> None:
    width, digits = residues.signed_digits(row * (1 + times // len(row)))
    assert all(-(1 << (width - 1)) <= digit < 1 << (width - 1) for digit in np.concatenate(digits))
    sums = sum(digit.astype(object) << (width * place) for place, digit in enumerate(digits))
    assert isinstance(sums, np.ndarray)
    assert sums.tolist()[: len(row)] == row


# noise


def elements(noise: Noise, count: int, random: Chance, m: int = SMOOTH) -> list[int]:
    return [int(value) for value in residues.join(*noise.draw(count, random), m)]


def classes(values: Sequence[int], factor: int) -> list[int]:
    """Into which of the `factor` cosets of the subgroup of this index each number falls."""
    root = next(
        pow(u, (SMOOTH - 1) // factor, SMOOTH) for u in range(2, 99) if pow(u, (SMOOTH - 1) // factor, SMOOTH) != 1
    )
    number = {pow(root, power, SMOOTH): power for power in range(factor)}
    return [number[pow(int(value) % SMOOTH, (SMOOTH - 1) // factor, SMOOTH)] for value in values]


def looks_uniform(counts: Ints) -> bool:
    """Pearson's χ², as many standard deviations from its mean as chance gives once in 10^6 tables."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # Wilson and Hilferty, 1931
    normal = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return normal < 4.9


def noise_is_uniform_and_independent(noise: Noise, seed: int) -> bool:
    """Whether what noise makes of skewed inputs is uniform, in each coset, whatever the input was."""
    count = 10_000
    square = SMOOTH * SMOOTH
    inputs = [pow(value, 1 + value % 3, square) for value in elements(Noise(SMOOTH, chance(0)), 7, chance(1))]
    before = [inputs[place * place % 7] for place in range(count)]
    after = [a * b % square for a, b in zip(before, elements(noise, count, chance(seed)), strict=True)]
    for factor in FACTORS:
        joint = np.zeros((factor, factor))
        np.add.at(joint, (classes(before, factor), classes(after, factor)), 1)
        if not all(looks_uniform(row) for row in joint if row.sum() > 100):
            return False
    return True


def test_noise_is_uniform_in_each_coset_and_independent_of_what_it_hides() -> None:
    for seed in range(3):
        noise = Noise(SMOOTH, chance(10 + seed), BASES, BITS, first_is_no_square=True)
        assert noise_is_uniform_and_independent(noise, 20 + seed)


def test_noise_without_a_table_is_uniform_too() -> None:
    assert noise_is_uniform_and_independent(Noise(SMOOTH, chance(30)), 31)


def test_a_single_base_does_not_pass_for_noise() -> None:
    found = [
        noise_is_uniform_and_independent(Noise(SMOOTH, chance(40 + seed), 1, 14, first_is_no_square=True), 50 + seed)
        for seed in range(6)
    ]
    assert not all(found)


def test_noise_reaches_every_unit_and_nothing_else() -> None:
    noise = Noise(SMOOTH, chance(60), BASES, BITS, first_is_no_square=True)
    drawn = elements(noise, 160_000, chance(61))
    assert set(drawn) == {pow(unit, SMOOTH, SMOOTH * SMOOTH) for unit in range(1, SMOOTH)}


def test_an_odd_number_of_bases_counts_every_one_of_them() -> None:
    for bases in (1, 3):
        drawn = set(elements(Noise(SMOOTH, chance(62), bases, 1, first_is_no_square=True), 300, chance(63)))
        assert len(drawn) == 2**bases
        assert {pow(value, SMOOTH - 1, SMOOTH * SMOOTH) for value in drawn} == {1}


def test_the_first_base_is_no_square() -> None:
    for seed in range(20):
        drawn = elements(Noise(SMOOTH, chance(70 + seed), 1, 1, first_is_no_square=True), 50, chance(seed))
        assert {gmpy2.legendre(value, SMOOTH) for value in drawn} == {1, -1}


def test_the_same_chance_gives_the_same_noise_and_each_draw_is_another() -> None:
    large = gmpy2.next_prime(1 << 256)
    noise = Noise(large, chance(1), 40, 10)
    assert noise.draw(9, chance(2)) == Noise(large, chance(1), 40, 10).draw(9, chance(2))
    random = chance(2)
    drawn = [residues.join(*noise.draw(9, random), large) for _ in range(20)]
    assert len({value % large for values in drawn for value in values}) == 180
    exact = Noise(large, chance(1))
    assert exact.draw(2, chance(3))[0] != exact.draw(2, chance(4))[0]
