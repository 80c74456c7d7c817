"""The daemon's side of a worker: a fresh interpreter with an empty environment, and one socket to it.

Rules
* Where systemd's worker socket is (sandbox.unit_socket), connecting to it makes a worker of its own user, with nothing
  of this machine but its interpreter; else it is a child of the daemon. Both confine themselves (sandbox.py). A socket
  that is there and does not answer is an error, never a reason to do with less.
* The process inherits its socket (descriptor 0), /dev/null (1) and a pipe to the log (2); of the environment nothing
  but `ENVIRONMENT`; no working directory; a session of its own, so that Ctrl-C reaches the daemon alone.
* Nothing it says is trusted: what breaks the protocol ends it, and is told as WorkerCrashed.
* What it writes to standard error goes to the log, printable, at most LOG_BYTES of it.
* Whatever happens, `aclose` leaves no child behind. A unit's worker is another user's: it ends when its socket does.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from fedpeer.errors import RemoteProtocolError, SandboxError, WorkerCrashed
from fedpeer.worker import protocol, sandbox
from fedpeer.worker.connection import CONTROL_BYTES, ancillary, received

COMMAND = (sys.executable, "-I", "-m", "fedpeer.worker.main")
ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",  # peers.map is the parallelism; Arrow's pool heeds this one too
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # a thread that is there at the start cannot be confined
}
LOG_BYTES = 64 * 1024
MAX_LINE = 400
PEERCRED = struct.Struct("@iII")
"""struct ucred: process, user, group; of a listening socket, those of who listens"""
GRACE_S = 5.0
"""How long a process may live on after it closed its socket, before it is killed."""


class WorkerProcess:
    """One worker. Made by `start`; after `next` or `answer` was cancelled only `aclose` is of use."""

    def __init__(
        self, process: trio.Process | None, connected: trio.socket.SocketType, log: Callable[[str], None]
    ) -> None:
        self._process = process
        self._socket = connected
        self._log = log
        self._room = LOG_BYTES
        self._line = b""

    @classmethod
    async def start(
        cls,
        start: protocol.Start,
        *,
        log: Callable[[str], None] = lambda line: None,
        command: Sequence[str] = (),
    ) -> WorkerProcess:
        """Get a worker and hand it its stage. `log` is given each line of its standard error (a unit's goes nowhere).

        `command`: start this, whether there is a worker socket or not. SandboxError if the socket is not systemd's.
        """
        if not command and (path := sandbox.unit_socket()) is not None:
            worker = cls(None, await _connect(path), log)
        else:
            worker = await cls._child(command or COMMAND, log)
        try:
            await worker._send(start)
        except BaseException:
            await worker.aclose()
            raise
        return worker

    @classmethod
    async def _child(cls, command: Sequence[str], log: Callable[[str], None]) -> WorkerProcess:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await trio.lowlevel.open_process(
                command,
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,
            )
        return cls(process, trio.socket.from_stdlib_socket(ours), log)

    @property
    def pid(self) -> int:
        """0: the unit's, which systemd knows."""
        return 0 if self._process is None else self._process.pid

    async def next(self) -> protocol.Request:
        """What the worker asks next. WorkerCrashed when it ended before Done or Failed, naming how."""
        crash: WorkerCrashed | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._copy_log)
            try:
                request = await self._receive()
            except WorkerCrashed as error:
                crash = error
            nursery.cancel_scope.cancel()
        if crash is not None:
            raise crash
        return request

    async def answer(self, answer: protocol.Answer) -> None:
        """Answer its last Receive, Sum or Agree. A worker that is gone is told by `next`."""
        await self._send(answer)

    async def aclose(self) -> None:
        """End the process, and everything it forked, and wait until it is gone."""
        if self._process is None:
            await self._leave()
            return
        self._socket.close()
        with trio.CancelScope(shield=True):
            if self._process.returncode is None:  # not reaped, so this process group is still ours
                os.killpg(self.pid, signal.SIGKILL)
            await self._process.wait()
            with trio.move_on_after(GRACE_S):
                await self._copy_log()  # it ends when the last of them is gone
            if self._line:
                self._log_line(self._line)
            assert self._process.stderr is not None
            await self._process.stderr.aclose()

    async def _leave(self) -> None:
        """Close the socket of a unit's worker, which ends it, and see that it has ended."""
        with trio.move_on_after(GRACE_S) as waiting:
            waiting.shield = True
            try:
                self._socket.shutdown(socket.SHUT_WR)
                while await self._socket.recv(LOG_BYTES):
                    pass
            except OSError:
                pass
        self._socket.close()
        if waiting.cancelled_caught:
            self._log("(the worker did not end: systemctl stop 'fedpeer-worker@*')")

    async def _send(self, message: protocol.Message) -> None:
        frame, descriptors = protocol.pack(message)
        try:
            sent = await self._socket.sendmsg([frame], ancillary(descriptors))
            while sent < len(frame):
                sent += await self._socket.send(memoryview(frame)[sent:])
        except OSError:
            return
        finally:
            protocol.close(descriptors)

    async def _receive(self) -> protocol.Request:
        try:
            request = await self._read_message()
        except RemoteProtocolError as error:
            raise WorkerCrashed(f"the worker broke the protocol ({error.message}) and was ended") from None
        if request is None:
            raise WorkerCrashed(f"the worker {await self._how_it_ended()} without a result")
        return request

    async def _read_message(self) -> protocol.Request | None:
        """The next message, or None at the end of the socket, wherever that is."""
        try:
            prefix, control, flags, _ = await self._socket.recvmsg(
                protocol.PREFIX_BYTES, CONTROL_BYTES, socket.MSG_CMSG_CLOEXEC
            )
            if not prefix:
                return None
            descriptors = received(control, flags)
            try:
                body = await self._read(protocol.size_of(prefix))
            except BaseException:
                protocol.close(descriptors)
                raise
        except OSError:
            return None
        request: protocol.Request = protocol.unpack(protocol.Request, body, descriptors)
        return request

    async def _read(self, size: int) -> bytes:
        body = bytearray()
        while len(body) < size:
            piece = await self._socket.recv(size - len(body))
            if not piece:
                raise ConnectionResetError("the worker ended in the middle of a message")
            body += piece
        return bytes(body)

    async def _how_it_ended(self) -> str:
        if self._process is None:
            return "of fedpeer-worker.socket closed its connection (journalctl -u 'fedpeer-worker@*' tells more)"
        with trio.move_on_after(GRACE_S):
            await self._process.wait()
        status = self._process.returncode
        if status is None:
            return "closed its socket"
        if status >= 0:
            return f"ended with exit status {status}"
        name = signal.Signals(-status).name
        killed = " (as by a limit of memory: of its control group, or of the machine)" if name == "SIGKILL" else ""
        return f"was ended by {name}{killed}"

    async def _copy_log(self) -> None:
        """Hand standard error to the log until it ends; what is beyond LOG_BYTES is read and forgotten."""
        if self._process is None:
            return
        assert self._process.stderr is not None
        async for piece in self._process.stderr:
            *lines, self._line = (self._line + piece).split(b"\n")
            if len(self._line) > MAX_LINE:
                lines.append(self._line)
                self._line = b""
            for line in lines:
                self._log_line(line)

    def _log_line(self, line: bytes) -> None:
        if self._room <= 0:
            return
        self._room -= len(line) + 1
        text = line[:MAX_LINE].decode(errors="backslashreplace")
        self._log("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))
        if self._room <= 0:
            self._log("(the worker wrote more than that; the rest is not kept)")


async def _connect(path: Path) -> trio.socket.SocketType:
    """A worker of the unit: systemd listens, and starts one for each connection. SandboxError if it is not systemd."""
    remedy = "systemctl status fedpeer-worker.socket; without the unit: systemctl disable --now fedpeer-worker.socket"
    connected = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await connected.connect(os.fspath(path))
        listener = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEERCRED.size)
    except OSError as error:
        connected.close()
        raise SandboxError(f"the worker socket {path} does not answer: {error.strerror}", hint=remedy) from None
    except BaseException:
        connected.close()
        raise
    process, user, _ = PEERCRED.unpack(listener)
    if user not in (0, os.geteuid()):
        connected.close()
        raise SandboxError(
            f"the worker socket {path} belongs to user {user} (process {process}), not to systemd", hint=remedy
        )
    return connected
