"""THE table of what an operator can ask of a daemon. The HTTP routes, the client and the command line are made from it.

A command is one row: a name (noun.verb), an HTTP method and path, its typed arguments, and a function on the daemon's
parts whose docstring is the help. To add one: write the arguments and the function, and add the row; the route and
`Client.call(name, …)` are there, and tests/admin fails until the command line has the verb.

Rules
* GET changes nothing, and is dropped when whoever asked has gone. Everything else is carried through to its end.
* Arguments in braces are part of the path; the others are the query of a GET or DELETE, else the JSON body. Unknown
  ones are refused. `ref` is a name, an id, or a prefix of an id that only one thing has.
* An answer is a record or a list of records (JSON), or text of the row's `media`. Errors are FedpeerErrors.

This page is imported by the client and the command line too, so at run time it imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import msgspec

from fedpeer.admin import caller
from fedpeer.config import nearest
from fedpeer.errors import ConfigError, NotFound, StoreError, UsageError

if TYPE_CHECKING:
    from fedpeer.config import Config
    from fedpeer.data.catalog import Catalog, DatasetView
    from fedpeer.data.offers import OffersView
    from fedpeer.events import Events
    from fedpeer.governance.audit import Entry
    from fedpeer.governance.passport import File
    from fedpeer.identity import Card, Identity
    from fedpeer.jobs.dryrun.service import DryRunView
    from fedpeer.jobs.service import Jobs
    from fedpeer.jobs.views import (
        ApprovalsView,
        DecisionView,
        JobView,
        LogLine,
        ModelView,
        ReviewView,
        StandingView,
    )
    from fedpeer.mesh.connections.service import Connections
    from fedpeer.mesh.roster import PeerView
    from fedpeer.mesh.service import Mesh
    from fedpeer.store import Record, Store, Transaction

JSON = "application/json"
CSV = "text/csv; charset=utf-8"
LINES = "application/x-ndjson"
EVENTS_PATH = "/v1/events"
METRICS_PATH = "/metrics"
UNFINISHED = ("proposed", "agreed", "running")


class Daemon(Protocol):
    """The parts of a daemon that commands work on (fedpeer/daemon.py is one)."""

    config: Config
    identity: Identity
    name: str
    started_at: datetime
    now: Callable[[], datetime]
    events: Events
    store: Store
    connections: Connections
    mesh: Mesh
    catalog: Catalog
    jobs: Jobs

    def record(self, event: str) -> Record:
        """What appends this event, and who asked for it, to the audit log in the transaction it is about."""
        ...

    async def use_policy(self) -> None: ...


# arguments


class Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """None."""


Word = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class Ref(Arguments, frozen=True):
    ref: Word


class NewPeer(Arguments, frozen=True):
    card: Annotated[str, msgspec.Meta(max_length=8192)]


class NewDataset(Arguments, frozen=True):
    name: Word
    uri: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
    id: str | None = None
    label: str | None = None
    text: Annotated[list[str], msgspec.Meta(max_length=4096)] = []
    """columns to be read as text whatever their cells look like"""
    secret: Word | None = None
    """the name of the database's password"""
    offered: bool = False
    """whether partners who ask are told of it"""


class Offering(Ref, frozen=True):
    offered: bool


class Removal(Ref, frozen=True):
    forget: bool = False
    """whether the tables of it that answers were from are forgotten, too"""


class NewJob(Arguments, frozen=True):
    text: Annotated[str, msgspec.Meta(max_length=256 * 1024)]
    """the TOML of a contract"""


class NewPolicy(Arguments, frozen=True):
    text: Annotated[str, msgspec.Meta(max_length=64 * 1024)]
    """the TOML of a policy"""
    after: int | None = None
    """the number of the policy that it was made from: refused if another was set meanwhile"""


class NewApproval(Arguments, frozen=True):
    ref: Word
    always: Annotated[int, msgspec.Meta(ge=0, le=2)] = 0
    """0 once, 1 every job like it, 2 also on other rows of the same datasets"""


