"""The cast of the mesh tests: organizations with a home on disk, whose daemon can be killed and started again."""

from __future__ import annotations

import shutil
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from fedpeer.crypto import Secret
from fedpeer.events import Event, Events
from fedpeer.identity import Identity
from fedpeer.mesh.connections.service import Connections
from fedpeer.mesh.service import Mesh
from fedpeer.network import Network
from fedpeer.store import RunInThread, Store, call_directly

SCOPE = bytes(range(32))


class Log:
    """What the daemon's log is told; `faults` are what an operator should never see."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def debug(self, event: str, **facts: object) -> None: ...

    info = warning = debug

    def error(self, event: str, *, exc_info: BaseException | None = None, **_facts: object) -> None:
        self.faults.append(event + "\n" + "".join(traceback.format_exception(exc_info)) if exc_info else event)

    def exception(self, event: str, **_facts: object) -> None:
        self.faults.append(f"{event}\n{traceback.format_exc()}")


class Organization:
    """A home, an identity, and while `start` to `stop` or `kill` a mesh."""

    def __init__(
        self, name: str, folder: Path, network: Network, address: str | None = None, listen: str | None = None
    ) -> None:
        self.name, self.folder, self.network = name, folder / name, network
        self.identity = Identity(Secret(name.encode().ljust(32, b".")))
        self.addresses = (address,) if address else ()
        self.listen = (listen or address,) if listen or address else ()
        self.card = self.identity.card(name, self.addresses)
        self.id = self.identity.id
        self.happened: list[Event] = []
        self.log = Log()
        self.starts = 0
        self._scope: trio.CancelScope | None = None

    async def start(
        self, nursery: trio.Nursery, *, run_in_thread: RunInThread = call_directly, connect: bool = True
    ) -> Mesh:
        self.store = Store(self.folder, [*Connections.SCHEMAS, *Mesh.SCHEMAS], run_in_thread)
        events = Events()
        events.subscribe(self.happened.append)
        self.connections = Connections(
            self.identity,
            self.name,
            self.store,
            self.network,
            listen=self.listen,
            addresses=self.addresses,
            events=events,
            log=self.log,
        )
        self.mesh = Mesh(self.identity, self.connections, self.store, events=events, log=self.log)
        self.starts += 1
        if connect:
            await self.connect(nursery)
        return self.mesh

    async def connect(self, nursery: trio.Nursery) -> None:
        """Let a mesh that was made with connect=False run."""
        await nursery.start(self._run)

    async def _run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._ended = trio.Event()
        try:
            with trio.CancelScope() as self._scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.mesh.run)
                    await nursery.start(self.connections.run)
                    task_status.started()
        finally:
            self.store.close()
            self._ended.set()

    async def stop(self) -> None:
        """The daemon is gone; what is on disk stays."""
        assert self._scope is not None
        self._scope.cancel()
        await self._ended.wait()

    async def until_connected(self, *others: Organization) -> None:
        while not all(self.connections.connected(other.id) for other in others):
            await self.connections.changed.ticket.wait()

    async def open(self, *audience: Organization, scope: bytes = SCOPE) -> None:
        ids = [self.id, *(other.id for other in audience)]
        await self.store.write(lambda tx: self.mesh.open_scope(tx, scope, ids))

    async def post(self, to: Organization, *parts: bytes, stage: str = "fit", tag: str = "t") -> int:
        return await self.store.write(lambda tx: self.mesh.post(tx, SCOPE, stage, to.id, tag, b"header", parts))

    async def receive(self, sender: Organization, stage: str = "fit") -> list[bytes]:
        """Take the next letter: its buffers."""
        letter = await self.mesh.next_mail(SCOPE, stage, sender.id)
        parts = [bytes(part) for part in letter.buffers]
        await self.store.write(lambda tx: self.mesh.take(tx, SCOPE, stage, sender.id, letter))
        return parts

    async def publish(self, kind: str, slot: str, body: bytes) -> None:
        await self.store.write(lambda tx: self.mesh.publish(tx, SCOPE, kind, slot, body))

    async def until_held(self, kind: str, slot: str, sender: Organization) -> bytes:
        while (body := self.mesh.find(SCOPE, kind, slot, sender.id)) is None:
            await self.mesh.changed(SCOPE)
        return body

    async def offer(self, data: bytes) -> bytes:
        digest = await self.store.put_file(data)
        await self.store.write(lambda tx: self.mesh.files.offer(tx, SCOPE, digest, len(data)))
        return digest


@contextmanager
def homes() -> Iterator[Path]:
    """A folder in memory where there is one: the store syncs after each commit, here to nothing."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fedpeer-mesh-", dir=memory if memory.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


async def introduce(*organizations: Organization) -> None:
    """Everybody adds the card of everybody else."""
    for one in organizations:
        for other in organizations:
            if one is not other:
                await one.connections.add_peer(other.card.text)
