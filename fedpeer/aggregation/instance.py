"""One attempt at a secure sum, at one party: messages, finished work and time in; messages, work and an end out.

Rules
* Pure. `add` and `done` only take in; `advance` says everything that follows, and says nothing twice: what this party
  has said is on the board, by its own messages, once they are on disk. So a restart needs no state but these.
* START fixes who contributes, who owns which slice, and under which keys; COMMIT fixes the survivors. What a party
  lets go of is decided by release.py alone.
* `valid…` depends on what is held, which only grows, never on opinions; opinions act in `_start_value` and
  `_commit_value`, which choose what this party proposes.
* Every alarm is soft: none decides about privacy.

The order of a successful instance: ADVERTISE, SHARE, ACK · READY · START · SCATTER, RECEIPT, SUM · COMMIT · RELEASE ·
OPEN · FINAL. The methods stand in this order.

Source: SA1, version 1, sections 4 to 9 and 11.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice, product
from typing import Any, Final, Literal

from fedpeer.aggregation import keyset, slices
from fedpeer.aggregation.agreement import Agreement
from fedpeer.aggregation.board import Board
from fedpeer.aggregation.keyset import HeldShare, KeySet, Which
from fedpeer.aggregation.messages import (
    COMMIT,
    START,
    AbortValue,
    CommitValue,
    Signed,
    Stage,
    StartValue,
    SumName,
    id_of,
    sign,
    value_of,
)
from fedpeer.aggregation.names import (
    Parties,
    Profile,
    advert_id,
    advert_root,
    bitmap,
    context,
    parties_of,
    proposer,
    sid_of,
)
from fedpeer.aggregation.release import (
    Decided,
    Log,
    Refused,
    may_open,
    may_release,
    may_scatter,
    may_share_b,
    may_share_sigma,
)
from fedpeer.aggregation.shamir import Weights
from fedpeer.aggregation.vectors import Prg, Width
from fedpeer.aggregation.work import Add, Chunk, Fetch, FetchTotal, Mask, Unmask, Work
from fedpeer.crypto import Secret, SigningKey
from fedpeer.errors import RemoteProtocolError, TrustError

ACK_S: Final = 0.05
RECEIPT_S: Final = 0.5
READY_S: Final = 10.0
OPEN_S: Final = 2.0
RATE: Final = 1.25e6
"""bytes a second that a party is taken to manage, until it is measured"""
TRIES: Final = 256
"""so many combinations of what a liar said twice, or of shares, are tried"""


@dataclass(frozen=True)
class Setting:
    """What all parties of a contract share, and who we are."""

    contract: bytes
    profile: Profile
    me: int
    publics: Sequence[bytes]
    """Ed25519 keys by party"""
    prg: Prg = "aegis256"
    stall_s: float = 3600.0
    name_of: Callable[[int], str] = str


@dataclass(frozen=True)
class Ask:
    """One call of Peers.sum at this party."""

    name: SumName
    group: bytes
    model: bytes
    """the history hash at this moment"""
    shared: bytes
    params: bytes
    d: int
    """elements of the padded vector"""
    used: int
    """elements before the pad"""
    w: Width = 24
    bits: int = 16
    data: bool = False
    """computed from the data alone: who is left out of the first instance is out for the contract"""
    pinned: bool = True


@dataclass(frozen=True)
class Note:
    """A step that an operator may watch."""

    sid: bytes
    step: str
    facts: Mapping[str, Any]


@dataclass
class Step:
    """What is to be done: commit `keep` and `say` in one transaction, `add` what was said, send it, start the work."""

    keep: dict[bytes, bytes | None] = field(default_factory=dict)
    """secrets, sealed on disk; None: erase"""
    say: list[tuple[Signed, int | None]] = field(default_factory=list)
    """our messages and whom they are for (None: all)"""
    work: list[Work] = field(default_factory=list)
    drop: list[bytes] = field(default_factory=list)
    """files that nobody needs any more, by digest"""
    forget: list[bytes] = field(default_factory=list)
    """instances of which nobody needs anything any more, by sid"""
    ended: list[Ended] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.keep or self.say or self.work or self.drop or self.forget or self.ended or self.notes)


Status = Literal["SUM", "NOISE", "LOST", "WAITING"]


@dataclass(frozen=True)
class Ended:
    """How a sum ended for this party. SUM: the total is the file named `sum_hash`; else `parties` are why."""

    name: SumName
    status: Status
    survivors: Parties
    sum_hash: bytes
    parties: Parties = frozenset()


@dataclass(frozen=True)
class Outcome:
    """How an instance ended for all: what the next one of the group names."""

    prev: list[Any]
    pin: Parties | None
    aborted: bool
    params: bytes
    survivors: Parties = frozenset()
    sum_hash: bytes = b""


@dataclass
class Here:
    """What the instances of one party share."""

    setting: Setting
    signer: SigningKey
    random: Callable[[int], bytes]
    log: Log = field(default_factory=Log)
    convicted: set[int] = field(default_factory=set)
    debtors: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Fixed:
    """What START decided."""

    contributors: Parties
    owners: Parties
    pin: Parties | None
    model: bytes
    params: bytes
    ctx: bytes
    adverts: Mapping[int, Signed]

    def advert(self, party: int) -> bytes:
        return advert_id(self.adverts[party].body)

    @property
    def publics(self) -> dict[int, bytes]:
        """pk by contributor"""
        return {party: signed.message.pk for party, signed in self.adverts.items()}


class Instance:
    """Instance `seq` of a group. `kept`: secrets of this sid from the disk, by their key."""

    def __init__(
        self,
        here: Here,
        group: bytes,
        seq: int,
        *,
        prev: list[Any] | None,
        pin: Parties | None,
        pinned: bool,
        data: bool,
        aborts: int,
        kept: Mapping[bytes, bytes],
    ) -> None:
        setting = here.setting
        self.here, self.group, self.seq, self.prev, self.pin = here, group, seq, prev, pin
        self.pinned, self.data, self.aborts = pinned, data, aborts
        self.me, self.n, self.profile = setting.me, setting.profile.n, setting.profile
        self.sid = sid_of(setting.contract, group, seq)
        self.board = Board(self.n)
        self.asks: dict[bytes, Ask] = {}  # by params
        self.fixed: Fixed | None = None
        self.outcome: Outcome | None = None
        self.muted = False
        """it met a message of its own that its log does not know: it says nothing more here"""
        self._start = Agreement(START, setting.profile, self.me, self._leader)
        self._commit = Agreement(COMMIT, setting.profile, self.me, self._leader)
        self._keys: KeySet | None = None
        self._shares: dict[bytes, HeldShare] = {}  # advert → our share of that dealer
        self._adverts: dict[int, dict[bytes, Signed]] = {party: {} for party in range(self.n)}
        self._dealt: set[tuple[int, bytes]] = set()
        self._tried: set[tuple[bytes, bytes]] = set()  # (SHARE, advert) that do not fit
        self._files: set[bytes] = set()  # digests that are here
        self._working: set[Any] = set()
        self._added: dict[tuple[bytes, int], bytes] = {}  # (survivors, chunk of ours) → digest, not yet said
        self._masked: Sequence[tuple[int, int, bytes]] = ()
        self._total: tuple[int, bytes] | None = None
        self._b: dict[int, Secret] = {}
        self._sigma: dict[int, Secret] = {}
        self._told: set[str] = set()
        self._since: dict[str, float] = {}
        self._alarms: list[float] = []
        self._values: dict[bytes, Any] = {}
        self._load(kept)

    def _leader(self, view: int) -> int:
        return proposer(self.here.setting.contract, self.group, self.seq, view, self.n)

    def _load(self, kept: Mapping[bytes, bytes]) -> None:
        for key, raw in kept.items():
            if key == self._key("keys"):
                self._keys = KeySet.from_bytes(raw)
            elif key.startswith(self._key("share")):
                share = HeldShare.from_bytes(raw)
                self._shares[share.adv_id] = share

    def _key(self, what: str, advert: bytes = b"") -> bytes:
        return self.sid + what.encode() + advert

    # what comes in

    def add(self, signed: Signed) -> None:
        """A verified message of this instance, our own from the log or just committed included."""
        if not self.board.add(signed):
            return
        match signed.kind:
            case "ADVERTISE":
                message = signed.message
                if keyset.is_usable(message.pk) and keyset.is_usable(message.epk):
                    self._adverts[signed.sender][advert_id(signed.body)] = signed
            case "PROPOSAL" | "PREVOTE" | "PRECOMMIT":
                (self._start if signed.message.stage == START else self._commit).add(signed)
            case "RELEASE" if signed.sender == self.me:
                survivors = parties_of(signed.message.survivors, self.n)
                self.here.log.release(self.sid, self.group, survivors, pinned=self.pinned)

    def done(self, work: Work, result: Any) -> None:
        """The result of work that `advance` asked for."""
        match work:
            case Mask():
                self._masked = result
                self._files |= {digest for _, _, digest in result}
            case Fetch():
                self._files.add(work.digest)
            case Add():
                self._added[work.survivors, work.chunk] = result[1]
                self._files.add(result[1])
            case Unmask():
                self._total = result
                self._files.add(result[1])
            case FetchTotal():
                self._files.add(work.sum_hash)

    def holds(self, digest: bytes) -> bool:
        return digest in self._files

    # what follows

    def advance(self, now: float, step: Step) -> None:
        """Add to `step` everything that follows from what is here."""
        self._alarms = []
        self._accuse(step)
        if self.outcome is not None:
            self._catch_up(step)
            return
        if not self.muted:
            if self._start.decided is None:
                self._set_up(now, step)
                self._be_ready(step)
            self._agree_on_start(now, step)
        if self._fix(now, step):
            if not self.muted:
                self._scatter(step)
                self._add_up(now, step)
            self._gather(step)
            if not self.muted:
                self._agree_on_commit(now, step)
            self._conclude(now, step)
        self._end(now, step)

    def wake_at(self) -> float | None:
        """When `advance` wants to be called again though nothing came."""
        times = [*self._alarms, *(t for t in (self._start.wake_at(), self._commit.wake_at()) if t is not None)]
        return min(times, default=None) if self.outcome is None else None

    def _due(self, now: float, at: float) -> bool:
        """Whether it is time; if not, an alarm is set."""
        if now < at:
            self._alarms.append(at)
        return now >= at

    def _from(self, what: str, now: float) -> float:
        """When this was first so (as far as we know since the start)."""
        return self._since.setdefault(what, now)

    def _say(self, step: Step, kind: str, *fields: Any, to: int | None = None) -> None:
        step.say.append((sign(self.here.signer, self.sid, kind, self.me, *fields), to))

    def _work(self, step: Step, key: Any, work: Work) -> None:
        if key not in self._working:
            self._working.add(key)
            step.work.append(work)

    def _note(self, step: Step, name: str, **facts: Any) -> None:
        if name not in self._told:
            self._told.add(name)
            step.notes.append(Note(self.sid, name, {"seq": self.seq, **facts}))

    def _accuse(self, step: Step) -> None:
        for type_, first, second in self.board.conflicts:
            self.here.convicted.add(first.sender)
            if not self.muted:
                self._say(step, "EVIDENCE", type_, [first.raw, second.raw])
        self.board.conflicts.clear()

    # 1 keys and shares

    def _set_up(self, now: float, step: Step) -> None:
        if self._keys is None:
            own = self.board.by("ADVERTISE", self.me)
            inc = max((signed.message.inc + 1 for signed in own), default=0)
            self._keys = KeySet.fresh(self.me, self.sid, inc, self.here.random)
            step.keep[self._key("keys")] = self._keys.to_bytes()
            self._say(step, "ADVERTISE", *self._keys.advertise_fields)
            return
        mine = self._own_advert()
        if mine is None:  # kept, but not said: it is said now
            self._say(step, "ADVERTISE", *self._keys.advertise_fields)
            return
        for party, adverts in self._adverts.items():
            for advert, signed in adverts.items():
                if party != self.me and (party, advert) not in self._dealt:
                    self._dealt.add((party, advert))
                    self._deal(step, party, advert, signed)
        if mine not in self._shares:
            sealed = self._keys.share_for(self.me, mine, self._keys.epk, self.profile.t, self.n, self.here.signer)
            public = self.here.setting.publics[self.me]
            self._shares[mine] = self._keys.open_share(self.me, mine, self._keys.epk, sealed, public, self.n)
        for party in range(self.n):
            for signed in self.board.by("SHARE", party):
                if signed.message.holder == self.me:
                    self._open_share(step, signed)
        self._ack(now, step)

    def _own_advert(self) -> bytes | None:
        """The name of our keys, once they are advertised."""
        assert self._keys is not None
        return self._keys.adv_id if self._keys.adv_id in self._adverts[self.me] else None

    def _deal(self, step: Step, party: int, advert: bytes, signed: Signed) -> None:
        assert self._keys is not None
        sealed = self._keys.share_for(party, advert, signed.message.epk, self.profile.t, self.n, self.here.signer)
        share = sign(self.here.signer, self.sid, "SHARE", self.me, party, sealed)
        if share.digest not in {said.digest for said in self.board.by("SHARE", self.me)}:
            step.say.append((share, party))

    def _open_share(self, step: Step, signed: Signed) -> None:
        assert self._keys is not None
        for advert, advertised in self._adverts[signed.sender].items():
            if advert in self._shares or (signed.digest, advert) in self._tried:
                continue
            self._tried.add((signed.digest, advert))
            try:
                share = self._keys.open_share(
                    signed.sender,
                    advert,
                    advertised.message.epk,
                    signed.message.ciphertext,
                    self.here.setting.publics[signed.sender],
                    self.n,
                )
            except TrustError:
                continue
            self._shares[advert] = share
            step.keep[self._key("share", advert)] = share.to_bytes()

    def _ack(self, now: float, step: Step) -> None:
        entries = [
            (party, advert) for party, adverts in self._adverts.items() for advert in adverts if advert in self._shares
        ]
        said = {entry for signed in self.board.by("ACK", self.me) for entry in signed.message.entries}
        if not set(entries) > said:
            self._since.pop("ack", None)
            return
        everybody = all(any(advert in self._shares for advert in adverts) for adverts in self._adverts.values())
        if everybody or self._due(now, self._from("ack", now) + ACK_S):
            self._since.pop("ack", None)
            self._say(step, "ACK", len(self.board.by("ACK", self.me)), sorted(entries))

    # 2 START

    def _be_ready(self, step: Step) -> None:
        said = {signed.message.params for signed in self.board.by("READY", self.me)}
        for ask in self.asks.values():
            if ask.params not in said:
                self._say(step, "READY", list(ask.name), ask.model, ask.shared, ask.params)

    def _agree_on_start(self, now: float, step: Step) -> None:
        if not self._start.started and self._start_value(now) is not None:
            self._start.start(now)
        drafts = self._start.advance(now, self._valid_start, self._valid_start, lambda: self._start_value(now))
        for draft in drafts:
            self._say(step, draft.kind, *draft.fields)

    def _ready(self, model: bytes, params: bytes) -> set[int]:
        return {
            signed.sender
            for signed in self.board.all("READY")
            if signed.message.model == model and signed.message.params == params
        }

    def _start_value(self, now: float) -> list[Any] | None:
        """What this party would propose: every party that can contribute to a sum, if it is time."""
        sums: dict[tuple[bytes, bytes], set[int]] = {}
        for signed in self.board.all("READY"):
            sums.setdefault((signed.message.model, signed.message.params), set()).add(signed.sender)
        if not sums:
            return None
        own = [key for key in sums if key[1] in self.asks and self.asks[key[1]].model == key[0]]
        model, params = max(own or sums, key=lambda key: (len(sums[key]), key))
        avoided = self.here.convicted | self.here.debtors
        ready = sums[model, params] - (avoided if self.pin is None else set())
        chosen = {party: max(self._adverts[party].items(), key=_newest) for party in ready if self._adverts[party]}
        if self.pin is not None:
            chosen = {party: advert for party, advert in chosen.items() if party in self.pin}
        while len(chosen) >= self.profile.m_min:
            lacking = [party for party, (advert, _) in chosen.items() if not self._available(party, advert, chosen)]
            if not lacking:
                break
            for party in lacking:
                del chosen[party]
        contributors = frozenset(chosen)
        if len(contributors) < self.profile.m_min or (self.pin is not None and contributors != self.pin):
            return None
        if self.pin is None and contributors != frozenset(range(self.n)) - avoided:
            patience = self.here.setting.stall_s / 2 if self.data and self.seq == 0 else READY_S
            if not self._due(now, self._from("ready", now) + patience):
                return None
        owners = frozenset({self.me}) if self.aborts >= 2 else contributors
        root = advert_root([chosen[party][0] for party in sorted(contributors)])
        pin = None if self.pin is None else bitmap(self.pin, self.n)
        return ["U", model, params, bitmap(contributors, self.n), bitmap(owners, self.n), root, pin, self.prev]

    def _available(self, party: int, advert: bytes, contributors: Mapping[int, Any] | Parties) -> bool:
        holders = self.board.acked.get((party, advert), set()) & set(contributors)
        return len(holders) >= self.profile.acks_needed(len(contributors))

    def _value(self, stage: Stage, raw: list[Any]) -> Any:
        """The typed value, None for what is none."""
        key = id_of(stage, raw)
        if key not in self._values and len(self._values) < TRIES:
            try:
                self._values[key] = value_of(stage, raw)
            except RemoteProtocolError:
                self._values[key] = None
        return self._values.get(key)

    def _valid_start(self, raw: list[Any]) -> bool:
        value = self._value(START, raw)
        if not isinstance(value, StartValue):
            return False
        try:
            contributors, owners = parties_of(value.contributors, self.n), parties_of(value.owners, self.n)
            pin = None if value.pin is None else parties_of(value.pin, self.n)
        except RemoteProtocolError:
            return False
        return (
            len(contributors) >= self.profile.m_min
            and bool(owners)
            and pin == self.pin
            and (self.pin is None or contributors == self.pin)
            and value.prev == self.prev
            and contributors <= self._ready(value.model, value.params)
            and self._rooted(contributors, value.root, available=True) is not None
        )

    def _rooted(self, contributors: Parties, root: bytes, *, available: bool) -> dict[int, Signed] | None:
        """The adverts behind this root; somebody may have shown two."""
        held = [
            [
                item
                for item in self._adverts[party].items()
                if not available or self._available(party, item[0], contributors)
            ]
            for party in sorted(contributors)
        ]
        for chosen in islice(product(*held), TRIES):
            if advert_root([advert for advert, _ in chosen]) == root:
                return dict(zip(sorted(contributors), (signed for _, signed in chosen), strict=True))
        return None

    def _fix(self, now: float, step: Step) -> bool:
        """Whether START is decided and everything behind it is here."""
        decided = self._start.decided
        if self.fixed is not None or decided is None:
            return self.fixed is not None
        value = self._value(START, decided.value)
        contributors, owners = parties_of(value.contributors, self.n), parties_of(value.owners, self.n)
        adverts = self._rooted(contributors, value.root, available=False)
        if adverts is None:
            return False
        pin = None if value.pin is None else parties_of(value.pin, self.n)
        ctx = context(self.sid, value.model, value.params, contributors, owners, value.root, pin)
        self.fixed = Fixed(contributors, owners, pin, value.model, value.params, ctx, adverts)
        self._from("started", now)
        self._note(step, "started", contributors=len(contributors))
        return True

    @property
    def _ask(self) -> Ask | None:
        """What this party asked, if it is what START is about."""
        assert self.fixed is not None
        ask = self.asks.get(self.fixed.params)
        return ask if ask is not None and ask.model == self.fixed.model else None

    # 3 SCATTER, RECEIPT, CUT, SUM

    def _chunks(self, ask: Ask) -> list[Chunk]:
        assert self.fixed is not None
        owners = self.fixed.owners
        return [
            Chunk(number, start, stop, slices.owner_of(number, owners, self.sid))
            for number, (start, stop) in enumerate(slices.chunks(ask.d, len(owners)))
        ]

    def _decided(self) -> Decided:
        assert self.fixed is not None
        return Decided(self.sid, self.group, self.fixed.contributors, self.fixed.pin, self.pinned)

    def _scatter(self, step: Step) -> None:
        fixed, ask = self.fixed, self._ask
        assert fixed is not None
        if self._keys is None or ask is None or self.me not in fixed.contributors:
            return
        if fixed.advert(self.me) != self._own_advert() or self.board.says("SCATTER", self.me):
            return
        try:
            may_scatter(self.here.log, self._decided())
        except Refused:
            return
        chunks = self._chunks(ask)
        if not self._masked:
            plus, minus = keyset.masking_seeds(self._keys, fixed.ctx, fixed.publics)
            work = Mask(self.sid, fixed.ctx, ask.name, self.me, plus, minus, chunks, ask.w, self.here.setting.prg)
            self._work(step, "mask", work)
            return
        for chunk, (number, nbytes, digest) in zip(chunks, self._masked, strict=True):
            self._say(step, "SCATTER", fixed.ctx, number, nbytes, digest, to=chunk.owner)
        self._note(step, "scattered")

    def _received(self, chunk: Chunk, ask: Ask) -> dict[int, bytes]:
        """contributor → digest of its part of this chunk, as far as the files are here."""
        assert self.fixed is not None
        here: dict[int, bytes] = {}
        for party in self.fixed.contributors:
            for signed in self.board.by("SCATTER", party):
                message = signed.message
                if message.ctx == self.fixed.ctx and message.chunk == chunk.number and message.digest in self._files:
                    here.setdefault(party, message.digest)
        return here

    def _add_up(self, now: float, step: Step) -> None:
        """An owner's part: fetch, say whose parts are here, add up."""
        fixed, ask = self.fixed, self._ask
        assert fixed is not None
        if self.me not in fixed.owners or ask is None:
            return
        chunks = [chunk for chunk in self._chunks(ask) if chunk.owner == self.me]
        for chunk in chunks:
            nbytes = (chunk.stop - chunk.start) * ask.w // 8
            for party in fixed.contributors:
                for signed in self.board.by("SCATTER", party):
                    message = signed.message
                    if (message.ctx, message.chunk, message.nbytes) == (fixed.ctx, chunk.number, nbytes):
                        self._fetch(step, "chunk", party, chunk.number, nbytes, message.digest)
        received = [self._received(chunk, ask) for chunk in chunks]
        present = fixed.contributors.intersection(*received) if received else fixed.contributors
        self._receipt(now, step, present)
        wanted = {fixed.contributors} if present == fixed.contributors else set()
        for signed in self.board.all("CUT"):
            cut = parties_of(signed.message.survivors, self.n)
            if signed.message.ctx == fixed.ctx and signed.sender == self._leader(signed.message.view):
                wanted.add(cut)
        for survivors in wanted:
            if self._admissible(survivors) and survivors <= present:
                for chunk, parts in zip(chunks, received, strict=True):
                    self._add_chunk(step, ask, chunk, survivors, [parts[party] for party in sorted(survivors)])

    def _fetch(self, step: Step, what: str, party: int, chunk: int, nbytes: int, digest: bytes) -> None:
        assert self.fixed is not None
        if digest not in self._files:
            self._work(step, digest, Fetch(self.sid, what, self.fixed.ctx, party, chunk, nbytes, digest))

    def _receipt(self, now: float, step: Step, present: Parties) -> None:
        assert self.fixed is not None
        said = self.board.receipts.get((self.fixed.ctx, self.me), set())
        if not present > said:
            self._since.pop("receipt", None)
        elif present == self.fixed.contributors or self._due(now, self._from("receipt", now) + RECEIPT_S):
            self._since.pop("receipt", None)
            counter = len(self.board.by("RECEIPT", self.me))
            self._say(step, "RECEIPT", self.fixed.ctx, counter, bitmap(present, self.n))

    def _add_chunk(self, step: Step, ask: Ask, chunk: Chunk, survivors: Parties, digests: list[bytes]) -> None:
        assert self.fixed is not None
        key = bitmap(survivors, self.n), chunk.number
        if any((signed.message.survivors, signed.message.chunk) == key for signed in self.board.by("SUM", self.me)):
            return  # said: E3 knows one digest for each
        if key in self._added:
            self._say(step, "SUM", self.fixed.ctx, *key, self._added[key])
            self._note(step, "added")
            return
        work = Add(self.sid, self.fixed.ctx, *key, digests, chunk.stop - chunk.start, ask.w)
        self._work(step, ("add", *key), work)

    def _admissible(self, survivors: Parties) -> bool:
        """Whether these may be survivors (R4, and the pin of START)."""
        fixed = self.fixed
        assert fixed is not None
        return (
            survivors <= fixed.contributors
            and len(survivors) >= self.profile.m_min
            and (fixed.pin is None or survivors == fixed.pin)
        )

    def _gather(self, step: Step) -> None:
        """Fetch every sum that could become the result."""
        fixed, ask = self.fixed, self._ask
        assert fixed is not None
        if ask is None:
            return
        for chunk in self._chunks(ask):
            for signed in self.board.by("SUM", chunk.owner):
                message = signed.message
                if message.ctx == fixed.ctx and message.chunk == chunk.number:
                    nbytes = (chunk.stop - chunk.start) * ask.w // 8
                    self._fetch(step, "sum", chunk.owner, chunk.number, nbytes, message.digest)

    def _sums(self, ask: Ask, survivors: bytes) -> Iterator[tuple[bytes, ...]]:
        """The digests of all chunks of the sum over these survivors; an owner may have said two."""
        assert self.fixed is not None
        held = [
            [
                signed.message.digest
                for signed in self.board.by("SUM", chunk.owner)
                if (signed.message.ctx, signed.message.chunk) == (self.fixed.ctx, chunk.number)
                and signed.message.survivors == survivors
                and signed.message.digest in self._files
            ]
            for chunk in self._chunks(ask)
        ]
        return islice(product(*held), TRIES)

    # 4 COMMIT

    def _scatter_s(self, ask: Ask | None) -> float:
        nbytes = 0 if ask is None else ask.d * ask.w // 8
        return 2.0 + 4 * nbytes / RATE

    def _agree_on_commit(self, now: float, step: Step) -> None:
        fixed, ask = self.fixed, self._ask
        assert fixed is not None
        if self._commit.decided is None:
            patience = self._scatter_s(ask)
            begun = self._from("started", now)
            late = self._due(now, begun + 2 * patience)
            if not self._commit.started and (late or self._complete(ask) is not None):
                self._commit.start(now)
            self._due(now, begun + 8 * patience)
            if self._due(now, begun + patience):
                self._cut(step)
        valid = lambda raw: self._valid_commit(raw, now)  # noqa: E731
        for draft in self._commit.advance(now, valid, valid, lambda: self._commit_value(now)):
            self._say(step, draft.kind, *draft.fields)

    def _complete(self, ask: Ask | None) -> tuple[bytes, tuple[bytes, ...]] | None:
        """The largest survivor set whose sum is here, and the digests of its chunks."""
        if ask is None:
            return None
        sets = {signed.message.survivors for signed in self.board.all("SUM")}
        for survivors in sorted(sets, key=lambda raw: (-len(parties_of(raw, self.n)), raw)):
            if self._admissible(parties_of(survivors, self.n)):
                for digests in self._sums(ask, survivors):
                    return survivors, digests
        return None

    def _cut(self, step: Step) -> None:
        """The proposer of the view names the survivors when an owner misses somebody."""
        fixed, view = self.fixed, self._commit.view
        assert fixed is not None
        if self._leader(view) != self.me or any(s.message.view == view for s in self.board.by("CUT", self.me)):
            return
        if fixed.pin is not None or (self.data and self.aborts < 2) or self._complete(self._ask) is not None:
            return
        survivors = fixed.contributors
        for owner in fixed.owners:
            survivors = survivors & self.board.receipts.get((fixed.ctx, owner), set())
        if self._admissible(survivors) and survivors != fixed.contributors:
            self._say(step, "CUT", fixed.ctx, view, bitmap(survivors, self.n))

    def _abortable(self, now: float) -> bool:
        return self._due(now, self._from("started", now) + 8 * self._scatter_s(self._ask))

    def _commit_value(self, now: float) -> list[Any] | None:
        fixed = self.fixed
        assert fixed is not None
        complete = self._complete(self._ask)
        if complete is not None:
            survivors, digests = complete
            return ["S", fixed.ctx, survivors, slices.root(digests)]
        if self._abortable(now):
            return ["ABORT", fixed.ctx, None if self.pin is None else bitmap(self.pin, self.n)]
        return None

    def _valid_commit(self, raw: list[Any], now: float) -> bool:
        fixed, value = self.fixed, self._value(COMMIT, raw)
        assert fixed is not None
        if value is None or value.ctx != fixed.ctx:
            return False
        if isinstance(value, AbortValue):
            pin = None if self.pin is None else bitmap(self.pin, self.n)
            return value.pin == pin and self._abortable(now)
        assert isinstance(value, CommitValue)
        return self._behind(value) is not None

    def _behind(self, value: CommitValue) -> tuple[bytes, ...] | None:
        """The digests of the chunks that this decision names, if they are all here."""
        ask = self._ask
        try:
            survivors = parties_of(value.survivors, self.n)
        except RemoteProtocolError:
            return None
        if ask is None or not self._admissible(survivors):
            return None
        for digests in self._sums(ask, value.survivors):
            if slices.root(digests) == value.root:
                return digests
        return None

    # 5 RELEASE, OPEN, the result

    def _conclude(self, now: float, step: Step) -> None:
        decided = self._commit.decided
        if decided is None:
            return
        value = self._value(COMMIT, decided.value)
        survivors = frozenset[int]() if isinstance(value, AbortValue) else parties_of(value.survivors, self.n)
        if survivors and self.pinned:
            self.here.log.pins.setdefault(self.group, survivors)
        self._from("committed", now)
        self._note(step, "committed" if survivors else "aborted", survivors=len(survivors))
        if not self.muted:
            self._release(step, survivors, list(decided.signers))
        if survivors:
            if not self.muted:
                self._open(now, step, survivors)
            self._learn(step, survivors)
            self._unmask(step, value, survivors)

    def _release(self, step: Step, survivors: Parties, voters: Sequence[int]) -> None:
        fixed = self.fixed
        assert fixed is not None
        if self.board.says("RELEASE", self.me):
            return
        try:
            may_release(self.here.log, self.profile, self._decided(), survivors, voters)
        except Refused:
            return
        shares = []
        for dealer in sorted(fixed.contributors - survivors if survivors else ()):
            share = self._shares.get(fixed.advert(dealer))
            may_share_sigma(self._decided(), survivors, dealer)
            if share is not None:
                shares.append(share.opened("s"))
        self._say(step, "RELEASE", fixed.ctx, bitmap(survivors, self.n), shares)
        self._note(step, "released")

    def _open(self, now: float, step: Step, survivors: Parties) -> None:
        fixed, log, released = self.fixed, self.here.log, self.board.released
        assert fixed is not None
        try:
            may_open(log, self.profile, self.sid, survivors, released)
        except Refused:
            return
        said = {(signed.message.dealer, signed.message.which) for signed in self.board.by("OPEN", self.me)}
        own = self._keys is not None and self._own_advert() == fixed.advert(self.me) if self.me in survivors else False
        if own and self._keys is not None and (self.me, "b") not in said:
            self._say(step, "OPEN", self.me, fixed.advert(self.me), "b", self._keys.b.reveal())
            self._note(step, "opened")
        missing = sorted(survivors - self._b.keys() - ({self.me} if own else set()))
        if not missing or not self._due(now, self._from("committed", now) + OPEN_S):
            return
        shared = {entry[0] for signed in self.board.by("SHARE_B", self.me) for entry in signed.message.shares}
        entries = []
        for dealer in missing:
            share = self._shares.get(fixed.advert(dealer))
            if share is not None and dealer not in shared:
                may_share_b(log, self.profile, self.sid, survivors, released, dealer)
                entries.append(share.opened("b"))
        if entries:
            self._say(step, "SHARE_B", fixed.ctx, bitmap(survivors, self.n), entries)

    def _learn(self, step: Step, survivors: Parties) -> None:
        """Secrets that are due: opened, or put together from shares. Each certifies itself."""
        fixed = self.fixed
        assert fixed is not None
        for signed in self.board.all("OPEN"):
            message = signed.message
            if message.dealer in fixed.contributors and message.advert == fixed.advert(message.dealer):
                self._check(message.dealer, message.which, message.secret, survivors)
        for kind, due, known in (
            ("RELEASE", fixed.contributors - survivors, self._sigma),
            ("SHARE_B", survivors, self._b),
        ):
            for dealer in due - known.keys():
                self._recover(step, kind, dealer, survivors)

    def _check(self, dealer: int, which: Which, secret: bytes, survivors: Parties) -> bool:
        """Keep a secret that is due and is what its dealer advertised."""
        assert self.fixed is not None
        known = self._b if which == "b" else self._sigma
        if (which == "b") != (dealer in survivors):
            return False
        if dealer not in known and keyset.is_secret_of(self.fixed.adverts[dealer].message, which, Secret(secret)):
            known[dealer] = Secret(secret)
        return dealer in known

    def _recover(self, step: Step, kind: str, dealer: int, survivors: Parties) -> None:
        fixed, which = self.fixed, _WHICH[kind]
        assert fixed is not None
        advert, public = fixed.advert(dealer), self.here.setting.publics[dealer]
        shares: dict[int, bytes] = {}
        for signed in self.board.all(kind):
            for entry in signed.message.shares:
                if entry[0] == dealer and signed.sender not in shares and signed.message.ctx == fixed.ctx:
                    try:
                        keyset.check_opened(
                            self.sid, dealer, advert, signed.sender, which, entry[1], entry[2], entry[3], public
                        )
                    except TrustError:
                        continue
                    shares[signed.sender] = entry[1]
        tried = ("recovered", which, dealer, len(shares))
        if len(shares) < self.profile.t or tried in self._working:
            return
        self._working.add(tried)
        for holders in islice(combinations(sorted(shares), self.profile.t), TRIES):
            secret = Weights(holders).interpolate([shares[holder] for holder in holders])
            if self._check(dealer, which, secret, survivors):
                if not self.muted:
                    self._say(step, "OPEN", dealer, advert, which, secret)
                return

    def _unmask(self, step: Step, value: CommitValue, survivors: Parties) -> None:
        fixed, ask = self.fixed, self._ask
        assert fixed is not None
        gone = fixed.contributors - survivors
        if ask is None or not (survivors <= self._b.keys() and gone <= self._sigma.keys()):
            return
        if self._total is None:
            digests = self._behind(value)
            if digests is None:
                return
            plus, minus = keyset.unmasking_seeds(fixed.ctx, survivors, fixed.publics, self._b, self._sigma)
            work = Unmask(
                self.sid,
                fixed.ctx,
                digests,
                [(chunk.start, chunk.stop) for chunk in self._chunks(ask)],
                plus,
                minus,
                len(survivors),
                ask.d,
                ask.used,
                ask.bits,
                ask.w,
                self.here.setting.prg,
            )
            self._work(step, "unmask", work)
        elif not self.board.says("FINAL", self.me) and not self.muted:
            status, sum_hash = self._total
            self._say(step, "FINAL", fixed.ctx, bitmap(survivors, self.n), status, sum_hash)
            self._note(step, "unmasked", status=status)

    # 6 the end

    def _end(self, now: float, step: Step) -> None:
        """Whether q parties say the same of it."""
        if self._commit.decided is None or self.fixed is None:
            return
        value = self._value(COMMIT, self._commit.decided.value)
        if isinstance(value, AbortValue):
            if sum(frozenset() in sets for sets in self.board.released.values()) >= self.profile.t:
                prev = ["ABORT", self._commit.decided.id]
                self._finish(step, Outcome(prev, self.pin, aborted=True, params=self.fixed.params))
            return
        survivors = parties_of(value.survivors, self.n)
        finals: dict[tuple[int, bytes], set[int]] = {}
        for signed in self.board.all("FINAL"):
            message = signed.message
            if (message.ctx, message.survivors) == (self.fixed.ctx, value.survivors):
                finals.setdefault((message.status, message.sum_hash), set()).add(signed.sender)
        for (status, sum_hash), parties in finals.items():
            if len(parties) >= self.profile.q:
                prev = ["FINAL", self._commit.decided.id, sum_hash]
                pin = survivors if self.pinned else None
                self._finish(
                    step,
                    Outcome(prev, pin, aborted=False, params=self.fixed.params, survivors=survivors, sum_hash=sum_hash),
                )
                self._note(step, "final" if status == 0 else "noise")
                self.noise = status == 1
                return

    noise = False

    def _finish(self, step: Step, outcome: Outcome) -> None:
        """R6: what this instance needed no longer is erased."""
        self.outcome = outcome
        for advert in self._shares:
            step.keep[self._key("share", advert)] = None
        step.keep[self._key("keys")] = None
        self._keys = None
        self._shares.clear()
        step.drop += sorted(self._files - {outcome.sum_hash})
        self._files &= {outcome.sum_hash}

    def _catch_up(self, step: Step) -> None:
        """Get a total that others have, if this party wants it."""
        outcome = self.outcome
        assert outcome is not None
        if outcome.aborted or self.noise:
            return
        ask = self.asks.get(outcome.params)
        if ask is not None and outcome.sum_hash not in self._files:
            holders = sorted({s.sender for s in self.board.all("FINAL") if s.message.sum_hash == outcome.sum_hash})
            work = FetchTotal(self.sid, outcome.sum_hash, holders, ask.d * ask.w // 8)
            self._work(step, "total", work)

    # what the group asks

    def result(self) -> tuple[Parties, bytes] | None:
        """The survivors and the name of the total, once this party has it."""
        if self.noise:
            return None
        if self.outcome is not None and not self.outcome.aborted and self.outcome.sum_hash in self._files:
            return self.outcome.survivors, self.outcome.sum_hash
        return None

    def owing(self) -> Parties:
        """Parties whose due secret is unknown."""
        if self._commit.decided is None or self.fixed is None or self.outcome is not None:
            return frozenset()
        value = self._value(COMMIT, self._commit.decided.value)
        if isinstance(value, AbortValue):
            return frozenset()
        survivors = parties_of(value.survivors, self.n)
        return (survivors - self._b.keys()) | (self.fixed.contributors - survivors - self._sigma.keys())

    def absent(self) -> Parties:
        """Parties that this instance waits for."""
        wanted = self.pin if self.pin is not None else frozenset(range(self.n))
        return frozenset(party for party in wanted if not self.board.says("READY", party))

    @property
    def decided(self) -> bool:
        return self._commit.decided is not None

    @property
    def settled(self) -> bool:
        """Whether nothing more follows here, whatever comes."""
        outcome = self.outcome
        return outcome is not None and (
            outcome.aborted or self.noise or outcome.params not in self.asks or outcome.sum_hash in self._files
        )


_WHICH: Final[dict[str, Which]] = {"RELEASE": "s", "SHARE_B": "b"}


def _newest(item: tuple[bytes, Signed]) -> tuple[int, bytes]:
    advert, signed = item
    return signed.message.inc, advert
