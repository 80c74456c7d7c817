"""The only importer of nacl and of cryptography: identities, signatures, agreement, sealing, hashing, streams.

Rules
* A secret is a `Secret`: its repr, str and format say nothing, and it cannot be pickled.
* Every hash and signature has a label (the `person` of BLAKE2b), so that no statement can be taken for another.
* Low-order X25519 points raise TrustError here, never RuntimeError further up.
* Zeroization is not promised: Python and libsodium keep copies. Core dumps and swap are the operator's to forbid.

Source: RFC 7693 (BLAKE2), RFC 8032 (Ed25519), RFC 7748 (X25519), RFC 8439 (ChaCha20-Poly1305),
draft-irtf-cfrg-aegis-aead (AEGIS-256).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import nacl.bindings as sodium
import nacl.exceptions
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from nacl._sodium import ffi as _ffi  # what nacl.bindings itself calls; see aegis256_into
from nacl._sodium import lib as _lib

from fedpeer.errors import LocalProtocolError, TrustError

Buffer = bytes | bytearray | memoryview
KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
TAG_BYTES: Final = 16


class Secret:
    """32 secret bytes (or as many as given) that no log, repr or format can show."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def reveal(self) -> bytes:
        """The bytes themselves, for a cryptographic call and nothing else."""
        return self._value

    @classmethod
    def random(cls, size: int = KEY_BYTES) -> Secret:
        return cls(os.urandom(size))

    def __repr__(self) -> str:
        return "<secret>"

    __str__ = __repr__

    def __format__(self, _spec: str) -> str:
        return "<secret>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value, other._value)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        raise TypeError("a secret is not serialisable")


def random_bytes(size: int) -> bytes:
    """Bytes from the operating system's generator."""
    return os.urandom(size)


def hash_(label: str, *parts: Buffer, key: bytes = b"", size: int = 32) -> bytes:
    """BLAKE2b with a label of at most 16 bytes over the length-prefixed parts (secure-aggregation, section 3)."""
    return _hashed(label, parts, key, size).digest()


def hash_rows(label: str, rows: Iterable[bytes], *, key: bytes, size: int) -> bytes:
    """`hash_(label, row, key=key, size=size)` of each row, one after the other; half the time of as many calls."""
    copy, digests = _labelled(label, key, size).copy, []
    lengths = [n.to_bytes(8, "little") for n in range(256)]
    for row in rows:
        state = copy()
        state.update((lengths[len(row)] if len(row) < 256 else len(row).to_bytes(8, "little")) + row)
        digests.append(state.digest())
    return b"".join(digests)


class Hasher:
    """`hash_` over parts of which the last comes in pieces: its length is known before its bytes."""

    __slots__ = ("_left", "_state")

    def __init__(self, label: str, *parts: Buffer, last: int) -> None:
        self._state = _hashed(label, parts, b"", 32)
        self._state.update(struct.pack("<Q", last))
        self._left = last

    def update(self, data: Buffer) -> None:
        """The next bytes of the last part. Raises LocalProtocolError for more than were announced."""
        self._left -= memoryview(data).nbytes
        if self._left < 0:
            raise LocalProtocolError("more bytes to hash than were announced")
        self._state.update(data)

    def digest(self) -> bytes:
        """32 bytes. Raises LocalProtocolError before the last byte has come."""
        if self._left:
            raise LocalProtocolError("fewer bytes to hash than were announced")
        return self._state.digest()


def _hashed(label: str, parts: Iterable[Buffer], key: bytes, size: int) -> hashlib.blake2b:
    state = _labelled(label, key, size) if key else _unkeyed(label, size).copy()
    for part in parts:
        nbytes = len(part) if type(part) is bytes else memoryview(part).nbytes
        state.update(nbytes.to_bytes(8, "little"))
        state.update(part)
    return state


def _labelled(label: str, key: bytes, size: int) -> hashlib.blake2b:
    person = label.encode()
    if len(person) > 16:
        raise LocalProtocolError(f"the label {label!r} is longer than 16 bytes")
    return hashlib.blake2b(digest_size=size, key=key, person=person.ljust(16, b"\0"))


@lru_cache
def _unkeyed(label: str, size: int) -> hashlib.blake2b:
    """To be copied: half of the cost of a short hash is its beginning."""
    return _labelled(label, b"", size)


def equal(a: bytes, b: bytes) -> bool:
    """Compare without telling where the difference is."""
    return hmac.compare_digest(a, b)


# Ed25519


class SigningKey:
    """An Ed25519 key of this peer."""

    __slots__ = ("_secret", "public")

    def __init__(self, seed: Secret) -> None:
        self.public, secret = sodium.crypto_sign_seed_keypair(seed.reveal())
        self._secret = Secret(secret)

    def sign(self, kind: str, body: Buffer, *, label: str = "fp.sig") -> bytes:
        """A detached signature (64 bytes) over the kind of statement and its bytes."""
        message = hash_(label, kind.encode(), body)
        signed: bytes = sodium.crypto_sign(message, self._secret.reveal())
        return signed[:SIGNATURE_BYTES]

    def __repr__(self) -> str:
        return f"SigningKey(public={self.public.hex()[:12]}…)"


