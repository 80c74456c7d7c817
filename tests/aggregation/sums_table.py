"""Several parties around a table, without daemons: what one says all hear at once, and one of them may lie."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from fedpeer import codec
from fedpeer.aggregation import names, slices, vectors
from fedpeer.aggregation.evidence import PINNED
from fedpeer.aggregation.messages import Signed, sign
from fedpeer.aggregation.party import Party
from fedpeer.aggregation.seat import Ask, Ended, Setting
from fedpeer.aggregation.work import Add, Fetch, FetchTotal, Mask, Unmask, perform
from fedpeer.crypto import Secret, SigningKey

CONTRACT = b"C" * 32
USED = 1000
LIAR = 1
Letter = tuple[Signed, int | None]


class Files(dict[bytes, bytes]):
    def read(self, digest: bytes) -> bytes:
        return self[digest]

    def write(self, digest: bytes, data: Any) -> None:
        self[digest] = bytes(data)


class Round:
    """Parties around a table: what one says all hear at once, save for what `lie` makes of the liar's letters."""

    def __init__(self, n: int, lie: Callable[[Letter], list[Letter]] = lambda letter: [letter]) -> None:
        self.n, self.lie, self.now = n, lie, 0.0
        chance = random.Random(n)
        self.keys = [SigningKey(Secret(bytes([party + 1]) * 32)) for party in range(n)]
        publics = [key.public for key in self.keys]
        self.parties = [
            Party(Setting(CONTRACT, names.profile(n), party, publics, stall_s=600), key, chance.randbytes, {})
            for party, key in enumerate(self.keys)
        ]
        self.files = [Files() for _ in range(n)]
        self.said: list[Signed] = []
        self.kept: list[dict[bytes, bytes]] = [{} for _ in range(n)]
        self.forgotten: list[set[bytes]] = [set() for _ in range(n)]
        self.work: Callable[[int, Any], Any] = lambda _party, work: work
        generator = np.random.default_rng(n)
        pad = np.zeros(slices.padded(USED) - USED, np.uint32)
        self.x = [np.concatenate([generator.integers(0, 1 << 16, USED, np.uint32), pad]) for _ in range(n)]

    def hear(self, sender: int, signed: Signed, to: int | None) -> None:
        self.said.append(signed)
        for party in range(self.n):
            if party != sender and to in (None, party):
                self.parties[party].add(signed)

    def ask(self, turn: int = 0, *, k: int = 0, group: str = "", models: dict[int, bytes] | None = None) -> None:
        """Every party has its vector for this sum."""
        encoded = codec.encode([1, ["fit", turn, k], PINNED])
        of = names.group_of(CONTRACT, (group or f"turn {turn}").encode())
        for number, party in enumerate(self.parties):
            model, params = (models or {}).get(number, b"m" * 32), names.params_hash(encoded)
            ask = Ask(("fit", turn, k), of, model, bytes(32), params, len(self.x[0]), USED, encoded=encoded)
            party.ask(ask, self.now)

    def run(self, until: float = math.inf) -> dict[int, Ended]:
        """What ends up to this time, or until it has ended at everybody; then no party has anything to say."""
        ended: dict[int, Ended] = {}
        for _ in range(3000):
            busy = [self.advance(number, ended) for number in range(self.n)]
            if not any(busy):
                times = [at for party in self.parties if (at := party.wake_at()) is not None]
                soon = max(min(times, default=math.inf), self.now + 1e-3)
                if len(ended) == self.n or soon > until:
                    return ended
                self.now = soon
        raise AssertionError(f"no end: {ended}")

    def sum(self, turn: int = 0, *, k: int = 0, group: str = "", models: dict[int, bytes] | None = None) -> list[Ended]:
        """How a sum of all ends at each; afterwards no party has anything to say."""
        self.ask(turn, k=k, group=group, models=models)
        ended = self.run()
        return [ended[number] for number in range(self.n)]

    def advance(self, number: int, ended: dict[int, Ended]) -> bool:
        party = self.parties[number]
        step = party.advance(self.now)
        kept = self.kept[number] | step.keep
        self.kept[number] = {key: raw for key, raw in kept.items() if raw is not None}
        self.forgotten[number].update(step.forget)
        for signed, to in step.say:
            party.add(signed, logged=True)
            for letter in self.lie((signed, to)) if number == LIAR else [(signed, to)]:
                self.hear(number, *letter)
        for work in step.work:
            match work := self.work(number, work):
                case Mask() | Add() | Unmask():
                    party.done(work, perform(work, self.files[number], self.x[number]))
                case Fetch(digest=digest, party=holder):
                    if digest in self.files[holder]:
                        self.files[number][digest] = self.files[holder][digest]
                        party.done(work, True)
                case FetchTotal(sum_hash=digest, holders=holders):
                    self.files[number][digest] = self.files[holders[0]][digest]
                    party.done(work, True)
        ended.update((number, end) for end in step.ended)
        return bool(step)

    def check(self, ends: list[Ended], without: set[int]) -> None:
        """All have the same exact sum over all but these."""
        survivors = frozenset(range(self.n)) - without
        exact = sum(self.x[party].astype(np.uint64) for party in survivors)
        for end, files in zip(ends, self.files, strict=True):
            assert (end.status, end.survivors) == ("SUM", survivors)
            assert (vectors.unpack(files[end.sum_hash], 24) == exact).all()

    def of(self, kind: str) -> list[Any]:
        return [signed.message for signed in self.said if signed.kind == kind]


def again(letter: Letter, key: SigningKey, **changed: Any) -> Letter:
    """The same message with other fields, signed by this key."""
    message = letter[0].message
    fields = {name: changed.get(name, getattr(message, name)) for name in message.__struct_fields__[4:]}
    return sign(key, changed.get("sid", message.sid), message.kind, message.sender, *fields.values()), letter[1]
