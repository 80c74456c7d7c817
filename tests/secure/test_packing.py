"""Slots, and what a ciphertext goes through on its way back to its owner."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paillier_keys import key

from fedpeer.errors import LocalProtocolError
from fedpeer.peers import Chance
from fedpeer.secure.packing import Slots, masked, readable
from fedpeer.secure.paillier import Ciphertexts, Owner, Stranger

PRIVATE = key()
N = int(PRIVATE.public.n)


def chance(number: int = 0) -> Chance:
    return Chance(number.to_bytes(32, "little"))


STRANGER = Stranger(PRIVATE.public, chance(), 1)


def encrypted(values: list[int]) -> Ciphertexts:
    return Owner(PRIVATE, chance(), 1).encrypt(values, chance(1))


def looks_uniform(numbers: list[int]) -> bool:
    """The first 64 bits of numbers below N, as many ones as half of them but for five standard deviations."""
    bits = "".join(f"{number * 2**64 // N:064b}" for number in numbers)
    return abs(bits.count("1") - len(bits) / 2) < 2.5 * len(bits) ** 0.5


def test_as_many_slots_as_the_plan_says() -> None:
    small, large = PRIVATE.public, key(3072).public
    for width, counts in {168: (11, 18), 272: (7, 11), 128: (15, 23), 68: (29, 44)}.items():
        assert (Slots.masked(small, width).count, Slots.masked(large, width).count) == counts
    assert [Slots.read(small, width).count for width in (74, 78, 84, 32)] == [27, 26, 24, 63]
    assert Slots.read(large, 84).count == 36


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from([3, 32, 74, 168, 272]), st.booleans())
def test_what_is_packed_is_unpacked(data: st.DataObject, width: int, hidden: bool) -> None:
    slots = (Slots.masked if hidden else Slots.read)(PRIVATE.public, width)
    most = 1 << (width - 2)
    number = st.sampled_from([most, -most, 0, 1, -1]) | st.integers(-most, most)
    values = data.draw(st.lists(number, max_size=3 * slots.count))
    plaintexts = slots.pack(values)
    assert len(plaintexts) == -(-len(values) // slots.count)
    assert slots.unpack([plaintext % N for plaintext in plaintexts], len(values)) == values


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_number_in_every_slot_survives(sign: int, hidden: bool) -> None:
    slots = (Slots.masked if hidden else Slots.read)(PRIVATE.public, 74)
    values = [sign << 72] * slots.count
    assert slots.unpack([value % N for value in slots.pack(values)], slots.count) == values
    with pytest.raises(LocalProtocolError, match="74 bits"):
        slots.pack([*values, sign * ((1 << 72) + 1)])


def test_packing_under_encryption_is_packing() -> None:
    slots = Slots.read(PRIVATE.public, 272)
    values = [5, -(2**270), 2**270, 0, -1, 1, 7, -8, 9]
    packed = slots.pack_encrypted(encrypted(values))
    assert PRIVATE.decrypt(packed) == [plaintext % N for plaintext in slots.pack(values)]


def test_nothing_is_packed_into_nothing() -> None:
    nothing, slots = encrypted([]), Slots.read(PRIVATE.public, 74)
    assert slots.pack([]) == slots.unpack([], 0) == []
    assert len(readable(nothing, slots, STRANGER, chance())) == 0
    assert masked(nothing, Slots.masked(PRIVATE.public, 74), STRANGER, chance())[1] == []
    with pytest.raises(LocalProtocolError, match="1 numbers were wanted of plaintexts with 0"):
        slots.unpack([], 1)


# masked


def test_shares_of_a_masked_number_add_up_to_it_or_one_beside_it() -> None:
    ring, slots = 128, Slots.masked(PRIVATE.public, 168)
    most = (1 << 127) - 2
    carries = set()
    for turn, values in enumerate([[most] * 22, [-most] * 22, [most, -most] * 11, list(range(-11, 11)), [0] * 12] * 2):
        returned, masks = masked(slots.pack_encrypted(encrypted(values)), slots, STRANGER, chance(10 + turn))
        owners = slots.shares(PRIVATE.decrypt(returned), ring, len(values))
        maskers = slots.shares(masks, ring, len(values))
        for value, a, b in zip(values, owners, maskers, strict=True):
            carries.add((a - b - value + 1) % (1 << ring) - 1)
    assert carries <= {-1, 0, 1}
    assert 0 in carries


def test_the_masker_may_be_told_what_it_masked() -> None:
    slots = Slots.masked(PRIVATE.public, 68)
    values = [2**66, -(2**66), 3, 0, -1] * 9
    returned, masks = masked(slots.pack_encrypted(encrypted(values)), slots, STRANGER, chance(30))
    told = [decryption - mask for decryption, mask in zip(PRIVATE.decrypt(returned), masks, strict=True)]
    assert slots.unpack(told, len(values)) == values


def test_a_masked_plaintext_is_uniform_whatever_the_owner_encrypted() -> None:
    cheat = encrypted([2 ** (200 + 500 * place) for place in range(3)])
    slots = Slots.masked(PRIVATE.public, 168)
    secret = [0x5EC2E7, 0xC0FFEE, 0xFACADE]
    seen = []
    for turn in range(60):
        returned, _ = masked(slots.pack_encrypted(cheat.multiply([secret])), slots, STRANGER, chance(40 + turn))
        (decryption,) = PRIVATE.decrypt(returned)
        seen.append(decryption)
        assert not any((decryption >> (200 + 500 * place)) & 0xFFFFFF == x for place, x in enumerate(secret))
    assert looks_uniform(seen)
    assert looks_uniform([number * 2**1900 % N for number in seen])  # and so are its lowest bits


def test_masks_and_noise_are_other_ones_each_time() -> None:
    slots = Slots.masked(PRIVATE.public, 168)
    ciphertexts = slots.pack_encrypted(encrypted([1, 2]))
    random = chance(150)
    seen = [masked(ciphertexts, slots, STRANGER, random) for _ in range(6)]
    assert len({masks[0] for _, masks in seen}) == 6
    noises = {returned.values[0] * pow(1 + N, -masks[0], N * N) % N for returned, masks in seen}
    assert len(noises) == 6


def test_numbers_are_hidden_only_where_there_is_room_for_the_mask() -> None:
    ciphertexts = encrypted([1])
    for wrong in (
        Slots.read(PRIVATE.public, 32),
        Slots(PRIVATE.public, 168, 1),
        Slots.masked(key(2048, 1).public, 168),
    ):
        with pytest.raises(LocalProtocolError, match="slots"):
            masked(ciphertexts, wrong, STRANGER, chance())
    with pytest.raises(LocalProtocolError, match="shares of 128 bits"):
        Slots.masked(PRIVATE.public, 68).shares([1], 128, 1)


def test_a_matrix_of_one_and_a_vector_of_the_other_become_shares_of_their_product() -> None:
    ring, slots = 128, Slots.masked(PRIVATE.public, 168)
    matrix = chance(160).integers(-(2**23), 2**23, 14 * 30).reshape(14, 30)
    vector = [int(value) << 60 for value in chance(161).integers(-(2**40), 2**40, 30)]
    products = slots.pack_encrypted(encrypted(vector).multiply(matrix))
    returned, masks = masked(products, slots, STRANGER, chance(162))
    assert len(returned) == 2
    shares = zip(slots.shares(PRIVATE.decrypt(returned), ring, 14), slots.shares(masks, ring, 14), strict=True)
    wanted = [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix.tolist()]
    for (owners, maskers), value in zip(shares, wanted, strict=True):
        assert (owners - maskers - value + 1) % (1 << ring) in (0, 1, 2)


def test_columns_of_both_become_shares_of_their_products() -> None:
    ring, slots = 68, Slots.masked(PRIVATE.public, 68)
    ours, theirs = (chance(170 + side).integers(-(2**23), 2**23 + 1, 60 * 5).reshape(60, 5) for side in range(2))
    ours[:, 0] = theirs[:, 0] = 2**23
    packed = encrypted(
        [slots.pack(row)[0] for row in theirs.tolist()]
    )  # a ciphertext for each row, all its columns in it
    returned, masks = masked(packed.multiply(ours.T), slots, STRANGER, chance(172))
    for column, decryption, mask in zip(range(5), PRIVATE.decrypt(returned), masks, strict=True):
        shares = zip(slots.shares([decryption], ring, 5), slots.shares([mask], ring, 5), strict=True)
        for (owners, maskers), value in zip(shares, (ours[:, column] @ theirs).tolist(), strict=True):
            assert (owners - maskers - value + 1) % (1 << ring) in (0, 1, 2)


# to be read


def test_the_owner_reads_what_it_is_meant_to_and_chance_in_every_other_bit() -> None:
    slots = Slots.read(PRIVATE.public, 74)
    values = [(-1) ** place * (2**72 - place) for place in range(slots.count + 3)]
    tops, ciphertexts = [], encrypted(values)
    for turn in range(20):
        returned = readable(ciphertexts, slots, STRANGER, chance(200 + turn))
        decryptions = PRIVATE.decrypt(returned)
        assert slots.unpack(decryptions, len(values)) == values
        tops.append(PRIVATE.public.centred(decryptions)[1] + (1 << 221) >> 222)
    assert looks_uniform([top * N >> 2046 - 222 for top in tops])
    assert looks_uniform([top % 2**64 * N >> 64 for top in tops])


def test_what_is_returned_to_be_read_is_packed_and_has_noise_of_its_own() -> None:
    ciphertexts, slots = encrypted([1] * 27), Slots.read(PRIVATE.public, 74)
    random = chance(260)
    seen = [readable(ciphertexts, slots, STRANGER, random) for _ in range(5)]
    assert {len(returned) for returned in seen} == {1}
    inputs = ciphertexts.values
    assert len({int(returned.values[0] % N) for returned in seen} | {int(value % N) for value in inputs}) == 5 + 27
    for wrong in (Slots.masked(PRIVATE.public, 32), Slots(PRIVATE.public, 74, 1)):
        with pytest.raises(LocalProtocolError, match="slots"):
            readable(ciphertexts, wrong, STRANGER, chance())