class Denial(Arguments, frozen=True):
    ref: Word
    reason: Annotated[str, msgspec.Meta(max_length=500)] = ""
    """for the own log"""


class Numbered(Arguments, frozen=True):
    number: int


class Prediction(Arguments, frozen=True):
    ref: Word
    dataset: Word


EntryNumber = Annotated[int, msgspec.Meta(ge=0)]


class SomeEntries(Arguments, frozen=True):
    job: str = ""
    """of one job: its id, a prefix of it, or its name"""
    since: EntryNumber = 0
    """0: the last ones"""
    limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100


class OneEntry(Arguments, frozen=True):
    number: EntryNumber


class Since(Arguments, frozen=True):
    since: EntryNumber = 0
    """0: what stands before the entries"""
    redacted: bool = False
    """whether hashes stand for the entries"""


# answers that no part has already


class CardView(msgspec.Struct, kw_only=True):
    id: str
    name: str
    fingerprint: str
    """twelve words, to be compared by voice"""
    card: str
    """the line to give to the others"""


class WaitingView(msgspec.Struct, kw_only=True):
    """A policy that one person has set, where the one that counts says two_person."""

    uid: int
    text: str
    time: str


class PolicyView(msgspec.Struct, kw_only=True):
    number: int
    """0: the default, which nobody set"""
    text: str
    uid: int | None
    """of who set it"""
    time: str
    waiting: list[WaitingView] = []
    """for a second person who sets the same text"""
    doubts: list[str] = []
    """what it names and is not there, a sentence each"""


class AccountView(msgspec.Struct, kw_only=True):
    """What a partner was told of a dataset in the last year."""

    dataset: str
    partner: str
    """peer id"""
    name: str
    epsilon: float
    left: float | None
    """of epsilon; None: no limit"""
    delta: float
    stages: int
    last: str


class ChargeView(msgspec.Struct, kw_only=True):
    time: str
    job: str
    """the contract's id"""
    stage: str
    run: str
    partner: str
    name: str
    epsilon: float
    delta: float


class BudgetView(msgspec.Struct, kw_only=True):
    """`per_year`, `per_job`: of epsilon, None without a limit; `charges`: all that were ever made, oldest first."""

    dataset: str
    remembered: int
    """tables of it that answers were from, so that no other tells a row by difference"""
    most_remembered: int
    per_year: float | None
    per_job: float | None
    accounts: list[AccountView]
    charges: list[ChargeView]


class StatusView(msgspec.Struct, kw_only=True):
    name: str
    id: str
    fingerprint: str
    version: str
    home: str
    started: str
    listening: list[str]
    addresses: list[str]
    peers: int
    connected: int
    jobs: int
    """jobs that have not ended"""
    datasets: int
    sandbox: str
    """what holds a worker on this machine, and what is missing"""
    bytes_sent: int
    bytes_received: int
    """on sockets to peers, since the start"""


class EntryView(msgspec.Struct, kw_only=True):
    number: int
    time: str
    event: str
    job: str
    """the contract's id, "" if it concerns none"""
    facts: dict[str, Any]


# what is done


async def status(daemon: Daemon, _: Arguments) -> StatusView:
    """Who this peer is, whom it is connected with, and what it is doing."""
    from fedpeer.worker import sandbox

    sent, received = daemon.connections.traffic()
    peers = daemon.connections.peers()
    return StatusView(
        name=daemon.name,
        id=daemon.identity.id,
        fingerprint=daemon.connections.card.fingerprint,
        version=importlib.metadata.version("fedpeer"),
        home=str(daemon.config.home),
        started=daemon.started_at.isoformat(timespec="seconds"),
        listening=list(daemon.connections.listening),
        addresses=list(daemon.config.addresses),
        peers=len(peers),
        connected=sum(peer.connected for peer in peers),
        jobs=sum(job.state in UNFINISHED for job in await daemon.jobs.list()),
        datasets=len(await daemon.catalog.list()),
        sandbox=sandbox.probe().text,
        bytes_sent=sent,
        bytes_received=received,
    )


