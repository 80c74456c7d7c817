"""The relay that plays a network that fails."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from relay import Relay


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve(end: socket.socket) -> None:
        while data := end.recv(1000):
            end.sendall(data)
        end.close()

    def accept() -> None:
        while True:
            try:
                threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def dial(relay: Relay) -> socket.socket:
    return socket.create_connection(("127.0.0.1", relay.port), timeout=5)


def test_bytes_go_both_ways_and_an_end_ends_the_other_side_too(echo: int) -> None:
    with dial(Relay(echo)) as one:
        for data in (b"a", b"b" * 900):
            one.sendall(data)
            assert one.recv(len(data), socket.MSG_WAITALL) == data
        one.shutdown(socket.SHUT_WR)
        while one.recv(1000):
            pass


def test_a_cut_ends_what_is_connected_and_refuses_all_until_it_is_healed(echo: int) -> None:
    relay = Relay(echo)
    with dial(relay) as one:
        one.sendall(b"a")
        assert one.recv(10) == b"a"
        relay.cut()
        assert one.recv(10) == b""
    with dial(relay) as other:
        assert other.recv(10) == b""
    relay.heal()
    with dial(relay) as again:
        again.sendall(b"b")
        assert again.recv(10) == b"b"


def test_a_relay_in_front_of_nobody_hangs_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        relay = Relay(server.getsockname()[1])
    with dial(relay) as one:
        assert one.recv(10) == b""
