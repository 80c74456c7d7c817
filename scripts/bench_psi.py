"""Seconds of a private set intersection of two parties: vertical.align against SecretFlow's (spu), in the same run.

Two processes over loopback, a CSV file in and a CSV file out on both sides, half of the ids in common, both sides told
which. Ours is the whole stage as it chooses its protocol by itself: normal form, base transfers, padding, tags and
result included; what is left out is the daemons (sessions, outbox, checkpoints on disk). The sides alternate; medians
count, of the party that takes longer. Ratios are the other's time over ours.

Of its protocols KKRT is the one that we compare with; RR22, another one, is shown beside it. "x25519" is what we do
with a partner who is not taken to follow the protocol, against its ECDH on the same curve.

spu is installed into .bench/psi by the first run.

    ./scripts/bench psi [--json] [--case 100k]
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements-bench-psi.lock"


class Case(NamedTuple):
    name: str
    ids: int
    ours: str
    peers: tuple[str, ...]
    runs: int


CASES = [
    Case("100k", 100_000, "kkrt", ("KKRT", "RR22"), 5),
    Case("1M", 1_000_000, "kkrt", ("KKRT", "RR22"), 3),
    Case("10k x25519", 10_000, "ecdh", ("ECDH",), 3),
]


def peer_python() -> Path:
    """The interpreter of the environment of what we are compared with; made when its lock has changed."""
    folder = ROOT / ".bench" / "psi"
    python, stamp = folder / "bin" / "python", folder / "lock.sha256"
    wanted = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    if not stamp.is_file() or stamp.read_text() != wanted:
        print("bench: installing what we are compared with into .bench/psi (once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--require-hashes"]
        subprocess.run([*pip, "-r", LOCK], check=True)
        stamp.write_text(wanted)
    return python


def write_ids(path: Path, first: int, count: int) -> None:
    path.write_text("id\n" + "".join(f"user{i:010d}\n" for i in range(first, first + count)))


def read_ids(path: Path) -> set[str]:
    with path.open(newline="") as file:
        return {row["id"] for row in csv.DictReader(file)}


def free_port() -> int:
    """A port of loopback that is free, and so, most likely, is the next one."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def measure(commands: list[list[str]]) -> list[list[float]]:
    """What each of two parties says, which begin at the same time: seconds, and more."""
    parties: list[subprocess.Popen[str]] = []
    ours = "psi_ours" in commands[0][1]
    try:
        for command in commands:
            pipe = subprocess.PIPE
            party = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, bufsize=1)
            parties.append(party)
            if ours:  # the second connects to the first
                _line(party, "ready")
        for party in () if ours else parties:
            _line(party, "ready")
        for party in parties:
            assert party.stdin is not None
            party.stdin.write("go\n")
            party.stdin.flush()
        said = [[float(word) for word in _line(party).split()] for party in parties]
    finally:
        for party in parties:
            party.kill()
            party.communicate()
    return said


def _line(party: subprocess.Popen[str], wanted: str = "") -> str:
    """The next line of a party that is `wanted`, or a number."""
    assert party.stdout is not None
    for line in party.stdout:
        word = line.strip()
        if word == wanted or (not wanted and word[:1].isdigit() and word.replace(".", "").replace(" ", "").isdigit()):
            return word
    raise SystemExit(f"bench: {party.args} ended without a result")


def run(case: Case, protocol: str, folder: Path) -> tuple[float, float]:
    """Seconds, and megabytes that both sent (0 where they are not told)."""
    ours = protocol == case.ours
    script = ROOT / "scripts" / ("psi_ours.py" if ours else "psi_spu.py")
    python = sys.executable if ours else str(peer_python())
    port, commands = free_port(), []
    for number, who in enumerate(("guest", "host") if ours else ("0", "1")):
        files = [str(folder / f"in{number}.csv"), str(folder / f"out{number}.csv")]
        Path(files[1]).unlink(missing_ok=True)
        commands.append([python, str(script), who, protocol, str(port), *files])
    said = measure(commands)
    common = {f"user{i:010d}" for i in range(case.ids // 2, case.ids)}
    for number in (0, 1):
        assert read_ids(folder / f"out{number}.csv") == common, f"{protocol} found other ids than there are"
    return max(each[0] for each in said), sum(sum(each[1:]) for each in said) / 1e6


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments.add_argument("--case", choices=[case.name for case in CASES], help="this one alone")
    options = arguments.parse_args()
    cases: list[dict[str, object]] = []
    peer_python()
    print("psi: seconds over loopback, two processes, file in and file out on both sides, medians of alternated runs")
    print(f"{'case':>20} {'fedpeer':>8} {'spu':>8} {'ratio':>6} {'MB sent':>8}")
    for case in CASES:
        if options.case not in (None, case.name):
            continue
        seconds: dict[str, list[float]] = {protocol: [] for protocol in (case.ours, *case.peers)}
        megabytes = 0.0
        with tempfile.TemporaryDirectory() as folder:
            for number in (0, 1):
                write_ids(Path(folder) / f"in{number}.csv", number * (case.ids // 2), case.ids)
            for _ in range(case.runs):
                for protocol, times in seconds.items():
                    took, sent = run(case, protocol, Path(folder))
                    times.append(took)
                    megabytes = max(megabytes, sent)
        ours = statistics.median(seconds[case.ours])
        for protocol in case.peers:
            peer = statistics.median(seconds[protocol])
            line = {"case": f"{case.name} vs {protocol}", "ours": round(ours, 3), "peer": round(peer, 3)}
            line |= {"ratio": round(peer / ours, 2), "megabytes": round(megabytes, 1)}
            cases.append(line)
            print(f"{line['case']:>20} {ours:>8.2f} {peer:>8.2f} {peer / ours:>6.2f} {megabytes:>8.1f}", flush=True)
    if options.json:
        print(json.dumps({"bench": "psi", "cases": cases}))


if __name__ == "__main__":
    main()
