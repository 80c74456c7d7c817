"""Whole daemons: how a contract is answered by policy, operators and silence, and what the others see of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.abc import Clock

from fedpeer import stage as stages
from fedpeer import store
from fedpeer.admin.caller import Caller
from fedpeer.data.catalog import DatasetView, Snapshot
from fedpeer.errors import PolicyError, UsageError
from fedpeer.governance import audit
from fedpeer.jobs import contract, lifecycle, service
from fedpeer.jobs.views import JobView
from fedpeer.mesh.records import Signed
from fedpeer.peers import Peers
from fedpeer.stage import Agreed, Params, Report, Stage, Table, at_least, stage
from fedpeer.testing.federation import LAX, Federation, Organization, federation
from fedpeer.worker import sandbox

NAMES = ["alice", "bob", "carol"]
ANN, BEN = Caller(1000, 11, "ann"), Caller(1001, 12, "ben")
ASK = LAX.replace('"auto"', '"ask"')
TWO = "two_person = true\n" + ASK
MORE_ROWS = LAX.replace("min_rows = 0", "min_rows = 61")
"""than anybody has"""


class Pick(Params, frozen=True):
    rows: int
    ids: bool = True


class Look(Params, frozen=True):
    columns: tuple[str, ...] = ()


@stage(
    version=1,
    params=Look,
    roles={"member": at_least(2)},
    inputs={"table": Table},
    outputs={"report": Report},
    messages={"one": Agreed("nothing: it is always 1")},
)
async def tally(peers: Peers, params: Look, table: Table) -> dict[str, Any]:
    return {"report": Report({"one": await peers.agree("one", 1)})}


@stage(
    version=1,
    roles={"member": at_least(1)},
    inputs={"table": Table},
    outputs={"table": Table},
    messages={},
    params=Pick,
)
async def pick(peers: Peers, params: Pick, table: Table) -> dict[str, Any]:
    """The first rows, with their ids or without."""
    data = table.data.slice(0, params.rows)
    return {"table": Table(data, table.id) if params.ids else Table(data.drop_columns(["id"]))}


def find(name: str) -> Stage:
    return {own.name: own for own in (tally, pick)}.get(name) or stages.find(name)


TALLY = """
[[stage]]
id = "tally"
run = "test_answers:tally"
inputs = { table = "dataset:rows" }
params = { columns = ["a"] }
"""
PICK = """
[[stage]]
id = "pick"
run = "test_answers:pick"
inputs = { table = "dataset:rows" }
params = { rows = %d, ids = %s }
[[stage]]
id = "tally"
run = "test_answers:tally"
inputs = { table = "pick.table" }
"""
DESCRIBE = """
[[stage]]
id = "describe"
run = "horizontal.statistics:run"
inputs = { table = "dataset:rows" }
"""


async def prepare(peers: Federation, bob: str, rows: int = 60) -> None:
    """Everybody has rows and allows everything, but for bob."""
    for number, peer in enumerate(peers.values()):
        lines = [f"{number}-{i},{i % 7},{i % 5}" for i in range(rows)]
        path = peers.folder / f"{peer.name}.csv"
        path.write_text("\n".join(["id,a,b", *lines]) + "\n")
        await peer.daemon.catalog.add("rows", str(path), "id", None)
    await peers["bob"].set_policy(bob)


async def until_asked(peer: Organization, job: str) -> JobView:
    """The job at a peer when its operators are asked."""
    with trio.fail_after(60):
        while True:
            if any(asked.id == job for asked in (await peer.daemon.jobs.approvals.list()).asking):
                return await peer.daemon.jobs.get(job)
            await trio.sleep(0.1)


ANSWER_S = 120


async def submit(peers: Federation, rules: str = "", stages: str = TALLY, answer_s: int = ANSWER_S) -> str:
    text = peers.contract(stages, rules=f"answer_s = {answer_s}\n{rules}")
    return (await peers["alice"].daemon.jobs.submit(text)).id


async def ended(peers: Federation, job: str, names: Sequence[str] = NAMES) -> list[JobView]:
    with trio.fail_after(900):
        return [await peers[name].daemon.jobs.wait(job) for name in names]


def answer_of(peer: Organization, job: str, who: str) -> str:
    """What `peer` knows of somebody's answer."""
    view = peer.daemon.jobs._jobs[bytes.fromhex(job)].view
    return next(participant.state for participant in view.participants if participant.alias == who)


