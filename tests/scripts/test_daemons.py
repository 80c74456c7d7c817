from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import daemons

SCRIPTS = str(Path(daemons.__file__).parent)

PROGRAM = """
import subprocess, sys
sys.path.insert(0, {scripts!r})
import daemons

daemons.adopt_orphans()
child = subprocess.Popen(["sh", "-c", {shell!r}], stdout=subprocess.PIPE, text=True, start_new_session=True)
pids = [child.pid, *map(int, child.stdout.readline().split())]
print(pids)
print(daemons.stop(grace_s=0.3))
"""


def ended(shell: str) -> tuple[list[int], list[str]]:
    """Pids of a shell and of what it says it started, and what `stop` had to kill, of a process that stops them."""
    program = PROGRAM.format(scripts=SCRIPTS, shell=shell)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    pids, killed = (eval(line) for line in done.stdout.splitlines())
    return pids, killed


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_child_that_heeds_sigterm_is_ended_without_a_word() -> None:
    pids, killed = ended("echo; exec sleep 60")
    assert killed == []
    assert not any(map(alive, pids))


def test_a_child_that_ignores_sigterm_is_killed_and_named() -> None:
    pids, killed = ended("trap '' TERM; echo; while :; do sleep 60; done")
    assert len(killed) == 2  # the shell and its sleep
    assert not any(map(alive, pids))


def test_what_a_child_left_behind_is_found_even_in_a_session_of_its_own() -> None:
    pids, killed = ended("setsid sleep 61 & echo $!; exec sleep 60")
    assert killed == ["sleep 61"]
    assert len(pids) == 2
    assert not any(map(alive, pids))


def test_of_several_ports_all_are_free_and_different() -> None:
    assert len(set(daemons.free_ports(4))) == 4
