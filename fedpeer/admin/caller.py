"""Who asks: the process at the other end of the admin socket, in the kernel's words.

    async def policy_set(daemon, ask):
        by = caller.current()                     # None: nobody came through the door (a test, a simulation)

Rules
* It is set for each request by the door (service.py) and for nothing else: what a daemon does by itself has no caller.
* A handler reads it and hands it on as an argument; below the table of commands nobody looks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


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


@contextmanager
def calling(caller: Caller) -> Iterator[None]:
    """What runs inside was asked for by `caller`."""
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)
