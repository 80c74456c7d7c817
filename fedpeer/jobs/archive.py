"""What this peer keeps of its jobs: the contract, how it ended, the log of what happened, the data it was run on.

All functions work inside a Store transaction; times are given by the caller as ISO-8601 text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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
            error TEXT NOT NULL DEFAULT ''  -- JSON of an ErrorView
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
    error: str


def add(tx: Transaction, contract: bytes, body: bytes, created: str, salt: bytes) -> bool:
    """Keep a contract; False if it is here already."""
    cursor = tx.execute(
        "INSERT OR IGNORE INTO job (contract, body, created, salt) VALUES (?, ?, ?, ?)", (contract, body, created, salt)
    )
    return cursor.rowcount == 1


def all_jobs(tx: Transaction) -> list[Kept]:
    """Every job, oldest first."""
    rows = tx.all("SELECT contract, body, created, salt, finished, state, error FROM job ORDER BY created, contract")
    return [Kept(*row) for row in rows]


def end(tx: Transaction, contract: bytes, state: str, finished: str, error: str) -> None:
    """Keep how a job ended; the first end counts."""
    tx.execute(
        "UPDATE job SET state = ?, finished = ?, error = ? WHERE contract = ? AND state = ''",
        (state, finished, error, contract),
    )


def log(tx: Transaction, contract: bytes, time: str, event: str, facts: Mapping[str, Any]) -> None:
    tx.execute(
        "INSERT INTO job_log (contract, time, event, facts) VALUES (?, ?, ?, ?)",
        (contract, time, event, json.dumps(dict(facts), sort_keys=True)),
    )


def logged(tx: Transaction, contract: bytes) -> list[tuple[str, str, dict[str, Any]]]:
    """(time, event, facts) of a job, oldest first."""
    rows = tx.all("SELECT time, event, facts FROM job_log WHERE contract = ? ORDER BY number", (contract,))
    return [(time, event, json.loads(facts)) for time, event, facts in rows]


def pin_snapshot(tx: Transaction, contract: bytes, stage: str, port: str, version: bytes) -> None:
    """From now on this input of the job is this snapshot, whatever becomes of the source."""
    tx.execute("INSERT OR REPLACE INTO job_snapshot VALUES (?, ?, ?, ?)", (contract, stage, port, version))


def snapshots(tx: Transaction, contract: bytes) -> dict[tuple[str, str], bytes]:
    """(stage, port) → version of a job's pinned inputs."""
    rows = tx.all("SELECT stage, port, version FROM job_snapshot WHERE contract = ?", (contract,))
    return {(stage, port): version for stage, port, version in rows}
