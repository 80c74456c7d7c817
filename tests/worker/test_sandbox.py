"""Attempts to get out of a worker: each fails with the layer that is to stop it, and succeeds without any layer.

The attempts are tests/worker/algorithms/trial/escape.py; real workers run them all, once without a layer, once with
each layer alone, and once as they are.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from fedpeer import artifact
from fedpeer.errors import SandboxError, WorkerCrashed
from fedpeer.worker import protocol as ask
from fedpeer.worker import sandbox, syscalls
from fedpeer.worker.connection import Connection
from fedpeer.worker.service import COMMAND, ENVIRONMENT, WorkerProcess

STAGES = Path(__file__).parent / "algorithms"
MEMORY = 64 << 20
OFF = {
    "landlock": "s.lock_files = lambda *given: None",
    "seccomp": "s.filter_calls = lambda: None",
    "limits": "s.limit = lambda memory: None; s.keep_private = lambda: None; s.keep_streams_only = lambda: None",
}
LANDLOCK = sandbox.probe().landlock
FILES, TCP, SCOPES = LANDLOCK >= 1, LANDLOCK >= 4, LANDLOCK >= 6
"""what this kernel's landlock knows"""

STOPPED_BY: dict[str, set[str]] = {
    "connect_tcp": {"seccomp", *["landlock"] * TCP},
    "bind_tcp": {"seccomp", *["landlock"] * TCP},
    "send_udp": {"seccomp"},
    "connect_unix": {"seccomp"},
    "connect_abstract": {"seccomp", *["landlock"] * SCOPES},
    "send_from_a_pair": {"seccomp"},
    "listen_to_the_kernel": {"seccomp"},
    "read_passwd": {"landlock"},
    "read_key": {"landlock"},
    "read_state": {"landlock"},
    "list_state": {"landlock"},
    "read_through_a_root": {"landlock"},
    "write_a_file": {"landlock", "seccomp"},
    "write_to_tmp": {"landlock", "seccomp"},
    "change_a_file": {"landlock", "seccomp"},
    "truncate_a_file": {"seccomp", *["landlock"] * (LANDLOCK >= 3)},
    "remove_a_file": {"landlock", "seccomp"},
    "remove_a_file_that_is_there": {"landlock", "seccomp"},
    "make_a_folder": {"landlock", "seccomp"},
    "make_a_link": {"landlock", "seccomp"},
    "change_a_mode": {"seccomp"},
    "touch_a_file": {"seccomp"},
    "read_its_environment": {"landlock"},
    "read_its_memory": {"landlock"},
    "trace_it": {"landlock", "seccomp"},
    "read_it_by_a_system_call": {"landlock", "seccomp"},
    "take_its_descriptor": {"landlock", "seccomp"},
    "signal_it": {"seccomp", *["landlock"] * SCOPES},
    "signal_it_by_a_descriptor": {"seccomp", *["landlock"] * SCOPES},
    "let_a_socket_signal_it": {"seccomp"},
    "leave_its_group": {"seccomp"},
    "run_a_program": {"landlock", "seccomp"},
    "make_a_namespace": {"seccomp"},
    "clone_into_a_namespace": {"seccomp"},
    "show_its_memory_again": {"seccomp"},
    "become_another": {"seccomp", "limits"},
    "read_the_kernels_keys": {"seccomp"},
    "queue_calls_past_the_filter": {"seccomp"},
    "take_memory": {"limits"},
    "take_memory_in_a_file": {"limits"},
    "raise_a_limit": {"seccomp"},
    "open_many_files": {"limits"},
}
REFUSALS = {"EPERM", "EACCES", "EMFILE", "EFBIG", "ENOMEM", "MemoryError", "_ArrayMemoryError"}
NEEDS_ROOT = {"become_another"}


@dataclass
class World:
    """What a worker must not reach, and what came of trying, by the layers that held it."""

    target: dict[str, Any]
    outcomes: dict[str, dict[str, str]] = field(default_factory=dict)

    def outcome(self, name: str, layers: str) -> str:
        if layers not in self.outcomes:
            self.outcomes[layers] = run("attempts", self.target, layers)
        return self.outcomes[layers][name]


