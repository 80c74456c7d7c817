"""One instance at a party: what it says, keeps and refuses when others go wrong, where no simulation can tell."""

from __future__ import annotations

import os
from typing import Any

import pytest
from sums_table import CONTRACT, LIAR, Letter, Round, again

from fedpeer.aggregation import names, slices
from fedpeer.aggregation.board import FEW, MANY, Board
from fedpeer.aggregation.evidence import convict
from fedpeer.aggregation.instance import Instance
from fedpeer.aggregation.keyset import KeySet
from fedpeer.aggregation.messages import START, Signed, id_of, sign
from fedpeer.aggregation.names import bitmap
from fedpeer.aggregation.party import Party
from fedpeer.aggregation.seat import Ask, Setting
from fedpeer.aggregation.work import Fetch, Mask
from fedpeer.crypto import Secret, SigningKey, hash_

ALL = frozenset(range(5))


# what is said


def test_who_holds_more_shares_than_an_ack_has_room_for_says_them_in_two() -> None:
    """A liar advertises four key sets among 200 parties; three hundred entries and more are no single message."""
    n = 200
    keys = [SigningKey(Secret(hash_("fp.test.key", bytes([party])))) for party in range(n)]
    profile, group = names.profile(n), names.group_of(CONTRACT, b"")
    party = Party(Setting(CONTRACT, profile, 0, [key.public for key in keys]), keys[0], os.urandom, {})
    party.ask(Ask(("fit", 0, 0), group, bytes(32), bytes(32), bytes(32), 256, 240), 0.0)
    acked: list[list[Any]] = []

    def advance(now: float) -> list[Signed]:
        said = [signed for signed, _ in party.advance(now).say]
        for signed in said:
            party.add(signed, logged=True)
            if signed.kind == "ACK":
                acked.append(signed.message.entries)
        return said

    mine = next(signed for signed in advance(0.0) if signed.kind == "ADVERTISE")
    for dealer in range(1, n):
        for inc in range(4 if dealer == 1 else 1):
            dealt = KeySet.fresh(dealer, mine.sid, inc, os.urandom)
            sealed = dealt.share_for(0, names.advert_id(mine.body), mine.message.epk, profile.t, n, keys[dealer])
            party.add(sign(keys[dealer], mine.sid, "ADVERTISE", dealer, *dealt.advertise_fields))
            party.add(sign(keys[dealer], mine.sid, "SHARE", dealer, 0, sealed))
    for now in range(1, 6):
        advance(float(now))
    assert [len(entries) for entries in acked] == [200, 3]
    assert len({tuple(entry) for entries in acked for entry in entries}) == 203, "none of them twice"


# what is kept


def test_a_flood_takes_bounded_room_and_a_contradiction_in_what_is_kept_is_seen_in_it() -> None:
    board, key = Board(4), SigningKey(Secret(bytes(32)))
    for view in range(1000):
        board.add(sign(key, bytes(32), "PREVOTE", 1, "COMMIT", view, None))
    assert len(board.by("PREVOTE", 1)) == MANY + 4 * 4
    assert len(board._slots) == MANY + 4 * 4
    board.add(sign(key, bytes(32), "PREVOTE", 1, "COMMIT", 999, bytes(32)))
    assert board.conflicts == [], "forgotten"
    board.add(sign(key, bytes(32), "PREVOTE", 1, "COMMIT", 3, bytes(32)))
    assert [type_ for type_, _, _ in board.conflicts] == ["E1"]
    for inc in range(9):
        board.add(sign(key, bytes(32), "ADVERTISE", 1, inc, *[bytes(32)] * 3))
    assert len(board.by("ADVERTISE", 1)) == FEW


# an abort


def aborted(kept_back: set[tuple[int, str]]) -> tuple[Round, list[Letter]]:
    """Five parties, an owner of whom adds nothing up, a minute later; and what the others did not hear: (who, kind)."""
    table = Round(5)
    late: list[Any] = []
    hear = table.hear

    def filtered(sender: int, signed: Signed, to: int | None) -> None:
        if (sender, signed.kind) in kept_back:
            late.append((sender, signed, to))
        else:
            hear(sender, signed, to)

    table.hear = filtered  # type: ignore[method-assign]
    table.ask()
    table.run(until=60.0)
    table.hear = hear  # type: ignore[method-assign]
    return table, late


def instances(table: Round, number: int) -> list[Instance]:
    return table.parties[number]._groups[names.group_of(CONTRACT, b"turn 0")].instances


def test_no_vector_is_masked_again_before_t_parties_have_released_for_nobody() -> None:
    """R5: of five parties four must have; a liar and one that is late have not, as far as the others see."""
    table, late = aborted({(LIAR, "SUM"), (LIAR, "RELEASE"), (2, "RELEASE")})
    first = {signed.sid for signed in table.said if signed.kind == "READY"}
    assert [message.survivors for message in table.of("RELEASE")] == [bytes(1)] * 3
    for number in (0, 3, 4):
        assert len(instances(table, number)) == 1
        assert instances(table, number)[0].outcome is None
    assert not [signed for signed in table.said if signed.sid not in first and signed.sender in (0, 3, 4)]
    for letter in late:
        if letter[0] == 2:
            table.hear(*letter)
    table.lie = lambda letter: [] if letter[0].kind == "SUM" else [letter]
    ended = table.run()
    table.check([ended[number] for number in range(5)], set())


