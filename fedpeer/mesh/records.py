"""Scopes and their records: signed statements, at most one for each kind, slot and sender.

Rules
* A scope is one contract: who may hear and say something in it. It is opened and closed by ourselves only.
* A record is the canonical bytes of `Record` and its sender's signature over exactly those bytes. The signed bytes are
  kept and passed on as received, so anybody of the audience can hand on what anybody said.
* A *sealed* record has no signature behind it: its body is signed in a form of its own. What follows the encoding is
  the signature, or nothing, so the two forms cannot be taken for each other.
* A *directed* record is for one peer of the audience (`to`). Who only passes it on keeps it, and does not show it.
* The first record in a slot stays. A different one by the same sender is kept once as evidence of equivocation. A
  sealed one with the same body is no other: anybody could address it anew; the addressee takes the one that is for it.
* Of a closed scope one record of ours may stay, the farewell: it is told to whoever of the audience still asks, for
  the others cannot know that everybody has heard everything.
* Caps, for each scope and sender: `MAX_RECORDS` records of together `MAX_BYTES`, `MAX_EVIDENCE` pieces of evidence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import msgspec

from fedpeer import codec
from fedpeer.crypto import SIGNATURE_BYTES, SigningKey, hash_, verify
from fedpeer.errors import LocalProtocolError, RemoteProtocolError
from fedpeer.mesh.messages import MAX_AUDIENCE, Scope
from fedpeer.store import Schema, Transaction

MAX_BODY: Final = 64_000
MAX_RECORDS: Final = 1 << 16
MAX_BYTES: Final = 64 << 20
MAX_EVIDENCE: Final = 16

SCHEMA = Schema(
    "mesh.records",
    [
        """CREATE TABLE mesh_scope (scope BLOB PRIMARY KEY, audience BLOB NOT NULL);
        CREATE TABLE mesh_record (scope BLOB NOT NULL, kind TEXT NOT NULL, slot TEXT NOT NULL, sender TEXT NOT NULL,
            raw BLOB NOT NULL, PRIMARY KEY (scope, kind, slot, sender));
        CREATE TABLE mesh_evidence (scope BLOB NOT NULL, kind TEXT NOT NULL, slot TEXT NOT NULL, sender TEXT NOT NULL,
            first BLOB NOT NULL, second BLOB NOT NULL, PRIMARY KEY (scope, kind, slot, sender))""",
        """CREATE TABLE mesh_farewell (scope BLOB PRIMARY KEY, audience BLOB NOT NULL, raw BLOB NOT NULL,
            until INTEGER NOT NULL)""",
        # what each sender has of a scope: counted as it changes, so that keeping a record costs the same at any number
        """CREATE TABLE mesh_quota (scope BLOB NOT NULL, sender TEXT NOT NULL, records INTEGER NOT NULL,
            bytes INTEGER NOT NULL, PRIMARY KEY (scope, sender)) WITHOUT ROWID;
        INSERT INTO mesh_quota SELECT scope, sender, COUNT(*), SUM(LENGTH(raw)) FROM mesh_record GROUP BY scope, sender;
        CREATE TRIGGER mesh_record_kept AFTER INSERT ON mesh_record BEGIN
            INSERT INTO mesh_quota VALUES (new.scope, new.sender, 1, LENGTH(new.raw))
                ON CONFLICT DO UPDATE SET records = records + 1, bytes = bytes + excluded.bytes;
        END;
        CREATE TRIGGER mesh_record_forgotten AFTER DELETE ON mesh_record BEGIN
            UPDATE mesh_quota SET records = records - 1, bytes = bytes - LENGTH(old.raw)
                WHERE scope = old.scope AND sender = old.sender;
            DELETE FROM mesh_quota WHERE scope = old.scope AND sender = old.sender AND records = 0;
        END""",
    ],
)


class Record(codec.Record, frozen=True):
    scope: Scope
    kind: Annotated[str, msgspec.Meta(min_length=1, max_length=32)]
    slot: Annotated[str, msgspec.Meta(max_length=128)]
    sender: Annotated[str, msgspec.Meta(max_length=64)]
    body: Annotated[bytes, msgspec.Meta(max_length=MAX_BODY)]
    to: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """the one peer it is for; empty: the whole audience"""


@dataclass(frozen=True)
class Signed:
    """A record with the bytes it came in: canonical encoding, then the signature if it is not sealed.

    `digest` is of the former.
    """

    record: Record
    raw: bytes
    digest: bytes
    signature: bytes
    """empty: the record is sealed"""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.record.kind, self.record.slot, self.record.sender

    def verify(self, public: bytes) -> None:
        """Raises TrustError unless its sender, who has this key, said it. Of a sealed record it cannot be said here."""
        verify(public, "record", self.raw[:-SIGNATURE_BYTES], self.signature)


def sign(key: SigningKey, record: Record) -> Signed:
    body = codec.encode(record)
    return parse(body + key.sign("record", body))


def seal(record: Record) -> Signed:
    """A record whose body is signed in a form of its own."""
    return parse(codec.encode(record))


def parse(raw: codec.Buffer) -> Signed:
    """A record and its signature, which is not looked at yet. Raises RemoteProtocolError."""
    raw = bytes(raw)
    try:
        return Signed(codec.decode_as(Record, raw), raw, hash_("fp.record", raw), b"")
    except RemoteProtocolError:
        if len(raw) <= SIGNATURE_BYTES:
            raise
    statement, signature = raw[:-SIGNATURE_BYTES], raw[-SIGNATURE_BYTES:]
    return Signed(codec.decode_as(Record, statement), raw, hash_("fp.record", statement), signature)


class Shelf:
    """The records of one scope, in memory: those for `me` to read, and those that are only passed on."""

    def __init__(self, me: str = "") -> None:
        self._me = me
        self._by_kind: dict[str, dict[tuple[str, str], Signed]] = {}
        self._feeds: dict[str, dict[int, Signed]] = {}  # of each kind, in the order they came, by number
        self._ends: dict[str, int] = {}  # the next number of each kind
        self._numbers: dict[bytes, int] = {}  # by digest
        self._passed: dict[tuple[str, str, str], Signed] = {}
        self._counts: Counter[str] = Counter()  # by sender

    def __iter__(self) -> Iterator[Signed]:
        for shelf in self._by_kind.values():
            yield from shelf.values()
        yield from self._passed.values()

    def directed(self) -> list[Signed]:
        """What we have for one other peer only."""
        return [signed for signed in self if signed.record.to not in ("", self._me)]

    def add(self, signed: Signed) -> bool:
        """Put it there unless the slot is taken; whether it was added."""
        record = signed.record
        if self.get(*signed.key) is not None:
            return False
        self._counts[record.sender] += 1
        if record.to not in ("", self._me) and record.sender != self._me:
            self._passed[signed.key] = signed
            return True
        self._by_kind.setdefault(record.kind, {})[record.slot, record.sender] = signed
        number = self._ends.get(record.kind, 0)
        self._feeds.setdefault(record.kind, {})[number] = signed
        self._ends[record.kind], self._numbers[signed.digest] = number + 1, number
        return True

    def count(self, sender: str) -> int:
        """How many records of this sender are here."""
        return self._counts[sender]

    def readdress(self, signed: Signed) -> None:
        """Take this in the place of the one that is only passed on."""
        if self._passed.pop(signed.key, None) is not None:
            self._counts[signed.record.sender] -= 1
        self.add(signed)

    def get(self, kind: str, slot: str, sender: str) -> Signed | None:
        """The record of this slot, also one that is only passed on."""
        return self._by_kind.get(kind, {}).get((slot, sender)) or self._passed.get((kind, slot, sender))

    def read(self, kind: str, slot: str, sender: str) -> Signed | None:
        """The record of this slot if it is for us, or ours."""
        return self._by_kind.get(kind, {}).get((slot, sender))

    def since(self, kind: str, position: int) -> tuple[list[Signed], int]:
        """What was added of a kind after this position (0: all that is here), and the position now."""
        new: list[Signed] = []
        feed = self._feeds.get(kind, {})
        for number in reversed(feed):
            if number < position:
                break
            new.append(feed[number])
        return new[::-1], self._ends.get(kind, 0)

    def of_kind(self, kind: str) -> list[Signed]:
        return list(self._by_kind.get(kind, {}).values())

    def bodies(self, kind: str) -> dict[tuple[str, str], bytes]:
        return {key: signed.record.body for key, signed in self._by_kind.get(kind, {}).items()}

    def discard(self, kind: str, slot: str) -> None:
        self._drop(kind, lambda text: text == slot)

    def discard_under(self, kind: str, prefix: str) -> None:
        self._drop(kind, lambda text: text.startswith(prefix))

    def _drop(self, kind: str, which: Callable[[str], bool]) -> None:
        shelf = self._by_kind.get(kind, {})
        for key in [key for key in shelf if which(key[0])]:
            del self._feeds[kind][self._numbers.pop(shelf.pop(key).digest)]
            self._counts[key[1]] -= 1
        for passed in [key for key in self._passed if key[0] == kind and which(key[1])]:
            del self._passed[passed]
            self._counts[passed[2]] -= 1

    def missing(self, known: Collection[bytes]) -> list[Signed]:
        """What somebody who holds the records of these digests lacks."""
        return [signed for signed in self if signed.digest not in known]


# the durable twin


def audience_of(tx: Transaction, scope: bytes) -> list[str] | None:
    """The peer ids of an open scope, None when it is not open."""
    row = tx.one("SELECT audience FROM mesh_scope WHERE scope = ?", (scope,))
    return None if row is None else codec.decode(row[0])


def open_(tx: Transaction, scope: bytes, audience: list[str]) -> bool:
    """Whether the scope is new. Raises LocalProtocolError if it is open for others."""
    if not 1 <= len(scope) <= 32 or not len(set(audience)) == len(audience) <= MAX_AUDIENCE:
        raise LocalProtocolError("a scope has 1 to 32 bytes and at most 256 different peers")
    known = audience_of(tx, scope)
    if known is not None and known != sorted(audience):
        raise LocalProtocolError("this scope is open already, for another audience")
    if known is None:
        tx.execute("INSERT INTO mesh_scope VALUES (?, ?)", (scope, codec.encode(sorted(audience))))
    return known is None


def keep(tx: Transaction, signed: Signed) -> Literal["new", "same", "evidence", "dropped"]:
    """Keep a verified record; "dropped" when its scope is closed or a cap is reached."""
    record = signed.record
    if audience_of(tx, record.scope) is None:
        return "dropped"
    place = (record.scope, *signed.key)
    row = tx.one("SELECT raw FROM mesh_record WHERE scope = ? AND kind = ? AND slot = ? AND sender = ?", place)
    if row is None:
        sql = "SELECT records, bytes FROM mesh_quota WHERE scope = ? AND sender = ?"
        count, size = tx.one(sql, (record.scope, record.sender)) or (0, 0)
        if count >= MAX_RECORDS or size + len(signed.raw) > MAX_BYTES:
            return "dropped"
        tx.execute("INSERT INTO mesh_record VALUES (?, ?, ?, ?, ?)", (*place, signed.raw))
        return "new"
    held = parse(row[0])
    if held.digest == signed.digest:  # Ed25519 has more than one signature of a statement
        return "same"
    if (
        not signed.signature and held.record.body == signed.record.body
    ):  # anybody could put another scope or to around it
        return "same"
    (count,) = tx.one("SELECT COUNT(*) FROM mesh_evidence WHERE scope = ? AND sender = ?", (place[0], place[3]))
    if count >= MAX_EVIDENCE:
        return "dropped"
    added = tx.execute("INSERT OR IGNORE INTO mesh_evidence VALUES (?, ?, ?, ?, ?, ?)", (*place, row[0], signed.raw))
    return "evidence" if added.rowcount else "dropped"


def find(tx: Transaction, scope: bytes, kind: str, slot: str, sender: str) -> Signed | None:
    """The record of this slot as it was signed."""
    place = (scope, kind, slot, sender)
    row = tx.one("SELECT raw FROM mesh_record WHERE scope = ? AND kind = ? AND slot = ? AND sender = ?", place)
    return None if row is None else parse(row[0])


def readdress(tx: Transaction, signed: Signed) -> None:
    """Keep this in the place of the record in its slot: the same that was addressed to another."""
    place = (signed.record.scope, *signed.key)
    tx.execute("DELETE FROM mesh_record WHERE scope = ? AND kind = ? AND slot = ? AND sender = ?", place)
    tx.execute("INSERT INTO mesh_record VALUES (?, ?, ?, ?, ?)", (*place, signed.raw))


def discard(tx: Transaction, scope: bytes, kind: str, slot: str) -> None:
    """Forget all senders' records of this slot."""
    tx.execute("DELETE FROM mesh_record WHERE scope = ? AND kind = ? AND slot = ?", (scope, kind, slot))


