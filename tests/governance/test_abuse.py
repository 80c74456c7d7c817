"""What a participant who writes the contracts gets past an owner's policy: nothing, and nobody else hears why.

Each attack is played twice, with other rows at alice, and once more without the one bound that stops it. Then it works:
so it is that bound that stops it.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from abuse_cast import ALIGN, ANSWER_S, FIT, NAMES, STATISTICS, Play, cast, stages, without
from trio.abc import Clock

from fedpeer import stage as algorithms
from fedpeer.jobs import archive
from fedpeer.jobs.contract import Contract
from fedpeer.peers import Peers
from fedpeer.stage import Params, Report, Stage, Sum, Table, at_least, stage

pytestmark = pytest.mark.system  # a minute of whole federations

NOT_ALLOWED, CANNOT = "alice does not allow it", "alice cannot run this contract: another release"


class Cells(Params, frozen=True):
    min_cell: int = 10


@stage(
    version=1,
    params=Cells,
    roles={"member": at_least(3)},
    inputs={"table": Table},
    outputs={"report": Report},
    messages={"rows": Sum("the rows of all, one after the other")},
)
async def steal(peers: Peers, params: Cells, table: Table) -> dict[str, Any]:
    total = await peers.sum("rows", table.matrix()[:3])
    return {"report": Report({"rows": total["values"].tolist()})}


def find(name: str) -> Stage:
    return steal if name == steal.name else algorithms.find(name)


@dataclass(frozen=True)
class Attack:
    """A contract of mallory's, and what alice says to it."""

    name: str
    contract: Callable[[Play], Contract]
    rule: str
    """what alice's own log says"""
    control: str
    """what her policy says where this attack is to work; "" where no policy can allow it"""
    before: Callable[[Play], Awaitable[Any]] | None = None
    """what she allowed before"""
    policy: str = ""
    told: str = NOT_ALLOWED
    """what the others read"""


def asks(text: str, **more: Any) -> Callable[[Play], Contract]:
    return lambda play: play.contract(text, **more)


def private(epsilon: float) -> str:
    return stages("horizontal.statistics:private", f"epsilon = {epsilon}, columns = {{ x0 = [-4, 4] }}, bins = 4")


async def three_thirds(play: Play) -> None:
    for _ in range(3):
        await play.honest(private(1.0))


async def of_all_rows(play: Play) -> None:
    await play.offer("fewer", first=1)
    await play.honest(FIT)


async def among_four(play: Play) -> None:
    await play.honest(FIT, names=NAMES)


async def clusters_among_four(play: Play) -> None:
    """The first sum of it is the moments that the statistics have, too."""
    await play.honest(stages("horizontal.kmeans:fit", "k = 2, max_iter = 1"), names=NAMES)


async def aligned(play: Play) -> None:
    await play.offer("people", ids="person")
    await play.honest(ALIGN.replace("PARAMS", ""), names=["mallory", "alice"])


async def nearly_alone(play: Play) -> None:
    await play.offer("alone", 2, names=["mallory", "bob"])
    await play.offer("alone", names=["alice"])


