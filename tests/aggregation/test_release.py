"""The rules of release: case by case, as properties, and against an agreement that hands out any certificate."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fedpeer.aggregation import release
from fedpeer.aggregation.instance import Instance
from fedpeer.aggregation.messages import START, Signed
from fedpeer.aggregation.names import Parties, Profile, profile
from fedpeer.aggregation.party import Party
from fedpeer.aggregation.release import Decided, Log, Refused
from fedpeer.aggregation.seat import Step
from fedpeer.crypto import Secret
from fedpeer.errors import LocalProtocolError, RemoteProtocolError
from fedpeer.testing.sums import world as worlds
from fedpeer.testing.sums.faults import EVERYTHING, Faults, Liar
from fedpeer.testing.sums.world import Sum, World

FILE = Path(__file__).resolve().parent.parent / "vectors/release.txt"
CASES = [line for line in FILE.read_text().splitlines() if line and not line.startswith("#")]
SID, GROUP = b"s" * 32, b"g" * 32


def set_(text: str) -> Parties:
    return frozenset() if text == "abort" else frozenset(map(int, text))


def verdict(case: str) -> str:
    """What release.py says of a case as tests/vectors/release.txt writes it: "allowed", or the rule that refuses."""
    what, *words = case.split()
    given_ = dict(word.split("=") for word in words)
    numbers = profile(int(given_.get("n", 4)), given_.get("profile", "byz"))
    everybody = "".join(map(str, range(numbers.n)))
    survivors = set_(given_.get("S", "abort"))
    pin = set_(given_["pin"]) if "pin" in given_ else None
    decided = Decided(SID, GROUP, set_(given_.get("U", everybody)), pin, "group" not in given_)
    log = Log()
    if "bound" in given_:
        log.pins[GROUP] = set_(given_["bound"])
    if "released" in given_:
        log.release(SID, GROUP, set_(given_["released"]), pinned=decided.pinned)
    said: dict[int, list[Parties]] = defaultdict(list)
    for entry in filter(None, given_.get("said", "").split(",")):
        party, _, named = entry.partition(":")
        said[int(party)].append(set_(named))
    try:
        match what:
            case "scatter":
                release.may_scatter(log, decided)
            case "release":
                release.may_release(log, numbers, decided, survivors, list(map(int, given_["votes"])))
            case "open":
                release.may_open(log, numbers, SID, survivors, said)
            case "share_b":
                release.may_share_b(log, numbers, SID, survivors, said, int(given_["dealer"]))
            case "share_s":
                release.may_share_sigma(decided, survivors, int(given_["dealer"]))
            case _:
                raise AssertionError(what)
    except Refused as refused:
        return str(refused).partition(":")[0]
    return "allowed"


@pytest.mark.parametrize("line", CASES)
def test_every_case_ends_as_the_file_says(line: str) -> None:
    case, _, expected = line.rpartition(" = ")
    assert verdict(case) == expected


def test_most_cases_must_be_refused_and_each_rule_refuses_some() -> None:
    ends = [line.rpartition(" = ")[2] for line in CASES]
    assert set(ends) == {"allowed", "R1", "R2", "R3", "R4", "R7"}
    assert sum(end != "allowed" for end in ends) > 0.6 * len(ends)


KNOWN = {
    "certificate of q for S={0,1,3}, empty log": "release S=013 votes=012",
    "certificate of q-1": "release S=013 votes=01",
    "S={0,1}: below m_min": "release S=01 votes=012",
    "S={0,1,5}: not inside U": "release S=015 votes=012",
    "log holds {0,1,3} for this sid, certificate for {0,1,2,3}": "release S=0123 votes=012 released=013",
    "log holds {0,1,3} for this sid, certificate for ABORT": "release S=abort votes=012 released=013",
    "log holds ABORT for this sid, certificate for {0,1,3}": "release S=013 votes=012 released=abort",
    "pinned START {0,1,3}, certificate for {0,1,2}": "release S=012 pin=013 votes=012",
    "unpinned START, but the log has {0,1,3} for the group": "release S=0123 bound=013 votes=012",
    "scatter: START without pin, but the log has {0,1,3} for the group": "scatter bound=013",
    "own b: t RELEASEs for my S": "open S=013 released=013 said=0:013,1:013,2:013",
    "own b: t-1 RELEASEs for my S, one for another S": "open S=013 released=013 said=0:013,1:013,2:0123",
    "own b: t RELEASEs for another S": "open S=013 released=013 said=1:0123,2:0123,3:0123",
    "own b: not released myself": "open S=013 said=1:013,2:013,3:013",
    "share of b_1: t RELEASEs": "share_b S=013 dealer=1 released=013 said=0:013,1:013,2:013",
    "share of b_1: t-1 RELEASEs": "share_b S=013 dealer=1 released=013 said=0:013,1:013",
    "share of b_2, 2 not in S": "share_b S=013 dealer=2 released=013 said=0:013,1:013,2:013",
}
"""The cases of the known answers in the words of tests/vectors/release.txt."""


def test_the_known_answers(shared: Path) -> None:
    known = json.loads((shared / "vectors/secagg_kat.json").read_text())["release_rules"]["cases"]
    assert {entry["case"] for entry in known} == KNOWN.keys()
    for entry in known:
        assert verdict(KNOWN[entry["case"]]) == entry["expect"].removeprefix("refused "), entry["case"]


# profiles


def profiles(n: int) -> Iterator[Profile]:
    """Every profile of n parties that can be asked for, with its default t_c."""
    yield profile(n, "crash")
    for f in range(1, (n - 1) // 3 + 1):
        yield profile(n, "byz", f=f)


@pytest.mark.parametrize("n", range(3, 201))
def test_the_numbers_of_every_profile_do_what_they_are_for(n: int) -> None:
    for p in profiles(n):
        assert 2 * p.q > n + p.f, "two quorums meet in an honest party"
        assert 2 * p.t > n + p.f, "two sets cannot both have t releases"
        assert p.m_min >= max(p.q, p.t, p.t_c + 2, 3)
        assert max(1, p.f) <= p.t_c <= p.t - 1
        assert n - p.t_c >= 2
        assert max(p.q, p.t) <= n - p.f, "those that do not lie are enough"
        assert p.m_min <= n
        for contributors in range(p.m_min, n + 1):
            needed = p.acks_needed(contributors)
            assert p.t <= needed <= contributors
            if contributors >= p.t + p.f:
                assert needed <= contributors - p.f, "f that refuse exclude nobody"
            if contributors >= p.t + 2 * p.f:
                assert needed - p.f >= p.t, "t honest holders"
    for name in ("crash", "byz"):
        if n >= 4:
            p = profile(n, name)
            assert 2 * p.t > n + p.t_c, "privacy does not rest on the agreement"
    if n >= 4:
        assert profile(n) == profile(n, "byz", f=max(1, (n - 1) // 5))
        assert profile(n, min_parties=n).m_min == n
    else:
        assert profile(n).name == "crash"
    with pytest.raises(LocalProtocolError):
        profile(n, min_parties=n + 1)
    with pytest.raises(LocalProtocolError):
        profile(n, "byz", f=(n - 1) // 3 + 1)


@pytest.mark.parametrize("n", [-1, 0, 1, 2, 201])
def test_there_is_no_profile_of_too_few_or_too_many(n: int) -> None:
    for name in ("", "byz", "crash"):
        with pytest.raises(LocalProtocolError):
            profile(n, name)


# as properties

sets = st.frozensets(st.integers(0, 6))


@given(
    st.sampled_from([profile(4), profile(5), profile(7), profile(7, "crash"), profile(3)]),
    sets,
    st.dictionaries(st.integers(0, 6), st.lists(sets, max_size=3)),
    st.dictionaries(st.just(SID), sets),
    st.integers(0, 6),
    st.data(),
)
def test_no_b_leaves_before_t_have_released_for_the_same_survivors(
    p: Profile,
    survivors: Parties,
    said: dict[int, list[Parties]],
    released: dict[bytes, Parties],
    dealer: int,
    data: st.DataObject,
) -> None:
    for party in data.draw(st.sets(st.integers(0, 6))):  # so that it is allowed at times
        said.setdefault(party, []).extend([survivors] * data.draw(st.integers(1, 2)))
    if data.draw(st.booleans()):
        released = {SID: survivors}
    enough = len({party for party, named in said.items() if survivors in named}) >= p.t
    mine = bool(survivors) and released.get(SID) == survivors
    for act, allowed in (
        (lambda: release.may_open(Log(released), p, SID, survivors, said), enough and mine),
        (
            lambda: release.may_share_b(Log(released), p, SID, survivors, said, dealer),
            enough and mine and dealer in survivors,
        ),
    ):
        try:
            act()
        except Refused:
            assert not allowed
        else:
            assert allowed


@given(st.sets(st.integers(0, 3)), st.sets(st.integers(0, 3)), st.sets(st.integers(0, 3)), st.integers(0, 4))
def test_of_one_dealer_never_both_kinds_of_share(u: set[int], s: set[int], votes: set[int], dealer: int) -> None:
    survivors, decided = frozenset(s), Decided(SID, GROUP, frozenset(u), None)
    said = {party: [survivors] for party in votes}

    def goes(act: Any, *arguments: Any) -> bool:
        try:
            act(*arguments)
        except Refused:
            return False
        return True

    b = goes(release.may_share_b, Log({SID: survivors}), profile(4), SID, survivors, said, dealer)
    sigma = goes(release.may_share_sigma, decided, survivors, dealer)
    assert not (b and sigma)
    if dealer not in u:
        assert not sigma


def test_without_a_quorum_nobody_decides_and_nothing_leaves() -> None:
    """n = 5, q = 4: two are away."""
    late = dict.fromkeys((3, 4), float("inf"))
    world = World(1, n=5, faults=Faults(late=late), sums=[Sum(("fit", 0, 0), "turn", True, 0)])
    outcome = world.run()
    assert outcome.ended == {"WAITING": 3}
    assert not outcome.failures
    kinds = {said.signed.kind for said in world.transcript}
    assert "READY" in kinds
    assert not kinds & {"SCATTER", "RELEASE", "OPEN", "SHARE_B"}


# a broken agreement


class Group(RuleBasedStateMachine):
    """One group of sums in the hands of an adversary that has a certificate for whatever it likes.

    It runs t_c liars, who have released for everything; it shows each honest party any START, any certificate, whenever
    it wants and as often as it wants; it hears every RELEASE at once, lets parties hear it or not, and restarts them:
    what is left then is what they have said. The rules alone stand between it and the sums of two sets.
    """

    openings = 0

    @initialize(
        numbers=st.sampled_from(
            [profile(4), profile(5), profile(7), profile(4, "crash"), profile(6, "crash"), profile(3), profile(7, f=2)]
        )
    )
    def begin(self, numbers: Profile) -> None:
        self.p = numbers
        lying = numbers.t_c if numbers.n > 3 else 0
        self.honest = list(range(numbers.n - lying))
        self.liars = list(range(numbers.n - lying, numbers.n))
        self.logs = {party: Log() for party in self.honest}
        self.disks: dict[int, list[tuple[bytes, Parties]]] = {party: [] for party in self.honest}
        self.opened: dict[bytes, set[Parties]] = defaultdict(set)
        self.scattered: dict[int, list[Parties | None]] = defaultdict(list)

    def some(self, data: st.DataObject, least: int) -> Parties:
        """Survivors: everybody but a few."""
        gone = data.draw(st.frozensets(st.integers(0, self.p.n - 1), max_size=self.p.n - least), label="without")
        return frozenset(range(self.p.n)) - gone

    def start(self, data: st.DataObject, sid: bytes, contributors: Parties) -> Decided:
        pins = [None, contributors, *self.named()]
        return Decided(sid, GROUP, contributors, data.draw(st.sampled_from(pins), label="pin"))

    def named(self) -> list[Parties]:
        return sorted({s for disk in self.disks.values() for _, s in disk if s}, key=sorted)

    def said(self, sid: bytes) -> Mapping[int, list[Parties]]:
        """The RELEASEs of an instance; the liars have said everything."""
        honest = {party: [s for of, s in disk if of == sid] for party, disk in self.disks.items()}
        return honest | {liar: self.named() for liar in self.liars}

    @rule(data=st.data(), seq=st.integers(0, 5))
    def show(self, data: st.DataObject, seq: int) -> None:
        """Some parties are shown a certificate, each under a START of its own, and say what the rules let them say."""
        sid = bytes([seq]) * 32
        some = self.some(data, self.p.m_min - 1)
        survivors = data.draw(st.sampled_from([some, some, *self.named(), frozenset[int]()]), label="survivors")
        votes = range(data.draw(st.sampled_from([self.p.q, self.p.n, self.p.q, self.p.q - 1]), label="votes"))
        for party in set(self.honest) - data.draw(st.sets(st.sampled_from(self.honest), max_size=2), label="but"):
            decided = self.start(data, sid, survivors or frozenset(range(self.p.n)))
            try:
                release.may_release(self.logs[party], self.p, decided, survivors, votes)
            except Refused:
                continue
            assert len(votes) >= self.p.q
            assert not survivors or len(survivors) >= self.p.m_min
            self.disks[party].append((sid, survivors))  # on disk, then said
            self.logs[party].release(sid, GROUP, survivors, pinned=True)

    @rule(deaf_to=st.sets(st.integers(0, 6), max_size=2))
    def hear(self, deaf_to: set[int]) -> None:
        """Parties look whether they may open; they heard everything, or nothing of some."""
        for party in self.honest:
            for sid, survivors in set(self.disks[party]):
                said = {party: named for party, named in self.said(sid).items() if party not in deaf_to}
                try:
                    release.may_open(self.logs[party], self.p, sid, survivors, said)
                except Refused:
                    continue
                self.opened[sid].add(survivors)
                Group.openings += 1

    @rule(data=st.data())
    def decide(self, data: st.DataObject) -> None:
        """A party sees something decided that it does not release for: this binds it, until it restarts."""
        party = data.draw(st.sampled_from(self.honest))
        self.logs[party].pins.setdefault(GROUP, self.some(data, self.p.m_min))

    @rule(data=st.data())
    def restart(self, data: st.DataObject) -> None:
        for party in data.draw(st.sets(st.sampled_from(self.honest), min_size=1)):
            self.logs[party] = Log()
            for sid, survivors in self.disks[party]:
                self.logs[party].release(sid, GROUP, survivors, pinned=True)

    @precondition(lambda self: bool(self.named()))
    @rule(data=st.data())
    def scatter(self, data: st.DataObject) -> None:
        """Who has released masks no vector under a START with another pin."""
        party = data.draw(st.sampled_from(self.honest))
        bound = {s for _, s in self.disks[party] if s}
        decided = self.start(data, b"\3" * 32, frozenset(range(self.p.n)))
        try:
            release.may_scatter(self.logs[party], decided)
        except Refused:
            return
        assert not bound or bound == {decided.pin}

    @invariant()
    def at_most_one_set_is_ever_opened(self) -> None:
        if not hasattr(self, "p"):
            return
        assert len(set().union(*self.opened.values())) <= 1, self.opened
        for party, disk in self.disks.items():
            assert len({survivors for _, survivors in disk if survivors}) <= 1, f"party {party} released for two sets"
            for sid in {sid for sid, _ in disk}:
                assert len({survivors for of, survivors in disk if of == sid}) == 1, f"party {party}, two in one sid"


def test_at_most_one_set_is_ever_opened_in_a_group_whatever_the_agreement_says() -> None:
    run_state_machine_as_test(Group, settings=settings(max_examples=100, stateful_step_count=25, deadline=None))
    assert Group.openings, "nothing was ever opened"


def test_a_group_without_a_pin_may_open_several_sets_but_an_instance_one() -> None:
    log, p, everybody = Log(), profile(4), frozenset(range(4))
    for number, survivors in enumerate((everybody, frozenset({0, 1, 2}))):
        sid = bytes([number]) * 32
        decided = Decided(sid, GROUP, everybody, None, pinned=False)
        release.may_scatter(log, decided)
        release.may_release(log, p, decided, survivors, range(3))
        log.release(sid, GROUP, survivors, pinned=False)
        release.may_open(log, p, sid, survivors, {party: [survivors] for party in range(3)})
        with pytest.raises(Refused, match="R1"):
            release.may_release(log, p, decided, frozenset({0, 1, 3}), range(4))
    assert not log.pins


# what is valid stays valid


class Watching(Party):
    """A party that, whenever a value becomes valid, hears all that was ever said of the instance, in any order.

    What is added is everything in the record of the same world, run before: votes and their contradictions, evidence,
    second adverts and sums, messages of the instance's end.
    """

    record: ClassVar[dict[bytes, list[Signed]]] = {}
    chance: ClassVar[Random] = Random()
    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._tried: set[tuple[bytes, bytes]] = set()

    def advance(self, now: float) -> Step:
        step = super().advance(now)
        for sid, instance in self._instances.items():
            for proposal in list(instance.seat.board.all("PROPOSAL")):
                key = sid, proposal.digest
                if instance.outcome is None and key not in self._tried and valid(instance, proposal, now):
                    self._tried.add(key)
                    self._hear_everything(instance, proposal, now)
        return step

    def _hear_everything(self, instance: Instance, proposal: Signed, now: float) -> None:
        here = instance.seat.here
        copy = deepcopy(instance, {id(kept): kept for kept in (here.signer, here.setting)})
        record = list(self.record[instance.seat.sid])
        self.chance.shuffle(record)
        for signed in record:
            with suppress(RemoteProtocolError):
                copy.add(signed)
            if signed.kind == "SUM":
                copy.seat.files.add(signed.message.digest)  # its bytes come, too
            assert valid(copy, proposal, now), f"{proposal.message.value} is no longer valid after a {signed.kind}"
        self.seen.update([proposal.message.value[0], "convicted"][: 1 + bool(copy.seat.here.convicted)])


def valid(instance: Instance, proposal: Signed, now: float) -> bool:
    """What a party would say of this value if it had to vote on it now."""
    alarms = list(instance.seat.alarms)
    try:
        if proposal.message.stage == START:
            return instance.starting.valid(proposal.message.value)
        return instance.seat.fixed is not None and instance._valid_commit(proposal.message.value, now)
    finally:
        instance.seat.alarms = alarms


LIES: list[Liar] = [
    *(Liar(twice=frozenset({kind})) for kind in ("PREVOTE", "PRECOMMIT", "ADVERTISE", "READY", "SUM", "SCATTER")),
    Liar(twice=EVERYTHING),
    Liar(twin=True),
]


def world(seed: int) -> World:
    """One of four parties lies in one way, mostly so late that it contributes when it is found out; then drawn ones."""
    if seed >= len(LIES):
        return World(100 + seed)
    return World(seed, n=4, faults=Faults(0.1, 0.2, 0.3, liars={seed % 4: LIES[seed % len(LIES)]}))


def test_no_message_makes_what_was_valid_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Secret, "__deepcopy__", lambda secret, _memo: secret, raising=False)  # a copy knows the same
    Watching.seen.clear()
    for seed in range(len(LIES) + 4):
        first = world(seed)
        outcome = first.run()
        Watching.record, Watching.chance = defaultdict(list), Random(seed)
        for said in first.transcript:
            Watching.record[said.signed.sid].append(said.signed)
        with monkeypatch.context() as patch:
            patch.setattr(worlds, "Party", Watching)
            again = world(seed).run()
        assert not again.failures, again.failures
        assert again.fingerprint == outcome.fingerprint  # looking changed nothing
    assert min(Watching.seen[kind] for kind in ("U", "S", "convicted")) > 10, Watching.seen
