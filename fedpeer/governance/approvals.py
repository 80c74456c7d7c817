"""What the operators of this peer said to contracts, and what they said to all contracts like one.

A contract that the policy does not decide waits here until it is approved, denied, or too old:

    asking ──▶ approved                 so many people said yes as the policy wants (two by its two-person rule)
       ├─────▶ denied                   one of them said no
       └─────▶ undecided                nobody said enough by the deadline
    refused                             by the policy, from the start

Rules
* What is asked, and what would be answered, is on disk before anybody is asked: after a restart it goes on from there.
* A person is a uid. The same uid counts once, also when it submitted the contract; -1 is the daemon itself.
* A standing approval covers a contract that is the same in everything but its nonce and its expiry (`form`), brings the
  same datasets with the same columns (and the same version of their rows, unless it was given for new ones too), and
  costs no more. It holds for STANDING_S, until it is revoked, and only if as many people gave it as are needed now.
* Only what the policy leaves to the operators is decided here: a refusal of the policy is no operator's to lift.

Pure functions, and functions on a Transaction; times are seconds since 1970, UTC, given by the caller.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from fedpeer.admin.caller import Caller
from fedpeer.errors import NotFound, UsageError
from fedpeer.store import Schema, Transaction

STANDING_S = 30 * 24 * 3600
MAX_WHY = 2000
"""Characters of a reason that are kept."""
DAEMON = -1
"""The uid of who asked from within this process."""
ASKING, APPROVED, DENIED, REFUSED, UNDECIDED = "asking", "approved", "denied", "refused", "undecided"

SCHEMA = Schema(
    "approvals",
    [
        """
        CREATE TABLE asked (
            contract BLOB PRIMARY KEY,
            initiator TEXT NOT NULL,        -- peer id
            time INTEGER NOT NULL,
            until INTEGER NOT NULL,         -- then it is refused
            state TEXT NOT NULL,            -- asking | approved | denied | refused | undecided
            needs INTEGER NOT NULL,         -- how many people must approve
            form BLOB NOT NULL,             -- hash of the contract without its nonce and expiry
            epsilon REAL NOT NULL,
            data TEXT NOT NULL,             -- JSON of [Data]
            answer BLOB NOT NULL,           -- what is said when it is approved
            why TEXT NOT NULL               -- for our operator: what the policy found, who denied it and why
        ) STRICT;
        CREATE INDEX asked_initiator ON asked (initiator, time);
        CREATE TABLE approval (
            contract BLOB NOT NULL,
            uid INTEGER NOT NULL,
            user TEXT NOT NULL,
            time INTEGER NOT NULL,
            how TEXT NOT NULL,              -- operator | submitted | standing NUMBER
            always INTEGER NOT NULL,        -- 0 once, 1 always like this, 2 and on new rows too
            PRIMARY KEY (contract, uid)
        ) STRICT;
        CREATE TABLE standing (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            contract BLOB NOT NULL,         -- that it was given for
            name TEXT NOT NULL,             -- of that job
            initiator TEXT NOT NULL,
            form BLOB NOT NULL,
            epsilon REAL NOT NULL,
            data TEXT NOT NULL,
            any_version INTEGER NOT NULL,
            people TEXT NOT NULL,           -- JSON: [[uid, user]]
            created INTEGER NOT NULL,
            expires INTEGER NOT NULL,
            revoked INTEGER NOT NULL DEFAULT 0,
            revoked_by INTEGER NOT NULL DEFAULT 0
        ) STRICT;
        CREATE INDEX standing_form ON standing (initiator, form);
        """
    ],
)


class Data(msgspec.Struct, frozen=True):
    """A dataset that a contract is about here: which content of it, and how it looks."""

    name: str
    version: bytes
    """digest of the snapshot"""
    rows: int
    columns: list[list[str]]
    """[name, kind], in the owner's order"""
    id: str | None
    label: str | None
    source: str = ""
    """what it is read from, whatever its name; "" before it was kept"""


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What an approval is about."""

    initiator: str
    """peer id"""
    form: bytes
    """the contract in everything but its nonce and expiry"""
    epsilon: float
    """the privacy that one such job costs; 0 where it adds no noise"""
    data: list[Data]


class Asked(Subject, frozen=True, kw_only=True):
    """A contract, and what was said to it so far."""

    contract: bytes
    time: int
    until: int
    """its deadline: whoever has not approved by then refuses"""
    state: str
    needs: int
    answer: bytes
    why: str = ""


class Standing(Subject, frozen=True, kw_only=True):
    """An approval of all contracts like one."""

    number: int
    contract: bytes
    name: str
    any_version: bool
    people: list[tuple[int, str]]
    created: int
    expires: int
    revoked: int


@dataclass(frozen=True)
class Approval:
    """One person's yes."""

    uid: int
    user: str
    time: int
    how: str
    """operator | submitted | standing NUMBER"""
    always: int
    """0 once, 1 always like this, 2 on new rows too"""

    @property
    def who(self) -> str:
        return who(self.uid, self.user)


