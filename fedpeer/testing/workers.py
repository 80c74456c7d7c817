"""A worker in this process: the stage's coroutine, asked step by step, for simulations of whole daemons.

It says and hears the same messages as a process does, through the same bytes and descriptors (worker/protocol.py),
and can be made to die at any of its steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import msgspec

from fedpeer import artifact, codec, stage
from fedpeer.errors import WorkerCrashed
from fedpeer.jobs.contract import FindStage
from fedpeer.peers import (
    AgreeRequest,
    CheckpointRequest,
    Peers,
    ProgressRequest,
    ReceiveRequest,
    Request,
    Resume,
    SendRequest,
    SumRequest,
    Total,
)
from fedpeer.secure import fixedpoint
from fedpeer.worker import main, protocol


class CoroutineWorker:
    """One run of a stage.

    `step` is called whenever the daemon has something of the worker or the worker of the daemon, with the message; it
    returns True for the worker to die at this point (before the daemon has the request, or the worker the answer).
    """

    def __init__(
        self,
        start: protocol.Start,
        find: FindStage = stage.find,
        step: Callable[[protocol.Message], Awaitable[bool]] | None = None,
    ) -> None:
        self._step = step
        self._said: deque[protocol.Message] = deque()
        self._answered: Callable[[Any], Any] | None = None  # makes the stage's value of the awaited answer
        self._dead = False
        start = through(start, protocol.Start, files=True)
        self._stage = find(start.stage)
        resume, keys = _resume(start.resume), main.keys_of(start)
        roles, trusted = dict(start.roles), start.semi_honest
        self._peers = Peers(self, start.me, roles, start.chance, resume, start.honest, keys, trusted)
        self._start = start
        self._coroutine: Coroutine[Request, Any, Any] | None = None

    # what the daemon does (jobs.execution.Worker)

    async def next(self) -> Any:
        if not self._said:
            self._advance(None)
        message = through(self._said.popleft(), protocol.Request)
        await self._live_on(message)
        return message

    async def answer(self, answer: protocol.Answer) -> None:
        await self._live_on(answer)
        assert self._answered is not None
        value, self._answered = self._answered(through(answer, protocol.Answer)), None
        self._advance(value)

    async def aclose(self) -> None:
        self._dead = True
        if self._coroutine is not None:
            self._coroutine.close()

    # what the stage does (peers.Driver)

    def post(self, request: Request) -> None:
        match request:
            case SendRequest(to, tag, value):
                self._said.append(protocol.Send(to, tag, *codec.pack_value(value)))
            case CheckpointRequest(turn, shared, own, chance):
                packed = codec.pack_value(dict(shared)), codec.pack_value(dict(own))
                self._said.append(protocol.Checkpoint(turn, *packed, chance))
            case ProgressRequest(done, of, metrics):
                self._said.append(protocol.Progress(done, of, dict(metrics)))

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return [function(item) for item in items]

    def _advance(self, value: Any) -> None:
        """Let the stage go on to its next await, or to its end."""
        try:
            if self._coroutine is None:
                params = msgspec.json.decode(self._start.params, type=self._stage.params)
                inputs = {port: artifact.load(kind, content) for port, kind, content in self._start.inputs}
                self._coroutine = self._stage(self._peers, params, **inputs)
            self._ask(self._coroutine.send(value))
        except StopIteration as end:
            outputs = [(name, artifact.dump(output)) for name, output in end.value.items() if output is not None]
            self._said.append(protocol.Done(outputs))
        except Exception as error:
            self._said.append(main.failure(error))

    def _ask(self, request: Request) -> None:
        match request:
            case ReceiveRequest(sender, tag):
                self._said.append(protocol.Receive(sender, tag))
                self._answered = _value
            case AgreeRequest(tag, value):
                self._said.append(protocol.Agree(tag, *codec.pack_value(value)))
                self._answered = _value
            case SumRequest(tag, values, chance):
                layout, vector = fixedpoint.encode(values, self._stage.codecs(tag), chance)
                self._said.append(protocol.Sum(tag, layout, vector))
                self._answered = lambda total: Total(
                    fixedpoint.decode(layout, total.vector, len(total.survivors)), total.survivors
                )

    async def _live_on(self, message: protocol.Message) -> None:
        if self._dead or (self._step is not None and await self._step(message)):
            self._dead = True
            raise WorkerCrashed("the worker was killed (signal SIGKILL)")


def through(message: protocol.Message, kind: Any, *, files: bool = False) -> Any:
    """A message as it arrives at the other end of the socket."""
    frame, descriptors = protocol.pack(message)
    return protocol.unpack(kind, frame[protocol.PREFIX_BYTES :], descriptors, files=files)


def _resume(saved: protocol.Resume | None) -> Resume | None:
    if saved is None:
        return None
    return Resume(saved.turn, codec.unpack_value(*saved.shared), codec.unpack_value(*saved.own), saved.chance)


def _value(answer: protocol.Value) -> Any:
    return codec.unpack_value(answer.header, answer.buffers)
