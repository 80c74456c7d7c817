"""Each participant's audit log is witnessed by the others, and nobody rewrites its own alone."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import trio
from test_federation import ends, settle
from trio.abc import Clock

from fedpeer import stage as stages
from fedpeer.admin import caller
from fedpeer.admin.commands import COMMANDS
from fedpeer.errors import AuditBroken, NotFound
from fedpeer.governance import audit, export, heads, passport
from fedpeer.jobs import service
from fedpeer.jobs.views import JobView
from fedpeer.jobs.witness.service import Witness
from fedpeer.peers import Peers
from fedpeer.stage import Model, Params, Report, Stage, Sum, at_least, stage
from fedpeer.store import Transaction
from fedpeer.testing.federation import Federation, federation

NAMES = ["alice", "bob", "carol"]


@stage(version=1, roles={"member": at_least(1)}, inputs={}, outputs={"report": Report}, messages={})
async def note(peers: Peers, params: Params) -> dict[str, Any]:
    return {"report": Report({"me": peers.me})}


@stage(
    version=1,
    roles={"member": at_least(3)},
    inputs={},
    outputs={"model": Model},
    messages={"value": Sum("a value", group="turn")},
    cost=lambda params: (0.5, 1e-6),
)
async def fit(peers: Peers, params: Params) -> dict[str, Any]:
    shared = {"w": np.zeros(1)}
    for _ in peers.rounds(2, shared=shared):
        shared["w"] = shared["w"] + (await peers.sum("value", {"one": np.ones(1)}))["one"]
    return {"model": Model("test.fit", {"n": 3, "note": "x" * 500}, {"w": shared["w"]})}


def find(name: str) -> Stage:
    return {own.name: own for own in (note, fit)}.get(name) or stages.find(name)


NOTE = f'[[stage]]\nid = "note"\nrun = "{note.name}"\n'
FIT = f'[[stage]]\nid = "fit"\nrun = "{fit.name}"\n'


async def run_job(peers: Federation, name: str = "job", text: str = NOTE) -> dict[str, JobView]:
    job = await peers["bob"].daemon.jobs.submit(peers.contract(text, name=name))
    views = await ends(peers, job.id)
    await settle(peers)
    assert {view.state for view in views.values()} == {"done"}, [view.error for view in views.values()]
    return views


async def exported(peers: Federation, name: str) -> list[bytes]:
    """The lines of a peer's audit log, as `fedpeer audit export` writes them."""
    command, pages, since = COMMANDS["audit.export"], b"", 0
    while page := await command.handler(peers[name].daemon, command.check({"since": since})):
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
    async with federation(quick_path, NAMES, find=find) as peers:
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
            others = [peer.identity.id for peer in peers.values()]
            tips = await peers[name].daemon.store.read(partial(heads.known, peers=others))
            assert len(tips.heads) == 2, "one for each of the others: a later head takes the place of an earlier one"