def test_what_an_aborted_instance_kept_is_erased_with_our_own_release_for_nobody() -> None:
    """R6: it waits for nobody else's; no other release of ours can follow."""
    kept_back = {(LIAR, "SUM"), *((number, "RELEASE") for number in range(5))}
    table, late = aborted(kept_back)
    for letter in late:
        if letter[1].kind == "SUM":
            table.hear(*letter)
    table.run(until=table.now + 1.0)
    for number in range(5):
        assert instances(table, number)[0].outcome is None
        assert table.kept[number] == {}
        assert not instances(table, number)[0].sharing.has_secrets
        assert not instances(table, number)[0].seat.files


# a pinned group, and more liars than f


@pytest.fixture
def second() -> Round:
    """The second instance of a group that is bound to all five, where nobody has heard what others say of START."""
    table = Round(5)
    table.check(table.sum(k=0), set())
    hear = table.hear
    table.hear = lambda sender, signed, to: (  # type: ignore[method-assign]
        None if getattr(signed.message, "stage", "") == START else hear(sender, signed, to)
    )
    table.ask(k=1)
    table.run(until=table.now + 5.0)
    table.hear = hear  # type: ignore[method-assign]
    return table


def decide_start(table: Round, contributors: frozenset[int], pin: frozenset[int] | None) -> list[Any]:
    """Party 0 is shown a certificate for this START; the work that it begins."""
    party, instance = table.parties[0], instances(table, 0)[1]
    seat, sharing = instance.seat, instance.sharing
    (ask,) = (ask for ask in seat.asks.values() if ask.name[2] == 1)
    root = names.advert_root([next(iter(sharing.adverts[number])) for number in sorted(contributors)])
    sets = [bitmap(parties, 5) for parties in (contributors, contributors)]
    value = ["U", ask.model, ask.params, *sets, root, None if pin is None else bitmap(pin, 5), seat.prev]
    id_ = id_of(START, value)
    votes = [
        (voter, sign(table.keys[voter], seat.sid, "PRECOMMIT", voter, START, 0, id_).signature) for voter in range(1, 5)
    ]
    party.add(sign(table.keys[1], seat.sid, "CERTIFICATE", 1, START, 0, value, votes))
    work = party.advance(table.now).work
    assert seat.fixed is not None
    assert seat.fixed.contributors == contributors
    return work


@pytest.mark.parametrize("pin", [None, ALL - {4}], ids=["no pin", "another pin"])
def test_a_start_without_our_pin_masks_nothing_whoever_decided_it(second: Round, pin: frozenset[int] | None) -> None:
    """R7: our own log binds the group."""
    assert decide_start(second, ALL - {4}, pin) == []


@pytest.mark.parametrize("survivors", [ALL, ALL - {4}], ids=["the pin", "others"])
def test_sums_over_others_than_the_pin_are_neither_fetched_nor_voted_for(
    second: Round, survivors: frozenset[int]
) -> None:
    assert [type(item) for item in decide_start(second, ALL, ALL)] == [Mask], "with our pin it goes on"
    party, instance = second.parties[0], instances(second, 0)[1]
    seat, fixed, raw = instance.seat, instance.seat.fixed, bitmap(survivors, 5)
    assert fixed is not None
    assert seat.ask is not None
    digests = []
    for chunk in instance.gathering.chunks(seat.ask):
        owner, digest = chunk.owner, hash_("fp.test.sum", bytes([chunk.number]))
        party.add(sign(second.keys[owner], seat.sid, "SUM", owner, fixed.ctx, raw, chunk.number, digest))
        digests.append(digest)
    fetched = [item.digest for item in party.advance(second.now).work if isinstance(item, Fetch)]
    assert fetched == (digests if survivors == ALL else [])
    for digest in digests:
        party.done(Fetch(seat.sid, "sum", fixed.ctx, 1, 0, 768, digest), True)
    value = ["S", fixed.ctx, raw, slices.root(digests)]
    assert instance._valid_commit(value, second.now) == (survivors == ALL)


# who owes


def test_who_owes_a_secret_in_one_group_is_left_out_of_the_others() -> None:
    """A dealer whose shares too few hold opens nothing: its sum is lost, and meanwhile it is in no other."""
    table = Round(4)
    group, sid = names.group_of(CONTRACT, b"turn 2"), names.sid_of(CONTRACT, names.group_of(CONTRACT, b"turn 1"), 0)
    assert names.proposer(CONTRACT, group, 0, 0, 4) != LIAR, "it would not leave itself out"

    def lie(letter: Letter) -> list[Letter]:
        signed, to = letter
        withheld = signed.kind in ("OPEN", "SHARE_B") or (signed.kind == "SHARE" and to == 3)
        return [] if withheld and signed.sid == sid else [letter]

    table.lie = lie
    table.ask(1)
    assert table.run(until=60.0) == {}
    assert table.parties[0]._groups[names.group_of(CONTRACT, b"turn 1")].owing == {LIAR}
    table.ask(2)
    ended = table.run(until=120.0)
    assert {(end.name[1], end.status, end.survivors) for number, end in ended.items() if number != LIAR} == {
        (2, "SUM", frozenset({0, 2, 3}))
    }


