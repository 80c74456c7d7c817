"""Whole daemons in one process: jobs from the contract to the model, whatever happens on the way."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from trio.abc import Clock

from fedpeer import artifact, codec
from fedpeer import stage as stages
from fedpeer.errors import Ambiguous, ContractError, JobError, NotFound
from fedpeer.jobs import contract, lifecycle, service
from fedpeer.jobs.views import JobView
from fedpeer.mesh import records
from fedpeer.peers import Peers
from fedpeer.stage import Open, Params, Report, Stage, Sum, Table, at_least, exactly, stage
from fedpeer.testing.federation import Federation, Organization, federation
from fedpeer.testing.network import MemoryNetwork
from fedpeer.worker import protocol

NAMES = ["alice", "bob", "carol", "dave"]
TRAIN = """
[[stage]]
id = "fit"
run = "horizontal.logistic:fit"
inputs = { table = "dataset:rows" }
params = { reg_lambda = 0.1 }
[[stage]]
id = "evaluate"
run = "horizontal.logistic:evaluate"
inputs = { model = "fit.model", table = "dataset:rows" }
"""


DESCRIBE = """
[[stage]]
id = "describe"
run = "horizontal.statistics:run"
inputs = { table = "dataset:rows" }
"""


def write_rows(path: Path, number: int, n: int = 60, columns: str = "id,a,b,y") -> Path:
    chance = np.random.Generator(np.random.PCG64(number))
    x = chance.normal(size=(n, 2))
    y = (x @ [1.5, -1.0] + chance.normal(size=n) > 0).astype(int)
    lines = [f"{number}-{i},{a:.6f},{b:.6f},{label}" for i, ((a, b), label) in enumerate(zip(x, y, strict=True))]
    path.write_text("\n".join([columns, *lines]) + "\n")
    return path


async def add_rows(peers: Federation) -> None:
    for number, peer in enumerate(peers.values()):
        path = write_rows(peers.folder / f"{peer.name}.csv", number)
        await peer.daemon.catalog.add("rows", str(path), "id", "y")


async def ends(peers: Federation, job: str, *, within: float = 900) -> dict[str, JobView]:
    """The job at all peers when it has ended everywhere, whatever daemons come and go meanwhile."""
    views: dict[str, JobView] = {}
    with trio.fail_after(within):
        while len(views) < len(peers):
            await trio.sleep(0.2)
            for peer in peers.values():
                try:
                    view = await peer.daemon.jobs.get(job)
                except (AssertionError, NotFound):
                    continue
                if view.finished:
                    views[peer.name] = view
    return views


async def settle(peers: Federation) -> None:
    """Until nobody needs anything of any job."""
    with trio.fail_after(60):
        while any(peer.daemon.mesh.scopes for peer in peers.values()):
            await trio.sleep(0.2)


def after_the_first_turn(peer: Organization) -> trio.Event:
    """Set when its worker is told the total of the first turn of a training, which the sum of moments precedes."""
    told, event = itertools.count(1), trio.Event()

    def step(message: protocol.Message) -> str:
        if isinstance(message, protocol.TotalAnswer) and next(told) == 2:
            event.set()
        return ""

    peer.step = step
    return event


def outputs(view: JobView) -> dict[str, str]:
    return {f"{output.stage}.{output.name}": output.digest for output in view.outputs}


async def test_a_peer_that_says_two_things_ends_the_job_and_is_named(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, ["alice", "bob", "carol"]) as peers:
        await add_rows(peers)
        await peers["carol"].stop()  # so that the job stays proposed
        alice, bob = peers["alice"].daemon, peers["bob"]
        job = await alice.jobs.submit(peers.contract(TRAIN))
        scope = bytes.fromhex(job.id)
        while alice.mesh.find(scope, "countersign", "", bob.identity.id) is None:
            await alice.mesh.changed(scope)
        other = records.Record(scope, "countersign", "", bob.identity.id, b"other")
        session = alice.connections.sessions[bob.identity.id]
        await alice.mesh.record_came(session, records.sign(bob.identity.signing, other).raw)
        with trio.fail_after(60):
            for daemon in (alice, bob.daemon):
                view = await daemon.jobs.wait(job.id)
                assert view.error is not None
                assert (view.state, view.error.code) == ("failed", "equivocation")
                assert "bob said two different things" in view.error.message


# the whole way


async def test_four_train_one_model_and_each_can_use_it(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        alice = peers["alice"].daemon
        seen: dict[str, list[str]] = {name: [] for name in NAMES}
        for name, peer in peers.items():
            peer.daemon.events.subscribe(
                lambda event, name=name: (
                    seen[name].append(event["event"]) if event["topic"].startswith("job:") else None
                )
            )
        proposed = await alice.jobs.submit(peers.contract(TRAIN, rules="min_parties = 4"))
        assert (proposed.state, proposed.me, proposed.initiator) == ("proposed", "alice", "alice")
        views = await ends(peers, proposed.id)
        await settle(peers)

        assert {view.state for view in views.values()} == {"done"}, [view.error for view in views.values()]
        assert len({tuple(outputs(view).items()) for view in views.values()}) == 1
        for name, view in views.items():
            assert [(s.id, s.state, s.role) for s in view.stages] == [
                ("fit", "done", "member"),
                ("evaluate", "done", "member"),
            ]
            assert {p.state for p in view.participants} == {"approved"}
            assert view.waiting_for == []
            events = [event for event in seen[name] if event not in ("progress", "sum")]
            assert sorted(events) == sorted(
                ["proposed", "decided", *["countersigned"] * 4, "agreed", *["stage_started", "stage_done"] * 2, "done"]
            )
            assert events[-1] == "done"
            assert "progress" in seen[name]
            report = next(output.values for output in view.outputs if output.kind == "report")
            assert report is not None
            assert report["auc"] > 0.8
        for peer in peers.values():
            daemon = peer.daemon
            (model,) = await daemon.jobs.models.list()
            assert model.digest == outputs(views[peer.name])["fit.model"]
            assert model.algorithm == "horizontal.logistic"
            table = await daemon.jobs.models.predict(model.digest[:8], "rows")
            assert table.num_rows == 60
            assert (await daemon.jobs.models.get("job")).digest == model.digest
            # what only the running job needed is gone: journal, snapshots, masked vectors, scope
            kept = {path.name for path in daemon.store.files.iterdir()}
            assert kept == set(outputs(views[peer.name]).values())
            for rows in ("checkpoint", "journal", "job_snapshot", "mesh_record", "mesh_outbox", "aggregation_sum"):
                assert daemon.store.write_now(lambda tx, rows=rows: tx.all(f"SELECT * FROM {rows}")) == []


async def test_a_finished_job_is_as_it_was_after_a_restart(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        job = await peers["bob"].daemon.jobs.submit(peers.contract(TRAIN))
        before = (await ends(peers, job.id))["bob"]
        logs = await peers["bob"].daemon.jobs.logs(job.id)
        await settle(peers)
        await peers["bob"].restart()
        with trio.fail_after(1):
            after = await peers["bob"].daemon.jobs.wait("job")
        for view in (before, after):
            for participant in view.participants:
                participant.connected = True
        assert after == before
        assert await peers["bob"].daemon.jobs.logs(job.id) == logs
        assert (logs[0].event, logs[-1].event) == ("proposed", "done")
        assert len(await peers["bob"].daemon.jobs.models.list()) == 1


async def test_a_peer_that_is_down_is_waited_for_by_name(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        await peers["dave"].stop()
        job = await peers["alice"].daemon.jobs.submit(peers.contract(TRAIN))
        await trio.sleep(3)
        for name in ("alice", "bob", "carol"):
            view = await peers[name].daemon.jobs.get(job.id)
            assert (view.state, view.waiting_for) == ("proposed", ["dave"])
            assert {p.alias: (p.state, p.connected) for p in view.participants}["dave"] == ("waiting", False)
        await peers["dave"].start()
        assert {view.state for view in (await ends(peers, job.id, within=5)).values()} == {"done"}


# it ends before it begins


@pytest.mark.parametrize(
    ("break_it", "code", "words"),
    [
        ("dataset", "policy", "dave does not allow it"),
        ("data", "policy", "dave does not allow it"),
        ("columns", "columns_differ", "which dave has not"),
        ("roster", "policy", "dave does not allow it"),
    ],
)
async def test_who_cannot_take_part_says_why_and_all_know(
    autojump_clock: Clock, quick_path: Path, break_it: str, code: str, words: str
) -> None:
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        dave = peers["dave"].daemon
        source = quick_path / "dave.csv"
        if break_it == "dataset":
            await dave.catalog.remove("rows")
        elif break_it == "data":
            source.write_text(source.read_text() + "x,1,many,1\n")
        elif break_it == "roster":
            await dave.connections.remove_peer("bob")
        else:
            await dave.catalog.remove("rows")
            await dave.catalog.add("rows", str(write_rows(source, 9, columns="id,a,c,y")), "id", "y")
        job = await peers["alice"].daemon.jobs.submit(peers.contract(TRAIN, rules="answer_s = 5"))
        views = await ends(peers, job.id)
        for name, view in views.items():
            assert view.state == "failed"
            assert view.error is not None
            assert {s.state for s in view.stages} == {"waiting"}, "nothing was computed"
            if name != "dave":
                assert view.error.code == code
                assert words in view.error.message
        if break_it == "dataset":  # our own operator reads more than the others
            assert "there is no dataset 'rows' here" in views["dave"].error.message
        if break_it == "data":
            assert "column 'b'" in views["dave"].error.message
            assert not any("many" in str(view) for view in views.values())
        for peer in peers.values():
            assert not list(peer.daemon.store.files.iterdir()), "no snapshot is left"


async def test_what_is_wrong_at_the_submitter_is_said_at_once_and_leaves_nothing(
    autojump_clock: Clock, quick_path: Path
) -> None:
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        jobs = peers["alice"].daemon.jobs
        good = peers.contract(TRAIN)
        for text, words in (
            (good.replace("dataset:rows", "dataset:row"), "there is no dataset 'row' here"),
            (good.replace(f'"{peers["dave"].identity.id}"', '"eve"'), "eve"),
            (good.replace("reg_lambda", "reg_lamda"), "no parameter 'reg_lamda'"),
            (good.replace("logistic:fit", "logistic:fot"), "'fot'"),
            ("x", "not TOML"),
        ):
            with pytest.raises(ContractError) as caught:
                await jobs.submit(text)
            assert words in caught.value.message
        assert await jobs.list() == []


async def test_a_contract_that_nobody_answers_expires(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        await peers["dave"].stop()
        job = await peers["alice"].daemon.jobs.submit(peers.contract(TRAIN, rules="stall_s = 4"))
        await trio.sleep(2)
        peers.ahead_s = 30 * 24 * 3600
        await trio.sleep(2)
        assert (await peers["alice"].daemon.jobs.get(job.id)).state == "proposed", "clocks may differ by five minutes"
        peers.ahead_s += 300
        for name in ("alice", "bob"):
            view = await peers[name].daemon.jobs.wait(job.id)
            assert view.state == "failed"
            assert "expired; it still waited for dave" in view.error.message
        await trio.sleep(2)
        assert not peers["alice"].daemon.mesh.scopes, "nobody is served for ever"
        await peers["dave"].start()
        await trio.sleep(3)
        assert await peers["dave"].daemon.jobs.list() == []
        assert len(await peers["alice"].daemon.jobs.list()) == 1


async def test_who_proposes_without_end_leaves_no_more_than_so_much(
    autojump_clock: Clock, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAX_UNAGREED", 3)
    async with federation(quick_path, NAMES[:3]) as peers:
        await add_rows(peers)
        await peers["carol"].daemon.catalog.remove("rows")
        alice, bob = peers["alice"].daemon, peers["bob"].daemon
        names = [f"job{i}" for i in range(6)]
        for name in names:
            job = await alice.jobs.submit(peers.contract(TRAIN, name=name, rules="answer_s = 5"))
            await ends(peers, job.id)
            await settle(peers)
        assert [view.name for view in await bob.jobs.list()] == names[-3:]
        rows = bob.store.write_now(lambda tx: tx.one("SELECT count(*), count(DISTINCT contract) FROM job_log"))
        assert rows[0] > rows[1] == 3
        assert len(bob.store.write_now(lambda tx: tx.all("SELECT * FROM job"))) == 3
        assert [view.name for view in await alice.jobs.list()] == names, "one's own proposals are kept"
        await peers["bob"].restart()
        assert [view.name for view in await peers["bob"].daemon.jobs.list()] == names[-3:]


async def test_who_aborts_and_never_ends_is_served_in_so_many_jobs_only(
    autojump_clock: Clock, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAX_PROPOSED", 3)
    async with federation(quick_path, NAMES[:3]) as peers:
        alice, bob = peers["alice"].daemon, peers["bob"].daemon
        for number in range(6):
            text = peers.contract(TRAIN, name=f"job{number}")
            read = contract.parse(
                text, me=alice.mesh.me, resolve=lambda ref: ref, find=find, now=int(peers.now().timestamp()),
                nonce=bytes([number]) * contract.NONCE_BYTES,
            )  # fmt: skip
            body = codec.encode(read)

            def say(tx: Any, read: contract.Contract = read, body: bytes = body) -> None:
                scope = contract.contract_id(body)
                alice.mesh.open_scope(tx, scope, read.peers)
                alice.mesh.publish(tx, scope, lifecycle.CONTRACT, "", body)
                alice.mesh.publish(tx, scope, lifecycle.ABORT, "", codec.encode(lifecycle.Abort("cancelled", "")))

            await alice.store.write(say)
            await trio.sleep(2)
        assert [(view.name, view.finished != "") for view in await bob.jobs.list()] == [
            ("job0", True), ("job1", True), ("job2", True)
        ]  # fmt: skip


async def test_any_participant_can_cancel(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        await peers["dave"].stop()
        job = await peers["alice"].daemon.jobs.submit(peers.contract(TRAIN))
        await trio.sleep(5)
        with trio.fail_after(1):  # not when time is looked at next
            assert (await peers["carol"].daemon.jobs.cancel("job")).state == "cancelled"
        assert (await peers["carol"].daemon.jobs.cancel("job")).state == "cancelled"
        for name in ("alice", "bob", "carol"):
            view = await peers[name].daemon.jobs.wait(job.id)
            assert view.state == "cancelled"
            assert "carol" in view.error.message
        with pytest.raises(NotFound):
            await peers["alice"].daemon.jobs.cancel("nothing")


async def test_a_job_that_has_ended_is_not_cancelled(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        job = await peers["alice"].daemon.jobs.submit(peers.contract(TRAIN))
        await ends(peers, job.id)
        with pytest.raises(JobError, match="has ended: done"):
            await peers["bob"].daemon.jobs.cancel(job.id)


async def test_two_jobs_of_one_name_are_two_jobs(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        jobs = peers["alice"].daemon.jobs
        one, two = await jobs.submit(peers.contract(TRAIN)), await jobs.submit(peers.contract(TRAIN))
        assert one.id != two.id
        with pytest.raises(Ambiguous) as caught:
            await jobs.get("job")
        assert one.id in caught.value.hint
        assert two.id in caught.value.hint
        assert (await jobs.get(one.id[:10])).id == one.id
        for job in (one, two):
            assert {view.state for view in (await ends(peers, job.id)).values()} == {"done"}
        with pytest.raises(NotFound):
            await jobs.get("")


# while it runs


@stage(
    version=1,
    roles={"guest": exactly(1), "host": at_least(2)},
    inputs={"table": Table},
    outputs={"report": Report},
    messages={
        "ask": Open("guest", "host", "a number", per_turn=3),
        "tell": Open("host", "guest", "a number", per_turn=3),
        "total": Sum("a total"),
    },
)
async def converse(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    """Checks itself that each message comes once and in order."""
    own = {"said": 0}
    shared: dict[str, Any] = {"total": 0}
    for turn in peers.rounds(6, shared=shared, own=own):
        number = int(peers.random.integers(0, 1 << 30, 1)[0])
        if peers.role == "guest":
            for i in range(3):
                await peers.broadcast("ask", [own["said"] + i, np.full(20_000 * (i == 1), number)], role="host")
            for host in peers.having("host"):
                for i in range(3):
                    heard = await peers.receive(host, "tell")
                    assert heard == [own["said"] + i, own["said"] + i]
        else:
            for i in range(3):
                asked, _ = await peers.receive(peers.having("guest")[0], "ask")
                assert asked == own["said"] + i
                await peers.send(peers.having("guest")[0], "tell", [asked, own["said"] + i])
        own["said"] += 3
        total = await peers.sum("total", np.array([number]))
        shared["total"] += int(total["values"][0])
        peers.progress(turn + 1, 6)
    return {"report": Report({"total": shared["total"], "said": own["said"]})}


@stage(
    version=1,
    roles={"guest": exactly(1), "host": at_least(2)},
    inputs={"table": Table},
    outputs={"report": Report},
    messages={"tell": Open("host", "guest", "a number", per_turn=1)},
)
async def tell(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    for _turn in peers.rounds(6, shared={}, own={}):
        if peers.role == "host":
            await peers.send(peers.having("guest")[0], "tell", 1)
        for host in peers.having("host") if peers.role == "guest" else ():
            await peers.receive(host, "tell")
    return {"report": Report({"total": 0})}


@stage(version=1, roles={"member": at_least(1)}, inputs={"report": Report}, outputs={"report": Report}, messages={})
async def double(peers: Peers, params: Params, report: Report) -> dict[str, Any]:
    return {"report": Report({"twice": 2 * report.values["total"]})}


def find(name: str) -> Stage:
    return {own.name: own for own in (converse, double, tell)}.get(name) or stages.find(name)


CONVERSE = """
[[stage]]
id = "twice"
run = "test_federation:double"
roles = { member = ["alice", "carol"] }
inputs = { report = "talk.report" }
[[stage]]
id = "talk"
run = "test_federation:converse"
roles = { guest = "bob", host = ["alice", "carol", "dave"] }
inputs = { table = "dataset:rows" }
"""


async def test_a_vertical_stage_feeds_another_that_some_have(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await add_rows(peers)
        job = await peers["carol"].daemon.jobs.submit(peers.contract(CONVERSE))
        views = await ends(peers, job.id)
        assert {view.state for view in views.values()} == {"done"}, [view.error for view in views.values()]
        values = {name: {o.stage: o.values for o in view.outputs} for name, view in views.items()}
        assert {v["talk"]["said"] for v in values.values()} == {18}
        assert len({v["talk"]["total"] for v in values.values()}) == 1
        assert values["alice"]["twice"] == {"twice": 2 * values["alice"]["talk"]["total"]}
        assert "twice" not in values["bob"]
        assert [(s.id, s.role, s.state) for s in views["bob"].stages] == [
            ("talk", "guest", "done"),
            ("twice", "", "waiting"),
        ]


def killer(chance: random.Random, share: float) -> Callable[[protocol.Message], str]:
    return lambda _message: chance.choice(["worker", "daemon"]) if chance.random() < share else ""


async def make_trouble(peers: Federation, chance: random.Random) -> None:
    """Connections break and daemons die at any time, whatever they are doing."""
    while True:
        await trio.sleep(chance.expovariate(4))
        a, b = chance.sample(NAMES, 2)
        if chance.random() < 0.3:
            peers[a].kill()
        else:
            peers.network.cut(a, b)
            await trio.sleep(chance.expovariate(10))
            peers.network.heal(a, b)


@pytest.mark.system  # a minute of chaos
@pytest.mark.parametrize("part", range(16))
async def test_killed_anywhere_all_end_with_the_same_model(
    autojump_clock: Clock, quick_path: Path, seed: int, part: int
) -> None:
    chance = random.Random(f"{seed}/{part}")
    async with federation(quick_path, NAMES, network=MemoryNetwork(random=chance), find=find) as peers:
        await add_rows(peers)
        for peer in peers.values():
            peer.step, peer.step_s = killer(chance, 0.06), 0.02
        text = peers.contract(TRAIN if part % 2 else CONVERSE, rules="restarts = 100")
        job = await peers["alice"].daemon.jobs.submit(text)
        await trio.sleep(0.01)  # all have heard of it
        async with trio.open_nursery() as nursery:
            nursery.start_soon(make_trouble, peers, chance)
            views = await ends(peers, job.id)
            nursery.cancel_scope.cancel()
        assert sum(peer.deaths for peer in peers.values()) > 0
        assert {view.state for view in views.values()} == {"done"}, [view.error for view in views.values()]
        if part % 2:
            assert len({outputs(view)["fit.model"] for view in views.values()}) == 1
        else:
            assert {o.values["said"] for v in views.values() for o in v.outputs if o.stage == "talk"} == {18}


NAMED_FILES = """
    SELECT version FROM job_snapshot UNION SELECT digest FROM job_output UNION SELECT digest FROM mesh_offer
    UNION SELECT state_file FROM checkpoint UNION SELECT answer_file FROM journal UNION SELECT digest FROM mesh_outbox
