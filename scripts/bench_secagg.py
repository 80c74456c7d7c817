"""CPU seconds of a secure sum: fedpeer's SA1 against the SecAgg+ functions of Flower, unmodified.

Two lines for each size; the sides alternate, the medians count.

* *same*: what a round of SecAgg+ does, for all n parties, in one process: keys, shares for the same k neighbours, one
  masked vector each, the sum, one recovery. Ours also signs and verifies every share, which SecAgg+ does not: that
  time is not in this line (--json tells it).
* *path*: one peer doing everything that it does in a sum of n with n neighbours each: every message parsed, verified
  and answered, votes, shares, masks, digests, its slice added up, unmasking; against one client of Flower and its
  server. Beside it the floor: what no implementation of SA1 can do without (the bytes of its masks, the signatures it
  verifies, the elements it packs and unpacks, at the rates measured in the same run), how many times that the path is
  without turning values into integers and back (and how many times, when the bytes that SA1 has a peer hash are part
  of the floor), and what the peer sends, against what the protocol says.

Both sides turn the same float32 values into integers and the sum back into means, and check these. CPU seconds are of
the whole process, all threads. Flower runs in an environment of its own, .bench/peer, made by the first run.

    ./scripts/bench secagg [--json] [--plot docs/secagg.svg]

--plot draws how the cost of a peer grows with n and d instead, the least of 12 runs of each.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import numpy as np
from peer_environment import python_of
from secagg_case import Case, fingerprint
from secagg_ours import Recording, same_work, signing_key

from fedpeer.aggregation import slices, vectors
from fedpeer.crypto import STREAM_SLACK, aegis256_into, verify

RUNS = 5
REPLAYS = 12
CASES = [Case(10, 1_000_000, 0), Case(50, 1_000_000, 3), Case(100, 100_000, 3)]
ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements-bench.lock"
GROWTH = {"n": [(n, 100_000) for n in (5, 10, 20, 40, 70, 100)], "d": [(10, d * 10_000) for d in (1, 10, 100, 400)]}


# the other side


class Flower:
    """A process that does rounds of SecAgg+."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [python_of("peer", LOCK), ROOT / "scripts" / "secagg_flower.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Flower:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, case: Case) -> dict[str, float]:
        """CPU seconds by stage."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([case.n, case.d, case.drop]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"bench: Flower's side ended with {self._process.wait()}; its error stands above")
        said = json.loads(line)
        assert said["fingerprint"] == fingerprint(case), "the two sides had different values"
        seconds: dict[str, float] = said["seconds"]
        return seconds


def whole_round(seconds: dict[str, float]) -> float:
    return sum(seconds.values())


def client_and_server(seconds: dict[str, float], n: int) -> float:
    server = sum(value for stage, value in seconds.items() if stage.startswith("server"))
    return server + (sum(seconds.values()) - server) / n


# the floor


def seconds_of(action: Callable[[], object], times: int) -> float:
    """CPU seconds of one call, on average."""
    action()
    begun = process_time()
    for _ in range(times):
        action()
    return (process_time() - begun) / times


class Least(NamedTuple):
    """What no party of a sum can do without."""

    masked: float
    """elements that a mask is put on or taken off"""
    signatures: int
    packed: float
    """elements"""
    unpacked: float
    hashed: float
    """elements, packed: its own vector, the chunks it fetches, the sums of all, the total"""


def least(recording: Recording) -> Least:
    """A mask with each contributor, one of each survivor, one of each survivor with each who is gone; the vector, a
    slice of the sum and the total packed, slices of the survivors and the sum unpacked."""
    d, n, survivors = recording.d, recording.case.n, recording.survivors
    masks = n + survivors + (n - survivors) * survivors
    hashed = d + (survivors - 1) * d / n + d + d
    return Least(masks * d, recording.signatures, d + d / n + d, survivors * d / n + d, hashed)


def floor(work: Least) -> tuple[float, float]:
    """CPU seconds for all of it but the hashes, and for these, at the rates of this moment."""
    segment = np.zeros(vectors.SEGMENT, np.uint32)
    buffer = bytearray(4 * vectors.SEGMENT + STREAM_SLACK)

    def mask() -> None:
        aegis256_into(bytes(32), bytes(32), buffer, 4 * vectors.SEGMENT)
        np.add(segment, np.frombuffer(buffer, np.uint32, vectors.SEGMENT), out=segment)

    key, body = signing_key(0), bytes(180)
    signature = key.sign("PREVOTE", body)
    packed = bytes(vectors.pack(segment, 24))
    return (
        work.masked / vectors.SEGMENT * seconds_of(mask, 50)
        + work.signatures * seconds_of(lambda: verify(key.public, "PREVOTE", body, signature), 200)
        + work.packed / vectors.SEGMENT * seconds_of(lambda: vectors.pack(segment, 24), 20)
        + work.unpacked / vectors.SEGMENT * seconds_of(lambda: vectors.add_packed(segment, packed, 24), 20),
        work.hashed / vectors.SEGMENT * seconds_of(lambda: slices.sum_hash(packed), 20),
    )


def bytes_expected(case: Case) -> float:
    """What the protocol says that a party sends, on average, at 24 bits an element (SA1, version 1, section 13)."""
    n, alive = case.n, len(case.alive)
    scatter, gather = 3 * (n - 1) / n * case.d * alive / n, 3 * (n - 1) / n * case.d
    return scatter + gather + n * (2000 + 21 * n) + (n - 1) * 460 + case.drop * n * 136


# what is printed


def measure(case: Case, flower: Flower, runs: int = RUNS) -> list[dict[str, Any]]:
    """The two lines of a case."""
    recording = Recording(case)
    runs_of: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(runs):
        gc.collect()  # what the run before left is not this one's
        ours, path, peer = same_work(case), recording.replay(), flower.run(case)
        runs_of["signatures"].append(ours.pop("signatures"))
        runs_of["same"].append(sum(ours.values()))
        runs_of["path"].append(sum(path.values()))
        least_s, hashes_s = floor(least(recording))
        doing = sum(path.values()) - path["quantise"]
        runs_of["floor"].append(least_s)
        runs_of["distance"].append(doing / least_s)
        runs_of["distance with hashes"].append(doing / (least_s + hashes_s))
        runs_of["peer same"].append(whole_round(peer))
        runs_of["peer path"].append(client_and_server(peer, case.n))
    of = {name: statistics.median(measured) for name, measured in runs_of.items()}
    lines: list[dict[str, Any]] = [
        {"case": f"{case.name} {which}", "ours": of[which], "peer": of[f"peer {which}"]} for which in ("same", "path")
    ]
    for line in lines:
        line["ratio"] = line["peer"] / line["ours"]
    lines[0]["signatures"] = of["signatures"]
    lines[1] |= {
        "floor": of["floor"],
        "distance": of["distance"],
        "distance_with_hashes": of["distance with hashes"],
        "bytes": recording.sent,
        "bytes_expected": bytes_expected(case),
    }
    return [{key: round(value, 4) if isinstance(value, float) else value for key, value in x.items()} for x in lines]


def growth() -> dict[str, list[dict[str, float]]]:
    """CPU seconds and bytes sent of one peer, as n grows and as d grows.

    The least of some runs, which the sizes take by turns: they are compared with each other, and what else the machine
    does only adds to them.
    """
    sizes = [(axis, n, d) for axis, points in GROWTH.items() for n, d in points]
    recordings = [Recording(Case(n, d, 0)) for _, n, d in sizes]
    seconds: list[list[float]] = [[] for _ in sizes]
    floors: list[list[float]] = [[] for _ in sizes]
    for _ in range(REPLAYS):
        for recording, times, least_times in zip(recordings, seconds, floors, strict=True):
            gc.collect()
            path = recording.replay()
            times.append(sum(path.values()) - path["quantise"])
            least_times.append(floor(least(recording))[0])
    found: dict[str, list[dict[str, float]]] = {axis: [] for axis in GROWTH}
    for (axis, n, d), recording, times, least_times in zip(sizes, recordings, seconds, floors, strict=True):
        point = {"n": n, "d": d, "bytes": recording.sent, "seconds": min(times), "floor": min(least_times)}
        found[axis].append(point)
        print(f"n={n} d={d}: {min(times):.3f} s, floor {min(least_times):.3f} s, {recording.sent:,.0f} bytes")
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="draw how the cost grows, instead")
    options = arguments.parse_args()
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        drawing = [python_of("peer", LOCK), ROOT / "scripts" / "secagg_plot.py", options.plot]
        subprocess.run(drawing, input=json.dumps(growth()), text=True, check=True)
        return
    cases: list[dict[str, Any]] = []
    print(f"secagg: CPU seconds, medians of {RUNS} alternated runs")
    head = f"{'case':>27} {'fedpeer':>8} {'Flower':>8} {'ratio':>6}"
    print(f"{head} {'floor':>7} {'x floor':>7} {'hashed':>6} {'MB sent':>8} {'said':>6}")
    with Flower() as flower:
        for case in CASES:
            for line in measure(case, flower):
                shown = f"{line['case']:>27} {line['ours']:>8.3f} {line['peer']:>8.3f} {line['ratio']:>6.1f}"
                if "floor" in line:
                    shown += f" {line['floor']:>7.3f} {line['distance']:>7.2f} {line['distance_with_hashes']:>6.2f}"
                    shown += f" {line['bytes'] / 1e6:>8.3f} {line['bytes_expected'] / 1e6:>6.3f}"
                print(shown, flush=True)
                cases.append(line)
    if options.json:
        print(json.dumps({"bench": "secagg", "cases": cases}))


if __name__ == "__main__":
    main()
