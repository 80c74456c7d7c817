"""A synchronous client of a daemon's admin socket; importable alone, with the standard library's HTTP under it.

    client = Client("/var/lib/fedpeer/admin/admin.sock")
    job = client.call("job.submit", text=Path("contract.toml").read_text())
    with client.events(f"job:{job['id']}") as events:
        for event in events: ...

Each call is a connection of its own, so a client may be used from several threads. Answers are plain JSON values (text
for CSV). Every failure is a FedpeerError: what the daemon said, or NotReachable, NotAuthorized, TimedOut.
"""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlencode

import msgspec

from fedpeer.admin.commands import COMMANDS, EVENTS_PATH, JSON, Command
from fedpeer.config import check_socket
from fedpeer.errors import AdminError, NotAuthorized, NotReachable, TimedOut, UsageError, by_code

CONNECT_S = 5.0
SILENCE_S = 60.0
"""The daemon sends a keepalive every 15 seconds on a stream of events; after this long it is taken for dead."""
MAX_LINE = 1 << 20
ENDS = ("done", "failed", "cancelled")
"""the states, and the events, that end a job"""


class Overrun(AdminError):
    """Events came faster than they were read, and some are missing. Ask for the state again."""


class Client:
    """`timeout_s` is how long to wait for any one answer, instead of what the table of commands says."""

    def __init__(
        self, path: str | Path, *, timeout_s: float | None = None, commands: Mapping[str, Command] = COMMANDS
    ) -> None:
        self.path = check_socket(Path(path))
        self.timeout_s = timeout_s
        self._commands = commands

    def call(self, command_name: str, /, **arguments: Any) -> Any:
        """Ask for a command of the table and return its answer. Raises FedpeerError."""
        command = self._commands[command_name]
        target, body = request(command, arguments)
        wait = command.timeout_s if self.timeout_s is None else self.timeout_s
        connection, response = self._ask(command.method, target, body, wait)
        try:
            data = response.read()
        except TimeoutError:
            raise TimedOut(f"no whole answer to {command.name} within {wait:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise NotReachable(f"the daemon ended while it answered {command.name} ({type(error).__name__})") from None
        finally:
            connection.close()
        if (response.getheader("content-type") or "").startswith(JSON):
            return msgspec.json.decode(data)
        return data.decode()

    def metrics(self) -> str:
        """The numbers for Prometheus, as text."""
        connection, response = self._ask("GET", "/metrics", None, CONNECT_S)
        try:
            return response.read().decode()
        finally:
            connection.close()

    def events(self, topic: str | None = None) -> EventStream:
        """What happens from now on: subscribed when this returns. `topic` such as "job:<id>"; None for everything."""
        target = EVENTS_PATH + ("?" + urlencode({"topic": topic}) if topic else "")
        return EventStream(*self._ask("GET", target, None, SILENCE_S))

    def watch(self, ref: str) -> Iterator[dict[str, Any]]:
        """The events of one job until it ends; the last has "terminal": True.

        The first is {"event": "state", "job": …}, the job as it is; it comes again when events were lost.
        """
        topic = f"job:{self.call('job.show', ref=ref)['id']}"
        while True:
            with self.events(topic) as events:
                job = self.call("job.show", ref=topic.removeprefix("job:"))  # nothing is missed: subscribed already
                ended = job["state"] in ENDS
                yield {"event": "state", "topic": topic, "job": job} | ({"terminal": True} if ended else {})
                try:
                    while not ended:
                        event = next(events)
                        ended = event["event"] in ENDS
                        yield event | ({"terminal": True} if ended else {})
                    return
                except Overrun:
                    continue

    def _ask(
        self, method: str, target: str, body: bytes | None, wait: float | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """The connection and the head of a good answer; a bad one is raised as the error it carries."""
        connection = _Connection(self.path, wait)
        try:
            headers = {"content-type": JSON} if body is not None else {}
            connection.request(method, target, body, headers)
            response = connection.getresponse()
            if response.status != 200:
                raise _error(response.read(MAX_LINE))
        except TimeoutError:
            connection.close()
            raise TimedOut(f"the daemon did not answer within {wait:g} s") from None
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            raise NotReachable(f"no daemon answers on {self.path}", hint=_START) from None
        except PermissionError:
            connection.close()
            raise NotAuthorized(f"this user may not use {self.path}", hint=_GROUP) from None
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise NotReachable(f"the daemon on {self.path} hung up ({type(error).__name__})") from None
        except BaseException:
            connection.close()
            raise
        return connection, response


class EventStream:
    """An iterator over events (dicts); close it, or use it as a context manager.

    It ends only by an error: NotReachable when the daemon ends, Overrun when this side read too slowly.
    """

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._response = response

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        overrun = False
        while True:
            try:
                line = self._response.readline(MAX_LINE)
            except TimeoutError:
                raise NotReachable(f"the daemon said nothing for {SILENCE_S:g} s") from None
            except (OSError, ValueError, http.client.HTTPException):
                line = b""
            if not line:
                raise NotReachable("the daemon ended", hint="its log says why")
            if line.startswith(b"event: overrun"):
                overrun = True
            elif line.startswith(b"data: "):
                if overrun:
                    raise Overrun
                event: dict[str, Any] = msgspec.json.decode(line[6:])
                return event

    def close(self) -> None:
        self._response.close()
        self._connection.close()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def request(command: Command, arguments: dict[str, Any]) -> tuple[str, bytes | None]:
    """The target (path and query) and the body of a command's request; arguments that are None are left out."""
    given = {key: value for key, value in arguments.items() if value is not None}
    command.check(given)
    path = command.path
    for name in command.in_path:
        value = str(given.pop(name))
        if "/" in value or value in (".", ".."):
            raise UsageError(f"{value!r} is not a {name} for {command.name}")
        path = path.replace(f"{{{name}}}", quote(value, safe=""))
    if command.method in ("GET", "DELETE"):
        return path + ("?" + urlencode(given) if given else ""), None
    return path, msgspec.json.encode(given)


def _error(data: bytes) -> Exception:
    """The error of an answer `{"error": {code, message, hint, peer}}`."""
    try:
        told = msgspec.json.decode(data)["error"]
        kind = by_code(str(told["code"]))
        return kind(str(told["message"]), hint=str(told.get("hint", "")), peer=str(told.get("peer", "")))
    except (msgspec.DecodeError, KeyError, TypeError):
        return AdminError("the daemon answered with something else than an answer")


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("fedpeer", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(CONNECT_S)  # a full queue of connections
        self.sock.connect(str(self._path))
        self.sock.settimeout(self.timeout)


_START = "start it with `fedpeer run`, or name its home with --home or FEDPEER_HOME"
_GROUP = "run it as the daemon's user or as a member of the group fedpeer-admin"
