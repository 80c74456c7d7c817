"""What bad input does to the cores of several parties that talk over a table: the name of each test says it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from sums_table import CONTRACT, LIAR, USED, Letter, Round, again

from fedpeer import codec
from fedpeer.aggregation import names, vectors
from fedpeer.aggregation.messages import LABEL, VERSION, id_of, parse, sign
from fedpeer.aggregation.seat import Ask
from fedpeer.aggregation.work import Fetch, Mask
from fedpeer.crypto import Secret, SigningKey
from fedpeer.errors import RemoteProtocolError, StageError, TrustError
from fedpeer.secure import fixedpoint


def test_a_faultless_round_is_the_sum_of_all() -> None:
    for n in (3, 4, 5):
        table = Round(n)
        table.check(table.sum(), set())
        assert table.of("EVIDENCE") == []


def test_shares_for_another_instance_are_not_acknowledged_and_their_dealer_is_left_out() -> None:
    table = Round(5)
    of_the_first: dict[int, bytes] = {}

    def lie(letter: Letter) -> list[Letter]:
        message = letter[0].message
        if message.kind == "SHARE":
            old = of_the_first.setdefault(message.holder, message.ciphertext)
            return [again(letter, table.keys[LIAR], ciphertext=old)]
        return [letter]

    table.lie = lie
    table.check(table.sum(1), set())
    table.check(table.sum(2), {LIAR})
    acked = {dealer for message in table.of("ACK") for dealer, _ in message.entries if message.sender != LIAR}
    assert LIAR in acked, "in the first instance"


@pytest.mark.parametrize("field", ["pk", "epk"])
@pytest.mark.parametrize("public", [bytes(32), b"\x01" + bytes(31)], ids=["zero", "one"])
def test_a_public_key_of_low_order_counts_as_none(field: str, public: bytes) -> None:
    table = Round(5)
    table.lie = lambda letter: (
        [again(letter, table.keys[LIAR], **{field: public})] if letter[0].kind == "ADVERTISE" else [letter]
    )
    table.check(table.sum(), {LIAR})


def test_a_chunk_of_a_wrong_length_is_not_fetched_and_its_contributor_is_cut() -> None:
    table = Round(5)
    table.lie = lambda letter: (
        [again(letter, table.keys[LIAR], nbytes=letter[0].message.nbytes + 3)]
        if letter[0].kind == "SCATTER"
        else [letter]
    )
    table.check(table.sum(), {LIAR})


@pytest.mark.parametrize("field", ["pk", "epk", "hb"])
def test_a_field_of_a_wrong_length_is_refused_before_anything_is_done_with_it(field: str) -> None:
    fields = {"inc": 0, "pk": bytes(32), "epk": bytes(32), "hb": bytes(32)}
    for length in (0, 31, 33):
        body = codec.encode([VERSION, bytes(32), "ADVERTISE", 0, *(fields | {field: bytes(length)}).values()])
        with pytest.raises(RemoteProtocolError):
            parse(body + bytes(64))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2.0**60])
def test_what_is_no_number_or_out_of_range_is_refused_at_its_own_party(value: float) -> None:
    with pytest.raises(StageError, match="the entry 'x' of a sum has"):
        fixedpoint.encode({"x": np.array([0.0, value])})


def test_a_header_in_the_name_of_another_contributor_does_not_verify() -> None:
    mallory, victim = (SigningKey(Secret(bytes([number]) * 32)) for number in (8, 9))
    forged = sign(mallory, bytes(32), "SCATTER", 0, bytes(32), 0, 3, bytes(32))
    with pytest.raises(TrustError):
        forged.verify(victim.public)
    other_kind = structs.replace(forged, signature=mallory.sign("SUM", forged.body, label=LABEL))
    with pytest.raises(TrustError):
        other_kind.verify(mallory.public)


@pytest.mark.parametrize("kind", ["PREVOTE", "PRECOMMIT"])
def test_a_vote_for_two_values_convicts_its_voter_who_is_left_out_of_the_next_group(kind: str) -> None:
    table = Round(5)
    table.lie = lambda letter: (
        [letter, again(letter, table.keys[LIAR], id=b"x" * 32)] if letter[0].kind == kind else [letter]
    )
    table.check(table.sum(1), set())
    accusers = {message.sender for message in table.of("EVIDENCE") if message.type == "E1"}
    assert accusers == set(range(5)) - {LIAR}
    for number in accusers:
        assert table.parties[number].convicted == {LIAR}
    table.check(table.sum(2), {LIAR})


def test_a_vector_that_comes_after_its_secret_was_opened_changes_nothing_and_is_never_unmasked() -> None:
    table = Round(5)
    late: list[Letter] = []

    def lie(letter: Letter) -> list[Letter]:
        if letter[0].kind == "SCATTER":
            late.append(letter)
            return []
        return [letter]

    table.lie = lie
    ends = table.sum()
    table.check(ends, {LIAR})
    opened = {(message.dealer, message.which) for message in table.of("OPEN")}
    assert (LIAR, "s") in opened, "the secret of its pair masks"
    before = len(table.said)
    assert late
    for letter in late:
        table.hear(LIAR, *letter)
    for _ in range(20):
        for number in range(5):
            table.advance(number, {})
        table.now += 60
    assert {signed.kind for signed in table.said[before:]} <= {"SCATTER"}
    assert (LIAR, "b") not in opened
    assert all(entry[0] != LIAR for message in table.of("SHARE_B") for entry in message.shares)
    table.check(ends, {LIAR})


def test_nobody_opens_anything_of_a_sum_that_one_masked_for_another_history_but_noise() -> None:
    """It says that it has the history of the others, and has not: the masks do not cancel."""
    table = Round(5)
    table.work = lambda number, work: replace(work, ctx=work.ctx, plus=work.plus[:-1]) if (
        number == LIAR and isinstance(work, Mask)
    ) else work  # fmt: skip
    ends = table.sum(group="g")
    assert {end.status for end in ends} == {"NOISE"}
    for files in table.files:
        for data in files.values():
            if len(data) == len(table.x[0]) * 3:
                total = vectors.unpack(data, 24)
                for some in [{party} for party in range(5)] + [set(range(5)) - {party} for party in range(5)]:
                    exact = sum(table.x[party].astype(np.uint64) for party in some)
                    assert np.mean(total == exact) < 0.01


def test_a_peer_whose_history_differs_is_in_no_sum_with_the_others_and_learns_none() -> None:
    table = Round(5)
    *ends, _ = ends_of_all = table.sum(models={4: b"x" * 32})
    assert {(end.status, end.survivors) for end in ends} == {("SUM", frozenset(range(4)))}
    assert ends_of_all[4].status == "NOISE"
    assert not any(message.sender == 4 for message in table.of("SCATTER"))


def test_a_pinned_peer_whose_history_differs_ends_the_group_without_a_second_set() -> None:
    table = Round(5)
    table.check(table.sum(k=0, group="data"), set())
    before = len(table.of("SCATTER"))
    ends = table.sum(k=1, group="data", models={4: b"x" * 32})
    assert {end.status for end in ends} == {"WAITING"}
    assert len(table.of("SCATTER")) == before, "nothing was masked"


@pytest.mark.parametrize("liars", [(LIAR,), (LIAR, 2)], ids=["one", "more than f"])
def test_a_sum_that_nobody_goes_on_with_keeps_neither_its_group_nor_secrets(liars: tuple[int, ...]) -> None:
    table = Round(5)
    table.check(table.sum(1), set())
    group = names.group_of(CONTRACT, b"turn 1")
    first, second = (names.sid_of(CONTRACT, group, seq) for seq in (0, 1))
    for liar in liars:
        table.hear(liar, sign(table.keys[liar], second, "READY", liar, ["fit", 1, 1], *[bytes(32)] * 3), None)
    for _ in range(5):
        for number in range(5):
            table.advance(number, {})
    begun = any(message.kind == "ADVERTISE" and message.sid == second for message in table.of("ADVERTISE"))
    assert begun == (len(liars) > 1), "one of f+1 parties is honest, and may need the others"
    for turn in (2, 3):
        table.check(table.sum(turn), set())
    for number in range(5):
        assert {first, second} <= table.forgotten[number]
        assert table.kept[number] == {}


def test_who_decided_shows_it_to_those_whom_a_flood_of_votes_kept_from_it() -> None:
    """Of the three votes that decide one is the liar's, and the others have no room left for it."""
    table = Round(4)
    lost: set[tuple[int, str]] = set()

    def flood(letter: Letter) -> list[Letter]:
        signed = letter[0]
        if signed.kind not in ("PREVOTE", "PRECOMMIT") or signed.message.stage != "COMMIT":
            return [letter]
        if signed.kind == "PREVOTE" or signed.message.id is None:
            return [letter] if signed.message.view == 0 else []
        noise = [again(letter, table.keys[LIAR], id=bytes([number] * 32))[0] for number in range(60)]
        return [*((each, to) for each in noise for to in (2, 3)), letter]

    def lacking(number: int, work: Any) -> Any:
        if number == 3 and isinstance(work, Fetch) and work.what == "sum":
            lost.add((number, work.what))
            return None  # one of the honest ones votes for nothing
        return work

    table.lie, table.work = flood, lacking
    table.check(table.sum(), set())
    assert lost
    shown = table.of("CERTIFICATE")
    assert {message.stage for message in shown} == {"COMMIT"}
    assert len({message.sender for message in shown}) == len(shown), "once each"


