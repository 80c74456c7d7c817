"""The key of one attempt at a sum, the context it is bound to, and the seeds of the pairwise masks.

Rules
* One masked vector per key, ever. A key lives in memory only; another attempt has another key.
* A seed depends on everything the parties must agree on: the name of the attempt, the history, the parameters, who
  takes part, and every key record. Parties that disagree get noise, not each other's numbers.
* A key of low order or wrong length is refused when it is seen, not when it is used.
* Parties are named by their index in the contract's order; inside hashes integers are u32 little endian and a set is
  the ascending concatenation of its members.

How it works.  σ → sk = H('fp.sa1.sk'; key=σ) → pk = X25519(sk, 9) is published. Two parties i < j share
X25519(sk_i, pk_j) and hash it, with the context and both public keys, to the seed of one mask, which i adds and j
takes away.

Source: Bonawitz et al., CCS 2017 (eprint 2017/281), section 4; the names and labels are those of SA1, version 1
(PROTOCOL.md), whose self masks and shares come with drop-outs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final, Literal, NamedTuple

from fedpeer.crypto import DhKey, Secret, hash_
from fedpeer.errors import TrustError

ADVERT_BYTES: Final = 16
_THROW_AWAY: Final = DhKey(Secret(b"\x01" * 32))


class PairMask(NamedTuple):
    """One mask of a party: `sign` · PRG(`seed`)."""

    sign: Literal[1, -1]
    seed: Secret


def u32(number: int) -> bytes:
    """An integer inside a hash."""
    return struct.pack("<I", number)


def members(indices: Iterable[int]) -> bytes:
    """A set of parties inside a hash; no set is empty."""
    return b"".join(u32(index) for index in sorted(indices))


def mask_key(sigma: Secret) -> DhKey:
    """The X25519 key of one attempt from 32 random bytes."""
    return DhKey(Secret(hash_("fp.sa1.sk", key=sigma.reveal())))


def is_usable(public: bytes) -> bool:
    """Whether a public key may be masked with: 32 bytes and not of low order."""
    try:
        _THROW_AWAY.exchange(public)
    except TrustError:
        return False
    return True


def advert_id(record: bytes) -> bytes:
    """What a key record is called inside the root: 16 bytes."""
    return hash_("fp.sa1.adv", record)[:ADVERT_BYTES]


def advert_root(adverts: Iterable[bytes]) -> bytes:
    """One hash over the advert ids of all contributors, in ascending order of their index."""
    return hash_("fp.sa1.advs", *adverts)


def context(
    sid: bytes,
    history: bytes,
    params: bytes,
    contributors: Iterable[int],
    root: bytes,
    *,
    owners: Iterable[int] = (),
    pin: Iterable[int] = (),
) -> bytes:
    """The context hash of an attempt (32 bytes): all that its contributors must agree on."""
    return hash_("fp.sa1.ctx", sid, history, params, members(contributors), members(owners), root, members(pin))


def pair_seed(ctx: bytes, me: int, other: int, key: DhKey, public: bytes) -> Secret:
    """The seed that `me` (holding `key`) and `other` (with this public key) share; both get the same.

    Raises TrustError if the public key is of low order.
    """
    shared = key.exchange(public)
    (low, public_low), (high, public_high) = sorted([(me, key.public), (other, public)])
    return Secret(hash_("fp.sa1.pair", ctx, u32(low), u32(high), public_low, public_high, key=shared))


def pair_masks(ctx: bytes, me: int, key: DhKey, publics: Sequence[bytes]) -> list[PairMask]:
    """All pairwise masks of party `me`; `publics` holds the public key of every party, by index."""
    return [
        PairMask(1 if other > me else -1, pair_seed(ctx, me, other, key, public))
        for other, public in enumerate(publics)
        if other != me
    ]
