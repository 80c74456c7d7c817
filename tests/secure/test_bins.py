"""Cuckoo hashing: every id in one of its three bins, whatever the walk, and nothing in a message of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fedpeer.errors import StageError
from fedpeer.secure import bins, psi


def blocks(count: int, seed: int) -> bins.Words:
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 2**64, (count, 2), dtype=np.uint64)


def walk(seed: int) -> Callable[[int], bins.Places]:
    chance = np.random.Generator(np.random.PCG64(seed))
    return lambda many: chance.integers(1, 3, many)


def test_there_are_131_bins_for_100_ids_in_steps_of_4096() -> None:
    assert [bins.count(n) for n in (4, 3126, 3127, 10_240, 2**20)] == [4096, 4096, 8192, 16_384, 1_376_256]
    for n in (8000, 2**17, 2**24):
        assert 1.31 * n <= bins.count(n) < 1.31 * n + 4096


def test_the_three_bins_of_an_id_are_different_and_every_triple_is_as_likely() -> None:
    few = bins.of(blocks(60_000, 1), 5)
    assert (few[0] != few[1]).all()
    assert (few[1] != few[2]).all()
    assert (few[0] != few[2]).all()
    counts = np.bincount(few[0] * 25 + few[1] * 5 + few[2], minlength=125)
    assert (counts > 0).sum() == 60
    assert 850 < counts[counts > 0].min() <= counts.max() < 1150
    many = bins.of(blocks(100_000, 2), 2**20)
    assert many.min() >= 0
    assert many.max() < 2**20


@pytest.mark.parametrize("n", [0, 1, 3, 4096, 10_240, 100_000])
def test_each_id_lies_in_one_of_its_bins_and_no_bin_holds_two(n: int, seed: int) -> None:
    count = bins.count(psi.padded(n))
    places = bins.of(blocks(n, seed), count)
    held, which = bins.table(places, count, walk(seed))
    assert held.shape == (count,)
    full = np.flatnonzero(held >= 0)
    assert sorted(held[full]) == list(range(n))
    assert (places[which[held[full]], held[full]] == full).all()


def test_full_lists_of_many_sessions_all_find_room(seed: int) -> None:
    for i in range(60):
        places = bins.of(blocks(2**13, 1000 * seed + i), bins.count(2**13))
        assert bins._walk(places, bins.count(2**13), walk(i)) is not None


def test_ids_that_do_not_fit_are_given_up_after_eight_walks() -> None:
    asked: list[int] = []

    def steps(many: int) -> bins.Places:
        asked.append(many)
        return walk(len(asked))(many)

    places = np.array([[0] * 4, [1] * 4, [2] * 4])
    with pytest.raises(StageError, match="do not fit"):
        bins.table(places, 4096, steps)
    assert len(asked) == bins.TRIES * bins.ROUNDS
