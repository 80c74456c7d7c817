"""A TCP relay that can be switched off: what a network does to one machine that is cut off from all others."""

from __future__ import annotations

import contextlib
import socket
import threading

BLOCK = 1 << 16


class Relay:
    """Whoever connects to `port` of the loopback is connected with `target`; nobody, while it is cut."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._server = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._whole = True
        self._ends: set[socket.socket] = set()
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End every connection, and let no other come about. What was under way is lost."""
        with self._lock:
            self._whole = False
            for end in self._ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def heal(self) -> None:
        with self._lock:
            self._whole = True

    def _accept(self) -> None:
        while True:
            came, _ = self._server.accept()
            with self._lock, contextlib.suppress(OSError):
                if self._whole:
                    pair = came, socket.create_connection(("127.0.0.1", self._target))
                    self._ends.update(pair)
                    for source, sink in (pair, pair[::-1]):
                        threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()
                    continue
            came.close()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        """What comes at one end goes out at the other, until either ends."""
        with contextlib.suppress(OSError):
            while data := source.recv(BLOCK):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()  # the other way's source is the other end
        with self._lock:
            self._ends.discard(source)
