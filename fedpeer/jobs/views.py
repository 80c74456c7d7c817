"""What an operator sees of jobs and models; the shapes of the admin API's answers."""

from __future__ import annotations

from typing import Any

import msgspec


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


class OutputView(View):
    stage: str
    name: str
    kind: str
    digest: str


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
    """names of the participants that have not answered yet"""
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
