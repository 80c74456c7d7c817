"""Lives of a federation of three that end at any system call: what test_crashes.py runs under strace.

In a life tables are added, a contract is proposed, two operators approve it, it is charged to budgets, it runs.

A server reads one line {"folder": …, "burn": n, "call": …} at a time from standard input and forks a child for it,
which has nothing to import any more. The child lives one life: three whole daemons on what is in the folder, until a
job of theirs has ended everywhere and nobody needs anything of it. It makes what is missing (the datasets, the job),
so the life after a kill goes on where that one ended. The server answers {"status": wait status, "told": […]}: what
the child had told before it died, each of which must be true in the next life.

strace's `when=N` counts the calls of one name of each process, so `burn` such calls that change nothing bring the fault
to the call N - burn of the life.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import trio
import trio.testing

from fedpeer import stage as stages
from fedpeer.admin.caller import Caller
from fedpeer.errors import StoreError
from fedpeer.governance import audit, budget
from fedpeer.jobs.views import JobView
from fedpeer.peers import Peers
from fedpeer.stage import Model, Params, Stage, Sum, Table, at_least, stage
from fedpeer.store import Transaction
from fedpeer.testing.federation import LAX, Federation, Organization, federation

NAMES = ["alice", "bob", "carol"]
JOB = "mean"
ROWS = 40
EPSILON, DELTA = 0.5, 1e-9
POLICY = LAX.replace('approve = "auto"', 'approve = "ask"')
ANN = Caller(uid=1000, pid=1, user="ann")
STORE_FAILED = 3
"""Exit code of a life that ended with a StoreError."""
TOLD = ("agreed", "stage_started", "stage_done", "done", "failed")
"""Lines of a job's log that are told when they are on disk, and not before."""


@stage(
    version=1,
    params=Params,
    roles={"member": at_least(3)},
    inputs={"table": Table},
    outputs={"model": Model},
    messages={"sums": Sum("the number of rows, and the sum of their ages", group="turn")},
    cost=lambda _: (EPSILON, DELTA),  # there is no noise; it is about the book
)
async def fit(peers: Peers, _params: Params, table: Table) -> dict[str, Any]:
    """A mean in two turns, so that checkpoints, sums of two groups and an output are in one life."""
    state = {"mean": np.zeros(1)}
    for _ in peers.rounds(2, shared=state):
        ages = table.column("age") - state["mean"]
        total = (await peers.sum("sums", np.array([len(ages), ages.sum()])))["values"]
        state["mean"] = state["mean"] + total[1] / total[0]
    return {"model": Model("test.mean", {}, dict(state))}


def _nothing_there(change: Callable[[Path], object]) -> None:
    with suppress(FileNotFoundError):
        change(Path("/nothing there"))


BURN: dict[str, Callable[[], object]] = {
    "write": lambda: os.write(BURNT, b"x"),
    "pwrite64": lambda: os.pwrite(BURNT, b"x", 0),
    "fsync": lambda: os.fsync(BURNT),
    "fdatasync": lambda: os.fdatasync(BURNT),
    "ftruncate": lambda: os.ftruncate(BURNT, 0),
    "unlink": lambda: _nothing_there(Path.unlink),
    "rename": lambda: _nothing_there(lambda path: path.rename("/nowhere/at all")),
}
"""The calls that write, each of which changes nothing here."""


def find(name: str) -> Stage:
    return fit if name == fit.name else stages.find(name)


STAGES = f"""
[[stage]]
id = "fit"
run = "{fit.name}"
inputs = {{ table = "dataset:rows" }}
"""


def serve() -> None:
    """Fork a life for each line, until the lines end."""
    for line in sys.stdin:
        asked = json.loads(line)
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(ours)
            os._exit(live(Path(asked["folder"]), asked["call"], int(asked["burn"]), theirs))
        os.close(theirs)
        with os.fdopen(ours) as pipe:
            told = [json.loads(said) for said in pipe]
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": status, "told": told}), flush=True)


