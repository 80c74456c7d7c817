"""Real TCP on loopback, and addresses."""

from __future__ import annotations

import os
import resource
import socket
from contextlib import suppress

import pytest
import trio

from fedpeer.crypto import DhKey
from fedpeer.errors import ConfigError, SessionError
from fedpeer.network import TcpNetwork, format_address, parse_address
from fedpeer.wire import service
from fedpeer.wire.constants import MAX_PAYLOAD


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:7420", "127.0.0.1", 7420),
        ("tcp://0.0.0.0:7420", "0.0.0.0", 7420),
        ("hospital-a.example:1", "hospital-a.example", 1),
        ("[::1]:7420", "::1", 7420),
        ("tcp://[::]:0", "::", 0),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    assert parse_address(text) == (host, port)
    assert parse_address(format_address(host, port)) == (host, port)


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":7420", "host:x", "host:65536", "::1:7420", "host:٣", "host:-1"]
)
def test_what_is_no_address_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="not an address") as error:
        parse_address(text)
    assert "host:port" in error.value.hint


async def test_a_port_in_use_is_named() -> None:
    listener = await TcpNetwork().listen("127.0.0.1:0")
    port = parse_address(listener.address)[1]
    with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is in use"):
        await TcpNetwork().listen(listener.address)
    await listener.aclose()
    again = await TcpNetwork().listen(f"127.0.0.1:{port}")
    await again.aclose()
    with pytest.raises(ConfigError, match="cannot listen"):
        await TcpNetwork().listen("198.51.100.1:7420")  # not an address of this machine (documentation range)
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()


async def test_nobody_there_is_an_oserror() -> None:
    listener = await TcpNetwork().listen("127.0.0.1:0")
    await listener.aclose()
    with pytest.raises(OSError):
        await TcpNetwork().connect(listener.address)


async def test_a_stream_has_the_options_that_let_control_go_first() -> None:
    listener = await TcpNetwork().listen("127.0.0.1:0")
    dialled = await TcpNetwork().connect(listener.address)
    accepted, source = await listener.accept()
    assert source == "127.0.0.1"
    for stream in (dialled, accepted):
        assert isinstance(stream, trio.SocketStream)
        assert stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 128 * 1024
        await stream.aclose()
    await listener.aclose()


async def test_accept_goes_on_after_connections_that_are_gone_and_when_descriptors_ran_out() -> None:
    listener = await TcpNetwork().listen("127.0.0.1:0")
    gone = await TcpNetwork().connect(listener.address)
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # a reset, not an end
    await gone.aclose()
    waiting = await TcpNetwork().connect(listener.address)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    accepted: list[trio.abc.Stream] = []

    async def accept() -> None:
        while len(accepted) < 2:
            accepted.append((await listener.accept())[0])

    fullest = max(int(name) for name in os.listdir("/proc/self/fd")) + 1  # noqa: PTH208
    taken: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (fullest + 1, hard))
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(accept)
                await trio.sleep(0.2)
                assert not accepted
                for descriptor in taken:
                    os.close(descriptor)
                taken.clear()
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                second = await TcpNetwork().connect(listener.address)
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for stream in (*accepted, waiting, second):
        await trio.aclose_forcefully(stream)
    await listener.aclose()


async def test_links_over_tcp_carry_bulk_both_ways_and_count_their_bytes() -> None:
    alice, bob = DhKey.random(), DhKey.random()
    listener = await TcpNetwork().listen("127.0.0.1:0")
    links: list[service.Link] = []
    received = [0, 0]
    total = 24 << 20
    finished = [trio.Event(), trio.Event()]

    async def serve(index: int, link: service.Link) -> None:
        async def on_message(_name: service.Name, _header: bytes, payload: memoryview) -> None:
            received[index] += len(payload)
            if received[index] >= total:
                finished[index].set()

        with pytest.raises(SessionError):
            await link.run(on_message)

    async def push(link: service.Link) -> None:
        chunk = os.urandom(MAX_PAYLOAD)
        for _ in range(-(-total // MAX_PAYLOAD)):
            await link.send(("blob", 1), b"", chunk, bulk=True)

    async def accept() -> None:
        stream, _ = await listener.accept()
        links.append(await service.respond(stream, bob, lambda key: key == alice.public))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        links.append(await service.initiate(await TcpNetwork().connect(listener.address), alice, bob.public))
    async with trio.open_nursery() as nursery:
        for index, link in enumerate(links):
            nursery.start_soon(serve, index, link)
            nursery.start_soon(push, link)
        for event in finished:
            await event.wait()
        assert await links[0].ping() < 5
        assert await links[1].ping() < 5
        one, two = links
        assert one.bytes_sent == two.bytes_received
        assert two.bytes_sent == one.bytes_received
        assert total < one.bytes_sent < total * 1.002 + 2 * MAX_PAYLOAD
        await one.aclose()
    await listener.aclose()
