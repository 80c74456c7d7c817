"""What goes wrong in one simulation, drawn from its seed; and the forgeries of parties that lie.

Rules
* Everything is drawn before the run (`draw`); what really happened is counted in the world, under the names of CLAIMS.
* At most f parties lie, and those that are gone for good leave the quorum that the profile promises to work with.
* A liar runs the honest core, and says other things beside it or in the place of it, under its own key: it needs no
  rule of the protocol. A *twin* is a second honest process with the same key, which sees another part of the world:
  between them they say any two things that an honest party could have said.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from fedpeer.aggregation import messages
from fedpeer.aggregation.messages import Signed
from fedpeer.aggregation.names import Profile, bitmap, parties_of
from fedpeer.crypto import SigningKey

CLAIMS: Final = {  # the share of seeds that has this fault, at the least but for chance
    "a message lost": 0.80,
    "a message twice": 0.80,
    "a message late": 0.80,
    "kill": 0.50,
    "kill before or after a commit": 0.50,
    "kill with writes unsynced": 0.15,
    "partition": 1 / 3,
    "equivocation": 0.25,
    "silent dealer or stingy owner": 0.25,
    "garbage for a file": 0.04,
    "disk full": 0.04,
    "disk rolled back": 0.02,
    "party gone for good": 0.06,
    "party late": 0.15,
}

POINTS: Final = (
    "before a commit",
    "after a commit",
    "between two messages",
    "before a file",
    "after a file",
    "before an end",
    "after an end",
    "after a message",
)
"""where a process can be killed; named for the driver's action"""

EQUIVOCATIONS: Final = (
    "PREVOTE",
    "PRECOMMIT",
    "PROPOSAL",
    "CUT",
    "SUM",
    "SCATTER",
    "ADVERTISE",
    "RELEASE",
    "FINAL",
    "READY",
    "OPEN",
    "SHARE_B",
)
EVERYTHING: Final = frozenset(EQUIVOCATIONS)


@dataclass(frozen=True)
class Kill:
    """SIGKILL when a process comes to this point for the `at`-th time; up again after so long (inf: never)."""

    point: str
    at: int
    down_s: float
    roll_back: bool = False
    """an old copy of the disk is put back"""


@dataclass(frozen=True)
class Partition:
    start: float
    stop: float
    side: frozenset[int]

    def parts(self, a: int, b: int, now: float) -> bool:
        return self.start <= now < self.stop and (a in self.side) != (b in self.side)


@dataclass(frozen=True)
class Liar:
    """What one malicious party does."""

    twice: frozenset[str] = frozenset()
    """kinds of which it says two"""
    twin: bool = False
    shares_for: frozenset[int] | None = None
    """the holders that get its shares (None: all); the others get none, or garbage"""
    garbage_shares: bool = False
    mute: frozenset[str] = frozenset()
    """kinds that it never says"""
    receipts_for: frozenset[int] | None = None
    """the contributors that it admits to have received"""
    files_for: frozenset[int] | None = None
    """the parties that it serves files"""
    garbage_files: bool = False
    """the first answer is not what was asked for"""
    rolled_back: bool = False
    """honest, but an old copy of its disk is put back; it counts among the f all the same"""


@dataclass(frozen=True)
class Faults:
    """The bad luck of one world."""

    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0
    kills: dict[int, tuple[Kill, ...]] = field(default_factory=dict)
    partitions: tuple[Partition, ...] = ()
    liars: dict[int, Liar] = field(default_factory=dict)
    slow: frozenset[int] = frozenset()
    late: dict[int, float] = field(default_factory=dict)
    """party → the second at which its process starts for the first time"""
    full: dict[int, int] = field(default_factory=dict)
    """party → the number of the transaction for which there is no space"""

    @property
    def gone(self) -> frozenset[int]:
        """The parties that are never there again."""
        return frozenset(
            party for party, kills in self.kills.items() if any(math.isinf(kill.down_s) for kill in kills)
        ) | frozenset(party for party, start in self.late.items() if math.isinf(start))


def some(rng: random.Random, of: Iterable[int], least: int = 1) -> frozenset[int]:
    """A part of these parties that is not all of them, where that is possible."""
    everybody = list(of)
    return frozenset(rng.sample(everybody, rng.randint(min(least, len(everybody)), max(least, len(everybody) - 1))))


