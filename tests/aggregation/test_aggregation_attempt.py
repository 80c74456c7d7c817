"""Whole sums of three to five parties, simulated: any order, duplicates, restarts of anybody at any point.

The simulation has no clock and no event loop. A party is a disk (its records and files, which outlive a restart) and
a memory (its `Sum`, which does not). One turn of the wheel is one of: a record of somebody's disk reaches somebody
(again), a party takes a step, a party is killed: before the step, after the work but before its commit, or after it.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import numpy as np
import pytest

from fedpeer import codec
from fedpeer.aggregation import keys, masks
from fedpeer.aggregation.attempt import (
    MAX_ATTEMPTS,
    Begin,
    Collect,
    KeyRecord,
    Mask,
    MaskedRecord,
    Slot,
    Step,
    Sum,
    Wait,
    floor,
    proposer,
)
from fedpeer.crypto import Secret, hash_
from fedpeer.errors import LocalProtocolError, SumError
from fedpeer.testing.uniformity import looks_uniform

CONTRACT = b"c" * 32
PARAMS = b"p" * 32
COUNT = 40
NAMES = ["alice", "bob", "carol", "dave", "erin"]


class Killed(Exception):
    """The party's process ended here."""


class Party:
    """One party on its way through a few sums of one stage."""

    def __init__(self, name: str, world: World) -> None:
        self.name, self.world = name, world
        self.records: dict[tuple[str, str, str], bytes] = {}  # disk: (kind, slot, sender) → body
        self.files: dict[bytes, bytes] = {}  # disk
        self.journal: list[list[int]] = []  # disk: decided totals
        self.history = b"h" * 32  # follows from the journal
        self.restarts = 0
        self.boot()

    def boot(self) -> None:
        """What is in memory after a start: nothing but what the journal says."""
        self.floor = (0, 0)
        self.sum = self.new_sum() if len(self.journal) < self.world.sums else None

    def new_sum(self) -> Sum:
        k = len(self.journal)
        return Sum(CONTRACT, Slot("fit", 1, k), self.world.names, self.name, self.history, PARAMS, COUNT)

    def held(self, kind: str) -> dict[tuple[str, str], bytes]:
        return {(slot, sender): body for (of, slot, sender), body in self.records.items() if of == kind}

    def take(self, key: tuple[str, str, str], body: bytes) -> None:
        slot = Slot.parse(key[1])
        assert slot is not None
        if slot.place >= self.floor and key not in self.records:
            self.records[key] = body

    def publish(self, kind: str, slot: Slot, body: bytes, fatal: str) -> None:
        if fatal == "before commit":
            raise Killed
        own = (kind, str(slot), self.name)
        assert self.records.get(own, body) == body, "another statement in one's own slot"
        self.records[own] = body
        if fatal == "after commit":
            raise Killed

    def step(self, fatal: str) -> bool:
        """Take one step; whether there was one to take."""
        if self.sum is None:
            return False
        slot = self.sum.slot
        match self.sum.next(self.held("key"), self.held("masked")):
            case Begin(attempt):
                body = self.sum.begin(attempt, Secret(self.world.chance.randbytes(32)))
                self.world.newest = max(self.world.newest, attempt)
                self.publish("key", slot._replace(attempt=attempt), body, fatal)
            case Mask() as mask:
                data = bytes(masks.mask(self.world.vector(self.name, slot.k), mask.masks, mask.label))
                self.world.use(self, slot.k, mask, data)
                digest = hash_("fp.file", data)
                self.files[digest] = data  # on disk before the row that names it
                body = codec.encode(MaskedRecord(mask.context, digest, len(data)))
                self.publish("masked", slot._replace(attempt=mask.attempt), body, fatal)
            case Collect() as collect:
                total = np.zeros(COUNT, np.uint32)
                for part in collect.parts:
                    data = self.world.party(part.party).files[part.digest]  # KeyError: discarded too early
                    assert len(data) == part.size
                    masks.add(total, io.BytesIO(data), part.label)
                if fatal == "before commit":
                    raise Killed
                self.journal.append(total.tolist())
                self.history = hash_("fp.test.hist", self.history, total.tobytes())
                self.clean()
                if fatal == "after commit":
                    raise Killed
                self.sum = self.new_sum() if len(self.journal) < self.world.sums else None
            case Wait():
                return False
        return True

    def clean(self) -> None:
        place = floor(self.world.names, "fit", self.held("key"))
        if place is None:
            return
        self.floor = place
        for kind, text, sender in list(self.records):
            slot = Slot.parse(text)
            assert slot is not None
            if slot.place < place:
                body = self.records.pop((kind, text, sender))
                if kind == "masked" and sender == self.name:
                    del self.files[codec.decode_as(MaskedRecord, body).digest]


