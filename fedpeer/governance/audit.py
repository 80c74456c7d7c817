"""The audit log: everything that was decided and done here, in order, so that a change afterwards is found.

Rules
* An entry is appended in the transaction of what it is about: both are on disk, or neither is. Nothing changes or
  removes one; the table refuses it.
* Its bytes are canonical, at most `MAX_ENTRY`: facts of more than MAX_FACTS are told by digest and size. It holds 16
  random bytes, so that its hash tells nothing of it to others.
* The entries are the leaves of a hash tree (tree.py). A `Head` is its size and root; heads are signed by us, and by the
  partners (heads.py), who check that the log only grew without seeing an entry. A plain chain of hashes would have
  to show them a hash for each entry in between; the proof of a tree is a kilobyte at a million entries.
* What others can cause to be appended is bounded: see PROTOCOL.md, audit.

How an altered entry is found: beside each lie its own hash and those of the nodes that it completes. `Checker` makes
all of them again; who alters an entry and its hashes too changes the root, and does not have the partners' signatures.

Time and chance are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec

from fedpeer import codec
from fedpeer.crypto import hash_, random_bytes
from fedpeer.errors import AuditBroken, FedpeerError, RemoteProtocolError
from fedpeer.governance import tree
from fedpeer.store import Schema, Transaction

SALT_BYTES: Final = 16
MAX_FACTS: Final = 4096
MAX_ENTRY: Final = 8192
_MAX_KEPT_VALUE = 200

SCHEMA = Schema(
    "governance.audit",
    [
        """
        CREATE TABLE audit_entry (
            number INTEGER PRIMARY KEY,     -- from 1, without a gap
            job BLOB NOT NULL,              -- to find it by; what counts is in the body
            body BLOB NOT NULL,             -- an Entry
            nodes BLOB NOT NULL             -- the hashes of the nodes of the tree that it completes
        ) STRICT;
        CREATE INDEX audit_entry_job ON audit_entry (job, number) WHERE job <> x'';
        CREATE TRIGGER audit_entry_stays BEFORE UPDATE ON audit_entry BEGIN
            SELECT RAISE(ABORT, 'the audit log is only appended to');
        END;
        CREATE TRIGGER audit_entry_remains BEFORE DELETE ON audit_entry BEGIN
            SELECT RAISE(ABORT, 'the audit log is only appended to');
        END
        """
    ],
)


class Entry(codec.Record, frozen=True):
    """What happened. `job`: the contract's id, or empty; `time`: ISO 8601, UTC, by this peer's clock."""

    number: Annotated[int, msgspec.Meta(ge=1)]
    time: Annotated[str, msgspec.Meta(max_length=40)]
    event: Annotated[str, msgspec.Meta(max_length=64)]
    job: Annotated[bytes, msgspec.Meta(max_length=32)]
    facts: dict[str, Any]
    salt: Annotated[bytes, msgspec.Meta(min_length=SALT_BYTES, max_length=SALT_BYTES)]


@dataclass(frozen=True)
class Head:
    """The log up to an entry: how many there are, and the root over them."""

    number: int
    digest: bytes


def append(
    tx: Transaction,
    time: str,
    event: str,
    job: bytes | None,
    facts: Mapping[str, Any],
    *,
    chance: Callable[[int], bytes] = random_bytes,
) -> int:
    """Append an entry; its number. `facts`: plain JSON values with text keys."""
    number = size(tx) + 1
    entry = Entry(number, time, event, job or b"", _capped(facts), chance(SALT_BYTES))
    body = codec.encode(entry)
    nodes = b"".join(tree.completed(number, tree.leaf(number, body), _kept(tx)))
    tx.execute("INSERT INTO audit_entry VALUES (?, ?, ?, ?)", (number, entry.job, body, nodes))
    return number


def size(tx: Transaction) -> int:
    """How many entries there are."""
    return int(tx.one("SELECT coalesce(max(number), 0) FROM audit_entry")[0])


def head(tx: Transaction, number: int | None = None) -> Head:
    """The head now, or as it was when there were so many entries."""
    number = size(tx) if number is None else number
    return Head(number, tree.root(number, _kept(tx)))


def prove(tx: Transaction, old: int, new: int) -> list[bytes]:
    """What shows others that the log of `new` entries begins with that of `old`."""
    return tree.prove(old, new, _kept(tx))


def read(body: codec.Buffer) -> Entry:
    """Raises RemoteProtocolError."""
    return codec.decode_as(Entry, body, limit=MAX_ENTRY)


def entries(tx: Transaction, *, job: bytes = b"", since: int = 0, limit: int = 1000) -> list[Entry]:
    """Entries from a number on, or the last ones (0); of one job, or of all. Raises AuditBroken, naming the entry."""
    found = "SELECT number, body FROM audit_entry WHERE number >= ? AND (? = x'' OR job = ?) ORDER BY number"
    sql = f"{found} LIMIT ?" if since else f"{found} DESC LIMIT ?"
    return [_read(number, body) for number, body in sorted(tx.all(sql, (since, job, job, limit)))]


def find(tx: Transaction, number: int) -> Entry | None:
    """One entry."""
    row = tx.one("SELECT body FROM audit_entry WHERE number = ?", (number,))
    return None if row is None else _read(number, row[0])


def stored(tx: Transaction, since: int, limit: int) -> list[tuple[int, bytes, bytes]]:
    """(number, body, nodes) of at most `limit` entries as they lie in the store, for a Checker."""
    return tx.all(
        "SELECT number, body, nodes FROM audit_entry WHERE number >= ? ORDER BY number LIMIT ?", (since, limit)
    )


class Checker:
    """Checks entries one after the other, as they lie in a store or an export, against signed heads.

    `heads`: number → (root, who signed it). Every method raises AuditBroken, which names the first wrong entry, or the
    entries among which it is.
    """

    def __init__(self, heads: Mapping[int, Sequence[tuple[bytes, str]]]) -> None:
        self._heads = heads
        self._log = tree.Growing()
        self._signed = 0  # up to here the entries are those that were signed
        self.hidden = 0
        """of how many only the hash was shown"""

    @property
    def number(self) -> int:
        return self._log.number

    def add(self, number: int, body: bytes, nodes: bytes) -> None:
        """The next entry, and the hashes that lie beside it. A `body` of b"" is hidden: its hash stands for it."""
        awaited = self._log.number + 1
        if number == awaited - 1:
            raise AuditBroken(f"entry {number} is there twice", number=number)
        if number != awaited:
            raise AuditBroken(f"entry {awaited} is missing: the next one has the number {number}", number=awaited)
        own = tree.leaf(number, body) if body else nodes[: tree.HASH_BYTES]
        self.hidden += not body
        if len(own) != tree.HASH_BYTES or b"".join(self._log.add(own)) != nodes:
            raise AuditBroken(f"entry {number} is not what it was when it was appended", number=number)
        for digest, who in self._heads.get(number, ()):
            if digest != self._log.root():
                first = self._signed + 1
                place = f"entry {number}" if first == number else f"one of the entries {first} to {number}"
                raise AuditBroken(f"{place} is not what it was when {who} signed the log up to there", number=first)
            self._signed = number

    def end(self) -> Head:
        """There is no more: the head. What was signed beyond it is missing."""
        if beyond := min((number for number in self._heads if number > self._log.number), default=0):
            who = ", ".join(sorted({who for _, who in self._heads[beyond]}))
            raise AuditBroken(
                f"the log ends with entry {self._log.number}, but {who} signed it up to {beyond}",
                number=self._log.number + 1,
            )
        return Head(self._log.number, self._log.root())


def _kept(tx: Transaction) -> tree.NodeOf:
    def node_of(level: int, index: int) -> bytes:
        number = (index + 1) << level
        row = tx.one("SELECT substr(nodes, ?, 32) FROM audit_entry WHERE number = ?", (32 * level + 1, number))
        if row is None or len(row[0]) != tree.HASH_BYTES:
            raise AuditBroken(f"entry {number} is missing, or its hashes are", number=number)
        return bytes(row[0])

    return node_of


def _read(number: int, body: bytes) -> Entry:
    try:
        entry = read(body)
    except RemoteProtocolError as error:
        raise AuditBroken(f"entry {number} cannot be read: {error.message}", number=number) from None
    if entry.number != number:
        raise AuditBroken(f"entry {entry.number} is in the place of entry {number}", number=number)
    return entry


def _capped(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts with sorted keys; of what is too large, or has no encoding, digest and size."""
    told = {key: _sorted(facts[key]) for key in sorted(facts)}
    if _size(told) <= MAX_FACTS:
        return told
    told = {key: value if _size(value) <= _MAX_KEPT_VALUE else _digest(value) for key, value in told.items()}
    return told if _size(told) <= MAX_FACTS else {"all": _digest(told)}


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list | tuple) else value


def _size(value: Any) -> int:
    try:
        encoded = codec.encode(value)
        codec.decode(encoded, depth=codec.MAX_DEPTH - 1)  # what is kept can be read again
        return len(encoded)
    except FedpeerError:
        return MAX_FACTS + 1


def _digest(value: Any) -> dict[str, Any]:
    text = msgspec.json.encode(value)
    return {"bytes": len(text), "digest": hash_("fp.audit.facts", text).hex()}
