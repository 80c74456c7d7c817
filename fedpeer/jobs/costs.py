"""What a stage of a contract costs a participant's privacy budget. Pure.

Rules
* What a stage costs is the stage's own declaration (stage.py, `cost`), asked here with the contract's parameters.
* Every own dataset whose rows come into the stage is charged in full, for every other participant of the stage, for
  all of them read what it tells. A choice of rows on the way makes it no cheaper.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from fedpeer.governance.budget import Charge, Privacy
from fedpeer.jobs.answer.asking import feeding
from fedpeer.jobs.contract import Contract, FindStage, StageEntry, read_params


def of_stage(
    contract_id: bytes, read: Contract, entry: StageEntry, me: str, find: FindStage, rows_of: Callable[[str], int]
) -> list[Charge]:
    """The charges of a stage at the participant with the alias `me`; none if it adds no noise."""
    stage = find(entry.run)
    cost = stage.cost(read_params(entry, stage)) if stage.cost is not None else None
    if cost is None:
        return []
    event = {"run": entry.run, "version": entry.version, "params": msgspec.Raw(entry.params.encode())}
    text = msgspec.json.encode(event).decode()
    return [
        Charge(contract_id, entry.id, dataset, rows_of(dataset), read.peer_of[partner], Privacy.of(*cost), text)
        for dataset in sorted(feeding(read, entry, me, find))
        for partner in entry.role_of
        if partner != me
    ]
