"""The simulated disk: what is lost at a kill, and what is not."""

from __future__ import annotations

import pytest

from fedpeer.testing.sums.disk import Disk, Full


def disk(*numbers: int) -> Disk:
    made = Disk()
    for number in numbers:
        made.write([("t", number, f"v{number}"), ("t", "last", number)])
    return made


def test_what_was_not_synced_is_lost_from_the_end() -> None:
    made = disk(1, 2)
    made.sync()
    made.write([("t", 3, "v3"), ("t", "last", 3)])
    made.write([("t", 1, None), ("t", "last", 4)])
    assert made.unsynced == 2
    made.lose(1)
    assert made.tables["t"] == {1: "v1", 2: "v2", 3: "v3", "last": 3}
    assert made.unsynced == 0, "what survived the kill is on the disk"


def test_all_that_was_not_synced_can_be_lost() -> None:
    made = disk(1)
    made.sync()
    made.write([("t", 2, "v2"), ("u", 2, "v2"), ("t", "last", 2)])
    made.write([("u", 2, None)])
    made.lose(made.unsynced)
    assert made.tables["t"] == {1: "v1", "last": 1}
    assert made.tables["u"] == {}


def test_a_full_disk_keeps_nothing_of_a_transaction() -> None:
    made = disk(1)
    with pytest.raises(Full):
        made.write([("t", 2, "v2")], full=True)
    assert 2 not in made.tables["t"]


def test_an_old_copy_brings_back_what_was() -> None:
    made = disk(1)
    backup = made.copy()
    made.write([("t", 1, "other"), ("t", 2, "new")])
    made.restore(backup)
    assert made.tables["t"] == {1: "v1", "last": 1}
    made.write([("t", 1, "other")])
    assert backup["t"][1] == "v1"
