"""Who adds up which elements, and the digests that name the parts of a masked sum.

Rules
* A vector is padded with zeros to a multiple of 256 elements, at least four of them: what unmasks to another pad is
  noise.
* Each element belongs to exactly one owner; which one follows from the length, the owners and the sid alone.
* A digest covers context, contributor and place: the same bytes elsewhere are called something else. All digests can
  be made while the bytes come in.

Source: SA1, version 1, sections 5 and 6.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from fedpeer.aggregation.names import u32
from fedpeer.crypto import Buffer, Hasher, hash_
from fedpeer.errors import LocalProtocolError

BLOCK: Final = 256
MIN_PAD: Final = 4


def padded(d: int) -> int:
    """The length of a vector of d elements with its pad."""
    return BLOCK * -(-(d + MIN_PAD) // BLOCK)


def slice_length(length: int, owners: int) -> int:
    """How many elements of a padded vector an owner adds up at most. Raises LocalProtocolError for no owner."""
    if owners < 1 or length < BLOCK or length % BLOCK:
        raise LocalProtocolError(f"no slices of {length} elements for {owners} owners")
    return BLOCK * -(-length // (BLOCK * owners))


def chunks(length: int, owners: int) -> list[tuple[int, int]]:
    """(start, stop) of each chunk of a padded vector; there may be fewer than owners."""
    size = slice_length(length, owners)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def owner_of(chunk: int, owners: Iterable[int], sid: bytes) -> int:
    """The party that adds up this chunk."""
    ascending = sorted(owners)
    return ascending[(chunk + int.from_bytes(sid[:4], "little")) % len(ascending)]


def chunk_hasher(ctx: bytes, contributor: int, chunk: int, nbytes: int) -> Hasher:
    """For the bytes of a chunk of a masked vector, as they come."""
    return Hasher("fp.sa1.chunk", ctx, u32(contributor), u32(chunk), last=nbytes)


def chunk_digest(ctx: bytes, contributor: int, chunk: int, data: Buffer) -> bytes:
    """The digest in a SCATTER."""
    return hash_("fp.sa1.chunk", ctx, u32(contributor), u32(chunk), data)


def sum_hasher(ctx: bytes, chunk: int, nbytes: int) -> Hasher:
    """For the bytes of a chunk of the masked sum, as they come."""
    return Hasher("fp.sa1.data", ctx, u32(chunk), last=nbytes)


def sum_digest(ctx: bytes, chunk: int, data: Buffer) -> bytes:
    """The digest in a SUM."""
    return hash_("fp.sa1.data", ctx, u32(chunk), data)


def root(digests: Sequence[bytes]) -> bytes:
    """What COMMIT decides on beside the survivors: the digests of all chunks of the masked sum, in order."""
    return hash_("fp.sa1.root", *digests)


def total_hasher(nbytes: int) -> Hasher:
    """For the packed total, as it comes."""
    return Hasher("fp.sa1.sum", last=nbytes)


def sum_hash(packed: Buffer) -> bytes:
    """What FINAL names: the packed total with its pad."""
    return hash_("fp.sa1.sum", packed)