"""


@pytest.mark.system  # half a minute of chaos
@pytest.mark.parametrize("part", range(4))
async def test_killed_between_a_file_and_its_row_no_file_stays_that_no_row_names(
    autojump_clock: Clock, quick_path: Path, seed: int, part: int
) -> None:
    chance = random.Random(f"{seed}/{part}")
    async with federation(quick_path, NAMES, network=MemoryNetwork(random=chance), find=find) as peers:
        await add_rows(peers)
        for peer in peers.values():
            peer.at_store = lambda: chance.random() < 0.03
        job = await peers["alice"].daemon.jobs.submit(peers.contract(TRAIN if part % 2 else CONVERSE))
        await trio.sleep(0.01)
        views = await ends(peers, job.id)
        assert sum(peer.deaths for peer in peers.values()) > 0
        assert {view.state for view in views.values()} == {"done"}, [view.error for view in views.values()]
        for peer in peers.values():
            peer.at_store = lambda: False
        await settle(peers)  # who died at the last moment hears from the others how it ended
        for peer in peers.values():
            await peer.restart()
            store = peer.daemon.store
            named = {row[0].hex() for row in store.write_now(lambda tx: tx.all(NAMED_FILES))} - {""}
            assert {path.name for path in store.files.iterdir()} == named
            assert named >= set(outputs(views[peer.name]).values())


async def test_a_daemon_that_stops_in_mid_round_goes_on_by_itself(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        stopped = trio.Event()

        def step(message: protocol.Message) -> str:
            if isinstance(message, protocol.TotalAnswer):
                count.append(1)
            if len(count) == 3:
                count.append(1)
                stopped.set()
                return "daemon"
            return ""

        count: list[int] = []
        peers["bob"].step = step
        job = await peers["alice"].daemon.jobs.submit(peers.contract(TRAIN))
        await stopped.wait()
        views = await ends(peers, job.id)
        assert {view.state for view in views.values()} == {"done"}, [view.error for view in views.values()]
        assert len({outputs(view)["fit.model"] for view in views.values()}) == 1
        assert {s.restarts for view in views.values() for s in view.stages} == {0}, "no worker crashed"
        logs = await peers["bob"].daemon.jobs.logs(job.id)
        assert sorted(line.facts["name"] for line in logs if line.event == "countersigned") == sorted(NAMES)
        assert [line.facts for line in logs if line.event == "resumed"] == [{"stage": "fit", "turn": 2}]
        others = [await peers[name].daemon.jobs.logs(job.id) for name in NAMES if name != "bob"]
        assert not [line for lines in others for line in lines if line.event in ("resumed", "waits")]


async def test_a_worker_that_always_crashes_fails_its_job_by_name_and_the_daemon_lives(
    autojump_clock: Clock, quick_path: Path
) -> None:
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        peers["bob"].step = lambda message: "worker" if isinstance(message, protocol.TotalAnswer) else ""
        job = await peers["alice"].daemon.jobs.submit(peers.contract(TRAIN))
        views = await ends(peers, job.id)
        for name, view in views.items():
            assert (view.state, view.error.code) == ("failed", "worker_crashed")
            assert ("'fit' ended 3 times without a result" in view.error.message) == (name == "bob")
            assert (view.error.peer == "bob") == (name != "bob")
        assert views["bob"].stages[0].restarts == 2
        logs = await peers["bob"].daemon.jobs.logs(job.id)
        told = [line.facts["restarts"] for line in logs if line.event in ("worker_crashed", "resumed")]
        assert told == [1, 2], "a line for each start after the first"
        await settle(peers)
        peers["bob"].step = lambda _message: ""
        again = await peers["bob"].daemon.jobs.submit(peers.contract(TRAIN, name="again"))
        assert {view.state for view in (await ends(peers, again.id)).values()} == {"done"}


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (protocol.Failed("sum", "secret", "secret"), "stage"),
        (protocol.Failed("cancelled", "secret", ""), "stage"),
        (protocol.Sum("secret", [], np.zeros(4, np.uint32)), "gate"),
        (protocol.Sum("moments", ["secret"], np.zeros(4, np.uint32)), "gate"),
        (protocol.Send("alice", "secret", b"", []), "gate"),
    ],
)
async def test_no_word_of_a_worker_reaches_the_others(
    autojump_clock: Clock, quick_path: Path, said: Any, code: str
) -> None:
    """Its own operator reads what it said; the others a code, and what that means."""
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)

        class Says:
            async def next(self) -> Any:
                return said

            async def aclose(self) -> None:
                pass

        async def start(_start: protocol.Start) -> Any:
            return Says()

        peers["bob"].daemon.jobs._stages._start_worker = start
        job = await peers["alice"].daemon.jobs.submit(peers.contract(TRAIN))
        views = await ends(peers, job.id)
        assert {(view.state, view.error.code) for view in views.values()} == {("failed", code)}
        for name, view in views.items():
            lines = await peers[name].daemon.jobs.logs(job.id)
            assert ("secret" in f"{view} {lines}") == (name == "bob")


async def test_outputs_are_read_beside_the_event_loop(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        beside: list[Any] = []

        async def run_in_thread(function: Any) -> Any:
            beside.append(getattr(function, "func", None))
            return function()

        peers["bob"].daemon.jobs._stages._run_in_thread = run_in_thread
        job = await peers["alice"].daemon.jobs.submit(peers.contract(TRAIN))
        views = await ends(peers, job.id)
        assert beside.count(artifact.load) == len(views["bob"].outputs) > 0


@pytest.mark.parametrize("profile", ["byz", "crash"])
async def test_the_others_train_on_without_one_that_never_comes_back_after_the_first_turn(
    autojump_clock: Clock, quick_path: Path, profile: str
) -> None:
    """It was in the sums over the data; each turn is a group of its own."""
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        gone = after_the_first_turn(peers["dave"])
        text = peers.contract(TRAIN.split('[[stage]]\nid = "eval')[0], rules=f'stall_s = 60\nprofile = "{profile}"')
        job = await peers["alice"].daemon.jobs.submit(text)
        await gone.wait()
        await peers["dave"].stop()
        views = [await peers[name].daemon.jobs.wait(job.id) for name in NAMES[:3]]
        assert {view.state for view in views} == {"done"}, [view.error for view in views]
        assert len({outputs(view)["fit.model"] for view in views}) == 1
        await peers["dave"].start()  # late, but what it was needed for is known: it ends with the same model
        view = await peers["dave"].daemon.jobs.wait(job.id)
        assert (view.state, outputs(view)) == ("done", outputs(views[0]))
        await settle(peers)


async def test_one_that_is_away_before_the_statistics_is_waited_for_and_then_left_out(
    autojump_clock: Clock, quick_path: Path
) -> None:
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        peers["dave"].step_s = 5
        job = await peers["alice"].daemon.jobs.submit(
            peers.contract(TRAIN.split('[[stage]]\nid = "eval')[0], rules="stall_s = 600")
        )
        await trio.sleep(3)
        await peers["dave"].stop()
        since = trio.current_time()
        await trio.sleep(200)
        view = await peers["bob"].daemon.jobs.get(job.id)
        assert (view.state, view.waiting_for) == ("running", ["dave"])
        (told,) = [line for line in await peers["bob"].daemon.jobs.logs(job.id) if line.event == "waits"]
        assert (told.facts["stage"], told.facts["turn"], told.facts["k"], told.facts["for"]) == ("fit", 0, 0, ["dave"])
        until = datetime.fromisoformat(told.facts["until"]) - peers.now()
        assert 350 < until.total_seconds() < 400, "the stall_s of the contract, since the sum was asked for"
        sums = view.stages[0].sums
        assert sums is not None
        assert (sums.waits_for, sums.waits_until) == (["dave"], told.facts["until"])
        views = [await peers[name].daemon.jobs.wait(job.id) for name in NAMES[:3]]
        assert [view.stages[0].sums.waits_until for view in views if view.stages[0].sums] == [""] * 3
        assert {view.state for view in views} == {"done"}, [view.error for view in views]
        assert trio.current_time() - since > 300, "whoever is left out of the data's sums is out for the contract"


async def test_a_participant_without_whom_a_statistic_would_tell_its_values_ends_the_job_by_name(
    autojump_clock: Clock, quick_path: Path
) -> None:
    """It was in the first stage's sums over the data, and the next asks more of the same data."""
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        trained = trio.Event()
        jobs = peers["dave"].daemon.events
        jobs.subscribe(lambda event: trained.set() if event["event"] == "stage_done" else None)
        text = peers.contract(DESCRIBE + TRAIN, rules="stall_s = 60")
        job = await peers["alice"].daemon.jobs.submit(text)
        await trained.wait()
        await peers["dave"].stop()
        since = trio.current_time()
        views = [await peers[name].daemon.jobs.wait(job.id) for name in NAMES[:3]]
        for view in views:
            assert (view.state, view.error.code) == ("failed", "survivors_changed")
            assert "dave" in view.error.message
        assert 60 <= trio.current_time() - since < 90
        await peers["dave"].start()
        assert (await peers["dave"].daemon.jobs.wait(job.id)).state == "failed"


