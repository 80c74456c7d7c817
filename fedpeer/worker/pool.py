"""Peers.map: the items of a list on all cores, in forked children that hand their results back over sockets.

Child c of n takes the items c, c + n, c + 2n …; the parent reads the results in the order of the items, so that the
results, and which error is raised when there are several, do not depend on n. One core, too, means one child: what
a function changes in place is lost in either case. A result is a message value (codec.py); nothing is pickled.
In a child the daemon's socket is closed and in its place one without another end, so that a request there is an error.
A child ends when its parent ends, or has closed the socket between them: a confined process kills no other.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fedpeer import codec
from fedpeer.errors import WorkerCrashed, by_code
from fedpeer.worker import protocol, sandbox
from fedpeer.worker.connection import Connection


def map_forked(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    processes: int,
    failure: Callable[[BaseException], protocol.Failed],
    daemon: int,
) -> list[Any]:
    """[function(item) for item in items], computed by at most `processes` children.

    `failure` says what an exception of the function is called; that error is raised here. `daemon` is the descriptor
    of the daemon's socket. WorkerCrashed if a child ends without its results.
    """
    count = min(processes, len(items))
    children: list[tuple[int, Connection]] = []
    try:
        for number in range(count):
            children.append(_fork(function, items[number::count], failure, daemon))  # noqa: PERF401 - one may fail
        return [_result(children[index % count]) for index in range(len(items))]
    finally:
        for _, connection in children:
            connection.close()
        for process, _ in children:
            os.waitpid(process, 0)


def _fork(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    failure: Callable[[BaseException], protocol.Failed],
    daemon: int,
) -> tuple[int, Connection]:
    ours, theirs = socket.socketpair()
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the other thread sleeps in poll(2) and holds no lock
        process = os.fork()
    if process == 0:
        ours.close()
        _child(function, items, failure, daemon, Connection(theirs), parent)
    theirs.close()
    return process, Connection(ours)


def _child(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    failure: Callable[[BaseException], protocol.Failed],
    daemon: int,
    connection: Connection,
    parent: int,
) -> NoReturn:
    status = 1
    try:
        sandbox.die_with_parent(parent)
        _cut_off(daemon)
        threading.Thread(target=end_with, args=(connection.fileno(),), daemon=True).start()
        for item in items:
            try:
                answer: protocol.Value | protocol.Failed = protocol.Value(*codec.pack_value(function(item)))
            except BaseException as error:
                answer = failure(error)
            connection.send(answer)
        status = 0
    finally:
        os._exit(status)


def _cut_off(descriptor: int) -> None:
    nowhere, other = socket.socketpair()
    with nowhere, other:
        os.dup2(nowhere.fileno(), descriptor)


def end_with(descriptor: int) -> None:
    """End this process when the other end of a socket is closed; what a thread of its own waits for."""
    hangup = select.poll()
    hangup.register(descriptor, select.POLLRDHUP)
    hangup.poll()
    os._exit(1)


def _result(child: tuple[int, Connection]) -> Any:
    _, connection = child
    try:
        answer = connection.receive(protocol.Value | protocol.Failed)
    except ConnectionError:
        answer = None
    if answer is None:
        raise WorkerCrashed("a process of peers.map ended without its result: killed, or out of memory")
    if isinstance(answer, protocol.Failed):
        raise by_code(answer.code)(answer.message, hint=answer.hint)
    return codec.unpack_value(answer.header, answer.buffers)
