"""One value that all participants of a stage adopt, where arithmetic may differ by processor (Peers.agree).

Rules
* Who proposes follows from the place of the value in the stage; everybody knows it in advance, which is harmless.
* The first value that was proposed stays: it is a signed record, one in a slot. The caller compares it with its own.
* A small value is in the record, a larger one a file that begins with a label of its place, so that no other file of
  the proposer can be taken for it.
* When all parties have proposed or gone on, what lies before is forgotten; what is left goes with the scope.

No event loop here: the awaits are of the store and the mesh.

Source: SA1, version 1, section 3 (the proposer).
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Annotated, Final, Protocol

import msgspec

from fedpeer import codec
from fedpeer.aggregation.names import u32
from fedpeer.crypto import equal, hash_
from fedpeer.errors import RemoteProtocolError
from fedpeer.mesh.roster import Roster
from fedpeer.store import RunInThread, Store, Transaction

KIND: Final = "agreed"
INLINE_BYTES: Final = 32 * 1024


class Records(Protocol):
    """What this needs of the mesh (mesh.service.Mesh has it)."""

    me: str

    def publish(self, tx: Transaction, scope: bytes, kind: str, slot: str, body: bytes) -> None: ...

    def find(self, scope: bytes, kind: str, slot: str, sender: str) -> bytes | None: ...

    def changed(self, scope: bytes) -> Awaitable[None]: ...


class Files(Protocol):
    """And of its files (mesh.files.service.Files has it)."""

    def offer(self, tx: Transaction, scope: bytes, digest: bytes, size: int) -> None: ...

    def fetch(self, scope: bytes, digest: bytes, size: int, holders: Sequence[str]) -> Awaitable[Path]: ...


class AgreedRecord(codec.Record, frozen=True):
    """Kind "agreed": the proposer's value, here or as a file (label ‖ value) of this digest and size."""

    value: bytes | None
    digest: Annotated[bytes, msgspec.Meta(max_length=32)]
    size: Annotated[int, msgspec.Meta(ge=0)]


def proposer(contract: bytes, stage: str, turn: int, k: int, parties: Sequence[str]) -> str:
    """Whose value is taken."""
    lead = hash_("fp.sa1.lead", contract, stage.encode(), u32(turn), u32(k))
    return parties[int.from_bytes(lead[:4], "little") % len(parties)]


class Agreed:
    """Agreed values of all contracts of this daemon."""

    def __init__(self, mesh: Records, files: Files, roster: Roster, store: Store, run_in_thread: RunInThread) -> None:
        self._mesh, self._files, self._roster, self._store, self._run = mesh, files, roster, store, run_in_thread

    async def agree(self, contract: bytes, parties: Sequence[str], stage: str, turn: int, k: int, mine: bytes) -> bytes:
        """One party's bytes for all, chosen by (contract, stage, turn, k).

        Raises RemoteProtocolError for a value far larger than `mine`.
        """
        slot = f"{stage}/{turn}/{k}"
        leader = proposer(contract, stage, turn, k, parties)
        label = hash_("fp.sa1.agreed", contract, stage.encode(), u32(turn), u32(k))
        if leader == self._mesh.me and self._mesh.find(contract, KIND, slot, leader) is None:
            await self._propose(contract, slot, label, mine)
        while (body := self._mesh.find(contract, KIND, slot, leader)) is None:
            await self._mesh.changed(contract)
        return await self._value(contract, label, leader, body, limit=2 * len(mine) + INLINE_BYTES)

    async def _propose(self, contract: bytes, slot: str, label: bytes, mine: bytes) -> None:
        small = len(mine) <= INLINE_BYTES
        digest = b"" if small else await self._store.put_file(label + mine)
        size = 0 if small else len(label) + len(mine)
        body = codec.encode(AgreedRecord(mine if small else None, digest, size))

        def publish(tx: Transaction) -> None:
            if not small:
                self._files.offer(tx, contract, digest, size)
            self._mesh.publish(tx, contract, KIND, slot, body)

        await self._store.write(publish)

    async def _value(self, contract: bytes, label: bytes, leader: str, body: bytes, *, limit: int) -> bytes:
        name = self._roster.name_of(leader)
        try:
            record = codec.decode_as(AgreedRecord, body)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"{name} proposed what is {error.message}", peer=leader) from None
        if record.value is not None:
            return record.value
        if not len(label) < record.size <= limit:
            raise RemoteProtocolError(
                f"{name} proposed a value of {record.size} bytes, far from the size of ours", peer=leader
            )
        path = self._store.path_of(record.digest)
        if leader != self._mesh.me:
            path = await self._files.fetch(contract, record.digest, record.size, [leader])
        data: bytes = await self._run(path.read_bytes)
        if not equal(data[: len(label)], label):
            raise RemoteProtocolError(f"{name} proposed bytes that belong to something else", peer=leader)
        return data[len(label) :]
