"""The agreement: its rules one by one, random schedules with parties that lie and restart, and the attacks on it.

The simulation moves messages, fires timers, forgets what was not committed, and knows no rule of the agreement.
Controls switch a rule off and must be seen to fail.
"""
# ruff: noqa: PT018 - what was said and what it led to is one statement

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from fedpeer import codec
from fedpeer.aggregation import agreement, names
from fedpeer.aggregation.agreement import Agreement, Decision, check_certificate
from fedpeer.aggregation.evidence import contradiction
from fedpeer.aggregation.messages import Signed, Stage, id_of, parse, sign
from fedpeer.aggregation.names import Profile, profile
from fedpeer.crypto import Secret, SigningKey
from fedpeer.errors import LocalProtocolError, TrustError

SID = bytes(range(32))
X, Y = ["S", "one"], ["S", "two"]
PROFILES = [
    *[profile(n, "byz") for n in range(4, 11)],
    *[profile(n, "crash") for n in range(3, 11)],
    profile(7, "byz", f=2),
    profile(10, "byz", f=3),
]
STAGES: list[Stage] = ["START", "COMMIT"]


class Pen:
    """Signs nothing: whoever adds to an agreement has verified."""

    def sign(self, _kind: str, _body: bytes, *, label: str) -> bytes:
        return b"s" * 64


@functools.cache
def _say(sender: int, kind: str, encoded: bytes) -> Signed:
    return sign(Pen(), SID, kind, sender, *codec.decode(encoded))  # type: ignore[arg-type]


def say(sender: int, kind: str, *fields: Any) -> Signed:
    return _say(sender, kind, codec.encode(list(fields)))


class Party:
    """An honest party: what it knows, its log of own messages, and the agreement in its memory."""

    def __init__(self, world: World, me: int) -> None:
        self.world, self.me, self.now = world, me, 0.0
        self.known: list[list[Any]] = []
        self.refused: list[list[Any]] = []  # what a clause of valid() that is not monotone turned false
        self.log: list[Signed] = []
        self.seen: dict[bytes, Signed] = {}
        self.outcomes: set[bytes] = set()
        self.begin()

    def begin(self) -> None:
        world = self.world
        self.agreement = world.kind(world.stage, world.profile, self.me, lambda view: world.proposer(view))
        for signed in self.log:
            self.agreement.add(signed)

    def take(self, *what: Signed) -> None:
        for signed in what:
            self.seen[signed.body] = signed
            self.agreement.add(signed)
        self.turn()

    def turn(self) -> None:
        """Say what is to be said; where power may fail, only the first of it may be committed, or nothing."""

        def known(value: list[Any]) -> bool:
            return value in self.known and value not in self.refused

        def wish() -> list[Any] | None:
            return self.world.wish(self) if self.known else None

        while drafts := self.agreement.advance(self.now, known, known, wish):
            for draft in drafts:
                if self.world.chance.random() < self.world.power_fails:
                    self.world.count["power failures"] += 1
                    return self.restart(1.0)
                signed = say(self.me, draft.kind, *draft.fields)
                for other in self.log:
                    same = (other.kind, other.message.view) == (signed.kind, signed.message.view)
                    assert not same, "an honest party spoke twice in one slot"
                self.log.append(signed)
                self.seen[signed.body] = signed
                self.agreement.add(signed)
                self.world.send(signed)
        if self.agreement.decided:
            self.outcomes.add(self.agreement.decided.id)

    def restart(self, kept: float) -> None:
        """Only the log survives; of what others said this fraction comes at once, the rest some time."""
        self.begin()
        for signed in self.world.chance.sample(list(self.seen.values()), len(self.seen)):
            if self.world.chance.random() < kept:
                self.agreement.add(signed)
            else:
                self.world.pool.append((self.me, signed))
        self.turn()

    def fire(self) -> None:
        due = self.agreement.wake_at()
        if due is not None:
            self.now = max(self.now, due)
            self.turn()


