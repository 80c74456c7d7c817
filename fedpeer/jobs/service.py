"""The jobs of a daemon: propose, countersign, run, end.

Rules
* Responsible for all jobs of this peer: how one begins, its one task, how it ends, and what an operator asks of it. The
  task has others do the work: job/ (one job: what was said and is told), answer/ (does this peer take part), approvals/
  (what its operators say to that), stages/ (inputs, a stage, outputs), files/ (what may be removed), models/ (what is
  left when jobs are over).
* How a job goes here, under a supervisor of its own (lifecycle.py decides, this page does):
  `submit` or a contract that arrives → archive, scope → one task `_supervise`, which
    answers         checks what the contract asks of this peer, takes snapshots of its data, countersigns or refuses
    runs            the stages in order, each an Execution; its outputs are files of the store, named by digest
    says done       and waits for all others to say the same
    ends            by all being done, a failure here, an abort of another, `cancel`, or the contract's expiry
    lingers         serves slower participants until all have ended, or the contract expired; then the scope closes
* Everything is in the store before it is said: a daemon that is killed at any point goes on from there at its next
  start. A StoreError is not a job's failure: it ends the daemon, which is clean after a restart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, ClassVar

import trio

from fedpeer import codec, stage
from fedpeer.admin.caller import Caller
from fedpeer.aggregation.service import Aggregation
from fedpeer.crypto import random_bytes
from fedpeer.data.catalog import Catalog
from fedpeer.errors import (
    Ambiguous,
    Cancelled,
    ContractError,
    DiskFull,
    Equivocation,
    FedpeerError,
    JobError,
    NotFound,
    PeerAbsent,
    PolicyError,
    RemoteProtocolError,
    StoreError,
)
from fedpeer.events import Events
from fedpeer.governance import answered, approvals, audit, budget, heads, passport, policy
from fedpeer.governance.approvals import who
from fedpeer.jobs import archive, checkpoint, contract, keyring, lifecycle
from fedpeer.jobs.answer.service import Answers
from fedpeer.jobs.approvals.service import Approvals
from fedpeer.jobs.contract import Contract
from fedpeer.jobs.dryrun.service import DryRuns, DryRunView
from fedpeer.jobs.execution import StartWorker
from fedpeer.jobs.files.service import Files
from fedpeer.jobs.job.service import Job, seconds_of, time_of
from fedpeer.jobs.lifecycle import Done
from fedpeer.jobs.models.service import Models
from fedpeer.jobs.passports import passport_of
from fedpeer.jobs.stages.service import Stages
from fedpeer.jobs.views import DecisionView, FindingView, JobView, LogLine
from fedpeer.jobs.witness.service import GRACE_S, Witness
from fedpeer.mesh.connections.service import Connections
from fedpeer.mesh.records import Record
from fedpeer.mesh.service import Mesh
from fedpeer.store import RunInThread, Schema, Store, Transaction

JobViews = list[JobView]
LogLines = list[LogLine]

MAX_PROPOSED = 64
"""Jobs of one initiator that live here or are served at a time; more of its contracts are not taken."""
MAX_PER_DAY = 200
"""Contracts of one other initiator that are taken within 24 hours: each leaves entries in the audit log for ever."""
OWN_ANSWER_S = 30.0
"""So long who submits waits for the own policy's word, which may read the data."""
MAX_UNAGREED = 200
"""Jobs of one other initiator that are kept when they are over though they were never agreed."""


GOVERNANCE = (
    policy.SCHEMA,
    answered.SCHEMA,
    approvals.SCHEMA,
    budget.SCHEMA,
    audit.SCHEMA,
    heads.SCHEMA,
    passport.SCHEMA,
)


