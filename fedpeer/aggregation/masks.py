"""Vectors of 24-bit integers: masking, packing into three bytes an element, adding up.

Rules
* Everything is modulo 2^WIDTH. A sum of n ≤ MAX_PARTIES vectors of BITS-bit values cannot wrap.
* A stream is used for one vector and nothing else: PRG(seed, segment) is the start of the AEGIS-256 keystream under
  key = seed, nonce = u64le(segment) ‖ 24 zero bytes; element e of a segment is u32le number e of it.
* Work goes segment by segment (2^18 elements, 1 MiB of stream); beside the vector itself one segment is in memory.
  All of it releases the interpreter's lock, and belongs in a thread.
* A masked vector is bytes: a label of 32 bytes that names its context and contributor, then the elements, three bytes
  each, little endian. A file with the right label can be nothing else that this peer keeps.

Source: SA1, version 1, sections 3 to 5; draft-irtf-cfrg-aegis-aead.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from fedpeer.aggregation.keys import PairMask, u32
from fedpeer.crypto import Buffer, Secret, aegis256_stream, hash_
from fedpeer.errors import LocalProtocolError, SumError

WIDTH: Final = 24
BITS: Final = 16
MAX_PARTIES: Final = 1 << (WIDTH - BITS)
ELEMENT_BYTES: Final = WIDTH // 8
LABEL_BYTES: Final = 32
SEGMENT: Final = 1 << 18
_RING: Final = np.uint32((1 << WIDTH) - 1)
_ZEROS: Final = bytes(4 * SEGMENT)

Vector = npt.NDArray[np.uint32]


def stream(seed: Secret, segment: int, count: int) -> npt.NDArray[np.uint32]:
    """`count` ≤ SEGMENT mask elements of this segment: uint32, of which the low WIDTH bits count."""
    nonce = struct.pack("<Q", segment) + bytes(24)
    zeros = _ZEROS if count == SEGMENT else bytes(4 * count)
    return np.frombuffer(aegis256_stream(seed.reveal(), nonce, zeros), "<u4")


def check(vector: npt.NDArray[Any]) -> None:
    """Raise LocalProtocolError unless this is a vector of the ring: one-dimensional, uint32, below 2^WIDTH."""
    if vector.dtype != np.uint32 or vector.ndim != 1 or vector.size == 0 or int(vector.max()) > int(_RING):
        raise LocalProtocolError(f"not a vector of integers below 2^{WIDTH}")


def label(ctx: bytes, contributor: int) -> bytes:
    """What the bytes of this contributor's masked vector begin with."""
    return hash_("fp.sa1.masked", ctx, u32(contributor))


def masked_bytes(count: int) -> int:
    """The size of a masked vector of `count` elements."""
    return LABEL_BYTES + ELEMENT_BYTES * count


def mask(vector: Vector, masks: Sequence[PairMask], name: bytes) -> bytearray:
    """The bytes of y = x + Σ sign·PRG(seed) mod 2^WIDTH under this label. `vector` stays as it is."""
    out = bytearray(masked_bytes(len(vector)))
    out[:LABEL_BYTES] = name
    packed = np.frombuffer(out, np.uint8, offset=LABEL_BYTES).reshape(-1, ELEMENT_BYTES)
    for segment, start in enumerate(range(0, len(vector), SEGMENT)):
        y = vector[start : start + SEGMENT].astype("<u4")  # a copy
        for sign, seed in masks:
            if sign > 0:
                y += stream(seed, segment, len(y))
            else:
                y -= stream(seed, segment, len(y))
        packed[start : start + SEGMENT] = y.view(np.uint8).reshape(-1, 4)[:, :ELEMENT_BYTES]
    return out


def pack(vector: Vector) -> bytes:
    """Elements as bytes: WIDTH bits each, little endian."""
    return vector.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :ELEMENT_BYTES].tobytes()


def unpack(data: Buffer) -> Vector:
    """The elements of bytes whose length is a multiple of three."""
    narrow = np.frombuffer(data, np.uint8).reshape(-1, ELEMENT_BYTES)
    wide = np.zeros((len(narrow), 4), np.uint8)
    wide[:, :ELEMENT_BYTES] = narrow
    return wide.reshape(-1).view("<u4").astype(np.uint32, copy=False)


def add(total: Vector, file: BinaryIO, name: bytes) -> None:
    """Add the masked vector in `file` to `total` in place, mod 2^WIDTH.

    Raises SumError if it is another one than `name` says, or of another length; `total` is then useless.
    """
    if file.read(LABEL_BYTES) != name:
        raise SumError("the bytes are not the masked vector of this sum")
    for start in range(0, len(total), SEGMENT):
        part = total[start : start + SEGMENT]
        data = file.read(ELEMENT_BYTES * len(part))
        if len(data) != ELEMENT_BYTES * len(part):
            raise SumError("a masked vector is too short")
        part += unpack(data)
        part &= _RING
    if file.read(1):
        raise SumError("a masked vector is too long")
