"""What a stage asks of the aggregation, and what it gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedpeer.aggregation.messages import SumName
from fedpeer.aggregation.names import MIN_PARTIES, Profile, profile
from fedpeer.aggregation.vectors import Prg, Vector


@dataclass(frozen=True)
class Request:
    """One call of Peers.sum."""

    stage: str
    turn: int
    k: int
    vector: Vector
    """uint32 below 2^bits, padded; of one length at all parties"""
    used: int
    """elements before the pad"""
    params: bytes
    """any bytes that must be equal at all"""
    history: bytes
    turn_history: bytes
    """the history when this turn began; it covers the shared state of the turns before"""
    group: Literal["data", "turn"]
    bits: int = 16

    @property
    def name(self) -> SumName:
        return self.stage, self.turn, self.k


@dataclass(frozen=True)
class Terms:
    """What the contract's rules say of its sums."""

    profile: Literal["byz", "crash"]
    min_parties: int
    stall_s: float
    prg: Prg = "chacha20"
    """"aegis256" where every participant's processor does AES"""

    def among(self, n: int) -> Profile:
        """The numbers of a sum of n parties; three parties have the profile "crash" only.

        Raises LocalProtocolError for numbers that no profile has.
        """
        return profile(n, self.profile if n > MIN_PARTIES else "crash", min_parties=self.min_parties)


@dataclass(frozen=True)
class Total:
    """A decided sum: `values` mod 2^24 (uint32), and the ids of the peers that are in it, in the contract's order."""

    values: Vector
    survivors: list[str]
    sum_hash: bytes
    """what q parties have signed; it goes into the history"""