class World:
    def __init__(
        self, chance: random.Random, profile: Profile, liars: Iterable[int], stage: Stage, kind: type[Agreement]
    ) -> None:
        self.chance, self.profile, self.stage, self.kind = chance, profile, stage, kind
        self.liars = sorted(liars)
        self.pool: list[tuple[int, Signed | list[Any]]] = []
        self.proposer: Callable[[int], int] = lambda view: (view + 1) % profile.n
        self.wish: Callable[[Party], list[Any]] = lambda party: party.known[0]
        self.parties = {me: Party(self, me) for me in range(profile.n) if me not in self.liars}
        self.first = 0
        self.power_fails = 0.0
        self.count: Counter[str] = Counter()

    def send(self, signed: Signed) -> None:
        self.pool += [(to, signed) for to in self.parties if to != signed.sender]

    def lie(self) -> None:
        chance, sender, to = self.chance, self.chance.choice(self.liars), self.chance.choice(list(self.parties))
        view = chance.randrange(max(party.agreement.view for party in self.parties.values()) + 2)
        value = chance.choice([X, Y])
        if self.proposer(view) == sender and chance.random() < 0.5:
            valid_view = chance.choice([None, *range(view)])
            self.pool.append((to, say(sender, "PROPOSAL", self.stage, view, value, valid_view)))
        else:
            kind, id_ = chance.choice(["PREVOTE", "PRECOMMIT"]), chance.choice([id_of(self.stage, value), None])
            for word in [id_] if kind == "PRECOMMIT" or chance.random() < 0.9 else [bytes([k] * 32) for k in range(6)]:
                self.pool.append((to, say(sender, kind, self.stage, view, word)))

    def chaos(self, steps: int, *, restarts: bool = True) -> set[bytes]:
        """Anything in any order; returns the ids of what was decided."""
        chance, parties = self.chance, list(self.parties.values())
        self.pool += [(me, value) for me in self.parties for value in (X, Y)]
        self.power_fails = 0.1 if restarts else 0.0
        for _ in range(steps):
            party, what = chance.choice(parties), chance.random()
            self.count["lies"] += what < 0.15 and bool(self.liars)
            self.count["timers"] += 0.15 <= what < 0.22 and party.agreement.wake_at() is not None
            self.count["restarts"] += 0.25 <= what < 0.27 and restarts
            if what < 0.15 and self.liars:
                self.lie()
            elif what < 0.22:
                party.fire()
            elif what < 0.25:
                if not party.agreement.started:
                    party.agreement.start(party.now)
                party.turn()
            elif what < 0.27 and restarts:
                party.restart(chance.random())
            elif self.pool:
                place = chance.randrange(len(self.pool))
                to, message = self.pool[place]
                if chance.random() > 0.05:  # else it comes once more
                    self.pool[place] = self.pool[-1]
                    self.pool.pop()
                self.deliver(to, message)
        return self.outcomes()

    def deliver(self, to: int, message: Signed | list[Any]) -> None:
        party = self.parties[to]
        if isinstance(message, Signed):
            party.take(message)
        else:
            party.known.append(message)
            party.turn()

    def calm(self, views: int) -> None:
        """The liars are silent; what one honest party holds all come to hold; then timers fire."""
        parties = list(self.parties.values())
        self.power_fails = 0.0
        self.first = max(party.agreement.view for party in parties)
        for party in parties:
            party.known += [value for value in (X, Y) if value not in party.known]
            if not party.agreement.started:
                party.agreement.start(party.now)
        while self.undecided() and self.newest() - self.first <= views:
            while any(self.tell(party) for party in parties):
                pass
            for party in parties:
                party.fire()
            if all(party.agreement.wake_at() is None for party in parties) and not self.pool:
                return

    def tell(self, party: Party) -> bool:
        """This party gets what it has not got of all that was said."""
        new = {body: s for other in self.parties.values() for body, s in other.seen.items() if body not in party.seen}
        lost = [message for to, message in self.pool if to == party.me and isinstance(message, Signed)]
        self.pool = [(to, message) for to, message in self.pool if to != party.me]
        party.take(*lost, *new.values())
        return bool(new)

    def newest(self) -> int:
        return max(party.agreement.view for party in self.parties.values())

    def undecided(self) -> list[int]:
        return [me for me, party in self.parties.items() if party.agreement.decided is None]

    def outcomes(self) -> set[bytes]:
        """All that any honest party ever decided, before or after a restart."""
        return set().union(*(party.outcomes for party in self.parties.values()))


def trial(number: int, kind: type[Agreement] = Agreement) -> World:
    chance = random.Random(number)
    numbers = chance.choice(PROFILES)
    world = World(
        chance, numbers, chance.sample(range(numbers.n), numbers.f), STAGES[number % 2], kind
    )  # with f = 0 nobody lies: parties crash only
    world.wish = lambda party: party.known[-1] if party.me % 2 else party.known[0]
    world.chaos(chance.choice([60, 200, 600]), restarts=chance.random() < 0.5)
    world.calm(3 * numbers.n)
    return world