async def events(peer: Organization, job: str) -> list[tuple[str, dict[str, Any]]]:
    return [(line.event, line.facts) for line in await peer.daemon.jobs.logs(job)]


# yes


async def test_a_job_waits_for_the_operator_and_runs_when_it_is_approved(
    autojump_clock: Clock, quick_path: Path
) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, ASK)
        job = await submit(peers)
        view = await until_asked(peers["bob"], job)
        assert (view.state, answer_of(peers["bob"], job, "bob")) == ("proposed", "asking")
        assert view.asks is not None
        assert (view.asks.needs, view.asks.approved) == (1, [])
        await trio.sleep(100)
        assert (await peers["alice"].daemon.jobs.get(job)).waiting_for == ["bob"]
        assert answer_of(peers["bob"], job, "alice") == "approved"  # who submits approves its own part
        view = await peers["bob"].daemon.jobs.approvals.approve(job, ANN)
        assert view.asks is None
        assert {view.state for view in await ended(peers, job)} == {"done"}
        assert ("approved", {"by": "ann (1000)", "always": 0}) in await events(peers["bob"], job)
        assert (await peers["bob"].daemon.jobs.get(job)).asks is None
        with pytest.raises(UsageError, match="asks nothing"):
            await peers["bob"].daemon.jobs.approvals.approve(job, BEN)


async def test_who_submitted_is_recorded(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, LAX)
        await peers["alice"].set_policy(ASK)
        job = (await peers["alice"].daemon.jobs.submit(peers.contract(TALLY), ANN)).id
        await ended(peers, job)
        told = dict(await events(peers["alice"], job))
        assert told["proposed"]["by"] == "ann (1000)"
        assert told["decided"]["approved"] == ["ann (1000), submitted"]


async def test_two_people_are_needed_where_the_policy_says_so(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, TWO)
        job = await submit(peers)
        await until_asked(peers["bob"], job)
        bob = peers["bob"].daemon.jobs
        view = await bob.approvals.approve(job, ANN)
        assert view.asks is not None
        assert view.asks.approved == ["ann (1000)"]
        with pytest.raises(UsageError, match=r"ann .1000. approved it already"):
            await bob.approvals.approve(job, ANN)
        await trio.sleep(60)
        assert answer_of(peers["bob"], job, "bob") == "asking"
        await peers["bob"].restart()
        bob = peers["bob"].daemon.jobs
        await bob.approvals.approve(job, BEN)
        assert {view.state for view in await ended(peers, job)} == {"done"}
        said = [facts["by"] for event, facts in await events(peers["bob"], job) if event == "approved"]
        assert said == ["ann (1000)", "ben (1001)"]


async def test_a_rule_of_two_that_came_later_holds_for_what_was_asked_before(
    autojump_clock: Clock, quick_path: Path
) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, ASK)
        job = await submit(peers)
        await until_asked(peers["bob"], job)
        await peers["bob"].set_policy(TWO)
        bob = peers["bob"].daemon.jobs
        await bob.approvals.approve(job, ANN)
        assert answer_of(peers["bob"], job, "bob") == "asking"
        await bob.approvals.approve(job, BEN)
        assert {view.state for view in await ended(peers, job)} == {"done"}


async def test_who_submits_is_one_of_two(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, LAX)
        await peers["alice"].set_policy(TWO)
        alice = peers["alice"].daemon.jobs
        job = (await alice.submit(peers.contract(TALLY), ANN)).id
        view = await until_asked(peers["alice"], job)
        assert view.asks is not None
        assert view.asks.approved == ["ann (1000), submitted"]
        await alice.approvals.approve(job, BEN)
        assert {view.state for view in await ended(peers, job)} == {"done"}


