"""The privacy budget: what noisy answers about a dataset told each partner, and how much more it may learn in a year.

Rules
* A charge is a row by (contract, stage, dataset, partner). It is written in the transaction that starts the stage, and
  the stage's worker runs after that is on disk: nothing leaves that is not charged. A stage that is started again finds
  its row and is charged once.
* Whether it can be paid is asked in the same transaction, and there is one writer: two jobs never spend the same rest.
* Everybody in the stage reads the answer, so each of the others is charged; all of them or, with BudgetSpent, none.
* Peers that the policy knows as one organization have one budget, for they may tell each other; also those that left
  the roster, by the name that they had when they were told.
* A charge is never taken back: a job that failed may have told its answer. So a crash can cost a job that tells
  nothing, and cannot save one that did.
* Charges are added up (basic composition), which is more than was lost: `event` says what ran with which noise, so that
  a sharper account can be made of old charges later.
* Privacy is counted in whole units, rounded up: sums are exact, whoever adds them and in whatever order.
* The delta of a year is at most 1 / (10 · rows): a delta of 1 / rows could be one row, shown to everybody.
* A dataset is what it is read from, and its name: what is offered under two names has one budget, and so has a name
  of which the source was changed. A copy of a file, or another query, is another source to the book.

Source: Dwork and Roth, The Algorithmic Foundations of Differential Privacy (2014), theorem 3.16 (composition).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Final

import msgspec

from fedpeer.errors import BudgetSpent
from fedpeer.governance import audit
from fedpeer.governance.decision import StageAsk
from fedpeer.governance.policy import Policy
from fedpeer.store import Schema, Transaction

YEAR_S: Final = 365 * 24 * 3600
EPSILON_UNITS: Final = 10**6
"""of epsilon in 1"""
DELTA_UNITS: Final = 10**15
ROWS_PER_DELTA: Final = 10
CHARGED: Final = "charged"
"""The event of a charge in the audit; its facts have the same whole units."""

Organization = frozenset[str]
NameOf = Callable[[str], str]

SCHEMA = Schema(
    "budget",
    [
        """
        CREATE TABLE charge (
            contract BLOB NOT NULL,
            stage TEXT NOT NULL,
            dataset TEXT NOT NULL,
            partner TEXT NOT NULL,          -- peer id
            epsilon INTEGER NOT NULL,       -- millionths
            delta INTEGER NOT NULL,         -- 10^-15
            time INTEGER NOT NULL,          -- seconds since 1970, UTC
            event TEXT NOT NULL,            -- JSON: what ran, for other accountants
            PRIMARY KEY (contract, stage, dataset, partner)
        ) STRICT;
        CREATE INDEX charge_of ON charge (dataset, partner, time);
        """,
        """
        ALTER TABLE charge ADD COLUMN source TEXT NOT NULL DEFAULT ''; -- what the dataset was read from
        CREATE INDEX charge_of_source ON charge (source, partner, time);
        """,
        """
        ALTER TABLE charge ADD COLUMN name TEXT NOT NULL DEFAULT ''; -- of the partner in our roster then
        """,
    ],
)


@dataclass(frozen=True)
class Privacy:
    """(ε, δ) of differential privacy in whole units of 10^-6 and 10^-15."""

    epsilon: int
    delta: int

    @staticmethod
    def of(epsilon: float, delta: float) -> Privacy:
        """As people write it, rounded up to a unit."""
        return Privacy(_units(epsilon, EPSILON_UNITS), _units(delta, DELTA_UNITS))

    def __add__(self, other: Privacy) -> Privacy:
        return Privacy(self.epsilon + other.epsilon, self.delta + other.delta)

    def __str__(self) -> str:
        return f"ε = {self.epsilon / EPSILON_UNITS:g}, δ = {self.delta / DELTA_UNITS:g}"


@dataclass(frozen=True)
class Charge:
    """What one stage tells one partner about one dataset of `rows` rows."""

    contract: bytes
    stage: str
    dataset: str
    rows: int
    partner: str
    cost: Privacy
    event: str
    source: str = ""
    """what the dataset is read from, "" if that is not known"""


@dataclass(frozen=True)
class Charged:
    """A row of the book."""

    contract: bytes
    stage: str
    dataset: str
    partner: str
    cost: Privacy
    time: int
    run: str
    """of the stage"""


@dataclass(frozen=True)
class Account:
    """What a partner was told of a dataset, in so many stages, the last one at the time `last`."""

    dataset: str
    partner: str
    spent: Privacy
    stages: int
    last: int


def of_stage(contract: bytes, ask: StageAsk, me: str) -> list[Charge]:
    """What a stage costs, as it declares it: for all own datasets whose rows come in, each in full, and each of the
    other participants, for all of them read what it tells. Nothing if it adds no noise.
    """
    if ask.cost is None:
        return []
    cost, facts = Privacy.of(*ask.cost), {"run": ask.run, "version": ask.stage.version, "params": ask.params}
    event = msgspec.json.encode(facts, order="sorted").decode()
    return [
        Charge(contract, ask.id, dataset.name, dataset.rows, partner, cost, event, dataset.source)
        for dataset in ask.datasets
        for partner in ask.parties
        if partner != me
    ]


def charge(tx: Transaction, wanted: Iterable[Charge], policy: Policy, time: str, name_of: NameOf = str) -> list[Charge]:
    """Write what is not written yet, with its entry in the audit; that is returned. `time`: ISO 8601 with a zone.

    `name_of`: peer id → its name in our roster, by which the policy may know its organization. Raises BudgetSpent: then
    nothing of the transaction may be committed.
    """
    now = int(datetime.fromisoformat(time).timestamp())
    new = affordable(tx, wanted, policy, now, name_of)
    for c in new:
        row = (c.contract, c.stage, c.dataset, c.partner, c.cost.epsilon, c.cost.delta, now, c.event, c.source)
        tx.execute("INSERT INTO charge VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, name_of(c.partner)))
        facts = {"stage": c.stage, "dataset": c.dataset, "partner": c.partner}
        audit.append(tx, time, CHARGED, c.contract, {**facts, "epsilon": c.cost.epsilon, "delta": c.cost.delta})
    return new


def affordable(
    tx: Transaction, wanted: Iterable[Charge], policy: Policy, now: int, name_of: NameOf = str
) -> list[Charge]:
    """Those of `wanted` that are not written yet, if all of them can be paid together. Raises BudgetSpent.

    What can be paid now may be spent later by another job: this is for telling people early, `charge` is what counts.
    """
    new = [c for c in wanted if not _is_written(tx, c)]
    limits = policy.budget
    year: dict[tuple[str, Organization], Privacy] = {}
    job: dict[tuple[bytes, str, Organization], Privacy] = {}
    counted = set()
    for c in new:
        told = _organization(tx, c, new, policy, name_of)
        if (answer := (c.contract, c.stage, c.dataset, told)) in counted:
            continue  # another peer of the same organization reads it
        counted.add(answer)
        data = c.source or c.dataset
        pair, this = (data, told), (c.contract, data, told)
        year[pair] = year.get(pair, spent(tx, c.dataset, told, now - YEAR_S, c.source)) + c.cost
        job[this] = job.get(this, _sum(tx, "contract = ?", c.contract, c.dataset, c.source, told)) + c.cost
        delta = DELTA_UNITS / (ROWS_PER_DELTA * max(c.rows, 1))
        for total, holds, most in (
            (job[this], job[this].epsilon <= _most(limits.per_job), f"in this job; the most is ε = {limits.per_job:g}"),
            (year[pair], year[pair].epsilon <= _most(limits.epsilon), f"in a year; the most is ε = {limits.epsilon:g}"),
            (
                year[pair],
                year[pair].delta <= delta,
                f"in a year; the most is δ = 1 / ({ROWS_PER_DELTA} · {c.rows} rows)",
            ),
        ):
            if not holds:
                raise BudgetSpent(
                    f"stage {c.stage!r} costs {c.cost} of the dataset {c.dataset!r}: {name_of(c.partner)} would "
                    f"then have {total} {most}",
                    hint=f"fedpeer budget show {c.dataset}",
                )
    return new


def spent(tx: Transaction, dataset: str, partners: Collection[str], since: int, source: str = "") -> Privacy:
    """What one organization, these peers, was told after `since` (seconds since 1970); of several in a stage, once.

    Of the dataset by its name, and of what was read from the same source.

    What a clock that was ahead dated later than now is in it, too.
    """
    return _sum(tx, "time > ?", since, dataset, source, partners)


def most_spent(
    tx: Transaction,
    dataset: str,
    source: str,
    partners: Iterable[str],
    policy: Policy,
    now: int,
    name_of: NameOf = str,
) -> float:
    """The ε of the last year, of the organization with the most among those of these peers."""
    wanted = [Charge(b"", "", dataset, 0, partner, Privacy(0, 0), "") for partner in partners]
    told = {_organization(tx, c, wanted, policy, name_of) for c in wanted}
    return max((spent(tx, dataset, peers, now - YEAR_S, source).epsilon for peers in told), default=0) / EPSILON_UNITS


def all_charges(tx: Transaction, dataset: str | None = None, source: str = "") -> list[Charged]:
    """The rows of one dataset and its source, or of all, oldest first."""
    rows = tx.all(
        "SELECT contract, stage, dataset, partner, epsilon, delta, time, event ->> 'run' FROM charge"
        " WHERE dataset = coalesce(?, dataset) OR (source = ? AND source <> '')"
        " ORDER BY time, contract, stage, dataset, partner",
        (dataset, source),
    )
    return [
        Charged(contract, stage, name, partner, Privacy(epsilon, delta), time, run or "")
        for contract, stage, name, partner, epsilon, delta, time, run in rows
    ]


def accounts(tx: Transaction, since: int, dataset: str | None = None, source: str = "") -> list[Account]:
    """What was charged after `since`, by dataset and partner; of one dataset and its source, or of all.

    `spent` is of the dataset's source: each of its names shows all of it.
    """
    rows = tx.all(
        "SELECT dataset, max(source), partner, count(*), max(time) FROM charge"
        " WHERE time > ? AND (dataset = coalesce(?, dataset) OR (source = ? AND source <> ''))"
        " GROUP BY dataset, partner ORDER BY dataset, partner",
        (since, dataset, source),
    )
    return [
        Account(name, partner, spent(tx, name, {partner}, since, of), stages, last)
        for name, of, partner, stages, last in rows
    ]


def _is_written(tx: Transaction, c: Charge) -> bool:
    query = "SELECT 1 FROM charge WHERE contract = ? AND stage = ? AND dataset = ? AND partner = ?"
    return tx.one(query, (c.contract, c.stage, c.dataset, c.partner)) is not None


def _organization(
    tx: Transaction, c: Charge, wanted: Iterable[Charge], policy: Policy, name_of: NameOf
) -> Organization:
    """The peers in the book or among `wanted` that are one organization with a charge's partner.

    By the name of today or by that in the book, for some left the roster since; and who comes back with another key and
    the same name is the same.
    """
    peers = set(tx.all("SELECT DISTINCT partner, name FROM charge")) | {(other.partner, "") for other in wanted}
    name = name_of(c.partner)
    organization = policy.organization(c.partner, name)
    return frozenset(
        peer
        for peer, before in peers
        if before == name or organization in {policy.organization(peer, word) for word in (name_of(peer), before)}
    )


def _sum(
    tx: Transaction, where: str, value: int | bytes, dataset: str, source: str, partners: Collection[str]
) -> Privacy:
    marks = ", ".join("?" * len(partners))
    return Privacy(
        *tx.one(
            "SELECT coalesce(sum(epsilon), 0), coalesce(sum(delta), 0) FROM (SELECT max(epsilon) AS epsilon, "  # noqa: S608
            f"max(delta) AS delta FROM charge WHERE {where} AND (dataset = ? OR (source = ? AND source <> '')) "
            f"AND partner IN ({marks}) GROUP BY contract, stage, dataset)",
            (value, dataset, source, *sorted(partners)),
        )
    )


def _units(amount: float, units: int) -> int:
    """Rounded up, of the decimal number that people see, not of the binary one beside it."""
    return math.ceil(Decimal(repr(amount)) * units)


def _most(epsilon: float) -> float:
    """A limit in units, rounded down; infinite for none."""
    return epsilon if math.isinf(epsilon) else math.floor(Decimal(repr(epsilon)) * EPSILON_UNITS)
