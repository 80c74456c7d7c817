"""One stage at this peer: a worker asks, and is answered from the stage's journal or from the other peers.

Rules
* A place in a stage is (turn, k): the k-th request of a turn. Turn 0 is everything before the loop over `rounds`,
  turn t + 1 is the loop's turn t.
* An answer is in the journal before the worker sees it; a message is in the outbox before its first byte leaves.
  A worker that repeats a turn is given the same answers, and what it says again is recognized by place and digest.
* What leaves has passed the gate first.
* A checkpoint is one commit: the state, the key of chance, the history hash, and the end of the turn's journal.

No event loop here: the awaits are of the store, the mesh and the aggregation.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from fedpeer import codec
from fedpeer.crypto import hash_, random_bytes
from fedpeer.errors import FedpeerError, StageError, WorkerCrashed, by_code
from fedpeer.governance.gate import Gate
from fedpeer.jobs import archive, checkpoint
from fedpeer.jobs.views import StageView
from fedpeer.stage import Stage
from fedpeer.store import Store
from fedpeer.worker import protocol as ask


class Worker(Protocol):
    """What runs the stage's function: a process, or in simulations this one."""

    async def next(self) -> ask.Request: ...

    async def answer(self, answer: ask.Answer) -> None: ...

    async def aclose(self) -> None: ...


StartWorker = Callable[[ask.Start], Awaitable[Worker]]


class Delivery(Protocol):
    """What a stage needs of the mesh (mesh.service.Mesh has it)."""

    def post(
        self, tx: Any, contract: bytes, stage: str, to: str, tag: str, header: bytes, buffers: Sequence[Any]
    ) -> int: ...

    def posted(self, to: str) -> None: ...

    async def next_mail(self, contract: bytes, stage: str, sender: str) -> Any: ...

    def take(self, tx: Any, contract: bytes, stage: str, sender: str, mail: Any) -> None: ...

    def taken(self, contract: bytes, stage: str, sender: str) -> None: ...


class Together(Protocol):
    """What the participants decide together (jobs.service wires it to the aggregation and to agreed records)."""

    async def sum(self, stage: str, turn: int, k: int, vector: Any, params: bytes, history: bytes) -> Any: ...

    async def agree(self, stage: str, turn: int, k: int, mine: bytes) -> bytes: ...


