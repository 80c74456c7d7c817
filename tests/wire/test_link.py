"""Two links over a stream in memory, with a clock that jumps."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from fedpeer.crypto import DhKey
from fedpeer.errors import SessionError
from fedpeer.testing.network import MemoryNetwork
from fedpeer.wire import service
from fedpeer.wire.service import Link


async def linked(network: MemoryNetwork) -> tuple[Link, Link]:
    """alice (who dialled) and bob, with a session."""
    alice, bob = DhKey.random(), DhKey.random()
    listener = await network.host("bob").listen("bob:0")
    ends: list[Link] = []

    async def accept() -> None:
        stream, _ = await listener.accept()
        ends.append(await service.respond(stream, bob, lambda key: key == alice.public))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        stream = await network.host("alice").connect(listener.address)
        dialler = await service.initiate(stream, alice, bob.public)
    await listener.aclose()
    assert dialler.handshake_hash == ends[0].handshake_hash
    return dialler, ends[0]


class Inbox:
    """Everything that came, in the order it came."""

    def __init__(self) -> None:
        self.messages: list[tuple[object, bytes, bytes]] = []
        self.arrived = trio.Condition()

    async def __call__(self, name: object, header: bytes, payload: memoryview) -> None:
        self.messages.append((name, header, bytes(payload)))
        async with self.arrived:
            self.arrived.notify_all()

    async def until(self, count: int) -> None:
        async with self.arrived:
            while len(self.messages) < count:
                await self.arrived.wait()


@asynccontextmanager
async def running(*links: tuple[Link, service.OnMessage]) -> AsyncIterator[dict[Link, SessionError]]:
    """The links serve in the background; how they ended is in the dictionary afterwards."""
    ended: dict[Link, SessionError] = {}

    async def run(link: Link, handler: service.OnMessage) -> None:
        try:
            await link.run(handler)
        except SessionError as error:
            ended[link] = error

    async with trio.open_nursery() as nursery:
        for link, handler in links:
            nursery.start_soon(run, link, handler)
        yield ended
        for link, _ in links:
            await link.aclose()


async def test_messages_arrive_whole_and_in_order(autojump_clock: trio.abc.Clock) -> None:
    alice, bob = await linked(MemoryNetwork())
    inbox = Inbox()
    sent = [(("mail", b"contract", n % 3), bytes([n]), bytes([n]) * (n * 997)) for n in range(65)]
    async with running((alice, Inbox()), (bob, inbox)):
        for name, header, payload in sent:
            await alice.send(name, header, payload, bulk=name[2] == 2)
        await inbox.until(len(sent))
        assert await alice.ping() >= 0
        assert await bob.ping() >= 0
    for channel in range(3):
        assert [m for m in inbox.messages if m[0][2] == channel] == [m for m in sent if m[0][2] == channel]


async def test_a_session_that_ended_says_so_to_everyone(autojump_clock: trio.abc.Clock) -> None:
    alice, bob = await linked(MemoryNetwork())
    async with running((alice, Inbox()), (bob, Inbox())) as ended:
        await bob.aclose()
        await trio.sleep(1)
        with pytest.raises(SessionError):
            await alice.send(("records",), b"", b"x")
        with pytest.raises(SessionError):
            await alice.ping()
    assert "ended the session" in ended[alice].message
    assert "ended here" in ended[bob].message
