"""A whole federation in one process: n real daemons on a network in memory, with workers that are coroutines.

    async with federation(folder, ["alice", "bob", "carol"]) as peers:
        await peers["alice"].daemon.catalog.add("rows", …)
        job = await peers["alice"].daemon.jobs.submit(peers.contract(STAGES))
        await peers["bob"].restart()                        # as after a kill: only what is on disk is left
        await peers["bob"].daemon.jobs.wait(job.id)

Under trio's autojump clock time passes only when everybody waits, and the daemons' wall clock is that clock. Arithmetic
and the store run inline, for threads do not mix with it. To see what a kill does at any point, `Organization.step`
is called at every step of a worker, and may ask for the death of the worker or of the whole daemon.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import trio

from fedpeer import stage
from fedpeer.config import Config
from fedpeer.crypto import Secret, hash_
from fedpeer.daemon import Daemon
from fedpeer.governance import policy
from fedpeer.identity import Identity
from fedpeer.jobs.contract import FindStage
from fedpeer.store import call_directly
from fedpeer.testing.network import MemoryNetwork
from fedpeer.testing.workers import CoroutineWorker
from fedpeer.worker import protocol

LAX = """\
approve = "auto"
stages = ["*"]
min_parties = 2
assumed_colluders = 0
min_rows = 0
min_cell = 0
max_parameters_per_row = inf
max_depth = 1000
min_batch = 0
no_row_differencing = false
no_party_differencing = false
jobs_per_day = 1_000_000
psi_per_version = 1_000_000
psi_max_ids = 100_000_000
min_intersection = 0
sandbox = "best-effort"
[budget]
epsilon = inf
per_job = inf
"""
"""A policy for data that is nobody's: everything may run at once."""
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
PORT = 7420
T = TypeVar("T")


