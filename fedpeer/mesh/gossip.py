"""Who is told which record by whom, in one scope: decided here, from what the neighbours say of their own connections.

A *neighbour* is a peer of the audience that is connected to us and has the scope open. Each tells the other, at first
and whenever it changes, who its neighbours are (`Near`).

Rules
* Passing on: a record that is new here goes to every neighbour but the one it came from, its signer, and those who say
  that they are connected to its signer, who tells them itself. In a full mesh nothing is sent twice.
* A directed record goes to its addressee; if that is no neighbour, to the neighbours who say that it is theirs; if
  there are none, to all but those whom the peer it came from has told already. Who is not the addressee passes it on
  alike and shows it to nobody. While signer and addressee are connected no third peer hears of it.
* Asking: a Sync names what we hold, and is answered with what is missing in that, but for what its signer tells
  itself; of the senders that the Sync names everything is told. It is said (1) for all, when a session begins or a
  scope is opened; (2) for a peer that is no neighbour any more, to all neighbours, `PAUSE_S` later, if it is not back
  by then (a directed record that is here takes a way that was lost or found with the same patience); (3) for all,
  everything, to one neighbour in turn every `LOOK_S`. So there are at most 1 / PAUSE_S Syncs a second for each scope
  and neighbour, however often others' connections break, and an answer never causes one.
* A neighbour that lies about its connections hurts itself (it is told less), or delays a directed record until (3).

Why nothing is lost. Of two neighbours, one that holds a record has told it to the other, got it from it, or leaves it
to the signer, for the other said that it is connected to that; when the sessions last, the queues run empty and only
the last case is left. Then the signer has told it on that very session, by passing on or in answer to the Sync the
session began with; if the session ended first, the loss of it was followed by a Sync (2) for just these records, and
a signer that holds back what it should say is made up for by (3). So across every edge that stays in the end both
sides hold the same, and if these edges connect the audience, everybody holds everything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Final

from fedpeer.mesh.records import Record

PAUSE_S: Final = 0.5
LOOK_S: Final = 30.0


def bits_of(audience: Sequence[str], peers: Collection[str]) -> bytes:
    """A set of peers as a bitmap over the audience: peer i is bit i % 8 of byte i // 8."""
    bits = bytearray((len(audience) + 7) // 8)
    for number, peer in enumerate(audience):
        if peer in peers:
            bits[number // 8] |= 1 << number % 8
    return bytes(bits)


def peers_of(audience: Sequence[str], bits: bytes) -> frozenset[str]:
    """The peers of a bitmap; bits beyond the audience name nobody."""
    return frozenset(peer for peer, bit in zip(audience, _each(bits), strict=False) if bit)


def _each(bits: bytes) -> Iterator[int]:
    for byte in bits:
        for number in range(8):
            yield byte >> number & 1


class Neighbours:
    """The neighbours in one scope, and whom each says it is connected to. Iterates over their ids."""

    def __init__(self, me: str, audience: Sequence[str]) -> None:
        self.unopened: set[str] = set()
        """connected peers who said that the scope is not open there: they are told the contract"""
        self.lost: set[str] = set()
        """whose records may have been missed: to be asked about"""
        self.gained: set[tuple[str, str]] = set()
        """neighbours, and to whom they are connected since: a new way for directed records"""
        self._me, self._audience = me, tuple(audience)
        self._near: dict[str, frozenset[str]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._near)

    def __contains__(self, peer: str) -> bool:
        return peer in self._near

    def bits(self) -> bytes:
        return bits_of(self._audience, self._near)

    def meet(self, peer: str, bits: bytes) -> bool:
        """A peer says whom it is connected to. Whether it is a new neighbour; to one that is not, ways may be new."""
        before = self._near.get(peer)
        near = self._near[peer] = peers_of(self._audience, bits) - {peer}
        self.unopened.discard(peer)
        if before is not None:
            self.gained |= {(peer, other) for other in near - before}
        return before is None

    def part(self, peer: str) -> bool:
        """Whether it was a neighbour, and is one no more."""
        self.unopened.discard(peer)
        return self._near.pop(peer, None) is not None

    def beside(self, peer: str) -> list[str]:
        """The neighbours who say that they are connected to this one."""
        return [neighbour for neighbour, near in self._near.items() if peer in near]

    def receivers(self, record: Record, source: str | None) -> list[str]:
        """To whom a record that is new here is passed on; it came from `source`, None for one of our own."""
        if record.to:
            return self._towards(record, source)
        if record.sender == self._me:
            return [peer for peer in self._near if peer != source]
        over = {source, record.sender, *self.beside(record.sender)}
        return [peer for peer in self._near if peer not in over]

    def _towards(self, record: Record, source: str | None) -> list[str]:
        ends = {record.sender, record.to}
        if self._me == record.to:
            return []
        if record.to in self._near:
            hears_it = record.sender in self._near[record.to] or source == record.to
            return [] if hears_it and record.sender != self._me else [record.to]
        over = {source, record.sender}
        known = [peer for peer in self.beside(record.to) if peer not in over]
        told = self._near.get(source, frozenset()) if source is not None else frozenset()
        return known or [peer for peer in self._near if peer not in over | told | ends]

    def answers(self, record: Record, asker: str, named: Collection[str]) -> bool:
        """Whether `asker`, who lacks this record and names these senders in its Sync, is told it by us."""
        if named and record.sender not in named:
            return False
        if asker == record.sender or (self._me == record.sender and record.to in ("", asker)):
            return True
        told_by_its_signer = record.sender in self._near.get(asker, ())
        if not record.to:
            return not told_by_its_signer or record.sender in named
        if asker == record.to:
            return not told_by_its_signer
        if record.to == self._me or record.to in self._near:
            return False
        return bool(named) or asker in self._towards(record, None)

    def lists(self, record: Record, peer: str) -> bool:
        """Whether our Sync with `peer` says that we hold this record: not if it has no part in it."""
        if not record.to or peer in (record.to, record.sender):
            return True
        return (record.sender if record.to == self._me else record.to) not in self._near

    def detours(self, record: Record) -> list[str]:
        """Through whom a directed record that is here can now reach its addressee, after what was lost and gained."""
        if record.to in self._near or record.to == self._me:
            return []
        ways = (peer for peer in self.beside(record.to) if peer != record.sender)
        return [peer for peer in ways if record.to in self.lost or (peer, record.to) in self.gained]
