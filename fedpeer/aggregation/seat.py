"""One party's place in one instance: what the parts of an instance share, and what they hand out.

Rules
* What is to be said is signed here and put into a `Step`; it counts once it is on disk and back on the board.
* Work is asked for once; after a restart it is asked for again.
* Alarms are soft: none decides about privacy.

Source: SA1, version 1, sections 1 and 11.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any, Final, Literal

from fedpeer.aggregation.board import Board
from fedpeer.aggregation.messages import Signed, Stage, SumName, sign, value_of
from fedpeer.aggregation.names import Parties, Profile, advert_id, bitmap, parties_of, proposer, sid_of
from fedpeer.aggregation.release import Decided, Log
from fedpeer.aggregation.vectors import Prg, Width
from fedpeer.aggregation.work import Work
from fedpeer.crypto import SigningKey
from fedpeer.errors import RemoteProtocolError

RATE: Final = 1.25e6
"""bytes a second that a party is taken to manage while nothing was measured"""
SHORTEST_S: Final = 2.0
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
    encoded: bytes = b""
    """what `params` is the hash of; it is shown in evidence"""


@dataclass(frozen=True)
class Note:
    """A step of a sum that an operator may watch."""

    sid: bytes
    step: str
    facts: Mapping[str, Any]
    """stage, turn and k of the sum, seq of the attempt, and what this step adds; sets of parties are frozensets"""


@dataclass
class Step:
    """What is to be done: commit `keep` and `say` in one transaction, `add` what was said, send it, start the work."""

    keep: dict[bytes, bytes | None] = field(default_factory=dict)
    """secrets, sealed on disk; None: erase"""
    say: list[tuple[Signed, int | None]] = field(default_factory=list)
    """our messages and whom they are for (None: all)"""
    work: list[Work] = field(default_factory=list)
    void: list[bytes] = field(default_factory=list)
    """instances of which no work that was asked for before is wanted any more, by sid"""
    drop: list[bytes] = field(default_factory=list)
    """files that nobody needs any more, by digest"""
    forget: list[bytes] = field(default_factory=list)
    """instances of which nobody needs anything any more, by sid"""
    again: bool = False
    """messages that were dropped for want of room may be wanted now: add all again, ours as logged"""
    ended: list[Ended] = field(default_factory=list)
    waits: list[Waits] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(vars(self).values())


Status = Literal["SUM", "NOISE", "LOST", "WAITING"]


@dataclass(frozen=True)
class Ended:
    """How a sum ended for this party. SUM: the total is the file named `sum_hash`; else `parties` are why.

    Of a sum that waits: `survivors` are those that the group is bound to, if it is; `parties` have not said what was
    due; `differing` were ready for it with another history or other parameters.
    """

    name: SumName
    status: Status
    survivors: Parties
    sum_hash: bytes
    parties: Parties = frozenset()
    differing: Parties = frozenset()


@dataclass(frozen=True)
class Waits:
    """A sum that is not there when it should be: whom it lacks, and how long it goes on waiting. Told once."""

    name: SumName
    parties: Parties
    left_s: float


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
    away: Parties = frozenset()
    """who was left out of the last START, or of the survivors"""
    took: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=5))
    """of the last sums that nobody was missing in: the bytes of a vector, the seconds until all were added up"""
    worked_s: dict[bytes, float] = field(default_factory=dict)
    """by params: how long this party worked for its vector, from the end of the sum before (0: not known)"""


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

    @cached_property
    def ids(self) -> dict[int, bytes]:
        """the name of the key set by contributor"""
        return {party: advert_id(signed.body) for party, signed in self.adverts.items()}

    @cached_property
    def publics(self) -> dict[int, bytes]:
        """pk by contributor"""
        return {party: signed.message.pk for party, signed in self.adverts.items()}


class Seat:
    """One party's place in one instance: what all parts of it share."""

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
        idle: Parties = frozenset(),
    ) -> None:
        setting = here.setting
        self.here, self.group, self.seq, self.prev, self.pin = here, group, seq, prev, pin
        self.pinned, self.data, self.aborts, self.idle = pinned, data, aborts, idle
        self.me, self.n, self.profile = setting.me, setting.profile.n, setting.profile
        self.sid = sid_of(setting.contract, group, seq)
        self.board = Board(self.n)
        self._first_leader = proposer(setting.contract, group, seq, 0, self.n)
        self.asks: dict[bytes, Ask] = {}
        """what this party has asked of the group, by params"""
        self.fixed: Fixed | None = None
        self.files: set[bytes] = set()
        """digests of files that are here"""
        self.muted = False
        """it met a message of its own that its log does not know: it says nothing more here"""
        self.working: set[Any] = set()
        self.times: dict[str, float] = {}
        self.alarms: list[float] = []
        self._told: set[str] = set()
        self._values: dict[int, tuple[list[Any], Any]] = {}  # by the identity of the list, which is kept

    def leader(self, view: int) -> int:
        return (self._first_leader + view) % self.n

    def key(self, what: str, advert: bytes = b"") -> bytes:
        return self.sid + what.encode() + advert

    def due(self, now: float, at: float) -> bool:
        """Whether it is time; if not, an alarm is set."""
        if now < at:
            self.alarms.append(at)
        return now >= at

    def since(self, what: str, now: float) -> float:
        """When this was first so (as far as we know since the start)."""
        return self.times.setdefault(what, now)

    def say(self, step: Step, kind: str, *fields: Any, to: int | None = None) -> None:
        step.say.append((sign(self.here.signer, self.sid, kind, self.me, *fields), to))

    def work(self, step: Step, key: Any, work: Work) -> None:
        if key not in self.working:
            self.working.add(key)
            step.work.append(work)

    def note(self, step: Step, name: str, **facts: Any) -> None:
        """Tell of a step, once, after START: before, nobody knows which sum it is."""
        assert self.fixed is not None
        if name not in self._told:
            self._told.add(name)
            params = self.fixed.params
            of = next((s.message.name for s in self.board.all("READY") if s.message.params == params), ())
            place = dict(zip(("stage", "turn", "k"), of, strict=False))
            step.notes.append(Note(self.sid, name, {**place, "seq": self.seq, **facts}))

    def value(self, stage: Stage, raw: list[Any]) -> Any:
        """The typed value; None for what is none, or names parties that do not exist."""
        if id(raw) not in self._values:
            try:
                value: Any = value_of(stage, raw)
                for name in ("contributors", "owners", "survivors", "pin"):
                    parties_of(getattr(value, name, None) or bitmap((), self.n), self.n)
            except RemoteProtocolError:
                value = None
            if len(self._values) == TRIES:
                return value
            self._values[id(raw)] = raw, value
        return self._values[id(raw)][1]

    @property
    def ask(self) -> Ask | None:
        """What this party asked, if it is what START is about."""
        assert self.fixed is not None
        ask = self.asks.get(self.fixed.params)
        return ask if ask is not None and ask.model == self.fixed.model else None

    def terms(self) -> Decided:
        assert self.fixed is not None
        return Decided(self.sid, self.group, self.fixed.contributors, self.fixed.pin, self.pinned)

    def admissible(self, survivors: Parties) -> bool:
        """Whether these may be survivors (R4, and the pin of START)."""
        fixed = self.fixed
        assert fixed is not None
        return (
            survivors <= fixed.contributors
            and len(survivors) >= self.profile.m_min
            and (fixed.pin is None or survivors == fixed.pin)
        )

    def patience(self, ask: Ask | None) -> float:
        """Seconds for all vectors of this size to be added up: three times what the last sums like it took."""
        nbytes = 0 if ask is None else ask.d * ask.w // 8
        took = [seconds for size, seconds in self.here.took if size <= 2 * nbytes <= 4 * size]
        return max(SHORTEST_S, 3 * median(took)) if took else SHORTEST_S + 4 * nbytes / RATE