async def test_of_three_one_that_stays_away_ends_the_job_by_its_name(autojump_clock: Clock, quick_path: Path) -> None:
    names = NAMES[:3]
    async with federation(quick_path, names) as peers:
        await add_rows(peers)
        gone = after_the_first_turn(peers["carol"])
        job = await peers["alice"].daemon.jobs.submit(peers.contract(TRAIN, rules="stall_s = 60"))
        await gone.wait()
        await peers["carol"].stop()
        since = trio.current_time()
        await trio.sleep(20)
        view = await peers["bob"].daemon.jobs.get(job.id)
        assert (view.state, view.waiting_for) == ("running", ["carol"])
        for name in names[:2]:
            view = await peers[name].daemon.jobs.wait(job.id)
            assert (view.state, view.error.code) == ("failed", "below_quorum")
            assert "missing: carol" in view.error.message
        assert 60 <= trio.current_time() - since < 90
        await peers["carol"].start()
        assert (await peers["carol"].daemon.jobs.wait(job.id)).state == "failed"


async def test_a_message_of_a_participant_that_stays_away_is_waited_for_and_ends_the_job_by_name(
    autojump_clock: Clock, quick_path: Path
) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await add_rows(peers)
        gone = trio.Event()
        peers["dave"].step = lambda message: gone.set() or "" if isinstance(message, protocol.Send) else ""
        text = peers.contract(CONVERSE.replace(":converse", ":tell"), rules="stall_s = 8")
        job = await peers["alice"].daemon.jobs.submit(text)
        await gone.wait()
        await peers["dave"].stop()
        since = trio.current_time()
        view = await peers["bob"].daemon.jobs.wait(job.id)
        assert (view.state, view.error.code) == ("failed", "peer_absent")
        assert "dave could not be reached for 8 s" in view.error.message
        assert 8 <= trio.current_time() - since < 20


