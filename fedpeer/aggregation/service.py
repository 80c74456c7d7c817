"""Secure sums of stages, the daemon's side: drives a `Party` for each contract and set of parties.

Rules
* A step's messages and secrets are one transaction; only then is anything sent, and work begun. Our own messages are
  records of the mesh, and so the log: after a restart the Party is made again from them and from the kept secrets.
* Secrets are sealed on disk with a key of this peer's identity.
* The parties of a stage with sums have a scope of their own, named `root`: what is said, and files, are for them alone.
* A message is one record, whoever passes it on and however it is wrapped: its slot is its name. Of instances that are
  not known here others may fill half of a sender's room and no more, so that what is known always finds place.
* When others have a message of ours that is not in our log, the log was restored from an old copy, and there may be
  more that nobody sent: that instance is left alone for good.
* The first vector asked for a sum is the only one: its hash is kept. Another vector, history or parameters for the
  same (contract, stage, turn, k) is NotDeterministic, before anything is sent.
* Arithmetic runs in threads, a step at a time for each Party. A Party lives until the contract's scope is closed: the
  others may need this peer's votes and shares after its own stage has ended.

Source: SA1, version 1, section 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import trio

from fedpeer import codec
from fedpeer.aggregation import slices, vectors
from fedpeer.aggregation.agreed import Agreed
from fedpeer.aggregation.evidence import PINNED
from fedpeer.aggregation.messages import Signed, SumName, parse
from fedpeer.aggregation.names import MIN_PARTIES, Profile, group_of, params_hash
from fedpeer.aggregation.party import Party
from fedpeer.aggregation.request import Request, Terms, Total
from fedpeer.aggregation.seat import Ask, Ended, Setting, Step, Waits
from fedpeer.aggregation.vectors import Vector
from fedpeer.aggregation.work import Add, Fetch, FetchTotal, Mask, Unmask, Work, perform
from fedpeer.crypto import Aead, Buffer, hash_, random_bytes
from fedpeer.errors import (
    BelowQuorum,
    LocalProtocolError,
    NotDeterministic,
    ProtocolError,
    RemoteProtocolError,
    SumError,
    SumIsNoise,
    SumLost,
    SurvivorsChanged,
    TrustError,
)
from fedpeer.events import Events
from fedpeer.identity import Card, Identity
from fedpeer.mesh import blobs
from fedpeer.mesh.records import MAX_RECORDS, Record
from fedpeer.mesh.service import Mesh
from fedpeer.store import RunInThread, Schema, Store, Transaction

KIND: Final = "sa1"
SID_CHARACTERS: Final = 33
WIDTH: Final = 24
_NONCE_BYTES: Final = 12


class Aggregation:
    """Secure sums and agreed values of all contracts of this daemon."""

    SCHEMAS: ClassVar[list[Schema]] = [
        Schema(
            "aggregation",
            [
                "CREATE TABLE aggregation_sum (contract BLOB NOT NULL, stage TEXT NOT NULL, turn INTEGER NOT NULL,"
                " k INTEGER NOT NULL, asked BLOB NOT NULL, PRIMARY KEY (contract, stage, turn, k)) WITHOUT ROWID",
                """
                CREATE TABLE aggregation_party (root BLOB PRIMARY KEY, contract BLOB NOT NULL, parties BLOB NOT NULL,
                    profile TEXT NOT NULL, min_parties INTEGER NOT NULL, stall_s REAL NOT NULL, prg TEXT NOT NULL);
                CREATE TABLE aggregation_secret (root BLOB NOT NULL, key BLOB NOT NULL, sealed BLOB NOT NULL,
                    PRIMARY KEY (root, key)) WITHOUT ROWID;
                CREATE TABLE aggregation_lost (root BLOB NOT NULL, sid BLOB NOT NULL, PRIMARY KEY (root, sid))
                    WITHOUT ROWID
                """,
                "CREATE TABLE aggregation_scope (root BLOB PRIMARY KEY, contract BLOB NOT NULL)",
            ],
        )
    ]

    def __init__(
        self,
        mesh: Mesh,
        store: Store,
        identity: Identity,
        *,
        run_in_thread: RunInThread,
        events: Events,
        log: Any,
    ) -> None:
        self.mesh, self.store, self.identity = mesh, store, identity
        self.run_in_thread, self.events, self.log = run_in_thread, events, log
        self.seal = Aead(identity.sealing.reveal())
        self._agreed = Agreed(mesh, mesh.files, mesh.roster, store, run_in_thread)
        self._drivers: dict[bytes, _Driver] = {}
        self._nursery: trio.Nursery | None = None
        self._strays: defaultdict[bytes, dict[str, Signed]] = defaultdict(dict)  # scope → slot → message
        mesh.seal(KIND, self._verify, self._stray)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part in the sums of all open contracts until cancelled. Started when those of the last run go on."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            rows = await self.store.read(
                lambda tx: tx.all("SELECT contract, parties, profile, min_parties, stall_s, prg FROM aggregation_party")
            )
            for contract, parties, *terms in rows:
                await self._driver(contract, codec.decode(parties), Terms(*terms))
            task_status.started()
            await trio.sleep_forever()

    async def sum(
        self,
        contract: bytes,
        parties: Sequence[str],
        terms: Terms,
        request: Request,
        *,
        waits: Callable[[Sequence[str], float], None] = lambda _names, _left_s: None,
    ) -> Total:
        """The sum of the vectors of those `parties` (peer ids, this one among them) that survive, mod 2^24.

        `waits` is told once if it takes longer than usual: the names of whom it lacks, and the seconds until it ends.
        Raises SumError (fewer than three parties; noise, lost, or waited for too long, naming the parties),
        NotDeterministic (asked before with another vector).
        """
        driver = await self._driver(contract, parties, terms)
        asked = await self.run_in_thread(
            lambda: hash_("fp.sa1.asked", request.history, request.params, np.ascontiguousarray(request.vector).data)
        )
        await self.store.write(lambda tx: _ask_once(tx, contract, request, asked))
        return await driver.sum(request, waits)

    async def agree(self, contract: bytes, parties: Sequence[str], stage: str, turn: int, k: int, mine: bytes) -> bytes:
        """One party's bytes for all (aggregation.agreed)."""
        return await self._agreed.agree(contract, parties, stage, turn, k, mine)

    def open(self, tx: Transaction, contract: bytes, parties: Sequence[str]) -> None:
        """These are going to have sums: keep what they say. Idempotent.

        When the contract is opened, not only with the first sum: a peer that was restored from an old copy of its state
        then hears what it has said before it says anything.
        """
        root = root_of(contract, parties)
        self.mesh.open_scope(tx, root, parties)
        tx.execute("INSERT OR IGNORE INTO aggregation_scope VALUES (?, ?)", (root, contract))

    def forget(self, tx: Transaction, contract: bytes) -> None:
        """The contract is over: nobody needs anything of its sums any more, and their scopes are closed with it."""
        for (root,) in tx.all("DELETE FROM aggregation_scope WHERE contract = ? RETURNING root", (contract,)):
            self.mesh.close_scope(tx, root)
        tx.execute("DELETE FROM aggregation_sum WHERE contract = ?", (contract,))
        for table in ("secret", "lost"):
            of_contract = "root IN (SELECT root FROM aggregation_party WHERE contract = ?)"
            tx.execute(f"DELETE FROM aggregation_{table} WHERE {of_contract}", (contract,))  # noqa: S608 - constants
        tx.execute("DELETE FROM aggregation_party WHERE contract = ?", (contract,))
        tx.after_commit(partial(self._forgotten, contract))

    def _stray(self, record: Record) -> None:
        """Others have a message of ours that is not in our log."""
        self._strays[record.scope][record.slot] = parse(record.body)  # as many as we have ever signed
        if record.scope in self._drivers:
            self._drivers[record.scope].ring()

    def strays(self, root: bytes) -> list[Signed]:
        """Messages of ours that others have, and we have not."""
        return list(self._strays[root].values()) if root in self._strays else []

    def _verify(self, record: Record, card: Card) -> None:
        """What the mesh asks before it keeps or passes on a message of a sum."""
        signed = parse(record.body)
        if record.slot != _slot(signed):
            raise RemoteProtocolError("a message of a sum under another name")
        driver = self._drivers.get(record.scope)
        if signed.kind == "SHARE":
            holder = signed.message.holder
            if driver is not None and driver.parties[holder : holder + 1] != [record.to]:
                raise RemoteProtocolError("a share that was addressed to another than its holder")
        elif record.to and signed.kind != "SCATTER":
            raise RemoteProtocolError("a message for all that was addressed to one")
        signed.verify(card.body.signing)

    def _forgotten(self, contract: bytes) -> None:
        for root, driver in list(self._drivers.items()):
            if driver.contract == contract:
                self._strays.pop(root, None)
                driver.scope.cancel()
                del self._drivers[root]

    async def _driver(self, contract: bytes, parties: Sequence[str], terms: Terms) -> _Driver:
        root = root_of(contract, parties)
        if root not in self._drivers:
            if contract not in self.mesh.scopes:
                raise LocalProtocolError("a sum of a contract whose scope is not open")
            if len(parties) < MIN_PARTIES:
                raise SumError(
                    f"a secure sum over {len(parties)} parties would show one what the others have",
                    hint=f"a stage with sums needs at least {MIN_PARTIES} participants",
                )
            try:
                numbers = terms.among(len(parties))
            except LocalProtocolError as error:
                raise SumError(error.message) from None
            row = (
                root,
                contract,
                codec.encode(list(parties)),
                terms.profile,
                terms.min_parties,
                terms.stall_s,
                terms.prg,
            )
            driver = _Driver(self, contract, root, parties, numbers, terms)

            def begin(tx: Transaction) -> None:
                tx.execute("INSERT OR IGNORE INTO aggregation_party VALUES (?, ?, ?, ?, ?, ?, ?)", row)
                self.open(tx, contract, parties)
                tx.after_commit(partial(self._begun, driver))

            await self.store.write(begin)
        if root not in self._drivers:
            raise LocalProtocolError("a sum of a contract whose scope was closed meanwhile")
        return self._drivers[root]

    def _begun(self, driver: _Driver) -> None:
        """Its scope is open: from now on it is driven, by one driver."""
        if driver.root not in self._drivers:
            assert self._nursery is not None, "sums begin when run() has started"
            self._drivers[driver.root] = driver
            self._nursery.start_soon(driver.run)


