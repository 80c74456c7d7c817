from __future__ import annotations

import bench_secagg
import numpy as np
import pytest
from secagg_case import BITS, CLIP, Case, check, fingerprint, values
from secagg_ours import Recording, mean_of, quantise, same_work


@pytest.mark.parametrize("case", bench_secagg.CASES, ids=lambda case: case.name)
def test_neighbours_are_mutual_and_enough_of_them_stay(case: Case) -> None:
    near = [case.neighbours(party) for party in range(case.n)]
    for party in range(case.n):
        assert len(set(near[party])) == case.k
        assert party in near[party]
        assert all(party in near[other] for other in near[party])
        assert sum(other in case.alive for other in near[party]) >= case.threshold


def test_integers_are_unbiased_and_within_their_bits() -> None:
    x = np.array([-100, -CLIP, 0.3, CLIP, 100], np.float32)
    rng = np.random.Generator(np.random.PCG64(1))
    drawn = np.array([quantise(x, 256, rng) for _ in range(2000)])
    assert drawn.max() == (1 << BITS) - 1
    assert not drawn[:, :2].any()
    assert not drawn[:, 5:].any()
    step = 2 * CLIP / ((1 << BITS) - 1)
    assert abs(mean_of(drawn.sum(axis=0, dtype=np.uint64), 5, 2000) - np.clip(x, -CLIP, CLIP)).max() < 0.1 * step


def test_a_wrong_mean_is_noticed() -> None:
    case = Case(4, 100, 1)
    true = np.mean([values(case, party) for party in range(3)], axis=0, dtype=np.float64)
    check(case, true)
    with pytest.raises(AssertionError):
        check(case, true + 1e-5)
    with pytest.raises(AssertionError):
        check(case, np.mean([values(case, party) for party in range(4)], axis=0, dtype=np.float64))


def test_the_values_are_named_by_a_fingerprint() -> None:
    assert fingerprint(Case(4, 100, 0)) != fingerprint(Case(4, 101, 0))
    assert fingerprint(Case(4, 100, 0)) == fingerprint(Case(4, 100, 1))


@pytest.mark.parametrize("case", [Case(10, 1000, 0), Case(20, 1000, 2)], ids=lambda case: case.name)
def test_the_same_work_gives_the_mean_of_those_who_stay_and_tells_signatures_apart(case: Case) -> None:
    seconds = same_work(case)  # checks the mean
    assert seconds.keys() == {"set-up", "shares", "masks", "sum", "unmask", "signatures"}
    assert min(seconds.values()) > 0


@pytest.mark.parametrize("case", [Case(5, 20_000, 0), Case(10, 100_000, 0), Case(16, 30_000, 2)], ids=lambda c: c.name)
def test_a_party_sends_what_the_protocol_says_within_five_percent(case: Case) -> None:
    recording = Recording(case)
    assert recording.survivors == len(case.alive)
    assert recording.sent == pytest.approx(bench_secagg.bytes_expected(case), rel=0.05)


@pytest.mark.parametrize("drop", [0, 1])
def test_a_replay_does_all_that_the_party_did(drop: int) -> None:
    recording = Recording(Case(7, 20_000, drop))
    first, second = recording.replay(), recording.replay()
    assert first.keys() == second.keys()
    assert first.keys() == {"quantise", "core", "messages", "mask", "fetch", "add", "unmask"}
    assert recording.signatures >= 7 * 12
    del recording.turns[len(recording.turns) // 2 :]
    with pytest.raises(AssertionError):  # a sum that does not end is not timed
        recording.replay()


def test_the_floor_counts_masks_signatures_and_packing() -> None:
    recording = Recording(Case(8, 20_000, 1))
    least = bench_secagg.least(recording)
    d = 20_224  # with its pad
    assert least[:3] == (d * (8 + 7 + 7), recording.signatures, pytest.approx(d * 2.125))
    assert least[3:] == (pytest.approx(d * 1.875), pytest.approx(d * 3.75))


@pytest.mark.parametrize("kind", bench_secagg.Least._fields)
def test_the_floor_grows_with_each_of_them(kind: str) -> None:
    little, much = (bench_secagg.Least(*(1,) * 5)._replace(**{kind: many}) for many in (1, 100_000_000))
    assert 0 < 100 * sum(bench_secagg.floor(little)) < sum(bench_secagg.floor(much))


def test_the_other_path_is_one_client_and_the_server() -> None:
    seconds = {"set-up": 1.0, "masks": 9.0, "server sum": 2.0, "server unmask": 3.0}
    assert bench_secagg.client_and_server(seconds, 10) == 6.0
    assert bench_secagg.whole_round(seconds) == 15.0
