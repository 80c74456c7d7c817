"""A thousand worlds under faults, as a person would run them: in as many processes as there are cores."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.timeout(1200)
def test_every_sum_of_a_thousand_worlds_is_exact_and_private_or_ends_by_name() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "fedpeer.testing.sums", "--seeds", "1000"], capture_output=True, text=True
    )
    print(ran.stdout, ran.stderr)
    assert ran.returncode == 0
    assert "1000 seeds" in ran.stdout
