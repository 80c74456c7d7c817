"""This peer's answer to a contract: whether it takes part, and with what.

Rules
* Responsible for what a contract asks of this peer, from this peer's own facts; nobody else's word counts in it.
* What it brings is pinned before it says so. It answers once: a daemon that was killed finds its answer among what was
  said.
"""

from __future__ import annotations

from typing import Any

from fedpeer import codec
from fedpeer.crypto import has_aes
from fedpeer.data.catalog import Catalog
from fedpeer.errors import ContractError, DataError, FedpeerError, NotFound
from fedpeer.jobs import archive, contract, lifecycle
from fedpeer.jobs.contract import Contract
from fedpeer.jobs.files.service import Files
from fedpeer.jobs.job.service import Job
from fedpeer.jobs.lifecycle import Answer
from fedpeer.mesh.service import Mesh
from fedpeer.store import Store, Transaction


class Refused(Exception):
    """This peer does not take part: `reason` of lifecycle.REFUSALS for all, `error` for our own operator."""

    def __init__(self, reason: str, error: FedpeerError) -> None:
        super().__init__(reason)
        self.reason, self.error = reason, error


class Answers:
    """What this peer says to contracts."""

    def __init__(
        self, mesh: Mesh, catalog: Catalog, store: Store, files: Files, *, find: contract.FindStage, log: Any
    ) -> None:
        self._mesh, self._roster, self._catalog = mesh, mesh.roster, catalog
        self._store, self._files, self._stage, self._log = store, files, find, log

    async def give(self, job: Job) -> None:
        """Countersign or refuse, once."""
        if self._mesh.find(job.id, lifecycle.COUNTERSIGN, "", self._mesh.me) is not None:
            return
        try:
            await self.check(job.contract)  # policies and approvals by the operator belong here, too
            answer = await self._bring(job)
        except Refused as refused:
            self._log.warning("job_refused", job=job.id.hex(), reason=refused.reason, code=refused.error.code)
            answer, job.failure = Answer(False, refused.reason, ()), refused.error
        body = codec.encode(answer)
        await self._store.write(lambda tx: self._mesh.publish(tx, job.id, lifecycle.COUNTERSIGN, "", body))

    async def check(self, read: Contract) -> None:
        """What the contract asks of this peer: known stages, peers, datasets and columns. Raises Refused."""
        try:
            contract.check(read, self._stage)
        except ContractError as error:
            raise Refused("contract", error) from None
        for peer in read.peers:
            try:
                if peer != self._mesh.me:
                    self._roster.resolve(peer)
            except FedpeerError as error:
                raise Refused("participants", error) from None
        for (stage_id, _), name in read.datasets(read.alias_of[self._mesh.me]).items():
            try:
                view = await self._catalog.get(name)
            except NotFound as error:
                problem = ContractError(f"stage {stage_id!r}: {error.message}", hint=error.hint)
                raise Refused("dataset", problem) from None
            try:
                contract.check_columns(read.stage(stage_id), self._stage, name, [column for column, _ in view.columns])
            except ContractError as error:
                raise Refused("columns", error) from None

    async def _bring(self, job: Job) -> Answer:
        """Snapshots of what we bring, pinned; and what we say of them."""
        datasets = job.contract.datasets(job.view.me)
        told = {
            name
            for (stage_id, _), name in datasets.items()
            if lifecycle.has_common_columns(entry := job.contract.stage(stage_id), entry.role_of[job.view.me])
        }
        said, version_of = [], {}
        async with self._files.keeping:
            for name in sorted(set(datasets.values())):
                try:
                    snapshot = await self._catalog.snapshot(name)
                except (DataError, NotFound) as error:
                    raise Refused("data", error) from None
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
