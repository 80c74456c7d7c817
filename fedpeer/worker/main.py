"""The worker process: one stage at this peer, driven by a blocking loop. `python -I -m fedpeer.worker.main`.

    daemon                     worker
      Start          ──────▶
                     ◀──────   Send, Checkpoint, Progress        no answer
                     ◀──────   Receive, Sum, Agree
      Value, Total   ──────▶
                     ◀──────   Done or Failed, and the end

Descriptor 0 is the socket to the daemon, 1 is /dev/null, 2 goes to the daemon's log. The process knows no key, no
peer's address, no path and no event loop. It ends with its daemon: a thread waits for the socket's end. Before it
imports the stage it is confined for good (sandbox.py); numpy and pyarrow are there by then.
What it says of an exception of the stage is the type and the place: a message may quote data. The same goes for
standard error, which gets the frames of the traceback and not the message.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import PurePath
from types import TracebackType
from typing import Any, Final

import msgspec

from fedpeer import artifact, codec, stage
from fedpeer.crypto import Secret
from fedpeer.errors import FedpeerError, StageError
from fedpeer.peers import (
    AgreeRequest,
    CheckpointRequest,
    Keys,
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
from fedpeer.worker import protocol, sandbox
from fedpeer.worker.connection import Connection
from fedpeer.worker.pool import end_with, map_forked

SOCKET: Final = 0


def main() -> None:
    """Run the stage that the daemon asks for, confined."""
    sandbox.keep_private()
    sandbox.keep_streams_only()
    sys.stdin = None  # a stage that reads it fails, and swallows no answer
    daemon = Connection(socket.socket(fileno=SOCKET))
    try:
        start = daemon.receive(protocol.Start, files=True)
        if start is None:  # the daemon is gone
            return
        modules = [start.stage.partition(":")[0]] if start.own else []
        sandbox.confine(memory=start.memory, modules=modules, best_effort=start.best_effort)
        threading.Thread(target=end_with, args=(SOCKET,), daemon=True).start()
        daemon.send(run(start, daemon))
    except BaseException as error:
        try:
            daemon.send(failure(error))
        except OSError:  # there is nobody left to tell
            os._exit(1)


class Daemon:
    """The driver of a stage: its requests as messages to the daemon."""

    def __init__(self, connection: Connection, declared: stage.Stage) -> None:
        self._connection, self._declared = connection, declared

    def post(self, request: Request) -> None:
        """Say what has no answer."""
        match request:
            case SendRequest(to, tag, value):
                self._connection.send(protocol.Send(to, tag, *codec.pack_value(value)))
            case CheckpointRequest(turn, shared, own, chance):
                packed = codec.pack_value(dict(shared)), codec.pack_value(dict(own))
                self._connection.send(protocol.Checkpoint(turn, *packed, chance))
            case ProgressRequest(done, of, metrics):
                self._connection.send(protocol.Progress(done, of, dict(metrics)))

    def ask(self, request: object) -> Any:
        """Say what has an answer, and wait for it."""
        match request:
            case ReceiveRequest(sender, tag):
                return self._value(protocol.Receive(sender, tag))
            case AgreeRequest(tag, value):
                return self._value(protocol.Agree(tag, *codec.pack_value(value)))
            case SumRequest(tag, values, chance):
                layout, vector = fixedpoint.encode(values, self._declared.codecs(tag), chance)
                self._connection.send(protocol.Sum(tag, layout, vector))
                del vector  # the daemon has it; it may be as large as a model
                total = self._answer(protocol.TotalAnswer)
                return Total(fixedpoint.decode(layout, total.vector, len(total.survivors)), total.survivors)
        raise StageError(
            f"the stage awaited something else than a method of its peers (it gave a {type(request).__name__})",
            hint="a stage has no event loop: no asyncio, no trio, no sleep",
        )

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return map_forked(function, items, len(os.sched_getaffinity(0)), failure, self._connection.fileno())

    def _value(self, request: protocol.Message) -> Any:
        self._connection.send(request)
        answer = self._answer(protocol.Value)
        return codec.unpack_value(answer.header, answer.buffers)

    def _answer(self, kind: Any) -> Any:
        answer = self._connection.receive(kind)
        if answer is None:
            raise ConnectionResetError("the daemon closed the socket")
        return answer


def run(start: protocol.Start, connection: Connection) -> protocol.Done:
    """The stage from its first line, or from its checkpoint, to its outputs."""
    declared = stage.find(start.stage, own=[start.stage] if start.own else ())
    daemon = Daemon(connection, declared)
    params = msgspec.json.decode(start.params, type=declared.params)
    inputs = {port: artifact.load(kind, content) for port, kind, content in start.inputs}
    resume, keys = _resume(start.resume), keys_of(start)
    peers = Peers(daemon, start.me, dict(start.roles), start.chance, resume, start.honest, keys)
    outputs = declared.check_outputs(drive(declared(peers, params, **inputs), daemon))
    return protocol.Done([(name, artifact.dump(output)) for name, output in outputs.items() if output is not None])


def drive(coroutine: Any, daemon: Daemon) -> Any:
    """What the stage returns. Each of its awaits is one request."""
    answer = None
    while True:
        try:
            request = coroutine.send(answer)
        except StopIteration as end:
            return end.value
        answer = daemon.ask(request)


def failure(error: BaseException) -> protocol.Failed:
    """An exception of the stage as the daemon is told: ours as they are, others by type and place."""
    if isinstance(error, FedpeerError):
        return protocol.failure(error)
    traceback.print_tb(error.__traceback__)
    if isinstance(error, MemoryError):
        hint = "offer fewer rows or columns, or run the daemon where there is more memory"
        return protocol.failure(StageError(f"out of memory {_place(error.__traceback__)}", hint=hint))
    return protocol.failure(StageError(f"{type(error).__name__} {_place(error.__traceback__)}"))


def _place(trace: TracebackType | None) -> str:
    """The innermost line of an algorithm in a traceback, or the innermost line."""
    frames = traceback.extract_tb(trace)
    ours = [frame for frame in frames if "algorithms" in PurePath(frame.filename).parts] or frames
    if not ours:
        return "(no place)"
    path = PurePath(ours[-1].filename)
    return f"in {path.parent.name}/{path.name}, line {ours[-1].lineno}, in {ours[-1].name}"


def keys_of(start: protocol.Start) -> Keys:
    """As the stage sees them."""
    own = Secret(start.own_key) if start.own_key else None
    return Keys(own, {alias: int.from_bytes(n, "big") for alias, n in start.moduli})


def _resume(saved: protocol.Resume | None) -> Resume | None:
    if saved is None:
        return None
    return Resume(saved.turn, codec.unpack_value(*saved.shared), codec.unpack_value(*saved.own), saved.chance)


if __name__ == "__main__":
    main()
