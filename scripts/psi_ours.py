"""One party of vertical.align: a file in, the rows of the common ids out as a file. Run by bench_psi.py.

    psi_ours.py ROLE PROTOCOL PORT IN OUT      says "ready", waits for a line, and says the seconds and the bytes sent

The stage is what a worker runs, and chooses the protocol by itself; its messages go over a TCP connection of loopback
instead of the daemons'. Checkpoints are packed, and not written to a disk.
"""

from __future__ import annotations

import os
import queue
import socket
import struct
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv

from fedpeer import codec
from fedpeer.algorithms.vertical import align
from fedpeer.peers import CheckpointRequest, Peers, ReceiveRequest, Request, SendRequest
from fedpeer.stage import Rows, Table
from fedpeer.worker.main import failure
from fedpeer.worker.pool import map_forked

ALIASES = {"guest": "alice", "host": "bob"}
HEAD = struct.Struct("<HIQ")


class Wire:
    """The driver of a stage, whose only other participant is at the other end of a socket."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream, self.sent = stream, 0
        self._out: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()
        self._in: dict[str, deque[Any]] = defaultdict(deque)
        self._writer = threading.Thread(target=self._write)
        self._writer.start()

    def post(self, request: Request) -> None:
        if isinstance(request, SendRequest):
            header, buffers = codec.pack_value(request.value)
            parts = [bytes(header), *buffers]
            tag, size = request.tag.encode(), sum(memoryview(part).nbytes for part in parts)
            sizes = struct.pack(f"<{len(parts)}I", *(memoryview(part).nbytes for part in parts))
            self.sent += size
            self._out.put([HEAD.pack(len(tag), len(parts), size), tag, sizes, *parts])
        elif isinstance(request, CheckpointRequest):
            codec.pack_value(dict(request.own))

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return map_forked(function, items, len(os.sched_getaffinity(0)), failure, self._stream.fileno())

    def receive(self, tag: str) -> Any:
        while not self._in[tag]:
            length, count, _ = HEAD.unpack(self._read(HEAD.size))
            name = bytes(self._read(length)).decode()
            sizes = struct.unpack(f"<{count}I", self._read(4 * count))
            header, *buffers = [self._read(size) for size in sizes]
            self._in[name].append(codec.unpack_value(bytes(header), buffers))
        return self._in[tag].popleft()

    def close(self) -> None:
        self._out.put(None)
        self._writer.join()

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            got = self._stream.recv_into(view)
            if not got:
                raise ConnectionError("the other party is gone")
            view = view[got:]
        return data

    def _write(self) -> None:
        while (parts := self._out.get()) is not None:
            for part in parts:
                self._stream.sendall(memoryview(part).cast("B"))


def connected(role: str, port: int) -> socket.socket:
    if role == "guest":
        with socket.create_server(("127.0.0.1", port)) as server:
            print("ready", flush=True)
            stream = server.accept()[0]
    else:
        stream = socket.create_connection(("127.0.0.1", port))
        print("ready", flush=True)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return stream


def main() -> None:
    role, protocol, port, source, target = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5]
    wire = Wire(connected(role, port))
    sys.stdin.readline()
    begun = time.perf_counter()
    text = pyarrow.csv.ConvertOptions(column_types={"id": pa.string()})
    data = pyarrow.csv.read_csv(source, convert_options=text)
    roles = {alias: held for held, alias in ALIASES.items()}
    semi_honest = set(ALIASES.values()) - {ALIASES[role]} if protocol == "kkrt" else ()
    peers = Peers(wire, ALIASES[role], roles, os.urandom(32), semi_honest=semi_honest)
    params = align.Align(max_ids=max(data.num_rows, 1000), min_intersection=0)
    stage, answer = align.run(peers, params, Table(data, id="id")), None
    try:
        while True:
            request = stage.send(answer)
            assert isinstance(request, ReceiveRequest)
            answer = wire.receive(request.tag)
    except StopIteration as end:
        rows = end.value["rows"]
    assert isinstance(rows, Rows)
    pyarrow.csv.write_csv(data.take(pa.array(rows.index)), target)
    seconds = time.perf_counter() - begun
    wire.close()
    print(seconds, wire.sent, flush=True)


main()
