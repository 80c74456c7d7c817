"""Files between peers: what we offer to the audience of a scope, and what we fetch of others, from whomever it comes.

Rules
* Responsible for one file's way here: whom to ask and in which turn, over whom when no holder is connected, what is
  done when it is another file than was asked for, and that many who want it share one transfer. How its bytes are
  kept, verified and removed is in blobs.py; how its pieces go over one session is the session's.
* A file comes from several, who go on where the last one stopped. If the whole was wrong, one must bring all of it, so
  that it is known who lies; what comes over another peer convicts nobody, and is not asked for again for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from fedpeer.errors import LocalProtocolError, StoreError, TrustError
from fedpeer.mesh import blobs, records
from fedpeer.mesh.blobs import DigestOf, Fetched, Incoming
from fedpeer.mesh.connections.service import Connections
from fedpeer.mesh.gossip import Neighbours
from fedpeer.mesh.session.service import Bell
from fedpeer.store import Store, Transaction

PULL_AGAIN_S: Final = 0.2
SUSPECT_S: Final = 5.0
"""how long a file is not asked for, when over every relay a wrong one came"""


class Files:
    """The files that this peer offers and fetches.

    `neighbours` gives those of an open scope, and raises LocalProtocolError for any other.
    """

    def __init__(
        self, connections: Connections, store: Store, neighbours: Callable[[bytes], Neighbours], log: Any
    ) -> None:
        self.fetched = Fetched(store.folder)
        self.ways = Bell()
        """Rung by the Mesh when there may be another way to a file, or a scope was closed."""
        self._connections, self._roster = connections, connections.roster
        self._store, self._neighbours, self._log = store, neighbours, log
        self._fetching: dict[tuple[bytes, bytes], trio.Lock] = {}

    def offer(self, tx: Transaction, scope: bytes, digest: bytes, size: int) -> None:
        """Let the audience fetch a file of the store; it is removed when the scope is closed or the offer withdrawn.

        Raises LocalProtocolError if there is no such file, or no such scope.
        """
        if records.audience_of(tx, scope) is None:
            raise LocalProtocolError("this scope is not open")
        blobs.offer(tx, self._store, scope, digest, size)

    def withdraw(self, tx: Transaction, scope: bytes, digest: bytes) -> None:
        """End an offer, and forget what was fetched under this digest; after the commit the files go, too."""
        blobs.withdraw(tx, self._store, scope, digest)
        tx.after_commit(partial(self.fetched.remove, scope, digest))

    async def fetch(
        self, scope: bytes, digest: bytes, size: int, holders: Sequence[str], *, digest_of: DigestOf | None = None
    ) -> Path:
        """The file of that digest and size, from any of the holders (peer ids) that is connected; waits for one.

        While none is, neighbours that are connected to one are asked. `digest_of` of the whole must give the digest;
        without it hash_("fp.file", view) must. The file is whole, verified and durable, and stays until the scope is
        closed or it is withdrawn. Concurrent calls share one transfer. Raises TrustError if every holder itself sent
        something else (what comes over another peer convicts nobody), LocalProtocolError once closed.
        """
        if self._connections.me in holders and (own := self._store.path_of(digest)).exists():
            return own
        return await self.pull(scope, digest, size, holders, digest_of=digest_of)

    async def pull(
        self,
        scope: bytes,
        digest: bytes,
        size: int,
        holders: Sequence[str],
        *,
        digest_of: DigestOf | None = None,
        relays: bool = True,
    ) -> Path:
        """`fetch`, from others only; with `relays` False from the holders themselves only."""
        self._neighbours(scope)
        path = self.fetched.path_of(scope, digest)
        lock = self._fetching.setdefault((scope, digest), trio.Lock())
        try:
            async with lock:
                self._neighbours(scope)  # it may have been closed while we waited
                if not path.exists():
                    incoming = Incoming(path, digest, size, digest_of, writing=self._store.with_reserve)
                    await self._transfer(scope, incoming, holders, relays)
        finally:
            if not lock.locked():
                self._fetching.pop((scope, digest), None)
        return path

    async def _transfer(self, scope: bytes, incoming: Incoming, holders: Sequence[str], relays: bool) -> None:
        honest = [peer for peer in holders if peer != self._connections.me]
        suspects: set[tuple[str, str]] = set()  # (relay, holder)
        whole = False  # what several brought was wrong once: from now on one must bring all of it
        tries = 0
        try:
            while True:
                ticket = self.ways.ticket
                ways = self._ways(scope, honest, relays)
                usable = [way for way in ways if way not in suspects]
                if ways and not usable:
                    suspects.clear()
                    await trio.sleep(SUSPECT_S)
                    continue
                if not (usable or incoming.complete):
                    await ticket.wait()
                    continue
                way = usable[tries % len(usable)] if usable else None
                tries += 1
                fresh = incoming.offset == 0 and not incoming.complete
                if not incoming.complete and way is not None:
                    relay, holder = way
                    await self._connections.sessions[relay].pull(scope, incoming, "" if relay == holder else holder)
                    if whole and not incoming.complete:
                        incoming.restart()
                        suspects |= {way} if relay != holder else set()
                if not incoming.complete:
                    await trio.sleep(PULL_AGAIN_S)
                elif await self._store.run(incoming.finish):
                    return
                elif not fresh or way is None:
                    whole = True
                else:
                    self._refuse(incoming.digest, way, suspects, honest)
        except StoreError:
            self._neighbours(scope)  # its folder is gone because the scope was closed: no fault of the disk
            raise
        finally:
            incoming.close()

    def _ways(self, scope: bytes, holders: Sequence[str], relays: bool) -> list[tuple[str, str]]:
        """Whom to ask for a file of which holder: the holders themselves, or who says that it is connected to one."""
        neighbours = self._neighbours(scope)
        direct = [(peer, peer) for peer in holders if peer in self._connections.sessions]
        over = (
            (relay, peer)
            for peer in holders
            for relay in neighbours.beside(peer)
            if relay in self._connections.sessions
        )
        return direct or (list(over) if relays else [])

    def _refuse(self, digest: bytes, way: tuple[str, str], suspects: set[tuple[str, str]], honest: list[str]) -> None:
        """One peer brought all of a file, and it is another one."""
        relay, holder = way
        name = self._roster.name_of(relay)
        self._log.warning("blob_refused", peer=name, holder=self._roster.name_of(holder), digest=digest.hex())
        if relay != holder:
            suspects.add(way)
            return
        honest.remove(holder)
        if not honest:
            raise TrustError(f"{name} sent another file than it offered", peer=name)
