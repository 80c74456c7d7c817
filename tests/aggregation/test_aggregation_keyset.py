"""Key sets: shares that come out as they were dealt or not at all; seeds bound to everything; nothing shown."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeer import codec
from fedpeer.aggregation import keyset, messages, names, shamir
from fedpeer.aggregation.keyset import HeldShare, KeySet
from fedpeer.crypto import Secret, SigningKey, hash_
from fedpeer.errors import LocalProtocolError, StoreError, TrustError
from fedpeer.testing.uniformity import looks_uniform

SID, OTHER_SID = hash_("fp.test", b"sid"), hash_("fp.test", b"another sid")
N, T = 5, 4


class Chance:
    """Bytes that are the same in every run."""

    def __init__(self, *names_: bytes) -> None:
        self.numbers, self.names = itertools.count(), names_

    def __call__(self, size: int) -> bytes:
        return hash_("fp.test", *self.names, names.u32(next(self.numbers)), size=size)


def keys_of(party: int, sid: bytes = SID, inc: int = 0) -> KeySet:
    return KeySet.fresh(party, sid, inc, Chance(sid, names.u32(party), names.u32(inc)))


SIGNERS = [SigningKey(Secret(hash_("fp.test", b"id", names.u32(party)))) for party in range(N)]
KEYS = [keys_of(party) for party in range(N)]


def dealt(dealer: KeySet, holder: KeySet, t: int = T, n: int = N) -> bytes:
    return dealer.share_for(holder.party, holder.adv_id, holder.epk, t, n, SIGNERS[dealer.party])


def opened(holder: KeySet, dealer: KeySet, ciphertext: bytes, n: int = N) -> HeldShare:
    public = SIGNERS[dealer.party].public
    return holder.open_share(dealer.party, dealer.adv_id, dealer.epk, ciphertext, public, n)


# keys


def test_fresh_keys_draw_again_what_is_no_element() -> None:
    too_big = b"\xff" * 32
    draws = [too_big, bytes([1]) * 32, too_big, too_big, bytes([2]) * 31 + b"\x82", bytes([3]) * 32, bytes([4]) * 32]
    keys = KeySet.fresh(1, SID, 0, lambda _size: draws.pop(0))
    assert keys.sigma.reveal() == bytes([1]) * 32
    assert keys.b.reveal() == bytes([2]) * 31 + b"\x02"  # the top bit is cleared, not refused
    assert keys.e == Secret(bytes([3]) * 32)
    assert keys.seed == Secret(bytes([4]) * 32)


def test_the_advert_id_is_that_of_the_message() -> None:
    keys = keys_of(2, inc=7)
    advert = messages.sign(SIGNERS[2], SID, "ADVERTISE", 2, *keys.advertise_fields)
    assert keys.adv_id == names.advert_id(advert.body)
    assert keyset.is_secret_of(advert.message, "b", keys.b)
    assert keyset.is_secret_of(advert.message, "s", keys.sigma)
    assert not keyset.is_secret_of(advert.message, "b", keys.sigma)
    assert not keyset.is_secret_of(advert.message, "s", keys.b)
    assert not keyset.is_secret_of(advert.message, "b", Secret(keys.b.reveal() + b"\0"))
    another = messages.sign(SIGNERS[1], SID, "ADVERTISE", 1, *keys.advertise_fields)
    assert not keyset.is_secret_of(another.message, "b", keys.b)  # hb is of one party


def test_nothing_of_a_key_set_is_shown() -> None:
    keys = keys_of(0)
    held = opened(keys, KEYS[1], dealt(KEYS[1], keys))
    dealt(keys, KEYS[1])  # the coefficients are kept now
    shown = repr(keys) + str(keys) + f"{keys}" + repr(held) + repr(vars(held)["share_b"])
    assert keys.e is not None
    secrets = [keys.sigma, keys.b, keys.e, keys.seed, held.share_b, held.share_s]
    for secret in [*(secret.reveal() for secret in secrets), *keys.coefficients("b", T), *keys.coefficients("s", T)]:
        assert secret.hex() not in shown
        assert repr(secret)[2:-1] not in shown


# in the store


def test_a_key_set_from_the_store_deals_the_same_bytes() -> None:
    keys = keys_of(3)
    ciphertexts = [dealt(keys, holder) for holder in KEYS]
    again = KeySet.from_bytes(keys.to_bytes())
    assert again.to_bytes() == keys.to_bytes()
    assert [dealt(again, holder) for holder in reversed(KEYS)] == ciphertexts[::-1]
    again.erase_e()
    final = KeySet.from_bytes(again.to_bytes())
    assert keys.e is not None
    assert keys.e.reveal() not in again.to_bytes()
    assert final.adv_id == keys.adv_id
    for act in (lambda: dealt(final, KEYS[0]), lambda: opened(final, KEYS[0], dealt(KEYS[0], keys))):
        with pytest.raises(LocalProtocolError, match="after START"):
            act()


def test_a_share_from_the_store_is_the_same() -> None:
    held = opened(KEYS[0], KEYS[1], dealt(KEYS[1], KEYS[0]))
    again = HeldShare.from_bytes(held.to_bytes())
    assert again.to_bytes() == held.to_bytes()
    assert (again.opened("b"), again.opened("s")) == (held.opened("b"), held.opened("s"))


def changed(raw: bytes, place: int, value: Any) -> bytes:
    fields = codec.decode(raw)
    fields[place] = value
    return codec.encode(fields)


STORED = KEYS[0].to_bytes()
PRIME = shamir.P.to_bytes(32, "little")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        STORED[:-1],
        STORED + b"\0",
        codec.encode([*codec.decode(STORED), 0]),
        changed(STORED, 0, 2),
        changed(STORED, 1, 200),
        changed(STORED, 2, bytes(31)),
        changed(STORED, 3, -1),
        changed(STORED, 4, PRIME),
        changed(STORED, 5, PRIME),
        changed(STORED, 6, bytes(32)),  # not the e of this epk
        changed(STORED, 8, bytes(33)),
    ],
)
def test_a_damaged_key_set_is_an_error_of_the_store(raw: bytes) -> None:
    with pytest.raises(StoreError):
        KeySet.from_bytes(raw)
    with pytest.raises(StoreError):
        HeldShare.from_bytes(raw)


# shares


@pytest.mark.parametrize("dealer", range(N))
def test_any_t_holders_open_what_was_dealt(dealer: int) -> None:
    keys = KEYS[dealer]
    held = [opened(holder, keys, dealt(keys, holder)) for holder in KEYS]  # the dealer itself too
    for holders in itertools.combinations(range(N), T):
        weights = shamir.Weights(holders)
        assert weights.interpolate([held[i].share_b.reveal() for i in holders]) == keys.b.reveal()
        assert weights.interpolate([held[i].share_s.reveal() for i in holders]) == keys.sigma.reveal()
    for holder, share in enumerate(held):
        for which in ("b", "s"):
            of, value, other, signature = share.opened(which)
            public = SIGNERS[dealer].public
            keyset.check_opened(SID, of, keys.adv_id, holder, which, value, other, signature, public)


def test_of_three_parties_sigma_is_never_shared() -> None:
    ciphertext = dealt(KEYS[0], KEYS[1], t=2, n=3)
    held = opened(KEYS[1], KEYS[0], ciphertext, n=3)
    assert held.share_s.reveal() == bytes(32)
    assert held.share_b.reveal() != bytes(32)
    with pytest.raises(LocalProtocolError):
        held.opened("s")
    with pytest.raises(TrustError, match="party 0"):  # among more than three a dealer must deal it
        opened(KEYS[1], KEYS[0], ciphertext, n=4)
    with pytest.raises(TrustError, match="party 0"):  # and among three it must not
        opened(KEYS[1], KEYS[0], dealt(KEYS[0], KEYS[1], t=2, n=4), n=3)


CIPHERTEXT = dealt(KEYS[0], KEYS[1])


@given(st.integers(0, 8 * len(CIPHERTEXT) - 1))
def test_any_flipped_bit_of_a_share_is_seen(bit: int) -> None:
    flipped = bytearray(CIPHERTEXT)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(TrustError, match="party 0"):
        opened(KEYS[1], KEYS[0], bytes(flipped))


def test_a_share_is_for_one_holder_one_instance_and_one_key_set() -> None:
    dealer, public = KEYS[0], SIGNERS[0].public
    later = keys_of(1, inc=1)
    elsewhere = keys_of(1, OTHER_SID)
    refused = [
        lambda: opened(KEYS[2], dealer, CIPHERTEXT),  # another holder
        lambda: opened(later, dealer, CIPHERTEXT),  # its keys after a restart
        lambda: opened(elsewhere, keys_of(0, OTHER_SID), CIPHERTEXT),  # another instance
        lambda: opened(replace(KEYS[1], sid=OTHER_SID), dealer, CIPHERTEXT),
        lambda: opened(KEYS[1], keys_of(0, inc=1), CIPHERTEXT),  # other keys of the dealer
        lambda: KEYS[1].open_share(2, dealer.adv_id, dealer.epk, CIPHERTEXT, public, N),  # another dealer
        lambda: KEYS[1].open_share(0, bytes(16), dealer.epk, CIPHERTEXT, public, N),
        lambda: KEYS[1].open_share(0, dealer.adv_id, KEYS[2].epk, CIPHERTEXT, public, N),
        lambda: KEYS[1].open_share(0, dealer.adv_id, bytes(32), CIPHERTEXT, public, N),  # of low order
        lambda: KEYS[1].open_share(0, dealer.adv_id, bytes(31), CIPHERTEXT, public, N),
        lambda: KEYS[1].open_share(0, dealer.adv_id, dealer.epk, CIPHERTEXT, SIGNERS[2].public, N),
        lambda: opened(KEYS[1], dealer, b""),
        lambda: opened(KEYS[1], dealer, CIPHERTEXT[:-1]),
        lambda: opened(KEYS[1], dealer, CIPHERTEXT + b"\0"),
    ]
    for act in refused:
        with pytest.raises(TrustError):
            act()


GOOD = codec.decode(
    KEYS[1]
    ._share_key(0, 1, KEYS[0].epk, KEYS[1].epk)
    .open(bytes(12), CIPHERTEXT, KEYS[1]._associated(0, KEYS[0].adv_id, KEYS[1].adv_id))
)


def signed_shares(share_b: bytes, share_s: bytes, holder: int = 1, sid: bytes = SID) -> list[bytes]:
    body = keyset.share_body(sid, KEYS[0].adv_id, holder, *keyset.share_digests(share_b, share_s))
    return [share_b, share_s, SIGNERS[0].sign("SHARE", body, label="fp.sa1.sig")]


@pytest.mark.parametrize(
    "plaintext",
    [
        [GOOD[0], GOOD[1]],
        [*GOOD, 0],
        [GOOD[0], GOOD[1], GOOD[2][:-1]],
        [GOOD[0], GOOD[1], bytes(64)],
        [GOOD[1], GOOD[0], GOOD[2]],  # signed the other way round
        [GOOD[0], GOOD[0], GOOD[2]],
        [GOOD[0][:31], GOOD[1], GOOD[2]],
        [GOOD[0].hex(), GOOD[1], GOOD[2]],
        signed_shares(PRIME, GOOD[1]),
        signed_shares(GOOD[0], PRIME),
        signed_shares(GOOD[0], b"\xff" * 32),
        signed_shares(GOOD[0], bytes(32)),  # none, where σ is shared
        signed_shares(GOOD[0], GOOD[1], holder=2),
        signed_shares(GOOD[0], GOOD[1], sid=OTHER_SID),
        {"b": GOOD[0]},
        None,
    ],
)
def test_a_dealer_that_seals_something_else_is_refused(plaintext: Any) -> None:
    key = KEYS[1]._share_key(0, 1, KEYS[0].epk, KEYS[1].epk)
    associated = KEYS[1]._associated(0, KEYS[0].adv_id, KEYS[1].adv_id)
    sealed = key.seal(bytes(12), codec.encode(plaintext), associated)
    with pytest.raises(TrustError, match="party 0"):
        opened(KEYS[1], KEYS[0], sealed)


def test_the_sealing_above_is_what_is_accepted() -> None:
    key = KEYS[1]._share_key(0, 1, KEYS[0].epk, KEYS[1].epk)
    associated = KEYS[1]._associated(0, KEYS[0].adv_id, KEYS[1].adv_id)
    plaintext = codec.encode(signed_shares(GOOD[0], GOOD[1]))
    assert opened(KEYS[1], KEYS[0], key.seal(bytes(12), plaintext, associated)).share_b == Secret(GOOD[0])


def test_an_opened_share_is_checked_against_its_dealer() -> None:
    held = opened(KEYS[1], KEYS[0], CIPHERTEXT)
    _, share, other, signature = held.opened("b")
    right: dict[str, Any] = {
        "sid": SID,
        "dealer": 0,
        "adv_id": KEYS[0].adv_id,
        "holder": 1,
        "which": "b",
        "share": share,
        "other_digest": other,
        "signature": signature,
        "dealer_public": SIGNERS[0].public,
    }
    keyset.check_opened(**right)
    wrong: dict[str, Any] = {
        "sid": OTHER_SID,
        "adv_id": bytes(16),
        "holder": 2,
        "which": "s",
        "share": GOOD[1],
        "other_digest": held.dig_b,
        "signature": bytes(64),
        "dealer_public": SIGNERS[1].public,
    }
    for name, value in wrong.items():
        with pytest.raises(TrustError, match=r"party [12]"):
            keyset.check_opened(**{**right, name: value})
    for raw in (PRIME, share[:31], share + b"\0", bytes(32)):
        with pytest.raises(TrustError):
            keyset.check_opened(**{**right, "share": raw})


def test_coefficients_and_shares_look_uniform() -> None:
    coefficients = b"".join(raw[:31] for raw in KEYS[0].coefficients("b", 1500))
    assert looks_uniform(coefficients, 31)
    shares = [
        shamir.split(KEYS[0].b.reveal(), keys_of(0, inc=inc).coefficients("b", 3), [1])[0][:31] for inc in range(1500)
    ]
    assert looks_uniform(b"".join(shares), 31)  # of one secret, by fresh coefficients
    assert KEYS[0].coefficients("b", 4)[:2] == KEYS[0].coefficients("b", 3)
    everything = KEYS[0].coefficients("b", 50) + KEYS[0].coefficients("s", 50) + KEYS[1].coefficients("b", 50)
    assert len(set(everything)) == len(everything)


# seeds


def context_of(**changed_: Any) -> bytes:
    parts: dict[str, Any] = {
        "contract": bytes(32),
        "scope": b"",
        "seq": 0,
        "stage": "fit",
        "shared": None,
        "params": bytes(32),
        "contributors": [0, 1, 2, 3],
        "owners": [0, 1],
        "adverts": [keys.adv_id for keys in KEYS[:4]],
        "pin": None,
        "survivors": [0, 1, 2],
        "sum_hash": bytes(32),
    } | changed_
    history = names.first_history(parts["contract"], parts["stage"], b"params")
    history = names.history_after_sum(history, parts["survivors"], parts["sum_hash"])
    if parts["shared"] is not None:
        history = names.history_after_turn(history, parts["shared"])
    group = names.group_of(parts["contract"], parts["scope"])
    sid = names.sid_of(parts["contract"], group, parts["seq"])
    root = names.advert_root(parts["adverts"])
    return names.context(sid, history, parts["params"], parts["contributors"], parts["owners"], root, parts["pin"])


def seeds_of(ctx: bytes) -> list[bytes]:
    publics = {keys.party: keys.pk for keys in KEYS[:4]}
    plus, minus = keyset.masking_seeds(KEYS[1], ctx, publics)
    return [seed.reveal() for seed in (*plus, *minus)]


def test_whatever_the_parties_disagree_on_changes_every_seed() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"contract": b"\1" * 32},
        {"scope": bytes(32)},
        {"seq": 1},
        {"stage": "fin"},
        {"shared": bytes(32)},
        {"shared": b"\1" * 32},
        {"params": b"\1" * 32},
        {"contributors": [0, 1, 2]},
        {"owners": [0]},
        {"owners": [0, 1, 2]},
        {"adverts": [keys.adv_id for keys in (*KEYS[:3], keys_of(3, inc=1))]},
        {"adverts": [keys.adv_id for keys in KEYS[3::-1]]},
        {"pin": [0, 1, 2]},
        {"pin": [0, 1, 2, 3]},
        {"survivors": [0, 1, 3]},
        {"sum_hash": b"\1" * 32},
    ]
    seeds = [seed for change in changes for seed in seeds_of(context_of(**change))]
    assert len(seeds) == 4 * len(changes)
    assert len(set(seeds)) == len(seeds)


def test_two_orders_of_the_same_sums_are_two_histories() -> None:
    start = names.first_history(bytes(32), "fit", b"")
    one, other = ([0, 1, 2], b"\1" * 32), ([0, 1, 2], b"\2" * 32)
    ways = {names.history_after_sum(names.history_after_sum(start, *a), *b) for a, b in ((one, other), (other, one))}
    assert len(ways) == 2


@given(st.permutations(range(N)), st.binary(min_size=32, max_size=32))
@settings(max_examples=20)
def test_both_ends_of_a_pair_have_the_same_seed_with_opposite_signs(order: list[int], ctx: bytes) -> None:
    publics = {party: KEYS[party].pk for party in order}
    signs: dict[bytes, list[int]] = {}
    for keys in KEYS:
        for sign, seeds in zip((1, -1), keyset.masking_seeds(keys, ctx, publics), strict=True):
            for seed in seeds:
                signs.setdefault(seed.reveal(), []).append(sign)
    own = {keyset.self_seed(ctx, keys.party, keys.b).reveal() for keys in KEYS}
    assert all(signs.pop(seed) == [1] for seed in own)
    assert len(signs) == N * (N - 1) // 2
    assert all(sorted(pair) == [-1, 1] for pair in signs.values())


def test_seeds_are_for_the_keys_of_the_instance() -> None:
    publics = {keys.party: keys.pk for keys in KEYS}
    with pytest.raises(LocalProtocolError):
        keyset.masking_seeds(keys_of(0, inc=1), bytes(32), publics)
    b, sigma = {keys.party: keys.b for keys in KEYS}, {keys.party: keys.sigma for keys in KEYS}
    everybody = frozenset(range(N))
    keyset.unmasking_seeds(bytes(32), everybody, publics, b, {})
    for survivors, opened_b, opened_sigma in (
        (everybody, b, sigma),  # never both secrets of one party
        (everybody, {0: b[0]}, {}),
        (everybody - {4}, b, {}),
        (everybody - {4}, {party: b[party] for party in range(4)}, {}),
        (frozenset[int](), {}, sigma),
    ):
        with pytest.raises(LocalProtocolError):
            keyset.unmasking_seeds(bytes(32), survivors, publics, opened_b, opened_sigma)


def test_keys_of_low_order_are_refused() -> None:
    prime = 2**255 - 19
    for number in (0, 1, prime - 1, prime, prime + 1):
        assert not keyset.is_usable(number.to_bytes(32, "little"))
        with pytest.raises(TrustError):
            keyset.pair_seed(bytes(32), 0, 1, KEYS[0].mask_key, number.to_bytes(32, "little"))
        with pytest.raises(TrustError):
            KEYS[0].share_for(1, bytes(16), number.to_bytes(32, "little"), T, N, SIGNERS[0])
    assert not keyset.is_usable(KEYS[0].pk[:31])
    assert not keyset.is_usable(KEYS[0].pk + b"\0")
    assert keyset.is_usable(KEYS[0].pk)