async def test_what_is_like_an_approved_job_is_not_asked_again(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, ASK)
        bob = peers["bob"].daemon.jobs
        first = await submit(peers)
        await until_asked(peers["bob"], first)
        await bob.approvals.approve(first, ANN, always=1)
        await ended(peers, first)
        (given,) = (await bob.approvals.list()).standing
        assert (given.initiator, given.datasets, given.people) == ("alice", ["rows"], ["ann (1000)"])
        again = await submit(peers)
        assert {view.state for view in await ended(peers, again)} == {"done"}
        told = dict(await events(peers["bob"], again))
        assert told["decided"]["approved"] == [f"ann (1000), standing {given.number}"]

        other = await submit(peers, rules="restarts = 3")
        await until_asked(peers["bob"], other)
        await bob.approvals.revoke(given.number, BEN, record=peers["bob"].daemon.record("approval_revoked"))
        (entry,) = await peers["bob"].daemon.store.read(partial(audit.entries, limit=1))
        assert (entry.event, entry.facts["number"]) == ("approval_revoked", given.number)
        revoked = await submit(peers)
        await until_asked(peers["bob"], revoked)
        for job in (other, revoked):
            await peers["alice"].daemon.jobs.cancel(job)
        # who decided what is in the audit log
        entries = await peers["bob"].daemon.store.read(audit.entries)
        by = [(entry.event, entry.facts.get("by")) for entry in entries if "appro" in entry.event]
        assert by == [("approved", "ann (1000)"), ("approval_revoked", None)]


async def test_a_review_shows_what_is_new_since_the_last_approved_job(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, ASK)
        bob = peers["bob"].daemon.jobs
        first = await submit(peers, stages=DESCRIBE)
        await until_asked(peers["bob"], first)
        seen = await bob.approvals.review(first)
        assert (seen.compared_with, seen.differences, seen.verdict) == ("", [], "ask")
        (stage,) = seen.stages
        assert (stage.run, stage.role, stage.parties) == ("horizontal.statistics:run", "member", NAMES)
        (read,) = stage.reads
        assert (read.dataset, read.rows, read.columns) == ("rows", 60, ["a", "b"])
        assert {message.kind for message in stage.messages} <= {"sum", "agreed"}
        assert all(message.text for message in stage.messages)
        assert stage.sums is not None
        assert all(finding.holds for finding in seen.findings)
        await bob.approvals.approve(first)
        await peers["alice"].daemon.jobs.cancel(first)
        other = await submit(peers, rules="restarts = 7", stages=DESCRIBE)
        await until_asked(peers["bob"], other)
        seen = await bob.approvals.review(other)
        assert seen.compared_with == first
        (change,) = seen.differences
        assert (change.field, change.before, change.after) == ("rules.restarts", "2", "7")
        await peers["alice"].daemon.jobs.cancel(other)


async def test_an_approval_is_asked_of_the_policy_of_now(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, ASK)
        job = await submit(peers)
        await until_asked(peers["bob"], job)
        await peers["bob"].set_policy(ASK.replace("min_rows = 0", "min_rows = 61"))
        with pytest.raises(PolicyError, match="60 rows in 'rows', min_rows = 61"):
            await peers["bob"].daemon.jobs.approvals.approve(job, ANN)
        assert answer_of(peers["bob"], job, "bob") == "asking"
        await peers["alice"].daemon.jobs.cancel(job)


# no


REFUSALS = ["policy", "refuse", "unreadable", "denied", "denied late", "silence", "one of two"]
OURS = ["no dataset", "no column", "data that cannot be read", "a partner we do not know"]
"""What a partner who tries names would find out."""


async def refused(
    peers: Federation, how: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[tuple[float, str, bytes]], list[int], list[JobView]]:
    """bob's records as they come to alice, the bytes he sent by each second, and how the job ends at all."""
    texts = {
        "policy": MORE_ROWS,
        "refuse": LAX.replace('"auto"', '"refuse"'),
        "one of two": TWO,
    }
    await prepare(peers, texts.get(how, ASK))
    if how == "unreadable":
        text = "no_such_key = 1"
        await peers["bob"].daemon.store.write(
            lambda tx: tx.execute("INSERT INTO policy (text, uid, time) VALUES (?, 0, '')", (text,))
        )
    alice, bob = peers["alice"].daemon, peers["bob"]
    source = peers.folder / "bob.csv"
    if how in ("no dataset", "no column"):
        await bob.daemon.catalog.remove("rows")
    if how == "no column":
        source.write_text(source.read_text().replace("id,a,b", "id,c,b"))
        await bob.daemon.catalog.add("rows", str(source), "id", None)
    if how == "data that cannot be read":
        source.write_text(source.read_text() + "x,many,1\n")
    if how == "a partner we do not know":
        await bob.daemon.connections.remove_peer("carol")
    start, seen, kept = trio.current_time(), [], alice.mesh._added

    def added(signed: Signed, source: str | None) -> None:
        if signed.record.sender == bob.identity.id:
            seen.append((trio.current_time() - start, signed.record.kind, bytes(signed.raw)))
        kept(signed, source)

    monkeypatch.setattr(alice.mesh, "_added", added)
    job = await submit(peers)
    traffic = []
    for second in range(ANSWER_S + 30):
        traffic.append(bob.daemon.connections.traffic()[0])
        if (how, second) in (("denied", 2), ("denied late", ANSWER_S - 3)):
            await bob.daemon.jobs.approvals.deny(job, ANN, reason="not with them")
        if (how, second) == ("one of two", 2):
            await bob.daemon.jobs.approvals.approve(job, ANN)
        await trio.sleep(1)
    return seen, [sent - traffic[1] for sent in traffic[1:]], await ended(peers, job)


