"""The daemon's side of a worker: a fresh interpreter with an empty environment, and one socket to it.

Rules
* The process inherits its socket (descriptor 0), /dev/null (1) and a pipe to the log (2); of the environment nothing
  but `ENVIRONMENT`; no working directory; a session of its own, so that Ctrl-C reaches the daemon alone.
* Nothing it says is trusted: what breaks the protocol ends it, and is told as WorkerCrashed.
* What it writes to standard error goes to the log, printable, at most LOG_BYTES of it.
* Whatever happens, `aclose` leaves no process behind.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

import trio

from fedpeer.errors import RemoteProtocolError, WorkerCrashed
from fedpeer.worker import protocol
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
GRACE_S = 5.0
"""How long a process may live on after it closed its socket, before it is killed."""


class WorkerProcess:
    """One worker. Made by `start`; after `next` or `answer` was cancelled only `aclose` is of use."""

    def __init__(self, process: trio.Process, connected: trio.socket.SocketType, log: Callable[[str], None]) -> None:
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
        command: Sequence[str] = COMMAND,
    ) -> WorkerProcess:
        """Start a process and hand it its stage. `log` is given each line of its standard error."""
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
        worker = cls(process, trio.socket.from_stdlib_socket(ours), log)
        try:
            await worker._send(start)
        except BaseException:
            await worker.aclose()
            raise
        return worker

    @property
    def pid(self) -> int:
        return self._process.pid

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
        with trio.move_on_after(GRACE_S):
            await self._process.wait()
        status = self._process.returncode
        if status is None:
            return "closed its socket"
        if status >= 0:
            return f"ended with exit status {status}"
        return f"was ended by {signal.Signals(-status).name}"

    async def _copy_log(self) -> None:
        """Hand standard error to the log until it ends; what is beyond LOG_BYTES is read and forgotten."""
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
