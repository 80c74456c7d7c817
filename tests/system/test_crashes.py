"""A whole job of three organizations, ended at its system calls: nothing that was told is lost, and it is finished.

One process lives all three daemons (crash_lives.py), so what ends it is what a machine's end is. strace brings the end
or the error at the chosen call; the points are every n-th of all calls that write, from a random first one (printed as
the seed). FEDPEER_POINTS=all takes every one of them (an hour).
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from crash_lives import BURN, NAMES, STAGES, STORE_FAILED, add_rows, find
from trio.abc import Clock

from fedpeer.errors import DiskFull
from fedpeer.events import Event
from fedpeer.testing.federation import Organization, federation

LEAST_CALLS = 2000
"""A life makes more calls that write; fewer mean that it was not the life that is meant."""
POINTS = 40
MAKING = 0.3
"""Within this part of the calls of a life the three databases are made."""
LIVES = Path(__file__).with_name("crash_lives.py")

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]


class Lives:
    """A server of lives."""

    def __init__(self, under: Sequence[str | Path] = (), call: str = "", at: int = 0) -> None:
        self._call, self._at = call, at
        self._process = subprocess.Popen(
            [*under, sys.executable, LIVES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def live(self, folder: Path, point: int = 0) -> tuple[int, list[list[Any]]]:
        """One life, with the fault at its `point`-th call (0: none): how it ended, and what it told."""
        self.begin(folder, point)
        return self.end()

    def begin(self, folder: Path, point: int = 0) -> None:
        asked = {"folder": str(folder), "call": self._call, "burn": self._at - point if point else 0}
        assert self._process.stdin is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)

    def end(self) -> tuple[int, list[list[Any]]]:
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.readline())
        return answer["status"], answer["told"]

    @property
    def living(self) -> int | None:
        """The process of the life that was begun, None when it has ended (of a server without strace)."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0]) if children else None

    def close(self) -> None:
        self._process.communicate(timeout=60)


