"""Vectors of w-bit integers: masked, packed, added up, unmasked.

Rules
* Everything is modulo 2^w, w = 16, 24 or 32. On the wire and in files an element has w/8 bytes, little endian; in
  memory it is a uint32.
* A stream is used for one vector and nothing else: PRG(seed, segment) is the start of the keystream of AEGIS-256, key =
  seed, nonce = u64le(segment) ‖ 24 zero bytes (or of ChaCha20, nonce = 4 zero bytes ‖ u64le(segment), counter from 1:
  for parties without AES in hardware). Element e of a segment is u32le number e of it.
* Work goes segment by segment (2^18 elements, 1 MiB of stream); beside the result two segments are in memory. All of
  it releases the interpreter's lock, and belongs in a thread.
* The order of chunks costs nothing: each segment's masks are made once as long as chunks come in ascending order.

Source: SA1, version 1, sections 3 to 5; draft-irtf-cfrg-aegis-aead; RFC 8439.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from fedpeer.crypto import STREAM_SLACK, Buffer, Secret, aegis256_into, chacha20_into
from fedpeer.errors import LocalProtocolError

Vector = npt.NDArray[np.uint32]
Width = Literal[16, 24, 32]
Prg = Literal["aegis256", "chacha20"]

SEGMENT: Final = 1 << 18


def check(vector: npt.NDArray[Any], bits: int) -> None:
    """Raise LocalProtocolError unless this is one dimension of uint32 below 2^bits, and not empty."""
    if vector.dtype != np.dtype("<u4") or vector.ndim != 1 or vector.size == 0 or int(vector.max()) >> bits:
        raise LocalProtocolError(f"not a vector of integers below 2^{bits}")


def mask(x: Vector, plus: Sequence[Secret], minus: Sequence[Secret], w: Width, prg: Prg) -> bytearray:
    """The packed bytes of x + Σ PRG(plus) − Σ PRG(minus) mod 2^w. x stays as it is."""
    return next(mask_chunks(x, [(0, len(x))], plus, minus, w, prg))


def mask_chunks(
    x: Vector, chunks: Iterable[tuple[int, int]], plus: Sequence[Secret], minus: Sequence[Secret], w: Width, prg: Prg
) -> Iterator[bytearray]:
    """The same for each chunk (start, stop) of x, made when it is asked for; in any order, ascending is cheapest."""
    y = np.empty(min(SEGMENT, len(x)), "<u4")
    buffer = _buffer(len(x))
    made = -1
    for start, stop in chunks:
        if not 0 <= start <= stop <= len(x):
            raise LocalProtocolError("a chunk outside of its vector")
        out = bytearray((stop - start) * w // 8)
        for segment in range(start // SEGMENT, -(-stop // SEGMENT)):
            first = segment * SEGMENT
            if segment != made:
                part = x[first : first + SEGMENT]
                y[: len(part)] = part
                _add_masks(y[: len(part)], segment, plus, minus, prg, buffer)
                made = segment
            begin, end = max(start, first), min(stop, first + SEGMENT)
            _pack(y[begin - first : end - first], out, begin - start, w)
        yield out


def add_masks(total: Vector, plus: Sequence[Secret], minus: Sequence[Secret], w: Width, prg: Prg) -> None:
    """total += Σ PRG(plus) − Σ PRG(minus) mod 2^w, in place."""
    buffer = _buffer(len(total))
    for segment, start in enumerate(range(0, len(total), SEGMENT)):
        part = total[start : start + SEGMENT]
        _add_masks(part, segment, plus, minus, prg, buffer)
        _reduce(part, w)


def stream(seed: Secret, segment: int, count: int, prg: Prg) -> Vector:
    """The first `count` ≤ SEGMENT mask elements of a segment, all 32 bits of them."""
    return _stream(seed, segment, count, prg, _buffer(count))


def _add_masks(
    y: Vector, segment: int, plus: Sequence[Secret], minus: Sequence[Secret], prg: Prg, buffer: bytearray
) -> None:
    for seed in plus:
        np.add(y, _stream(seed, segment, len(y), prg, buffer), out=y)
    for seed in minus:
        np.subtract(y, _stream(seed, segment, len(y), prg, buffer), out=y)


def _stream(seed: Secret, segment: int, count: int, prg: Prg, buffer: bytearray) -> Vector:
    """A view of `buffer`."""
    number = struct.pack("<Q", segment)
    if prg == "aegis256":
        aegis256_into(seed.reveal(), number + bytes(24), buffer, 4 * count)
    else:
        chacha20_into(seed.reveal(), bytes(4) + number, buffer, 4 * count)
    return np.frombuffer(buffer, "<u4", count)


def _buffer(count: int) -> bytearray:
    """Room for the streams of a vector of so many elements."""
    return bytearray(4 * min(SEGMENT, count) + STREAM_SLACK)


def _reduce(total: Vector, w: Width) -> None:
    if w < 32:
        np.bitwise_and(total, np.uint32((1 << w) - 1), out=total)


# packed elements


def packed_bytes(count: int, w: Width) -> int:
    """The size of so many elements in a file."""
    return count * w // 8


def pack(vector: Vector, w: Width) -> bytearray:
    """Elements mod 2^w as bytes."""
    out = bytearray(packed_bytes(len(vector), w))
    for start in range(0, len(vector), SEGMENT):
        _pack(vector[start : start + SEGMENT], out, start, w)
    return out


def unpack(data: Buffer, w: Width) -> Vector:
    """The elements of bytes. Raises LocalProtocolError for a length that is no multiple of an element's."""
    total = np.zeros(memoryview(data).nbytes * 8 // w, "<u4")
    add_packed(total, data, w)
    return total


def add_packed(total: Vector, data: Buffer, w: Width) -> None:
    """total += the elements of `data` mod 2^w, in place. Raises LocalProtocolError for another number of elements."""
    view = memoryview(data).cast("B")
    if view.nbytes != packed_bytes(len(total), w):
        raise LocalProtocolError(f"{view.nbytes} bytes where {len(total)} elements of {w} bits are added")
    size = w // 8
    for start in range(0, len(total), SEGMENT):
        part = total[start : start + SEGMENT]
        raw = view[start * size : (start + len(part)) * size]
        if w == 24:  # read four bytes for each three; the fourth, of the next element, is above 2^24
            np.add(part[:-1], np.ndarray(len(part) - 1, "<u4", raw, strides=(3,)), out=part[:-1])
            part[-1] = (int(part[-1]) + int.from_bytes(raw[-3:], "little")) & 0xFFFFFF
        else:
            np.add(part, np.frombuffer(raw, f"<u{size}"), out=part)
        _reduce(part, w)


def _pack(vector: Vector, out: bytearray, start: int, w: Width) -> None:
    """Elements mod 2^w to their place in `out`, from element `start` on."""
    size, count = w // 8, len(vector)
    if w == 24:
        low = np.ndarray(count, "<u2", out, 3 * start, strides=(3,))
        high = np.ndarray(count, np.uint8, out, 3 * start + 2, strides=(3,))
        np.copyto(low, vector, casting="unsafe")  # drops the upper bits
        np.copyto(high, vector.view(np.uint8)[2::4])
    else:
        np.copyto(np.frombuffer(out, f"<u{size}", count, size * start), vector, casting="unsafe")


def status(total: Vector, d: int, count: int, bits: int) -> Literal["SUM", "NOISE"]:
    """What unmasking gave: a sum of `count` vectors of d elements below 2^bits and a pad of zeros, or noise."""
    is_sum = not total[d:].any() and int(total.max()) <= count * ((1 << bits) - 1)
    return "SUM" if is_sum else "NOISE"
