"""The cast of the tests of sums: organizations with a mesh and an aggregation, on a network in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import trio

from fedpeer.aggregation.messages import Signed, parse
from fedpeer.aggregation.request import Request, Terms, Total
from fedpeer.aggregation.service import KIND, Aggregation, root_of
from fedpeer.crypto import Secret
from fedpeer.errors import FedpeerError
from fedpeer.events import Events
from fedpeer.identity import Identity
from fedpeer.mesh.connections.service import Connections
from fedpeer.mesh.service import Mesh
from fedpeer.store import RunInThread, Store, call_directly
from fedpeer.testing.network import MemoryNetwork

CONTRACT = b"c" * 32
HISTORY = b"h" * 32
COUNT = 1000
"""values in a vector; the pad makes 1024 elements of them"""
STALL_S = 600.0
NAMES = ["alice", "bob", "carol", "dave", "erin"]

Vector = npt.NDArray[np.uint32]


class Log:
    """Fails the test for what an operator should never see."""

    def debug(self, event: str, **facts: object) -> None: ...

    info = warning = debug

    def exception(self, event: str, **_facts: object) -> None:
        raise AssertionError(event)

    error = exception


class Daemon:
    """An organization's home on disk and, between `open` and the end of `live`, its mesh and its aggregation."""

    def __init__(self, name: str, folder: Path, network: MemoryNetwork) -> None:
        self.name, self.folder, self.host = name, folder / name, network.host(name)
        self.identity = Identity(Secret(name.encode().ljust(32, b".")))
        self.id = self.identity.id
        self.address = f"{name}:7420"
        self.card = self.identity.card(name, (self.address,)).text
        self.is_open = False
        self.scope = trio.CancelScope()
        self.roots: defaultdict[bytes, set[bytes]] = defaultdict(set)
        """the scopes of the sums of a contract"""

    def open(self, run_in_thread: RunInThread = call_directly, store_thread: RunInThread = call_directly) -> None:
        self.store = Store(self.folder, [*Connections.SCHEMAS, *Mesh.SCHEMAS, *Aggregation.SCHEMAS], store_thread)
        self.events: list[Any] = []
        events = Events()
        events.subscribe(self.events.append)
        facts: dict[str, Any] = {"events": events, "log": Log()}
        self.connections = Connections(
            self.identity, self.name, self.store, self.host, listen=(self.address,), addresses=(self.address,), **facts
        )
        self.mesh = Mesh(self.identity, self.connections, self.store, **facts)
        self.aggregation = Aggregation(self.mesh, self.store, self.identity, run_in_thread=run_in_thread, **facts)
        self.is_open = True

    async def live(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run everything and `work`, until `work` is done or `scope` is cancelled: then the daemon is gone."""
        self.scope = trio.CancelScope()
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.mesh.run)
                    await nursery.start(self.connections.run)
                    await nursery.start(self.aggregation.run)
                    await work()
                    nursery.cancel_scope.cancel()
        finally:
            self.store.close()
            self.is_open = False

    async def sum(
        self,
        parties: Sequence[Daemon],
        k: int = 0,
        *,
        turn: int = 1,
        stage: str = "fit",
        contract: bytes = CONTRACT,
        vector: Vector | None = None,
        params: bytes = b"params",
        history: bytes = HISTORY,
        group: Literal["data", "turn"] = "turn",
        profile: Literal["byz", "crash"] = "byz",
        min_parties: int = 3,
        used: int = COUNT,
        stall_s: float = STALL_S,
    ) -> Total:
        vector = vector_of(self.name, k) if vector is None else vector
        request = Request(stage, turn, k, vector, used, params, history, b"turn" + turn.to_bytes(28, "little"), group)
        terms = Terms(profile, min_parties, stall_s)
        ids = [party.id for party in parties]
        self.roots[contract].add(root_of(contract, ids))
        return await self.aggregation.sum(contract, ids, terms, request)

    async def agree(self, parties: Sequence[Daemon], mine: bytes, k: int = 0, turn: int = 1) -> bytes:
        return await self.aggregation.agree(CONTRACT, [party.id for party in parties], "fit", turn, k, mine)

    async def forget(self) -> None:
        def over(tx: Any) -> None:
            self.aggregation.forget(tx, CONTRACT)
            self.mesh.close_scope(tx, CONTRACT)

        await self.store.write(over)

    # what is seen of it

    def files(self) -> list[Path]:
        return [*self.store.files.iterdir(), *(self.folder / "fetched").glob("*/*")]

    def rows(self, table: str) -> list[Any]:
        return self.store.write_now(lambda tx: tx.all(f"SELECT * FROM {table}"))

    def held(self, contract: bytes = CONTRACT) -> dict[tuple[str, str], bytes]:
        """The records of sums that are here: (slot, sender) → message."""
        return {place: body for root in self.roots[contract] for place, body in self.mesh.held(root, KIND).items()}

    def messages(self, kind: str = "", sender: Daemon | None = None, contract: bytes = CONTRACT) -> list[Signed]:
        """The messages of sums that are here."""
        return [
            signed
            for (_, peer), body in self.held(contract).items()
            if (signed := parse(body)).kind.startswith(kind) and (sender is None or peer == sender.id)
        ]

    def steps(self) -> list[str]:
        return [event["step"] for event in self.events if event["event"] == "sum"]


def vector_of(name: str, k: int, count: int = COUNT) -> Vector:
    values = np.random.default_rng([*name.encode(), k]).integers(0, 2**16, count, np.uint32)
    return np.concatenate([values, np.zeros(-(count + 4) % 256 + 4, np.uint32)])


def expected(parties: Sequence[Daemon], k: int = 0, count: int = COUNT) -> list[int]:
    total: list[int] = sum(vector_of(party.name, k, count).astype(np.uint64) for party in parties).tolist()  # type: ignore[union-attr]
    return total


async def introduced(folder: Path, network: MemoryNetwork, *names: str, **threads: RunInThread) -> list[Daemon]:
    """Daemons that know each other and have the contract's scope open; their meshes do not run yet."""
    daemons = [Daemon(name, folder, network) for name in names]
    for daemon in daemons:
        daemon.open(**threads)
        for other in daemons:
            if other is not daemon:
                await daemon.connections.add_peer(other.card)
        await open_scope(daemon, daemons)
    return daemons


async def open_scope(daemon: Daemon, audience: Sequence[Daemon], contract: bytes = CONTRACT) -> None:
    """As the jobs do: the contract's scope, and that of its sums."""
    ids = [other.id for other in audience]

    def opened(tx: Any) -> None:
        daemon.mesh.open_scope(tx, contract, ids)
        daemon.aggregation.open(tx, contract, ids)

    await daemon.store.write(opened)
    daemon.roots[contract].add(root_of(contract, ids))


async def together(daemons: Sequence[Daemon], work: Callable[[Daemon], Awaitable[Any]]) -> list[Any]:
    """What `work` gave at each daemon, or the FedpeerError that it raised; all run until all are done."""
    results: dict[str, Any] = {}
    all_done = trio.Event()

    async def one(daemon: Daemon) -> None:
        try:
            results[daemon.name] = await work(daemon)
        except FedpeerError as error:
            results[daemon.name] = error
        if len(results) == len(daemons):
            all_done.set()
        await all_done.wait()

    async with trio.open_nursery() as nursery:
        for daemon in daemons:
            nursery.start_soon(daemon.live, partial(one, daemon))
    return [results[daemon.name] for daemon in daemons]


async def until(condition: Callable[[], bool]) -> None:
    """Look again and again, for at most an hour of the clock."""
    with trio.fail_after(3600):
        while not condition():
            await trio.sleep(0.01)
