"""Who may knock: the caps before authentication, and the pause before the next dial. No clock in here: `now` is given.

Rules
* At most `cap` unauthenticated connections, `reserve` of them only for addresses from which a peer has authenticated
  before, at most `per_source` from one address, and a token bucket of `burst` refilled by `rate` per second each.
* What is kept for the sake of strangers is bounded: the buckets of the `REMEMBERED` latest addresses.

Measured in a prototype: 1,000 strangers from 250 addresses fill what is not reserved; a known peer gets in at once.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

REMEMBERED = 4096
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 60.0


class Door:
    def __init__(
        self, *, cap: int = 256, reserve: int = 32, per_source: int = 16, rate: float = 20, burst: float = 40
    ) -> None:
        self.cap, self.reserve, self.per_source, self.rate, self.burst = cap, reserve, per_source, rate, burst
        self.inside: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._known: OrderedDict[str, None] = OrderedDict()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._total = 0

    def enter(self, source: str, now: float) -> bool:
        """Whether a connection from `source` may try a handshake; each True needs one `leave`."""
        reason = self._reason(source, now)
        if reason:
            self.refused[reason] += 1
            return False
        self._total += 1
        self.inside[source] += 1
        return True

    def leave(self, source: str) -> None:
        self._total -= 1
        self.inside[source] -= 1
        if not self.inside[source]:
            del self.inside[source]

    def know(self, source: str) -> None:
        """A peer of the roster has authenticated from this address."""
        self._known[source] = None
        self._known.move_to_end(source)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def _reason(self, source: str, now: float) -> str:
        if self._total >= (self.cap if source in self._known else self.cap - self.reserve):
            return "full"
        if self.inside[source] >= self.per_source:
            return "source"
        tokens, then = self._buckets.pop(source, (self.burst, now))
        tokens = min(self.burst, tokens + (now - then) * self.rate)
        self._buckets[source] = (tokens - 1 if tokens >= 1 else tokens, now)
        while len(self._buckets) > REMEMBERED:
            self._buckets.popitem(last=False)
        return "" if tokens >= 1 else "rate"


def pause(failures: int, chance: float) -> float:
    """Seconds before the next dial after so many failures in a row; `chance` in [0, 1) spreads them by ± 50 %."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(failures, 16)) * (0.5 + chance)
