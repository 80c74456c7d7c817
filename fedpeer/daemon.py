"""The daemon: everything is made here, in order, and lives in one nursery.

Order: configuration, identity, store, connections, mesh, catalog, aggregation, jobs, then the admin socket; READY is
told to systemd when this peer listens and the admin socket answers. SIGTERM and SIGINT end it in order: whatever it was
doing is in the store, and goes on at the next start. A StoreError ends it too, with an error: it is clean after a
restart.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog
import trio

from fedpeer import config as configuration
from fedpeer import log as logging
from fedpeer import stage, systemd
from fedpeer.admin import caller
from fedpeer.admin import service as admin
from fedpeer.aggregation.service import Aggregation
from fedpeer.config import Config
from fedpeer.data.catalog import Catalog
from fedpeer.events import Events
from fedpeer.governance import audit
from fedpeer.identity import Identity, load_key_file
from fedpeer.jobs.contract import FindStage
from fedpeer.jobs.execution import StartWorker
from fedpeer.jobs.job.service import time_of
from fedpeer.jobs.lifecycle import TERMINAL
from fedpeer.jobs.service import Jobs
from fedpeer.mesh.connections.service import Connections
from fedpeer.mesh.service import Mesh
from fedpeer.network import Network, TcpNetwork
from fedpeer.store import Record, RunInThread, Store
from fedpeer.worker.protocol import Start
from fedpeer.worker.service import WorkerProcess

T = TypeVar("T")
PR_SET_DUMPABLE = 4
M_MMAP_THRESHOLD = -3
MMAP_THRESHOLD = 1 << 20
"""Blocks of so many bytes are given back to the system when they are freed."""
STATUS_S = 5.0
RESERVE_BYTES = 16 << 20
"""Room on the disk for what runs when the disk is full."""
_PLACE = re.compile(r'\s*File "[^"]+", line \d+, in [\w<>.]+')


class Daemon:
    """One peer. The parts are public: they are what the admin commands work on.

    `now` and `find` are the wall clock and the stages that are installed; simulations have their own.
    """

    def __init__(
        self,
        config: Config,
        identity: Identity,
        network: Network,
        *,
        run_in_thread: RunInThread,
        run_store: RunInThread,
        start_worker: StartWorker,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        find: FindStage = stage.find,
    ) -> None:
        self._now = now
        self.config = config
        self.identity = identity
        self.name = config.name
        self.now = now
        self.started_at = now()
        self.events = Events()
        self.log = structlog.get_logger()
        schemas = [*Connections.SCHEMAS, *Mesh.SCHEMAS, *Aggregation.SCHEMAS, *Catalog.SCHEMAS, *Jobs.SCHEMAS]
        self.store = Store(config.state, schemas, run_store)
        self.store.sweep(schemas)
        self.connections = Connections(
            identity,
            config.name,
            self.store,
            network,
            listen=config.listen,
            addresses=config.addresses,
            events=self.events,
            log=self.log,
        )
        self.mesh = Mesh(identity, self.connections, self.store, events=self.events, log=self.log)
        self.catalog = Catalog(self.store, run_in_thread)
        self.aggregation = Aggregation(
            self.mesh, self.store, identity, run_in_thread=run_in_thread, events=self.events, log=self.log
        )
        self.jobs = Jobs(
            self.connections,
            self.mesh,
            self.aggregation,
            self.catalog,
            self.store,
            start_worker=start_worker,
            run_in_thread=run_in_thread,
            events=self.events,
            log=self.log,
            now=now,
            find=find,
        )

    def record(self, event: str) -> Record:
        """What appends this event, and who asked for it, to the audit log in the transaction it is about."""
        by, time = caller.current(), time_of(self._now())
        who = {} if by is None else {"uid": by.uid, "user": by.user}
        return lambda tx, facts: audit.append(tx, time, event, None, {**facts, **who})

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Live until cancelled. Started when this peer listens and the jobs of the last run go on."""
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.mesh.run)
                await nursery.start(self.connections.run)
                await nursery.start(self.aggregation.run)
                await nursery.start(self.jobs.run)
                task_status.started()
        finally:
            self.store.close()


def run(home: Path) -> int:
    """`fedpeer run`: the daemon in the foreground until a signal ends it; the exit code. Raises what ended it else."""
    os.umask(0o077)
    sys.setswitchinterval(0.0002)  # beside a busy loop, mask generation in threads is 10 times slower at the default
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # nobody reads our memory, no core of it
    if hasattr(libc, "mallopt"):  # glibc; it would keep up to 32 MiB of each freed vector or file for later
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
    config = configuration.load(home)
    logging.configure(config.log_level)
    identity = load_key_file(config.key_file)
    try:
        trio.run(_main, config, identity)
    except BaseExceptionGroup as group:
        raise _first(group) from group
    return 0


async def _main(config: Config, identity: Identity) -> None:
    cores = len(os.sched_getaffinity(0))
    daemon = Daemon(
        config,
        identity,
        TcpNetwork(),
        run_in_thread=_threads(cores),
        run_store=_threads(1),  # one writer
        start_worker=_start_worker,
    )
    daemon.store.reserve(RESERVE_BYTES)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            await nursery.start(daemon.run)
            await nursery.start(partial(admin.serve, daemon, daemon.log))
            nursery.start_soon(_tell_status, daemon)
            nursery.start_soon(_feed_watchdog, daemon)
            systemd.notify("READY=1")
            daemon.log.info("ready", peer=daemon.name, listen=",".join(daemon.connections.listening))
            async for number in signals:
                systemd.notify("STOPPING=1", "STATUS=stopping")
                daemon.log.info("stopping", signal=signal.Signals(number).name)
                nursery.cancel_scope.cancel()
                break


def _threads(count: int) -> RunInThread:
    """At most `count` threads at a time. What was begun is finished, even when the task is cancelled."""
    limiter = trio.CapacityLimiter(count)

    async def run_in_thread(function: Callable[[], T], /) -> T:
        return await trio.to_thread.run_sync(function, limiter=limiter)

    return run_in_thread


async def _start_worker(start: Start) -> WorkerProcess:
    log = structlog.get_logger()
    worker = await WorkerProcess.start(
        start, log=lambda line: log.info("worker_said", stage=start.stage, **worker_remark(line))
    )
    log.info("worker_started", stage=start.stage, pid=worker.pid)
    return worker


def worker_remark(line: str) -> dict[str, str | int]:
    """What the log keeps of a line of a worker's standard error: a place in the program, of any other its length.

    A library's warning or a stage's print may show values of somebody's data.
    """
    return {"reason": line.strip()} if _PLACE.fullmatch(line) else {"size": len(line)}


async def _tell_status(daemon: Daemon) -> None:
    """One line of `systemctl status`, whenever it changes."""
    told = ""
    while True:
        peers = daemon.connections.peers()
        living = [job for job in await daemon.jobs.list() if job.state not in TERMINAL]
        status = f"STATUS={sum(peer.connected for peer in peers)} of {len(peers)} peers connected, {len(living)} jobs"
        if status != told:
            systemd.notify(status)
            told = status
        await trio.sleep(STATUS_S)


async def _feed_watchdog(daemon: Daemon) -> None:
    """While the event loop turns and the store answers."""
    interval = systemd.watchdog_interval()
    while interval is not None:
        await daemon.store.read(lambda tx: tx.one("SELECT 1"))
        systemd.notify("WATCHDOG=1")
        await trio.sleep(interval)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What is told of several that ended it together: the first."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
