"""Chance of a stage: integers of any length."""

from __future__ import annotations

import pytest

from fedpeer.peers import Chance


def chance(number: int) -> Chance:
    return Chance(number.to_bytes(32, "little"))


@pytest.mark.parametrize("bound", [1, 2, 3, 255, 256, 257, 2**64, 2**2047 + 1])
def test_integers_below_a_bound_are_below_it_and_as_many_as_asked(bound: int) -> None:
    drawn = chance(bound.bit_length()).below(bound, 500)
    assert len(drawn) == 500
    assert min(drawn) >= 0
    assert max(drawn) < bound
    assert max(drawn) >= bound // 2
    assert chance(bound.bit_length()).below(bound, 0) == []


@pytest.mark.parametrize("bound", [3, 5, 6, 200, 129])
def test_integers_below_a_bound_are_all_as_frequent(bound: int) -> None:
    count = 400 * bound
    drawn = chance(7).below(bound, count)
    statistic = sum((drawn.count(value) - 400) ** 2 / 400 for value in range(bound))
    assert statistic < bound + 6 * (2 * bound) ** 0.5


def test_integers_below_a_bound_are_the_same_again_and_others_with_other_chance() -> None:
    bound = 2**2047 + 12345
    random = chance(1)
    first, second = random.below(bound, 5), random.below(bound, 5)
    assert chance(1).below(bound, 5) == first
    assert not set(first) & (set(second) | set(chance(2).below(bound, 5)))
