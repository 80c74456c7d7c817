"""The files that jobs read and left at this peer, and when one of them may go.

Rules
* Responsible for one thing: a file goes when no job and no prediction needs it, and never between its being kept and
  the row that needs it. Who keeps a file holds `keeping` until its row is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from fedpeer.data.catalog import Catalog
from fedpeer.jobs import archive
from fedpeer.store import Store


class Files:
    """Files of the store, as far as jobs need them."""

    def __init__(self, store: Store) -> None:
        self.keeping = trio.Lock()
        """Held between keeping a file and the row that needs it: nobody removes one meanwhile."""
        self._store = store
        self._in_use: Counter[bytes] = Counter()  # snapshots that predictions read

    @asynccontextmanager
    async def snapshot(self, catalog: Catalog, dataset: str) -> AsyncIterator[Path]:
        """A snapshot of a dataset that stays while it is read. Raises DataError, NotFound."""
        async with self.keeping:
            version = (await catalog.snapshot(dataset)).version
            self._in_use[version] += 1
        try:
            yield self._store.path_of(version)
        finally:
            with trio.CancelScope(shield=True):
                self._in_use[version] -= 1
                await self.remove_unneeded([version])

    async def remove_unneeded(self, digests: Sequence[bytes]) -> None:
        """Remove the files that no job and no prediction reads."""
        async with self.keeping:
            for digest in digests:
                needed = await self._store.read(partial(archive.refers_to, digest=digest))
                if not needed and not self._in_use[digest]:
                    self._store.remove_file(digest)
