"""Records, mail and blobs between meshes on a network in memory, without faults of the network."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing
from mesh_cast import SCOPE, Organization, homes, introduce

from fedpeer import codec
from fedpeer.crypto import hash_
from fedpeer.errors import LocalProtocolError, SessionError, TrustError
from fedpeer.mesh import blobs, mail, records
from fedpeer.mesh.mail import Place
from fedpeer.mesh.messages import HELLO, RECORDS, SYNC, WANTS, Chunk, Hello, LetterHead, Sync, Want
from fedpeer.mesh.records import Record
from fedpeer.mesh.session import service as sessions
from fedpeer.store import Transaction
from fedpeer.testing.network import MemoryNetwork
from fedpeer.wire.constants import BULK_CHANNELS
from fedpeer.wire.service import Link, initiate

LARGE = Random(5).randbytes(500_000)


@pytest.fixture
def home() -> Iterator[Path]:
    with homes() as folder:
        yield folder


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork()


@pytest.fixture
def alice(home: Path, network: MemoryNetwork) -> Organization:
    return Organization("alice", home, network.host("alice"), "alice:7420")


@pytest.fixture
def bob(home: Path, network: MemoryNetwork) -> Organization:
    return Organization("bob", home, network.host("bob"), "bob:7420")


@pytest.fixture
def carol(home: Path, network: MemoryNetwork) -> Organization:
    return Organization("carol", home, network.host("carol"), "carol:7420")


@asynccontextmanager
async def together(*organizations: Organization) -> AsyncIterator[trio.Nursery]:
    """All connected with all, SCOPE open for all."""
    with trio.fail_after(10_000):
        async with trio.open_nursery() as nursery:
            for one in organizations:
                await one.start(nursery)
            await introduce(*organizations)
            for one in organizations:
                others = [other for other in organizations if other is not one]
                await one.open(*others)
                await one.until_connected(*others)
            yield nursery
            nursery.cancel_scope.cancel()
    for one in organizations:
        assert one.log.faults == []


def files(one: Organization) -> int:
    """How many files its store and its mesh keep."""
    return sum(1 for folder in ("files", "fetched") for path in (one.folder / folder).rglob("*") if path.is_file())


# mail


async def test_letters_of_any_size_arrive_once_and_in_order_and_leave_nothing(alice, bob, autojump_clock) -> None:
    letters = [Random(size).randbytes(size) for size in (0, 1, 32_000, 33_000, 300_000, 5)]
    async with together(alice, bob):
        assert [await alice.post(bob, letter) for letter in letters] == list(range(6))
        assert [b"".join(await bob.receive(alice)) for _ in letters] == letters
        await trio.sleep(1)
        assert files(alice) == files(bob) == 0
        rows = await alice.store.read(lambda tx: tx.all("SELECT * FROM mesh_outbox"))
        assert rows == await bob.store.read(lambda tx: tx.all("SELECT * FROM mesh_inbox")) == []


async def test_a_letter_carries_its_tag_header_and_buffers(alice, bob, autojump_clock) -> None:
    async with together(alice, bob):
        await alice.post(bob, b"one", b"", b"three", tag="gradient")
        letter = await bob.mesh.next_mail(SCOPE, "fit", alice.id)
        assert (letter.seq, letter.tag, letter.header) == (0, "gradient", b"header")
        assert [bytes(part) for part in letter.buffers] == [b"one", b"", b"three"]
        assert all(part.readonly for part in letter.buffers)
        assert await bob.mesh.next_mail(SCOPE, "fit", alice.id) == letter  # until it is taken


async def test_streams_are_apart(alice, bob, carol, autojump_clock) -> None:
    async with together(alice, bob, carol):
        for sender in (alice, carol):
            for stage in ("align", "fit"):
                for number in range(3):
                    await sender.post(bob, f"{sender.name} {stage} {number}".encode(), stage=stage)
        for stage in ("fit", "align"):
            for number in range(3):
                for sender in (carol, alice):
                    assert await bob.receive(sender, stage) == [f"{sender.name} {stage} {number}".encode()]


async def test_a_letter_posted_before_the_other_side_opened_the_scope_waits_for_it(alice, bob, autojump_clock) -> None:
    async with trio.open_nursery() as nursery:
        for one in (alice, bob):
            await one.start(nursery)
        await introduce(alice, bob)
        await alice.open(bob)
        await alice.post(bob, LARGE)
        await alice.publish("note", "0", b"x")
        await alice.until_connected(bob)
        await trio.sleep(100)
        await bob.open(alice)
        with trio.fail_after(10):
            assert await bob.receive(alice) == [LARGE]
            assert await bob.until_held("note", "0", alice) == b"x"
        nursery.cancel_scope.cancel()


async def test_a_rolled_back_transaction_posts_publishes_and_opens_nothing(alice, bob, autojump_clock) -> None:
    async with together(alice, bob):

        def fail(tx) -> None:
            alice.mesh.post(tx, SCOPE, "fit", bob.id, "t", b"", [b"never"])
            alice.mesh.publish(tx, SCOPE, "note", "0", b"never")
            alice.mesh.open_scope(tx, b"other", [alice.id])
            raise KeyError

        with pytest.raises(KeyError):
            await alice.store.write(fail)
        await alice.post(bob, b"first")
        assert await bob.receive(alice) == [b"first"]
        assert alice.mesh.find(SCOPE, "note", "0", alice.id) is None
        assert alice.mesh.scopes.keys() == {SCOPE}


async def test_a_letter_is_taken_in_order_and_once(alice, bob, autojump_clock) -> None:
    async with together(alice, bob):
        await alice.post(bob, b"0")
        letter = await bob.mesh.next_mail(SCOPE, "fit", alice.id)
        await bob.receive(alice)
        with pytest.raises(LocalProtocolError, match="not the first"):
            await bob.store.write(lambda tx: bob.mesh.take(tx, SCOPE, "fit", alice.id, letter))


async def test_what_cannot_be_posted_is_refused(alice, bob, carol, autojump_clock) -> None:
    async with together(alice, bob):
        for to, stage in ((carol, "fit"), (alice, "fit"), (bob, "a stage"), (bob, "x" * 65), (bob, "")):
            with pytest.raises(LocalProtocolError):
                await alice.post(to, b"", stage=stage)
        with pytest.raises(LocalProtocolError):
            await alice.store.write(lambda tx: alice.mesh.post(tx, b"closed", "fit", bob.id, "t", b"", []))


async def test_a_sender_stands_still_while_its_letters_are_not_taken(alice, bob, autojump_clock, monkeypatch) -> None:
    monkeypatch.setattr(mail, "MAX_WAITING", 3)
    monkeypatch.setattr(mail, "MAX_WAITING_BYTES", 100_000)
    async with together(alice, bob) as nursery:
        for number in range(10):
            await alice.post(bob, bytes([number]))
        await alice.post(bob, LARGE)
        await alice.post(bob, b"last")
        await trio.sleep(100)
        waiting = "SELECT COUNT(*) FROM mesh_inbox"
        assert await bob.store.read(lambda tx: tx.one(waiting)) == (3,)
        await bob.stop()
        await bob.start(nursery)  # what waited is counted again
        await trio.sleep(100)
        assert await bob.store.read(lambda tx: tx.one(waiting)) == (3,)
        for number in range(10):
            assert await bob.receive(alice) == [bytes([number])]
        await trio.sleep(100)
        assert await bob.store.read(lambda tx: tx.one(waiting)) == (1,)  # larger than the room, so it came alone
        assert await bob.receive(alice) == [LARGE]
        assert await bob.receive(alice) == [b"last"]


async def test_a_sender_stands_still_when_all_its_scopes_together_hold_too_much(
    alice, bob, autojump_clock, monkeypatch
) -> None:
    monkeypatch.setattr(mail, "MAX_WAITING_TOTAL", 1_100_000)
    async with together(alice, bob) as nursery:
        scopes = [bytes([number]) for number in range(5)]

        async def waiting() -> set[bytes]:
            rows = await bob.store.read(lambda tx: tx.all("SELECT scope FROM mesh_inbox"))
            return {scope for (scope,) in rows}

        async def take(scope: bytes) -> None:
            letter = await bob.mesh.next_mail(scope, "fit", alice.id)
            assert [bytes(part) for part in letter.buffers] == [LARGE]
            await bob.store.write(lambda tx: bob.mesh.take(tx, scope, "fit", alice.id, letter))

        for scope in scopes:
            for one, other in ((alice, bob), (bob, alice)):
                await one.open(other, scope=scope)
            await alice.store.write(lambda tx, s=scope: alice.mesh.post(tx, s, "fit", bob.id, "t", b"", [LARGE]))
        await trio.sleep(100)
        first = await waiting()
        assert len(first) == 2
        await bob.stop()
        await bob.start(nursery)  # what waited is counted again
        await trio.sleep(100)
        assert await waiting() == first
        closed, taken = first
        await take(taken)
        await bob.store.write(lambda tx: bob.mesh.close_scope(tx, closed))
        await trio.sleep(100)
        second = await waiting()
        assert len(second) == 2
        for scope in (*second, *({*scopes} - first - second)):  # the last one comes when there is room for it
            await take(scope)
        await alice.post(bob, b"nothing of it is left")
        assert await bob.receive(alice) == [b"nothing of it is left"]
        assert set(bob.mesh.waiting._held.values()) == {(0, 0)}


# records


async def test_a_farewell_is_told_to_a_peer_that_was_away_until_its_time_is_over(
    alice, bob, carol, autojump_clock
) -> None:
    async with together(alice, bob, carol) as nursery:
        pair, mine = sorted([alice.id, bob.id]), b"pair"
        for one in (alice, bob):
            await one.store.write(lambda tx, one=one: one.mesh.open_scope(tx, mine, pair))
        await bob.stop()

        def close(tx: Transaction) -> None:
            alice.mesh.publish(tx, mine, "ended", "", b"done")
            alice.mesh.publish(tx, mine, "note", "", b"not kept")
            alice.mesh.say_farewell(tx, mine, "ended", until=200, now=100)
            alice.mesh.close_scope(tx, mine)

        await alice.store.write(close)
        await carol.store.write(lambda tx: carol.mesh.open_scope(tx, mine, [alice.id, carol.id]))
        await alice.stop()
        await alice.start(nursery)
        await bob.start(nursery)
        await trio.sleep(100)
        assert bob.mesh.held(mine, "ended") == {("", alice.id): b"done"}
        assert bob.mesh.held(mine, "note") == {}
        assert carol.mesh.held(mine, "ended") == {}, "it was not of that scope"

        await alice.store.write(lambda tx: alice.mesh.say_farewell(tx, SCOPE, "nothing", until=300, now=201))
        await bob.store.write(lambda tx: bob.mesh.discard(tx, mine, "ended", ""))
        await bob.stop()
        await bob.start(nursery)
        await trio.sleep(100)
        assert bob.mesh.held(mine, "ended") == {}


async def test_a_record_is_known_to_the_audience_and_to_nobody_else(alice, bob, carol, autojump_clock) -> None:
    async with together(alice, bob, carol):
        await alice.publish("note", "0", b"for all")
        for one in (alice, bob, carol):
            assert await one.until_held("note", "0", alice) == b"for all"
        pair = bytes(32)
        for one, other in ((alice, bob), (bob, alice)):
            await one.open(other, scope=pair)
        await carol.open(alice, bob, scope=pair)
        await alice.store.write(lambda tx: alice.mesh.publish(tx, pair, "note", "1", b"for two"))
        await trio.sleep(100)
        assert bob.mesh.held(pair, "note") == {("1", alice.id): b"for two"}
        assert carol.mesh.held(pair, "note") == {}


async def test_a_record_that_was_missed_comes_with_the_next_session_from_anybody(
    network, alice, bob, carol, autojump_clock
) -> None:
    async with together(alice, bob, carol) as nursery:
        await carol.stop()
        await alice.publish("note", "0", b"x")
        await bob.until_held("note", "0", alice)
        await alice.stop()
        await carol.start(nursery)
        assert await carol.until_held("note", "0", alice) == b"x"  # bob has it from alice


async def test_more_records_than_one_list_of_digests_holds_are_caught_up(alice, bob, autojump_clock) -> None:
    async with together(alice, bob) as nursery:
        await bob.stop()

        def publish(tx) -> None:
            for number in range(1300):
                alice.mesh.publish(tx, SCOPE, "note", str(number), b"")

        await alice.store.write(publish)
        await bob.start(nursery)
        await bob.until_held("note", "1299", alice)
        await trio.sleep(1)
        assert len(bob.mesh.held(SCOPE, "note")) == 1300
        await alice.stop()
        await alice.start(nursery)  # both hold all: nothing is sent again
        await alice.until_connected(bob)
        await trio.sleep(1)
        assert alice.connections.traffic()[0] < 100_000


async def test_the_same_statement_again_is_nothing_and_another_is_refused(alice, bob, autojump_clock) -> None:
    async with together(alice, bob) as nursery:
        for _ in range(2):
            await alice.publish("note", "0", b"x")
        for _ in range(2):
            with pytest.raises(LocalProtocolError, match="another note record of ours is in slot '0'"):
                await alice.publish("note", "0", b"y")
            await alice.stop()
            await alice.start(nursery)
        assert alice.mesh.find(SCOPE, "note", "0", alice.id) == b"x"
        with pytest.raises(LocalProtocolError):
            await alice.publish("note", "1", bytes(records.MAX_BODY + 1))
        await alice.publish("note", "1", bytes(records.MAX_BODY))
        assert await bob.until_held("note", "1", alice) == bytes(records.MAX_BODY)


async def test_changed_wakes_for_every_record_after_the_call(alice, bob, autojump_clock) -> None:
    async with together(alice, bob):
        waiting = bob.mesh.changed(SCOPE)
        await alice.publish("note", "0", b"x")
        await trio.sleep(1)
        with trio.fail_after(1):
            await waiting
        with trio.move_on_after(10) as idle:
            await bob.mesh.changed(SCOPE)
        assert idle.cancelled_caught


async def test_what_is_discarded_and_refused_does_not_come_back(alice, bob, carol, autojump_clock) -> None:
    async with together(alice, bob, carol) as nursery:
        await alice.publish("key", "old", b"x")
        await alice.publish("key", "new", b"y")
        await bob.until_held("key", "new", alice)
        bob.mesh.refuse(SCOPE, lambda record: record.kind == "key" and record.slot == "old")
        await bob.store.write(lambda tx: bob.mesh.discard(tx, SCOPE, "key", "old"))
        assert bob.mesh.held(SCOPE, "key") == {("new", alice.id): b"y"}
        await alice.stop()
        await alice.start(nursery)
        await bob.until_connected(alice)
        await trio.sleep(10)
        assert bob.mesh.held(SCOPE, "key") == {("new", alice.id): b"y"}
        await bob.stop()
        await bob.start(nursery, connect=False)
        assert bob.mesh.held(SCOPE, "key") == {("new", alice.id): b"y"}


async def test_a_contract_of_an_unknown_scope_is_asked_about_and_kept_if_the_scope_is_opened(
    alice, bob, autojump_clock
) -> None:
    async with together(alice, bob):
        asked: list[Record] = []

        async def consider(record: Record) -> None:
            asked.append(record)
            if record.body == b"good":
                await bob.open(alice, scope=record.scope)
            if record.body == b"bad":
                raise KeyError("a fault of the jobs")

        bob.mesh.on_unknown_scope = consider
        for scope, kind, body in ((b"1", "contract", b"bad"), (b"2", "note", b"good"), (b"3", "contract", b"good")):
            await alice.open(bob, scope=scope)
            await alice.store.write(lambda tx, s=scope, k=kind, b=body: alice.mesh.publish(tx, s, k, "", b))
        await trio.sleep(1)
        assert [record.scope for record in asked] == [b"1", b"3"]
        assert bob.mesh.find(b"3", "contract", "", alice.id) == b"good"
        assert bob.mesh.held(b"2", "note") == {}
        assert bob.connections.connected(alice.id)
        (fault,) = bob.log.faults
        assert "contract_not_considered" in fault
        bob.log.faults.clear()


async def test_a_closed_scope_leaves_nothing_behind(alice, bob, autojump_clock) -> None:
    async with together(alice, bob):
        digest = await alice.offer(LARGE)
        await bob.mesh.files.fetch(SCOPE, digest, len(LARGE), [alice.id])
        for number in range(3):
            await alice.post(bob, LARGE, bytes([number]))
            await bob.post(alice, b"small")
            await alice.publish("note", str(number), b"x")
        await bob.mesh.next_mail(SCOPE, "fit", alice.id)
        assert files(alice)
        assert files(bob)
        waiting = [bob.mesh.changed(SCOPE)]
        for one in (alice, bob):
            await one.store.write(lambda tx, one=one: one.mesh.close_scope(tx, SCOPE))
        with trio.fail_after(1):
            await waiting[0]
        await trio.sleep(100)
        assert files(alice) == 0
        assert files(bob) == 0, list(bob.folder.rglob("*"))
        for one in (alice, bob):
            for table in ("scope", "record", "evidence", "outbox", "inbox", "stream", "offer"):
                rows = await one.store.read(lambda tx, t=table: tx.all(f"SELECT * FROM mesh_{t}"))
                assert rows == [], table
        with pytest.raises(LocalProtocolError, match="not open"):
            await alice.mesh.next_mail(SCOPE, "fit", bob.id)


async def test_a_scope_is_open_for_one_audience(alice, bob, carol, autojump_clock) -> None:
    async with together(alice, bob):
        await alice.open(bob)
        with pytest.raises(LocalProtocolError, match="another audience"):
            await alice.open(bob, carol)
        with pytest.raises(LocalProtocolError, match="not for ourselves"):
            await alice.store.write(lambda tx: alice.mesh.open_scope(tx, b"x", [bob.id]))


# blobs


async def test_a_blob_is_fetched_whole_and_concurrent_calls_share_one_transfer(alice, bob, autojump_clock) -> None:
    async with together(alice, bob):
        digest, empty = await alice.offer(LARGE), await alice.offer(b"")
        paths: list[Path] = []

        async def fetch() -> None:
            paths.append(await bob.mesh.files.fetch(SCOPE, digest, len(LARGE), [alice.id]))

        before = bob.connections.traffic()[1]
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(fetch)
        assert {path.read_bytes() for path in paths} == {LARGE}
        assert bob.connections.traffic()[1] - before < 1.05 * len(LARGE)
        assert (await bob.mesh.files.fetch(SCOPE, empty, 0, [alice.id])).read_bytes() == b""
        assert (await alice.mesh.files.fetch(SCOPE, digest, len(LARGE), [alice.id])).read_bytes() == LARGE


async def test_more_blobs_than_lanes_are_fetched_at_once(alice, bob, autojump_clock) -> None:
    async with together(alice, bob):
        data = [Random(n).randbytes(200_000) for n in range(20)]
        fetched: list[bytes] = []

        async def fetch(content: bytes) -> None:
            digest = await alice.offer(content)
            fetched.append((await bob.mesh.files.fetch(SCOPE, digest, len(content), [alice.id])).read_bytes())

        async with trio.open_nursery() as nursery:
            for content in data:
                nursery.start_soon(fetch, content)
        assert sorted(fetched) == sorted(data)


async def test_a_fetch_waits_for_its_holder_until_the_scope_is_closed(alice, bob, autojump_clock) -> None:
    async with together(alice, bob) as nursery:
        digest = await alice.offer(LARGE)
        await alice.stop()
        while bob.connections.connected(alice.id):
            await bob.connections.changed.ticket.wait()
        got: list[bytes] = []

        async def fetch() -> None:
            got.append((await bob.mesh.files.fetch(SCOPE, digest, len(LARGE), [alice.id])).read_bytes())

        async def fetch_what_nobody_has() -> None:
            with pytest.raises(LocalProtocolError, match="not open"):
                await bob.mesh.files.fetch(SCOPE, bytes(32), 100, ["fp1nobody"])

        with trio.fail_after(60):
            async with trio.open_nursery() as fetching:
                fetching.start_soon(fetch_what_nobody_has)
                async with trio.open_nursery() as waiting:
                    waiting.start_soon(fetch)
                    await trio.sleep(10)
                    assert got == []
                    await alice.start(nursery)
                assert got == [LARGE]
                await bob.store.write(lambda tx: bob.mesh.close_scope(tx, SCOPE))


async def test_a_transfer_goes_on_where_it_was_after_a_cut_and_a_restart(network, alice, bob, autojump_clock) -> None:
    async with together(alice, bob) as nursery:
        digest = await alice.offer(LARGE)
        for restart in (False, True):
            await bob.until_connected(alice)
            bob.connections.sessions[alice.id].end("for the test")
            limits: list[int] = []  # for one connection; the next ones break at once

            def limit(dialler: str, _: str, limits: list[int] = limits) -> tuple[int | None, int | None]:
                most = limits.pop() if limits else 0
                return (None, most) if dialler == "bob" else (most, None)

            network.limits = limit
            part = bob.mesh.files.fetched.path_of(SCOPE, digest).with_suffix(".part")
            for _ in range(10):  # of two connections at once, the one that is given up may have had the bytes
                limits.append(220_000)
                with trio.move_on_after(70):
                    await bob.mesh.files.fetch(SCOPE, digest, len(LARGE), [alice.id])
                if part.stat().st_size >= (300_000 if restart else 100_000):
                    break
            else:
                pytest.fail("no further byte came")
            network.limits = lambda *_: (None, None)
            await bob.stop()
            await bob.start(nursery)
        path = await bob.mesh.files.fetch(SCOPE, digest, len(LARGE), [alice.id])
        assert path.read_bytes() == LARGE
        assert bob.connections.traffic()[1] < 250_000


async def test_a_fetch_waits_for_a_holder_and_takes_any(alice, bob, carol, autojump_clock) -> None:
    async with together(alice, bob, carol) as nursery:
        await alice.stop()
        digest = await carol.offer(LARGE)
        assert (await bob.mesh.files.fetch(SCOPE, digest, len(LARGE), [alice.id, carol.id])).read_bytes() == LARGE
        other = LARGE[::-1]
        results = []

        async def fetch() -> None:
            path = await bob.mesh.files.fetch(SCOPE, hash_("fp.file", other), len(other), [alice.id])
            results.append(path.read_bytes())

        nursery.start_soon(fetch)
        await trio.sleep(100)
        await alice.start(nursery)
        await bob.until_connected(alice)
        await trio.sleep(10)
        assert results == []
        await alice.offer(other)  # it was asked for before it was there
        await trio.sleep(10)
        assert results == [other]


async def test_a_withdrawn_offer_is_not_served_and_its_files_are_gone(alice, bob, autojump_clock) -> None:
    async with together(alice, bob):
        digest = await alice.offer(LARGE)
        await bob.mesh.files.fetch(SCOPE, digest, len(LARGE), [alice.id])
        for one in (alice, bob):
            await one.store.write(lambda tx, one=one: one.mesh.files.withdraw(tx, SCOPE, digest))
            assert files(one) == 0
        with trio.move_on_after(100) as patience:
            await bob.mesh.files.fetch(SCOPE, digest, len(LARGE), [alice.id])
        assert patience.cancelled_caught


async def test_what_two_scopes_offered_one_after_the_other_is_there_after_a_restart(alice, bob, autojump_clock) -> None:
    """Two jobs over the same rows have the same total: one file."""
    async with together(alice, bob) as nursery:
        await alice.offer(LARGE)
        await alice.store.write(lambda tx: alice.mesh.close_scope(tx, SCOPE))
        await alice.open(bob)
        digest = await alice.offer(LARGE)
        await alice.stop()
        await alice.start(nursery)
        path = await bob.mesh.files.fetch(SCOPE, digest, len(LARGE), [alice.id])
        assert path.read_bytes() == LARGE


async def test_a_file_that_is_fetched_is_never_one_of_ours(alice, bob, autojump_clock) -> None:
    """Who offers what we hold already learns nothing by it, and closing the scope leaves our own file."""
    async with together(alice, bob):
        mine = await bob.store.put_file(LARGE)
        digest = await alice.offer(LARGE)
        assert mine == digest
        before = bob.connections.traffic()[1]
        await bob.mesh.files.fetch(SCOPE, digest, len(LARGE), [alice.id])
        assert bob.connections.traffic()[1] - before > len(LARGE)
        await bob.store.write(lambda tx: bob.mesh.close_scope(tx, SCOPE))
        assert bob.store.path_of(mine).read_bytes() == LARGE


async def test_what_cannot_be_offered_is_refused(alice, bob, autojump_clock) -> None:
    async with together(alice, bob):
        digest = await alice.store.put_file(b"data")
        for scope, name, size in ((b"closed", digest, 4), (SCOPE, digest, 5), (SCOPE, bytes(32), 4)):
            with pytest.raises(LocalProtocolError):
                await alice.store.write(lambda tx, a=(scope, name, size): alice.mesh.files.offer(tx, *a))
        with pytest.raises(LocalProtocolError, match="at most"):
            await bob.mesh.files.fetch(SCOPE, digest, blobs.MAX_BLOB + 1, [alice.id])


# mallory: a peer of the roster and of the audience, who says what it likes


class Mallory:
    """A bare link to alice, past Hello."""

    def __init__(self, who: Organization, link: Link) -> None:
        self.who, self.link = who, link
        self.heard: list[tuple] = []

    async def serve(self) -> None:
        async def note(name, header, payload) -> None:
            self.heard.append((name, bytes(header), bytes(payload)))
            if name == WANTS:
                self.wanted(codec.decode_as(Want, payload))

        with suppress(SessionError):
            await self.link.run(note)

    def wanted(self, want: Want) -> None: ...

    def record(self, kind: str, slot: str, body: bytes, *, scope: bytes = SCOPE) -> bytes:
        return records.sign(self.who.identity.signing, Record(scope, kind, slot, self.who.id, body)).raw

    async def say(self, raw: bytes) -> None:
        await self.link.send(RECORDS, b"", raw)
        await trio.sleep(0.01)


@asynccontextmanager
async def facing(network: MemoryNetwork, alice: Organization, mallory: Organization, *others: Organization):
    alice.listen, alice.addresses = ("alice:7420",), ()
    with trio.fail_after(10_000):
        async with trio.open_nursery() as nursery:
            await alice.start(nursery)
            for one in (mallory, *others):
                await alice.connections.add_peer(one.identity.card(one.name).text)
            await alice.open(mallory, *others)
            stream = await network.host(mallory.name).connect("alice:7420")
            link = await initiate(stream, mallory.identity.dh, alice.identity.dh.public)
            face = Mallory(mallory, link)
            nursery.start_soon(face.serve)
            await link.send(HELLO, b"", codec.encode(Hello([1], bytes(8), 0)))
            await alice.until_connected(mallory)
            yield face
            nursery.cancel_scope.cancel()
    assert alice.log.faults == []


async def test_a_second_record_in_one_slot_is_kept_as_evidence_and_the_first_stays(
    network, alice, bob, autojump_clock
) -> None:
    async with facing(network, alice, bob) as mallory:
        first, second = mallory.record("vote", "1", b"yes"), mallory.record("vote", "1", b"no")
        for raw in (first, second, second, first):
            await mallory.say(raw)
        assert alice.mesh.find(SCOPE, "vote", "1", bob.id) == b"yes"
        evidence = await alice.store.read(lambda tx: tx.all("SELECT sender, first, second FROM mesh_evidence"))
        assert evidence == [(bob.id, first, second)]
        (event,) = [event for event in alice.happened if event["event"] == "equivocation"]
        assert (event["topic"], event["slot"], event["scope"]) == (f"peer:{bob.id}", "1", SCOPE.hex())
        for number in range(100):
            await mallory.say(mallory.record("vote", f"e{number}", b"yes"))
            await mallory.say(mallory.record("vote", f"e{number}", b"no"))
        (count,) = await alice.store.read(lambda tx: tx.one("SELECT COUNT(*) FROM mesh_evidence"))
        assert count == records.MAX_EVIDENCE


async def test_records_are_handed_on_as_signed_and_forged_ones_end_the_session(
    network, alice, bob, carol, autojump_clock
) -> None:
    async with facing(network, alice, bob, carol) as mallory:
        honest = records.sign(carol.identity.signing, Record(SCOPE, "vote", "1", carol.id, b"yes")).raw
        await mallory.say(honest)
        assert alice.mesh.find(SCOPE, "vote", "1", carol.id) == b"yes"
        forged = records.sign(bob.identity.signing, Record(SCOPE, "vote", "2", carol.id, b"yes")).raw
        await mallory.say(forged)
        assert alice.mesh.find(SCOPE, "vote", "2", carol.id) is None
        assert not alice.connections.connected(bob.id)
        assert "signature" in alice.connections.peer("bob").error


async def test_the_records_of_one_sender_are_capped(network, alice, bob, autojump_clock, monkeypatch) -> None:
    monkeypatch.setattr(records, "MAX_RECORDS", 5)
    async with facing(network, alice, bob) as mallory:
        for number in range(10):
            await mallory.say(mallory.record("vote", str(number), b""))
        assert len(alice.mesh.held(SCOPE, "vote")) == 5
        await alice.store.write(lambda tx: alice.mesh.discard(tx, SCOPE, "vote", "0"))
        monkeypatch.setattr(records, "MAX_BYTES", 10_000)
        await mallory.say(mallory.record("vote", "large", bytes(10_000)))
        assert len(alice.mesh.held(SCOPE, "vote")) == 4
        await mallory.say(mallory.record("vote", "small", b""))
        assert len(alice.mesh.held(SCOPE, "vote")) == 5


async def test_a_letter_too_many_or_that_belongs_elsewhere_ends_the_session(
    network, alice, bob, carol, autojump_clock
) -> None:
    def letter(place: Place, head_seq: int | None = None) -> tuple[LetterHead, bytes]:
        packed = mail.pack(place, "t", b"", [])
        return LetterHead(place.stage, place.seq if head_seq is None else head_seq, len(packed), b""), packed

    right = Place(SCOPE, "fit", bob.id, alice.id, 0)
    wrong = [
        letter(right._replace(seq=1)),
        letter(right._replace(seq=1), 0),
        letter(right._replace(sender=carol.id)),
        letter(right._replace(receiver=carol.id)),
        letter(right._replace(scope=b"other")),
        (LetterHead("fit", 0, 1 << 60, bytes(32)), b""),
        (LetterHead("fit", 0, 10, bytes(31)), b""),
        (LetterHead("fit", 0, 0, b""), letter(right)[1]),
        (LetterHead("fit", 0, 10, b""), b"\xff" * 10),
    ]
    for head, body in wrong:
        async with facing(network, alice, bob, carol) as mallory:
            await mallory.link.send(("mail", SCOPE), codec.encode(head), body)
            await trio.sleep(0.01)
            assert not alice.connections.connected(bob.id), head
            assert await alice.store.read(lambda tx: tx.all("SELECT * FROM mesh_inbox")) == []
            await alice.stop()
    async with facing(network, alice, bob, carol) as mallory:
        for _ in range(3):
            head, body = letter(right)
            await mallory.link.send(("mail", SCOPE), codec.encode(head), body)
        await trio.sleep(0.01)
        assert alice.connections.connected(bob.id)
        (count,) = await alice.store.read(lambda tx: tx.one("SELECT COUNT(*) FROM mesh_inbox"))
        assert count == 1


async def test_letters_of_too_many_stages_end_the_session(network, alice, bob, autojump_clock) -> None:
    async with facing(network, alice, bob) as mallory:
        for number in range(300):
            packed = mail.pack(Place(SCOPE, f"s{number}", bob.id, alice.id, 0), "t", b"", [])
            try:
                await mallory.link.send(
                    ("mail", SCOPE), codec.encode(LetterHead(f"s{number}", 0, len(packed), b"")), packed
                )
            except SessionError:
                break
        await trio.sleep(1)
        assert not alice.connections.connected(bob.id)
        (count,) = await alice.store.read(lambda tx: tx.one("SELECT COUNT(*) FROM mesh_inbox"))
        assert count == 256


@pytest.mark.parametrize("lie", ["other bytes", "too long"])
async def test_a_holder_that_sends_other_bytes_is_named_and_nothing_is_kept(
    network, alice, bob, autojump_clock, lie
) -> None:
    async with facing(network, alice, bob) as mallory, trio.open_nursery() as nursery:
        sizes = {"other bytes": 100, "too long": 101}

        def answer(want: Want) -> None:
            piece = bytes(sizes[lie])
            nursery.start_soon(send, want, piece)

        async def send(want: Want, piece: bytes) -> None:
            await mallory.link.send(
                ("blob", want.lane), codec.encode(Chunk(want.digest, want.offset)), piece, bulk=True
            )

        mallory.wanted = answer
        if lie == "other bytes":
            with pytest.raises(TrustError, match="bob sent another file"):
                await alice.mesh.files.fetch(SCOPE, b"d" * 32, 100, [bob.id])
        else:
            with trio.move_on_after(5):
                await alice.mesh.files.fetch(SCOPE, b"d" * 32, 100, [bob.id])
            assert "longer" in alice.connections.peer("bob").error
        assert all(path.stat().st_size == 0 for path in (alice.folder / "fetched").rglob("*.part"))
        assert list((alice.folder / "fetched").rglob("6464*")) == list((alice.folder / "fetched").rglob("*.part"))


async def test_only_what_is_offered_is_served(network, alice, bob, carol, autojump_clock) -> None:
    async with facing(network, alice, bob, carol) as mallory:
        secret = await alice.store.put_file(b"a snapshot")
        other = bytes(32)
        await alice.open(carol, scope=other)
        hidden = await alice.store.put_file(b"for carol")
        await alice.store.write(lambda tx: alice.mesh.files.offer(tx, other, hidden, 9))
        await alice.post(carol, LARGE)
        (letter,) = await alice.store.read(lambda tx: tx.one("SELECT digest FROM mesh_outbox"))
        shown = await alice.offer(b"for all")
        for scope, digest in ((SCOPE, secret), (other, hidden), (SCOPE, hidden), (SCOPE, letter), (SCOPE, shown)):
            await mallory.link.send(WANTS, b"", codec.encode(Want(0, scope, digest, 0, 9, "")))
            await trio.sleep(1)
        answers = [(codec.decode_as(Chunk, h).offset, p) for name, h, p in mallory.heard if name == ("blob", 0)]
        assert answers == [(-1, b"")] * 4 + [(0, b"for all")]


async def test_no_more_files_are_asked_for_at_once_than_can_flow(network, alice, bob, autojump_clock) -> None:
    async with facing(network, alice, bob) as mallory, trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(alice.mesh.files.fetch, SCOPE, bytes([number]) * 32, 100, [bob.id])
        await trio.sleep(5)
        assert len([name for name, _, _ in mallory.heard if name == WANTS]) == BULK_CHANNELS
        nursery.cancel_scope.cancel()


async def test_a_session_outlives_more_scopes_than_may_be_open(alice, bob, autojump_clock, monkeypatch) -> None:
    monkeypatch.setattr(sessions, "MAX_READY", 3)
    async with together(alice, bob):
        session = alice.connections.sessions[bob.id]
        for number in range(10):
            scope = bytes([number])
            for one, other in ((alice, bob), (bob, alice)):
                await one.open(other, scope=scope)
            await trio.sleep(1)
            for one in (alice, bob):
                await one.store.write(lambda tx, one=one, scope=scope: one.mesh.close_scope(tx, scope))
        await trio.sleep(1)
        assert alice.connections.sessions.get(bob.id) is session, alice.connections.peer("bob").error


async def test_repeated_lists_of_digests_do_not_make_memory_grow(network, alice, bob, autojump_clock) -> None:
    async with facing(network, alice, bob) as mallory:
        for number in range(50):
            await alice.publish("note", str(number), bytes(1000))
        session = alice.connections.sessions[bob.id]
        for _ in range(100):
            await mallory.link.send(SYNC, b"", codec.encode(Sync(SCOPE, b"", [], b"", True)))
            await trio.sleep(0.01)
            assert len(session._to_say) <= 51
