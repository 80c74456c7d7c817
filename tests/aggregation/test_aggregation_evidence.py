"""Evidence: each crime convicts its author, from the messages alone; whatever honest parties say convicts nobody."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeer import codec
from fedpeer.aggregation import evidence, messages, names
from fedpeer.aggregation.evidence import Dealt, Place, bad_dealing, contradiction, convict, two_releases
from fedpeer.aggregation.keyset import KeySet, Which, share_body, share_digests
from fedpeer.aggregation.messages import Evidence, Signed, StartValue
from fedpeer.crypto import Secret, SigningKey, hash_

CONTRACT = hash_("fp.test", b"contract")
GROUP = names.group_of(CONTRACT, b"")
PROFILE = names.profile(5)  # t = 4
SIGNERS = [SigningKey(Secret(hash_("fp.test", names.u32(party)))) for party in range(5)]
PUBLICS = [signer.public for signer in SIGNERS]
PARAMS = codec.encode([1, ["fit", 0, 0], bytes(32), [], 24, 16, "aegis256", "byz", 1, 4, 4, 1, 4, "data", "group"])
FREE = codec.encode([1, ["fit", 0, 0], bytes(32), [], 24, 16, "aegis256", "byz", 1, 4, 4, 1, 4, "data", "none"])
A, B = bytes(32), b"\1" * 32
CULPRIT = 2


def sid(seq: int = 0) -> bytes:
    return names.sid_of(CONTRACT, GROUP, seq)


def said(kind: str, *fields: Any, by: int = CULPRIT, seq: int = 0) -> Signed:
    return messages.sign(SIGNERS[by], sid(seq), kind, by, *fields)


def judged(kind: str, raws: list[bytes], profile: names.Profile = PROFILE) -> int | None:
    sent = messages.sign(SIGNERS[4], sid(), "EVIDENCE", 4, kind, raws)  # as it travels
    received = messages.parse(sent.raw).message
    assert isinstance(received, Evidence)
    return convict(received, profile, PUBLICS, CONTRACT)


def bits(*parties: int) -> bytes:
    return names.bitmap(parties, 5)


def place(seq: int, params: bytes = PARAMS, pin: bytes | None = None) -> Place:
    return Place(seq, StartValue("U", A, names.params_hash(params), bits(*range(5)), bits(0, 1), A, pin, None), params)


def ctx(seq: int, params: bytes = PARAMS, pin: tuple[int, ...] | None = None) -> bytes:
    return names.context(sid(seq), A, names.params_hash(params), range(5), (0, 1), A, pin)


def release(seq: int, *survivors: int, params: bytes = PARAMS, by: int = CULPRIT) -> Signed:
    return said("RELEASE", ctx(seq, params), bits(*survivors), [], by=by, seq=seq)


SHARED: list[Any] = ["START", 1, ["U"], None]
PAIRS: list[tuple[str, Signed, Signed]] = [
    ("E1", said("PREVOTE", "START", 0, A), said("PREVOTE", "START", 0, B)),
    ("E1", said("PREVOTE", "COMMIT", 3, A), said("PREVOTE", "COMMIT", 3, None)),
    ("E1", said("PRECOMMIT", "COMMIT", 0, None), said("PRECOMMIT", "COMMIT", 0, B)),
    ("E2", said("PROPOSAL", *SHARED), said("PROPOSAL", "START", 1, ["V"], None)),
    ("E2", said("PROPOSAL", *SHARED), said("PROPOSAL", "START", 1, ["U"], 0)),
    ("E2", said("CUT", A, 0, bits(0, 1, 2, 3)), said("CUT", A, 0, bits(0, 1, 2, 4))),
    ("E3", said("SUM", A, bits(0, 1, 2, 3), 1, A), said("SUM", A, bits(0, 1, 2, 3), 1, B)),
    ("E4", said("SCATTER", A, 1, 768, A), said("SCATTER", A, 1, 768, B)),
    ("E6", release(0, 0, 1, 2, 3), release(0, 0, 1, 2, 4)),
    ("E6", release(0, 0, 1, 2, 3), release(0)),
    ("E7", said("ADVERTISE", 0, A, B, A), said("ADVERTISE", 0, A, B, B)),
]
HONEST: list[tuple[Signed, Signed]] = [
    (said("PREVOTE", "START", 0, A), said("PREVOTE", "START", 0, A)),
    (said("PREVOTE", "START", 0, A), said("PREVOTE", "START", 1, B)),
    (said("PREVOTE", "START", 0, A), said("PREVOTE", "COMMIT", 0, B)),
    (said("PREVOTE", "START", 0, None), said("PRECOMMIT", "START", 0, B)),
    (said("PREVOTE", "START", 0, A), said("PREVOTE", "START", 0, B, seq=1)),
    (said("PREVOTE", "START", 0, A), said("PREVOTE", "START", 0, B, by=1)),
    (said("PROPOSAL", *SHARED), said("PROPOSAL", "START", 2, ["V"], 1)),
    (said("PROPOSAL", *SHARED), said("PROPOSAL", "COMMIT", 1, ["V"], None)),
    (said("CUT", A, 0, bits(0, 1, 2, 3)), said("CUT", A, 1, bits(0, 1, 2, 4))),
    (said("SUM", A, bits(0, 1, 2, 3), 1, A), said("SUM", A, bits(0, 1, 2, 4), 1, B)),
    (said("SUM", A, bits(0, 1, 2, 3), 1, A), said("SUM", A, bits(0, 1, 2, 3), 0, B)),
    (said("SCATTER", A, 1, 768, A), said("SCATTER", A, 0, 768, B)),
    (release(0, 0, 1, 2, 3), release(0, 0, 1, 2, 3)),
    (release(0), release(1, 0, 1, 2, 3)),
    (said("ADVERTISE", 0, A, B, A), said("ADVERTISE", 1, A, B, B)),
    (said("RECEIPT", A, 0, bits(0)), said("RECEIPT", A, 0, bits(1))),
    (said("ACK", 0, []), said("ACK", 0, [[1, bytes(16)]])),
    (said("READY", ["fit", 0, 0], A, A, A), said("READY", ["fit", 0, 0], B, A, A)),
    (said("FINAL", A, bits(0, 1, 2, 3), 0, A), said("FINAL", A, bits(0, 1, 2, 3), 1, A)),
    (said("OPEN", 1, bytes(16), "b", A), said("OPEN", 1, bytes(16), "b", B)),
]


@pytest.mark.parametrize(("kind", "a", "b"), PAIRS)
def test_two_statements_that_no_honest_party_makes_convict(kind: str, a: Signed, b: Signed) -> None:
    assert contradiction(a, b) == contradiction(b, a) == kind
    assert judged(kind, [a.raw, b.raw]) == judged(kind, [b.raw, a.raw]) == CULPRIT
    for other in ("E1", "E2", "E3", "E4", "E5", "E6", "E7", "E8", "xx"):
        assert judged(other, [a.raw, b.raw]) == (CULPRIT if other == kind else None)


@pytest.mark.parametrize(("a", "b"), HONEST)
def test_two_statements_of_an_honest_party_do_not(a: Signed, b: Signed) -> None:
    assert contradiction(a, b) is None
    for kind in ("E1", "E2", "E3", "E4", "E5", "E6", "E7"):
        assert judged(kind, [a.raw, b.raw]) is None


@pytest.mark.parametrize(("kind", "a", "b"), PAIRS)
def test_what_its_author_did_not_sign_convicts_nobody(kind: str, a: Signed, b: Signed) -> None:
    forged = b.body + SIGNERS[4].sign(b.kind, b.body, label=messages.LABEL)
    another_label = b.body + SIGNERS[CULPRIT].sign(b.kind, b.body)
    another_kind = b.body + SIGNERS[CULPRIT].sign("SHARE", b.body, label=messages.LABEL)
    for raw in (forged, another_label, another_kind, b.body + a.signature, b.raw[:-1], b.raw + b"\0", b"", a.raw):
        assert judged(kind, [a.raw, raw]) is None
        assert judged(kind, [raw, a.raw]) is None
    assert judged(kind, []) is None
    assert judged(kind, [a.raw]) is None
    assert judged(kind, [a.raw, b.raw, a.raw]) is None


def test_against_a_party_that_is_convicted_already_nothing_more_is_looked_at() -> None:
    kind, a, b = PAIRS[0]
    given = messages.Evidence(1, bytes(32), "EVIDENCE", 0, kind, [a.raw, b.raw])
    others = set(range(len(PUBLICS))) - {CULPRIT}
    assert convict(given, PROFILE, PUBLICS, CONTRACT, others) == CULPRIT
    assert convict(given, PROFILE, PUBLICS, CONTRACT, {CULPRIT}) is None


def test_a_party_that_does_not_exist_is_not_convicted() -> None:
    stranger = [messages.sign(SIGNERS[0], sid(), "PREVOTE", 7, "START", 0, value).raw for value in (A, B)]
    assert judged("E1", stranger) is None


@given(st.integers(0, len(PAIRS) - 1), st.integers(0, 2000), st.booleans())
@settings(max_examples=300)
def test_a_flipped_bit_convicts_nobody(index: int, bit: int, first: bool) -> None:
    kind, a, b = PAIRS[index]
    raw = bytearray(a.raw)
    raw[bit // 8 % len(raw)] ^= 1 << bit % 8
    assert judged(kind, [bytes(raw), b.raw] if first else [b.raw, bytes(raw)]) is None


# E6 in one group


def test_two_survivor_sets_in_one_group_convict() -> None:
    a, b = release(0, 0, 1, 2, 3), release(3, 0, 1, 2, 4)
    raws = two_releases(a, b, GROUP, (place(0), place(3)))
    assert judged("E6", raws) == CULPRIT
    pinned = said("RELEASE", ctx(3, pin=(0, 1, 2, 4)), bits(0, 1, 2, 4), [], seq=3)
    assert judged("E6", two_releases(a, pinned, GROUP, (place(0), place(3, pin=bits(0, 1, 2, 4))))) == CULPRIT


ONE, TWO = release(0, 0, 1, 2, 3), release(3, 0, 1, 2, 4)
GROUPS: list[tuple[str, Callable[[], list[bytes]]]] = [
    ("the same set", lambda: two_releases(ONE, release(3, 0, 1, 2, 3), GROUP, (place(0), place(3)))),
    ("after an abort", lambda: two_releases(release(0), TWO, GROUP, (place(0), place(3)))),
    ("two parties", lambda: two_releases(ONE, release(3, 0, 1, 2, 4, by=1), GROUP, (place(0), place(3)))),
    ("another group", lambda: two_releases(ONE, TWO, A, (place(0), place(3)))),
    ("a group that is none", lambda: two_releases(ONE, TWO, b"", (place(0), place(3)))),
    ("another seq", lambda: two_releases(ONE, TWO, GROUP, (place(0), place(2)))),
    ("places exchanged", lambda: two_releases(ONE, TWO, GROUP, (place(3), place(0)))),
    ("another pin", lambda: two_releases(ONE, TWO, GROUP, (place(0), place(3, pin=bits(0, 1, 2, 4))))),
    (
        "sums that may have any survivors",
        lambda: two_releases(
            release(0, 0, 1, 2, 3, params=FREE),
            release(3, 0, 1, 2, 4, params=FREE),
            GROUP,
            (place(0, FREE), place(3, FREE)),
        ),
    ),
    (
        "one of which may",
        lambda: two_releases(release(0, 0, 1, 2, 3, params=FREE), TWO, GROUP, (place(0, FREE), place(3))),
    ),
    (
        "which is denied",
        lambda: two_releases(release(0, 0, 1, 2, 3, params=FREE), TWO, GROUP, (place(0), place(3))),
    ),
    (
        "parameters that are not those of START",
        lambda: two_releases(
            release(0, 0, 1, 2, 3, params=FREE), TWO, GROUP, (Place(0, place(0, FREE).start, PARAMS), place(3))
        ),
    ),
    ("no places", lambda: [ONE.raw, TWO.raw, GROUP]),
    ("one place", lambda: [ONE.raw, TWO.raw, GROUP, codec.encode(place(0))]),
    ("three places", lambda: [*two_releases(ONE, TWO, GROUP, (place(0), place(3))), codec.encode(place(3))]),
    ("places that are none", lambda: [ONE.raw, TWO.raw, GROUP, b"", b"\xc0"]),
    ("nothing between", lambda: [ONE.raw, TWO.raw]),
    ("twice the same", lambda: two_releases(ONE, ONE, GROUP, (place(0), place(0)))),
    (
        "no releases",
        lambda: two_releases(
            said("CUT", ctx(0), 0, bits(0, 1, 2, 3)),
            said("CUT", ctx(3), 0, bits(0, 1, 2, 4), seq=3),
            GROUP,
            (place(0), place(3)),
        ),
    ),
]


@pytest.mark.parametrize(("name", "raws"), GROUPS, ids=[name for name, _ in GROUPS])
def test_releases_that_an_honest_party_may_sign_do_not(name: str, raws: Callable[[], list[bytes]]) -> None:
    assert judged("E6", raws()) is None


def test_a_set_with_parties_that_do_not_exist_is_none() -> None:
    odd = said("RELEASE", ctx(3), b"\x0f\x00", [], seq=3)
    assert judged("E6", two_releases(ONE, odd, GROUP, (place(0), place(3)))) is None


def test_the_largest_releases_are_evidence_too() -> None:
    entries = [[party, b"\xff" * 32, b"\xff" * 32, b"\xff" * 64] for party in range(100, 200)]
    profile = names.profile(200)
    signers = [SIGNERS[0]] * 200
    raws = []
    for last in (150, 151):
        survivors = names.bitmap([*range(100), last], 200)
        body = messages.sign(signers[199], sid(), "RELEASE", 199, ctx(0), survivors, entries)
        raws.append(body.raw)
    received = messages.parse(messages.sign(SIGNERS[4], sid(), "EVIDENCE", 4, "E6", raws).raw).message
    assert convict(received, profile, [signer.public for signer in signers], CONTRACT) == 199


# E5


class Dealer:
    """Keys of the culprit, its shares for everybody, and what it signed."""

    def __init__(self, t: int = 4, n: int = 5, *, off: int | None = None, which: Which = "b") -> None:
        draws = itertools.count()
        self.keys = KeySet.fresh(CULPRIT, sid(), 0, lambda size: hash_("fp.test", names.u32(next(draws)), size=size))
        self.advert = said("ADVERTISE", *self.keys.advertise_fields)
        self.shares: list[dict[Which, Dealt]] = []
        for holder in range(n):
            share_b = self.keys._share("b", self.keys.b, holder, t)
            share_s = self.keys._share("s", self.keys.sigma, holder, t) if n > 3 else bytes(32)
            if holder == off:
                wrong = bytes([(share_b if which == "b" else share_s)[0] ^ 1])
                share_b, share_s = (wrong + share_b[1:], share_s) if which == "b" else (share_b, wrong + share_s[1:])
            dig_b, dig_s = share_digests(share_b, share_s)
            signature = self.signed(share_body(sid(), self.keys.adv_id, holder, dig_b, dig_s))
            self.shares.append(
                {"b": Dealt(holder, "b", share_b, dig_s, signature), "s": Dealt(holder, "s", share_s, dig_b, signature)}
            )

    @staticmethod
    def signed(body: bytes) -> bytes:
        return SIGNERS[CULPRIT].sign("SHARE", body, label=messages.LABEL)

    def raws(self, which: Which, *holders: int) -> list[bytes]:
        return bad_dealing(self.advert, [self.shares[holder][which] for holder in holders])


@pytest.mark.parametrize("which", ["b", "s"])
def test_a_dealer_of_shares_that_open_something_else_is_convicted(which: Which) -> None:
    bad, other = Dealer(off=1, which=which), "s" if which == "b" else "b"
    for holders in itertools.combinations(range(5), 4):
        assert judged("E5", bad.raws(which, *holders)) == (CULPRIT if 1 in holders else None)
        assert judged("E5", bad.raws(other, *holders)) is None


@pytest.mark.parametrize("which", ["b", "s"])
def test_an_honest_dealer_is_not(which: Which) -> None:
    honest = Dealer()
    for count in range(6):
        for holders in itertools.permutations(range(5), count):
            assert judged("E5", honest.raws(which, *holders)) is None
    for holders in itertools.product(range(5), repeat=4):
        if len(set(holders)) < 4:
            assert judged("E5", honest.raws(which, *holders)) is None


def test_zeros_in_the_place_of_a_sigma_that_is_not_shared_do_not_convict() -> None:
    three = names.profile(3)
    honest = Dealer(t=2, n=3)
    assert judged("E5", honest.raws("s", 0, 1), three) is None
    assert judged("E5", honest.raws("b", 0, 1), three) is None
    assert judged("E5", Dealer(t=2, n=3, off=1).raws("b", 0, 1), three) == CULPRIT


def test_shares_that_are_not_of_one_dealing_do_not_convict() -> None:
    bad = Dealer(off=1)
    raws = bad.raws("b", 0, 1, 2, 3)
    assert judged("E5", raws) == CULPRIT
    mixed = [bad.shares[0]["b"], bad.shares[1]["b"], bad.shares[2]["b"], bad.shares[3]["s"]]
    again = said("ADVERTISE", 1, *bad.keys.advertise_fields[1:])
    another = messages.sign(SIGNERS[1], sid(), "ADVERTISE", 1, *bad.keys.advertise_fields)
    elsewhere = said("ADVERTISE", *bad.keys.advertise_fields, seq=1)
    right = bad.shares[1]["b"]
    changes = [
        Dealt(4, "b", right.share, right.other, right.signature),
        Dealt(199, "b", right.share, right.other, right.signature),
        Dealt(1, "s", right.share, right.other, right.signature),
        Dealt(1, "b", right.other, right.share, right.signature),
        Dealt(1, "b", b"\xff" * 32, right.other, right.signature),
        Dealt(1, "b", right.share, bytes(32), right.signature),
        Dealt(1, "b", right.share, right.other, bytes(64)),
    ]
    refused = [
        bad_dealing(bad.advert, mixed),
        *([new.raw, *raws[1:]] for new in (again, another, elsewhere, said("CUT", A, 0, bits(0)))),
        *([raws[0], raws[1], codec.encode(change), *raws[3:]] for change in changes),
        raws[:-1],
        [*raws, raws[1]],
        [*raws, codec.encode(bad.shares[4]["b"])],
        [*raws[:-1], b""],
        [*raws[:-1], raws[-1] + b"\0"],
        [raws[0]],
    ]
    for case in refused:
        assert judged("E5", case) is None


def test_a_share_beyond_the_field_that_its_dealer_signed_is_ignored() -> None:
    bad = Dealer()
    share = b"\xff" * 32
    dig_b, dig_s = share_digests(share, bytes(32))
    signature = bad.signed(share_body(sid(), bad.keys.adv_id, 0, dig_b, dig_s))
    shares = [Dealt(0, "b", share, dig_s, signature), *(bad.shares[holder]["b"] for holder in (1, 2, 3))]
    assert judged("E5", bad_dealing(bad.advert, shares)) is None


# whatever is said


@given(
    st.sampled_from(["E1", "E2", "E3", "E4", "E5", "E6", "E7", "", "E0"]), st.lists(st.binary(max_size=300), max_size=8)
)
def test_nothing_escapes_from_what_is_no_evidence(kind: str, raws: list[bytes]) -> None:
    made = Evidence(1, A, "EVIDENCE", 0, kind, raws)
    assert convict(made, PROFILE, PUBLICS, CONTRACT) is None


def test_no_pair_out_of_an_honest_life_convicts() -> None:
    """One statement for each slot, in two instances of a group, all in the words of one party."""
    life: list[Signed] = []
    for seq in (0, 1):
        honest = [
            ("ADVERTISE", 0, A, B, hash_("fp.test", names.u32(seq))),
            ("ADVERTISE", 1, B, A, A),
            *(("PREVOTE", stage, view, A if view else None) for stage in ("START", "COMMIT") for view in (0, 1)),
            *(("PRECOMMIT", stage, view, B if view else None) for stage in ("START", "COMMIT") for view in (0, 1)),
            *(("PROPOSAL", stage, view, [stage, view], None) for stage in ("START", "COMMIT") for view in (0, 1)),
            *(("CUT", A, view, bits(0, 1, 2, 3 + view)) for view in (0, 1)),
            *(("SCATTER", A, chunk, 768, bytes([chunk]) * 32) for chunk in (0, 1)),
            *(("SUM", A, bits(0, 1, 2, 3 + c), d, bytes([c, d]) * 16) for c in (0, 1) for d in (0, 1)),
            *(("RECEIPT", A, counter, bits(*range(counter))) for counter in range(3)),
            ("RELEASE", ctx(seq), bits(0, 1, 2, 3) if seq else bits(), []),
            ("FINAL", A, bits(0, 1, 2, 3), 0, A),
        ]
        life += [said(kind, *fields, seq=seq) for kind, *fields in honest]
    for a, b in itertools.product(life, repeat=2):
        kind = contradiction(a, b)
        assert kind is None
        if a.kind == b.kind:
            assert all(judged(e, [a.raw, b.raw]) is None for e in ("E1", "E2", "E3", "E4", "E6", "E7"))
    releases = [signed for signed in life if signed.kind == "RELEASE"]
    assert judged("E6", two_releases(releases[0], releases[1], GROUP, (place(0), place(1)))) is None
    assert evidence.PINNED == "group"
