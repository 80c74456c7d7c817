"""One session with one peer: what is said on its channels (messages.py), and by whom it is waited for.

Rules
* A handler never waits for a send: it notes what is to be said in `_to_say`, where one thing has one place, so that the
  memory of it is bounded by what there is to say and not by how often it was asked for.
* Nothing in here survives the session. What must is in the store, and the next session begins with Hello and Sync.
* Whatever the other side does wrong ends this session (RemoteProtocolError in a handler); StoreError ends the daemon.
"""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from fedpeer import codec
from fedpeer.data import offers
from fedpeer.data.offers import Offers
from fedpeer.errors import LocalProtocolError, RemoteProtocolError, SessionError, StoreError, TrustError
from fedpeer.mesh import blobs, mail, records
from fedpeer.mesh.blobs import Incoming
from fedpeer.mesh.gossip import peers_of
from fedpeer.mesh.mail import Place
from fedpeer.mesh.messages import (
    ACKS,
    CHUNK_BYTES,
    DATASETS,
    DIGEST_BYTES,
    GONE,
    HELLO,
    LANES,
    RECORDS,
    SYNC,
    SYNC_DIGESTS,
    VERSIONS,
    WANTS,
    Ack,
    Chunk,
    Claim,
    Hello,
    LetterHead,
    Near,
    Sync,
    Want,
)
from fedpeer.store import Transaction
from fedpeer.wire.frames import Name
from fedpeer.wire.service import Link

if TYPE_CHECKING:
    from fedpeer.mesh.service import Mesh

HELLO_S: Final = 5.0
STALL_S: Final = 30.0
ANSWER_S: Final = 10.0
FRESH_S: Final = 3600.0
"""After so long the dialler ends a session and dials again: fresh keys, unknown to who learnt the old ones."""
MAX_READY: Final = 4096
MAX_KNOWN: Final = 1 << 16


