"""Records, mail and blobs between meshes on a network in memory, without faults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import trio
from mesh_cast import SCOPE, Organization, homes, introduce

from fedpeer.errors import LocalProtocolError
from fedpeer.testing.network import MemoryNetwork


@pytest.fixture
def home() -> Iterator[Path]:
    with homes() as folder:
        yield folder


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork()


def cast(home: Path, network: MemoryNetwork, *names: str) -> list[Organization]:
    return [Organization(name, home, network.host(name), f"{name}:7420") for name in names]


async def test_a_letter_of_any_size_arrives_once_and_in_order(home, network, autojump_clock) -> None:
    alice, bob = cast(home, network, "alice", "bob")
    random = Random(1)
    letters = [random.randbytes(size) for size in (0, 1, 32_000, 33_000, 300_000, 5)]
    async with trio.open_nursery() as nursery:
        for one in (alice, bob):
            await one.start(nursery)
        await introduce(alice, bob)
        await alice.open(bob)
        assert [await alice.post(bob, letter) for letter in letters] == list(range(6))
        await bob.open(alice)
        with trio.fail_after(60):
            assert [b"".join(await bob.receive(alice)) for _ in letters] == letters
        nursery.cancel_scope.cancel()
