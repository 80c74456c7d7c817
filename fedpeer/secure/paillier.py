"""Paillier's encryption of integers, many at a time: keys, what proves them, and vectors of ciphertexts.

Who encrypts knows p and q (`Owner`) or does not (`Stranger`); both give ciphertexts that add up: E(a)·E(b) = E(a + b)
modulo n². phe.PaillierPrivateKey reads every one of them (without its exponents: integers only).

Rules
* |n| is 2048 or 3072. The daemon makes a key by phe before the stage starts, one for each contract; a worker is given p
  and q, and never makes one.
* n from another peer counts with its certificate only. The shape of n is checked wherever it comes from, but it is the
  certificate that shows gcd(n, φ(n)) = 1, without which r^n covers but a part of what hides a plaintext.
* Ciphertexts of others are below n², not 0, and have no factor in common with n; one that has is refused with all that
  came with it.
* Each ciphertext has noise of its own, within 2^-64 of the textbook's law (residues.Noise), drawn from `peers.random`
  when it is used. A sum or a product has what its parts had, and none if there were none: it does not leave before a
  fresh encryption was added to it (packing.py).
* `Owner` and `Stranger` of many encryptions make tables of bases, reusable, in seconds: before `spread`, so that all
  cores share them.
* The exponents that an owner keeps secret take the same time and memory whatever the ciphertext is (powmod_sec).

Source: Paillier, Public-Key Cryptosystems Based on Composite Degree Residuosity Classes, 1999; decryption by p and q
from its section 7. The certificate: Goldberg, Reyzin, Sagga, Baldimtsi, Efficient Noninteractive Certification of RSA
Moduli and Beyond, 2019 (eprint 2018/057), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, Final, TypeVar

import gmpy2
import numpy as np
import numpy.typing as npt

from fedpeer.crypto import chacha20_stream, hash_
from fedpeer.errors import LocalProtocolError, RemoteProtocolError, TrustError
from fedpeer.peers import Chance, Peers
from fedpeer.secure import residues
from fedpeer.secure.residues import Index, Noise

T = TypeVar("T")
Rows = npt.NDArray[np.uint8]

LENGTHS: Final = (2048, 3072)
"""bits of n"""
SMALL: Final = 1 << 16
"""no prime below divides n"""
ROOTS: Final = 11
"""of a certificate; each that is there, though gcd(n, φ(n)) > 1, was luck of at most 1 : SMALL"""
OWNER_BASES: Final = {2048: 96, 3072: 139}
"""of 12 bits, for each prime"""
STRANGER_BASES: Final = {2048: 272, 3072: 400}
"""of 8 bits"""
OWNER_TABLE_FROM: Final = 1500
"""encryptions: fewer are faster without a table"""
STRANGER_TABLE_FROM: Final = 400
PART: Final = 1024
"""numbers that `spread` should give to one process at a time"""

_PRIMORIAL: Final = gmpy2.primorial(SMALL)


class PublicKey:
    """n, its shape checked. Raises TrustError for what no Paillier key looks like."""

    def __init__(self, n: int) -> None:
        if n < 0 or n.bit_length() not in LENGTHS:
            raise TrustError(f"a Paillier key that is negative, or of {n.bit_length()} bits and not of 2048 or 3072")
        if gmpy2.gcd(n, _PRIMORIAL) != 1:
            raise TrustError(f"a Paillier key with a factor below {SMALL}")
        if gmpy2.is_power(n) or gmpy2.is_prime(n):
            raise TrustError("a Paillier key that is a power or a prime, not a product of two primes")
        self.n: int = gmpy2.mpz(n)
        self.square: int = self.n * self.n
        self.bits: int = n.bit_length()
        self.width = 2 * self.bits // 8
        """bytes of a ciphertext"""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and self.n == other.n

    def __hash__(self) -> int:
        return hash(self.n)

    def __repr__(self) -> str:
        return f"<Paillier key of {self.bits} bits>"

    def centred(self, residues_: Iterable[int]) -> list[int]:
        """The numbers from -n/2 to n/2 that these are modulo n."""
        half = self.n >> 1
        return [int((value + half) % self.n - half) for value in residues_]


class PrivateKey:
    """p and q, as phe makes them. It shows in no repr, and cannot be pickled. TrustError for what is no such pair."""

    __slots__ = ("_crt", "_p", "_q", "public")

    def __init__(self, p: int, q: int) -> None:
        self._p, self._q = gmpy2.mpz(p), gmpy2.mpz(q)
        self.public = PublicKey(p * q)
        if p == q or not (gmpy2.is_prime(self._p) and gmpy2.is_prime(self._q)):
            raise TrustError("what makes up a Paillier key are not two primes")
        if gmpy2.gcd(self.public.n, (self._p - 1) * (self._q - 1)) != 1:
            raise TrustError("a Paillier key with a prime that divides the other one less one")
        self._crt = gmpy2.invert(self._q, self._p)

    def __repr__(self) -> str:
        return "<Paillier private key>"

    def __reduce__(self) -> Any:
        raise TypeError("a private key is not serialisable")

    def decrypt(self, ciphertexts: Ciphertexts) -> list[int]:
        """Plaintexts in [0, n)."""
        if ciphertexts.public != self.public:
            raise LocalProtocolError("ciphertexts under another key")
        by_p = _decrypt(ciphertexts.values, self._p, self._q)
        by_q = _decrypt(ciphertexts.values, self._q, self._p)
        p, q, crt = self._p, self._q, self._crt
        return [int(b + q * ((a - b) * crt % p)) for a, b in zip(by_p, by_q, strict=True)]

    def nth_root(self, value: int) -> int:
        """z with z^n ≡ value modulo n."""
        n, p, q = self.public.n, self._p, self._q
        a = gmpy2.powmod_sec(value, gmpy2.invert(n, p - 1), p)
        b = gmpy2.powmod_sec(value, gmpy2.invert(n, q - 1), q)
        return int(b + q * ((a - b) * self._crt % p))


def _decrypt(ciphertexts: Sequence[int], p: int, q: int) -> list[int]:
    """Plaintexts modulo p: c^(p-1) is 1 + p·(-q)·plaintext modulo p²."""
    square, scale = p * p, gmpy2.invert(-q, p)
    powers = (gmpy2.powmod_sec(value % square, p - 1, square) for value in ciphertexts)
    return [(power - 1) // p * scale % p for power in powers]


def private_key(primes: bytes) -> PrivateKey:
    """Of p and q, big-endian, one after the other. Raises TrustError."""
    half = len(primes) // 2
    return PrivateKey(int.from_bytes(primes[:half], "big"), int.from_bytes(primes[half:], "big"))


def own_key(peers: Peers) -> PrivateKey:
    """This participant's key in its stage, which declares one for its role."""
    if peers.keys.own is None:
        raise LocalProtocolError(f"the role {peers.role!r} has no Paillier key in this stage")
    return private_key(peers.keys.own.reveal())