class _Driver:
    """Does what the Party of one contract and set of parties says."""

    def __init__(
        self,
        aggregation: Aggregation,
        contract: bytes,
        root: bytes,
        parties: Sequence[str],
        numbers: Profile,
        terms: Terms,
    ) -> None:
        self.contract, self.root, self.parties = contract, root, list(parties)
        self.scope = trio.CancelScope()
        self._aggregation, self._mesh, self._store = aggregation, aggregation.mesh, aggregation.store
        self._numbers, self._stall_s, self._prg = numbers, terms.stall_s, terms.prg
        self._me = self.parties.index(aggregation.identity.id)
        self._position = 0
        self._over: set[str] = set()  # beginnings of slots of which nobody needs anything any more
        self._known: Callable[[bytes], bool] = lambda _sid: True
        self._bell = trio.Event()
        self._asks: list[Ask] = []
        self._results: list[tuple[Work, Any]] = []
        self._working: defaultdict[bytes, set[trio.CancelScope]] = defaultdict(set)  # by sid
        self._vectors: dict[SumName, Vector] = {}
        self._paths: dict[bytes, Path] = {}
        self._made: set[bytes] = set()  # files that this party made here, offered or not
        self._ended: dict[SumName, Ended] = {}
        self._waits: dict[SumName, Waits] = {}
        self._told = trio.Event()
        self._broken: SumError | None = None

    async def sum(self, request: Request, waits: Callable[[Sequence[str], float], None]) -> Total:
        group = group_of(self.root, b"" if request.group == "data" else request.turn_history)
        if self._numbers.n * ((1 << request.bits) - 1) >= 1 << WIDTH:
            raise SumError(f"{self._numbers.n} values of {request.bits} bits do not fit into {WIDTH}: a sum would wrap")
        numbers = vars(self._numbers).values()
        encoded = codec.encode(
            [1, list(request.name), request.params, WIDTH, request.bits, self._prg, *numbers, request.group, PINNED]
        )
        ask = Ask(
            request.name,
            group,
            request.history,
            request.turn_history,
            params_hash(encoded),
            len(request.vector),
            request.used,
            WIDTH,
            request.bits,
            data=request.group == "data",
            encoded=encoded,
        )
        self._vectors[request.name] = request.vector
        self._asks.append(ask)
        self.ring()
        try:
            while (ended := self._ended.get(request.name)) is None:
                if self._broken is not None:
                    raise self._broken
                if (waiting := self._waits.pop(request.name, None)) is not None:
                    waits(self._list(waiting.parties), waiting.left_s)
                await self._told.wait()
        finally:
            self._vectors.pop(request.name, None)
            self._waits.pop(request.name, None)
        if ended.status != "SUM":
            raise self._failure(request, ended)
        path = self._path(ended.sum_hash)
        values = await self._aggregation.run_in_thread(lambda: vectors.unpack(path.read_bytes(), WIDTH))
        return Total(values, [self.parties[party] for party in sorted(ended.survivors)], ended.sum_hash)

    def _failure(self, request: Request, ended: Ended) -> SumError:
        names = self._names(ended.parties)
        what = f"sum {request.k} of turn {request.turn} of stage {request.stage!r}"
        if ended.status == "NOISE":
            return SumIsNoise(
                f"{what} is noise: a participant had another history or other parameters, or broke the protocol"
            )
        if ended.status == "LOST":
            return SumLost(f"{what} is lost: {names} did not show what is needed to finish it in {self._stall_s:.0f} s")
        if ended.parties & ended.survivors:
            names = self._names(ended.parties & ended.survivors)
            return SurvivorsChanged(
                f"{what} waited {self._stall_s:.0f} s for {names}: over other participants it would tell their values",
                hint="in a new contract without them the same sums would tell their values by the difference",
            )
        why = [f"missing: {names}"] if names else []
        if ended.differing:
            why.append(f"with another history or other parameters: {self._names(ended.differing)}")
        return BelowQuorum("; ".join([f"{what} waited {self._stall_s:.0f} s: too few participants answered", *why]))

    def _names(self, parties: Collection[int]) -> str:
        return ", ".join(self._list(parties))

    def _list(self, parties: Collection[int]) -> list[str]:
        return [self._mesh.roster.name_of(self.parties[party]) for party in sorted(parties)]

    # the loop

    async def run(self) -> None:
        """Until the contract is forgotten."""
        with self.scope:
            try:
                await self._run()
            except* ProtocolError as group:  # the scope was closed under us, or our records are too many or too large
                reason = str(group.exceptions[0])
                self._aggregation.log.warning("sums_ended", contract=self.contract.hex(), reason=reason)
                self._broken = SumError(f"the sums of this contract cannot go on here: {reason}")
                self._tell()

    async def _run(self) -> None:
        kept, lost = await self._store.read(self._load)
        setting = Setting(
            self.root,
            self._numbers,
            self._me,
            [self._key_of(party) for party in self.parties],
            self._prg,
            self._stall_s,
            name_of=lambda party: self._mesh.roster.name_of(self.parties[party]),
        )
        party = Party(setting, self._aggregation.identity.signing, random_bytes, kept, lost)
        self._known = party.knows
        self._mesh.refuse(self.root, self._refuses)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            while True:
                self._bell = trio.Event()
                step = await self._look(party)
                if step:
                    await self._carry_out(party, step, nursery)
                elif not self._bell.is_set():
                    at = party.wake_at()
                    with trio.move_on_at(trio.current_time() + 3600 if at is None else at):
                        await self._bell.wait()

    async def _watch(self) -> None:
        with suppress(LocalProtocolError):  # the scope was closed
            while True:
                change = self._mesh.changed(self.root)
                self.ring()  # what came before this moment is looked at, too
                await change

    def _refuses(self, record: Record) -> bool:
        """Of what is over nothing is taken, of what is not known only so much that what is known still has room."""
        if record.slot[:SID_CHARACTERS] in self._over:
            return True
        if self._mesh.count(self.root, record.sender) < MAX_RECORDS // 2:
            return False
        try:
            return not self._known(parse(record.body).sid)
        except RemoteProtocolError:
            return True

    def _tell(self) -> None:
        self._told.set()
        self._told = trio.Event()

    def ring(self) -> None:
        self._bell.set()

    def _key_of(self, peer: str) -> bytes:
        card = self._mesh.roster.get(peer)
        return card.body.signing if card is not None else bytes(32)

    async def _look(self, party: Party) -> Step:
        """Take in what came since the last look, and what follows from it. What is here of ours is our log."""
        now, lost = trio.current_time(), len(party.lost)
        new, self._position = self._mesh.since(self.root, KIND, self._position)
        strays = self._aggregation.strays(self.root)
        asks, self._asks = self._asks, []
        results, self._results = self._results, []

        def look() -> Step:
            for sender, _slot, body in new:
                signed = parse(body)
                if signed.sender < len(self.parties) and self.parties[signed.sender] == sender:
                    party.add(signed, logged=sender == self._mesh.me)
            for stray in strays:
                party.add(stray)
            for ask in asks:
                party.ask(ask, now)
            for work, result in results:
                party.done(work, result)
            return party.advance(now)

        step = await self._aggregation.run_in_thread(look)
        if len(party.lost) > lost:
            rows = [(self.root, sid) for sid in party.lost]
            await self._store.write(
                lambda tx: tx.executemany("INSERT OR IGNORE INTO aggregation_lost VALUES (?, ?)", rows)
            )
        return step

    async def _carry_out(self, party: Party, step: Step, nursery: trio.Nursery) -> None:
        self._over |= {_slot_of(sid) for sid in step.forget}
        for sid in step.void:
            for scope in self._working.get(sid, ()):
                scope.cancel()
        await self._store.write(lambda tx: self._commit(tx, step))
        for digest in step.drop:
            self._paths.pop(digest, None)
            self._made.discard(digest)
        for signed, _ in step.say:
            party.add(signed, logged=True)
        for work in step.work:
            nursery.start_soon(self._do, work)
        for ended in step.ended:
            self._ended[ended.name] = ended
        for waiting in step.waits:
            self._waits[waiting.name] = waiting
        if step.ended or step.waits:
            self._tell()
        if step.again:
            self._position = 0
        for note in step.notes:
            facts = {
                fact: [self.parties[party] for party in sorted(value)] if isinstance(value, frozenset) else value
                for fact, value in note.facts.items()
            }
            topic = f"job:{self.contract.hex()}"
            self._aggregation.events.publish(topic, "sum", sid=note.sid.hex()[:16], step=note.step, **facts)

    def _commit(self, tx: Transaction, step: Step) -> None:
        for key, raw in step.keep.items():
            if raw is None:
                tx.execute("DELETE FROM aggregation_secret WHERE root = ? AND key = ?", (self.root, key))
            else:
                nonce = random_bytes(_NONCE_BYTES)
                sealed = nonce + self._aggregation.seal.seal(nonce, raw, self.root + key)
                tx.execute("INSERT OR REPLACE INTO aggregation_secret VALUES (?, ?, ?)", (self.root, key, sealed))
        for signed, to in step.say:
            for digest in _files_of(signed):
                path = self._store.path_of(digest)
                if path.exists():
                    self._mesh.files.offer(tx, self.root, digest, path.stat().st_size)
            peer = "" if to is None or to == self._me else self.parties[to]
            self._mesh.publish(tx, self.root, KIND, _slot(signed), signed.raw, to=peer)
        for digest in step.drop:
            self._mesh.files.withdraw(tx, self.root, digest)
        for sid in step.forget:
            self._mesh.discard_under(tx, self.root, KIND, _slot_of(sid))

    def _load(self, tx: Transaction) -> tuple[dict[bytes, bytes], list[bytes]]:
        """The kept secrets, and the instances of which our log lacks something."""
        rows = tx.all("SELECT key, sealed FROM aggregation_secret WHERE root = ?", (self.root,))
        lost = tx.all("SELECT sid FROM aggregation_lost WHERE root = ?", (self.root,))
        kept = {
            key: self._aggregation.seal.open(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], self.root + key)
            for key, sealed in rows
        }
        return kept, [sid for (sid,) in lost]

    # work

    async def _do(self, work: Work) -> None:
        """Until it is done, or its instance is over."""
        if isinstance(work, Mask) and work.name not in self._vectors:
            return  # the stage was ended, or its patience: this party drops out
        scope = trio.CancelScope()
        scopes = self._working[work.sid]
        scopes.add(scope)
        try:
            with scope:
                result = await self._result(work)
                self._results.append((work, result))
                self.ring()
        except TrustError as error:
            self._aggregation.log.warning("sum_file_refused", reason=error.message)
        except (LocalProtocolError, FileNotFoundError):
            pass  # the scope was closed, or the instance ended and its files were dropped
        finally:
            scopes.discard(scope)
            if not scopes:
                self._working.pop(work.sid, None)

    async def _result(self, work: Work) -> Any:
        match work:
            case Mask():
                vector = self._vectors[work.name]
                return await self._aggregation.run_in_thread(lambda: perform(work, self, vector))
            case Add() | Unmask():
                return await self._aggregation.run_in_thread(lambda: perform(work, self))
            case Fetch():
                return await self._fetch(work.digest, work.nbytes, [work.party], _digest_of(work))
            case FetchTotal():
                return await self._fetch(work.sum_hash, work.nbytes, work.holders, slices.sum_hash)

    async def _fetch(self, digest: bytes, nbytes: int, holders: Sequence[int], digest_of: Callable[..., bytes]) -> bool:
        """Others choose these digests: a file of ours is taken for one only if it has it in this very place.

        And only if it was made or is offered here, and then it is offered: what another contract holds under the same
        name goes with that contract.
        """
        path = self._store.path_of(digest)
        known = digest in self._made or await self._store.read(lambda tx: blobs.offered(tx, self.root, digest))

        def is_ours() -> bool:
            return known and path.exists() and digest_of(path.read_bytes()) == digest

        def offer(tx: Transaction) -> bool:
            if path.exists():
                self._mesh.files.offer(tx, self.root, digest, nbytes)
            return path.exists()

        ours = await self._aggregation.run_in_thread(is_ours) and await self._store.write(offer)
        if not ours:
            peers = [self.parties[party] for party in holders if party != self._me]
            self._paths[digest] = await self._mesh.files.fetch(self.root, digest, nbytes, peers, digest_of=digest_of)
        return True

    def _path(self, digest: bytes) -> Path:
        return self._paths.get(digest) or self._store.path_of(digest)

    def read(self, digest: bytes) -> Buffer:
        """work.Files"""
        return self._path(digest).read_bytes()

    def write(self, digest: bytes, data: Buffer) -> None:
        """work.Files"""
        self._store.put_file_now(data, digest)
        self._made.add(digest)