def run(stage: str, target: dict[str, Any], layers: str, first: str = "", **popen: Any) -> Any:
    """What a stage of escape.py reports in a real worker that is held by these layers."""
    off = "; ".join(code for layer, code in OFF.items() if layer not in layers)
    program = (
        f"import fedpeer.algorithms as a; a.__path__.append({str(STAGES)!r}); import fedpeer.worker.sandbox as s\n"
        f"{off}\nimport fedpeer.worker.main as m\n{first}\nm.main()"
    )
    ours, theirs = socket.socketpair()
    roles = [("alice", "guest"), ("bob", "host")]
    start = ask.Start(
        f"trial.escape:{stage}", msgspec.json.encode(target), "alice", roles, bytes(32), None, [], memory=MEMORY
    )
    with ours, theirs:
        command = (*COMMAND[:2], "-c", program)
        process = subprocess.Popen(command, stdin=theirs, env=ENVIRONMENT, start_new_session=True, cwd="/", **popen)
        theirs.close()
        connection = Connection(ours)
        try:
            connection.send(start)
            done = connection.receive(ask.Request)
        finally:
            process.kill()
            process.wait()
    assert isinstance(done, ask.Done), done
    return artifact.load(*done.outputs[0][1]).values  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("groups", "limits", "bytes_"),
    [
        ("0::/a/b", {"sys/fs/cgroup/a/memory.max": "4000", "sys/fs/cgroup/a/b/memory.max": "max"}, 3000),
        ("4:cpu,memory:/x\n3:cpu:/y", {"sys/fs/cgroup/memory/x/memory.limit_in_bytes": "8000"}, 6000),
        ("4:memory:/hidden\n0::/", {"sys/fs/cgroup/memory/memory.limit_in_bytes": "400"}, 300),
    ],
)  # fmt: skip
def test_the_memory_that_is_to_be_had_is_that_of_the_smallest_control_group(
    tmp_path: Path, groups: str, limits: dict[str, str], bytes_: int
) -> None:
    for name, text in {"proc/self/cgroup": groups, **limits}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert sandbox.usable_memory(tmp_path) == bytes_
    assert 0 < sandbox.usable_memory(tmp_path / "nowhere") <= sandbox.default_memory() * 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("home")
    (folder / "state").mkdir()
    (folder / "state" / "fedpeer.sqlite").write_bytes(b"rows")
    for name in ("identity.key", "victim", "removable"):
        (folder / name).write_bytes(b"secret")
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(type=socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log,
        subprocess.Popen(
            [sys.executable, "-I", "-c", "import time; time.sleep(600)"], stdin=subprocess.DEVNULL
        ) as daemon,
    ):
        udp.bind(("127.0.0.1", 0))
        unix.bind(str(folder / "admin.sock"))
        log.bind(str(folder / "log.sock"))
        abstract.bind(f"\0fedpeer-escape-{os.getpid()}")
        unix.listen()
        abstract.listen()
        try:
            yield World(
                {
                    "folder": str(folder),
                    "process": daemon.pid,
                    "tcp": tcp.getsockname()[1],
                    "udp": udp.getsockname()[1],
                    "abstract": f"fedpeer-escape-{os.getpid()}",
                    "count": MEMORY,
                }
            )
        finally:
            daemon.kill()


def needs(*layers: str) -> None:
    missing = dict(sandbox.probe().missing())
    for layer in layers:
        if layer in missing:
            pytest.skip(f"this kernel has no {layer}: {missing[layer]}")


