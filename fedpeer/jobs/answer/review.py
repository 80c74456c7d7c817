"""What an operator reads before it says yes: what runs on which columns, what it tells whom, and what is new in it.

Rules
* Everything is of this peer's own making: texts of the stages that are installed here, names of its roster, its own
  columns and rows. Of the initiator there are only the job's name, the aliases, and the purpose.
* `differences` is empty for two contracts exactly when their `form` is the same: nothing of a contract is left out but
  its nonce and its expiry.

Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from fedpeer.governance.approvals import Data
from fedpeer.jobs.contract import Contract, StageEntry
from fedpeer.jobs.views import ChangeView


"""Columns that are named one by one."""


def differences(
    old: Contract, old_data: Sequence[Data], new: Contract, new_data: Sequence[Data]
) -> list[ChangeView]:
    """Field by field, in order of their names; "" stands for what is not there."""
    before, after = _fields(old, old_data), _fields(new, new_data)
    return [
        ChangeView(field=field, before=before.get(field, ""), after=after.get(field, ""))
        for field in sorted(before.keys() | after)
        if before.get(field, "") != after.get(field, "")
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
        fields |= {f"stages.{entry.id}.{name}": value for name, value in _stage_fields(entry)}
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


def _stage_fields(entry: StageEntry) -> Iterator[tuple[str, str]]:
    yield "run", entry.run
    yield "version", str(entry.version)
    yield "declaration", entry.declaration.hex()
    yield "roles", ", ".join(f"{alias} is {role}" for alias, role in entry.roles)
    yield "inputs", ", ".join(f"{item.port} of {item.alias or 'all'}: {item.source}" for item in entry.inputs)
    params: Mapping[str, Any] = msgspec.json.decode(entry.params)
    for name, value in params.items():
        yield f"params.{name}", msgspec.json.encode(value, order="sorted").decode()
