"""One stage at this peer: a worker asks, and is answered from the stage's journal or from the other peers.

Rules
* A place in a stage is (turn, k): the k-th request of a turn. Turn 0 is everything before the loop over `rounds`,
  turn t + 1 is the loop's turn t.
* An answer is in the journal before the worker sees it; a message is in the outbox before its first byte leaves.
  A worker that repeats a turn is given the same answers, and what it says again is recognized by place and digest.
* What leaves has passed the gate first.
* The history covers all totals, shared states and agreed values so far, and masks are bound to it: no sum is opened
  over participants who were told different ones.
* A checkpoint is one commit: the state, the key of chance, the history hash, and the end of the turn's journal.

No event loop here: the awaits are of the store, the mesh and the aggregation.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np

from fedpeer import codec
from fedpeer.aggregation import names
from fedpeer.aggregation.agreed import proposer
from fedpeer.aggregation.request import Request
from fedpeer.crypto import Buffer, hash_, random_bytes
from fedpeer.errors import (
    DataError,
    FedpeerError,
    GateClosed,
    LocalProtocolError,
    StageError,
    WorkerCrashed,
    by_code,
)
from fedpeer.governance.gate import Gate
from fedpeer.jobs import checkpoint, keyring
from fedpeer.jobs.checkpoint import Kept
from fedpeer.peers import Keys
from fedpeer.secure import fixedpoint
from fedpeer.stage import KINDS, Stage, Sum
from fedpeer.store import INLINE_BYTES, RunInThread, Store, Transaction
from fedpeer.worker import protocol as ask

T = TypeVar("T")
Outputs = dict[str, tuple[str, bytes]]
"""name → (kind, bytes) as artifact.dump gives them."""


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

    async def next_mail(self, contract: bytes, stage: str, sender: str) -> Any: ...

    def take(self, tx: Any, contract: bytes, stage: str, sender: str, mail: Any) -> None: ...


class Together(Protocol):
    """What the participants decide together (jobs.service wires it to the aggregation and to agreed records)."""

    async def sum(self, request: Request) -> Any: ...

    async def agree(self, stage: str, turn: int, k: int, mine: bytes) -> bytes: ...


class Execution:
    """One stage of one job at this peer, over any number of workers and restarts of the daemon.

    `params`: canonical JSON; `roles`: alias → role of all who take part, in the contract's order; `peer_of`: alias →
    peer id; `chance`: gives the 32-byte key of chance of a stage's first start; `say`: tells the operator;
    `run_in_thread`: for work on values of more than INLINE_BYTES, during which the event loop goes on; `honest`:
    so many contributors of every sum do not pool what they see; `keys`: the Paillier keys that the stage declares.
    """

    def __init__(
        self,
        contract: bytes,
        stage_id: str,
        stage: Stage,
        params: str,
        roles: Mapping[str, str],
        peer_of: Mapping[str, str],
        me: str,
        *,
        store: Store,
        mesh: Delivery,
        together: Together,
        start_worker: StartWorker,
        say: Callable[..., None],
        restarts: int,
        run_in_thread: RunInThread,
        honest: int = 1,
        keys: Keys | None = None,
        chance: Callable[[], bytes] = lambda: random_bytes(32),
    ) -> None:
        self.contract, self.stage_id, self.stage, self.params = contract, stage_id, stage, params
        self.roles, self.peer_of, self.me = dict(roles), dict(peer_of), me
        self.store, self.mesh, self.together, self.start_worker = store, mesh, together, start_worker
        self.say, self.restarts, self.chance = say, restarts, chance
        self.run_in_thread, self.honest, self.keys = run_in_thread, honest, keys or Keys()
        self.gate = Gate(stage, self.roles, me)
        self.declaration = stage.declaration_hash()
        self.turn = self.k = self.common = 0
        self.history = self.turn_history = b""
        self.saved_turn, self.saved_history = -1, b""
        self._begun = False  # by this daemon
        self.waits_for = ""
        """the peer without whom this stage does not go on: its message or its proposal comes next"""

    async def run(self, inputs: Sequence[tuple[str, str, Any]]) -> tuple[Outputs, bytes]:
        """The stage's outputs and its last history hash. Raises the error that ended it.

        `inputs`: (port, kind, bytes or the path of a file with them).
        """
        while True:
            try:
                return await self._one_worker(inputs), self.history
            except WorkerCrashed as crash:
                crashes = await self.store.write(lambda tx: checkpoint.crashed(tx, self.contract, self.stage_id))
                if crashes > self.restarts:
                    raise WorkerCrashed(
                        f"the worker of stage {self.stage_id!r} ended {crashes} times without a result: {crash.message}"
                    ) from None
                self.say("worker_crashed", stage=self.stage_id, restarts=crashes, message=crash.message)

    async def _one_worker(self, inputs: Sequence[tuple[str, str, Any]]) -> Outputs:
        first = names.first_history(self.contract, self.stage_id, self.params.encode())
        saved = await self.store.write(
            lambda tx: checkpoint.begin(tx, self.contract, self.stage_id, self.chance(), first)
        )
        if saved.again and not self._begun:  # what follows a crash of the worker is told by that
            self.say("resumed", stage=self.stage_id, turn=saved.turn + 1)
        self._begun = True
        self.saved_turn, self.saved_history = saved.turn, saved.history
        self._at(0, saved.first_history)
        resume = None
        if saved.turn >= 0:
            state = await self._open(self._name("state", saved.turn), saved.state)
            shared, own = split(state)[1]
            resume = ask.Resume(saved.turn, split(shared), split(own), saved.chance)
        worker = await self.start_worker(
            ask.Start(
                stage=self.stage.name,
                params=self.params.encode(),
                me=self.me,
                roles=list(self.roles.items()),
                chance=saved.first_chance,
                resume=resume,
                inputs=list(inputs),
                honest=self.honest,
                own_key=self.keys.own.reveal() if self.keys.own else b"",
                moduli=[(alias, keyring.as_bytes(n)) for alias, n in self.keys.moduli.items()],
            )
        )
        try:
            while True:
                request = await worker.next()
                if isinstance(request, ask.Done):
                    return checked_outputs(self.stage, request)
                if isinstance(request, ask.Failed):
                    raise failure(request)
                served = self._serve(request)
                del request  # it may be as large as a model: what serves it lets it go
                if (answer := await served) is not None:
                    await worker.answer(answer)
                del served, answer
        finally:
            await worker.aclose()

    def _serve(self, request: ask.Request) -> Awaitable[ask.Answer | None]:
        """Do what the worker asks; the answer, for the three kinds that have one."""
        match request:
            case ask.Send():
                return self._send(request)
            case ask.Receive():
                return self._receive(request)
            case ask.Sum():
                return self._sum(request)
            case ask.Agree():
                return self._agree(request)
            case ask.Checkpoint():
                return self._checkpoint(request)
            case ask.Progress():
                return self._progress(request)
        raise LocalProtocolError(f"a {type(request).__name__} is not served")

    async def _progress(self, request: ask.Progress) -> None:
        self.say("progress", stage=self.stage_id, done=request.done, of=request.of, metrics=dict(request.metrics))

    async def _send(self, request: ask.Send) -> None:
        self.gate.send(request.to, request.tag, request.header, request.buffers)
        size, to_tag = size_of(request.buffers), (request.to.encode(), request.tag.encode())
        digest = await self._work(size, lambda: hash_("fp.message", *to_tag, request.header, *request.buffers))
        turn, k = self._next_place()
        to = self.peer_of[request.to]

        def commit(tx: Transaction) -> None:
            if not checkpoint.sent(tx, self.contract, self.stage_id, turn, k, digest):
                self.mesh.post(tx, self.contract, self.stage_id, to, request.tag, request.header, request.buffers)

        await self.store.write(commit)

    async def _receive(self, request: ask.Receive) -> ask.Answer:
        self.gate.receive(request.sender, request.tag)
        turn, k = self._next_place()
        asked = hash_("fp.receive", request.sender.encode(), request.tag.encode())
        payload = await self._journaled(turn, k, "receive", asked)
        if payload is None:
            sender = self.peer_of[request.sender]
            with self._waiting(sender):
                mail = await self.mesh.next_mail(self.contract, self.stage_id, sender)
            if mail.tag != request.tag:
                raise StageError(
                    f"stage {self.stage_id!r} asks {request.sender!r} for {request.tag!r}, but its next message is "
                    f"{mail.tag!r}: messages of one sender are received in the order they were sent"
                )
            payload = await self._join(mail.header, mail.buffers)
            kept = await self._keep([payload], turn, k)

            def commit(tx: Transaction) -> None:
                checkpoint.answer(tx, self.contract, self.stage_id, turn, k, "receive", asked, kept)
                self.mesh.take(tx, self.contract, self.stage_id, sender, mail)

            await self.store.write(commit)
        return ask.Value(*split(payload))

    async def _sum(self, request: ask.Sum) -> ask.Answer:
        size = request.vector.nbytes
        await self._work(size, lambda: self.gate.sum(request.tag, request.layout, request.vector))
        turn, k = self._next_place()
        common = self._next_common()
        params = codec.encode([self.stage_id, turn, common, request.tag, self.declaration, request.layout])
        vector = np.ascontiguousarray(request.vector, dtype=np.uint32)
        asked = await self._work(size, lambda: hash_("fp.sum", params, vector.data))
        payload = await self._journaled(turn, k, "sum", asked)
        if payload is None:
            declared = self.stage.messages[request.tag]
            assert isinstance(declared, Sum), "the gate lets nothing else pass"
            total = await self.together.sum(
                Request(
                    self.stage_id,
                    turn,
                    common,
                    vector,
                    fixedpoint.used(request.layout),
                    params,
                    self.history,
                    self.turn_history,
                    declared.group,
                    fixedpoint.bits(request.layout),
                )
            )
            del request, vector  # another one as large, the total, is here
            self.say("sum", stage=self.stage_id, step="total", turn=turn, k=common, survivors=list(total.survivors))
            parties = list(self.peer_of.values())
            values, sum_hash = total.values, total.sum_hash
            survivors = sorted(parties.index(peer) for peer in total.survivors)
            kept = await self._keep(pieces(*codec.pack_value([values, survivors, sum_hash])), turn, k)
            over = [alias for alias, peer in self.peer_of.items() if peer in total.survivors]

            def commit(tx: Transaction) -> None:
                checkpoint.answer(tx, self.contract, self.stage_id, turn, k, "sum", asked, kept)
                checkpoint.summed(tx, self.contract, self.stage_id, turn, over)

            await self.store.write(commit)
        else:
            values, survivors, sum_hash = codec.unpack_value(*split(payload))
        self.history = names.history_after_sum(self.history, survivors, sum_hash)
        aliases = list(self.peer_of)
        return ask.TotalAnswer(values, [aliases[party] for party in survivors])

    async def _agree(self, request: ask.Agree) -> ask.Answer:
        mine = await self._join(request.header, request.buffers)
        self.gate.agree(request.tag, len(mine))
        turn, k = self._next_place()
        common = self._next_common()
        asked = hash_("fp.agree", request.tag.encode())
        payload = await self._journaled(turn, k, "agree", asked)
        if payload is None:
            parties = list(self.peer_of.values())
            with self._waiting(proposer(self.contract, self.stage_id, turn, common, parties)):
                payload = await self.together.agree(self.stage_id, turn, common, mine)
            split(payload)
            await self._journal(turn, k, "agree", asked, [payload])
        digest = await self._work(len(payload), lambda: hash_("fp.agreed", payload))
        self.history = names.history_after_agreed(self.history, digest)
        return ask.Value(*split(payload))

    async def _checkpoint(self, request: ask.Checkpoint) -> None:
        if request.turn != self.saved_turn:  # a worker that resumed says where it goes on: that one is saved
            if request.turn != self.saved_turn + 1:
                raise LocalProtocolError(
                    f"stage {self.stage_id!r}: turn {request.turn} is complete after turn {self.saved_turn}"
                )
            shared, own = await self._join(*request.shared), await self._join(*request.own)
            digest = await self._work(len(shared), lambda: hash_("fp.shared", shared))
            history = names.history_after_turn(self.history, digest)
            name = self._name("state", request.turn)
            kept = await checkpoint.keep(self.store, name, pieces(b"", [shared, own]))
            old = await self.store.write(
                lambda tx: checkpoint.save(
                    tx, self.contract, self.stage_id, request.turn, kept, request.chance, history
                )
            )
            for file in old:
                self.store.remove_file(file)
            self.saved_turn, self.saved_history = request.turn, history
        self._at(request.turn + 1, self.saved_history)

    @contextmanager
    def _waiting(self, peer: str) -> Iterator[None]:
        self.waits_for = peer
        try:
            yield
        finally:
            self.waits_for = ""

    # places

    def _at(self, turn: int, history: bytes) -> None:
        self.turn, self.k, self.common, self.history = turn, 0, 0, history
        self.turn_history = history
        self.gate.turn(turn)

    def _next_place(self) -> tuple[int, int]:
        place = self.turn, self.k
        self.k += 1
        return place

    def _next_common(self) -> int:
        """The number of a sum or agreed value within the turn: equal at all, whatever messages each sends besides."""
        self.common += 1
        return self.common - 1

    def _name(self, *place: str | int) -> bytes:
        return codec.encode([self.contract, self.stage_id, *place])

    # the journal

    async def _journaled(self, turn: int, k: int, kind: str, asked: bytes) -> bytes | None:
        kept = await self.store.read(
            lambda tx: checkpoint.find_answer(tx, self.contract, self.stage_id, turn, k, kind, asked)
        )
        return None if kept is None else await self._open(self._name(turn, k), kept)

    async def _journal(self, turn: int, k: int, kind: str, asked: bytes, payload: Sequence[Buffer]) -> None:
        kept = await self._keep(payload, turn, k)
        await self.store.write(
            lambda tx: checkpoint.answer(tx, self.contract, self.stage_id, turn, k, kind, asked, kept)
        )

    async def _keep(self, payload: Sequence[Buffer], turn: int, k: int) -> Kept:
        return await checkpoint.keep(self.store, self._name(turn, k), payload)

    async def _open(self, name: bytes, kept: Kept) -> bytes:
        if not kept.file:
            return kept.inline
        return await self.run_in_thread(lambda: checkpoint.open_(self.store, name, kept))

    # large values

    async def _work(self, size: int, work: Callable[[], T]) -> T:
        """Work on so many bytes: in a thread if they are many."""
        return work() if size <= INLINE_BYTES else await self.run_in_thread(work)

    async def _join(self, header: bytes, buffers: Sequence[Any]) -> bytes:
        return await self._work(size_of(buffers), lambda: join(header, buffers))


async def run_alone(
    stage: Stage, params: str, inputs: Sequence[tuple[str, str, Any]], start_worker: StartWorker
) -> Outputs:
    """Run a stage that talks to nobody, with no contract: what it would say to others is refused by its gate."""
    me, role = "me", next(iter(stage.roles))
    gate = Gate(stage, {me: role}, me)
    worker = await start_worker(
        ask.Start(stage.name, params.encode(), me, [(me, role)], random_bytes(32), None, list(inputs))
    )
    try:
        while True:
            match await worker.next():
                case ask.Done() as done:
                    return checked_outputs(stage, done)
                case ask.Failed() as failed:
                    raise failure(failed)
                case ask.Checkpoint() | ask.Progress():
                    pass
                case ask.Send() as send:
                    gate.send(send.to, send.tag, send.header, send.buffers)
                case other:
                    raise GateClosed(f"{stage.name} asked for a {type(other).__name__}, and runs here without peers")
    finally:
        await worker.aclose()


def checked_outputs(stage: Stage, done: ask.Done) -> Outputs:
    """What a worker brought, if it is what the stage declares: each at most once, and of its kind."""
    outputs: Outputs = {}
    for name, (kind, data) in done.outputs:
        if name in outputs or name not in stage.outputs or stage.outputs[name] is not KINDS.get(kind):
            raise StageError(f"{stage.name} gave the output {name!r} of kind {kind!r}, which it does not declare so")
        outputs[name] = (kind, bytes(data))
    return outputs


def failure(failed: ask.Failed) -> FedpeerError:
    """The error a worker ended with; a worker speaks of its stage and its data only, whatever code it says."""
    cls = DataError if issubclass(by_code(failed.code), DataError) else StageError
    return cls(failed.message, hint=failed.hint)


def size_of(buffers: Sequence[Any]) -> int:
    return sum(memoryview(buffer).nbytes for buffer in buffers)


def pieces(header: bytes, buffers: Sequence[Any]) -> list[Buffer]:
    """A packed value: header and buffers, each after its length (8 bytes, little endian)."""
    parts = [memoryview(part).cast("B") for part in (header, *buffers)]
    return [piece for part in parts for piece in (len(part).to_bytes(8, "little"), part)]


def join(header: bytes, buffers: Sequence[Any]) -> bytes:
    """Its pieces as one."""
    return b"".join(pieces(header, buffers))


def split(joined: bytes | memoryview) -> tuple[bytes, list[memoryview]]:
    """The header and buffers of `join`. StageError if it is not one (an agreed value comes from another peer)."""
    view, parts = memoryview(joined), []
    while view:
        size = int.from_bytes(view[:8], "little")
        if len(view) < 8 + size:
            raise StageError("an agreed value is cut off")
        parts.append(view[8 : 8 + size])
        view = view[8 + size :]
    if not parts:
        raise StageError("an agreed value is empty")
    return bytes(parts[0]), parts[1:]
