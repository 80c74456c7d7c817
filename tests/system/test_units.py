"""The units: systemd understands them, they are as closed as promised, and each hardening line says why."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNITS = Path(__file__).resolve().parents[2] / "systemd"
PROGRAM = "/opt/fedpeer/bin/fedpeer"


@pytest.fixture
def analyze(tmp_path: Path) -> str:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    for unit in UNITS.iterdir():  # verify looks for the program: name one that exists
        (tmp_path / unit.name).write_text(unit.read_text().replace(PROGRAM, sys.executable))
    return program


@pytest.mark.system
def test_systemd_finds_nothing_wrong_with_the_units(analyze: str, tmp_path: Path) -> None:
    command = [analyze, "verify", "--man=no", str(tmp_path / "fedpeer.service"), str(tmp_path / "fedpeer-admin.socket")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.system
def test_the_exposure_is_at_most_one_and_a_half(analyze: str, tmp_path: Path) -> None:
    command = [analyze, "security", "--offline=true", "--threshold=15", "--no-pager", str(tmp_path / "fedpeer.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-300:]


def test_every_hardening_line_is_under_a_reason() -> None:
    lines = (
        (UNITS / "fedpeer.service").read_text().partition("# --- hardening")[2].partition("[Install]")[0].splitlines()
    )
    explained = False
    for line in lines[1:]:
        if line.startswith("#"):
            explained = True
        elif not line:
            explained = False
        else:
            assert explained, f"{line} has no reason above it"


def test_the_units_and_the_program_mean_the_same_places() -> None:
    from fedpeer import config
    from fedpeer.admin import service

    socket_unit = (UNITS / "fedpeer-admin.socket").read_text()
    assert f"ListenStream={config.SYSTEM_SOCKET}\n" in socket_unit
    assert "FileDescriptorName=admin\n" in socket_unit
    assert f"SocketGroup={service.GROUP}\n" in socket_unit
    assert f"g {service.GROUP} " in (UNITS / "fedpeer.sysusers.conf").read_text()
    port = config.Settings(name="a").listen[0].rpartition(":")[2]
    assert f"SocketBindAllow=tcp:{port}\n" in (UNITS / "fedpeer.service").read_text()