def contradictions(party: Party) -> list[tuple[Signed, Signed]]:
    """What this party has seen of which no honest party says both."""
    return [pair for pair in itertools.combinations(party.seen.values(), 2) if contradiction(*pair)]


# random schedules


def test_no_schedule_makes_honest_parties_disagree_or_wait_for_ever(seed: int) -> None:
    views, count = 0, Counter[str]()
    for number in range(1000 * seed, 1000 * seed + 400):
        world = trial(number)
        assert len(world.outcomes()) == 1 and not world.undecided(), f"trial({number}): {world.outcomes()}"
        for party in world.parties.values():
            assert {one.sender for one, _ in contradictions(party)} <= set(world.liars), f"trial({number})"
            decided = party.agreement.decided
            assert decided is not None and decided.value in (X, Y) and decided.id == id_of(world.stage, decided.value)
            assert len(decided.signers) == world.profile.q and list(decided.signers) == sorted(decided.signers)
        views, count = max(views, world.newest() - world.first), count + world.count
    print("views needed after the calm, at most:", views, dict(count))
    assert all(count[what] > 200 for what in ("lies", "timers", "restarts", "power failures"))


def test_liars_are_seen_to_vote_twice(seed: int) -> None:
    pairs = [pair for k in range(60) for party in trial(k).parties.values() for pair in contradictions(party)]
    assert {one.kind for one, _ in pairs} == {"PROPOSAL", "PREVOTE", "PRECOMMIT"}


def test_control_a_quorum_that_is_too_small_disagrees() -> None:
    def split(number: int) -> bool:
        chance = random.Random(number)
        numbers = dataclasses.replace(profile(4), q=2)
        return len(World(chance, numbers, chance.sample(range(4), 2), "COMMIT", Agreement).chaos(600)) > 1

    assert any(split(number) for number in range(200))


def test_control_when_only_the_first_vote_counts_some_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    add = agreement._Tally.add

    def first_only(self: Any, party: int, id_: bytes | None, signature: bytes) -> None:
        if party not in self.parties or party in self.ids.get(id_, {}):
            add(self, party, id_, signature)

    monkeypatch.setattr(agreement._Tally, "add", first_only)
    assert any(trial(number).undecided() for number in range(600))


def test_control_a_party_that_forgets_its_log_contradicts_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(self: Party) -> None:
        self.agreement = Agreement(self.world.stage, self.world.profile, self.me, self.world.proposer)

    monkeypatch.setattr(Party, "begin", begin)
    monkeypatch.setattr(Party, "restart", lambda self, _kept: (self.begin(), self.turn()))
    with pytest.raises(AssertionError, match="spoke twice"):
        list(map(trial, range(200)))


# the lock


class NoLock(Agreement):
    """Control: whoever has PRECOMMITted a value does not care."""

    _lock = property(lambda _self: None, lambda _self, _value: None)  # type: ignore[assignment]


def four(stage: Stage, kind: type[Agreement] = Agreement) -> tuple[World, list[Party]]:
    """Four parties, of which party 3 lies, party 0 leads view 0, and everybody knows both values."""
    world = World(random.Random(0), profile(4), {3}, stage, kind)
    world.proposer = lambda view: view % 4
    parties = list(world.parties.values())
    for party in parties:
        party.known = [X, Y]
    return world, parties


def move(world: World, wanted: Callable[[int, Signed], bool]) -> None:
    """Deliver what is wanted, and what it leads to; the rest stays under way."""
    while found := next((entry for entry in world.pool if wanted(*entry)), None):  # type: ignore[arg-type]
        world.pool.remove(found)
        world.deliver(*found)


def begin(world: World) -> None:
    for party in world.parties.values():
        party.agreement.start(party.now)
        party.turn()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("monotone", [True, False])
