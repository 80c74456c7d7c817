"""The daemons of a demo or a test: real processes with homes of their own, all of them gone at the end.

Nothing of fedpeer is imported but the client of the admin sockets; the rest goes through the command line.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedpeer.admin.client import AdminError, Client

FEDPEER = str(Path(sys.executable).with_name("fedpeer"))
START_S, GRACE_S = 20.0, 5.0
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None)


class DemoError(Exception):
    """Something did not go as it must; the message is for people."""


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [server.getsockname()[1] for server in held]
    finally:
        for server in held:
            server.close()


class Daemon:
    """One clinic: its home, its port, its process, and a client of its admin socket."""

    def __init__(self, name: str, folder: Path, port: int, command: Sequence[str] = (FEDPEER,)) -> None:
        self.name = name
        self.command = command
        self.home = folder / name
        self.port = port
        self.log = folder / f"{name}.log"
        self.client = Client(self.home / "admin" / "admin.sock")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """In a session of its own, where the terminal's Ctrl-C does not reach; it is ended with this process."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, "--home", str(self.home), "run"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
                start_new_session=True,
                preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
            )

    def wait_ready(self) -> None:
        for _ in until(START_S, f"{self.name}'s daemon is not ready"):
            self.check()
            with contextlib.suppress(AdminError):
                self.client.call("status")
                return

    def kill(self) -> None:
        """SIGKILL: it has no time for anything."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def check(self) -> None:
        """Raise DemoError when the daemon has ended by itself."""
        if self.process is not None and self.process.poll() is not None:
            raise DemoError(f"{self.name}'s daemon ended with {self.process.returncode}")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("FEDPEER_")}


def fedpeer(*commands: tuple[Daemon, Sequence[str]]) -> list[Any]:
    """What `fedpeer --json …` answers, for commands that run at the same time. Raises DemoError."""
    running: list[subprocess.Popen[str]] = []
    answers = []
    try:
        for daemon, words in commands:
            line = [FEDPEER, "--json", "--home", str(daemon.home), *words]
            running.append(
                subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
            )
        for process, (daemon, words) in zip(running, commands, strict=True):
            out, err = process.communicate()
            try:
                answer = json.loads(out.splitlines()[-1])
            except (ValueError, IndexError):
                raise DemoError(f"fedpeer {' '.join(words[:2])} at {daemon.name}: {(err or out).strip()}") from None
            if not answer["ok"]:
                error = answer["error"]
                raise DemoError(
                    f"fedpeer {' '.join(words[:2])} at {daemon.name}: {error['message']} {error.get('hint', '')}"
                )
            answers.append(answer["data"])
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
    return answers


def meet(daemons: Sequence[Daemon]) -> None:
    """Make these peers, start their daemons and exchange their cards; return when each is connected with each other."""
    made = []
    for daemon in daemons:
        where = f"127.0.0.1:{daemon.port}"
        made.append((daemon, ["init", "--name", daemon.name, "--listen", where, "--address", where]))
    cards = fedpeer(*made)
    for daemon in daemons:
        daemon.start()
    for daemon in daemons:
        daemon.wait_ready()
    others = [(daemon, card["card"]) for daemon in daemons for card in cards if card["name"] != daemon.name]
    fedpeer(*((daemon, ["peer", "add", card]) for daemon, card in others))
    for _ in until(START_S, "the daemons are not connected with each other"):
        if all(daemon.client.call("status")["connected"] == len(daemons) - 1 for daemon in daemons):
            break


def until(seconds: float, otherwise: str) -> Iterator[None]:
    """Again and again with short pauses; DemoError(otherwise) after so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.05)
    raise DemoError(f"{otherwise} after {seconds:g} s")


def children(parent: int) -> dict[int, str]:
    """pid → command line of the processes whose parent is `parent`, zombies left out."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, ppid = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(ppid) == parent and state != "Z":
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ").strip()
    return found


def stop(grace_s: float = GRACE_S) -> list[str]:
    """End every process this one started, and theirs: SIGTERM, then SIGKILL. What had to be killed is returned.

    After `adopt_orphans`, what a daemon leaves behind is a child of this process, and so is found.
    """
    killed = []
    for pid in children(os.getpid()):
        _signal(pid, signal.SIGTERM)
    end = time.monotonic() + grace_s
    while (left := children(os.getpid())) and time.monotonic() < end:
        time.sleep(0.02)
        _reap()
    while left:
        for pid, line in left.items():
            killed.append(line)
            _signal(pid, signal.SIGKILL)
        time.sleep(0.02)
        _reap()
        left = children(os.getpid())
    _reap()
    return killed


@contextlib.contextmanager
def homes() -> Iterator[tuple[Path, list[str]]]:
    """A folder for the homes of daemons. However it ends, every process that was started is gone then, and the folder.

    Beside it the command lines of those that had to be killed, once it has ended. SIGTERM and SIGHUP end it by
    SystemExit.
    """

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGHUP, end)
    adopt_orphans()
    parent = tempfile.gettempdir()
    made = Path(tempfile.mkdtemp(prefix="fp", dir=parent if len(parent) <= 40 else "/tmp"))  # noqa: S108 - 107 bytes for a socket
    killed: list[str] = []
    try:
        yield made, killed
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # what follows takes seconds at most
        killed += stop()
        shutil.rmtree(made, ignore_errors=True)


def last_words(daemons: Sequence[Daemon]) -> str:
    """The ends of their logs."""
    logs = [(daemon.name, daemon.log.read_text()) for daemon in daemons if daemon.log.exists()]
    return "".join(f"{name}: {line}\n" for name, log in logs for line in log.splitlines()[-15:])


def adopt_orphans() -> None:
    """From now on this process is the parent of what its descendants leave behind."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _reap() -> None:
    """Collect children that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
