"""The signed messages of a secure aggregation: their fields, their encoding, their caps.

    body = encode([1, sid, kind, sender, fields…])        signature = Ed25519 over H("fp.sa1.sig", kind, body)

Rules
* Canonical msgpack arrays; what does not re-encode to the same bytes, has another field, another type or more than the
  cap of its kind is refused. What is hashed and signed are the bytes as they came.
* A message is named by the digest of its body. Its *slot* says what an honest party says once: two different bodies in
  one slot convict their sender (evidence.py). Signatures are never compared.
* Parties are indices, sets are bitmaps (names.py).

Source: SA1, version 1, sections 3, 7 and 8.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Final, Literal

import msgspec

from fedpeer import codec
from fedpeer.aggregation.names import MAX_PARTIES, value_id
from fedpeer.crypto import SIGNATURE_BYTES, Buffer, SigningKey, hash_, verify
from fedpeer.errors import RemoteProtocolError

VERSION: Final = 1
LABEL: Final = "fp.sa1.sig"

Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
AdvertId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Signature = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
Party = Annotated[int, msgspec.Meta(ge=0, lt=MAX_PARTIES)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Set = Annotated[bytes, msgspec.Meta(max_length=(MAX_PARTIES + 7) // 8)]
Stage = Literal["START", "COMMIT"]
START: Final[Stage] = "START"
COMMIT: Final[Stage] = "COMMIT"


class Message(codec.Record, frozen=True):
    """What every message begins with."""

    version: Literal[1]
    sid: Digest
    kind: str
    sender: Party


class Advertise(Message, frozen=True):
    """The keys of one party for one instance."""

    inc: Count
    pk: Digest
    epk: Digest
    hb: Digest


class Share(Message, frozen=True):
    """A dealer's shares for one holder, sealed to it."""

    holder: Party
    ciphertext: Annotated[bytes, msgspec.Meta(min_length=100, max_length=200)]


Acked = tuple[Party, AdvertId]


class Ack(Message, frozen=True):
    """Shares that this holder has: those of all its ACKs together, so that entries only grow."""

    counter: Count
    entries: Annotated[list[Acked], msgspec.Meta(max_length=MAX_PARTIES)]


SumName = tuple[Annotated[str, msgspec.Meta(max_length=64)], Count, Count]
"""(stage, turn, k)"""


class Ready(Message, frozen=True):
    """This party has its vector for this sum, with this history, state and these parameters."""

    name: SumName
    model: Digest
    shared: Digest
    params: Digest


class StartValue(codec.Record, frozen=True):
    tag: Literal["U"]
    model: Digest
    params: Digest
    contributors: Set
    owners: Set
    root: Digest
    pin: Set | None
    prev: list[Any] | None
    """None, ["FINAL", commit id, sum hash] or ["ABORT", commit id]: how the instance before ended."""


class CommitValue(codec.Record, frozen=True):
    tag: Literal["S"]
    ctx: Digest
    survivors: Set
    root: Digest


class AbortValue(codec.Record, frozen=True):
    tag: Literal["ABORT"]
    ctx: Digest
    pin: Set | None


class Proposal(Message, frozen=True):
    stage: Stage
    view: Count
    value: list[Any]
    valid_view: Count | None


class Vote(Message, frozen=True):
    """PREVOTE or PRECOMMIT."""

    stage: Stage
    view: Count
    id: Digest | None


class Scatter(Message, frozen=True):
    """A chunk of the sender's masked vector, for its owner; the bytes are a file of this digest."""

    ctx: Digest
    chunk: Count
    nbytes: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
    digest: Digest


class Receipt(Message, frozen=True):
    """The contributors whose chunks this owner holds; the greater counter wins, bits only grow."""

    ctx: Digest
    counter: Count
    contributors: Set


class Cut(Message, frozen=True):
    """The proposer of this view of COMMIT asks the owners to add up these."""

    ctx: Digest
    view: Count
    survivors: Set


class Added(Message, frozen=True):
    """Kind SUM: an owner's chunk of the sum over `survivors`; the bytes are a file of this digest."""

    ctx: Digest
    survivors: Set
    chunk: Count
    digest: Digest


Opened = tuple[Party, Digest, Digest, Signature]
"""(dealer, share, digest of the other share, the dealer's signature)"""


