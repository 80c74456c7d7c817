"""What a peer says of its datasets when a partner asks: only then, only to the roster, one answer to each question."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from mesh_cast import Organization, homes, introduce

from fedpeer import codec
from fedpeer.crypto import Secret
from fedpeer.data.offers import Offer, Offers
from fedpeer.errors import HandshakeError, NotFound, SessionError
from fedpeer.identity import Identity
from fedpeer.mesh.messages import DATASETS
from fedpeer.mesh.session import service as session
from fedpeer.testing.network import MemoryNetwork
from fedpeer.wire.service import initiate

OFFERED = Offers([Offer("loans", 1200, "id", None, [("age", "number")], 0)], 0)


@pytest.fixture
def home() -> Iterator[Path]:
    with homes() as folder:
        yield folder


@pytest.fixture
def pair(home: Path) -> tuple[Organization, Organization]:
    network = MemoryNetwork()
    alice, bob = (Organization(name, home, network.host(name), f"{name}:7420") for name in ("alice", "bob"))
    return alice, bob


class Told:
    """What bob says, and how often he was asked."""

    def __init__(self, offers: Offers = OFFERED) -> None:
        self.offers, self.asked = offers, 0

    async def __call__(self) -> Offers:
        self.asked += 1
        return self.offers


async def meet(nursery: trio.Nursery, alice: Organization, bob: Organization, told: Told) -> None:
    await alice.start(nursery)
    (await bob.start(nursery, connect=False)).offers = told
    await bob.connect(nursery)
    await introduce(alice, bob)
    await alice.until_connected(bob)
    await bob.until_connected(alice)


async def test_a_peer_says_what_it_offers_when_it_is_asked(pair, autojump_clock) -> None:
    alice, bob = pair
    told = Told()
    async with trio.open_nursery() as nursery:
        await meet(nursery, alice, bob, told)
        await trio.sleep(60)
        assert told.asked == 0, "nothing is told unasked"
        assert await alice.mesh.datasets_of("bob") == OFFERED
        told.offers = Offers([], 0)
        assert await alice.mesh.datasets_of("bob") == Offers([], 0)
        assert await bob.mesh.datasets_of("alice") == Offers([], 0), "who set nothing up offers nothing"
        with pytest.raises(NotFound):
            await alice.mesh.datasets_of("carol")
        with pytest.raises(NotFound):
            await alice.mesh.datasets_of("alice")
        nursery.cancel_scope.cancel()
    assert alice.log.faults == bob.log.faults == []


async def test_many_who_ask_at_once_are_one_question(pair, autojump_clock) -> None:
    alice, bob = pair
    told = Told()

    async def slow() -> Offers:
        await trio.sleep(3)
        return await told()

    async with trio.open_nursery() as nursery:
        await meet(nursery, alice, bob, told)
        bob.mesh.offers = slow
        async with trio.open_nursery() as askers:
            for _ in range(3):
                askers.start_soon(alice.mesh.datasets_of, "bob")
                await trio.sleep(1)
        await trio.sleep(10)
        assert told.asked == 1
        nursery.cancel_scope.cancel()


async def test_a_flood_of_questions_is_answered_no_faster_than_answers_leave(pair, autojump_clock) -> None:
    alice, bob = pair
    told = Told()
    async with trio.open_nursery() as nursery:
        await meet(nursery, alice, bob, told)
        there = bob.connections.sessions[alice.id]
        for _ in range(1000):
            there._datasets_came(memoryview(b""))
        assert len(there._to_say) <= 1
        nursery.cancel_scope.cancel()


async def test_an_answer_that_nobody_asked_for_or_that_is_none_ends_the_session(pair, autojump_clock) -> None:
    alice, bob = pair
    async with trio.open_nursery() as nursery:
        await meet(nursery, alice, bob, Told(Offers([Offer("loans", 1234, None, None, [], 0)], 0)))
        await bob.connections.sessions[alice.id].link.send(DATASETS, b"", codec.encode(OFFERED))
        while alice.connections.connected(bob.id):
            await alice.connections.changed.ticket.wait()
        assert "no question" in alice.connections.peer("bob").error
        await alice.until_connected(bob)
        with pytest.raises(SessionError, match="not rounded"):
            await alice.mesh.datasets_of("bob")
        nursery.cancel_scope.cancel()
    assert alice.log.faults == bob.log.faults == []


async def test_who_does_not_answer_or_is_not_there_is_named(pair, autojump_clock) -> None:
    alice, bob = pair
    async with trio.open_nursery() as nursery:
        told = Told()
        await meet(nursery, alice, bob, told)

        async def silent() -> Offers:
            await trio.sleep(3 * session.ANSWER_S)
            return OFFERED

        bob.mesh.offers = silent
        with pytest.raises(SessionError, match="bob: no answer within 10 seconds"):
            await alice.mesh.datasets_of("bob")
        await bob.stop()
        with pytest.raises(SessionError, match="bob"):
            await alice.mesh.datasets_of("bob")
        nursery.cancel_scope.cancel()


async def test_who_waits_for_an_answer_learns_that_the_session_is_over(pair, autojump_clock) -> None:
    alice, bob = pair
    async with trio.open_nursery() as nursery:
        await meet(nursery, alice, bob, Told())

        async def cut() -> None:
            alice.connections.sessions[bob.id].end("cut")

        nursery.start_soon(cut)
        asked_at = trio.current_time()
        with pytest.raises(SessionError, match="bob: cut"):
            await alice.mesh.datasets_of("bob")
        assert trio.current_time() - asked_at < session.ANSWER_S
        nursery.cancel_scope.cancel()


async def test_a_stranger_is_told_nothing(pair, autojump_clock) -> None:
    alice, bob = pair
    told = Told()
    async with trio.open_nursery() as nursery:
        await meet(nursery, alice, bob, told)
        stranger = Identity(Secret(b"s" * 32))
        stream = await alice.network.connect("bob:7420")
        with pytest.raises(HandshakeError):
            await initiate(stream, stranger.dh, bob.card.body.dh)
        await bob.connections.remove_peer("alice")
        await trio.sleep(1)
        with pytest.raises(SessionError):
            await alice.mesh.datasets_of("bob")
        assert told.asked == 0
        nursery.cancel_scope.cancel()
