from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator

import pytest
import tcp_counters


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def watch(listener: socket.socket) -> Iterator[tcp_counters.Watch]:
    with contextlib.closing(tcp_counters.Watch([listener.getsockname()[1]])) as watch:
        yield watch


def receive(connection: socket.socket, size: int) -> None:
    while size:
        size -= len(connection.recv(size))


@pytest.mark.parametrize("ended", [False, True])
def test_the_kernel_counts_what_was_sent_over_living_and_ended_connections(listener, watch, ended: bool) -> None:
    port = listener.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)) as dialled:
        accepted, (_, other) = listener.accept()
        with accepted:
            dialled.sendall(b"x" * 100_000)
            receive(accepted, 100_000)
            accepted.sendall(b"y" * 777)
            receive(dialled, 777)
            if not ended:
                ends = {end.port: end for end in watch.read()}
                assert ends[other].inode == os.fstat(dialled.fileno()).st_ino
    if ended:  # the kernel tells of the end a little later
        until = time.monotonic() + 5
        while len(ends := {end.port: end for end in watch.read()}) < 2 and time.monotonic() < until:
            time.sleep(0.01)
    assert ends.keys() == {port, other}
    assert (ends[other].sent, ends[port].sent) == (100_000, 777)
    assert 777 <= ends[other].received <= 778  # the end of a stream counts as one
    assert 100_000 <= ends[port].received <= 100_001


def test_connections_of_other_ports_are_left_out(watch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, socket.create_connection(other.getsockname()):
        assert watch.read() == []


def test_the_sockets_of_a_process_are_found() -> None:
    with socket.socket() as one:
        inode = os.fstat(one.fileno()).st_ino
        assert inode in tcp_counters.sockets_of(os.getpid())
    assert inode not in tcp_counters.sockets_of(os.getpid())