@contextmanager
def lives(folder: Path, call: str = "", fault: str = "", at: int = 0) -> Iterator[Lives]:
    """A server under strace. `fault` is brought to the `at`-th call of this name, "" for none."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    inject = ["-e", f"inject={call}:{fault}:when={at}"] if fault else []
    traced = ["-e", f"trace={call or ','.join(BURN)}", *inject, "-o", folder / "strace"]
    server = Lives(["strace", "-f", "-qq", *traced], call, at)
    try:
        yield server
    finally:
        server.close()


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def count(folder: Path) -> Counter[str]:
    """How many calls of each name a whole life makes."""
    with lives(folder) as server:
        status, told = server.live(fresh(folder / "counted"))
    assert status == 0
    assert all(said[2] == "done" for said in told if said[1] == "end")
    made: dict[str, Counter[str]] = defaultdict(Counter)  # by process
    for line in (folder / "strace").read_text().splitlines():
        pid, call = line.split(maxsplit=1)
        made[pid][call.partition("(")[0]] += 1
    found = max(made.values(), key=Counter.total)
    print("calls of one life:", dict(found))
    assert found.total() > LEAST_CALLS
    return found


def chosen(total: int, points: int, seed: int) -> Sequence[int]:
    """Every n-th call from one that the seed chooses."""
    step = 1 if os.environ.get("FEDPEER_POINTS") == "all" else max(1, total // points)
    return range(1 + seed * 7919 % step, total + 1, step)


def check_the_next_life(told: list[list[Any]], status: int, after: list[list[Any]], where: str) -> None:
    """What was told in the first life holds in the next one, and that one finishes the job, equal at all."""
    assert status == 0, where
    ends = {said[0]: said[2:] for said in after if said[1] == "end"}
    assert {state for state, *_ in ends.values()} == {"done"}, (where, ends)
    assert len({model for _, _, model, _ in ends.values()}) == 1, (where, ends)
    again = [said for said in after if said[1] in ("dataset", "submitted")]
    assert not [said for said in told if said in again], f"{where}: made again though it was told: {again}"
    for name, event, *_ in told:
        if event in ("approved", "agreed", "stage_started", "stage_done", "done"):
            assert event in ends[name][3], f"{where}: {name} told {event}, and its log has lost it"


def strike(folder: Path, faults: Mapping[str, str], ends: int, seed: int, points: int = POINTS) -> None:
    """Lives that end by a fault (by the name of the call) with this wait status, and the lives after them."""
    counted, struck, tried = count(folder), 0, 0
    totals = {call: counted[call] for call in faults}
    for call, fault in faults.items():
        share = max(4, points * totals[call] // sum(totals.values()))
        with lives(folder, call, fault, at=totals[call] + 1000) as faulty, lives(folder) as sound:
            for point in chosen(totals[call], share, seed):
                where = f"{call} number {point} of {totals[call]}, {fault}"
                home = fresh(folder / "home")
                status, told = faulty.live(home, point)
                tried += 1
                if status == 0:
                    # No two lives make quite the same number of calls; and SQLite is silent about some errors while
                    # it makes a database, when nothing was told yet that could be lost.
                    making = fault.startswith("error") and point <= MAKING * totals[call]
                    assert point > 0.9 * totals[call] or making, f"{where}: it did not strike"
                else:
                    assert status == ends, f"{where}: the life ended with {status}"
                    struck += 1
                check_the_next_life(told, *sound.live(home), where)
    print(f"{struck} of {tried} lives struck; a life makes {sum(totals.values())} such calls")
    assert struck >= 0.8 * tried
    assert tried >= points


def test_killed_at_any_call_that_writes_the_job_goes_on_and_nothing_told_is_lost(quick_path: Path, seed: int) -> None:
    strike(quick_path, dict.fromkeys(BURN, "signal=KILL"), signal.SIGKILL, seed)


@pytest.mark.parametrize(
    "faults",
    [
        {"fsync": "error=EIO", "fdatasync": "error=EIO"},
        {"pwrite64": "error=EIO", "rename": "error=EIO"},
        {"pwrite64": "error=ENOSPC"},
    ],
    ids=["sync-EIO", "write-EIO", "disk-full"],
)
def test_a_disk_that_fails_ends_the_daemon_and_nothing_told_is_lost(
    quick_path: Path, seed: int, faults: dict[str, str]
) -> None:
    strike(quick_path, faults, STORE_FAILED << 8, seed, points=10)


# a power cut: an ext4 file system of its own, which stops where it is and writes nothing more


SHUTDOWN, WITHOUT_ITS_LOG = 0x8004587D, 2  # EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH
CUTS = 8


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def volume(quick_path: Path) -> Iterator[Path]:
    """An empty file system of its own."""
    image, mounted = quick_path / "image", quick_path / "mounted"
    image.touch()
    os.truncate(image, 128 << 20)
    mounted.mkdir()
    try:
        run("mkfs.ext4", "-qF", "-E", "lazy_itable_init=0", image)
        run("mount", "-o", "loop", image, mounted)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("an image cannot be mounted: it takes root and a loop device")
    yield mounted
    run("umount", "--lazy", mounted)  # tables that are mapped may not be collected yet


def test_after_a_power_cut_everything_that_was_told_is_there(volume: Path, seed: int) -> None:
    chance, cuts = random.Random(seed), 0
    server = Lives()
    try:
        begun = time.monotonic()
        assert server.live(fresh(volume / "home"))[0] == 0
        whole_s = time.monotonic() - begun
        while cuts < CUTS:
            home, begun = fresh(volume / "home"), time.monotonic()
            server.begin(home)
            time.sleep(chance.uniform(0, whole_s))
            pid = server.living
            with suppress(ProcessLookupError):  # it may have ended just now
                if pid is not None:
                    os.kill(pid, signal.SIGSTOP)  # so that nothing is told after the cut
            folder = os.open(volume, os.O_RDONLY)
            fcntl.ioctl(folder, SHUTDOWN, struct.pack("I", WITHOUT_ITS_LOG))
            os.close(folder)
            with suppress(ProcessLookupError):
                if pid is not None:
                    os.kill(pid, signal.SIGKILL)
            cuts += pid is not None
            if pid is None:  # it had ended: this machine is faster now
                whole_s = min(whole_s, 0.9 * (time.monotonic() - begun))
            _, told = server.end()
            image = volume.with_name("image")
            run("umount", volume)
            run("mount", "-o", "loop", image, volume)
            home.mkdir(exist_ok=True)  # it was made just now, and nobody had been told of it
            check_the_next_life(told, *server.live(home), where=f"cut number {cuts} (told: {told})")
    finally:
        server.close()


# a disk that is full


async def test_on_a_full_disk_what_runs_goes_on_and_nothing_new_begins_until_there_is_room(
    autojump_clock: Clock, volume: Path
) -> None:
    async with federation(volume, NAMES, find=find) as peers:
        await add_rows(peers)
        alice, junk, filled = peers["alice"].daemon, volume / "junk", trio.Event()
        for peer in peers.values():
            peer.daemon.store.reserve(12 << 20)  # a log grows to 4 MiB before it is written back

        def fill(event: Event) -> None:
            if event["event"] == "stage_started" and not filled.is_set():
                filled.set()
                with junk.open("wb", buffering=0) as file, suppress(OSError):
                    while True:
                        file.write(bytes(1 << 20))
                with junk.open("ab", buffering=0) as file, suppress(OSError):
                    while True:
                        file.write(bytes(1 << 10))

        alice.events.subscribe(fill)
        job = await alice.jobs.submit(peers.contract(STAGES))
        views = [await peer.daemon.jobs.wait(job.id) for peer in peers.values() if await heard(peer, job.id)]
        assert [view.state for view in views] == ["done"] * 3, [view.error for view in views]
        assert filled.is_set()
        assert alice.store.scarce
        with pytest.raises(DiskFull, match="Make room"):
            await alice.jobs.submit(peers.contract(STAGES, name="another"))
        assert [view.name for view in await alice.catalog.list()] == ["rows"]

        junk.unlink()
        await alice.catalog.remove("rows")  # any write
        assert not alice.store.scarce


async def heard(peer: Organization, job: str) -> bool:
    """Wait until it knows the job."""
    while job not in [view.id for view in await peer.daemon.jobs.list()]:
        await trio.sleep(0.1)
    return True
