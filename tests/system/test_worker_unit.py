"""The worker unit in a booted systemd: what it stops by itself, and that a stage runs in it with all layers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIP = 77
HIDDEN = ("/root", "/home", "/tmp", "/var", "/run", "/opt")
TRIED = ("connect_tcp", "send_udp", "read_key", "read_state", "write_a_file", "write_to_tmp", "read_its_environment",
         "signal_it", "trace_it", "make_a_namespace", "read_passwd", "run_a_program")  # fmt: skip
BARE = (
    "import fedpeer.worker.sandbox as s; s.lock_files = lambda *given: None; s.filter_calls = lambda: None; "
    "s.limit = lambda memory: None; import fedpeer.worker.main as m; m.main()"
)
"""A worker that does not confine itself."""

SETUP = """
set -eu
R=$1; V=$R/opt/fedpeer
/usr/bin/python3 -m venv --without-pip "$V"
P=$("$V/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp -r {root}/fedpeer "$P/fedpeer"
cp -r {root}/tests/worker/algorithms/trial "$P/fedpeer/algorithms/trial"
case {hidden} in 1) cp -r {packages}/. "$P/" ;; *) echo {packages} >"$P/packages.pth" ;; esac
S=$R/etc/systemd/system
cp {root}/systemd/fedpeer-worker.socket {root}/systemd/fedpeer-worker@.service "$S/"
sed 's#fedpeer-worker/#fedpeer-bare/#' "$S/fedpeer-worker.socket" >"$S/fedpeer-bare.socket"
sed 's#^ExecStart=.*#ExecStart=/opt/fedpeer/bin/python -I /opt/fedpeer/bare.py#' \\
  "$S/fedpeer-worker@.service" >"$S/fedpeer-bare@.service"
cp {folder}/bare.py "$V/bare.py"
cp {folder}/drive.py "$R/box/drive.py"
mkdir -p "$R/usr/lib/sysusers.d"; cp {root}/systemd/fedpeer.sysusers.conf "$R/usr/lib/sysusers.d/fedpeer.conf"
"""

TEST = """
set -eu
systemd-sysusers /usr/lib/sysusers.d/fedpeer.conf
ip link set lo up || true
systemctl start fedpeer-worker.socket fedpeer-bare.socket
mkdir -p /srv/home/state; echo rows >/srv/home/state/fedpeer.sqlite; echo key >/srv/home/identity.key
chown -R fedpeer /srv/home; chmod -R a+rX /srv/home
runuser -u fedpeer -- /opt/fedpeer/bin/python -I /box/drive.py
test -z "$(systemctl list-units --no-legend --plain 'fedpeer-worker@*' 'fedpeer-bare@*')"
"""

DRIVE = """
import json, os, socket, tempfile, time
from pathlib import Path
import numpy as np, pyarrow as pa, trio
from fedpeer import artifact
from fedpeer.stage import Rows, Table
from fedpeer.worker import protocol as ask, sandbox
from fedpeer.worker.service import WorkerProcess

async def run(unit, stage, params, roles, inputs):
    os.environ["FEDPEER_WORKER_SOCKET"] = "/run/fedpeer-" + unit + "/worker.sock" if unit else ""
    began = time.monotonic()
    start = ask.Start(stage, json.dumps(params).encode(), "alice", roles, bytes(32), None, inputs)
    worker = await WorkerProcess.start(start)
    try:
        said = await worker.next()
        seconds = time.monotonic() - began
    finally:
        await worker.aclose()
    assert isinstance(said, ask.Done), said
    return artifact.load(*said.outputs[0][1]), seconds

async def main():
    tcp, udp = socket.create_server(("127.0.0.1", 0)), socket.socket(type=socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    target = dict(folder="/srv/home", process=os.getpid(), tcp=tcp.getsockname()[1], udp=udp.getsockname()[1],
                  abstract="", count=1 << 26, only=TRIED)
    talk = [("alice", "guest"), ("bob", "host")]
    told = {}
    for unit in ("worker", "bare"):
        report, _ = await run(unit, "trial.escape:attempts", target, talk, [])
        told[unit] = dict(report.values)
    path = Path(tempfile.mkdtemp()) / "table"
    path.write_bytes(artifact.dump(Table(pa.table({"x": [1.0, 2.0], "y": [3.0, 4.0]})))[1])
    path.chmod(0o400)
    inputs = [("rows", *artifact.dump(Rows(np.array([1])))), ("table", "table", path)]
    for unit in ("worker", ""):
        table, told["seconds of " + (unit or "child")] = await run(
            unit, "local.select:run", {}, [("alice", "member")], inputs)
        told["rows of " + (unit or "child")] = table.data.to_pylist()
    os.environ.pop("FEDPEER_WORKER_SOCKET")
    told["layers"] = sandbox.probe().unit
    print("TOLD " + json.dumps(told))

trio.run(main)
"""


@pytest.fixture(scope="module")
def told(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a daemon's user was told by workers of the units in a booted systemd."""
    box = shared / "tools" / "systemd-box.sh"
    if not box.is_file():
        pytest.skip(f"there is no {box} to boot a systemd with")
    python = shutil.which("python3", path="/usr/bin")
    minor = [python or "false", "-c", "import sys; sys.exit(sys.version_info[:2] != " + str(sys.version_info[:2]) + ")"]
    if subprocess.run(minor, check=False).returncode != 0:
        pytest.skip("/usr/bin/python3 is another version than this one, and the packages are of this one")
    folder = tmp_path_factory.mktemp("box")
    packages = Path(numpy.__file__).parents[1]
    hidden = int(any(packages.is_relative_to(path) for path in HIDDEN))
    (folder / "bare.py").write_text(BARE)
    (folder / "drive.py").write_text(DRIVE.replace("only=TRIED", f"only={TRIED!r}"))
    (folder / "setup").write_text(SETUP.format(root=ROOT, folder=folder, packages=packages, hidden=hidden))
    (folder / "test").write_text(TEST)
    command = ["bash", str(box), str(folder / "setup"), str(folder / "test")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    if done.returncode == SKIP:
        pytest.skip(done.stdout.strip() or done.stderr.strip())
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    assert (done.returncode, len(lines)) == (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("TOLD "))  # type: ignore[no-any-return]


@pytest.mark.system
def test_a_stage_runs_in_the_unit_with_all_layers_on_a_file_that_only_the_daemon_can_open(told: dict[str, Any]) -> None:
    assert told["rows of worker"] == told["rows of child"] == [{"x": 2.0, "y": 4.0}]
    assert told["layers"] is True
    print({name: value for name, value in told.items() if name.startswith("seconds")})


@pytest.mark.system
def test_nothing_gets_out_of_the_unit(told: dict[str, Any]) -> None:
    assert {name for name, said in told["worker"].items() if said == "done"} == set()


@pytest.mark.system
def test_the_unit_stops_a_worker_that_does_not_confine_itself(told: dict[str, Any]) -> None:
    open_to_it = {"read_passwd", "run_a_program", "write_to_tmp"}  # a public file, a program, a /tmp of its own
    assert {name for name, said in told["bare"].items() if said == "done"} == open_to_it