@pytest.mark.parametrize("name", STOPPED_BY)
def test_an_attempt_fails_with_each_layer_that_is_to_stop_it_and_succeeds_without(name: str, world: World) -> None:
    if name in NEEDS_ROOT and os.geteuid() != 0:
        pytest.skip(f"only root could {name} without the layer")
    needs(*STOPPED_BY[name])
    without = world.outcome(name, "")
    if name == "queue_calls_past_the_filter" and without != "done":
        pytest.skip(f"this kernel has no io_uring for us: {without}")
    assert without == "done"
    outcomes = {layer: world.outcome(name, layer) for layer in sorted(STOPPED_BY[name])}
    outcomes["all"] = world.outcome(name, "landlock seccomp limits")
    assert {layer: said for layer, said in outcomes.items() if said not in REFUSALS} == {}


def test_every_attempt_is_in_the_table(world: World) -> None:
    world.outcome("read_key", "")
    assert world.outcomes[""].keys() == STOPPED_BY.keys()


# what is tried alone, for it would disturb the others


def test_a_fork_bomb_ends_at_the_limit_of_processes() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can take a user of its own, whose processes are counted")
    user = 54_321
    first = (
        f"import os; import fedpeer.stage as f; f.find('trial.escape:bomb'); s.MAX_PROCESSES = 5\n"
        f"os.setgroups([]); os.setresgid({user}, {user}, {user}); os.setresuid({user}, {user}, {user})"
    )
    wanted = {"count": 20}
    assert run("bomb", wanted, "", first) == {"made": 20}
    assert run("bomb", wanted, "limits", first)["made"] <= 5


def test_descriptors_that_were_left_open_by_mistake_are_closed() -> None:
    opened = os.open("/etc/passwd", os.O_RDONLY)
    try:
        given = {"pass_fds": (opened,)}
        assert opened in run("descriptors", {"count": 256}, "", **given)["open"]
        assert run("descriptors", {"count": 256}, "landlock seccomp limits", **given)["open"] == [0, 1, 2]
    finally:
        os.close(opened)


def test_others_of_the_same_user_cannot_read_a_private_process() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can take a user of its own")
    assert _read_each_other(private=False) == "done"
    assert _read_each_other(private=True) == "PermissionError"


def _read_each_other(*, private: bool) -> str:
    """One process of a user opens the memory of another."""
    user, dumpable = 54_322, 4
    ready, set_ready = os.pipe()
    if (victim := os.fork()) == 0:
        os.setresuid(user, user, user)
        sandbox._prctl(dumpable, 1)  # setuid took it
        if private:
            sandbox.keep_private()
        os.write(set_ready, b"1")
        signal.pause()
    os.read(ready, 1)
    told, tell = os.pipe()
    if (attacker := os.fork()) == 0:
        try:
            os.setresuid(user, user, user)
            os.open(f"/proc/{victim}/mem", os.O_RDONLY)
            os.write(tell, b"done")
        except BaseException as error:
            os.write(tell, type(error).__name__.encode())
        finally:
            os._exit(0)
    said = os.read(told, 100).decode()
    os.waitpid(attacker, 0)
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    for descriptor in (ready, set_ready, told, tell):
        os.close(descriptor)
    return said


def test_a_process_of_several_threads_is_not_confined(world: World) -> None:
    first = "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    with pytest.raises(AssertionError, match="a process of 2 threads cannot be confined"):
        run("attempts", world.target | {"only": ["read_key"]}, "landlock seccomp limits", first)


@pytest.mark.parametrize("layer", ["landlock", "seccomp"])
def test_a_worker_does_not_start_without_a_layer_unless_it_may(layer: str, world: World) -> None:
    needs("landlock", "seccomp")
    lost = {"landlock": "s._landlock_version = lambda: 0", "seccomp": "s._has_seccomp = lambda: False"}[layer]
    target = world.target | {"only": ["read_key", "connect_unix"]}
    with pytest.raises(
        AssertionError, match=rf"code='sandbox', message='workers are not confined here: {layer} is mis"
    ):
        run("attempts", target, "landlock seccomp limits", lost)
    outcomes = run("attempts", target, "landlock seccomp limits", f"{lost}; s.check = lambda layers: None")
    assert outcomes == {
        "read_key": "done" if layer == "landlock" else "EACCES",
        "connect_unix": "done" if layer == "seccomp" else "EPERM",
    }


# who answers at the worker socket