def test_evidence_must_not_turn_valid_false(stage: Stage, monotone: bool) -> None:
    """View 0: only party 0 sees the quorum in time and locks; 1 and 2 see nil of party 3 and give up. Then the double
    vote of party 3 becomes known and it falls silent; X contains party 3. If evidence turns X down, it never ends."""
    world, parties = four(stage)
    x = id_of(stage, X)
    begin(world)
    move(world, lambda _to, s: s.kind == "PROPOSAL")
    for party in parties[1:]:
        party.take(say(3, "PREVOTE", stage, 0, None))
        move(world, lambda to, s, me=party.me: to == me and s.kind == "PREVOTE" and s.sender == 0)
        party.fire()
    move(world, lambda to, s: to == 0 and s.kind == "PREVOTE")
    assert [party.agreement._lock for party in parties] == [(0, x), None, None]
    parties[0].take(say(3, "PREVOTE", stage, 0, x))
    parties[0].take(say(3, "PREVOTE", stage, 0, None))
    assert [(a.message.id, b.message.id) for a, b in contradictions(parties[0])] == [(x, None)]
    world.wish = lambda party: Y
    if not monotone:
        for party in parties:
            party.refused = [X]
    world.calm(100)
    assert world.outcomes() == ({x} if monotone else set())
    assert world.undecided() == ([] if monotone else [0, 1, 2])


def lock_attack(stage: Stage, old_view: bool, kind: type[Agreement]) -> set[bytes]:
    """All lock X, only party 0 sees the PRECOMMITs and decides; then the liar leads and proposes Y: plainly, or
    (old_view) with a genuine quorum of PREVOTEs for Y of a view before the lock."""
    world, parties = four(stage, kind)
    leaders = [0, 1, 3] if old_view else [0, 3]
    world.proposer = lambda view: leaders[view] if view < len(leaders) else view % 3
    world.wish = lambda party: Y if old_view and party.agreement.view == 0 else X
    y, view = id_of(stage, Y), 0
    begin(world)
    if old_view:  # everybody PREVOTEs Y, sees too little of it, and PRECOMMITs nil
        move(world, lambda _to, s: s.kind == "PROPOSAL")
        for party in parties:
            party.take(say(3, "PREVOTE", stage, 0, None))
            move(world, lambda to, s, me=party.me: to == me and s.kind == "PREVOTE" and s.sender == (me + 1) % 3)
            party.fire()
        move(world, lambda _to, s: s.kind == "PRECOMMIT")
        for party in parties:
            if party.agreement.view == 0:
                party.fire()
        view = 1
    move(world, lambda _to, s: s.message.view == view and s.kind in ("PROPOSAL", "PREVOTE"))
    move(world, lambda to, s: s.message.view == view and s.kind == "PRECOMMIT" and (to == 0 or s.sender == 0))
    assert parties[0].agreement.decided is not None and parties[0].agreement.decided.value == X
    if kind is Agreement:
        assert [party.agreement._lock for party in parties[1:]] == [(view, id_of(stage, X))] * 2
    for party in parties[1:]:
        party.take(say(3, "PRECOMMIT", stage, view, None))
        party.fire()
        assert party.agreement.view == view + 1
    move(world, lambda _to, s: s.message.view == 0 and s.kind == "PREVOTE")
    for party in parties[1:]:
        party.take(
            say(3, "PROPOSAL", stage, view + 1, Y, 0 if old_view else None),
            say(3, "PREVOTE", stage, view + 1, y),
            say(3, "PRECOMMIT", stage, view + 1, y),
        )
    move(world, lambda to, s: to != 0 and s.message.view == view + 1)
    world.calm(12)
    return world.outcomes()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("old_view", [False, True])
def test_the_lock_withstands_a_leader_that_lies(stage: Stage, old_view: bool) -> None:
    assert lock_attack(stage, old_view, Agreement) == {id_of(stage, X)}
    assert lock_attack(stage, old_view, NoLock) == {id_of(stage, X), id_of(stage, Y)}, "the control must fail"


# the rules one by one


def alone(me: int = 0, numbers: Profile | None = None, leader: int = 1) -> Agreement:
    return Agreement("COMMIT", numbers or profile(4), me, lambda view: (view + leader) % (numbers or profile(4)).n)


def advance(
    one: Agreement, now: float = 0.0, *, valid: bool = True, held: bool = True, wish: Any = None
) -> list[tuple[Any, ...]]:
    drafts = one.advance(now, lambda _x: valid, lambda _x: held, lambda: wish)
    return [(draft.kind, *draft.fields[1:]) for draft in drafts]


def votes(kind: str, view: int, id_: bytes | None, *parties: int) -> list[Signed]:
    return [say(party, kind, "COMMIT", view, id_) for party in parties]


def fill(one: Agreement, *signed: Signed) -> Agreement:
    for each in signed:
        one.add(each)
    return one


XID, YID = id_of("COMMIT", X), id_of("COMMIT", Y)


