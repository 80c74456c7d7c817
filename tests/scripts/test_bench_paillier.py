"""What the bench says when one of the others cannot be installed."""

from __future__ import annotations

import json
import os
import subprocess
from types import SimpleNamespace

import bench_paillier
import pytest


class Ours:
    table_seconds = 4.0
    floors = SimpleNamespace(measure=lambda case: 1e-6)

    def run(self, case: str) -> float:
        return 2e-6


class Other:
    def __init__(self, name: str) -> None:
        if name == "heu":
            raise subprocess.CalledProcessError(1, "pip")

    def run(self, case: str) -> float:
        return {"encrypt": 32e-6}.get(case, 6e-6)

    def close(self) -> None:
        pass


def test_cases_of_who_cannot_be_installed_are_said_to_be_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_paillier, "Ours", Ours)
    monkeypatch.setattr(bench_paillier, "Other", Other)
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: None)
    monkeypatch.setattr("sys.argv", ["bench_paillier.py", "--json"])
    assert bench_paillier.main() == 1
    said = capsys.readouterr()
    assert "heu cannot be installed here" in said.err
    assert "encrypt vs heu not run" in said.out
    assert "matmul vs heu not run" in said.out
    found = json.loads(said.out.splitlines()[-1])
    assert found["bench"] == "paillier"
    assert {case["case"]: case["ratio"] for case in found["cases"]} == {
        "encrypt vs fate_utils": 16,
        "add vs fate_utils": 3,
        "add vs fate_utils, integers": 3,
        "matmul vs fate_utils": 3,
        "matmul vs fate_utils, integers": 3,
    }
