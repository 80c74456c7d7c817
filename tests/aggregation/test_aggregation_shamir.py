"""Shamir's sharing: any t shares give the secret, fewer say nothing, what is no element is refused."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeer.aggregation import shamir
from fedpeer.errors import LocalProtocolError, TrustError

elements = st.integers(0, shamir.P - 1).map(lambda number: number.to_bytes(32, "little"))


def element(number: int) -> bytes:
    return number.to_bytes(32, "little")


@given(elements, st.lists(elements, max_size=39), st.data())
def test_any_t_shares_give_the_secret(secret: bytes, coefficients: list[bytes], data: st.DataObject) -> None:
    t = len(coefficients) + 1
    n = data.draw(st.integers(t, 200))
    holders = data.draw(st.permutations(range(n)))[:t]
    shares = shamir.split(secret, coefficients, holders)
    assert all(map(shamir.is_element, shares))
    assert shamir.Weights(holders).interpolate(shares) == secret


@given(elements, st.lists(elements, min_size=2, max_size=9), st.integers(0, 9), st.integers(1, shamir.P - 1))
def test_one_wrong_share_gives_another_secret(secret: bytes, coefficients: list[bytes], which: int, by: int) -> None:
    t = len(coefficients) + 1
    shares = shamir.split(secret, coefficients, range(t))
    wrong = (int.from_bytes(shares[which % t], "little") + by) % shamir.P
    shares[which % t] = element(wrong)
    assert shamir.Weights(range(t)).interpolate(shares) != secret


def test_fewer_than_t_shares_fit_every_secret_equally(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shamir, "P", 7)  # a field small enough to try everything
    n, everything = 5, [element(number) for number in range(7)]
    for holders in itertools.combinations(range(n), 2):
        fits: Counter[tuple[bytes, ...]] = Counter()
        for secret, *coefficients in itertools.product(everything, repeat=3):
            fits[(secret, *shamir.split(secret, coefficients, holders))] += 1
        assert len(fits) == 7**3
        assert set(fits.values()) == {1}


def test_the_largest_sharing() -> None:
    coefficients = [element(shamir.P - 1 - number) for number in range(133)]
    shares = shamir.split(element(shamir.P - 1), coefficients, range(200))
    last = range(66, 200)
    assert shamir.Weights(last).interpolate([shares[holder] for holder in last]) == element(shamir.P - 1)


def test_a_share_of_a_holder_is_the_value_at_its_index_plus_one() -> None:
    assert shamir.split(element(5), [element(2), element(3)], [0, 4]) == [element(10), element(5 + 10 + 75)]


@pytest.mark.parametrize("raw", [element(shamir.P), b"\xff" * 32, bytes(31), bytes(33), b""])
def test_what_is_no_element_is_refused(raw: bytes) -> None:
    assert not shamir.is_element(raw)
    with pytest.raises(LocalProtocolError):
        shamir.split(raw, [], [0])
    with pytest.raises(LocalProtocolError):
        shamir.split(element(1), [raw], [0])
    with pytest.raises(TrustError):
        shamir.Weights([0, 1]).interpolate([element(1), raw])


@pytest.mark.parametrize("holders", [[], [1, 1], [-1, 0]])
def test_holders_that_are_none_are_refused(holders: list[int]) -> None:
    with pytest.raises(LocalProtocolError):
        shamir.Weights(holders)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_shares_as_holders(count: int) -> None:
    with pytest.raises(LocalProtocolError):
        shamir.Weights([0, 1]).interpolate([element(1)] * count)
