"""The door on a real unix socket: what callers get, and that nothing they do harms the others."""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
import trio

from fedpeer.admin import caller, service
from fedpeer.admin.caller import Caller
from fedpeer.admin.client import Client, Overrun
from fedpeer.admin.commands import CSV, Arguments, Command, Ref
from fedpeer.admin.service import AdminServer
from fedpeer.errors import (
    AdminError,
    ConfigError,
    DataError,
    FedpeerError,
    NotAuthorized,
    NotFound,
    NotReachable,
    PolicyError,
    StoreError,
    TimedOut,
    UsageError,
)
from fedpeer.events import Events
from fedpeer.metrics import Metrics

HOST = b"host: fedpeer\r\n"
LAST = HOST + b"connection: close\r\n"


class Text(Arguments, frozen=True):
    ref: str
    text: str
    count: int = 1


class Hall:
    """What the test commands work on."""

    def __init__(self) -> None:
        self.waiting = 0
        self.changes = 0
        self.begun = trio.Event()
        self.go_on = trio.Event()
        self.error: Exception = NotFound("there is no job 'x'", hint="did you mean 'y'?")


async def echo(_hall: Hall, ask: Text) -> dict[str, Any]:
    return {"ref": ask.ref, "text": ask.text * ask.count}


async def fail(hall: Hall, _ask: Arguments) -> None:
    raise hall.error


async def wait(hall: Hall, _ask: Arguments) -> None:
    hall.waiting += 1
    hall.begun.set()
    try:
        await trio.sleep_forever()
    finally:
        hall.waiting -= 1


async def change(hall: Hall, _ask: Arguments) -> None:
    hall.begun.set()
    await hall.go_on.wait()
    hall.changes += 1


async def who(_hall: Hall, _ask: Arguments) -> dict[str, Any]:
    by = caller.current()
    assert by is not None
    return {"uid": by.uid, "pid": by.pid, "user": by.user}


async def table(_hall: Hall, ask: Ref) -> bytes:
    return f"a,b\n1,{ask.ref}\n".encode()


COMMANDS = {
    command.name: command
    for command in (
        Command("echo.post", "POST", "/v1/echo/{ref}", Text, echo),
        Command("echo.get", "GET", "/v1/echo/{ref}", Text, echo),
        Command("fail", "GET", "/v1/fail", Arguments, fail),
        Command("wait", "GET", "/v1/wait", Arguments, wait),
        Command("change", "POST", "/v1/change", Arguments, change),
        Command("who", "GET", "/v1/who", Arguments, who),
        Command("table", "GET", "/v1/table/{ref}", Ref, table, media=CSV),
    )
}


