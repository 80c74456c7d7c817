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
from decimal import Decimal
from typing import Final

from fedpeer.errors import BudgetSpent
from fedpeer.store import Schema, Transaction

YEAR_S: Final = 365 * 24 * 3600
EPSILON_UNITS: Final = 10**6
"""of epsilon in 1"""
DELTA_UNITS: Final = 10**15
ROWS_PER_DELTA: Final = 10

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
class Limits:
    """What may be spent."""

    epsilon: float = 3.0
    """of a dataset and a partner in a year"""
    per_job: float = 1.0


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
    event: str


def charge(tx: Transaction, wanted: Iterable[Charge], limits: Limits, now: int) -> list[Charge]:
    """Write what is not written yet; that is returned. Raises BudgetSpent, and then nothing may be committed."""
    new = affordable(tx, wanted, limits, now)
    tx.executemany(
        "INSERT INTO charge VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [(c.contract, c.stage, c.dataset, c.partner, c.cost.epsilon, c.cost.delta, now, c.event) for c in new],
    )
    return new


def affordable(tx: Transaction, wanted: Iterable[Charge], limits: Limits, now: int) -> list[Charge]:
    """Those of `wanted` that are not written yet, if all of them can be paid together. Raises BudgetSpent.

    What can be paid now may be spent later by another job: this is for telling people early, `charge` is what counts.
    """
    new = [c for c in wanted if not _is_written(tx, c)]
    year: dict[tuple[str, str], Privacy] = {}
    job: dict[tuple[bytes, str, str], Privacy] = {}
    for c in new:
        pair, this = (c.dataset, c.partner), (c.contract, c.dataset, c.partner)
        year[pair] = year.get(pair, spent(tx, *pair, since=now - YEAR_S)) + c.cost
        job[this] = job.get(this, _spent_in(tx, *this)) + c.cost
        most = Privacy(_units(limits.epsilon, EPSILON_UNITS), DELTA_UNITS // (ROWS_PER_DELTA * max(c.rows, 1)))
        wrong = {
            f"a job may cost ε = {limits.per_job:g}": job[this].epsilon > _units(limits.per_job, EPSILON_UNITS),
            f"a year may cost ε = {limits.epsilon:g}": year[pair].epsilon > most.epsilon,
            f"a year may cost δ = 1 / ({ROWS_PER_DELTA} · {c.rows} rows)": year[pair].delta > most.delta,
        }
        for rule, broken in wrong.items():
            if broken:
                raise BudgetSpent(
                    f"stage {c.stage!r} costs {c.cost} of the dataset {c.dataset!r}, which would make {job[this]} in "
                    f"this job and {year[pair]} in a year for partner {c.partner}; {rule}",
                    hint=f"fedpeer budget show {c.dataset}",
                )
    return new


def spent(tx: Transaction, dataset: str, partner: str, since: int) -> Privacy:
    """What was charged after `since`; also what a clock that was ahead dated later than now."""
    query = "SELECT coalesce(sum(epsilon), 0), coalesce(sum(delta), 0) FROM charge WHERE dataset = ? AND partner = ?"
    return Privacy(*tx.one(f"{query} AND time > ?", (dataset, partner, since)))


def all_charges(tx: Transaction, dataset: str | None = None) -> list[Charged]:
    """The rows of one dataset, or of all, oldest first."""
    rows = tx.all(
        "SELECT contract, stage, dataset, partner, epsilon, delta, time, event FROM charge"
        " WHERE dataset = coalesce(?, dataset) ORDER BY time, contract, stage, dataset, partner",
        (dataset,),
    )
    return [
        Charged(contract, stage, name, partner, Privacy(epsilon, delta), time, event)
        for contract, stage, name, partner, epsilon, delta, time, event in rows
    ]


def _is_written(tx: Transaction, c: Charge) -> bool:
    query = "SELECT 1 FROM charge WHERE contract = ? AND stage = ? AND dataset = ? AND partner = ?"
    return tx.one(query, (c.contract, c.stage, c.dataset, c.partner)) is not None


def _spent_in(tx: Transaction, contract: bytes, dataset: str, partner: str) -> Privacy:
    query = "SELECT coalesce(sum(epsilon), 0), coalesce(sum(delta), 0) FROM charge"
    return Privacy(*tx.one(f"{query} WHERE contract = ? AND dataset = ? AND partner = ?", (contract, dataset, partner)))


def _units(amount: float, units: int) -> int:
    """Of the decimal number that people see, not of the binary one beside it."""
    return math.ceil(Decimal(repr(amount)) * units)
