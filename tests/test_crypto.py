"""The primitives against public vectors and a second implementation, and the promises of their wrappers."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from fedpeer import crypto
from fedpeer.crypto import Aead, DhKey, Secret, SigningKey
from fedpeer.errors import LocalProtocolError, TrustError

LOW_ORDER = [  # X25519 of these is zero for every scalar
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


def test_x25519_iterated_a_thousand_times_gives_the_value_of_rfc_7748() -> None:
    k = u = bytes([9]) + bytes(31)
    k, u = crypto.x25519(k, u), k
    assert k.hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    for _ in range(999):
        k, u = crypto.x25519(k, u), k
    assert k.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


def test_agreement_is_the_same_in_another_implementation() -> None:
    mine, theirs = DhKey.random(), X25519PrivateKey.generate()
    shared = mine.exchange(theirs.public_key().public_bytes_raw())
    assert shared == theirs.exchange(X25519PublicKey.from_public_bytes(mine.public))


@pytest.mark.parametrize("point", LOW_ORDER)
def test_a_point_of_low_order_is_refused_by_name(point: str) -> None:
    with pytest.raises(TrustError):
        DhKey.random().exchange(bytes.fromhex(point))


def test_a_point_of_wrong_length_is_refused_by_name() -> None:
    with pytest.raises(TrustError):
        DhKey.random().exchange(bytes(31))


def test_a_signature_holds_for_its_kind_its_bytes_and_its_key_only() -> None:
    key, other = SigningKey(Secret.random()), SigningKey(Secret.random())
    signature = key.sign("vote", b"yes")
    crypto.verify(key.public, "vote", b"yes", signature)
    for public, kind, body, signed in [
        (other.public, "vote", b"yes", signature),
        (key.public, "veto", b"yes", signature),
        (key.public, "vote", b"no", signature),
        (key.public, "vote", b"yes", bytes([signature[0] ^ 1]) + signature[1:]),
        (key.public, "vote", b"yes", signature[:-1]),
        (key.public[:-1], "vote", b"yes", signature),
    ]:
        with pytest.raises(TrustError):
            crypto.verify(public, kind, body, signed)


def test_a_hash_depends_on_its_label_and_on_where_parts_end() -> None:
    seen = {
        crypto.hash_("fp.a", b"ab", b"c"),
        crypto.hash_("fp.a", b"a", b"bc"),
        crypto.hash_("fp.b", b"ab", b"c"),
        crypto.hash_("fp.a", b"abc"),
        crypto.hash_("fp.a", b"abc", key=b"k"),
    }
    assert len(seen) == 5
    with pytest.raises(LocalProtocolError):
        crypto.hash_("a label of more than 16 bytes")


def test_sealed_bytes_open_once_unchanged_and_with_the_same_nonce_and_context() -> None:
    aead, nonce = Aead(bytes(32)), bytes(12)
    sealed = aead.seal(nonce, b"plain", b"context")
    assert aead.open(nonce, sealed, b"context") == b"plain"
    for n, s, a in [(nonce, sealed[:-1] + b"\0", b"context"), (b"\1" * 12, sealed, b"context"), (nonce, sealed, b"")]:
        with pytest.raises(TrustError):
            aead.open(n, s, a)
    out = bytearray(len(sealed))
    assert aead.seal_into(nonce, b"plain", b"context", memoryview(out)) == len(out)
    assert bytes(out) == sealed
    back = bytearray(5)
    assert aead.open_into(nonce, sealed, b"context", memoryview(back)) == 5
    assert bytes(back) == b"plain"
    with pytest.raises(TrustError):
        aead.open_into(nonce, sealed, b"other", memoryview(back))


def test_a_secret_is_in_no_repr_no_format_and_no_copy_on_disk() -> None:
    secret = Secret(b"\xaa" * 32)
    shown = [repr(secret), str(secret), f"{secret}", f"{secret:>40}", repr(SigningKey(secret)), repr(DhKey(secret))]
    assert not [text for text in shown if "aa" * 4 in text or "\\xaa" in text]
    for spread in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            spread(secret)
    with pytest.raises(TypeError):
        hash(secret)
    assert secret == Secret(b"\xaa" * 32) != Secret(b"\xab" * 32)


def test_the_edwards_curve_refuses_points_outside_the_prime_order_group() -> None:
    point = crypto.edwards_from_uniform(bytes(range(32)))
    assert crypto.edwards_is_valid(point)
    order_two = bytes.fromhex("ec" + "ff" * 30 + "7f")
    assert not crypto.edwards_is_valid(order_two)
    assert not crypto.edwards_is_valid(crypto.edwards_add(point, order_two))  # a mixed-order point
    with pytest.raises(TrustError):
        crypto.edwards_multiply(bytes(32), point)


def aegis256(seed: bytes, nonce: bytes, size: int) -> bytes:
    out = bytearray(size + crypto.STREAM_SLACK)
    crypto.aegis256_into(seed, nonce, out, size)
    return bytes(out[:size])


def test_the_aegis_stream_is_that_of_the_public_vector() -> None:
    # draft-irtf-cfrg-aegis-aead, AEGIS-256 test vector 1: sixteen zero bytes
    key, nonce = bytes([0x10, 0x01]) + bytes(30), bytes([0x10, 0x00, 0x02]) + bytes(29)
    assert aegis256(key, nonce, 16).hex() == "754fc3d8c973246dcc6d741412a4b236"


@pytest.mark.parametrize(("into", "nonce"), [(crypto.aegis256_into, bytes(32)), (crypto.chacha20_into, bytes(12))])
def test_a_stream_is_written_within_its_buffer_or_not_at_all(
    into: Callable[[bytes, bytes, bytearray, int], None], nonce: bytes
) -> None:
    out = bytearray(b"\xaa" * (100 + crypto.STREAM_SLACK + 8))
    into(bytes(32), nonce, out, 100)
    assert out[-8:] == b"\xaa" * 8
    assert out[:100] != b"\xaa" * 100
    for seed, number, size in (
        (bytes(31), nonce, 100),
        (bytes(33), nonce, 100),
        (bytes(32), nonce[:-1], 100),
        (bytes(32), nonce + b"\0", 100),
        (bytes(32), nonce, -1),
        (bytes(32), nonce, 109),
        (bytes(32), nonce, crypto.STREAM_BYTES + 1),
    ):
        before = bytes(out)
        with pytest.raises(LocalProtocolError):
            into(seed, number, out, size)
        assert out == before
    with pytest.raises(LocalProtocolError):
        into(bytes(32), nonce, bytearray(crypto.STREAM_BYTES + 1 + crypto.STREAM_SLACK), crypto.STREAM_BYTES + 1)


def test_hashes_and_streams_are_those_of_the_known_answers(shared: Path) -> None:
    known = json.loads((shared / "vectors" / "secagg_kat.json").read_text())
    assert crypto.hash_("fp.sa1.ctx", b"a", b"bc").hex() == known["H"]['H("fp.sa1.ctx", "a", "bc")']
    assert crypto.hash_("fp.sa1.self", b"x", key=bytes(32)).hex() == known["H"]['H("fp.sa1.self", "x"; key=32*00)']
    seed = bytes.fromhex(known["prg"]["seed"])
    for segment in (0, 1):
        number = segment.to_bytes(8, "little")
        aegis = aegis256(seed, number + bytes(24), 64)
        chacha = crypto.chacha20_stream(seed, bytes(4) + number, bytes(64))
        assert aegis.hex() == known["prg"]["aegis256"][f"seg{segment}_first64"]
        assert chacha.hex() == known["prg"]["chacha20"][f"seg{segment}_first64"]
    for refused in known["refused_public_keys"]:
        with pytest.raises(TrustError):
            DhKey.random().exchange(bytes.fromhex(refused))


def test_hashes_of_rows_are_those_of_each_row() -> None:
    rows = [bytes([n % 251]) * n for n in (0, 1, 127, 128, 129, 255, 256, 300, 70_000)]
    expected = [crypto.hash_("fp.test", row, key=b"k" * 32, size=48) for row in rows]
    assert crypto.hash_rows("fp.test", rows, key=b"k" * 32, size=48) == b"".join(expected)


def test_the_permutation_is_aes_128_as_in_fips_197() -> None:
    block, out = bytes.fromhex("00112233445566778899aabbccddeeff"), bytearray(48)
    crypto.Permutation(bytes(range(16))).into(block * 2, out)
    assert out[:32].hex() == 2 * "69c4e0d86a7b0430d8cdb78070b4c55a"


def test_scalars_and_points_of_the_edwards_curve_add_and_subtract() -> None:
    a, b = crypto.edwards_scalar(b"a" * 64), crypto.edwards_scalar(b"b" * 64)
    of_a, of_b = crypto.edwards_base(a), crypto.edwards_base(b)
    assert crypto.edwards_multiply(a, of_b) == crypto.edwards_multiply(b, of_a)
    assert crypto.edwards_subtract(crypto.edwards_add(of_a, of_b), of_b) == of_a
    with pytest.raises(TrustError, match="zero"):
        crypto.edwards_base(bytes(32))
