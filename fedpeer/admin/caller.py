"""Who asks: the process at the other end of the admin socket, in the kernel's words.

    async def policy_set(daemon, ask):
        by = caller.current()                     # None: nobody came through the door (a test, a simulation)

Rules
* It is set for each request by the door (service.py) and for nothing else: what a daemon does by itself has no caller.
* A handler reads it and hands it on as an argument; below the table of commands nobody looks for it.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

GROUP = "fedpeer-admin"
"""Whose members may use the admin socket, beside root and the daemon's own user."""


@dataclass(frozen=True)
class Caller:
    """The kernel's word on the process that connected (SO_PEERCRED), at the time of connect."""

    uid: int
    pid: int
    user: str = ""
    """the name of the uid, "" if the system has none for it"""
    groups: frozenset[int] = frozenset()


_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


def current() -> Caller | None:
    """Who asked for what runs now; None in the daemon's own work."""
    return _caller.get()


def others_may_control() -> bool:
    """Whether the group has a member beside the daemon's own user."""
    try:
        members = grp.getgrnam(GROUP).gr_mem
        return any(pwd.getpwnam(name).pw_uid != os.geteuid() for name in members)
    except KeyError:
        return False


@contextmanager
def calling(caller: Caller) -> Iterator[None]:
    """What runs inside was asked for by `caller`."""
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)
