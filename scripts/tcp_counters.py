"""What the kernel says of TCP sockets: bytes sent and received on every connection of some local ports.

Netlink's sock_diag (Linux) is asked for the sockets that live, and tells of those that end (a multicast group that
needs no privilege), each with its tcp_info. Nothing of fedpeer is used: it is a check from outside.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

NETLINK_SOCK_DIAG, TCP_DESTROY_GROUP = 4, 1
SOCK_DIAG_BY_FAMILY, NLMSG_ERROR, NLMSG_DONE, NLM_DUMP = 20, 2, 3, 0x301
INET_DIAG_INFO = 2
LISTEN, TIME_WAIT = 10, 6
BYTES_RECEIVED, BYTES_SENT, BYTES_RETRANSMITTED = 128, 200, 208  # offsets in struct tcp_info (Linux 4.19)


@dataclass(frozen=True)
class Connection:
    """One end of a connection: ports of this end and of the other, and what this end sent and received."""

    inode: int
    port: int
    other_port: int
    sent: int
    received: int


class Watch:
    """Every connection with `ports` at one of its ends, from now on. Raises OSError where there is no netlink."""

    def __init__(self, ports: Collection[int]) -> None:
        self._ports = frozenset(ports)
        self._seen: dict[bytes, Connection] = {}
        self._ended = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG)
        self._ended.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._ended.bind((0, 1 << (TCP_DESTROY_GROUP - 1)))
        self._ended.setblocking(False)

    def read(self) -> list[Connection]:
        """All connections since this watch began, the ended ones with their last numbers."""
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG) as ask:
            wanted = ~(1 << LISTEN | 1 << TIME_WAIT) & 0xFFFFFFFF
            body = struct.pack("=BBBBI48x", socket.AF_INET, socket.IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), 0, wanted)
            ask.send(struct.pack("=IHHII", 16 + len(body), SOCK_DIAG_BY_FAMILY, NLM_DUMP, 1, 0) + body)
            while self._keep(ask.recv(1 << 16)):
                pass
        try:
            while True:
                self._keep(self._ended.recv(1 << 16))
        except BlockingIOError:
            return list(self._seen.values())

    def close(self) -> None:
        self._ended.close()

    def _keep(self, data: bytes) -> bool:
        """Take the sockets of some netlink messages; False after the last one of an answer."""
        for kind, message in _messages(data):
            if kind == NLMSG_DONE:
                return False
            if kind == NLMSG_ERROR:
                raise OSError(-struct.unpack_from("=i", message)[0], "sock_diag refused")
            port, other_port = struct.unpack_from("!HH", message, 4)
            info = next((value for key, value in _attributes(message[72:]) if key == INET_DIAG_INFO), b"")
            if (port in self._ports or other_port in self._ports) and len(info) >= BYTES_RETRANSMITTED + 8:
                (received,) = struct.unpack_from("=Q", info, BYTES_RECEIVED)
                sent, again = struct.unpack_from("=QQ", info, BYTES_SENT)
                (inode,) = struct.unpack_from("=I", message, 68)
                cookie = message[44:52]  # names a socket, for ever
                before = self._seen.get(cookie)
                inode = inode or (before.inode if before else 0)  # an ended socket belongs to no file any more
                self._seen[cookie] = Connection(inode, port, other_port, sent - again, received)
        return True


def sockets_of(process: int) -> set[int]:
    """The inodes of the sockets that a process holds. Raises PermissionError when it may not be looked into."""
    held = set()
    for entry in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            link = str(entry.readlink())
            if link.startswith("socket:["):
                held.add(int(link[8:-1]))
    return held


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        size, kind = struct.unpack_from("=IH", data)
        yield kind, data[16:size]
        data = data[(size + 3) & ~3 :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        size, kind = struct.unpack_from("=HH", data)
        yield kind, data[4:size]
        data = data[(size + 3) & ~3 :]
