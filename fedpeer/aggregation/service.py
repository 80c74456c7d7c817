"""Sums and agreed values of stages, the daemon's side: does what `attempt.Sum` says, with records, blobs and files.

Rules
* Persist before you send: a masked vector's file is on disk, and its offer and its record are one transaction, before
  anything of it leaves.
* The first vector asked for a sum is the only one: its hash is kept with the first key. Another vector, history or
  parameters for the same (contract, stage, turn, k) is NotDeterministic, before anything is sent.
* Asked again, a sum is finished from what is on disk: a masked vector is never made again under another key for an
  attempt that has one. The caller's journal answers what was decided.
* When all parties have published something for a later place of the stage, everybody is done with what is before it:
  its records and files go, and are refused when they come again. What is left goes with the scope.

Two transfers are all of it: key records one way and back, then masked vectors to everybody (n − 1 times 3 bytes an
element sent by each; owners that each add up a slice replace this).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Protocol

import msgspec
import numpy as np
import trio

from fedpeer import codec
from fedpeer.aggregation import masks
from fedpeer.aggregation.attempt import (
    MAX_ATTEMPTS,
    Begin,
    Collect,
    Held,
    Mask,
    MaskedRecord,
    Part,
    Place,
    Slot,
    Sum,
    floor,
    proposer,
)
from fedpeer.aggregation.keys import u32
from fedpeer.aggregation.masks import Vector
from fedpeer.crypto import Secret, equal, hash_
from fedpeer.errors import FedpeerError, NotDeterministic, RemoteProtocolError, SumError
from fedpeer.events import Events
from fedpeer.identity import Identity
from fedpeer.store import RunInThread, Schema, Store, Transaction

INLINE_BYTES: Final = 32 * 1024
_KINDS: Final = ("key", "masked", "agreed")


class Records(Protocol):
    """What the aggregation needs of the mesh (mesh.service.Mesh has it)."""

    def publish(self, tx: Transaction, scope: bytes, kind: str, slot: str, body: bytes) -> None: ...

    def discard(self, tx: Transaction, scope: bytes, kind: str, slot: str) -> None: ...

    def find(self, scope: bytes, kind: str, slot: str, sender: str) -> bytes | None: ...

    def held(self, scope: bytes, kind: str) -> Held: ...

    def changed(self, scope: bytes) -> Awaitable[None]: ...

    def refuse(self, scope: bytes, predicate: Callable[[Any], bool]) -> None: ...

    def offer(self, tx: Transaction, scope: bytes, digest: bytes, size: int) -> None: ...

    def withdraw(self, tx: Transaction, scope: bytes, digest: bytes) -> None: ...

    def fetch(self, scope: bytes, digest: bytes, size: int, holders: Sequence[str]) -> Awaitable[Path]: ...

    def name_of(self, peer: str) -> str: ...


class AgreedRecord(codec.Record, frozen=True):
    """Kind "agreed": the proposer's value, here or as a blob (label ‖ value) of this digest and size."""

    value: bytes | None
    digest: Annotated[bytes, msgspec.Meta(max_length=32)]
    size: Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True)
class Total:
    """A decided sum: `values` mod 2^24 (uint32), and the ids of the peers that are in it, in the contract's order."""

    values: Vector
    survivors: list[str]


