from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpeer.testing.network import MemoryNetwork


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder in memory where the machine has one: a simulation's thousands of commits wait for no disk."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix=f"fedpeer-sums-{os.getpid()}-", dir=memory if memory.is_dir() else None))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork()
