"""Stages that try to get out of their worker; each attempt in a forked child, which tells what came of it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedpeer.peers import Peers
from fedpeer.stage import Params, Report, at_least, exactly, stage

libc = ctypes.CDLL(None, use_errno=True)


class Target(Params):
    """What the attempts aim at: a folder (`secret` and `state/` in it), the process and the ports of the daemon."""

    folder: str = ""
    process: int = 0
    tcp: int = 0
    udp: int = 0
    abstract: str = ""
    count: int = 0
    only: tuple[str, ...] = ()


ATTEMPTS: dict[str, Callable[[Target], Any]] = {}


def attempt(function: Callable[[Target], Any]) -> Callable[[Target], Any]:
    ATTEMPTS[function.__name__] = function
    return function


def call(name: str, *arguments: Any) -> int:
    """A function of libc; OSError if it fails."""
    result = int(getattr(libc, name)(*arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def outcome(function: Callable[[Target], Any], target: Target) -> str:
    """ "done", or the error. In a child, so that an attempt cannot disturb the next."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            function(target)
            said = "done"
        except OSError as error:
            said = errno.errorcode.get(error.errno or 0, str(error))
        except BaseException as error:
            said = type(error).__name__
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        said = answer.read()
    _, status = os.waitpid(child, 0)
    return said or f"ended by {status}"


def escaping(function: Any) -> Any:
    return stage(
        version=1,
        params=Target,
        roles={"guest": exactly(1), "host": at_least(1)},
        inputs={},
        outputs={"report": Report},
        messages={},
    )(function)


@escaping
async def attempts(peers: Peers, params: Target) -> dict[str, Any]:
    return {"report": Report({name: outcome(ATTEMPTS[name], params) for name in params.only or ATTEMPTS})}


@escaping
async def bomb(peers: Peers, params: Target) -> dict[str, Any]:
    """How many children there were at a time, of those that were wanted."""
    reader, writer = os.pipe()
    made = 0
    try:
        for _ in range(params.count):
            if os.fork() == 0:
                os.close(writer)
                os.read(reader, 1)
                os._exit(0)
            made += 1
    except OSError:
        pass
    os.close(writer)
    for _ in range(made):
        os.wait()
    return {"report": Report({"made": made})}


@escaping
async def descriptors(peers: Peers, params: Target) -> dict[str, Any]:
    found = []
    for number in range(params.count):
        try:
            os.fstat(number)
            found.append(number)
        except OSError:
            pass
    return {"report": Report({"open": found})}


# network


@attempt
def connect_tcp(target: Target) -> None:
    socket.create_connection(("127.0.0.1", target.tcp), timeout=5).close()


@attempt
def bind_tcp(target: Target) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()


@attempt
def send_udp(target: Target) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as sending:
        sending.sendto(b"rows", ("127.0.0.1", target.udp))


@attempt
def connect_unix(target: Target) -> None:
    with socket.socket(socket.AF_UNIX) as calling:
        calling.connect(f"{target.folder}/admin.sock")


@attempt
def connect_abstract(target: Target) -> None:
    with socket.socket(socket.AF_UNIX) as calling:
        calling.connect(f"\0{target.abstract}")


