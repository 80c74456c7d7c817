"""Paillier with keys of full size: phe reads all of it, and what a cheat would send is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator

import gmpy2
import numpy as np
import pytest
from paillier_keys import key, primes
from phe.paillier import PaillierPrivateKey, PaillierPublicKey

from fedpeer.errors import LocalProtocolError, RemoteProtocolError, TrustError
from fedpeer.peers import Chance
from fedpeer.secure import paillier
from fedpeer.secure.paillier import (
    OWNER_BASES,
    STRANGER_BASES,
    Ciphertexts,
    Owner,
    PrivateKey,
    PublicKey,
    Stranger,
    certify,
    verify_certificate,
)

LARGE = 10_000
"""encryptions enough for a table"""
VALUES = [0, 1, -1, 2**40, -(2**200), 2**2000, 17, 17]


def chance(number: int = 0) -> Chance:
    return Chance(number.to_bytes(32, "little"))


def read_by_phe(private: PrivateKey, bits: int, ciphertexts: Ciphertexts) -> list[int]:
    public = PaillierPublicKey(int(private.public.n))
    (p, q) = next(pair for pair in primes("key", bits) if pair[0] * pair[1] == public.n)
    theirs = PaillierPrivateKey(public, p, q)
    return [theirs.raw_decrypt(int(value)) for value in ciphertexts.values]


BASES = {"OWNER_BASES": {2048: 6}, "STRANGER_BASES": {2048: 7}}
"""Of the tables in these tests: so few make no noise, but ciphertexts."""


@pytest.fixture(scope="module", autouse=True)
def small_tables() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, bases in BASES.items():
            patch.setattr(paillier, name, bases)
        yield


@pytest.fixture(scope="module")
def owner(small_tables: None) -> Owner:
    return Owner(key(), chance(1), LARGE)


@pytest.fixture(scope="module")
def stranger(small_tables: None) -> Stranger:
    return Stranger(key().public, chance(2), LARGE)


@pytest.fixture(scope="module")
def some() -> tuple[list[int], Ciphertexts]:
    """Sixty plaintexts and their ciphertexts."""
    values = [int(value) for value in chance(3).integers(-(2**40), 2**40, 60)]
    return values, Owner(key(), chance(), 1).encrypt(values, chance(4))


def plain(ciphertexts: Ciphertexts) -> list[int]:
    private = key()
    return private.public.centred(private.decrypt(ciphertexts))


# keys


def next_prime(value: int) -> int:
    return int(gmpy2.next_prime(value))


SHAPES: dict[str, tuple[Callable[[int], int], str]] = {
    "even": (lambda n: n + 1, "a factor"),
    "a prime": (lambda n: next_prime(n), "a prime"),
    "a square": (lambda n: next_prime(1 << 1023 | 1 << 1022) ** 2, "a power"),
    "a cube": (lambda n: next_prime(3 << 681) ** 3, "a power"),
    "a factor 3": (lambda n: 3 * next_prime(n // 3), "a factor"),
    "a factor 6353": (lambda n: 6353 * next_prime(n // 6353), "a factor"),
    "a factor 65521": (lambda n: 65521 * next_prime(n // 65521), "a factor"),
    "1024 bits": (lambda n: next_prime(3 << 510) * next_prime(3 << 510 | 99), "1024 bits"),
    "2047 bits": (lambda n: next_prime(3 << 1021) * next_prime(3 << 1022), "2047 bits"),
    "2049 bits": (lambda n: next_prime(3 << 1022) * next_prime(3 << 1023), "2049 bits"),
    "negative": (lambda n: -n, "2048 bits"),
    "0": (lambda n: 0, "0 bits"),
    "1": (lambda n: 1, "1 bits"),
}


@pytest.mark.parametrize("what", SHAPES)
def test_a_key_of_a_wrong_shape_is_refused(what: str) -> None:
    wrong, reason = SHAPES[what]
    with pytest.raises(TrustError, match=f"a Paillier key .*{reason}"):
        PublicKey(wrong(int(key().public.n)))


def test_a_private_key_whose_primes_do_not_fit_is_refused() -> None:
    ((p, q), (other, _)) = primes("key", 2048)
    PrivateKey(p, q)
    for wrong in [(p, p), (p * q, 1), (p, other + 2), primes("bad", 2048)[0]]:
        with pytest.raises(TrustError):
            PrivateKey(*wrong)


def test_a_private_key_shows_nowhere() -> None:
    private = key()
    for shown in (private, Owner(private, chance(), 1), private.public):
        assert not any(str(int(prime))[:12] in f"{shown!r} {shown}" for prime in primes("key", 2048)[0])
    with pytest.raises(TypeError):
        pickle.dumps(private)


# certificates


@pytest.mark.parametrize("bits", [2048, 3072])
def test_a_certificate_is_of_one_key_peer_and_contract(bits: int) -> None:
    private, other = key(bits), key(bits, 1)
    certificate = certify(private, b"alice", b"contract")
    verify_certificate(private.public, b"alice", b"contract", certificate)
    for public, peer, contract in [
        (other.public, b"alice", b"contract"),
        (private.public, b"bob", b"contract"),
        (private.public, b"alice", b"another"),
        (private.public, b"alicec", b"ontract"),
    ]:
        with pytest.raises(TrustError, match="certificate"):
            verify_certificate(public, peer, contract, certificate)


def test_a_certificate_needs_every_root() -> None:
    private = key()
    certificate = certify(private, b"alice", b"contract")
    width = len(certificate) // 11
    wrong = [b"", certificate[:-width], certificate[:width] * 10, certificate + certificate[:width], certificate[:-1]]
    for number in range(11):
        changed = bytearray(certificate)
        changed[(number + 1) * width - 1] ^= 1
        wrong.append(bytes(changed))
        wrong.append(certificate[: number * width] + bytes(width) + certificate[(number + 1) * width :])
    for certificate in wrong:
        with pytest.raises(TrustError, match="certificate"):
            verify_certificate(private.public, b"alice", b"contract", certificate)


def test_a_root_is_written_in_one_way() -> None:
    private = key(2048, 1)
    n = int(private.public.n)
    for contract in range(200):  # until a root and n fit the width of n
        certificate = certify(private, b"alice", bytes([contract]))
        larger = int.from_bytes(certificate[:256], "big") + n
        if larger.bit_length() <= 2048:
            break
    with pytest.raises(TrustError, match="certificate"):
        verify_certificate(private.public, b"alice", bytes([contract]), larger.to_bytes(256, "big") + certificate[256:])


def test_a_key_under_which_noise_would_not_hide_has_no_certificate() -> None:
    p, q = primes("bad", 2048)[0]
    public = PublicKey(p * q)  # its shape is right
    found = []
    for value in paillier._challenges(
        public, b"mallory", b"contract"
    ):  # the best there is: a root modulo q, and a guess
        a = pow(value % p, pow(p * q, -1, (p - 1) // q), p)
        b = pow(value % q, pow(p * q, -1, q - 1), q)
        root = b + q * ((a - b) * pow(q, -1, p) % p)
        assert pow(root, p * q, q) == value % q
        found.append(root.to_bytes(256, "big"))
    with pytest.raises(TrustError, match="certificate"):
        verify_certificate(public, b"mallory", b"contract", b"".join(found))


# what others send


def test_ciphertexts_arrive_as_they_were_sent(some: tuple[list[int], Ciphertexts]) -> None:
    _, ciphertexts = some
    array = ciphertexts.to_array()
    assert (array.shape, array.dtype) == ((60, 512), np.uint8)
    assert Ciphertexts.from_array(key().public, array, 60).values == ciphertexts.values


HOSTILE: dict[str, Callable[[int, int], int]] = {
    "0": lambda n, p: 0,
    "n": lambda n, p: n,
    "a multiple of p": lambda n, p: 4711 * p,
    "a multiple of p²": lambda n, p: 5 * p * p,
    "n²": lambda n, p: n * n,
    "one above n²": lambda n, p: n * n + 1,
    "all ones": lambda n, p: (1 << 4096) - 1,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_one_wrong_ciphertext_has_all_refused(what: str, some: tuple[list[int], Ciphertexts]) -> None:
    public = key().public
    array = some[1].to_array().copy()
    array[31] = np.frombuffer(HOSTILE[what](int(public.n), primes("key", 2048)[0][0]).to_bytes(512, "big"), np.uint8)
    with pytest.raises(RemoteProtocolError, match="a ciphertext that"):
        Ciphertexts.from_array(public, array, 60)


def test_what_is_no_array_of_ciphertexts_is_refused(some: tuple[list[int], Ciphertexts]) -> None:
    array = some[1].to_array()
    for wrong in (None, 7, array.tobytes(), array[:-1], array[:, 1:], array.astype(np.int8), array.reshape(-1), [[1]]):
        with pytest.raises(RemoteProtocolError, match="not 60 ciphertexts of 512 bytes"):
            Ciphertexts.from_array(key().public, wrong, 60)


# encryption


@pytest.mark.parametrize("bits", [2048, 3072])
def test_phe_reads_what_an_owner_and_a_stranger_encrypt(bits: int) -> None:
    private = key(bits)
    n = int(private.public.n)
    for encrypt in (Owner(private, chance(), 1).encrypt, Stranger(private.public, chance(), 1).encrypt):
        ciphertexts = encrypt(VALUES, chance(5))
        assert read_by_phe(private, bits, ciphertexts) == private.decrypt(ciphertexts) == [v % n for v in VALUES]
        assert private.public.centred(private.decrypt(ciphertexts)) == VALUES


def test_phe_reads_what_is_encrypted_by_tables(owner: Owner, stranger: Stranger) -> None:
    for by in (owner, stranger):
        ciphertexts = by.encrypt(VALUES, chance(6))
        assert read_by_phe(key(), 2048, ciphertexts) == [value % key().public.n for value in VALUES]


def test_tables_are_made_for_many_and_have_all_their_bases(owner: Owner, stranger: Stranger) -> None:
    assert owner._by_p._x.shape[:2] == owner._by_q._x.shape[:2] == (BASES["OWNER_BASES"][2048], 1 << 12)
    assert stranger._noise._x.shape[:2] == (BASES["STRANGER_BASES"][2048], 1 << 8)
    assert not len(Owner(key(), chance(), 1499)._by_p._x)
    assert not len(Stranger(key().public, chance(), 399)._noise._x)


def test_digits_have_128_bits_more_than_what_they_reach() -> None:
    assert {bits: 12 * bases for bits, bases in OWNER_BASES.items()} == {2048: 1024 + 128, 3072: 1536 + 132}
    assert {bits: 8 * bases for bits, bases in STRANGER_BASES.items()} == {2048: 2048 + 128, 3072: 3072 + 128}


@pytest.mark.parametrize("by", ["owner", "stranger"])
def test_equal_plaintexts_never_give_equal_ciphertexts(by: str, request: pytest.FixtureRequest) -> None:
    encrypt = request.getfixturevalue(by).encrypt
    random = chance(7)
    n = key().public.n
    found = [value for _ in range(3) for value in encrypt([17] * 100, random).values]
    assert len({value % n for value in found}) == 300  # modulo n nothing but the noise is left


@pytest.mark.parametrize(
    "by", [Owner(key(), chance(), 1), Stranger(key().public, chance(), 1)], ids=["owner", "stranger"]
)
def test_equal_plaintexts_never_give_equal_ciphertexts_without_a_table(by: Owner | Stranger) -> None:
    random = chance(8)
    found = [*by.encrypt([0] * 5, random).values, *by.encrypt([0] * 5, random).values]
    assert len({value % key().public.n for value in found}) == 10


def test_the_noise_of_both_primes_is_another(owner: Owner) -> None:
    (p, q) = primes("key", 2048)[0]
    found = owner.encrypt([0] * 50, chance(9)).values
    assert len({value % (p * p) for value in found}) == len({value % (q * q) for value in found}) == 50


def test_a_repeated_turn_gives_the_same_bytes(owner: Owner, stranger: Stranger) -> None:
    for by in (owner, stranger):
        first = by.encrypt(VALUES, chance(10)).to_array().tobytes()
        assert by.encrypt(VALUES, chance(10)).to_array().tobytes() == first
        assert by.encrypt(VALUES, chance(11)).to_array().tobytes() != first


# sums and products


def test_sums_by_bin_are_those_of_the_plaintexts(some: tuple[list[int], Ciphertexts]) -> None:
    values, ciphertexts = some
    index = chance(12).integers(-1, 8, 60)
    wanted = [sum(value for value, bin_ in zip(values, index, strict=True) if bin_ == at) for at in range(9)]
    slow = Ciphertexts(ciphertexts.public, ciphertexts.values).sums(index, 9)
    fast = ciphertexts.prepare().sums(index, 9)
    assert fast.values == slow.values
    assert plain(slow) == wanted
    assert plain(slow.prefix_sums()) == np.cumsum(wanted).tolist()


def test_a_sibling_is_its_parent_less_the_other_child(some: tuple[list[int], Ciphertexts]) -> None:
    values, ciphertexts = some
    index = chance(13).integers(0, 4, 60)
    left = np.where(np.arange(60) < 25, index, -1)
    sibling = ciphertexts.sums(index, 4) - ciphertexts.sums(left, 4)
    right = ciphertexts[25:].sums(index[25:], 4)
    assert sibling.values == right.values
    assert plain(sibling) == [sum(values[25 + row] for row in np.flatnonzero(index[25:] == at)) for at in range(4)]


def test_sums_element_by_element_and_parts_of_vectors(some: tuple[list[int], Ciphertexts]) -> None:
    values, ciphertexts = some
    assert plain(ciphertexts[:5] + ciphertexts[5:10]) == [a + b for a, b in zip(values[:5], values[5:10], strict=True)]
    mixed = Ciphertexts.concatenate([ciphertexts[[3, 1]], ciphertexts[np.array([2])], ciphertexts[:0]])
    assert plain(mixed) == [values[3], values[1], values[2]]
    assert len(mixed) == 3


def test_a_matrix_times_a_vector_is_that_of_the_plaintexts(some: tuple[list[int], Ciphertexts]) -> None:
    values, ciphertexts = some
    matrix = chance(14).integers(-(2**23), 2**23, 180).reshape(3, 60)
    product = ciphertexts.multiply(matrix)
    assert plain(product) == [sum(a * b for a, b in zip(row, values, strict=True)) for row in matrix.tolist()]
    assert read_by_phe(key(), 2048, product) == [value % key().public.n for value in plain(product)]
    wide = [[(-1) ** place * 2**127 + place for place in range(60)], [0] * 60]
    assert plain(ciphertexts.multiply(wide)) == [sum(a * b for a, b in zip(row, values, strict=True)) for row in wide]


def test_a_vector_may_be_empty(owner: Owner, stranger: Stranger) -> None:
    for by in (owner, stranger, Owner(key(), chance(), 0)):
        empty = by.encrypt([], chance())
        assert len(empty) == len(empty + empty) == len(empty - empty) == len(empty.prefix_sums()) == 0
        assert len(Ciphertexts.from_array(key().public, empty.to_array(), 0)) == 0
        assert plain(empty.sums(np.zeros(0, np.int64), 2)) == plain(empty.multiply([[], []])) == [0, 0]


def test_integers_of_numpy_are_integers(owner: Owner) -> None:
    assert plain(owner.encrypt(np.array([2**62, -7]), chance())) == [2**62, -7]


def test_what_does_not_fit_is_refused(some: tuple[list[int], Ciphertexts]) -> None:
    _, ciphertexts = some
    foreign = Ciphertexts(key(2048, 1).public, ciphertexts.values)
    for wrong in (
        lambda: ciphertexts + foreign,
        lambda: ciphertexts - foreign,
        lambda: Ciphertexts.concatenate([ciphertexts, foreign]),
        lambda: key().decrypt(foreign),
        lambda: ciphertexts.sums(np.zeros(59, np.int64), 3),
        lambda: ciphertexts.sums(np.full(60, 3), 3),
        lambda: ciphertexts.multiply([[1] * 59]),
    ):
        with pytest.raises(LocalProtocolError):
            wrong()
    with pytest.raises(ValueError):
        _ = ciphertexts + ciphertexts[1:]