class Bell:
    """Wakes whoever waits. Take the ticket first, then look, then wait on the ticket: no ring is missed."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def ring(self) -> None:
        self._event.set()
        self._event = trio.Event()

    @property
    def ticket(self) -> trio.Event:
        return self._event


class Session:
    """A link and the conversation on it. `run` lives as long as the session."""

    def __init__(self, mesh: Mesh, peer: str, link: Link) -> None:
        self.peer = peer
        self.link = link
        self.claim: Claim | None = None
        """None until the other side's Hello is here; nothing else is looked at before."""
        self.reason = "the session ended"
        self.violated = False
        self._mesh = mesh
        self._over = False
        self._greeted = trio.Event()
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._to_say: dict[Hashable, bytes | int] = {}
        self._something = Bell()
        self._known: dict[bytes, set[bytes]] = {}  # digests of a Sync that comes in parts
        self._ready: set[bytes] = set()  # scopes that are open over there
        self._near: dict[bytes, bytes] = {}  # and whom the other side is connected to in them
        self._given: set[bytes] = set()  # directed records that were pushed
        self._pumps: set[bytes] = set()
        self._serving = [trio.CancelScope() for _ in range(LANES)]
        self._lanes = trio.Semaphore(LANES)
        self._free_lanes = list(range(LANES))
        self._pulling: dict[int, tuple[Incoming, Bell]] = {}
        self._gone: Counter[bytes] = Counter()
        self._asked = False  # what the other side offers; one question waits at a time
        self._offers = Offers([], 0)
        self._told = Bell()

    async def run(self) -> None:
        """Converse until the session ends; `reason` says why. Raises what failed here: StoreError, or a fault."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._await_hello)
                    nursery.start_soon(self._talk)
                    nursery.start_soon(self._grow_old)
                    try:
                        await self.link.run(self._on_message)
                    except SessionError as error:
                        self.reason = error.message
                        self.violated = isinstance(error.__cause__, RemoteProtocolError)
                        if error.__cause__ is not None and not self.violated:
                            raise error.__cause__ from None
                    nursery.cancel_scope.cancel()
        finally:
            self._over = True
            for bell in (self._told, *(bell for _, bell in self._pulling.values())):
                bell.ring()
            with trio.CancelScope(shield=True):
                await self.link.aclose()

    def end(self, reason: str) -> None:
        """End the session at once."""
        self.reason = reason
        self._scope.cancel()

    async def _grow_old(self) -> None:
        await trio.sleep(FRESH_S)
        if self.link.initiator:
            self.end("an hour is over: a new session with fresh keys follows")

    # what we say

    def sync(self, scope: bytes) -> None:
        """Say what we hold of a scope; begin with letters if it is known to be open over there."""
        self.tell_near(scope)
        self._say(("sync", scope), 0)
        if scope in self._ready:
            self._pump(scope)

    def ask(self, scope: bytes, of: bytes) -> None:
        """Ask for everything of these senders that is not here."""
        more = self._to_say.get(("ask", scope), b"")
        assert isinstance(more, bytes)
        both = int.from_bytes(of, "little") | int.from_bytes(more, "little")
        self._say(("ask", scope), both.to_bytes(max(len(of), len(more)), "little"))

    def tell_near(self, scope: bytes) -> None:
        """Say whom we are connected to, or that the scope is not open here."""
        self._say(("near", scope), 0)

    def near(self, scope: bytes) -> bytes | None:
        """Whom the other side is connected to; None if the scope is not known to be open there."""
        return self._near.get(scope, b"") if scope in self._ready else None

    def forget(self, scope: bytes) -> None:
        """A scope was closed here: the other side makes room for another, and we when it says the same."""
        self.tell_near(scope)

    def push_anew(self, signed: records.Signed) -> None:
        """Push a directed record unless that was done in this session."""
        if signed.digest not in self._given:
            self.push(signed)

    def push(self, signed: records.Signed) -> None:
        if signed.record.to:
            self._given.add(signed.digest)
        self._say(("record", signed.digest), signed.raw)

    def _say(self, key: Hashable, value: bytes | int) -> None:
        self._to_say[key] = value
        self._something.ring()

    async def _talk(self) -> None:
        """The one task that says what is to be said."""
        mesh, link = self._mesh, self.link
        try:
            hello = Hello(list(VERSIONS), mesh.connections.boot, mesh.connections.epochs[self.peer])
            await link.send(HELLO, b"", codec.encode(hello))
            await self._greeted.wait()
            while True:
                ticket = self._something.ticket
                if not self._to_say:
                    await ticket.wait()
                    continue
                key = next(iter(self._to_say))
                value = self._to_say.pop(key)
                match key, value:
                    case ("record", _), bytes(raw):
                        await link.send(RECORDS, b"", raw)
                    case ("ack", bytes(scope), str(stage)), int(upto):
                        await link.send(ACKS, b"", codec.encode(Ack(scope, stage, upto)))
                    case ("near", bytes(scope)), _:
                        if scope not in mesh.scopes or self.peer in mesh.scopes[scope].audience:
                            await link.send(SYNC, codec.encode(mesh.near(scope)))
                    case ("ask datasets",), _:
                        await link.send(DATASETS, b"")
                    case ("datasets",), _:
                        await link.send(DATASETS, b"", codec.encode(await mesh.offers()))
                    case ("sync", bytes(scope)), _:
                        await self._say_sync(scope, b"")
                    case ("ask", bytes(scope)), bytes(of):
                        await self._say_sync(scope, of)
        except SessionError:
            pass  # `run` knows

    async def _say_sync(self, scope: bytes, of: bytes) -> None:
        received = [] if of else await self._mesh.store.read(lambda tx: mail.received(tx, scope, self.peer))
        opened = self._mesh.scopes.get(scope)
        if opened is None:
            return
        named = peers_of(opened.audience, of)
        digests = [
            signed.digest
            for signed in opened.shelf
            if (not named or signed.record.sender in named) and opened.neighbours.lists(signed.record, self.peer)
        ]
        for start in range(0, max(len(digests), 1), SYNC_DIGESTS):
            part = b"".join(digests[start : start + SYNC_DIGESTS])
            counters = received if start == 0 else []
            last = start + SYNC_DIGESTS >= len(digests)
            await self.link.send(SYNC, b"", codec.encode(Sync(scope, of, counters, part, last)))

    def _pump(self, scope: bytes) -> None:
        if scope not in self._pumps and self._nursery is not None and not self._over:
            self._pumps.add(scope)
            self._nursery.start_soon(self._send_letters, scope)

    async def _send_letters(self, scope: bytes) -> None:
        """Send the outbox of one scope from its beginning, and what comes into it."""
        sent = 0
        try:
            while (opened := self._mesh.scopes.get(scope)) is not None:
                ticket = opened.outbox[self.peer].ticket
                letters = await self._mesh.store.read(lambda tx: mail.outgoing(tx, scope, self.peer, sent))  # noqa: B023
                for row, head, body in letters:
                    await self.link.send(("mail", scope), codec.encode(head), body)
                    sent = row
                if not letters:
                    await ticket.wait()
        except SessionError:
            pass

    # what we are told

    async def _await_hello(self) -> None:
        with trio.move_on_after(HELLO_S):
            await self._greeted.wait()
            return
        self.end(f"it said nothing within {HELLO_S:.0f} seconds")

    async def _on_message(self, name: Name, header: bytes, payload: memoryview) -> None:
        if name == HELLO:
            self._hello(codec.decode_as(Hello, payload))
            return
        await self._greeted.wait()
        match name:
            case ("records",):
                await self._mesh.record_came(self, payload)
            case ("sync",) if header:
                self._near_came(codec.decode_as(Near, header))
            case ("sync",):
                await self._sync_came(codec.decode_as(Sync, payload))
            case ("acks",):
                await self._ack_came(codec.decode_as(Ack, payload))
            case ("wants",):
                await self._want_came(codec.decode_as(Want, payload))
            case ("mail", bytes(scope)):
                await self._letter_came(scope, codec.decode_as(LetterHead, header), payload)
            case ("datasets",):
                self._datasets_came(payload)
            case ("blob", int(lane)):
                self._piece_came(lane, codec.decode_as(Chunk, header), payload)
            case _:
                raise RemoteProtocolError("a channel of an unknown name")

    def _hello(self, hello: Hello) -> None:
        if self.claim is not None:
            raise RemoteProtocolError("a second hello")
        if not set(hello.versions) & set(VERSIONS):
            raise RemoteProtocolError(f"it speaks other versions of the protocol than ours: {hello.versions}")
        self.claim = Claim(hello.boot, hello.epoch, self._mesh.me if self.link.initiator else self.peer)
        if self._mesh.connections.adopt(self):
            self._greeted.set()

    def _near_came(self, near: Near) -> None:
        scope, mesh = near.scope, self._mesh
        ready = scope in self._ready
        if near.open:
            if scope not in self._near and len(self._near) >= MAX_READY:
                raise RemoteProtocolError("of too many scopes")
            self._near[scope] = near.peers
            if ready:
                mesh.met(self, scope, near.peers)
        else:
            self._near.pop(scope, None)
            self._ready.discard(scope)
            if ready:
                mesh.closed(self, scope)
            else:
                mesh.not_open(self, scope)

    async def _sync_came(self, sync: Sync) -> None:
        scope, mesh = sync.scope, self._mesh
        if len(sync.digests) % DIGEST_BYTES or (scope not in self._ready and len(self._ready) >= MAX_READY):
            raise RemoteProtocolError("a list of digests that is none, or of too many scopes")
        known = self._known.setdefault(scope, set())
        known.update(sync.digests[i : i + DIGEST_BYTES] for i in range(0, len(sync.digests), DIGEST_BYTES))
        if sum(map(len, self._known.values())) > MAX_KNOWN or len(self._known) > LANES:
            raise RemoteProtocolError("a list of too many digests")
        if sync.received:
            await mesh.store.write(lambda tx: self._forget(tx, scope, sync.received))
        if sync.last:
            del self._known[scope]
            if not sync.of:
                self._ready.add(scope)
                mesh.met(self, scope, self._near.get(scope, b""))
            opened = mesh.scopes.get(scope)
            if opened is None:
                farewell = await mesh.store.read(lambda tx: records.farewell(tx, scope, self.peer))
                if farewell is not None and farewell.digest not in known:
                    self.push(farewell)
                if scope not in mesh.considered:
                    self.tell_near(scope)
            elif self.peer in opened.audience:
                named = peers_of(opened.audience, sync.of)
                for signed in opened.shelf.missing(known):
                    if opened.neighbours.answers(signed.record, self.peer, named):
                        self.push(signed)
                if scope in self._ready:
                    self._pump(scope)

    async def _ack_came(self, ack: Ack) -> None:
        await self._mesh.store.write(lambda tx: self._forget(tx, ack.scope, [(ack.stage, ack.upto)]))

    def _forget(self, tx: Transaction, scope: bytes, acknowledged: list[tuple[str, int]]) -> None:
        for stage, upto in acknowledged:
            blobs.remove(tx, self._mesh.store, mail.acknowledged(tx, scope, stage, self.peer, upto))

    async def _letter_came(self, scope: bytes, head: LetterHead, payload: memoryview) -> None:
        mesh = self._mesh
        place = Place(scope, head.stage, self.peer, mesh.me, head.seq)
        if head.size > mail.MAX_LETTER or (not head.digest and head.size != len(payload)):
            raise RemoteProtocolError("a letter that is too large, or of another size than it says")
        while True:
            ticket = mesh.room.ticket
            opened = mesh.scopes.get(scope)
            if opened is None or self.peer not in opened.audience:
                return  # closed here; the sender learns it from the job
            if mesh.waiting.has_room(scope, self.peer, head.size):
                break
            await ticket.wait()
        mesh.waiting.add(scope, self.peer, 0, head.size)  # its room is taken while it comes
        try:
            await self._keep_letter(place, head, payload, opened.inbox[self.peer])
        finally:
            if scope in mesh.scopes:
                mesh.waiting.add(scope, self.peer, 0, -head.size)
            mesh.room.ring()

    async def _keep_letter(self, place: Place, head: LetterHead, payload: memoryview, inbox: Bell) -> None:
        mesh, scope = self._mesh, place.scope
        if not head.digest:
            mail.unpack(place, payload)
        elif await mesh.store.read(lambda tx: mail.expected(tx, scope, head.stage, self.peer)) <= head.seq:
            try:
                await self._fetch_letter(place, head)
            except LocalProtocolError:
                if scope in mesh.scopes:
                    raise
                return  # it was closed meanwhile
        body = bytes(payload)

        def commit(tx: Transaction) -> int:
            if records.audience_of(tx, scope) is not None and mail.deliver(tx, place, head, body):
                tx.after_commit(lambda: mesh.waiting.add(scope, self.peer, 1, head.size))
                tx.after_commit(inbox.ring)
            return mail.expected(tx, scope, head.stage, self.peer)

        self._say(("ack", scope, head.stage), await mesh.store.write(commit))

    async def _fetch_letter(self, place: Place, head: LetterHead) -> None:
        if len(head.digest) != DIGEST_BYTES:
            raise RemoteProtocolError("a letter that has no digest")
        try:
            path = await self._mesh.files.pull(place.scope, head.digest, head.size, [self.peer], relays=False)
        except TrustError as error:
            raise RemoteProtocolError(error.message) from None
        try:
            mail.unpack(place, read_file(path))
        except RemoteProtocolError:
            path.unlink(missing_ok=True)
            raise

    # datasets

    async def ask_datasets(self) -> Offers:
        """What the other side offers. Raises SessionError if it does not say so in time."""
        if not self._asked:
            self._asked = True
            self._say(("ask datasets",), 0)
        with trio.move_on_after(ANSWER_S) as patience:
            await self._told.ticket.wait()
        if self._over or patience.cancelled_caught:
            reason = self.reason if self._over else f"no answer within {ANSWER_S:.0f} seconds"
            raise SessionError(f"{self._mesh.roster.name_of(self.peer)}: {reason}", peer=self.peer)
        return self._offers

    def _datasets_came(self, payload: memoryview) -> None:
        if not payload:
            self._say(("datasets",), 0)
            return
        if not self._asked:
            raise RemoteProtocolError("an answer to no question")
        self._offers, self._asked = offers.parse(payload), False
        self._told.ring()

    # files

    async def pull(self, scope: bytes, incoming: Incoming, holder: str = "", bell: Bell | None = None) -> bool:
        """Ask for the rest of a file, of which somebody else may be the holder; whether all of it came.

        False: the session ended, or it is not there. The bell rings with every piece.
        """
        async with self._lanes:
            lane = self._free_lanes.pop()
            bell = bell or Bell()
            self._pulling[lane] = (incoming, bell)
            gone = self._gone[incoming.digest]
            try:
                ticket = bell.ticket
                want = Want(lane, scope, incoming.digest, incoming.offset, incoming.size, holder)
                await self.link.send(WANTS, b"", codec.encode(want))
                while not incoming.complete:
                    with trio.move_on_after(STALL_S) as patience:
                        await ticket.wait()
                    ticket = bell.ticket
                    if self._over or patience.cancelled_caught or self._gone[incoming.digest] != gone:
                        return incoming.complete
                return True
            except SessionError:
                return False
            finally:
                del self._pulling[lane]
                self._free_lanes.append(lane)

    def _piece_came(self, lane: int, chunk: Chunk, piece: memoryview) -> None:
        if lane not in self._pulling:
            return
        incoming, bell = self._pulling[lane]
        if chunk.offset == GONE and chunk.digest == incoming.digest:
            self._gone[chunk.digest] += 1
            bell.ring()
            return
        try:
            if incoming.write(chunk.digest, chunk.offset, piece):
                bell.ring()
        except StoreError:
            if not incoming.passing:
                raise
            self._gone[chunk.digest] += 1  # no room for the files of others: they ask another way
            bell.ring()

    async def _want_came(self, want: Want) -> None:
        opened = self._mesh.scopes.get(want.scope)
        allowed = (
            opened is not None
            and self.peer in opened.audience
            and await self._mesh.store.read(
                lambda tx: (
                    blobs.offered(tx, want.scope, want.digest) or mail.offers(tx, want.scope, self.peer, want.digest)
                )
            )
        )
        self._serving[want.lane].cancel()
        self._serving[want.lane] = serving = trio.CancelScope()
        assert self._nursery is not None
        if not allowed and (holder := self._holder(want)) is not None:
            self._nursery.start_soon(self._pass_on, want, holder, serving)
            return
        self._nursery.start_soon(self._send_file, want, self._mesh.store.path_of(want.digest), allowed, serving)

    def _holder(self, want: Want) -> Session | None:
        """The session with the holder that a Want names, if both it and who asks have a part in the scope."""
        opened = self._mesh.scopes.get(want.scope)
        if opened is None or not {self.peer, want.holder} <= {*opened.neighbours}:
            return None
        return self._mesh.connections.sessions[want.holder] if want.holder != self.peer else None

    async def _pass_on(self, want: Want, holder: Session, serving: trio.CancelScope) -> None:
        """Fetch a file for the other side from one whom it cannot reach, and send each piece as it comes."""
        name, bell = ("blob", want.lane), Bell()
        over = False

        async def pull() -> None:
            nonlocal over
            await holder.pull(want.scope, passing, bell=bell)
            over = True
            bell.ring()

        with serving:
            try:
                passing = self._mesh.files.fetched.passage(want.digest, want.size, min(want.offset, want.size))
            except StoreError:  # no room for the files of others
                with suppress(SessionError):
                    await self.link.send(name, codec.encode(Chunk(want.digest, GONE)), bulk=True)
                return
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pull)
                    offset = want.offset
                    while offset < want.size:
                        ticket = bell.ticket
                        if piece := passing.read(offset, CHUNK_BYTES):
                            await self.link.send(name, codec.encode(Chunk(want.digest, offset)), piece, bulk=True)
                            offset += len(piece)
                        elif over:
                            await self.link.send(name, codec.encode(Chunk(want.digest, GONE)), bulk=True)
                            break
                        else:
                            await ticket.wait()
                    nursery.cancel_scope.cancel()
            except* SessionError:
                pass
            finally:
                passing.close()

    async def _send_file(self, want: Want, path: Path, allowed: bool, serving: trio.CancelScope) -> None:
        with serving:
            name = ("blob", want.lane)
            try:
                try:
                    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if allowed else None
                except FileNotFoundError:
                    file = None
                if file is None:
                    await self.link.send(name, codec.encode(Chunk(want.digest, GONE)), bulk=True)
                    return
                try:
                    offset = want.offset
                    while piece := os.pread(file, CHUNK_BYTES, offset):
                        await self.link.send(name, codec.encode(Chunk(want.digest, offset)), piece, bulk=True)
                        offset += len(piece)
                finally:
                    os.close(file)
            except SessionError:
                pass


def read_file(path: Path) -> memoryview:
    """A file's bytes, mapped, read-only; they stay readable when it is removed."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
