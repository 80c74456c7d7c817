"""One stage of one job at this peer: what goes into it, the Execution, and what is kept of it.

Rules
* Responsible for the way from inputs to outputs: snapshots and outputs of earlier stages go in; outputs are files of
  the store, and their rows, the stage's end and the loss of its checkpoint are one commit.
* No stage begins before the policy of now has seen the rows that it gets; what may not begin ends the job, for the
  others not before `answer_s` have passed: when it ends does not tell why. Our own log has it at once.
* What the participants of a stage decide together is asked of the aggregation, in their names only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import trio

from fedpeer import artifact
from fedpeer.aggregation.request import Request, Total
from fedpeer.aggregation.service import Aggregation
from fedpeer.errors import DataError, JobError, PolicyError
from fedpeer.governance import answered, approvals, budget, passport, policy
from fedpeer.governance.answered import Cohort
from fedpeer.governance.decision import Ask
from fedpeer.jobs import archive, checkpoint, contract
from fedpeer.jobs.answer import asking
from fedpeer.jobs.answer.review import utc
from fedpeer.jobs.answer.service import LOOK_S
from fedpeer.jobs.cohorts import Source, cohorts_of
from fedpeer.jobs.contract import DATASET, StageEntry
from fedpeer.jobs.execution import Execution, Outputs, StartWorker
from fedpeer.jobs.job.service import Job, seconds_of
from fedpeer.jobs.keys.service import KeyRing
from fedpeer.mesh.service import Mesh
from fedpeer.stage import Model, Report, Stage
from fedpeer.store import RunInThread, Store, Transaction

REFUSED = "stage_refused"
"""The line of a job's log that says why a stage may not begin here, and until when nobody else reads so."""


