"""What a stage of a contract costs this participant's privacy budget, and its charge.

Rules
* What a stage costs is the stage's own declaration (stage.py, `cost`), asked here with the contract's parameters.
* Every own dataset whose rows come into the stage is charged in full, for every other participant of the stage, for
  all of them read what it tells. A choice of rows on the way makes it no cheaper.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from fedpeer.governance import approvals, budget, policy
from fedpeer.governance.budget import Charge, NameOf, Privacy
from fedpeer.jobs.answer.asking import feeding
from fedpeer.jobs.contract import Contract, FindStage, StageEntry, read_params
from fedpeer.store import Transaction


def charge(
    tx: Transaction,
    contract_id: bytes,
    read: Contract,
    entry: StageEntry,
    me: str,
    find: FindStage,
    time: str,
    name_of: NameOf,
) -> None:
    """Charge what a stage costs, by the policy of now and the rows that were approved; `time`: ISO 8601.

    In the transaction that starts the stage. Raises BudgetSpent, PolicyError.
    """
    asked = approvals.find(tx, contract_id)
    rows = {item.name: item.rows for item in asked.data} if asked is not None else {}
    if due := of_stage(contract_id, read, entry, me, find, rows):
        budget.charge(tx, due, policy.current(tx), time, name_of)


def of_stage(
    contract_id: bytes, read: Contract, entry: StageEntry, me: str, find: FindStage, rows: Mapping[str, int]
) -> list[Charge]:
    """The charges of a stage at the participant with the alias `me`; none if it adds no noise. `rows`: by dataset."""
    stage = find(entry.run)
    cost = stage.cost(read_params(entry, stage)) if stage.cost is not None else None
    if cost is None:
        return []
    event = {"run": entry.run, "version": entry.version, "params": msgspec.Raw(entry.params.encode())}
    text = msgspec.json.encode(event).decode()
    return [
        Charge(contract_id, entry.id, dataset, rows[dataset], read.peer_of[partner], Privacy.of(*cost), text)
        for dataset in sorted(feeding(read, entry, me, find))
        for partner in entry.role_of
        if partner != me
    ]