class World:
    def __init__(self, seed: int, n: int, sums: int, kills: int) -> None:
        self.chance = random.Random(seed)
        self.names, self.sums, self.kills = NAMES[:n], sums, kills
        self.uses: dict[bytes, bytes] = {}  # public key → the one masked vector made with it
        self.newest = 0  # attempt of either sum
        self.parties = [Party(name, self) for name in self.names]

    def party(self, name: str) -> Party:
        return self.parties[self.names.index(name)]

    def vector(self, name: str, k: int) -> masks.Vector:
        return np.random.default_rng([self.names.index(name), k]).integers(0, 2**16, COUNT, np.uint32)

    def expected(self, k: int) -> list[int]:
        return (sum(self.vector(name, k).astype(np.uint64) for name in self.names) % 2**24).tolist()

    def use(self, party: Party, k: int, mask: Mask, data: bytes) -> None:
        """R0: one masked vector per key, ever."""
        slot = str(Slot("fit", 1, k, mask.attempt))
        public = codec.decode_as(KeyRecord, party.records["key", slot, party.name]).public
        assert self.uses.setdefault(public, data) == data, "two vectors under one key"

    def spread(self) -> None:
        """One record reaches one party, perhaps again."""
        sender, receiver = self.chance.sample(self.parties, 2)
        own = [(key, body) for key, body in sender.records.items() if key[2] == sender.name]
        if own:
            receiver.take(*self.chance.choice(own))

    def settle(self) -> None:
        for sender in self.parties:
            for key, body in list(sender.records.items()):
                for receiver in self.parties:
                    if key[2] == sender.name and receiver is not sender:
                        receiver.take(key, body)

    def turn(self) -> None:
        party = self.chance.choice(self.parties)
        if self.chance.random() < 0.6:
            self.spread()
            return
        fatal = ""
        if self.kills > 0 and self.chance.random() < 0.15:
            fatal = self.chance.choice(["before commit", "after commit", "idle"])
        try:
            if fatal == "idle":
                raise Killed
            party.step(fatal)
        except Killed:
            self.kills -= 1
            party.restarts += 1
            party.boot()

    def run(self) -> None:
        for _ in range(2000):
            self.turn()
            if all(len(party.journal) == self.sums for party in self.parties):
                return
        self.kills = 0
        for _ in range(100 * self.sums):  # now everything arrives and nobody is killed: it must end
            self.settle()
            for party in self.parties:
                while party.step(""):
                    pass
            if all(len(party.journal) == self.sums for party in self.parties):
                return
        raise AssertionError("the sums do not end")


