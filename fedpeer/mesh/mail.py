"""Letters: exactly once and in order for each (scope, stage, sender → receiver), across sessions and restarts.

How it works
* A letter goes over a session of its two peers. There is no other way: without a direct connection it waits.
* The sender commits a letter to its outbox under the next number of its stream, and keeps it until the receiver's
  daemon has said that it is on disk there. On every new session it sends again what is not acknowledged.
* The receiver takes the number it expects and no other: it commits letter and counter together, then acknowledges
  (cumulatively, so a lost acknowledgement does not matter). A lower number is a repetition and is acknowledged again;
  a higher one cannot happen on an ordered channel and ends the session.
* The receiver keeps a letter until whoever it is for has taken it, in the same transaction that records its effect.
* A letter above `INLINE_BYTES` is a file and is fetched as a blob. Every letter names its place in itself, so its file
  is its own: no other file has this digest, and it can be removed when the letter goes.
* Room: at most `MAX_WAITING` letters of together `MAX_WAITING_BYTES` (or one that is larger) of one sender and scope
  wait to be taken, and `MAX_WAITING_TOTAL` bytes of one sender in all scopes, those on their way included; beyond, the
  channel of that scope stands still, and with it the sender.

Source: the reliable channel of Cachin, Guerraoui, Rodrigues, "Introduction to Reliable and Secure Distributed
Programming" (2011), 2.4.4 with logged delivery (2.4.5); departure: acknowledgements are for prefixes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final, NamedTuple

import msgspec

from fedpeer import codec
from fedpeer.codec import Buffer
from fedpeer.errors import LocalProtocolError, RemoteProtocolError
from fedpeer.mesh.messages import MAX_STAGES, Count, LetterHead, Scope, StageId
from fedpeer.store import Schema, Store, Transaction

INLINE_BYTES: Final = 32 * 1024
MAX_LETTER: Final = 1 << 30
MAX_BUFFERS: Final = 4096
MAX_WAITING: Final = 4096
MAX_WAITING_BYTES: Final = 256 << 20
MAX_WAITING_TOTAL: Final = 4 << 30
BATCH: Final = 16

SCHEMA = Schema(
    "mesh.mail",
    [
        """CREATE TABLE mesh_outbox (n INTEGER PRIMARY KEY AUTOINCREMENT, scope BLOB NOT NULL, stage TEXT NOT NULL,
            receiver TEXT NOT NULL, seq INTEGER NOT NULL, size INTEGER NOT NULL, digest BLOB NOT NULL,
            body BLOB NOT NULL, UNIQUE (scope, stage, receiver, seq));
        CREATE TABLE mesh_inbox (scope BLOB NOT NULL, stage TEXT NOT NULL, sender TEXT NOT NULL, seq INTEGER NOT NULL,
            size INTEGER NOT NULL, digest BLOB NOT NULL, body BLOB NOT NULL, PRIMARY KEY (scope, stage, sender, seq));
        CREATE TABLE mesh_stream (scope BLOB NOT NULL, stage TEXT NOT NULL, peer TEXT NOT NULL,
            posted INTEGER NOT NULL DEFAULT 0, received INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (scope, stage, peer))"""
    ],
    files="SELECT digest FROM mesh_outbox",
)


@dataclass(frozen=True)
class Mail:
    """A letter as its receiver gets it. `buffers` are read-only."""

    seq: int
    tag: str
    header: bytes
    buffers: list[memoryview]


class Place(NamedTuple):
    """Where a letter belongs."""

    scope: bytes
    stage: str
    sender: str
    receiver: str
    seq: int


class _Head(codec.Record, frozen=True):
    scope: Scope
    stage: StageId
    sender: str
    receiver: str
    seq: Count
    tag: Annotated[str, msgspec.Meta(max_length=64)]
    header: bytes
    sizes: Annotated[list[Count], msgspec.Meta(max_length=MAX_BUFFERS)]


_LENGTH = struct.Struct("<I")
_MAX_HEAD = codec.MAX_MESSAGE_HEADER + MAX_LETTER // 16384


def pack(place: Place, tag: str, header: bytes, buffers: Sequence[Buffer]) -> bytes:
    """A letter as one string of bytes. Raises LocalProtocolError when it is too large."""
    views = [memoryview(buffer).cast("B") for buffer in buffers]
    if len(views) > MAX_BUFFERS or len(header) > codec.MAX_MESSAGE_HEADER or len(tag) > 64:
        raise LocalProtocolError("a message with too many arrays, or too long a header or tag")
    if not re.fullmatch("[!-~]{1,64}", place.stage):
        raise LocalProtocolError(f"the name of stage {place.stage!r} is not 1 to 64 visible ASCII characters")
    head = codec.encode(_Head(*place, tag, header, [len(view) for view in views]))
    letter = b"".join([_LENGTH.pack(len(head)), head, *views])
    if len(letter) > MAX_LETTER:
        raise LocalProtocolError(f"a message of {len(letter)} bytes where at most {MAX_LETTER} are allowed")
    return letter


def unpack(place: Place, letter: Buffer) -> Mail:
    """The letter that belongs at `place`. Raises RemoteProtocolError for any other."""
    view = memoryview(letter)
    if len(view) < _LENGTH.size:
        raise RemoteProtocolError("not a letter")
    (length,) = _LENGTH.unpack(view[: _LENGTH.size])
    start = _LENGTH.size + length
    head = codec.decode_as(_Head, view[_LENGTH.size : start], limit=_MAX_HEAD)
    if Place(head.scope, head.stage, head.sender, head.receiver, head.seq) != place:
        raise RemoteProtocolError("a letter that belongs elsewhere")
    if start + sum(head.sizes) != len(view):
        raise RemoteProtocolError("a letter of another length than it says")
    buffers = []
    for size in head.sizes:
        buffers.append(view[start : start + size])
        start += size
    return Mail(head.seq, head.tag, head.header, buffers)


# the sender's side


def post(
    tx: Transaction,
    store: Store,
    me: str,
    scope: bytes,
    stage: str,
    to: str,
    letter: tuple[str, bytes, Sequence[Buffer]],
) -> int:
    """Put (tag, header, buffers) into the outbox; its number in the stream."""
    row = tx.one("SELECT posted FROM mesh_stream WHERE scope = ? AND stage = ? AND peer = ?", (scope, stage, to))
    seq: int = row[0] if row else 0
    packed = pack(Place(scope, stage, me, to, seq), *letter)
    inline = len(packed) <= INLINE_BYTES
    digest = b"" if inline else store.put_file_now(packed)
    tx.execute(
        "INSERT INTO mesh_outbox (scope, stage, receiver, seq, size, digest, body) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (scope, stage, to, seq, len(packed), digest, packed if inline else b""),
    )
    tx.execute(
        "INSERT INTO mesh_stream (scope, stage, peer, posted) VALUES (?, ?, ?, 1)"
        " ON CONFLICT (scope, stage, peer) DO UPDATE SET posted = posted + 1",
        (scope, stage, to),
    )
    return seq


def outgoing(tx: Transaction, scope: bytes, to: str, after: int) -> list[tuple[int, LetterHead, bytes]]:
    """The next few letters of the outbox behind row `after`: (row, head, body)."""
    rows = tx.all(
        "SELECT n, stage, seq, size, digest, body FROM mesh_outbox"
        " WHERE scope = ? AND receiver = ? AND n > ? ORDER BY n LIMIT ?",
        (scope, to, after, BATCH),
    )
    return [(n, LetterHead(stage, seq, size, digest), body) for n, stage, seq, size, digest, body in rows]


def offers(tx: Transaction, scope: bytes, to: str, digest: bytes) -> bool:
    """Whether a letter to this peer is in the file of that digest."""
    sql = "SELECT 1 FROM mesh_outbox WHERE scope = ? AND receiver = ? AND digest = ?"
    return tx.one(sql, (scope, to, digest)) is not None


def acknowledged(tx: Transaction, scope: bytes, stage: str, to: str, upto: int) -> list[bytes]:
    """Forget the letters before `upto`; the digests of their files."""
    rows = tx.all(
        "DELETE FROM mesh_outbox WHERE scope = ? AND stage = ? AND receiver = ? AND seq < ? RETURNING digest",
        (scope, stage, to, upto),
    )
    return [digest for (digest,) in rows if digest]


# the receiver's side


def received(tx: Transaction, scope: bytes, sender: str) -> list[tuple[str, int]]:
    """For each stage, how many letters of this sender are on disk or were taken."""
    return tx.all(
        "SELECT stage, received FROM mesh_stream WHERE scope = ? AND peer = ? AND received > 0 ORDER BY stage LIMIT ?",
        (scope, sender, MAX_STAGES),
    )


def expected(tx: Transaction, scope: bytes, stage: str, sender: str) -> int:
    """The number of the next letter of this stream."""
    row = tx.one("SELECT received FROM mesh_stream WHERE scope = ? AND stage = ? AND peer = ?", (scope, stage, sender))
    number: int = row[0] if row else 0
    return number


def deliver(tx: Transaction, place: Place, head: LetterHead, body: bytes) -> bool:
    """Put a letter into the inbox if it is the expected one; False for a repetition. Raises RemoteProtocolError."""
    next_ = expected(tx, place.scope, place.stage, place.sender)
    if head.seq < next_:
        return False
    if head.seq > next_:
        raise RemoteProtocolError(f"letter {head.seq} of stage {place.stage!r} where {next_} was expected")
    if next_ == 0 and len(received(tx, place.scope, place.sender)) >= MAX_STAGES:
        raise RemoteProtocolError("letters of too many stages")
    tx.execute(
        "INSERT INTO mesh_inbox VALUES (?, ?, ?, ?, ?, ?, ?)",
        (place.scope, place.stage, place.sender, head.seq, head.size, head.digest, body),
    )
    tx.execute(
        "INSERT INTO mesh_stream (scope, stage, peer, received) VALUES (?, ?, ?, 1)"
        " ON CONFLICT (scope, stage, peer) DO UPDATE SET received = received + 1",
        (place.scope, place.stage, place.sender),
    )
    return True


def first(tx: Transaction, scope: bytes, stage: str, sender: str) -> tuple[int, bytes, bytes] | None:
    """The first letter that is not taken: (seq, digest, body)."""
    row: tuple[int, bytes, bytes] | None = tx.one(
        "SELECT seq, digest, body FROM mesh_inbox WHERE scope = ? AND stage = ? AND sender = ? ORDER BY seq LIMIT 1",
        (scope, stage, sender),
    )
    return row


def take(tx: Transaction, scope: bytes, stage: str, sender: str, seq: int) -> tuple[int, bytes]:
    """Remove the first letter, which must be number `seq`: (size, digest of its file or b"")."""
    found = first(tx, scope, stage, sender)
    if found is None or found[0] != seq:
        raise LocalProtocolError(f"letter {seq} of stage {stage!r} is not the first one that waits")
    row: tuple[int, bytes] = tx.one(
        "DELETE FROM mesh_inbox WHERE scope = ? AND stage = ? AND sender = ? AND seq = ? RETURNING size, digest",
        (scope, stage, sender, seq),
    )
    return row


class Waiting:
    """How much of each sender and scope waits to be taken, in memory."""

    def __init__(self, tx: Transaction) -> None:
        rows = tx.all("SELECT scope, sender, COUNT(*), SUM(size) FROM mesh_inbox GROUP BY scope, sender")
        self._held: dict[tuple[bytes, str], tuple[int, int]] = {
            (scope, sender): (count, size) for scope, sender, count, size in rows
        }

    def has_room(self, scope: bytes, sender: str, size: int) -> bool:
        count, held = self._held.get((scope, sender), (0, 0))
        total = sum(held for (_, other), (_, held) in self._held.items() if other == sender)
        alone_or_fits = count == 0 or (count < MAX_WAITING and held + size <= MAX_WAITING_BYTES)
        return alone_or_fits and total + size <= MAX_WAITING_TOTAL

    def add(self, scope: bytes, sender: str, letters: int, size: int) -> None:
        """Count letters in, or out with negative numbers."""
        count, held = self._held.get((scope, sender), (0, 0))
        self._held[scope, sender] = (count + letters, held + size)

    def close(self, scope: bytes) -> None:
        self._held = {key: value for key, value in self._held.items() if key[0] != scope}
