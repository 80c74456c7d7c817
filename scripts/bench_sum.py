"""One real sum: n daemons with their workers on this machine, over real TCP, with what it costs each of them.

Each daemon has a home, a key, a store and a port of its own, as in the demo; the stage is scripts/algorithms/bench,
one sum of d floats at 16 bits (3 bytes each on the wire). Measured from the moment when the first worker has made its
vector: seconds until the last has the total, CPU seconds of each daemon and its worker, bytes that each daemon says it
sent (the kernel's counters must agree), beside what the protocol says; and memory.

Memory is PSS of a daemon and its worker together, sampled every 20 ms: the most during the sum, less the least while
the same processes are idle (the worker waits in a sum of one float before it makes its vector), less the vector of
the stage, 4 bytes a float, which it holds all the time. The total that the stage is given, 8 bytes a float, is counted
as ours. At most 16 bytes a float are meant to be used at 10 M floats; a few MB that do not grow with them are in it.
Only root may see the PSS of daemons.

The totals of all must be the bits of numpy's sum; the exit code is 1 if they are not.

    ./scripts/bench sum [--json] [--n 10] [--d 1000000]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from algorithms.bench import vector
from bench_secagg import bytes_expected
from daemons import START_S, Daemon, DemoError, children, fedpeer, free_ports, homes, last_words, until
from demo import Job, Kernel
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from secagg_case import Case

from fedpeer.admin.client import AdminError

COMMAND = (sys.executable, str(Path(__file__).with_name("staged_daemon.py")))
STEPS = ("started", "scattered", "added", "committed", "released", "opened", "unmasked", "final", "total")
BYTES_MEANT = 16
"""of memory for each float, at most"""
SAMPLE_S = 0.02
TICKS = os.sysconf("SC_CLK_TCK")

CONTRACT = """\
version = 1
name = "sum"

[participants]
{participants}

[[stage]]
id = "sum"
run = "bench.vector:add"
params = {{ d = {d} }}
"""

people = Console(stderr=True)


def cpu_seconds(daemon: Daemon) -> float:
    """Of a daemon, of its workers that have ended, and of those that live."""

    def ticks(pid: int, fields: int) -> int:
        return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11 : 11 + fields]))

    total = ticks(daemon.pid, 4)
    for pid in children(daemon.pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            total += ticks(pid, 2)
    return total / TICKS


def pss(pid: int) -> int:
    """Bytes of a process; pages that it shares with others in equal parts. PermissionError where it is not for us."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    return 0


class Memory:
    """Samples PSS of each daemon with its workers, in a thread, until it is closed."""

    def __init__(self, daemons: Sequence[Daemon]) -> None:
        self.daemons = daemons
        self.idle: list[list[int]] = [[] for _ in daemons]
        """while this one's worker waits, with nothing made"""
        self.busy: list[list[int]] = [[] for _ in daemons]
        """from when its vector is made"""
        self.into: list[list[list[int]] | None] = [None] * len(daemons)
        """`idle`, `busy` or none of them, of each daemon"""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_S):
            for number, daemon in enumerate(self.daemons):
                into = self.into[number]
                if into is None:
                    continue
                used = 0
                for pid in (daemon.pid, *children(daemon.pid)):
                    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the worker has ended
                        try:
                            used += pss(pid)
                        except PermissionError:
                            return
                if into is self.into[number]:  # not while it went from one to the other
                    into[number].append(used)


def expected(n: int, d: int) -> str:
    """The digest of numpy's sum."""
    total = np.zeros(d)
    for number in range(n):
        total += vector.values(number, d)
    return vector.digest(total)


POLICY = 'approve = "auto"\nstages = ["bench.*"]\nmin_cell = 0\nsandbox = "best-effort"\n'


