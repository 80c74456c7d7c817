"""An order in which to run stages that feed each other."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fedpeer.errors import ContractError


def in_order(needs: Mapping[str, Collection[str]]) -> list[str]:
    """The keys of `needs` (stage → stages that feed it), each after all it needs, otherwise in the given order.

    Equal at every peer. Raises ContractError naming stages that wait for each other.
    """
    waiting = list(needs)
    ordered: list[str] = []
    while waiting:
        ready = next((stage for stage in waiting if set(needs[stage]).issubset(ordered)), None)
        if ready is None:
            raise ContractError(f"the stages {_cycle(needs, waiting)} wait for each other's outputs")
        waiting.remove(ready)
        ordered.append(ready)
    return ordered


def _cycle(needs: Mapping[str, Collection[str]], waiting: list[str]) -> str:
    """A cycle among stages of which each needs another of them, as "a → b → a"."""
    path = [waiting[0]]
    while True:
        ahead = min(stage for stage in needs[path[-1]] if stage in waiting)
        path.append(ahead)
        if ahead in path[:-1]:
            return " → ".join(path[path.index(ahead) :])