def draw(rng: random.Random, profile: Profile) -> Faults:
    """The faults of a seed, at the rates of the project's test plan."""
    n = profile.n
    everybody = range(n)
    liars: dict[int, Liar] = {}
    equivocator, withholder = rng.random() < 0.4, rng.random() < 0.5
    if profile.f:
        for party in rng.sample(everybody, rng.randint(1, profile.f)):
            liar = _liar(rng, profile, equivocator, withholder)
            if liar != Liar():
                liars[party] = liar
    kills: dict[int, tuple[Kill, ...]] = {
        party: (Kill("before a commit", rng.randint(2, 30), 1.0, roll_back=True),)
        for party, liar in liars.items()
        if liar.rolled_back
    }
    honest = [party for party in everybody if party not in liars]
    if rng.random() < 0.6:
        for party in rng.sample(honest, rng.randint(1, max(1, min(3, len(honest))))):
            kills[party] = tuple(_kill(rng) for _ in range(rng.randint(1, 3)))
    spare = n - max(profile.q, profile.t) - len(liars)  # so many may be gone and there still is a quorum
    late: dict[int, float] = {}
    if spare > 0 and rng.random() < 0.3:
        for party in rng.sample(honest, 1 if rng.random() < 0.8 else rng.randint(1, min(spare, len(honest)))):
            if rng.random() < 0.25:
                late[party] = math.inf
            else:
                kills[party] = (*kills.get(party, ()), _kill(rng, math.inf))
    if rng.random() < 0.25:
        late.setdefault(rng.choice(honest), rng.choice((5.0, 30.0, 200.0)) * (0.5 + rng.random()))
    partitions: list[Partition] = []
    if rng.random() < 0.4:
        start = rng.uniform(0, 40)
        for _ in range(rng.randint(1, 2)):
            stop = start + rng.choice((3.0, 20.0, 120.0)) * (0.5 + rng.random())
            partitions.append(Partition(start, stop, some(rng, everybody)))
            start = stop + rng.uniform(0, 20)
    return Faults(
        loss=rng.uniform(0, 0.2),
        duplication=rng.uniform(0, 0.3),
        reordering=rng.uniform(0, 0.3),
        kills=kills,
        partitions=tuple(partitions),
        liars=liars,
        slow=some(rng, everybody) if rng.random() < 0.1 else frozenset(),
        late=late,
        full={rng.choice(honest): rng.randint(1, 30)} if rng.random() < 0.08 else {},
    )


def _kill(rng: random.Random, down_s: float = 0.0) -> Kill:
    point = rng.choice((*POINTS, *("before a commit", "after a commit") * 3))
    return Kill(point, int(1.2 ** rng.uniform(0, 20)), down_s or rng.choice((0.1, 5.0, 60.0, 400.0)) * rng.random())


def _liar(rng: random.Random, profile: Profile, equivocator: bool, withholder: bool) -> Liar:
    everybody = range(profile.n)
    liar: dict[str, Any] = {}
    if equivocator:
        match rng.randrange(3):
            case 0:
                liar |= {"twin": True}
            case 1:
                liar |= {"twice": EVERYTHING}
            case 2:
                liar |= {"twice": frozenset(rng.sample(EQUIVOCATIONS, 3))}
    if withholder:
        match rng.randrange(5):
            case 0:
                liar |= {"shares_for": some(rng, everybody, 0), "garbage_shares": rng.random() < 0.5}
            case 1:
                liar |= {"receipts_for": some(rng, everybody, 0)}
            case 2:
                liar |= {"mute": frozenset(rng.sample(_KEPT_BACK, 2))}
            case 3:
                liar |= {"files_for": some(rng, everybody, 0)}
            case 4:
                liar |= {"mute": frozenset({"SUM", "RELEASE"})}  # it makes the others abort, and does not say so
    if rng.random() < 0.2:
        liar |= {"garbage_files": True}
    if not liar and rng.random() < 0.3:
        liar |= {"rolled_back": True}
    return Liar(**liar)


_KEPT_BACK: Final = "SHARE ACK RECEIPT SUM RELEASE OPEN PREVOTE PRECOMMIT PROPOSAL SCATTER FINAL".split()


