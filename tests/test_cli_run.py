"""`fedpeer run`: a real daemon in a process of its own, started, asked and stopped as an operator does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedpeer import cli
from fedpeer.admin.client import Client
from fedpeer.errors import CardError, FedpeerError

daemon = pytest.importorskip("fedpeer.daemon")

RUN = [sys.executable, "-m", "fedpeer.cli", "run", "--home"]


def made(home: Path, name: str) -> str:
    """A peer on a free port of loopback; the port stays free, for it is given out by the system to nobody else soon."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    assert cli.main(["init", "--name", name, "--listen", address, "--address", address, "--home", str(home)]) == 0
    return address


@contextmanager
def running(home: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A daemon that has said READY to a service manager (this test)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(home / "notify"))
        manager.settimeout(60)
        given = os.environ | {"NOTIFY_SOCKET": str(home / "notify")} | environment
        process = subprocess.Popen([*RUN, str(home)], env=given, stderr=subprocess.PIPE, text=True)
        try:
            said = ""
            while "READY=1" not in said:
                said = manager.recv(4096).decode()
            yield process
        finally:
            process.kill()
            process.communicate()
            (home / "notify").unlink()


def asked(home: Path, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "fedpeer.cli", "--json", "--home", str(home), *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_two_organizations_meet_through_the_command_line(tmp_path: Path) -> None:
    homes = {name: tmp_path / name for name in ("bank", "clinic")}
    for name, home in homes.items():
        made(home, name)
    with running(homes["bank"]), running(homes["clinic"]):
        clients = {name: Client(home / "admin" / "admin.sock") for name, home in homes.items()}
        cards = {name: client.call("card")["card"] for name, client in clients.items()}
        with clients["bank"].events() as events:
            assert asked(homes["bank"], "peer", "add", cards["clinic"])["data"]["connected"] is False
            assert asked(homes["clinic"], "peer", "add", cards["bank"])["ok"]
            assert next(event for event in events if event["event"] == "peer_connected")["name"] == "clinic"
        assert asked(homes["bank"], "peer", "ping", "clinic")["data"]["seconds"] > 0
        status = asked(homes["bank"], "status")["data"]
        assert (status["peers"], status["connected"], status["bytes_sent"] > 100) == (1, 1, True)
        with pytest.raises(CardError):
            clients["bank"].call("peer.add", card=cards["clinic"].replace("A", "B"))
        assert asked(homes["bank"], "peer", "show", "nobody")["error"]["code"] == "not_found"
        assert asked(homes["bank"], "job", "submit", os.devnull)["error"]["code"] == "contract"
        assert clients["bank"].call("health.ready") == {"ready": True}
        assert "fedpeer_peers_connected 1.0" in clients["bank"].metrics()


def test_a_second_daemon_of_one_home_and_a_port_in_use_are_named(tmp_path: Path) -> None:
    address = made(tmp_path / "a", "a")
    with running(tmp_path / "a"):
        done = subprocess.run([*RUN, str(tmp_path / "a")], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "in use by another fedpeer daemon" in done.stderr
        assert "Traceback" not in done.stderr
        assert Client(tmp_path / "a" / "admin" / "admin.sock").call("health.live"), "the first one is not harmed"
        assert cli.main(["init", "--name", "b", "--listen", address, "--home", str(tmp_path / "b")]) == 0
        done = subprocess.run([*RUN, str(tmp_path / "b")], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert address.rpartition(":")[2] in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order_also_while_somebody_watches(tmp_path: Path, number: signal.Signals) -> None:
    made(tmp_path / "a", "a")
    with running(tmp_path / "a") as process:
        client = Client(tmp_path / "a" / "admin" / "admin.sock")
        ended: list[FedpeerError] = []

        def watch() -> None:
            try:
                for _ in events:
                    pass
            except FedpeerError as error:
                ended.append(error)

        events = client.events()
        watcher = threading.Thread(target=watch)
        watcher.start()
        process.send_signal(number)
        assert process.wait(30) == 0
        watcher.join()
        assert [error.code for error in ended] == ["not_reachable"]
        assert not (tmp_path / "a" / "admin" / "admin.sock").exists()


def test_a_killed_daemon_starts_again_over_its_stale_socket(tmp_path: Path) -> None:
    made(tmp_path / "a", "a")
    with running(tmp_path / "a") as process:
        process.kill()
        process.wait()
        assert (tmp_path / "a" / "admin" / "admin.sock").exists()
    with running(tmp_path / "a"):
        assert Client(tmp_path / "a" / "admin" / "admin.sock").call("status")["name"] == "a"
