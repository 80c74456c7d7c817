"""Connections: one session with each peer of the roster, whoever of the two dialled.

Rules
* Responsible for who is connected: listening and the door, dialling, who is let in, which of two sessions stays, and
  what an operator sees of a peer. What is said in a session is the session's, and what follows from it the Mesh's.
* A session needs both rosters: a peer that is not in ours gets not one byte, whatever it sends.
* A peer is dialled at the addresses of its card, again and again with a jittered pause; a peer without addresses dials.
  Two sessions with one peer are settled by both sides alike (`Claim.replaces`), when the other side's Hello is here: a
  dead session stays until the new one has proved itself with a valid frame.
* Exactly three places catch everything: the accept loop's task for one connection, the dial of one peer, and the
  supervisor of one session. StoreError passes the last: it ends the daemon, which is clean after a restart.
* Caps before authentication are the Door's.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from random import Random
from typing import Any, ClassVar, Final

import trio

from fedpeer.crypto import random_bytes
from fedpeer.errors import ConfigError, HandshakeError, NotFound, SessionError, StoreError
from fedpeer.events import Events
from fedpeer.identity import Card, Identity
from fedpeer.mesh import roster
from fedpeer.mesh.door import Door, pause
from fedpeer.mesh.roster import PeerView, Roster
from fedpeer.mesh.session.service import Bell, Session
from fedpeer.network import Listener, Network
from fedpeer.store import Record, Schema, Store, Transaction, unrecorded
from fedpeer.wire.service import Link, initiate, respond

DIAL_S: Final = 5.0
SECOND_DIALLER_S: Final = 0.5
"""how long the peer with the greater id leaves the first dial to the other, when both can dial"""


class Connections:
    """Whom this peer is connected to. Made from the roster in the store; `run` listens and dials."""

    SCHEMAS: ClassVar[list[Schema]] = [roster.SCHEMA]

    converse: Callable[[str, Link], Session]
    """A session with this peer on this link. The Mesh sets it and the two that follow, before `run`."""
    on_connected: Callable[[Session], None]
    """Told of a session that is now the session with its peer."""
    on_lost: Callable[[str], None]
    """Told of a peer when the session with it is over, also when another takes its place."""

    def __init__(
        self,
        identity: Identity,
        name: str,
        store: Store,
        network: Network,
        *,
        listen: tuple[str, ...],
        addresses: tuple[str, ...],
        events: Events,
        log: Any,
    ) -> None:
        self.me = identity.id
        self.card = identity.card(name, addresses)
        self.roster = Roster(self.card, store.write_now(roster.load))
        self.listening: list[str] = []
        self.door = Door()
        self.boot = random_bytes(8)
        self.epochs: Counter[str] = Counter()
        self.sessions: dict[str, Session] = {}
        self.changed = Bell()
        """Rings when a peer is connected, and when it is not any more."""
        self._identity, self._store, self._network, self._listen = identity, store, network, listen
        self._events, self._log = events, log
        self._random = Random()  # noqa: S311 - spreads dials in time
        self._nursery: trio.Nursery | None = None
        self._dialling: dict[str, trio.CancelScope] = {}
        self._live: set[Session] = set()
        self._ended: dict[str, tuple[int, int]] = {}
        self._since: dict[str, str] = {}
        self._errors: dict[str, str] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen, dial and converse until cancelled. Started when it listens. ConfigError for an address in use."""
        listeners: list[Listener] = []
        try:
            for address in self._listen:
                listeners.append(await self._network.listen(address))  # noqa: PERF401 - what is open is closed below
            self.listening = [listener.address for listener in listeners]
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for listener in listeners:
                    nursery.start_soon(self._accept, listener)
                for card in self.roster:
                    self._start_dialling(card.id)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            with trio.CancelScope(shield=True):
                for listener in listeners:
                    await listener.aclose()

    # what an operator sees and does

    async def add_peer(self, card_text: str, *, record: Record = unrecorded) -> PeerView:
        """Add a peer, or replace its card. Raises CardError, TrustError (another peer of that name)."""
        card = self.roster.check(card_text)
        if self.roster.get(card.id) != card:
            now = _now()

            def add(tx: Transaction) -> None:
                roster.save(tx, card, now)
                record(tx, {"peer": card.id, "name": card.name, "fingerprint": card.fingerprint, "card": card.text})

            await self._store.write(add)
            self.roster.add(card)
            self._start_dialling(card.id)
        return self._view(card)

    async def remove_peer(self, ref: str, *, record: Record = unrecorded) -> PeerView:
        """Forget a peer and end the session with it at once. Raises NotFound, Ambiguous."""
        card = self._card(ref)

        def remove(tx: Transaction) -> None:
            roster.forget(tx, card.id)
            record(tx, {"peer": card.id, "name": card.name})

        await self._store.write(remove)
        self.roster.remove(card.id)
        for session in [session for session in self._live if session.peer == card.id]:
            session.end("it was removed from the roster")
        if card.id in self._dialling:
            self._dialling.pop(card.id).cancel()
        self._errors[card.id] = "it was removed from the roster"
        return self._view(card, connected=False)

    def peers(self) -> list[PeerView]:
        """By name."""
        return [self._view(card) for card in self.roster]

    def peer(self, ref: str) -> PeerView:
        """Raises NotFound (also for ourselves), Ambiguous."""
        return self._view(self._card(ref))

    async def ping(self, ref: str) -> float:
        """The seconds until a peer answered. Raises SessionError if it is not connected."""
        card = self._card(ref)
        session = self.sessions.get(card.id)
        if session is None:
            raise SessionError(f"{card.name} is not connected: {self._view(card).error}", peer=card.name)
        return await session.link.ping()

    def connected(self, peer: str) -> bool:
        return peer in self.sessions

    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received on the streams of all sessions since the start."""
        pairs = [*self._ended.values(), *((s.link.bytes_sent, s.link.bytes_received) for s in self._live)]
        return sum(sent for sent, _ in pairs), sum(received for _, received in pairs)

    def _card(self, ref: str) -> Card:
        peer = self.roster.resolve(ref)
        card = self.roster.get(peer)
        if card is None or peer == self.me:
            raise NotFound(f"{ref!r} is this peer itself")
        return card

    def _view(self, card: Card, *, connected: bool | None = None) -> PeerView:
        peer = card.id
        sent, received = self._ended.get(peer, (0, 0))
        for session in self._live:
            if session.peer == peer:
                sent, received = sent + session.link.bytes_sent, received + session.link.bytes_received
        connected = peer in self.sessions if connected is None else connected
        silent = "not dialled yet" if card.body.addresses else "its card has no address: it has to dial us"
        return PeerView(
            id=peer,
            name=card.name,
            fingerprint=card.fingerprint,
            addresses=list(card.body.addresses),
            connected=connected,
            since=self._since.get(peer, "") if connected else "",
            bytes_sent=sent,
            bytes_received=received,
            error="" if connected else self._errors.get(peer, silent),
        )

    # sessions

    async def _accept(self, listener: Listener) -> None:
        assert self._nursery is not None
        while True:
            try:
                stream, source = await listener.accept()
            except Exception:
                self._log.exception("accept_failed", address=listener.address)
                await trio.sleep(0.1)
                continue
            if self.door.enter(source, trio.current_time()):
                self._nursery.start_soon(self._let_in, stream, source)
            else:
                self._nursery.start_soon(self._turn_away, stream)

    async def _turn_away(self, stream: trio.abc.Stream) -> None:
        try:
            await trio.aclose_forcefully(stream)
        except Exception:
            self._log.exception("close_failed")

    async def _let_in(self, stream: trio.abc.Stream, source: str) -> None:
        try:
            try:
                link = await respond(stream, self._identity.dh, lambda key: self.roster.by_key(key) is not None)
            finally:
                self.door.leave(source)
        except HandshakeError as error:
            self.door.refused["handshake"] += 1
            self._log.debug("handshake_refused", source=source, reason=error.message)
        except Exception:
            self.door.refused["error"] += 1
            self._log.exception("handshake_failed", source=source)
        else:
            self.door.know(source)
            await self._converse(self.converse(self._peer_of(link.remote), link))

    def _peer_of(self, key: bytes) -> str:
        card = self.roster.by_key(key)
        return card.id if card else ""

    async def _converse(self, session: Session) -> bool:
        """Supervise one session until it ends. Whether it was one that may be dialled again without a longer pause."""
        if session.peer not in self.roster:  # removed while the handshake was on its way
            await session.link.aclose()
            return False
        self._live.add(session)
        try:
            await session.run()
        except Exception as error:
            group = error if isinstance(error, ExceptionGroup) else ExceptionGroup("in a session", [error])
            fatal, rest = group.split(StoreError)
            if fatal is not None:
                raise fatal from None
            session.reason, session.violated = "a fault here; the log has it", True
            self._log.error("session_failed", peer=self.roster.name_of(session.peer), exc_info=rest)
        finally:
            self._ended_now(session)
        return session.claim is not None and not session.violated

    def adopt(self, session: Session) -> bool:
        """The Hello of a session is here: whether it is now the session with its peer."""
        peer = session.peer
        assert session.claim is not None
        old = self.sessions.get(peer)
        if old is not None:
            assert old.claim is not None
            if not session.claim.replaces(old.claim):
                session.end("another session with this peer stays")
                return False
            old.end("a newer session took its place")
            self.on_lost(peer)
        self.sessions[peer] = session
        self._since[peer] = _now()
        self._errors.pop(peer, None)
        if old is None:
            self._publish(peer, "peer_connected", "")
        self.changed.ring()
        self.on_connected(session)
        return True

    def _ended_now(self, session: Session) -> None:
        peer = session.peer
        self._live.discard(session)
        sent, received = self._ended.get(peer, (0, 0))
        self._ended[peer] = (sent + session.link.bytes_sent, received + session.link.bytes_received)
        if self.sessions.get(peer) is session:
            del self.sessions[peer]
            self.epochs[peer] += 1
            self._errors[peer] = session.reason
            self.on_lost(peer)
            self._publish(peer, "peer_disconnected", session.reason)
            self.changed.ring()
        elif peer not in self.sessions:
            self._errors[peer] = session.reason

    def _publish(self, peer: str, event: str, reason: str) -> None:
        self._log.info(event, peer=self.roster.name_of(peer), reason=reason)
        self._events.publish(f"peer:{peer}", event, peer=peer, name=self.roster.name_of(peer), reason=reason)

    def _start_dialling(self, peer: str) -> None:
        if peer in self._dialling:
            self._dialling.pop(peer).cancel()
        card = self.roster.get(peer)
        if self._nursery is not None and card is not None and card.body.addresses:
            self._dialling[peer] = scope = trio.CancelScope()
            self._nursery.start_soon(self._dial, card, scope)

    async def _dial(self, card: Card, scope: trio.CancelScope) -> None:
        """Keep a session with this peer as long as it is in the roster with this card."""
        patience = SECOND_DIALLER_S if self.me > card.id and self.card.body.addresses else 0.0
        failures = 0
        with scope:
            while True:
                ticket = self.changed.ticket
                if card.id in self.sessions:
                    await ticket.wait()
                    continue
                await trio.sleep(pause(failures, self._random.random()) + patience)
                if card.id not in self.sessions:
                    address = card.body.addresses[failures % len(card.body.addresses)]
                    failures = 0 if await self._dial_once(card, address) else failures + 1

    async def _dial_once(self, card: Card, address: str) -> bool:
        try:
            with trio.fail_after(DIAL_S):
                stream = await self._network.connect(address)
            link = await initiate(stream, self._identity.dh, card.body.dh)
        except trio.TooSlowError:
            error = f"{address}: no connection within {DIAL_S:.0f} seconds"
        except HandshakeError as refusal:
            error = f"{address}: {refusal.message}"
        except (OSError, ValueError) as cause:  # ValueError: the resolver's, for a host that cannot be
            error = f"{address}: {_words(cause)}"
        except ConfigError as mistake:
            error = mistake.message
        except Exception:
            error = f"{address}: a fault here; the log has it"
            self._log.exception("dial_failed", peer=card.name, address=address)
        else:
            return await self._converse(self.converse(card.id, link))
        if card.id not in self.sessions:
            self._errors[card.id] = error
        return False


def _words(error: OSError | ValueError) -> str:
    """What an operator reads of a failed dial."""
    if isinstance(error, ValueError):
        return str(error)
    cause = error.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[-1]
    number = (cause.errno if isinstance(cause, OSError) else None) or error.errno
    return (os.strerror(number) if number and number > 0 else error.strerror or str(error)).lower()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
