"""What the passport of a model says (governance/passport.py), from its contract and from how its stage went."""

from __future__ import annotations

import json

from fedpeer.governance import passport
from fedpeer.governance.passport import Passport
from fedpeer.jobs import contract
from fedpeer.jobs.archive import KeptOutput
from fedpeer.jobs.contract import Contract, FindStage
from fedpeer.store import Transaction


def passport_of(tx: Transaction, read: Contract, kept: KeptOutput, history: bytes, find: FindStage) -> Passport:
    """The passport of a model that is equal at all who have a role in its stage; `history`: the stage's."""
    entry = read.stage(kept.stage)
    declared = find(entry.run)
    epsilon, delta = (declared.cost(contract.read_params(entry, declared)) if declared.cost else None) or (None, None)
    ran = passport.ran(tx, kept.contract, kept.stage)
    metrics, metrics_left_out = passport.metrics(kept.facts["facts"])
    sums, sums_left_out = passport.sums(ran)
    return Passport(
        contract=kept.contract.hex(),
        job=read.name,
        purpose=read.purpose,
        initiator=read.initiator,
        participants=read.peer_of,
        stage=entry.id,
        output=kept.name,
        run=entry.run,
        declaration=entry.declaration.hex(),
        params=json.loads(entry.params),
        contributors=[alias for alias, _ in entry.roles],
        rounds=ran.rounds,
        history=history.hex(),
        sums=sums,
        sums_left_out=sums_left_out,
        epsilon=epsilon,
        delta=delta,
        model=kept.digest.hex(),
        algorithm=kept.facts["algorithm"],
        metrics=metrics,
        metrics_left_out=metrics_left_out,
    )
