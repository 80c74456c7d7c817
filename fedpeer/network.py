"""Listening and connecting, as a small interface: real TCP here, a twin in memory in fedpeer.testing.network.

Rules
* An address is "host:port", with or without "tcp://" before it; an IPv6 host stands in brackets.
* `accept` never fails for a connection that is already gone, or for want of file descriptors: it goes on.
* A TCP stream has NODELAY, KEEPALIVE, and at most `NOTSENT_LOWAT` bytes in the kernel that are not on their way,
  so that what is chosen next (control before bulk) is next on the wire, too.
"""

from __future__ import annotations

import errno
import socket
from typing import Final, Protocol

import trio

from fedpeer.errors import ConfigError

NOTSENT_LOWAT: Final = 128 * 1024
_NO_ROOM: Final = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}


class Listener(Protocol):
    address: str
    """"host:port" as bound."""

    async def accept(self) -> tuple[trio.abc.Stream, str]:
        """The next connection and the address (without a port) that it came from. ClosedResourceError once closed."""

    async def aclose(self) -> None: ...


class Network(Protocol):
    async def listen(self, address: str) -> Listener:
        """Raises ConfigError that names the address."""

    async def connect(self, address: str) -> trio.abc.Stream:
        """Raises OSError if nobody is there, ConfigError if this is no address."""


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port", "[v6]:port", "tcp://host:port". Raises ConfigError."""
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    if not (colon and host and port.isascii() and port.isdecimal() and int(port) < 65536) or (":" in host) != bracketed:
        raise ConfigError(f"{address!r} is not an address", hint="write it as host:port, for example 0.0.0.0:7420")
    return host, int(port)


def format_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class TcpListener:
    def __init__(self, listener: trio.SocketListener) -> None:
        self._listener = listener
        host, port = listener.socket.getsockname()[:2]
        self.address = format_address(host, port)

    async def accept(self) -> tuple[trio.abc.Stream, str]:
        while True:
            try:
                stream = await self._listener.accept()
            except OSError as error:
                if error.errno in _NO_ROOM:
                    await trio.sleep(0.1)
                continue
            try:
                source: str = stream.socket.getpeername()[0]
                _tune(stream)
            except OSError:  # it is gone already
                await trio.aclose_forcefully(stream)
                continue
            return stream, source.removeprefix("::ffff:")

    async def aclose(self) -> None:
        await self._listener.aclose()


class TcpNetwork:
    async def listen(self, address: str) -> TcpListener:
        host, port = parse_address(address)
        sock = None
        try:
            family, _, _, _, name = (
                await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            )[0]
            sock = trio.socket.socket(family, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            await sock.bind(name)
            sock.listen(256)
        except OSError as error:
            if sock is not None:
                sock.close()
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"port {port} of {host} is in use",
                    hint="stop the other program, or choose another port with listen",
                ) from None
            raise ConfigError(f"cannot listen on {address}: {error.strerror or error}") from None
        return TcpListener(trio.SocketListener(sock))

    async def connect(self, address: str) -> trio.SocketStream:
        host, port = parse_address(address)
        stream = await trio.open_tcp_stream(host, port)
        _tune(stream)
        return stream


def _tune(stream: trio.SocketStream) -> None:
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # NODELAY is trio's default
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT)