async def test_a_socket_of_another_user_gets_no_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a socket of another user")
    path = tmp_path / "worker.sock"
    monkeypatch.setenv("FEDPEER_WORKER_SOCKET", str(path))
    start = ask.Start("a.b:c", b"{}", "alice", [("alice", "member")], bytes(32), None, [])
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        if (impostor := os.fork()) == 0:
            os.setresuid(65_534, 65_534, 65_534)
            listening.listen()
            signal.pause()
        try:
            while sandbox.unit_socket() and (error := _refused(path)):
                assert error == errno.ECONNREFUSED
                await trio.sleep(0.01)
            with pytest.raises(SandboxError, match=r"belongs to user 65534 .* not to systemd") as told:
                await WorkerProcess.start(start)
            assert "systemctl status fedpeer-worker.socket" in told.value.hint
        finally:
            os.kill(impostor, signal.SIGKILL)
            os.waitpid(impostor, 0)


async def test_a_socket_of_systemd_or_our_own_gets_the_stage_and_one_that_is_closed_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "worker.sock"
    monkeypatch.setenv("FEDPEER_WORKER_SOCKET", str(path))
    start = ask.Start("a.b:c", b"{}", "alice", [("alice", "member")], bytes(32), None, [])
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        with pytest.raises(SandboxError, match="does not answer: Connection refused"):  # it does not make do with less
            await WorkerProcess.start(start)
        listening.listen()
        worker = await WorkerProcess.start(start)
        given, _ = listening.accept()
        with given:
            assert Connection(given).receive(ask.Start, files=True) == start
        with pytest.raises(WorkerCrashed, match="closed its connection"):
            await worker.next()
        await worker.aclose()


def _refused(path: Path) -> int:
    with socket.socket(socket.AF_UNIX) as calling:
        return calling.connect_ex(str(path))


def test_the_worker_socket_is_the_units_the_one_that_is_named_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDPEER_WORKER_SOCKET", raising=False)
    monkeypatch.setattr(sandbox, "UNIT_SOCKET", Path("/nowhere/worker.sock"))
    assert (sandbox.unit_socket(), sandbox.probe().unit) == (None, False)
    monkeypatch.setenv("FEDPEER_WORKER_SOCKET", "/named")
    assert (sandbox.unit_socket(), sandbox.probe().unit) == (Path("/named"), True)
    monkeypatch.setenv("FEDPEER_WORKER_SOCKET", "")
    assert sandbox.unit_socket() is None


# what is asked of the kernel, and told


def test_what_is_missing_is_told_with_its_remedy() -> None:
    sandbox.check(sandbox.Layers(1, True, True))
    for layers, remedy in [
        (sandbox.Layers(0, True, True), "landlock in its parameter lsm="),
        (sandbox.Layers(7, False, True), "CONFIG_SECCOMP_FILTER"),
    ]:
        with pytest.raises(SandboxError, match="is missing") as told:
            sandbox.check(layers)
        assert remedy in told.value.hint
        assert "best-effort" in told.value.hint
    assert sandbox.Layers(7, True, True).text == "landlock 7, seccomp, limits"
    assert sandbox.Layers(0, True, True, unit=True).text == "worker unit, seccomp, limits; landlock is missing"


def test_probing_changes_nothing() -> None:
    before = Path("/proc/self/status").read_text().partition("NoNewPrivs")[2].partition("Speculation")[0]
    limits = resource.getrlimit(resource.RLIMIT_AS)
    sandbox.probe()
    after = Path("/proc/self/status").read_text().partition("NoNewPrivs")[2].partition("Speculation")[0]
    assert (after, resource.getrlimit(resource.RLIMIT_AS)) == (before, limits)


def test_of_an_editable_installation_only_the_package_may_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "__init__.py").touch()
    (tmp_path / "alone.py").touch()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    folders = sandbox.readable(["bank.scoring", "alone", "absent.module"])
    assert tmp_path / "bank" in folders
    assert tmp_path / "alone.py" in folders
    assert not any(tmp_path.is_relative_to(folder) for folder in folders)
    assert not any(Path("/etc/passwd").is_relative_to(folder) for folder in folders)
    assert not any(Path("/home/a/.ssh").is_relative_to(folder) for folder in folders)
    assert "bank" not in sys.modules


