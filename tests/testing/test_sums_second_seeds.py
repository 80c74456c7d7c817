"""Worlds under faults, in two files of which this is a system test: seeds 500 to 649."""

from __future__ import annotations

import pytest

from fedpeer.testing.sums.tally import Tally

pytestmark = pytest.mark.system  # a minute of chaos

FIRST, SEEDS, PART = 500, 150, 50


@pytest.fixture(scope="module")
def tally() -> Tally:
    return Tally()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(FIRST, FIRST + SEEDS, PART))
def test_every_sum_is_exact_and_private_or_ends_by_name(tally: Tally, first: int) -> None:
    failures = tally.run(range(first, first + PART))
    assert not failures, "\n".join(failures)


def test_as_many_faults_were_injected_and_results_had_as_are_claimed(tally: Tally) -> None:
    if tally.seeds < SEEDS:
        pytest.skip(f"only {tally.seeds} of {SEEDS} seeds were run")
    assert not tally.wrong(), "\n".join(tally.wrong())
