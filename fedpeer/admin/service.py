"""The operator's door: HTTP/1.1 on a unix socket, every route from the table of commands, events as a stream.

Rules
* Nothing escapes a connection. Whatever a client sends, and wherever it hangs up, ends its own connection at most.
* Two layers say who may come in: the socket's folder (0700, or 0750 and a group), and the kernel's word on the caller
  (SO_PEERCRED, at the time of connect): root, the daemon's own user, and members of the group fedpeer-admin. Everybody
  else gets 403 and nothing is told.
* Every read has a cap and a deadline: `MAX_HEADER`, `MAX_BODY`, `READ_S`; so has every write, and the number of
  connections. A subscriber's queue is bounded: who reads too slowly is told so ("overrun") and dropped.
* A GET ends when its caller has gone, so no waiter and no subscriber outlives its client. What changes something is
  carried through, whether or not anybody still waits for the answer.
* A FedpeerError becomes {"error": {code, message, hint, peer}}. Any other exception is a fault of the program: the
  caller reads that the log has it, and the log has the trace.

How: h11 is the protocol, an ASGI application (Starlette: routes) the answers, and between them `_Connection`, which
reads a whole request before it asks the application, since no request is large.

Source: RFC 9110, 9112; ASGI 3.0; the WHATWG's server-sent events; unix(7).
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import h11
import msgspec
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedpeer import systemd
from fedpeer.admin.caller import GROUP, Caller, calling
from fedpeer.admin.commands import COMMANDS, EVENTS_PATH, JSON, METRICS_PATH, Command, Daemon
from fedpeer.config import check_socket
from fedpeer.errors import AdminError, ConfigError, FedpeerError, NotAuthorized, NotFound, StoreError, UsageError
from fedpeer.events import Event, Events
from fedpeer.metrics import Metrics

MAX_HEADER = 16 * 1024
MAX_BODY = 1 << 20
MAX_CONNECTIONS = 128
IDLE_S = 75.0
READ_S = 20.0
WRITE_S = 30.0
KEEPALIVE_S = 15.0
MAX_QUEUE = 1024
SO_PEERGROUPS = 59

GONE = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError)
"""A client that hung up or stopped to read or write."""

STATUS_OF_EXIT_CODE = {2: 400, 4: 403, 5: 404, 6: 403, 7: 504}
"""HTTP status by the exit code of an error's class; 422 for any other (asked well, but it failed)."""


