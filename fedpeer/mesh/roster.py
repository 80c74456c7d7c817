"""The peers we know: their cards, by id, name and key.

Rules
* A peer is in the roster because an operator added its card; nothing that comes over the network adds one.
* One id, one card: a card given later replaces the one we had. One name, one id: two peers cannot share a name here,
  nor take ours.
* A reference to a peer is its name, its id, or any beginning of its id that only one peer has.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

import msgspec

from fedpeer.crypto import equal
from fedpeer.errors import Ambiguous, CardError, NotFound, TrustError
from fedpeer.identity import Card
from fedpeer.store import Schema, Transaction

SCHEMA = Schema(
    "mesh.roster", ["CREATE TABLE mesh_peer (id TEXT PRIMARY KEY, card TEXT NOT NULL, added TEXT NOT NULL)"]
)


class PeerView(msgspec.Struct, kw_only=True):
    """What an operator sees of a peer."""

    id: str
    name: str
    fingerprint: str
    addresses: list[str]
    connected: bool
    since: str
    """when the session began (RFC 3339), "" when there is none"""
    bytes_sent: int
    bytes_received: int
    error: str
    """why there is no session, "" when there is one"""


class Roster:
    """In memory; `save`, `forget` and `load` are its durable twin."""

    def __init__(self, me: Card, cards: Iterable[Card] = ()) -> None:
        self.me = me
        self._cards = {card.id: card for card in cards}

    def check(self, text: str) -> Card:
        """The card of this text if it may be added. Raises CardError, TrustError."""
        card = Card.parse(text)
        if card.id == self.me.id:
            raise CardError("this is the card of this peer itself", hint="add the card that the other side prints")
        for other in (self.me, *self._cards.values()):
            if other.name == card.name and other.id != card.id:
                raise TrustError(
                    f"another peer is called {card.name!r} here already: {other.id}",
                    hint="compare the fingerprints by voice; `fedpeer peer remove` forgets the old one",
                    peer=card.name,
                )
        return card

    def add(self, card: Card) -> None:
        self._cards[card.id] = card

    def remove(self, peer: str) -> None:
        self._cards.pop(peer, None)

    def get(self, peer: str) -> Card | None:
        """The card of this id, our own included."""
        return self.me if peer == self.me.id else self._cards.get(peer)

    def by_key(self, dh: bytes) -> Card | None:
        """The peer (never ourselves) whose sessions are made with this key; time does not tell how much of it fits."""
        return next((card for card in self._cards.values() if equal(card.body.dh, dh)), None)

    def __iter__(self) -> Iterator[Card]:
        return iter(sorted(self._cards.values(), key=lambda card: card.name))

    def __contains__(self, peer: str) -> bool:
        return peer in self._cards

    def resolve(self, ref: str) -> str:
        """The id that a name, an id or a beginning of one means. Raises NotFound (with the nearest name), Ambiguous."""
        everyone: list[Card] = [self.me, *self]
        for card in everyone:
            if ref in (card.name, card.id):
                return card.id
        found = [card for card in everyone if ref and card.id.startswith(ref)]
        if len(found) == 1:
            return found[0].id
        if found:
            raise Ambiguous(f"{ref!r} begins the ids of {', '.join(card.name for card in found)}")
        near = difflib.get_close_matches(ref, [card.name for card in everyone], n=1)
        raise NotFound(
            f"no peer {ref!r} in the roster",
            hint=f"did you mean {near[0]!r}?"
            if near
            else "`fedpeer peer list` shows them, `fedpeer peer add CARD` adds one",
        )

    def card_text(self, peer: str) -> str:
        """The card of this id as a line, "" if there is none."""
        card = self.get(peer)
        return card.text if card else ""

    def name_of(self, peer: str) -> str:
        card = self.get(peer)
        return card.name if card else peer[:8] + "…"


def load(tx: Transaction) -> list[Card]:
    return [Card.parse(text) for (text,) in tx.all("SELECT card FROM mesh_peer")]


def save(tx: Transaction, card: Card, now: str) -> None:
    tx.execute(
        "INSERT INTO mesh_peer VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET card = excluded.card",
        (card.id, card.text, now),
    )


def forget(tx: Transaction, peer: str) -> None:
    tx.execute("DELETE FROM mesh_peer WHERE id = ?", (peer,))
