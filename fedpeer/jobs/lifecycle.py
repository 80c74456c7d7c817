"""The life of a job, decided from signed records and this peer's own facts. Pure: no clock, no network.

            answers of all          stages begin           all say done, and the same
  PROPOSED ───────────────▶ AGREED ─────────────▶ RUNNING ───────────────────────────▶ DONE
      │  refused, expired      │                     │  results differ, expired
      └───────────────┬────────┴──────────┬──────────┘
        failed or aborted ▶ FAILED    cancelled ▶ CANCELLED

Records of a job, in the scope named by the contract's id, one of each kind per participant (slot ""):
  contract      the canonical contract, by its initiator
  countersign   `Answer`: approved with what I bring, or refused with a reason of a fixed list
  done          `Done`: every stage of mine is complete; digests of what must be equal everywhere
  abort         `Abort`: I end the job
  ended         `Ended`: it is over here, and how; when all have said so, nobody needs anything of it
(and those of audit logs, passports and keys: governance/heads.py, governance/passport.py, keyring.py)

Rules
* A participant says "done" or "abort", never both. So the end is the same at all, in whatever order records come: if
  all say done the results are compared, and any abort ends the job for everybody.
* What is said to others is coarse: a code, and a text that our own daemon made. The full error stays at home.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

import msgspec

from fedpeer import codec
from fedpeer.crypto import hash_
from fedpeer.errors import (
    Cancelled,
    ColumnsDiffer,
    FedpeerError,
    GateClosed,
    JobError,
    LocalProtocolError,
    NotEqual,
    PolicyError,
    by_code,
)
from fedpeer.governance import heads
from fedpeer.governance.passport import PASSPORT
from fedpeer.jobs.contract import SKEW_S, Contract, Digest, StageEntry
from fedpeer.jobs.keyring import KEY

CONTRACT, COUNTERSIGN, DONE, ABORT, ENDED = "contract", "countersign", "done", "abort", "ended"
KINDS = frozenset({CONTRACT, COUNTERSIGN, DONE, ABORT, ENDED, *heads.KINDS, PASSPORT, KEY})

REFUSALS = {
    "contract": "cannot run this contract: another release, or a stage it does not have",
    "policy": "does not allow it",
}
"""Why a participant refuses; all it says to the others."""

OWN_WORDS = frozenset(
    {"not_deterministic", "sum", "sum_is_noise", "sum_lost", "survivors_changed", "below_quorum"}
    | {"peer_absent", "columns_differ", "cancelled", "equivocation"}
)
"""Codes whose message the daemon made of its own values, without a word of a worker (which may be anybody's data):
others may read it. Of all others they read what the code means."""

MAX_COLUMNS_BYTES = 24 * 1024
Short = Annotated[str, msgspec.Meta(max_length=500)]


class State(StrEnum):
    PROPOSED = "proposed"
    AGREED = "agreed"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Event(StrEnum):
    AGREE = "agreed"
    START = "started"
    FINISH = "done"
    FAIL = "failed"
    CANCEL = "cancelled"


_ENDS = {Event.FAIL: State.FAILED, Event.CANCEL: State.CANCELLED}
TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    State.PROPOSED: {Event.AGREE: State.AGREED, **_ENDS},
    State.AGREED: {Event.START: State.RUNNING, Event.FINISH: State.DONE, **_ENDS},  # done: no role in any stage
    State.RUNNING: {Event.FINISH: State.DONE, **_ENDS},
    State.DONE: {},
    State.FAILED: {},
    State.CANCELLED: {},
}
TERMINAL = frozenset(state for state, moves in TRANSITIONS.items() if not moves)


def step(state: State, event: Event) -> State:
    """The state after an event. LocalProtocolError for one that cannot happen there."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise LocalProtocolError(f"a job that is {state} cannot be {event}") from None


# what the participants say


class Brought(codec.Record, frozen=True):
    """A dataset I bring. The columns are told only where members must have the same ones; "" and () otherwise."""

    dataset: str
    commitment: Digest
    """Of the snapshot: the owner cannot exchange the data later, the others cannot recognize it."""
    columns_digest: Annotated[bytes, msgspec.Meta(max_length=32)]
    columns: tuple[tuple[str, str], ...]
    """(name, kind) in order, the id column left out; () when there are too many to list."""
    label: str


class Answer(codec.Record, frozen=True):
    approved: bool
    reason: str
    """A key of REFUSALS, "" when approved."""
    data: tuple[Brought, ...]
    aes: bool = False
    """its processor does AES: where that of all does, masks are AEGIS streams, elsewhere ChaCha20"""


class Abort(codec.Record, frozen=True):
    code: Annotated[str, msgspec.Meta(max_length=40)]
    message: Short


class Done(codec.Record, frozen=True):
    histories: tuple[tuple[str, Digest], ...]
    """(stage, history hash) of the stages I had a role in."""
    outputs: tuple[tuple[str, str, Digest], ...]
    """(stage, output, digest) of what must be equal at all."""


class Ended(codec.Record, frozen=True):
    """How it ended here. Who did not hear the cause itself (from a peer it is not connected with) hears it so."""

    event: Event
    code: Annotated[str, msgspec.Meta(max_length=40)]
    message: Short
    peer: Annotated[str, msgspec.Meta(max_length=64)]
    """The name of whose fault or wish it was, "" when done or when our own."""


def brought(
    dataset: str, version: bytes, salt: bytes, columns: Sequence[tuple[str, str]], label: str, *, told: bool
) -> Brought:
    """What I say of a dataset; `told`: its columns are to be compared with the other members'."""
    commitment = hash_("fp.data", salt, version)
    if not told:
        return Brought(dataset, commitment, b"", (), "")
    listed = tuple(columns)
    encoded = codec.encode([listed, label])
    return Brought(
        dataset, commitment, hash_("fp.columns", encoded), listed if len(encoded) <= MAX_COLUMNS_BYTES else (), label
    )


def abort_of(error: FedpeerError) -> Abort:
    """What the others may know of why I end the job. Whatever a policy found, they read that there is one."""
    if isinstance(error, PolicyError) and not isinstance(error, GateClosed):
        error = PolicyError()
    words = error.message if error.code in OWN_WORDS else type(error)().message
    return Abort(error.code, words[:500])


def ended_of(verdict: Verdict, failure: FedpeerError | None, me: str) -> Ended:
    """What I say of the end. `failure`: what ended it here, if it did; `me`: my name."""
    error = verdict.error
    if error is None:
        return Ended(verdict.event, "", "", "")
    if error is failure:
        told = abort_of(error)
        return Ended(verdict.event, told.code, f"{me} ended the job: {told.message}"[:500], me)
    return Ended(verdict.event, error.code, error.message[:500], error.peer[:64])


@dataclass
class Heard:
    """What was said so far: peer id → record."""

    answers: dict[str, Answer] = field(default_factory=dict)
    dones: dict[str, Done] = field(default_factory=dict)
    aborts: dict[str, Abort] = field(default_factory=dict)
    ended: dict[str, Ended] = field(default_factory=dict)


# what follows from it


def agreed(contract: Contract, heard: Heard) -> bool:
    return all(peer in heard.answers and heard.answers[peer].approved for peer in contract.peers)


def waiting_for(contract: Contract, heard: Heard, state: State, me: str, absent: Callable[[str], bool]) -> list[str]:
    """The peers on whom it depends that the job goes on."""
    match state:
        case State.PROPOSED:
            return [peer for peer in contract.peers if peer not in heard.answers]
        case State.AGREED | State.RUNNING:
            if me in heard.dones:
                return [peer for peer in contract.peers if peer not in heard.dones]
            return [peer for peer in contract.peers if peer != me and absent(peer)]
    return []


@dataclass(frozen=True)
class Verdict:
    """How a job ended: without an error it is done."""

    event: Event
    error: FedpeerError | None = None


def judge(
    contract: Contract,
    heard: Heard,
    now: int,
    failure: FedpeerError | None,
    common: Sequence[tuple[str, str]],
    name_of: Callable[[str], str],
    gone: Collection[str] = (),
) -> Verdict | None:
    """The end of a job, None while it lives. `failure`: what ended it here; `common`: outputs that must be equal.

    `gone`: peers that are away for too long to be waited for, when most of the participants have ended.
    """
    peers = contract.peers
    left_out = [peer for peer in peers if peer in gone and peer not in heard.dones]
    if 2 * len(heard.dones) > len(peers) and all(peer in heard.dones for peer in peers if peer not in left_out):
        try:
            compare_results(contract, heard.dones, common, name_of)
        except NotEqual as error:
            return Verdict(Event.FAIL, error)
        return Verdict(Event.FINISH)
    if isinstance(failure, Cancelled):
        return Verdict(Event.CANCEL, failure)
    if failure is not None:
        return Verdict(Event.FAIL, failure)
    for peer in peers:
        if peer in heard.aborts:
            abort, name = heard.aborts[peer], name_of(peer)
            if abort.code == Cancelled.code:
                return Verdict(Event.CANCEL, Cancelled(f"{name} cancelled the job", peer=name))
            hint = "" if abort.code in OWN_WORDS else f"what exactly is shown at {name} only: fedpeer job show"
            return Verdict(
                Event.FAIL, by_code(abort.code)(f"{name} ended the job: {abort.message}", hint=hint, peer=name)
            )
    for peer in peers:
        answer = heard.answers.get(peer)
        if answer is not None and not answer.approved:
            why = REFUSALS.get(answer.reason, "refuses for a reason of a newer release")
            kind = PolicyError if answer.reason == "policy" else JobError
            return Verdict(Event.FAIL, kind(f"{name_of(peer)} {why}", peer=name_of(peer)))
    for ended in (heard.ended[peer] for peer in peers if peer in heard.ended):
        if ended.event is not Event.FINISH:
            heard_of = by_code(ended.code)(ended.message, peer=ended.peer)
            return Verdict(Event.CANCEL if ended.event is Event.CANCEL else Event.FAIL, heard_of)
    if now >= contract.expires + SKEW_S:
        late = [name_of(peer) for peer in peers if peer not in heard.answers] or [
            name_of(peer) for peer in peers if peer not in heard.dones
        ]
        return Verdict(Event.FAIL, JobError(f"the contract expired; it still waited for {', '.join(late)}"))
    return None


def has_common_columns(entry: StageEntry, role: str) -> bool:
    """Whether the holders of this role tell each other their columns, which must be the same.

    Guests and hosts have columns of their own, and so has everybody in a local stage, which has no messages.
    """
    return role == "member" and not entry.run.startswith("local.")


def compare_columns(contract: Contract, answers: Mapping[str, Answer], name_of: Callable[[str], str]) -> None:
    """Before anything is computed: members of a stage bring the same columns. Raises ColumnsDiffer."""
    data = {(peer, item.dataset): item for peer, answer in answers.items() for item in answer.data}
    for entry in contract.stages:
        first: dict[str, tuple[str, Brought]] = {}
        for alias, role in entry.roles:
            for port, source in entry.sources(alias).items() if has_common_columns(entry, role) else ():
                peer = contract.peer_of[alias]
                item = data.get((peer, source.removeprefix("dataset:")))
                if not source.startswith("dataset:"):
                    continue
                if item is None:
                    raise ColumnsDiffer(f"{name_of(peer)} did not say which columns it brings to stage {entry.id!r}")
                one, other = first.setdefault(port, (peer, item))
                if other.columns_digest != item.columns_digest:
                    raise ColumnsDiffer(
                        f"stage {entry.id!r}: {_difference(name_of(one), other, name_of(peer), item)}",
                        hint="give the columns the same names, kinds and order at all participants",
                        peer=name_of(peer),
                    )


def _difference(one: str, a: Brought, other: str, b: Brought) -> str:
    if a.label != b.label:
        return f"the label column is {a.label!r} at {one} and {b.label!r} at {other}"
    mine, theirs = dict(a.columns), dict(b.columns)
    parts = []
    for has, lacks, names in ((one, other, mine.keys() - theirs), (other, one, theirs.keys() - mine)):
        if names and mine and theirs:
            listed = ", ".join(repr(name) for name in sorted(names)[:5]) + (", …" if len(names) > 5 else "")
            parts.append(f"{has} has {listed}, which {lacks} has not")
    parts += [
        f"{name!r} is {mine[name]} at {one} and {theirs[name]} at {other}"
        for name in mine
        if name in theirs and mine[name] != theirs[name]
    ]
    return "; ".join(parts[:6]) or f"{one} and {other} have the columns in another order, or too many to list here"


def compare_results(
    contract: Contract,
    dones: Mapping[str, Done],
    common: Sequence[tuple[str, str]],
    name_of: Callable[[str], str],
) -> None:
    """At the end: equal histories, and equal bytes of what must be equal. Raises NotEqual naming who differs."""
    histories = {(peer, stage): digest for peer, done in dones.items() for stage, digest in done.histories}
    outputs = {(peer, stage, name): digest for peer, done in dones.items() for stage, name, digest in done.outputs}
    for entry in contract.stages:
        holders = [peer for alias, _ in entry.roles if (peer := contract.peer_of[alias]) in dones]
        _all_equal({peer: histories.get((peer, entry.id)) for peer in holders}, f"stage {entry.id!r}", name_of)
        for stage, name in common:
            if stage == entry.id:
                made = {peer: outputs.get((peer, stage, name)) for peer in holders}
                _all_equal(made, f"the output {stage}.{name}", name_of)


def _all_equal(digests: Mapping[str, bytes | None], what: str, name_of: Callable[[str], str]) -> None:
    values = list(digests.values())
    usual = max(values, key=values.count)
    odd = [name_of(peer) for peer, digest in digests.items() if digest != usual]
    if odd or usual is None:
        raise NotEqual(f"{what} came out differently at {', '.join(odd) or 'all'}", peer=", ".join(odd))