def who(uid: int, user: str) -> str:
    """A person as operators read it: "ann (1000)"."""
    if uid == DAEMON:
        return "the daemon"
    return f"{user} ({uid})" if user else str(uid)


def covers(standing: Standing, subject: Subject, needs: int, now: int) -> bool:
    """Whether it was approved in advance, by `needs` people or more. A clock that went back covers nothing."""
    return (
        not standing.revoked
        and standing.created <= now < standing.expires
        and len({uid for uid, _ in standing.people}) >= needs
        and standing.initiator == subject.initiator
        and standing.form == subject.form
        and subject.epsilon <= standing.epsilon
        and len(standing.data) == len(subject.data)
        and all(
            _looks(mine) == _looks(other) and (standing.any_version or mine.version == other.version)
            for mine, other in zip(standing.data, subject.data, strict=True)
        )
    )


def _looks(data: Data) -> Any:
    return data.name, data.columns, data.id, data.label


# what is asked


def submitted(tx: Transaction, contract: bytes, by: Caller | None, now: int) -> None:
    """Who submits a contract approves this peer's part of it, before it is asked about."""
    uid, user = _person(by)
    tx.execute("INSERT OR IGNORE INTO approval VALUES (?, ?, ?, ?, 'submitted', 0)", (contract, uid, user, now))


def ask(tx: Transaction, asked: Asked) -> Asked:
    """Keep what the policy says of a contract (`state` asking or refused), and what follows from it.

    It is approved at once when nobody needs to be asked (`needs` is 0), when its submitter is enough, and when a
    standing approval covers it.
    """
    if asked.state == ASKING:
        if (given := covering(tx, asked, asked.needs, asked.time)) is not None:
            tx.executemany(
                "INSERT OR IGNORE INTO approval VALUES (?, ?, ?, ?, ?, 0)",
                [(asked.contract, uid, user, asked.time, f"standing {given.number}") for uid, user in given.people],
            )
        if len(approvals(tx, asked.contract)) >= asked.needs:
            asked = msgspec.structs.replace(asked, state=APPROVED)
    tx.execute(
        "INSERT INTO asked VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            asked.contract,
            asked.initiator,
            asked.time,
            asked.until,
            asked.state,
            asked.needs,
            asked.form,
            asked.epsilon,
            msgspec.json.encode(asked.data).decode(),
            asked.answer,
            asked.why,
        ),
    )
    return asked


_ASKED = "SELECT contract, initiator, time, until, state, needs, form, epsilon, data, answer, why FROM asked"


def find(tx: Transaction, contract: bytes) -> Asked | None:
    """What is asked in a contract; None before its policy was asked, and where it cannot run at all."""
    row = tx.one(f"{_ASKED} WHERE contract = ?", (contract,))
    return None if row is None else _asked(row)


def asking(tx: Transaction) -> list[Asked]:
    """All that wait for the operators, oldest first."""
    return [_asked(row) for row in tx.all(f"{_ASKED} WHERE state = 'asking' ORDER BY time, contract")]


def last_approved(tx: Transaction, initiator: str, *, but: bytes) -> Asked | None:
    """The contract of this initiator that was approved last, another than `but`."""
    row = tx.one(
        f"{_ASKED} WHERE initiator = ? AND state = 'approved' AND contract <> ? ORDER BY time DESC, rowid DESC LIMIT 1",
        (initiator, but),
    )
    return None if row is None else _asked(row)


def forget(tx: Transaction, contract: bytes) -> None:
    """Nothing of this contract is of use any more; standing approvals stay."""
    tx.execute("DELETE FROM asked WHERE contract = ?", (contract,))
    tx.execute("DELETE FROM approval WHERE contract = ?", (contract,))


# what people say


def approvals(tx: Transaction, contract: bytes) -> list[Approval]:
    """Who approved a contract, in order."""
    rows = tx.all(
        "SELECT uid, user, time, how, always FROM approval WHERE contract = ? ORDER BY time, uid", (contract,)
    )
    return [Approval(*row) for row in rows]