def view_of_card(card: Card) -> CardView:
    return CardView(id=card.id, name=card.name, fingerprint=card.fingerprint, card=card.text)


async def card_show(daemon: Daemon, _: Arguments) -> CardView:
    """Print the own card, the line that other organizations add, and its fingerprint in words."""
    return view_of_card(daemon.connections.card)


async def peer_add(daemon: Daemon, ask: NewPeer) -> PeerView:
    """Add another organization's card: text, a file, or - for standard input."""
    return await daemon.connections.add_peer(ask.card, record=daemon.record("peer_added"))


async def peer_list(daemon: Daemon, _: Arguments) -> list[PeerView]:
    """List the peers of the roster."""
    return daemon.connections.peers()


async def peer_show(daemon: Daemon, ask: Ref) -> PeerView:
    """Show one peer: its fingerprint, addresses, and why it is not connected."""
    return daemon.connections.peer(ask.ref)


async def peer_ping(daemon: Daemon, ask: Ref) -> dict[str, Any]:
    """Measure the round trip to a connected peer."""
    peer = daemon.connections.peer(ask.ref)
    return {"id": peer.id, "name": peer.name, "seconds": await daemon.connections.ping(peer.id)}


async def peer_datasets(daemon: Daemon, ask: Ref) -> OffersView:
    """Ask a connected peer what it offers: names, columns, about how many rows. Never values."""
    from fedpeer.data import offers

    return offers.view(daemon.connections.peer(ask.ref).name, await daemon.mesh.datasets_of(ask.ref))


async def peer_remove(daemon: Daemon, ask: Ref) -> PeerView:
    """Take a peer off the roster and end the session with it."""
    return await daemon.connections.remove_peer(ask.ref, record=daemon.record("peer_removed"))


async def dataset_add(daemon: Daemon, ask: NewDataset) -> DatasetView:
    """Register a table of this peer (CSV, Parquet, a database) under a name. It is read once, and nothing leaves."""
    return await daemon.catalog.add(
        ask.name,
        ask.uri,
        ask.id,
        ask.label,
        text=ask.text,
        secret=ask.secret,
        offered=ask.offered,
        record=daemon.record("dataset_added"),
    )


async def dataset_list(daemon: Daemon, _: Arguments) -> list[DatasetView]:
    """List the datasets of this peer."""
    return await daemon.catalog.list()


async def dataset_show(daemon: Daemon, ask: Ref) -> DatasetView:
    """Show one dataset: its source, rows and columns."""
    return await daemon.catalog.get(ask.ref)


async def dataset_offer(daemon: Daemon, ask: Offering) -> DatasetView:
    """Tell partners who ask of a dataset from now on: its columns, and about how many rows; or tell them no more."""
    return await daemon.catalog.offer(ask.ref, ask.offered, record=daemon.record("dataset_offered"))


async def dataset_remove(daemon: Daemon, ask: Removal) -> None:
    """Forget a dataset. Its file stays where it is."""
    from fedpeer.governance import answered

    record = daemon.record("dataset_removed")

    def removed(tx: Transaction, facts: dict[str, Any]) -> None:
        forgot = {"forgot": answered.forget(tx, ask.ref)} if ask.forget else {}
        record(tx, {**facts, **forgot})

    await daemon.catalog.remove(ask.ref, record=removed)


async def job_submit(daemon: Daemon, ask: NewJob) -> JobView:
    """Propose the contract in a TOML file to its participants; prints the id of the job."""
    return await daemon.jobs.submit(ask.text, caller.current())


async def job_dry_run(daemon: Daemon, ask: NewJob) -> DryRunView:
    """Try a contract on synthetic twins of the datasets, with simulated partners, on this machine alone."""
    return await daemon.jobs.dry_run(ask.text)


