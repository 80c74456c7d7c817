"""A blocking end of a socket that speaks protocol.py: the worker's, and those of its forked children."""

from __future__ import annotations

import socket
from array import array
from collections.abc import Sequence
from typing import Any

from fedpeer.errors import RemoteProtocolError
from fedpeer.worker import protocol


class Connection:
    """Messages over a connected unix stream socket, one after the other."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: protocol.Message) -> None:
        """Blocks until the kernel has it all. OSError if the other end is closed."""
        frame, descriptors = protocol.pack(message)
        try:
            sent = self._socket.sendmsg([frame], ancillary(descriptors))
        finally:
            protocol.close(descriptors)
        if sent < len(frame):
            self._socket.sendall(memoryview(frame)[sent:])

    def receive(self, kind: Any, *, files: bool = False) -> Any:
        """The next message, one of `kind`; None when the other end is closed. RemoteProtocolError for anything else."""
        prefix, control, flags, _ = self._socket.recvmsg(
            protocol.PREFIX_BYTES, CONTROL_BYTES, socket.MSG_CMSG_CLOEXEC | socket.MSG_WAITALL
        )
        descriptors = received(control, flags)
        try:
            if not prefix:
                return None
            body = self._read(protocol.size_of(prefix))
        except BaseException:
            protocol.close(descriptors)
            raise
        return protocol.unpack(kind, body, descriptors, files=files)

    def close(self) -> None:
        self._socket.close()

    def _read(self, size: int) -> bytes:
        body = bytearray()
        while len(body) < size:
            piece = self._socket.recv(size - len(body))
            if not piece:
                raise ConnectionResetError("the other end closed in the middle of a message")
            body += piece
        return bytes(body)


CONTROL_BYTES = socket.CMSG_LEN(protocol.MAX_DESCRIPTORS * array("i").itemsize)


def ancillary(descriptors: Sequence[int]) -> list[tuple[int, int, array[int]]]:
    """What sendmsg takes to pass these descriptors on."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []


def received(control: Sequence[tuple[int, int, bytes]], flags: int) -> list[int]:
    """The descriptors in what recvmsg gave (the caller closes them). RemoteProtocolError if there were too many."""
    descriptors = array("i")
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    if flags & socket.MSG_CTRUNC:
        protocol.close(descriptors)
        raise RemoteProtocolError("more descriptors than a message may have")
    return descriptors.tolist()
