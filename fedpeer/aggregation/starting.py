"""START: who contributes to which sum, who owns which slice, under which keys.

Rules
* `valid` depends on messages that are here and on how the instance before ended; it only ever becomes true.
* `propose` may depend on anything: on who is suspected, on who owes a secret, on how long it has waited.

Source: SA1, version 1, sections 6, 7 and 11.
"""

from __future__ import annotations

from typing import Any, Final

from fedpeer.aggregation.agreement import Decision
from fedpeer.aggregation.messages import START, Signed, StartValue
from fedpeer.aggregation.names import Parties, advert_root, bitmap, context, parties_of
from fedpeer.aggregation.seat import Ask, Fixed, Seat, Step
from fedpeer.aggregation.sharing import Sharing

READY_S: Final = 10.0
AWAY_S: Final = 1.0
"""how long who was waited for in vain the last time is waited for again"""


class Starting:
    """How this party comes to START."""

    def __init__(self, seat: Seat, sharing: Sharing) -> None:
        self.seat, self.sharing = seat, sharing

    def be_ready(self, step: Step) -> None:
        said = {signed.message.params for signed in self.seat.board.by("READY", self.seat.me)}
        for ask in self.seat.asks.values():
            if ask.params not in said:
                self.seat.say(step, "READY", list(ask.name), ask.model, ask.shared, ask.params)

    def _ready(self, model: bytes, params: bytes) -> set[int]:
        return {
            signed.sender
            for signed in self.seat.board.all("READY")
            if signed.message.model == model and signed.message.params == params
        }

    def propose(self, now: float) -> list[Any] | None:
        """What this party would propose: every party that can contribute to a sum, if it is time."""
        sums: dict[tuple[bytes, bytes], set[int]] = {}
        for signed in self.seat.board.all("READY"):
            sums.setdefault((signed.message.model, signed.message.params), set()).add(signed.sender)
        if not sums:
            return None
        own = [key for key in sums if key[1] in self.seat.asks and self.seat.asks[key[1]].model == key[0]]
        model, params = max(own or sums, key=lambda key: (len(sums[key]), key))
        avoided = self.seat.here.convicted | self.seat.here.debtors
        ready = sums[model, params] - (avoided if self.seat.pin is None else set())
        chosen = {
            party: max(self.sharing.adverts[party].items(), key=_newest)
            for party in ready
            if self.sharing.adverts[party]
        }
        if self.seat.pin is not None:
            chosen = {party: advert for party, advert in chosen.items() if party in self.seat.pin}
        while len(chosen) >= self.seat.profile.m_min:
            lacking = [
                party
                for party, (advert, _) in chosen.items()
                if not self.sharing.available(party, advert, chosen.keys())
            ]
            if not lacking:
                break
            for party in lacking:
                del chosen[party]
        contributors = frozenset(chosen)
        if len(contributors) < self.seat.profile.m_min or (self.seat.pin is not None and contributors != self.seat.pin):
            return None
        missing = frozenset(range(self.seat.n)) - avoided - contributors
        if self.seat.pin is None and missing:
            turn_s = self.seat.here.worked_s.get(params, 0.0)
            patience = AWAY_S if all(self._is_away(party) for party in missing) else max(READY_S, turn_s / 4)
            if self.seat.data and self.seat.seq == 0:  # who is left out here is out for the contract
                patience = self.seat.here.setting.stall_s / 2
            if not self.seat.due(now, self.seat.since("ready", now) + patience):
                return None
        owners = frozenset({self.seat.me}) if self.seat.aborts >= 2 else contributors - self.seat.idle or contributors
        root = advert_root([chosen[party][0] for party in sorted(contributors)])
        pin = None if self.seat.pin is None else bitmap(self.seat.pin, self.seat.n)
        return [
            "U",
            model,
            params,
            bitmap(contributors, self.seat.n),
            bitmap(owners, self.seat.n),
            root,
            pin,
            self.seat.prev,
        ]

    def absent(self, ask: Ask) -> Parties:
        """Whom this sum lacks: who is not ready for it, has no keys, or does not acknowledge the share that we gave it.

        If nobody, those whose shares too few hold.
        """
        wanted = self.seat.pin if self.seat.pin is not None else frozenset(range(self.seat.n))
        others, adverts = wanted - {self.seat.me}, self.sharing.adverts
        ready = {signed.sender for signed in self.seat.board.all("READY") if signed.message.name == ask.name}
        mine = self.sharing.own_advert() if self.sharing.keys is not None else None
        holders = others if mine is None else self.seat.board.acked.get((self.seat.me, mine), set())
        return frozenset(
            party for party in others if party not in ready or not adverts[party] or party not in holders
        ) or frozenset(
            party
            for party in others
            if not any(self.sharing.available(party, advert, wanted) for advert in adverts[party])
        )

    def differing(self, ask: Ask) -> Parties:
        """Who is ready for this sum, but with another history or other parameters than we."""
        ready = {signed.sender for signed in self.seat.board.all("READY") if signed.message.name == ask.name}
        return frozenset(ready - self._ready(ask.model, ask.params) - {self.seat.me})

    def _is_away(self, party: int) -> bool:
        """It was left out last time, and has not been heard of here."""
        return party in self.seat.here.away and not self.seat.board.says("ADVERTISE", party)

    def valid(self, raw: list[Any]) -> bool:
        value = self.seat.value(START, raw)
        if not isinstance(value, StartValue):
            return False
        contributors, owners = parties_of(value.contributors, self.seat.n), parties_of(value.owners, self.seat.n)
        pin = None if value.pin is None else parties_of(value.pin, self.seat.n)
        return (
            len(contributors) >= self.seat.profile.m_min
            and bool(owners)
            and pin == self.seat.pin
            and (self.seat.pin is None or contributors == self.seat.pin)
            and value.prev == self.seat.prev
            and contributors <= self._ready(value.model, value.params)
            and self.sharing.rooted(contributors, value.root, available=True) is not None
        )

    def fix(self, decided: Decision, now: float, step: Step) -> bool:
        """START is decided: take it over once everything behind it is here; whether it is."""
        value = self.seat.value(START, decided.value)
        if not isinstance(value, StartValue):
            return False  # more parties than f lie
        contributors, owners = parties_of(value.contributors, self.seat.n), parties_of(value.owners, self.seat.n)
        adverts = self.sharing.rooted(contributors, value.root, available=False)
        if adverts is None:
            return False
        pin = None if value.pin is None else parties_of(value.pin, self.seat.n)
        ctx = context(self.seat.sid, value.model, value.params, contributors, owners, value.root, pin)
        self.seat.fixed = Fixed(contributors, owners, pin, value.model, value.params, ctx, adverts)
        self.seat.here.away = frozenset(range(self.seat.n)) - contributors
        self.seat.since("started", now)
        self.seat.note(step, "started", contributors=contributors)
        return True


def _newest(item: tuple[bytes, Signed]) -> tuple[int, bytes]:
    advert, signed = item
    return signed.message.inc, advert