def key_of(peers: Peers, alias: str) -> PublicKey:
    """The key of a participant whose role has one."""
    return PublicKey(peers.keys.moduli[alias])


# certificates


def certify(private: PrivateKey, peer: bytes, contract: bytes) -> bytes:
    """What shows that gcd(n, φ(n)) = 1: n-th roots of numbers that nobody chose, for this owner and contract."""
    roots = [private.nth_root(value) for value in _challenges(private.public, peer, contract)]
    return b"".join(root.to_bytes(private.public.width // 2, "big") for root in roots)


def verify_certificate(public: PublicKey, peer: bytes, contract: bytes, certificate: bytes) -> None:
    """Raise TrustError unless the certificate is of this key, peer and contract."""
    width = public.width // 2
    if len(certificate) != ROOTS * width:
        raise TrustError("a certificate of a Paillier key that has not the right length")
    roots = [int.from_bytes(certificate[at : at + width], "big") for at in range(0, len(certificate), width)]
    for root, value in zip(roots, _challenges(public, peer, contract), strict=True):
        if not 0 < root < public.n or gmpy2.powmod(root, public.n, public.n) != value:
            raise TrustError("a certificate that is not of this Paillier key, this peer and this contract")


def _challenges(public: PublicKey, peer: bytes, contract: bytes) -> list[int]:
    """ROOTS numbers below n, uniform but for 2^-128."""
    width = public.width // 2
    n = int(public.n).to_bytes(width, "big")
    found = []
    for number in range(ROOTS):
        seed = hash_("fp.he.root", n, peer, contract, number.to_bytes(4, "little"))
        found.append(int.from_bytes(chacha20_stream(seed, bytes(12), bytes(width + 16)), "big") % public.n)
    return found


# vectors of ciphertexts


class Ciphertexts:
    """A vector of ciphertexts under one key; it is never changed. Others' come by `from_array`."""

    def __init__(self, public: PublicKey, values: Sequence[int]) -> None:
        self.public = public
        self.values = values
        """units modulo n²"""

    @classmethod
    def from_array(cls, public: PublicKey, array: Any, count: int) -> Ciphertexts:
        """What another peer sent, `count` of them. Raises RemoteProtocolError for anything else."""
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape != (count, public.width):
            raise RemoteProtocolError(f"not {count} ciphertexts of {public.width} bytes")
        values = _integers(array)
        n, product = public.n, residues.ONE
        for value in values:
            if not 0 < value < public.square:
                raise RemoteProtocolError("a ciphertext that is 0 or not below n²")
            product = product * value % n
        if gmpy2.gcd(product, n) != 1:
            raise RemoteProtocolError("a ciphertext that has a factor in common with n")
        return cls(public, values)

    def to_array(self) -> Rows:
        """A message value: uint8 of shape (count, width), big-endian."""
        width = self.public.width
        raw = b"".join(int(value).to_bytes(width, "big") for value in self.values)
        return np.frombuffer(raw, np.uint8).reshape(-1, width)

    @classmethod
    def concatenate(cls, parts: Sequence[Ciphertexts]) -> Ciphertexts:
        """One after the other; at least one, all under one key."""
        for part in parts:
            parts[0]._like(part)
        return cls(parts[0].public, [value for part in parts for value in part.values])

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, places: slice | Sequence[int] | Index) -> Ciphertexts:
        if isinstance(places, slice):
            return Ciphertexts(self.public, self.values[places])
        return Ciphertexts(self.public, [self.values[place] for place in places])

    def __add__(self, other: Ciphertexts) -> Ciphertexts:
        """Element by element."""
        self._like(other)
        square = self.public.square
        return Ciphertexts(self.public, [a * b % square for a, b in zip(self.values, other.values, strict=True)])

    def __sub__(self, other: Ciphertexts) -> Ciphertexts:
        self._like(other)
        return self + Ciphertexts(self.public, residues.inverses_squared(other.values, self.public.n))

    def prepare(self) -> Ciphertexts:
        """Itself, made ready for `sums` of every one of it at least four times; before `spread`."""
        _ = self._split
        return self

    @cached_property
    def _split(self) -> residues.Split:
        return residues.split(self.values, self.public.n)

    def sums(self, index: Index, count: int) -> Ciphertexts:
        """Of those with index 0, of those with 1, … count - 1. `index`: one for each; a negative one is left out."""
        if index.shape != (len(self),) or (len(index) and int(index.max()) >= count):
            raise LocalProtocolError("an index that does not fit the ciphertexts and the number of sums")
        if "_split" in self.__dict__:
            return Ciphertexts(self.public, residues.split_products(self._split, index, count, self.public.n))
        return Ciphertexts(self.public, residues.products(self.values, index, count, self.public.n))

    def prefix_sums(self) -> Ciphertexts:
        """The sum of the first, of the first two, …"""
        square, total, found = self.public.square, residues.ONE, []
        for value in self.values:
            total = total * value % square
            found.append(total)
        return Ciphertexts(self.public, found)

    def multiply(self, matrix: Sequence[Sequence[int]] | npt.NDArray[Any]) -> Ciphertexts:
        """Σ matrix[i][j]·plaintext[j] for each i. `matrix`: signed integers of any length, shape (rows, len(self))."""
        rows = matrix.tolist() if isinstance(matrix, np.ndarray) else matrix
        if any(len(row) != len(self) for row in rows):
            raise LocalProtocolError("a matrix whose rows do not fit the ciphertexts")
        return Ciphertexts(self.public, residues.power_products(self._split, rows, self.public.n))

    def _like(self, other: Ciphertexts) -> None:
        if self.public != other.public:
            raise LocalProtocolError("ciphertexts under different keys")


def _integers(array: Rows) -> list[int]:
    return [gmpy2.mpz(int.from_bytes(row.tobytes(), "big")) for row in array]


# encryption


class Owner:
    """Encrypts under its own key. `count`: how many encryptions, about; many pay for tables of 200 MB (3072: 440)."""

    def __init__(self, private: PrivateKey, random: Chance, count: int) -> None:
        self.public = private.public
        self._p, self._q = private._p, private._q
        bases = OWNER_BASES[self.public.bits] if count >= OWNER_TABLE_FROM else 0
        self._by_p = Noise(self._p, random, bases, 12, first_is_no_square=True)
        self._by_q = Noise(self._q, random, bases, 12, first_is_no_square=True)
        self._crt = gmpy2.invert(self._q**2, self._p**2)

    def encrypt(self, values: Sequence[int], random: Chance) -> Ciphertexts:
        """Integers modulo n; negative ones, too."""
        p, q = self._p, self._q
        by_p = _encrypt(values, self._by_p.draw(len(values), random), p, q)
        by_q = _encrypt(values, self._by_q.draw(len(values), random), q, p)
        crt, p2, q2 = self._crt, p * p, q * q
        return Ciphertexts(self.public, [b + q2 * ((a - b) * crt % p2) for a, b in zip(by_p, by_q, strict=True)])

    def __repr__(self) -> str:
        return "<owner of a Paillier key>"


class Stranger:
    """Encrypts under another peer's key. `count`: how many encryptions, about; many pay for a table of 38 MB."""

    def __init__(self, public: PublicKey, random: Chance, count: int) -> None:
        self.public = public
        bases = STRANGER_BASES[public.bits] if count >= STRANGER_TABLE_FROM else 0
        self._noise = Noise(public.n, random, bases, 8)

    def encrypt(self, values: Sequence[int], random: Chance) -> Ciphertexts:
        """Integers modulo n; negative ones, too."""
        return Ciphertexts(self.public, _encrypt(values, self._noise.draw(len(values), random), self.public.n, 1))


def _encrypt(values: Sequence[int], noise: residues.Split, m: int, rest: int) -> list[int]:
    """(1 + n·value)·noise modulo m², n = m·rest: the plaintext is added to the noise's t."""
    x, t = noise
    return residues.join(x, [a + rest * int(value) for a, value in zip(t, values, strict=True)], m)


# on all cores


def spread(peers: Peers, public: PublicKey, function: Callable[[T], Ciphertexts], items: Sequence[T]) -> Ciphertexts:
    """function(item) for each item, one after the other in one vector, computed on all cores (Peers.map).

    The function draws from `peers.random`, which is another one for each item. Items are `parts` of the data, columns,
    or rows of a matrix, and never as many as there are cores: then the bytes are the same on any number of them.
    """
    arrays: list[Rows] = peers.map(lambda item: function(item).to_array(), items)
    return Ciphertexts(public, [value for array in arrays for value in _integers(array)])


def parts(values: Sequence[int]) -> list[Sequence[int]]:
    """In order, PART of them at a time."""
    return [values[start : start + PART] for start in range(0, len(values), PART)]
