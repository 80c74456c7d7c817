"""`./scripts/test sim`: what it says, and when it fails."""

from __future__ import annotations

from collections import Counter

import pytest

from fedpeer.aggregation.names import profile
from fedpeer.testing.sums.__main__ import main
from fedpeer.testing.sums.faults import CLAIMS, Faults
from fedpeer.testing.sums.tally import Tally
from fedpeer.testing.sums.world import Outcome, World, Wrong


def outcome(seed: int, *, injected: tuple[str, ...] = tuple(CLAIMS), kept: int = 1, failure: str = "") -> Outcome:
    return Outcome(
        seed,
        profile(4),
        Faults(),
        Counter(injected),
        Counter(SUM=4),
        promised=1,
        kept=kept,
        failures=[failure] if failure else [],
    )


def tally(*outcomes: Outcome) -> Tally:
    made = Tally()
    for one in outcomes:
        made.add(one)
    return made


def test_a_run_that_injected_and_gave_what_it_claims_is_well() -> None:
    assert tally(*(outcome(seed) for seed in range(100))).wrong() == []


def test_a_seed_that_fails_is_told_with_the_command_that_repeats_it() -> None:
    assert tally(outcome(7, failure="x")).wrong() == ["seed 7 failed:  ./scripts/test sim --seed 7"]


@pytest.mark.parametrize("name", CLAIMS)
def test_a_run_that_injected_less_than_it_claims_fails(name: str) -> None:
    others = tuple(claim for claim in CLAIMS if claim != name)
    (line,) = tally(*(outcome(seed, injected=others) for seed in range(1000))).wrong()
    assert line.startswith(f"{name}: only in 0 of 1000 seeds")


def test_fewer_results_than_promised_fail() -> None:
    enough = [outcome(seed, kept=seed >= 5) for seed in range(100)]
    assert tally(*enough).wrong() == []
    (line,) = tally(*enough, outcome(100, kept=0)).wrong()
    assert "only 95 of 101 sums" in line


def test_one_seed_shows_everything_about_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "3"]) == 0
    said = capsys.readouterr().out
    assert World(3).run().fingerprint.hex() in said
    assert "a message lost" in said


def test_a_failing_seed_makes_the_command_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(_self: World, *_arguments: object) -> None:
        raise Wrong("planted")

    monkeypatch.setattr(World, "_ended", wrong)
    assert main(["--seeds", "4", "--first", "10", "--stop"]) == 1
    said = capsys.readouterr().out
    assert "planted" in said
    assert "to repeat it:  ./scripts/test sim --seed 10" in said