class Door:
    """A server with the test commands on a real socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hall = Hall()
        self.events = Events()
        self.logged = structlog.testing.CapturingLogger()
        self.allow: Callable[[Caller], bool] = lambda _: True
        metrics = Metrics(self.events, traffic=lambda: (1, 2), connected=lambda: 0)
        self.server = AdminServer(
            COMMANDS.values(), self.hall, self.events, log=self.logged, metrics=metrics, allow=lambda c: self.allow(c)
        )

    async def call(self, name: str, timeout_s: float | None = None, **arguments: Any) -> Any:
        client = Client(self.path, timeout_s=timeout_s, commands=COMMANDS)
        return await trio.to_thread.run_sync(partial(client.call, name, **arguments))

    async def raw(self, data: bytes) -> bytes:
        """Send bytes, and read until the server closes."""
        answer = b""
        async with await self.connect() as stream:
            with trio.fail_after(30), contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(data)
                while chunk := await stream.receive_some():
                    answer += chunk
        return answer

    async def connect(self) -> trio.SocketStream:
        return await trio.open_unix_socket(str(self.path))

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(5):
            while not condition():
                await trio.sleep(0.005)

    async def works(self) -> None:
        assert await self.call("echo.post", ref="a", text="b") == {"ref": "a", "text": "b"}

    @property
    def errors(self) -> list[str]:
        return [call.args[0] for call in self.logged.calls if call.method_name == "error"]


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    opened = Door(tmp_path / "admin" / "admin.sock")
    with service.listening(opened.path) as listeners:
        async with trio.open_nursery() as nursery:
            await nursery.start(opened.server.serve, *listeners)
            yield opened
            nursery.cancel_scope.cancel()


# what callers get


async def test_arguments_travel_in_path_query_and_body(door: Door) -> None:
    odd = "ö&=?%#+ \"'"
    for name in ("echo.post", "echo.get"):
        assert await door.call(name, ref=odd, text=odd, count=2) == {"ref": odd, "text": odd * 2}


async def test_an_answer_of_another_media_type_is_text(door: Door) -> None:
    assert await door.call("table", ref="7") == "a,b\n1,7\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotFound("a", hint="b"), 404),
        (UsageError("a"), 400),
        (NotAuthorized("a"), 403),
        (PolicyError("a"), 403),
        (TimedOut("a"), 504),
        (DataError("a", peer="bank"), 422),
        (StoreError("a"), 500),
    ],
)
async def test_an_error_arrives_as_the_same_error(door: Door, error: FedpeerError, status: int) -> None:
    door.hall.error = error
    with pytest.raises(type(error)) as caught:
        await door.call("fail")
    assert (caught.value.message, caught.value.hint, caught.value.peer) == (error.message, error.hint, error.peer)
    assert (await door.raw(b"GET /v1/fail HTTP/1.1\r\n" + LAST + b"\r\n")).startswith(b"HTTP/1.1 %d " % status)
    assert not door.errors


async def test_a_fault_of_the_program_is_logged_and_not_told(door: Door) -> None:
    door.hall.error = RuntimeError("canary 4711")
    with pytest.raises(AdminError, match="failed inside the daemon") as caught:
        await door.call("fail")
    assert "4711" not in caught.value.message + caught.value.hint
    assert door.errors == ["an admin command failed"]
    await door.works()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"text": "x", "cout": 2}', "did you mean 'count'?"),
        (b"{}", "missing required field `text`"),
        (b'{"text": 5}', "Expected `str`, got `int`"),
        (b'{"text": "x", "ref": "y"}', "'ref' is given twice"),
        (b"[]", "not a JSON object"),
        (b"{", "not a JSON object"),
        (b"\xff", "not a JSON object"),
        (b'{"text":' + b"[" * 100_000, "not a JSON object"),
    ],
)
async def test_wrong_arguments_are_refused_by_name(door: Door, body: bytes, said: str) -> None:
    head = b"POST /v1/echo/a HTTP/1.1\r\n" + LAST + b"content-length: %d\r\n\r\n" % len(body)
    answer = await door.raw(head + body)
    assert answer.startswith(b"HTTP/1.1 400 ")
    error = msgspec.json.decode(answer.partition(b"\r\n\r\n")[2])["error"]
    assert said in error["message"] + error["hint"]
    assert not door.errors


async def test_an_unknown_path_is_not_found_in_json(door: Door) -> None:
    for target in (b"GET /nowhere", b"GET /v1/fail/", b"DELETE /v1/fail", b"GET /v1/echo/"):
        answer = await door.raw(target + b" HTTP/1.1\r\n" + LAST + b"\r\n")
        assert answer[9:12] in (b"404", b"405")
        assert msgspec.json.decode(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "not_found"


async def test_metrics_are_plain_text(door: Door) -> None:
    text = await trio.to_thread.run_sync(Client(door.path).metrics)
    assert 'fedpeer_bytes_total{direction="received"} 2.0' in text


async def test_one_connection_carries_many_requests_also_pipelined(door: Door) -> None:
    one = b"GET /v1/echo/a?text=x HTTP/1.1\r\n"
    asked = (one + HOST + b"\r\n") * 4 + one + LAST + b"\r\n"
    assert (await door.raw(asked)).count(b'{"ref":"a","text":"x"}') == 5


async def test_head_has_no_body(door: Door) -> None:
    answer = await door.raw(b"HEAD /v1/table/1 HTTP/1.1\r\n" + LAST + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n\r\n")


# who may come in


async def test_others_get_403_on_every_path_and_nothing_else(door: Door) -> None:
    door.allow = lambda _: False
    for target in (b"GET /v1/echo/a?text=x", b"GET /v1/events", b"GET /metrics", b"GET /nowhere"):
        answer = await door.raw(target + b" HTTP/1.1\r\n" + LAST + b"\r\n")
        assert answer.startswith(b"HTTP/1.1 403 ")
    with pytest.raises(NotAuthorized, match="fedpeer-admin"):
        await door.call("change")
    assert door.hall.changes == 0


async def test_the_kernel_says_who_calls(door: Door) -> None:
    callers = []
    door.allow = lambda by: callers.append(by) is None
    await door.works()
    (by,) = callers
    assert (by.uid, by.pid, by.user) == (os.getuid(), os.getpid(), pwd.getpwuid(os.getuid()).pw_name)
    assert os.getgid() in by.groups


async def test_a_command_knows_who_asked_for_it_and_nobody_is_left_behind(door: Door) -> None:
    assert await door.call("who") == {
        "uid": os.getuid(), "pid": os.getpid(), "user": pwd.getpwuid(os.getuid()).pw_name
    }  # fmt: skip
    assert caller.current() is None


def test_root_the_own_user_and_the_group_may_control(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(service, "GROUP", "no-such-group")
    assert service.may_control(Caller(0, 1, groups=frozenset()))
    assert service.may_control(Caller(1000, 1, groups=frozenset()))
    assert not service.may_control(Caller(1001, 1, groups=frozenset({0, 1000})))
    monkeypatch.setattr(service, "GROUP", "root")  # the one group that every machine has
    assert service.may_control(Caller(1001, 1, groups=frozenset({0})))
    assert not service.may_control(Caller(1001, 1, groups=frozenset({5})))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to ask as another user")
@pytest.mark.system
async def test_another_user_is_stopped_at_both_layers(door: Door) -> None:
    door.allow = service.may_control
    code = f"""
