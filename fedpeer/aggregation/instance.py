"""One attempt at a secure sum, at one party: messages, finished work and time in; messages, work and an end out.

Rules
* Pure. `add` and `done` only take in; `advance` says everything that follows, and says nothing twice: what this party
  has said is on the board, by its own messages, once they are on disk. So a restart needs no state but these.
* START fixes who contributes, who owns which slice, and under which keys; COMMIT fixes the survivors. What a party
  lets go of is decided by release.py alone.
* `Starting.valid` and `_valid_commit` depend on what is held, which only grows, never on opinions; opinions act in
  `Starting.propose` and `_commit_value`, which choose what this party proposes.
* Every alarm is soft: none decides about privacy.

The order of a successful instance, and where it is: ADVERTISE, SHARE, ACK (sharing) · READY, START (starting) ·
SCATTER, RECEIPT, SUM (gathering) · COMMIT (here) · RELEASE, OPEN (unmasking) · FINAL (here).

Source: SA1, version 1, sections 4 to 9 and 11.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from fedpeer.aggregation import keyset, slices
from fedpeer.aggregation.agreement import Agreement, check_certificate
from fedpeer.aggregation.evidence import Place, convict
from fedpeer.aggregation.gathering import Gathering
from fedpeer.aggregation.messages import COMMIT, START, AbortValue, Certificate, CommitValue, Signed, Stage
from fedpeer.aggregation.names import Parties, advert_id, bitmap, parties_of
from fedpeer.aggregation.seat import Ask, Outcome, Seat, Step
from fedpeer.aggregation.sharing import Sharing
from fedpeer.aggregation.starting import Starting
from fedpeer.aggregation.unmasking import Unmasking
from fedpeer.aggregation.work import Add, Fetch, FetchTotal, Mask, Unmask, Work
from fedpeer.errors import TrustError


class Instance:
    """The attempt that this seat is in. `kept`: secrets of its sid from the disk, by their key."""

    def __init__(self, seat: Seat, kept: Mapping[bytes, bytes]) -> None:
        self.seat = seat
        self.sharing = Sharing(self.seat, kept)
        self.starting = Starting(self.seat, self.sharing)
        self.gathering = Gathering(self.seat, self.sharing)
        self.unmasking = Unmasking(self.seat, self.sharing, self.gathering)
        self.outcome: Outcome | None = None
        self.noise = False
        self._start = Agreement(START, self.seat.profile, self.seat.me, self.seat.leader)
        self._commit = Agreement(COMMIT, self.seat.profile, self.seat.me, self.seat.leader)

    # what comes in

    def add(self, signed: Signed) -> bool:
        """A verified message of this instance, our own from the log or just committed included; whether it is new."""
        if not self.seat.board.add(signed):
            return False
        match signed.kind:
            case "ADVERTISE":
                message = signed.message
                if keyset.is_usable(message.pk) and keyset.is_usable(message.epk):
                    self.sharing.adverts[signed.sender][advert_id(signed.body)] = signed
            case "PROPOSAL" | "PREVOTE" | "PRECOMMIT":
                (self._start if signed.message.stage == START else self._commit).add(signed)
            case "CERTIFICATE":
                self._settle(signed.message)
            case "EVIDENCE":
                setting, convicted = self.seat.here.setting, self.seat.here.convicted
                guilty = convict(signed.message, self.seat.profile, setting.publics, setting.contract, convicted)
                if guilty is not None:
                    convicted.add(guilty)
            case "RELEASE" if signed.sender == self.seat.me:
                survivors = parties_of(signed.message.survivors, self.seat.n)
                self.seat.here.log.release(self.seat.sid, self.seat.group, survivors, pinned=self.seat.pinned)
        return True

    def _settle(self, message: Certificate) -> None:
        agreement = self._start if message.stage == START else self._commit
        if agreement.decided is not None:
            return
        publics = self.seat.here.setting.publics
        with suppress(TrustError):
            agreement.settle(
                check_certificate(
                    self.seat.sid,
                    message.stage,
                    self.seat.profile,
                    publics,
                    message.value,
                    message.view,
                    message.signatures,
                )
            )

    def done(self, work: Work, result: Any) -> None:
        """The result of work that `advance` asked for."""
        match work:
            case Mask():
                self.gathering.masked = result
                self.seat.files |= {digest for _, _, digest in result}
            case Fetch():
                self.seat.files.add(work.digest)
            case Add():
                self.gathering.added[work.survivors, work.chunk] = result[1]
                self.seat.files.add(result[1])
            case Unmask():
                self.unmasking.total = result
                self.seat.files.add(result[1])
            case FetchTotal():
                self.seat.files.add(work.sum_hash)

    # what follows

    def advance(self, now: float, step: Step) -> None:
        """Add to `step` everything that follows from what is here."""
        self.seat.alarms = []
        self._accuse(step)
        if self.outcome is not None:
            self._catch_up(step)
            return
        if self.seat.muted:
            self._start.decide()
        else:
            self._agree_on_start(now, step)
            if self._start.decided is None:
                self.sharing.set_up(now, step)
                self.starting.be_ready(step)
        if self._fix(now, step):
            if not self.seat.muted:
                self.gathering.scatter(step)
                if self._commit.decided is None:
                    self.gathering.add_up(now, step)
            if self.unmasking.total is None and not isinstance(self._committed, AbortValue):
                self.gathering.gather(step)
                self._measure(now)
            if self.seat.muted:
                self._commit.decide()
            else:
                self._agree_on_commit(now, step)
            self._conclude(now, step)
        if not self.seat.muted:
            self._certify(step)
        self._end(now, step)

    def wake_at(self) -> float | None:
        """When `advance` wants to be called again though nothing came."""
        if self.outcome is not None:
            return None
        agreements = () if self.seat.muted else (self._start, self._commit)
        times = [*self.seat.alarms, *(at for each in agreements if (at := each.wake_at()) is not None)]
        return min(times, default=None)

    def _accuse(self, step: Step) -> None:
        for type_, first, second in self.seat.board.conflicts:
            self.seat.here.convicted.add(first.sender)
            if not self.seat.muted:
                self.seat.say(step, "EVIDENCE", type_, [first.raw, second.raw])
        self.seat.board.conflicts.clear()

    def _agree_on_start(self, now: float, step: Step) -> None:
        if not self._start.started and self.starting.propose(now) is not None:
            self._start.start(now)
        valid = self.starting.valid
        for draft in self._start.advance(now, valid, valid, lambda: self.starting.propose(now)):
            self.seat.say(step, draft.kind, *draft.fields)

    def _certify(self, step: Step) -> None:
        """Show what decided it to whoever goes on: a liar may have told each only a part."""
        stages: list[tuple[Stage, Agreement]] = [(START, self._start), (COMMIT, self._commit)]
        for stage, agreement in stages:
            decision = agreement.decided
            if decision is None or not agreement.passed:
                continue
            if all(signed.message.stage != stage for signed in self.seat.board.by("CERTIFICATE", self.seat.me)):
                self.seat.say(step, "CERTIFICATE", stage, decision.view, decision.value, list(decision.signers.items()))

    def _fix(self, now: float, step: Step) -> bool:
        """Whether START is decided and everything behind it is here."""
        if self.seat.fixed is None and self._start.decided is not None:
            self.sharing.close(step)
            return self.starting.fix(self._start.decided, now, step)
        return self.seat.fixed is not None

    def _agree_on_commit(self, now: float, step: Step) -> None:
        fixed, ask = self.seat.fixed, self.seat.ask
        assert fixed is not None
        if self._commit.decided is None:
            patience = self.seat.patience(ask)
            begun = self.seat.since("started", now)
            late = self.seat.due(now, begun + 2 * patience)
            if not self._commit.started and (late or self.gathering.complete(ask) is not None):
                self._commit.start(now)
            self.seat.due(now, begun + 8 * patience)
            if self.seat.due(now, begun + patience):
                self.gathering.cut(self._commit.view, step)
        valid = lambda raw: self._valid_commit(raw, now)  # noqa: E731
        for draft in self._commit.advance(now, valid, valid, lambda: self._commit_value(now)):
            self.seat.say(step, draft.kind, *draft.fields)

    def _measure(self, now: float) -> None:
        """How long it took until all vectors were added up, if nobody was missing."""
        ask = self.seat.ask
        if ask is None or "gathered" in self.seat.times:
            return
        complete = self.gathering.complete(ask)
        if complete is not None:
            took = self.seat.since("gathered", now) - self.seat.since("started", now)
            if self.seat.fixed is not None and parties_of(complete[0], self.seat.n) == self.seat.fixed.contributors:
                self.seat.here.took.append((ask.d * ask.w // 8, took))

    def _abortable(self, now: float) -> bool:
        """Whether an end without a sum may be voted for. Once it may, it may."""
        if "abortable" not in self.seat.times and self.seat.due(
            now, self.seat.since("started", now) + 8 * self.seat.patience(self.seat.ask)
        ):
            self.seat.since("abortable", now)
        return "abortable" in self.seat.times

    def _commit_value(self, now: float) -> list[Any] | None:
        fixed = self.seat.fixed
        assert fixed is not None
        complete = self.gathering.complete(self.seat.ask)
        if complete is not None:
            survivors, digests = complete
            return ["S", fixed.ctx, survivors, slices.root(digests)]
        if self._abortable(now):
            return ["ABORT", fixed.ctx, None if self.seat.pin is None else bitmap(self.seat.pin, self.seat.n)]
        return None

    def _valid_commit(self, raw: list[Any], now: float) -> bool:
        fixed, value = self.seat.fixed, self.seat.value(COMMIT, raw)
        assert fixed is not None
        if value is None or value.ctx != fixed.ctx:
            return False
        if isinstance(value, AbortValue):
            pin = None if self.seat.pin is None else bitmap(self.seat.pin, self.seat.n)
            return value.pin == pin and self._abortable(now)
        assert isinstance(value, CommitValue)
        return self.gathering.behind(value) is not None

    @property
    def _committed(self) -> CommitValue | AbortValue | None:
        """What COMMIT decided; None also for what is no value: then more parties than f lie."""
        decided = self._commit.decided
        value: CommitValue | AbortValue | None = None
        if decided is not None:
            value = self.seat.value(COMMIT, decided.value)
        return value

    def _conclude(self, now: float, step: Step) -> None:
        decided, value = self._commit.decided, self._committed
        if decided is None or value is None:
            return
        survivors = frozenset[int]() if isinstance(value, AbortValue) else parties_of(value.survivors, self.seat.n)
        if survivors and self.seat.pinned:
            self.seat.here.log.pins.setdefault(self.seat.group, survivors)
        self.seat.since("committed", now)
        if survivors:
            self.seat.here.away = frozenset(range(self.seat.n)) - survivors
        self.seat.note(step, "committed" if survivors else "aborted", survivors=survivors)
        if not self.seat.muted:
            self.unmasking.release(step, survivors, list(decided.signers))
        if frozenset() in self.seat.board.released.get(self.seat.me, ()) and self.sharing.has_secrets:
            self.erase(step)  # no other RELEASE of ours can follow
        if isinstance(value, CommitValue):
            if not self.seat.muted:
                self.unmasking.open(now, step, survivors)
            self.unmasking.learn(step, survivors)
            self.unmasking.unmask(step, value, survivors)

    # the end

    def _end(self, now: float, step: Step) -> None:
        """Whether q parties say the same of it."""
        decided, value = self._commit.decided, self._committed
        if decided is None or value is None or self.seat.fixed is None:
            return
        if isinstance(value, AbortValue):
            if sum(frozenset() in sets for sets in self.seat.board.released.values()) >= self.seat.profile.t:
                prev = ["ABORT", decided.id]
                self._finish(step, Outcome(prev, self.seat.pin, aborted=True, params=self.seat.fixed.params))
            return
        survivors = parties_of(value.survivors, self.seat.n)
        finals: dict[tuple[int, bytes], set[int]] = {}
        for signed in self.seat.board.all("FINAL"):
            message = signed.message
            if (message.ctx, message.survivors) == (self.seat.fixed.ctx, value.survivors):
                finals.setdefault((message.status, message.sum_hash), set()).add(signed.sender)
        for (status, sum_hash), parties in finals.items():
            if len(parties) >= self.seat.profile.q:
                prev = ["FINAL", decided.id, sum_hash]
                pin = survivors if self.seat.pinned else None
                self._finish(
                    step,
                    Outcome(
                        prev, pin, aborted=False, params=self.seat.fixed.params, survivors=survivors, sum_hash=sum_hash
                    ),
                )
                self.seat.note(step, "final" if status == 0 else "noise", survivors=survivors)
                self.noise = status == 1
                return

    def _finish(self, step: Step, outcome: Outcome) -> None:
        self.outcome = outcome
        self.erase(step, outcome.sum_hash)

    def erase(self, step: Step, total: bytes = b"") -> None:
        """R6: secrets and files go, but the total."""
        self.sharing.erase(step)
        step.void.append(self.seat.sid)
        step.drop += sorted(self.seat.files - {total})
        self.seat.files &= {total}

    def _catch_up(self, step: Step) -> None:
        """Get a total that others have, if this party wants it."""
        outcome = self.outcome
        assert outcome is not None
        if outcome.aborted or self.noise:
            return
        ask = self.seat.asks.get(outcome.params)
        if ask is not None and outcome.sum_hash not in self.seat.files:
            holders = sorted({s.sender for s in self.seat.board.all("FINAL") if s.message.sum_hash == outcome.sum_hash})
            work = FetchTotal(self.seat.sid, outcome.sum_hash, holders, ask.d * ask.w // 8)
            self.seat.work(step, "total", work)

    # what the group asks

    def result(self) -> tuple[Parties, bytes] | None:
        """The survivors and the name of the total, once this party has it."""
        if self.noise:
            return None
        if self.outcome is not None and not self.outcome.aborted and self.outcome.sum_hash in self.seat.files:
            return self.outcome.survivors, self.outcome.sum_hash
        return None

    def owing(self) -> Parties:
        """Parties whose due secret is unknown; while nothing may be opened, those that have not released."""
        value = self._committed if self.outcome is None else None
        if not isinstance(value, CommitValue) or self.seat.fixed is None:
            return frozenset()
        survivors = parties_of(value.survivors, self.seat.n)
        released = {party for party, sets in self.seat.board.released.items() if survivors in sets}
        if len(released) < self.seat.profile.t:
            return frozenset(range(self.seat.n)) - released
        return (survivors - self.unmasking.b.keys()) | (
            self.seat.fixed.contributors - survivors - self.unmasking.sigma.keys()
        )

    def place_of(self, release: Signed) -> Place | None:
        """What shows, in evidence, where in its group this RELEASE was said; None as long as it is not known."""
        fixed, decided = self.seat.fixed, self._start.decided
        if fixed is None or decided is None or release.message.ctx != fixed.ctx or fixed.params not in self.seat.asks:
            return None
        value = self.seat.value(START, decided.value)
        return Place(self.seat.seq, value, self.seat.asks[fixed.params].encoded)

    def idle(self) -> Parties:
        """Owners that have added nothing up."""
        owners = self.seat.fixed.owners if self.seat.fixed is not None else frozenset[int]()
        return frozenset(owner for owner in owners if not self.seat.board.says("SUM", owner))

    def absent(self, ask: Ask) -> Parties:
        """Parties that this instance waits for where it stands: who has not said what is due."""
        board, value = self.seat.board, self._committed
        if self.seat.fixed is None:
            return self._start.silent() or self.starting.absent(ask)
        if value is None:
            return self._commit.silent() or self.gathering.absent() - {self.seat.me}
        survivors = frozenset[int]() if isinstance(value, AbortValue) else parties_of(value.survivors, self.seat.n)
        released = {party for party, sets in board.released.items() if survivors in sets}
        others = frozenset(range(self.seat.n)) - {self.seat.me}
        if len(released) < self.seat.profile.t:
            return others - released
        return self.owing() or frozenset(party for party in others if not board.says("FINAL", party))

    def differing(self, ask: Ask) -> Parties:
        """Parties that are ready for this sum, but with another history or other parameters, while START waits."""
        return self.starting.differing(ask) if self.seat.fixed is None else frozenset()

    @property
    def started(self) -> bool:
        return self._start.decided is not None

    @property
    def decided(self) -> bool:
        return self._commit.decided is not None

    @property
    def settled(self) -> bool:
        """Whether nothing more follows here, whatever comes."""
        outcome = self.outcome
        return outcome is not None and (
            outcome.aborted or self.noise or outcome.params not in self.seat.asks or outcome.sum_hash in self.seat.files
        )
