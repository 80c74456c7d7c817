"""A network in memory with the faults of a real one: the twin of fedpeer.network.TcpNetwork.

    network = MemoryNetwork()
    alice, bob = network.host("alice"), network.host("bob")     # each a Network; addresses are "bob:7420"
    network.cut("alice", "bob")                                 # connections break, new ones are refused, until heal

Faults
* `cut(a, b)`: every connection of the two breaks now; what was under way is lost. With `silent=True` nothing
  breaks: bytes vanish and connecting hangs, as behind a dead router; after `heal` old streams stay dead.
* `limits`: called for every new connection with (dialling host, accepting host); it returns after how many
  bytes in each direction (from the dialler, to the dialler) the connection breaks, None for never. The bytes up
  to there arrive, the sender is not told which ones did, and what is under way the other way is lost.
* `random`: with it each receive gets a part of random size of what is there, as small as one byte.
"""

from __future__ import annotations

import errno
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random

import trio

from fedpeer.errors import ConfigError

BUFFER = 64 * 1024


class MemoryNetwork:
    def __init__(self, *, random: Random | None = None) -> None:
        self.random = random
        self.limits: Callable[[str, str], tuple[int | None, int | None]] = lambda _from, _to: (None, None)
        self.connections = 0
        """How many were made."""
        self.broken = 0
        """How many broke at a limit or by `cut`."""
        self._listeners: dict[str, MemoryListener] = {}
        self._open: set[_Connection] = set()
        self._cut: dict[frozenset[str], bool] = {}  # to whether it is silent

    def host(self, name: str) -> MemoryHost:
        return MemoryHost(self, name)

    def cut(self, a: str, b: str, *, silent: bool = False) -> None:
        self._cut[frozenset((a, b))] = silent
        for connection in [c for c in self._open if {c.dialler, c.acceptor} == {a, b}]:
            if silent:
                connection.mute()
            else:
                connection.break_()

    def heal(self, a: str, b: str) -> None:
        self._cut.pop(frozenset((a, b)), None)


class MemoryHost:
    """One machine on the network."""

    def __init__(self, network: MemoryNetwork, name: str) -> None:
        self._network = network
        self.name = name

    async def listen(self, address: str) -> MemoryListener:
        await trio.lowlevel.checkpoint()
        _, _, port = address.removeprefix("tcp://").rpartition(":")
        if port == "0":
            port = str(next(p for p in range(40000, 65536) if f"{self.name}:{p}" not in self._network._listeners))
        bound = f"{self.name}:{port}"
        if bound in self._network._listeners:
            raise ConfigError(f"port {port} of {self.name} is in use")
        listener = self._network._listeners[bound] = MemoryListener(self._network, bound)
        return listener

    async def connect(self, address: str) -> MemoryStream:
        await trio.lowlevel.checkpoint()
        network = self._network
        address = address.removeprefix("tcp://")
        acceptor = address.rpartition(":")[0]
        silent = network._cut.get(frozenset((self.name, acceptor)))
        if silent:
            await trio.sleep(60)
            raise OSError(errno.ETIMEDOUT, "connection timed out")
        listener = network._listeners.get(address)
        if silent is not None or listener is None:
            raise OSError(errno.ECONNREFUSED, "connection refused")
        connection = _Connection(network, self.name, acceptor)
        listener._arrive(connection)
        return connection.ends[0]


class MemoryListener:
    def __init__(self, network: MemoryNetwork, address: str) -> None:
        self.address = address
        self._network = network
        self._send, self._receive = trio.open_memory_channel[_Connection](float("inf"))
        self._closed = False

    def _arrive(self, connection: _Connection) -> None:
        self._send.send_nowait(connection)

    async def accept(self) -> tuple[trio.abc.Stream, str]:
        connection = await self._receive.receive()
        return connection.ends[1], connection.dialler

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            del self._network._listeners[self.address]
            while True:
                try:
                    self._receive.receive_nowait().break_()
                except trio.WouldBlock:
                    break
            self._receive.close()
        await trio.lowlevel.checkpoint()


