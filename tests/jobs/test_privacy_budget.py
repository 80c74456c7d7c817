"""Whole daemons: noisy statistics are charged at each owner, before anything is said, and once, whoever dies."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import trio
from trio.abc import Clock

from fedpeer import stage
from fedpeer.admin.commands import COMMANDS
from fedpeer.algorithms.horizontal.statistics import squared_sensitivity
from fedpeer.errors import ContractError, NotFound, PolicyError
from fedpeer.governance import audit, budget
from fedpeer.governance.budget import Charged
from fedpeer.jobs import lifecycle
from fedpeer.jobs.views import JobView
from fedpeer.secure import dp
from fedpeer.testing.federation import LAX, Federation, Organization, federation
from fedpeer.worker import protocol

pytestmark = pytest.mark.system  # processes, or whole federations, for a while

NAMES = ["alice", "bob", "carol"]
ROWS = 1000
RULES = LAX.replace("epsilon = inf", "epsilon = 1.5").replace("per_job = inf", "per_job = 1.0")
PRIVATE = """
[[stage]]
id = "describe"
run = "horizontal.statistics:private"
inputs = { table = "dataset:rows" }
params = { epsilon = EPSILON, columns = { a = [0, 10] }, bins = 4 }
"""


async def add_rows(peers: Federation) -> None:
    for number, peer in enumerate(peers.values()):
        path = peers.folder / f"{peer.name}.csv"
        path.write_text("\n".join(["id,a", *(f"{number}-{i},{i % 11}" for i in range(ROWS))]) + "\n")
        await peer.daemon.catalog.add("rows", str(path), "id", None)


def text(peers: Federation, epsilon: float, name: str = "job") -> str:
    return peers.contract(PRIVATE.replace("EPSILON", str(epsilon)), name=name, rules="answer_s = 60")


async def ended(peers: Federation, job: str) -> dict[str, JobView]:
    views = {}
    with trio.fail_after(600):
        while len(views) < len(peers):
            await trio.sleep(0.2)
            for peer in peers.values():
                try:
                    view = await peer.daemon.jobs.get(job)
                except (AssertionError, NotFound):  # it is down, or died before it had heard of it
                    continue
                if view.finished:
                    views[peer.name] = view
    return views


async def charges(peer: Organization) -> list[Charged]:
    return await peer.daemon.store.read(budget.all_charges)


async def test_every_owner_charges_both_others_before_anything_is_said(tmp_path: Path, autojump_clock: Clock) -> None:
    early: list[int] = []

    async with federation(tmp_path, NAMES, rules=RULES) as peers:
        await add_rows(peers)
        bob = peers["bob"]

        def step(message: protocol.Message) -> str:
            if isinstance(message, protocol.Sum):
                early.append(len(bob.daemon.store.write_now(budget.all_charges)))
            return ""

        bob.step = step
        job = await peers["alice"].daemon.jobs.submit(text(peers, 0.8))
        views = await ended(peers, job.id)
        assert {view.state for view in views.values()} == {"done"}
        assert early == [2]
        for peer in peers.values():
            told = await charges(peer)
            others = sorted(other.identity.id for other in peers.values() if other is not peer)
            assert [(c.partner, c.cost.epsilon, c.dataset, c.run) for c in told] == [
                (other, 800_000, "rows", "horizontal.statistics:private") for other in others
            ]
            entries = await peer.daemon.store.read(lambda tx: audit.entries(tx, job=bytes.fromhex(job.id)))
            assert sum(entry.event == budget.CHARGED for entry in entries) == 2
        reports = [view.outputs[0].values for view in views.values()]
        assert reports[0] == reports[1] == reports[2]
        assert reports[0] is not None
        assert reports[0]["privacy"]["contributors"] == 3
        scale = dp.scale(dp.multiplier(0.8, 1e-8), squared_sensitivity(1), 2)  # two of three are honest
        errors = reports[0]["columns"]["a"]["standard_error"]
        assert errors["count"] == scale * math.sqrt(3) / dp.GRID
        pooled = np.tile(np.minimum(np.arange(ROWS) % 11, 10), 3)
        assert abs(reports[0]["columns"]["a"]["mean"] - pooled.mean()) < 6 * errors["mean"]


async def test_what_is_spent_is_refused_when_it_is_submitted_and_when_it_is_proposed(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with federation(tmp_path, NAMES, rules=RULES) as peers:
        await add_rows(peers)
        await ended(peers, (await peers["alice"].daemon.jobs.submit(text(peers, 0.8))).id)
        with pytest.raises(PolicyError, match=r"0\.8 in the year before"):
            await peers["alice"].daemon.jobs.submit(text(peers, 0.8))
        await peers["alice"].set_policy(LAX)
        views = await ended(peers, (await peers["alice"].daemon.jobs.submit(text(peers, 0.8))).id)
        assert views["alice"].state == "failed"
        assert views["alice"].error is not None
        assert "does not allow it" in views["alice"].error.message
        assert "0.8" not in str(views["alice"].error), "a partner read a figure"
        peers.ahead_s += 366 * 24 * 3600
        for peer in peers.values():
            await peer.restart()
        await peers.connected()
        views = await ended(peers, (await peers["alice"].daemon.jobs.submit(text(peers, 0.8))).id)
        assert {view.state for view in views.values()} == {"done"}


async def test_what_is_spent_is_spent_under_every_name_of_the_same_file(tmp_path: Path, autojump_clock: Clock) -> None:
    async with federation(tmp_path, NAMES, rules=RULES) as peers:
        await add_rows(peers)
        await ended(peers, (await peers["alice"].daemon.jobs.submit(text(peers, 0.8))).id)
        for peer in peers.values():
            (peers.folder / f"{peer.name}-2.csv").symlink_to(peers.folder / f"{peer.name}.csv")
            await peer.daemon.catalog.remove("rows")
            await peer.daemon.catalog.add("again", str(peers.folder / f"{peer.name}-2.csv"), "id", None)
        again = text(peers, 0.8).replace("dataset:rows", "dataset:again")
        with pytest.raises(PolicyError, match=r"'again' and 0\.8 in the year before"):
            await peers["alice"].daemon.jobs.submit(again)
        await peers["alice"].set_policy(LAX)
        views = await ended(peers, (await peers["alice"].daemon.jobs.submit(again)).id)
        assert {view.state for view in views.values()} == {"failed"}
        show = COMMANDS["budget.show"]
        shown = await show.handler(peers["bob"].daemon, show.check({"ref": "again"}))
        assert {(account.dataset, account.epsilon) for account in shown.accounts} == {("rows", 0.8)}


async def test_of_jobs_proposed_at_once_one_gets_the_rest(tmp_path: Path, autojump_clock: Clock) -> None:
    async with federation(tmp_path, NAMES, rules=RULES) as peers:
        await add_rows(peers)
        jobs: list[str] = []

        async def propose(name: str) -> None:
            jobs.append((await peers[name].daemon.jobs.submit(text(peers, 0.8, name))).id)

        async with trio.open_nursery() as nursery:
            for name in NAMES:
                nursery.start_soon(propose, name)
        views = [await ended(peers, job) for job in jobs]
        states = [{view.state for view in one.values()} for one in views]
        assert sum(state == {"done"} for state in states) <= 1
        assert all(state in ({"done"}, {"failed"}) for state in states)
        for peer in peers.values():
            for other in NAMES:
                spent = sum(c.cost.epsilon for c in await charges(peer) if c.partner == peers[other].identity.id)
                assert spent <= 1_500_000
        for one in views:
            for name, view in one.items():
                if view.error is not None and view.error.peer not in ("", name):
                    assert "ε" not in str(view.error), "a partner read a figure"


@pytest.mark.parametrize("place", range(0, 60, 13))
async def test_a_daemon_that_dies_anywhere_has_charged_once(tmp_path: Path, autojump_clock: Clock, place: int) -> None:
    async with federation(tmp_path, NAMES, rules=RULES) as peers:
        await add_rows(peers)
        uses = iter(range(10**6))
        peers["bob"].at_store = lambda: next(uses) in (place, place + 60, place + 120)
        job = await peers["alice"].daemon.jobs.submit(text(peers, 0.8))
        views = await ended(peers, job.id)
        peers["bob"].at_store = lambda: False
        assert {view.state for view in views.values()} == {"done"}, views["bob"].error
        await trio.sleep(1)
        assert peers["bob"].deaths > 0
        told = await charges(peers["bob"])
        assert [c.cost.epsilon for c in told] == [800_000, 800_000]
        entries = await peers["bob"].daemon.store.read(lambda tx: audit.entries(tx, job=bytes.fromhex(job.id)))
        assert sum(entry.event == budget.CHARGED for entry in entries) == 2


async def test_a_daemon_without_the_extra_refuses_by_name(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with federation(tmp_path, NAMES, rules=RULES) as peers:
        await add_rows(peers)
        job = await peers["alice"].daemon.jobs.submit(text(peers, 0.8))
        monkeypatch.setattr(stage, "EXTRAS", {"dp": ("opendp", "no_such_module")})
        views = await ended(peers, job.id)
        assert {view.state for view in views.values()} == {"failed"}
        assert [await charges(peer) for peer in peers.values()] == [[], [], []]
        assert lifecycle.REFUSALS["contract"] in str([p.reason for p in views["alice"].participants])
        with pytest.raises(ContractError, match="extra 'dp', and no_such_module is not installed here") as refused:
            await peers["alice"].daemon.jobs.submit(text(peers, 0.8))
        assert refused.value.hint == "pip install 'fedpeer[dp]', then start the daemon again"
