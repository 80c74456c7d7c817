"""The mesh: sessions with every peer of the roster, and delivery that survives them.

Rules
* A session needs both rosters: a peer that is not in ours gets not one byte, whatever it sends.
* A peer is dialled at the addresses of its card, again and again with a jittered pause; a peer without addresses dials.
  Two sessions with one peer are settled by both sides alike (`Claim.replaces`), when the other side's Hello is here: a
  dead session stays until the new one has proved itself with a valid frame.
* Exactly three places catch everything: the accept loop's task for one connection, the dial of one peer, and the
  supervisor of one session. StoreError passes the last: it ends the daemon, which is clean after a restart.
* Functions that take a transaction touch the database only, and may be called in its thread. What is in memory follows
  in `after_commit`; so nothing is said to anybody that is not on disk.
* Caps before authentication are the Door's; those for peers of the roster are in records.py, mail.py and blobs.py.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Final

import trio

from fedpeer.codec import Buffer
from fedpeer.crypto import random_bytes
from fedpeer.errors import (
    ConfigError,
    HandshakeError,
    LocalProtocolError,
    NotFound,
    RemoteProtocolError,
    SessionError,
    StoreError,
    TrustError,
)
from fedpeer.events import Events
from fedpeer.identity import Card, Identity
from fedpeer.mesh import blobs, gossip, mail, records, roster
from fedpeer.mesh.blobs import DigestOf, Fetched, Incoming
from fedpeer.mesh.door import Door, pause
from fedpeer.mesh.gossip import Neighbours
from fedpeer.mesh.mail import Mail, Place
from fedpeer.mesh.messages import MAX_AUDIENCE, Near
from fedpeer.mesh.records import Record, Shelf, Signed
from fedpeer.mesh.roster import PeerView, Roster
from fedpeer.mesh.session.service import Bell, Session, read_file
from fedpeer.network import Listener, Network
from fedpeer.store import Schema, Store, Transaction
from fedpeer.wire.service import initiate, respond

DIAL_S: Final = 5.0
SECOND_DIALLER_S: Final = 0.5
"""how long the peer with the greater id leaves the first dial to the other, when both can dial"""
PULL_AGAIN_S: Final = 0.2
SUSPECT_S: Final = 5.0
"""how long a file is not asked for, when over every relay a wrong one came"""
CONTRACT: Final = "contract"
"""the one kind of record that is listened to before its scope is open"""

Verify = Callable[[Record, Card], None]


class Scope:
    """An open scope in memory."""

    def __init__(self, me: str, audience: Sequence[str], shelf: Shelf) -> None:
        self.audience = tuple(audience)
        self.shelf = shelf
        self.neighbours = Neighbours(me, self.audience)
        self.added = Bell()
        self.refusals: list[Callable[[Record], bool]] = []
        self.outbox: defaultdict[str, Bell] = defaultdict(Bell)
        self.inbox: defaultdict[str, Bell] = defaultdict(Bell)
        self.fetching: dict[bytes, trio.Lock] = {}

    def wake(self) -> None:
        """Everybody who waits for something of this scope looks again."""
        for bell in (self.added, *self.outbox.values(), *self.inbox.values()):
            bell.ring()


class Mesh:
    """This peer among its peers. Made from what is in the store; `run` connects it."""

    SCHEMAS: ClassVar[list[Schema]] = [roster.SCHEMA, records.SCHEMA, mail.SCHEMA, blobs.SCHEMA]

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
        random: Random | None = None,
    ) -> None:
        self.me = identity.id
        self.card = identity.card(name, addresses)
        self.listening: list[str] = []
        self.on_unknown_scope: Callable[[Record], Awaitable[None]] | None = None
        """Set it before `run`: what comes while it is None is not kept, and comes again with the next session only."""
        self.on_equivocation: Callable[[bytes, str], None] | None = None
        """Told (scope, peer) when a peer has said two different things there; both are on disk."""
        self.door = Door()
        self.store = store
        self.boot = random_bytes(8)
        self.epochs: Counter[str] = Counter()
        self.sessions: dict[str, Session] = {}
        self.connections = Bell()
        self.room = Bell()
        self.considered: set[bytes] = set()
        """scopes whose contract is here, and perhaps about to open them"""
        self.fetched = Fetched(store.folder)
        self._identity, self._network, self._listen = identity, network, listen
        self._events, self._log = events, log
        self._random = random or Random()  # noqa: S311 - spreads dials in time
        self._nursery: trio.Nursery | None = None
        self._dialling: dict[str, trio.CancelScope] = {}
        self._live: set[Session] = set()
        self._ended: dict[str, tuple[int, int]] = {}
        self._since: dict[str, str] = {}
        self._errors: dict[str, str] = {}
        self._seals: dict[str, Verify] = {}
        self._changes = Bell()
        self._strays: dict[str, Callable[[Record], None]] = {}
        self.roster: Roster
        self.scopes: dict[bytes, Scope]
        store.write_now(self._load)

    def _load(self, tx: Transaction) -> None:
        self.roster = Roster(self.card, roster.load(tx))
        loaded = records.load(tx, self.me)
        self.scopes = {scope: Scope(self.me, audience, shelf) for scope, (audience, shelf) in loaded.items()}
        self.waiting = mail.Waiting(tx)
        blobs.sweep(tx, self.store)
        self.fetched.sweep(self.scopes)

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
                nursery.start_soon(self._mend)
                nursery.start_soon(self._look_around)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            with trio.CancelScope(shield=True):
                for listener in listeners:
                    await listener.aclose()

    # roster

    async def add_peer(self, card_text: str) -> PeerView:
        """Add a peer, or replace its card. Raises CardError, TrustError (another peer of that name)."""
        card = self.roster.check(card_text)
        if self.roster.get(card.id) != card:
            now = _now()
            await self.store.write(lambda tx: roster.save(tx, card, now))
            self.roster.add(card)
            self._start_dialling(card.id)
        return self._view(card)

    async def remove_peer(self, ref: str) -> PeerView:
        """Forget a peer and end the session with it at once. Raises NotFound, Ambiguous."""
        card = self._card(ref)
        await self.store.write(lambda tx: roster.forget(tx, card.id))
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

    def resolve(self, ref: str) -> str:
        """The peer id of a name, an id or a beginning of one; ours, too. Raises NotFound, Ambiguous."""
        return self.roster.resolve(ref)

    def name_of(self, peer: str) -> str:
        return self.roster.name_of(peer)

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
            await self._converse(Session(self, self._peer_of(link.remote), link))

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
            self._log.error("session_failed", peer=self.name_of(session.peer), exc_info=rest)
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
            self._lost(peer)
        self.sessions[peer] = session
        self._since[peer] = _now()
        self._errors.pop(peer, None)
        if old is None:
            self._publish(peer, "peer_connected", "")
        self.connections.ring()
        for scope, opened in self.scopes.items():
            if peer in opened.audience:
                session.sync(scope)
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
            self._lost(peer)
            self._publish(peer, "peer_disconnected", session.reason)
            self.connections.ring()
        elif peer not in self.sessions:
            self._errors[peer] = session.reason

    def _publish(self, peer: str, event: str, reason: str) -> None:
        self._log.info(event, peer=self.name_of(peer), reason=reason)
        self._events.publish(f"peer:{peer}", event, peer=peer, name=self.name_of(peer), reason=reason)

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
                ticket = self.connections.ticket
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
            return await self._converse(Session(self, card.id, link))
        if card.id not in self.sessions:
            self._errors[card.id] = error
        return False

    # scopes

    def open_scope(self, tx: Transaction, scope: bytes, audience: Sequence[str]) -> None:
        """Open a scope for these peers (ids, ours among them). Idempotent. Raises LocalProtocolError."""
        if self.me not in audience:
            raise LocalProtocolError("a scope that is not for ourselves")
        if records.open_(tx, scope, list(audience)):
            tx.after_commit(partial(self._opened, scope, sorted(audience)))

    def say_farewell(self, tx: Transaction, scope: bytes, kind: str, *, until: int, now: int) -> None:
        """Tell our record of this kind (slot "") to peers of the scope who ask after it is closed, until that time."""
        records.say_farewell(tx, scope, kind, self.me, until, now)

    def close_scope(self, tx: Transaction, scope: bytes) -> None:
        """Forget everything of a scope but its farewell: records, letters, offers, and after the commit their files."""
        blobs.withdraw(tx, self.store, scope)
        files = tx.all("SELECT digest FROM mesh_outbox WHERE scope = ? AND digest <> x''", (scope,))
        blobs.remove(tx, self.store, [digest for (digest,) in files])
        for table in ("scope", "record", "evidence", "outbox", "inbox", "stream"):
            tx.execute(f"DELETE FROM mesh_{table} WHERE scope = ?", (scope,))  # noqa: S608 - constants
        tx.after_commit(partial(self._closed, scope))

    def _opened(self, scope: bytes, audience: Sequence[str]) -> None:
        opened = self.scopes[scope] = Scope(self.me, audience, Shelf(self.me))
        for session in self._audience(opened):
            if (bits := session.near(scope)) is not None:
                opened.neighbours.meet(session.peer, bits)
        for session in self._audience(opened):
            session.sync(scope)

    def _closed(self, scope: bytes) -> None:
        opened = self.scopes.pop(scope, None)
        self.waiting.close(scope)
        self.fetched.close(scope)
        if opened is not None:
            opened.wake()
            for session in self._audience(opened):
                session.forget(scope)
        self.room.ring()
        self.connections.ring()

    def _audience(self, opened: Scope) -> list[Session]:
        return [self.sessions[peer] for peer in opened.audience if peer in self.sessions]

    def _scope(self, scope: bytes) -> Scope:
        opened = self.scopes.get(scope)
        if opened is None:
            raise LocalProtocolError("this scope is not open")
        return opened

    # neighbours

    def near(self, scope: bytes) -> Near:
        """What we say of our connections in a scope."""
        opened = self.scopes.get(scope)
        return Near(scope, True, opened.neighbours.bits()) if opened is not None else Near(scope, False, b"")

    def met(self, session: Session, scope: bytes, bits: bytes) -> None:
        """Over there the scope is open, and these are the neighbours of that peer."""
        opened, peer = self.scopes.get(scope), session.peer
        if opened is None or peer not in opened.audience or self.sessions.get(peer) is not session:
            return
        if opened.neighbours.meet(peer, bits):
            self._tell_near(scope, opened)
        elif opened.neighbours.gained:
            self._changes.ring()
        self.connections.ring()

    def not_open(self, session: Session, scope: bytes) -> None:
        """A peer answered that the scope is not open there: it is told the contract."""
        opened = self.scopes.get(scope)
        if opened is not None and session.peer in opened.audience and self.sessions.get(session.peer) is session:
            opened.neighbours.unopened.add(session.peer)
            for signed in opened.shelf.of_kind(CONTRACT):
                session.push(signed)

    def closed(self, session: Session, scope: bytes) -> None:
        """A peer has closed the scope: it said all that it had to say."""
        opened = self.scopes.get(scope)
        if opened is not None and self.sessions.get(session.peer) is session and opened.neighbours.part(session.peer):
            self._tell_near(scope, opened)

    def _lost(self, peer: str) -> None:
        """The session with a peer is over: what it said may have been missed."""
        for scope, opened in self.scopes.items():
            if opened.neighbours.part(peer):
                opened.neighbours.lost.add(peer)
                self._tell_near(scope, opened)
        self._changes.ring()

    def _tell_near(self, scope: bytes, opened: Scope) -> None:
        for session in self._audience(opened):  # who opens it later knows it from the first moment
            session.tell_near(scope)

    async def _mend(self) -> None:
        """A little after connections were lost or made: ask for what may have been missed, and use the new ways."""
        while True:
            ticket = self._changes.ticket
            for scope, opened in self.scopes.items():
                neighbours = opened.neighbours
                for signed in opened.shelf.directed() if neighbours.lost or neighbours.gained else ():
                    for peer in neighbours.detours(signed.record):
                        self.sessions[peer].push_anew(signed)
                if lost := neighbours.lost.difference(neighbours):
                    for peer in neighbours:
                        self.sessions[peer].ask(scope, gossip.bits_of(opened.audience, lost))
                neighbours.lost.clear()
                neighbours.gained.clear()
            await ticket.wait()
            await trio.sleep(gossip.PAUSE_S)

    async def _look_around(self) -> None:
        """Once in a while ask one neighbour for everything: some signer may hold back what it should say itself."""
        turn = self._random.randrange(MAX_AUDIENCE)
        while True:
            await trio.sleep(gossip.LOOK_S * (0.5 + self._random.random()))
            turn += 1
            for scope, opened in self.scopes.items():
                if neighbours := sorted(opened.neighbours):
                    everyone = gossip.bits_of(opened.audience, opened.audience)
                    self.sessions[neighbours[turn % len(neighbours)]].ask(scope, everyone)

    # records

    def seal(self, kind: str, verify: Verify, stray: Callable[[Record], None]) -> None:
        """Records of this kind are signed in their body: they get no other signature, and are taken in no other form.

        `verify(record, card)` raises TrustError or RemoteProtocolError unless the peer of that card signed the body
        *and* with it all the rest: scope, kind, slot, sender and to; else who passes the record on could change them.
        `stray(record)`: others have such a record of ours that we do not; it is not kept. What is here is our log.
        Call it before `run`, and before records of this kind are published.
        """
        self._seals[kind], self._strays[kind] = verify, stray

    def publish(self, tx: Transaction, scope: bytes, kind: str, slot: str, body: bytes, *, to: str = "") -> None:
        """Sign a statement, keep it and tell the audience, or one peer of it, after the commit. Again is nothing.

        Raises LocalProtocolError for other bytes in a slot of ours, a scope that is not open, an addressee that is no
        other peer of it, too large a body, and beyond the caps of records.py.
        """
        record = Record(scope, kind, slot, self.me, bytes(body), to)
        if to and (to == self.me or to not in (records.audience_of(tx, scope) or ())):
            raise LocalProtocolError(f"{self.name_of(to)} is not another peer of this scope")
        try:
            signed = records.seal(record) if kind in self._seals else records.sign(self._identity.signing, record)
        except RemoteProtocolError as error:
            raise LocalProtocolError(f"this cannot be a record: {error.message}") from None
        outcome = records.keep(tx, signed)
        if outcome == "new":
            tx.after_commit(partial(self._added, signed, None))
        elif outcome != "same":
            raise LocalProtocolError(
                f"another {kind} record of ours is in slot {slot!r}, or the scope is closed or full"
            )

    def discard(self, tx: Transaction, scope: bytes, kind: str, slot: str) -> None:
        """Forget all senders' records of this slot. They come back unless `refuse` says no."""
        records.discard(tx, scope, kind, slot)
        tx.after_commit(partial(self._discarded, scope, kind, slot))

    def discard_under(self, tx: Transaction, scope: bytes, kind: str, prefix: str) -> None:
        """Forget all senders' records of a kind whose slot begins so. They come back unless `refuse` says no."""
        records.discard_under(tx, scope, kind, prefix)
        tx.after_commit(partial(self._discarded_under, scope, kind, prefix))

    def find(self, scope: bytes, kind: str, slot: str, sender: str) -> bytes | None:
        """The body of a record that is here, for us or of ours."""
        opened = self.scopes.get(scope)
        signed = opened.shelf.read(kind, slot, sender) if opened else None
        return signed.record.body if signed else None

    def held(self, scope: bytes, kind: str) -> dict[tuple[str, str], bytes]:
        """All records of a kind that are here: (slot, sender) → body."""
        return self.scopes[scope].shelf.bodies(kind) if scope in self.scopes else {}

    def since(self, scope: bytes, kind: str, position: int) -> tuple[list[tuple[str, str, bytes]], int]:
        """(sender, slot, body) of the records of a kind that came after this position, in order, and the new position.

        At position 0: all that are here, after a restart in any order. A position is void after a restart. What was
        discarded is not among them; what only passes through here never is.
        """
        if scope not in self.scopes:
            return [], position
        new, position = self.scopes[scope].shelf.since(kind, position)
        return [(signed.record.sender, signed.record.slot, signed.record.body) for signed in new], position

    def changed(self, scope: bytes) -> Awaitable[None]:
        """Wait until a record is added to the scope after this call was made, or the scope is closed."""
        return self._scope(scope).added.ticket.wait()

    def refuse(self, scope: bytes, predicate: Callable[[Record], bool]) -> None:
        """Drop coming records of the scope for which this is True, until the scope closes or the daemon ends."""
        self._scope(scope).refusals.append(predicate)

    async def record_came(self, session: Session, raw: Buffer) -> None:
        """A record from a session, by whomever. Raises RemoteProtocolError for what its signer did not say."""
        signed = records.parse(raw)
        record = signed.record
        card = self.roster.get(record.sender)
        if card is None:
            return
        if record.scope not in self.scopes:
            if record.kind != CONTRACT or record.to or self.on_unknown_scope is None:
                return
            self._verify(signed, card)
            await self._ask_about(record)
        opened = self.scopes.get(record.scope)
        if opened is None or not {record.sender, session.peer, record.to or self.me} <= set(opened.audience):
            return
        held = opened.shelf.get(*signed.key)
        if (held is not None and held.digest == signed.digest) or any(no(record) for no in opened.refusals):
            return
        self._verify(signed, card)
        if record.sender == self.me and record.kind in self._strays:
            self._strays[record.kind](record)
            return

        def commit(tx: Transaction) -> str:
            outcome = records.keep(tx, signed)
            if outcome == "new":
                tx.after_commit(partial(self._added, signed, session.peer))
            return outcome

        if await self.store.write(commit) == "evidence":
            peer, name = record.sender, self.name_of(record.sender)
            facts = {"peer": peer, "name": name, "kind": record.kind, "slot": record.slot}
            self._log.warning("equivocation", **facts)
            self._events.publish(f"peer:{peer}", "equivocation", scope=record.scope.hex(), **facts)
            if self.on_equivocation is not None:
                self.on_equivocation(record.scope, peer)

    def _discarded(self, scope: bytes, kind: str, slot: str) -> None:
        if scope in self.scopes:
            self.scopes[scope].shelf.discard(kind, slot)

    def _discarded_under(self, scope: bytes, kind: str, prefix: str) -> None:
        if scope in self.scopes:
            self.scopes[scope].shelf.discard_under(kind, prefix)

    def _verify(self, signed: Signed, card: Card) -> None:
        """Raises RemoteProtocolError unless this peer said it, in the form of its kind."""
        verify = self._seals.get(signed.record.kind)
        try:
            if (verify is None) == (not signed.signature):
                raise RemoteProtocolError(f"a {signed.record.kind} record in another form than those of its kind have")
            if verify is None:
                signed.verify(card.body.signing)
            else:
                verify(signed.record, card)
        except TrustError as error:
            raise RemoteProtocolError(error.message) from None

    async def _ask_about(self, record: Record) -> None:
        assert self.on_unknown_scope is not None
        self.considered.add(record.scope)
        try:
            await self.on_unknown_scope(record)
        except StoreError:
            raise
        except Exception:
            self._log.exception("contract_not_considered", peer=self.name_of(record.sender))
        finally:
            self.considered.discard(record.scope)

    def _added(self, signed: Signed, source: str | None) -> None:
        """A record is kept: pass it on. It came from `source`, or is ours."""
        opened = self.scopes.get(signed.record.scope)
        if opened is not None and opened.shelf.add(signed):
            opened.added.ring()
            receivers = opened.neighbours.receivers(signed.record, source)
            if signed.record.kind == CONTRACT:
                receivers += opened.neighbours.unopened - {source}
            for peer in receivers:
                self.sessions[peer].push(signed)

    # mail

    def post(
        self,
        tx: Transaction,
        contract: bytes,
        stage: str,
        to: str,
        tag: str,
        header: bytes,
        buffers: Sequence[Buffer],
    ) -> int:
        """Commit a letter to the outbox; it is sent after the commit. Its number in the stream (stage, to).

        Raises LocalProtocolError if `to` is no other peer of the scope, or the letter too large.
        """
        if to == self.me or to not in (records.audience_of(tx, contract) or ()):
            raise LocalProtocolError(f"{self.name_of(to)} is not a peer of this scope")
        seq = mail.post(tx, self.store, self.me, contract, stage, to, (tag, header, buffers))
        tx.after_commit(partial(self._posted, contract, to))
        return seq

    def _posted(self, contract: bytes, to: str) -> None:
        if contract in self.scopes:
            self.scopes[contract].outbox[to].ring()

    async def next_mail(self, contract: bytes, stage: str, sender: str) -> Mail:
        """The first letter of this stream that is not taken; waits for it. Raises LocalProtocolError once closed."""
        place = Place(contract, stage, sender, self.me, 0)
        while True:
            ticket = self._scope(contract).inbox[sender].ticket
            row = await self.store.read(lambda tx: mail.first(tx, contract, stage, sender))
            if row is None:
                await ticket.wait()
                continue
            seq, digest, body = row
            try:
                content = read_file(self.fetched.path_of(contract, digest)) if digest else body
            except OSError as error:
                self._scope(contract)  # closed meanwhile
                raise StoreError(f"{self.fetched.path_of(contract, digest)}: {error.strerror}") from None
            return mail.unpack(place._replace(seq=seq), content)

    def take(self, tx: Transaction, contract: bytes, stage: str, sender: str, letter: Mail) -> None:
        """The letter has had its effect in this transaction: it does not come again. LocalProtocolError if it did."""
        size, digest = mail.take(tx, contract, stage, sender, letter.seq)
        tx.after_commit(partial(self._taken, contract, sender, size, digest))

    def _taken(self, contract: bytes, sender: str, size: int, digest: bytes) -> None:
        if contract in self.scopes:
            self.waiting.add(contract, sender, -1, -size)
        if digest:
            self.fetched.remove(contract, digest)
        self.room.ring()

    # blobs

    def offer(self, tx: Transaction, scope: bytes, digest: bytes, size: int) -> None:
        """Let the audience fetch a file of the store; it is removed when the scope is closed or the offer withdrawn.

        Raises LocalProtocolError if there is no such file, or no such scope.
        """
        if records.audience_of(tx, scope) is None:
            raise LocalProtocolError("this scope is not open")
        blobs.offer(tx, self.store, scope, digest, size)

    def withdraw(self, tx: Transaction, scope: bytes, digest: bytes) -> None:
        """End an offer, and forget what was fetched under this digest; after the commit the files go, too."""
        blobs.withdraw(tx, self.store, scope, digest)
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
        if self.me in holders and (own := self.store.path_of(digest)).exists():
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
        opened = self._scope(scope)
        path = self.fetched.path_of(scope, digest)
        lock = opened.fetching.setdefault(digest, trio.Lock())
        try:
            async with lock:
                self._scope(scope)  # it may have been closed while we waited
                if not path.exists():
                    incoming = Incoming(path, digest, size, digest_of) if digest_of else Incoming(path, digest, size)
                    await self._transfer(scope, incoming, holders, relays)
        finally:
            if not lock.locked():
                opened.fetching.pop(digest, None)
        return path

    async def _transfer(self, scope: bytes, incoming: Incoming, holders: Sequence[str], relays: bool) -> None:
        honest = [peer for peer in holders if peer != self.me]
        suspects: set[tuple[str, str]] = set()  # (relay, holder)
        whole = False  # what several brought was wrong once: from now on one must bring all of it
        tries = 0
        try:
            while True:
                ticket = self.connections.ticket
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
                    await self.sessions[relay].pull(scope, incoming, "" if relay == holder else holder)
                    if whole and not incoming.complete:
                        incoming.restart()
                        suspects |= {way} if relay != holder else set()
                if not incoming.complete:
                    await trio.sleep(PULL_AGAIN_S)
                elif await self.store.run(incoming.finish):
                    return
                elif not fresh or way is None:
                    whole = True
                else:
                    self._refuse_blob(incoming.digest, way, suspects, honest)
        except StoreError:
            self._scope(scope)  # its folder is gone because the scope was closed: no fault of the disk
            raise
        finally:
            incoming.close()

    def _ways(self, scope: bytes, holders: Sequence[str], relays: bool) -> list[tuple[str, str]]:
        """Whom to ask for a file of which holder: the holders themselves, or who says that it is connected to one."""
        neighbours = self._scope(scope).neighbours
        direct = [(peer, peer) for peer in holders if peer in self.sessions]
        over = ((relay, peer) for peer in holders for relay in neighbours.beside(peer) if relay in self.sessions)
        return direct or (list(over) if relays else [])

    def _refuse_blob(
        self, digest: bytes, way: tuple[str, str], suspects: set[tuple[str, str]], honest: list[str]
    ) -> None:
        """One peer brought all of a file, and it is another one."""
        relay, holder = way
        name = self.name_of(relay)
        self._log.warning("blob_refused", peer=name, holder=self.name_of(holder), digest=digest.hex())
        if relay != holder:
            suspects.add(way)
            return
        honest.remove(holder)
        if not honest:
            raise TrustError(f"{name} sent another file than it offered", peer=name)


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
