"""An organization's own stages: run where its policy names them, in the same sandbox, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from fedpeer import artifact
from fedpeer.admin.commands import COMMANDS, NewPolicy
from fedpeer.errors import ConfigError, ContractError
from fedpeer.testing.federation import federation
from fedpeer.worker import protocol as ask
from fedpeer.worker import sandbox
from fedpeer.worker.service import COMMAND, WorkerProcess

NAMES = ("alice", "bob", "carol")
SCORING = """
from pathlib import Path
from bank import helper
from fedpeer.stage import Params, Report, at_least, stage

def tried(path):
    try:
        return bool(Path(path).read_bytes())
    except OSError as error:
        return type(error).__name__

AT_IMPORT = {name: tried(name) for name in ("/etc/passwd", SECRET)}

@stage(version=1, params=Params, roles={"member": at_least(1)}, inputs={}, outputs={"report": Report}, messages={})
async def fit(peers, params):
    return {"report": Report({"helped": helper.ANSWER, "import": AT_IMPORT, "run": tried("/etc/passwd")})}
"""
CONTRACT = """
[[stage]]
id = "score"
run = "bank.scoring:fit"
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where an organization has its package, beside what nobody should read."""
    home = tmp_path / "home"
    (home / "bank").mkdir(parents=True)
    (home / "bank" / "__init__.py").touch()
    (home / "bank" / "helper.py").write_text("ANSWER = 42\n")
    (home / "secret").write_text("key")
    (home / "bank" / "scoring.py").write_text(SCORING.replace("SECRET", repr(str(home / "secret"))))
    return home


@pytest.fixture
def installed(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(home)
    yield home
    for name in [name for name in sys.modules if name.partition(".")[0] == "bank"]:
        del sys.modules[name]


async def said(home: Path, start: ask.Start, first: str = "pass") -> Any:
    program = f"import sys; sys.path.append({str(home)!r}); import fedpeer.worker.main as m; {first}; m.main()"
    worker = await WorkerProcess.start(start, command=(*COMMAND[:2], "-c", program))
    try:
        with trio.fail_after(60):
            return await worker.next()
    finally:
        await worker.aclose()


START = ask.Start("bank.scoring:fit", b"{}", "alice", [("alice", "member")], bytes(32), None, [], own=True)


async def test_an_own_stage_runs_and_is_imported_in_the_sandbox(home: Path) -> None:
    if sandbox.probe().missing():
        pytest.skip(f"no sandbox here: {sandbox.probe().text}")
    done = await said(home, START)
    assert isinstance(done, ask.Done), done
    shut = {"/etc/passwd": "PermissionError", str(home / "secret"): "PermissionError"}
    assert values(done) == {"helped": 42, "import": shut, "run": "PermissionError"}
    done = await said(home, START, "m.sandbox.lock_files = lambda *given: None")
    assert values(done) == {"helped": 42, "import": dict.fromkeys(shut, True), "run": True}


async def test_a_worker_that_was_not_told_so_does_not_look_for_stages_elsewhere(home: Path) -> None:
    failed = await said(home, replace_own(START, own=False))
    assert isinstance(failed, ask.Failed)
    assert (failed.code, failed.message) == ("contract", "there is no algorithm 'bank.scoring'")


def replace_own(start: ask.Start, *, own: bool) -> ask.Start:
    fields = {name: getattr(start, name) for name in start.__struct_fields__}
    return ask.Start(**(fields | {"own": own}))


def values(done: ask.Done) -> Any:
    return artifact.load(*done.outputs[0][1]).values  # type: ignore[union-attr]


async def set_policy(daemon: Any, modules: Sequence[str], sandbox: str = "required") -> None:
    text = f'approve = "auto"\nmodules = {list(modules)}\nsandbox = {sandbox!r}\n'.replace("'", '"')
    await COMMANDS["policy.set"].handler(daemon, NewPolicy(text=text))


@pytest.mark.usefixtures("installed")
async def test_a_contract_with_an_own_stage_runs_where_every_policy_names_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with federation(tmp_path, NAMES) as peers:
        alice, bob, carol = (peers[name].daemon for name in NAMES)
        text = peers.contract(CONTRACT)
        with pytest.raises(ContractError, match=r"stage 'score': there is no algorithm 'bank.scoring'"):
            await alice.jobs.submit(text)
        assert "bank.scoring" not in sys.modules
        for daemon in (alice, bob):
            await set_policy(daemon, ["bank.scoring:fit"])
        refused = await alice.jobs.wait((await alice.jobs.submit(text)).id)
        assert refused.state == "failed"
        assert [
            (p.name, "a stage it does not have" in p.reason) for p in refused.participants if p.state == "refused"
        ] == [("carol", True)]
        await set_policy(carol, ["bank.scoring"])
        done = await alice.jobs.wait((await alice.jobs.submit(peers.contract(CONTRACT, name="again"))).id)
        assert (done.state, done.error) == ("done", None)
        await set_policy(alice, [])
        with pytest.raises(ContractError, match="there is no algorithm"):
            await alice.jobs.submit(text)


@pytest.mark.usefixtures("installed")
async def test_the_policy_of_the_moment_is_what_a_worker_is_told(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with federation(tmp_path, NAMES) as peers:
        alice, told = peers["alice"].daemon, []

        async def start(given: ask.Start) -> None:
            told.append((given.own, given.best_effort))

        alice._start_worker = start
        for modules, sandbox_ in [([], "required"), (["bank.scoring"], "best-effort"), (["bank.other"], "required")]:
            await set_policy(alice, modules, sandbox_)
            await alice._start_confined(replace_own(START, own=False))
        assert told == [(False, False), (True, True), (False, False)]
        await peers["alice"].restart()
        assert peers["alice"].daemon._own == frozenset(["bank.other"])
        with pytest.raises(ConfigError, match="is a name of fedpeer's or of Python's"):
            await set_policy(peers["alice"].daemon, ["horizontal.logistic:fit"])


@pytest.mark.system  # daemons
async def test_a_job_is_refused_where_a_layer_is_missing_that_the_policy_requires(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = '[[stage]]\nid = "count"\nrun = "horizontal.statistics:run"\ninputs = {table = "dataset:rows"}\n'
    async with federation(tmp_path, NAMES) as peers:
        for name in NAMES:
            path = tmp_path / f"{name}.csv"
            path.write_text("x\n" + "\n".join(map(str, range(200))) + "\n")
            await peers[name].daemon.catalog.add("rows", str(path), None, None)
            await set_policy(peers[name].daemon, [])
        probed = sandbox.probe()
        monkeypatch.setattr(sandbox, "probe", lambda: replace(probed, landlock=0))
        with pytest.raises(Exception, match=r"sandbox lacks landlock \(start Linux 5.13") as refused:
            await peers["alice"].daemon.jobs.submit(peers.contract(stages))
        assert getattr(refused.value, "code", "") == "policy"
        for name in NAMES:
            await set_policy(peers[name].daemon, [], "best-effort")
        jobs = peers["alice"].daemon.jobs
        view = await jobs.wait((await jobs.submit(peers.contract(stages))).id)
        assert (view.state, view.error) == ("done", None)
