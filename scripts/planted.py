"""Bugs planted on purpose, one patch each in tests/planted: every one of them must be found.

    ./scripts/test planted [--seeds 2000] [NAME …]

A patch begins with a line that says what it breaks, and changes at most ten lines. It is applied to a copy of the
package. If its second line is "Found by: tests/….py::test_…", these tests must fail there (that they pass without it
is what ./scripts/test shows). All others are bugs of secure sums: without faults the sums must still be right (the bug
is none that any test would see), and of the given number of seeds of the simulator at least one must fail.
Exit 1 if a bug is not found, or breaks what has no faults.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
PLANTED = ROOT / "tests" / "planted"
MOST_LINES = 10
FOUND_BY = "Found by: "


def changed_lines(patch: Path) -> int:
    """How many lines a patch takes away or adds, whichever is more."""
    lines = patch.read_text().splitlines()
    removed = sum(line.startswith("-") and not line.startswith("---") for line in lines)
    added = sum(line.startswith("+") and not line.startswith("+++") for line in lines)
    return max(removed, added)


def tests_for(patch: Path) -> list[str]:
    """The tests that are to find a bug; none if that is the simulator's work."""
    second = patch.read_text().splitlines()[1]
    return second.removeprefix(FOUND_BY).split() if second.startswith(FOUND_BY) else []


def plant(patch: Path, folder: Path) -> None:
    """A copy of the package and its tests in `folder`, with the bug. CalledProcessError if the patch does not fit."""
    folder.mkdir(exist_ok=True)
    for name in ("fedpeer", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    command = ["git", "apply", str(patch)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)


def simulate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The simulator of the package in this folder."""
    return subprocess.run(
        [sys.executable, "-m", "fedpeer.testing.sums", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


def run_tests(folder: Path, nodes: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """These tests, of the package in this folder."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=line", *nodes],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


def found(patch: Path, seeds: int) -> str:
    """How the bug was found. Raises AssertionError if it was not, or if it is none."""
    assert changed_lines(patch) <= MOST_LINES, f"{patch.name} changes more than {MOST_LINES} lines"
    with tempfile.TemporaryDirectory(prefix="fedpeer-planted-") as name:
        folder = Path(name)
        plant(patch, folder)
        if nodes := tests_for(patch):
            ran = run_tests(folder, nodes)
            assert ran.returncode == 1, f"not found by {' '.join(nodes)}: {ran.stdout[-500:]}{ran.stderr[-500:]}"
            return next(line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR")))
        calm = simulate(folder, "--seeds", "4", "--calm", "--stop")
        assert calm.returncode == 0, f"it breaks what has no faults: {_head(calm)}"
        stormy = simulate(folder, "--seeds", str(seeds), "--stop")
        assert stormy.returncode == 1, f"not found within {seeds} seeds"
        return _head(stormy)


def tried(patch: Path, seeds: int) -> tuple[str, bool, float]:
    """What is told of a patch, whether its bug was found, and in how many seconds."""
    started = time.monotonic()
    try:
        how, is_found = f"found: {found(patch, seeds)}", True
    except (AssertionError, subprocess.CalledProcessError) as error:
        how, is_found = f"{error} {getattr(error, 'stdout', '') or ''}", False
    return how, is_found, time.monotonic() - started


def _head(ran: subprocess.CompletedProcess[str]) -> str:
    """The first failure that a run tells of."""
    return "\n".join(f"{ran.stdout}{ran.stderr}".splitlines()[:2])


def main() -> int:
    parser = argparse.ArgumentParser(prog="./scripts/test planted", description="Are planted bugs found?")
    parser.add_argument("names", nargs="*", help="patches of tests/planted (all)")
    parser.add_argument("--seeds", type=int, default=2000, help="so many seeds for each (default 2000)")
    chosen = parser.parse_args()
    console, missed = Console(), 0
    patches = sorted(PLANTED.glob("*.patch"))
    if unknown := sorted(set(chosen.names) - {patch.stem for patch in patches}):
        parser.error(f"no patch is called {', '.join(unknown)}; there are {', '.join(patch.stem for patch in patches)}")
    wanted = [patch for patch in patches if not chosen.names or patch.stem in chosen.names]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for patch, (how, is_found, seconds) in zip(
            wanted, pool.map(partial(tried, seeds=chosen.seeds), wanted), strict=True
        ):
            missed += not is_found
            console.print(f"{patch.stem} ({seconds:.0f} s): ", style="green" if is_found else "red", end="")
            console.print(how, markup=False, highlight=False, soft_wrap=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
