"""After COMMIT: RELEASE, OPEN, SHARE_B, and the result.

Rules
* What is let go of is asked of release.py, every time.
* A secret certifies itself against its ADVERTISE, a share by its dealer's signature; whatever does not is ignored.
* Whoever puts a secret together from shares opens it for all.
* The result is a function of the decision and of self-certified secrets: alike everywhere.

Source: SA1, version 1, sections 8 (4 to 6) and 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, islice
from typing import Final

from fedpeer.aggregation import keyset
from fedpeer.aggregation.evidence import Dealt, bad_dealing
from fedpeer.aggregation.gathering import Gathering
from fedpeer.aggregation.keyset import Which
from fedpeer.aggregation.messages import CommitValue
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
        fixed, which = self.seat.fixed, _WHICH[kind]
        assert fixed is not None
        advert, public = fixed.ids[dealer], self.seat.here.setting.publics[dealer]
        shares: dict[int, bytes] = {}
        dealt: list[Dealt] = []
        for signed in self.seat.board.all(kind):
            for entry in signed.message.shares:
                if entry[0] == dealer and signed.sender not in shares and signed.message.ctx == fixed.ctx:
                    try:
                        keyset.check_opened(
                            self.seat.sid, dealer, advert, signed.sender, which, entry[1], entry[2], entry[3], public
                        )
                    except TrustError:
                        continue
                    shares[signed.sender] = entry[1]
                    dealt.append(Dealt(signed.sender, which, entry[1], entry[2], entry[3]))
        tried = ("recovered", which, dealer, len(shares))
        if len(shares) < self.seat.profile.t or tried in self.seat.working:
            return
        self.seat.working.add(tried)
        for holders in islice(combinations(sorted(shares), self.seat.profile.t), TRIES):
            secret = Weights(holders).interpolate([shares[holder] for holder in holders])
            if self._check(dealer, which, secret, survivors):
                if not self.seat.muted:
                    self.seat.say(step, "OPEN", dealer, advert, which, secret)
                return
        self.seat.here.convicted.add(dealer)  # it signed shares of nothing
        if not self.seat.muted and dealer not in self._accused:
            self._accused.add(dealer)
            proof = bad_dealing(fixed.adverts[dealer], dealt[: self.seat.profile.t])
            self.seat.say(step, "EVIDENCE", "E5", proof)

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
