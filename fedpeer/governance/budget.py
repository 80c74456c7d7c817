"""The privacy budget: what noisy answers about a dataset told each partner, and how much more it may learn in a year.

Rules
* A charge is a row by (contract, stage, dataset, partner). It is written in the transaction that starts the stage, and
  the stage's worker runs after that is on disk: nothing leaves that is not charged. A stage that is started again finds
  its row and is charged once.
* Whether it can be paid is asked in the same transaction, and there is one writer: two jobs never spend the same rest.
* Everybody in the stage reads the answer, so each of the others is charged; all of them or, with BudgetSpent, none.
* A charge is never taken back: a job that failed may have told its answer. So a crash can cost a job that tells
  nothing, and cannot save one that did.
* Charges are added up (basic composition), which is more than was lost: `event` says what ran with which noise, so that
  a sharper account can be made of old charges later.
* Privacy is counted in whole units, rounded up: sums are exact, whoever adds them and in whatever order.
* The delta of a year is at most 1 / (10 · rows): a delta of 1 / rows could be one row, shown to everybody.
* A dataset is its name. What is offered twice under two names has two budgets.

Source: Dwork and Roth, The Algorithmic Foundations of Differential Privacy (2014), theorem 3.16 (composition).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Final

from fedpeer.errors import BudgetSpent
from fedpeer.governance import audit
from fedpeer.governance.policy import Budget
from fedpeer.store import Schema, Transaction

YEAR_S: Final = 365 * 24 * 3600
EPSILON_UNITS: Final = 10**6
"""of epsilon in 1"""
DELTA_UNITS: Final = 10**15
ROWS_PER_DELTA: Final = 10
CHARGED: Final = "charged"
"""The event of a charge in the audit; its facts have the same whole units."""

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
        """
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


def charge(tx: Transaction, wanted: Iterable[Charge], limits: Budget, time: str) -> list[Charge]:
    """Write what is not written yet, with its entry in the audit; that is returned. `time`: ISO 8601 with a zone.

    Raises BudgetSpent: then nothing of the transaction may be committed.
    """
    now = _seconds(time)
    new = affordable(tx, wanted, limits, now)
    for c in new:
        row = (c.contract, c.stage, c.dataset, c.partner, c.cost.epsilon, c.cost.delta, now, c.event)
        tx.execute("INSERT INTO charge VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        facts = {"stage": c.stage, "dataset": c.dataset, "partner": c.partner}
        audit.append(tx, time, CHARGED, c.contract, {**facts, "epsilon": c.cost.epsilon, "delta": c.cost.delta})
    return new


def affordable(tx: Transaction, wanted: Iterable[Charge], limits: Budget, now: int) -> list[Charge]:
    """Those of `wanted` that are not written yet, if all of them can be paid together. Raises BudgetSpent.

    What can be paid now may be spent later by another job: this is for telling people early, `charge` is what counts.
    """
    new = [c for c in wanted if not _is_written(tx, c)]
    per_year, per_job = _most(limits.epsilon, EPSILON_UNITS), _most(limits.per_job, EPSILON_UNITS)
    year: dict[tuple[str, str], Privacy] = {}
    job: dict[tuple[bytes, str, str], Privacy] = {}
    for c in new:
        pair, this = (c.dataset, c.partner), (c.contract, c.dataset, c.partner)
        year[pair] = year.get(pair, spent(tx, *pair, since=now - YEAR_S)) + c.cost
        job[this] = job.get(this, _spent_in(tx, *this)) + c.cost
        delta = DELTA_UNITS / (ROWS_PER_DELTA * max(c.rows, 1))
        for total, holds, most in (
            (job[this], job[this].epsilon <= per_job, f"in this job; the most is ε = {limits.per_job:g}"),
            (year[pair], year[pair].epsilon <= per_year, f"in a year; the most is ε = {limits.epsilon:g}"),
            (
                year[pair],
                year[pair].delta <= delta,
                f"in a year; the most is δ = 1 / ({ROWS_PER_DELTA} · {c.rows} rows)",
            ),
        ):
            if not holds:
                raise BudgetSpent(
                    f"stage {c.stage!r} costs {c.cost} of the dataset {c.dataset!r}: with it, {c.partner} would have "
                    f"{total} {most}",
                    hint=f"fedpeer budget show {c.dataset}",
                )
    return new


def spent(tx: Transaction, dataset: str, partner: str, since: int) -> Privacy:
    """What was charged after `since` (seconds since 1970); also what a clock that was ahead dated later than now."""
    query = f"{_SUM} WHERE dataset = ? AND partner = ? AND time > ?"
    return Privacy(*tx.one(query, (dataset, partner, since)))


def most_spent(tx: Transaction, dataset: str, partners: Iterable[str], now: int) -> float:
    """The ε of the last year, of the partner with the most."""
    return max((spent(tx, dataset, one, now - YEAR_S).epsilon for one in partners), default=0) / EPSILON_UNITS


def all_charges(tx: Transaction, dataset: str | None = None) -> list[Charged]:
    """The rows of one dataset, or of all, oldest first."""
    rows = tx.all(
        "SELECT contract, stage, dataset, partner, epsilon, delta, time, event ->> 'run' FROM charge"
        " WHERE dataset = coalesce(?, dataset) ORDER BY time, contract, stage, dataset, partner",
        (dataset,),
    )
    return [
        Charged(contract, stage, name, partner, Privacy(epsilon, delta), time, run or "")
        for contract, stage, name, partner, epsilon, delta, time, run in rows
    ]


def accounts(tx: Transaction, since: int, dataset: str | None = None) -> list[Account]:
    """What was charged after `since`, by dataset and partner; of one dataset, or of all."""
    rows = tx.all(
        "SELECT dataset, partner, sum(epsilon), sum(delta), count(*), max(time) FROM charge"
        " WHERE time > ? AND dataset = coalesce(?, dataset) GROUP BY dataset, partner ORDER BY dataset, partner",
        (since, dataset),
    )
    return [Account(name, partner, Privacy(e, d), stages, last) for name, partner, e, d, stages, last in rows]


def _is_written(tx: Transaction, c: Charge) -> bool:
    query = "SELECT 1 FROM charge WHERE contract = ? AND stage = ? AND dataset = ? AND partner = ?"
    return tx.one(query, (c.contract, c.stage, c.dataset, c.partner)) is not None


def _spent_in(tx: Transaction, contract: bytes, dataset: str, partner: str) -> Privacy:
    query = f"{_SUM} WHERE contract = ? AND dataset = ? AND partner = ?"
    return Privacy(*tx.one(query, (contract, dataset, partner)))


_SUM: Final = "SELECT coalesce(sum(epsilon), 0), coalesce(sum(delta), 0) FROM charge"


def _units(amount: float, units: int) -> int:
    """Rounded up, of the decimal number that people see, not of the binary one beside it."""
    return math.ceil(Decimal(repr(amount)) * units)


def _most(amount: float, units: int) -> float:
    """A limit, rounded down; infinite for none."""
    return amount if math.isinf(amount) else math.floor(Decimal(repr(amount)) * units)


def _seconds(time: str) -> int:
    return int(datetime.fromisoformat(time).timestamp())
