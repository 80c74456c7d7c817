"""The newcomer's demo as a newcomer runs it; whatever it starts must be gone at the end, however it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import daemons
import pytest

DEMO = Path(daemons.__file__).with_name("demo.py")

# adopts what the demo leaves behind, and tells
SUPERVISOR = f"""
import json, os, signal, subprocess, sys
sys.path.insert(0, {str(DEMO.parent)!r})
import daemons

daemons.adopt_orphans()
demo = subprocess.Popen([sys.executable, {str(DEMO)!r}, *sys.argv[1:]])
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: os.kill(demo.pid, {{signal.SIGUSR1: signal.SIGKILL}}.get(number, number)))
code = demo.wait()
if code == -signal.SIGKILL:  # it could not end its daemons; the kernel told them
    signal.alarm(10)
    while daemons.children(os.getpid()):
        os.wait()
print(json.dumps({{"code": code, "left": list(daemons.children(os.getpid()).values())}}))
"""


class Run:
    """One run of the demo: its lines on stderr while it runs, then what it printed, how it ended and what it left."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700)
        self._process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(folder), "COLUMNS": "200"},
        )
        self.said = ""

    def until(self, words: str) -> None:
        assert self._process.stderr is not None
        while words not in self.said:
            line = self._process.stderr.readline()
            assert line, self.said
            self.said += line

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        out, err = self._process.communicate()
        self.said += err
        *self.lines, last = out.splitlines()
        told = json.loads(last)
        self.left = told["left"]
        self.files = list(self._folder.iterdir())
        return int(told["code"])


@pytest.fixture
def folder() -> Path:
    """A short path: unix sockets lie below it."""
    return Path(f"/tmp/fpt-{os.getpid()}-{time.monotonic_ns() % 10**9}")


def agrees(result: dict, keys: set[str]) -> None:
    wanted = {"peers", "auc", "pooled_auc", "alone_auc", "models_identical", "rounds", "bytes_sent", "seconds"}
    assert result.keys() == wanted | keys
    assert result["peers"] == 4
    assert abs(result["auc"] - result["pooled_auc"]) <= 0.005
    assert result["models_identical"] is True
    assert result["rounds"] > 2
    assert len(result["alone_auc"]) == len(result["bytes_sent"]) == 4
    assert min(result["bytes_sent"]) > 10_000


def test_four_daemons_train_one_model_and_nothing_is_left(folder: Path) -> None:
    run = Run(folder, "--json")
    assert run.end() == 0, run.said
    agrees(json.loads(run.lines[-1]), set())
    assert "not compared" not in run.said
    assert run.left == run.files == []


def test_without_json_there_is_a_table_for_people(folder: Path) -> None:
    run = Run(folder)
    assert run.end() == 0, run.said
    text = "\n".join(run.lines)
    assert all(re.search(rf"^ ?{name} +11[34] +0\.9\d+ +[0-9a-f]{{16}} ", text, re.M) for name in ("north", "west"))
    assert "the same bytes at all four" in text


def test_a_killed_daemon_and_a_killed_worker_come_back_and_the_models_agree(folder: Path) -> None:
    run = Run(folder, "--json", "--restart")
    assert run.end() == 0, run.said
    result = json.loads(run.lines[-1])
    agrees(result, {"restarted"})
    assert result["restarted"] == 2
    assert run.left == run.files == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_demo_leaves_nothing(folder: Path, number: int, code: int) -> None:
    run = Run(folder, "--json")
    run.until("four private files")
    run.signal(number)
    assert run.end() == code, run.said
    assert run.left == run.files == []


def test_a_killed_demo_leaves_no_process(folder: Path) -> None:
    run = Run(folder, "--json")
    run.until("four private files")
    run.signal(signal.SIGUSR1)  # the supervisor kills it with SIGKILL
    assert run.end() == -signal.SIGKILL
    assert run.left == []
