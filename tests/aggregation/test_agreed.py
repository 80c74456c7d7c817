"""Agreed values over real meshes on a network in memory: all take one, and what cannot be is refused by name."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from sums_cast import CONTRACT, Daemon, introduced, together, until

from fedpeer import codec
from fedpeer.aggregation.agreed import INLINE_BYTES, KIND, AgreedRecord, proposer
from fedpeer.errors import RemoteProtocolError
from fedpeer.testing.network import MemoryNetwork


@pytest.mark.parametrize("size", [0, 10, INLINE_BYTES, INLINE_BYTES + 1, 300_000])
@pytest.mark.parametrize("n", [2, 4])
async def test_all_take_the_value_of_one(
    size: int, n: int, home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, *["alice", "bob", "carol", "dave"][:n])
    values = {daemon.id: Random(daemon.name).randbytes(size) for daemon in daemons}
    for k in range(3):
        leader = proposer(CONTRACT, "fit", 1, k, list(values))
        agreed = await together(daemons, lambda daemon, k=k: daemon.agree(daemons, values[daemon.id], k))  # type: ignore[misc]
        assert agreed == [values[leader]] * n
        for daemon in daemons:
            daemon.open()
    for daemon in daemons:
        daemon.store.close()


def test_everybody_proposes_at_some_place() -> None:
    parties = ["a", "b", "c"]
    assert {proposer(CONTRACT, "fit", 1, k, parties) for k in range(40)} == set(parties)
    assert {proposer(CONTRACT, "fit", turn, 0, parties) for turn in range(40)} == set(parties)


async def test_the_first_value_that_was_proposed_stays(home: Path, network: MemoryNetwork, autojump_clock: Any) -> None:
    daemons = await introduced(home, network, "alice", "bob", "carol")
    first = await together(daemons, lambda daemon: daemon.agree(daemons, b"first"))
    for daemon in daemons:
        daemon.open()
    again = await together(daemons, lambda daemon: daemon.agree(daemons, b"again"))
    assert first == again == [b"first"] * 3


async def said_by_the_leader(daemons: list[Daemon], file: bytes, body: bytes = b"") -> list[Any]:
    """What the others get when the leader says `body`, or by default that it offers `file`; and who the leader is."""
    leader = proposer(CONTRACT, "fit", 1, 0, [daemon.id for daemon in daemons])

    async def work(daemon: Daemon) -> Any:
        if daemon.id != leader:
            return await daemon.agree(daemons, b"mine")
        digest = await daemon.store.put_file(file)

        def publish(tx: Any) -> None:
            daemon.mesh.files.offer(tx, CONTRACT, digest, len(file))
            said = body or codec.encode(AgreedRecord(None, digest, len(file)))
            daemon.mesh.publish(tx, CONTRACT, KIND, "fit/1/0", said)

        return await daemon.store.write(publish)

    results = [result for result in await together(daemons, work) if result is not None]
    assert len(results) == len(daemons) - 1
    return [leader, *results]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (codec.encode(AgreedRecord(None, bytes(32), 1 << 30)), "proposed a value of 1073741824 bytes"),
        (codec.encode(AgreedRecord(None, bytes(32), 5)), "proposed a value of 5 bytes"),
        (codec.encode([1, 2]), "not a AgreedRecord"),
        (b"", "belong to something else"),
    ],
    ids=["too large", "too small", "no record", "another file"],
)
async def test_a_proposal_that_cannot_be_is_refused_by_the_name_of_its_peer(
    body: bytes, says: str, home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, "alice", "bob", "carol")
    leader, *errors = await said_by_the_leader(daemons, b"another file of the leader's" * 10, body)
    for error in errors:
        assert isinstance(error, RemoteProtocolError)
        assert says in error.message
        assert error.peer == leader


async def test_nothing_of_a_value_is_left_when_the_contract_is_over(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, "alice", "bob", "carol")
    everywhere: list[int] = []

    async def work(daemon: Daemon) -> None:
        for k in range(3):
            await daemon.agree(daemons, b"v" * (INLINE_BYTES + 1), k)
        everywhere.append(len(daemon.files()))
        await until(lambda: len(everywhere) == 3)
        await daemon.forget()
        assert daemon.files() == []
        assert daemon.rows("mesh_record") == []

    assert [error for error in await together(daemons, work) if error is not None] == []
    assert min(everywhere) > 0