class Stages:
    """Runs the stages of all jobs."""

    def __init__(
        self,
        mesh: Mesh,
        aggregation: Aggregation,
        store: Store,
        *,
        start_worker: StartWorker,
        run_in_thread: RunInThread,
        find: contract.FindStage,
    ) -> None:
        self._mesh, self._aggregation, self._store = mesh, aggregation, store
        self._start_worker, self._run_in_thread, self._stage = start_worker, run_in_thread, find
        self._keys = KeyRing(mesh, store, run_in_thread)

    async def run(self, job: Job, entry: StageEntry) -> None:
        """Run a stage to its end, unless it has ended here already. Raises what it fails with."""
        if entry.id in await self._store.read(lambda tx: archive.stages(tx, job.id)):
            return
        declared = self._stage(entry.run)
        if next(view for view in job.view.stages if view.id == entry.id).state == "waiting":
            await self._begin(job, entry, declared)
        role_of, peer_of = entry.role_of, job.contract.peer_of
        profile = contract.sums_of(job.contract, entry, self._stage)
        keys = await self._keys.of(job, entry, declared)
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
                aes=all(answer.aes for answer in job.hear().answers.values()),
            ),
            start_worker=self._start_worker,
            say=lambda event, **facts: job.say(event, facts),
            restarts=job.contract.rules.restarts,
            run_in_thread=self._run_in_thread,
            honest=profile.honest if profile else 1,
            keys=keys,
        )
        job.execution = execution
        outputs, history = await execution.run(await self._inputs(job, entry, declared))
        await self._keep_outputs(job, entry, outputs, history)

    async def _begin(self, job: Job, entry: StageEntry, declared: Stage) -> None:
        """Start it, or end the job because it may not begin: at a fixed time, kept, so that no restart changes it.

        Raises PolicyError.
        """
        lines = await self._store.read(lambda tx: archive.logged(tx, job.id))
        told = next((facts for _, event, facts in lines if (event, facts.get("stage")) == (REFUSED, entry.id)), None)
        if told is None:
            try:
                await self._start(job, entry, declared)
                return
            except (PolicyError, DataError) as error:
                until = _seconds(job) + job.contract.rules.answer_s
                told = {"stage": entry.id, "why": error.message, "until": utc(until)}
            await job.write(lambda tx: None, (REFUSED, told))
        until = seconds_of(datetime.fromisoformat(told["until"]))
        while (left := until - _seconds(job)) > 0:
            with trio.move_on_after(min(left, LOOK_S)):
                await self._mesh.changed(job.id)
        raise PolicyError(told["why"], hint="fedpeer policy show")

    async def _start(self, job: Job, entry: StageEntry, declared: Stage) -> None:
        """Whether it may begin with the rows it gets: asked of the policy of now, and kept, before its first byte.

        What these rows are, that they count as answered from now on, and what it costs of the privacy budget, is one
        commit. Raises PolicyError, DataError.
        """
        cohorts: Sequence[Cohort] = ()
        if declared.messages:
            cohorts = await self._cohorts(job, entry)
        told = {"stage": entry.id, "rows": {cohort.dataset: cohort.rows for cohort in cohorts}}

        def start(tx: Transaction) -> None:
            asked = approvals.find(tx, job.id)
            assert asked is not None, "what was not asked about is not agreed"
            ask = self._ask(job, asked.data, answered.aligned_peers(tx))
            stage = next(item for item in ask.stages if item.id == entry.id)
            findings = answered.check_cohort(tx, policy.current(tx), ask, stage, cohorts, job.time())
            if failed := [finding.text for finding in findings if not finding.holds]:
                why = f"stage {entry.id!r}: {'; '.join(failed)}"
                raise PolicyError(why[: approvals.MAX_WHY])
            due = budget.of_stage(job.id, stage, ask.me)
            budget.charge(tx, due, policy.current(tx), job.time(), self._mesh.roster.name_of)

        await job.write(start, ("stage_started", told))

    def _ask(self, job: Job, data: Sequence[approvals.Data], others: Collection[str]) -> Ask:
        """The contract as the policy reads it; what rows really go in is told by the cohorts.

        `others`: whose names it has to know beside the participants'.
        """
        name_of = self._mesh.roster.name_of
        facts = asking.Facts(
            datetime.fromisoformat(job.time()),
            0,
            {
                item.name: asking.DatasetFacts(
                    item.version,
                    item.rows,
                    tuple(column for column, _ in item.columns if column != item.id),
                    item.label,
                    item.source,
                )
                for item in data
            },
            {peer: name_of(peer) for peer in {*job.contract.peers, *others}},
        )
        return asking.ask_of(job.contract, self._mesh.me, self._stage, facts)

    async def _cohorts(self, job: Job, entry: StageEntry) -> Sequence[Cohort]:
        """The rows of each own dataset that go into a stage. Raises PolicyError, DataError."""
        pinned = await self._store.read(lambda tx: archive.snapshots(tx, job.id))
        made = {
            f"{kept.stage}.{kept.name}": kept for kept in await self._store.read(lambda tx: archive.outputs(tx, job.id))
        }
        snapshots = {
            name: Source("table", self._store.path_of(version), version, [name], whole=True)
            for place, name in job.contract.datasets(job.view.me).items()
            if (version := pinned[place])
        }
        sources = []
        for source in entry.sources(job.view.me).values():
            if source.startswith(DATASET):
                sources.append(snapshots[source.removeprefix(DATASET)])
            elif (kept := made.get(source)) is not None:  # what is missing is said where it is opened
                before = job.contract.stage(kept.stage)
                names = asking.feeding(job.contract, before, job.view.me, self._stage)
                sources.append(Source(kept.kind, self._store.path_of(kept.digest), kept.digest, names, whole=False))
        return await self._run_in_thread(partial(cohorts_of, sources, snapshots))

    async def _inputs(self, job: Job, entry: StageEntry, declared: Stage) -> Sequence[tuple[str, str, Path]]:
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

    async def _keep_outputs(self, job: Job, entry: StageEntry, outputs: Outputs, history: bytes) -> None:
        """The outputs and the stage's end in one commit; what restarts would have needed goes with it."""
        created, kept, told = job.time(), [], []
        try:
            for name, (kind, data) in sorted(outputs.items()):
                loaded = await self._run_in_thread(partial(artifact.load, kind, data))
                digest = await self._store.put_file(data, held=True)
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
                passport.keep_ran(tx, job.id, entry.id, checkpoint.ran(tx, job.id, entry.id))
                return checkpoint.drop(tx, job.id, entry.id)

            for digest in await job.write(end, ("stage_done", {"stage": entry.id, "outputs": told})):
                self._store.remove_file(digest)
        finally:
            for output in kept:
                self._store.claimed(output.digest)


def _seconds(job: Job) -> int:
    return seconds_of(datetime.fromisoformat(job.time()))


class _Together:
    """Sums and agreed values of one stage, among those who have a role in it."""

    def __init__(self, aggregation: Aggregation, job: Job, parties: Sequence[str], *, aes: bool) -> None:
        self._aggregation, self._job, self._parties = aggregation, job, list(parties)
        self._terms = replace(job.contract.rules.terms, prg="aegis256" if aes else "chacha20")

    async def sum(self, request: Request) -> Total:
        def waits(names: Sequence[str], left_s: float) -> None:
            place = {"stage": request.stage, "turn": request.turn, "k": request.k}
            self._job.say("waits", {**place, "for": list(names), "until": self._job.time(left_s)})

        return await self._aggregation.sum(self._job.id, self._parties, self._terms, request, waits=waits)

    async def agree(self, stage_id: str, turn: int, k: int, mine: bytes) -> bytes:
        return await self._aggregation.agree(self._job.id, self._parties, stage_id, turn, k, mine)