async def serve(daemon: Daemon, log: Any, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """The whole door of one daemon: started when it answers, open until cancelled. ConfigError for a bad socket."""
    metrics = Metrics(
        daemon.events,
        traffic=daemon.connections.traffic,
        connected=lambda: sum(peer.connected for peer in daemon.connections.peers()),
    )
    server = AdminServer(COMMANDS.values(), daemon, daemon.events, log=log, metrics=metrics)
    with listening(daemon.config.socket) as listeners:
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                await nursery.start(server.serve, listener)
            task_status.started()


# the socket


@contextmanager
def listening(path: Path) -> Iterator[list[trio.SocketListener]]:
    """The admin sockets: those that systemd opened under the name "admin", else one at `path`, removed at the end."""
    if given := systemd.listen_fds().get("admin"):
        yield [trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in given]
        return
    sock = open_socket(path)
    made = path.stat()
    try:
        yield [trio.SocketListener(trio.socket.from_stdlib_socket(sock))]
    finally:
        sock.close()
        with contextlib.suppress(OSError):
            if path.stat().st_ino == made.st_ino:  # not the one of a daemon that came after
                path.unlink()


def open_socket(path: Path) -> socket.socket:
    """Listen at `path`, in a folder made 0700. Replaces a stale socket; ConfigError when one answers there."""
    check_socket(path)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_folder(path.parent)
        _remove_stale(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.bind(str(path))
            os.chown(path, -1, path.parent.stat().st_gid)  # who may enter the folder may knock
            path.chmod(0o660)
            sock.listen(64)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise ConfigError(f"the admin socket {path}: {error.strerror}") from None
    return sock


def _check_folder(folder: Path) -> None:
    status = folder.stat()
    if status.st_uid not in (os.geteuid(), 0) or stat.S_IMODE(status.st_mode) & 0o027:
        raise ConfigError(
            f"{folder} must be closed to others, for the admin socket lies in it"
            f" (owner uid {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o})",
            hint="give it a folder of its own, mode 700 (or 750, with a group that may control the daemon)",
        )


def _remove_stale(path: Path) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise ConfigError(f"{path} is in the way of the admin socket and is none", hint="move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        failure = probe.connect_ex(str(path))
    if failure != errno.ECONNREFUSED:
        raise ConfigError(f"a daemon answers on {path} already", hint="stop that one, or take another --home")
    path.unlink()


# who asks


def caller_of(sock: trio.socket.SocketType) -> Caller:
    """Who connected."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)
    except OSError:  # more than 256 groups: none of them counts
        raw = b""
    user = ""
    with contextlib.suppress(KeyError):
        user = pwd.getpwuid(uid).pw_name
    return Caller(uid, pid, user, frozenset({gid, *struct.unpack(f"{len(raw) // 4}I", raw)}))


def may_control(caller: Caller) -> bool:
    """Root, the daemon's own user, and members of the group fedpeer-admin."""
    if caller.uid in (0, os.geteuid()):
        return True
    try:
        return grp.getgrnam(GROUP).gr_gid in caller.groups
    except KeyError:
        return False


# the server


class AdminServer:
    """Serves a table of commands; each handler is given `target` (the daemon) and its typed arguments."""

    def __init__(
        self,
        commands: Iterable[Command],
        target: Any,
        events: Events,
        *,
        log: Any,
        metrics: Metrics | None = None,
        allow: Callable[[Caller], bool] = may_control,
    ) -> None:
        self.connections = 0
        self.subscribers = 0
        self._target = target
        self._events = events
        self._log = log
        self._allow = allow
        routes = [Route(command.path, self._endpoint(command), methods=[command.method]) for command in commands]
        routes.append(Route(EVENTS_PATH, self._subscribe, methods=["GET"]))
        if metrics is not None:
            routes.append(Route(METRICS_PATH, _exposition(metrics), methods=["GET"]))
        self._app = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})
        self._app.router.redirect_slashes = False

    async def serve(
        self, listener: trio.SocketListener, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Accept until cancelled; the listener is closed at the end."""
        async with listener, trio.open_nursery() as nursery:
            task_status.started()
            while True:
                try:
                    stream = await listener.accept()
                except OSError:  # out of descriptors, or the client has gone already
                    self._log.warning("an admin connection could not be accepted", exc_info=True)
                    await trio.sleep(0.1)
                    continue
                if self.connections >= MAX_CONNECTIONS:
                    await trio.aclose_forcefully(stream)
                    continue
                self.connections += 1
                nursery.start_soon(self._serve_one, stream)

    async def _serve_one(self, stream: trio.SocketStream) -> None:
        try:
            caller = caller_of(stream.socket)
            app = self._app if self._allow(caller) else _refuse
            if app is _refuse:
                self._log.warning("admin connection refused", uid=caller.uid, pid=caller.pid)
            await _Connection(app, stream, {"caller": caller}).serve()
        except* GONE:
            pass
        except* Exception:
            self._log.error("an admin connection failed", exc_info=True)
        finally:
            self.connections -= 1
            await trio.aclose_forcefully(stream)

    def _endpoint(self, command: Command) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            caller = request.state.caller
            try:
                arguments = command.check(await _given(command, request))
                if command.method != "GET":
                    self._log.info("admin command", command=command.name, uid=caller.uid, pid=caller.pid)
                with calling(caller):
                    answer = await command.handler(self._target, arguments)
                data = msgspec.json.encode(answer) if command.media == JSON else answer
                return Response(data, media_type=command.media)
            except FedpeerError as error:
                return error_response(error)
            except Exception:
                self._log.error("an admin command failed", command=command.name, exc_info=True)
                return error_response(
                    AdminError(f"{command.name} failed inside the daemon", hint="the daemon's log says where"), 500
                )

        return endpoint

    async def _subscribe(self, request: Request) -> Response:
        return _EventStream(self, request.query_params.get("topic"))

    @contextmanager
    def subscription(self, topic: str | None) -> Iterator[trio.MemoryReceiveChannel[bytes]]:
        """A bounded queue of encoded events; it is closed when it overflows."""
        send, receive = trio.open_memory_channel[bytes](MAX_QUEUE)

        def put(event: Event) -> None:
            if topic is None or event["topic"] == topic:
                try:
                    send.send_nowait(msgspec.json.encode(event))
                except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
                    send.close()
                except Exception:  # no JSON: whoever published it must not suffer for that
                    self._log.error("an event could not be told", exc_info=True)

        end = self._events.subscribe(put)
        self.subscribers += 1
        try:
            yield receive
        finally:
            end()
            self.subscribers -= 1
            send.close()
            receive.close()


class _EventStream(Response):
    """The subscription lives exactly as long as this response; a generator's `finally` would not run in time."""

    def __init__(self, server: AdminServer, topic: str | None) -> None:
        super().__init__(media_type="text/event-stream")
        self._server = server
        self._topic = topic

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        with self._server.subscription(self._topic) as queue:
            headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b": subscribed\n\n", "more_body": True})
            while True:
                chunk = b": keepalive\n\n"
                with trio.move_on_after(KEEPALIVE_S):
                    try:
                        chunk = b"data: " + await queue.receive() + b"\n\n"
                    except trio.EndOfChannel:
                        break
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"event: overrun\ndata: {}\n\n", "more_body": False})


