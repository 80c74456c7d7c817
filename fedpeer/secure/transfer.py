"""Oblivious transfer and its extension: an oblivious pseudorandom function for millions of ids, in bulk arithmetic.

How it works
    The receiver of the function has one input in each bin, the sender gets the function of every bin. 512 base
    transfers on edwards25519 come first: the *sender* chooses one of two keys in each, by the bits of its secret s.
    Each key is stretched to a column of one bit a bin. T0 and T1 are the columns of the two keys as rows of 512 bits,
    one row a bin. The receiver sends U = T0 ⊕ T1 ⊕ C(input of the bin), where C is a pseudorandom code, and the sender
    makes q = T_s ⊕ (U ∧ s) of it. Then q ⊕ (C(x) ∧ s) is T0 where x is the bin's input, and differs in the bits of s
    where C differs for any other x: at least 128 of 512. What both have is the hash of that row.

Rules
* Semi-honest, as it stands: a receiver that flips a bit of U for an input that it knows to be common reads a bit of s
  from the answer, and with s it can test every input offline. Where that matters it is not used (secure/psi.py is).
* Points are checked before they are used: with a small-order part in the offer a choice would show its bit.
* One s meets one U: a daemon gives a repeated step the same message or none.
* Both points of a choice are computed, whatever its bit is.
* Everything is keyed by the session. The row hash takes bin and index as a tweak, so that equal rows do not show.
* The hash is taken to be tweakable correlation-robust; argued in the ideal-permutation model for AES, and not a
  theorem for an input of 512 bits, which is first folded into one of 128 through the permutation.

Source: Kolesnikov, Kumaresan, Rosulek, Trieu (CCS 2016) for the function; Ishai, Kilian, Nissim, Petrank (Crypto 2003)
for the extension; Chou, Orlandi (Latincrypt 2015) for the base transfers; Guo, Katz, Wang, Yu (S&P 2020), TMMO, for the
hash; Warren, Hacker's Delight, 7-3, for the transposition of bits.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedpeer import crypto
from fedpeer.crypto import AES_BYTES, Permutation, Secret, hash_
from fedpeer.errors import RemoteProtocolError
from fedpeer.secure.ids import are_ascending

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]
"""Rows of 64-bit words: (n, 8) is n rows of 512 bits, (n, 2) n blocks."""

WIDTH: Final = 512
"""Bits of the code, and number of base transfers. Two inputs of 3 · 10^7 have a distance below 128 with 2^-77."""
ROW_BYTES: Final = WIDTH // 8
POINT_BYTES: Final = 32
SCALAR_BYTES: Final = 64
"""random bytes of one scalar"""
TAG_BYTES: Final = 12
_ROWS: Final = 1 << 12
"""that are worked on at once: a quarter of a megabyte, which stays in the cache"""
_WORDS: Final = 64
"""of each of 64 columns that are transposed at once"""
_NUMBERS: Final = np.arange(1, 5, dtype=np.uint64)
_MASKS: Final = {
    step: np.uint64(sum((1 << step) - 1 << at for at in range(0, 64, 2 * step))) for step in (32, 16, 8, 4, 2, 1)
}


# base transfers


def check_offer(value: Any) -> bytes:
    """The receiver's point A. Raises RemoteProtocolError unless it is a point of the main subgroup."""
    if not isinstance(value, bytes) or len(value) != POINT_BYTES or not crypto.edwards_is_valid(value):
        raise RemoteProtocolError("no point of the main subgroup")
    return value


def check_choices(value: Any) -> Bytes:
    """The sender's points B. Raises RemoteProtocolError unless they are 512 points of the main subgroup."""
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.shape != (WIDTH, POINT_BYTES):
        raise RemoteProtocolError(f"not {WIDTH} points of {POINT_BYTES} bytes")
    if not all(crypto.edwards_is_valid(row.tobytes()) for row in value):
        raise RemoteProtocolError("a point that is not of the main subgroup")
    return value


def offer(a: Secret) -> bytes:
    """A = a·G."""
    return crypto.edwards_base(a.reveal())