def live(folder: Path, call: str, burn: int, pipe: int) -> int:
    """One life; its exit code. What is told goes to the pipe, one JSON line each."""

    def tell(*said: Any) -> None:
        os.writev(pipe, [json.dumps(said).encode(), b"\n"])  # a call that no fault is brought to

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the server's answers go there
    for _ in range(burn):
        BURN[call]()
    for database in folder.glob("*/state/fedpeer.sqlite"):
        connection = sqlite3.connect(database)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",), database
        connection.close()
    try:
        trio.run(_live, folder, tell, clock=trio.testing.MockClock(autojump_threshold=0))
    except BaseExceptionGroup as group:
        store, others = group.split(StoreError)
        if store is not None and others is None:
            return STORE_FAILED
        raise
    except StoreError:
        return STORE_FAILED
    return 0


async def _live(folder: Path, tell: Callable[..., None]) -> None:
    async with federation(folder, NAMES, find=find, rules=POLICY) as peers, trio.open_nursery() as nursery:
        for name, peer in peers.items():
            peer.daemon.events.subscribe(
                lambda event, name=name: tell(name, event["event"]) if event["event"] in TOLD else None  # type: ignore[misc]
            )
        for name in await add_rows(peers):
            tell(name, "dataset")
        alice = peers["alice"].daemon
        if not await alice.jobs.list():
            await alice.jobs.submit(peers.contract(STAGES, name=JOB), ANN)
            tell("alice", "submitted")
        for name in NAMES[1:]:
            nursery.start_soon(approve, peers, name, tell)
        with trio.fail_after(900):
            views = [await peer.daemon.jobs.wait(await _id_of(peers, name)) for name, peer in peers.items()]
            while any(peer.daemon.mesh.scopes for peer in peers.values()):
                await trio.sleep(0.2)
        for peer in peers.values():
            await check_books(peer)
        for name, view in zip(peers, views, strict=True):
            tell(
                name,
                "end",
                view.state,
                view.error and view.error.message,
                _outputs(view),
                [line.event for line in await peers[name].daemon.jobs.logs(JOB)],
            )


async def approve(peers: Federation, name: str, tell: Callable[..., None]) -> None:
    """What an operator says who is asked."""
    jobs = peers[name].daemon.jobs
    job = await _id_of(peers, name)
    while (view := await jobs.get(job)).state == "proposed":
        if view.asks is not None:
            await jobs.approvals.approve(job, ANN)
            tell(name, "approved")
            return
        await trio.sleep(0.2)


async def check_books(peer: Organization) -> None:
    """The audit log is whole, and what it says was charged is what the budget says, once for each partner."""

    def check(tx: Transaction) -> None:
        checker, charged = audit.Checker({}), []
        for number, body, nodes in audit.stored(tx, 0, 10_000):
            checker.add(number, body, nodes)
            entry = audit.read(body)
            if entry.event == budget.CHARGED:
                charged.append((entry.facts["partner"], entry.facts["epsilon"]))
        assert checker.end() == audit.head(tx)
        booked = [(charge.partner, charge.cost.epsilon) for charge in budget.all_charges(tx)]
        assert sorted(booked) == sorted(charged), (booked, charged)
        assert len(booked) == len({partner for partner, _ in booked} - {peer.identity.id}) == len(NAMES) - 1, booked

    await peer.daemon.store.read(check)


async def add_rows(peers: Federation) -> list[str]:
    """Give those a table who have none; their names."""
    given = []
    for number, (name, peer) in enumerate(peers.items()):
        if "rows" not in [view.name for view in await peer.daemon.catalog.list()]:
            path = _rows(peers.folder / f"{name}.csv", number)
            await peer.daemon.catalog.add("rows", str(path), "id", None)
            given.append(name)
    return given


async def _id_of(peers: Federation, name: str) -> str:
    while not (jobs := await peers[name].daemon.jobs.list()):
        await trio.sleep(0.2)
    (view,) = jobs
    return view.id


def _outputs(view: JobView) -> str:
    return ",".join(output.digest for output in view.outputs)


def _rows(path: Path, number: int) -> Path:
    lines = [f"{number}-{i},{(7 * i + number) % 31}" for i in range(ROWS)]
    path.write_text("\n".join(["id,age", *lines]) + "\n")
    for synced in (path, path.parent):  # the owner's table is not what a power cut may take
        descriptor = os.open(synced, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return path


BURNT = os.memfd_create("burnt")

if __name__ == "__main__":
    serve()
