"""The keys, the context and the seeds of SA1: known answers, and what every seed depends on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeer.aggregation import keys
from fedpeer.crypto import DhKey, Secret, hash_
from fedpeer.errors import TrustError


@pytest.fixture(scope="module")
def known(shared: Path) -> dict[str, Any]:
    answers: dict[str, Any] = json.loads((shared / "vectors/secagg_kat.json").read_text())
    return answers


@pytest.fixture(scope="module")
def instance(known: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = known["group"]["instance_1_one_dropout_after_START"]
    return found


def test_the_hash_gives_the_known_answers(known: dict[str, Any]) -> None:
    answers = known["H"]
    assert hash_("fp.sa1.ctx", b"a", b"bc").hex() == answers['H("fp.sa1.ctx", "a", "bc")']
    assert hash_("fp.sa1.self", b"x", key=bytes(32)).hex() == answers['H("fp.sa1.self", "x"; key=32*00)']


def test_a_mask_key_is_the_known_one_of_its_secret(instance: dict[str, Any]) -> None:
    for entry in instance["keys"]["sets"]:
        assert keys.mask_key(Secret(bytes.fromhex(entry["sigma"]))).public.hex() == entry["pk"]


def test_root_and_context_are_the_known_ones(known: dict[str, Any], instance: dict[str, Any]) -> None:
    adverts = [instance["adv"][str(i)] for i in instance["U"]]
    ids = [keys.advert_id(bytes.fromhex(advert["body"])) for advert in adverts]
    assert [i.hex() for i in ids] == [advert["adv_id"] for advert in adverts]
    root = keys.advert_root(ids)
    assert root.hex() == instance["adv_root"]
    ctx = keys.context(
        bytes.fromhex(instance["sid"]),
        bytes.fromhex(known["names"]["h0"]),
        bytes.fromhex(known["names"]["params_hash"]),
        instance["U"],
        root,
        owners=instance["O"],
        pin=instance["pin"] or (),
    )
    assert ctx.hex() == instance["ctx"]


def test_pair_seeds_are_the_known_ones_at_both_ends(instance: dict[str, Any]) -> None:
    own = [keys.mask_key(Secret(bytes.fromhex(entry["sigma"]))) for entry in instance["keys"]["sets"]]
    ctx = bytes.fromhex(instance["ctx"])
    for me, key in enumerate(own):
        masks = keys.pair_masks(ctx, me, key, [other.public for other in own])
        others = [i for i in range(len(own)) if i != me]
        assert [mask.sign for mask in masks] == [1 if i > me else -1 for i in others]
        for other, mask in zip(others, masks, strict=True):
            name = f"{min(me, other)}-{max(me, other)}"
            assert mask.seed.reveal().hex() == instance["keys"]["pair_seeds"][name]


def test_public_keys_of_low_order_are_not_usable(known: dict[str, Any]) -> None:
    assert known["refused_public_keys"]
    for refused in known["refused_public_keys"]:
        assert not keys.is_usable(bytes.fromhex(refused))


@pytest.mark.parametrize("public", [bytes(32), b"\x01" + bytes(31), b"", b"\x09" * 31, b"\x09" * 33])
def test_public_keys_of_wrong_length_are_not_usable(public: bytes) -> None:
    assert not keys.is_usable(public)
    with pytest.raises(TrustError):
        DhKey.random().exchange(public)
    assert keys.is_usable(DhKey.random().public)


PARTS = ["sid", "history", "params", "who", "root", "owners", "pin"]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), n=st.integers(3, 10), changed=st.sampled_from(PARTS))
def test_a_seed_depends_on_everything_the_parties_must_agree_on(data: st.DataObject, n: int, changed: str) -> None:
    digest = st.binary(min_size=32, max_size=32)
    groups = st.sets(st.integers(0, n - 1), max_size=n)
    facts: dict[str, Any] = {
        name: data.draw(groups if name in ("who", "owners", "pin") else digest, label=name) for name in PARTS
    }
    other = dict(facts)
    strategy = groups if changed in ("who", "owners", "pin") else digest
    other[changed] = data.draw(strategy.filter(lambda value: value != facts[changed]), label="another")

    def seed(f: dict[str, Any]) -> bytes:
        ctx = keys.context(f["sid"], f["history"], f["params"], f["who"], f["root"], owners=f["owners"], pin=f["pin"])
        return keys.pair_seed(ctx, 0, 1, alice, bob.public).reveal()

    alice, bob = keys.mask_key(Secret(b"a" * 32)), keys.mask_key(Secret(b"b" * 32))
    assert seed(facts) != seed(other)


def test_a_seed_depends_on_both_keys_and_both_places() -> None:
    alice, bob, carol = (keys.mask_key(Secret(letter * 32)) for letter in (b"a", b"b", b"c"))
    seeds = [
        keys.pair_seed(bytes(32), 0, 1, alice, bob.public),
        keys.pair_seed(bytes(32), 1, 0, alice, bob.public),
        keys.pair_seed(bytes(32), 0, 2, alice, bob.public),
        keys.pair_seed(bytes(32), 0, 1, alice, carol.public),
        keys.pair_seed(bytes(32), 0, 1, carol, bob.public),
    ]
    assert len({seed.reveal() for seed in seeds}) == len(seeds)


def test_neither_a_mask_nor_a_key_shows_its_secret() -> None:
    key = keys.mask_key(Secret(b"a" * 32))
    mask = keys.PairMask(1, Secret(b"\xab" * 32))
    assert "abab" not in repr(mask)
    assert hash_("fp.sa1.sk", key=b"a" * 32).hex() not in repr(key)
