"""What an operator sees of jobs and models; the shapes of the admin API's answers.

The view of a job is the fold of its events: `first_view` and then `apply` for each, as they happen and again from the
job's log after a restart. Nothing is decided from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import msgspec

from fedpeer.errors import ContractError
from fedpeer.jobs.contract import Contract, FindStage, StageEntry, sums_of
from fedpeer.jobs.lifecycle import Event, State, step
from fedpeer.stage import Sum


class View(msgspec.Struct, kw_only=True):
    """Base of what the admin API answers with: plain JSON fields."""


class ParticipantView(View):
    alias: str
    peer: str
    name: str
    connected: bool
    state: str
    """waiting | approved | refused"""
    reason: str = ""


class SumsView(View):
    """What the secure sums of a stage protect, and who was in the last one (participants by alias)."""

    parties: list[str]
    profile: str
    """byz: holds against participants that lie; crash: all run unmodified software"""
    hidden_among: int
    """Every sum has at least so many contributors that do not pool what they see: among theirs one's values are."""
    pooling: int
    """so many may pool what they see"""
    may_be_away: int
    """so many may be away, and sums go on"""
    of_data: bool
    """some are computed from the data alone: who is in the first of these is needed in all of them"""
    turn: int = -1
    """of the last sum; before the first -1"""
    survivors: list[str] = []
    left_out: dict[str, list[int]] = {}
    """who was left out lately: first and last turn, without a break"""


class StageView(View):
    id: str
    run: str
    state: str
    """waiting | running | done | failed"""
    role: str
    round: int = 0
    rounds: int = 0
    metrics: dict[str, float] = {}
    restarts: int = 0
    sums: SumsView | None = None


class OutputView(View):
    stage: str
    name: str
    kind: str
    digest: str
    values: dict[str, Any] | None = None
    """a report's numbers"""


class ErrorView(View):
    code: str
    message: str
    hint: str = ""
    peer: str = ""


class JobView(View):
    id: str
    name: str
    purpose: str
    state: str
    """proposed | agreed | running | done | failed | cancelled"""
    initiator: str
    me: str
    participants: list[ParticipantView]
    waiting_for: list[str]
    """names of the participants on whom it depends that the job goes on"""
    stages: list[StageView]
    outputs: list[OutputView]
    created: str
    finished: str = ""
    error: ErrorView | None = None


class LogLine(View):
    time: str
    event: str
    facts: dict[str, Any]


class ModelView(View):
    digest: str
    job: str
    job_name: str
    stage: str
    algorithm: str
    created: str
    facts: dict[str, Any]


def first_view(
    contract: Contract, contract_id: bytes, created: str, me: str, name_of: Callable[[str], str], find: FindStage
) -> JobView:
    """A job that was just proposed, as the peer `me` (its id) sees it."""
    alias = contract.alias_of[me]
    return JobView(
        id=contract_id.hex(),
        name=contract.name,
        purpose=contract.purpose,
        state="proposed",
        initiator=contract.initiator,
        me=alias,
        participants=[
            ParticipantView(alias=item.alias, peer=item.peer, name=name_of(item.peer), connected=False, state="waiting")
            for item in contract.participants
        ],
        waiting_for=[],
        stages=[
            StageView(
                id=entry.id,
                run=entry.run,
                state="waiting",
                role=entry.role_of.get(alias, ""),
                sums=_sums(contract, entry, find),
            )
            for entry in contract.in_order()
        ],
        outputs=[],
        created=created,
    )


def apply(view: JobView, time: str, event: str, facts: Mapping[str, Any]) -> None:
    """Change the view by one event of the job."""
    stage = next((stage for stage in view.stages if stage.id == facts.get("stage")), None)
    match event:
        case "countersigned" | "refused":
            for participant in view.participants:
                if participant.peer == facts["peer"]:
                    participant.state = "approved" if event == "countersigned" else "refused"
                    participant.reason = str(facts.get("reason", ""))
        case "agreed":
            view.state = step(State(view.state), Event.AGREE)
        case "stage_started" if stage is not None:
            stage.state = "running"
            if view.state == State.AGREED:
                view.state = step(State.AGREED, Event.START)
        case "progress" if stage is not None:
            stage.round, stage.rounds, stage.metrics = facts["done"], facts["of"], dict(facts["metrics"])
        case "sum" if stage is not None and stage.sums is not None and facts["step"] == "total":
            alias_of = {participant.peer: participant.alias for participant in view.participants}
            _summed(stage.sums, facts["turn"], [alias_of[peer] for peer in facts["survivors"]])
        case "worker_crashed" if stage is not None:
            stage.restarts = facts["restarts"]
        case "stage_done" if stage is not None:
            stage.state = "done"
            view.outputs += [msgspec.convert(output, OutputView) for output in facts["outputs"]]
        case "done" | "failed" | "cancelled":
            view.state, view.finished = step(State(view.state), Event(event)), time
            if event != "done":
                error = {key: facts.get(key, "") for key in ("code", "message", "hint", "peer")}
                view.error = msgspec.convert(error, ErrorView)
                for running in view.stages:
                    running.state = "failed" if running.state == "running" else running.state


def _sums(contract: Contract, entry: StageEntry, find: FindStage) -> SumsView | None:
    with suppress(ContractError):  # it cannot run here
        if (of := sums_of(contract, entry, find)) is not None:
            return SumsView(
                parties=list(entry.role_of),
                profile=of.name,
                hidden_among=of.m_min - of.t_c,
                pooling=of.t_c,
                may_be_away=of.n - of.m_min,
                of_data=any(isinstance(m, Sum) and m.group == "data" for m in find(entry.run).messages.values()),
            )
    return None


def _summed(sums: SumsView, turn: int, survivors: list[str]) -> None:
    """A sum of this turn is known, over these aliases."""
    for alias in set(sums.parties) - set(survivors):
        first, last = sums.left_out.get(alias, (turn, turn))
        sums.left_out[alias] = [first if last >= turn - 1 else turn, turn]
    sums.left_out = {alias: turns for alias, turns in sums.left_out.items() if turns[1] >= turn - 1}
    sums.turn, sums.survivors = turn, survivors