def discard_under(tx: Transaction, scope: bytes, kind: str, prefix: str) -> None:
    """Forget all senders' records of this kind whose slot begins so."""
    where = "scope = ? AND kind = ? AND substr(slot, 1, ?) = ?"
    tx.execute(f"DELETE FROM mesh_record WHERE {where}", (scope, kind, len(prefix), prefix))  # noqa: S608 - constant


def say_farewell(tx: Transaction, scope: bytes, kind: str, sender: str, until: int, now: int) -> None:
    """Keep this record of an open scope beyond its end, until then (seconds since the epoch); forget those of old."""
    tx.execute("DELETE FROM mesh_farewell WHERE until < ?", (now,))
    tx.execute(
        "INSERT OR REPLACE INTO mesh_farewell SELECT scope, audience, raw, ? FROM mesh_record JOIN mesh_scope"
        " USING (scope) WHERE scope = ? AND kind = ? AND slot = '' AND sender = ?",
        (until, scope, kind, sender),
    )


def farewell(tx: Transaction, scope: bytes, peer: str) -> Signed | None:
    """What is left of a closed scope for this peer of it."""
    row = tx.one("SELECT audience, raw FROM mesh_farewell WHERE scope = ?", (scope,))
    return parse(row[1]) if row is not None and peer in codec.decode(row[0]) else None


def load(tx: Transaction, me: str) -> dict[bytes, tuple[list[str], Shelf]]:
    """Every open scope: its audience and its records."""
    scopes = {scope: (codec.decode(raw), Shelf(me)) for scope, raw in tx.all("SELECT scope, audience FROM mesh_scope")}
    for scope, raw in tx.all("SELECT scope, raw FROM mesh_record"):
        scopes[scope][1].add(parse(raw))
    return scopes
