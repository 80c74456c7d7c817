"""What mallory does besides writing contracts: she lies to some, and lets others in. Alice ends it before she tells.

Whatever she lies about is hers to lie about: what she proposes to all, what her stage sends, whom she passes on.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from abuse_cast import ALIGN, FIT, STATISTICS, THREE, Play, beside, cast, stages
from trio.abc import Clock

from fedpeer import codec
from fedpeer import stage as algorithms
from fedpeer.aggregation import agreed
from fedpeer.algorithms.vertical import align
from fedpeer.errors import PolicyError
from fedpeer.jobs import contract, lifecycle
from fedpeer.jobs.contract import Contract
from fedpeer.jobs.execution import join
from fedpeer.mesh import records
from fedpeer.peers import Peers
from fedpeer.secure import psi
from fedpeer.stage import Agreed, Params, Report, Stage, Sum, Table, at_least, stage
from fedpeer.testing.federation import LAX

pytestmark = pytest.mark.system  # a minute of whole federations


class Cells(Params, frozen=True):
    min_cell: int = 10


@stage(
    version=1,
    params=Cells,
    roles={"member": at_least(3)},
    inputs={"table": Table},
    outputs={"report": Report},
    messages={"model": Agreed("nothing: where to begin"), "gradient": Sum("at the agreed model, of all rows")},
)
async def train(peers: Peers, params: Cells, table: Table) -> dict[str, Any]:
    """Where one begins at 0 and another at 1, the sum is the gradient of the latter alone."""
    model = await peers.agree("model", np.ones(2))
    total = await peers.sum("gradient", table.matrix()[:, :2].sum(axis=0) * model)
    return {"report": Report({"gradient": total["values"].tolist()})}


def find(name: str) -> Stage:
    return train if name == train.name else algorithms.find(name)


def shape(told: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """What was said when, of messages with fresh keys the kind only."""
    return [(at, kind, str(slot).split("/")[1:2]) for at, kind, slot, *_ in told]


def sums_of(play: Play) -> list[Any]:
    """Her masked vectors, and what they are announced with."""
    return [item for item in play.watch.of_stages() if item[1][0] == "blob" or "/SCATTER/" in str(item[2])]


# model inconsistency


def says_another_model(play: Play, told: dict[str, float]) -> None:
    """As the proposer mallory tells each another first value, in a record of the same slot."""
    daemon = play.mallory.daemon

    async def agree(contract: bytes, parties: Sequence[str], stage: str, turn: int, k: int, mine: bytes) -> bytes:
        for name, number in told.items():
            value = join(*codec.pack_value(np.full(2, number)))
            body = codec.encode(agreed.AgreedRecord(value, b"", 0))
            said = records.Record(contract, agreed.KIND, f"{stage}/{turn}/{k}", daemon.identity.id, body)
            session = daemon.connections.sessions[play.peers[name].identity.id]
            session.push(records.sign(daemon.identity.signing, said))
        return join(*codec.pack_value(np.ones(2)))

    daemon.aggregation._agreed.agree = agree  # type: ignore[method-assign]


def led_by_mallory(play: Play, text: str, rules: str) -> Contract:
    """A contract whose first agreed value is mallory's to propose: she tries nonces until it is so."""
    for number in itertools.count():
        read = play.contract(text, rules=rules, nonce=number.to_bytes(contract.NONCE_BYTES, "little"))
        id_ = contract.contract_id(codec.encode(read))
        if agreed.proposer(id_, "ask", 0, 0, read.peers) == play.mallory.identity.id:
            return read
    raise AssertionError


async def test_no_sum_is_opened_over_those_who_were_told_different_models(
    autojump_clock: Clock, quick_path: Path
) -> None:
    """As little different as the stage lets pass for another processor's last bits."""
    async with cast(quick_path, 1, policy='stages = ["test_abuse_deeds:train"]\n', find=find, names=THREE) as play:
        await play.offer()
        says_another_model(play, {"alice": 1.0, "bob": 1 + 1e-12})
        async with play.watched():
            job = await play.propose(led_by_mallory(play, stages(train.name), "stall_s = 600"))
            views = await play.ended(job)
        alice = views["alice"]
        assert alice.error is not None
        assert (alice.state, alice.error.code) == ("failed", "equivocation")
        assert "mallory said two different things" in alice.error.message
        assert "two different things" in str((await play.audited(job))[-1].facts)
        assert sums_of(play) == []


async def test_a_stage_does_not_go_on_from_what_it_did_not_compute(autojump_clock: Clock, quick_path: Path) -> None:
    told = []
    for secret in (1, 2):
        async with cast(quick_path, secret, policy='stages = ["test_abuse_deeds:train"]\n', find=find) as play:
            await play.offer()
            says_another_model(play, {"alice": 0.5, "bob": 0.0})
            async with play.watched():
                job = await play.propose(led_by_mallory(play, stages(train.name), "stall_s = 600"))
                views = await play.ended(job)
            (failed,) = [entry for entry in await play.audited(job) if entry.event == "failed"]
            assert "is not what came out here" in str(failed.facts)
            assert views["mallory"].outputs == []
            assert sums_of(play) == []
            told.append(play.watch.told())
    kinds = [
        [(at, kind, str(slot).partition("/")[2].partition("/")[0]) for at, kind, slot, *_ in each] for each in told
    ]
    assert kinds[0] == kinds[1]


# late joiners