# the filter, as the kernel reads it


def verdict(machine: syscalls.Machine, number: int, *arguments: int, architecture: int | None = None) -> int:
    """What the filter of a process 7 says of a system call."""
    program = syscalls.program(machine, 7)
    data = struct.pack(
        "<IIQ6Q", number, architecture or machine.architecture, 0, *arguments, *[0] * (6 - len(arguments))
    )
    at, word = 0, 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        match code:
            case 0x20:
                (word,) = struct.unpack_from("<I", data, value)
            case 0x15:
                at += if_true if word == value else if_false
            case 0x45:
                at += if_true if word & value else if_false
            case 0x06:
                return value


EPERM, ENOSYS, KILL, ALLOW = 0x50001, 0x50026, 0x80000000, 0x7FFF0000


@pytest.mark.parametrize("name", syscalls.MACHINES)
def test_the_filter_allows_what_is_listed_and_refuses_the_rest(name: str) -> None:
    machine = syscalls.MACHINES[name]
    listed = {numbers[machine.column] for numbers in syscalls.CALLS.values()} - {-1}
    for number in range(600):
        said = verdict(machine, number, 1 << 40, 1 << 40, 1 << 40, 1 << 40, 1 << 40)
        expected = {ALLOW, EPERM} if number in listed else {ENOSYS} if number == 435 else {EPERM}
        assert said in expected, number
    assert verdict(machine, 0x40000000 | 39) == EPERM  # x32
    assert verdict(machine, 0, architecture=0x40000003) == KILL  # 32 bits
    assert len(syscalls.program(machine, 7)) < 4096 * syscalls.INSTRUCTION_BYTES


@pytest.mark.parametrize("name", syscalls.MACHINES)
def test_the_filter_reads_arguments(name: str) -> None:
    machine = syscalls.MACHINES[name]
    number = {call: numbers[machine.column] for call, numbers in syscalls.CALLS.items()}
    for call, arguments, allowed in [
        ("openat", (0, 0, os.O_RDONLY | os.O_CLOEXEC), True),
        ("openat", (0, 0, os.O_RDWR), False),
        ("openat", (0, 0, os.O_WRONLY), False),
        ("openat", (0, 0, os.O_RDONLY | os.O_CREAT), False),
        ("openat", (0, 0, os.O_RDONLY | os.O_TRUNC), False),
        ("kill", (7, 9), True),
        ("kill", (8, 9), False),
        ("kill", (0, 9), False),
        ("kill", ((1 << 64) - 7, 9), False),
        ("tgkill", (7, 9, 9), True),
        ("clone", (0x3D0F00,), True),  # a thread
        ("clone", (0x1200011,), True),  # a child
        ("clone", (0x10000011,), False),
        ("clone", (0x8011,), False),  # a sibling, whose end would signal the daemon
        ("sendto", (0, 1, 1, 0, 0), True),
        ("sendto", (0, 1, 1, 0, 1), False),
        ("sendto", (0, 1, 1, 0, 1 << 32), False),
        ("prlimit64", (0, 7, 0, 1), True),
        ("prlimit64", (0, 7, 1 << 32, 1), False),
        ("prlimit64", (8, 7, 0, 1), False),
        ("socketpair", (1, 1 | 0o2000000), True),
        ("socketpair", (1, 2), False),
        ("socketpair", (2, 1), False),
        ("prctl", (1, 9), True),
        ("prctl", (4, 1), False),
        ("fcntl", (3, 1033), True),
        ("fcntl", (3, 8), False),
        ("ioctl", (3, 0x5401), True),
        ("ioctl", (3, 0x5412), False),  # TIOCSTI
    ]:
        assert verdict(machine, number[call], *arguments) == (ALLOW if allowed else EPERM), (call, arguments)
