"""The system calls of a confined worker, as a filter program of the kernel (classic BPF).

Rules
* What is not listed is refused with EPERM; clone3, whose flags a filter cannot see, with ENOSYS, which makes libc take
  clone. Another machine's calls (32 bits, x32) end the process.
* A call that could reach beyond the process is listed with the arguments that do not: files are opened for reading,
  sockets are pairs of connected streams, signals go to the process itself, clone makes no namespace and no sibling.
* Arguments that are pointers cannot be read by a filter: a call that names its target through one is not listed at all
  (connect, bind), or only with null (sendto); sendmsg on a connected stream has no use for an address.

It is assembled here, for libseccomp is a system package that an installation without root may not have, and what is
needed of it is this page. Numbers: asm/unistd_64.h (x86_64), asm-generic/unistd.h (aarch64) of Linux.

Source: seccomp(2), linux/filter.h, linux/seccomp.h, linux/audit.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

INSTRUCTION_BYTES: Final = 8
ALLOW: Final = 0x7FFF0000
REFUSE: Final = 0x00050000  # | errno
KILL: Final = 0x80000000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; an argument has 8 bytes, low word first


@dataclass(frozen=True)
class Machine:
    """What differs between processors: which column of `CALLS`, and the name of its calls in audit.h."""

    column: int
    architecture: int
    seccomp: int


MACHINES: Final = {"x86_64": Machine(0, 0xC000003E, 317), "aarch64": Machine(1, 0xC00000B7, 277)}

# name: (x86_64, aarch64); -1 where the machine does not have it
CALLS: Final[dict[str, tuple[int, int]]] = {
    # files that are open, or may be read
    "read": (0, 63),
    "readv": (19, 65),
    "pread64": (17, 67),
    "preadv": (295, 69),
    "write": (1, 64),
    "writev": (20, 66),
    "pwrite64": (18, 68),
    "pwritev": (296, 70),
    "lseek": (8, 62),
    "close": (3, 57),
    "close_range": (436, 436),
    "dup": (32, 23),
    "dup2": (33, -1),
    "dup3": (292, 24),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "stat": (4, -1),
    "lstat": (6, -1),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "access": (21, -1),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, -1),
    "readlinkat": (267, 78),
    "open": (2, -1),
    "openat": (257, 56),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "fadvise64": (221, 223),
    "poll": (7, -1),
    "ppoll": (271, 73),
    "select": (23, -1),
    "pselect6": (270, 72),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, -1),
    "epoll_pwait": (281, 22),
    "eventfd2": (290, 19),
    "pipe2": (293, 59),
    "memfd_create": (319, 279),
    "ftruncate": (77, 46),
    "fallocate": (285, 47),
    # memory
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    "mincore": (27, 232),
    "membarrier": (324, 283),
    # threads and children
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "get_robust_list": (274, 100),
    "rseq": (334, 293),
    "set_tid_address": (218, 96),
    "arch_prctl": (158, -1),
    "prctl": (157, 167),
    "fork": (57, -1),
    "clone": (56, 220),
    "wait4": (61, 260),
    "waitid": (247, 95),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "kill": (62, 129),
    "tgkill": (234, 131),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigtimedwait": (128, 137),
    "rt_sigpending": (127, 136),
    "rt_sigsuspend": (130, 133),
    "pause": (34, -1),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "sched_getaffinity": (204, 123),
    "sched_yield": (24, 124),
    "getcpu": (309, 168),
    # itself and the clock
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getpgrp": (111, -1),
    "getpgid": (121, 155),
    "getsid": (124, 156),
    "getrandom": (318, 278),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "time": (201, -1),
    "times": (100, 153),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "uname": (63, 160),
    "getrlimit": (97, 163),
    "prlimit64": (302, 261),
    # sockets that are connected
    "socketpair": (53, 199),
    "sendto": (44, 206),
    "sendmsg": (46, 211),
    "recvfrom": (45, 207),
    "recvmsg": (47, 212),
    "shutdown": (48, 210),
    "getsockopt": (55, 209),
    "getsockname": (51, 204),
    "getpeername": (52, 205),
}
_CLONE3: Final = 435


@dataclass(frozen=True)
class _Among:
    """The argument's low word is one of these: for an int, which is all that the kernel reads."""

    argument: int
    values: tuple[int, ...]

    def code(self) -> list[bytes]:
        last = len(self.values) - 1
        refuse = _instruction(_RETURN, REFUSE | errno.EPERM)
        tests = [_instruction(_EQUAL, value, last - at + 1, 0) for at, value in enumerate(self.values)]
        return [_load(self.argument), *tests, refuse]


