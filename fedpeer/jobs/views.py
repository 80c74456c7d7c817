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
    """waiting | asking (its operators; known of this peer only) | approved | refused"""
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
    waits_for: list[str] = []
    """names of those whom a sum lacks that takes longer than usual"""
    waits_until: str = ""
    """then it ends without them, or the job with it; "" where none waits"""


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


class AsksView(View):
    """What a job asks of this peer's operators."""

    until: str
    """then the others read that this peer does not allow it"""
    needs: int
    """how many people must approve"""
    approved: list[str] = []
    """who did so far"""


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
    asks: AsksView | None = None


class LogLine(View):
    time: str
    event: str
    facts: dict[str, Any]


class ChangeView(View):
    """One field in which two jobs differ; "" where it is not there."""

    field: str
    before: str
    after: str


class MessageView(View):
    """What a stage lets out, as it declares it."""

    tag: str
    kind: str
    """sum | agreed | sealed | open"""
    sender: str
    receiver: str
    """roles; "" where all send to all"""
    text: str


class FindingView(View):
    """A bound or rule of this peer's policy."""

    rule: str
    stage: str
    holds: bool
    text: str


class DecisionView(View):
    """What the policy says to a contract, and every bound of it."""

    verdict: str
    """refused | ask | auto"""
    findings: list[FindingView]


class ReadView(View):
    """What a stage reads of a dataset of this peer, directly or through earlier stages."""

    dataset: str
    rows: int
    columns: list[str]
    label: str


class StageReviewView(View):
    id: str
    run: str
    text: str
    """what it does, in its own words"""
    role: str
    """of this peer"""
    parties: list[str]
    """names of those who have a role in it"""
    params: dict[str, Any]
    reads: list[ReadView]
    messages: list[MessageView]
    sums: SumsView | None
    epsilon: float
    delta: float
    """the privacy it costs; 0 where it adds no noise"""


class ReviewView(View):
    """All that an operator should know before it approves."""

    id: str
    name: str
    purpose: str
    initiator: str
    """its name here"""
    participants: list[str]
    state: str
    """asking | approved | denied | refused | undecided"""
    until: str
    expires: str
    needs: int
    approved: list[str]
    released: list[str]
    """outputs that all participants get"""
    stages: list[StageReviewView]
    epsilon: float
    verdict: str
    """what the policy says of it now: refused | ask | auto"""
    findings: list[FindingView]
    compared_with: str
    """id of the job of the same initiator that was approved last, "" if there is none"""
    differences: list[ChangeView]


class AskedView(View):
    """A job that waits for this peer's operators."""

    id: str
    name: str
    purpose: str
    initiator: str
    until: str
    needs: int
    approved: list[str]


class StandingView(View):
    """An approval of all jobs like one."""

    number: int
    job: str
    name: str
    """of that job"""
    initiator: str
    datasets: list[str]
    new_rows: bool
    """whether it covers the same datasets with other rows"""
    epsilon: float
    people: list[str]
    created: str
    expires: str


class ApprovalsView(View):
    asking: list[AskedView]
    standing: list[StandingView]


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
                sums=sums_view(contract, entry, find),
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
                    was, participant.state = participant.state, _ANSWERS[event]
                    if was != "refused":  # our own reason says more than what others read
                        participant.reason = str(facts.get("reason", ""))
            if event == "countersigned" and facts["peer"] == _mine(view).peer:
                view.asks = None
        case "decided" if facts["state"] == "asking":
            _mine(view).state = "asking"
            view.asks = AsksView(until=facts["until"], needs=facts["needs"], approved=list(facts["approved"]))
        case "approved" if view.asks is not None:
            view.asks.approved.append(facts["by"])
            if len(view.asks.approved) >= view.asks.needs:  # it is countersigned next
                view.asks = None
        case "denied" | "decided" if event == "denied" or facts["state"] == "refused":
            _mine(view).state, _mine(view).reason, view.asks = "refused", facts["why"], None
        case "agreed":
            view.state = step(State(view.state), Event.AGREE)
        case "stage_refused":
            _mine(view).reason = f"but does not begin stage {facts['stage']!r}: {facts['why']}"
        case "stage_started" if stage is not None:
            stage.state = "running"
            if view.state == State.AGREED:
                view.state = step(State.AGREED, Event.START)
        case "progress" if stage is not None:
            stage.round, stage.rounds, stage.metrics = facts["done"], facts["of"], dict(facts["metrics"])
        case "sum" if stage is not None and stage.sums is not None and facts["step"] == "total":
            alias_of = {participant.peer: participant.alias for participant in view.participants}
            _summed(stage.sums, facts["turn"], [alias_of[peer] for peer in facts["survivors"]])
            stage.sums.waits_for, stage.sums.waits_until = [], ""
        case "waits" if stage is not None and stage.sums is not None:
            stage.sums.waits_for, stage.sums.waits_until = list(facts["for"]), facts["until"]
        case "resumed" if stage is not None and stage.sums is not None:
            stage.sums.waits_for, stage.sums.waits_until = [], ""
        case "worker_crashed" if stage is not None:
            stage.restarts = facts["restarts"]
        case "stage_done" if stage is not None:
            stage.state = "done"
            view.outputs += [msgspec.convert(output, OutputView) for output in facts["outputs"]]
        case "done" | "failed" | "cancelled":
            view.state, view.finished, view.asks = step(State(view.state), Event(event)), time, None
            if _mine(view).state == "asking":  # it ended before anybody said anything
                _mine(view).state = "waiting"
            if event != "done":
                error = {key: facts.get(key, "") for key in ("code", "message", "hint", "peer")}
                view.error = msgspec.convert(error, ErrorView)
                for running in view.stages:
                    running.state = "failed" if running.state == "running" else running.state


_ANSWERS = {"countersigned": "approved", "refused": "refused"}


def _mine(view: JobView) -> ParticipantView:
    return next(participant for participant in view.participants if participant.alias == view.me)


def sums_view(contract: Contract, entry: StageEntry, find: FindStage) -> SumsView | None:
    """What its secure sums protect; None if it makes none, or cannot run."""
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
