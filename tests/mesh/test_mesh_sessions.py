"""Who is connected with whom: both rosters, dialling, settling, strangers, and what the operator reads."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from mesh_cast import Organization, homes, introduce

from fedpeer import codec
from fedpeer.errors import (
    Ambiguous,
    CardError,
    ConfigError,
    HandshakeError,
    NotFound,
    SessionError,
    StoreError,
    TrustError,
)
from fedpeer.mesh import records
from fedpeer.mesh.messages import HELLO, RECORDS, Hello
from fedpeer.testing.network import MemoryNetwork
from fedpeer.wire.service import Link, initiate


@pytest.fixture
def home() -> Iterator[Path]:
    with homes() as folder:
        yield folder


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork()


@asynccontextmanager
async def running(*organizations: Organization) -> AsyncIterator[trio.Nursery]:
    with trio.fail_after(100_000):
        async with trio.open_nursery() as nursery:
            for one in organizations:
                await one.start(nursery)
            yield nursery
            nursery.cancel_scope.cancel()
    for one in organizations:
        assert one.log.faults == []


def organization(home: Path, network: MemoryNetwork, name: str, *, dial_only: bool = False) -> Organization:
    return Organization(name, home, network.host(name), None if dial_only else f"{name}:7420")


def events(one: Organization) -> list[str]:
    return [str(event["event"]) for event in one.happened]


async def test_peers_who_have_added_each_other_are_connected_by_one_session(home, network, autojump_clock) -> None:
    alice, bob = (organization(home, network, name) for name in ("alice", "bob"))
    async with running(alice, bob):
        await introduce(alice, bob)
        await trio.sleep(30)
        assert alice.connections.connected(bob.id)
        assert bob.connections.connected(alice.id)
        assert len(network._open) == 1
        (view,) = alice.connections.peers()
        assert (view.name, view.connected, view.error, view.addresses) == ("bob", True, "", ["bob:7420"])
        assert view.fingerprint == bob.card.fingerprint
        assert view.since
        assert await alice.connections.ping("bob") < 5
        assert events(alice) == events(bob) == ["peer_connected"]
        assert alice.happened[0]["topic"] == f"peer:{bob.id}"
        view = alice.connections.peer("bob")
        assert alice.connections.traffic() == bob.connections.traffic()[::-1] == (view.bytes_sent, view.bytes_received)


@pytest.mark.parametrize("delays", [(0, 0), (0, 1), (1, 0)])
async def test_a_simultaneous_dial_settles_on_the_session_of_the_smaller_id(
    home, network, autojump_clock, delays
) -> None:
    alice, bob = (organization(home, network, name) for name in ("alice", "bob"))
    smaller = min(alice, bob, key=lambda one: one.id)
    async with running(alice, bob) as nursery:
        await introduce(alice, bob)
        await alice.until_connected(bob)
        await bob.until_connected(alice)

        async def dial(one: Organization, other: Organization, delay: int) -> None:
            for _ in range(delay):
                await trio.lowlevel.checkpoint()
            await one.connections._dial_once(one.connections.roster.get(other.id), f"{other.name}:7420")

        for session in (alice.connections.sessions[bob.id], bob.connections.sessions[alice.id]):
            session.end("to begin anew")
        await trio.sleep(0.01)
        assert not alice.connections.connected(bob.id)
        assert not bob.connections.connected(alice.id)
        nursery.start_soon(dial, alice, bob, delays[0])
        nursery.start_soon(dial, bob, alice, delays[1])
        await trio.sleep(0.05)  # less than the shortest pause of a dialler
        assert len(network._open) == 1
        a, b = alice.connections.sessions[bob.id], bob.connections.sessions[alice.id]
        assert a.link.handshake_hash == b.link.handshake_hash
        assert (a if smaller is alice else b).link.initiator


async def test_a_session_gives_way_to_one_with_fresh_keys_after_an_hour(home, network, autojump_clock) -> None:
    alice, bob = (organization(home, network, name) for name in ("alice", "bob"))
    async with running(alice, bob):
        await introduce(alice, bob)
        await alice.until_connected(bob)
        first = alice.connections.sessions[bob.id].link.handshake_hash
        await trio.sleep(3500)
        assert alice.connections.sessions[bob.id].link.handshake_hash == first
        await trio.sleep(200)
        assert alice.connections.sessions[bob.id].link.handshake_hash != first
        assert await alice.connections.ping("bob") < 5
        assert network.connections == 2


async def test_a_peer_without_an_address_dials_and_is_never_dialled(home, network, autojump_clock) -> None:
    alice, bob = organization(home, network, "alice", dial_only=True), organization(home, network, "bob")
    async with running(alice, bob):
        await bob.connections.add_peer(alice.card.text)
        await trio.sleep(100)
        assert bob.connections.peer("alice").error == "its card has no address: it has to dial us"
        await alice.connections.add_peer(bob.card.text)
        await bob.until_connected(alice)
        assert network.connections == 1


async def test_who_is_known_by_one_side_only_is_told_so_and_let_in_when_both_know(
    home, network, autojump_clock
) -> None:
    alice, bob = (organization(home, network, name) for name in ("alice", "bob"))
    async with running(alice, bob):
        await alice.connections.add_peer(bob.card.text)
        await trio.sleep(20)
        assert not alice.connections.connected(bob.id)
        assert "does not know our key (yet)" in alice.connections.peer("bob").error
        assert bob.happened == []
        assert bob.connections.traffic() == (0, 0)
        with pytest.raises(SessionError, match=r"bob is not connected: .*does not know our key"):
            await alice.connections.ping("bob")
        await bob.connections.add_peer(alice.card.text)
        await alice.until_connected(bob)
        assert alice.connections.peer("bob").error == ""


async def test_a_stranger_gets_not_one_byte(home, network, autojump_clock) -> None:
    alice, mallory = (organization(home, network, name) for name in ("alice", "mallory"))
    async with running(alice):
        stream = await network.host("mallory").connect("alice:7420")
        with pytest.raises(HandshakeError):
            await initiate(_Heard(stream), mallory.identity.dh, alice.identity.dh.public)
        for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(500)):
            stream = await network.host("mallory").connect("alice:7420")
            begun = trio.current_time()
            if garbage:
                await stream.send_all(garbage)
            with pytest.raises((trio.BrokenResourceError, AssertionError)):
                assert await stream.receive_some() != b""
            assert trio.current_time() - begun <= 5
            await stream.aclose()
        await trio.sleep(0.01)
        assert alice.connections.peers() == []
        assert alice.connections.door.inside == {}


class _Heard(trio.abc.Stream):
    """Fails the test when anything is received on it."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream

    async def send_all(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        data = await self.stream.receive_some(max_bytes)
        assert data == b"", "a stranger was answered"
        return data

    async def aclose(self) -> None:
        await self.stream.aclose()


async def test_a_removed_peer_is_gone_at_once_and_does_not_come_back(home, network, autojump_clock) -> None:
    alice, bob = (organization(home, network, name) for name in ("alice", "bob"))
    async with running(alice, bob) as nursery:
        await introduce(alice, bob)
        await alice.until_connected(bob)
        await bob.until_connected(alice)
        view = await alice.connections.remove_peer("bob")
        assert not view.connected
        await trio.testing.wait_all_tasks_blocked()
        assert not alice.connections.connected(bob.id)
        assert not bob.connections.connected(alice.id)
        await trio.sleep(100)
        assert not bob.connections.connected(alice.id)
        assert alice.happened[-1]["reason"] == "it was removed from the roster"
        await alice.stop()
        await alice.start(nursery)
        assert alice.connections.peers() == []


async def test_the_roster_survives_and_connects_again_after_a_restart(home, network, autojump_clock) -> None:
    alice, bob = (organization(home, network, name) for name in ("alice", "bob"))
    async with running(alice, bob) as nursery:
        await introduce(alice, bob)
        for one, other in ((alice, bob), (bob, alice)):
            await one.until_connected(other)
            await other.until_connected(one)
            await one.stop()
            with trio.fail_after(60):
                while other.connections.connected(one.id):
                    await other.connections.changed.ticket.wait()
            assert other.happened[-1]["event"] == "peer_disconnected"
            await one.start(nursery)
            with trio.fail_after(60):
                await one.until_connected(other)
                await other.until_connected(one)


async def test_a_new_session_replaces_one_that_died_unnoticed(home, network, autojump_clock) -> None:
    alice, bob = (organization(home, network, name) for name in ("alice", "bob"))
    larger, smaller = sorted((alice, bob), key=lambda one: one.id, reverse=True)
    async with running(alice, bob) as nursery:
        await introduce(alice, bob)
        await larger.until_connected(smaller)
        await smaller.until_connected(larger)
        old = smaller.connections.sessions[larger.id]
        told: list[
            tuple[str, object]
        ] = []  # of what follows from it, the mesh is told: first the end, then the new one
        lost, connected = smaller.connections.on_lost, smaller.connections.on_connected
        smaller.connections.on_lost = lambda peer: (told.append(("lost", peer)), lost(peer))[1]
        smaller.connections.on_connected = lambda session: (told.append(("new", session)), connected(session))[1]
        network.cut("alice", "bob", silent=True)
        dead = larger.connections.sessions[smaller.id].link._stream.stream
        dead.aclose = trio.lowlevel.checkpoint  # the end of it does not arrive either
        await larger.stop()
        network.heal("alice", "bob")
        await trio.sleep(0.01)
        assert smaller.connections.sessions[larger.id] is old
        await larger.start(nursery)
        with trio.fail_after(5):
            await larger.until_connected(smaller)
        await trio.testing.wait_all_tasks_blocked(0.01)
        new = smaller.connections.sessions[larger.id]
        assert new is not old
        assert told == [("lost", larger.id), ("new", new)]
        assert new.link.handshake_hash == larger.connections.sessions[smaller.id].link.handshake_hash


async def test_who_was_dialled_dials_when_the_dialler_does_not_any_more(home, network, autojump_clock) -> None:
    alice, bob = (organization(home, network, name) for name in ("alice", "bob"))
    async with running(alice, bob):
        await introduce(alice, bob)
        await alice.until_connected(bob)
        await bob.until_connected(alice)
        dialler, other = (alice, bob) if alice.connections.sessions[bob.id].link.initiator else (bob, alice)
        dialler.connections._dialling[other.id].cancel()  # and the session that it had dialled with it
        with trio.fail_after(10):
            while other.connections.connected(dialler.id):
                await other.connections.changed.ticket.wait()
            await other.until_connected(dialler)
        assert other.connections.sessions[dialler.id].link.initiator


async def test_a_half_open_handshake_does_not_disturb_the_session(home, network, autojump_clock) -> None:
    alice, bob = (organization(home, network, name) for name in ("alice", "bob"))
    async with running(alice, bob):
        await introduce(alice, bob)
        await alice.until_connected(bob)
        await bob.until_connected(alice)
        session = alice.connections.sessions[bob.id]
        stream = await network.host("bob").connect("alice:7420")
        replay = _Once(stream)
        with trio.move_on_after(1):
            await initiate(replay, bob.identity.dh, alice.identity.dh.public)
        assert replay.answered
        await trio.sleep(20)
        assert alice.connections.sessions[bob.id] is session
        assert await alice.connections.ping("bob") < 1


class _Once(_Heard):
    """Lets the first message through and nothing that comes after the answer."""

    answered = False

    async def send_all(self, data: bytes) -> None:
        if self.answered:
            await trio.sleep_forever()
        await self.stream.send_all(data)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        data = await self.stream.receive_some(max_bytes)
        self.answered = True
        return data


async def dial_as(bob: Organization, alice: Organization, network: MemoryNetwork) -> Link:
    stream = await network.host("bob").connect("alice:7420")
    return await initiate(stream, bob.identity.dh, alice.identity.dh.public)


async def ignore(*_: object) -> None: ...


async def test_nothing_is_accepted_before_hello(home, network, autojump_clock) -> None:
    alice, bob = organization(home, network, "alice"), organization(home, network, "bob", dial_only=True)
    async with running(alice, bob) as nursery:
        await alice.connections.add_peer(bob.card.text)
        asked = []

        async def note(record: object) -> None:
            asked.append(record)

        alice.mesh.on_unknown_scope = note
        link = await dial_as(bob, alice, network)
        raw = records.sign(bob.identity.signing, records.Record(b"s", "contract", "", bob.id, b"")).raw
        await link.send(RECORDS, b"", raw)
        begun = trio.current_time()
        with pytest.raises(SessionError):
            await link.run(ignore)
        assert trio.current_time() - begun == pytest.approx(5, abs=1)
        await trio.sleep(0.01)
        assert asked == []
        assert "said nothing" in alice.connections.peer("bob").error
        assert events(alice) == []
        # the same with a hello is listened to
        link = await dial_as(bob, alice, network)
        await link.send(RECORDS, b"", raw)
        await link.send(HELLO, b"", codec.encode(Hello([1], bytes(8), 0)))
        nursery.start_soon(ended, link)
        await trio.sleep(1)
        assert len(asked) == 1


async def ended(link: Link) -> None:
    with pytest.raises(SessionError):
        await link.run(ignore)


@pytest.mark.parametrize(
    ("hello", "error"),
    [
        (codec.encode(Hello([2, 3], bytes(8), 0)), "it speaks other versions"),
        (b"\x93\x91\x01", "not msgpack"),
        (codec.encode([[1], bytes(7), 0]), "not a Hello"),
    ],
)
async def test_a_hello_that_does_not_fit_ends_the_session_and_the_operator_reads_why(
    home, network, autojump_clock, hello, error
) -> None:
    alice, bob = organization(home, network, "alice"), organization(home, network, "bob", dial_only=True)
    async with running(alice):
        await alice.connections.add_peer(bob.card.text)
        link = await dial_as(bob, alice, network)
        await link.send(HELLO, b"", hello)
        with pytest.raises(SessionError):
            await link.run(ignore)
        await trio.sleep(0.01)
        assert error in alice.connections.peer("bob").error


@pytest.mark.parametrize("name", [("hello",), ("nonsense",), ("blob", "x"), ("acks",), ("wants",), ("sync",)])
async def test_whatever_a_peer_says_wrong_ends_its_session_only(home, network, autojump_clock, name) -> None:
    alice, bob = organization(home, network, "alice"), organization(home, network, "bob", dial_only=True)
    async with running(alice):
        await alice.connections.add_peer(bob.card.text)
        link = await dial_as(bob, alice, network)
        await link.send(HELLO, b"", codec.encode(Hello([1], bytes(8), 0)))
        await link.send(name, b"", codec.encode(Hello([1], bytes(8), 0)))
        with trio.fail_after(3), pytest.raises(SessionError):
            await link.run(ignore)
        await trio.sleep(0.01)
        assert "broke the protocol" in alice.connections.peer("bob").error


async def test_the_operator_reads_why_a_dial_failed(home, network, autojump_clock) -> None:
    alice, bob = (organization(home, network, name) for name in ("alice", "bob"))
    async with running(alice):
        await alice.connections.add_peer(bob.card.text)
        assert alice.connections.peer("bob").error == "not dialled yet"
        await trio.sleep(10)
        assert alice.connections.peer("bob").error == "bob:7420: connection refused"
        network.cut("alice", "bob", silent=True)
        await trio.sleep(200)
        assert alice.connections.peer("bob").error == "bob:7420: no connection within 5 seconds"


async def test_a_dial_that_fails_in_whatever_way_ends_neither_the_mesh_nor_the_dialling(
    home, network, autojump_clock
) -> None:
    alice, bob = (organization(home, network, name) for name in ("alice", "bob"))
    failures = [RuntimeError("of any kind"), UnicodeError("label too long"), ValueError("embedded null byte")]
    seen = []

    class Host:
        async def listen(self, address: str):
            return await network.host("alice").listen(address)

        async def connect(self, address: str):
            seen.append(alice.connections.peer("bob").error)
            if failures:
                raise failures.pop()
            return await network.host("alice").connect(address)

    alice.network = Host()
    bob.addresses = ()
    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            for one in (alice, bob):
                await one.start(nursery)
            await bob.connections.add_peer(alice.identity.card("alice").text)
            await alice.connections.add_peer(bob.card.text)
            await alice.until_connected(bob)
            nursery.cancel_scope.cancel()
    assert seen == [
        "not dialled yet",
        "bob:7420: embedded null byte",
        "bob:7420: label too long",
        "bob:7420: a fault here; the log has it",
    ]
    (fault,) = alice.log.faults
    assert fault.startswith("dial_failed")


async def test_dials_that_fail_are_spread_and_do_not_become_rarer_than_a_minute_and_a_half(
    home, network, autojump_clock
) -> None:
    alice, bob = (organization(home, network, name) for name in ("alice", "bob"))
    async with running(alice, bob):
        await alice.connections.add_peer(bob.card.text)
        await trio.sleep(60)
        early = network.connections
        assert 4 <= early <= 12
        await trio.sleep(6000)
        assert 60 <= network.connections - early <= 200


async def test_a_newer_card_replaces_the_older_and_is_dialled(home, network, autojump_clock) -> None:
    alice, bob = organization(home, network, "alice"), organization(home, network, "bob")
    bob.listen, old = ("bob:9000",), bob.card
    alice.addresses = alice.listen = ()
    async with running(alice, bob) as nursery:
        await bob.connections.add_peer(alice.identity.card("alice").text)
        await alice.connections.add_peer(old.text)
        await trio.sleep(100)
        assert not alice.connections.connected(bob.id)
        newer = bob.identity.card("bob", ("bob:9000",))
        assert (await alice.connections.add_peer(newer.text)).addresses == ["bob:9000"]
        assert await alice.connections.add_peer(newer.text) == alice.connections.peer("bob")
        with trio.fail_after(10):
            await alice.until_connected(bob)
        await alice.stop()
        await alice.start(nursery)
        assert alice.connections.peer("bob").addresses == ["bob:9000"]


async def test_cards_that_must_not_be_added_are_refused_by_name(home, network, autojump_clock) -> None:
    alice, bob, carol = (organization(home, network, name) for name in ("alice", "bob", "carol"))
    async with running(alice):
        await alice.connections.add_peer(bob.card.text)
        with pytest.raises(CardError, match="of this peer itself"):
            await alice.connections.add_peer(alice.card.text)
        with pytest.raises(CardError):
            await alice.connections.add_peer(carol.card.text[:-1] + ("A" if carol.card.text[-1] != "A" else "B"))
        for name in ("bob", "alice"):
            with pytest.raises(TrustError, match=f"another peer is called '{name}' here already"):
                await alice.connections.add_peer(carol.identity.card(name).text)
        assert [view.name for view in alice.connections.peers()] == ["bob"]


async def test_a_reference_is_a_name_an_id_or_a_beginning_of_one(home, network, autojump_clock) -> None:
    alice, bob, carol = (organization(home, network, name) for name in ("alice", "bob", "carol"))
    async with running(alice):
        for one in (bob, carol):
            await alice.connections.add_peer(one.card.text)
        assert (
            alice.connections.roster.resolve("bob")
            == alice.connections.roster.resolve(bob.id)
            == alice.connections.roster.resolve(bob.id[:12])
            == bob.id
        )
        assert alice.connections.roster.resolve("alice") == alice.mesh.me
        with pytest.raises(Ambiguous):
            alice.connections.roster.resolve("fp1")
        with pytest.raises(NotFound) as caught:
            alice.connections.roster.resolve("carl")
        assert "carol" in caught.value.hint
        with pytest.raises(NotFound):
            alice.connections.roster.resolve("")
        with pytest.raises(NotFound, match="is this peer itself"):
            await alice.connections.remove_peer("alice")
        assert alice.connections.roster.name_of("fp1abcdefgh") == "fp1abcde…"
        assert alice.connections.roster.name_of(carol.id) == "carol"


async def test_a_port_in_use_is_a_named_error(home, network, autojump_clock) -> None:
    alice, bob = (organization(home, network, name) for name in ("alice", "bob"))
    bob.network, bob.listen = network.host("alice"), ("alice:7420",)
    async with running(alice) as nursery:
        with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match="7420")):
            await bob.start(nursery)