def proposal(view: int, value: list[Any], valid_view: int | None = None, sender: int | None = None) -> Signed:
    return say((view + 1) % 4 if sender is None else sender, "PROPOSAL", "COMMIT", view, value, valid_view)


def test_a_leader_proposes_when_it_can_and_says_everything_once() -> None:
    one = alone(me=1)
    assert advance(one) == [] and one.step == "propose"
    assert advance(one, wish=X) == [("PROPOSAL", 0, X, None), ("PREVOTE", 0, XID)]
    assert advance(one, wish=Y) == [] and one.step == "prevote"
    fill(one, *votes("PREVOTE", 0, XID, 2, 3))
    assert advance(one) == [("PRECOMMIT", 0, XID)] and one.step == "precommit"
    fill(one, *votes("PRECOMMIT", 0, XID, 2, 3))
    assert advance(one) == [] and one.decided is None, "decided without its own signature"
    fill(one, *votes("PRECOMMIT", 0, XID, 1))
    assert advance(one) == [] and one.decided == Decision(X, XID, 0, {1: b"s" * 64, 2: b"s" * 64, 3: b"s" * 64})


def test_a_proposal_waits_for_its_data_and_then_for_the_timer() -> None:
    one = fill(alone(), proposal(0, X))
    one.start(0.0)
    assert advance(one, 1.9, valid=False) == [] and one.wake_at() == 2.0
    assert advance(fill(alone(), proposal(0, X)), 1.9) == [("PREVOTE", 0, XID)]
    assert advance(one, 2.0, valid=False) == [("PREVOTE", 0, None)]
    assert advance(one, 2.1, valid=True) == []


def test_a_quorum_is_not_followed_before_its_data_is_held() -> None:
    one = fill(alone(), proposal(0, X), *votes("PREVOTE", 0, XID, 1, 2, 3))
    assert advance(one, held=False) == [("PREVOTE", 0, XID)]
    assert advance(one, held=True) == [("PRECOMMIT", 0, XID)]
    later = fill(alone(), proposal(1, X, 0), *votes("PREVOTE", 0, XID, 1, 2, 3), *votes("PREVOTE", 1, XID, 1, 2))
    assert advance(later, held=False) == [] and later.view == 1
    assert advance(later, held=True, valid=False)[0] == ("PREVOTE", 1, XID)


def test_a_proposal_by_another_than_the_leader_counts_for_nothing() -> None:
    one = fill(alone(), proposal(0, X, sender=2), *votes("PRECOMMIT", 0, XID, 1, 2, 3))
    assert advance(one) == [] and one.decided is None
    assert advance(fill(alone(), proposal(5, X, sender=1), proposal(5, X, sender=3))) == []


def test_every_value_of_a_leader_that_proposes_several_can_be_decided() -> None:
    one = fill(alone(), proposal(0, X), proposal(0, Y), *votes("PRECOMMIT", 0, YID, 1, 2, 3))
    assert advance(one) == [] and one.decided is not None and one.decided.value == Y


def test_a_locked_party_votes_for_another_value_only_after_a_newer_quorum() -> None:
    locked = [proposal(1, X), *votes("PREVOTE", 1, XID, 0, 1, 2), *votes("PRECOMMIT", 1, XID, 0)]
    go_on = votes("PREVOTE", 3, None, 1, 2)

    def said(*more: Signed) -> tuple[Any, ...]:
        return advance(fill(alone(), *locked, *go_on, *more))[0]

    assert said(proposal(3, Y, sender=0)) == ("PREVOTE", 3, None)
    assert said(proposal(3, X, sender=0)) == ("PREVOTE", 3, XID)
    for view, answer in ((0, None), (1, YID), (2, YID)):
        quorum = votes("PREVOTE", view, YID, 1, 2, 3)
        assert said(proposal(3, Y, view, sender=0), *quorum) == ("PREVOTE", 3, answer)
    assert said(proposal(3, X, 0, sender=0), *votes("PREVOTE", 0, XID, 1, 2, 3)) == ("PREVOTE", 3, XID)


def test_a_quorum_of_the_same_or_a_later_view_justifies_nothing() -> None:
    for valid_view in (0, 1):
        one = fill(alone(), proposal(0, X, valid_view), *votes("PREVOTE", valid_view, XID, 1, 2, 3))
        assert advance(one) == [], "a leader cannot have seen its own future"