def verify(public: bytes, kind: str, body: Buffer, signature: bytes, *, label: str = "fp.sig") -> None:
    """Raise TrustError unless `signature` is by `public` over this kind and body."""
    try:
        if len(public) != KEY_BYTES or len(signature) != SIGNATURE_BYTES:
            raise ValueError
        sodium.crypto_sign_open(signature + hash_(label, kind.encode(), body), public)
    except (nacl.exceptions.CryptoError, ValueError, TypeError):
        raise TrustError(f"the signature on a {kind} does not fit its sender's key") from None


# X25519


class DhKey:
    """An X25519 key pair."""

    __slots__ = ("_secret", "public")

    def __init__(self, secret: Secret) -> None:
        self._secret = secret
        self.public: bytes = sodium.crypto_scalarmult_base(secret.reveal())

    @classmethod
    def random(cls) -> DhKey:
        return cls(Secret.random())

    def exchange(self, public: bytes) -> bytes:
        """The shared secret (32 bytes). Raises TrustError for a point of low order or a wrong length."""
        if len(public) != KEY_BYTES:  # the binding does not look, and libsodium reads 32 bytes wherever they are
            raise TrustError("an X25519 public key of wrong length")
        try:
            shared: bytes = sodium.crypto_scalarmult(self._secret.reveal(), public)
        except (RuntimeError, ValueError, TypeError, nacl.exceptions.CryptoError):
            raise TrustError("an X25519 public key of low order") from None
        return shared

    def __repr__(self) -> str:
        return f"DhKey(public={self.public.hex()[:12]}…)"


# sealing


class Aead:
    """ChaCha20-Poly1305 under one key with 96-bit nonces given by the caller (bulk speed, one context)."""

    __slots__ = ("_cipher",)

    def __init__(self, key: bytes) -> None:
        self._cipher = ChaCha20Poly1305(key)

    def seal(self, nonce: bytes, plaintext: Buffer, associated: Buffer = b"") -> bytes:
        return self._cipher.encrypt(nonce, plaintext, associated)

    def open(self, nonce: bytes, sealed: Buffer, associated: Buffer = b"") -> bytes:
        """The plaintext; raises TrustError if a bit was changed."""
        try:
            return self._cipher.decrypt(nonce, sealed, associated)
        except InvalidTag:
            raise TrustError("sealed bytes were changed") from None

    def seal_into(self, nonce: bytes, plaintext: Buffer, associated: Buffer, out: memoryview) -> int:
        """Seal into `out` (16 bytes longer than the plaintext) without another copy; the number of bytes written."""
        return self._cipher.encrypt_into(nonce, plaintext, associated, out)

    def open_into(self, nonce: bytes, sealed: Buffer, associated: Buffer, out: memoryview) -> int:
        """Open into `out` (16 bytes shorter than the sealed bytes); raises TrustError if a bit was changed."""
        try:
            return self._cipher.decrypt_into(nonce, sealed, associated, out)
        except InvalidTag:
            raise TrustError("sealed bytes were changed") from None


# streams for masks


def chacha20_stream(seed: bytes, nonce: bytes, zeros: Buffer) -> bytes:
    """The first len(zeros) bytes of ChaCha20 (RFC 8439, counter from 1) under (seed, 96-bit nonce)."""
    sealed: bytes = sodium.crypto_aead_chacha20poly1305_ietf_encrypt(bytes(zeros), None, nonce, seed)
    return sealed[: len(zeros)]


STREAM_BYTES: Final = 1 << 20
"""the longest stream of one nonce"""
STREAM_SLACK: Final = 32
"""how many bytes behind the stream are overwritten"""
_ZEROS: Final = bytes(STREAM_BYTES)


def has_aes() -> bool:
    """Whether this processor does AES itself: without it AEGIS is slow, and not free of side channels."""
    try:
        with Path("/proc/cpuinfo").open(encoding="ascii", errors="replace") as file:
            return any(line.startswith(("flags", "Features")) and " aes" in line for line in file)
    except OSError:
        return False


def aegis256_into(seed: bytes, nonce: bytes, out: bytearray, size: int) -> None:
    """Write the first `size` bytes of the AEGIS-256 keystream to `out`, which has STREAM_SLACK bytes more.

    This is the call behind nacl.bindings.crypto_aead_aegis256_encrypt without its two copies and fresh pages, which
    cost ten times the cipher. Sizes are checked here, as libsodium looks at none. The interpreter's lock is released.
    """
    if not (len(seed) == len(nonce) == 32 and 0 <= size <= STREAM_BYTES and len(out) >= size + STREAM_SLACK):
        raise LocalProtocolError("a stream of a wrong size")
    target = _ffi.from_buffer("unsigned char[]", out, True)
    if _lib.crypto_aead_aegis256_encrypt(target, _ffi.NULL, _ZEROS, size, _ffi.NULL, 0, _ffi.NULL, nonce, seed) != 0:
        raise LocalProtocolError("no stream")


