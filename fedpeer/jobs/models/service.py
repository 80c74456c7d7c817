"""The models that jobs left at this peer: what an operator sees of them, and what they predict.

Rules
* Responsible for reading outputs of jobs that are over; nothing of it leaves this peer.
* A model that was not the same at all participants is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa

from fedpeer import artifact, stage
from fedpeer.data.catalog import Catalog
from fedpeer.errors import Ambiguous, ContractError, JobError, NotFound
from fedpeer.governance import passport
from fedpeer.jobs import archive, contract
from fedpeer.jobs.execution import StartWorker, run_alone
from fedpeer.jobs.files.service import Files
from fedpeer.jobs.views import JobView, ModelView
from fedpeer.stage import KINDS
from fedpeer.store import RunInThread, Store, Transaction

ModelViews = list[ModelView]


class Models:
    """All models of this peer. `view_of` gives the job that made an output, by the id of its contract."""

    def __init__(
        self,
        view_of: Callable[[bytes], JobView],
        files: Files,
        catalog: Catalog,
        store: Store,
        *,
        start_worker: StartWorker,
        run_in_thread: RunInThread,
        find: contract.FindStage,
    ) -> None:
        self._view_of, self._files, self._catalog, self._store = view_of, files, catalog, store
        self._start_worker, self._run_in_thread, self._stage = start_worker, run_in_thread, find

    async def list(self) -> ModelViews:
        """The models that jobs left at this peer, oldest first."""
        return [view for view, _ in await self._kept()]

    async def get(self, ref: str) -> ModelView:
        """One model by digest, unique prefix of it, or name of the one job that made it. Raises NotFound, Ambiguous."""
        found = [view for view in await self.list() if ref == view.job_name or (ref and view.digest.startswith(ref))]
        if not found:
            raise NotFound(f"there is no model {ref!r} here", hint="fedpeer model list")
        if len({view.digest for view in found}) > 1:
            raise Ambiguous(
                f"{ref!r} means {len(found)} models", hint="; ".join(f"{v.digest} of {v.job_name}" for v in found)
            )
        return found[-1]

    async def predict(self, ref: str, dataset: str) -> pa.Table:
        """A table of predictions for the rows of an own dataset. Nothing leaves this peer."""
        digest = (await self.get(ref)).digest
        view, path = next((view, path) for view, path in await self._kept() if view.digest == digest)
        try:
            predicts = self._stage(f"{view.algorithm}:predict")
        except ContractError:
            raise NotFound(f"{view.algorithm} does not predict: it has no stage named predict") from None
        ports = {
            next(name for name, kind in KINDS.items() if kind is cls): port for port, cls in predicts.inputs.items()
        }
        if ports.keys() != {"model", "table"}:
            raise NotFound(f"{predicts.name} takes other inputs than a model and a table")
        async with self._files.snapshots(self._catalog, [dataset]) as taken:
            table = self._store.path_of(taken[dataset].version)
            inputs = [(ports["model"], "model", path), (ports["table"], "table", table)]
            params = contract.canonical_params({}, predicts, predicts.name)
            outputs = await run_alone(predicts, params, inputs, self._start_worker)
        tables = [data for kind, data in outputs.values() if kind == "table"]
        if len(tables) != 1:
            raise JobError(f"{predicts.name} gave {len(tables)} tables where one was awaited")
        loaded = await self._run_in_thread(lambda: artifact.load("table", tables[0]))
        assert isinstance(loaded, stage.Table)
        return loaded.data

    async def passport(self, ref: str) -> passport.File:
        """Where a model is from, signed by those who made it. Raises NotFound, Ambiguous."""
        view = await self.get(ref)
        contract_id = bytes.fromhex(view.job)

        def find(tx: Transaction) -> passport.File | None:
            of_job = archive.outputs(tx, contract_id)
            name = next(o.name for o in of_job if (o.stage, o.digest.hex()) == (view.stage, view.digest))
            return passport.find(tx, contract_id, view.stage, name)

        found = await self._store.read(find)
        if found is None:
            raise NotFound(f"the model {ref!r} has no passport: it is this peer's alone, or its job did not end well")
        return found

    async def _kept(self) -> Sequence[tuple[ModelView, Path]]:
        found = []
        for kept in await self._store.read(archive.outputs):
            job = self._view_of(kept.contract)
            if kept.kind != "model" or (job.error and job.error.code == "not_equal"):
                continue
            view = ModelView(
                digest=kept.digest.hex(),
                job=kept.contract.hex(),
                job_name=job.name,
                stage=kept.stage,
                algorithm=kept.facts["algorithm"],
                created=kept.created,
                facts=kept.facts["facts"],
            )
            found.append((view, self._store.path_of(kept.digest)))
        return found
