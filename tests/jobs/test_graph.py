from __future__ import annotations

import random

import pytest

from fedpeer.errors import ContractError
from fedpeer.jobs.graph import in_order


def test_stages_come_after_what_feeds_them_and_otherwise_as_written() -> None:
    assert in_order({"c": ["a"], "a": [], "b": [], "d": ["c", "b"]}) == ["a", "c", "b", "d"]
    assert in_order({}) == []


def test_any_graph_without_a_cycle_is_ordered(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(200):
        names = [f"s{i}" for i in range(chance.randint(1, 12))]
        needs = {name: chance.sample(names[:i], chance.randint(0, i)) for i, name in enumerate(names)}
        shuffled = dict(chance.sample(list(needs.items()), len(needs)))
        ordered = in_order(shuffled)
        assert sorted(ordered) == sorted(names)
        assert all(ordered.index(need) < ordered.index(name) for name in names for need in needs[name])


@pytest.mark.parametrize(
    ("needs", "cycle"),
    [
        ({"a": ["a"]}, "a → a"),
        ({"a": ["b"], "b": ["c"], "c": ["a"]}, "a → b → c → a"),
        ({"x": [], "d": ["a"], "a": ["b", "x"], "b": ["a"]}, "a → b → a"),
    ],
)
def test_a_cycle_is_named(needs: dict[str, list[str]], cycle: str) -> None:
    with pytest.raises(ContractError, match=cycle):
        in_order(needs)