def test_a_leader_proposes_the_newest_value_with_a_quorum() -> None:
    one = alone(leader=0)  # leads view 4
    fill(one, proposal(0, X, sender=0), *votes("PREVOTE", 0, XID, 1, 2, 3))
    fill(one, proposal(2, Y, sender=2), *votes("PREVOTE", 2, YID, 1, 2, 3), *votes("PREVOTE", 4, None, 1, 2))
    assert advance(one, wish=X, valid=False) == [("PROPOSAL", 4, Y, 2), ("PREVOTE", 4, YID)]


def test_f_plus_one_parties_in_higher_views_take_us_along() -> None:
    one = fill(alone(), *votes("PREVOTE", 7, None, 1))
    assert advance(one) == [] and one.view == 0 and not one.started
    fill(one, *votes("PRECOMMIT", 5, None, 2))
    assert advance(one) == [] and one.view == 5 and one.started and one.wake_at() == 2.0 * 2**5


def test_timers_double_with_the_view_and_stop_doubling() -> None:
    one = alone(numbers=profile(3), leader=1)
    one.timeout_s = 0.5
    assert one.wake_at() is None
    one.start(10.0)
    assert one.wake_at() == 10.5
    assert advance(one, 10.4) == [] and advance(one, 10.5) == [("PREVOTE", 0, None)] and one.wake_at() is None
    fill(one, *votes("PREVOTE", 0, XID, 1))
    assert advance(one, 11.0) == [] and one.wake_at() == 11.5
    assert advance(one, 11.5) == [("PRECOMMIT", 0, None)]
    fill(one, *votes("PRECOMMIT", 0, XID, 1))
    assert advance(one, 12.0) == [] and one.wake_at() == 12.5
    assert advance(one, 12.5) == [] and one.view == 1 and one.wake_at() == 13.5
    fill(one, *votes("PREVOTE", 30, None, 1))
    assert advance(one, 20.0) == [] and one.wake_at() == 20.0 + 0.5 * 1024


def test_who_waits_for_a_proposal_moves_on_with_a_quorum_of_precommits() -> None:
    one = fill(alone(), *votes("PRECOMMIT", 0, None, 1, 2, 3))
    assert advance(one, 1.0) == [] and one.wake_at() == 3.0
    assert advance(one, 3.0) == [] and one.view == 1


def test_nil_is_precommitted_at_once_when_a_quorum_wants_nil() -> None:
    one = fill(alone(), proposal(0, X), *votes("PREVOTE", 0, None, 1, 2, 3))
    assert advance(one) == [("PREVOTE", 0, XID), ("PRECOMMIT", 0, None)]


def test_a_decision_of_any_view_is_taken_and_nothing_is_said_after_it() -> None:
    one = fill(alone(), *votes("PREVOTE", 9, None, 1, 2))
    assert advance(one) == [] and one.view == 9
    fill(one, proposal(3, X), *votes("PRECOMMIT", 3, XID, 3, 2, 1, 0))
    assert advance(one) == [] and one.decided is not None
    assert one.decided.view == 3 and list(one.decided.signers) == [0, 1, 2] and one.wake_at() is None
    fill(one, *votes("PREVOTE", 20, None, 1, 2, 3), proposal(20, Y))
    assert advance(one, 1e9, wish=Y) == [] and one.view == 9


def test_no_view_follows_the_last_one() -> None:
    last = agreement.MAX_VIEWS - 1
    one = fill(alone(), *votes("PREVOTE", last + 1, None, 1, 2, 3), *votes("PREVOTE", last, None, 1, 2))
    assert advance(one) == [] and one.view == last
    fill(one, *votes("PRECOMMIT", last, None, 1, 2, 3))
    assert advance(one, 1e9) == [("PREVOTE", last, None), ("PRECOMMIT", last, None)]
    assert one.view == last and one.wake_at() is None
    fill(one, proposal(0, X), *votes("PRECOMMIT", 0, XID, 1, 2, 3))
    assert advance(one) == [] and one.decided is not None


def test_what_does_not_belong_here_is_refused() -> None:
    one = alone()
    for wrong in (
        say(1, "PREVOTE", "START", 0, None),
        say(4, "PREVOTE", "COMMIT", 0, None),
        say(1, "CUT", bytes(32), 0, b"\x07"),
    ):
        with pytest.raises(LocalProtocolError):
            one.add(wrong)


# restarts and order