def chacha20_into(seed: bytes, nonce: bytes, out: bytearray, size: int) -> None:
    """Write the first `size` bytes of ChaCha20 (RFC 8439, counter from 1; 96-bit nonce) to `out`, sized as above."""
    if not (len(seed) == 32 and len(nonce) == 12 and 0 <= size <= STREAM_BYTES and len(out) >= size + STREAM_SLACK):
        raise LocalProtocolError("a stream of a wrong size")
    cipher = Cipher(algorithms.ChaCha20(seed, struct.pack("<I", 1) + nonce), mode=None)
    cipher.encryptor().update_into(memoryview(_ZEROS)[:size], out)


# AES-128 in bulk, for oblivious transfer

AES_BYTES: Final = 16
"""of a key and of a block"""


def aes_stream_into(key: bytes, counter: int, out: memoryview) -> None:
    """Write len(out) bytes of AES-128-CTR to `out`: the blocks from `counter` on, big-endian in 16 bytes."""
    if len(key) != AES_BYTES:
        raise LocalProtocolError("a stream of a wrong size")
    stream = Cipher(algorithms.AES(key), modes.CTR(counter.to_bytes(AES_BYTES, "big"))).encryptor()
    for at in range(0, len(out), STREAM_BYTES):
        part = out[at : at + STREAM_BYTES]
        stream.update_into(memoryview(_ZEROS)[: len(part)], part)


class Permutation:
    """AES-128 under a key that all parties know, as a fixed permutation of blocks of 16 bytes. It encrypts nothing."""

    __slots__ = ("_cipher",)

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES(key), modes.ECB())  # noqa: S305 - the permutation itself is wanted

    def into(self, blocks: Buffer, out: Buffer) -> None:
        """π of each block of `blocks` to `out`, which has at least 15 bytes more."""
        self._cipher.encryptor().update_into(blocks, out)


# the Edwards curve, for private set intersection


def edwards_from_uniform(uniform: bytes) -> bytes:
    """A point of the main subgroup's coset from 32 uniform bytes (Elligator 2, cofactor cleared)."""
    point: bytes = sodium.crypto_core_ed25519_from_uniform(uniform)
    return point


def edwards_add(a: bytes, b: bytes) -> bytes:
    point: bytes = sodium.crypto_core_ed25519_add(a, b)
    return point


def edwards_subtract(a: bytes, b: bytes) -> bytes:
    point: bytes = sodium.crypto_core_ed25519_sub(a, b)
    return point


def edwards_scalar(uniform: bytes) -> bytes:
    """A scalar modulo the order of the main subgroup from 64 uniform bytes."""
    scalar: bytes = sodium.crypto_core_ed25519_scalar_reduce(uniform)
    return scalar


def edwards_base(scalar: bytes) -> bytes:
    """scalar·G without clamping. Raises TrustError for a scalar that is zero."""
    try:
        point: bytes = sodium.crypto_scalarmult_ed25519_base_noclamp(scalar)
    except (RuntimeError, ValueError, TypeError, nacl.exceptions.CryptoError):
        raise TrustError("a scalar that is zero") from None
    return point


def edwards_is_valid(point: bytes) -> bool:
    """Whether it is a canonical point of the main subgroup and not of small order (PyNaCl ≥ 1.6.2)."""
    return bool(sodium.crypto_core_ed25519_is_valid_point(point))


def edwards_multiply(scalar: bytes, point: bytes) -> bytes:
    """scalar·point without clamping. Raises TrustError for the identity or an invalid point."""
    try:
        product: bytes = sodium.crypto_scalarmult_ed25519_noclamp(scalar, point)
    except (RuntimeError, ValueError, TypeError, nacl.exceptions.CryptoError):
        raise TrustError("a point of small order") from None
    return product


def edwards_to_x25519(point: bytes) -> bytes:
    """The Montgomery u-coordinate of an Edwards point."""
    u: bytes = sodium.crypto_sign_ed25519_pk_to_curve25519(point)
    return u


def x25519(scalar: bytes, point: bytes) -> bytes:
    """Clamped scalar multiplication; raises TrustError for the all-zero result or a wrong length."""
    if len(scalar) != KEY_BYTES or len(point) != KEY_BYTES:  # the binding does not look
        raise TrustError("an X25519 scalar or point of wrong length")
    try:
        product: bytes = sodium.crypto_scalarmult(scalar, point)
    except (RuntimeError, ValueError, TypeError, nacl.exceptions.CryptoError):
        raise TrustError("an X25519 point of low order") from None
    return product
