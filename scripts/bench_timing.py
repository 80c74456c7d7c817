"""Whether time tells a stranger anything before it has shown that it knows our key: Welch's t of fixed against random.

Each case runs the daemon's own code on two classes of inputs that an attacker would want to tell apart, in random
order: one that is fixed and as close to right as can be, and random ones. |t| below 4.5 says that so many samples do
not tell them apart; the slowest tenth of all samples, which is the machine's doing, is left out.

    equal      a MAC of which all bytes but the last are right, against random ones
    mac1       the check of a whole first message (hash and comparison), likewise
    lookup     a key that differs from one of the roster in its last byte, against random ones, among 50 cards
    refusal    the door (`wire.service.respond`) up to its refusal of a first message, likewise

What is not asked: a key of the roster against a stranger's. Who is admitted is answered, so it knows; and a key is
looked up only after its owner has shown that it has the secret one.

    ./scripts/bench timing [--samples 100000] [--json]          exit code 1 if a case is over 4.5

Source: Reparaz, Balasch and Verbauwhede, Dude, is my code constant time? (DATE 2017): its test and its cropping.
"""

from __future__ import annotations

import argparse
import gc
import json
import secrets
import sys
from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt
import trio

from fedpeer.crypto import DhKey, Secret, equal
from fedpeer.errors import HandshakeError
from fedpeer.identity import Identity
from fedpeer.mesh.roster import Roster
from fedpeer.wire import service
from fedpeer.wire.constants import MAC1_BYTES, MESSAGE_1_BYTES
from fedpeer.wire.noise import mac1

SAMPLES = 100_000
MOST = 4.5
KEPT = 0.9
BLOCK = 1000
"""samples whose inputs are made together, so that making them is not measured"""
OURS = DhKey(Secret(bytes(range(32))))
MESSAGE = bytes(MESSAGE_1_BYTES - MAC1_BYTES)
RIGHT = mac1(MESSAGE, OURS.public)

Case = tuple[Callable[[], bytes], Callable[[], bytes], Callable[[bytes], Awaitable[object]]]
"""the fixed class, the random one, and what is timed"""


def nearly(right: bytes) -> bytes:
    """Right but for a bit of its last byte; another object each time, as what comes from a socket is."""
    return right[:-1] + bytes([right[-1] ^ 1])


def cases() -> dict[str, Case]:
    """The cases by name. Each gives inputs of one length."""
    roster = Roster(
        Identity(Secret.random()).card("us"), (Identity(Secret.random()).card(f"peer-{i}") for i in range(50))
    )
    known = next(iter(roster)).body.dh
    length = MESSAGE_1_BYTES.to_bytes(service.LENGTH_BYTES, "big")

    async def compare(mac: bytes) -> None:
        equal(mac, RIGHT)

    async def check(message: bytes) -> None:
        equal(message[-MAC1_BYTES:], mac1(message[:-MAC1_BYTES], OURS.public))

    async def look_up(key: bytes) -> None:
        roster.by_key(key)

    async def refuse(said: bytes) -> None:
        try:
            await service.respond(Said(said), OURS, lambda key: roster.by_key(key) is not None)
        except HandshakeError:
            return
        raise AssertionError("a stranger was let in")

    def a_mac() -> bytes:
        return secrets.token_bytes(MAC1_BYTES)

    return {
        "equal": (lambda: nearly(RIGHT), a_mac, compare),
        "mac1": (lambda: nearly(MESSAGE + RIGHT), lambda: MESSAGE + a_mac(), check),
        "lookup": (lambda: nearly(known), lambda: secrets.token_bytes(len(known)), look_up),
        "refusal": (lambda: length + nearly(MESSAGE + RIGHT), lambda: length + MESSAGE + a_mac(), refuse),
    }


class Said(trio.abc.Stream):
    """A connection whose other side has said this."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        said, self._data = self._data[:max_bytes], self._data[max_bytes:]
        return said

    async def send_all(self, data: object) -> None:
        raise AssertionError("a stranger was answered")

    async def wait_send_all_might_not_block(self) -> None:
        raise AssertionError("a stranger was answered")

    async def aclose(self) -> None:
        pass


async def measure(case: Case, samples: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Nanoseconds of each run, and whether it was of the fixed class; `samples` of each class, about."""
    fixed, random, run = case
    times, classes = np.empty(2 * samples, np.int64), np.empty(2 * samples, bool)
    for begin in range(0, 2 * samples, BLOCK):
        end = min(begin + BLOCK, 2 * samples)
        of_fixed = np.frombuffer(secrets.token_bytes(end - begin), np.uint8) & 1 == 1
        inputs = [fixed() if one else random() for one in of_fixed]
        for at, data in enumerate(inputs, start=begin):
            began = perf_counter_ns()
            await run(data)
            times[at] = perf_counter_ns() - began
        classes[begin:end] = of_fixed
    return times, classes


def welch(one: Sequence[float] | npt.NDArray[np.int64], other: Sequence[float] | npt.NDArray[np.int64]) -> float:
    """Welch's t of two samples; 0 where nothing varies and the means are the same."""
    means, spread = np.mean(one) - np.mean(other), np.var(one, ddof=1) / len(one) + np.var(other, ddof=1) / len(other)
    if spread == 0:
        return 0.0 if means == 0 else float("inf") * float(np.sign(means))
    return float(means / np.sqrt(spread))


def t_of(times: npt.NDArray[np.int64], classes: npt.NDArray[np.bool_]) -> float:
    """Welch's t of the fixed class against the random one, without the slowest tenth of all."""
    kept = times <= np.quantile(times, KEPT)
    return welch(times[kept & classes], times[kept & ~classes])


def main() -> int:
    parser = argparse.ArgumentParser(prog="./scripts/bench timing", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of each class")
    parser.add_argument("--json", action="store_true", help="one object on the last line")
    given = parser.parse_args()
    if given.samples < 100:
        parser.error("--samples: 100 or more")
    gc.disable()
    found = {}
    for name, case in cases().items():
        trio.run(measure, case, BLOCK)  # warm
        times, classes = trio.run(measure, case, given.samples)
        found[name] = t_of(times, classes)
        print(f"{name:8} |t| = {abs(found[name]):5.2f}   {np.median(times):8.0f} ns", file=sys.stderr)
    over = [name for name, t in found.items() if abs(t) >= MOST]
    print(f"over {MOST}: {', '.join(over) or 'none'}", file=sys.stderr)
    if given.json:
        print(json.dumps({"samples": given.samples, "t": found, "over": over}))
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
