"""The newcomer's demo as a newcomer runs it; whatever it starts must be gone at the end, however it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import daemons
import demo
import pytest

DEMO = Path(daemons.__file__).with_name("demo.py")

# adopts what the demo leaves behind, and tells
SUPERVISOR = f"""
import json, os, signal, subprocess, sys
sys.path.insert(0, {str(DEMO.parent)!r})
import daemons

daemons.adopt_orphans()
demo = subprocess.Popen([sys.executable, *sys.argv[1:]])
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

    def __init__(self, folder: Path, *options: str, script: Path = DEMO) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, str(script), *options],
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
def folder() -> Iterator[Path]:
    """A folder of a short name, for unix sockets lie below it."""
    path = Path(tempfile.mkdtemp(prefix="fpt"))
    yield path
    shutil.rmtree(path)


def agrees(result: dict, keys: set[str], peers: int = 4) -> None:
    wanted = {"peers", "auc", "pooled_auc", "alone_auc", "models_identical", "rounds", "bytes_sent", "seconds"}
    assert result.keys() == wanted | keys
    assert result["peers"] == peers
    assert abs(result["auc"] - result["pooled_auc"]) <= 0.005
    assert result["models_identical"] is True
    assert result["rounds"] > 2
    assert len(result["alone_auc"]) == len(result["bytes_sent"]) == peers
    assert min(result["bytes_sent"]) > 10_000


@pytest.mark.system  # a demo
def test_four_daemons_train_one_model_and_nothing_is_left(folder: Path) -> None:
    run = Run(folder, "--json")
    assert run.end() == 0, run.said
    agrees(json.loads(run.lines[-1]), set())
    assert "not compared" not in run.said
    assert run.left == run.files == []


def test_the_table_for_people_says_whether_the_models_are_one(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"peers": 4, "auc": 0.99, "pooled_auc": 0.99, "models_identical": True, "rounds": 9, "seconds": 12.3}
    clinics = [["north", "114", "0.9914", "495c51b4da80d4ed", "653 KiB"]]
    demo.table(result, clinics)
    assert re.search(r"north +114 +0\.9914 +495c51b4da80d4ed", said := capsys.readouterr().out)
    assert "the same bytes at all four" in " ".join(said.split())
    demo.table(result | {"models_identical": False, "restarted": 2}, clinics)
    said = " ".join(capsys.readouterr().out.split())
    assert "NOT the same" in said
    assert "2 processes killed and back" in said
    away = {"peers": 5, "rounds_without": 3}
    demo.table(result | away | {"killed": 1}, clinics)
    demo.table(result | away | {"partition_s": 20.0}, clinics)
    said = " ".join(capsys.readouterr().out.split())
    assert "the same bytes at all five" in said
    assert "west killed and back, 3 rounds without it" in said
    assert "west cut off for 20 s and back, 3 rounds without it" in said


@pytest.mark.system
def test_a_killed_daemon_and_a_killed_worker_come_back_and_the_models_agree(folder: Path) -> None:
    run = Run(folder, "--json", "--restart")
    assert run.end() == 0, run.said
    result = json.loads(run.lines[-1])
    agrees(result, {"restarted"})
    assert result["restarted"] == 2
    assert run.left == run.files == []


@pytest.mark.system
def test_a_daemon_killed_in_the_middle_of_a_sum_catches_up_and_the_models_agree(folder: Path) -> None:
    run = Run(folder, "--json", "--kill", "1")
    assert run.end() == 0, run.said
    result = json.loads(run.lines[-1])
    agrees(result, {"killed", "rounds_without"}, peers=5)
    assert result["killed"] == 1
    assert result["rounds_without"] >= 1
    assert run.left == run.files == []


@pytest.mark.system
def test_a_daemon_cut_off_in_the_middle_of_a_sum_catches_up_and_the_models_agree(folder: Path) -> None:
    run = Run(folder, "--json", "--partition", "15")
    assert run.end() == 0, run.said
    result = json.loads(run.lines[-1])
    agrees(result, {"partition_s", "rounds_without"}, peers=5)
    assert result["partition_s"] == 15
    assert run.left == run.files == []


@pytest.mark.system
@pytest.mark.parametrize(
    ("options", "words"), [(("--kill", "1"), "killed west"), (("--partition", "20"), "cut west off")]
)
def test_a_demo_interrupted_while_one_is_away_leaves_nothing(
    folder: Path, options: tuple[str, ...], words: str
) -> None:
    run = Run(folder, "--json", *options)
    run.until(words)
    run.signal(signal.SIGINT)
    assert run.end() == 130, run.said
    assert run.left == run.files == []


@pytest.mark.parametrize("options", [("--kill", "2"), ("--partition", "0"), ("--kill", "1", "--partition", "5")])
def test_what_a_demo_cannot_do_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", *options])
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert ended.value.code == 2
    assert "usage: demo" in capsys.readouterr().err


@pytest.mark.system  # five demos
@pytest.mark.parametrize(
    ("number", "words", "code"), [(signal.SIGINT, "; training", 130), (signal.SIGTERM, "four daemons run", 143)]
)
def test_an_interrupted_demo_leaves_nothing(folder: Path, number: int, words: str, code: int) -> None:
    run = Run(folder, "--json")
    run.until(words)
    run.signal(number)
    assert run.end() == code, run.said
    assert run.left == run.files == []


@pytest.mark.system  # a demo
def test_a_killed_demo_leaves_no_process(folder: Path) -> None:
    run = Run(folder, "--json")
    run.until("cards exchanged")
    run.signal(signal.SIGUSR1)  # the supervisor kills it with SIGKILL
    assert run.end() == -signal.SIGKILL
    assert run.left == []
