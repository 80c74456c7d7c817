"""The two things that bench_secagg.py measures on our side, by the functions that the daemon uses.

`same_work` does for n parties what one round of SecAgg+ does: keys, shares for k neighbours, one masked vector each,
the sum, its secrets put together from shares, the masks taken off. Our shares are signed by their dealer and verified,
which SecAgg+ has not; that time is told apart.

`Recording` is a whole sum of n real `Party` cores: everything that one of them was told, in order. `replay` tells it
to a new one with the same chance and times it alone: parsing and verifying every message, votes, sealing and opening
shares, masking, hashing what it fetches, adding up its slice, recovering secrets, unmasking. Files are in memory; the
disk and the wire are not in it.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import process_time
from typing import Any

import numpy as np
import numpy.typing as npt
from secagg_case import BITS, CLIP, Case, check, values

from fedpeer.aggregation import keyset, names, slices, vectors, work
from fedpeer.aggregation.keyset import HeldShare, KeySet
from fedpeer.aggregation.messages import Signed, parse
from fedpeer.aggregation.party import Party
from fedpeer.aggregation.seat import Ask, Setting, Step
from fedpeer.aggregation.shamir import Weights
from fedpeer.crypto import Secret, SigningKey, random_bytes

Seconds = dict[str, float]
Vector = npt.NDArray[np.uint32]
PIECE = 1 << 16


class Clock:
    """CPU seconds of this process by name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begun = process_time()
        yield
        self.seconds[stage] += process_time() - begun


def signing_key(party: int) -> SigningKey:
    return SigningKey(Secret(party.to_bytes(32, "little")))


# values as integers: the codec ["clip", BITS, CLIP]


def quantise(x: npt.NDArray[np.float32], d: int, rng: np.random.Generator, bits: int = BITS) -> Vector:
    """floor(v + u) within [0, 2^b - 1], v = (x + c)·((2^b - 1)/(2c)), 0 ≤ u < 1; then zeros up to d elements."""
    top = (1 << bits) - 1
    out = np.zeros(d, np.uint32)
    v, u = np.empty(PIECE), np.empty(PIECE)
    for start in range(0, len(x), PIECE):
        part = x[start : start + PIECE]
        y, chance = v[: len(part)], u[: len(part)]
        np.multiply(part, top / (2 * CLIP), out=y)
        rng.random(out=chance)
        y += chance
        y += top / 2
        np.clip(y, 0, top, out=y)
        out[start : start + len(part)] = y
    return out


def mean_of(total: Vector, d: int, count: int, bits: int = BITS) -> npt.NDArray[np.float64]:
    """The mean of `count` vectors from their sum."""
    mean = total[:d] * (2 * CLIP / ((1 << bits) - 1) / count)
    mean -= CLIP
    return mean


# the same work


class TimedKey(SigningKey):
    """Tells the time that it takes apart."""

    __slots__ = ("_clock",)

    def __init__(self, party: int, clock: Clock) -> None:
        super().__init__(Secret(party.to_bytes(32, "little")))
        self._clock = clock

    def sign(self, *args: Any, **kwargs: Any) -> bytes:
        with self._clock("signatures"):
            return super().sign(*args, **kwargs)


@contextmanager
def timed_verify(clock: Clock) -> Iterator[None]:
    """What keyset spends on verifying is told apart."""
    verify = keyset.verify

    def timed(*args: Any, **kwargs: Any) -> None:
        with clock("signatures"):
            verify(*args, **kwargs)

    keyset.verify = timed
    try:
        yield
    finally:
        keyset.verify = verify


