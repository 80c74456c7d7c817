"""What this peer keeps of its jobs: the contract, how it ended, the log of what happened, the data it was run on.

All functions work inside a Store transaction; times are given by the caller as ISO-8601 text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpeer.store import Schema, Transaction

SCHEMA = Schema(
    "archive",
    [
        """
        CREATE TABLE job (
            contract BLOB PRIMARY KEY,
            body BLOB NOT NULL,
            created TEXT NOT NULL,
            salt BLOB NOT NULL,             -- hides the data versions in our countersignature
            finished TEXT NOT NULL DEFAULT '',
            state TEXT NOT NULL DEFAULT '', -- done | failed | cancelled, empty while it lives
            closed INTEGER NOT NULL DEFAULT 0 -- nobody needs anything of it any more
        ) STRICT;
        CREATE TABLE job_stage (
            contract BLOB NOT NULL REFERENCES job ON DELETE CASCADE,
            stage TEXT NOT NULL,
            history BLOB NOT NULL,          -- after its last request
            PRIMARY KEY (contract, stage)
        ) STRICT;
        CREATE TABLE job_output (
            contract BLOB NOT NULL,
            stage TEXT NOT NULL,
            name TEXT NOT NULL,
            kind TEXT NOT NULL,
            digest BLOB NOT NULL,           -- and the name of its file
            facts TEXT NOT NULL,            -- JSON: of a model or a report, what people may want to see in a list
            created TEXT NOT NULL,
            PRIMARY KEY (contract, stage, name),
            FOREIGN KEY (contract, stage) REFERENCES job_stage ON DELETE CASCADE
        ) STRICT;
        CREATE TABLE job_log (
            contract BLOB NOT NULL REFERENCES job ON DELETE CASCADE,
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            time TEXT NOT NULL,
            event TEXT NOT NULL,
            facts TEXT NOT NULL
        ) STRICT;
        CREATE INDEX job_log_contract ON job_log (contract, number);
        CREATE TABLE job_snapshot (
            contract BLOB NOT NULL REFERENCES job ON DELETE CASCADE,
            stage TEXT NOT NULL,
            port TEXT NOT NULL,
            version BLOB NOT NULL,          -- digest of the snapshot, and its file's name
            PRIMARY KEY (contract, stage, port)
        ) STRICT;
        """
    ],
    files="SELECT version FROM job_snapshot UNION SELECT digest FROM job_output",
)


@dataclass(frozen=True)
class Kept:
    """A row of the archive."""

    contract: bytes
    body: bytes
    created: str
    salt: bytes
    finished: str
    state: str
    closed: bool


@dataclass(frozen=True)
class KeptOutput:
    """What a stage made at this peer; the file of this digest holds it."""

    contract: bytes
    stage: str
    name: str
    kind: str
    digest: bytes
    facts: dict[str, Any]
    created: str


def add(tx: Transaction, contract: bytes, body: bytes, created: str, salt: bytes) -> bool:
    """Keep a contract; False if it is here already."""
    cursor = tx.execute(
        "INSERT OR IGNORE INTO job (contract, body, created, salt) VALUES (?, ?, ?, ?)", (contract, body, created, salt)
    )
    return cursor.rowcount == 1


def all_jobs(tx: Transaction) -> list[Kept]:
    """Every job, oldest first."""
    rows = tx.all("SELECT contract, body, created, salt, finished, state, closed FROM job ORDER BY created, contract")
    return [
        Kept(contract, body, created, salt, finished, state, bool(closed))
        for contract, body, created, salt, finished, state, closed in rows
    ]


def body(tx: Transaction, contract: bytes) -> bytes | None:
    """The canonical contract of a job; None if it is not here any more."""
    row = tx.one("SELECT body FROM job WHERE contract = ?", (contract,))
    return None if row is None else bytes(row[0])


def since(tx: Transaction, moment: str, before: bytes) -> list[bytes]:
    """The bodies of the contracts that came after a moment and before this one, which may be not here yet."""
    rows = tx.all(
        "SELECT body FROM job WHERE created > ?"
        " AND rowid < coalesce((SELECT rowid FROM job WHERE contract = ?), 9223372036854775807)",
        (moment, before),
    )
    return [body for (body,) in rows]


def end(tx: Transaction, contract: bytes, state: str, finished: str) -> None:
    """Keep how a job ended (why is in its log); the first end counts."""
    tx.execute("UPDATE job SET state = ?, finished = ? WHERE contract = ? AND state = ''", (state, finished, contract))


def close(tx: Transaction, contract: bytes) -> None:
    """Nobody needs anything of this job any more."""
    tx.execute("UPDATE job SET closed = 1 WHERE contract = ?", (contract,))


def forget(tx: Transaction, contract: bytes) -> None:
    """Everything of a job that left no outputs goes."""
    tx.execute("DELETE FROM job WHERE contract = ?", (contract,))


def log(tx: Transaction, contract: bytes, time: str, event: str, facts: Mapping[str, Any]) -> None:
    tx.execute(
        "INSERT INTO job_log (contract, time, event, facts) VALUES (?, ?, ?, ?)",
        (contract, time, event, json.dumps(dict(facts), sort_keys=True)),
    )


def logged(tx: Transaction, contract: bytes) -> list[tuple[str, str, dict[str, Any]]]:
    """(time, event, facts) of a job, oldest first."""
    rows = tx.all("SELECT time, event, facts FROM job_log WHERE contract = ? ORDER BY number", (contract,))
    return [(time, event, json.loads(facts)) for time, event, facts in rows]


def end_stage(tx: Transaction, contract: bytes, stage: str, history: bytes, outputs: Sequence[KeptOutput]) -> None:
    """A stage is complete, with these outputs."""
    tx.execute("INSERT INTO job_stage VALUES (?, ?, ?)", (contract, stage, history))
    tx.executemany(
        "INSERT INTO job_output VALUES (?, ?, ?, ?, ?, ?, ?)",
        [(o.contract, o.stage, o.name, o.kind, o.digest, json.dumps(o.facts), o.created) for o in outputs],
    )


def stages(tx: Transaction, contract: bytes) -> dict[str, bytes]:
    """The stages that are complete here → history hash."""
    return dict(tx.all("SELECT stage, history FROM job_stage WHERE contract = ?", (contract,)))


def outputs(tx: Transaction, contract: bytes | None = None) -> list[KeptOutput]:
    """What the stages of a job made at this peer, or those of all jobs; oldest first."""
    rows = tx.all(
        "SELECT contract, stage, name, kind, digest, facts, created FROM job_output"
        " WHERE contract = coalesce(?, contract) ORDER BY created, contract, stage, name",
        (contract,),
    )
    return [
        KeptOutput(contract, stage, name, kind, digest, json.loads(facts), created)
        for contract, stage, name, kind, digest, facts, created in rows
    ]


def pin_snapshot(tx: Transaction, contract: bytes, stage: str, port: str, version: bytes) -> None:
    """From now on this input of the job is this snapshot, whatever becomes of the source."""
    tx.execute("INSERT OR REPLACE INTO job_snapshot VALUES (?, ?, ?, ?)", (contract, stage, port, version))


def unpin_snapshots(tx: Transaction, contract: bytes) -> list[bytes]:
    """The job needs its snapshots no more; their versions."""
    versions = sorted(set(snapshots(tx, contract).values()))
    tx.execute("DELETE FROM job_snapshot WHERE contract = ?", (contract,))
    return versions


def refers_to(tx: Transaction, digest: bytes) -> bool:
    """Whether a job needs this file, as a snapshot or as an output (the same bytes are one file)."""
    query = "SELECT 1 FROM job_snapshot WHERE version = ? UNION ALL SELECT 1 FROM job_output WHERE digest = ?"
    return tx.one(query, (digest, digest)) is not None


def snapshots(tx: Transaction, contract: bytes) -> dict[tuple[str, str], bytes]:
    """(stage, port) → version of a job's pinned inputs."""
    rows = tx.all("SELECT stage, port, version FROM job_snapshot WHERE contract = ?", (contract,))
    return {(stage, port): version for stage, port, version in rows}
