"""A disk that loses what was not synced when its process is killed, and that may be full.

Rules
* `write` is one transaction: all of it or nothing is there after a kill. Transactions are lost from the end only, as
  in a write-ahead log.
* `sync` makes durable everything that was written before.
* A disk that is full raises `Full` and keeps nothing of the transaction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import Any

Write = tuple[str, Hashable, Any]
"""(table, key, value); None as value erases"""


class Full(Exception):
    """There is no space for this transaction."""


class Disk:
    """Tables of what one party keeps, as its process sees them."""

    def __init__(self) -> None:
        self.tables: defaultdict[str, dict[Any, Any]] = defaultdict(dict)
        self._before: list[list[Write]] = []
        """of each transaction that is not synced: what was there before"""

    def write(self, writes: Iterable[Write], *, full: bool = False) -> None:
        """One transaction; durable at the next sync. Raises Full."""
        if full:
            raise Full
        before: list[Write] = []
        for table, key, value in writes:
            before.append((table, key, self.tables[table].get(key)))
            self._put(table, key, value)
        self._before.append(before)

    def sync(self) -> None:
        self._before.clear()

    @property
    def unsynced(self) -> int:
        """How many transactions a kill may lose."""
        return len(self._before)

    def lose(self, count: int) -> None:
        """The process was killed: the last `count` of the unsynced transactions never were."""
        for _ in range(min(count, len(self._before))):
            for table, key, value in reversed(self._before.pop()):
                self._put(table, key, value)
        self.sync()

    def copy(self) -> dict[str, dict[Any, Any]]:
        """What a backup made now would bring back."""
        return {name: dict(table) for name, table in self.tables.items()}

    def restore(self, backup: dict[str, dict[Any, Any]]) -> None:
        """Somebody put an old copy in the place of this disk."""
        self.tables = defaultdict(dict, {name: dict(table) for name, table in backup.items()})
        self.sync()

    def _put(self, table: str, key: Hashable, value: Any) -> None:
        if value is None:
            self.tables[table].pop(key, None)
        else:
            self.tables[table][key] = value
