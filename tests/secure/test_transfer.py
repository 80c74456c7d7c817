"""Oblivious transfer and its extension: against plain definitions, and what one who deviates gets and does not get."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedpeer import crypto
from fedpeer.crypto import Secret, edwards_scalar, hash_
from fedpeer.errors import RemoteProtocolError
from fedpeer.secure import transfer
from fedpeer.testing.uniformity import looks_uniform

SESSION = bytes(range(32))
CHANCE = np.random.Generator(np.random.PCG64(5))
A = Secret(edwards_scalar(bytes(range(64))))
S = Secret(CHANCE.bytes(64))
SCALARS = Secret(CHANCE.bytes(512 * 64))
OFFER = transfer.offer(A)
CHOSEN, KEYS = transfer.choose(SESSION, OFFER, S, SCALARS)
BOTH = transfer.keys_of(SESSION, A, CHOSEN)
FUNCTION = transfer.Function(SESSION)
SMALL_ORDER = [  # the eight points of order 1, 2, 4 and 8; the first is the neutral one
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
]


def bits_of(s: Secret) -> list[int]:
    return [int(bit) for bit in np.unpackbits(np.frombuffer(s.reveal(), np.uint8), bitorder="little")]


def blocks(count: int, seed: int = 1) -> transfer.Words:
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 2**64, (count, 2), dtype=np.uint64)


def test_the_sender_has_the_key_it_chose_of_each_transfer_and_not_the_other() -> None:
    for i, bit in enumerate(bits_of(S)):
        assert KEYS[i] == BOTH[bit][i]
        assert KEYS[i] != BOTH[1 - bit][i]
    assert len({key.reveal() for keys in BOTH for key in keys}) == 1024
    other = transfer.choose(bytes(32), OFFER, S, SCALARS)[1]
    assert not {key.reveal() for key in other} & {key.reveal() for key in KEYS}, "keys of another session are the same"


def test_the_points_of_a_choice_are_b_times_g_plus_a_if_it_is_one() -> None:
    for i, bit in enumerate(bits_of(S)):
        b = edwards_scalar(SCALARS.reveal()[64 * i : 64 * i + 64])
        plain = crypto.edwards_base(b)
        assert CHOSEN[i].tobytes() == (crypto.edwards_add(plain, OFFER) if bit else plain)


@pytest.mark.parametrize("small", SMALL_ORDER[1:])
def test_an_offer_with_a_part_of_small_order_would_show_the_choice_and_is_refused(small: str) -> None:
    mixed = crypto.edwards_add(OFFER, bytes.fromhex(small))
    with pytest.raises(RemoteProtocolError, match="no point of the main subgroup"):
        transfer.check_offer(mixed)
    shown = []
    for i in range(8):  # what the sender's points would be: in the main subgroup only where the bit is zero
        plain = crypto.edwards_base(edwards_scalar(SCALARS.reveal()[64 * i : 64 * i + 64]))
        shown += [crypto.edwards_is_valid(plain), crypto.edwards_is_valid(crypto.edwards_add(plain, mixed))]
    assert shown == [True, False] * 8


@pytest.mark.parametrize("offer", [bytes.fromhex(point) for point in SMALL_ORDER] + [b"", OFFER[:31], OFFER + b"\0"])
def test_an_offer_that_is_no_point_is_refused(offer: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="no point of the main subgroup"):
        transfer.check_offer(offer)
    assert transfer.check_offer(OFFER) == OFFER


def test_choices_of_another_number_or_with_one_bad_point_are_refused() -> None:
    assert transfer.check_choices(CHOSEN) is CHOSEN
    for wrong in (CHOSEN[:511], CHOSEN[:, :31], CHOSEN.tobytes(), CHOSEN.view(np.int8), None):
        with pytest.raises(RemoteProtocolError, match="not 512 points of 32 bytes"):
            transfer.check_choices(wrong)
    for small in SMALL_ORDER[1:]:
        spoiled = CHOSEN.copy()
        spoiled[77] = np.frombuffer(crypto.edwards_add(CHOSEN[77].tobytes(), bytes.fromhex(small)), np.uint8)
        with pytest.raises(RemoteProtocolError, match="not of the main subgroup"):
            transfer.check_choices(spoiled)


def test_bits_of_columns_become_bits_of_rows() -> None:
    columns = CHANCE.integers(0, 256, (512, 1024 + 16), dtype=np.uint8)
    bits = np.unpackbits(columns, axis=1, bitorder="little")
    expected = np.packbits(bits.T, axis=1, bitorder="little")
    assert (transfer.rows_of(columns).view(np.uint8) == expected).all()


def test_columns_are_the_stream_of_their_key_from_any_bin_on() -> None:
    whole = transfer.stretched(KEYS, 0, 4096)
    assert (transfer.stretched(KEYS, 1024, 2048) == whole[:, 128 : 128 + 256]).all()
    stream = Cipher(algorithms.AES(KEYS[3].reveal()), modes.CTR(bytes(16))).encryptor().update(bytes(512))
    assert whole[3].tobytes() == stream


def test_a_long_stream_goes_on_where_its_first_part_ends() -> None:
    size = crypto.STREAM_BYTES + 4096
    out = np.empty(size, np.uint8)
    crypto.aes_stream_into(bytes(16), 7, out.data)
    whole = Cipher(algorithms.AES(bytes(16)), modes.CTR((7).to_bytes(16, "big"))).encryptor().update(bytes(size))
    assert out.tobytes() == whole


def test_what_both_compute_is_equal_for_the_input_of_a_bin_and_for_no_other() -> None:
    inputs = blocks(4096)
    u, t0 = transfer.masked(BOTH, 8192, FUNCTION.codewords(inputs))
    q = transfer.unmasked(KEYS, S, 8192, u)
    bins = np.arange(8192, 8192 + 4096)
    mine = FUNCTION.tags(t0, bins, 2)
    assert (FUNCTION.tags_of(q, S, inputs, bins, 8192, 2) == mine).all()
    assert not (FUNCTION.tags_of(q, S, inputs, bins, 8192, 1) == mine).all(axis=1).any(), "the index is no part of it"
    assert not (FUNCTION.tags_of(q, S, blocks(4096, 2), bins, 8192, 2) == mine).all(axis=1).any()


def test_a_tag_is_the_hash_that_is_written_down() -> None:
    row = blocks(4, 9).reshape(1, 8)
    key = hash_("fp.kkrt.pi", key=SESSION, size=16)

    def pi(block: bytes) -> bytes:
        return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(block)

    def xor(*parts: bytes) -> bytes:
        return bytes(np.bitwise_xor.reduce([np.frombuffer(part, np.uint8) for part in parts]))

    x = [row.tobytes()[i : i + 16] for i in range(0, 64, 16)]
    state = xor(*x)
    for part in x[1:]:
        state = xor(pi(state), part)
    e = pi(state)
    tweak = (300_000).to_bytes(8, "little") + (2).to_bytes(8, "little")
    assert FUNCTION.tags(row, np.array([300_000]), 2).tobytes() == xor(pi(xor(e, tweak)), e)[:12]


def test_equal_rows_in_other_bins_or_places_have_other_tags() -> None:
    rows = np.repeat(blocks(4).reshape(1, 8), 300, axis=0)
    tags = FUNCTION.tags(rows, np.arange(300) // 3, np.arange(300) % 3)
    assert len({row.tobytes() for row in tags}) == 300


def test_codewords_of_different_inputs_are_far_from_each_other() -> None:
    words = FUNCTION.codewords(np.concatenate([blocks(50_000), np.arange(100_000, dtype=np.uint64).reshape(-1, 2)]))
    least = 512
    for shift in range(1, 11):
        least = min(least, int(np.bitwise_count(words ^ np.roll(words, shift, axis=0)).sum(axis=1).min()))
    assert least >= 180  # of 10^6 pairs; 128 has probability 2^-100 for so many


def test_inputs_alike_in_half_of_their_bits_do_not_match() -> None:
    inputs = blocks(4096)
    alike = inputs.copy()
    alike[:, 1] ^= np.arange(1, 4097, dtype=np.uint64)
    u, t0 = transfer.masked(BOTH, 0, FUNCTION.codewords(inputs))
    q, bins = transfer.unmasked(KEYS, S, 0, u), np.arange(4096)
    assert not (FUNCTION.tags_of(q, S, alike, bins, 0, 0) == FUNCTION.tags(t0, bins, 0)).all(axis=1).any()


def test_what_the_sender_sees_has_one_law_whatever_the_inputs_are() -> None:
    """For one who knows one of the two keys of each transfer. (Whoever knew both would read the inputs.)"""
    for inputs in (blocks(4096), np.zeros((4096, 2), np.uint64)):
        u, _ = transfer.masked(BOTH, 0, FUNCTION.codewords(inputs))
        assert looks_uniform(u.tobytes(), width=64)
        q = transfer.unmasked(KEYS, S, 0, u)
        own = transfer.rows_of(transfer.stretched(KEYS, 0, 4096))
        assert looks_uniform((own ^ u).tobytes(), width=64)
        assert looks_uniform(q.tobytes(), width=64)


def test_what_the_receiver_of_choices_sees_has_one_law_whatever_s_is() -> None:
    """Points of the main subgroup, of which none says whether A is in it: its bytes are uniform for every s."""
    for s in (bytes(64), b"\xff" * 64):
        scalars = [SCALARS, Secret(SCALARS.reveal()[::-1]), Secret(bytes(CHANCE.bytes(512 * 64)))]
        chosen = np.concatenate([transfer.choose(SESSION, OFFER, Secret(s), each)[0] for each in scalars])
        assert len(transfer.check_choices(chosen[:512])) == 512
        assert looks_uniform(np.ascontiguousarray(chosen[:, :31]).tobytes(), width=31)


def test_a_receiver_that_flips_bits_of_inputs_it_knows_to_be_common_reads_s() -> None:
    """What the declaration warns of, done: hence only with partners that are taken to follow the protocol."""
    inputs, bins = blocks(4096), np.arange(4096)
    u, t0 = transfer.masked(BOTH, 0, FUNCTION.codewords(inputs))
    flip = np.zeros((4096, 64), np.uint8)
    flip[np.arange(512), np.arange(512) // 8] = 1 << np.arange(512) % 8
    lying = u ^ flip.view(np.uint64)
    told = FUNCTION.tags_of(transfer.unmasked(KEYS, S, 0, lying), S, inputs, bins, 0, 0)
    without = FUNCTION.tags(t0, bins, 0)
    read = [int((told[i] != without[i]).any()) for i in range(512)]
    assert read == bits_of(S)


@pytest.mark.parametrize("spoil", [lambda u: u[:-1], lambda u: u[:, :7], lambda u: u.view(np.int64), lambda u: None])
def test_rows_of_another_number_or_form_are_refused(spoil: Any) -> None:
    u = np.zeros((4096, 8), np.uint64)
    assert transfer.check_masked(u, 4096) is u
    with pytest.raises(RemoteProtocolError, match="not 4096 rows of 64 bytes"):
        transfer.check_masked(spoil(u), 4096)


def test_a_list_of_tags_is_refused_if_it_is_longer_shorter_unsorted_or_repeats_one() -> None:
    tags = np.array([[i] * 12 for i in (2, 3, 90, 200)], np.uint8)
    assert transfer.check_list(tags, 4) is tags
    for wrong in (tags[:3], tags[:, :8], tags.tobytes(), np.concatenate([tags, tags])):
        with pytest.raises(RemoteProtocolError, match="not 4 tags of 12 bytes"):
            transfer.check_list(wrong, 4)
    low = tags.copy()
    low[2, :8], low[2, 8:] = low[1, :8], low[1, 8:] - 1
    for wrong in (tags[::-1], tags[[0, 1, 1, 2]], low):
        with pytest.raises(RemoteProtocolError, match="tags that are not sorted"):
            transfer.check_list(np.ascontiguousarray(wrong), 4)