class Execution:
    """One stage of one job at this peer, over any number of workers and restarts of the daemon."""

    def __init__(
        self,
        contract: bytes,
        stage_id: str,
        stage: Stage,
        params: bytes,
        roles: Mapping[str, str],
        peer_of: Mapping[str, str],
        me: str,
        *,
        store: Store,
        mesh: Delivery,
        together: Together,
        start_worker: StartWorker,
        view: StageView,
        changed: Callable[[], None],
        now: Callable[[], str],
        restarts: int,
    ) -> None:
        self.contract, self.stage_id, self.stage, self.params = contract, stage_id, stage, params
        self.roles, self.peer_of, self.me = dict(roles), dict(peer_of), me
        self.store, self.mesh, self.together = store, mesh, together
        self.start_worker, self.view, self.changed, self.now, self.restarts = start_worker, view, changed, now, restarts
        self.gate = Gate(stage, self.roles, me)
        self.turn = self.k = self.sums = 0
        self.history = b""

    async def run(self, inputs: Sequence[tuple[str, str, Any]]) -> dict[str, tuple[str, bytes]]:
        """The stage's outputs: name → (kind, bytes). Raises the JobError that ended it."""
        while True:
            try:
                return await self._one_worker(inputs)
            except WorkerCrashed as crash:
                self.view.restarts += 1
                restarts = self.view.restarts
                await self.store.write(lambda tx: self._log(tx, "worker_crashed", {"restarts": restarts}))
                if restarts > self.restarts:
                    raise WorkerCrashed(
                        f"the worker of stage {self.stage_id!r} ended {restarts} times without a result: {crash.message}"
                    ) from None
                self.changed()

    async def _one_worker(self, inputs: Sequence[tuple[str, str, Any]]) -> dict[str, tuple[str, bytes]]:
        saved = await self.store.write(
            lambda tx: checkpoint.begin(tx, self.contract, self.stage_id, random_bytes(32), self._first_history())
        )
        self._at(0, saved.first_history)
        self.saved = saved
        worker = await self.start_worker(
            ask.Start(
                stage=self.stage.name,
                params=self.params,
                me=self.me,
                roles=[[alias, role] for alias, role in self.roles.items()],
                chance=saved.first_chance,
                resume=saved.resume,
                inputs=inputs,
            )
        )
        try:
            while True:
                request = await worker.next()
                if isinstance(request, ask.Done):
                    return dict(request.outputs)
                if isinstance(request, ask.Failed):
                    raise await self._failure(request)
                answer = await self._serve(request)
                if answer is not None:
                    await worker.answer(answer)
        finally:
            await worker.aclose()

    async def _serve(self, request: ask.Request) -> ask.Answer | None:
        """Do what the worker asks; the answer, for the three kinds that have one."""
        match request:
            case ask.Send():
                await self._send(request)
            case ask.Receive():
                return await self._receive(request)
            case ask.Sum():
                return await self._sum(request)
            case ask.Agree():
                return await self._agree(request)
            case ask.Checkpoint():
                await self._checkpoint(request)
            case ask.Progress():
                self.view.rounds, self.view.metrics = request.of, dict(request.metrics)
                self.view.round = request.done
                self.changed()
        return None

    async def _send(self, request: ask.Send) -> None:
        self.gate.send(request.to, request.tag, request.header, request.buffers)
        digest = hash_("fp.message", request.to.encode(), request.tag.encode(), request.header, *request.buffers)
        turn, k = self._next_place()
        to = self.peer_of[request.to]

        def commit(tx: Transaction) -> None:
            if not checkpoint.sent(tx, self.contract, self.stage_id, turn, k, digest):
                self.mesh.post(
                    tx, self.contract, self.stage_id, to, request.tag, request.header, request.buffers
                )

        await self.store.write(commit)
        self.mesh.posted(to)

    async def _receive(self, request: ask.Receive) -> ask.Answer:
        self.gate.receive(request.sender, request.tag)
        turn, k = self._next_place()
        asked = hash_("fp.receive", request.sender.encode(), request.tag.encode())
        kept = await self._journaled(turn, k, "receive", asked)
        if kept is None:
            sender = self.peer_of[request.sender]
            mail = await self.mesh.next_mail(self.contract, self.stage_id, sender)
            if mail.tag != request.tag:
                raise StageError(
                    f"stage {self.stage_id!r} asks {request.sender!r} for {request.tag!r}, but its next message is "
                    f"{mail.tag!r}: messages of one sender are received in the order they were sent"
                )
            kept = join(mail.header, mail.buffers)
            payload = kept

            def commit(tx: Transaction) -> None:
                checkpoint.answer(tx, self.contract, self.stage_id, turn, k, "receive", asked, payload)
                self.mesh.take(tx, self.contract, self.stage_id, sender, mail)

            await self.store.write(commit)
            self.mesh.taken(self.contract, self.stage_id, sender)
        header, buffers = split(kept)
        return ask.Value(header, buffers)

    async def _sum(self, request: ask.Sum) -> ask.Answer:
        self.gate.sum(request.tag, request.layout, request.vector)
        turn, k = self._next_place()
        params = codec.encode(
            [self.stage_id, turn, k, request.tag, self.stage.declaration_hash(), request.layout, *RING]
        )
        asked = hash_("fp.sum", params, memoryview(np.ascontiguousarray(request.vector)).cast("B"))
        kept = await self._journaled(turn, k, "sum", asked)
        if kept is None:
            total = await self.together.sum(self.stage_id, turn, k, request.vector, params, self.history)
            survivors = [self._alias_of(peer) for peer in total.survivors]
            kept = join(*codec.pack_value([total.values, survivors]))
            payload = kept
            await self.store.write(
                lambda tx: checkpoint.answer(tx, self.contract, self.stage_id, turn, k, "sum", asked, payload)
            )
        vector, survivors = codec.unpack_value(*split(kept))
        self.history = checkpoint.history_sum(self.history, survivors, hash_("fp.total", memoryview(vector).cast("B")))
        return ask.TotalAnswer(vector, survivors)

    async def _agree(self, request: ask.Agree) -> ask.Answer:
        self.gate.agree(request.tag, len(request.header) + sum(len(buffer) for buffer in request.buffers))
        turn, k = self._next_place()
        asked = hash_("fp.agree", request.tag.encode())
        kept = await self._journaled(turn, k, "agree", asked)
        if kept is None:
            kept = await self.together.agree(self.stage_id, turn, k, join(request.header, request.buffers))
            payload = kept
            await self.store.write(
                lambda tx: checkpoint.answer(tx, self.contract, self.stage_id, turn, k, "agree", asked, payload)
            )
        header, buffers = split(kept)
        return ask.Value(header, buffers)

    async def _checkpoint(self, request: ask.Checkpoint) -> None:
        shared, own = join(*request.shared), join(*request.own)
        if request.turn != self.saved_turn:
            history = checkpoint.history_turn(self.history, hash_("fp.shared", shared))
            await self.store.write(
                lambda tx: checkpoint.save(
                    tx, self.contract, self.stage_id, request.turn, shared, own, request.chance, history
                )
            )
            self.saved_turn, self.saved_history = request.turn, history
        self._at(request.turn + 1, self.saved_history)

    # places


    def _at(self, turn: int, history: bytes) -> None:
        self.turn, self.k, self.history = turn, 0, history
        self.gate.turn(turn)

    def _next_place(self) -> tuple[int, int]:
        place = self.turn, self.k
        self.k += 1
        return place

    async def _journaled(self, turn: int, k: int, kind: str, asked: bytes) -> bytes | None:
        return await self.store.read(
            lambda tx: checkpoint.find_answer(tx, self.contract, self.stage_id, turn, k, kind, asked)
        )

    def _alias_of(self, peer: str) -> str:
        return next(alias for alias, held in self.peer_of.items() if held == peer)


def join(header: bytes, buffers: Sequence[Any]) -> bytes:
    """A packed value as one piece: header and buffers, each after its length."""
    parts = [header, *(bytes(buffer) for buffer in buffers)]
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def split(joined: bytes) -> tuple[bytes, list[memoryview]]:
    """The header and buffers of `join`."""
    view, parts = memoryview(joined), []
    while view:
        size = int.from_bytes(view[:8], "little")
        parts.append(view[8 : 8 + size])
        view = view[8 + size :]
    return bytes(parts[0]), parts[1:]
