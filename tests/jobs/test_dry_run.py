"""Dry runs: the contract's stages on synthetic twins, in real workers, and nothing of the rows or for the others."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from fedpeer import artifact
from fedpeer.data import twin
from fedpeer.errors import ContractError, DataError, SandboxError
from fedpeer.jobs.dryrun import service as dryrun
from fedpeer.stage import Table
from fedpeer.testing.federation import Federation, federation
from fedpeer.worker.protocol import Start
from fedpeer.worker.service import WorkerProcess

pytestmark = pytest.mark.system  # processes, or whole federations, for a while

NAMES = ("alice", "bob", "carol", "dave")
CSV = "pid,age,dose,site,treated\n" + "".join(
    f"p{n}x,{4000 + n},{n % 7}.125,ward-{n % 3},{n % 2}\n" for n in range(437)
)
TRAINING = """
[[stage]]
id = "count"
run = "horizontal.statistics:run"
inputs = {table = "dataset:patients"}
[[stage]]
id = "fit"
run = "horizontal.logistic:fit"
inputs = {table = "dataset:numbers"}
[[stage]]
id = "check"
run = "horizontal.logistic:evaluate"
inputs = {table = "dataset:numbers", model = "fit.model"}
"""
ALIGNING = """
[[stage]]
id = "align"
run = "vertical.align:run"
roles = {guest = "bob", host = ["alice"]}
inputs = {table = "dataset:patients"}
[[stage]]
id = "take"
run = "local.select:run"
roles = {member = ["alice", "bob"]}
inputs = {table = "dataset:patients", rows = "align.rows"}
"""


@asynccontextmanager
async def offering(folder: Path) -> AsyncIterator[tuple[Federation, list[Start]]]:
    """Four organizations, of which alice has two datasets; and what her workers were started with."""
    started: list[Start] = []
    async with federation(folder, NAMES, rules=None) as peers:
        alice = peers["alice"].daemon
        (folder / "patients.csv").write_text(CSV)
        numbers = "\n".join(",".join(line.split(",")[:3] + line.split(",")[4:]) for line in CSV.splitlines())
        (folder / "numbers.csv").write_text(numbers)
        await alice.catalog.add("patients", str(folder / "patients.csv"), "pid", None)
        await alice.catalog.add("numbers", str(folder / "numbers.csv"), "pid", "treated")

        async def start(given: Start) -> WorkerProcess:
            started.append(given)
            return await WorkerProcess.start(given)

        alice._start_worker = start
        yield peers, started


async def test_a_contract_runs_on_twins_and_tells_what_would_leave(tmp_path: Path) -> None:
    async with offering(tmp_path) as (peers, started):
        kept = sorted(path.name for path in (tmp_path / "alice" / "state" / "files").iterdir())
        view = await peers["alice"].daemon.jobs.dry_run(peers.contract(TRAINING))
        for peer in peers.values():
            assert await peer.daemon.jobs.list() == []
        assert sorted(path.name for path in (tmp_path / "alice" / "state" / "files").iterdir()) == kept
    assert [stage.id for stage in view.stages] == ["count", "fit", "check"]
    assert [stage.outputs for stage in view.stages] == [{"report": "report"}, {"model": "model"}, {"report": "report"}]
    assert all(stage.participants == ["alice", "bob", "carol"] for stage in view.stages)  # three are enough
    assert [stage.rows for stage in view.stages] == [{"table": 440}] * 3
    said = {(stage.id, message.tag): message for stage in view.stages for message in stage.messages}
    assert {stage for stage, _ in said} == {"count", "fit", "check"}
    assert all(message.count >= 1 and message.bytes >= 3 and message.text for message in said.values())
    assert len(started) == 9


async def test_no_row_is_read_for_a_dry_run(tmp_path: Path) -> None:
    async with offering(tmp_path) as (peers, started):
        (tmp_path / "patients.csv").unlink()
        (tmp_path / "numbers.csv").unlink()
        await peers["alice"].daemon.jobs.dry_run(peers.contract(TRAINING))
    tables = [artifact.load(kind, content) for start in started for _, kind, content in start.inputs if kind == "table"]
    assert len(tables) == 9
    for table in tables:
        assert isinstance(table, Table)
        for name in table.data.column_names:
            values = table.data.column(name).to_pylist()
            assert not any(isinstance(value, float) and abs(value) > 100 for value in values)
            assert not any(isinstance(value, str) and value.startswith(("p", "ward")) for value in values)


async def test_a_host_dry_runs_an_alignment_with_a_guest_of_the_same_making(tmp_path: Path) -> None:
    async with offering(tmp_path) as (peers, _):
        text = peers.contract(ALIGNING)
        view = await peers["alice"].daemon.jobs.dry_run(text)
    align, take = view.stages
    assert align.participants == ["alice", "bob"]
    assert {message.kind for message in align.messages} == {"open", "sealed"}
    assert take.messages == []
    assert take.outputs == {"table": "table"}


async def test_what_a_stage_fails_with_is_told_with_its_place_and_nothing_is_left(tmp_path: Path) -> None:
    fails = '[[stage]]\nid = "fit"\nrun = "horizontal.kmeans:fit"\ninputs = {table = "dataset:patients"}\n'
    async with offering(tmp_path) as (peers, started):
        with pytest.raises(DataError, match=r"dry run of stage 'fit' at (alice|bob|carol): .*site"):
            await peers["alice"].daemon.jobs.dry_run(peers.contract(fails + "params = {k = 2}\n"))
        assert len(started) == 3
        children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
        assert "".join(path.read_text() for path in children) == ""
        with pytest.raises(ContractError, match="'other'"):
            await peers["alice"].daemon.jobs.dry_run(peers.contract(TRAINING.replace("patients", "other")))


async def test_a_dry_run_ends_when_it_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dryrun, "MAX_S", 0.01)
    async with offering(tmp_path) as (peers, _):
        with pytest.raises(dryrun.TimedOut, match="more than"):
            await peers["alice"].daemon.jobs.dry_run(peers.contract(TRAINING))


async def test_a_dry_run_is_confined_as_the_policy_says(tmp_path: Path) -> None:
    async with offering(tmp_path) as (peers, started):
        alice = peers["alice"].daemon

        async def start(given: Start) -> WorkerProcess:
            started.append(given)
            raise SandboxError("landlock is missing")

        alice._start_worker = start
        with pytest.raises(SandboxError, match="landlock is missing"):
            await alice.jobs.dry_run(peers.contract(TRAINING))
    assert not any(given.best_effort or given.own for given in started)


# twins

COLUMNS = [("id", "text"), ("x", "number"), ("site", "text"), ("dead", "boolean"), ("y", "number")]


def test_a_twin_has_the_schema_and_invented_values() -> None:
    made = twin.make(COLUMNS, 500, id_="id", label="y")
    assert [(field.name, str(field.type)) for field in made.data.schema] == [
        ("id", "string"), ("x", "double"), ("site", "string"), ("dead", "bool"), ("y", "double"),
    ]  # fmt: skip
    assert (made.id, made.label, made.n_samples) == ("id", "y", 500)
    assert set(made.labels()) == {0.0, 1.0}
    assert len(set(made.ids())) == 500
    assert set(made.data.column("site").to_pylist()) == set(twin.WORDS)
    assert abs(np.mean(made.column("x"))) < 0.2
    assert made.data.equals(twin.make(COLUMNS, 500, id_="id", label="y").data)
    assert twin.make(COLUMNS, 10**9, id_="id", label="y").n_samples == twin.MAX_ROWS


def test_twins_of_several_participants_have_most_ids_in_common_and_other_values() -> None:
    one, other = (twin.make(COLUMNS, 500, id_="id", label="y", participant=number) for number in (0, 2))
    assert 400 < len(set(one.ids()) & set(other.ids())) < 500
    assert not np.array_equal(one.column("x"), other.column("x"))
    numbers = twin.make([("id", "number")], 100, id_="id", label=None)
    assert str(numbers.data.schema.field("id").type) == "double"
