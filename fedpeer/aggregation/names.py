"""What the parties of a secure aggregation are called, how many may fail, and the hashes that name everything.

Rules
* A party is its index in the contract's order. A set of parties is a frozenset; inside a hash it is the ascending
  concatenation of u32 (no set is empty), on the wire a bitmap of ⌈n/8⌉ bytes, little endian, unused bits zero.
* A `Profile` says how many parties may lie (f), how many votes decide (q), how many shares open a secret (t), how many
  may pool what they see (t_c), and how many a survivor set has at least (m_min). Two quorums meet in an honest party,
  and 2t > n + f: at most one survivor set of a group can ever be opened.
* A *sum* is one call of Peers.sum; a *group* is the set of sums that must have one survivor set; an *instance* is one
  attempt at a sum, with keys used once, number `seq` of its group. `sid` names the instance.

Source: SA1, version 1, sections 1 to 4 (PROTOCOL.md); Bonawitz et al., CCS 2017 (eprint 2017/281).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from fedpeer.crypto import hash_
from fedpeer.errors import LocalProtocolError, RemoteProtocolError

MIN_PARTIES: Final = 3
MAX_PARTIES: Final = 200
ID_BYTES: Final = 16

Parties = frozenset[int]


@dataclass(frozen=True)
class Profile:
    """The numbers that all parties of a contract agree on; made by `profile`."""

    name: Literal["byz", "crash"]
    n: int
    f: int
    q: int
    t: int
    t_c: int
    m_min: int

    @property
    def honest(self) -> int:
        """So many contributors of every sum, at least, do not pool what they see."""
        return self.m_min - self.t_c

    def acks_needed(self, contributors: int) -> int:
        """So many of this many contributors must hold a dealer's shares before it may contribute."""
        return max(self.t, min(self.t + self.f, contributors - self.f))


def profile(n: int, name: str = "", *, f: int | None = None, t_c: int | None = None, min_parties: int = 0) -> Profile:
    """The profile of n parties: "byz" (organizations that may misbehave; the default from n = 4 on) or "crash".

    Raises LocalProtocolError for numbers that no profile has.
    """
    name = name or ("byz" if n > MIN_PARTIES else "crash")
    if not MIN_PARTIES <= n <= MAX_PARTIES or name not in ("byz", "crash") or (name == "byz" and n == MIN_PARTIES):
        raise LocalProtocolError(
            f"there is no profile {name!r} for {n} parties; a sum takes {MIN_PARTIES} to {MAX_PARTIES}"
        )
    if name == "crash":
        f = 0
    elif f is None:
        f = max(1, (n - 1) // 5)
    q = (n + f) // 2 + 1
    t = q if name == "byz" else 2 if n == MIN_PARTIES else (n + 1) // 2 + 1
    t_c = max(1, f) if t_c is None else t_c
    if not (f >= 0 and n > 3 * f and 2 * t > n + f and f <= t_c <= t - 1 and n - t_c >= 2):
        raise LocalProtocolError(f"{n} parties cannot stand {f} that lie and {t_c} that pool what they see")
    m_min = max(q, t, t_c + 2, MIN_PARTIES, min_parties)
    if m_min > n:
        raise LocalProtocolError(f"at least {min_parties} contributors of {n} parties")
    return Profile("byz" if name == "byz" else "crash", n, f, q, t, t_c, m_min)


# sets and integers


def u32(number: int) -> bytes:
    """An integer inside a hash."""
    return struct.pack("<I", number)


def members(parties: Iterable[int] | None) -> bytes:
    """A set inside a hash."""
    return b"".join(u32(party) for party in sorted(parties or ()))


def bitmap(parties: Iterable[int], n: int) -> bytes:
    """A set on the wire."""
    return sum(1 << party for party in parties).to_bytes((n + 7) // 8, "little")


@functools.lru_cache(1024)  # n parties name the same few sets
def parties_of(raw: bytes, n: int) -> Parties:
    """The set of a bitmap. Raises RemoteProtocolError for a wrong length or a party that does not exist."""
    bits = int.from_bytes(raw, "little")
    if len(raw) != (n + 7) // 8 or bits >> n:
        raise RemoteProtocolError("a set of parties that is none")
    return frozenset(party for party in range(n) if bits >> party & 1)


# names


def group_of(contract: bytes, scope: bytes) -> bytes:
    """The group of sums; `scope` is empty for what is computed from the data alone, else the turn's first history."""
    return hash_("fp.sa1.grp", contract, scope)


def sid_of(contract: bytes, group: bytes, seq: int) -> bytes:
    return hash_("fp.sa1.sid", contract, group, u32(seq))


def proposer(contract: bytes, group: bytes, seq: int, view: int, n: int) -> int:
    """Who leads a view. Everybody can tell in advance; that is harmless. Nobody is skipped."""
    lead = int.from_bytes(hash_("fp.sa1.lead", contract, group)[:4], "little")
    return (lead + seq + view) % n


def first_history(contract: bytes, stage: str, params: bytes) -> bytes:
    return hash_("fp.sa1.hist", contract, stage.encode(), params)


def history_after_sum(history: bytes, survivors: Iterable[int], sum_hash: bytes) -> bytes:
    return hash_("fp.sa1.hist", history, members(survivors), sum_hash)


def history_after_turn(history: bytes, shared: bytes) -> bytes:
    """`shared`: the digest of the stage's shared state."""
    return hash_("fp.sa1.hist", history, shared)


def history_after_agreed(history: bytes, value: bytes) -> bytes:
    """`value`: the digest of a value that all adopted."""
    return hash_("fp.sa1.hist", history, value)


def params_hash(encoded: bytes) -> bytes:
    """Of what must be equal at all contributors, canonically encoded."""
    return hash_("fp.sa1.prm", encoded)


def advert_id(body: bytes) -> bytes:
    """What the body of an ADVERTISE, and the key set behind it, is called."""
    return hash_("fp.sa1.adv", body)[:ID_BYTES]


def advert_root(adverts: Sequence[bytes]) -> bytes:
    """Over the advert ids of all contributors, ascending by party."""
    return hash_("fp.sa1.advs", *adverts)


def context(
    sid: bytes,
    model: bytes,
    params: bytes,
    contributors: Iterable[int],
    owners: Iterable[int],
    root: bytes,
    pin: Iterable[int] | None,
) -> bytes:
    """ctx: everything that the contributors of an instance must agree on; masks are bound to it."""
    return hash_("fp.sa1.ctx", sid, model, params, members(contributors), members(owners), root, members(pin))


def value_id(stage: str, encoded: bytes) -> bytes:
    """What votes name: the value of an agreement, canonically encoded."""
    return hash_("fp.sa1.val", stage.encode(), encoded)