def connect(folder: Path, n: int) -> tuple[list[Daemon], list[dict[str, Any]]]:
    """n daemons that run and are connected with each other, and their cards."""
    names = [f"peer{number}" for number in range(n)]
    daemons = [Daemon(name, folder, port, COMMAND) for name, port in zip(names, free_ports(n), strict=True)]
    here = [f"127.0.0.1:{daemon.port}" for daemon in daemons]
    cards = fedpeer(
        *(
            (daemon, ["init", "--name", daemon.name, "--listen", at, "--address", at])
            for daemon, at in zip(daemons, here, strict=True)
        )
    )
    for daemon in daemons:
        daemon.start()
    for daemon in daemons:
        daemon.wait_ready()
        daemon.client.call("policy.set", text=POLICY)
        for card in cards:
            if card["name"] != daemon.name:
                daemon.client.call("peer.add", card=card["card"])
    for _ in until(START_S, "the daemons are not connected with each other"):
        if all(daemon.client.call("status")["connected"] == n - 1 for daemon in daemons):
            return daemons, cards
    raise AssertionError("unreachable")


class Counts(NamedTuple):
    """Of each daemon so far."""

    cpu: list[float]
    sent: list[int]
    """bytes that it says it sent"""
    kernel: list[int] | None
    """that the kernel says; None where that cannot be seen"""


class Sum:
    """The job, followed to its end; what was counted before and after."""

    def __init__(self, daemons: Sequence[Daemon], job: Job, kernel: Kernel | None) -> None:
        self.daemons, self.job, self._kernel = daemons, job, kernel
        self.begun = self.ended = 0.0
        self._before = Counts([], [], None)
        self._have: set[int] = set()
        self.memory = Memory(daemons)

    def follow(self) -> None:
        """Show it while it runs. Raises DemoError if it fails."""
        columns = (TextColumn("{task.description:7}"), BarColumn(), TextColumn("{task.fields[step]}"))
        try:
            with Progress(*columns, console=people, transient=True, disable=not people.is_terminal) as progress:
                bars = [progress.add_task(d.name, total=len(STEPS), step="starts a worker") for d in self.daemons]
                for number, event in self.job.events():
                    self._see(number, event)
                    step = event.get("step")
                    if step in STEPS and event["k"] == 1:
                        progress.update(bars[number], completed=1 + STEPS.index(step), step=step)
        finally:
            self.memory.close()

    def _see(self, number: int, event: dict[str, Any]) -> None:
        into = self.memory.into
        match event:
            case {"event": "sum", "step": "started", "k": 0}:
                into[number] = self.memory.idle
            case {"event": "sum", "step": "unmasked", "k": 0}:
                into[number] = None
            case {"event": "progress", "done": 0}:
                if not self.begun:
                    self.begun = time.monotonic()
                    self._before = self._count()
                into[number] = self.memory.busy
            case {"event": "progress", "done": 1}:
                self._have.add(number)
                if len(self._have) == len(self.daemons):
                    self.ended = time.monotonic()
            case {"event": "failed" | "cancelled" as how, **facts}:
                raise DemoError(f"the job {how} at {self.daemons[number].name}: {facts.get('message', '')}")

    def _count(self) -> Counts:
        counted = self._kernel.counted() if self._kernel else None
        return Counts(
            [cpu_seconds(daemon) for daemon in self.daemons],
            [daemon.client.call("status")["bytes_sent"] for daemon in self.daemons],
            counted and [sent for sent, _ in counted],
        )

    @property
    def seconds(self) -> float:
        return self.ended - self.begun

    def counted(self) -> Counts:
        """From when the first vector was made until now."""
        (cpu, sent, kernel), (cpu_now, sent_now, kernel_now) = self._before, self._count()
        return Counts(
            [now - before for before, now in zip(cpu, cpu_now, strict=True)],
            [now - before for before, now in zip(sent, sent_now, strict=True)],
            [now - before for before, now in zip(kernel, kernel_now, strict=True)] if kernel and kernel_now else None,
        )

    def used(self, d: int) -> list[int | None]:
        """Bytes above idle, without the vector of the stage."""
        samples = zip(self.memory.idle, self.memory.busy, strict=True)
        return [max(busy) - min(idle) - 4 * d if idle and busy else None for idle, busy in samples]