@pytest.mark.parametrize("block", range(6))
def test_sums_are_exact_whatever_the_order_and_whoever_restarts(block: int, seed: int) -> None:
    restarts = attempts = 0
    for number in range(100 * block, 100 * (block + 1)):
        world = World(seed * 1_000_003 + number, n=3 + number % 3, sums=2, kills=number // 3 % 10)
        try:
            world.run()
            for party in world.parties:
                assert party.journal == [world.expected(0), world.expected(1)]
            assert world.newest <= sum(party.restarts for party in world.parties)
        except Exception:
            print(f"world {number} of FEDPEER_SEED={seed}")
            raise
        restarts += sum(party.restarts for party in world.parties)
        attempts += world.newest
    assert restarts > 200  # it is a test of restarts
    assert attempts > 100


def test_a_sum_without_restarts_is_one_attempt_and_leaves_only_the_last_one_behind() -> None:
    world = World(seed=5, n=4, sums=3, kills=0)
    world.run()
    world.settle()
    for party in world.parties:
        party.clean()
        assert {slot for slot, _ in party.held("key")} == {"fit/1/2/0"}
        assert {slot for slot, _ in party.held("masked")} == {"fit/1/2/0"}
        assert len(party.files) == 1


# one party, step by step


def one(me: str = "alice", *, history: bytes = b"h" * 32, params: bytes = PARAMS, count: int = COUNT) -> Sum:
    return Sum(CONTRACT, Slot("fit", 1, 0), NAMES[:3], me, history, params, count, str.title)


def slot(attempt: int = 0, k: int = 0) -> str:
    return str(Slot("fit", 1, k, attempt))


def key_record(name: str, *, history: bytes = b"h" * 32, params: bytes = PARAMS) -> bytes:
    return codec.encode(KeyRecord(history, params, keys.mask_key(Secret(hash_("fp.test", name.encode()))).public))


def begun(me: Sum, attempt: int = 0) -> dict[tuple[str, str], bytes]:
    assert me.next({}, {}) == Begin(attempt)
    return {(slot(attempt), me.me): me.begin(attempt, Secret(b"s" * 32))}


def with_others(held: dict[tuple[str, str], bytes], attempt: int = 0) -> dict[tuple[str, str], bytes]:
    return held | {(slot(attempt), name): key_record(name) for name in ("bob", "carol")}


def test_a_party_waits_for_the_keys_of_all_and_masks_once() -> None:
    me = one()
    held = begun(me)
    assert me.next(held, {}) == Wait()
    assert me.next(held | {(slot(), "bob"): key_record("bob")}, {}) == Wait()
    step = me.next(with_others(held), {})
    assert isinstance(step, Mask)
    assert [mask.sign for mask in step.masks] == [1, 1]
    assert me.next(with_others(held), {}) == Begin(1)  # the key is gone: never a second vector under it


def test_a_restarted_party_with_its_masked_vector_on_disk_needs_no_key() -> None:
    me = one()
    held = with_others(begun(me))
    step = me.next(held, {})
    assert isinstance(step, Mask)
    records = {
        (slot(), name): codec.encode(MaskedRecord(step.context, hash_("fp.test", name.encode()), 32 + 3 * COUNT))
        for name in NAMES[:3]
    }
    restarted = one()
    assert restarted.next(held, {(slot(), "alice"): records[slot(), "alice"]}) == Wait()
    collect = restarted.next({}, records)
    assert isinstance(collect, Collect)
    assert [part.party for part in collect.parts] == NAMES[:3]
    assert [part.label for part in collect.parts] == [masks.label(step.context, i) for i in range(3)]


def test_a_restarted_party_without_its_key_begins_the_next_attempt_and_others_join_it() -> None:
    held = begun(one())
    assert one().next(held, {}) == Begin(1)
    bob = one("bob")
    assert bob.next({(slot(3), "alice"): key_record("alice")}, {}) == Begin(3)


def test_an_older_attempt_that_is_complete_is_collected_all_the_same() -> None:
    me = one()
    held = with_others(begun(me))
    step = me.next(held, {})
    assert isinstance(step, Mask)
    records = {
        (slot(), name): codec.encode(MaskedRecord(step.context, bytes(32), 32 + 3 * COUNT)) for name in NAMES[:3]
    }
    assert isinstance(me.next(held | {(slot(1), "carol"): key_record("carol")}, records), Collect)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (key_record("bob", history=b"x" * 32), "another history"),
        (key_record("bob", params=b"x" * 32), "something else"),
        (codec.encode([b"h" * 32, PARAMS, bytes(32)]), "low order"),
        (codec.encode([b"h" * 32, PARAMS, bytes(31)]), "not a KeyRecord"),
        (codec.encode([b"h" * 32, PARAMS]), "not a KeyRecord"),
        (b"\xc1", "not msgpack"),
        (b"", "not msgpack"),
    ],
)
def test_a_key_that_does_not_fit_ends_the_sum_by_the_name_of_its_peer(record: bytes, says: str) -> None:
    me = one()
    with pytest.raises(SumError, match=f"Bob.*{says}") as caught:
        me.next(begun(me) | {(slot(), "bob"): record}, {})
    assert caught.value.peer == "bob"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (codec.encode(MaskedRecord(b"x" * 32, bytes(32), 32 + 3 * COUNT)), "other keys"),
        (None, "another length"),
        (codec.encode([1, 2, 3]), "not a MaskedRecord"),
    ],
)
def test_a_masked_vector_that_does_not_fit_ends_the_sum_by_the_name_of_its_peer(body: bytes | None, says: str) -> None:
    me = one()
    held = with_others(begun(me))
    step = me.next(held, {})
    assert isinstance(step, Mask)
    mine = codec.encode(MaskedRecord(step.context, bytes(32), 32 + 3 * COUNT))
    theirs = body or codec.encode(MaskedRecord(step.context, bytes(32), 33 + 3 * COUNT))
    with pytest.raises(SumError, match=f"Bob.*{says}") as caught:
        me.next(held, {(slot(), "alice"): mine, (slot(), "bob"): theirs})
    assert caught.value.peer == "bob"


