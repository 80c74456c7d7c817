"""What one party does next about one sum. No event loop, no file, no chance: records in, a step out.

Rules
* A sum is (contract, stage, turn, k). It is tried in attempts 0, 1, …; the newest that anybody has begun is the one
  that counts, and everybody joins it. All parties contribute, to every attempt the same vector.
* A party publishes one key record for an attempt; when the keys of all are here and carry its own history and
  parameters, it masks its vector, and publishes the masked one. When the masked vectors of all are here, they are
  added up: the masks cancel.
* A key is in memory only and is taken away by the step that masks with it: one masked vector per key, ever (R0). A
  party that has published a key, but neither has the key any more nor a masked vector on disk, begins the next
  attempt. One whose masked vector is on disk needs no key: it collects.
* Nothing is asked about the past. `Sum.next` looks at the records that are held, whatever their order, however often
  they came, and before or after a restart.

Why it ends.  Attempt a+1 is begun only by a party that will never publish its masked vector of attempt a. So when all
masked vectors of an attempt exist there is no newer attempt, everybody can finish this one, and who has finished is
needed no more, save for its files. Each restart costs one attempt at most.

Why repeating is harmless.  To whoever does not know the keys, the masked vectors of an attempt are uniform but for
their sum. Another attempt has fresh keys, the same parties and the same vectors, hence the same sum: it says nothing
that the first did not say. Another vector or another set of parties would, by subtraction; the service refuses a
vector that is not the one of the first attempt, and the set is fixed by the contract.

What a liar can do: make a sum noise or never end, by name. Two keys shown to two parties give two contexts, so the
masks do not cancel, and nothing else.

Source: SA1, version 1, sections 1 and 4, with U = S = all parties and every party its own owner.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, NamedTuple

import msgspec

from fedpeer import codec
from fedpeer.aggregation import keys, masks
from fedpeer.crypto import DhKey, Secret, hash_
from fedpeer.errors import LocalProtocolError, RemoteProtocolError, SumError

MIN_PARTIES: Final = 3
MAX_ATTEMPTS: Final = 64

Held = Mapping[tuple[str, str], bytes]
"""Records of one kind: (slot, sender) → body."""
Place = tuple[int, int]
"""(turn, k): where in a stage something is asked."""

_SLOT = re.compile(r"(.+)/(0|[1-9][0-9]{0,8})/(0|[1-9][0-9]{0,8})/(0|[1-9][0-9]{0,8})", re.DOTALL)
_ATTEMPTS: Final = {str(attempt): attempt for attempt in range(MAX_ATTEMPTS)}
_Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Slot(NamedTuple):
    """The name of a record within its scope and kind, as text "stage/turn/k/attempt"."""

    stage: str
    turn: int
    k: int
    attempt: int = 0

    def __str__(self) -> str:
        return f"{self.stage}/{self.turn}/{self.k}/{self.attempt}"

    @property
    def place(self) -> Place:
        return self.turn, self.k

    @classmethod
    def parse(cls, text: str) -> Slot | None:
        """The slot of this text, None for what is none."""
        match = _SLOT.fullmatch(text)
        return cls(match[1], int(match[2]), int(match[3]), int(match[4])) if match else None


class KeyRecord(codec.Record, frozen=True):
    """Kind "key": this party's key for an attempt, and what it is about to sum."""

    history: _Digest
    params: _Digest
    public: _Digest


class MaskedRecord(codec.Record, frozen=True):
    """Kind "masked": where this party's masked vector is: a blob of this digest and size."""

    context: _Digest
    digest: _Digest
    size: Annotated[int, msgspec.Meta(ge=0)]


# steps


@dataclass(frozen=True)
class Begin:
    """Make a key for this attempt (`Sum.begin`) and publish it."""

    attempt: int


@dataclass(frozen=True)
class Mask:
    """Mask the vector with these, keep the bytes, and publish them. The key is gone."""

    attempt: int
    context: bytes
    masks: Sequence[keys.PairMask]
    label: bytes


