"""What a worker gives up before it runs a stage: files, network, other processes, new programs, memory without end.

    layer      what it takes                                                          where it is from
    landlock   files but those that Python reads to import; TCP; signals and          Linux 5.13, TCP 6.7, signals 6.12
               abstract sockets to the outside
    seccomp    every system call that is not in worker/syscalls.py: no socket but a   Linux 4.14, x86_64 and aarch64
               pair of its own, no file opened for writing, no program, no other
               process's memory, no signal but to itself
    limits     memory, processes, descriptors, sizes of files; core files;            any Linux
               capabilities; the right of others of the same user to read this process

Rules
* Each layer holds by itself where it can: what leaves by the network is stopped by seccomp alone, and by landlock alone
  where the kernel has that much of it. The layers are asked of the kernel, never guessed from its version.
* `confine` fails closed: a layer that should hold and does not is a SandboxError. Where the owner's policy says
  "best-effort", a layer that the kernel does not have is left out; one that it has must hold in this case too.
* It is called in a process of one thread, before any stage's module is imported, and for good.
* What is not taken: a process may look whether a path exists (landlock has no word for stat(2)); the limit of memory
  is for each process, of which `peers.map` has one for each core; root has no limit of processes. The unit
  systemd/fedpeer-worker@.service takes these, too.

Source: landlock(7), seccomp(2), prctl(2), getrlimit(2), capset(2), cgroups(7).
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import importlib.util
import os
import resource
import signal
import struct
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpeer.errors import SandboxError
from fedpeer.worker import syscalls

MAX_FILES = 256
"""descriptors: those of one message are 64 (protocol.py), and a child of peers.map has one"""
MAX_PROCESSES = 512
"""processes and threads that the user of the daemon may have beyond those that it has at a worker's start"""
LEAST_MEMORY = 2 << 30
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")

UNIT_SOCKET = Path("/run/fedpeer-worker/worker.sock")
"""where systemd/fedpeer-worker.socket listens"""

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_CAPABILITY_VERSION_3 = 0x20080522
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on every machine
_CREATE_RULESET_VERSION, _RULE_PATH_BENEATH = 1, 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_SECCOMP_SET_MODE_FILTER, _SECCOMP_GET_ACTION_AVAIL = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Layers:
    """What holds a worker on this machine. `landlock` is the kernel's version of it, 0 for none; `unit`: systemd's."""

    landlock: int
    seccomp: bool
    limits: bool
    unit: bool = False

    def missing(self) -> list[tuple[str, str]]:
        """(layer, remedy) of each one that every worker should have."""
        found = []
        if not self.landlock:
            found.append(
                (
                    "landlock",
                    "start Linux 5.13 or newer with landlock in its parameter lsm= (cat /sys/kernel/security/lsm); "
                    "a container may refuse it: allow landlock_create_ruleset, _add_rule and _restrict_self there",
                )
            )
        if not self.seccomp:
            found.append(("seccomp", "take a Linux with CONFIG_SECCOMP_FILTER, on x86_64 or aarch64"))
        if not self.limits:
            found.append(("limits", "run the daemon on Linux"))
        return found

    @property
    def text(self) -> str:
        """One line for people."""
        held = [
            "worker unit" if self.unit else "",
            f"landlock {self.landlock}" if self.landlock else "",
            "seccomp" if self.seccomp else "",
            "limits" if self.limits else "",
        ]
        said = ", ".join(filter(None, held)) or "none"
        return said + "".join(f"; {layer} is missing" for layer, _ in self.missing())


def probe() -> Layers:
    """What this kernel gives to a worker that this process starts. Nothing is changed."""
    return Layers(_landlock_version(), _has_seccomp(), sys.platform == "linux", unit_socket() is not None)


def unit_socket() -> Path | None:
    """The socket behind which systemd makes workers: FEDPEER_WORKER_SOCKET ("" for none), else the unit's if it is."""
    named = os.environ.get("FEDPEER_WORKER_SOCKET")
    if named is not None:
        return Path(named) if named else None
    return UNIT_SOCKET if UNIT_SOCKET.is_socket() else None


def check(layers: Layers) -> None:
    """SandboxError with the remedy if a layer is missing."""
    if missing := layers.missing():
        raise SandboxError(
            f"workers are not confined here: {', '.join(layer for layer, _ in missing)} is missing",
            hint=f'{"; ".join(remedy for _, remedy in missing)}; or let the policy say sandbox = "best-effort"',
        )


def confine(*, memory: int = 0, modules: Sequence[str] = (), best_effort: bool = False) -> Layers:
    """Give up everything, in this process and its children, for good. The layers that hold.

    `memory`: bytes of address space beyond what is in use (0: `default_memory`). `modules`: names of modules outside
    fedpeer that will be imported; their packages may be read. SandboxError if a layer is missing or does not hold.
    """
    layers = probe()
    if not best_effort:
        check(layers)
    if (threads := len(list(Path("/proc/self/task").iterdir()))) != 1:
        raise SandboxError(f"a process of {threads} threads cannot be confined: only one of them would be")
    try:
        folders = readable(modules)
        limit(memory or default_memory())
        if layers.landlock:
            lock_files(layers.landlock, folders)
        if layers.seccomp:
            filter_calls()
    except OSError as error:
        raise SandboxError(f"this process could not be confined: {error}") from None
    return layers


def default_memory() -> int:
    """Bytes of address space: `usable_memory`, and at least LEAST_MEMORY, for not all that is reserved is used."""
    return max(LEAST_MEMORY, usable_memory())


def usable_memory(system: Path = Path("/")) -> int:
    """Bytes: three quarters of the machine's memory, or of what the control groups of this process let it have."""
    least = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit_file in _memory_limits(system):
        try:
            text = limit_file.read_text().strip()
        except OSError:  # a group of outside this container
            continue
        least = min(least, int(text)) if text.isdigit() else least
    return least // 4 * 3


