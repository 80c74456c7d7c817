"""The door: caps before authentication; the pause between dials; which of two sessions stays. No network, no clock."""

from __future__ import annotations

from collections import Counter

import pytest

from fedpeer.mesh.door import LONGEST_PAUSE_S, REMEMBERED, Door, pause
from fedpeer.mesh.messages import Claim


def test_strangers_cannot_take_the_places_reserved_for_known_addresses() -> None:
    door = Door(cap=256, reserve=32, per_source=16)
    door.know("friend")
    entered = Counter(f"10.0.0.{i % 200}" for i in range(1000) if door.enter(f"10.0.0.{i % 200}", 0.0))
    assert entered.total() == 224
    assert max(entered.values()) <= 16
    assert not door.enter("10.1.1.1", 0.0)
    assert door.enter("friend", 0.0)
    assert door.refused["full"] == 777


def test_one_source_has_few_places_and_gets_them_back() -> None:
    door = Door(per_source=3)
    assert [door.enter("a", 0.0) for _ in range(5)] == [True] * 3 + [False] * 2
    assert door.enter("b", 0.0)
    door.leave("a")
    assert door.enter("a", 0.0)
    for source in "aaab":
        door.leave(source)
    assert door.inside == {}
    assert door.refused == {"source": 2}


def test_one_source_may_try_so_many_times_a_second() -> None:
    door = Door(rate=20, burst=5, per_source=1000)

    def tries(now: float) -> int:
        return sum(door.enter("a", now) for _ in range(100))

    assert tries(0.0) == 5
    assert tries(0.1) == 2
    assert tries(1.1) == 5  # the bucket is full at 5
    assert door.enter("b", 1.1)
    assert door.refused["rate"] == 288


def test_what_is_remembered_of_addresses_is_bounded() -> None:
    door = Door()
    for number in range(3 * REMEMBERED):
        if door.enter(str(number), 0.0):
            door.leave(str(number))
        door.know(str(number))
    assert len(door._buckets) == len(door._known) == REMEMBERED
    assert door.inside == {}


def test_the_pause_doubles_up_to_a_minute_and_is_spread_by_half() -> None:
    assert [pause(n, 0.5) for n in range(4)] == [0.25, 0.5, 1.0, 2.0]
    assert pause(10_000, 0.5) == LONGEST_PAUSE_S
    assert (pause(3, 0.0), pause(3, 0.999)) == (1.0, pytest.approx(3.0, abs=0.01))


@pytest.mark.parametrize(
    ("new", "old", "replaces"),
    [
        (Claim(b"1", 0, "a"), Claim(b"1", 0, "b"), True),  # a simultaneous dial: the smaller initiator's stays
        (Claim(b"1", 0, "b"), Claim(b"1", 0, "a"), False),
        (Claim(b"1", 0, "a"), Claim(b"1", 0, "a"), True),  # it gave up its first try
        (Claim(b"1", 1, "b"), Claim(b"1", 0, "a"), True),  # over there a session ended since
        (Claim(b"1", 0, "a"), Claim(b"1", 1, "b"), False),
        (Claim(b"2", 0, "b"), Claim(b"1", 7, "a"), True),  # it was started anew
    ],
)
def test_both_sides_choose_alike_between_two_sessions(new, old, replaces) -> None:
    assert new.replaces(old) is replaces
