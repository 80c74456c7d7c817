"""What many simulations together came to, and whether that is what is claimed of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from fedpeer.testing.sums.faults import CLAIMS, Faults
from fedpeer.testing.sums.world import Outcome, World

RESULTS: Final = 0.95
"""of the sums that are promised a result"""
ENOUGH: Final = 100
"""seeds below which shares say nothing"""


def simulate(seed: int) -> Outcome:
    return World(seed).run()


def simulate_calm(seed: int) -> Outcome:
    """The same parties and job without faults, and nobody looks at what is said: what any test would see."""
    return World(seed, faults=Faults()).run(watched=False)


def command(seed: int) -> str:
    """What a person types to see this seed again."""
    return f"./scripts/test sim --seed {seed}"


@dataclass
class Tally:
    seeds: int = 0
    failed: list[int] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)
    seeds_with: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    promised: int = 0
    kept: int = 0
    instances: int = 0
    steps: int = 0

    def add(self, outcome: Outcome) -> None:
        self.seeds += 1
        if outcome.failures:
            self.failed.append(outcome.seed)
        self.injected += outcome.injected
        self.seeds_with.update(outcome.injected.keys())
        self.ended += outcome.ended
        self.notes += outcome.notes
        self.promised += outcome.promised
        self.kept += outcome.kept
        self.instances += outcome.instances
        self.steps += outcome.steps

    def run(self, seeds: Iterable[int]) -> list[str]:
        """Simulate these; what failed, with the command that repeats it."""
        failures = []
        for seed in seeds:
            outcome = simulate(seed)
            self.add(outcome)
            failures += [f"{command(seed)}: {failure}" for failure in outcome.failures]
        return failures

    def wrong(self, *, shares: bool = True) -> list[str]:
        """Everything that makes the run a failure, in words; `shares`: what was injected counts, too."""
        lines = [f"seed {seed} failed:  {command(seed)}" for seed in self.failed]
        if self.seeds < ENOUGH or not shares:
            return lines
        for name, share in CLAIMS.items():
            if self.seeds_with[name] < share * self.seeds - 3 * math.sqrt(self.seeds * share * (1 - share)):
                lines.append(f"{name}: only in {self.seeds_with[name]} of {self.seeds} seeds, {share:.0%} are claimed")
        if self.kept < RESULTS * self.promised:
            lines.append(f"only {self.kept} of {self.promised} sums gave the result that they are promised")
        return lines