PAIR = {"names": ["mallory", "alice"]}
ATTACKS = [
    Attack("a sum of two", lambda play: without(play.contract(STATISTICS), "bob"), "takes at least 3", "", told=CANNOT),
    Attack(
        "a sum that two survivors open",
        asks(FIT, rules="min_parties = 2"),
        "the contract opens sums over 2, maybe 2 organizations that hold data, min_parties = 3",
        "min_parties = 2\nassumed_colluders = 0",
    ),
    Attack(
        "a tiny cohort",
        asks(FIT.replace("rows", "rare")),
        r"(25|30) rows in 'rare', min_rows = 100",
        "min_rows = 1",
        before=lambda play: play.offer("rare", 20),
    ),
    Attack(
        "all rows but one",
        asks(FIT.replace("rows", "fewer")),
        "1 rows of 'fewer' differ from an earlier answer, min_cell = 10",
        "no_row_differencing = false",
        before=of_all_rows,
    ),
    Attack(
        "all participants but one",
        asks(FIT),
        "1 participants differ from those of a sum over these rows of 'rows', at least 3",
        "no_party_differencing = false",
        before=among_four,
    ),
    Attack(
        "all participants but one by another stage",
        asks(STATISTICS),
        "1 participants differ from those of a sum over these rows of 'rows', at least 3",
        "no_party_differencing = false",
        before=clusters_among_four,
    ),
    Attack(
        "cells of one row",
        asks(stages("horizontal.statistics:run", "bins = 100, min_cell = 1")),
        "min_cell = 1 in the contract, min_cell = 10",
        "min_cell = 1",
    ),
    Attack(
        "clusters of three rows",
        asks(stages("horizontal.kmeans:fit", "k = 4, min_rows = 3, max_iter = 1")),
        "min_rows = 3 in the contract, min_cell = 10",
        "min_cell = 3",
    ),
    Attack(
        "a stage that nobody named",
        asks(stages(steal.name)),
        "test_abuse:steal is not among what may run",
        'stages = ["*"]',
    ),
    Attack(
        "a stage of mallory",
        lambda play: renamed(play.contract(stages(steal.name)), "mallory.own:steal"),
        "there is no algorithm 'mallory.own'",
        "",
        told=CANNOT,
    ),
    Attack(
        "more than a job may cost",
        asks(private(1.5)),
        "ε = 1.5 of 'rows' in one job, per_job = 1",
        "[budget]\nper_job = 2.0",
    ),
    Attack(
        "more than a year may cost",
        asks(private(0.5)),
        "ε = 0.5 of 'rows' and 3 in the year before, epsilon = 3",
        "[budget]\nepsilon = 4.0",
        before=three_thirds,
    ),
    Attack(
        "more parameters than rows tell",
        asks(stages("horizontal.logistic:fit", "max_iter = 2", dataset="wide")),
        r"36 parameters from 10[05] rows, max_parameters_per_row = 0.33",
        "max_parameters_per_row = inf",
        before=lambda play: play.offer("wide", 95, 35),
    ),
    Attack(
        "a list of all ids",
        asks(ALIGN.replace("PARAMS", "max_ids = 10000"), **PAIR),
        "max_ids = 10000 in the contract, psi_max_ids = 500",
        "psi_max_ids = 10000",
        before=lambda play: play.offer("people", ids="person"),
        policy="psi_max_ids = 500\n",
    ),
    Attack(
        "ids by few at a time",
        asks(ALIGN.replace("PARAMS", "min_intersection = 1"), **PAIR),
        "min_intersection = 1 in the contract, min_intersection = 100",
        "min_intersection = 1",
        before=lambda play: play.offer("people", ids="person"),
    ),
    Attack(
        "ids once more",
        asks(ALIGN.replace("PARAMS", ""), **PAIR),
        "1 alignments of this version of 'people' with mallory, psi_per_version = 1",
        "psi_per_version = 2",
        before=aligned,
    ),
    Attack(
        "partners that bring next to no rows",
        asks(FIT.replace("rows", "alone")),
        "2 organizations hold data, min_parties = 3",
        'trusted = ["*"]',
        before=nearly_alone,
        policy='trusted = ["bob", "carol"]\n',
    ),
    Attack(
        "two names of one organization",
        asks(FIT, names=["mallory", "alice", "carol"]),
        "2 organizations hold data, min_parties = 3",
        "organizations = {}",
        policy='organizations = { one = ["mallory", "carol"] }\n',
    ),
]


def renamed(read: Contract, run: str) -> Contract:
    replace = msgspec.structs.replace
    return replace(read, stages=tuple(replace(entry, run=run) for entry in read.stages))


def named(attack: Attack) -> str:
    return attack.name.replace(" ", "-")


def relaxed(attack: Attack) -> str:
    """Alice's policy with the attack's bound away."""
    key = attack.control.partition(" ")[0]
    kept = [line for line in attack.policy.splitlines() if line.partition(" ")[0] != key]
    return "\n".join([*kept, attack.control])


@pytest.mark.parametrize("attack", ATTACKS, ids=named)
async def test_alice_refuses_says_nothing_and_knows_why(
    autojump_clock: Clock, quick_path: Path, attack: Attack
) -> None:
    told = []
    for secret in (1, 2):
        async with cast(quick_path, secret, policy=attack.policy, find=find) as play:
            await play.offer()
            if attack.before is not None:
                await attack.before(play)
            async with play.watched():
                job = await play.propose(attack.contract(play))
                views = await play.ended(job, ["mallory", "alice"])
            alice, mallory = views["alice"], views["mallory"]
            assert (alice.state, mallory.state) == ("failed", "failed")
            assert alice.error is not None
            assert mallory.error is not None
            entries = {entry.event: str(entry.facts) for entry in await play.audited(job)}
            for own in (alice.error.message, entries["failed"]):
                assert re.search(attack.rule, own)
            if attack.told != CANNOT or mallory.error.peer:  # else its own daemon cannot run it either, and was first
                read = mallory.error.message
                if attack.told == CANNOT:  # bob says so at once, too, and may be heard first
                    read = read.replace("bob", "alice", 1)
                assert read.startswith(attack.told)
                assert not re.search(r"\d", read)
            assert play.watch.of_stages() == []
            assert not await play.alice.daemon.store.read(lambda tx: archive.stages(tx, bytes.fromhex(job)))  # noqa: B023
            told.append(play.watch.told())
    assert told[0] == told[1]
    when = 0 if attack.told == CANNOT else ANSWER_S  # what a policy finds is told at the deadline
    assert {second for second, *_ in told[0]} == {when}


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack.control], ids=named)
async def test_without_that_bound_it_works(autojump_clock: Clock, quick_path: Path, attack: Attack) -> None:
    async with cast(quick_path, 1, policy=relaxed(attack), find=find) as play:
        await play.offer()
        if attack.before is not None:
            await attack.before(play)
        async with play.watched():
            job = await play.propose(attack.contract(play))
            views = await play.ended(job, ["mallory", "alice"])
        assert {view.state for view in views.values()} == {"done"}, views["alice"].error
        assert play.watch.of_stages() != []
