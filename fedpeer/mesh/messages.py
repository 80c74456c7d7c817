"""What two peers of a mesh say to each other on the channels of a session: the typed records and their caps.

    channel           payload                           header
    ("hello",)        Hello                             -            the first message of a session, once each way
    ("sync",)         Sync, or nothing                  -, or Near   "of this scope I hold these", "connected to me are"
    ("records",)      a record (records.py)             -
    ("acks",)         Ack                               -
    ("wants",)        Want                              -
    ("mail", scope)   a small letter, or nothing        LetterHead   in the order they were posted
    ("blob", lane)    a piece of a file, or nothing     Chunk        at most LANES files at a time, each way
    ("datasets",)     Offers (data/offers.py), nothing  -            nothing: "what do you offer?"; one answer to each

Rules
* Nothing is looked at before the other side's Hello is here, and nothing is sent before that but the own Hello.
* Near and Sync share a channel: who reads a Sync has read what was said before it of the connections of its sender.
* Before a scope is open over there, nothing is said of it but the contract, and that when the answer to a Sync was a
  Near that says "not open here".
* A set of peers of a scope is a bitmap over its sorted audience (gossip.py); so nobody else can be named.
* Letters of a scope flow only after the other side's Sync for it: it says that the scope is open there, which records
  it lacks, and from which letter on. So a new session needs no memory of the last one.
* Which of two sessions with one peer stays is decided by both sides alike: see `Claim.replaces`.
"""

from __future__ import annotations

from typing import Annotated, Final, NamedTuple

import msgspec

from fedpeer import codec
from fedpeer.wire.constants import BULK_CHANNELS

VERSIONS: Final = (1,)
LANES: Final = BULK_CHANNELS
"""a lane more would have no channel number, and stand still until a whole file of another had come"""
CHUNK_BYTES: Final = 60_000
SYNC_DIGESTS: Final = 512
"""digests in one Sync; a longer list goes in parts"""
DIGEST_BYTES: Final = 32
MAX_AUDIENCE: Final = 256
MAX_STAGES: Final = 256
"""streams of letters, for one scope and sender"""
GONE: Final = -1
"""the offset in a Chunk that says: not here"""

Scope = Annotated[bytes, msgspec.Meta(min_length=1, max_length=32)]
Digest = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
StageId = Annotated[str, msgspec.Meta(pattern="^[!-~]{1,64}$")]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Bits = Annotated[bytes, msgspec.Meta(max_length=MAX_AUDIENCE // 8)]

HELLO, SYNC, RECORDS, ACKS, WANTS = ("hello",), ("sync",), ("records",), ("acks",), ("wants",)
DATASETS = ("datasets",)


class Hello(codec.Record, frozen=True):
    versions: Annotated[list[Count], msgspec.Meta(min_length=1, max_length=16)]
    boot: Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
    """drawn when the sender's daemon started"""
    epoch: Count
    """how many sessions with the receiver have ended there since then"""


class Near(codec.Record, frozen=True):
    scope: Scope
    open: bool
    """False: it is not open at the sender, or not any more"""
    peers: Bits
    """to whom of its audience the sender is connected, with the scope open over there"""


class Sync(codec.Record, frozen=True):
    scope: Scope
    of: Bits
    """of these senders everything is asked for; none: of all, but for what they can tell themselves"""
    received: Annotated[list[tuple[StageId, Count]], msgspec.Meta(max_length=MAX_STAGES)]
    """of the receiver's letters of each stage, those before this number are on the sender's disk"""
    digests: Annotated[bytes, msgspec.Meta(max_length=SYNC_DIGESTS * DIGEST_BYTES)]
    last: bool


class Ack(codec.Record, frozen=True):
    scope: Scope
    stage: StageId
    upto: Count


class Want(codec.Record, frozen=True):
    lane: Annotated[int, msgspec.Meta(ge=0, lt=LANES)]
    scope: Scope
    digest: Digest
    offset: Count
    size: Count
    """of the whole file, as its asker knows it"""
    holder: Annotated[str, msgspec.Meta(max_length=64)]
    """who has it; empty: the receiver of this"""


class Chunk(codec.Record, frozen=True):
    digest: Digest
    offset: Annotated[int, msgspec.Meta(ge=GONE, le=2**62)]


class LetterHead(codec.Record, frozen=True):
    stage: StageId
    seq: Count
    size: Count
    digest: Annotated[bytes, msgspec.Meta(max_length=DIGEST_BYTES)]
    """empty: the letter is in the payload; else it is fetched as a blob"""


class Claim(NamedTuple):
    """What decides between two sessions with one peer: facts that both sides know of each session."""

    boot: bytes
    epoch: int
    initiator: str

    def replaces(self, old: Claim) -> bool:
        """Whether a session with this claim takes the place of one with the claim `old`.

        A peer dials only when it has no session. So a later epoch, or another start of the daemon, says that the old
        session is dead over there, whatever it looks like here. Equal ones are a simultaneous dial: the session whose
        initiator has the smaller id stays, on both sides.
        """
        if self.boot != old.boot:
            return True
        if self.epoch != old.epoch:
            return self.epoch > old.epoch
        return self.initiator <= old.initiator