# who is named


@pytest.mark.parametrize(
    ("silent_from", "status"),
    [
        ("READY", "WAITING"),
        ("ACK", "WAITING"),
        ("PREVOTE START", "WAITING"),
        ("PRECOMMIT START", "WAITING"),
        ("RECEIPT", "WAITING"),
        ("PREVOTE COMMIT", "WAITING"),
        ("PRECOMMIT COMMIT", "WAITING"),
        ("RELEASE", "LOST"),
        ("FINAL", "WAITING"),
    ],
)
def test_a_sum_that_waits_in_vain_names_those_who_fell_silent_and_nobody_else(silent_from: str, status: str) -> None:
    """Two of five; four are needed."""
    table = Round(5)
    gone: set[int] = set()
    hear = table.hear

    def filtered(sender: int, signed: Signed, to: int | None) -> None:
        if f"{signed.kind} {getattr(signed.message, 'stage', '')}".startswith(silent_from) and sender in (LIAR, 3):
            gone.add(sender)
        if sender not in gone:
            hear(sender, signed, to)

    table.hear = filtered  # type: ignore[method-assign]
    table.ask()
    ended = table.run(until=2000.0)
    assert {(end.status, end.parties, end.differing) for number, end in ended.items() if number not in gone} == {
        (status, frozenset({LIAR, 3}), frozenset())
    }


def test_who_has_another_history_is_told_apart_from_who_is_absent() -> None:
    table = Round(5)
    hear = table.hear
    table.hear = lambda sender, signed, to: None if sender == 4 else hear(sender, signed, to)  # type: ignore[method-assign]
    table.ask(models={3: b"x" * 32})
    ended = table.run()
    for number in (0, 1, 2):
        assert (ended[number].status, ended[number].parties, ended[number].differing) == ("WAITING", {4}, {3})
    assert (ended[3].parties, ended[3].differing) == ({4}, {0, 1, 2})


@pytest.mark.parametrize("kind", ["SCATTER", "SUM"])
def test_before_anybody_votes_who_masked_or_added_up_nothing_is_named(kind: str) -> None:
    table = Round(5, lambda letter: [] if letter[0].kind == kind else [letter])
    table.ask()
    table.run(until=1.5)
    (instance,) = instances(table, 0)
    (ask,) = instance.seat.asks.values()
    assert instance.absent(ask) == {LIAR}


# two sets in one group


def test_who_releases_for_two_sets_in_two_instances_of_a_group_is_convicted_by_everybody() -> None:
    """E6: by the evidence of those that heard both, one of them before it knew of the START, and by nothing else."""
    table = Round(5)
    table.check(table.sum(k=0), set())
    second_sid = names.sid_of(CONTRACT, names.group_of(CONTRACT, b"turn 0"), 1)
    held_back: list[Signed] = []
    deaf = True

    def lie(letter: Letter) -> list[Letter]:
        return [again(letter, table.keys[LIAR], survivors=b"\x0f")] if letter[0].kind == "RELEASE" else [letter]

    def filtered(sender: int, signed: Signed, to: int | None) -> None:
        table.said.append(signed)
        for number in {*range(5)} - {sender} if to is None else {to}:
            stage = getattr(signed.message, "stage", "")
            if (number, sender, signed.kind) == (4, LIAR, "RELEASE"):
                continue  # it hears of it by evidence only
            if deaf and number == 3 and signed.sid == second_sid and (stage or signed.kind == "EVIDENCE"):
                held_back.append(signed)
                continue
            table.parties[number].add(signed)

    table.lie, table.hear = lie, filtered  # type: ignore[method-assign]
    table.ask(k=1)
    table.run(until=table.now + 60.0)
    release = next(m for m in table.of("RELEASE") if (m.sender, m.sid) == (LIAR, second_sid))
    assert release.survivors == b"\x0f"
    assert instances(table, 3)[1].seat.fixed is None, "it has not heard what START was"
    assert table.parties[3].convicted == {LIAR}
    assert {signed.sender for signed in table.said if signed.kind == "EVIDENCE"} == {0, 2}
    deaf = False
    for signed in held_back:
        if signed.kind != "EVIDENCE":
            table.parties[3].add(signed)
    table.run(until=table.now + 60.0)
    evidence = [message for message in table.of("EVIDENCE") if message.sender != LIAR]
    assert {message.type for message in evidence} == {"E6"}
    assert sorted(message.sender for message in evidence) == [0, 2, 3], "once each"
    publics = [key.public for key in table.keys]
    for message in evidence:
        assert len(message.messages) == 5
        assert convict(message, names.profile(5), publics, CONTRACT) == LIAR
    for number in (0, 2, 3, 4):
        assert table.parties[number].convicted == {LIAR}, number
