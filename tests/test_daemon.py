"""`fedpeer run` as a process: it tells systemd what it does, and ends in order."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpeer.admin.client import Client
from fedpeer.daemon import swaps, worker_remark

FEDPEER = [sys.executable, "-m", "fedpeer.cli"]


class Manager:
    """What systemd is to a service: a socket for its remarks."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.path))
        self.socket.settimeout(60)
        self.heard: list[str] = []

    def until(self, word: str) -> None:
        while word not in self.heard:
            self.heard += self.socket.recv(4096).decode().split("\n")


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("p")


@pytest.fixture
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    manager = Manager(tmp_path_factory.mktemp("m"))
    with manager.socket:
        yield manager


def environment(home: Path, manager: Manager | None = None, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FEDPEER", "NOTIFY", "WATCHDOG"))}
    return kept | {"FEDPEER_HOME": str(home)} | ({"NOTIFY_SOCKET": str(manager.path)} if manager else {}) | more


def make(home: Path, listen: str = "127.0.0.1:0") -> None:
    subprocess.run(
        [*FEDPEER, "init", "--name", "alice", "--listen", listen],
        env=environment(home),
        check=True,
        capture_output=True,
    )


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_it_is_ready_when_it_answers_and_stops_in_order(home: Path, manager: Manager, ending: signal.Signals) -> None:
    make(home)
    process = subprocess.Popen(
        [*FEDPEER, "run"], env=environment(home, manager, WATCHDOG_USEC="2000000"), stderr=subprocess.PIPE
    )
    try:
        manager.until("READY=1")
        client = Client(home / "admin" / "admin.sock")
        status = client.call("status")
        assert status["name"] == "alice"
        assert status["listening"][0].startswith("127.0.0.1:")
        manager.until("STATUS=0 of 0 peers connected, 0 jobs")
        manager.until("WATCHDOG=1")
        manager.heard.remove("WATCHDOG=1")
        manager.until("WATCHDOG=1")

        process.send_signal(ending)
        manager.until("STOPPING=1")
        assert process.wait(30) == 0
        assert not (home / "admin" / "admin.sock").exists()
    finally:
        process.kill()
        process.communicate()


def test_a_port_in_use_is_named(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        make(home, f"127.0.0.1:{port}")
        run = subprocess.run([*FEDPEER, "run"], env=environment(home), capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert str(port) in run.stderr
    assert "Traceback" not in run.stderr


def test_of_what_a_worker_writes_the_log_keeps_places_and_no_values() -> None:
    place = '  File "/x/fedpeer/algorithms/horizontal/logistic.py", line 84, in fit'
    assert worker_remark(place) == {"reason": place.strip()}
    for line in (
        "patient 17: glucose 9.81",
        "RuntimeWarning: overflow in 9.81",
        place + " patient 17",
        "",
        " x = 9.81",
    ):
        assert worker_remark(line) == {"size": len(line)}


def test_swap_that_writes_to_a_disk_is_seen(tmp_path: Path) -> None:
    listed = tmp_path / "swaps"
    head = "Filename\tType\tSize\tUsed\tPriority\n"
    for lines, seen in [("", False), ("/dev/zram0 partition 1 0 100\n", False), ("/swap.img file 1 0 -2\n", True)]:
        listed.write_text(head + lines)
        assert swaps(listed) is seen
    assert swaps(tmp_path / "absent") is False
