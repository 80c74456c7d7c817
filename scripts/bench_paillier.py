"""Paillier of 2048 bits on one core: fedpeer's beside FATE's Rust (fate_utils) and HEU's ZPaillier, in the same run.

The sides alternate, one right after the other; medians count, of CPU time in µs of an operation and of its ratios, the
other's time over ours. An addition is of two ciphertexts; an operation of a matrix product is one row and feature of an
8 × 512 matrix of signed numbers with 20 bits behind the point (FATE: of floats, as its regression does; "integers" are
faster there). Ours is all that a product takes, the split of the vector too. Encryption is by the key's owner, with
noise of 96 bases for each prime. The tables of that noise, made once, are told apart.

Beside it the floor, what the multiplications alone take, timed in the same run: one product modulo n² for an addition;
a short one for each base and prime for an encryption; for a matrix a short one for each digit and number, and two long
ones for each bucket. How far ours is above that is what Python, memory and turning numbers to and fro cost.

The others are installed into .bench/fate and .bench/heu by the first run. A side that cannot be installed is said so,
its cases are left out, and the exit code is 1.

    ./scripts/bench paillier [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gmpy2
from paillier_peers import COLUMNS, COUNT, ROWS, WHOLE_MATRIX, WHOLE_VECTOR, timed
from peer_environment import python_of

from fedpeer.peers import Chance
from fedpeer.secure import residues
from fedpeer.secure.paillier import OWNER_BASES, OWNER_TABLE_FROM, Ciphertexts, Owner, PrivateKey

ROUNDS = 9
ROOT = Path(__file__).resolve().parent.parent
KEYS = ROOT / "tests" / "vectors" / "paillier.txt"
ENCRYPTIONS = 1024
CASES = {
    "encrypt vs fate_utils": ("encrypt", "fate", "encrypt"),
    "encrypt vs heu": ("encrypt", "heu", "encrypt"),
    "add vs fate_utils": ("add", "fate", "add"),
    "add vs fate_utils, integers": ("add", "fate", "add integers"),
    "matmul vs fate_utils": ("matmul", "fate", "matmul"),
    "matmul vs fate_utils, integers": ("matmul", "fate", "matmul integers"),
    "matmul vs heu": ("matmul", "heu", "matmul"),
}
"""name of a case → what ours is called, the other, and what that is asked"""


class Other:
    """A process of one of the others."""

    def __init__(self, name: str) -> None:
        python = python_of(name, ROOT / f"requirements-bench-{name}.lock")
        self._process = subprocess.Popen(
            [python, ROOT / "scripts" / "paillier_peers.py", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "RAYON_NUM_THREADS": "1"},
        )

    def run(self, case: str) -> float:
        """CPU seconds of an operation."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(case + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if not line.startswith("["):  # HEU writes its log there
                return float(line)
        raise SystemExit(f"bench: {self._process.args!r} ended with {self._process.wait()}")

    def close(self) -> None:
        self._process.communicate()


class Ours:
    """The same work by fedpeer, checked."""

    def __init__(self) -> None:
        p, q = next(line.split()[2:] for line in KEYS.read_text().splitlines() if line.startswith("key 2048 "))
        self._private, self._chance = PrivateKey(int(p, 16), int(q, 16)), Chance(bytes(32))
        self.public = self._private.public
        self.table_seconds, self._owner = timed(lambda: Owner(self._private, self._chance, OWNER_TABLE_FROM), 1)
        self._vector = self._encrypt(WHOLE_VECTOR.tolist())
        self.floors = Floors(self.public.n, int(p, 16), self._vector)

    def _encrypt(self, values: list[int]) -> Ciphertexts:
        return self._owner.encrypt(values, self._chance)

    def _check(self, found: Ciphertexts, wanted: list[int]) -> None:
        assert self.public.centred(self._private.decrypt(found)) == wanted

    def run(self, case: str) -> float:
        """CPU seconds of an operation."""
        if case == "encrypt":
            values = WHOLE_VECTOR.tolist() * (ENCRYPTIONS // ROWS)
            seconds, found = timed(lambda: self._encrypt(values), ENCRYPTIONS)
            self._check(found[:8], values[:8])
        elif case == "add":
            a, b = self._vector[:COUNT], self._vector[COUNT:]
            seconds, found = timed(lambda: a + b, COUNT, 20)
            self._check(found[:8], (WHOLE_VECTOR[:8] + WHOLE_VECTOR[COUNT : COUNT + 8]).tolist())
        else:
            fresh = Ciphertexts(self.public, self._vector.values)  # nothing is prepared
            seconds, found = timed(lambda: fresh.multiply(WHOLE_MATRIX), ROWS * COLUMNS)
            self._check(found, (WHOLE_MATRIX @ WHOLE_VECTOR).tolist())
        return seconds


class Floors:
    """What an operation takes at least: its products, at the rates of this moment."""

    def __init__(self, n: int, p: int, vector: Ciphertexts) -> None:
        square, p2 = n * n, gmpy2.mpz(p) ** 2
        long, short = vector.values[0], vector.values[0] % n
        p_long, p_short = long % p2, short % p
        self._rates: dict[str, Callable[[], object]] = {
            "long": lambda: [long * long % square for _ in range(2000)],
            "short": lambda: [long * (short * short) % square for _ in range(1000)],
            "half": lambda: [p_long * (p_short * p_short) % p2 for _ in range(1000)],
        }
        width, digits = residues.signed_digits(WHOLE_MATRIX[0].tolist())
        self._short = len(digits)  # of each row and feature
        self._long = len(digits) * (2 << width) / ROWS

    def measure(self, case: str) -> float:
        """CPU seconds of an operation."""
        rate = {name: timed(action, 2000)[0] for name, action in self._rates.items()}
        if case == "encrypt":
            return 2 * OWNER_BASES[2048] * rate["half"]
        return rate["long"] if case == "add" else self._short * rate["short"] + self._long * rate["long"]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true", help="end with one JSON object")
    options = arguments.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # the others inherit it
    others: dict[str, Other] = {}
    for name in ("fate", "heu"):
        try:
            others[name] = Other(name)
        except subprocess.CalledProcessError:
            print(f"bench: {name} cannot be installed here; its cases are not run", file=sys.stderr)
    ours = Ours()
    runs: defaultdict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for _ in range(ROUNDS):
        for name, (work, other, asked) in CASES.items():
            if other in others:
                runs[name].append((ours.run(work), others[other].run(asked), ours.floors.measure(work)))
    for process in others.values():
        process.close()
    print(f"paillier: 2048 bits, one core, µs of CPU an operation, medians of {ROUNDS} alternated runs;")
    print(f"tables of an owner's noise, once a key: {ours.table_seconds:.1f} s")
    print(f"{'':>32} {'fedpeer':>9} {'other':>9} {'ratio':>7} {'floor':>7}")
    cases: list[dict[str, Any]] = []
    for name in CASES:
        if name not in runs:
            print(f"{name:>32} not run")
            continue
        us, peer, floor = (statistics.median(side) * 1e6 for side in zip(*runs[name], strict=True))
        ratio = statistics.median(there / here for here, there, _ in runs[name])
        print(f"{name:>32} {us:>9.2f} {peer:>9.2f} {ratio:>7.2f} {floor:>7.2f}", flush=True)
        figures = {"ours": us, "peer": peer, "ratio": ratio, "floor": floor}
        cases.append({"case": name, **{key: round(value, 3) for key, value in figures.items()}})
    if options.json:
        print(json.dumps({"bench": "paillier", "cases": cases}))
    return 0 if len(others) == 2 else 1


if __name__ == "__main__":
    sys.exit(main())
