"""The jobs of a daemon: propose, countersign, run, end.

How a job goes here, under a supervisor of its own (lifecycle.py decides, this page does):
  `submit` or a contract that arrives → archive, scope → one task `_supervise`, which
    answers         checks what the contract asks of this peer, takes snapshots of its data, countersigns or refuses
    runs            the stages in order, each an Execution; its outputs are files of the store, named by digest
    says done       and waits for all others to say the same
    ends            by all being done, a failure here, an abort of another, `cancel`, or the contract's expiry
    lingers         serves slower participants until all have ended, or the contract expired; then the scope closes

Everything is in the store before it is said: a daemon that is killed at any point goes on from there at its next start.
A StoreError is not a job's failure: it ends the daemon, which is clean after a restart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import msgspec
import pyarrow as pa
import trio

from fedpeer import artifact, codec, stage
from fedpeer.aggregation.request import Request, Total
from fedpeer.aggregation.service import Aggregation
from fedpeer.crypto import has_aes, random_bytes
from fedpeer.data.catalog import Catalog
from fedpeer.errors import (
    Ambiguous,
    Cancelled,
    ContractError,
    DataError,
    Equivocation,
    FedpeerError,
    JobError,
    NotFound,
    PeerAbsent,
    RemoteProtocolError,
    StoreError,
)
from fedpeer.events import Events
from fedpeer.jobs import archive, checkpoint, contract, lifecycle, views
from fedpeer.jobs.contract import Contract, StageEntry
from fedpeer.jobs.execution import Execution, Outputs, StartWorker, run_alone
from fedpeer.jobs.lifecycle import Abort, Answer, Done, Ended, Heard, Verdict
from fedpeer.jobs.views import JobView, LogLine, ModelView
from fedpeer.mesh.connections.service import Connections
from fedpeer.mesh.records import Record
from fedpeer.mesh.service import Mesh
from fedpeer.stage import KINDS, Model, Report, Stage
from fedpeer.store import RunInThread, Schema, Store, Transaction

T = TypeVar("T")
JobViews = list[JobView]
LogLines = list[LogLine]
ModelViews = list[ModelView]
Facts = dict[str, Any]

MAX_PROPOSED = 64
"""Jobs of one initiator that live here or are served at a time; more of its contracts are not taken."""
MAX_UNAGREED = 200
"""Jobs of one other initiator that are kept when they are over though they were never agreed."""


class _Refused(Exception):
    """This peer does not take part: `reason` of lifecycle.REFUSALS for all, `error` for our own operator."""

    def __init__(self, reason: str, error: FedpeerError) -> None:
        super().__init__(reason)
        self.reason, self.error = reason, error


class _Job:
    """A job in memory."""

    def __init__(self, kept: archive.Kept, read: Contract, view: JobView, find: contract.FindStage) -> None:
        self.id, self.salt, self.contract, self.view = kept.contract, kept.salt, read, view
        self.closed = kept.closed
        self.common: list[tuple[str, str]] = []  # outputs that must be equal; none where the contract cannot run
        with suppress(ContractError):
            self.common = contract.outputs_equal(read, find)
        self.heard = Heard()
        self.told: set[str] = set()  # peers whose answer was told to the operator
        self.unwritten: list[tuple[str, str, Facts]] = []  # lines for the log's next transaction
        self.complete = False  # we say "done", and cannot abort any more
        self.failure: FedpeerError | None = None  # what ended it here
        self.execution: Execution | None = None  # the stage that runs
        self.gone: set[str] = set()  # peers whose end we do not wait for any more
        self.verdict: Verdict | None = None
        self.agreed = trio.Event()
        self.over = trio.Event()
        self.scope = trio.CancelScope()

    @property
    def topic(self) -> str:
        return f"job:{self.id.hex()}"


class Jobs:
    """All jobs of this daemon."""

    SCHEMAS: ClassVar[list[Schema]] = [archive.SCHEMA, checkpoint.SCHEMA]

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
        self._mesh, self._aggregation, self._catalog, self._store = mesh, aggregation, catalog, store
        self._start_worker, self._run_in_thread = start_worker, run_in_thread
        self._events, self._log, self._now, self._stage = events, log, now, find
        self._jobs: dict[bytes, _Job] = {}
        self._files = trio.Lock()  # between keeping a file and the row that needs it, nobody removes it
        self._in_use: Counter[bytes] = Counter()  # snapshots that predictions read
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

    async def submit(self, text: str) -> JobView:
        """Propose the contract of a TOML text to its participants. Raises ContractError naming what is wrong in it."""
        read = contract.parse(
            text,
            me=self._mesh.me,
            resolve=self._roster.resolve,
            find=self._stage,
            now=self._seconds(),
            nonce=random_bytes(contract.NONCE_BYTES),
        )
        try:
            await self._check_here(read)
        except _Refused as refused:
            raise refused.error from None
        return self._view(await self._add(codec.encode(read), read))

    async def list(self) -> JobViews:
        """Every job, oldest first."""
        return sorted((self._view(job) for job in self._jobs.values()), key=lambda view: (view.created, view.id))

    async def get(self, ref: str) -> JobView:
        """One job by id, unique prefix of it, or name. Raises NotFound, Ambiguous."""
        return self._view(self._find(ref))

    async def wait(self, ref: str) -> JobView:
        """The job when it has ended."""
        job = self._find(ref)
        await job.over.wait()
        return self._view(job)

    async def logs(self, ref: str) -> LogLines:
        """What happened in a job at this peer, oldest first."""
        job = self._find(ref)
        lines = await self._store.read(lambda tx: archive.logged(tx, job.id))
        return [LogLine(time=time, event=event, facts=facts) for time, event, facts in [*lines, *job.unwritten]]

    async def cancel(self, ref: str) -> JobView:
        """End a job for all participants. JobError if it is complete here already."""
        job = self._find(ref)
        if job.view.state == lifecycle.State.CANCELLED:
            return self._view(job)
        if job.over.is_set() or self._is_complete(job):
            waiting = ", ".join(self._view(job).waiting_for)
            state = f"is complete here, and waits for {waiting}" if waiting else f"has ended: {job.view.state}"
            raise JobError(f"the job {job.view.name!r} {state}")
        job.failure = job.failure or Cancelled(f"cancelled by {self._roster.name_of(self._mesh.me)}")
        self._judge(job)
        await job.over.wait()
        return self._view(job)

    # models

    async def models(self) -> ModelViews:
        """The models that jobs left at this peer, oldest first."""
        return [view for view, _ in await self._models()]

    async def model(self, ref: str) -> ModelView:
        """One model by digest, unique prefix of it, or name of the one job that made it. Raises NotFound, Ambiguous."""
        found = [view for view in await self.models() if ref == view.job_name or (ref and view.digest.startswith(ref))]
        if not found:
            raise NotFound(f"there is no model {ref!r} here", hint="fedpeer model list")
        if len({view.digest for view in found}) > 1:
            raise Ambiguous(
                f"{ref!r} means {len(found)} models", hint="; ".join(f"{v.digest} of {v.job_name}" for v in found)
            )
        return found[-1]

    async def predict(self, ref: str, dataset: str) -> pa.Table:
        """A table of predictions for the rows of an own dataset. Nothing leaves this peer."""
        digest = (await self.model(ref)).digest
        view, path = next((view, path) for view, path in await self._models() if view.digest == digest)
        try:
            predicts = self._stage(f"{view.algorithm}:predict")
        except ContractError:
            raise NotFound(f"{view.algorithm} does not predict: it has no stage named predict") from None
        ports = {
            next(name for name, kind in KINDS.items() if kind is cls): port for port, cls in predicts.inputs.items()
        }
        if ports.keys() != {"model", "table"}:
            raise NotFound(f"{predicts.name} takes other inputs than a model and a table")
        async with self._files:
            version = (await self._catalog.snapshot(dataset)).version
            self._in_use[version] += 1
        try:
            inputs = [(ports["model"], "model", path), (ports["table"], "table", self._store.path_of(version))]
            params = contract.canonical_params({}, predicts, predicts.name)
            outputs = await run_alone(predicts, params, inputs, self._start_worker)
        finally:
            with trio.CancelScope(shield=True):
                self._in_use[version] -= 1
                await self._remove_unneeded([version])
        tables = [data for kind, data in outputs.values() if kind == "table"]
        if len(tables) != 1:
            raise JobError(f"{predicts.name} gave {len(tables)} tables where one was awaited")
        loaded = await self._run_in_thread(lambda: artifact.load("table", tables[0]))
        assert isinstance(loaded, stage.Table)
        return loaded.data

    async def _models(self) -> Sequence[tuple[ModelView, Path]]:
        found = []
        for kept in await self._store.read(archive.outputs):
            job = self._jobs[kept.contract]
            if kept.kind != "model" or (job.view.error and job.view.error.code == "not_equal"):
                continue
            view = ModelView(
                digest=kept.digest.hex(),
                job=kept.contract.hex(),
                job_name=job.view.name,
                stage=kept.stage,
                algorithm=kept.facts["algorithm"],
                created=kept.created,
                facts=kept.facts["facts"],
            )
            found.append((view, self._store.path_of(kept.digest)))
        return found

    # a job begins

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
        wrong = {
            "its id is not its hash": contract.contract_id(record.body) != record.scope,
            "it is not sent by its initiator": read.peer_of.get(read.initiator) != record.sender,
            "this peer is no participant": self._mesh.me not in read.peers,
            "a peer is in it twice": len(set(read.peers)) < len(read.peers) or len(read.peer_of) < len(read.peers),
            "it expired": read.expires <= self._seconds(),
            "the initiator has too many jobs here": living >= MAX_PROPOSED,
        }
        if any(wrong.values()):
            reason = next(reason for reason, holds in wrong.items() if holds)
            self._log.warning("contract_refused", peer=self._roster.name_of(record.sender), reason=reason)
            return
        await self._add(record.body, read)

    def _equivocated(self, scope: bytes, peer: str) -> None:
        job = self._jobs.get(scope)
        if job is not None and not self._is_complete(job):
            name = self._roster.name_of(peer)
            what = f"{name} said two different things where it may say one; both statements are kept"
            job.failure = job.failure or Equivocation(what, peer=name)
            self._judge(job)

    async def _add(self, body: bytes, read: Contract) -> _Job:
        """Keep a contract, say it if it is ours, and start its task."""
        contract_id, created, salt = contract.contract_id(body), self._time(), random_bytes(32)
        job = _Job(
            archive.Kept(contract_id, body, created, salt, "", "", closed=False),
            read,
            self._first_view(read, body, created),
            self._stage,
        )
        self._jobs[job.id] = job  # before anything is awaited: the same contract may arrive again meanwhile
        facts = {"initiator": self._roster.name_of(read.peer_of[read.initiator])}

        def keep(tx: Transaction) -> None:
            archive.add(tx, job.id, body, created, salt)
            self._mesh.open_scope(tx, job.id, read.peers)
            if read.peer_of[read.initiator] == self._mesh.me:
                self._mesh.publish(tx, job.id, lifecycle.CONTRACT, "", body)

        try:
            await self._write(job, keep, ("proposed", facts))
        except BaseException:
            del self._jobs[job.id]
            raise
        assert self._nursery is not None, "jobs begin when run() has started"
        self._nursery.start_soon(self._supervise, job)
        return job

    def _first_view(self, read: Contract, body: bytes, created: str) -> JobView:
        return views.first_view(
            read, contract.contract_id(body), created, self._mesh.me, self._roster.name_of, self._stage
        )

    async def _load(self, kept: archive.Kept) -> _Job:
        """A job of the store as it was."""
        read = contract.read(kept.body)
        job = _Job(kept, read, self._first_view(read, kept.body, kept.created), self._stage)
        for time, event, facts in await self._store.read(lambda tx: archive.logged(tx, kept.contract)):
            views.apply(job.view, time, event, facts)
            if event in ("countersigned", "refused"):
                job.told.add(facts["peer"])
        if kept.state:
            job.over.set()
        return job

    # a job's one task

    async def _supervise(self, job: _Job) -> None:
        """Everything a job does at this peer. Nothing but the store's failure escapes."""
        if job.closed:
            return
        try:
            if not job.over.is_set():
                await self._live(job)
            await self._linger(job)
        except Exception as error:
            cause = _one(error)
            self._log.error("job_not_ended", job=job.id.hex(), exc_info=cause)
            if isinstance(cause, StoreError):
                raise cause from None

    async def _live(self, job: _Job) -> None:
        async with trio.open_nursery() as nursery:
            job.scope = nursery.cancel_scope
            nursery.start_soon(self._listen, job)
            nursery.start_soon(self._watch_time, job)
            nursery.start_soon(self._act, job)
        await self._end(job)

    async def _listen(self, job: _Job) -> None:
        while True:
            self._tell_answers(job)
            self._judge(job)
            await self._mesh.changed(job.id)

    async def _watch_time(self, job: _Job) -> None:
        """The contract's expiry, and participants that are needed and away for too long."""
        away: dict[str, float] = {}
        while True:
            stall = job.contract.rules.stall_s
            needed = self._needed(job)
            away = {p: away.get(p, trio.current_time()) for p in needed if not self._connections.connected(p)}
            late = [peer for peer, since in away.items() if trio.current_time() - since >= stall]
            if self._is_complete(job):
                job.gone = set(late)
            elif late:
                name = self._roster.name_of(late[0])
                job.failure = job.failure or PeerAbsent(f"{name} could not be reached for {stall} s", peer=name)
            self._judge(job)
            left = job.contract.expires + contract.SKEW_S - self._seconds()
            await trio.sleep(max(1.0, min(left, stall / 4, 60.0)))

    def _needed(self, job: _Job) -> Sequence[str]:
        """Without whom this peer does not go on. Sums are not meant: they go on without some, or end by themselves."""
        if self._is_complete(job):
            return [peer for peer in job.contract.peers if peer not in self._hear(job).dones]
        return [job.execution.waits_for] if job.execution is not None and job.execution.waits_for else []

    def _judge(self, job: _Job) -> None:
        """Look at all that is known; at the job's end stop everything that runs for it."""
        if job.verdict is not None:
            return
        heard = self._hear(job)
        if lifecycle.agreed(job.contract, heard):
            job.agreed.set()
        job.verdict = lifecycle.judge(
            job.contract, heard, self._seconds(), job.failure, job.common, self._roster.name_of, job.gone
        )
        if job.verdict is not None:
            job.scope.cancel()

    async def _act(self, job: _Job) -> None:
        """This peer's part. Whatever fails in it is the failure of the job, not of the daemon."""
        try:
            await self._answer(job)
            await job.agreed.wait()
            if job.view.state == lifecycle.State.PROPOSED:
                await self._write(job, lambda tx: None, ("agreed", {}))
            lifecycle.compare_columns(job.contract, self._hear(job).answers, self._roster.name_of)
            for entry in job.contract.in_order():
                if job.view.me in entry.role_of:
                    await self._run_stage(job, entry)
            await self._say_done(job)
        except Exception as error:
            cause = _one(error)
            if isinstance(cause, StoreError):
                raise cause from error
            if not isinstance(cause, FedpeerError):
                self._log.error("job_fault", job=job.id.hex(), exc_info=cause)
                cause = JobError(f"a fault of the program ({type(cause).__name__}); the daemon's log has the place")
            job.failure = job.failure or cause
            self._judge(job)

    async def _end(self, job: _Job) -> None:
        """The verdict, durably: said to all, and what only the running job needed goes."""
        verdict = job.verdict
        assert verdict is not None
        error = verdict.error
        facts: dict[str, Any] = {}
        if error is not None:
            facts = {"code": error.code, "message": error.message, "hint": error.hint, "peer": error.peer}

        own = self._hear(job).answers.get(self._mesh.me)
        refused = own is not None and not own.approved
        ended = lifecycle.ended_of(verdict, job.failure, self._roster.name_of(self._mesh.me))

        def end(tx: Transaction) -> tuple[Sequence[bytes], Sequence[bytes]]:
            archive.end(tx, job.id, verdict.event, self._time())
            if error is not None and error is job.failure and not refused:
                self._mesh.publish(tx, job.id, lifecycle.ABORT, "", codec.encode(lifecycle.abort_of(error)))
            self._mesh.publish(tx, job.id, lifecycle.ENDED, "", codec.encode(ended))
            return checkpoint.drop(tx, job.id), archive.unpin_snapshots(tx, job.id)

        with trio.CancelScope(shield=True):  # nothing else runs for it any more; one commit, and the files after it
            own_files, snapshots = await self._write(job, end, (str(verdict.event), facts))
            for digest in own_files:
                self._store.remove_file(digest)
            await self._remove_unneeded(snapshots)
        job.over.set()

    async def _remove_unneeded(self, versions: Sequence[bytes]) -> None:
        """Remove the files that no job and no prediction reads."""
        async with self._files:
            for version in versions:
                needed = await self._store.read(partial(archive.refers_to, digest=version))
                if not needed and not self._in_use[version]:
                    self._store.remove_file(version)

    async def _linger(self, job: _Job) -> None:
        """Others may still need our records and mail: until all have ended, or the contract expired.

        That all have ended is not known to all at once: how it ended here is told to whoever asks even afterwards.
        """
        everybody, until = set(job.contract.peers), job.contract.expires + contract.SKEW_S
        while self._hear(job).ended.keys() < everybody:
            left = until - self._seconds()
            if left <= 0:
                break
            with trio.move_on_after(min(left, 24 * 3600)):
                await self._mesh.changed(job.id)

        job.closed = True
        surplus = self._surplus(job.contract.peer_of[job.contract.initiator])

        def close(tx: Transaction) -> None:
            self._mesh.say_farewell(tx, job.id, lifecycle.ENDED, until=until, now=self._seconds())
            self._aggregation.forget(tx, job.id)
            self._mesh.close_scope(tx, job.id)
            archive.close(tx, job.id)
            for old in surplus:
                archive.forget(tx, old.id)

        await self._store.write(close)
        for old in surplus:
            self._jobs.pop(old.id, None)

    def _surplus(self, initiator: str) -> Sequence[_Job]:
        """The oldest jobs of another initiator that were never agreed and of which nobody needs anything."""
        unagreed = [
            job
            for job in self._jobs.values()
            if job.closed
            and initiator == job.contract.peer_of[job.contract.initiator] != self._mesh.me
            and not all(participant.state == "approved" for participant in job.view.participants)
        ]
        return sorted(unagreed, key=lambda job: job.view.created)[:-MAX_UNAGREED]

    # our answer

    async def _answer(self, job: _Job) -> None:
        """Countersign or refuse, once."""
        if self._mesh.find(job.id, lifecycle.COUNTERSIGN, "", self._mesh.me) is not None:
            return
        try:
            await self._decide(job.contract)
            answer = await self._bring(job)
        except _Refused as refused:
            self._log.warning("job_refused", job=job.id.hex(), reason=refused.reason, code=refused.error.code)
            answer, job.failure = Answer(False, refused.reason, ()), refused.error
        body = codec.encode(answer)
        await self._store.write(lambda tx: self._mesh.publish(tx, job.id, lifecycle.COUNTERSIGN, "", body))

    async def _decide(self, read: Contract) -> None:
        """Whether this peer takes part; _Refused if not. Policies and approvals by the operator belong here."""
        await self._check_here(read)

    async def _check_here(self, read: Contract) -> None:
        """What the contract asks of this peer: known stages, peers, datasets and columns."""
        try:
            contract.check(read, self._stage)
        except ContractError as error:
            raise _Refused("contract", error) from None
        for peer in read.peers:
            try:
                if peer != self._mesh.me:
                    self._roster.resolve(peer)
            except FedpeerError as error:
                raise _Refused("participants", error) from None
        for (stage_id, _), name in read.datasets(read.alias_of[self._mesh.me]).items():
            try:
                view = await self._catalog.get(name)
            except NotFound as error:
                problem = ContractError(f"stage {stage_id!r}: {error.message}", hint=error.hint)
                raise _Refused("dataset", problem) from None
            try:
                contract.check_columns(read.stage(stage_id), self._stage, name, [column for column, _ in view.columns])
            except ContractError as error:
                raise _Refused("columns", error) from None

    async def _bring(self, job: _Job) -> Answer:
        """Snapshots of what we bring, pinned; and what we say of them."""
        datasets = job.contract.datasets(job.view.me)
        told = {
            name
            for (stage_id, _), name in datasets.items()
            if lifecycle.has_common_columns(entry := job.contract.stage(stage_id), entry.role_of[job.view.me])
        }
        said, version_of = [], {}
        async with self._files:
            for name in sorted(set(datasets.values())):
                try:
                    snapshot = await self._catalog.snapshot(name)
                except (DataError, NotFound) as error:
                    raise _Refused("data", error) from None
                version_of[name] = snapshot.version
                columns = [(column, kind) for column, kind in snapshot.columns if column != snapshot.id]
                said.append(
                    lifecycle.brought(
                        name, snapshot.version, job.salt, columns, snapshot.label or "", told=name in told
                    )
                )

            def pin(tx: Transaction) -> None:
                for (stage_id, port), name in datasets.items():
                    archive.pin_snapshot(tx, job.id, stage_id, port, version_of[name])

            await self._store.write(pin)
        return Answer(True, "", tuple(said), has_aes())

    # stages

    async def _run_stage(self, job: _Job, entry: StageEntry) -> None:
        if entry.id in await self._store.read(lambda tx: archive.stages(tx, job.id)):
            return
        declared = self._stage(entry.run)
        if next(view for view in job.view.stages if view.id == entry.id).state == "waiting":
            await self._write(job, lambda tx: None, ("stage_started", {"stage": entry.id}))
        role_of, peer_of = entry.role_of, job.contract.peer_of
        execution = Execution(
            job.id,
            entry.id,
            declared,
            entry.params,
            role_of,
            {alias: peer_of[alias] for alias in role_of},
            job.view.me,
            store=self._store,
            mesh=self._mesh,
            together=_Together(
                self._aggregation,
                job,
                [peer_of[alias] for alias in role_of],
                aes=all(answer.aes for answer in self._hear(job).answers.values()),
            ),
            start_worker=self._start_worker,
            say=lambda event, **facts: self._say(job, event, facts),
            restarts=job.contract.rules.restarts,
            run_in_thread=self._run_in_thread,
        )
        job.execution = execution
        outputs, history = await execution.run(await self._inputs(job, entry, declared))
        await self._keep_outputs(job, entry, outputs, history)

    async def _inputs(self, job: _Job, entry: StageEntry, declared: Stage) -> Sequence[tuple[str, str, Path]]:
        pinned = await self._store.read(lambda tx: archive.snapshots(tx, job.id))
        made = {
            f"{kept.stage}.{kept.name}": kept for kept in await self._store.read(lambda tx: archive.outputs(tx, job.id))
        }
        inputs = []
        for port, source in sorted(entry.sources(job.view.me).items()):
            if (entry.id, port) in pinned:
                inputs.append((port, "table", self._store.path_of(pinned[entry.id, port])))
                continue
            if source not in made:
                raise JobError(f"stage {entry.id!r}: {source!r} was not made at this participant")
            inputs.append((port, made[source].kind, self._store.path_of(made[source].digest)))
        return inputs

    async def _keep_outputs(self, job: _Job, entry: StageEntry, outputs: Outputs, history: bytes) -> None:
        """The outputs and the stage's end in one commit; what restarts would have needed goes with it."""
        created, kept, told = self._time(), [], []
        async with self._files:
            for name, (kind, data) in sorted(outputs.items()):
                loaded = await self._run_in_thread(partial(artifact.load, kind, data))
                digest = await self._store.put_file(data)
                facts: dict[str, Any] = {}
                match loaded:
                    case Model(algorithm, values, _):
                        facts = {"algorithm": algorithm, "facts": dict(values)}
                    case Report(values):
                        facts = {"values": dict(values)}
                kept.append(archive.KeptOutput(job.id, entry.id, name, kind, digest, facts, created))
                told.append(
                    {
                        "stage": entry.id,
                        "name": name,
                        "kind": kind,
                        "digest": digest.hex(),
                        "values": facts.get("values"),
                    }
                )

            def end(tx: Transaction) -> list[bytes]:
                archive.end_stage(tx, job.id, entry.id, history, kept)
                return checkpoint.drop(tx, job.id, entry.id)

            for digest in await self._write(job, end, ("stage_done", {"stage": entry.id, "outputs": told})):
                self._store.remove_file(digest)

    async def _say_done(self, job: _Job) -> None:
        histories = await self._store.read(lambda tx: archive.stages(tx, job.id))
        outputs = await self._store.read(lambda tx: archive.outputs(tx, job.id))
        equal = [(kept.stage, kept.name, kept.digest) for kept in outputs if (kept.stage, kept.name) in job.common]
        if job.failure is not None:
            return
        job.complete = True
        body = codec.encode(Done(tuple(sorted(histories.items())), tuple(equal)))
        await self._write(job, lambda tx: self._mesh.publish(tx, job.id, lifecycle.DONE, "", body))
        self._judge(job)

    # what was said

    def _hear(self, job: _Job) -> Heard:
        """What was said in a job so far. A record that is not what its kind says counts as an abort by its sender."""
        heard, members = job.heard, set(job.contract.peers)
        readers: dict[str, tuple[type[codec.Record], dict[str, Any]]] = {
            lifecycle.COUNTERSIGN: (Answer, heard.answers),
            lifecycle.DONE: (Done, heard.dones),
            lifecycle.ABORT: (Abort, heard.aborts),
            lifecycle.ENDED: (Ended, heard.ended),
        }
        for kind, (record, said) in readers.items():
            for (slot, sender), body in self._mesh.held(job.id, kind).items():
                if slot or sender not in members or sender in said:
                    continue
                try:
                    said[sender] = codec.decode_as(record, body)
                except RemoteProtocolError as error:
                    heard.aborts[sender] = Abort(error.code, f"its record of kind {kind} cannot be read")
        return heard

    def _is_complete(self, job: _Job) -> bool:
        return job.complete or self._mesh.me in self._hear(job).dones

    def _tell_answers(self, job: _Job) -> None:
        for peer, answer in self._hear(job).answers.items():
            if peer not in job.told:
                job.told.add(peer)
                facts = {"peer": peer, "name": self._roster.name_of(peer)}
                if answer.approved:
                    self._say(job, "countersigned", facts)
                else:
                    reason = lifecycle.REFUSALS.get(answer.reason, "refuses for a reason of a newer release")
                    self._say(job, "refused", {**facts, "reason": reason})

    # what is told to the operator

    def _say(self, job: _Job, event: str, facts: dict[str, Any]) -> None:
        """Tell it now; the log has it with the next transaction."""
        time = self._time()
        job.unwritten.append((time, event, facts))
        views.apply(job.view, time, event, facts)
        self._events.publish(job.topic, event, **facts)

    async def _write(self, job: _Job, function: Callable[[Transaction], T], *told: tuple[str, Facts]) -> T:
        """A transaction of a job, with the lines of its log; what it means is told when it is on disk."""
        time = self._time()
        pending, job.unwritten = job.unwritten, []
        lines = [*pending, *((time, event, facts) for event, facts in told)]

        def write(tx: Transaction) -> T:
            result = function(tx)
            for line in lines:
                archive.log(tx, job.id, *line)
            return result

        try:
            result = await self._store.write(write)
        except BaseException:
            job.unwritten = pending + job.unwritten
            raise
        for event, facts in told:
            views.apply(job.view, time, event, facts)
            self._events.publish(job.topic, event, **facts)
            self._log.info("job", job_event=event, job=job.id.hex(), name=job.view.name, stage=facts.get("stage", ""))
        return result

    def _view(self, job: _Job) -> JobView:
        """A copy for the operator, with who is connected and on whom it waits now."""
        view = msgspec.convert(msgspec.to_builtins(job.view), JobView)
        for participant in view.participants:
            participant.name = self._roster.name_of(participant.peer)
            participant.connected = participant.peer == self._mesh.me or self._connections.connected(participant.peer)
        if not job.over.is_set():
            waiting = lifecycle.waiting_for(
                job.contract,
                self._hear(job),
                lifecycle.State(view.state),
                self._mesh.me,
                lambda peer: not self._connections.connected(peer),
            )
            view.waiting_for = [self._roster.name_of(peer) for peer in waiting]
        return view

    def _find(self, ref: str) -> _Job:
        named = [job for job in self._jobs.values() if job.view.name == ref]
        found = named or [job for job in self._jobs.values() if ref and job.id.hex().startswith(ref.lower())]
        if not found:
            raise NotFound(f"there is no job {ref!r} here", hint="fedpeer job list")
        if len(found) > 1:
            ids = ", ".join(f"{job.id.hex()} ({job.view.state})" for job in found)
            raise Ambiguous(f"{len(found)} jobs are named or begin with {ref!r}", hint=f"give one of the ids: {ids}")
        return found[0]

    def _seconds(self) -> int:
        return int(self._now().timestamp())

    def _time(self) -> str:
        return self._now().astimezone(UTC).isoformat(timespec="milliseconds")


class _Together:
    """Sums and agreed values of one stage, among those who have a role in it."""

    def __init__(self, aggregation: Aggregation, job: _Job, parties: Sequence[str], *, aes: bool) -> None:
        self._aggregation, self._contract, self._parties = aggregation, job.id, list(parties)
        self._terms = replace(job.contract.rules.terms, prg="aegis256" if aes else "chacha20")

    async def sum(self, request: Request) -> Total:
        return await self._aggregation.sum(self._contract, self._parties, self._terms, request)

    async def agree(self, stage_id: str, turn: int, k: int, mine: bytes) -> bytes:
        return await self._aggregation.agree(self._contract, self._parties, stage_id, turn, k, mine)


def _one(error: BaseException) -> BaseException:
    """The error inside groups that hold one only."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