def test_records_of_other_sums_other_peers_and_no_slot_at_all_are_not_looked_at() -> None:
    me = one()
    held = begun(me)
    noise = {
        (slot(k=1), "bob"): b"",
        ("fitted/1/0/0", "bob"): b"",
        ("fit/1/0", "bob"): b"",
        ("fit/1/0/-1", "bob"): b"",
        ("fit/1/0/00", "bob"): b"",
        (slot(MAX_ATTEMPTS), "bob"): b"",
        (slot(), "mallory"): b"",
    }
    assert me.next(held | noise, noise) == Wait()


def test_attempts_end_by_name() -> None:
    me = one()
    assert me.next({(slot(MAX_ATTEMPTS - 1), "alice"): key_record("alice")}, {}) == Begin(MAX_ATTEMPTS)
    with pytest.raises(SumError, match="was tried 64 times"):
        me.begin(MAX_ATTEMPTS, Secret(bytes(32)))


@pytest.mark.parametrize("n", [0, 1, 2, 257])
def test_too_few_or_too_many_parties_are_refused(n: int) -> None:
    parties = [f"p{i}" for i in range(n)]
    with pytest.raises(SumError, match="parties"):
        Sum(CONTRACT, Slot("fit", 0, 0), parties, "p0", bytes(32), bytes(32), 1)
    assert Sum(CONTRACT, Slot("fit", 0, 0), ["p0", "p1", "p2"], "p0", bytes(32), bytes(32), 1)


@pytest.mark.parametrize("parties", [["a", "b", "b"], ["b", "c", "d"]])
def test_parties_are_different_and_this_one_is_among_them(parties: list[str]) -> None:
    with pytest.raises(LocalProtocolError):
        Sum(CONTRACT, Slot("fit", 0, 0), parties, "a", bytes(32), bytes(32), 1)


def named_otherwise() -> set[bytes]:
    """The same keys at the same places, of parties with other names."""
    return seeds_of(
        lambda: Sum(CONTRACT, Slot("fit", 1, 0), ["alice", "rob", "carol"], "alice", b"h" * 32, PARAMS, COUNT),
        {"rob": key_record("bob"), "carol": key_record("carol")},
    )


def seeds_of(make: Callable[[], Sum], others: dict[str, bytes]) -> set[bytes]:
    me = make()
    held: dict[tuple[str, str], bytes] = {}
    step: Step = me.next(held, {})
    while isinstance(step, Begin):
        held[str(me.slot._replace(attempt=step.attempt)), me.me] = me.begin(step.attempt, Secret(b"s" * 32))
        for name, body in others.items():
            held[str(me.slot._replace(attempt=step.attempt)), name] = body
        step = me.next(held, {})
    assert isinstance(step, Mask)
    return {mask.seed.reveal() for mask in step.masks}


