"""The folders in memory that simulations use do not pile up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")


@pytest.mark.skipif(not MEMORY.is_dir(), reason="this machine has no folder in memory")
def test_what_an_interrupted_run_left_in_memory_goes_with_the_next_run(request: pytest.FixtureRequest) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, others = (MEMORY / f"fedpeer-test-{pid}-x" for pid in (dead.pid, os.getppid()))
    for folder in (left, others):
        (folder / "state").mkdir(parents=True)
        request.addfinalizer(partial(shutil.rmtree, folder, ignore_errors=True))
    own = request.getfixturevalue("quick_path")
    assert own.is_dir()
    assert others.is_dir()
    assert not left.exists()