async def test_an_error_of_accept_does_not_end_the_accept_loop(home, network, autojump_clock) -> None:
    alice, bob = (organization(home, network, name) for name in ("alice", "bob"))

    class Flaky:
        def __init__(self, inner) -> None:
            self.inner, self.address, self.failures = inner, inner.address, 3

        async def accept(self):
            if self.failures:
                self.failures -= 1
                raise RuntimeError("of any kind")
            return await self.inner.accept()

        async def aclose(self) -> None:
            await self.inner.aclose()

    class Host:
        async def listen(self, address: str):
            return Flaky(await network.host("alice").listen(address))

        async def connect(self, address: str):
            return await network.host("alice").connect(address)

    alice.network = Host()
    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            for one in (alice, bob):
                await one.start(nursery)
            await introduce(alice, bob)
            await bob.until_connected(alice)
            assert len(alice.log.faults) == 3
            nursery.cancel_scope.cancel()


async def test_a_store_that_fails_in_a_session_ends_the_mesh(home, network, autojump_clock, monkeypatch) -> None:
    alice, bob = organization(home, network, "alice"), organization(home, network, "bob", dial_only=True)

    async def fail(_: object) -> None:
        raise StoreError("the disk is full")

    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            await alice.start(nursery)
            await alice.connections.add_peer(bob.card.text)
            await alice.store.write(lambda tx: alice.mesh.open_scope(tx, b"s", [alice.id, bob.id]))
            link = await dial_as(bob, alice, network)
            nursery.start_soon(ended, link)
            await link.send(HELLO, b"", codec.encode(Hello([1], bytes(8), 0)))
            await alice.until_connected(bob)
            monkeypatch.setattr(alice.store, "write", fail)
            raw = records.sign(bob.identity.signing, records.Record(b"s", "note", "", bob.id, b"")).raw
            await link.send(RECORDS, b"", raw)
            await trio.sleep(10)

    with pytest.raises(BaseExceptionGroup) as caught:
        await scenario()
    assert caught.group_contains(StoreError, match="the disk is full")