@dataclass(frozen=True)
class _Without:
    """None of these bits is in the argument's low word."""

    argument: int
    bits: int

    def code(self) -> list[bytes]:
        refuse = _instruction(_RETURN, REFUSE | errno.EPERM)
        return [_load(self.argument), _instruction(_ANY_BIT, self.bits, 0, 1), refuse]


@dataclass(frozen=True)
class _Null:
    """The argument is a null pointer: both of its words are zero."""

    argument: int

    def code(self) -> list[bytes]:
        return [
            *_Among(self.argument, (0,)).code(),
            _load(self.argument, high=True),
            _instruction(_EQUAL, 0, 1, 0),
            _instruction(_RETURN, REFUSE | errno.EPERM),
        ]


_Check = _Among | _Without | _Null
_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_STREAMS: Final = tuple(
    socket.SOCK_STREAM | flags
    for flags in (0, socket.SOCK_CLOEXEC, socket.SOCK_NONBLOCK, socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
)
_NAMESPACES_TRACING_AND_SIBLINGS: Final = 0x7E020000 | 0x80 | 0x2000 | 0x8000
"""CLONE_NEW*, CLONE_PTRACE, CLONE_PARENT"""
_ABOUT_A_DESCRIPTOR: Final = (0, 1, 2, 3, 4, 1030, 1033, 1034)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_ADD_SEALS, F_GET_SEALS: no owner and no signal"""
_ABOUT_A_STREAM: Final = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX"""
_ABOUT_ITSELF: Final = (1, 15, 16, 0x53564D41)
"""PR_SET_PDEATHSIG, PR_SET_NAME, PR_GET_NAME, PR_SET_VMA"""


def _checks(process: int) -> dict[str, Sequence[_Check]]:
    return {
        "open": [_Without(1, _WRITING)],
        "openat": [_Without(2, _WRITING)],
        "fcntl": [_Among(1, _ABOUT_A_DESCRIPTOR)],
        "ioctl": [_Among(1, _ABOUT_A_STREAM)],
        "prctl": [_Among(0, _ABOUT_ITSELF)],
        "clone": [_Without(0, _NAMESPACES_TRACING_AND_SIBLINGS)],
        "kill": [_Among(0, (process,))],
        "tgkill": [_Among(0, (process,))],
        "prlimit64": [_Among(0, (0,)), _Null(2)],
        "socketpair": [_Among(0, (socket.AF_UNIX,)), _Among(1, _STREAMS)],
        "sendto": [_Null(4)],
    }


def program(machine: Machine, process: int) -> bytes:
    """The filter for this machine's workers; `process` is the id that signals may go to."""
    checks = _checks(process)
    lines = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_EQUAL, machine.architecture, 1, 0),
        _instruction(_RETURN, KILL),
        _instruction(_LOAD, _NUMBER),
    ]
    for name, numbers in CALLS.items():
        if (number := numbers[machine.column]) >= 0:
            allow = [code for check in checks.get(name, ()) for code in check.code()]
            allow.append(_instruction(_RETURN, ALLOW))
            lines += [_instruction(_EQUAL, number, 0, len(allow)), *allow]
    lines += [_instruction(_EQUAL, _CLONE3, 0, 1), _instruction(_RETURN, REFUSE | errno.ENOSYS)]
    return b"".join([*lines, _instruction(_RETURN, REFUSE | errno.EPERM)])


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _load(argument: int, *, high: bool = False) -> bytes:
    return _instruction(_LOAD, _ARGUMENTS + 8 * argument + 4 * high)
