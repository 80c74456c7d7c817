from __future__ import annotations

import json
import sys

import bench_timing
import numpy as np
import numpy.typing as npt
import pytest
import trio

from fedpeer.crypto import equal


def test_t_is_welchs() -> None:
    assert bench_timing.welch([1.0, 2.0, 3.0], [2.0, 4.0, 6.0, 8.0]) == pytest.approx(-3 / (1 / 3 + 5 / 3) ** 0.5)
    assert bench_timing.welch([2.0, 2.0], [2.0, 2.0]) == 0
    assert bench_timing.welch([2.0, 2.0], [1.0, 1.0]) == float("inf")


def test_the_slowest_tenth_of_all_samples_is_left_out() -> None:
    times = np.array([1, 2, 3] * 30 + [10**9] * 9)
    classes = np.arange(99) % 2 == 0
    kept = bench_timing.t_of(times, classes)
    assert kept == bench_timing.welch(times[:90][classes[:90]], times[:90][~classes[:90]])


@pytest.mark.parametrize("name", ["equal", "mac1", "lookup", "refusal"])
def test_both_classes_are_alike_but_for_what_is_compared(name: str) -> None:
    fixed, random, run = bench_timing.cases()[name]
    assert len(fixed()) == len(random())
    assert fixed() == fixed() != random() != random()
    assert fixed() is not fixed()
    times, classes = trio.run(bench_timing.measure, (fixed, random, run), 100)
    assert (len(times), times.min() > 0, 50 < classes.sum() < 150) == (200, True, True)


def test_a_mac_that_is_right_is_not_measured() -> None:
    assert equal(bench_timing.RIGHT, bench_timing.mac1(bench_timing.MESSAGE, bench_timing.OURS.public))
    assert not equal(bench_timing.nearly(bench_timing.RIGHT), bench_timing.RIGHT)


@pytest.mark.parametrize(("late", "code", "over"), [(0, 0, []), (40, 1, ["equal", "mac1", "lookup", "refusal"])])
def test_what_time_tells_is_over_and_ends_with_1(
    late: int, code: int, over: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def measure(case: object, samples: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        chance = np.random.default_rng(1)
        classes = chance.integers(0, 2, 2 * samples) == 1
        return np.int64(1000 + chance.integers(0, 100, 2 * samples) + late * classes), classes

    monkeypatch.setattr(bench_timing, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["bench_timing.py", "--json", "--samples", "1000"])
    assert bench_timing.main() == code
    assert json.loads(capsys.readouterr().out)["over"] == over
