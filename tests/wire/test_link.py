"""Two links over a stream in memory, with a clock that jumps."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from random import Random

import pytest
import trio
import trio.testing

from fedpeer.crypto import DhKey
from fedpeer.errors import RemoteProtocolError, SessionError, StoreError
from fedpeer.testing.network import MemoryNetwork
from fedpeer.wire import service
from fedpeer.wire.constants import MAX_PAYLOAD
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
    assert "closed the connection" in ended[alice].message
    assert "ended here" in ended[bob].message


async def test_one_channel_is_handled_in_order_and_channels_do_not_wait_for_each_other(
    autojump_clock: trio.abc.Clock,
) -> None:
    alice, bob = await linked(MemoryNetwork())
    log: list[tuple[object, str]] = []
    done = trio.Event()

    async def slow(name: service.Name, header: bytes, _payload: memoryview) -> None:
        log.append(((*name, header), "begun"))
        await trio.sleep(10 if name == ("slow",) else 1)
        log.append(((*name, header), "ended"))
        if len(log) == 12:
            done.set()

    async with running((alice, Inbox()), (bob, slow)):
        for n in range(2):
            await alice.send(("slow",), bytes([n]))
        for n in range(4):
            await alice.send(("quick",), bytes([n]))
        await done.wait()
    for name in ("slow", "quick"):
        mine = [(key[1], what) for key, what in log if key[0] == name]  # type: ignore[index]
        assert mine == [(bytes([n]), what) for n in range(len(mine) // 2) for what in ("begun", "ended")]
    assert log.index((("quick", b"\x03"), "ended")) < log.index((("slow", b"\x00"), "ended"))


async def test_a_sender_waits_for_credit_and_goes_on_when_the_receiver_does(autojump_clock: trio.abc.Clock) -> None:
    alice, bob = await linked(MemoryNetwork())
    gate = trio.Event()
    handled = 0
    sent = 0

    async def hold(_name: service.Name, _header: bytes, _payload: memoryview) -> None:
        nonlocal handled
        await gate.wait()
        handled += 1

    async def send() -> None:
        nonlocal sent
        for _ in range(100):
            await alice.send(("blob", 1), b"", bytes(MAX_PAYLOAD), bulk=True)
            sent += 1

    async with running((alice, Inbox()), (bob, hold)):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.sleep(100)
            assert 31 <= sent <= 33
            assert await alice.ping() < 1  # the session itself is not held up
            gate.set()
        while handled < 100:
            await trio.sleep(0.1)


async def test_more_names_than_numbers_at_once_all_arrive(autojump_clock: trio.abc.Clock) -> None:
    alice, bob = await linked(MemoryNetwork())
    came: set[object] = set()

    async def slowly(name: service.Name, header: bytes, _payload: memoryview) -> None:
        await trio.sleep(0.5)
        came.add((name, header))

    async def send(number: int) -> None:
        for n in range(3):
            await alice.send(("mail", number), bytes([n]), bulk=number % 2 == 0)

    async with running((alice, Inbox()), (bob, slowly)):
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(send, number)
        while len(came) < 300:
            await trio.sleep(1)


async def test_control_overtakes_bulk_on_a_slow_stream(autojump_clock: trio.abc.Clock) -> None:
    """A stream that takes 64 KiB in 0.1 s: after 20 bulk frames were queued, control waits for what was sealed only."""
    alice, bob = await linked(MemoryNetwork())
    raw = alice._stream.stream
    send_all = raw.send_all

    async def slow_send_all(data: memoryview) -> None:
        await trio.sleep(len(data) / 655_360)
        await send_all(data)

    raw.send_all = slow_send_all  # type: ignore[method-assign,assignment]
    inbox = Inbox()
    async with running((alice, Inbox()), (bob, inbox)):
        for _ in range(20):
            await alice.send(("blob", 1), b"", bytes(MAX_PAYLOAD), bulk=True)
        await trio.sleep(0.35)
        sealed = 20 - len(alice._session._bulk)
        await alice.send(("records",), b"urgent")
        await inbox.until(21)
    position = [name for name, _, _ in inbox.messages].index(("records",))
    assert 2 <= sealed <= 4
    assert position <= sealed + 2  # the handlers of two channels run in any order


async def test_a_silent_peer_is_declared_dead(autojump_clock: trio.abc.Clock) -> None:
    network = MemoryNetwork()
    alice, bob = await linked(network)
    async with running((alice, Inbox()), (bob, Inbox())) as ended:
        await trio.sleep(1000)  # idle sessions live
        assert not ended
        begun = trio.current_time()
        network.cut("alice", "bob", silent=True)
        with pytest.raises(SessionError):
            await alice.ping()
        assert trio.current_time() - begun <= 31
        await trio.sleep(31)
        assert "silent" in ended[alice].message
        assert "silent" in ended[bob].message


async def test_a_peer_that_takes_nothing_is_declared_dead(autojump_clock: trio.abc.Clock) -> None:
    alice, bob = await linked(MemoryNetwork())
    never = trio.Event()

    async def not_reading(*_: object) -> None:
        await never.wait()

    async def talk_only() -> None:  # bob does not read, but is not silent
        with suppress(SessionError):
            for n in range(100):
                bob._session.send(("still", "here"), bytes([n]), b"", bulk=False)
                await bob._stream.send_all(bob._session.data_to_send(trio.current_time()))
                await trio.sleep(5)

    async with running((alice, not_reading)) as ended, trio.open_nursery() as nursery:
        nursery.start_soon(talk_only)
        for _ in range(20):
            await alice.send(("blob", 1), b"", bytes(MAX_PAYLOAD), bulk=True)
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert "took nothing" in ended[alice].message


async def test_the_error_of_a_handler_ends_the_session_and_is_raised_by_run(autojump_clock: trio.abc.Clock) -> None:
    for raised, expected in (
        (RemoteProtocolError("no hello"), SessionError),
        (StoreError("disk full"), StoreError),
        (KeyError("bug"), SessionError),
        (OSError("no space left on device"), SessionError),
    ):
        alice, bob = await linked(MemoryNetwork())

        async def fail(*_: object, raised: Exception = raised) -> None:
            raise raised

        async with trio.open_nursery() as nursery:
            nursery.start_soon(alice.send, ("records",), b"", b"x")

            async def serve(link: Link = alice) -> None:
                with pytest.raises(SessionError):
                    await link.run(Inbox())

            nursery.start_soon(serve)
            with pytest.raises(expected) as caught:
                await bob.run(fail)
        assert caught.value is raised or caught.value.__cause__ is raised
        assert "lost" not in caught.value.message


async def test_who_waits_for_credit_learns_that_the_session_ended(autojump_clock: trio.abc.Clock) -> None:
    alice, bob = await linked(MemoryNetwork())

    told: list[str] = []

    async def fill() -> None:
        try:
            while True:
                await alice.send(("blob", 1), b"", bytes(MAX_PAYLOAD), bulk=True)
        except SessionError as error:
            told.append(error.message)

    async with running((alice, Inbox())), trio.open_nursery() as nursery:
        nursery.start_soon(fill)
        await trio.testing.wait_all_tasks_blocked()
        assert not told
        await alice.aclose()
    assert told == ["the session was ended here"]
    await bob.aclose()


async def test_cancelling_run_closes_the_stream_and_wakes_whoever_waits(autojump_clock: trio.abc.Clock) -> None:
    alice, bob = await linked(MemoryNetwork())
    with trio.move_on_after(1) as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(alice.run, Inbox())
    assert scope.cancelled_caught
    with pytest.raises(SessionError):
        await alice.send(("records",), b"")
    with pytest.raises(SessionError, match=r"closed the connection|lost"):
        await bob.run(Inbox())


async def test_a_cut_at_any_byte_ends_both_sides_with_what_came_being_a_beginning(seed: int) -> None:
    random = Random(seed)
    sent = [(("records",), bytes([n]), random.randbytes(random.choice([0, 10, 5000]))) for n in range(12)]
    cuts = 0
    for _ in range(60):
        network = MemoryNetwork(random=random)
        position = random.randrange(135, 22_000)
        network.limits = lambda _from, _to, p=position: (p, None)  # type: ignore[misc]
        alice, bob = await linked(network)
        inbox = Inbox()

        async def send(link: Link = alice) -> None:
            try:
                for name, header, payload in sent:
                    await link.send(name, header, payload)
                while True:
                    await link.ping()
            except SessionError:
                pass

        with trio.fail_after(5):
            async with running((alice, Inbox()), (bob, inbox)) as ended:
                await send()
                while len(ended) < 2:
                    await trio.lowlevel.checkpoint()
        assert inbox.messages == sent[: len(inbox.messages)]
        cuts += network.broken
    assert cuts == 60