import os, sys
sys.path[:] = {sys.path!r}
from fedpeer.admin import client
from fedpeer.admin.commands import Arguments, Command
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    client.Client({str(door.path)!r}, commands={{"x": Command("x", "GET", "/v1/fail", Arguments, None)}}).call("x")
except Exception as error:
    print(error.code, error.message)
"""

    async def as_nobody() -> str:
        done = await trio.run_process([sys.executable, "-c", code], capture_stdout=True)
        return done.stdout.decode()

    assert "not_authorized this user may not use" in await as_nobody()
    for folder in (door.path.parent, *door.path.parent.parents[:4]):  # open the first layer
        folder.chmod(0o755)
    door.path.chmod(0o666)
    assert "not_authorized This user may not control the daemon" in await as_nobody()


# abuse


async def test_garbage_is_answered_with_400_and_closed(door: Door, seed: int) -> None:
    chance = random.Random(seed)
    fixed = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
    ]
    for data in [*fixed, *(chance.randbytes(chance.randrange(1, 4000)) + b"\r\n\r\n" for _ in range(30))]:
        answer = await door.raw(data)
        assert answer[9:10] == b"4"
    await door.works()
    assert not door.errors


async def test_a_huge_header_is_refused(door: Door) -> None:
    answer = await door.raw(b"GET / HTTP/1.1\r\n" + HOST + b"x: " + b"y" * 200_000 + b"\r\n\r\n")
    assert answer[9:12] in (b"431", b"400") or answer == b""
    await door.works()


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_above_the_cap_is_refused(door: Door, announced: bool) -> None:
    head = b"POST /v1/echo/a HTTP/1.1\r\n" + HOST
    if announced:
        answer = await door.raw(head + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % (service.MAX_BODY + 1))
    else:
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        answer = b""
        async with await door.connect() as stream:
            await stream.send_all(head + b"transfer-encoding: chunked\r\n\r\n")
            with contextlib.suppress(trio.BrokenResourceError):
                for _ in range(64):
                    await stream.send_all(chunk)
            answer = await stream.receive_some()
    assert answer.startswith(b"HTTP/1.1 413 ")
    await door.works()


async def test_a_body_of_exactly_the_cap_is_read(door: Door) -> None:
    body = b'{"text":"' + b"x" * (service.MAX_BODY - len(b'{"text":""}')) + b'"}'
    head = b"POST /v1/echo/a HTTP/1.1\r\n" + HOST + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n"
    async with await door.connect() as stream:
        await stream.send_all(head % len(body))
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 100 ")
        await stream.send_all(body)
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 200 ")


async def test_fifty_who_hang_up_at_any_byte_harm_nobody(door: Door, seed: int) -> None:
    whole = (
        b"POST /v1/echo/a HTTP/1.1\r\n" + HOST + b"content-length: 30000\r\n\r\n" + b'{"text":"' + b"x" * 29989 + b'"}'
    )
    chance = random.Random(seed)
    async with trio.open_nursery() as nursery:
        for _ in range(50):

            async def one(cut: int = chance.randrange(len(whole))) -> None:
                stream = await door.connect()
                await stream.send_all(whole[:cut])
                await trio.aclose_forcefully(stream)

            nursery.start_soon(one)
    await door.until(lambda: door.server.connections == 0)
    await door.works()
    assert not door.errors


async def test_who_sends_nothing_is_dropped_in_time(door: Door, autojump_clock: None) -> None:
    for begun in (b"", b"GET / HT", b"POST /v1/change HTTP/1.1\r\n" + HOST + b"content-length: 5\r\n\r\n{"):
        left, right = socket.socketpair()
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(left))
        other = trio.SocketStream(trio.socket.from_stdlib_socket(right))
        async with trio.open_nursery() as nursery:
            door.server.connections += 1
            nursery.start_soon(door.server._serve_one, stream)
            await other.send_all(begun)
            before = trio.current_time()
            assert await other.receive_some() == b""
            assert trio.current_time() - before <= service.IDLE_S
        await other.aclose()
    assert door.hall.changes == 0


async def test_a_fault_in_the_server_itself_ends_one_connection_only(door: Door) -> None:
    def fault(_: Caller) -> bool:
        raise RuntimeError("a bug")

    door.allow = fault
    with pytest.raises(NotReachable):
        await door.call("echo.get", ref="a", text="b")
    assert door.errors == ["an admin connection failed"]
    door.allow = lambda _: True
    await door.works()


async def test_the_number_of_connections_has_a_cap(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_CONNECTIONS", 3)
    held = [await door.connect() for _ in range(3)]
    await door.until(lambda: door.server.connections == 3)
    with pytest.raises(NotReachable):
        await door.call("echo.get", ref="a", text="b")
    for stream in held:
        await stream.aclose()
    await door.until(lambda: door.server.connections == 0)
    await door.works()


# what outlives its caller, and what does not


async def test_a_question_ends_when_its_caller_has_gone(door: Door) -> None:
    stream = await door.connect()
    await stream.send_all(b"GET /v1/wait HTTP/1.1\r\n" + HOST + b"\r\n")
    await door.hall.begun.wait()
    await trio.aclose_forcefully(stream)
    await door.until(lambda: door.hall.waiting == 0 and door.server.connections == 0)
    assert not door.errors


async def test_a_change_is_carried_through_when_its_caller_has_gone(door: Door) -> None:
    stream = await door.connect()
    await stream.send_all(b"POST /v1/change HTTP/1.1\r\n" + HOST + b"content-length: 0\r\n\r\n")
    await door.hall.begun.wait()
    await trio.aclose_forcefully(stream)
    await trio.testing.wait_all_tasks_blocked(0.01)
    door.hall.go_on.set()
    await door.until(lambda: door.hall.changes == 1 and door.server.connections == 0)
    assert not door.errors


async def test_a_client_that_waits_no_longer_says_so(door: Door) -> None:
    with pytest.raises(TimedOut):
        await door.call("wait", timeout_s=0.05)
    await door.until(lambda: door.hall.waiting == 0)


async def test_a_server_that_stops_is_told_as_not_reachable(tmp_path: Path) -> None:
    door = Door(tmp_path / "admin" / "admin.sock")
    with service.listening(door.path) as listeners:
        async with trio.open_nursery() as nursery:
            await nursery.start(door.server.serve, *listeners)

            async def caller() -> None:
                with pytest.raises(NotReachable):
                    await door.call("wait")

            async def watcher(task_status: trio.TaskStatus[None]) -> None:
                stream = await trio.to_thread.run_sync(Client(door.path).events)
                task_status.started()
                with pytest.raises(NotReachable, match="ended"):
                    await trio.to_thread.run_sync(next, stream)

            async with trio.open_nursery() as callers:
                await callers.start(watcher)
                callers.start_soon(caller)
                await door.hall.begun.wait()
                nursery.cancel_scope.cancel()
    assert not door.path.exists()
    assert door.server.subscribers == 0


# events


async def test_a_subscriber_gets_its_topic_in_order_from_the_moment_it_asked(door: Door) -> None:
    client = Client(door.path)
    door.events.publish("job:a", "early")
    stream = await trio.to_thread.run_sync(client.events, "job:a")
    for i in range(100):
        door.events.publish("job:a", "progress", done=i, note='line\nfeed "ö"')
        door.events.publish("job:b", "progress", done=-1)
    seen = [await trio.to_thread.run_sync(next, stream) for _ in range(100)]
    assert [event["done"] for event in seen] == list(range(100))
    assert seen[0] == {"topic": "job:a", "event": "progress", "done": 0, "note": 'line\nfeed "ö"'}
    stream.close()
    await door.until(lambda: door.server.subscribers == 0)


async def test_no_dead_subscriber_stays(door: Door) -> None:
    streams = []
    for _ in range(50):
        stream = await door.connect()
        await stream.send_all(b"GET /v1/events HTTP/1.1\r\n" + HOST + b"\r\n")
        streams.append(stream)
    await door.until(lambda: door.server.subscribers == 50)
    for stream in streams:
        await trio.aclose_forcefully(stream)
    await door.until(lambda: door.server.subscribers == 0 and door.server.connections == 0)
    door.events.publish("daemon", "still fine")
    await door.works()
    assert not door.errors


async def test_a_slow_subscriber_is_told_that_events_are_missing_and_stalls_nobody(door: Door) -> None:
    stream = await trio.to_thread.run_sync(Client(door.path).events)
    sent = 3 * service.MAX_QUEUE
    for i in range(sent):
        door.events.publish("daemon", "e", i=i, pad="x" * 2000)
    read: list[int] = []

    def read_all() -> None:
        for event in stream:
            read.append(event["i"])

    with pytest.raises(Overrun):
        await trio.to_thread.run_sync(read_all)
    assert read == list(range(len(read)))
    assert service.MAX_QUEUE <= len(read) < sent
    stream.close()
    await door.until(lambda: door.server.subscribers == 0)


async def test_an_event_that_is_no_json_harms_neither_publisher_nor_subscriber(door: Door) -> None:
    stream = await trio.to_thread.run_sync(Client(door.path).events)
    door.events.publish("daemon", "odd", value=object())
    door.events.publish("daemon", "even")
    assert (await trio.to_thread.run_sync(next, stream))["event"] == "even"
    assert door.errors == ["an event could not be told"]
    stream.close()


async def test_a_silent_stream_is_kept_alive(door: Door, autojump_clock: None) -> None:
    left, right = socket.socketpair()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(left))
    other = trio.SocketStream(trio.socket.from_stdlib_socket(right))
    async with trio.open_nursery() as nursery:
        door.server.connections += 1
        nursery.start_soon(door.server._serve_one, stream)
        await other.send_all(b"GET /v1/events HTTP/1.1\r\n" + HOST + b"\r\n")
        got = b""
        while got.count(b": keepalive") < 3:
            got += await other.receive_some()
        await other.aclose()
    assert door.server.subscribers == 0


# the socket


async def test_the_socket_lies_in_a_folder_of_its_own_that_is_closed_to_others(door: Door) -> None:
    assert stat.S_IMODE(door.path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(door.path.stat().st_mode) == 0o660


def test_a_stale_socket_is_replaced_and_a_live_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "admin" / "admin.sock"
    service.open_socket(path).close()  # closed, not removed: what a killed daemon leaves
    assert path.exists()
    with service.open_socket(path):
        with pytest.raises(ConfigError, match="a daemon answers"):
            service.open_socket(path)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))


def test_a_file_in_the_way_of_the_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "admin" / "admin.sock"
    path.parent.mkdir(mode=0o700)
    path.write_text("precious")
    with pytest.raises(ConfigError, match="in the way"):
        service.open_socket(path)
    assert path.read_text() == "precious"


@pytest.mark.parametrize("mode", [0o770, 0o755, 0o701])
def test_a_folder_that_others_may_enter_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "admin").mkdir()
    (tmp_path / "admin").chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}"):
        service.open_socket(tmp_path / "admin" / "admin.sock")


async def test_a_daemon_does_not_remove_the_socket_of_its_successor(tmp_path: Path) -> None:
    path = tmp_path / "admin" / "admin.sock"
    with service.listening(path):
        path.unlink()
        successor = service.open_socket(path)
    assert path.exists()
    successor.close()


async def test_a_socket_that_systemd_opened_wins_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "run" / "admin.sock"
    path.parent.mkdir()
    code = f"""
import os, trio
from pathlib import Path
from fedpeer.admin import service
os.environ["LISTEN_PID"] = str(os.getpid())
async def main():
    with service.listening(Path({str(tmp_path / "unused" / "admin.sock")!r})) as listeners:
        assert [l.socket.getsockname() for l in listeners] == [{str(path)!r}]
trio.run(main)
"""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "admin"},
            preexec_fn=lambda: os.dup2(sock.fileno(), 3) and None,
            pass_fds=(3,),
            check=True,
        )
    assert path.exists()
    assert not (tmp_path / "unused").exists()