async def test_who_is_not_in_the_contract_joins_by_no_second_one(autojump_clock: Clock, quick_path: Path) -> None:
    """Alice has agreed and bob is still asked. Mallory says the contract again, with carol in it."""
    told = []
    for secret in (1, 2):
        async with cast(quick_path, secret) as play:
            await play.offer()
            await play.peers["bob"].set_policy(LAX.replace('"auto"', '"ask"'))
            mallory, carol = play.mallory.daemon, play.peers["carol"].daemon
            async with play.watched():
                read = play.contract(STATISTICS)
                job = await play.propose(read)
                await trio.sleep(5)
                assert (await play.alice.daemon.jobs.get(job)).state == "proposed"
                scope = bytes.fromhex(job)
                mine = codec.encode(lifecycle.Answer(True, "", ()))
                joins = records.Record(scope, lifecycle.COUNTERSIGN, "", carol.identity.id, mine)
                session = carol.connections.sessions[play.alice.identity.id]
                session.push(records.sign(carol.identity.signing, joins))
                await trio.sleep(5)
                view = await play.alice.daemon.jobs.get(job)
                assert (view.state, view.waiting_for) == ("proposed", ["bob"])
                body = codec.encode(beside(read, "carol", carol.identity.id))
                again = records.Record(scope, lifecycle.CONTRACT, "", mallory.identity.id, body)
                session = mallory.connections.sessions[play.alice.identity.id]
                session.push(records.sign(mallory.identity.signing, again))
                views = await play.ended(job)
            alice = views["alice"]
            assert alice.error is not None
            assert (alice.state, alice.error.code) == ("failed", "equivocation")
            assert "two different things" in str((await play.audited(job))[-1].facts)
            assert play.watch.of_stages() == []
            told.append(play.watch.told())
    assert told[0] == told[1]


# what her stage says


async def greedy(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    """Asks about more ids than the contract lets it."""
    await peers.broadcast("guest_size", psi.padded(psi.MAX_IDS))
    await peers.receive("alice", "host_size")
    await peers.receive("alice", "host_nonce")
    return {}


async def test_more_ids_than_were_agreed_are_not_answered(autojump_clock: Clock, quick_path: Path) -> None:
    told = []
    for secret in (1, 2):
        async with cast(quick_path, secret) as play:
            await play.offer("people", ids="person")
            lies = replace(align.run, function=functools.update_wrapper(greedy, align.run.function))
            play.mallory.daemon.find = lambda name, lies=lies: lies if name == lies.name else algorithms.find(name)
            async with play.watched():
                job = await play.propose(
                    play.contract(ALIGN.replace("PARAMS", "max_ids = 500"), names=["mallory", "alice"])
                )
                views = await play.ended(job, ["mallory", "alice"])
            alice, mallory = views["alice"], views["mallory"]
            assert alice.error is not None
            assert mallory.error is not None
            assert "mallory sent" in alice.error.message
            assert "alice ended the job" in mallory.error.message
            told.append(play.watch.told())
            letters = [codec.decode(item[2])[0:1] for item in play.watch.of_stages() if item[1][0] == "mail"]
            assert len(letters) == 1  # how many ids she has, rounded
    assert told[0] == told[1]


CHOSEN = (
    ALIGN.replace("PARAMS", "")
    + """
[[stage]]
id = "choose"
run = "local.select:run"
roles = { member = ["mallory", "alice"] }
inputs = { rows = "align.rows", table = "dataset:people" }
[[stage]]
id = "ask"
run = "horizontal.logistic:fit"
inputs.table = { mallory = "choose.table", alice = "choose.table", bob = "dataset:people" }
"""
)


async def test_rows_that_are_chosen_by_an_alignment_are_compared_with_earlier_ones(
    autojump_clock: Clock, quick_path: Path
) -> None:
    """Mallory has all of alice's ids but one. Alice's part of the alignment is what she allowed; no sum follows."""
    async with cast(quick_path, 1) as play:
        await play.offer("people", 205, names=["mallory", "bob"], first=1, ids="person")
        await play.offer("people", names=["alice"], ids="person")
        await play.honest(FIT.replace("rows", "people"))
        async with play.watched():
            job = await play.propose(play.contract(CHOSEN))
            views = await play.ended(job)
        alice, mallory = views["alice"], views["mallory"]
        assert alice.error is not None
        assert mallory.error is not None
        assert "1 rows of 'people' differ from an earlier answer, min_cell = 10" in alice.error.message
        assert mallory.error.message == f"alice ended the job: {PolicyError().message}"
        assert not [item for item in play.watch.of_stages() if item[1] == "sa1"]


# the same question again and again


async def test_a_hundred_repeats_are_answered_until_the_budget_or_the_day_is_over(
    autojump_clock: Clock, quick_path: Path
) -> None:
    text = stages("horizontal.statistics:private", "epsilon = 0.5, columns = { x0 = [-4, 4] }, bins = 1")
    async with cast(quick_path, 1, names=THREE) as play:
        await play.offer(features=1)
        for _ in range(6):
            await play.honest(text)
        play.watch_from_now()
        reasons = []
        for _ in range(2):
            jobs = [await play.propose(play.contract(text)) for _ in range(47)]
            for job in jobs:
                views = await play.ended(job)
                mallory, alice = views["mallory"].error, views["alice"].error
                assert alice is not None
                assert mallory is not None
                assert mallory.message == "alice does not allow it"
                reasons.append(alice.message)
            await play.settled()
        assert sum("3 in the year before, epsilon = 3" in reason for reason in reasons) == 94
        assert sum("jobs of mallory in the last 24 hours, jobs_per_day = 20" in reason for reason in reasons) >= 80
        assert play.watch.of_stages() == []
