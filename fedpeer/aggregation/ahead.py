"""Messages of instances that are not open here yet: their senders are further than this party.

Rules
* Of each other party so many bytes are kept. What an instance that opens next needs goes before what is further ahead.
* What finds no room is dropped, and that is known (`lacking`): whoever keeps all messages adds them again once an
  instance has opened.
* A message counts once, however often it comes.

Source: SA1, version 1, section 8.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Final

from fedpeer.aggregation.messages import Signed

MAX_AHEAD: Final = 1 << 20
"""bytes of messages that are kept of each other party"""


class Ahead:
    """What is kept for party `me`, by sender and instance."""

    def __init__(self, me: int) -> None:
        self.lacking = False
        """something was dropped for want of room"""
        self._me = me
        self._kept: defaultdict[int, dict[bytes, dict[bytes, Signed]]] = defaultdict(dict)  # sender → sid → digest
        self._used: defaultdict[int, int] = defaultdict(int)  # bytes

    def add(self, signed: Signed, wanted: Collection[bytes]) -> None:
        """Keep a message if there is room; `wanted`: the instances that may open next, by sid.

        Our own are always kept: without them this party could contradict itself.
        """
        kept, nbytes = self._kept[signed.sender], len(signed.raw)
        if signed.digest in kept.get(signed.sid, ()):
            return
        if signed.sender != self._me and self._used[signed.sender] + nbytes > MAX_AHEAD:
            self.lacking = True
            if signed.sid in wanted:
                for sid in kept.keys() - wanted:
                    self._take(signed.sender, sid)
            if self._used[signed.sender] + nbytes > MAX_AHEAD:
                return
        kept.setdefault(signed.sid, {})[signed.digest] = signed
        self._used[signed.sender] += nbytes

    def of(self, sid: bytes) -> Iterator[Signed]:
        """What is kept of this instance."""
        for kept in self._kept.values():
            yield from kept.get(sid, {}).values()

    def take(self, sid: bytes) -> list[Signed]:
        """The same; it is kept no longer."""
        return [signed for sender in self._kept for signed in self._take(sender, sid)]

    def _take(self, sender: int, sid: bytes) -> list[Signed]:
        taken = list(self._kept[sender].pop(sid, {}).values())
        self._used[sender] -= sum(len(signed.raw) for signed in taken)
        return taken
