"""Alignment in a contract between real daemons, feeding a later stage, while workers and daemons die."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio
import trio.testing

from fedpeer import artifact
from fedpeer.jobs.views import JobView
from fedpeer.testing.federation import Federation, federation
from fedpeer.worker import protocol

NAMES = ["alice", "bob", "carol", "dave"]
PATIENTS = {"alice": range(0, 40), "bob": range(10, 50), "carol": range(12, 37), "dave": range(5, 31)}
COMMON = range(12, 31)
STAGES = """
[[stage]]
id = "align"
run = "vertical.align:run"
roles = { guest = "bob", host = ["alice", "carol", "dave"] }
inputs = { table = "dataset:patients" }
params = { min_intersection = 10 }
[[stage]]
id = "select"
run = "local.select:run"
inputs = { rows = "align.rows", table = "dataset:patients" }
[[stage]]
id = "look"
run = "horizontal.statistics:run"
inputs = { table = "select.table" }
params = { bins = 1 }
"""


async def run_job(peers: Federation, seed: int) -> dict[str, JobView]:
    for name, patients in PATIENTS.items():
        rows = [f"P-{i:03d},{i}" for i in patients]
        random.Random(f"{seed} {name}").shuffle(rows)
        path = peers.folder / f"{name}.csv"
        path.write_text("\n".join(["id,x", *rows]) + "\n")
        await peers[name].daemon.catalog.add("patients", str(path), "id", None)
    job = await peers["alice"].daemon.jobs.submit(peers.contract(STAGES, rules="restarts = 100"))
    views: dict[str, JobView] = {}
    while len(views) < len(peers):
        await trio.sleep(0.2)
        for peer in peers.values():
            try:
                view = await peer.daemon.jobs.get(job.id)
            except AssertionError:  # its daemon is down
                continue
            if view.finished:
                views[peer.name] = view
    return views


def check(views: dict[str, JobView]) -> None:
    assert [view.error for view in views.values()] == [None] * 4
    (report,) = {str(o.values) for view in views.values() for o in view.outputs if o.kind == "report"}
    (values,) = [o.values for o in views["alice"].outputs if o.kind == "report"]
    assert values is not None
    assert values["columns"]["x"]["count"] == 4 * len(COMMON), report
    assert values["columns"]["x"]["mean"] == sum(COMMON) / len(COMMON)
    assert values["columns"]["x"]["min"] == sum(COMMON[:10]) / 10
    assert values["columns"]["x"]["max"] == sum(COMMON[-10:]) / 10


@pytest.mark.system  # chaos
async def test_an_alignment_feeds_a_later_stage_whatever_workers_and_daemons_die_meanwhile(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, seed: int
) -> None:
    chance = random.Random(seed)

    def step(message: protocol.Message) -> str:
        return "" if chance.random() > 0.05 else chance.choice(["worker", "worker", "daemon"])

    async with federation(tmp_path, NAMES) as peers:
        for peer in peers.values():
            peer.step = step
        check(await run_job(peers, seed))
        assert sum(peer.deaths for peer in peers.values()) >= 3


PAIR = """
[[stage]]
id = "align"
run = "vertical.align:run"
roles = { guest = "alice", host = ["bob"] }
inputs = { table = "dataset:patients" }
params = { min_intersection = 1 }
[[stage]]
id = "pick"
run = "local.select:run"
inputs = { rows = "align.rows", table = "dataset:patients" }
"""


async def test_two_with_other_columns_each_have_their_own_columns_of_the_common_rows(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with federation(tmp_path, ["alice", "bob"]) as peers:
        for name, columns, patients in (("alice", "id,age,sick", range(0, 9)), ("bob", "id,smoker", range(4, 20))):
            rows = [",".join([f"P-{i}", *("1" for _ in columns.split(",")[1:])]) for i in patients]
            path = tmp_path / f"{name}.csv"
            path.write_text("\n".join([columns, *rows]) + "\n")
            await peers[name].daemon.catalog.add("patients", str(path), "id", "sick" if name == "alice" else None)
        sent = []
        for peer in peers.values():
            whole = peer.daemon.mesh.publish
            peer.daemon.mesh.publish = lambda *a, whole=whole: (sent.append(a[-1]), whole(*a))[1]
        jobs = peers["alice"].daemon.jobs
        view = await jobs.wait((await jobs.submit(peers.contract(PAIR))).id)
        assert view.state == "done", view.error
        (table,) = [output for output in view.outputs if output.name == "table"]
        picked = artifact.load("table", peers["alice"].daemon.store.path_of(bytes.fromhex(table.digest)).read_bytes())
        assert picked.features == ["age"]
        assert sorted(picked.ids()) == [f"P-{i}" for i in range(4, 9)]
        assert not [body for body in sent if b"smoker" in body or b"sick" in body], "columns of one's own are told"