def test_a_certificate_with_a_signature_too_few_decides_nothing() -> None:
    table = Round(4)
    group = names.group_of(CONTRACT, b"turn 0")
    sid = names.sid_of(CONTRACT, group, 0)
    value = ["U", bytes(32), bytes(32), b"\x0f", b"\x0f", bytes(32), None, None]
    votes = [
        (party, sign(table.keys[party], sid, "PRECOMMIT", party, "START", 0, id_of("START", value)).signature)
        for party in (1, 2, 3)
    ]
    table.parties[0].ask(Ask(("fit", 0, 0), group, b"m" * 32, bytes(32), bytes(32), len(table.x[0]), USED), 0.0)
    table.parties[0].advance(0.0)
    instance = table.parties[0]._instances[sid]
    table.parties[0].add(sign(table.keys[1], sid, "CERTIFICATE", 1, "START", 0, value, votes[:2]))
    assert instance._start.decided is None
    table.parties[0].add(sign(table.keys[1], sid, "CERTIFICATE", 1, "START", 0, value, votes))
    assert instance._start.decided is not None


@pytest.mark.parametrize(
    "value",
    [
        ["nonsense"],
        ["U", bytes(32), bytes(32), b"\xff", b"\x0f", bytes(32), None, None],  # parties that do not exist
        ["U", bytes(32), bytes(32), b"\x0f\x00", b"\x0f", bytes(32), None, None],
        ["U", bytes(32), bytes(32), b"\x0f", b"\x0f", bytes(32), None, ["END"]],
    ],
)
def test_what_more_liars_than_f_decide_though_it_is_no_value_stops_the_sum_and_not_the_party(value: list[Any]) -> None:
    table = Round(4)
    group = names.group_of(CONTRACT, b"turn 0")
    sid = names.sid_of(CONTRACT, group, 0)
    party = table.parties[0]
    party.ask(Ask(("fit", 0, 0), group, b"m" * 32, bytes(32), bytes(32), len(table.x[0]), USED), 0.0)
    party.advance(0.0)
    view = next(view for view in range(4) if names.proposer(CONTRACT, group, 0, view, 4) != 0)
    leader = names.proposer(CONTRACT, group, 0, view, 4)
    party.add(sign(table.keys[leader], sid, "PROPOSAL", leader, "START", view, value, None))
    for liar in (1, 2, 3):
        party.add(sign(table.keys[liar], sid, "PRECOMMIT", liar, "START", view, id_of("START", value)))
    ended = [end for now in range(0, 1300, 50) for end in party.advance(float(now)).ended]
    assert party._instances[sid]._start.decided is not None
    assert [end.status for end in ended] == ["WAITING"]