async def _given(command: Command, request: Request) -> dict[str, Any]:
    """The arguments of path, query and body as plain values. Raises UsageError."""
    body = await request.body()
    given: dict[str, Any] = {}
    if body:
        try:
            given = msgspec.json.decode(body, type=dict[str, Any])
        except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
            raise UsageError(f"the body is not a JSON object: {error}") from None
    for name, value in [*request.query_params.multi_items(), *request.path_params.items()]:
        if name in given:
            raise UsageError(f"{command.name}: {name!r} is given twice")
        given[name] = value
    return given


def error_response(error: FedpeerError, status: int | None = None) -> Response:
    """The JSON answer of an error."""
    if status is None:
        status = STATUS_OF_EXIT_CODE.get(error.exit_code, 500 if isinstance(error, StoreError) else 422)
    told = {"code": error.code, "message": error.message, "hint": error.hint, "peer": error.peer}
    return Response(msgspec.json.encode({"error": told}), status, media_type=JSON)


async def _no_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    return error_response(NotFound(f"there is no {request.method} {request.scope['path']}"), status)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    await error_response(NotAuthorized())(scope, receive, send)


def _exposition(metrics: Metrics) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(_: Request) -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return endpoint


# one connection


class _TooLarge(Exception):
    pass


class _Connection:
    """HTTP/1.1 on one stream: read a whole request, let the application answer, again."""

    def __init__(self, app: ASGIApp, stream: trio.SocketStream, state: dict[str, Any]) -> None:
        self._app = app
        self._stream = stream
        self._state = state
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER)

    async def serve(self) -> None:
        """Until either side closes. Raises what is in GONE; everything the client did wrong was answered."""
        try:
            while self._http.states == {h11.CLIENT: h11.IDLE, h11.SERVER: h11.IDLE}:
                with trio.fail_after(IDLE_S):
                    request = await self._next()
                if not isinstance(request, h11.Request):
                    return
                if any(name == b"content-length" and int(value) > MAX_BODY for name, value in request.headers):
                    raise _TooLarge
                with trio.fail_after(READ_S):
                    body = await self._body()
                await self._answer(request, body)
                if self._http.states == {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}:
                    self._http.start_next_cycle()
        except h11.RemoteProtocolError as error:
            await self._reject(error.error_status_hint)
        except _TooLarge:
            await self._reject(413)

    async def _next(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            if self._http.they_are_waiting_for_100_continue:
                await self._write(h11.InformationalResponse(status_code=100, headers=[]))
            self._http.receive_data(await self._stream.receive_some(MAX_HEADER))
        return event

    async def _body(self) -> bytes:
        body = bytearray()
        while isinstance(event := await self._next(), h11.Data):
            body += event.data
            if len(body) > MAX_BODY:
                raise _TooLarge
        return bytes(body)

    async def _answer(self, request: h11.Request, body: bytes) -> None:
        path, _, query = request.target.partition(b"?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": request.http_version.decode(),
            "method": request.method.decode(),
            "scheme": "http",
            "path": unquote(path.decode("ascii", "replace")),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": list(request.headers),
            "client": None,
            "server": None,
            "state": dict(self._state),
        }
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return messages.pop() if messages else {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                await self._write(h11.Response(status_code=message["status"], headers=message.get("headers", [])))
                return
            events: list[h11.Event] = []
            if message.get("body"):
                events.append(h11.Data(data=message["body"]))
            if not message.get("more_body"):
                events.append(h11.EndOfMessage())
            await self._write(*events)

        async with trio.open_nursery() as nursery:
            if request.method in (b"GET", b"HEAD"):
                nursery.start_soon(self._cancel_when_gone, nursery.cancel_scope)
            await self._app(scope, receive, send)
            nursery.cancel_scope.cancel()

    async def _cancel_when_gone(self, scope: trio.CancelScope) -> None:
        """Read ahead while a GET is answered: end of file cancels it, the start of a next request is kept for later."""
        try:
            data = await self._stream.receive_some(MAX_HEADER)
        except trio.BrokenResourceError:
            data = b""
        self._http.receive_data(data)
        if not data:
            scope.cancel()

    async def _reject(self, status: int) -> None:
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [("content-length", "0"), ("connection", "close")]
            await self._write(h11.Response(status_code=status, headers=headers), h11.EndOfMessage())

    async def _write(self, *events: h11.Event) -> None:
        data = b"".join(self._http.send(event) or b"" for event in events)
        if data:
            with trio.fail_after(WRITE_S):
                await self._stream.send_all(data)