def test_its_own_messages_restore_a_party_in_any_order() -> None:
    own = [
        *votes("PREVOTE", 0, XID, 0),
        *votes("PRECOMMIT", 0, XID, 0),
        *votes("PREVOTE", 2, YID, 0),
        *votes("PRECOMMIT", 2, YID, 0),
        *votes("PREVOTE", 3, None, 0),
        *votes("PRECOMMIT", 3, None, 0),
        say(0, "PROPOSAL", "COMMIT", 7, Y, 2),
    ]
    for number in range(50):
        mixed = random.Random(number).choices(own, k=5) + random.Random(number).sample(own, len(own))
        one = fill(alone(), *mixed)
        assert (one.view, one.step, one._lock, one.started) == (7, "propose", (2, YID), False)
        assert advance(one, 1.0, valid=False, wish=X) == [] and one.wake_at() == 1.0 + 2.0 * 2**7
    one = fill(alone(), *own[:4])
    assert (one.view, one.step) == (2, "precommit")
    assert (fill(alone(), *own[:3]).step, fill(alone(), *own[:2]).step) == ("prevote", "precommit")


def test_order_and_number_of_messages_change_nothing(seed: int) -> None:
    """What a party has seen, mixed and doubled, brings a new one of the same log to the same place."""
    for number in range(60):
        world = trial(number)
        for party in world.parties.values():
            seen = list(party.seen.values())
            mixed = world.chance.choices(seen, k=len(seen)) + world.chance.sample(seen, len(seen))
            places = []
            for messages in (seen, mixed):
                again = fill(Agreement(world.stage, world.profile, party.me, world.proposer), *messages)
                assert again._lock == party.agreement._lock
                places.append((again.view, again.step, advance(again), again.decided and again.decided.value))
            assert places[0] == places[1] and places[0][2:] == ([], party.agreement.decided.value)  # type: ignore[union-attr]


# bounds


def test_a_flood_takes_bounded_memory(seed: int) -> None:
    one, chance = alone(), random.Random(seed)
    for k in range(3000):
        view = k % 3
        one.add(say(3, "PREVOTE", "COMMIT", view, chance.randbytes(32)))
        one.add(proposal(view, ["S", k]))
    one.add(say(3, "PREVOTE", "COMMIT", 1 << 31, None))
    assert sum(len(known) for known in one._proposals.values()) <= 3 * agreement.MAX_PROPOSALS >= len(one._values)
    assert sum(len(tally.ids) for tally in one._tallies.values()) == 3 * agreement.MAX_VALUES
    assert len(one._newest) == 3


