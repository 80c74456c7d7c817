"""Heads of audit logs, signed by their owners and by the partners: nobody rewrites its history alone.

The participants of a contract say in its scope, at its agreement (`when` = "agreed") and at its end ("ended"):
  known    `Known`, slot ""            the last heads of each of you that I co-signed
  head     `SignedHead`, slot `when`   the head of my log, once I know what all of you know
  growth   `Growth`, slot `when`/i     proofs that it begins with every head of mine that one of you knows
  cosign   `Cosign`, slots "0", "1" …  the heads of others that I checked

Rules
* A head is co-signed if it is shown to begin with everything of the same log that was co-signed before. A *tip* is a
  co-signed head that is not shown yet to be the beginning of a later one: one for each peer, and for a while some more
  where jobs run side by side, since their records come in any order. A log that was forked has two tips that no head
  joins: found with the next contract.
* What a partner's head should have shown and did not is told to the operator, with the records as evidence; no head of
  that log is co-signed any more until the operator accepts it. The job goes on.
* A known head of ours that our log does not begin with: this log was restored from an old copy, or they say wrong.
* Caps: two heads of a participant and contract; `MAX_TIPS` of each peer are named.

Functions on a transaction, and the verdict on a head.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec

from fedpeer import codec
from fedpeer.governance import audit, tree
from fedpeer.mesh import records
from fedpeer.store import Schema, Transaction

KNOWN, HEAD, GROWTH, COSIGN = "known", "head", "growth", "cosign"
KINDS = (KNOWN, HEAD, GROWTH, COSIGN)
AGREED, ENDED = "agreed", "ended"
MAX_TIPS: Final = 8
MAX_GROWTHS: Final = 32
MAX_NAMED: Final = 256 * 2
_MAX_BODY = 60_000
_MAX_EVIDENCE = 256 * 1024

SCHEMA = Schema(
    "governance.heads",
    [
        """
        CREATE TABLE audit_head (           -- of our log and of others', as their owners signed them
            owner TEXT NOT NULL,
            number INTEGER NOT NULL,
            root BLOB NOT NULL,
            scope BLOB NOT NULL,
            raw BLOB NOT NULL,              -- the signed record
            PRIMARY KEY (owner, number, root, scope)
        ) STRICT;
        CREATE TABLE audit_cosign (         -- who co-signed it, ourselves among them
            owner TEXT NOT NULL,
            number INTEGER NOT NULL,
            root BLOB NOT NULL,
            signer TEXT NOT NULL,
            raw BLOB NOT NULL,
            PRIMARY KEY (owner, number, root, signer)
        ) STRICT;
        CREATE TABLE audit_tip (            -- what the next head of this log has to begin with
            owner TEXT NOT NULL,
            number INTEGER NOT NULL,
            root BLOB NOT NULL,
            PRIMARY KEY (owner, number, root)
        ) STRICT;
        CREATE TABLE audit_card (peer TEXT PRIMARY KEY, card TEXT NOT NULL) STRICT; -- also of who left the roster
        CREATE TABLE audit_alarm (          -- who did not show that its log only grew
            owner TEXT NOT NULL,
            scope BLOB NOT NULL,
            time TEXT NOT NULL,
            evidence BLOB NOT NULL,
            PRIMARY KEY (owner, scope)
        ) STRICT;
        """
    ],
)

PeerId = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Number = Annotated[int, msgspec.Meta(ge=1, lt=tree.MAX_LEAVES)]
Hash = Annotated[bytes, msgspec.Meta(min_length=tree.HASH_BYTES, max_length=tree.HASH_BYTES)]
Point = tuple[int, bytes]
"""(number, root): a head of a log that is not named"""
Named = tuple[PeerId, Number, Hash]
"""(owner, number, root)"""


class Known(codec.Record, frozen=True):
    heads: Annotated[tuple[Named, ...], msgspec.Meta(max_length=MAX_NAMED)]


class SignedHead(codec.Record, frozen=True):
    number: Number
    root: Hash
    growths: Annotated[int, msgspec.Meta(ge=0, le=MAX_GROWTHS)]
    """how many records of proofs belong to it"""


class Growth(codec.Record, frozen=True):
    proofs: tuple[tuple[Number, Annotated[tuple[Hash, ...], msgspec.Meta(max_length=tree.MAX_PROOF)]], ...]
    """(number of an earlier head, what shows that the log begins with it)"""


class Cosign(codec.Record, frozen=True):
    heads: Annotated[tuple[Named, ...], msgspec.Meta(max_length=MAX_NAMED)]


# what we say


def known(tx: Transaction, peers: Iterable[str]) -> Known:
    """What we co-signed last of these peers."""
    sql = "SELECT owner, number, root FROM audit_tip WHERE owner = ? ORDER BY number LIMIT ?"
    named = [row for peer in peers for row in tx.all(sql, (peer, MAX_TIPS))]
    return Known(tuple(named[:MAX_NAMED]))


def named(said: Iterable[Known], owner: str) -> set[Point]:
    """What these know of one log: at most MAX_TIPS of each."""
    points: set[Point] = set()
    for one in said:
        points.update([(number, root) for whose, number, root in one.heads if whose == owner][:MAX_TIPS])
    return points


def begins_with(tx: Transaction, points: Iterable[Point]) -> set[Point]:
    """Those of these heads with which our log begins."""
    size = audit.size(tx)
    return {(number, root) for number, root in points if number <= size and audit.head(tx, number).digest == root}


def shown(tx: Transaction, points: Iterable[Point]) -> tuple[SignedHead, list[Growth]]:
    """Our head, and proofs that it begins with these heads."""
    now = audit.head(tx)
    growths, size = [], _MAX_BODY
    for number in sorted({number for number, _ in points}):
        proof = (number, tuple(audit.prove(tx, number, now.number)))
        more = len(codec.encode(proof))
        if size + more > _MAX_BODY:
            growths.append([proof])
            size = more
        else:
            growths[-1].append(proof)
            size += more
    del growths[MAX_GROWTHS:]
    return SignedHead(now.number, now.digest, len(growths)), [Growth(tuple(proofs)) for proofs in growths]


# what others say


def only_grew(required: Collection[Point], head: SignedHead, growths: Iterable[Growth]) -> bool:
    """Whether this head is shown to begin with each of the required ones."""
    proofs = {number: proof for growth in growths for number, proof in growth.proofs}
    return all(
        (number, root) == (head.number, head.root)
        or (number in proofs and tree.grew(number, root, head.number, head.root, proofs[number]))
        for number, root in required
    )


def keep(tx: Transaction, owner: str, head: SignedHead, raw: bytes, scope: bytes, card: str) -> None:
    """Keep a head that its owner signed, with its card."""
    tx.execute("INSERT OR IGNORE INTO audit_head VALUES (?, ?, ?, ?, ?)", (owner, head.number, head.root, scope, raw))
    _keep_card(tx, owner, card)


def co_signed(tx: Transaction, owner: str, point: Point, signer: str, raw: bytes, card: str) -> None:
    """Keep the signature of another than its owner under a head."""
    tx.execute("INSERT OR IGNORE INTO audit_cosign VALUES (?, ?, ?, ?, ?)", (owner, *point, signer, raw))
    _keep_card(tx, signer, card)


def move_tip(tx: Transaction, owner: str, begins: Iterable[Point], to: Point) -> None:
    """We co-sign this head, which begins with those."""
    for point in begins:
        tx.execute("DELETE FROM audit_tip WHERE owner = ? AND number = ? AND root = ?", (owner, *point))
    tx.execute("INSERT OR IGNORE INTO audit_tip VALUES (?, ?, ?)", (owner, *to))


def sound_alarm(
    tx: Transaction, owner: str, scope: bytes, time: str, required: Collection[Point], raws: Sequence[bytes]
) -> bool:
    """Keep what shows that an owner did not show it; False if that was done for this contract already."""
    kept: list[bytes] = []
    for raw in raws:
        if sum(map(len, kept)) + len(raw) <= _MAX_EVIDENCE:
            kept.append(raw)
    evidence = codec.encode([sorted(required), kept])
    return (
        tx.execute("INSERT OR IGNORE INTO audit_alarm VALUES (?, ?, ?, ?)", (owner, scope, time, evidence)).rowcount
        == 1
    )


def alarms(tx: Transaction, scope: bytes) -> set[str]:
    """Whose heads were not shown in this contract."""
    return {owner for (owner,) in tx.all("SELECT owner FROM audit_alarm WHERE scope = ?", (scope,))}


def accept(tx: Transaction, owner: str) -> list[Point]:
    """The operator takes the log of this peer as it is from now on; what was known of it before."""
    tips: list[Point] = tx.all("SELECT number, root FROM audit_tip WHERE owner = ? ORDER BY number", (owner,))
    tx.execute("DELETE FROM audit_tip WHERE owner = ?", (owner,))
    return tips


# what is kept


@dataclass(frozen=True)
class Statements:
    """All signed records that are kept, and the cards of those who signed them."""

    cards: Mapping[str, str]
    heads: Sequence[bytes]
    cosigns: Sequence[bytes]


def statements(tx: Transaction) -> Statements:
    return Statements(
        dict(tx.all("SELECT peer, card FROM audit_card ORDER BY peer")),
        [raw for (raw,) in tx.all("SELECT raw FROM audit_head ORDER BY owner, number")],
        [raw for (raw,) in tx.all("SELECT DISTINCT raw FROM audit_cosign ORDER BY owner, number")],
    )


def _keep_card(tx: Transaction, peer: str, card: str) -> None:
    if card:  # it may have left the roster
        tx.execute("INSERT OR REPLACE INTO audit_card VALUES (?, ?)", (peer, card))


def signed(tx: Transaction, scope: bytes, kind: str, slot: str, sender: str) -> bytes:
    """A record of the scope as it was signed; it is there."""
    found = records.find(tx, scope, kind, slot, sender)
    assert found is not None, "a record that was read is in the store"
    return found.raw