class _Direction:
    """Bytes on their way from one end to the other."""

    def __init__(self, limit: int | None) -> None:
        self.data = bytearray()
        self.limit = limit
        self.ended = False  # EOF follows the data
        self.broken = False  # an error follows the data
        self.muted = False
        self.changed = trio.lowlevel.ParkingLot()


class _Connection:
    def __init__(self, network: MemoryNetwork, dialler: str, acceptor: str) -> None:
        self.network, self.dialler, self.acceptor = network, dialler, acceptor
        there, back = (_Direction(limit) for limit in network.limits(dialler, acceptor))
        self.directions = (there, back)
        self.ends = (MemoryStream(self, back, there), MemoryStream(self, there, back))
        network.connections += 1
        network._open.add(self)

    def break_(self, *, keep: _Direction | None = None) -> None:
        """Both directions break; only what is under way in `keep` still arrives."""
        if self in self.network._open:
            self.network._open.discard(self)
            self.network.broken += 1
        for direction in self.directions:
            if direction is not keep:
                direction.data.clear()
            direction.broken = True
            direction.changed.unpark_all()

    def mute(self) -> None:
        for direction in self.directions:
            direction.data.clear()
            direction.muted = True


class MemoryStream(trio.abc.HalfCloseableStream):
    """One end of a connection. At most 64 KiB are under way in each direction."""

    def __init__(self, connection: _Connection, incoming: _Direction, outgoing: _Direction) -> None:
        self._connection, self._in, self._out = connection, incoming, outgoing
        self._closed = False
        self._busy: set[str] = set()

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        if what in self._busy:
            raise trio.BusyResourceError(f"another task does this already: {what}")
        self._busy.add(what)
        try:
            yield
        finally:
            self._busy.discard(what)

    def _check(self) -> None:
        if self._closed or self._out.ended:
            raise trio.ClosedResourceError("this stream was closed")
        if self._out.broken:
            raise trio.BrokenResourceError("the connection was cut")

    async def wait_send_all_might_not_block(self) -> None:
        with self._alone("send"):
            await trio.lowlevel.checkpoint()
            self._check()
            while len(self._out.data) >= BUFFER:
                await self._out.changed.park()
                self._check()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with self._alone("send"):
            await self._send(memoryview(data))

    async def _send(self, rest: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        out = self._out
        while True:
            self._check()
            if out.muted:
                return
            part = rest[: max(BUFFER - len(out.data), 0)]
            rest = rest[len(part) :]
            if out.limit is not None and len(part) >= out.limit:
                out.data += part[: out.limit]
                self._connection.break_(keep=out)
                return  # the sender does not learn it from this call
            if out.limit is not None:
                out.limit -= len(part)
            out.data += part
            out.changed.unpark_all()
            if not rest:
                return
            await out.changed.park()

    async def send_eof(self) -> None:
        with self._alone("send"):
            await trio.lowlevel.checkpoint()
            if not self._out.ended or self._closed:
                self._check()
            self._out.ended = True
            self._out.changed.unpark_all()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError("max_bytes must be at least 1")
        with self._alone("receive"):
            await trio.lowlevel.checkpoint()
            return await self._receive(max_bytes)

    async def _receive(self, max_bytes: int | None) -> bytes:
        incoming = self._in
        while True:
            if self._closed:
                raise trio.ClosedResourceError("this stream was closed")
            if incoming.data:
                size = min(len(incoming.data), max_bytes or BUFFER)
                if self._connection.network.random is not None:
                    size = self._connection.network.random.randint(1, size)
                part = bytes(incoming.data[:size])
                del incoming.data[:size]
                incoming.changed.unpark_all()
                return part
            if incoming.broken:
                raise trio.BrokenResourceError("the connection was cut")
            if incoming.ended:
                return b""
            await incoming.changed.park()

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            self._connection.network._open.discard(self._connection)
            self._out.ended = True
            self._in.broken = True  # what the other side still sends fails there
            self._in.data.clear()
            for direction in self._connection.directions:
                direction.changed.unpark_all()
        await trio.lowlevel.checkpoint()