def same_work(case: Case) -> Seconds:
    """CPU seconds by stage of all parties together; "signatures" is in none of the others."""
    clock, n, d = Clock(), case.n, slices.padded(case.d)
    sid, ctx = b"s" * 32, b"c" * 32
    near = [case.neighbours(party) for party in range(n)]
    signers = [TimedKey(party, clock) for party in range(n)]
    rng = np.random.Generator(np.random.SFC64())
    with clock("set-up"):
        keys = [KeySet.fresh(party, sid, 0, random_bytes) for party in range(n)]
        pks, adv_ids = [key.pk for key in keys], [key.adv_id for key in keys]
    held: list[dict[int, HeldShare]] = [{} for _ in range(n)]  # holder → dealer → its share
    with clock("shares"), timed_verify(clock):
        for dealer in range(n):
            for holder in near[dealer]:
                sealed = keys[dealer].share_for(
                    holder, adv_ids[holder], keys[holder].epk, case.threshold, n, signers[dealer]
                )
                held[holder][dealer] = keys[holder].open_share(
                    dealer, adv_ids[dealer], keys[dealer].epk, sealed, signers[dealer].public, n
                )
    total = np.zeros(d, np.uint32)
    for party in case.alive:
        x = values(case, party)
        with clock("masks"):
            vector = quantise(x, d, rng)
            seeds = keyset.masking_seeds(keys[party], ctx, {other: pks[other] for other in near[party]})
            data = vectors.mask(vector, *seeds, 32, "aegis256")
        with clock("sum"):
            vectors.add_packed(total, data, 32)
    with clock("unmask"):
        plus, minus = [], []
        for dealer in range(n):
            alive = [holder for holder in near[dealer] if holder in case.alive]
            holders = alive[: case.threshold]
            shares = [held[holder][dealer].opened("b" if dealer in case.alive else "s")[1] for holder in holders]
            secret = Secret(Weights(holders).interpolate(shares))
            if dealer in case.alive:
                minus.append(keyset.self_seed(ctx, dealer, secret))
                continue
            key = keyset.mask_key(secret)
            for other in alive:
                (minus if other < dealer else plus).append(keyset.pair_seed(ctx, dealer, other, key, pks[other]))
        vectors.add_masks(total, plus, minus, 32, "aegis256")
        assert vectors.status(total, case.d, len(case.alive), BITS) == "SUM"
        mean = mean_of(total, case.d, len(case.alive))
    check(case, mean)
    clock.seconds["shares"] -= clock.seconds["signatures"]
    return dict(clock.seconds)


# the path of one peer


class Files(dict[bytes, bytes]):
    """In memory, by digest."""

    read = dict.__getitem__
    write = dict.__setitem__


@dataclass
class Turn:
    """What a party was told before it was asked what follows."""

    now: float
    came: list[bytes] = field(default_factory=list)
    """messages of others as they came"""