def choose(session: bytes, offered: bytes, s: Secret, scalars: Secret) -> tuple[Bytes, list[Secret]]:
    """B_i = b_i·G + s_i·A, shape (512, 32), and the key of each choice. `scalars`: 512 · 64 random bytes."""
    bits, random = np.unpackbits(np.frombuffer(s.reveal(), np.uint8), bitorder="little"), scalars.reveal()
    points, keys = [], []
    for i, bit in enumerate(bits.tolist()):
        b = crypto.edwards_scalar(random[i * SCALAR_BYTES : (i + 1) * SCALAR_BYTES])
        plain = crypto.edwards_base(b)
        both = plain, crypto.edwards_add(plain, offered)
        points.append(both[bit])
        keys.append(_key(session, offered, points[-1], i, crypto.edwards_multiply(b, offered)))
    return np.frombuffer(b"".join(points), np.uint8).reshape(WIDTH, POINT_BYTES), keys


def keys_of(session: bytes, a: Secret, chosen: Bytes) -> tuple[list[Secret], list[Secret]]:
    """Both keys of each transfer: of a·B_i and of a·(B_i - A)."""
    offered = offer(a)
    step = crypto.edwards_multiply(a.reveal(), offered)
    zeros, ones = [], []
    for i, row in enumerate(chosen):
        point = row.tobytes()
        shared = crypto.edwards_multiply(a.reveal(), point)
        zeros.append(_key(session, offered, point, i, shared))
        ones.append(_key(session, offered, point, i, crypto.edwards_subtract(shared, step)))
    return zeros, ones


def _key(session: bytes, offered: bytes, chosen: bytes, i: int, shared: bytes) -> Secret:
    return Secret(hash_("fp.ot.key", offered, chosen, i.to_bytes(2, "little"), shared, key=session, size=AES_BYTES))


# rows of 512 bits, one a bin


