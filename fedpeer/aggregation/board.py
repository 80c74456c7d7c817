"""What has been said about one instance, by whomever and in whatever order.

Rules
* The same messages make the same board, however often and in whatever order they came.
* What only grows (acks, receipts) is the union of all that its sender said: once true, never false again.
* Two different bodies in one slot of one sender are a conflict, and both count: a vote against another is evidence
  *and* a vote.
* Memory is bounded: of each kind and sender so many messages are kept, far more than an honest party says.

Source: SA1, version 1, sections 8 and 10.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator
from typing import Any, Final

from fedpeer.aggregation.evidence import contradiction
from fedpeer.aggregation.messages import Acked, Signed
from fedpeer.aggregation.names import Parties, parties_of
from fedpeer.errors import RemoteProtocolError

FEW: Final = 4
"""what is kept of what an honest party says once"""
MANY: Final = 32
"""what is kept of the rest, in addition to four for each party"""


def slot_of(message: Any) -> Hashable:
    """What an honest sender says once; None for kinds of which it may say several."""
    match message.kind:
        case "ADVERTISE":
            return (message.inc,)
        case "PREVOTE" | "PRECOMMIT" | "PROPOSAL":
            return message.stage, message.view
        case "CUT":
            return (message.view,)
        case "SUM":
            return message.survivors, message.chunk
        case "SCATTER":
            return (message.chunk,)
        case "RELEASE":
            return ()
    return None


class Board:
    """The messages of one instance of n parties."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.conflicts: list[tuple[str, Signed, Signed]] = []
        """("E1".."E7", one message, another) not yet told"""
        self.acked: defaultdict[Acked, set[int]] = defaultdict(set)
        """(dealer, advert) → the parties that say that they hold its shares"""
        self.receipts: defaultdict[tuple[bytes, int], set[int]] = defaultdict(set)
        """(ctx, owner) → the contributors whose chunks it says that it holds"""
        self.released: defaultdict[int, set[Parties]] = defaultdict(set)
        self._said: defaultdict[str, dict[int, dict[bytes, Signed]]] = defaultdict(dict)
        """kind → sender → digest → message"""
        self._slots: dict[tuple[str, int, Hashable], Signed] = {}
        self._accused: set[tuple[str, int]] = set()

    def add(self, signed: Signed) -> bool:
        """Whether it is new. Raises RemoteProtocolError for what cannot be meant for this instance."""
        message, kind, sender = signed.message, signed.kind, signed.sender
        if sender >= self.n:
            raise RemoteProtocolError("a message of a party that does not exist")
        said = self._said[kind].setdefault(sender, {})
        if signed.digest in said:
            return False
        sets = {name: parties_of(getattr(message, name), self.n) for name in _SETS.get(kind, ())}
        limit = MANY + 4 * self.n
        if kind == "ADVERTISE" or (kind == "RELEASE" and self.released[sender]):
            limit = FEW
        full = len(said) >= limit
        slot = slot_of(message)
        if slot is not None:
            first = self._slots.get((kind, sender, slot), signed)
            type_ = contradiction(first, signed)
            if type_ is not None and (kind, sender) not in self._accused:
                self._accused.add((kind, sender))
                self.conflicts.append((type_, first, signed))
            if not full:
                self._slots[kind, sender, slot] = first
        if full:
            return False
        said[signed.digest] = signed
        match kind:
            case "ACK":
                for entry in message.entries:
                    self.acked[entry].add(sender)
            case "RECEIPT":
                self.receipts[message.ctx, sender] |= sets["contributors"]
            case "RELEASE":
                self.released[sender].add(sets["survivors"])
        return True

    def has(self, signed: Signed) -> bool:
        """Whether this message is here."""
        return signed.digest in self._said[signed.kind].get(signed.sender, {})

    def by(self, kind: str, sender: int) -> Collection[Signed]:
        """In the order in which they came; what comes later is in it, too."""
        return self._said[kind].get(sender, {}).values()

    def all(self, kind: str) -> Iterator[Signed]:
        """By sender, ascending."""
        for _, said in sorted(self._said[kind].items()):
            yield from said.values()

    def says(self, kind: str, sender: int) -> bool:
        return bool(self._said[kind].get(sender))


_SETS: Final = {
    "RECEIPT": ("contributors",),
    "CUT": ("survivors",),
    "SUM": ("survivors",),
    "RELEASE": ("survivors",),
    "SHARE_B": ("survivors",),
    "FINAL": ("survivors",),
}
