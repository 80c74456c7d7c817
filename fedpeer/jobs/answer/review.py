"""What an operator reads before it says yes: what runs on which columns, what it tells whom, and what is new in it.

Rules
* Everything is of this peer's own making: texts of the stages that are installed here, names of its roster, its own
  columns and rows. Of the initiator there are only the job's name, its purpose, and the parameters.
* `differences` is empty for two contracts exactly when their `form` is the same: nothing of a contract is left out but
  its nonce and its expiry.

Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

import msgspec

from fedpeer.governance.approvals import Approval, Asked, Data
from fedpeer.governance.decision import Ask, Decision, StageAsk
from fedpeer.jobs.contract import Contract, FindStage, StageEntry
from fedpeer.jobs.views import (
    ChangeView,
    FindingView,
    MessageView,
    ReadView,
    ReviewView,
    StageReviewView,
    sums_view,
)
from fedpeer.stage import Open, Sealed


def review(
    read: Contract,
    asked: Asked,
    ask: Ask,
    decision: Decision,
    *,
    approved: Sequence[Approval],
    previous: tuple[Contract, Asked] | None,
    find: FindStage,
    name_of: Callable[[str], str],
) -> ReviewView:
    """The page of one contract. `previous`: the job of the same initiator that was approved last."""
    stages = [_stage(read, stage, find, name_of) for stage in ask.stages]
    return ReviewView(
        id=asked.contract.hex(),
        name=read.name,
        purpose=read.purpose,
        initiator=name_of(asked.initiator),
        participants=[name_of(peer) for peer in read.peers],
        state=asked.state,
        until=utc(asked.until),
        expires=utc(read.expires),
        needs=asked.needs,
        approved=[approval.who for approval in approved],
        released=[item.output for item in read.release],
        stages=stages,
        epsilon=asked.epsilon,
        verdict=decision.verdict,
        findings=[
            FindingView(rule=finding.rule, stage=finding.stage, holds=finding.holds, text=finding.text)
            for finding in decision.findings
        ],
        compared_with=previous[1].contract.hex() if previous else "",
        differences=differences(previous[0], previous[1].data, read, asked.data) if previous else [],
    )


def _stage(read: Contract, stage: StageAsk, find: FindStage, name_of: Callable[[str], str]) -> StageReviewView:
    epsilon, delta = stage.cost or (0.0, 0.0)
    entry, peer_of = read.stage(stage.id), read.peer_of
    return StageReviewView(
        id=stage.id,
        run=stage.run,
        text=stage.stage.text,
        role=stage.role,
        parties=[name_of(peer_of[alias]) for alias in entry.role_of],
        params=msgspec.json.decode(entry.params),
        reads=[
            ReadView(dataset=item.name, rows=item.rows, columns=list(item.columns), label=item.label or "")
            for item in stage.datasets
        ],
        messages=[
            MessageView(
                tag=tag,
                kind=message.kind,
                sender=message.sender if isinstance(message, Sealed | Open) else "",
                receiver=message.receiver if isinstance(message, Sealed | Open) else "",
                text=message.text,
            )
            for tag, message in sorted(stage.stage.messages.items())
        ],
        sums=sums_view(read, entry, find),
        epsilon=epsilon,
        delta=delta,
    )


def differences(old: Contract, old_data: Sequence[Data], new: Contract, new_data: Sequence[Data]) -> list[ChangeView]:
    """Field by field, in order of their names; "" stands for what is not there."""
    before, after = _fields(old, old_data), _fields(new, new_data)
    return [
        ChangeView(field=field, before=before.get(field, ""), after=after.get(field, ""))
        for field in sorted(before.keys() | after)
        if before.get(field) != after.get(field)
    ]


def _fields(contract: Contract, data: Sequence[Data]) -> dict[str, str]:
    fields = {
        "version": str(contract.version),
        "name": contract.name,
        "purpose": contract.purpose,
        "initiator": contract.initiator,
        "participants": ", ".join(contract.peer_of),
        "stages": ", ".join(entry.id for entry in contract.stages),
        "release": ", ".join(f"{item.output} to {item.to}" for item in contract.release),
    }
    fields |= {f"participants.{alias}": peer for alias, peer in contract.peer_of.items()}
    fields |= {f"rules.{name}": str(value) for name, value in msgspec.structs.asdict(contract.rules).items()}
    for entry in contract.stages:
        fields |= {f"stages.{entry.id}.{name}": value for name, value in _of_a_stage(entry)}
    for item in data:
        looks = {
            "rows": str(item.rows),
            "version": item.version.hex()[:12],
            "columns": ", ".join(f"{name} ({kind})" for name, kind in item.columns),
            "id": item.id or "",
            "label": item.label or "",
        }
        fields |= {f"dataset {item.name}.{name}": value for name, value in looks.items()}
    return fields


def _of_a_stage(entry: StageEntry) -> Iterator[tuple[str, str]]:
    yield "run", entry.run
    yield "version", str(entry.version)
    yield "declaration", entry.declaration.hex()
    yield "roles", ", ".join(f"{alias} is {role}" for alias, role in entry.roles)
    yield "inputs", ", ".join(f"{item.port} of {item.alias or 'all'}: {item.source}" for item in entry.inputs)
    params: dict[str, object] = msgspec.json.decode(entry.params)
    for name, value in params.items():
        yield f"params.{name}", msgspec.json.encode(value, order="sorted").decode()


def utc(seconds: int) -> str:
    """A time of a contract as people read it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
