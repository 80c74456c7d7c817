"""The table, the routes, the client and the command line say the same."""

from __future__ import annotations

import ast
import grp
import itertools
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import msgspec
import pytest
import structlog
import trio

from fedpeer import cli
from fedpeer.admin import service
from fedpeer.admin.caller import Caller, calling
from fedpeer.admin.client import Client, request
from fedpeer.admin.commands import COMMANDS, Command
from fedpeer.errors import ConfigError, UsageError
from fedpeer.events import Events
from fedpeer.governance import policy
from fedpeer.store import Record, Store

LOCAL = {"init", "run", "config.show", "events", "job.watch", "policy.edit", "audit.verify", "model.verify"}
"""verbs that are no row of the table"""


def verbs(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from verbs(command, f"{prefix}{name}.")
        else:
            yield prefix + name, command


def test_every_command_has_a_verb_with_its_help_and_every_verb_a_command() -> None:
    found = dict(verbs(cli.cli))
    asked = {name for name in COMMANDS if not name.startswith("health.")}
    assert asked == set(found) - LOCAL
    for name in asked:
        assert found[name].help == COMMANDS[name].help
    for name, verb in found.items():
        assert verb.help, f"{name} has no help"
        assert {"--home", "--json"} <= {option for param in verb.params for option in param.opts}


def test_the_command_line_calls_commands_with_arguments_they_have() -> None:
    trees = [ast.parse(path.read_text()) for path in Path(cli.__file__).parent.glob("*.py")]
    called = set()
    for node in itertools.chain.from_iterable(ast.walk(tree) for tree in trees):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "call":
            (named,) = node.args
            if isinstance(named, ast.Constant):
                command = COMMANDS[named.value]
                given = {keyword.arg for keyword in node.keywords}
                fields = msgspec.structs.fields(command.arguments)
                assert given <= {field.name for field in fields}, named.value
                assert {field.name for field in fields if field.required} <= given, named.value
                called.add(named.value)
    assert called == {name for name in COMMANDS if not name.startswith("health.")}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_row_is_complete(command: Command) -> None:
    assert command.help.strip().endswith(".")
    assert set(command.in_path) <= set(command.arguments.__struct_fields__)
    assert command.path.startswith("/v1/")
    assert command.method in ("GET", "POST", "DELETE")


def test_no_two_commands_have_one_route() -> None:
    routes = [(command.method, command.path.replace("{name}", "{ref}")) for command in COMMANDS.values()]
    assert len(set(routes)) == len(routes)


@pytest.mark.parametrize(
    ("name", "arguments", "target", "body"),
    [
        ("status", {}, "/v1/status", None),
        ("job.show", {"ref": "my job.."}, "/v1/jobs/my%20job..", None),
        ("model.predict", {"ref": "ab", "dataset": "ü&x"}, "/v1/models/ab/predict?dataset=%C3%BC%26x", None),
        ("peer.remove", {"ref": "ab"}, "/v1/peers/ab", None),
        ("peer.add", {"card": "x"}, "/v1/peers", b'{"card":"x"}'),
        ("dataset.add", {"name": "a", "uri": "/x", "id": None}, "/v1/datasets", b'{"name":"a","uri":"/x"}'),
        ("job.cancel", {"ref": "ab"}, "/v1/jobs/ab/cancel", b"{}"),
    ],
)  # fmt: skip
def test_a_request_is_a_path_a_query_and_a_body(
    name: str, arguments: dict[str, str], target: str, body: bytes | None
) -> None:
    assert request(COMMANDS[name], arguments) == (target, body)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("job.show", {"ref": "a/b"}, "is not a ref"),
        ("job.show", {"ref": ".."}, "is not a ref"),
        ("job.show", {"ref": ""}, "length >= 1"),
        ("job.show", {}, "missing required field `ref`"),
        ("job.show", {"reff": "x"}, "no argument 'reff'"),
        ("status", {"verbose": True}, "no argument 'verbose'"),
        ("peer.add", {"card": "x" * 9000}, "length <= 8192"),
    ],
)
def test_wrong_arguments_are_found_before_anything_is_sent(name: str, arguments: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        request(COMMANDS[name], arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("job.submit", {"text": "x"}), ("job.approve", {"ref": "x"}), ("job.deny", {"ref": "x"}),
     ("approvals.revoke", {"number": 1})],
)  # fmt: skip
async def test_who_says_yes_or_no_is_handed_on(name: str, arguments: dict[str, Any]) -> None:
    given: list[Any] = []

    class Jobs:
        async def submit(self, *told: Any, **more: Any) -> None:
            given.extend(told)

        approve = deny = revoke = submit

    jobs = Jobs()
    jobs.approvals = jobs  # type: ignore[attr-defined]
    ann = Caller(1000, 77, "ann")
    with calling(ann):
        await COMMANDS[name].handler(
            SimpleNamespace(jobs=jobs, record=lambda event: event), COMMANDS[name].check(arguments)
        )
    assert ann in given


def test_the_client_is_importable_alone() -> None:
    code = "import sys; from fedpeer.admin.client import Client; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"trio", "numpy", "pyarrow", "nacl", "cryptography", "starlette", "h11", "click", "rich"}


def test_the_command_line_starts_without_heavy_modules() -> None:
    code = "import sys; import fedpeer.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"trio", "numpy", "pyarrow", "nacl", "cryptography", "starlette", "rich"}