async def job_list(daemon: Daemon, _: Arguments) -> list[JobView]:
    """List the jobs this peer takes part in."""
    return await daemon.jobs.list()


async def job_show(daemon: Daemon, ask: Ref) -> JobView:
    """Show one job: who has agreed, its stages, its results."""
    return await daemon.jobs.get(ask.ref)


async def job_wait(daemon: Daemon, ask: Ref) -> JobView:
    """Wait until a job has ended; the exit code tells how. For scripts."""
    return await daemon.jobs.wait(ask.ref)


async def job_logs(daemon: Daemon, ask: Ref) -> list[LogLine]:
    """Print what happened in a job."""
    return await daemon.jobs.logs(ask.ref)


async def job_cancel(daemon: Daemon, ask: Ref) -> JobView:
    """End a job for all its participants."""
    return await daemon.jobs.cancel(ask.ref)


async def job_review(daemon: Daemon, ask: Ref) -> ReviewView:
    """Show what a job asks of this peer: what runs on which columns, what it tells, what it costs, what is new."""
    return await daemon.jobs.approvals.review(ask.ref)


async def job_approve(daemon: Daemon, ask: NewApproval) -> JobView:
    """Approve a job that asks for it, after showing what it would do."""
    return await daemon.jobs.approvals.approve(ask.ref, caller.current(), always=ask.always)


async def job_deny(daemon: Daemon, ask: Denial) -> JobView:
    """Refuse a job that asks. The others read so when the time to answer is over, and never why."""
    return await daemon.jobs.approvals.deny(ask.ref, caller.current(), reason=ask.reason)


async def approvals_list(daemon: Daemon, _: Arguments) -> ApprovalsView:
    """List the jobs that wait for this peer's operators, and the standing approvals."""
    return await daemon.jobs.approvals.list()


async def approvals_revoke(daemon: Daemon, ask: Numbered) -> StandingView:
    """Take a standing approval back, by its number; jobs that it approved go on."""
    return await daemon.jobs.approvals.revoke(ask.number, caller.current(), record=daemon.record("approval_revoked"))


async def policy_show(daemon: Daemon, _: Arguments) -> PolicyView:
    """Print the policy of this peer: what may be computed on its data. Without one, the commented defaults."""
    return await _doubted(daemon, await daemon.store.read(_policy))


async def policy_set(daemon: Daemon, ask: NewPolicy) -> PolicyView:
    """Replace the policy of this peer by the text of a file, or of - for standard input; two must where it says so."""
    from fedpeer.governance import policy

    by, now = caller.current(), daemon.now().astimezone(UTC).isoformat(timespec="milliseconds")
    uid = os.geteuid() if by is None else by.uid
    set_, waits = daemon.record("policy_set"), daemon.record("policy_waits")

    def keep(tx: Transaction) -> PolicyView:
        kept = policy.keep(tx, ask.text, uid, now, ask.after)
        if kept is None:
            waits(tx, {"text": ask.text})
        else:
            set_(tx, {"policy": kept.number, "text": ask.text})
        return _policy(tx)

    view = await daemon.store.write(keep)
    await daemon.use_policy()
    return await _doubted(daemon, view)


async def _doubted(daemon: Daemon, view: PolicyView) -> PolicyView:
    """The view with what looks like a slip of the pen in it, or in a text that waits."""
    from fedpeer import stage
    from fedpeer.governance import policy
    from fedpeer.governance.doubts import doubts

    roster = daemon.connections.roster
    partners = {word for card in roster for word in (card.name, card.id)}
    datasets = [dataset.name for dataset in await daemon.catalog.list()]
    for text in (view.text, *(one.text for one in view.waiting)):
        with contextlib.suppress(ConfigError):  # it was written by another release
            read = policy.parse(text)
            found = doubts(read, partners=partners, datasets=datasets, modules=stage.algorithms())
            if read.two_person and not caller.others_may_control():
                found.append(
                    f"two_person: only you and root may control this daemon; add another to the group {caller.GROUP}"
                )
            view.doubts += [one for one in found if one not in view.doubts]
    return view


