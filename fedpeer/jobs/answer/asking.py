"""What a contract asks of this peer, as its policy reads it: the contract's text beside this peer's own facts. Pure.

Rules
* Every number in an Ask is a fact of this peer. Of the contract it has what is computed on what, with whom and for what
  purpose; aliases, the order of participants and the contract's name make no difference.
* A dataset counts for every stage that it feeds, also through tables and rows of earlier stages; not through a model or
  a report, for what those may hold is decided where they are made. Which of its rows come through is known only when
  the stage begins, so earlier answers are compared then (governance/answered.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from fedpeer import codec
from fedpeer.errors import ContractError
from fedpeer.governance.decision import Ask, DatasetAsk, StageAsk
from fedpeer.jobs import contract
from fedpeer.jobs.contract import DATASET, Contract, FindStage, StageEntry
from fedpeer.stage import Params, Rows, Table


@dataclass(frozen=True)
class DatasetFacts:
    """What this peer knows of one of its datasets at the version that the job would get."""

    version: bytes
    rows: int
    columns: tuple[str, ...]
    """without the id"""
    label: str | None = None
    source: str = ""
    spent: float = 0.0
    aligned: Mapping[str, int] = field(default_factory=dict)
    nearest: int | None = None
    parties: tuple[tuple[frozenset[str], bool], ...] = ()
    """the participants of earlier sums over these rows"""


@dataclass(frozen=True)
class Facts:
    """What this peer knows, but for the contract."""

    now: datetime
    jobs_today: int
    datasets: Mapping[str, DatasetFacts]
    names: Mapping[str, str] = field(default_factory=dict)
    sandbox_missing: tuple[str, ...] = ()
    memory: int = 0
    """bytes that a worker may take"""


def ask_of(read: Contract, me: str, find: FindStage, facts: Facts) -> Ask:
    """The contract as it concerns the peer with the id `me`, which is a participant. `read` has been checked."""
    alias, peer_of = read.alias_of[me], read.peer_of
    stages = []
    for entry in read.stages:
        if alias not in entry.role_of:
            continue
        stage = find(entry.run)
        params = contract.read_params(entry, stage)
        stages.append(
            StageAsk(
                entry.id,
                entry.run,
                stage,
                params,
                entry.role_of[alias],
                tuple(sorted(peer_of[other] for other in entry.role_of)),
                tuple(
                    _dataset(name, facts.datasets[name], entry, alias, params)
                    for name in sorted(feeding(read, entry, alias, find))
                ),
                *_noise(read, entry, find),
            )
        )
    return Ask(
        contract.contract_id(codec.encode(read)).hex(),
        me,
        peer_of[read.initiator],
        tuple(sorted(peer for peer in read.peers if peer != me)),
        read.purpose,
        facts.now,
        read.rules.min_parties,
        tuple(stages),
        facts.jobs_today,
        facts.names,
        facts.sandbox_missing,
        facts.memory,
    )


def _noise(read: Contract, entry: StageEntry, find: FindStage) -> tuple[int, int]:
    """Over how many its sums are opened at least, and how many of them noise is made for."""
    try:
        profile = contract.sums_of(read, entry, find)
    except ContractError:  # the check of the contract says why; no noise is enough
        return 0, 1
    return (profile.m_min, profile.honest) if profile else (0, 0)


def feeding(read: Contract, entry: StageEntry, alias: str, find: FindStage) -> set[str]:
    """Names of this participant's datasets whose rows come into a stage."""
    found: set[str] = set()
    for source in entry.sources(alias).values():
        if source.startswith(DATASET):
            found.add(source.removeprefix(DATASET))
            continue
        stage_id, _, output = source.partition(".")
        before = read.stage(stage_id)
        if find(before.run).outputs[output] in (Table, Rows):
            found |= feeding(read, before, alias, find)
    return found


def _dataset(name: str, facts: DatasetFacts, entry: StageEntry, alias: str, params: Params) -> DatasetAsk:
    named = getattr(params, "columns", None)
    columns = tuple(named) if isinstance(named, list | tuple | dict) and named else facts.columns
    whole = f"{DATASET}{name}" in entry.sources(alias).values()  # else which rows it will be is known when it begins
    return DatasetAsk(
        name,
        facts.version,
        facts.rows,
        columns,
        facts.label,
        facts.source,
        facts.spent,
        facts.aligned,
        facts.nearest if whole else None,
        facts.parties if whole else (),
    )
