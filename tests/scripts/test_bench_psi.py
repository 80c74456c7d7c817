from __future__ import annotations

from pathlib import Path

import bench_psi
import pytest
from bench_psi import Case


@pytest.mark.parametrize("protocol", ["kkrt", "ecdh"])
def test_two_processes_find_the_common_ids_and_a_wrong_file_is_noticed(protocol: str, tmp_path: Path) -> None:
    case = Case("1k", 1000, protocol, (), 1)
    for number in (0, 1):
        bench_psi.write_ids(tmp_path / f"in{number}.csv", number * 500, 1000)
    seconds, megabytes = bench_psi.run(case, protocol, tmp_path)
    assert seconds > 0
    assert megabytes == pytest.approx({"kkrt": 0.324, "ecdh": 0.09}[protocol], rel=0.05)
    bench_psi.write_ids(tmp_path / "in1.csv", 501, 1000)
    with pytest.raises(AssertionError, match="found other ids than there are"):
        bench_psi.run(case, protocol, tmp_path)
