"""What a contract asks of a peer, and what `fedpeer policy test` says of it at a whole daemon."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trio.testing

from fedpeer import codec
from fedpeer.daemon import Daemon
from fedpeer.errors import ContractError
from fedpeer.governance import policy
from fedpeer.governance.answered import check_cohort
from fedpeer.governance.decision import Ask
from fedpeer.governance.policy import DEFAULT
from fedpeer.jobs import archive, contract
from fedpeer.jobs.answer import gathering
from fedpeer.jobs.answer.asking import DatasetFacts, Facts, ask_of
from fedpeer.jobs.contract import Contract, contract_id
from fedpeer.stage import Model, Params, Report, Stage, Sum, Table, at_least, find, stage
from fedpeer.store import Store, call_directly
from fedpeer.testing.federation import Federation, federation

NOW = datetime(2026, 6, 1, tzinfo=UTC)
PEERS = {"alice": "fp1" + "a" * 20, "bob": "fp1" + "b" * 20, "carol": "fp1" + "c" * 20}


class Some(Params, frozen=True):
    columns: tuple[str, ...] = ()


@stage(
    version=1,
    params=Some,
    roles={"member": at_least(3)},
    inputs={"table": Table},
    outputs={"report": Report},
    messages={"total": Sum("a total")},
)
async def look(peers: Any, params: Some, table: Table) -> dict[str, Any]:
    return {}


@stage(
    version=1,
    roles={"member": at_least(3)},
    inputs={"model": Model, "table": Table},
    outputs={"report": Report},
    messages={"total": Sum("a total")},
)
async def score(peers: Any, params: Params, model: Model, table: Table) -> dict[str, Any]:
    return {}


def stages(name: str) -> Stage:
    return {"trial.look:look": look, "trial.score:score": score}.get(name) or find(name)


def written(text: str, *, me: str = "alice", name: str = "job", nonce: int = 0, order: str = "abc") -> Contract:
    participants = "\n".join(f'{n} = "{p}"' for n, p in sorted(PEERS.items(), key=lambda item: order.index(item[0][0])))
    whole = f'version = 1\nname = "{name}"\npurpose = "care"\n[participants]\n{participants}\n{text}'
    return contract.parse(
        whole,
        me=PEERS[me],
        resolve=lambda ref: ref,
        find=stages,
        now=int(NOW.timestamp()),
        nonce=nonce.to_bytes(16, "big"),
    )


def facts(**datasets: tuple[str, ...]) -> Facts:
    return Facts(
        NOW, 3, {name: DatasetFacts(name.encode(), 500, columns, "y") for name, columns in datasets.items()}, {}
    )


def asked(text: str, known: Facts, **more: Any) -> Ask:
    return ask_of(written(text, **more), PEERS["alice"], stages, known)


LOOK = '[[stage]]\nid = "look"\nrun = "trial.look:look"\ninputs = { table = "dataset:rows" }\n'


def test_what_is_asked_are_the_contracts_stages_on_this_peers_facts() -> None:
    ask = asked(LOOK, facts(rows=("x", "y")))
    (only,) = ask.stages
    (data,) = only.datasets
    assert (ask.me, ask.initiator, ask.purpose, ask.jobs_today) == (PEERS["alice"], PEERS["alice"], "care", 3)
    assert ask.partners == (PEERS["bob"], PEERS["carol"])
    assert (only.run, only.role, only.parties) == ("trial.look:look", "member", tuple(PEERS.values()))
    assert (data.name, data.version, data.rows, data.columns, data.label) == ("rows", b"rows", 500, ("x", "y"), "y")


def test_the_columns_are_those_that_the_parameters_name() -> None:
    (only,) = asked(LOOK + 'params = { columns = ["x"] }', facts(rows=("x", "y"))).stages
    assert only.datasets[0].columns == ("x",)


def test_a_dataset_counts_for_what_it_feeds_through_rows_and_tables_and_not_through_models() -> None:
    text = """