class Policies:
    """A daemon as far as its policy is concerned, behind a real socket whose callers are who they say."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = Store(folder / "state", [policy.SCHEMA])
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.used = 0
        self.uid = 1000
        self.connections = SimpleNamespace(roster=[SimpleNamespace(name="hospital-b", id="fp1b")])
        self.catalog = SimpleNamespace(list=self._datasets)
        self._path = folder / "admin" / "admin.sock"
        monkeypatch.setattr(service, "caller_of", lambda _: Caller(uid=self.uid, pid=1))

    def record(self, event: str) -> Record:
        return lambda _tx, facts: self.told.append((event, facts))

    def now(self) -> datetime:
        return datetime(2026, 6, 1, tzinfo=UTC)

    async def use_policy(self) -> None:
        self.used += 1

    async def _datasets(self) -> list[Any]:
        return [SimpleNamespace(name="patients")]

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        log = structlog.testing.CapturingLogger()
        server = service.AdminServer(COMMANDS.values(), self, Events(), log=log, allow=lambda _: True)
        with service.listening(self._path) as listeners:
            async with trio.open_nursery() as nursery:
                await nursery.start(server.serve, *listeners)
                yield
                nursery.cancel_scope.cancel()
        self.store.close()

    async def ask(self, uid: int, name: str, **given: Any) -> dict[str, Any]:
        self.uid = uid
        answer: dict[str, Any] = await trio.to_thread.run_sync(partial(Client(self._path).call, name, **given))
        return answer


async def test_a_policy_is_kept_with_who_set_it_and_only_in_place_of_the_one_it_was_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = Policies(tmp_path, monkeypatch)
    async with daemon.serving():
        assert (await daemon.ask(1000, "policy.show"))["number"] == 0
        kept = await daemon.ask(1001, "policy.set", text="min_rows = 50", after=0)
        assert kept == {
            "number": 1, "text": "min_rows = 50", "uid": 1001, "time": "2026-06-01T00:00:00.000+00:00", "waiting": [],
            "doubts": [],
        }  # fmt: skip
        with pytest.raises(ConfigError, match="changed meanwhile, by uid 1001"):
            await daemon.ask(1002, "policy.set", text="min_rows = 51", after=0)
        with pytest.raises(ConfigError, match="unknown key"):
            await daemon.ask(1002, "policy.set", text="min_row = 51")
        assert await daemon.ask(1000, "policy.show") == kept
    assert daemon.used == 1
    assert daemon.told == [("policy_set", {"policy": 1, "text": "min_rows = 50"})]


SLIPS = """
trusted = ["hospitl-b"]
[[rule]]
do = "refuse"
stages = ["horizontal.statistcs:*"]
datasets = ["patient"]
partners = ["fp1b", "hospital-*", "bank"]
"""


async def test_who_sets_a_policy_is_told_what_it_names_and_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = Policies(tmp_path, monkeypatch)
    async with daemon.serving():
        told = (await daemon.ask(1000, "policy.set", text=SLIPS))["doubts"]
        assert told == [
            "trusted: 'hospitl-b' matches nobody in the roster; did you mean 'hospital-b'?",
            "rule 1, stages: 'horizontal.statistcs' matches no stage; did you mean 'horizontal.statistics'?",
            "rule 1, partners: 'bank' matches nobody in the roster",
            "rule 1, datasets: 'patient' matches no dataset here; did you mean 'patients'?",
        ]
        assert (await daemon.ask(1000, "policy.show"))["doubts"] == told


@pytest.mark.parametrize(("members", "warned"), [(["root"], True), (["nobody"], False)])
async def test_who_wants_two_people_is_told_if_there_is_no_second_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: list[str], warned: bool
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(grp, "getgrnam", lambda _: SimpleNamespace(gr_mem=members, gr_gid=7))
    daemon = Policies(tmp_path, monkeypatch)
    async with daemon.serving():
        told = (await daemon.ask(1000, "policy.set", text="two_person = true"))["doubts"]
    assert [one for one in told if "add another to the group fedpeer-admin" in one] == told
    assert bool(told) == warned


@pytest.mark.parametrize("text", ["two_person = false", "two_person = true\napprove = 'auto'", ""])
async def test_where_two_must_approve_nobody_changes_the_policy_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    daemon = Policies(tmp_path, monkeypatch)
    async with daemon.serving():
        await daemon.ask(1000, "policy.set", text="two_person = true")
        for _ in range(2):  # the same person twice is one
            view = await daemon.ask(1000, "policy.set", text=text)
            assert (view["number"], view["text"]) == (1, "two_person = true")
            assert [(one["uid"], one["text"]) for one in view["waiting"]] == [(1000, text)]
        view = await daemon.ask(1001, "policy.set", text=text + "\n# another text")
        assert (view["number"], len(view["waiting"])) == (1, 2)
        view = await daemon.ask(1001, "policy.set", text=text)
        assert (view["number"], view["text"], view["uid"], view["waiting"]) == (2, text, 1001, [])
    waits = [facts["text"] for event, facts in daemon.told if event == "policy_waits"]
    assert waits == [text, text, text + "\n# another text"]
    assert [facts["policy"] for event, facts in daemon.told if event == "policy_set"] == [1, 2]


def test_a_kept_policy_that_cannot_be_read_is_replaced_by_as_many_people_as_it_says(tmp_path: Path) -> None:
    store = Store(tmp_path, [policy.SCHEMA])
    for text, waits in (("of_a_newer_release = 1", False), ("of_a_newer_release = 1\ntwo_person = true", True)):
        store.write_now(
            lambda tx, text=text: tx.execute("INSERT INTO policy (text, uid, time) VALUES (?, 0, '')", (text,))
        )
        assert (store.write_now(lambda tx: policy.keep(tx, "min_rows = 5", 1, "")) is None) == waits
    store.close()
