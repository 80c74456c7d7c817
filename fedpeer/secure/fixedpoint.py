"""Values of a secure sum as a vector of small integers, and the sum of such vectors back as values.

Rules
* One dict of arrays is one vector: the entries by name, each in C order, then zeros up to d' = 256·⌈(d + 4) / 256⌉,
  so that at least four elements must come out as zero.
* `["int", B]`, exact: an integer v (also a boolean), -2^(B-1) ≤ v < 2^(B-1), becomes v + 2^(B-1) in ⌈B / 16⌉ limbs of
  16 bits. An entry of m values is limb-major: the least significant limbs of all its values first. B ≤ 55.
* `["fixed", F, B]`: a float x, |x| < 2^(B-1-F), becomes the integer rint(x·2^F) (ties to even), then as above: at most
  2^-(F+1) away from x.
* `["clip", b, c]`, one element a value: a float x becomes v = (clip(x, -c, c) + c)·((2^b - 1) / 2c) rounded down or up,
  up with the probability v - ⌊v⌋: right on average, and less than one step 2c / (2^b - 1) away from the clipped x.
  The chance is ChaCha20 under a seed that the caller keeps secret: the same seed and values give the same vector.
* Vectors are added modulo 2^24. n of them with elements below 2^b cannot wrap as long as n·(2^b - 1) < 2^24 (`fits`);
  limbs of 16 bits: up to 256.
* The sum of integers is exact. The sum of fixed floats is exact over the rounded values and becomes one float64
  (rounded once more if it needs more than 53 bits). Of every codec it is the same bits at every peer.
* What is not finite or out of range is an error here, naming the entry, before anything is handed over.

The layout, [[name, "int64" | "float64", shape, codec], …] sorted by name, says how to read a vector. All parties of a
sum have the same one, so it must not depend on anybody's data: the codecs are what the stage declares (stage.Sum).

Source: the value codecs of SA1, version 1, section 5 (PROTOCOL.md, section 6), with 16-bit limbs and 24-bit words.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedpeer.crypto import STREAM_BYTES, STREAM_SLACK, chacha20_into, hash_
from fedpeer.errors import LocalProtocolError, StageError, SumError

Array = npt.NDArray[Any]
Layout = list[list[Any]]
Codecs = Mapping[str, list[Any]]
"""dtype → how a value of it is written"""

WIDTH: Final = 24
"""Bits of an element on the wire; sums are taken modulo 2^WIDTH."""
BITS: Final = 16
"""Bits of a limb."""
EXACT: Final[Codecs] = {"int64": ["int", 55], "float64": ["fixed", 32, 55]}
"""Integers below 2^54, floats below 2^22: what a stage gets that asks for nothing else."""
MAX_NAME: Final = 256
MAX_DIMENSIONS: Final = 8

_SEGMENT: Final = STREAM_BYTES // 8
"""so many values are rounded at a time"""


def encode(
    values: Mapping[str, Array], codecs: Codecs = EXACT, seed: bytes = b""
) -> tuple[Layout, npt.NDArray[np.uint32]]:
    """The layout of `values` and their vector, uint32 of shape (d',).

    `seed`: 32 secret bytes, used for this vector only, from which "clip" draws. Raises StageError, naming the entry:
    not numbers, not finite, out of range.
    """
    layout: Layout = []
    arrays: list[Array] = []
    for name in sorted(values):
        array = np.asarray(values[name])
        if not name or len(name) > MAX_NAME or array.ndim > MAX_DIMENSIONS:
            raise StageError(f"the entry {name!r} of a sum has no name, one that is too long, or too many dimensions")
        dtype = {"f": "float64", "b": "int64", "i": "int64", "u": "int64"}.get(array.dtype.kind)
        if dtype is None:
            raise StageError(f"the entry {name!r} of a sum has the dtype {array.dtype}, not integers or floats")
        layout.append([name, dtype, list(array.shape), list(codecs[dtype])])
        arrays.append(array.reshape(-1))
    vector = np.zeros(_padded(used(layout)), dtype=np.uint32)
    for (name, _, _, codec), array, (start, stop) in zip(layout, arrays, _places(layout), strict=True):
        out = vector[start:stop]
        match codec:
            case ["int", width]:
                _put_whole(_integers(name, array, width), width, out)
            case ["fixed", fraction, width]:
                _put_whole(_fixed(name, array, fraction, width), width, out)
            case ["clip", width, c]:
                _put_clipped(name, array, width, c, seed, out)
    return layout, vector


def decode(layout: Layout, total: npt.NDArray[np.uint32], n: int) -> dict[str, Array]:
    """The values of the sum of `n` vectors: int64 or float64 arrays by name.

    Raises SumError when a padding element is not zero or an element is more than n vectors can add up to: then
    something other than n vectors of this layout was added (parties that do not agree, or a fault).
    """
    if n < 1 or not fits(n, bits(layout)):
        raise SumError(f"a sum of {n} vectors of {bits(layout)} bits: none, or more than can be told apart")
    _check_vector(layout, total, n)
    values: dict[str, Array] = {}
    for (name, _, shape, codec), (start, stop) in zip(layout, _places(layout), strict=True):
        part = total[start:stop]
        match codec:
            case ["int", width]:
                flat: Array = _get_whole(part, width, n)
            case ["fixed", fraction, width]:
                flat = _get_whole(part, width, n) / float(1 << fraction)
            case ["clip", width, c]:
                flat = np.multiply(part, 2.0 * c / ((1 << width) - 1), dtype=np.float64)
                flat -= n * c
        values[name] = flat.reshape(shape)
    return values


def check(layout: Any, vector: npt.NDArray[np.uint32], codecs: Codecs = EXACT) -> None:
    """Refuse (SumError) what `encode` cannot have made: the daemon's check of what a worker hands over."""
    if not isinstance(layout, list):
        raise SumError("the layout of a sum is not a list")
    before = ""
    for entry in layout:
        match entry:
            case [str(name), str(dtype), list(shape), list(codec)] if _alike(codec, codecs.get(dtype)):
                if not before < name or len(name) > MAX_NAME:
                    raise SumError("the entries of a sum are sorted by name and each has another one")
                if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
                    raise SumError(f"the entry {name!r} of a sum has no proper shape")
                before = name
            case _:
                raise SumError(f"an entry of a sum that is not [name, dtype, shape, declared codec]: {entry!r:.100}")
    _check_vector(layout, vector, 1)


def used(layout: Layout) -> int:
    """How many elements of a vector of this layout come before its pad."""
    return sum(len(_tops(codec)) * math.prod(shape) for _, _, shape, codec in layout)


def bits(layout: Layout) -> int:
    """No element of a vector of this layout is 2^bits or more."""
    return max((max(_tops(codec)).bit_length() for *_, codec in layout), default=BITS)


def rounded(x: npt.NDArray[np.float64], c: float, top: int, u: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """`x` clipped to ±c as integers 0 … top, rounded up where `u`, uniform in [0, 1), says so."""
    v = (np.clip(x, -c, c) + c) * (top / (2.0 * c))
    low = np.floor(v)
    up: npt.NDArray[np.float64] = np.minimum(low + (u < v - low), top)  # v itself may be above top by rounding
    return up


def fits(n: int, bits: int) -> bool:
    """Whether sums of `n` vectors with elements below 2^bits cannot wrap."""
    return n * ((1 << bits) - 1) < 1 << WIDTH


# entries and elements


def _tops(codec: list[Any]) -> list[int]:
    """The greatest value of each element of a value, least significant first."""
    match codec:
        case ["clip", int(width), _]:
            return [(1 << width) - 1]
    upper, width = divmod(codec[-1] - 1, BITS)
    return [(1 << BITS) - 1] * upper + [(2 << width) - 1]


def _padded(size: int) -> int:
    return 256 * -(-(size + 4) // 256)


def _places(layout: Layout) -> Iterator[tuple[int, int]]:
    """Where the elements of each entry start and stop."""
    stop = 0
    for _, _, shape, codec in layout:
        start, stop = stop, stop + len(_tops(codec)) * math.prod(shape)
        yield start, stop


def _check_vector(layout: Layout, vector: npt.NDArray[np.uint32], n: int) -> None:
    """SumError for what n vectors of this layout cannot add up to."""
    size = used(layout)
    if vector.dtype != np.uint32 or vector.shape != (_padded(size),):
        raise SumError(f"a vector of dtype {vector.dtype}, shape {vector.shape} where ({_padded(size)},) is laid out")
    noise = bool(vector[size:].any())
    for (*_, codec), (start, stop) in zip(layout, _places(layout), strict=True):
        tops = _tops(codec)
        for limb, top in zip(vector[start:stop].reshape(len(tops), -1), tops, strict=True):
            noise = noise or bool(limb.size and int(limb.max()) > n * top)
    if noise:
        raise SumError(f"the sum of {n} vectors is noise: an element has a value that they cannot add up to")


def _alike(codec: list[Any], declared: list[Any] | None) -> bool:
    """Whether these are the same, types too: 55.0 is not 55."""
    return codec == declared and [type(part) for part in codec] == [type(part) for part in declared]


# codecs


def _put_whole(whole: npt.NDArray[np.int64], width: int, out: npt.NDArray[np.uint32]) -> None:
    """Integers of `width` bits as limbs, limb-major."""
    lifted = whole + (1 << (width - 1))
    for place, limb in enumerate(out.reshape(-(-width // BITS), -1)):
        limb[:] = (lifted >> (BITS * place)) & ((1 << BITS) - 1)


def _get_whole(limbs: npt.NDArray[np.uint32], width: int, n: int) -> npt.NDArray[np.int64]:
    """The sum of n such integers; |sum| ≤ n·2^(width-1) ≤ 2^62, also on the way."""
    rows = limbs.reshape(-(-width // BITS), -1)
    whole = np.full(rows.shape[1], -n << (width - 1), dtype=np.int64)
    for place, limb in enumerate(rows):
        whole += limb.astype(np.int64) << (BITS * place)
    return whole


def _integers(name: str, array: Array, width: int) -> npt.NDArray[np.int64]:
    bound = 1 << (width - 1)
    if array.size and not (int(array.min()) >= -bound and int(array.max()) < bound):
        raise StageError(f"the entry {name!r} of a sum has an integer of 2^{width - 1} or more")
    return array.astype(np.int64)


def _fixed(name: str, array: Array, fraction: int, width: int) -> npt.NDArray[np.int64]:
    x = array.astype(np.float64)
    _check_finite(name, x)
    with np.errstate(over="ignore"):
        scaled = np.rint(x * float(1 << fraction))
    if array.size and not np.abs(scaled).max() < 1 << (width - 1):
        raise StageError(
            f"the entry {name!r} of a sum has a value of 2^{width - 1 - fraction} or more; scale it by a power of two"
        )
    return scaled.astype(np.int64)


def _put_clipped(name: str, array: Array, width: int, c: float, seed: bytes, out: npt.NDArray[np.uint32]) -> None:
    """Floats as one element each, rounded up or down by chance; a segment at a time, for arrays are large here."""
    if len(seed) != 32:
        raise LocalProtocolError("rounding by chance takes a seed of 32 bytes")
    top = (1 << width) - 1
    stream = bytearray(8 * min(array.size, _SEGMENT) + STREAM_SLACK)
    key = hash_("fp.sum.round", name.encode(), key=seed)
    for number, start in enumerate(range(0, array.size, _SEGMENT)):
        x = array[start : start + _SEGMENT].astype(np.float64)
        _check_finite(name, x)
        chacha20_into(key, struct.pack("<4xQ", number), stream, 8 * x.size)
        u = (np.frombuffer(stream, "<u8", x.size) >> 11).astype(np.float64) * 2.0**-53
        out[start : start + x.size] = rounded(x, c, top, u)


def _check_finite(name: str, x: npt.NDArray[np.float64]) -> None:
    if not np.isfinite(x).all():
        raise StageError(f"the entry {name!r} of a sum has a value that is not finite")
