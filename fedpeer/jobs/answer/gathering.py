"""This peer's own facts about what a contract asks of it: counted rows, earlier answers, earlier jobs.

Rules
* Nothing here comes from others but who proposed which contract, and those signed it. Nothing is changed.
* A row is read where it lies, in a thread; what leaves that thread are counts and keys.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fedpeer import artifact
from fedpeer.crypto import Buffer
from fedpeer.data.catalog import Snapshot
from fedpeer.errors import DataError
from fedpeer.governance import answered
from fedpeer.governance.answered import Cohort
from fedpeer.governance.decision import widest_cell
from fedpeer.governance.policy import Policy
from fedpeer.jobs import archive, contract
from fedpeer.jobs.answer.asking import DatasetFacts, Facts
from fedpeer.jobs.contract import Contract
from fedpeer.stage import Table
from fedpeer.store import RunInThread, Store, Transaction

DAY = timedelta(hours=24)


async def gather(
    read: Contract,
    contract_id: bytes,
    policy: Policy,
    snapshots: Mapping[str, Snapshot],
    *,
    store: Store,
    run_in_thread: RunInThread,
    name_of: Callable[[str], str],
    now: datetime,
    sandbox_missing: tuple[str, ...] = (),
    memory: int = 0,
    spent: Callable[[Transaction, str, str], float] = lambda tx, dataset, source: 0.0,
) -> Facts:
    """What is known here about this contract. `snapshots`: of each own dataset in it, by name.

    `spent`: the ε of a dataset, by its name and its source, that was spent in the last year with the partners of the
    contract. Raises PolicyError for a dataset with more rows than can be remembered.
    """
    cohorts = {
        name: await read_cohort(name, snapshot.version, store.path_of(snapshot.version), run_in_thread)
        for name, snapshot in snapshots.items()
        if policy.no_row_differencing
    }

    def look(tx: Transaction) -> Facts:
        return Facts(
            now,
            jobs_before(tx, policy, read, contract_id, name_of, now),
            {
                name: DatasetFacts(
                    snapshot.version,
                    snapshot.rows,
                    tuple(column for column, _ in snapshot.columns if column != snapshot.id),
                    snapshot.label,
                    snapshot.source,
                    spent(tx, name, snapshot.source),
                    answered.aligned(tx, snapshot.version),
                    answered.nearest(tx, cohorts[name], widest_cell(policy)) if name in cohorts else None,
                    answered.parties(tx, snapshot.version, cohort=cohorts.get(name)),
                )
                for name, snapshot in snapshots.items()
            },
            {peer: name_of(peer) for peer in {*read.peers, *answered.aligned_peers(tx)}},
            sandbox_missing,
            memory,
        )

    return await store.read(look)


async def read_cohort(dataset: str, version: bytes, path: Path, run_in_thread: RunInThread) -> Cohort:
    """The rows of a table in the store, a snapshot or what a stage made. Raises PolicyError, DataError."""

    def work() -> Cohort:
        table = artifact.load("table", mapped(path))
        assert isinstance(table, Table)
        return answered.cohort_of(dataset, version, table)

    return await run_in_thread(work)


def jobs_before(
    tx: Transaction,
    policy: Policy,
    read: Contract,
    contract_id: bytes,
    name_of: Callable[[str], str],
    now: datetime,
) -> int:
    """Contracts of the initiator's organization that came in the last 24 hours and before this one."""

    def organization(peer: str) -> str:
        return policy.organization(peer, name_of(peer))

    mine = organization(read.peer_of[read.initiator])
    bodies = archive.since(tx, (now - DAY).astimezone(UTC).isoformat(timespec="milliseconds"), before=contract_id)
    others = (contract.read(body) for body in bodies)
    return sum(organization(other.peer_of[other.initiator]) == mine for other in others)


def mapped(path: Path) -> Buffer:
    """The bytes of a file, read when they are used."""
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None