async def test_nobody_can_tell_who_refused_or_when(
    autojump_clock: Clock, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy, an operator, silence, what our data says: the same bytes, in the same second, and as much traffic."""
    chance = service.random_bytes
    monkeypatch.setattr(service, "random_bytes", lambda n: bytes(n) if n == contract.NONCE_BYTES else chance(n))
    first: Any = None
    for how in [*REFUSALS, *OURS]:
        start = trio.current_time()
        folder = quick_path / how.replace(" ", "-")
        folder.mkdir()
        async with federation(folder, NAMES, find=find) as peers:
            peers.ahead_s = -start
            seen, traffic, (alice, bob, carol) = await refused(peers, how, monkeypatch)
        told = [(round(second, 1), kind, raw) for second, kind, raw in seen]
        assert [kind for _, kind, _ in told] == [lifecycle.COUNTERSIGN, lifecycle.ENDED]
        assert ANSWER_S <= told[0][0] <= ANSWER_S + 1
        first = first or told
        assert told == first, how
        assert traffic[:8] == [0] * 8, how  # nothing is sent when it is decided, or denied
        for view in (alice, carol):
            assert view.error is not None
            assert (view.state, view.error.code) == ("failed", "policy")
            assert view.error.message == "bob does not allow it"
        assert bob.error is not None
        assert bob.error.code == "policy"
        own = {
            "policy": "60 rows in 'rows', min_rows = 61", "refuse": "approve refuses it", "unreadable": "no_such_key",
            "denied": "denied by ann (1000): not with them", "denied late": "denied by ann (1000): not with them",
            "silence": "nobody approved it within 120 s", "one of two": "nobody approved it within 120 s",
            "no dataset": "stage 'tally': there is no dataset 'rows' here", "no column": "'rows' has no column 'a'",
            "data that cannot be read": "column 'a'", "a partner we do not know": "[participants]: ",
        }  # fmt: skip
        assert own[how] in bob.error.message


async def test_our_own_operator_knows_of_a_refusal_at_once(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, MORE_ROWS)
        job = await submit(peers)
        await trio.sleep(5)
        view = await peers["bob"].daemon.jobs.get(job)
        mine = next(participant for participant in view.participants if participant.alias == "bob")
        assert (view.state, mine.state) == ("proposed", "refused")
        assert "60 rows in 'rows', min_rows = 61" in mine.reason
        assert answer_of(peers["alice"], job, "bob") == "waiting"
        with pytest.raises(UsageError, match="refused already"):
            await peers["bob"].daemon.jobs.approvals.deny(job, ANN)
        with pytest.raises(PolicyError, match="min_rows"):
            await peers["bob"].daemon.jobs.approvals.approve(job, ANN)
        (alice, bob, _) = await ended(peers, job)
        assert (alice.state, bob.state) == ("failed", "failed")


async def test_what_cannot_run_whatever_the_data_is_refused_at_once(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, ASK)
        peers["bob"].daemon.jobs._answers._stage = stages.find  # it has no such stage
        job = await submit(peers)
        with trio.fail_after(10):
            view = await peers["alice"].daemon.jobs.wait(job)
        assert view.error is not None
        assert view.error.message == "bob cannot run this contract: another release, or a stage it does not have"
        with pytest.raises(UsageError, match="asks nothing of this operator"):
            await peers["bob"].daemon.jobs.approvals.review(job)


async def test_our_own_policy_refuses_before_anything_is_said(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, LAX)
        await peers["alice"].set_policy(MORE_ROWS)
        with pytest.raises(PolicyError, match=r"your own policy refuses it: .*60 rows in 'rows', min_rows = 61"):
            await submit(peers)
        await trio.sleep(5)
        assert [await peer.daemon.jobs.list() for peer in peers.values()] == [[], [], []]


async def test_too_late_is_too_late(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, ASK)
        job = await submit(peers)
        await until_asked(peers["bob"], job)
        peers.ahead_s = ANSWER_S  # the clock says so, though nothing has woken up yet
        with pytest.raises(UsageError, match="too late"):
            await peers["bob"].daemon.jobs.approvals.approve(job, ANN)


# a daemon that is killed


@pytest.mark.parametrize("when", ["asking", "denied", "late"])
async def test_a_daemon_that_was_killed_goes_on_asking(autojump_clock: Clock, quick_path: Path, when: str) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, ASK)
        job = await submit(peers)
        before = await until_asked(peers["bob"], job)
        if when == "denied":
            await peers["bob"].daemon.jobs.approvals.deny(job, ANN)
        await peers["bob"].stop()
        (peers.folder / "bob.csv").write_text("id,a,b\n1,2,3\n")  # what was pinned is what it is about
        await trio.sleep(ANSWER_S + 30 if when == "late" else 30)
        await peers["bob"].start()
        if when == "asking":
            after = await until_asked(peers["bob"], job)
            assert (after.asks, answer_of(peers["bob"], job, "bob")) == (before.asks, "asking")
            await peers["bob"].daemon.jobs.approvals.approve(job, ANN)
            assert {view.state for view in await ended(peers, job)} == {"done"}
            values = {str(view.outputs[0].values) for view in await ended(peers, job)}
            assert len(values) == 1
            return
        views = await ended(peers, job)
        assert {view.state for view in views} == {"failed"}
        assert views[1].error is not None
        assert ("denied by ann" if when == "denied" else "nobody approved it") in views[1].error.message


@pytest.mark.parametrize("deaths", range(8))
async def test_killed_after_any_write_it_says_one_thing(autojump_clock: Clock, quick_path: Path, deaths: int) -> None:
    """Bob dies after one use of his store, from the contract's arrival to the end of the job, and comes back."""
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, MORE_ROWS)
        bob, uses = peers["bob"], iter(range(1_000_000))
        bob.at_store = lambda: next(uses) == deaths
        job = (await peers["alice"].daemon.jobs.submit(peers.contract(TALLY, rules="answer_s = 5"))).id
        for view in await ended(peers, job, ["alice", "carol"]):
            assert view.error is not None
            assert view.error.message == "bob does not allow it"
        assert bob.deaths == 1