def approve(
    tx: Transaction,
    contract: bytes,
    by: Caller | None,
    now: int,
    *,
    name: str = "",
    always: int = 0,
    people: int = 1,
) -> Asked:
    """A person approves, once or (`always` 1, 2) all that is like it; the state is "approved" when it is enough.

    `name`: of the job, for the list of standing approvals. `people`: how many the policy of now wants; the policy under
    which it came may want more. Raises UsageError when nothing is asked any more, and for
    a person who approved already while another one is needed.
    """
    asked = _still_asking(tx, contract)
    if asked.needs < people:
        asked = msgspec.structs.replace(asked, needs=people)
        tx.execute("UPDATE asked SET needs = ? WHERE contract = ?", (people, contract))
    uid, user = _person(by)
    before = approvals(tx, contract)
    if uid in {approval.uid for approval in before}:
        raise UsageError(
            f"{who(uid, user)} approved it already, and the policy wants {asked.needs} people",
            hint="another user of the group fedpeer-admin approves it",
        )
    tx.execute("INSERT INTO approval VALUES (?, ?, ?, ?, ?, ?)", (contract, uid, user, now, "operator", always))
    given = [*before, Approval(uid, user, now, "operator", always)]
    if len(given) < asked.needs:
        return asked
    _settle(tx, contract, APPROVED, "")
    if (said := min(person.always for person in given)) > 0:
        tx.execute(
            "INSERT INTO standing (contract, name, initiator, form, epsilon, data, any_version, people, created,"
            " expires) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                contract,
                name,
                asked.initiator,
                asked.form,
                asked.epsilon,
                msgspec.json.encode(asked.data).decode(),
                said == 2,
                json.dumps([[person.uid, person.user] for person in given]),
                now,
                now + STANDING_S,
            ),
        )
    return msgspec.structs.replace(asked, state=APPROVED)


def deny(tx: Transaction, contract: bytes, why: str) -> Asked:
    """A person says no; `why` is for our own operator. Raises UsageError when nothing is asked any more."""
    asked = _still_asking(tx, contract)
    _settle(tx, contract, DENIED, why)
    return msgspec.structs.replace(asked, state=DENIED, why=why)


def give_up(tx: Transaction, contract: bytes, why: str) -> Asked:
    """The deadline of a contract that is not approved: how it stands now, "undecided" if it was asking."""
    asked = find(tx, contract)
    assert asked is not None, "only what was asked has a deadline"
    if asked.state != ASKING:
        return asked
    _settle(tx, contract, UNDECIDED, why)
    return msgspec.structs.replace(asked, state=UNDECIDED, why=why)


def _still_asking(tx: Transaction, contract: bytes) -> Asked:
    asked = find(tx, contract)
    if asked is None or asked.state != ASKING:
        state = "not asked of this operator" if asked is None else f"{asked.state} already"
        hint = "fedpeer job cancel ends it" if asked is not None and asked.state == APPROVED else "fedpeer approvals"
        raise UsageError(f"this job is {state}", hint=hint)
    return asked


def _settle(tx: Transaction, contract: bytes, state: str, why: str) -> None:
    tx.execute("UPDATE asked SET state = ?, why = ? WHERE contract = ?", (state, why, contract))


# standing approvals


def covering(tx: Transaction, subject: Subject, needs: int, now: int) -> Standing | None:
    """A standing approval that covers this, the newest if there are several."""
    rows = tx.all(
        f"{_STANDING} WHERE initiator = ? AND form = ? ORDER BY number DESC", (subject.initiator, subject.form)
    )
    return next((found for found in map(_standing, rows) if covers(found, subject, needs, now)), None)


def standing(tx: Transaction, now: int) -> list[Standing]:
    """Those that hold at `now`, oldest first."""
    rows = tx.all(f"{_STANDING} WHERE revoked = 0 AND expires > ? ORDER BY number", (now,))
    return [_standing(row) for row in rows]


def revoke(tx: Transaction, number: int, by: Caller | None, now: int) -> Standing:
    """It covers nothing from now on; jobs that it approved go on. Raises NotFound."""
    row = tx.one(f"{_STANDING} WHERE number = ? AND revoked = 0", (number,))
    if row is None:
        raise NotFound(f"there is no standing approval {number} here", hint="fedpeer approvals")
    uid, _ = _person(by)
    tx.execute("UPDATE standing SET revoked = ?, revoked_by = ? WHERE number = ?", (max(now, 1), uid, number))
    return _standing(row)


_STANDING = (
    "SELECT number, contract, name, initiator, form, epsilon, data, any_version, people, created, expires, revoked"
    " FROM standing"
)


def _person(by: Caller | None) -> tuple[int, str]:
    return (by.uid, by.user) if by else (DAEMON, "")


def _asked(row: Sequence[Any]) -> Asked:
    contract, initiator, time, until, state, needs, form, epsilon, data, answer, why = row
    return Asked(
        contract=contract,
        initiator=initiator,
        time=time,
        until=until,
        state=state,
        needs=needs,
        form=form,
        epsilon=epsilon,
        data=msgspec.json.decode(data, type=list[Data]),
        answer=answer,
        why=why,
    )


def _standing(row: Sequence[Any]) -> Standing:
    number, contract, name, initiator, form, epsilon, data, any_version, people, created, expires, revoked = row
    return Standing(
        number=number,
        contract=contract,
        name=name,
        initiator=initiator,
        form=form,
        epsilon=epsilon,
        data=msgspec.json.decode(data, type=list[Data]),
        any_version=bool(any_version),
        people=[(uid, user) for uid, user in json.loads(people)],
        created=created,
        expires=expires,
        revoked=revoked,
    )
