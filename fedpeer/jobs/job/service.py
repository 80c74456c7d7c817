"""One job at this peer: what was said in it, what is known of it, and what the operator is told.

Rules
* Responsible for the state of one job in memory; who acts on it is in the modules beside (service.py: its one task).
* What was said are records of the mesh: `hear` reads them, `judge` says what follows (lifecycle.py decides).
* What happened are lines: each changes the view, goes to the log and, as an entry, to the audit log with the next
  transaction, and to who watches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import msgspec
import trio

from fedpeer import codec
from fedpeer.errors import ContractError, FedpeerError, RemoteProtocolError
from fedpeer.events import Events
from fedpeer.governance import audit
from fedpeer.jobs import archive, contract, lifecycle, views
from fedpeer.jobs.contract import Contract
from fedpeer.jobs.execution import Execution
from fedpeer.jobs.lifecycle import Abort, Answer, Done, Ended, Heard, Verdict
from fedpeer.jobs.views import JobView, LogLine
from fedpeer.mesh.connections.service import Connections
from fedpeer.mesh.service import Mesh
from fedpeer.store import Store, Transaction

T = TypeVar("T")
Facts = dict[str, Any]


class Job:
    """A job in memory."""

    def __init__(
        self,
        kept: archive.Kept,
        read: Contract,
        *,
        connections: Connections,
        mesh: Mesh,
        store: Store,
        find: contract.FindStage,
        events: Events,
        log: Any,
        now: Callable[[], datetime],
    ) -> None:
        self._connections, self._roster, self._mesh, self._store = connections, connections.roster, mesh, store
        self._events, self._log, self._now = events, log, now
        self.id, self.salt, self.contract = kept.contract, kept.salt, read
        self.created = seconds_of(datetime.fromisoformat(kept.created))
        """when it came here, as contracts count it"""
        self.view = views.first_view(read, self.id, kept.created, mesh.me, self._roster.name_of, find)
        self.closed = kept.closed
        self.common: list[tuple[str, str]] = []  # outputs that must be equal; none where the contract cannot run
        with suppress(ContractError):
            self.common = contract.outputs_equal(read, find)
        self._heard = Heard()
        self._told: set[str] = set()  # peers whose answer was told to the operator
        self._unwritten: list[tuple[str, str, Facts]] = []  # lines for the log's next transaction
        self.complete = False  # we say "done", and cannot abort any more
        self.failure: FedpeerError | None = None  # what ended it here
        self.execution: Execution | None = None  # the stage that runs
        self.awaits = ""
        """the peer whose key the next stage waits for"""
        self.gone: set[str] = set()  # peers whose end we do not wait for any more
        self.verdict: Verdict | None = None
        self.asked = trio.Event()
        """set when our own policy has said something to it"""
        self.refused_here = ""
        """what it said, if that was no"""
        self.agreed = trio.Event()
        self.over = trio.Event()
        if kept.state:
            self.over.set()
        self.scope = trio.CancelScope()

    def replay(self, lines: Iterable[tuple[str, str, Facts]]) -> None:
        """What the log has of it: (time, event, facts), oldest first."""
        for time, event, facts in lines:
            views.apply(self.view, time, event, facts)
            if event in ("countersigned", "refused"):
                self._told.add(facts["peer"])

    # what was said

    def hear(self) -> Heard:
        """What was said in a job so far. A record that is not what its kind says counts as an abort by its sender."""
        heard, members = self._heard, set(self.contract.peers)
        readers: dict[str, tuple[type[codec.Record], dict[str, Any]]] = {
            lifecycle.COUNTERSIGN: (Answer, heard.answers),
            lifecycle.DONE: (Done, heard.dones),
            lifecycle.ABORT: (Abort, heard.aborts),
            lifecycle.ENDED: (Ended, heard.ended),
        }
        for kind, (record, said) in readers.items():
            for (slot, sender), body in self._mesh.held(self.id, kind).items():
                if slot or sender not in members or sender in said:
                    continue
                try:
                    said[sender] = codec.decode_as(record, body)
                except RemoteProtocolError as error:
                    heard.aborts[sender] = Abort(error.code, f"its record of kind {kind} cannot be read")
        return heard

    def is_complete(self) -> bool:
        """Whether we say "done", and cannot abort any more."""
        return self.complete or self._mesh.me in self.hear().dones

    def tell_answers(self) -> None:
        """Tell the operator of answers that came."""
        for peer, answer in self.hear().answers.items():
            if peer not in self._told:
                self._told.add(peer)
                facts = {"peer": peer, "name": self._roster.name_of(peer)}
                if answer.approved:
                    self.say("countersigned", facts)
                else:
                    reason = lifecycle.REFUSALS.get(answer.reason, "refuses for a reason of a newer release")
                    self.say("refused", {**facts, "reason": reason})

    # what follows

    def fail(self, error: FedpeerError) -> None:
        """It has failed here; the first failure counts."""
        self.failure = self.failure or error
        self.judge()

    def needed(self) -> Sequence[str]:
        """Without whom this peer does not go on. Sums are not meant: they go on without some, or end by themselves."""
        if self.is_complete():
            return [peer for peer in self.contract.peers if peer not in self.hear().dones]
        awaited = (self.awaits, self.execution.waits_for if self.execution is not None else "")
        return [peer for peer in awaited if peer]

    def judge(self) -> None:
        """Look at all that is known; at the job's end stop everything that runs for it."""
        if self.verdict is not None:
            return
        heard = self.hear()
        if lifecycle.agreed(self.contract, heard):
            self.agreed.set()
        self.verdict = lifecycle.judge(
            self.contract, heard, seconds_of(self._now()), self.failure, self.common, self._roster.name_of, self.gone
        )
        if self.verdict is not None:
            self.scope.cancel()

    # what is told to the operator

    def say(self, event: str, facts: dict[str, Any]) -> None:
        """Tell it now; the log has it with the next transaction."""
        time = self.time()
        self._unwritten.append((time, event, facts))
        views.apply(self.view, time, event, facts)
        self._events.publish(f"job:{self.id.hex()}", event, **facts)

    async def write(self, function: Callable[[Transaction], T], *told: tuple[str, Facts]) -> T:
        """A transaction of this job, with the lines of its log; what it means is told when it is on disk."""
        now = self.time()
        pending, self._unwritten = self._unwritten, []
        lines = [*pending, *((now, event, facts) for event, facts in told)]

        def write(tx: Transaction) -> T:
            result = function(tx)
            for time, event, facts in lines:
                archive.log(tx, self.id, time, event, facts)
                audit.append(tx, time, event, self.id, facts)
            return result

        try:
            result = await self._store.write(write)
        except BaseException:
            self._unwritten = pending + self._unwritten
            raise
        for event, facts in told:
            views.apply(self.view, now, event, facts)
            self._events.publish(f"job:{self.id.hex()}", event, **facts)
            self._log.info("job", job_event=event, job=self.id.hex(), name=self.view.name, stage=facts.get("stage", ""))
        return result

    def seen(self) -> JobView:
        """A copy for the operator, with who is connected and on whom it waits now."""
        view = msgspec.convert(msgspec.to_builtins(self.view), JobView)
        for participant in view.participants:
            participant.name = self._roster.name_of(participant.peer)
            participant.connected = participant.peer == self._mesh.me or self._connections.connected(participant.peer)
        if not self.over.is_set():
            waiting = lifecycle.waiting_for(
                self.contract,
                self.hear(),
                lifecycle.State(view.state),
                self._mesh.me,
                lambda peer: not self._connections.connected(peer),
            )
            view.waiting_for = [self._roster.name_of(peer) for peer in waiting]
        return view

    async def lines(self) -> list[LogLine]:
        """What happened, oldest first."""
        logged = await self._store.read(lambda tx: archive.logged(tx, self.id))
        return [LogLine(time=time, event=event, facts=facts) for time, event, facts in [*logged, *self._unwritten]]

    def time(self, ahead_s: float = 0.0) -> str:
        """Now, or so many seconds from now, as the log has it."""
        return time_of(self._now() + timedelta(seconds=ahead_s))


def seconds_of(moment: datetime) -> int:
    """As contracts count it."""
    return int(moment.timestamp())


def time_of(moment: datetime) -> str:
    """As rows and lines of the log have it."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")
