"""What bad input does to the cores of several parties that talk over a table: the name of each test says it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedpeer import codec
from fedpeer.aggregation import names, slices, vectors
from fedpeer.aggregation.messages import LABEL, VERSION, Signed, id_of, parse, sign
from fedpeer.aggregation.party import Party
from fedpeer.aggregation.seat import Ask, Ended, Setting
from fedpeer.aggregation.work import Add, Fetch, FetchTotal, Mask, Unmask, perform
from fedpeer.crypto import Secret, SigningKey
from fedpeer.errors import RemoteProtocolError, StageError, TrustError
from fedpeer.secure import fixedpoint

CONTRACT = b"C" * 32
USED = 1000
LIAR = 1
Letter = tuple[Signed, int | None]


class Files(dict[bytes, bytes]):
    def read(self, digest: bytes) -> bytes:
        return self[digest]

    def write(self, digest: bytes, data: Any) -> None:
        self[digest] = bytes(data)


class Round:
    """Parties around a table: what one says all hear at once, save for what `lie` makes of the liar's letters."""

    def __init__(self, n: int, lie: Callable[[Letter], list[Letter]] = lambda letter: [letter]) -> None:
        self.n, self.lie, self.now = n, lie, 0.0
        chance = random.Random(n)
        self.keys = [SigningKey(Secret(bytes([party + 1]) * 32)) for party in range(n)]
        publics = [key.public for key in self.keys]
        self.parties = [
            Party(Setting(CONTRACT, names.profile(n), party, publics, stall_s=600), key, chance.randbytes, {})
            for party, key in enumerate(self.keys)
        ]
        self.files = [Files() for _ in range(n)]
        self.said: list[Signed] = []
        self.kept: list[dict[bytes, bytes]] = [{} for _ in range(n)]
        self.forgotten: list[set[bytes]] = [set() for _ in range(n)]
        self.work: Callable[[int, Any], Any] = lambda _party, work: work
        generator = np.random.default_rng(n)
        pad = np.zeros(slices.padded(USED) - USED, np.uint32)
        self.x = [np.concatenate([generator.integers(0, 1 << 16, USED, np.uint32), pad]) for _ in range(n)]

    def hear(self, sender: int, signed: Signed, to: int | None) -> None:
        self.said.append(signed)
        for party in range(self.n):
            if party != sender and to in (None, party):
                self.parties[party].add(signed)

    def sum(self, turn: int = 0, *, k: int = 0, group: str = "", models: dict[int, bytes] | None = None) -> list[Ended]:
        """How a sum of all ends at each; afterwards no party has anything to say."""
        ended: dict[int, Ended] = {}
        params = names.params_hash(b"%d/%d" % (turn, k))
        of = names.group_of(CONTRACT, (group or f"turn {turn}").encode())
        for number, party in enumerate(self.parties):
            model = (models or {}).get(number, b"m" * 32)
            party.ask(Ask(("fit", turn, k), of, model, bytes(32), params, len(self.x[0]), USED), self.now)
        for _ in range(3000):
            busy = [self.advance(number, ended) for number in range(self.n)]
            if not any(busy):
                if len(ended) == self.n:
                    return [ended[number] for number in range(self.n)]
                times = [at for party in self.parties if (at := party.wake_at()) is not None]
                self.now = max(min(times), self.now + 1e-3)
        raise AssertionError(f"no end: {ended}")

    def advance(self, number: int, ended: dict[int, Ended]) -> bool:
        party = self.parties[number]
        step = party.advance(self.now)
        kept = self.kept[number] | step.keep
        self.kept[number] = {key: raw for key, raw in kept.items() if raw is not None}
        self.forgotten[number].update(step.forget)
        for signed, to in step.say:
            party.add(signed, logged=True)
            for letter in self.lie((signed, to)) if number == LIAR else [(signed, to)]:
                self.hear(number, *letter)
        for work in step.work:
            match work := self.work(number, work):
                case Mask() | Add() | Unmask():
                    party.done(work, perform(work, self.files[number], self.x[number]))
                case Fetch(digest=digest, party=holder):
                    if digest in self.files[holder]:
                        self.files[number][digest] = self.files[holder][digest]
                        party.done(work, True)
                case FetchTotal(sum_hash=digest, holders=holders):
                    self.files[number][digest] = self.files[holders[0]][digest]
                    party.done(work, True)
        ended.update((number, end) for end in step.ended)
        return bool(step)

    def check(self, ends: list[Ended], without: set[int]) -> None:
        """All have the same exact sum over all but these."""
        survivors = frozenset(range(self.n)) - without
        exact = sum(self.x[party].astype(np.uint64) for party in survivors)
        for end, files in zip(ends, self.files, strict=True):
            assert (end.status, end.survivors) == ("SUM", survivors)
            assert (vectors.unpack(files[end.sum_hash], 24) == exact).all()

    def of(self, kind: str) -> list[Any]:
        return [signed.message for signed in self.said if signed.kind == kind]


def again(letter: Letter, key: SigningKey, **changed: Any) -> Letter:
    """The same message with other fields, signed by this key."""
    message = letter[0].message
    fields = {name: changed.get(name, getattr(message, name)) for name in message.__struct_fields__[4:]}
    return sign(key, changed.get("sid", message.sid), message.kind, message.sender, *fields.values()), letter[1]


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
    other_kind = replace(forged, signature=mallory.sign("SUM", forged.body, label=LABEL))
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