def _memory_limits(system: Path) -> Iterator[Path]:
    """The files with the limits of this process's control groups, of version 1 and 2, and of those around them."""
    try:
        groups = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = system / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            root, name = system / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = Path(path.lstrip("/"))
        yield from (root / folder / name for folder in (group, *group.parents))


def keep_private() -> None:
    """No core file, and no reading of this process's memory, descriptors or environment by others of its user."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)


def keep_streams_only() -> None:
    """Close every descriptor but 0, 1 and 2: one that was left open in the daemon would be a way around all layers."""
    os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def die_with_parent(parent: int) -> None:
    """In a forked child: be killed when the thread that forked it ends, also if it has ended already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


# limits


def limit(memory: int) -> None:
    """No new rights, no capability, no core; and so much of memory, processes, descriptors and sizes of files.

    A file in memory (worker/protocol.py) is the only one that there is to write; its size counts as memory does.
    """
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    keep_private()
    _drop_capabilities()
    bounds = {
        resource.RLIMIT_AS: _in_use() + memory,
        resource.RLIMIT_FSIZE: memory,
        resource.RLIMIT_NPROC: _tasks_of(os.getuid()) + MAX_PROCESSES,
        resource.RLIMIT_NOFILE: MAX_FILES,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, bound in bounds.items():
        _, hard = resource.getrlimit(kind)
        least = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (least, least))


def _drop_capabilities() -> None:
    """Those of root, too, and what a program file could give."""
    number = 0
    status = Path("/proc/self/status").read_text()
    if not any(int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("CapPrm", "CapInh"))):
        return
    while _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(number), 0, 0, 0) == 0:
        number += 1  # fails at once without CAP_SETPCAP, else after the last one
    _libc.prctl(_PR_CAP_AMBIENT, ctypes.c_ulong(_PR_CAP_AMBIENT_CLEAR_ALL), 0, 0, 0)
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, bytes(24)), "capset")


def _in_use() -> int:
    """Bytes of address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _tasks_of(user: int) -> int:
    """Threads of all processes of a user, as far as they can be seen."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid == user:
                count += len(list((process / "task").iterdir()))
        except OSError:  # it ended
            continue
    return count


# landlock


def readable(modules: Sequence[str] = ()) -> list[Path]:
    """What Python needs to import what is installed: libraries, packages, fedpeer, and the packages of `modules`.

    Of any other folder of sys.path (an editable installation) nothing but those packages: it may be somebody's home.
    """
    found = [
        *map(Path, LIBRARIES),
        *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *(path for path in map(Path, sys.path) if path.name in ("site-packages", "dist-packages", "lib-dynload")),
    ]
    for name in ("fedpeer", "fedpeer.algorithms"):
        found += map(Path, importlib.import_module(name).__path__)
    for module in modules:
        found += _package_of(module)
    return sorted({path.resolve() for path in found if os.access(path, os.R_OK)})


def _package_of(module: str) -> Iterator[Path]:
    """The folder or the file of the outermost package of a module. Nothing is imported.

    The import system remembers what lies beside it, so that it is found later, too, when that may not be listed.
    """
    spec = importlib.util.find_spec(module.partition(".")[0])
    if spec is not None:
        places = spec.submodule_search_locations or ([spec.origin] if spec.has_location and spec.origin else [])
        yield from map(Path, places)


def lock_files(version: int, folders: Sequence[Path]) -> None:
    """Landlock, as far as the kernel's version of it goes: nothing but reading beneath `folders`. Raises OSError."""
    rights = (1 << 13) - 1  # of version 1
    rights |= 1 << 13 if version >= 2 else 0  # linking elsewhere
    rights |= 1 << 14 if version >= 3 else 0  # truncating
    rights |= 1 << 15 if version >= 5 else 0  # control of devices
    network = 3 if version >= 4 else 0  # binding and connecting of TCP
    scopes = 3 if version >= 6 else 0  # abstract sockets, signals
    attributes = struct.pack("<QQQ", rights, network, scopes)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = _syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for folder in folders:
            allowed = _READ_FILE | _READ_DIR if folder.is_dir() else _READ_FILE
            beneath = os.open(folder, os.O_PATH | os.O_CLOEXEC)
            try:
                _syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, struct.pack("<Qi", allowed, beneath), 0)
            finally:
                os.close(beneath)
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _syscall(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _landlock_version() -> int:
    try:
        return _syscall(_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    except OSError:
        return 0


# seccomp


def filter_calls() -> None:
    """Seccomp: from here on nothing but the calls of syscalls.py. OSError if it fails."""
    machine = syscalls.MACHINES[os.uname().machine]
    program = syscalls.program(machine, os.getpid())
    code = ctypes.create_string_buffer(program, len(program))
    count = len(program) // syscalls.INSTRUCTION_BYTES
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _syscall(machine.seccomp, _SECCOMP_SET_MODE_FILTER, 0, struct.pack("@HP", count, ctypes.addressof(code)))


def _has_seccomp() -> bool:
    machine = syscalls.MACHINES.get(os.uname().machine)
    if machine is None or sys.maxsize < 1 << 32:
        return False
    try:
        _syscall(machine.seccomp, _SECCOMP_GET_ACTION_AVAIL, 0, struct.pack("=I", syscalls.REFUSE))
    except OSError:
        return False
    return True


def _syscall(number: int, *arguments: bytes | int | None) -> int:
    """A system call that libc has no function for. OSError with the number of the error."""
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *words), f"system call {number}")


def _prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl({option})")


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno() or errno.EINVAL
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