def test_every_seed_changes_with_anything_the_parties_must_agree_on() -> None:
    """The same keys throughout, so that only the context can make the difference."""
    others = {name: key_record(name) for name in ("bob", "carol")}
    base = seeds_of(one, others)

    def at(contract: bytes = CONTRACT, stage: str = "fit", turn: int = 1, k: int = 0, more: int = 0) -> set[bytes]:
        parties = [*NAMES[:3], *(f"p{i}" for i in range(more))]
        records = others | {name: key_record(name) for name in parties[3:]}
        return seeds_of(
            lambda: Sum(contract, Slot(stage, turn, k), parties, "alice", b"h" * 32, PARAMS, COUNT), records
        )

    def differing(history: bytes = b"h" * 32, params: bytes = PARAMS) -> set[bytes]:
        records = {name: key_record(name, history=history, params=params) for name in ("bob", "carol")}
        return seeds_of(lambda: one(history=history, params=params), records)

    assert at() == base
    variants = {
        "contract": at(contract=b"d" * 32),
        "stage": at(stage="fit2"),
        "turn": at(turn=2),
        "k": at(k=1),
        "parties": at(more=1),
        "names of the parties": named_otherwise(),
        "history": differing(history=b"i" * 32),
        "params": differing(params=b"q" * 32),
        "key of carol": seeds_of(one, others | {"carol": key_record("mallory")}),
    }
    for name, seeds in variants.items():
        assert not seeds & base, f"{name} is not in the seeds"


def test_attempts_have_different_contexts_even_for_the_same_records() -> None:
    records = [key_record(name) for name in NAMES[:3]]
    assert one().context(0, records) != one().context(1, records)
    assert one().context(0, records) != one().context(0, records[::-1])


def test_what_a_repeated_attempt_adds_looks_uniform_too() -> None:
    """y of attempt 1 minus y of attempt 0 over the same vector is chance: fresh keys."""
    count = 20_000
    vector = np.arange(count, dtype=np.uint32)
    made = []
    for attempt in (0, 1):
        me = one(count=count)
        held = with_others(
            {(slot(attempt), "alice"): me.begin(attempt, Secret(hash_("fp.test", keys.u32(attempt))))}, attempt
        )
        step = me.next(held, {})
        assert isinstance(step, Mask)
        made.append(masks.unpack(masks.mask(vector, step.masks, step.label)[masks.LABEL_BYTES :]))
    assert looks_uniform(masks.pack(made[0]))
    assert looks_uniform(masks.pack(made[1] - made[0]))


# where all parties are, and who leads


def test_the_floor_is_the_place_that_all_parties_have_reached() -> None:
    records = [("fit/1/0/0", "a"), ("fit/1/2/0", "a"), ("fit/1/1/3", "b"), ("other/9/9/0", "c"), ("junk", "c")]
    assert floor(["a", "b"], "fit", records) == (1, 1)
    assert floor(["a", "b", "c"], "fit", records) is None
    assert floor(["a"], "fit", records) == (1, 2)
    assert floor(["a", "b"], "fit", [("fit/2/0/0", "a"), ("fit/1/9/0", "b")]) == (1, 9)


@pytest.mark.parametrize("stage", ["fit", "a/b", "a/1/2/3", "Straße"])
def test_a_slot_is_read_as_it_was_written(stage: str) -> None:
    assert Slot.parse(str(Slot(stage, 3, 14, 15))) == Slot(stage, 3, 14, 15)


@pytest.mark.parametrize("text", ["", "fit", "fit/1/2", "fit/1/2/x", "/1/2/3", "fit/1/2/3/", "fit/01/2/3", "fit/1/2/٣"])
def test_what_is_no_slot_is_none(text: str) -> None:
    assert Slot.parse(text) is None


def test_everybody_is_proposer_now_and_then() -> None:
    leaders = [proposer(CONTRACT, Slot("fit", turn, 0), NAMES) for turn in range(200)]
    assert set(leaders) == set(NAMES)
    assert max(map(leaders.count, NAMES)) < 80
