"""Each participant's audit log is witnessed by the others, and nobody rewrites its own alone."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.abc import Clock

from fedpeer.errors import AuditBroken
from fedpeer.governance import audit, export, heads
from fedpeer.jobs.views import JobView
from fedpeer.testing.federation import Federation, federation
from test_federation import DESCRIBE, add_rows, ends, settle

NAMES = ["alice", "bob", "carol"]


async def run_job(peers: Federation, name: str = "job") -> dict[str, JobView]:
    job = await peers["bob"].daemon.jobs.submit(peers.contract(DESCRIBE, name=name))
    views = await ends(peers, job.id)
    await settle(peers)
    assert {view.state for view in views.values()} == {"done"}, [view.error for view in views.values()]
    return views


async def exported(peers: Federation, name: str) -> list[bytes]:
    """The lines of a peer's audit log, as `fedpeer audit export` writes them."""
    daemon, pages, since = peers[name].daemon, b"", 0
    card = daemon.connections.card
    while page := await daemon.store.read(lambda tx: export.page(tx, card.id, card.text, since)):
        pages += page
        since = since + page.count(b"\n") if since else 1
    return pages.splitlines(keepends=True)


async def verified(peers: Federation) -> dict[str, export.Verified]:
    found = export.verify([(name, await exported(peers, name)) for name in peers])
    return {log.name: log for log in found}


async def events(peers: Federation, name: str) -> list[str]:
    return [entry.event for entry in await peers[name].daemon.store.read(audit.entries)]


def folder_of(peers: Federation, name: str) -> Path:
    return peers.folder / name / "state"


async def test_every_log_is_co_signed_to_its_end_and_holds_every_line_of_the_job(
    autojump_clock: Clock, quick_path: Path
) -> None:
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        views = await run_job(peers)
        first = await verified(peers)
        for name, log in first.items():
            assert {signer.name for signer in log.cosigners} == set(NAMES) - {name}
            assert log.signed == log.entries > 5
            lines = await peers[name].daemon.jobs.logs(views[name].id)
            told = await peers[name].daemon.store.read(lambda tx: audit.entries(tx, job=bytes.fromhex(views["bob"].id)))
            assert [(line.time, line.event) for line in lines] == [(entry.time, entry.event) for entry in told]
        for peer in peers.values():
            await peer.restart()
        await peers.connected()
        await run_job(peers, "again")
        second = await verified(peers)
        for name, log in second.items():
            assert log.signed == log.entries > first[name].entries
            assert all(signer.number == log.entries for signer in log.cosigners)
            assert "history_changed" not in await events(peers, name)


async def test_jobs_side_by_side_do_not_look_like_two_histories(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        for turn in range(2):
            jobs = [
                (await peer.daemon.jobs.submit(peers.contract(DESCRIBE, name=f"{turn}"))).id for peer in peers.values()
            ]
            for job in jobs:
                await ends(peers, job)
            await settle(peers)
        await verified(peers)
        assert not [name for name in peers if "history_changed" in await events(peers, name)]


def take_back(folder: Path, copy: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)


def write_anew(folder: Path, _copy: Path) -> None:
    """Change one entry, and make all hashes anew, as if it had always been so."""
    with sqlite3.connect(folder / "fedpeer.sqlite") as connection:
        for trigger in ("audit_entry_stays", "audit_entry_remains"):
            connection.execute(f"DROP TRIGGER {trigger}")
        rows = connection.execute("SELECT number, body FROM audit_entry ORDER BY number").fetchall()
        log = audit.tree.Growing()
        for number, body in rows:
            changed = body.replace(b"bob", b"eve")
            nodes = b"".join(log.add(audit.tree.leaf(number, changed)))
            connection.execute("UPDATE audit_entry SET body = ?, nodes = ? WHERE number = ?", (changed, nodes, number))
    connection.close()


@pytest.mark.parametrize("harm", [take_back, write_anew])
async def test_a_log_that_lost_or_changed_its_history_is_found_by_the_partners_and_by_its_owner(
    autojump_clock: Clock, quick_path: Path, harm: Callable[[Path, Path], None]
) -> None:
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        await run_job(peers, "first")
        await peers["carol"].stop()
        copy = quick_path / "copy"
        shutil.copytree(folder_of(peers, "carol"), copy)
        await peers["carol"].start()
        await peers.connected()
        await run_job(peers, "second")

        await peers["carol"].stop()
        harm(folder_of(peers, "carol"), copy)
        await peers["carol"].start()
        await peers.connected()
        await run_job(peers, "third")
        assert "own_history_lost" in await events(peers, "carol")
        for name in ("alice", "bob"):
            told = [e for e in await peers[name].daemon.store.read(audit.entries) if e.event == "history_changed"]
            assert [entry.facts["name"] for entry in told] == ["carol"]
        files = {name: await exported(peers, name) for name in NAMES}
        with pytest.raises(AuditBroken, match="carol"):
            export.verify(list(files.items()))

        accepting = [peers[name].daemon for name in ("alice", "bob")]
        for daemon in accepting:
            carol = daemon.connections.peer("carol").id
            await daemon.store.write(lambda tx, carol=carol: heads.accept(tx, carol))
        await run_job(peers, "fourth")
        for name in ("alice", "bob"):
            assert (await events(peers, name)).count("history_changed") == 1