@dataclass(frozen=True)
class Part:
    """One party's masked vector."""

    party: str
    digest: bytes
    size: int
    label: bytes


@dataclass(frozen=True)
class Collect:
    """Fetch all masked vectors and add them up."""

    attempt: int
    parts: Sequence[Part]


@dataclass(frozen=True)
class Wait:
    """Nothing until another record comes."""


Step = Begin | Mask | Collect | Wait


class Sum:
    """One sum at one party, from the first call or after a restart.

    `parties`: ids in the contract's order; `history`, `params`: 32 bytes that must be equal at all; `count`: elements
    of the vector. Raises SumError for fewer than three parties or too many.
    """

    def __init__(
        self,
        contract: bytes,
        slot: Slot,
        parties: Sequence[str],
        me: str,
        history: bytes,
        params: bytes,
        count: int,
        name_of: Callable[[str], str] = str,
    ) -> None:
        if len(parties) < MIN_PARTIES:
            raise SumError(
                f"a secure sum over {len(parties)} parties would show one what the others have",
                hint=f"a stage with sums needs at least {MIN_PARTIES} participants",
            )
        if len(parties) > masks.MAX_PARTIES:
            raise SumError(f"a secure sum takes at most {masks.MAX_PARTIES} parties, not {len(parties)}")
        if len(set(parties)) != len(parties) or me not in parties:
            raise LocalProtocolError("the parties of a sum are different ones, this peer among them")
        if len(history) != 32 or len(params) != 32:
            raise LocalProtocolError("history and parameters of a sum are hashes of 32 bytes")
        self.contract, self.slot, self.parties, self.me = contract, slot, list(parties), me
        self.history, self.params, self.count, self.name_of = history, params, count, name_of
        self._prefix = f"{slot.stage}/{slot.turn}/{slot.k}/"
        self._keys: dict[int, dict[str, tuple[bytes, bytes]]] = {}  # attempt → party → (record, public key)
        self._masked: dict[int, dict[str, MaskedRecord]] = {}
        self._own: tuple[int, DhKey] | None = None  # attempt, its key

    def next(self, key_records: Held, masked_records: Held) -> Step:
        """The step that these records call for. Raises SumError naming the peer that does not fit."""
        self._read(key_records, masked_records)
        for attempt, masked in self._masked.items():
            if len(masked) == len(self.parties):
                return Collect(attempt, [self._part(masked, index) for index in range(len(self.parties))])
        newest = max(self._keys, default=0)
        held = self._keys.get(newest, {})
        if self.me not in held:
            return Begin(newest)
        if self.me in self._masked.get(newest, {}):
            return Wait()
        if self._own is None or self._own[0] != newest:
            return Begin(newest + 1)
        if len(held) < len(self.parties):
            return Wait()
        return self._mask(*self._own, [held[party] for party in self.parties])

    def begin(self, attempt: int, sigma: Secret) -> bytes:
        """The key record of a new attempt from 32 fresh random bytes. Raises SumError after MAX_ATTEMPTS."""
        if attempt >= MAX_ATTEMPTS:
            raise SumError(
                f"the sum {self.slot.place} of stage {self.slot.stage!r} was tried {attempt} times; "
                "each time a peer was restarted in the middle of it",
                hint="look at the logs of the participants for the peer that keeps restarting",
            )
        key = keys.mask_key(sigma)
        self._own = attempt, key
        return codec.encode(KeyRecord(self.history, self.params, key.public))

    def context(self, attempt: int, records: Sequence[bytes]) -> bytes:
        """What everybody who masks for this attempt agrees on; `records`: the key records of all parties, in order."""
        sid = hash_(
            "fp.sa1.try",
            self.contract,
            self.slot.stage.encode(),
            keys.u32(self.slot.turn),
            keys.u32(self.slot.k),
            keys.u32(attempt),
            *(party.encode() for party in self.parties),
        )
        root = keys.advert_root(keys.advert_id(record) for record in records)
        return keys.context(sid, self.history, self.params, range(len(self.parties)), root)

    def _mask(self, attempt: int, key: DhKey, held: Sequence[tuple[bytes, bytes]]) -> Mask:
        self._own = None
        me = self.parties.index(self.me)
        ctx = self.context(attempt, [record for record, _ in held])
        return Mask(attempt, ctx, keys.pair_masks(ctx, me, key, [public for _, public in held]), masks.label(ctx, me))

    def _part(self, masked: Mapping[str, MaskedRecord], index: int) -> Part:
        party = self.parties[index]
        record = masked[party]
        return Part(party, record.digest, record.size, masks.label(record.context, index))

    def _read(self, key_records: Held, masked_records: Held) -> None:
        """Take in the records of this sum that were not seen before; each is checked when it is."""
        for attempt, party, body in self._ours(key_records):
            if party not in self._keys.setdefault(attempt, {}):
                self._keys[attempt][party] = body, self._checked_key(party, body)
        for attempt, party, body in self._ours(masked_records):
            if party not in self._masked.setdefault(attempt, {}):
                self._masked[attempt][party] = self._decode(MaskedRecord, party, body)
        for masked in self._masked.values():
            mine = masked.get(self.me)
            if mine is not None:
                for party, record in masked.items():
                    self._check_masked(party, record, mine)

    def _ours(self, records: Held) -> Iterable[tuple[int, str, bytes]]:
        for (text, sender), body in records.items():
            if text.startswith(self._prefix) and sender in self.parties:
                attempt = _ATTEMPTS.get(text[len(self._prefix) :])
                if attempt is not None:
                    yield attempt, sender, body

    def _checked_key(self, party: str, body: bytes) -> bytes:
        record = self._decode(KeyRecord, party, body)
        if record.history != self.history:
            raise SumError(
                f"{self.name_of(party)} comes to this sum with another history than this peer: "
                "a sum or a turn before gave it another result",
                peer=party,
            )
        if record.params != self.params:
            raise SumError(
                f"{self.name_of(party)} would sum something else: names, shapes or types of its values differ",
                peer=party,
            )
        if not keys.is_usable(record.public):
            raise SumError(f"{self.name_of(party)} published a key of low order", peer=party)
        return record.public

    def _check_masked(self, party: str, record: MaskedRecord, mine: MaskedRecord) -> None:
        if record.context != mine.context:
            raise SumError(
                f"{self.name_of(party)} masked its values for other keys than were shown here: "
                "one of the peers showed two keys",
                peer=party,
            )
        if record.size != masks.masked_bytes(self.count):
            raise SumError(f"{self.name_of(party)} published a masked vector of another length", peer=party)

    def _decode(self, kind: type[codec.R], party: str, body: bytes) -> codec.R:
        try:
            return codec.decode_as(kind, body)
        except RemoteProtocolError as error:
            raise SumError(f"{self.name_of(party)} published what is {error.message}", peer=party) from None


def proposer(contract: bytes, slot: Slot, parties: Sequence[str]) -> str:
    """Whose value is taken where arithmetic may differ. Everybody can tell in advance; that is harmless."""
    lead = hash_("fp.sa1.lead", contract, slot.stage.encode(), keys.u32(slot.turn), keys.u32(slot.k))
    return parties[int.from_bytes(lead[:4], "little") % len(parties)]


def floor(parties: Sequence[str], stage: str, records: Iterable[tuple[str, str]]) -> Place | None:
    """The place that all parties have reached: what lies before it in this stage is finished everywhere.

    `records`: (slot, sender) of what parties publish only after they are done with everything before it.
    """
    reached: dict[str, Place] = {}
    for text, sender in records:
        slot = Slot.parse(text)
        if slot is not None and slot.stage == stage:
            reached[sender] = max(slot.place, reached.get(sender, slot.place))
    return min((reached[party] for party in parties), default=None) if reached.keys() >= set(parties) else None