def _policy(tx: Transaction) -> PolicyView:
    from fedpeer.governance import policy

    waiting = [WaitingView(**msgspec.structs.asdict(one)) for one in policy.waiting(tx)]
    return PolicyView(**msgspec.structs.asdict(policy.kept(tx)), waiting=waiting)


async def policy_test(daemon: Daemon, ask: NewJob) -> DecisionView:
    """Show what the policy says to a contract, and why. Nothing is sent and nothing counts."""
    return await daemon.jobs.test_policy(ask.text)


async def budget_list(daemon: Daemon, _: Arguments) -> list[AccountView]:
    """List what partners were told of each dataset in the last year, as differential privacy counts it."""
    return await daemon.store.read(lambda tx: _accounts(tx, daemon, None))


async def budget_show(daemon: Daemon, ask: Ref) -> BudgetView:
    """Show the privacy budget of a dataset: what a year and a job may cost, and every charge."""
    from fedpeer.data.source import identity
    from fedpeer.governance import answered, budget, policy

    dataset = await daemon.catalog.get(ask.ref)
    source = identity(dataset.uri)

    def look(tx: Transaction) -> BudgetView:
        limits = policy.current(tx).budget
        return BudgetView(
            dataset=dataset.name,
            remembered=answered.remembered(tx, dataset.name),
            most_remembered=answered.MAX_ANSWERS,
            per_year=_finite(limits.epsilon),
            per_job=_finite(limits.per_job),
            accounts=_accounts(tx, daemon, dataset.name, source),
            charges=[
                ChargeView(
                    time=_time(charge.time),
                    job=charge.contract.hex(),
                    stage=charge.stage,
                    run=charge.run,
                    partner=charge.partner,
                    name=daemon.connections.roster.name_of(charge.partner),
                    epsilon=charge.cost.epsilon / budget.EPSILON_UNITS,
                    delta=charge.cost.delta / budget.DELTA_UNITS,
                )
                for charge in budget.all_charges(tx, dataset.name, source)
            ],
        )

    return await daemon.store.read(look)


def _accounts(tx: Transaction, daemon: Daemon, dataset: str | None, source: str = "") -> list[AccountView]:
    from fedpeer.governance import budget, policy

    limit, since = policy.current(tx).budget.epsilon, int(daemon.now().timestamp()) - budget.YEAR_S
    return [
        AccountView(
            dataset=account.dataset,
            partner=account.partner,
            name=daemon.connections.roster.name_of(account.partner),
            epsilon=(epsilon := account.spent.epsilon / budget.EPSILON_UNITS),
            left=_finite(max(limit - epsilon, 0.0)),
            delta=account.spent.delta / budget.DELTA_UNITS,
            stages=account.stages,
            last=_time(account.last),
        )
        for account in budget.accounts(tx, since, dataset, source)
    ]


def _finite(amount: float) -> float | None:
    return None if math.isinf(amount) else amount


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


async def model_list(daemon: Daemon, _: Arguments) -> list[ModelView]:
    """List the models that jobs left at this peer."""
    return await daemon.jobs.models.list()


async def model_show(daemon: Daemon, ask: Ref) -> ModelView:
    """Show one model: where it is from and what it says of itself."""
    return await daemon.jobs.models.get(ask.ref)


async def model_predict(daemon: Daemon, ask: Prediction) -> bytes:
    """Predict the rows of a dataset of this peer with a model, as CSV. Nothing leaves this peer."""
    import pyarrow as pa
    import pyarrow.csv

    table = await daemon.jobs.models.predict(ask.ref, ask.dataset)
    sink = pa.BufferOutputStream()
    pyarrow.csv.write_csv(table, sink, pyarrow.csv.WriteOptions(quoting_style="needed"))
    return bytes(sink.getvalue())