class Recording:
    """A sum of n parties in one process: all are told everything, turn by turn; the last `drop` never scatter."""

    def __init__(self, case: Case, bits: int = 16) -> None:
        n = case.n
        self.case, self.bits = case, bits
        self.d = slices.padded(case.d)
        self.files = Files()
        self.turns: list[Turn] = []
        self.control = [0] * n
        """bytes of messages that each party sent, to all others or to one"""
        self.bulk = [0] * n
        """bytes of chunks that each party sent"""
        self.survivors = 0
        self._setting = [
            Setting(b"C" * 32, names.profile(n), party, [signing_key(other).public for other in range(n)])
            for party in range(n)
        ]
        lead = names.proposer(b"C" * 32, self.ask.group, 0, 0, n)
        self.me = lead if lead in case.alive else 0
        """the proposer, who does most"""
        self._record()

    @property
    def signatures(self) -> int:
        """How many the party that is replayed has to verify: of all messages, and of the shares dealt to it."""
        return sum(len(turn.came) for turn in self.turns) + self.case.n - 1

    @property
    def sent(self) -> float:
        """Bytes that a party sent, on average."""
        return (sum(self.control) + sum(self.bulk)) / self.case.n

    @property
    def ask(self) -> Ask:
        history = names.first_history(b"C" * 32, "fit", b"")
        group = names.group_of(b"C" * 32, history)
        params = names.params_hash(b"")
        return Ask(("fit", 0, 0), group, history, bytes(32), params, self.d, self.case.d, bits=self.bits)

    def party(self, party: int) -> Party:
        chance = random.Random(party)  # noqa: S311
        return Party(self._setting[party], signing_key(party), chance.randbytes, {})

    def _vector(self, party: int) -> Vector:
        return quantise(values(self.case, party), self.d, np.random.Generator(np.random.SFC64(party)), self.bits)

    def _record(self) -> None:
        n, now = self.case.n, 0.0
        parties = [self.party(party) for party in range(n)]
        inboxes: list[list[Signed]] = [[] for _ in range(n)]
        unmasked: Any = None
        ended: set[int] = set()
        for party in parties:
            party.ask(self.ask, now)
        while len(ended) < n or any(inboxes):
            moved = False
            outboxes: list[list[Signed]] = [[] for _ in range(n)]
            for me, party in enumerate(parties):
                for signed in inboxes[me]:
                    party.add(signed)
                if me == self.me:
                    self.turns.append(Turn(now, [signed.raw for signed in inboxes[me]]))
                step = party.advance(now)
                moved = moved or bool(step)
                self._post(me, party, step, outboxes)
                for job in step.work:
                    match job:
                        case work.Mask():
                            result = work.perform(job, self.files, self._vector(me))
                        case work.Unmask():  # the same for all
                            unmasked = result = unmasked or work.perform(job, self.files)
                        case work.Add():
                            result = work.perform(job, self.files)
                        case _:
                            result = True
                            if isinstance(job, work.Fetch) and job.party != me:
                                self.bulk[job.party] += job.nbytes
                    party.done(job, result)
                for end in step.ended:
                    assert end.status == "SUM"
                    self.survivors = len(end.survivors)
                    ended.add(me)
            inboxes = outboxes
            if not moved and not any(inboxes):
                wakes = [wake for party in parties if (wake := party.wake_at()) is not None]
                now = max(min(wakes), now + 1e-3)

    def _post(self, me: int, party: Party, step: Step, outboxes: list[list[Signed]]) -> None:
        gone = me not in self.case.alive
        for signed, to in step.say:
            party.add(signed, logged=True)
            if gone and signed.kind == "SCATTER":
                continue
            for other, outbox in enumerate(outboxes):
                if other != me and to in (None, other):
                    self.control[me] += len(signed.raw)
                    outbox.append(signed)

    def replay(self) -> Seconds:
        """CPU seconds by what was done, of the proposer alone."""
        clock, files, party = Clock(), Files(), self.party(self.me)
        publics = self._setting[self.me].publics
        x, rng = values(self.case, self.me), np.random.Generator(np.random.SFC64(self.me))
        with clock("quantise"):
            vector = quantise(x, self.d, rng, self.bits)
        ended = False
        with clock("core"):
            party.ask(self.ask, 0.0)
        for turn in self.turns:
            came = []
            with clock("messages"):
                for raw in turn.came:
                    signed = parse(raw)
                    signed.verify(publics[signed.sender])
                    came.append(signed)
            with clock("core"):
                for signed in came:
                    party.add(signed)
                step = party.advance(turn.now)
                for signed, _ in step.say:
                    party.add(signed, logged=True)
            for job in step.work:
                with clock(type(job).__name__.lower()):
                    result = self._perform(job, files, vector)
                party.done(job, result)
            for end in step.ended:
                total = vectors.unpack(files[end.sum_hash], 24)
                with clock("quantise"):
                    mean_of(total, self.case.d, len(end.survivors), self.bits)
                ended = True
        assert ended
        return dict(clock.seconds)

    def _perform(self, job: work.Work, files: Files, vector: Vector) -> Any:
        match job:
            case work.Mask() | work.Add() | work.Unmask():
                return work.perform(job, files, vector)
            case work.Fetch():
                data = self.files[job.digest]
                make: Callable[..., bytes] = slices.chunk_digest if job.what == "chunk" else slices.sum_digest
                place = (job.party, job.chunk) if job.what == "chunk" else (job.chunk,)
                assert make(job.ctx, *place, data) == job.digest
                files[job.digest] = data
                return True
        raise AssertionError("the proposer is never late")
