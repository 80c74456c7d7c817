"""Two meshes over real TCP, each with a real thread for its store."""

from __future__ import annotations

import socket
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random

import pytest
import trio
from mesh_cast import SCOPE, Organization

from fedpeer.errors import ConfigError
from fedpeer.network import TcpNetwork
from fedpeer.store import RunInThread


def one_thread() -> RunInThread:
    return partial(trio.to_thread.run_sync, limiter=trio.CapacityLimiter(1))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


async def test_letters_records_and_blobs_over_tcp_with_a_restart(tmp_path: Path) -> None:
    alice, bob = (
        Organization(name, tmp_path, TcpNetwork(), f"127.0.0.1:{free_port()}", None) for name in ("alice", "bob")
    )
    large = Random(1).randbytes(3_000_000)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for one in (alice, bob):
                await one.start(nursery, run_in_thread=one_thread())
                assert one.connections.listening == list(one.addresses)
            for one, other in ((alice, bob), (bob, alice)):
                await one.connections.add_peer(other.card.text)
                await one.open(other)
            for one, other in ((alice, bob), (bob, alice)):
                await one.until_connected(other)
                await one.post(other, b"small")
                await one.post(other, large, b"second part")
                await one.publish("note", "0", b"x")
            digest = await alice.offer(large)
            assert (await bob.mesh.files.fetch(SCOPE, digest, len(large), [alice.id])).read_bytes() == large
            await bob.stop()
            await bob.start(nursery, run_in_thread=one_thread())
            for one, other in ((alice, bob), (bob, alice)):
                assert await one.receive(other) == [b"small"]
                assert await one.receive(other) == [large, b"second part"]
                assert await one.until_held("note", "0", other) == b"x"
            await alice.until_connected(bob)
            assert await alice.connections.ping("bob") < 5
            nursery.cancel_scope.cancel()
    assert alice.log.faults == bob.log.faults == []


async def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        alice = Organization("alice", tmp_path, TcpNetwork(), address)
        async with trio.open_nursery() as nursery:
            with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match="is in use")):
                await alice.start(nursery)


async def test_a_dial_that_is_refused_is_explained(tmp_path: Path) -> None:
    alice, bob = (Organization(name, tmp_path, TcpNetwork(), f"127.0.0.1:{free_port()}") for name in ("alice", "bob"))
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await alice.start(nursery)
            await alice.connections.add_peer(bob.card.text)
            while alice.connections.peer("bob").error == "not dialled yet":
                await trio.sleep(0.01)
            assert alice.connections.peer("bob").error == f"{bob.addresses[0]}: connection refused"
            nursery.cancel_scope.cancel()


async def test_strangers_who_say_nothing_are_ended_after_five_seconds_and_keep_nobody_out(tmp_path: Path) -> None:
    alice, bob = (Organization(name, tmp_path, TcpNetwork(), f"127.0.0.1:{free_port()}") for name in ("alice", "bob"))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for one in (alice, bob):
                await one.start(nursery)
            host, port = alice.addresses[0].split(":")
            silent = [await trio.open_tcp_stream(host, int(port)) for _ in range(30)]
            for one, other in ((alice, bob), (bob, alice)):
                await one.connections.add_peer(other.card.text)
            await alice.until_connected(bob)
            with trio.fail_after(10):
                for stream in silent:
                    with suppress(trio.BrokenResourceError):
                        assert await stream.receive_some() == b""
                    await stream.aclose()
            assert alice.connections.door.refused["source"] >= 1
            assert alice.connections.connected(bob.id)
            nursery.cancel_scope.cancel()