# forgeries


def withheld(liar: Liar, signed: Signed, addressee: int) -> bool:
    """Whether a liar does not send this to this party."""
    if signed.kind in liar.mute:
        return True
    return (
        signed.kind == "SHARE"
        and liar.shares_for is not None
        and not liar.garbage_shares
        and addressee not in liar.shares_for
    )


def in_place_of(liar: Liar, signed: Signed, key: SigningKey, rng: random.Random, n: int) -> Signed:
    """What a liar says where its core said this."""
    message = signed.message
    if signed.kind == "SHARE" and liar.garbage_shares and message.holder not in (liar.shares_for or ()):
        return _again(key, signed, ciphertext=rng.randbytes(len(message.ciphertext)))
    if signed.kind == "RECEIPT" and liar.receipts_for is not None:
        return _again(key, signed, contributors=bitmap(parties_of(message.contributors, n) & liar.receipts_for, n))
    return signed


def beside(liar: Liar, signed: Signed, key: SigningKey, rng: random.Random, n: int, ids: list[bytes]) -> Signed | None:
    """A second message for the slot of this one, or None. `ids`: what votes of this instance and stage could name."""
    if signed.kind not in liar.twice:
        return None
    change = _CHANGES[signed.kind](signed.message, rng, n, ids)
    return _again(key, signed, **change) if change else None


def _again(key: SigningKey, signed: Signed, **changes: Any) -> Signed:
    message = msgspec.structs.replace(signed.message, **changes)
    _version, sid, kind, sender, *fields = msgspec.structs.astuple(message)
    return messages.sign(key, sid, kind, sender, *fields)


Change = Callable[[Any, random.Random, int, list[bytes]], dict[str, Any]]


def _vote(message: Any, rng: random.Random, _n: int, ids: list[bytes]) -> dict[str, Any]:
    others = [value for value in (None, *ids) if value != message.id]
    return {"id": rng.choice(others)} if others else {}


def _proposal(message: Any, rng: random.Random, n: int, _ids: list[bytes]) -> dict[str, Any]:
    value = list(message.value)
    match value[0], rng.randrange(3):
        case "U", 0:
            value[3] = _less(value[3], rng, n)
        case "U", 1:
            value[4] = _less(value[4], rng, n)
        case "U", _:
            value[1] = rng.randbytes(32)
        case "S", 0:
            value[2] = _less(value[2], rng, n)
        case "S", 1:
            value = ["ABORT", value[1], None]
        case "S", _:
            value[3] = rng.randbytes(32)
        case _:
            value[1] = rng.randbytes(32)
    return {"value": value}


def _less(raw: bytes, rng: random.Random, n: int) -> bytes:
    """The set without one of its members."""
    parties = parties_of(raw, n)
    return bitmap(parties - {rng.choice(sorted(parties))}, n) if parties else bitmap(range(n), n)


def _survivors(message: Any, rng: random.Random, n: int, _ids: list[bytes]) -> dict[str, Any]:
    nobody = message.kind == "RELEASE" and rng.random() < 0.5 and any(message.survivors)
    return {"survivors": bitmap((), n) if nobody else _less(message.survivors, rng, n)}


def _noise(*names: str) -> Change:
    return lambda message, rng, n, ids: {name: rng.randbytes(32) for name in names}


def _advertise(message: Any, rng: random.Random, _n: int, _ids: list[bytes]) -> dict[str, Any]:
    return {"pk": rng.choice((bytes(32), rng.randbytes(32))), "inc": message.inc + rng.randrange(2)}


_CHANGES: Final[dict[str, Change]] = {
    "PREVOTE": _vote,
    "PRECOMMIT": _vote,
    "PROPOSAL": _proposal,
    "CUT": _survivors,
    "SUM": _noise("digest"),
    "SCATTER": _noise("digest"),
    "ADVERTISE": _advertise,
    "RELEASE": _survivors,
    "FINAL": _noise("sum_hash"),
    "READY": _noise("model"),
    "OPEN": _noise("secret"),
    "SHARE_B": lambda message, rng, n, ids: {"shares": message.shares[1:]} if message.shares else {},
}
