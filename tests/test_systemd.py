"""Readiness, watchdog, activated sockets and credentials, against real datagram and stream sockets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fedpeer import systemd


@pytest.mark.parametrize("abstract", [False, True])
def test_a_notification_is_one_datagram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    path = f"@fedpeer-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + path[1:] if abstract else path)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        assert systemd.notify("READY=1", "STATUS=2 of 3 peers\nconnected")
        assert manager.recv(4096) == b"READY=1\nSTATUS=2 of 3 peers connected"


@pytest.mark.parametrize("path", ["", "relative", "/nowhere/at/all"])
def test_a_notification_that_nobody_takes_harms_nobody(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    assert not systemd.notify("READY=1")


def test_the_watchdog_is_fed_twice_as_often_as_systemd_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    assert systemd.watchdog_interval() is None
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert systemd.watchdog_interval() == 15.0
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    assert systemd.watchdog_interval() is None, "the watchdog of another process is not ours"


def test_sockets_of_systemd_are_taken_by_name_and_once(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    code = """
import os, socket, sys
from fedpeer import systemd
os.environ["LISTEN_PID"] = str(os.getpid())
given = systemd.listen_fds()
assert list(given) == ["admin"], given
(sock,) = given["admin"]
assert sock.family == socket.AF_UNIX and sock.getsockname() == sys.argv[1]
assert not os.get_inheritable(sock.fileno()), "a worker must not inherit it"
assert "LISTEN_FDS" not in os.environ and systemd.listen_fds() == {}
"""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()
        environment = os.environ | {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "admin"}

        def move_to_three() -> None:
            os.dup2(sock.fileno(), 3, inheritable=True)

        command = [sys.executable, "-c", code, path]
        subprocess.run(command, env=environment, preexec_fn=move_to_three, pass_fds=(3,), check=True)


def test_sockets_meant_for_another_process_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    assert systemd.listen_fds() == {}


def test_a_credential_is_found_when_systemd_gave_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert systemd.credential("identity.key") is None
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert systemd.credential("identity.key") is None
    (tmp_path / "identity.key").touch()
    assert systemd.credential("identity.key") == tmp_path / "identity.key"
