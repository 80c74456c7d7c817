from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where the machine has one: a simulation's thousands of commits wait for no disk."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    for left in memory.glob("fedpeer-test-*-*"):  # of runs that were interrupted: the name tells their pid
        if not Path("/proc", left.name.split("-")[2]).exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"fedpeer-test-{os.getpid()}-", dir=memory))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