class Release(Message, frozen=True):
    """ "For this instance I release for these survivors only" (none: it was aborted), and shares of σ of the others."""

    ctx: Digest
    survivors: Set
    shares: Annotated[list[Opened], msgspec.Meta(max_length=MAX_PARTIES // 2)]  # q survive; two of these are evidence


class Open(Message, frozen=True):
    """A secret of a party that certifies itself: b against hb, σ against pk."""

    dealer: Party
    advert: AdvertId
    which: Literal["b", "s"]
    secret: Digest


class ShareB(Message, frozen=True):
    """Kind SHARE_B: shares of b of survivors that have not opened it themselves; entries only grow."""

    ctx: Digest
    survivors: Set
    shares: Annotated[list[Opened], msgspec.Meta(max_length=MAX_PARTIES)]


class Finished(Message, frozen=True):
    """Kind FINAL: how it ended here: status 0, the sum of this hash; status 1, noise."""

    ctx: Digest
    survivors: Set
    status: Literal[0, 1]
    sum_hash: Digest


class Certificate(Message, frozen=True):
    """The PRECOMMITs of exactly q parties, ascending, that decided this value: for who goes on without knowing it."""

    stage: Stage
    view: Count
    value: list[Any]
    signatures: Annotated[list[tuple[Party, Signature]], msgspec.Meta(max_length=MAX_PARTIES)]


class Evidence(Message, frozen=True):
    """Signed messages (body ‖ signature) that together convict their sender; `type` is "E1" to "E7"."""

    type: Annotated[str, msgspec.Meta(min_length=2, max_length=2)]
    messages: Annotated[list[bytes], msgspec.Meta(max_length=MAX_PARTIES)]


KINDS: Final[dict[str, tuple[type[Message], int]]] = {  # kind → its fields, the cap of its body in bytes
    "ADVERTISE": (Advertise, 256),
    "SHARE": (Share, 320),
    "ACK": (Ack, 256 + 24 * MAX_PARTIES),
    "READY": (Ready, 320),
    "PROPOSAL": (Proposal, 640),
    "PREVOTE": (Vote, 192),
    "PRECOMMIT": (Vote, 192),
    "SCATTER": (Scatter, 256),
    "RECEIPT": (Receipt, 256),
    "CUT": (Cut, 256),
    "SUM": (Added, 320),
    "RELEASE": (Release, 320 + 150 * (MAX_PARTIES // 2)),
    "OPEN": (Open, 256),
    "SHARE_B": (ShareB, 320 + 150 * MAX_PARTIES),
    "FINAL": (Finished, 320),
    "CERTIFICATE": (Certificate, 640 + 72 * MAX_PARTIES),
    "EVIDENCE": (Evidence, 60_000),
}


class Signed(msgspec.Struct, frozen=True, dict=True):
    """A message and the bytes that were signed. Made by `sign`, or by `parse`, which does not look at the signature."""

    message: Any
    body: bytes
    signature: bytes
    kind: str
    sender: int
    sid: bytes

    @property
    def raw(self) -> bytes:
        return self.body + self.signature

    @cached_property
    def digest(self) -> bytes:
        """Names the message: 16 bytes over its body."""
        return hash_("fp.sa1.msg", self.body, size=16)

    def verify(self, public: bytes) -> None:
        """Raises TrustError unless the holder of this key said it."""
        verify(public, self.kind, self.body, self.signature, label=LABEL)


def sign(key: SigningKey, sid: bytes, kind: str, sender: int, *fields: Any) -> Signed:
    """A message of ours. Raises RemoteProtocolError for fields that nobody would take."""
    body = codec.encode([VERSION, sid, kind, sender, *fields])
    return parse(body + key.sign(kind, body, label=LABEL))


class _Head(msgspec.Struct, frozen=True, array_like=True):
    """What every body begins with; what follows is skipped."""

    version: Literal[1]
    sid: Digest
    kind: str


_HEAD: Final = msgspec.msgpack.Decoder(_Head)
_DECODERS: Final = {kind: msgspec.msgpack.Decoder(fields) for kind, (fields, _) in KINDS.items()}


def parse(raw: Buffer) -> Signed:
    """A message and its signature. Raises RemoteProtocolError for what is none."""
    raw = bytes(raw)
    body, signature = raw[:-SIGNATURE_BYTES], raw[-SIGNATURE_BYTES:]
    if len(body) > codec.MAX_RECORD:
        raise RemoteProtocolError(f"a message of {len(body)} bytes")
    try:
        kind = _HEAD.decode(body).kind
        if kind not in KINDS:
            raise RemoteProtocolError("a message of an unknown kind")
        if len(body) > KINDS[kind][1]:
            raise RemoteProtocolError(f"a {kind} of {len(body)} bytes")
        message = _DECODERS[kind].decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"not a message: {error}") from None
    if kind in ("PROPOSAL", "CERTIFICATE"):
        codec.decode(body)  # what is proposed may be anything that has one encoding
    if msgspec.msgpack.encode(message) != body:
        raise RemoteProtocolError(f"not the canonical encoding of a {kind}")
    return Signed(message, body, signature, kind, message.sender, message.sid)


def value_of(stage: Stage, raw: list[Any]) -> StartValue | CommitValue | AbortValue:
    """The typed value of a proposal. Raises RemoteProtocolError."""
    encoded = codec.encode(raw)
    if stage == START:
        value = codec.decode_as(StartValue, encoded)
        match value.prev:
            case None | ["FINAL", bytes(), bytes()] | ["ABORT", bytes()]:
                return value
        raise RemoteProtocolError("a START with an end that is none")
    if raw[:1] == ["S"]:
        return codec.decode_as(CommitValue, encoded)
    return codec.decode_as(AbortValue, encoded)


def id_of(stage: Stage, value: Any) -> bytes:
    """What votes for this value (a list or its typed form) name."""
    return value_id(stage, codec.encode(value))