class Jobs:
    """All jobs of this daemon."""

    SCHEMAS: ClassVar[list[Schema]] = [archive.SCHEMA, checkpoint.SCHEMA, keyring.SCHEMA, *GOVERNANCE]

    def __init__(
        self,
        connections: Connections,
        mesh: Mesh,
        aggregation: Aggregation,
        catalog: Catalog,
        store: Store,
        *,
        start_worker: StartWorker,
        run_in_thread: RunInThread,
        events: Events,
        log: Any,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        find: contract.FindStage = stage.find,
    ) -> None:
        self._connections, self._roster = connections, connections.roster
        self._mesh, self._aggregation, self._store = mesh, aggregation, store
        self._log, self._now, self._stage = log, now, find
        self._make = partial(
            Job, connections=connections, mesh=mesh, store=store, find=find, events=events, log=log, now=now
        )
        self._files = Files(store)
        self._answers = Answers(
            mesh, catalog, store, self._files, run_in_thread=run_in_thread, find=find, now=now, log=log
        )
        self.approvals = Approvals(
            self._answers,
            mesh,
            store,
            find_job=self._find,
            job_of=lambda contract_id: self._jobs.get(contract_id),
            find=find,
            now=now,
        )
        self._dry_runs = DryRuns(catalog, start_worker=start_worker, run_in_thread=run_in_thread, find=find)
        self._stages = Stages(
            mesh, aggregation, store, start_worker=start_worker, run_in_thread=run_in_thread, find=find
        )
        self.models = Models(
            lambda contract_id: self._jobs[contract_id].view,
            self._files,
            catalog,
            store,
            start_worker=start_worker,
            run_in_thread=run_in_thread,
            find=find,
        )
        self._jobs: dict[bytes, Job] = {}
        self._nursery: trio.Nursery | None = None
        self._started = trio.Event()
        mesh.on_unknown_scope = self._proposed
        mesh.on_equivocation = self._equivocated

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Live until cancelled; the jobs of the last run go on."""
        for kept in await self._store.read(archive.all_jobs):
            job = await self._load(kept)
            self._jobs[job.id] = job
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for job in self._jobs.values():
                nursery.start_soon(self._supervise, job)
            self._started.set()
            task_status.started()
            await trio.sleep_forever()

    # what an operator asks

    async def submit(self, text: str, by: Caller | None = None) -> JobView:
        """Propose the contract of a TOML text to its participants; `by`, who does, approves our own part of it.

        Raises ContractError naming what is wrong in it, PolicyError where our own policy refuses it (that may show only
        when our data is read: then the job is cancelled), DiskFull. A table that is read for long is not waited for.
        """
        if self._store.scarce:
            raise DiskFull
        read = await self._written(text)
        await self._answers.check_policy(read)
        job = await self._add(codec.encode(read), read, by)
        with trio.move_on_after(OWN_ANSWER_S):
            await job.asked.wait()
        if job.refused_here:  # as far as it shows only when the data is read
            job.fail(Cancelled(f"cancelled by {self._roster.name_of(self._mesh.me)}"))
            raise PolicyError(f"your own part of it is refused: {job.refused_here}", hint="fedpeer policy show")
        return job.seen()

    async def test_policy(self, text: str) -> DecisionView:
        """What this peer's policy says to the contract of a TOML text, and why. Nothing is sent, kept or counted.

        Raises ContractError naming what is wrong in it, DataError for data that cannot be read.
        """
        decided = await self._answers.would_be(await self._written(text))
        findings = [FindingView(**asdict(finding)) for finding in decided.findings]
        return DecisionView(verdict=decided.verdict, findings=findings)

    async def dry_run(self, text: str) -> DryRunView:
        """Run our part of the contract of a TOML text on synthetic twins of our datasets. Nothing is sent or kept.

        Raises ContractError naming what is wrong in it, and what a stage fails with.
        """
        read = await self._written(text)
        return await self._dry_runs.run(read, read.alias_of[self._mesh.me])

    async def list(self) -> JobViews:
        """Every job, oldest first."""
        return sorted((job.seen() for job in self._jobs.values()), key=lambda view: (view.created, view.id))

    async def get(self, ref: str) -> JobView:
        """One job by id, unique prefix of it, or name. Raises NotFound, Ambiguous."""
        return self._find(ref).seen()

    async def wait(self, ref: str) -> JobView:
        """The job when it has ended."""
        job = self._find(ref)
        await job.over.wait()
        return job.seen()

    async def logs(self, ref: str) -> LogLines:
        """What happened in a job at this peer, oldest first."""
        return await self._find(ref).lines()

    async def cancel(self, ref: str) -> JobView:
        """End a job for all participants. JobError if it is complete here already."""
        job = self._find(ref)
        if job.view.state == lifecycle.State.CANCELLED:
            return job.seen()
        if job.over.is_set() or job.is_complete():
            waiting = ", ".join(job.seen().waiting_for)
            state = f"is complete here, and waits for {waiting}" if waiting else f"has ended: {job.view.state}"
            raise JobError(f"the job {job.view.name!r} {state}")
        job.fail(Cancelled(f"cancelled by {self._roster.name_of(self._mesh.me)}"))
        await job.over.wait()
        return job.seen()

    # a job begins

    async def _written(self, text: str) -> Contract:
        """The contract of a TOML text, which this peer could take part in. Raises ContractError."""
        read = contract.parse(
            text,
            me=self._mesh.me,
            resolve=self._roster.resolve,
            find=self._stage,
            now=self._seconds(),
            nonce=random_bytes(contract.NONCE_BYTES),
        )
        await self._answers.check(read)
        return read

    async def _proposed(self, record: Record) -> None:
        """A peer of the roster sent a contract that is not known here."""
        await self._started.wait()
        if record.scope in self._jobs or record.kind != lifecycle.CONTRACT:
            return
        try:
            read = contract.read(record.body)
        except RemoteProtocolError as error:
            self._log.warning("contract_refused", peer=self._roster.name_of(record.sender), reason=error.message)
            return
        living = sum(
            not job.closed and job.contract.peer_of[job.contract.initiator] == record.sender
            for job in self._jobs.values()
        )
        yesterday = time_of(self._now() - timedelta(days=1))
        recent = sum(
            job.view.created > yesterday and job.contract.peer_of[job.contract.initiator] == record.sender
            for job in self._jobs.values()
        )
        wrong = {
            "its id is not its hash": contract.contract_id(record.body) != record.scope,
            "it is not sent by its initiator": read.peer_of.get(read.initiator) != record.sender,
            "this peer is no participant": self._mesh.me not in read.peers,
            "a peer is in it twice": len(set(read.peers)) < len(read.peers) or len(read.peer_of) < len(read.peers),
            "it expired": read.expires <= self._seconds(),
            "the initiator has too many jobs here": living >= MAX_PROPOSED,
            "the disk is full": self._store.scarce,
            "the initiator proposed too many contracts within a day": recent >= MAX_PER_DAY,
        }
        if any(wrong.values()):
            reason = next(reason for reason, holds in wrong.items() if holds)
            self._log.warning("contract_refused", peer=self._roster.name_of(record.sender), reason=reason)
            return
        await self._add(record.body, read)

    def _equivocated(self, scope: bytes, peer: str) -> None:
        job = self._jobs.get(scope)
        if job is not None and not job.is_complete():
            name = self._roster.name_of(peer)
            what = f"{name} said two different things where it may say one; both statements are kept"
            job.fail(Equivocation(what, peer=name))

    async def _add(self, body: bytes, read: Contract, by: Caller | None = None) -> Job:
        """Keep a contract, say it if it is ours (`by`: who submitted it), and start its task."""
        contract_id, created, salt = contract.contract_id(body), time_of(self._now()), random_bytes(32)
        job = self._make(archive.Kept(contract_id, body, created, salt, "", "", closed=False), read)
        self._jobs[job.id] = job  # before anything is awaited: the same contract may arrive again meanwhile
        ours = read.peer_of[read.initiator] == self._mesh.me
        facts = {"initiator": self._roster.name_of(read.peer_of[read.initiator])}
        if ours and by is not None:
            facts["by"] = who(by.uid, by.user)
        try:
            summing = contract.summing(read, self._stage)
        except ContractError:  # it names what is not known here, and is going to be refused
            summing = []

        def keep(tx: Transaction) -> None:
            archive.add(tx, job.id, body, created, salt)
            self._mesh.open_scope(tx, job.id, read.peers)
            if self._mesh.me in summing:
                self._aggregation.open(tx, job.id, summing)
            if ours:
                approvals.submitted(tx, job.id, by, self._seconds())
                self._mesh.publish(tx, job.id, lifecycle.CONTRACT, "", body)

        try:
            await job.write(keep, ("proposed", facts))
        except BaseException:
            del self._jobs[job.id]
            raise
        assert self._nursery is not None, "jobs begin when run() has started"
        self._nursery.start_soon(self._supervise, job)
        return job

    async def _load(self, kept: archive.Kept) -> Job:
        """A job of the store as it was."""
        job = self._make(kept, contract.read(kept.body))
        job.replay(await self._store.read(lambda tx: archive.logged(tx, job.id)))
        return job

    # a job's one task

    async def _supervise(self, job: Job) -> None:
        """Everything a job does at this peer. Nothing but the store's failure escapes."""
        if job.closed:
            return
        witness = Witness(job, self._mesh, self._log)
        try:
            if not job.over.is_set():
                await self._live(job, witness)
            await self._linger(job, witness)
        except Exception as error:
            cause = _one(error)
            self._log.error("job_not_ended", job=job.id.hex(), exc_info=cause)
            if isinstance(cause, StoreError):
                raise cause from None

    async def _live(self, job: Job, witness: Witness) -> None:
        async with trio.open_nursery() as nursery:
            job.scope = nursery.cancel_scope
            nursery.start_soon(self._listen, job)
            nursery.start_soon(self._watch_time, job)
            nursery.start_soon(witness.live)
            nursery.start_soon(self._act, job)
        await self._end(job)

    async def _listen(self, job: Job) -> None:
        while True:
            job.tell_answers()
            job.judge()
            await self._mesh.changed(job.id)

    async def _watch_time(self, job: Job) -> None:
        """The contract's expiry, and participants that are needed and away for too long."""
        away: dict[str, float] = {}
        while True:
            stall = job.contract.rules.stall_s
            needed = job.needed()
            away = {p: away.get(p, trio.current_time()) for p in needed if not self._connections.connected(p)}
            late = [peer for peer, since in away.items() if trio.current_time() - since >= stall]
            if job.is_complete():
                job.gone = set(late)
            elif late:
                name = self._roster.name_of(late[0])
                job.failure = job.failure or PeerAbsent(f"{name} could not be reached for {stall} s", peer=name)
            job.judge()
            left = job.contract.expires + contract.SKEW_S - self._seconds()
            await trio.sleep(max(1.0, min(left, stall / 4, 60.0)))

    async def _act(self, job: Job) -> None:
        """This peer's part. Whatever fails in it is the failure of the job, not of the daemon."""
        try:
            await self._answers.give(job)
            await job.agreed.wait()
            if job.view.state == lifecycle.State.PROPOSED:
                await job.write(lambda tx: None, ("agreed", {}))
            lifecycle.compare_columns(job.contract, job.hear().answers, self._roster.name_of)
            for entry in job.contract.in_order():
                if job.view.me in entry.role_of:
                    await self._stages.run(job, entry)
            await self._say_done(job)
        except Exception as error:
            cause = _one(error)
            if isinstance(cause, StoreError):
                raise cause from error
            if not isinstance(cause, FedpeerError):
                self._log.error("job_fault", job=job.id.hex(), exc_info=cause)
                cause = JobError(f"a fault of the program ({type(cause).__name__}); the daemon's log has the place")
            job.fail(cause)

    async def _say_done(self, job: Job) -> None:
        histories = await self._store.read(lambda tx: archive.stages(tx, job.id))
        outputs = await self._store.read(lambda tx: archive.outputs(tx, job.id))
        equal = [kept for kept in outputs if (kept.stage, kept.name) in job.common]
        if job.failure is not None:
            return
        job.complete = True
        body = codec.encode(
            Done(tuple(sorted(histories.items())), tuple((kept.stage, kept.name, kept.digest) for kept in equal))
        )

        def say(tx: Transaction) -> None:
            for kept in equal:
                if kept.kind == "model":  # before "done": who has heard that has its signature too
                    made = passport_of(tx, job.contract, kept, histories[kept.stage], self._stage)
                    data = passport.document(made)
                    passport.keep(tx, job.id, kept.stage, kept.name, data)
                    slot = f"{kept.stage}.{kept.name}"
                    self._mesh.publish(tx, job.id, passport.PASSPORT, slot, passport.digest(data))
            self._mesh.publish(tx, job.id, lifecycle.DONE, "", body)

        await job.write(say)
        job.judge()

    async def _end(self, job: Job) -> None:
        """The verdict, durably: said to all, and what only the running job needed goes."""
        verdict = job.verdict
        assert verdict is not None
        error = verdict.error
        facts: dict[str, Any] = {}
        if error is not None:
            facts = {"code": error.code, "message": error.message, "hint": error.hint, "peer": error.peer}

        own = job.hear().answers.get(self._mesh.me)
        refused = own is not None and not own.approved
        ended = lifecycle.ended_of(verdict, job.failure, self._roster.name_of(self._mesh.me))

        def end(tx: Transaction) -> tuple[Sequence[bytes], Sequence[bytes]]:
            archive.end(tx, job.id, verdict.event, job.time())
            if error is not None and error is job.failure and not refused:
                self._mesh.publish(tx, job.id, lifecycle.ABORT, "", codec.encode(lifecycle.abort_of(error)))
            self._mesh.publish(tx, job.id, lifecycle.ENDED, "", codec.encode(ended))
            passport.gather(tx, job.id, self._roster.card_text)
            keyring.drop(tx, job.id)
            return checkpoint.drop(tx, job.id), archive.unpin_snapshots(tx, job.id)

        with trio.CancelScope(shield=True):  # nothing else runs for it any more; one commit, and the files after it
            own_files, snapshots = await job.write(end, (str(verdict.event), facts))
            for digest in own_files:
                self._store.remove_file(digest)
            await self._files.remove_unneeded(snapshots)
        job.over.set()

    async def _linger(self, job: Job, witness: Witness) -> None:
        """Others may still need our records and mail: until all have ended, or the contract expired.

        When all have ended, what they still have to say of each other's audit logs is waited for GRACE_S at most. That
        all have ended is not known to all at once: how it ended here is told to whoever asks even afterwards.
        """
        everybody, until = set(job.contract.peers), job.contract.expires + contract.SKEW_S
        heard_all = math.inf
        while True:
            await witness.look()
            ended = job.hear().ended.keys() >= everybody
            left = float(until - self._seconds())
            if ended:
                heard_all = min(heard_all, trio.current_time())
                left = min(left, heard_all + GRACE_S - trio.current_time())
            if left <= 0 or (ended and witness.done()):
                break
            with trio.move_on_after(min(left, 24 * 3600)):
                await self._mesh.changed(job.id)

        job.closed = True
        surplus = self._surplus(job.contract.peer_of[job.contract.initiator])

        def close(tx: Transaction) -> None:
            passport.gather(tx, job.id, self._roster.card_text)
            self._mesh.say_farewell(tx, job.id, lifecycle.ENDED, until=until, now=self._seconds())
            self._aggregation.forget(tx, job.id)
            self._mesh.close_scope(tx, job.id)
            archive.close(tx, job.id)
            for old in surplus:
                archive.forget(tx, old.id)
                approvals.forget(tx, old.id)

        await self._store.write(close)
        for old in surplus:
            self._jobs.pop(old.id, None)

    def _surplus(self, initiator: str) -> Sequence[Job]:
        """The oldest jobs of another initiator that were never agreed and of which nobody needs anything."""
        unagreed = [
            job
            for job in self._jobs.values()
            if job.closed
            and initiator == job.contract.peer_of[job.contract.initiator] != self._mesh.me
            and not all(participant.state == "approved" for participant in job.view.participants)
        ]
        return sorted(unagreed, key=lambda job: job.view.created)[:-MAX_UNAGREED]

    def _find(self, ref: str) -> Job:
        named = [job for job in self._jobs.values() if job.view.name == ref]
        found = named or [job for job in self._jobs.values() if ref and job.id.hex().startswith(ref.lower())]
        if not found:
            raise NotFound(f"there is no job {ref!r} here", hint="fedpeer job list")
        if len(found) > 1:
            ids = ", ".join(f"{job.id.hex()} ({job.view.state})" for job in found)
            raise Ambiguous(f"{len(found)} jobs are named or begin with {ref!r}", hint=f"give one of the ids: {ids}")
        return found[0]

    def _seconds(self) -> int:
        return seconds_of(self._now())


def _one(error: BaseException) -> BaseException:
    """The error inside groups that hold one only."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
