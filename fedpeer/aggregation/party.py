"""All sums of one contract at one party: groups of sums, and in each a chain of instances.

Rules
* Pure. Messages, asks, results of work and time come in; a `Step` comes out. Whoever drives it commits what is to be
  kept and said in one transaction, `add`s what was said, sends it, and starts the work, in this order.
* After a restart a new Party is given the kept secrets, every message of ours from the log (`logged=True`), whatever
  messages of others are there or come again, and the asks.
* What came before its instance was open, and found no room, comes again when a step says `again`.
* The instances of a group run one after the other: the next begins when the end of the one before is known by
  signatures of q (a sum) or t (an abort) parties, and names it. Groups run side by side.
* A message of ours that our log does not know means that the log was lost or rolled back: that instance is left alone.

Source: SA1, version 1, sections 1, 8 and 9.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any, Final

from fedpeer.aggregation.ahead import Ahead
from fedpeer.aggregation.evidence import two_releases
from fedpeer.aggregation.instance import Instance
from fedpeer.aggregation.messages import Signed, SumName
from fedpeer.aggregation.names import Parties, parties_of, sid_of
from fedpeer.aggregation.seat import Ask, Ended, Here, Outcome, Seat, Setting, Step, Waits
from fedpeer.aggregation.starting import READY_S
from fedpeer.aggregation.work import Work
from fedpeer.crypto import SigningKey
from fedpeer.errors import RemoteProtocolError

KEPT_MESSAGES: Final = 30_000
"""so many messages of each sender, about, are kept of sums that a party which is away may still ask for"""


class Group:
    """The sums that have one survivor set."""

    def __init__(self, contract: bytes, ask: Ask) -> None:
        self.id, self.pinned, self.data = ask.group, ask.pinned, ask.data
        self.instances: list[Instance] = []
        self.next_sid = sid_of(contract, ask.group, 0)
        self.asks: dict[bytes, Ask] = {}  # by params
        self.ended: dict[bytes, Ended] = {}  # by params
        self.asked_at: dict[bytes, float] = {}
        self.waits: set[bytes] = set()  # params of which it was told that they wait
        self.owing: set[int] = set()
        """parties whose secrets its instances wait for"""
        self.releases: dict[int, list[tuple[Instance, Signed]]] = {}
        """what a party released for, by party, not counting aborts"""
        self.accused: set[int] = set()
        """parties that were shown to have released for two sets"""
        self.wake_at = 0.0
        """when it wants to be looked at though nothing came; at once in the beginning"""

    @property
    def names(self) -> list[SumName]:
        """What was asked of it here."""
        return [ask.name for ask in self.asks.values()]


class Party:
    """One party of one contract."""

    def __init__(
        self,
        setting: Setting,
        signer: SigningKey,
        random: Callable[[int], bytes],
        kept: Mapping[bytes, bytes],
        lost: Collection[bytes] = (),
    ) -> None:
        self.setting = setting
        self._here = Here(setting, signer, random)
        self._kept = dict(kept)
        self._groups: dict[bytes, Group] = {}
        self._instances: dict[bytes, Instance] = {}  # by sid
        self._next: dict[bytes, Group] = {}  # by the sid that opens next
        self._ahead = Ahead(setting.me)
        self._log: set[bytes] = set()  # digests of our own messages that are on disk
        self._ended_at: dict[str, float] = {}  # when the last sum of a stage ended here
        self._reached: defaultdict[str, dict[int, tuple[int, int]]] = defaultdict(dict)  # stage → party → (turn, k)
        self._over: set[bytes] = set()  # forgotten
        self.lost: set[bytes] = set(lost)
        """instances in which this party said what its log does not know; keep them for the next Party"""

    @property
    def convicted(self) -> Parties:
        """Parties that evidence was seen against."""
        return frozenset(self._here.convicted)

    def ask(self, ask: Ask, now: float) -> None:
        """This party has its vector for a sum; again after every restart. The answer is an `Ended` of a later step."""
        group = self._groups.get(ask.group)
        if group is None:
            group = self._groups[ask.group] = Group(self.setting.contract, ask)
            self._next[group.next_sid] = group
        group.asks.setdefault(ask.params, ask)
        group.asked_at.setdefault(ask.params, now)
        self._here.worked_s.setdefault(ask.params, now - self._ended_at.get(ask.name[0], now))
        group.wake_at = now

    def add(self, signed: Signed, *, logged: bool = False) -> None:
        """Take in a verified message. `logged`: it is ours, from our own log.

        Of ours that our log lacks nothing is said any more in its instance; how that ends is still understood.
        """
        if signed.sender == self.setting.me:
            if logged:
                self._log.add(signed.digest)
            elif signed.digest not in self._log:
                self.lost.add(signed.sid)
                if signed.sid in self._instances:
                    self._instances[signed.sid].seat.muted = True
        instance = self._instances.get(signed.sid)
        if instance is not None:
            self._put(instance, signed)
        elif signed.sid in self._over:
            return
        else:
            self._ahead.add(signed, self._next.keys())
            if signed.sid in self._next:
                self._next[signed.sid].wake_at = 0.0

    def _put(self, instance: Instance, signed: Signed) -> None:
        if signed.kind == "READY":
            stage, *place = signed.message.name
            reached = self._reached[stage]
            reached[signed.sender] = max((place[0], place[1]), reached.get(signed.sender, (0, 0)))
        with suppress(RemoteProtocolError):  # what no honest party says
            if instance.add(signed) and signed.kind == "RELEASE":
                self._releases(self._groups[instance.seat.group], instance, signed)
        self._groups[instance.seat.group].wake_at = 0.0

    def _releases(self, group: Group, instance: Instance, signed: Signed) -> None:
        """R7: no honest party releases for two sets of survivors in one group."""
        if group.pinned and parties_of(signed.message.survivors, self.setting.profile.n):
            releases = group.releases.setdefault(signed.sender, [])
            releases.append((instance, signed))
            if any(other.message.survivors != signed.message.survivors for _, other in releases):
                self._here.convicted.add(signed.sender)

    def _accuse(self, group: Group, step: Step) -> None:
        """Show it to the others as soon as the places of two such releases are known here."""
        for party in self._here.convicted & group.releases.keys() - group.accused:
            placed = [
                (*release, place) for release in group.releases[party] if (place := release[0].place_of(release[1]))
            ]
            for instance, signed, place in placed[1:]:
                _, first, first_place = placed[0]
                if signed.message.survivors != first.message.survivors and party not in group.accused:
                    group.accused.add(party)
                    proof = two_releases(first, signed, group.id, (first_place, place))
                    if not instance.seat.muted:
                        instance.seat.say(step, "EVIDENCE", "E6", proof)

    def knows(self, sid: bytes) -> bool:
        """Whether this instance is one of ours, over, or the next of a group that was asked for."""
        return sid in self._instances or sid in self._over or any(g.next_sid == sid for g in self._groups.values())

    def done(self, work: Work, result: Any) -> None:
        """The result of work that a step asked for."""
        if work.sid in self._instances:
            instance = self._instances[work.sid]
            instance.done(work, result)
            self._groups[instance.seat.group].wake_at = 0.0

    def advance(self, now: float) -> Step:
        """Everything that follows from what is here."""
        step = Step()
        self._here.debtors = set().union(*(group.owing for group in self._groups.values()))
        for group in list(self._groups.values()):
            if group.wake_at <= now:
                self._go_on(group, step)
                going_on = [instance for instance in group.instances if instance.outcome is None]
                for instance in group.instances:
                    if not instance.settled:
                        instance.advance(now, step)
                self._accuse(group, step)
                self._close(group, now, step)
                over = any(instance.outcome is not None for instance in going_on)
                group.wake_at = now if over else self._next_look(group)  # an end lets the next begin
        self._ended_at.update((ended.name[0], now) for ended in step.ended)
        self._forget(step)
        return step

    def wake_at(self) -> float | None:
        """When `advance` wants to be called again though nothing came."""
        at = min((group.wake_at for group in self._groups.values()), default=math.inf)
        return None if at == math.inf else at

    def _next_look(self, group: Group) -> float:
        times = [at for instance in group.instances if (at := instance.wake_at()) is not None]
        for params, at in group.asked_at.items():
            if params not in group.ended:
                times.append(at + self.setting.stall_s)
                if params not in group.waits and group.instances:
                    times.append(self._waits_at(group, params))
        return min(times, default=math.inf)

    def _waits_at(self, group: Group, params: bytes) -> float:
        """When a sum that is not there is one that waits: what is usual for its turn and its size is over."""
        patience = group.instances[-1].seat.patience(group.asks[params])
        return group.asked_at[params] + max(READY_S, self._here.worked_s.get(params, 0.0) / 4, 2 * patience)

    def _forget(self, step: Step) -> None:
        """Groups of one turn that every party has left behind, as its READYs say; for who is away only the last stay.

        What somebody began in it since, and nobody goes on with, goes too.

        So a party that is gone for good costs the others a bounded number of messages.
        """
        turns = [group for group in self._groups.values() if not group.data]
        if not turns:
            return
        n, q = self.setting.profile.n, self.setting.profile.q
        reached = {stage: sorted(parties.values(), reverse=True) for stage, parties in self._reached.items()}
        everybody = {stage: places[-1] for stage, places in reached.items() if len(places) == n}
        quorum = {stage: places[q - 1] for stage, places in reached.items() if len(places) >= q}
        over = [
            group
            for group in turns
            if all((turn, k) < quorum.get(stage, (0, 0)) for stage, turn, k in group.names)
            and all(
                instance.settled or (not instance.started and group.asks.keys() == group.ended.keys())
                for instance in group.instances
            )
        ]
        spare = len(over) - max(1, KEPT_MESSAGES // (20 + 2 * n))
        totals: set[bytes] = set()
        for number, group in enumerate(over):  # in the order they were asked for
            passed = all((turn, k) < everybody.get(stage, (0, 0)) for stage, turn, k in group.names)
            if passed or number < spare:
                del self._groups[group.id], self._next[group.next_sid]
                for params in group.asks:
                    self._here.worked_s.pop(params, None)
                for instance in group.instances:
                    del self._instances[instance.seat.sid]
                    if instance.outcome is None:
                        instance.erase(step)
                    else:
                        totals.add(instance.outcome.sum_hash)
                self._ahead.take(group.next_sid)
                sids = [*(instance.seat.sid for instance in group.instances), group.next_sid]
                self._over.update(sids)
                step.forget += sids
        if totals:  # equal sums are one file
            needed = {instance.outcome.sum_hash for instance in self._instances.values() if instance.outcome}
            step.drop += sorted(totals - needed - {b""})

    def _go_on(self, group: Group, step: Step) -> None:
        """Open the next instance of a group if the one before has ended, and we or an honest party want another."""
        open_asks = {params: ask for params, ask in group.asks.items() if params not in group.ended}
        last = group.instances[-1] if group.instances else None
        if last is None or (last.outcome is not None and not last.noise):
            seq = len(group.instances)
            sid = group.next_sid
            decided = {
                instance.outcome.params
                for instance in group.instances
                if instance.outcome and not instance.outcome.aborted
            }
            ready = {signed.sender for signed in self._ahead.of(sid) if signed.kind == "READY"}
            if open_asks.keys() - decided or len(ready) > self.setting.profile.f:
                self._open(group, seq, sid, last.outcome if last else None)
                step.again |= self._ahead.lacking
                self._ahead.lacking = False
        if group.instances:
            group.instances[-1].seat.asks.update(open_asks)
            for instance in group.instances[:-1]:
                outcome = instance.outcome
                if outcome is not None and outcome.params in open_asks:
                    instance.seat.asks[outcome.params] = open_asks[outcome.params]

    def _open(self, group: Group, seq: int, sid: bytes, outcome: Outcome | None) -> None:
        aborts = 0
        for instance in reversed(group.instances):
            if instance.outcome is None or not instance.outcome.aborted:
                break
            aborts += 1
        seat = Seat(
            self._here,
            group.id,
            seq,
            prev=outcome.prev if outcome else None,
            pin=outcome.pin if outcome else None,
            pinned=group.pinned,
            data=group.data,
            aborts=aborts,
            idle=group.instances[-1].idle() if aborts else frozenset(),
        )
        kept = [key for key in self._kept if key.startswith(sid)]
        instance = Instance(seat, {key: self._kept.pop(key) for key in kept})
        group.instances.append(instance)
        del self._next[sid]
        group.next_sid = sid_of(self.setting.contract, group.id, seq + 1)
        self._next[group.next_sid] = group
        self._instances[sid] = instance
        instance.seat.muted = sid in self.lost
        for signed in self._ahead.take(sid):
            self._put(instance, signed)

    def _close(self, group: Group, now: float, step: Step) -> None:
        """Tell how sums ended."""
        group.owing = set().union(*(instance.owing() for instance in group.instances))
        for instance in group.instances:
            found, outcome = instance.result(), instance.outcome
            if found is not None and outcome is not None and outcome.params in group.asks:
                fixed, ask = instance.seat.fixed, group.asks[outcome.params]
                if fixed is not None and fixed.model == ask.model:
                    self._end(group, outcome.params, step, "SUM", *found)
                else:  # it is the others' sum; with our history it means nothing
                    self._end(group, outcome.params, step, "NOISE", outcome.survivors, b"")
        last = group.instances[-1] if group.instances else None
        for params, asked_at in group.asked_at.items():
            if params in group.ended or last is None:
                continue
            late = now >= asked_at + self.setting.stall_s
            if last.noise:
                survivors = last.outcome.survivors if last.outcome else frozenset[int]()
                self._end(group, params, step, "NOISE", survivors, b"")
            elif late:
                ask = group.asks[params]
                if last.decided and last.owing():
                    self._end(group, params, step, "LOST", frozenset(), b"", last.absent(ask))
                else:
                    pin, differing = last.seat.pin or frozenset(), last.differing(ask)
                    self._end(group, params, step, "WAITING", pin, b"", last.absent(ask), differing)
            elif params not in group.waits and now >= self._waits_at(group, params):
                group.waits.add(params)
                ask = group.asks[params]
                lacking = last.absent(ask) or last.differing(ask)
                step.waits.append(Waits(ask.name, lacking, asked_at + self.setting.stall_s - now))

    def _end(
        self,
        group: Group,
        params: bytes,
        step: Step,
        status: Any,
        survivors: Parties,
        sum_hash: bytes,
        parties: Parties = frozenset(),
        differing: Parties = frozenset(),
    ) -> None:
        if params not in group.ended:
            ended = Ended(group.asks[params].name, status, survivors, sum_hash, parties, differing)
            group.ended[params] = ended
            step.ended.append(ended)