# a stage begins


ONCE = LAX.replace("no_row_differencing = false", "no_row_differencing = true").replace("min_cell = 0", "min_cell = 10")


async def outcome(peers: Federation, stages: str) -> tuple[str, str]:
    """How a job ends: the error's code at alice, and what bob reads."""
    job = await submit(peers, stages=stages)
    alice, bob, _ = await ended(peers, job)
    return alice.error.code if alice.error else alice.state, bob.error.message if bob.error else ""


async def test_the_rows_that_really_go_in_decide(autojump_clock: Clock, quick_path: Path) -> None:
    """A choice of rows by an earlier stage is known when it is made, not when the job is agreed."""
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, ONCE)
        job = await submit(peers)
        assert {view.state for view in await ended(peers, job)} == {"done"}
        started = [facts for event, facts in await events(peers["bob"], job) if event == "stage_started"]
        assert started == [{"stage": "tally", "rows": {"rows": 60}}]
        code, why = await outcome(peers, PICK % (59, "true"))
        assert code == "policy"
        assert "'tally': 1 rows of 'rows' differ from an earlier answer, min_cell = 10" in why
        assert await outcome(peers, PICK % (50, "true")) == ("done", "")
        code, why = await outcome(peers, PICK % (51, "true"))
        assert code == "policy"
        assert "1 rows" in why
        # what was refused was not answered, so it does not count against others
        assert await outcome(peers, PICK % (40, "true")) == ("done", "")


