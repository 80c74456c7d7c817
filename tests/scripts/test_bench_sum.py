from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_sum
import numpy as np
import pytest
from algorithms.bench import vector

from fedpeer.secure import fixedpoint

SCRIPTS = str(Path(bench_sum.__file__).parent)
ME = SimpleNamespace(pid=os.getpid())


def run(*options: str, wrong: bool = False) -> tuple[int, dict[str, Any], str]:
    """The exit code, the object on the last line, and what people are told, of the bench in a process of its own."""
    plant = "bench_sum.expected = lambda n, d: 'another';" if wrong else ""
    program = f"import sys; sys.path.insert(0, {SCRIPTS!r}); import bench_sum; {plant} sys.exit(bench_sum.main())"
    done = subprocess.run([sys.executable, "-c", program, "--json", *options], capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_no_value_is_rounded_so_that_the_total_is_numpys() -> None:
    codecs = vector.add.codecs("vector")
    given = [vector.values(number, 70_000) for number in range(3)]
    assert given[0].dtype == np.float32
    assert min(x.min() for x in given) == -32767.5
    assert max(x.max() for x in given) == 32767.5
    layout, first = fixedpoint.encode({"values": given[0]}, codecs, bytes(32))
    again = fixedpoint.encode({"values": given[0]}, codecs, bytes([1] * 32))[1]
    assert (first == again).all()
    total = first + sum(fixedpoint.encode({"values": x}, codecs, bytes(32))[1] for x in given[1:])
    assert vector.digest(fixedpoint.decode(layout, total, 3)["values"]) == bench_sum.expected(3, 70_000)


def test_a_total_has_another_name_when_one_bit_differs() -> None:
    total = np.arange(100.0)
    name = vector.digest(total)
    total[50] = np.nextafter(total[50], 99)
    assert vector.digest(total) != name


def test_pss_grows_with_what_is_used() -> None:
    before = bench_sum.pss(os.getpid())
    held = np.ones(8_000_000)
    assert 60e6 < bench_sum.pss(os.getpid()) - before < 80e6
    del held


def test_cpu_seconds_are_those_of_children_too_alive_or_ended() -> None:
    busy = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True); input()"
    before = bench_sum.cpu_seconds(ME)
    child = subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    assert bench_sum.cpu_seconds(ME) - before > 0.25
    child.communicate(b"\n")
    assert bench_sum.cpu_seconds(ME) - before > 0.25


@pytest.mark.system
def test_a_sum_of_daemons_is_numpys_and_costs_what_is_said() -> None:
    d = 6_000_000
    code, result, told = run("--n", "3", "--d", str(d))
    assert code == 0, told
    assert result["totals_equal"]
    assert result["total_exact"]
    assert len(result["peers"]) == 3
    total, meant = 3 * d, 3 * result["bytes_expected"]
    more = sum(peer["bytes_sent"] for peer in result["peers"]) - meant
    late = round(more / total)  # on a busy machine one may come late: it has the total from another
    assert 0 <= late < 3
    assert more == pytest.approx(late * total, abs=0.05 * meant)
    for peer in result["peers"]:
        assert peer["bytes_kernel"] in (None, pytest.approx(peer["bytes_sent"], rel=0.01))
        assert peer["cpu_seconds"] > 0
        if os.geteuid() == 0:
            assert 8 * d < peer["memory"] <= result["memory_meant"] == 16 * d


@pytest.mark.system
def test_a_total_that_is_not_numpys_is_told_and_exits_with_1() -> None:
    code, result, told = run("--n", "3", "--d", "1000", wrong=True)
    assert code == 1
    assert "the totals are not numpy's" in told
    assert result["totals_equal"]
    assert not result["total_exact"]
