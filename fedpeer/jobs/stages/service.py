"""One stage of one job at this peer: what goes into it, the Execution, and what is kept of it.

Rules
* Responsible for the way from inputs to outputs: snapshots and outputs of earlier stages go in; outputs are files of
  the store, and their rows, the stage's end and the loss of its checkpoint are one commit.
* No stage begins before the policy of now has seen the rows that it gets; what may not begin ends the job.
* What the participants of a stage decide together is asked of the aggregation, in their names only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from fedpeer import artifact
from fedpeer.aggregation.request import Request, Total
from fedpeer.aggregation.service import Aggregation
from fedpeer.errors import JobError, PolicyError
from fedpeer.governance import answered, approvals, budget, passport, policy
from fedpeer.governance.answered import Cohort
from fedpeer.governance.decision import Ask
from fedpeer.jobs import archive, checkpoint, contract
from fedpeer.jobs.answer import asking
from fedpeer.jobs.cohorts import Source, cohorts_of
from fedpeer.jobs.contract import DATASET, StageEntry
from fedpeer.jobs.execution import Execution, Outputs, StartWorker
from fedpeer.jobs.files.service import Files
from fedpeer.jobs.job.service import Job
from fedpeer.jobs.keys.service import KeyRing
from fedpeer.mesh.service import Mesh
from fedpeer.stage import Model, Report, Stage
from fedpeer.store import RunInThread, Store, Transaction


class Stages:
    """Runs the stages of all jobs."""

    def __init__(
        self,
        mesh: Mesh,
        aggregation: Aggregation,
        store: Store,
        files: Files,
        *,
        start_worker: StartWorker,
        run_in_thread: RunInThread,
        find: contract.FindStage,
    ) -> None:
        self._mesh, self._aggregation, self._store, self._files = mesh, aggregation, store, files
        self._start_worker, self._run_in_thread, self._stage = start_worker, run_in_thread, find
        self._keys = KeyRing(mesh, store, run_in_thread)

    async def run(self, job: Job, entry: StageEntry) -> None:
        """Run a stage to its end, unless it has ended here already. Raises what it fails with."""
        if entry.id in await self._store.read(lambda tx: archive.stages(tx, job.id)):
            return
        declared = self._stage(entry.run)
        if next(view for view in job.view.stages if view.id == entry.id).state == "waiting":
            await self._start(job, entry, declared)
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

    async def _start(self, job: Job, entry: StageEntry, declared: Stage) -> None:
        """Whether it may begin with the rows it gets: asked of the policy of now, and kept, before its first byte.

        What these rows are, that they count as answered from now on, and what it costs of the privacy budget, is one
        commit. Raises PolicyError.
        """
        cohorts: Sequence[Cohort] = ()
        if declared.messages:
            cohorts = await self._cohorts(job, entry)
        told = {"stage": entry.id, "rows": {cohort.dataset: cohort.rows for cohort in cohorts}}

        def start(tx: Transaction) -> None:
            asked = approvals.find(tx, job.id)
            assert asked is not None, "what was not asked about is not agreed"
            ask = self._ask(job, asked.data)
            stage = next(item for item in ask.stages if item.id == entry.id)
            findings = answered.check_cohort(tx, policy.current(tx), ask, stage, cohorts, job.time())
            if failed := [finding.text for finding in findings if not finding.holds]:
                why = f"stage {entry.id!r}: {'; '.join(failed)}"
                raise PolicyError(why[: approvals.MAX_WHY], hint="fedpeer policy show")
            due = budget.of_stage(job.id, stage, ask.me)
            budget.charge(tx, due, policy.current(tx), job.time(), self._mesh.roster.name_of)

        await job.write(start, ("stage_started", told))

    def _ask(self, job: Job, data: Sequence[approvals.Data]) -> Ask:
        """The contract as the policy reads it; what rows really go in is told by the cohorts."""
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
                )
                for item in data
            },
            {peer: name_of(peer) for peer in job.contract.peers},
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
        async with self._files.keeping:
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
                passport.keep_ran(tx, job.id, entry.id, checkpoint.ran(tx, job.id, entry.id))
                return checkpoint.drop(tx, job.id, entry.id)

            for digest in await job.write(end, ("stage_done", {"stage": entry.id, "outputs": told})):
                self._store.remove_file(digest)


class _Together:
    """Sums and agreed values of one stage, among those who have a role in it."""

    def __init__(self, aggregation: Aggregation, job: Job, parties: Sequence[str], *, aes: bool) -> None:
        self._aggregation, self._contract, self._parties = aggregation, job.id, list(parties)
        self._terms = replace(job.contract.rules.terms, prg="aegis256" if aes else "chacha20")

    async def sum(self, request: Request) -> Total:
        return await self._aggregation.sum(self._contract, self._parties, self._terms, request)

    async def agree(self, stage_id: str, turn: int, k: int, mine: bytes) -> bytes:
        return await self._aggregation.agree(self._contract, self._parties, stage_id, turn, k, mine)