def _digest_of(work: Fetch) -> Callable[..., bytes]:
    if work.what == "chunk":
        return partial(slices.chunk_digest, work.ctx, work.party, work.chunk)
    return partial(slices.sum_digest, work.ctx, work.chunk)


def root_of(contract: bytes, parties: Sequence[str]) -> bytes:
    """Names the sums that these parties (peer ids, in order) have in a contract: their scope, and in every sid."""
    return hash_("fp.sa1.who", contract, *(party.encode() for party in parties))


def _slot(signed: Signed) -> str:
    """The record's slot: each distinct message has its own; whether two contradict is the aggregation's to see."""
    return f"{_slot_of(signed.sid)}{signed.kind}/{signed.digest.hex()}"


def _slot_of(sid: bytes) -> str:
    """What the slots of an instance begin with."""
    return f"{sid.hex()[: SID_CHARACTERS - 1]}/"


def _files_of(signed: Signed) -> list[bytes]:
    """What others may fetch once this is said."""
    match signed.kind:
        case "SCATTER" | "SUM":
            return [signed.message.digest]
        case "FINAL":
            return [signed.message.sum_hash]
    return []


def _ask_once(tx: Transaction, contract: bytes, request: Request, asked: bytes) -> None:
    place = (contract, request.stage, request.turn, request.k)
    row = tx.one("SELECT asked FROM aggregation_sum WHERE contract = ? AND stage = ? AND turn = ? AND k = ?", place)
    if row is None:
        tx.execute("INSERT INTO aggregation_sum VALUES (?, ?, ?, ?, ?)", (*place, asked))
    elif row[0] != asked:
        raise NotDeterministic(
            f"sum {request.k} of turn {request.turn} of stage {request.stage!r} was asked again with other values",
            hint="in a stage, chance comes from peers.random and values from its inputs and from peers only",
        )
