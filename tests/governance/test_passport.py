"""A model's passport: unaltered, and signed by all who made the model, or it says who is missing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from fedpeer.crypto import Secret
from fedpeer.errors import TrustError
from fedpeer.governance import passport
from fedpeer.governance.passport import File, Passport, Ran, Sums
from fedpeer.identity import Identity
from fedpeer.mesh import records

CAST = {name: Identity(Secret(name.encode().ljust(32))) for name in ("alice", "bob", "carol", "eve")}
MADE_BY = ("alice", "bob", "carol")
JOB = bytes(range(32))


def made(**other: Any) -> Passport:
    facts: dict[str, Any] = {
        "contract": JOB.hex(), "job": "breast", "purpose": "risk", "initiator": "alice",
        "participants": {name: CAST[name].id for name in MADE_BY}, "stage": "fit", "output": "model",
        "run": "horizontal.logistic:fit", "declaration": "ab", "params": {"reg_lambda": 0.1},
        "contributors": list(MADE_BY), "rounds": 9, "history": "cd", "sums": [], "sums_left_out": 0,
        "epsilon": 1.0, "delta": 1e-6, "model": "ef" * 32, "algorithm": "horizontal.logistic",
        "metrics": {"auc": 0.91}, "metrics_left_out": 0,
    }  # fmt: skip
    return Passport(**{**facts, **other})


def signature(name: str, document: Passport, **other: Any) -> bytes:
    place = {
        "scope": JOB, "kind": passport.PASSPORT, "slot": "fit.model", "sender": CAST[name].id,
        "body": passport.digest(passport.document(document)),
    }  # fmt: skip
    return records.sign(CAST[name].signing, records.Record(**{**place, **other})).raw


def file(document: Passport, *signers: str, raws: list[bytes] | None = None) -> File:
    return File(
        fedpeer_passport=1,
        passport=document,
        cards=[CAST[name].card(name).text for name in signers],
        signatures=raws if raws is not None else [signature(name, document) for name in signers],
    )


def verify(given: File) -> passport.Verified:
    return passport.verify(msgspec.json.encode(given))


def test_a_passport_is_signed_by_all_or_says_who_is_missing() -> None:
    assert verify(file(made(), *MADE_BY)).missing == []
    found = verify(file(made(), "alice", "carol"))
    assert found.missing == ["bob"]
    assert found.signed_by == [f"alice ({CAST['alice'].id})", f"carol ({CAST['carol'].id})"]
    assert verify(file(made())).missing == list(MADE_BY)


@pytest.mark.parametrize(
    "other",
    [
        {"epsilon": 0.5}, {"rounds": 8}, {"purpose": "other"}, {"model": "ee" * 32}, {"metrics": {"auc": 0.92}},
        {"contract": "00" * 32}, {"output": "other"}, {"stage": "other"}, {"contributors": ["alice", "bob"]},
    ],
)  # fmt: skip
def test_what_was_altered_after_it_was_signed_is_refused(other: dict[str, Any]) -> None:
    signed = file(made(), *MADE_BY)
    signed.passport = made(**other)
    with pytest.raises(TrustError):
        verify(signed)


def test_an_altered_card_is_told_as_one_of_the_passport() -> None:
    signed = file(made(), *MADE_BY)
    at = len(signed.cards[0]) // 2
    signed.cards[0] = signed.cards[0][:at] + ("A" if signed.cards[0][at] != "A" else "B") + signed.cards[0][at + 1 :]
    with pytest.raises(TrustError, match="a card in this passport was altered") as caught:
        verify(signed)
    assert "paste" not in str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        lambda: signature("alice", made(), kind="head"),
        lambda: signature("alice", made(), slot="fit.other"),
        lambda: signature("alice", made(), scope=b"x" * 32),
        lambda: signature("alice", made(), body=b"y" * 32),
        lambda: signature("alice", made(), sender=CAST["bob"].id),
        lambda: signature("eve", made()),
        lambda: signature("alice", made())[:-64],
        lambda: b"nothing",
    ],
    ids=["kind", "place", "contract", "document", "another's name", "a stranger", "unsigned", "nothing"],
)
def test_a_signature_counts_for_this_passport_by_its_signer_only(raw: Callable[[], bytes]) -> None:
    with pytest.raises(TrustError):
        verify(file(made(), *MADE_BY, "eve", raws=[raw()]))


def test_no_flipped_byte_gives_another_passport_that_verifies() -> None:
    whole = msgspec.json.encode(file(made(), *MADE_BY))
    told = passport.verify(whole)
    chance = random.Random(3)
    for at in chance.sample(range(len(whole)), 400):
        changed = bytearray(whole)
        changed[at] ^= 1 << chance.randrange(8)
        try:
            assert passport.verify(bytes(changed)) == told  # base64 has more than one form of some bytes
        except TrustError:
            continue
        assert at > whole.index(b'"signatures"')


def test_what_is_too_large_is_left_out_and_counted() -> None:
    facts = {"auc": 0.9, "coefficients": [1, 2], "text": "x" * 500, "k" * 300: 1, **{f"m{i:03}": i for i in range(100)}}
    kept, left_out = passport.metrics(facts)
    assert len(kept) == passport.MAX_METRICS
    assert left_out == len(facts) - len(kept)
    assert "auc" in kept
    many = Ran(3, [Sums(tuple(f"p{i}" for i in range(256)), turn, turn, 1) for turn in range(100)])
    sums, left_out = passport.sums(many)
    assert (len(sums), left_out) == (8, 92)
    with pytest.raises(TrustError, match="at most"):
        passport.document(made(purpose="x" * passport.MAX_DOCUMENT))
    with pytest.raises(TrustError, match="at most"):
        passport.verify(b"x" * (passport.MAX_FILE + 1))