def rows_of(columns: Bytes) -> Words:
    """The bits of 512 columns, shape (512, bins / 8), as rows: shape (bins, 8). Bit i of a row is of column i."""
    whole = columns.view(np.uint64).reshape(WIDTH // 64, 64, -1)
    out = np.empty((whole.shape[2], 64, WIDTH // 64), np.uint64)
    for at in range(0, whole.shape[2], _WORDS):
        part = whole[:, :, at : at + _WORDS]
        for group in range(WIDTH // 64):
            square = part[group].copy()
            for step in (32, 16, 8, 4, 2, 1):
                pairs = square.reshape(32 // step, 2, step, -1)
                low, high = pairs[:, 0], pairs[:, 1]
                swapped = low >> np.uint64(step)
                swapped ^= high
                swapped &= _MASKS[step]
                high ^= swapped
                swapped <<= np.uint64(step)
                low ^= swapped
            out[at : at + _WORDS, :, group] = square.T
    return out.reshape(-1, WIDTH // 64)


def stretched(keys: list[Secret], first: int, count: int) -> Bytes:
    """The columns of these keys for `count` bins from `first` on, both multiples of 128; shape (512, count / 8)."""
    out = np.empty((len(keys), count // 8), np.uint8)
    for key, row in zip(keys, out, strict=True):
        crypto.aes_stream_into(key.reveal(), first // 128, row.data)
    return out


def masked(keys: tuple[list[Secret], list[Secret]], first: int, codewords: Words) -> tuple[Words, Words]:
    """U and T0 of the bins from `first` on, whose inputs have these codewords; each of shape (bins, 8)."""
    zeros, ones = (stretched(of, first, len(codewords)) for of in keys)
    ones ^= zeros
    u = rows_of(ones)
    u ^= codewords
    return u, rows_of(zeros)


def unmasked(keys: list[Secret], s: Secret, first: int, u: Words) -> Words:
    """q of the bins from `first` on, shape (bins, 8)."""
    q = rows_of(stretched(keys, first, len(u)))
    q ^= u & words(s)
    return q


def check_masked(value: Any, bins: int) -> Words:
    """U of so many bins. Any bits are possible: nothing else can be checked."""
    if not isinstance(value, np.ndarray) or value.dtype != np.uint64 or value.shape != (bins, ROW_BYTES // 8):
        raise RemoteProtocolError(f"not {bins} rows of {ROW_BYTES} bytes")
    return value


def check_list(value: Any, count: int) -> Bytes:
    """`count` tags, ascending, none twice. Raises RemoteProtocolError."""
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.shape != (count, TAG_BYTES):
        raise RemoteProtocolError(f"not {count} tags of {TAG_BYTES} bytes")
    if not are_ascending(value):
        raise RemoteProtocolError("tags that are not sorted")
    return value


def words(s: Secret) -> Words:
    return np.frombuffer(s.reveal(), np.uint64)


# code and hash


class Function:
    """The code and the hash of a session."""

    def __init__(self, session: bytes) -> None:
        self._code = Permutation(hash_("fp.kkrt.code", key=session, size=AES_BYTES))
        self._hash = Permutation(hash_("fp.kkrt.pi", key=session, size=AES_BYTES))

    def codewords(self, inputs: Words) -> Words:
        """C(h) = π'(h ⊕ 1) ‖ … ‖ π'(h ⊕ 4) of blocks h, shape (n, 2) → (n, 8)."""
        out = np.empty((len(inputs), 8), np.uint64)
        for at in range(0, len(inputs), _ROWS):
            part = inputs[at : at + _ROWS]
            blocks = np.empty((len(part), 4, 2), np.uint64)
            blocks[:, :, 0] = part[:, :1] ^ _NUMBERS
            blocks[:, :, 1] = part[:, 1:]
            out[at : at + _ROWS] = _permuted(self._code, blocks).reshape(-1, 8)
        return out

    def tags(self, rows: Words, bins: npt.NDArray[Any], index: npt.NDArray[Any] | int) -> Bytes:
        """The first 96 bits of the hash of each row for its bin and which of the three bins of its input that is.

        For x1 ‖ … ‖ x4 and τ = (bin, index): a = x1 ⊕ … ⊕ x4, b = π(a) ⊕ x2, c = π(b) ⊕ x3, d = π(c) ⊕ x4, e = π(d),
        and the hash is π(e ⊕ τ) ⊕ e. Shape (n, 12).
        """
        out = np.empty((len(rows), TAG_BYTES), np.uint8)
        index = np.broadcast_to(np.asarray(index), bins.shape)
        for at in range(0, len(rows), _ROWS):
            part = slice(at, at + _ROWS)
            out[part] = self._tags(rows[part], bins[part], index[part])
        return out

    def _tags(self, rows: Words, bins: npt.NDArray[Any], index: npt.NDArray[Any]) -> Bytes:
        x = rows.reshape(-1, 4, 2)
        state = x[:, 0] ^ x[:, 1]
        state ^= x[:, 2]
        state ^= x[:, 3]
        for j in (1, 2, 3):
            state = _permuted(self._hash, state)
            state ^= x[:, j]
        e = _permuted(self._hash, state)
        state[:, 0] = e[:, 0] ^ bins.astype(np.uint64)
        state[:, 1] = e[:, 1] ^ index.astype(np.uint64)
        hashed = _permuted(self._hash, state)
        hashed ^= e
        return hashed.view(np.uint8).reshape(-1, AES_BYTES)[:, :TAG_BYTES]

    def tags_of(self, q: Words, s: Secret, inputs: Words, places: npt.NDArray[np.int64], first: int, k: int) -> Bytes:
        """The sender's tags: of inputs, shape (n, 2), for their bins `places`; q is of the bins from `first` on."""
        out, secret = np.empty((len(inputs), TAG_BYTES), np.uint8), words(s)
        for at in range(0, len(inputs), _ROWS):
            part = slice(at, at + _ROWS)
            rows = self.codewords(inputs[part])
            rows &= secret
            rows ^= q.take(places[part] - first, axis=0)
            out[part] = self._tags(rows, places[part], np.broadcast_to(k, len(rows)))
        return out


def _permuted(permutation: Permutation, blocks: Words) -> Words:
    """π of each block; the shape of `blocks`."""
    out = np.empty(blocks.nbytes + AES_BYTES, np.uint8)
    permutation.into(np.ascontiguousarray(blocks).reshape(-1).view(np.uint8).data, out.data)
    return out[: blocks.nbytes].view(np.uint64).reshape(blocks.shape)
