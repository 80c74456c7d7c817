"""Where a stage stands at this peer, durably: its last checkpoint, and the journal of what came after.

A place in a stage is (turn, k). The journal says, for each place since the last checkpoint, what was asked there (a
digest) and what was answered, or that it was sent. A repeated turn finds its answers here; one that asks something
else at a place is NotDeterministic. The places of turn 0, before the loop, are kept to the end: that code runs again
after every restart.

Large values are files that belong to one row alone (each begins with the row's own name), so they go with their row.
All functions but `keep` and `open_` work inside a Store transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpeer.crypto import Buffer, hash_
from fedpeer.errors import NotDeterministic, StoreError
from fedpeer.governance.passport import Ran, Sums
from fedpeer.store import INLINE_BYTES, Schema, Store, Transaction

SCHEMA = Schema(
    "checkpoint",
    [
        """
        CREATE TABLE checkpoint (
            contract BLOB NOT NULL,
            stage TEXT NOT NULL,
            first_chance BLOB NOT NULL,     -- key of chance before the loop
            first_history BLOB NOT NULL,
            turn INTEGER NOT NULL DEFAULT -1, -- so many turns are complete; -1: the loop was not reached
            chance BLOB NOT NULL DEFAULT x'', -- key of chance of the next turn
            history BLOB NOT NULL DEFAULT x'',
            state BLOB NOT NULL DEFAULT x'',
            state_file BLOB NOT NULL DEFAULT x'',
            crashes INTEGER NOT NULL DEFAULT 0,
            PRIMARY KEY (contract, stage)
        ) STRICT;
        CREATE TABLE journal (
            contract BLOB NOT NULL,
            stage TEXT NOT NULL,
            turn INTEGER NOT NULL,
            k INTEGER NOT NULL,
            kind TEXT NOT NULL,             -- send | receive | sum | agree
            asked BLOB NOT NULL,            -- digest of the request
            answer BLOB NOT NULL,
            answer_file BLOB NOT NULL,
            PRIMARY KEY (contract, stage, turn, k)
        ) STRICT;
        """,
        """
        CREATE TABLE summed (               -- over whom the sums of the stage went
            contract BLOB NOT NULL,
            stage TEXT NOT NULL,
            survivors TEXT NOT NULL,        -- aliases, with a space between
            first_turn INTEGER NOT NULL,
            last_turn INTEGER NOT NULL,
            count INTEGER NOT NULL,
            PRIMARY KEY (contract, stage, survivors)
        ) STRICT;
        """,
    ],
    files="SELECT state_file FROM checkpoint UNION SELECT answer_file FROM journal",
)


@dataclass(frozen=True)
class Kept:
    """A value on disk: in its row, or in a file of its own."""

    inline: bytes = b""
    file: bytes = b""


@dataclass(frozen=True)
class Saved:
    """A row of `checkpoint`: `turn` turns are complete, -1 before the loop."""

    first_chance: bytes
    first_history: bytes
    turn: int
    chance: bytes
    history: bytes
    state: Kept
    again: bool
    """it began before"""


async def keep(store: Store, name: bytes, value: Sequence[Buffer]) -> Kept:
    """Put a value, given in pieces, where its row can refer to it; `name` is used for no other value."""
    if sum(memoryview(piece).nbytes for piece in value) <= INLINE_BYTES:
        return Kept(b"".join(value))
    return Kept(file=await store.put_file([len(name).to_bytes(4, "little"), name, *value]))


def open_(store: Store, name: bytes, kept: Kept) -> bytes:
    """The value again."""
    if not kept.file:
        return kept.inline
    path: Path = store.path_of(kept.file)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None
    if hash_("fp.file", data) != kept.file:
        raise StoreError(f"{path} was changed on disk")
    return data[4 + len(name) :]


def begin(tx: Transaction, contract: bytes, stage: str, chance: bytes, history: bytes) -> Saved:
    """Where the stage stands; at its first start, `chance` and `history` are what it starts with."""
    begun = tx.execute(
        "INSERT OR IGNORE INTO checkpoint (contract, stage, first_chance, first_history) VALUES (?, ?, ?, ?)",
        (contract, stage, chance, history),
    )
    row = tx.one(
        "SELECT first_chance, first_history, turn, chance, history, state, state_file FROM checkpoint"
        " WHERE contract = ? AND stage = ?",
        (contract, stage),
    )
    first_chance, first_history, turn, chance_next, history_next, inline, file = row
    return Saved(
        first_chance, first_history, turn, chance_next, history_next, Kept(inline, file), again=not begun.rowcount
    )


def save(
    tx: Transaction, contract: bytes, stage: str, turn: int, state: Kept, chance: bytes, history: bytes
) -> list[bytes]:
    """`turn` turns are complete; the journal of the turns of the loop ends. Files that nobody refers to now."""
    where = (contract, stage)
    files = [
        tx.one("SELECT state_file FROM checkpoint WHERE contract = ? AND stage = ?", where)[0],
        *_files(tx, "contract = ? AND stage = ? AND turn > 0", where),
    ]
    tx.execute(
        "UPDATE checkpoint SET turn = ?, chance = ?, history = ?, state = ?, state_file = ?"
        " WHERE contract = ? AND stage = ?",
        (turn, chance, history, state.inline, state.file, *where),
    )
    tx.execute("DELETE FROM journal WHERE contract = ? AND stage = ? AND turn > 0", where)
    return [file for file in files if file]


def crashed(tx: Transaction, contract: bytes, stage: str) -> int:
    """Count one more crash of a worker; how many there were."""
    tx.execute("UPDATE checkpoint SET crashes = crashes + 1 WHERE contract = ? AND stage = ?", (contract, stage))
    return int(tx.one("SELECT crashes FROM checkpoint WHERE contract = ? AND stage = ?", (contract, stage))[0])


def sent(tx: Transaction, contract: bytes, stage: str, turn: int, k: int, digest: bytes) -> bool:
    """Whether this was sent already from this place; if not it is noted, in the transaction that sends it."""
    if find_answer(tx, contract, stage, turn, k, "send", digest) is not None:
        return True
    answer(tx, contract, stage, turn, k, "send", digest, Kept())
    return False


def find_answer(
    tx: Transaction, contract: bytes, stage: str, turn: int, k: int, kind: str, asked: bytes
) -> Kept | None:
    """What was answered at this place, None if nothing was. Raises NotDeterministic if something else was asked."""
    row = tx.one(
        "SELECT kind, asked, answer, answer_file FROM journal WHERE contract = ? AND stage = ? AND turn = ? AND k = ?",
        (contract, stage, turn, k),
    )
    if row is None:
        return None
    if (row[0], row[1]) != (kind, asked):
        raise NotDeterministic(
            f"stage {stage!r}, turn {turn}, request {k}: a repeated turn asked for a {kind} with other bytes than the "
            f"first time, when it was a {row[0]}",
            hint="the stage must take values and chance only from its inputs and from `peers`",
        )
    return Kept(row[2], row[3])


def answer(
    tx: Transaction, contract: bytes, stage: str, turn: int, k: int, kind: str, asked: bytes, kept: Kept
) -> None:
    """Note what is answered at a place, before the worker sees it."""
    tx.execute(
        "INSERT INTO journal VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (contract, stage, turn, k, kind, asked, kept.inline, kept.file),
    )


def summed(tx: Transaction, contract: bytes, stage: str, turn: int, survivors: Sequence[str]) -> None:
    """A sum over these aliases is answered; in the transaction of its answer, so each counts once."""
    tx.execute(
        "INSERT INTO summed VALUES (?, ?, ?, ?, ?, 1)"
        " ON CONFLICT DO UPDATE SET last_turn = excluded.last_turn, count = count + 1",
        (contract, stage, " ".join(survivors), turn, turn),
    )


def ran(tx: Transaction, contract: bytes, stage: str) -> Ran:
    """How a stage went whose last turn is complete, before it is dropped."""
    (turns,) = tx.one("SELECT turn FROM checkpoint WHERE contract = ? AND stage = ?", (contract, stage)) or (0,)
    rows = tx.all(
        "SELECT survivors, first_turn, last_turn, count FROM summed WHERE contract = ? AND stage = ?"
        " ORDER BY first_turn, survivors",
        (contract, stage),
    )
    return Ran(max(turns, 0), [Sums(tuple(survivors.split()), *counts) for survivors, *counts in rows])


def drop(tx: Transaction, contract: bytes, stage: str | None = None) -> list[bytes]:
    """Forget a stage, or the whole job; the files to remove after the commit."""
    where, values = "contract = ?", [contract]
    if stage is not None:
        where, values = where + " AND stage = ?", [contract, stage]  # type: ignore[list-item]
    rows = tx.all(f"SELECT state_file FROM checkpoint WHERE {where}", values)  # noqa: S608 - constants of the program
    files = [*(row[0] for row in rows), *_files(tx, where, values)]
    for table in ("checkpoint", "journal", "summed"):
        tx.execute(f"DELETE FROM {table} WHERE {where}", values)  # noqa: S608
    return [file for file in files if file]


def _files(tx: Transaction, where: str, values: object) -> list[bytes]:
    rows = tx.all(f"SELECT answer_file FROM journal WHERE {where}", values)  # type: ignore[arg-type]  # noqa: S608
    return [row[0] for row in rows]
