"""The simulator itself: it repeats, it injects, its driver keeps to its duties; and some worlds by name."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fedpeer.aggregation import names
from fedpeer.testing.sums import world as worlds
from fedpeer.testing.sums.faults import EVERYTHING, POINTS, Faults, Kill, Liar, Partition
from fedpeer.testing.sums.world import Node, Outcome, Sum, World

ONE = [Sum(("fit", 0, 0), "turn", True, 0)]
TWO = [*ONE, Sum(("fit", 0, 1), "turn", True, 0)]
BOTH_GROUPS = [Sum(("count", 0, 0), "data", True, 0), *TWO, Sum(("fit", 1, 0), "turn", False, 1)]


def ended(outcome: Outcome) -> dict[str, int]:
    assert not outcome.failures, outcome.failures
    return dict(outcome.ended)


@pytest.mark.parametrize("n", [3, 4, 5, 7, 11])
def test_without_faults_every_sum_is_exact_at_the_first_attempt(n: int) -> None:
    outcome = World(n, n=n, faults=Faults(), sums=BOTH_GROUPS).run()
    assert ended(outcome) == {"SUM": 4 * n}
    assert outcome.instances == 4
    assert outcome.promised == outcome.kept == 3  # all but the second of the pinned group


def test_the_same_seed_is_the_same_run_in_any_process() -> None:
    program = "from fedpeer.testing.sums.world import World; print([World(s).run().fingerprint.hex() for s in (7, 8)])"
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1, said


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_every_point_leaves_the_sums_exact(point: str) -> None:
    for at in (1, 2, 5, 9):
        faults = Faults(kills={1: (Kill(point, at, 3.0),)})
        outcome = World(at, n=4, faults=faults, sums=TWO).run()
        assert ended(outcome) == {"SUM": 8}, (point, at)
        if at == 1:
            assert outcome.injected[f"kill {point}"] == 1


def test_a_partition_heals() -> None:
    faults = Faults(partitions=(Partition(0.2, 100.0, frozenset({0, 1})),))
    outcome = World(1, n=4, faults=faults, sums=TWO).run()
    assert ended(outcome) == {"SUM": 8}
    assert outcome.seconds > 100


def test_a_full_disk_says_nothing_and_goes_on_when_there_is_space() -> None:
    for at in range(1, 14):
        world = World(at, n=4, faults=Faults(full={2: at}), sums=ONE)
        outcome = world.run()
        assert ended(outcome) == {"SUM": 4}, at
        assert outcome.injected["disk full"] == 1, at


def test_a_party_that_comes_late_is_waited_for_where_it_would_be_out_for_the_contract() -> None:
    data = [Sum(("count", 0, 0), "data", True, 0)]
    world = World(1, n=5, faults=Faults(late={4: 100.0}), sums=data)
    assert ended(world.run()) == {"SUM": 5}
    assert world.nodes[0].ends()["count", 0, 0].survivors == frozenset(range(5))


def test_of_three_nobody_may_be_absent() -> None:
    outcome = World(1, n=3, faults=Faults(late={2: float("inf")}), sums=ONE).run()
    assert ended(outcome) == {"WAITING": 2}


def test_a_silent_dealer_among_four_ends_by_name_or_well() -> None:
    for seed in range(6):
        faults = Faults(liars={seed % 4: Liar(shares_for=frozenset({(seed + 1) % 4}))})
        outcome = World(seed, n=4, faults=faults, sums=TWO).run()
        assert set(ended(outcome)) <= {"SUM", "LOST", "WAITING"}


@pytest.mark.parametrize("liar", [Liar(twin=True), Liar(twice=EVERYTHING)], ids=["twin", "twice"])
def test_an_equivocator_changes_no_total(liar: Liar) -> None:
    for seed in range(5):
        outcome = World(seed, n=5, faults=Faults(0.1, 0.1, 0.1, liars={seed: liar}), sums=TWO).run()
        assert not outcome.failures, (seed, outcome.failures)
        assert outcome.injected["equivocation"]


def test_a_party_with_an_old_copy_of_its_disk_says_nothing_more_in_that_instance() -> None:
    returned = 0
    for at in range(3, 16):
        kill = Kill("before a commit", at, 1.0, roll_back=True)
        faults = Faults(kills={1: (kill,)}, liars={1: Liar(rolled_back=True)})
        world = World(at, n=4, faults=faults, sums=ONE)
        outcome = world.run()
        assert not outcome.failures, (at, outcome.failures)
        for when, party, sid in world.returned:
            returned += 1
            assert not [
                said.signed.kind
                for said in world.transcript
                if said.party == party and said.signed.sid == sid and said.at > when
            ]
    assert returned > 20


def test_who_gave_up_masks_nothing_any_more_and_the_others_give_up_too() -> None:
    """The last of the three that a sum takes comes when the patience of the first two is nearly over."""
    data = [Sum(("count", 0, 0), "data", True, 0)]
    for seed, n, late in ((1, 4, {3: math.inf, 2: 2000.0}), (2, 5, {2: 1900.0, 3: math.inf})):
        world = World(seed, n=n, faults=Faults(late=late), sums=data)
        assert ended(world.run()) == {"WAITING": n - 1}
        assert {said.party for said in world.transcript if said.signed.kind == "SCATTER"} <= {2}


# planted in the simulator's own driver: each must be seen


def planted(monkeypatch: pytest.MonkeyPatch, name: str, replacement: Callable[..., Any]) -> list[int]:
    monkeypatch.setattr(World, name, replacement)
    return [seed for seed in range(400, 430) if World(seed).run().failures]


def test_a_driver_that_sends_before_it_commits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    write = World._write

    def unsynced(self: World, node: Node, *writes: Any, sync: bool = True) -> None:
        write(self, node, *writes, sync=sync and not any(table in ("said", "kept") for table, _, _ in writes))

    assert planted(monkeypatch, "_write", unsynced)


@pytest.mark.parametrize("status", ["NOISE", "LOST", "WAITING"])
def test_another_end_at_one_party_than_at_the_others_is_found(status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = World._ended

    def wrong(self: World, node: Node, ended: Any) -> None:
        told(self, node, replace(ended, status=status) if node.party in (2, 3) else ended)

    monkeypatch.setattr(World, "_ended", wrong)
    failures = World(1, n=4, faults=Faults(), sums=ONE).run().failures
    for party in (2, 3):
        assert f"('fit', 0, 0): {status} at party {party}, though [0, 1] have the total" in failures


def test_a_total_that_is_not_the_sum_of_its_survivors_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    perform = worlds.work.perform

    def wrong(item: Any, files: Any, vector: Any = None) -> Any:
        if vector is not None:
            vector[0] ^= 1  # what is masked is not what was asked for
        return perform(item, files, vector)

    monkeypatch.setattr(worlds.work, "perform", wrong)
    failures = World(1, n=4, faults=Faults(), sums=ONE).run().failures
    assert len(failures) == 4
    assert all("is not the sum" in failure for failure in failures)


def test_profiles_of_worlds_are_those_of_the_protocol() -> None:
    assert {World(seed).profile for seed in range(60)} <= {
        names.profile(n, name) for n in range(3, 12) for name in ("byz", "crash") if (n, name) != (3, "byz")
    }
