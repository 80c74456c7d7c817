"""What a daemon says to systemd and gets from it: readiness, watchdog, sockets, credentials. Without systemd: nothing.

The protocol is one datagram and a few environment variables (sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3),
systemd.exec(5) "CREDENTIALS"); no library is needed for it.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

FIRST_FD = 3


def notify(*fields: str) -> bool:
    """Tell the service manager, e.g. notify("READY=1", "STATUS=2 of 3 peers connected"). False where nobody listens.

    Fields: READY=1, STATUS=text, WATCHDOG=1, STOPPING=1. It never raises: a daemon must not die of a lost remark.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
            sock.connect("\0" + path[1:] if path.startswith("@") else path)
            sock.send("\n".join(field.replace("\n", " ") for field in fields).encode())
    except OSError:
        return False
    return True


def watchdog_interval() -> float | None:
    """Seconds between two notify("WATCHDOG=1"), half of what systemd waits; None when it does not watch us."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 2e6 if microseconds.isdecimal() and int(microseconds) > 0 else None


def listen_fds() -> dict[str, list[socket.socket]]:
    """The listening sockets that systemd opened, by FileDescriptorName=. Empty the second time: they are yours."""
    pid, count, names = (os.environ.pop(f"LISTEN_{key}", "") for key in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()) or not count.isdecimal():
        return {}
    given: dict[str, list[socket.socket]] = {}
    listed = names.split(":") if names else []
    for index in range(int(count)):
        descriptor = FIRST_FD + index
        os.set_inheritable(descriptor, False)
        name = listed[index] if index < len(listed) else "unknown"
        given.setdefault(name, []).append(socket.socket(fileno=descriptor))
    return given


def credential(name: str) -> Path | None:
    """The file of a credential that systemd decrypted for this service (LoadCredential*=), if there is one."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        return None
    path = Path(folder) / name
    return path if path.is_file() else None
