"""The network in memory: it behaves as a stream should, and breaks where it is told to."""

from __future__ import annotations

from contextlib import suppress
from random import Random

import pytest
import trio
import trio.testing

from fedpeer.errors import ConfigError
from fedpeer.testing.network import BUFFER, MemoryNetwork, MemoryStream


async def connected(network: MemoryNetwork) -> tuple[MemoryStream, MemoryStream]:
    listener = await network.host("bob").listen("bob:7420")
    dialled = await network.host("alice").connect("tcp://bob:7420")
    accepted, source = await listener.accept()
    assert source == "alice"
    assert isinstance(accepted, MemoryStream)
    await listener.aclose()
    return dialled, accepted


async def test_it_is_a_stream_as_trio_wants_it() -> None:
    async def make() -> tuple[MemoryStream, MemoryStream]:
        return await connected(MemoryNetwork())

    async def clogged() -> tuple[MemoryStream, MemoryStream]:
        pair = await make()
        await pair[0].send_all(bytes(BUFFER))
        await pair[1].send_all(bytes(BUFFER))
        return pair

    await trio.testing.check_half_closeable_stream(make, clogged)


async def test_a_name_that_is_not_listening_refuses_and_a_port_in_use_is_named() -> None:
    network = MemoryNetwork()
    with pytest.raises(OSError):
        await network.host("alice").connect("bob:7420")
    listener = await network.host("bob").listen("tcp://bob:0")
    assert listener.address == "bob:40000"
    with pytest.raises(ConfigError, match="in use"):
        await network.host("bob").listen("bob:40000")
    await listener.aclose()
    await network.host("bob").listen("bob:40000")


async def test_a_cut_breaks_what_is_open_and_refuses_what_is_new_until_it_is_healed() -> None:
    network = MemoryNetwork()
    dialled, accepted = await connected(network)
    await dialled.send_all(b"under way")
    network.cut("bob", "alice")
    for stream in (dialled, accepted):
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x")
    await network.host("bob").listen("bob:7420")
    with pytest.raises(OSError):
        await network.host("alice").connect("bob:7420")
    network.heal("alice", "bob")
    await network.host("alice").connect("bob:7420")
    assert (network.connections, network.broken) == (2, 1)


async def test_a_silent_cut_swallows_bytes_and_connections(autojump_clock: trio.abc.Clock) -> None:
    network = MemoryNetwork()
    dialled, accepted = await connected(network)
    network.cut("alice", "bob", silent=True)
    await dialled.send_all(bytes(10 * BUFFER))
    with trio.move_on_after(1000) as patience:
        await accepted.receive_some()
    assert patience.cancelled_caught
    begun = trio.current_time()
    with pytest.raises(OSError, match="timed out"):
        await network.host("alice").connect("bob:7420")
    assert trio.current_time() > begun


async def test_a_limit_breaks_the_connection_at_that_byte(seed: int) -> None:
    random = Random(seed)
    for _ in range(200):
        network = MemoryNetwork(random=random)
        limit = random.randrange(300)
        backwards = random.random() < 0.5
        network.limits = lambda _f, _t, n=limit, back=backwards: (None, n) if back else (n, None)  # type: ignore[misc]
        dialled, accepted = await connected(network)
        sender, receiver = (accepted, dialled) if backwards else (dialled, accepted)
        data = random.randbytes(300)
        await receiver.send_all(b"lost")
        with suppress(trio.BrokenResourceError):
            for n in range(0, 300, 10):
                await sender.send_all(data[n : n + 10])
        came = b""
        with suppress(trio.BrokenResourceError):
            while True:
                came += await receiver.receive_some()
        assert came == data[:limit]
        with pytest.raises(trio.BrokenResourceError):
            await sender.send_all(b"more")
        with pytest.raises(trio.BrokenResourceError):
            await sender.receive_some()
        assert network.broken == 1


async def test_parts_of_random_size_are_the_same_bytes_in_order(seed: int) -> None:
    dialled, accepted = await connected(MemoryNetwork(random=Random(seed)))
    data = Random(seed).randbytes(5000)
    await dialled.send_all(data)
    await dialled.send_eof()
    parts = []
    while part := await accepted.receive_some():
        parts.append(part)
    assert b"".join(parts) == data
    assert min(map(len, parts)) < 100 < max(map(len, parts))
