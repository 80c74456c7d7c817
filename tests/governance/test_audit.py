"""The audit log: appended to only, and every change is found."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpeer.errors import AuditBroken
from fedpeer.governance import audit
from fedpeer.store import Store

JOB = b"j" * 32


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path, [audit.SCHEMA])
    yield opened
    opened.close()


def fill(store: Store, count: int) -> list[audit.Head]:
    """Entries, and the head after each."""
    heads = []
    for i in range(count):
        store.write_now(lambda tx, i=i: audit.append(tx, f"2026-01-01T00:00:{i:02}Z", "happened", JOB, {"i": i}))
        heads.append(store.write_now(audit.head))
    return heads


Rows = list[tuple[int, bytes, bytes]]


def rows_of(store: Store) -> Rows:
    return store.write_now(lambda tx: audit.stored(tx, 1, 10**6))


def check(rows: Rows, heads: dict[int, Any] | None = None) -> audit.Head:
    checker = audit.Checker(heads or {})
    for row in rows:
        checker.add(*row)
    return checker.end()


def broken(rows: Rows, heads: dict[int, Any] | None = None) -> AuditBroken:
    with pytest.raises(AuditBroken) as caught:
        check(rows, heads)
    return caught.value


def test_what_was_appended_is_read_in_order_and_by_job(store: Store) -> None:
    heads = fill(store, 9)
    store.write_now(lambda tx: audit.append(tx, "t", "peer_added", None, {"uid": 7}))
    read = store.write_now(audit.entries)
    assert [entry.number for entry in read] == list(range(1, 11))
    assert [entry.facts for entry in read] == [*({"i": i} for i in range(9)), {"uid": 7}]
    assert len(store.write_now(lambda tx: audit.entries(tx, job=JOB, since=4))) == 6
    assert check(rows_of(store)[:9]) == heads[-1]
    assert store.write_now(lambda tx: audit.head(tx, 4)) == heads[3]


def test_the_table_refuses_a_change_and_a_removal(store: Store) -> None:
    fill(store, 2)
    for sql in ("UPDATE audit_entry SET body = x'00' WHERE number = 1", "DELETE FROM audit_entry WHERE number = 2"):
        with pytest.raises(sqlite3.IntegrityError, match="only appended"):
            store.write_now(lambda tx, sql=sql: tx.execute(sql))
    assert len(rows_of(store)) == 2