def measure(folder: Path, daemons: list[Daemon], n: int, d: int) -> tuple[dict[str, Any], list[str]]:
    """The numbers of --json, and the checks that failed."""
    people.print(f"[dim]{n} daemons are made[/dim]")
    made, cards = connect(folder, n)
    daemons += made
    try:
        kernel = Kernel(daemons)
    except OSError as error:
        kernel = None
        people.print(f"[yellow]the kernel's counters cannot be read here ({error}): not compared[/yellow]")
    participants = "\n".join(f'{card["name"]} = "{card["id"]}"' for card in cards)
    text = CONTRACT.format(participants=participants, d=d)
    submitted = daemons[0].client.call("job.submit", text=text)
    run = Sum(daemons, Job(daemons, submitted["id"]), kernel)
    run.follow()
    problems = kernel.differences() if kernel else []
    counted, used = run.counted(), run.used(d)
    reports = [view["outputs"][0]["values"] for view in run.job.views()]
    right = expected(n, d)
    if any(report != {"digest": right, "survivors": n} for report in reports):
        problems.append(f"the totals are not numpy's, {right}: {reports}")
    said = bytes_expected(Case(n, d, 0))
    peers = [
        {
            "name": daemon.name,
            "cpu_seconds": round(cpu, 2),
            "bytes_sent": sent,
            "bytes_kernel": kernels,
            "memory": memory,
        }
        for daemon, cpu, sent, kernels, memory in zip(
            daemons, counted.cpu, counted.sent, counted.kernel or [None] * n, used, strict=True
        )
    ]
    result = {
        "bench": "sum",
        "n": n,
        "d": d,
        "seconds": round(run.seconds, 2),
        "bytes_expected": round(said),
        "bytes_ratio": round(sum(counted.sent) / n / said, 4),
        "memory_meant": BYTES_MEANT * d,
        "totals_equal": len({report["digest"] for report in reports}) == 1,
        "total_exact": not any(report["digest"] != right for report in reports),
        "peers": peers,
    }
    return result, problems


def show(result: dict[str, Any]) -> None:
    out = Console()
    table = Table("peer", "CPU s", "MB sent", "MB by the kernel", "MB of memory", box=None)

    def megabytes(amount: int | None, digits: int) -> str:
        return "not to be seen" if amount is None else f"{amount / 1e6:.{digits}f}"

    for peer in result["peers"]:
        sent, kernel = megabytes(peer["bytes_sent"], 3), megabytes(peer["bytes_kernel"], 3)
        table.add_row(peer["name"], f"{peer['cpu_seconds']:.2f}", sent, kernel, megabytes(peer["memory"], 1))
    table.add_row("meant", "", megabytes(result["bytes_expected"], 3), "", megabytes(result["memory_meant"], 1))
    out.print(table)
    exact = "the same bits as numpy's" if result["total_exact"] else "NOT numpy's"
    out.print(
        f"\na sum of {result['d']:,} floats over {result['n']} daemons: {result['seconds']:.2f} s; bytes sent "
        f"{result['bytes_ratio']:.3f} of what the protocol says; the total at all is {exact}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    parser.add_argument("--n", type=int, default=10, help="daemons, 3 to 50")
    parser.add_argument("--d", type=int, default=1_000_000, help="floats")
    options = parser.parse_args()
    if not (3 <= options.n <= 50 and 1 <= options.d <= 1 << 28):
        parser.error("3 to 50 daemons, 1 to 2^28 floats")
    daemons: list[Daemon] = []
    problems: list[str] = []
    code = 0
    with homes() as (folder, killed):
        try:
            result, problems = measure(folder, daemons, options.n, options.d)
            show(result)
            if options.json:
                print(json.dumps(result))
        except (DemoError, AdminError) as error:
            problems.append(str(error))
            sys.stderr.write(last_words(daemons))
        except KeyboardInterrupt:
            code = 130
    for problem in [*problems, *(f"had to be killed: {line}" for line in killed)]:
        people.print(f"[red]bench: {problem}[/red]", highlight=False)
        code = code or 1
    return code


if __name__ == "__main__":
    sys.exit(main())
