"""The units: systemd understands them, they are as closed as promised, and each hardening line says why."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNITS = Path(__file__).resolve().parents[2] / "systemd"
PROGRAMS = ("/opt/fedpeer/bin/fedpeer", "/opt/fedpeer/bin/python")


@pytest.fixture
def analyze(tmp_path: Path) -> str:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    for unit in UNITS.iterdir():  # verify looks for the program: name one that exists
        text = unit.read_text()
        for named in PROGRAMS:
            text = text.replace(f"={named} ", f"={sys.executable} ")
        (tmp_path / unit.name).write_text(text)
    return program


@pytest.mark.system
def test_systemd_finds_nothing_wrong_with_the_units(analyze: str, tmp_path: Path) -> None:
    units = [str(path) for path in sorted(tmp_path.iterdir()) if path.suffix in (".service", ".socket")]
    assert len(units) == 4
    command = [analyze, "verify", "--man=no", *units]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.system
@pytest.mark.parametrize(("unit", "tenths"), [("fedpeer.service", 15), ("fedpeer-worker@.service", 5)])
def test_the_exposure_is_at_most_what_was_promised(unit: str, tenths: int, analyze: str, tmp_path: Path) -> None:
    command = [analyze, "security", "--offline=true", f"--threshold={tenths}", "--no-pager", str(tmp_path / unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-300:]


@pytest.mark.parametrize("unit", ["fedpeer.service", "fedpeer-worker@.service"])
def test_every_hardening_line_is_under_a_reason(unit: str) -> None:
    lines = (UNITS / unit).read_text().partition("# --- hardening")[2].partition("[Install]")[0].splitlines()
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


def test_a_worker_of_the_unit_is_started_as_one_of_the_daemon_is() -> None:
    from fedpeer.worker import sandbox, service

    assert f"ListenStream={sandbox.UNIT_SOCKET}\n" in (UNITS / "fedpeer-worker.socket").read_text()
    lines = (UNITS / "fedpeer-worker@.service").read_text().splitlines()
    assert "ExecStart=/opt/fedpeer/bin/python " + " ".join(service.COMMAND[1:]) in lines
    given = [word for line in lines if line.startswith("Environment=") for word in line.partition("=")[2].split()]
    assert dict(word.split("=", 1) for word in given) == service.ENVIRONMENT