class Organization:
    """One peer: its folder and key outlive any of its daemons."""

    def __init__(self, federation: Federation, name: str) -> None:
        self.name = name
        self.identity = Identity(Secret(hash_("fp.testing", name.encode())))
        self.step: Callable[[protocol.Message], str] = lambda _message: ""
        """"worker": the worker dies here, "daemon": the daemon does, "" nobody."""
        self.at_store: Callable[[], bool] = lambda: False
        """Whether the daemon dies after this use of its store: what it wrote is there, what it would do next is not."""
        self.step_s = 0.0
        """So long each step of a worker takes."""
        self.deaths = 0
        self._federation = federation
        self._folder = federation.folder / name
        self._scope = trio.CancelScope()
        self._gone = trio.Event()
        self._daemon: Daemon | None = None
        self._up = False

    @property
    def daemon(self) -> Daemon:
        assert self._daemon is not None, f"{self.name} is down"
        return self._daemon

    async def start(self) -> None:
        """Start the daemon on what is in the folder."""
        federation = self._federation
        address = f"{self.name}:{PORT}"
        config = Config(
            home=self._folder,
            name=self.name,
            listen=(address,),
            addresses=(address,),
            state=self._folder / "state",
            key_file=self._folder / "identity.key",
            socket=self._folder / "admin.sock",
            log_level="info",
            origin={},
        )
        self._daemon = Daemon(
            config,
            self.identity,
            federation.network.host(self.name),
            run_in_thread=call_directly,
            run_store=self._run_store,
            start_worker=self._start_worker,
            now=federation.now,
            find=federation.find,
        )
        self._scope, self._gone = trio.CancelScope(), trio.Event()
        self._up = False
        await federation.nursery.start(self._live, self._daemon, self._scope, self._gone)
        self._up = True

    async def set_policy(self, text: str) -> None:
        """What `fedpeer policy set` does."""
        time = self._federation.now().isoformat()
        await self.daemon.store.write(lambda tx: policy.keep(tx, text, 0, time))
        await self.daemon.use_policy()

    async def stop(self) -> None:
        """End the daemon. In a simulation this is a kill: nothing is written at the end but what is on disk already."""
        self._scope.cancel()
        await self._gone.wait()
        self._daemon = None

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    def kill(self) -> None:
        """The daemon dies here and now, and is started again as a service manager does. Nothing if it is dying."""
        if not self._scope.cancel_called:
            self.deaths += 1
            self._scope.cancel()
            self._federation.nursery.start_soon(self._rise)

    async def _live(
        self,
        daemon: Daemon,
        scope: trio.CancelScope,
        gone: trio.Event,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        try:
            with scope:
                await daemon.run(task_status=task_status)
        finally:
            gone.set()

    async def _run_store(self, function: Callable[[], T], /) -> T:
        result = function()
        if self._up and self.at_store():
            self.kill()
            await trio.lowlevel.checkpoint_if_cancelled()
        return result

    async def _start_worker(self, start: protocol.Start) -> CoroutineWorker:
        await trio.lowlevel.checkpoint()
        return CoroutineWorker(start, self.daemon.find, self._at_step)

    async def _at_step(self, message: protocol.Message) -> bool:
        await trio.sleep(self.step_s)
        victim = self.step(message)
        if victim == "daemon":
            self.kill()
            await trio.sleep_forever()  # until the cancellation is here: nothing is done any more
        self.deaths += bool(victim)
        return bool(victim)

    async def _rise(self) -> None:
        """What a service manager does after a daemon died."""
        await self._gone.wait()
        await trio.sleep(0.1)
        await self.start()


class Federation(Mapping[str, Organization]):
    """The organizations by name."""

    def __init__(
        self, folder: Path, names: Sequence[str], network: MemoryNetwork, nursery: trio.Nursery, find: FindStage
    ) -> None:
        self.folder, self.network, self.nursery, self.find = folder, network, nursery, find
        self.ahead_s = 0.0
        """So far the wall clock of all is ahead of trio's: add to it to let days pass without living them."""
        self._organizations = {name: Organization(self, name) for name in names}

    def __getitem__(self, name: str) -> Organization:
        return self._organizations[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._organizations)

    def __len__(self) -> int:
        return len(self._organizations)

    def now(self) -> datetime:
        """The wall clock of all of them."""
        return EPOCH + timedelta(seconds=trio.current_time() + self.ahead_s)

    async def introduce(self) -> None:
        """Everybody adds everybody's card, and waits until all are connected."""
        for one in self.values():
            for other in self.values():
                if one is not other:
                    await one.daemon.connections.add_peer(other.daemon.connections.card.text)
        await self.connected()

    async def connected(self) -> None:
        """Wait until everybody is connected with everybody."""
        while not all(peer.connected for one in self.values() for peer in one.daemon.connections.peers()):  # noqa: ASYNC110
            await trio.sleep(0.1)

    def contract(self, stages: str, *, name: str = "job", rules: str = "") -> str:
        """The TOML of a contract of all of them, each alias being the name."""
        participants = "\n".join(f'{one.name} = "{one.identity.id}"' for one in self.values())
        return f'version = 1\nname = "{name}"\n[participants]\n{participants}\n{stages}\n[rules]\n{rules}\n'


@asynccontextmanager
async def federation(
    folder: Path,
    names: Sequence[str],
    *,
    network: MemoryNetwork | None = None,
    find: FindStage = stage.find,
    introduced: bool = True,
    rules: str | None = LAX,
) -> AsyncIterator[Federation]:
    """Daemons of these names, running, and connected with each other unless `introduced` is False.

    `rules`: the policy that each is given; None leaves the strict default.
    """
    async with trio.open_nursery() as nursery:
        peers = Federation(folder, names, network or MemoryNetwork(), nursery, find)
        for one in peers.values():
            await one.start()
            if rules is not None:
                await one.set_policy(rules)
        if introduced:
            await peers.introduce()
        yield peers
        nursery.cancel_scope.cancel()
