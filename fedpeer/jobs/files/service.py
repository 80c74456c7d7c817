"""The files that jobs read and left at this peer, and when one of them may go.

Rules
* Responsible for one thing: a file goes when no job and no prediction needs it, and never between its being kept and
  the row that needs it. The store holds what was kept until it is claimed, so nobody waits for another's source.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import trio

from fedpeer.data.catalog import Catalog, Snapshot
from fedpeer.jobs import archive
from fedpeer.store import Store, Transaction


class Files:
    """Files of the store, as far as jobs need them."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @asynccontextmanager
    async def snapshots(self, catalog: Catalog, datasets: Iterable[str]) -> AsyncIterator[dict[str, Snapshot]]:
        """Snapshots of datasets by name, whose files stay inside, and after it as far as a job pinned them.

        Raises DataError, NotFound, DiskFull.
        """
        taken: dict[str, Snapshot] = {}
        try:
            for name in datasets:
                taken[name] = await catalog.snapshot(name)
            yield taken
        finally:
            versions = [snapshot.version for snapshot in taken.values()]
            for version in versions:
                self._store.claimed(version)
            with trio.CancelScope(shield=True):
                await self.remove_unneeded(versions)

    async def remove_unneeded(self, digests: Sequence[bytes]) -> None:
        """Remove the files that no job needs, and nobody holds.

        It is decided in a transaction, and done after it in the order of the commits: who held a file and has written
        the row that needs it claims it only later.
        """

        def remove(tx: Transaction) -> None:
            for digest in digests:
                if not archive.refers_to(tx, digest):
                    tx.after_commit(partial(self._store.remove_file, digest))

        if digests:
            await self._store.write(remove)
