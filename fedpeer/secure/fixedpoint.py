"""Values of a secure sum as a vector of small integers, and the sum of such vectors back as values.

Rules
* One dict of arrays is one vector: the entries by name, each in C order, then zeros up to d' = 256·⌈(d + 4) / 256⌉,
  so that at least four elements must come out as zero.
* An integer v (also a boolean), -2^54 ≤ v < 2^54, becomes v + 2^54 in four limbs of 16 bits. An entry of m values is
  4·m elements, limb-major: the least significant limbs of all its values first.
* A float x, |x| < 2^22, becomes the integer rint(x·2^32) (ties to even), then as above: at most 2^-33 away from x.
* Vectors are added modulo 2^24. Up to 256 of them cannot wrap: 256·(2^16 - 1) < 2^24.
* The sum of integers is exact. The sum of floats is exact over the rounded values and becomes one float64 (rounded
  once more if it needs more than 53 bits), the same bits at every peer.
* What is not finite or out of range is an error here, naming the entry, before anything is handed over.

The layout, [[name, "int64" | "float64", shape, codec], …] sorted by name, says how to read a vector. All parties of a
sum have the same one, so it must not depend on anybody's data.

Source: the value codecs "int" and "fixed" of the project's secure aggregation (PROTOCOL.md), with B = 55, F = 32,
16-bit limbs and 24-bit words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedpeer.errors import StageError, SumError

Array = npt.NDArray[Any]
Layout = list[list[Any]]

WIDTH: Final = 24
"""Bits of an element on the wire; sums are taken modulo 2^WIDTH."""
BITS: Final = 16
"""Bits of a limb."""
LIMBS: Final = 4
VALUE_BITS: Final = 55
FRACTION_BITS: Final = 32
MAX_PARTIES: Final = 1 << (WIDTH - BITS)
MAX_NAME: Final = 256
MAX_DIMENSIONS: Final = 8

_OFFSET: Final = 1 << (VALUE_BITS - 1)
_LIMB: Final = (1 << BITS) - 1
_TOP_LIMB: Final = (1 << (VALUE_BITS - BITS * (LIMBS - 1))) - 1
_CODECS: Final[dict[str, list[Any]]] = {"int64": ["int", VALUE_BITS], "float64": ["fixed", FRACTION_BITS, VALUE_BITS]}


def encode(values: Mapping[str, Array]) -> tuple[Layout, npt.NDArray[np.uint32]]:
    """The layout of `values` and their vector, uint32 of shape (d',), each element below 2^16.

    Raises StageError, naming the entry: not numbers, not finite, out of range.
    """
    layout: Layout = []
    parts: list[npt.NDArray[np.uint32]] = []
    for name in sorted(values):
        array = np.asarray(values[name])
        if not name or len(name) > MAX_NAME or array.ndim > MAX_DIMENSIONS:
            raise StageError(f"the entry {name!r} of a sum has no name, one that is too long, or too many dimensions")
        if array.dtype.kind == "f":
            dtype, whole = "float64", _fixed(name, array)
        elif array.dtype.kind in "biu":
            dtype, whole = "int64", _integer(name, array)
        else:
            raise StageError(f"the entry {name!r} of a sum has the dtype {array.dtype}, not integers or floats")
        layout.append([name, dtype, list(array.shape), list(_CODECS[dtype])])
        lifted = (whole + _OFFSET).ravel()
        parts.extend(((lifted >> (BITS * limb)) & _LIMB).astype(np.uint32) for limb in range(LIMBS))
    size = sum(part.size for part in parts)
    return layout, np.concatenate([*parts, np.zeros(_padded(size) - size, dtype=np.uint32)])


def decode(layout: Layout, total: npt.NDArray[np.uint32], n: int) -> dict[str, Array]:
    """The values of the sum of `n` vectors: int64 or float64 arrays by name.

    Raises SumError when a padding element is not zero or an element is more than n vectors can add up to: then
    something other than n vectors of this layout was added (parties that do not agree, or a fault).
    """
    if not 1 <= n <= MAX_PARTIES:
        raise SumError(f"a sum of {n} vectors; at least 1 and at most {MAX_PARTIES} can be added")
    words = _vector(layout, total, n)
    values: dict[str, Array] = {}
    start = 0
    for name, dtype, shape, _ in layout:
        count = math.prod(shape)
        limbs = words[start : start + LIMBS * count].reshape(LIMBS, count).astype(np.int64)
        start += LIMBS * count
        whole = np.full(count, -n * _OFFSET, dtype=np.int64)
        for limb in range(LIMBS):
            whole += limbs[limb] << (BITS * limb)  # at most n·2^55 - n·2^54 ≤ 2^62
        values[name] = (whole if dtype == "int64" else whole / float(1 << FRACTION_BITS)).reshape(shape)
    return values


def check(layout: Any, vector: npt.NDArray[np.uint32]) -> None:
    """Refuse (SumError) what `encode` cannot have made: the daemon's check of what a worker hands over."""
    if not isinstance(layout, list):
        raise SumError("the layout of a sum is not a list")
    before = ""
    for entry in layout:
        match entry:
            case [str(name), str(dtype), list(shape), list(codec)] if codec == _CODECS.get(dtype):
                if not before < name or len(name) > MAX_NAME:
                    raise SumError("the entries of a sum are sorted by name and each has another one")
                if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
                    raise SumError(f"the entry {name!r} of a sum has no proper shape")
                before = name
            case _:
                raise SumError(f"an entry of a sum that is not [name, dtype, shape, codec]: {entry!r:.100}")
    _vector(layout, vector, 1)


def used(layout: Layout) -> int:
    """How many elements of a vector of this layout come before its pad."""
    return LIMBS * sum(math.prod(shape) for _, _, shape, _ in layout)


def _padded(size: int) -> int:
    return 256 * -(-(size + 4) // 256)


def _integer(name: str, array: Array) -> npt.NDArray[np.int64]:
    if array.size and not (int(array.min()) >= -_OFFSET and int(array.max()) < _OFFSET):
        raise StageError(f"the entry {name!r} of a sum has an integer of 2^54 or more")
    return array.astype(np.int64)


def _fixed(name: str, array: Array) -> npt.NDArray[np.int64]:
    x = array.astype(np.float64)
    if not np.isfinite(x).all():
        raise StageError(f"the entry {name!r} of a sum has a value that is not finite")
    if array.size and not np.abs(x).max() < 1 << (VALUE_BITS - 1 - FRACTION_BITS):
        raise StageError(f"the entry {name!r} of a sum has a value of 2^22 or more; scale it by a power of two")
    return np.rint(x * float(1 << FRACTION_BITS)).astype(np.int64)


def _vector(layout: Layout, vector: npt.NDArray[np.uint32], n: int) -> npt.NDArray[np.uint32]:
    """The elements of a sum of n vectors without their padding; SumError for what n vectors cannot make."""
    counts = [math.prod(shape) for _, _, shape, _ in layout]
    size = LIMBS * sum(counts)
    if vector.dtype != np.uint32 or vector.shape != (_padded(size),):
        raise SumError(f"a vector of dtype {vector.dtype}, shape {vector.shape} where ({_padded(size)},) is laid out")
    noise = bool(vector[size:].any()) or int(vector.max()) > n * _LIMB
    start = 0
    for count in counts:
        start += LIMBS * count
        noise = noise or bool((vector[start - count : start] > n * _TOP_LIMB).any())
    if noise:
        raise SumError(f"the sum of {n} vectors is noise: an element has a value that they cannot add up to")
    return vector[:size]