async def test_a_running_job_is_cancelled_for_all(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        running = trio.Event()
        peers["dave"].step = lambda message: running.set() or "" if isinstance(message, protocol.TotalAnswer) else ""
        job = await peers["alice"].daemon.jobs.submit(peers.contract(TRAIN))
        await running.wait()
        await peers["dave"].daemon.jobs.cancel(job.id)
        views = await ends(peers, job.id)
        assert {view.state for view in views.values()} == {"cancelled"}
        await settle(peers)
        for peer in peers.values():
            assert not list(peer.daemon.store.files.iterdir())


async def test_results_that_differ_fail_the_job_everywhere(autojump_clock: Clock, quick_path: Path) -> None:
    """One peer's worker hands over another model than it computed."""
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)

        def tamper(message: protocol.Message) -> str:
            if isinstance(message, protocol.Done):
                for i, (name, (kind, data)) in enumerate(message.outputs):
                    if kind == "model":
                        message.outputs[i] = (name, (kind, data[:-8] + bytes(8)))
            return ""

        peers["carol"].step = tamper
        job = await peers["alice"].daemon.jobs.submit(peers.contract(TRAIN.split('[[stage]]\nid = "eval')[0]))
        views = await ends(peers, job.id)
        for peer in peers.values():
            view = views[peer.name]
            assert (view.state, view.error.code) == ("failed", "not_equal")
            assert "fit.model came out differently at carol" in view.error.message
            assert await peer.daemon.jobs.models.list() == []