async def test_rows_that_cannot_be_told_are_refused(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, ONCE)
        code, why = await outcome(peers, PICK % (59, "false"))
        assert code == "policy"
        assert "cannot be told which rows of 'rows'" in why
        assert await outcome(peers, PICK % (60, "false")) == ("done", "")


async def test_too_few_rows_are_found_when_they_are_chosen(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, LAX.replace("min_rows = 0", "min_rows = 50"))
        code, why = await outcome(peers, PICK % (49, "true"))
        assert code == "policy"
        assert "49 rows in 'rows', min_rows = 50" in why
        (line,) = [line for line in await peers["alice"].daemon.jobs.logs("job") if line.event == "failed"]
        assert "49" not in str(line.facts)  # the figures stay at home
        assert await outcome(peers, PICK % (50, "true")) == ("done", "")


BEGINNINGS = ["of other rows", "too few rows", "a policy of then", "of other rows, and killed"]


async def test_when_a_stage_is_refused_tells_nothing_and_our_own_log_has_it_at_once(
    autojump_clock: Clock, quick_path: Path
) -> None:
    """Whatever it was: the same words to all, `answer_s` after the stage could have begun, over restarts too."""
    found = []
    for how in BEGINNINGS:
        folder = quick_path / how.replace(" ", "-").replace(",", "")
        folder.mkdir()
        async with federation(folder, NAMES, find=find) as peers:
            peers.ahead_s = -trio.current_time()
            await prepare(peers, LAX.replace("min_rows = 0", "min_rows = 60") if how == "too few rows" else ONCE)
            assert await outcome(peers, PICK % (60, "true")) == ("done", "")
            await peers["carol"].set_policy(ASK)
            job = await submit(peers, stages=PICK % (50 if how == "a policy of then" else 59, "true"))
            await until_asked(peers["carol"], job)
            if how == "a policy of then":
                await peers["bob"].set_policy(MORE_ROWS)
            await peers["carol"].daemon.jobs.approvals.approve(job, ANN)
            with trio.fail_after(60):
                while not (lines := [f for event, f in await events(peers["bob"], job) if event == "stage_refused"]):
                    await trio.sleep(0.1)
            start = trio.current_time()
            if how.endswith("killed"):
                await trio.sleep(ANSWER_S / 2)
                await peers["bob"].restart()
                await peers["bob"].set_policy(LAX)  # too late for a stage that was refused
            view = await peers["bob"].daemon.jobs.get(job)
            assert lines[0]["why"] in next(one.reason for one in view.participants if one.alias == "bob")
            while (alice := await peers["alice"].daemon.jobs.get(job)).state == "running":
                await trio.sleep(0.1)
            assert ANSWER_S - 1 <= trio.current_time() - start <= ANSWER_S + 2, how
            assert alice.error is not None
            found.append((alice.error.code, alice.error.message, alice.error.peer))
            (bob,) = await ended(peers, job, ["bob"])
            assert bob.error is not None
            assert bob.error.message == lines[0]["why"]
            assert len([event for event, _ in await events(peers["bob"], job) if event == "stage_refused"]) == 1
    assert len(set(found)) == 1, found


async def test_a_stage_begins_under_the_policy_of_then(autojump_clock: Clock, quick_path: Path) -> None:
    """A policy that was set after the job was agreed holds for stages that did not begin yet."""
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, ASK)
        job = await submit(peers)
        await until_asked(peers["bob"], job)
        await peers["carol"].set_policy(LAX.replace('"auto"', '"refuse"'))
        await peers["bob"].daemon.jobs.approvals.approve(job, ANN)
        views = await ended(peers, job)
        assert {view.state for view in views} == {"failed"}
        assert views[0].error is not None
        assert (views[0].error.code, views[0].error.peer) == ("policy", "carol")


async def test_what_was_answered_is_kept_over_a_kill(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, ONCE)
        bob = peers["bob"]
        bob.step = lambda _message: "daemon" if not bob.deaths else ""
        assert await outcome(peers, TALLY) == ("done", "")  # the same run is no other answer
        assert bob.deaths == 1
        assert (await outcome(peers, PICK % (55, "true")))[0] == "policy"