async def model_passport(daemon: Daemon, ask: Ref) -> File:
    """Show where a model is from: contract, contributors, rounds, privacy spent; signed by all who made it."""
    return await daemon.jobs.models.passport(ask.ref)


async def audit_list(daemon: Daemon, ask: SomeEntries) -> list[EntryView]:
    """List entries of the audit log, oldest first: what was decided and done here."""
    from fedpeer.governance import audit

    known = re.fullmatch("[0-9a-f]{64}|", ask.job)  # a whole id: perhaps of a job that is forgotten here
    job = bytes.fromhex(ask.job if known else (await daemon.jobs.get(ask.job)).id)
    found = await daemon.store.read(lambda tx: audit.entries(tx, job=job, since=ask.since, limit=ask.limit))
    return [_entry(entry) for entry in found]


async def audit_show(daemon: Daemon, ask: OneEntry) -> EntryView:
    """Show one entry of the audit log."""
    from fedpeer.governance import audit

    entry = await daemon.store.read(lambda tx: audit.find(tx, ask.number))
    if entry is None:
        raise NotFound(f"the audit log has no entry {ask.number}", hint="fedpeer audit list")
    return _entry(entry)


async def audit_export(daemon: Daemon, ask: Since) -> bytes:
    """Write the whole audit log to a file that verifies elsewhere: entries, signed heads, co-signatures, cards."""
    from fedpeer.governance import export

    card = daemon.connections.card
    return await daemon.store.read(lambda tx: export.page(tx, card.id, card.text, ask.since, redacted=ask.redacted))


async def audit_accept(daemon: Daemon, ask: Ref) -> dict[str, Any]:
    """Co-sign a peer's audit log again, as it is from now on, after it was restored from an old copy."""
    from fedpeer.governance import heads

    peer, record = daemon.connections.peer(ask.ref), daemon.record("history_accepted")

    def accept(tx: Transaction) -> int:
        known = max((number for number, _ in heads.accept(tx, peer.id)), default=0)
        record(tx, {"peer": peer.id, "name": peer.name, "known": known})
        return known

    return {"id": peer.id, "name": peer.name, "known": await daemon.store.write(accept)}


def _entry(entry: Entry) -> EntryView:
    return EntryView(number=entry.number, time=entry.time, event=entry.event, job=entry.job.hex(), facts=entry.facts)


async def health_live(_daemon: Daemon, _: Arguments) -> dict[str, bool]:
    """Whether the daemon answers at all."""
    return {"live": True}


async def health_ready(daemon: Daemon, _: Arguments) -> dict[str, bool]:
    """Whether it listens where it should and its store can be read."""
    if daemon.config.listen and not daemon.connections.listening:
        raise StoreError("the mesh does not listen yet")
    await daemon.store.read(lambda transaction: transaction.one("SELECT 1"))
    return {"ready": True}


# the table


@dataclass(frozen=True)
class Command:
    """One row. `timeout_s` is how long a client waits for the answer, None: as long as it takes."""

    name: str
    method: str
    path: str
    arguments: type[Arguments]
    handler: Callable[[Any, Any], Awaitable[Any]]
    timeout_s: float | None = 30.0
    media: str = JSON

    @property
    def help(self) -> str:
        return self.handler.__doc__ or ""

    @property
    def in_path(self) -> tuple[str, ...]:
        """The names of the arguments that are part of the path."""
        return tuple(re.findall(r"\{(\w+)\}", self.path))

    def check(self, given: Mapping[str, Any]) -> Arguments:
        """The typed arguments. Raises UsageError naming the one that is unknown, missing or of another type."""
        known = list(self.arguments.__struct_fields__)
        for name in given:
            if name not in known:
                raise UsageError(f"{self.name} has no argument {name!r}", hint=nearest(name, known) if known else "")
        try:
            return msgspec.convert(given, self.arguments, strict=False)  # not strict: a query has text only
        except msgspec.ValidationError as error:
            raise UsageError(f"{self.name}: {error}") from None


COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command("status", "GET", "/v1/status", Arguments, status),
        Command("card", "GET", "/v1/card", Arguments, card_show),
        Command("peer.add", "POST", "/v1/peers", NewPeer, peer_add),
        Command("peer.list", "GET", "/v1/peers", Arguments, peer_list),
        Command("peer.show", "GET", "/v1/peers/{ref}", Ref, peer_show),
        Command("peer.ping", "GET", "/v1/peers/{ref}/ping", Ref, peer_ping),
        Command("peer.datasets", "GET", "/v1/peers/{ref}/datasets", Ref, peer_datasets),
        Command("peer.remove", "DELETE", "/v1/peers/{ref}", Ref, peer_remove),
        Command("dataset.add", "POST", "/v1/datasets", NewDataset, dataset_add, timeout_s=None),
        Command("dataset.list", "GET", "/v1/datasets", Arguments, dataset_list),
        Command("dataset.show", "GET", "/v1/datasets/{ref}", Ref, dataset_show),
        Command("dataset.offer", "POST", "/v1/datasets/{ref}/offer", Offering, dataset_offer),
        Command("dataset.remove", "DELETE", "/v1/datasets/{ref}", Removal, dataset_remove),
        Command("job.submit", "POST", "/v1/jobs", NewJob, job_submit),
        Command("job.dry-run", "POST", "/v1/dry-runs", NewJob, job_dry_run, timeout_s=None),
        Command("job.list", "GET", "/v1/jobs", Arguments, job_list),
        Command("job.show", "GET", "/v1/jobs/{ref}", Ref, job_show),
        Command("job.wait", "GET", "/v1/jobs/{ref}/wait", Ref, job_wait, timeout_s=None),
        Command("job.logs", "GET", "/v1/jobs/{ref}/logs", Ref, job_logs),
        Command("job.cancel", "POST", "/v1/jobs/{ref}/cancel", Ref, job_cancel),
        Command("job.review", "GET", "/v1/jobs/{ref}/review", Ref, job_review, timeout_s=None),
        Command("job.approve", "POST", "/v1/jobs/{ref}/approve", NewApproval, job_approve, timeout_s=None),
        Command("job.deny", "POST", "/v1/jobs/{ref}/deny", Denial, job_deny),
        Command("approvals.list", "GET", "/v1/approvals", Arguments, approvals_list),
        Command("approvals.revoke", "DELETE", "/v1/approvals/{number}", Numbered, approvals_revoke),
        Command("policy.show", "GET", "/v1/policy", Arguments, policy_show),
        Command("policy.set", "POST", "/v1/policy", NewPolicy, policy_set),
        Command("policy.test", "POST", "/v1/policy/test", NewJob, policy_test, timeout_s=None),
        Command("budget.list", "GET", "/v1/budget", Arguments, budget_list),
        Command("budget.show", "GET", "/v1/budget/{ref}", Ref, budget_show),
        Command("model.list", "GET", "/v1/models", Arguments, model_list),
        Command("model.show", "GET", "/v1/models/{ref}", Ref, model_show),
        Command(
            "model.predict", "GET", "/v1/models/{ref}/predict", Prediction, model_predict, timeout_s=None, media=CSV
        ),
        Command("model.passport", "GET", "/v1/models/{ref}/passport", Ref, model_passport),
        Command("audit.list", "GET", "/v1/audit", SomeEntries, audit_list),
        Command("audit.export", "GET", "/v1/audit/export", Since, audit_export, media=LINES),
        Command("audit.accept", "POST", "/v1/audit/accept/{ref}", Ref, audit_accept),
        Command("audit.show", "GET", "/v1/audit/{number}", OneEntry, audit_show),
        Command("health.live", "GET", "/v1/health/live", Arguments, health_live),
        Command("health.ready", "GET", "/v1/health/ready", Arguments, health_ready),
    )
}
