"""The mesh: scopes with a part in them for every peer of their audience, and delivery that survives sessions.

Rules
* Responsible for what is said in a scope: records and who passes them on to whom, letters, and what is known of the
  neighbours. Who is connected is in connections/, files are in files/, what one session says in session/.
* Functions that take a transaction touch the database only, and may be called in its thread. What is in memory follows
  in `after_commit`; so nothing is said to anybody that is not on disk.
* Caps for peers of the roster are in records.py, mail.py and blobs.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from random import Random
from typing import Any, ClassVar, Final

import trio

from fedpeer.codec import Buffer
from fedpeer.data.offers import Offers
from fedpeer.errors import LocalProtocolError, RemoteProtocolError, SessionError, StoreError, TrustError
from fedpeer.events import Events
from fedpeer.identity import Card, Identity
from fedpeer.mesh import blobs, gossip, mail, records
from fedpeer.mesh.connections.service import Connections
from fedpeer.mesh.files.service import Files
from fedpeer.mesh.gossip import Neighbours
from fedpeer.mesh.mail import Mail, Place
from fedpeer.mesh.messages import MAX_AUDIENCE, Near
from fedpeer.mesh.records import Record, Shelf, Signed
from fedpeer.mesh.session.service import Bell, Session, read_file
from fedpeer.store import Schema, Store, Transaction

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

    def wake(self) -> None:
        """Everybody who waits for something of this scope looks again."""
        for bell in (self.added, *self.outbox.values(), *self.inbox.values()):
            bell.ring()


class Mesh:
    """This peer among its peers. Made from what is in the store; `run` keeps what is known of neighbours true."""

    SCHEMAS: ClassVar[list[Schema]] = [records.SCHEMA, mail.SCHEMA, blobs.SCHEMA]

    def __init__(self, identity: Identity, connections: Connections, store: Store, *, events: Events, log: Any) -> None:
        self.me = identity.id
        self.connections, self.roster = connections, connections.roster
        self.store = store
        self.on_unknown_scope: Callable[[Record], Awaitable[None]] | None = None
        """Set it before `run`: what comes while it is None is not kept, and comes again with the next session only."""
        self.on_equivocation: Callable[[bytes, str], None] | None = None
        """Told (scope, peer) when a peer has said two different things there; both are on disk."""
        self.offers: Callable[[], Awaitable[Offers]] = _nothing
        """What peers of the roster who ask are told of our datasets. Set it before `run`."""
        self.room = Bell()
        self.considered: set[bytes] = set()
        """scopes whose contract is here, and perhaps about to open them"""
        self.files = Files(connections, store, lambda scope: self._scope(scope).neighbours, log)
        self._identity, self._events, self._log = identity, events, log
        self._random = Random()  # noqa: S311 - spreads questions in time
        self._seals: dict[str, Verify] = {}
        self._changes = Bell()
        self._strays: dict[str, Callable[[Record], None]] = {}
        self.scopes: dict[bytes, Scope]
        store.write_now(self._load)
        connections.converse = partial(Session, self)
        connections.on_connected, connections.on_lost = self._connected, self._lost

    def _load(self, tx: Transaction) -> None:
        loaded = records.load(tx, self.me)
        self.scopes = {scope: Scope(self.me, audience, shelf) for scope, (audience, shelf) in loaded.items()}
        self.waiting = mail.Waiting(tx)
        self.files.fetched.sweep(self.scopes)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Ask again for what may have been missed, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._mend)
            nursery.start_soon(self._look_around)
            task_status.started()

    async def datasets_of(self, ref: str) -> Offers:
        """What a peer says of the datasets that it offers. Raises NotFound, Ambiguous, SessionError."""
        peer = self.connections.peer(ref)
        session = self.connections.sessions.get(peer.id)
        if session is None:
            raise SessionError(f"{peer.name} is not connected: {peer.error}", peer=peer.name)
        return await session.ask_datasets()

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
        self.files.fetched.close(scope)
        if opened is not None:
            opened.wake()
            for session in self._audience(opened):
                session.forget(scope)
        self.room.ring()
        self.files.ways.ring()

    def _audience(self, opened: Scope) -> list[Session]:
        return [self.connections.sessions[peer] for peer in opened.audience if peer in self.connections.sessions]

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
        if opened is None or peer not in opened.audience or self.connections.sessions.get(peer) is not session:
            return
        if opened.neighbours.meet(peer, bits):
            self._tell_near(scope, opened)
        elif opened.neighbours.gained:
            self._changes.ring()
        self.files.ways.ring()

    def not_open(self, session: Session, scope: bytes) -> None:
        """A peer answered that the scope is not open there: it is told the contract."""
        opened = self.scopes.get(scope)
        if (
            opened is not None
            and session.peer in opened.audience
            and self.connections.sessions.get(session.peer) is session
        ):
            opened.neighbours.unopened.add(session.peer)
            for signed in opened.shelf.of_kind(CONTRACT):
                session.push(signed)

    def closed(self, session: Session, scope: bytes) -> None:
        """A peer has closed the scope: it said all that it had to say."""
        opened = self.scopes.get(scope)
        if (
            opened is not None
            and self.connections.sessions.get(session.peer) is session
            and opened.neighbours.part(session.peer)
        ):
            self._tell_near(scope, opened)

    def _connected(self, session: Session) -> None:
        """There is a session with a peer: each side says what it holds of what both have a part in."""
        self.files.ways.ring()
        for scope, opened in self.scopes.items():
            if session.peer in opened.audience:
                session.sync(scope)

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
                        self.connections.sessions[peer].push_anew(signed)
                if lost := neighbours.lost.difference(neighbours):
                    for peer in neighbours:
                        self.connections.sessions[peer].ask(scope, gossip.bits_of(opened.audience, lost))
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
                    self.connections.sessions[neighbours[turn % len(neighbours)]].ask(scope, everyone)

    # records

    def seal(self, kind: str, verify: Verify, stray: Callable[[Record], None]) -> None:
        """Records of this kind are signed in their body: they get no other signature, and are taken in no other form.

        `verify(record, card)` raises TrustError or RemoteProtocolError unless the peer of that card signed the body
        *and* with it kind, slot and sender; else who passes the record on could change them. Scope and addressee it
        could change: the same body in the same slot stays one record, and is evidence of nothing.
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
            raise LocalProtocolError(f"{self.roster.name_of(to)} is not another peer of this scope")
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

    def count(self, scope: bytes, sender: str) -> int:
        """How many records of this sender are here."""
        return self.scopes[scope].shelf.count(sender) if scope in self.scopes else 0

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
            elif outcome == "same" and record.to == self.me and opened.shelf.read(*signed.key) is None:
                records.readdress(tx, signed)
                tx.after_commit(partial(self._readdressed, signed))
            return outcome

        if await self.store.write(commit) == "evidence":
            peer, name = record.sender, self.roster.name_of(record.sender)
            facts = {"peer": peer, "name": name, "kind": record.kind, "slot": record.slot}
            self._log.warning("equivocation", **facts)
            self._events.publish(f"peer:{peer}", "equivocation", scope=record.scope.hex(), **facts)
            if self.on_equivocation is not None:
                self.on_equivocation(record.scope, peer)

    def _readdressed(self, signed: Signed) -> None:
        opened = self.scopes.get(signed.record.scope)
        if opened is not None:
            opened.shelf.readdress(signed)
            opened.added.ring()

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
            self._log.exception("contract_not_considered", peer=self.roster.name_of(record.sender))
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
                self.connections.sessions[peer].push(signed)

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
            raise LocalProtocolError(f"{self.roster.name_of(to)} is not a peer of this scope")
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
                content = read_file(self.files.fetched.path_of(contract, digest)) if digest else body
            except OSError as error:
                self._scope(contract)  # closed meanwhile
                raise StoreError(f"{self.files.fetched.path_of(contract, digest)}: {error.strerror}") from None
            return mail.unpack(place._replace(seq=seq), content)

    def take(self, tx: Transaction, contract: bytes, stage: str, sender: str, letter: Mail) -> None:
        """The letter has had its effect in this transaction: it does not come again. LocalProtocolError if it did."""
        size, digest = mail.take(tx, contract, stage, sender, letter.seq)
        tx.after_commit(partial(self._taken, contract, sender, size, digest))

    def _taken(self, contract: bytes, sender: str, size: int, digest: bytes) -> None:
        if contract in self.scopes:
            self.waiting.add(contract, sender, -1, -size)
        if digest:
            self.files.fetched.remove(contract, digest)
        self.room.ring()


async def _nothing() -> Offers:
    return Offers([], 0)