async def test_a_contract_that_the_policy_refuses_unseen_has_no_table_read(
    autojump_clock: Clock, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        bob = peers["bob"].daemon
        taken: list[str] = []
        snapshot = bob.catalog.snapshot

        async def counted(name: str) -> Snapshot:
            taken.append(name)
            return await snapshot(name)

        monkeypatch.setattr(bob.catalog, "snapshot", counted)
        await prepare(peers, MORE_ROWS)
        await submit(peers)
        await trio.sleep(5)
        assert (taken, list(bob.store.files.iterdir())) == ([], [])


async def test_what_cannot_fit_in_a_worker_is_refused_by_name_before_a_row_is_read(
    autojump_clock: Clock, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, LAX)
        bob = peers["bob"].daemon
        rows_of = bob.catalog.get

        async def of_a_billion_rows(name: str) -> DatasetView:
            return msgspec.structs.replace(await rows_of(name), rows=10**9)

        monkeypatch.setattr(sandbox, "usable_memory", lambda: 7 * 10**9)
        monkeypatch.setattr(bob.catalog, "get", of_a_billion_rows)
        job = await submit(peers)
        await trio.sleep(5)
        assert list(bob.store.files.iterdir()) == []
        (told,) = [facts for event, facts in await events(peers["bob"], job) if event == "decided"]
        assert "a worker takes 8,000 MB or more, and may take" in told["why"]


async def test_a_slow_source_holds_back_no_job_over_another(
    autojump_clock: Clock, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, LAX)
        bob = peers["bob"].daemon
        for peer in peers.values():
            await peer.daemon.catalog.add("slow", str(peers.folder / f"{peer.name}.csv"), "id", None)
        snapshot, given, reading = bob.catalog.snapshot, trio.Event(), trio.Event()
        made: list[Snapshot] = []

        async def slowly(name: str) -> Snapshot:
            if name == "slow":
                reading.set()
                await given.wait()
            made.append(await snapshot(name))
            return made[-1]

        monkeypatch.setattr(bob.catalog, "snapshot", slowly)
        first = await submit(peers, stages=TALLY.replace("dataset:rows", "dataset:slow"), answer_s=3600)
        with trio.fail_after(60):
            await reading.wait()
        second = await submit(peers)
        assert {view.state for view in await ended(peers, second)} == {"done"}
        given.set()
        assert {view.state for view in await ended(peers, first)} == {"done"}
        assert len(made) == 2
        assert not any(bob.store.path_of(snapshot.version).exists() for snapshot in made)


async def test_a_file_stays_for_the_job_that_was_asked_while_another_gave_it_up(
    autojump_clock: Clock, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, LAX)
        bob = peers["bob"].daemon
        snapshot, given, taken = bob.catalog.snapshot, trio.Event(), trio.Event()

        async def and_waits(name: str) -> Snapshot:
            made = await snapshot(name)
            if not taken.is_set():
                taken.set()
                await given.wait()  # the file is there, and no row names it
            return made

        monkeypatch.setattr(bob.catalog, "snapshot", and_waits)
        first = await submit(peers, answer_s=3600)
        with trio.fail_after(60):
            await taken.wait()
        second = await submit(peers)
        await ended(peers, second)  # over the same rows: the same file
        given.set()
        assert {view.state for view in await ended(peers, first)} == {"done"}


async def test_who_submits_is_told_that_the_own_part_is_refused_though_that_shows_only_in_the_data(
    autojump_clock: Clock, quick_path: Path
) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, LAX)
        (peers.folder / "alice.csv").unlink()
        with pytest.raises(PolicyError, match=r"your own part of it is refused: .*alice.csv"):
            await submit(peers)
        await trio.sleep(5)
        for peer in peers.values():
            (view,) = await peer.daemon.jobs.list()
            assert view.error is not None
            assert (view.state, view.error.message) == ("cancelled", "cancelled by alice") or peer.name != "alice"
            assert view.state == "cancelled"


async def test_a_table_that_does_not_fit_on_the_disk_is_refused_and_the_daemon_lives(
    autojump_clock: Clock, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await prepare(peers, LAX)
        write = os.write

        def full(descriptor: int, data: bytes) -> int:
            if "/bob/" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data)

        monkeypatch.setattr(store.os, "write", full)
        peers["bob"].daemon.store.reserve(1 << 20)
        job = await submit(peers)
        (_, bob, _) = await ended(peers, job)
        assert bob.error is not None
        assert bob.error.code == "policy", "what our data says is told as the policy's"
        assert "No space left on device" in bob.error.message
        assert not peers["bob"].daemon.store.scarce