[[stage]]
id = "align"
run = "vertical.align:run"
roles = { guest = "alice", host = ["bob", "carol"] }
inputs = { table = "dataset:ids" }
[[stage]]
id = "select"
run = "local.select:run"
inputs = { rows = "align.rows", table = "dataset:rows" }
[[stage]]
id = "fit"
run = "horizontal.logistic:fit"
inputs = { table = "select.table" }
[[stage]]
id = "test"
run = "trial.score:score"
inputs = { model = "fit.model", table = "dataset:other" }
"""
    ask = asked(text, facts(ids=(), rows=("x",), other=("z",)))
    assert [[data.name for data in each.datasets] for each in ask.stages] == [
        ["ids"], ["ids", "rows"], ["ids", "rows"], ["other"]
    ]  # fmt: skip
    known = facts(ids=(), rows=("x",), other=("z",))
    near = {name: replace(data, nearest=1) for name, data in known.datasets.items()}
    ask = asked(text, replace(known, datasets=near))
    assert [[data.nearest for data in each.datasets] for each in ask.stages] == [[1], [None, 1], [None, None], [1]]


def test_names_and_the_order_of_participants_change_nothing_that_is_asked() -> None:
    known = facts(rows=("x", "y"))
    first, other = asked(LOOK, known), asked(LOOK, known, name="another", nonce=7, order="cab")
    assert replace(first, contract="") == replace(other, contract="")


def test_jobs_of_the_initiators_organization_count_that_came_before_this_one_and_in_a_day(tmp_path: Path) -> None:
    store = Store(tmp_path, [archive.SCHEMA])
    came = [
        ("alice", "2026-05-31T00:00:00.000+00:00"),  # a day ago
        ("alice", "2026-05-31T00:00:00.001+00:00"),
        ("bob", "2026-05-31T12:00:00.000+00:00"),
        ("alice", "2026-05-31T12:00:00.000+00:00"),
        ("carol", "2026-05-31T13:00:00.000+00:00"),
        ("alice", "2026-05-31T12:00:00.000+00:00"),
    ]
    jobs = [written(LOOK, me=who, nonce=i) for i, (who, _) in enumerate(came)]
    for job, (_, created) in zip(jobs, came, strict=True):
        body = codec.encode(job)
        store.write_now(lambda tx, body=body, at=created: archive.add(tx, contract_id(body), body, at, b""))

    def before(job: Contract, rules: policy.Policy = DEFAULT) -> int:
        names = {peer: name for name, peer in PEERS.items()}
        id_ = contract_id(codec.encode(job))
        return store.write_now(lambda tx: gathering.jobs_before(tx, rules, job, id_, names.__getitem__, NOW))

    assert [before(job) for job in jobs] == [0, 0, 0, 1, 0, 2]
    assert before(written(LOOK, nonce=99)) == 3  # that did not come yet
    assert before(written(LOOK, me="carol", nonce=99), policy.parse('organizations = { g = ["alice", "carol"] }')) == 4
    store.close()


# a whole daemon


STATISTICS = '[[stage]]\nid = "look"\nrun = "horizontal.statistics:run"\ninputs = { table = "dataset:rows" }\n'


async def add_rows(peers: Federation, rows: int, name: str = "rows") -> None:
    for peer in peers.values():
        path = peers.folder / f"{peer.name}-{name}.csv"
        path.write_text("id,x\n" + "".join(f"{peer.name}{i},{i}\n" for i in range(rows)))
        await peer.daemon.catalog.add(name, str(path), "id", None)


async def test_a_test_says_what_would_be_decided_and_why_and_changes_nothing(
    quick_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with federation(quick_path, ["alice", "bob", "carol"], rules=None) as peers:
        await add_rows(peers, 99)
        alice = peers["alice"].daemon
        before = await alice.store.read(lambda tx: list(tx._connection.iterdump()))
        for _ in range(30):
            view = await alice.jobs.test_policy(peers.contract(STATISTICS))
        assert view.verdict == "refused"
        (failed,) = [finding for finding in view.findings if not finding.holds]
        assert (failed.rule, failed.stage, failed.text) == ("min_rows", "look", "99 rows in 'rows', min_rows = 100")
        assert {"jobs_per_day", "min_parties", "min_cell", "stages", "approve"} < {f.rule for f in view.findings}
        assert await alice.store.read(lambda tx: list(tx._connection.iterdump())) == before
        assert not list(alice.store.files.iterdir())
        assert await alice.jobs.list() == []
        assert all(not peer.daemon.mesh.scopes for peer in peers.values())

        await peers["alice"].set_policy("min_rows = 50")
        assert (await alice.jobs.test_policy(peers.contract(STATISTICS))).verdict == "ask"
        await peers["alice"].set_policy('min_rows = 50\napprove = "auto"')
        assert (await alice.jobs.test_policy(peers.contract(STATISTICS))).verdict == "auto"
        with pytest.raises(ContractError, match="no dataset 'row'"):
            await alice.jobs.test_policy(peers.contract(STATISTICS.replace("rows", "row")))
        assert not list(alice.store.files.iterdir())


async def test_what_was_answered_before_is_seen_by_the_next_question(
    quick_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with federation(quick_path, ["alice", "bob", "carol"], rules='approve = "auto"') as peers:
        await add_rows(peers, 200)
        await add_rows(peers, 199, "fewer")
        alice = peers["alice"].daemon
        text = peers.contract(STATISTICS)
        assert (await alice.jobs.test_policy(text)).verdict == "auto"
        await answer(alice, text, peers.now())
        assert (await alice.jobs.test_policy(text)).verdict == "auto"
        view = await alice.jobs.test_policy(text.replace("dataset:rows", "dataset:fewer"))
        (failed,) = [finding for finding in view.findings if not finding.holds]
        assert view.verdict == "refused"
        assert failed.text == "1 rows of 'fewer' differ from an earlier answer, min_cell = 10"


async def answer(alice: Daemon, text: str, now: datetime) -> None:
    """What alice does when the one stage of a contract on her dataset "rows" begins."""
    me, store = alice.identity.id, alice.store
    read = contract.parse(text, me=me, resolve=str, find=find, now=int(now.timestamp()), nonce=bytes(16))
    snapshot = await alice.catalog.snapshot("rows")
    cohort = await gathering.read_cohort("rows", snapshot.version, store.path_of(snapshot.version), call_directly)
    rules = await store.read(policy.current)
    known = await gathering.gather(
        read,
        bytes(32),
        rules,
        {"rows": snapshot},
        store=store,
        run_in_thread=call_directly,
        name_of=alice.mesh.roster.name_of,
        now=now,
    )
    ask = ask_of(read, me, find, known)
    found = await store.write(lambda tx: check_cohort(tx, rules, ask, ask.stages[0], [cohort], "t"))
    assert all(finding.holds for finding in found)
