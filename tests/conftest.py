"""Shared by all tests: where reference material lies, and chance that can be replayed."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent

# A shell starts what runs in the background with Ctrl-C ignored, and so would every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no bug.
hypothesis.settings.register_profile("fedpeer", deadline=None)
hypothesis.settings.load_profile("fedpeer")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of public vectors and reference data beside the project; skips loudly where it is absent."""
    folder = Path(os.environ.get("FEDPEER_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no reference material: {folder} does not exist (set FEDPEER_SHARED)")
    return folder


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of a random test: FEDPEER_SEED repeats a run; it is printed when the test fails."""
    value = int(os.environ.get("FEDPEER_SEED", "1"))
    print(f"seed: FEDPEER_SEED={value}")
    return value


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
