"""What an instance needs done outside the event loop: arithmetic on whole vectors, and files from elsewhere.

Rules
* Work is a value: the same work has the same result, and may be done again after a restart.
* A file is named by the digest that the protocol gives its bytes, and is durable before the result is told.
* `perform` does the arithmetic, for the daemon and for simulations alike; fetching is the driver's.

Source: SA1, version 1, sections 4 to 6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fedpeer.aggregation import slices, vectors
from fedpeer.aggregation.messages import SumName
from fedpeer.aggregation.vectors import Prg, Vector, Width
from fedpeer.crypto import Buffer, Secret


@dataclass(frozen=True)
class Chunk:
    """Elements start to stop of a vector, and who adds them up."""

    number: int
    start: int
    stop: int
    owner: int


@dataclass(frozen=True, eq=False)
class Mask:
    """Mask our vector of this sum, chunk by chunk. Result: (number of the chunk, bytes, digest) of each."""

    sid: bytes
    ctx: bytes
    name: SumName
    party: int
    plus: Sequence[Secret]
    minus: Sequence[Secret]
    chunks: Sequence[Chunk]
    w: Width
    prg: Prg


@dataclass(frozen=True, eq=False)
class Fetch:
    """Get a file from another party. Result: True once it is here, durable, and has this digest."""

    sid: bytes
    what: str
    """"chunk": of a contributor, "sum": of the survivors"""
    ctx: bytes
    party: int
    """the contributor of a chunk; of a sum its owner"""
    chunk: int
    nbytes: int
    digest: bytes


@dataclass(frozen=True, eq=False)
class Add:
    """Add up one chunk of all survivors. Result: (bytes, digest) of the sum."""

    sid: bytes
    ctx: bytes
    survivors: bytes
    chunk: int
    digests: Sequence[bytes]
    length: int
    w: Width


@dataclass(frozen=True, eq=False)
class Unmask:
    """Take the masks off the sum. Result: (status, sum hash); the total is the file of that name."""

    sid: bytes
    ctx: bytes
    digests: Sequence[bytes]
    chunks: Sequence[tuple[int, int]]
    plus: Sequence[Secret]
    minus: Sequence[Secret]
    survivors: int
    d: int
    used: int
    bits: int
    w: Width
    prg: Prg


@dataclass(frozen=True, eq=False)
class FetchTotal:
    """Get the total that q parties signed. Result: True once the file of this name is here."""

    sid: bytes
    sum_hash: bytes
    holders: Sequence[int]
    nbytes: int


Work = Mask | Fetch | Add | Unmask | FetchTotal


class Files(Protocol):
    """Where the bytes are: durable once `write` has returned."""

    def read(self, digest: bytes) -> Buffer: ...

    def write(self, digest: bytes, data: Buffer) -> None: ...


def perform(work: Mask | Add | Unmask, files: Files, vector: Vector | None = None) -> Any:
    """Do the arithmetic; the result is what the dataclass says. `vector`: what this party has for the sum of a Mask.

    Raises LocalProtocolError for a file of another length. Releases the interpreter's lock for most of its time.
    """
    match work:
        case Mask():
            assert vector is not None
            places = [(chunk.start, chunk.stop) for chunk in work.chunks]
            made = vectors.mask_chunks(vector, places, work.plus, work.minus, work.w, work.prg)
            return tuple(
                (chunk.number, len(data), _write(files, data, slices.chunk_digest, work.ctx, work.party, chunk.number))
                for chunk, data in zip(work.chunks, made, strict=True)
            )
        case Add():
            total = np.zeros(work.length, "<u4")
            for digest in work.digests:
                vectors.add_packed(total, files.read(digest), work.w)
            data = vectors.pack(total, work.w)
            return len(data), _write(files, data, slices.sum_digest, work.ctx, work.chunk)
        case Unmask():
            total = np.zeros(work.d, "<u4")
            for digest, (start, stop) in zip(work.digests, work.chunks, strict=True):
                vectors.add_packed(total[start:stop], files.read(digest), work.w)
            vectors.add_masks(total, work.plus, work.minus, work.w, work.prg)
            status = vectors.status(total, work.used, work.survivors, work.bits)
            return int(status == "NOISE"), _write(files, vectors.pack(total, work.w), slices.sum_hash)


def _write(files: Files, data: Buffer, digest_of: Callable[..., bytes], *place: Any) -> bytes:
    digest = digest_of(*place, data)
    files.write(digest, data)
    return digest
