"""Keys and shares of one instance: ADVERTISE, SHARE, ACK.

Rules
* A key set is on disk before it is advertised, a share before it is acknowledged.
* A share is dealt to whoever advertises, until START is decided; re-sent it is the same bytes.
* An ACK says what no earlier one of its sender said, as far as it has room; what it holds is all of them together.
* A dealer can contribute when so many contributors hold its shares that its silence later harms nobody.

Source: SA1, version 1, sections 4 and 8 (1).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from itertools import islice, product
from typing import Final

from fedpeer.aggregation.keyset import HeldShare, KeySet
from fedpeer.aggregation.messages import Signed, sign
from fedpeer.aggregation.names import MAX_PARTIES, Parties, advert_root
from fedpeer.aggregation.seat import TRIES, Seat, Step
from fedpeer.errors import TrustError

ACK_S: Final = 0.05


class Sharing:
    """This party's keys, what it dealt, and the shares that it holds."""

    def __init__(self, seat: Seat, kept: Mapping[bytes, bytes]) -> None:
        self.seat = seat
        self.keys: KeySet | None = None
        self.shares: dict[bytes, HeldShare] = {}
        """advert → our share of that dealer"""
        self.adverts: dict[int, dict[bytes, Signed]] = {party: {} for party in range(seat.n)}
        self._dealt: set[tuple[int, bytes]] = set()
        self._tried: set[tuple[bytes, bytes]] = set()  # (SHARE, advert) that do not fit
        for key, raw in kept.items():
            if key == seat.key("keys"):
                self.keys = KeySet.from_bytes(raw)
            elif key.startswith(seat.key("share")):
                share = HeldShare.from_bytes(raw)
                self.shares[share.adv_id] = share

    def set_up(self, now: float, step: Step) -> None:
        if self.keys is None:
            own = self.seat.board.by("ADVERTISE", self.seat.me)
            inc = max((signed.message.inc + 1 for signed in own), default=0)
            self.keys = KeySet.fresh(self.seat.me, self.seat.sid, inc, self.seat.here.random)
            step.keep[self.seat.key("keys")] = self.keys.to_bytes()
            self.seat.say(step, "ADVERTISE", *self.keys.advertise_fields)
            return
        if self.keys.e is None:
            return  # START was decided before the last restart; its messages come again
        mine = self.own_advert()
        if mine is None:  # kept, but not said: it is said now
            self.seat.say(step, "ADVERTISE", *self.keys.advertise_fields)
            return
        for party, adverts in self.adverts.items():
            for advert, signed in adverts.items():
                if party != self.seat.me and (party, advert) not in self._dealt:
                    self._dealt.add((party, advert))
                    self._deal(step, party, advert, signed)
        for party in range(self.seat.n):
            for signed in self.seat.board.by("SHARE", party):
                if signed.message.holder == self.seat.me:
                    self._open_share(step, signed)
        self._ack(now, step)

    def own_advert(self) -> bytes | None:
        """The name of our keys, once they are advertised."""
        assert self.keys is not None
        return self.keys.adv_id if self.keys.adv_id in self.adverts[self.seat.me] else None

    def share_of(self, advert: bytes) -> HeldShare | None:
        """Our share of the secrets behind this advert, our own included."""
        if self.keys is not None and self.keys.adv_id == advert:
            return self.keys.own_share(self.seat.profile.t, self.seat.n, self.seat.here.signer)
        return self.shares.get(advert)

    def close(self, step: Step) -> None:
        """START is decided: no share is dealt or opened any more."""
        if self.keys is not None and self.keys.e is not None:
            self.keys.erase_e()
            step.keep[self.seat.key("keys")] = self.keys.to_bytes()

    @property
    def has_secrets(self) -> bool:
        return self.keys is not None or bool(self.shares)

    def erase(self, step: Step) -> None:
        """R6: nothing more is let go of here."""
        if self.keys is not None:
            step.keep[self.seat.key("keys")] = None
        for advert in self.shares:
            step.keep[self.seat.key("share", advert)] = None
        self.keys = None
        self.shares.clear()

    def _deal(self, step: Step, party: int, advert: bytes, signed: Signed) -> None:
        assert self.keys is not None
        sealed = self.keys.share_for(
            party, advert, signed.message.epk, self.seat.profile.t, self.seat.n, self.seat.here.signer
        )
        share = sign(self.seat.here.signer, self.seat.sid, "SHARE", self.seat.me, party, sealed)
        if not self.seat.board.has(share):
            step.say.append((share, party))

    def _open_share(self, step: Step, signed: Signed) -> None:
        assert self.keys is not None
        for advert, advertised in self.adverts[signed.sender].items():
            if advert in self.shares or (signed.digest, advert) in self._tried:
                continue
            self._tried.add((signed.digest, advert))
            try:
                share = self.keys.open_share(
                    signed.sender,
                    advert,
                    advertised.message.epk,
                    signed.message.ciphertext,
                    self.seat.here.setting.publics[signed.sender],
                    self.seat.n,
                )
            except TrustError:
                continue
            self.shares[advert] = share
            step.keep[self.seat.key("share", advert)] = share.to_bytes()

    def _ack(self, now: float, step: Step) -> None:
        held = {*self.shares, self.own_advert()}  # a dealer holds its own
        acked = self.seat.board.acked
        entries = [
            (party, advert)
            for party, adverts in self.adverts.items()
            for advert in adverts
            if advert in held and self.seat.me not in acked.get((party, advert), ())
        ]
        if not entries:
            self.seat.times.pop("ack", None)
            return
        everybody = all(not held.isdisjoint(adverts) for adverts in self.adverts.values())
        if everybody or self.seat.due(now, self.seat.since("ack", now) + ACK_S):
            self.seat.times.pop("ack", None)
            self.seat.say(step, "ACK", len(self.seat.board.by("ACK", self.seat.me)), sorted(entries)[:MAX_PARTIES])

    def available(self, party: int, advert: bytes, contributors: Set[int]) -> bool:
        """Whether enough of these contributors hold the shares of this key set."""
        holders = self.seat.board.acked.get((party, advert), set()) & contributors
        return len(holders) >= self.seat.profile.acks_needed(len(contributors))

    def rooted(self, contributors: Parties, root: bytes, *, available: bool) -> dict[int, Signed] | None:
        """The adverts behind this root; somebody may have shown two."""
        held = [
            [
                item
                for item in self.adverts[party].items()
                if not available or self.available(party, item[0], contributors)
            ]
            for party in sorted(contributors)
        ]
        for chosen in islice(product(*held), TRIES):
            if advert_root([advert for advert, _ in chosen]) == root:
                return dict(zip(sorted(contributors), (signed for _, signed in chosen), strict=True))
        return None
