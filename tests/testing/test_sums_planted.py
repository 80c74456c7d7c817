"""The planted bugs fit the code as it is, and are small. That they are found: ./scripts/test planted."""

from __future__ import annotations

import subprocess
from pathlib import Path

import planted
import pytest

PATCHES = sorted(planted.PLANTED.glob("*.patch"))


def test_there_are_enough_of_them() -> None:
    assert len(PATCHES) >= 12


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_planted_bug_fits_and_is_small_and_says_what_it_breaks(patch: Path, tmp_path: Path) -> None:
    assert planted.changed_lines(patch) <= planted.MOST_LINES
    assert patch.read_text().splitlines()[0].endswith(".")
    planted.plant(patch, tmp_path)


def test_a_patch_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    patch = tmp_path / "other.patch"
    patch.write_text(PATCHES[0].read_text().replace("\n-", "\n-something else "))
    with pytest.raises(subprocess.CalledProcessError):
        planted.plant(patch, tmp_path / "copy")


@pytest.mark.system  # simulates a planted bug
def test_a_bug_is_found_and_what_is_none_is_not(tmp_path: Path) -> None:
    assert "before enough parties released" in planted.found(planted.PLANTED / "b_before_the_gate.patch", 40)
    harmless = tmp_path / "harmless.patch"
    harmless.write_text(
        "Nothing.\n--- a/fedpeer/aggregation/__init__.py\n+++ b/fedpeer/aggregation/__init__.py\n"
        "@@ -0,0 +1 @@\n+# nothing\n"
    )
    with pytest.raises(AssertionError, match="not found within 2 seeds"):
        planted.found(harmless, 2)