def test_no_vote_is_missed_for_want_of_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of q = 3 PREVOTEs that a lock rests on, one is by a liar that filled its slot elsewhere before."""
    x, liar = id_of("COMMIT", X), [say(3, "PREVOTE", "COMMIT", 0, bytes([k] * 32)) for k in range(4)]

    def last() -> list[tuple[Any, ...]]:
        one = fill(alone(), *liar, proposal(1, X, 0), *votes("PREVOTE", 0, x, 1, 2, 3), *votes("PREVOTE", 1, x, 1, 2))
        return advance(one)

    assert last()[0] == ("PREVOTE", 1, x)
    monkeypatch.setattr(agreement._Tally, "count", lambda self, id_: len(self.ids.get(id_, {})))
    assert last() == [], "the control must wait"


def test_a_liar_of_many_values_decides_nothing_without_its_signature() -> None:
    liar = [say(3, "PRECOMMIT", "COMMIT", 0, bytes([k] * 32)) for k in range(5)]
    one = fill(alone(), proposal(0, X), *liar, *votes("PRECOMMIT", 0, XID, 1, 2, 3))
    advance(one)
    assert one.decided is None
    one.settle(Decision(X, XID, 0, {1: b"s" * 64, 2: b"s" * 64, 3: b"s" * 64}))
    assert one.decided is not None and advance(one, 1e9) == []


def test_the_first_decision_stays() -> None:
    one, decision = alone(), Decision(X, XID, 0, {1: b"s" * 64, 2: b"s" * 64, 3: b"s" * 64})
    one.settle(decision)
    one.settle(dataclasses.replace(decision, value=Y, id=YID))
    assert one.decided == decision


def test_who_has_decided_notices_that_somebody_goes_on() -> None:
    one = fill(alone(), proposal(0, X), *votes("PRECOMMIT", 0, XID, 1, 2, 3), *votes("PREVOTE", 0, XID, 1))
    advance(one)
    assert one.decided is not None and not one.passed
    assert fill(one, *votes("PREVOTE", 1, None, 2)).passed
    assert not fill(alone(), *votes("PREVOTE", 1, None, 2)).passed


# certificates


@pytest.fixture(scope="module")
def keys() -> list[SigningKey]:
    return [SigningKey(Secret(bytes([k] * 32))) for k in range(5)]


def test_a_certificate_proves_a_decision_and_nothing_else(keys: list[SigningKey]) -> None:
    numbers, publics = profile(5), [key.public for key in keys]  # q = 4
    signed = {k: sign(keys[k], SID, "PRECOMMIT", k, "COMMIT", 2, XID).signature for k in range(5)}
    good = {k: signed[k] for k in (0, 1, 3, 4)}

    pairs = list(good.items())

    def check(
        signatures: Any = pairs, sid: bytes = SID, stage: Stage = "COMMIT", value: Any = X, view: int = 2
    ) -> Decision:
        return check_certificate(sid, stage, numbers, publics, value, view, signatures)

    assert check() == Decision(X, XID, 2, good)
    other = sign(keys[4], SID, "PREVOTE", 4, "COMMIT", 2, XID).signature
    bad: dict[str, Callable[[], Decision]] = {
        "too few": lambda: check(pairs[:3]),
        "more than q": lambda: check(list(signed.items())),
        "nobody": lambda: check([]),
        "one twice": lambda: check([pairs[0], *pairs[:3]]),
        "not ascending": lambda: check(pairs[::-1]),
        "a party that is none": lambda: check([*pairs[:3], (5, signed[4])]),
        "a party below none": lambda: check([(-1, signed[4]), *pairs[:3]]),
        "the signature of another": lambda: check([*pairs[:2], (2, signed[3]), pairs[3]]),
        "a PREVOTE": lambda: check([*pairs[:3], (4, other)]),
        "a short signature": lambda: check([*pairs[:3], (4, signed[4][:63])]),
        "a changed signature": lambda: check([*pairs[:3], (4, bytes([signed[4][0] ^ 1]) + signed[4][1:])]),
        "another value": lambda: check(value=Y),
        "another view": lambda: check(view=1),
        "another stage": lambda: check(stage="START"),
        "another instance": lambda: check(sid=bytes(32)),
    }
    for what, attempt in bad.items():
        with pytest.raises(TrustError):
            pytest.fail(f"accepted: {what}: {attempt()}")


@pytest.mark.parametrize("instance", ["instance_0_aborted", "instance_1_one_dropout_after_START", "instance_2_pinned"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_known_certificates_are_accepted(shared: Path, instance: str, stage: Stage) -> None:
    answers = json.loads((shared / "vectors/secagg_kat.json").read_text())
    publics = [bytes.fromhex(key) for key in answers["names"]["identity_keys"]]
    known = answers["group"][instance]
    sid, proof = bytes.fromhex(known["sid"]), known[f"{stage.lower()}_dc"]
    value = codec.decode(bytes.fromhex(known[f"{stage.lower()}_value"]))
    assert id_of(stage, value).hex() == proof["id"]
    signatures = {int(party): bytes.fromhex(signature) for party, signature in proof["sigs"].items()}
    pairs = list(signatures.items())
    assert check_certificate(sid, stage, profile(4), publics, value, proof["view"], pairs).signers == signatures
    vote = parse(bytes.fromhex(proof["precommit_body_of_0"]) + signatures[0])
    vote.verify(publics[0])
    assert (vote.message.stage, vote.message.view, vote.message.id.hex()) == (stage, proof["view"], proof["id"])
    with pytest.raises(TrustError):
        check_certificate(sid, stage, profile(4), publics, value, proof["view"] + 1, pairs)

    # and the agreement itself makes them of those votes
    lead = functools.partial(names.proposer, bytes(32), bytes(32), 0, n=4)
    one = Agreement(stage, profile(4), 0, lambda view: lead(view=view))
    one.add(sign(Pen(), sid, "PROPOSAL", lead(view=0), stage, 0, value, None))  # type: ignore[arg-type]
    for party, signature in signatures.items():
        body = codec.encode([1, sid, "PRECOMMIT", party, stage, 0, id_of(stage, value)])
        one.add(parse(body + signature))
    assert advance(one) == [] and one.decided is not None
    assert (one.decided.value, one.decided.signers) == (value, signatures)