async def test_jobs_side_by_side_do_not_look_like_two_histories(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        for turn in range(2):
            jobs = [(await peer.daemon.jobs.submit(peers.contract(NOTE, name=f"{turn}"))).id for peer in peers.values()]
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
    async with federation(quick_path, NAMES, find=find) as peers:
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

        command = COMMANDS["audit.accept"]
        for name in ("alice", "bob"):
            assert (await command.handler(peers[name].daemon, command.check({"ref": "carol"})))["known"] > 0
            assert (await events(peers, name))[-1] == "history_accepted"
        await run_job(peers, "fourth")
        for name in ("alice", "bob"):
            assert (await events(peers, name)).count("history_changed") == 1


async def test_what_a_partner_can_cause_to_be_appended_is_bounded(
    autojump_clock: Clock, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAX_PER_DAY", 3)
    async with federation(quick_path, NAMES, find=find) as peers:
        alice = peers["alice"].daemon
        for i in range(3):
            await run_job(peers, f"job-{i}")
        entries = len(await events(peers, "alice"))
        await peers["bob"].daemon.jobs.submit(peers.contract(NOTE, name="one-more"))
        await trio.sleep(60)
        assert (len(await alice.jobs.list()), len(await events(peers, "alice"))) == (3, entries)
        peers.ahead_s += 25 * 3600
        job = await peers["bob"].daemon.jobs.submit(peers.contract(NOTE, name="tomorrow"))
        assert (await ends(peers, job.id))["alice"].state == "done"


async def test_a_known_head_that_is_made_up_harms_nobody_but_is_told(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        await run_job(peers, "first")
        mallory, alice = peers["carol"], peers["alice"].identity.id
        await mallory.daemon.store.write(lambda tx: heads.move_tip(tx, alice, [], (3, b"f" * 32)))
        await run_job(peers, "second")
        (told,) = [
            entry
            for entry in await peers["alice"].daemon.store.read(audit.entries)
            if entry.event == "own_history_lost"
        ]
        assert told.facts == {"peers": ["carol"]}
        assert "history_changed" not in await events(peers, "bob")
        log = (await verified(peers))["alice"]
        assert (log.signed, {s.name for s in log.cosigners if s.number == log.entries}) == (log.entries, {"bob"})


@pytest.mark.parametrize("fault", [AssertionError, KeyError, ValueError])
async def test_a_fault_in_what_others_showed_ends_no_job_and_no_daemon(
    autojump_clock: Clock, quick_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type[Exception]
) -> None:
    def fails(*_: object) -> bool:
        raise fault("bytes of others")

    async with federation(quick_path, NAMES, find=find) as peers:
        monkeypatch.setattr(heads, "only_grew", fails)
        await run_job(peers)
        monkeypatch.undo()
        await run_job(peers, "next")
        assert [peer.deaths for peer in peers.values()] == [0, 0, 0]


async def test_peers_and_datasets_that_come_and_go_are_entries_with_who_asked(
    autojump_clock: Clock, quick_path: Path
) -> None:
    (quick_path / "rows.csv").write_text("id,a\n1,0.5\n2,0.25\n")
    asks = (
        ("peer.add", {"card": ""}),
        ("dataset.add", {"name": "rows", "uri": str(quick_path / "rows.csv")}),
        ("dataset.offer", {"ref": "rows", "offered": True}),
        ("dataset.remove", {"ref": "rows", "forget": True}),
        ("peer.remove", {"ref": "bob"}),
    )
    async with federation(quick_path, NAMES[:2], introduced=False, find=find) as peers:
        alice = peers["alice"].daemon
        answered = "INSERT INTO answered_table (dataset, version, rows) VALUES ('rows', x'', 2)"
        await alice.store.write(lambda tx: tx.execute(answered))
        for name, given in asks:
            command = COMMANDS[name]
            if "card" in given:
                given["card"] = peers["bob"].daemon.connections.card.text
            with caller.calling(caller.Caller(uid=1234, pid=1, user="ann")):
                await command.handler(alice, command.check(given))
        told = await alice.store.read(audit.entries)
        assert [entry.event for entry in told] == [
            "peer_added", "dataset_added", "dataset_offered", "dataset_removed", "peer_removed"
        ]  # fmt: skip
        assert {(entry.facts["uid"], entry.facts["user"]) for entry in told} == {(1234, "ann")}
        assert (told[1].facts["rows"], told[3].facts["forgot"]) == (2, 1)
        shown = COMMANDS["audit.show"].handler(alice, COMMANDS["audit.show"].check({"number": 2}))
        assert (await shown).event == "dataset_added"
        listed = COMMANDS["audit.list"].handler(alice, COMMANDS["audit.list"].check({"job": "ab" * 32}))
        assert await listed == []
        with pytest.raises(NotFound):
            await COMMANDS["audit.show"].handler(alice, COMMANDS["audit.show"].check({"number": 9}))


async def test_a_model_has_one_passport_at_all_signed_by_all(autojump_clock: Clock, quick_path: Path) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        views = await run_job(peers, "job", FIT)
        files = [await peer.daemon.jobs.models.passport("job") for peer in peers.values()]
        told = files[0].passport
        assert len({passport.document(file.passport) for file in files}) == 1
        assert (told.contract, told.rounds, told.contributors) == (views["bob"].id, 2, NAMES)
        assert told.sums == [{"survivors": NAMES, "first_turn": 1, "last_turn": 2, "sums": 2}]
        assert (told.metrics, told.metrics_left_out, told.epsilon, told.delta) == ({"n": 3}, 1, 0.5, 1e-6)
        for file in files:
            found = passport.verify(msgspec.json.encode(file))
            assert (found.model, found.missing, len(found.signed_by)) == (views["bob"].outputs[0].digest, [], 3)
        await peers["carol"].restart()
        assert await peers["carol"].daemon.jobs.models.passport("job") == files[2]


async def test_what_a_partner_signs_that_is_no_head_of_ours_does_not_count(
    autojump_clock: Clock, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with federation(quick_path, NAMES, find=find) as peers:
        alice, carol = peers["alice"].identity.id, peers["carol"].identity.id
        publish = Witness._publish

        def lie(self: Witness, tx: Transaction, kind: str, slot: str, record: Any) -> None:
            if kind == heads.COSIGN and self._mesh.me == carol:
                record = heads.Cosign((*record.heads, (alice, 10**6, bytes(32))))
            publish(self, tx, kind, slot, record)

        monkeypatch.setattr(Witness, "_publish", lie)
        await run_job(peers)
        for name in NAMES:
            (log,) = export.verify([(name, await exported(peers, name))])
            assert log.cosigners