class Aggregation:
    """Secure sums and agreed values of all contracts of this daemon."""

    SCHEMAS: ClassVar[list[Schema]] = [
        Schema(
            "aggregation",
            [
                "CREATE TABLE aggregation_sum (contract BLOB NOT NULL, stage TEXT NOT NULL, turn INTEGER NOT NULL,"
                " k INTEGER NOT NULL, asked BLOB NOT NULL, PRIMARY KEY (contract, stage, turn, k)) WITHOUT ROWID"
            ],
        )
    ]

    def __init__(
        self,
        mesh: Records,
        store: Store,
        identity: Identity,
        *,
        run_in_thread: RunInThread,
        events: Events,
        log: Any,
    ) -> None:
        self._mesh, self._store, self._me = mesh, store, identity.id
        self._run, self._events, self._log = run_in_thread, events, log
        self._floors: dict[bytes, dict[str, Place]] = {}  # contract → stage → where all parties are

    async def sum(
        self,
        contract: bytes,
        parties: Sequence[str],
        stage: str,
        turn: int,
        k: int,
        vector: Vector,
        params: bytes,
        history: bytes,
    ) -> Total:
        """The sum of the vectors of all `parties` (peer ids, this one among them), mod 2^24; waits for all of them.

        `vector`: uint32 below 2^24, of one length at all parties; `params`: any bytes that must be equal everywhere
        (layout, tag, declaration); `history`: 32 bytes, likewise. Nobody learns more than the total.
        Raises SumError (fewer than three parties, a peer whose history, parameters, key or vector does not fit),
        NotDeterministic (asked before with another vector).
        """
        masks.check(vector)
        vector = np.ascontiguousarray(vector)
        slot = Slot(stage, turn, k)
        one = Sum(
            contract,
            slot,
            parties,
            self._me,
            history,
            hash_("fp.sa1.prm", params),
            len(vector),
            self._mesh.name_of,
        )
        self._refuse_finished(contract)
        asked = await self._run(
            lambda: hash_("fp.sa1.asked", history, params, *(party.encode() for party in parties), vector.data)
        )
        await self._store.write(lambda tx: _ask_once(tx, contract, slot, asked))
        while True:
            match one.next(self._mesh.held(contract, "key"), self._mesh.held(contract, "masked")):
                case Begin(attempt):
                    if attempt:
                        self._log.info("sum_repeated", stage=stage, turn=turn, k=k, attempt=attempt)
                    await self._publish(
                        contract, "key", slot._replace(attempt=attempt), one.begin(attempt, Secret.random())
                    )
                case Mask() as step:
                    await self._mask(contract, slot, vector, step)
                case Collect() as step:
                    total = await self._collect(contract, len(vector), step)
                    self._events.publish(
                        f"job:{contract.hex()}", "sum", stage=stage, turn=turn, k=k, attempt=step.attempt
                    )
                    await self._clean(contract, parties, stage)
                    return Total(total, list(parties))
                case _:
                    await self._mesh.changed(contract)

    async def agree(self, contract: bytes, parties: Sequence[str], stage: str, turn: int, k: int, mine: bytes) -> bytes:
        """One party's bytes for all, chosen by (contract, stage, turn, k); the caller compares them with `mine`.

        The first value that was proposed stays. Raises RemoteProtocolError for a value far larger than `mine`.
        """
        slot = Slot(stage, turn, k)
        leader = proposer(contract, slot, parties)
        self._refuse_finished(contract)
        if leader == self._me and self._mesh.find(contract, "agreed", str(slot), leader) is None:
            await self._propose(contract, slot, mine)
        while (body := self._mesh.find(contract, "agreed", str(slot), leader)) is None:
            await self._mesh.changed(contract)
        value = await self._agreed(contract, slot, leader, body, limit=2 * len(mine) + INLINE_BYTES)
        await self._clean(contract, parties, stage)
        return value

    def forget(self, tx: Transaction, contract: bytes) -> None:
        """The contract is over: its rows go. Records, offers and files go with the scope."""
        tx.execute("DELETE FROM aggregation_sum WHERE contract = ?", (contract,))
        tx.after_commit(partial(self._forgotten, contract))

    def _forgotten(self, contract: bytes) -> None:
        self._floors.pop(contract, None)

    # sums

    async def _publish(
        self, contract: bytes, kind: str, slot: Slot, body: bytes, blob: tuple[bytes, int] | None = None
    ) -> None:
        """One transaction, then it may leave."""

        def publish(tx: Transaction) -> None:
            if blob is not None:
                self._mesh.offer(tx, contract, *blob)
            self._mesh.publish(tx, contract, kind, str(slot), body)

        await self._store.write(publish)

    async def _mask(self, contract: bytes, slot: Slot, vector: Vector, step: Mask) -> None:
        masked = await self._run(lambda: masks.mask(vector, step.masks, step.label))
        digest = await self._store.put_file(masked)
        body = codec.encode(MaskedRecord(step.context, digest, len(masked)))
        await self._publish(contract, "masked", slot._replace(attempt=step.attempt), body, (digest, len(masked)))

    async def _collect(self, contract: bytes, count: int, step: Collect) -> Vector:
        paths = await self._fetch(contract, step.parts)

        def add_up() -> Vector:
            total = np.zeros(count, np.uint32)
            for part, path in zip(step.parts, paths, strict=True):
                try:
                    with path.open("rb") as file:
                        masks.add(total, file, part.label)
                except SumError as error:
                    name = self._mesh.name_of(part.party)
                    raise SumError(f"{name}: {error.message}", peer=part.party) from None
            return total

        return await self._run(add_up)

    async def _fetch(self, contract: bytes, parts: Sequence[Part]) -> list[Path]:
        """The files of all parts, in order, fetched side by side."""
        paths = {part.party: self._store.path_of(part.digest) for part in parts}
        failures: list[FedpeerError] = []

        async def fetch(part: Part) -> None:
            try:
                paths[part.party] = await self._mesh.fetch(contract, part.digest, part.size, [part.party])
            except FedpeerError as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for part in parts:
                if part.party != self._me:
                    nursery.start_soon(fetch, part)
        if failures:
            raise failures[0]
        return list(paths.values())

    # agreed values

    async def _propose(self, contract: bytes, slot: Slot, mine: bytes) -> None:
        if len(mine) <= INLINE_BYTES:
            await self._publish(contract, "agreed", slot, codec.encode(AgreedRecord(mine, b"", 0)))
            return
        labelled = _agreed_label(contract, slot) + mine
        digest = await self._store.put_file(labelled)
        body = codec.encode(AgreedRecord(None, digest, len(labelled)))
        await self._publish(contract, "agreed", slot, body, (digest, len(labelled)))

    async def _agreed(self, contract: bytes, slot: Slot, leader: str, body: bytes, *, limit: int) -> bytes:
        name = self._mesh.name_of(leader)
        try:
            record = codec.decode_as(AgreedRecord, body)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"{name} proposed what is {error.message}", peer=leader) from None
        if record.value is not None:
            return record.value
        label = _agreed_label(contract, slot)
        if not len(label) < record.size <= limit:
            raise RemoteProtocolError(
                f"{name} proposed a value of {record.size} bytes, far from the size of ours", peer=leader
            )
        path = self._store.path_of(record.digest)
        if leader != self._me:
            path = await self._mesh.fetch(contract, record.digest, record.size, [leader])
        data = await self._run(path.read_bytes)
        if not equal(data[: len(label)], label):
            raise RemoteProtocolError(f"{name} proposed bytes that belong to something else", peer=leader)
        return data[len(label) :]

    # what is finished everywhere

    def _refuse_finished(self, contract: bytes) -> None:
        """From now on, drop records of sums that are over, and of no sum at all."""
        if contract in self._floors:
            return
        floors: dict[str, Place] = {}

        def finished(record: Any) -> bool:
            if record.kind not in _KINDS:
                return False
            slot = Slot.parse(record.slot)
            return slot is None or slot.attempt >= MAX_ATTEMPTS or slot.place < floors.get(slot.stage, (0, 0))

        self._mesh.refuse(contract, finished)
        self._floors[contract] = floors

    async def _clean(self, contract: bytes, parties: Sequence[str], stage: str) -> None:
        """Discard what lies before the place that all parties have reached."""
        held = {kind: self._mesh.held(contract, kind) for kind in _KINDS}
        place = floor(parties, stage, [*held["key"], *held["agreed"]])
        floors = self._floors.get(contract, {})  # none: forgotten meanwhile
        if place is None or place == floors.get(stage):
            return
        floors[stage] = place
        slots: set[tuple[str, str]] = set()
        blobs: dict[bool, set[bytes]] = {True: set(), False: set()}
        for kind, records in held.items():
            for (text, _), body in records.items():
                slot = Slot.parse(text)
                over = slot is None or (slot.stage == stage and slot.place < place)
                if over:
                    slots.add((kind, text))
                blobs[over].add(_blob(kind, body))

        def discard(tx: Transaction) -> None:
            for kind, text in sorted(slots):
                self._mesh.discard(tx, contract, kind, text)
            for digest in sorted(blobs[True] - blobs[False] - {b""}):
                self._mesh.withdraw(tx, contract, digest)
            tx.execute(
                "DELETE FROM aggregation_sum WHERE contract = ? AND stage = ? AND (turn, k) < (?, ?)",
                (contract, stage, *place),
            )

        if slots:
            await self._store.write(discard)


def _ask_once(tx: Transaction, contract: bytes, slot: Slot, asked: bytes) -> None:
    row = tx.one(
        "SELECT asked FROM aggregation_sum WHERE contract = ? AND stage = ? AND turn = ? AND k = ?",
        (contract, *slot[:3]),
    )
    if row is None:
        tx.execute("INSERT INTO aggregation_sum VALUES (?, ?, ?, ?, ?)", (contract, *slot[:3], asked))
    elif row[0] != asked:
        raise NotDeterministic(
            f"sum {slot.k} of turn {slot.turn} of stage {slot.stage!r} was asked again with other values",
            hint="in a stage, chance comes from peers.random and values from its inputs and from peers only",
        )


def _agreed_label(contract: bytes, slot: Slot) -> bytes:
    return hash_("fp.sa1.agreed", contract, slot.stage.encode(), u32(slot.turn), u32(slot.k))


def _blob(kind: str, body: bytes) -> bytes:
    """The digest of the blob that a record names; nothing for a record without one."""
    try:
        match kind:
            case "masked":
                return codec.decode_as(MaskedRecord, body).digest
            case "agreed":
                return codec.decode_as(AgreedRecord, body).digest
    except RemoteProtocolError:
        pass
    return b""
