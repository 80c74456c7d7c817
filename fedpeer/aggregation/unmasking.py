"""After COMMIT: RELEASE, OPEN, SHARE_B, and the result.

Rules
* What is let go of is asked of release.py, every time.
* A secret certifies itself against its ADVERTISE, a share by its dealer's signature; whatever does not is ignored.
* Whoever puts a secret together from shares opens it for all.
* The result is a function of the decision and of self-certified secrets: alike everywhere.

Source: SA1, version 1, sections 8 (4 to 6) and 9.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, islice
from typing import Final

from fedpeer.aggregation import keyset
from fedpeer.aggregation.evidence import Dealt, bad_dealing
from fedpeer.aggregation.gathering import Gathering
from fedpeer.aggregation.keyset import Which
from fedpeer.aggregation.messages import CommitValue, Opened
from fedpeer.aggregation.names import Parties, bitmap
from fedpeer.aggregation.release import Refused, may_open, may_release, may_share_b, may_share_sigma
from fedpeer.aggregation.seat import TRIES, Seat, Step
from fedpeer.aggregation.shamir import Weights
from fedpeer.aggregation.sharing import Sharing
from fedpeer.aggregation.work import Unmask
from fedpeer.crypto import Secret
from fedpeer.errors import TrustError

OPEN_S: Final = 2.0
_WHICH: Final[dict[str, Which]] = {"RELEASE": "s", "SHARE_B": "b"}


class Unmasking:
    """What is let go of once the survivors are decided, and the result."""

    def __init__(self, seat: Seat, sharing: Sharing, gathering: Gathering) -> None:
        self.seat, self.sharing, self.gathering = seat, sharing, gathering
        self.b: dict[int, Secret] = {}
        self.sigma: dict[int, Secret] = {}
        self.total: tuple[int, bytes] | None = None
        self._accused: set[int] = set()
        self._weights: tuple[tuple[int, ...], Weights] | None = None

    def release(self, step: Step, survivors: Parties, voters: Sequence[int]) -> None:
        fixed = self.seat.fixed
        assert fixed is not None
        if self.seat.board.says("RELEASE", self.seat.me):
            return
        try:
            may_release(self.seat.here.log, self.seat.profile, self.seat.terms(), survivors, voters)
        except Refused:
            return
        shares = []
        for dealer in sorted(fixed.contributors - survivors if survivors else ()):
            share = self.sharing.share_of(fixed.ids[dealer])
            may_share_sigma(self.seat.terms(), survivors, dealer)
            if share is not None:
                shares.append(share.opened("s"))
        self.seat.say(step, "RELEASE", fixed.ctx, bitmap(survivors, self.seat.n), shares)
        self.seat.note(step, "released")

    def open(self, now: float, step: Step, survivors: Parties) -> None:
        fixed, log, released = self.seat.fixed, self.seat.here.log, self.seat.board.released
        assert fixed is not None
        try:
            may_open(log, self.seat.profile, self.seat.sid, survivors, released)
        except Refused:
            return
        said = {(signed.message.dealer, signed.message.which) for signed in self.seat.board.by("OPEN", self.seat.me)}
        own = (
            self.sharing.keys is not None and self.sharing.own_advert() == fixed.ids[self.seat.me]
            if self.seat.me in survivors
            else False
        )
        if own and self.sharing.keys is not None and (self.seat.me, "b") not in said:
            self.seat.say(step, "OPEN", self.seat.me, fixed.ids[self.seat.me], "b", self.sharing.keys.b.reveal())
            self.seat.note(step, "opened")
        missing = sorted(survivors - self.b.keys() - ({self.seat.me} if own else set()))
        if not missing or not self.seat.due(now, self.seat.since("committed", now) + OPEN_S):
            return
        shared = {entry[0] for signed in self.seat.board.by("SHARE_B", self.seat.me) for entry in signed.message.shares}
        entries = []
        for dealer in missing:
            share = self.sharing.share_of(fixed.ids[dealer])
            if share is not None and dealer not in shared:
                may_share_b(log, self.seat.profile, self.seat.sid, survivors, released, dealer)
                entries.append(share.opened("b"))
        if entries:
            self.seat.say(step, "SHARE_B", fixed.ctx, bitmap(survivors, self.seat.n), entries)

    def learn(self, step: Step, survivors: Parties) -> None:
        """Secrets that are due: opened, or put together from shares. Each certifies itself."""
        fixed = self.seat.fixed
        assert fixed is not None
        for signed in self.seat.board.all("OPEN"):
            message = signed.message
            if message.dealer in (self.b if message.which == "b" else self.sigma):
                continue
            if message.dealer in fixed.contributors and message.advert == fixed.ids[message.dealer]:
                self._check(message.dealer, message.which, message.secret, survivors)
        for kind, due, known in (
            ("RELEASE", fixed.contributors - survivors, self.sigma),
            ("SHARE_B", survivors, self.b),
        ):
            for dealer in due - known.keys():
                self._recover(step, kind, dealer, survivors)

    def _check(self, dealer: int, which: Which, secret: bytes, survivors: Parties) -> bool:
        """Keep a secret that is due and is what its dealer advertised."""
        assert self.seat.fixed is not None
        known = self.b if which == "b" else self.sigma
        if (which == "b") != (dealer in survivors):
            return False
        if dealer not in known and keyset.is_secret_of(self.seat.fixed.adverts[dealer].message, which, Secret(secret)):
            known[dealer] = Secret(secret)
        return dealer in known

    def _recover(self, step: Step, kind: str, dealer: int, survivors: Parties) -> None:
        """Put a secret together from t shares. It certifies itself, so signatures matter only if it does not."""
        fixed, which, t = self.seat.fixed, _WHICH[kind], self.seat.profile.t
        assert fixed is not None
        entries: dict[int, Opened] = {}
        for signed in self.seat.board.all(kind):
            for entry in signed.message.shares:
                if entry[0] == dealer and signed.message.ctx == fixed.ctx:
                    entries.setdefault(signed.sender, entry)
        tried = ("recovered", which, dealer, len(entries))
        if len(entries) < t or tried in self.seat.working:
            return
        self.seat.working.add(tried)
        if self._put_together(step, dealer, which, sorted(entries)[:t], entries, survivors):
            return
        signed_by_dealer = [holder for holder, entry in sorted(entries.items()) if self._is_dealt(which, holder, entry)]
        for holders in islice(combinations(signed_by_dealer, t), TRIES):
            if self._put_together(step, dealer, which, holders, entries, survivors):
                return
        if len(signed_by_dealer) >= t and dealer not in self._accused:
            self._accused.add(dealer)
            self.seat.here.convicted.add(dealer)  # it signed shares of nothing
            shares = [Dealt(holder, which, *entries[holder][1:]) for holder in signed_by_dealer[:t]]
            if not self.seat.muted:
                self.seat.say(step, "EVIDENCE", "E5", bad_dealing(fixed.adverts[dealer], shares))

    def _put_together(
        self,
        step: Step,
        dealer: int,
        which: Which,
        holders: Sequence[int],
        entries: Mapping[int, Opened],
        survivors: Parties,
    ) -> bool:
        assert self.seat.fixed is not None
        if self._weights is None or self._weights[0] != tuple(holders):
            self._weights = tuple(holders), Weights(holders)
        try:
            secret = self._weights[1].interpolate([entries[holder][1] for holder in holders])
        except TrustError:  # no element of the field
            return False
        found = self._check(dealer, which, secret, survivors)
        if found and not self.seat.muted and self.seat.leader(0) == self.seat.me:  # one is enough: all have the shares
            self.seat.say(step, "OPEN", dealer, self.seat.fixed.ids[dealer], which, secret)
        return found

    def _is_dealt(self, which: Which, holder: int, entry: Opened) -> bool:
        assert self.seat.fixed is not None
        dealer, share, other, signature = entry
        public = self.seat.here.setting.publics[dealer]
        try:
            keyset.check_opened(
                self.seat.sid, dealer, self.seat.fixed.ids[dealer], holder, which, share, other, signature, public
            )
        except TrustError:
            return False
        return True

    def unmask(self, step: Step, value: CommitValue, survivors: Parties) -> None:
        fixed, ask = self.seat.fixed, self.seat.ask
        assert fixed is not None
        gone = fixed.contributors - survivors
        if ask is None or not (survivors <= self.b.keys() and gone <= self.sigma.keys()):
            return
        if self.total is None:
            digests = self.gathering.behind(value)
            if digests is None:
                return
            plus, minus = keyset.unmasking_seeds(fixed.ctx, survivors, fixed.publics, self.b, self.sigma)
            work = Unmask(
                self.seat.sid,
                fixed.ctx,
                digests,
                [(chunk.start, chunk.stop) for chunk in self.gathering.chunks(ask)],
                plus,
                minus,
                len(survivors),
                ask.d,
                ask.used,
                ask.bits,
                ask.w,
                self.seat.here.setting.prg,
            )
            self.seat.work(step, "unmask", work)
        elif not self.seat.board.says("FINAL", self.seat.me) and not self.seat.muted:
            status, sum_hash = self.total
            self.seat.say(step, "FINAL", fixed.ctx, bitmap(survivors, self.seat.n), status, sum_hash)
            self.seat.note(step, "unmasked", status=status)