@attempt
def send_from_a_pair(target: Target) -> None:
    """sendmsg takes an address through a pointer, which a filter cannot read: such a pair must not be made at all."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other:
        one.sendmsg([b"rows"], [], 0, f"{target.folder}/log.sock")


@attempt
def listen_to_the_kernel(target: Target) -> None:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close()


# files


@attempt
def read_passwd(target: Target) -> None:
    assert Path("/etc/passwd").read_bytes()


@attempt
def read_key(target: Target) -> None:
    assert Path(target.folder, "identity.key").read_bytes()


@attempt
def read_state(target: Target) -> None:
    assert Path(target.folder, "state", "fedpeer.sqlite").read_bytes()


@attempt
def list_state(target: Target) -> None:
    assert list(Path(target.folder, "state").iterdir())


@attempt
def read_through_a_root(target: Target) -> None:
    """From a folder that may be read, upwards."""
    folder = os.open(Path(os.__file__).parent, os.O_RDONLY)
    os.open("../" * 20 + target.folder + "/identity.key", os.O_RDONLY, dir_fd=folder)


@attempt
def write_a_file(target: Target) -> None:
    Path(target.folder, "new").write_bytes(b"rows")


@attempt
def write_to_tmp(target: Target) -> None:
    path = Path(f"/tmp/fedpeer-escape-{os.getpid()}")
    path.write_bytes(b"rows")
    path.unlink()


@attempt
def change_a_file(target: Target) -> None:
    with Path(target.folder, "victim").open("ab") as file:
        file.write(b"rows")


@attempt
def truncate_a_file(target: Target) -> None:
    os.truncate(Path(target.folder, "victim"), 0)


@attempt
def remove_a_file(target: Target) -> None:
    Path(target.folder, f"remove-{os.getpid()}").touch()
    Path(target.folder, f"remove-{os.getpid()}").unlink()


@attempt
def remove_a_file_that_is_there(target: Target) -> None:
    Path(target.folder, "removable").unlink()
    Path(target.folder, "removable").touch()


@attempt
def make_a_folder(target: Target) -> None:
    Path(target.folder, "folder").mkdir()
    Path(target.folder, "folder").rmdir()


@attempt
def make_a_link(target: Target) -> None:
    link = Path(target.folder, "link")
    link.symlink_to("/etc/passwd")
    link.unlink()


@attempt
def change_a_mode(target: Target) -> None:
    Path(target.folder, "identity.key").chmod(0o644)
    Path(target.folder, "identity.key").chmod(0o600)


@attempt
def touch_a_file(target: Target) -> None:
    os.utime(Path(target.folder, "victim"))


# other processes


@attempt
def read_its_environment(target: Target) -> None:
    assert Path(f"/proc/{target.process}/environ").read_bytes()


@attempt
def read_its_memory(target: Target) -> None:
    os.close(os.open(f"/proc/{target.process}/mem", os.O_RDONLY))


@attempt
def trace_it(target: Target) -> None:
    seize, interrupt_none = 0x4206, 0
    call("ptrace", seize, target.process, ctypes.c_void_p(0), ctypes.c_void_p(interrupt_none))


@attempt
def read_it_by_a_system_call(target: Target) -> None:
    """What is not mapped gives EFAULT, which says that it was allowed."""
    here, there = ctypes.create_string_buffer(8), 0x1000
    local = struct.pack("@PN", ctypes.addressof(here), 8)
    remote = struct.pack("@PN", there, 8)
    try:
        call("process_vm_readv", target.process, local, 1, remote, 1, 0)
    except OSError as error:
        if error.errno != 14:
            raise


@attempt
def take_its_descriptor(target: Target) -> None:
    process = call("syscall", 434, target.process, 0)
    call("syscall", 438, process, 0, 0)


@attempt
def signal_it(target: Target) -> None:
    os.kill(target.process, signal.SIGWINCH)


@attempt
def signal_it_by_a_descriptor(target: Target) -> None:
    process = call("syscall", 434, target.process, 0)
    call("syscall", 424, process, signal.SIGWINCH, None, 0)


@attempt
def let_a_socket_signal_it(target: Target) -> None:
    one, other = socket.socketpair()
    with one, other:
        fcntl.fcntl(one, fcntl.F_SETOWN, target.process)
        fcntl.fcntl(one, fcntl.F_SETSIG, signal.SIGWINCH)


@attempt
def leave_its_group(target: Target) -> None:
    """Out of reach of the kill that ends a worker and all that it forked."""
    os.setsid()


# programs and rights


@attempt
def run_a_program(target: Target) -> None:
    if (child := os.fork()) == 0:
        try:
            os.execv("/bin/true", ["/bin/true"])
        finally:
            os._exit(1)
    if os.waitpid(child, 0)[1] != 0:
        raise PermissionError(errno.EPERM, "exec")


@attempt
def make_a_namespace(target: Target) -> None:
    new_user = 0x10000000
    call("unshare", new_user)


@attempt
def clone_into_a_namespace(target: Target) -> None:
    number, new_user = {"x86_64": 56, "aarch64": 220}[os.uname().machine], 0x10000000
    child = call("syscall", number, ctypes.c_long(new_user | signal.SIGCHLD), 0, 0, 0, 0)
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


@attempt
def show_its_memory_again(target: Target) -> None:
    call("prctl", 4, 1, 0, 0, 0)


@attempt
def become_another(target: Target) -> None:
    os.setuid(65534)


@attempt
def read_the_kernels_keys(target: Target) -> None:
    number, session = {"x86_64": 250, "aarch64": 219}[os.uname().machine], -3
    call("syscall", number, 0, session, 1, 0, 0)


@attempt
def queue_calls_past_the_filter(target: Target) -> None:
    """io_uring, whose calls no filter sees."""
    parameters = ctypes.create_string_buffer(120)
    call("syscall", 425, 1, parameters)


# memory


@attempt
def take_memory(target: Target) -> None:
    np.ones(target.count // 8 + 1_000_000)


@attempt
def take_memory_in_a_file(target: Target) -> None:
    file = os.memfd_create("large")
    os.ftruncate(file, target.count + 8_000_000)


@attempt
def raise_a_limit(target: Target) -> None:
    number = {"x86_64": 160, "aarch64": 164}[os.uname().machine]
    call("syscall", number, resource.RLIMIT_CORE, struct.pack("@qq", *resource.getrlimit(resource.RLIMIT_CORE)))


@attempt
def open_many_files(target: Target) -> None:
    kept = [socket.socketpair() for _ in range(300)]
    assert kept
    time.sleep(0)
