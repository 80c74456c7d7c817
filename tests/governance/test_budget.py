"""No partner is told more than the budget says, whoever proposes at once and wherever the daemon dies."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from fedpeer.errors import BudgetSpent
from fedpeer.governance import audit, budget
from fedpeer.governance.budget import Charge, Privacy
from fedpeer.governance.policy import Budget, Policy
from fedpeer.store import Store, Transaction

T = TypeVar("T")
POLICY = Policy()  # 3 in a year, 1 in a job
UNLIMITED = Policy(budget=Budget(epsilon=float("inf"), per_job=float("inf")))
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
NOW = EPOCH.isoformat()
MEMORY = "/dev/shm"  # a machine that only plays a crash needs no disk
SCHEMAS = [audit.SCHEMA, budget.SCHEMA]


def due(
    job: int,
    epsilon: float = 1.0,
    *,
    stage: str = "describe",
    dataset: str = "trial",
    partners: tuple[str, ...] = ("fp1bob",),
    delta: float = 1e-8,
    rows: int = 1000,
    source: str = "",
) -> list[Charge]:
    cost, run = Privacy.of(epsilon, delta), '{"run":"x:y"}'
    return [Charge(job.to_bytes(32), stage, dataset, rows, partner, cost, run, source) for partner in partners]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path, SCHEMAS)
    yield store
    store.close()


def charge(store: Store, wanted: list[Charge], time: str = NOW, policy: Policy = POLICY) -> list[Charge]:
    return store.write_now(lambda tx: budget.charge(tx, wanted, policy, time))


def spent(store: Store, partner: str = "fp1bob", since: int = 0) -> Privacy:
    return store.write_now(lambda tx: budget.spent(tx, "trial", {partner}, since))


def test_a_stage_that_starts_again_is_charged_once(store: Store) -> None:
    assert charge(store, due(1)) == due(1)
    assert charge(store, due(1)) == []
    assert spent(store) == Privacy(10**6, 10**7)


def test_the_fourth_job_of_a_year_is_refused_and_of_the_next_one_allowed(store: Store) -> None:
    for job in range(3):
        charge(store, due(job), (EPOCH + timedelta(days=job)).isoformat())
    with pytest.raises(BudgetSpent, match=r"ε = 4.* in a year; the most is ε = 3") as refused:
        charge(store, due(3), (EPOCH + timedelta(days=364)).isoformat())
    assert refused.value.hint == "fedpeer budget show trial"
    charge(store, due(3), (EPOCH + timedelta(days=365)).isoformat())


def test_the_rest_can_be_spent_to_the_last_millionth(store: Store) -> None:
    for job in range(30):
        charge(store, due(job, 0.1))
    assert spent(store).epsilon == 3 * 10**6
    with pytest.raises(BudgetSpent):
        charge(store, due(30, 0.01))


def test_a_partner_does_not_pay_for_another_nor_a_dataset_for_another(store: Store) -> None:
    for job in range(3):
        charge(store, due(job))
    charge(store, due(3, partners=("fp1carol",)))
    charge(store, due(4, dataset="survey"))
    with pytest.raises(BudgetSpent):
        charge(store, due(5, partners=("fp1carol", "fp1bob")))
    assert spent(store, "fp1carol") == Privacy(10**6, 10**7), "what was refused charged one of two"


def test_the_stages_of_a_job_share_what_a_job_may_cost(store: Store) -> None:
    charge(store, due(1, 0.6, stage="one"))
    with pytest.raises(BudgetSpent, match="in this job; the most is ε = 1"):
        charge(store, due(1, 0.5, stage="two"))
    with pytest.raises(BudgetSpent, match="in this job"):
        charge(store, due(2, 0.6, stage="one") + due(2, 0.6, stage="two"))
    charge(store, due(1, 0.4, stage="two"))


def test_the_delta_of_a_year_is_at_most_one_in_ten_rows(store: Store) -> None:
    charge(store, due(1, 0.1, delta=6e-5))
    with pytest.raises(BudgetSpent, match=r"δ = 1 / \(10 · 1000 rows\)"):
        charge(store, due(2, 0.1, delta=6e-5))
    charge(store, due(2, 0.1, delta=4e-5))


def test_peers_of_one_organization_have_one_budget(store: Store) -> None:
    group = Policy(organizations={"group": ("bob", "carol")})
    names = {"fp1bob": "bob", "fp1carol": "carol", "fp1dave": "dave"}

    def pay(wanted: list[Charge]) -> None:
        store.write_now(lambda tx: budget.charge(tx, wanted, group, NOW, names.__getitem__))

    pay(due(1, partners=("fp1bob", "fp1carol", "fp1dave")))  # one answer, whoever of the group reads it
    pay(due(2, partners=("fp1bob",)))
    pay(due(3, partners=("fp1carol",)))
    with pytest.raises(BudgetSpent, match="carol would then have ε = 4"):
        pay(due(4, partners=("fp1dave", "fp1carol")))
    pay(due(4, partners=("fp1dave",)))
    most = store.write_now(
        lambda tx: budget.most_spent(tx, "trial", "", names, group, int(EPOCH.timestamp()), names.get)
    )
    assert most == 3.0
    assert store.write_now(lambda tx: budget.most_spent(tx, "other", "", names, group, 0)) == 0.0


def test_who_left_the_roster_or_came_back_with_another_key_is_who_it_was(store: Store) -> None:
    group = Policy(organizations={"group": ("bob", "carol")})
    names = {"fp1bob": "bob", "fp1carol": "carol", "fp1erin": "erin"}

    def pay(wanted: list[Charge]) -> None:
        store.write_now(lambda tx: budget.charge(tx, wanted, group, NOW, lambda peer: names.get(peer, peer[:8])))

    for job in range(3):
        pay(due(job, partners=("fp1bob", "fp1erin")))
    del names["fp1bob"], names["fp1erin"]
    with pytest.raises(BudgetSpent, match="carol would then have ε = 4"):
        pay(due(4, partners=("fp1carol",)))
    names["fp1other"] = "erin"
    with pytest.raises(BudgetSpent, match="erin would then have ε = 4"):
        pay(due(4, partners=("fp1other",)))


def test_two_names_for_one_source_have_one_budget_and_so_has_a_name_with_another_source(store: Store) -> None:
    charge(store, due(1, dataset="trial", source="/a.csv"))
    charge(store, due(2, dataset="copy", source="/a.csv"))
    charge(store, due(3, dataset="third", source="/a.csv"))
    for name, source in (("fourth", "/a.csv"), ("copy", "/b.csv")):
        spends = due(4, dataset=name, source=source)
        if source == "/a.csv":
            with pytest.raises(BudgetSpent, match=r"would then have ε = 4"):
                charge(store, spends)
        else:
            charge(store, spends)  # one was told of it by this name
    with pytest.raises(BudgetSpent, match=r"in this job"):  # one stage reads the rows twice
        charge(store, due(5, 0.6, dataset="x", source="/c.csv") + due(5, 0.6, dataset="y", source="/c.csv"))
    charge(store, due(6, 0.5, dataset="x", source="/c.csv") + due(6, 0.5, dataset="y", source="/c.csv"))

    def told(tx: Transaction, name: str, source: str) -> float:
        return budget.most_spent(tx, name, source, ["fp1bob"], POLICY, int(EPOCH.timestamp()))

    assert store.write_now(lambda tx: told(tx, "new", "/c.csv")) == 1.0
    assert store.write_now(lambda tx: told(tx, "new", "/a.csv")) == 3.0
    assert store.write_now(lambda tx: told(tx, "copy", "/b.csv")) == 2.0
    shown = store.write_now(lambda tx: budget.accounts(tx, 0, "new", "/a.csv"))
    assert [(account.dataset, account.spent.epsilon / 10**6) for account in shown] == [
        ("copy", 4.0), ("third", 3.0), ("trial", 3.0)
    ]  # fmt: skip
    assert len(store.write_now(lambda tx: budget.all_charges(tx, "new", "/a.csv"))) == 3
    assert store.write_now(lambda tx: told(tx, "new", "")) == 0.0


def test_no_limit_is_infinity(store: Store) -> None:
    charge(store, due(1, 50.0), policy=UNLIMITED)


def test_privacy_is_counted_as_people_read_it_and_never_rounded_down() -> None:
    assert Privacy.of(0.1, 1e-8) == Privacy(100_000, 10_000_000)
    assert Privacy.of(1e-7, 1e-16) == Privacy(1, 1)
    assert sum((Privacy.of(0.1, 0) for _ in range(30)), Privacy(0, 0)) == Privacy.of(3.0, 0)


def test_a_clock_that_was_ahead_does_not_make_room(store: Store) -> None:
    for job in range(3):
        charge(store, due(job), (EPOCH + timedelta(days=900)).isoformat())
    with pytest.raises(BudgetSpent):
        charge(store, due(3))


def test_a_charge_and_its_entry_in_the_audit_are_one(store: Store) -> None:
    with pytest.raises(BudgetSpent):
        charge(store, [*due(1), *due(2, 2.0)])
    assert store.write_now(audit.size) == 0
    charge(store, due(1))
    (entry,) = store.write_now(audit.entries)
    assert (entry.event, entry.job, entry.time) == (budget.CHARGED, (1).to_bytes(32), NOW)
    assert entry.facts == {
        "dataset": "trial", "delta": 10**7, "epsilon": 10**6, "partner": "fp1bob", "stage": "describe",
    }  # fmt: skip


# T50: many jobs at once, and a daemon that dies anywhere


class Killed(BaseException):
    """kill -9"""


class Dying:
    """A transaction during which the daemon dies, before its `left`-th statement."""

    def __init__(self, tx: Transaction, left: int) -> None:
        self._tx, self._left = tx, left

    def __getattr__(self, name: str) -> Any:
        if name in ("execute", "one", "all"):
            self._left -= 1
            if self._left < 0:
                raise Killed
        return getattr(self._tx, name)


@types.coroutine
def pause() -> Generator[None, None, None]:
    yield


async def in_a_thread(function: Callable[[], T], /) -> T:
    """Other tasks go on before it runs, and after it ran before anybody is told."""
    await pause()
    result = function()
    await pause()
    return result


Begin = Callable[[Store, list[Charge], str, Callable[[Transaction], Any]], Awaitable[Any]]


async def begin(store: Store, wanted: list[Charge], time: str, through: Callable[[Transaction], Any]) -> None:
    """As jobs/stages/service.py begins a stage."""
    await store.write(lambda tx: budget.charge(through(tx), wanted, POLICY, time))


async def check_then_act(store: Store, wanted: list[Charge], time: str, through: Callable[[Transaction], Any]) -> None:
    """The bug that is looked for: what was affordable is written in a transaction of its own."""
    now = int(datetime.fromisoformat(time).timestamp())
    new = await store.read(lambda tx: budget.affordable(tx, wanted, POLICY, now))
    await store.write(lambda tx: budget.charge(through(tx), new, UNLIMITED, time))


async def charge_afterwards(
    store: Store, wanted: list[Charge], time: str, through: Callable[[Transaction], Any]
) -> None:
    """Another bug: the daemon dies between the answer and its charge."""
    told.update((c.contract, c.stage, c.dataset, c.partner) for c in wanted)
    await begin(store, wanted, time, through)


told: set[tuple[bytes, str, str, str]] = set()
"""what partners were told, by the key of its charge; of the machine that runs"""


class Owner(RuleBasedStateMachine):
    """One owner's store, the partners' proposals, and what they were told."""

    begin: Begin = staticmethod(begin)

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory(dir=MEMORY if Path(MEMORY).is_dir() else None)
        self.store = Store(Path(self.folder.name), SCHEMAS, in_a_thread)
        self.jobs: list[list[Charge]] = []
        self.tasks: dict[int, Coroutine[None, None, None]] = {}
        self.refused: set[int] = set()
        self.crashes = 0
        self.now = EPOCH
        self.fuse: int | None = None
        told.clear()

    def teardown(self) -> None:
        for task in self.tasks.values():
            task.close()
        self.store.close()
        self.folder.cleanup()

    def start(self, job: int) -> None:
        def through(tx: Transaction) -> Any:
            if self.fuse is None:
                return tx
            fuse, self.fuse = self.fuse, None
            return Dying(tx, fuse)

        self.tasks[job] = self.begin(self.store, self.jobs[job], self.now.isoformat(), through)  # type: ignore[assignment]

    @rule(
        epsilon=st.sampled_from([0.3, 0.5, 1.0, 1.1]),
        stages=st.integers(1, 2),
        datasets=st.sets(st.sampled_from(["a", "b"]), min_size=1),
        partners=st.sets(st.sampled_from(["bob", "carol"]), min_size=1),
        at_once=st.integers(1, 4),
    )
    def propose(self, epsilon: float, stages: int, datasets: set[str], partners: set[str], at_once: int) -> None:
        """Partners' daemons propose jobs at once, and all agreed: their stages begin."""
        for _ in range(at_once):
            charges = [
                replace(c, stage=str(stage), dataset=dataset)
                for stage in range(stages)
                for dataset in sorted(datasets)
                for c in due(len(self.jobs), epsilon / stages, partners=tuple(sorted(partners)))
            ]
            self.jobs.append(charges)
            self.start(len(self.jobs) - 1)

    def step(self, job: int) -> None:
        """A task runs until it waits for the store, or ends."""
        try:
            self.tasks[job].send(None)
        except StopIteration:
            told.update((c.contract, c.stage, c.dataset, c.partner) for c in self.jobs[job])
            del self.tasks[job]
        except BudgetSpent:
            self.refused.add(job)
            del self.tasks[job]
        except Killed:
            self.die()

    @precondition(lambda self: self.tasks)
    @rule(data=st.data(), steps=st.integers(1, 5))
    def one_goes_on(self, data: st.DataObject, steps: int) -> None:
        job = data.draw(st.sampled_from(sorted(self.tasks)), "job")
        for _ in range(steps):
            if job in self.tasks:
                self.step(job)

    @rule(steps=st.integers(1, 3))
    def all_go_on(self, steps: int) -> None:
        for _ in range(steps):
            for job in sorted(self.tasks):
                if job in self.tasks:
                    self.step(job)

    @rule(statements=st.integers(0, 12))
    def die_soon(self, statements: int) -> None:
        """The next transaction is not finished."""
        self.fuse = statements

    @rule()
    def die(self) -> None:
        """kill -9: tasks are gone, and what is on disk is there. Jobs that did not end go on."""
        self.crashes += 1
        self.fuse = None
        going_on = sorted(self.tasks)
        for task in self.tasks.values():
            task.close()
        self.tasks.clear()
        self.store.close()
        self.store = Store(Path(self.folder.name), SCHEMAS, in_a_thread)
        for job in going_on:
            self.start(job)

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """A job ends before its stage has begun, for another's reasons."""
        job = data.draw(st.sampled_from(sorted(self.tasks)), "job")
        self.tasks.pop(job).close()
        self.crashes += 1  # it may have been charged: as much as a crash may cost

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def start_again(self, data: st.DataObject) -> None:
        """The daemon was restarted in the middle of a stage."""
        job = data.draw(st.sampled_from(range(len(self.jobs))), "job")
        if job not in self.tasks and job not in self.refused:
            self.start(job)

    @rule(days=st.sampled_from([1, 100, 200, 365]))
    def time_passes(self, days: int) -> None:
        self.now += timedelta(days=days)

    @invariant()
    def nobody_was_told_more_than_was_charged(self) -> None:
        since = int((self.now - timedelta(days=365)).timestamp())
        charged = {(c.contract, c.stage, c.dataset, c.partner): c for c in self.store.write_now(budget.all_charges)}
        assert told <= charged.keys(), "something was told that was not charged"
        pending = {c.contract for job in self.tasks for c in self.jobs[job]}
        lost = {key[0] for key in charged.keys() - told} - pending
        assert len(lost) <= self.crashes, "charged and never told"
        folded: Counter[tuple[str, str]] = Counter()
        in_job: Counter[tuple[bytes, str, str]] = Counter()
        for entry in self.store.write_now(audit.entries):
            facts = entry.facts
            in_job[entry.job, facts["dataset"], facts["partner"]] += facts["epsilon"]
            if datetime.fromisoformat(entry.time).timestamp() > since:
                folded[facts["dataset"], facts["partner"]] += facts["epsilon"]
        for dataset in ("a", "b"):
            for partner in ("bob", "carol"):
                held = self.store.write_now(lambda tx, d=dataset, p=partner: budget.spent(tx, d, {p}, since))
                assert held.epsilon == folded[dataset, partner], "the book and the audit differ"
                assert held.epsilon <= 3 * 10**6, "more was spent than there is"
        assert max(in_job.values(), default=0) <= 10**6


class CheckThenAct(Owner):
    begin = staticmethod(check_then_act)


class ChargeAfterwards(Owner):
    begin = staticmethod(charge_afterwards)


TRIED = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
FOUND = settings(TRIED, max_examples=400, phases=[Phase.generate], derandomize=True)  # shrunk, it would be 5 steps


def test_concurrent_jobs_and_crashes_never_under_count() -> None:
    run_state_machine_as_test(Owner, settings=TRIED)


@pytest.mark.parametrize("bug", [CheckThenAct, ChargeAfterwards])
def test_a_planted_bug_is_found(bug: type[Owner]) -> None:
    with pytest.raises((AssertionError, ExceptionGroup)):
        run_state_machine_as_test(bug, settings=FOUND)
