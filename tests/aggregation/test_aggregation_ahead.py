"""Room for what is said in instances that are not open yet."""

from __future__ import annotations

import pytest

from fedpeer.aggregation import ahead, names
from fedpeer.aggregation.ahead import Ahead
from fedpeer.aggregation.messages import Signed, sign
from fedpeer.aggregation.party import Party
from fedpeer.aggregation.seat import Ask, Setting
from fedpeer.crypto import Secret, SigningKey
from fedpeer.testing.sums.faults import Faults, Kill, Liar
from fedpeer.testing.sums.world import Sum, World

ME, OTHER, THIRD = 0, 1, 2
NEXT, LATER = b"n" * 32, b"l" * 32
KEY = SigningKey(Secret(bytes(32)))


def said(sender: int, sid: bytes, number: int) -> Signed:
    return sign(KEY, sid, "PREVOTE", sender, "START", number, None)


ONE = len(said(OTHER, NEXT, 0).raw)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Ahead:
    """Room for three messages of each sender."""
    monkeypatch.setattr(ahead, "MAX_AHEAD", 3 * ONE)
    return Ahead(ME)


def test_a_message_takes_its_room_once_however_often_it_comes(few: Ahead) -> None:
    for number in range(3):
        for _ in range(5):
            few.add(said(OTHER, LATER, number), ())
    assert len(list(few.of(LATER))) == 3
    assert not few.lacking


def test_who_fills_its_room_takes_none_from_others_and_what_it_lacks_is_known(few: Ahead) -> None:
    for number in range(9):
        few.add(said(OTHER, LATER, number), ())
    assert few.lacking
    few.add(said(THIRD, LATER, 0), ())
    assert [(signed.sender, signed.message.view) for signed in few.take(LATER)] == [(1, 0), (1, 1), (1, 2), (2, 0)]
    assert not list(few.of(LATER))
    few.add(said(OTHER, LATER, 9), ())
    assert len(list(few.of(LATER))) == 1, "there is room again"


def test_what_opens_next_goes_before_what_is_further_ahead(few: Ahead) -> None:
    for number in range(2):
        few.add(said(OTHER, LATER, number), {NEXT})
        few.add(said(THIRD, LATER, number), {NEXT})
    for number in range(4):
        few.add(said(OTHER, NEXT, number), {NEXT})
    assert [signed.message.view for signed in few.of(NEXT)] == [0, 1, 2]
    assert [signed.sender for signed in few.of(LATER)] == [THIRD, THIRD]
    assert few.lacking


def test_our_own_are_kept_however_many(few: Ahead) -> None:
    for number in range(9):
        few.add(said(ME, LATER, number), ())
    assert len(list(few.of(LATER))) == 9
    assert not few.lacking


JOBS: dict[str, list[Sum]] = {
    "one group each": [Sum(("fit", turn, 0), "turn", True, turn) for turn in range(6)],
    "all of one group": [Sum(("count", 0, k), "data", True, k) for k in range(6)],
}
FAULTS = {
    "late": Faults(late={3: 700.0}),
    "late after aborts": Faults(late={3: 700.0}, liars={1: Liar(mute=frozenset({"SUM"}))}),
    "killed": Faults(kills={3: (Kill("after a commit", 12, 300.0), Kill("after a commit", 30, 300.0))}),
}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_a_party_far_behind_catches_up_whatever_found_no_room(
    faults: Faults, job: list[Sum], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "MAX_AHEAD", 3000)
    outcome = World(5, n=5, faults=faults, sums=job).run()
    assert not outcome.failures, outcome.failures[:2]
    assert outcome.ended == {"SUM": len(job) * (5 - len(faults.liars))}


def test_a_party_finds_room_for_the_next_instance_of_a_sum_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MAX_AHEAD", 3 * ONE)
    keys = [SigningKey(Secret(bytes([number]) * 32)) for number in range(4)]
    party = Party(Setting(bytes(32), names.profile(4), ME, [key.public for key in keys]), keys[ME], bytes, {})
    group = names.group_of(bytes(32), b"")
    party.ask(Ask(("fit", 0, 0), group, bytes(32), bytes(32), bytes(32), 256, 240), 0.0)
    for number in range(5):
        party.add(said(OTHER, LATER, number))
    sid = names.sid_of(bytes(32), group, 0)
    party.add(said(OTHER, sid, 0))
    step = party.advance(0.0)
    assert step.again
    assert party._instances[sid].seat.board.says("PREVOTE", OTHER)
    assert not party.advance(1.0).again, "once"
