"""This peer's answer to a contract: whether it takes part, and with what.

    what cannot run here whatever our data (unknown stage, another release)        → refused at once, "contract"
    we have no such dataset, column or partner, or cannot read our data            → refused at the deadline, "policy"
    the policy refuses, an operator denies, or nobody says anything                → refused at the deadline, "policy"
    the policy allows it, its operators approve, or a standing approval covers it  → countersigned at once

Rules
* Responsible for what a contract asks of this peer, from this peer's own facts; nobody else's word counts in it.
* What it brings is pinned before it says so; the policy's word, what is asked of the operators and what would be said
  are one commit with it. It answers once: a daemon that was killed while it asked goes on asking.
* Who was refused cannot tell by whom or why: what our data says, the policy's, an operator's and the silent no are the
  same bytes at the same time, `answer_s` after the contract came. So names cannot be tried. Why, with all figures,
  stays in our own log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from functools import partial
from typing import Any

import msgspec
import trio

from fedpeer import codec
from fedpeer.crypto import has_aes
from fedpeer.data.catalog import Catalog, Snapshot
from fedpeer.data.source import identity
from fedpeer.errors import ContractError, DiskFull, FedpeerError, NotFound, PolicyError, StoreError
from fedpeer.governance import approvals, budget, policy
from fedpeer.governance.approvals import APPROVED, ASKING, REFUSED, Asked, Data
from fedpeer.governance.decision import Decision, decide
from fedpeer.governance.policy import Policy
from fedpeer.jobs import archive, contract, lifecycle
from fedpeer.jobs.answer import asking, gathering
from fedpeer.jobs.answer.asking import Facts
from fedpeer.jobs.answer.review import utc
from fedpeer.jobs.contract import Contract
from fedpeer.jobs.files.service import Files
from fedpeer.jobs.job.service import Job, seconds_of
from fedpeer.jobs.lifecycle import Answer
from fedpeer.mesh.service import Mesh
from fedpeer.store import RunInThread, Store, Transaction
from fedpeer.worker import sandbox

LOOK_S = 600.0
"""So often at least a waiting job looks at the clock, which may have been set."""


class Answers:
    """What this peer says to contracts."""

    def __init__(
        self,
        mesh: Mesh,
        catalog: Catalog,
        store: Store,
        files: Files,
        *,
        run_in_thread: RunInThread,
        find: contract.FindStage,
        now: Callable[[], datetime],
        log: Any,
    ) -> None:
        self._mesh, self._roster, self._catalog = mesh, mesh.roster, catalog
        self._store, self._files, self._stage, self._now, self._log = store, files, find, now, log
        self._run_in_thread = run_in_thread

    async def give(self, job: Job) -> None:
        """Countersign or refuse, once; return when it is said."""
        asked = await self._store.read(lambda tx: approvals.find(tx, job.id))
        if self._said(job):
            if asked is not None and asked.state != APPROVED:
                job.failure = _refusal(asked)  # it was killed between saying so and ending
            return
        try:
            if asked is None:
                contract.check(job.contract, self._stage)
        except ContractError as error:
            self._log.warning("job_refused", job=job.id.hex(), reason="contract", code=error.code)
            job.failure = error
            await self._store.write(lambda tx: self.say(tx, job, Answer(False, "contract", ())))
            return
        if asked is None:
            asked = await self._ask(job)
        while not self._said(job):
            left = asked.until - self._seconds()
            if left <= 0:
                await self._store.write(partial(self._give_up, job=job))
            else:
                with trio.move_on_after(min(left, LOOK_S)):
                    await self._mesh.changed(job.id)

    async def check(self, read: Contract) -> None:
        """What the contract asks of this peer: known stages, peers, datasets and columns. Raises ContractError."""
        contract.check(read, self._stage)
        await self._check_ours(read)

    async def _check_ours(self, read: Contract) -> None:
        """Whether we know its participants, and have what it names of our data. Raises ContractError."""
        for peer in read.peers:
            try:
                if peer != self._mesh.me:
                    self._roster.resolve(peer)
            except FedpeerError as error:
                raise ContractError(f"[participants]: {error.message}", hint=error.hint) from None
        for (stage_id, _), name in read.datasets(read.alias_of[self._mesh.me]).items():
            try:
                view = await self._catalog.get(name)
            except NotFound as error:
                raise ContractError(f"stage {stage_id!r}: {error.message}", hint=error.hint) from None
            contract.check_columns(read.stage(stage_id), self._stage, name, [column for column, _ in view.columns])

    async def check_policy(self, read: Contract) -> None:
        """Before an own contract is said to anybody: our own policy, as far as the data is known without reading it.

        Raises PolicyError with what it found. `read` has been checked.
        """
        if refusal := await self._refused_unseen(read):
            raise PolicyError(f"your own policy refuses it: {refusal}", hint="fedpeer policy show")

    async def _refused_unseen(self, read: Contract) -> str:
        """Why the policy refuses it whatever is in the data, "" if that is still to be seen. Nothing is read."""
        data = []
        for name in sorted(set(read.datasets(read.alias_of[self._mesh.me]).values())):
            view = await self._catalog.get(name)
            source = identity(view.uri)
            data.append(Data(name, b"", view.rows, view.columns, view.id, view.label, source))
        rules = msgspec.structs.replace(await self._store.read(policy.current), no_row_differencing=False)
        facts = await self.facts(read, b"", data, rules)
        decision = decide(rules, asking.ask_of(read, self._mesh.me, self._stage, facts))
        return decision.reason if decision.verdict == "refused" else ""

    async def would_be(self, read: Contract) -> Decision:
        """What the policy says to a contract that nobody proposed yet, from the data as it is now. Nothing is kept.

        Raises PolicyError, DataError. `read` has been checked.
        """
        names = sorted(set(read.datasets(read.alias_of[self._mesh.me]).values()))
        async with self._files.snapshots(self._catalog, names) as taken:
            data = [_data(name, snapshot) for name, snapshot in taken.items()]
            rules = await self._store.read(policy.current)
            facts = await self.facts(read, contract.contract_id(codec.encode(read)), data, rules)
        return decide(rules, asking.ask_of(read, self._mesh.me, self._stage, facts))

    # how a contract is asked about

    async def _ask(self, job: Job) -> Asked:
        """Ask the policy, pin what we would bring, and keep what follows, in one commit."""
        facts: Facts | FedpeerError
        data: list[Data] = []
        answer = Answer(False, "policy", ())
        async with AsyncExitStack() as stack:
            try:
                await self._check_ours(job.contract)
                if unseen := await self._refused_unseen(job.contract):
                    raise PolicyError(unseen)  # no partner makes us read and keep a table that will not be used
                names = sorted(set(job.contract.datasets(job.view.me).values()))
                answer, data = self._bring(
                    job, await stack.enter_async_context(self._files.snapshots(self._catalog, names))
                )
                facts = await self.facts(job.contract, job.id, data, await self._store.read(policy.current))
            except FedpeerError as error:
                if isinstance(error, StoreError) and not isinstance(error, DiskFull):
                    raise
                facts = error
            return await self._write_asked(job, facts, answer, data)

    async def _write_asked(self, job: Job, facts: Facts | FedpeerError, answer: Answer, data: list[Data]) -> Asked:
        told: dict[str, Any] = {}

        def write(tx: Transaction) -> Asked:
            asked = approvals.ask(tx, self._decide(tx, job, facts, answer, data))
            if asked.state != REFUSED:
                version_of = {item.name: item.version for item in data}
                for (stage_id, port), name in job.contract.datasets(job.view.me).items():
                    archive.pin_snapshot(tx, job.id, stage_id, port, version_of[name])
            if asked.state == APPROVED:
                self.say(tx, job, answer)
            told["approved"] = [f"{one.who}, {one.how}" for one in approvals.approvals(tx, job.id)]
            told.update(state=asked.state, needs=asked.needs, until=utc(asked.until), policy=policy.kept(tx).number)
            if asked.state == REFUSED:
                ours = isinstance(facts, Facts | PolicyError)
                told["why"] = f"the policy: {asked.why}" if ours else asked.why
            return asked

        asked = await job.write(write, ("decided", told))
        job.refused_here = asked.why if asked.state == REFUSED else ""
        job.asked.set()
        return asked

    def _decide(
        self, tx: Transaction, job: Job, facts: Facts | FedpeerError, answer: Answer, data: list[Data]
    ) -> Asked:
        """What the policy says, as it is kept: refused, or so many people are to be asked."""
        state, needs, epsilon = REFUSED, 0, 0.0
        try:
            if isinstance(facts, FedpeerError):
                raise PolicyError(facts.message)
            rules = policy.current(tx)
            ask = asking.ask_of(job.contract, self._mesh.me, self._stage, facts)
            decision = decide(rules, ask)
            epsilon = sum(stage.cost[0] for stage in ask.stages if stage.cost is not None)
            why = decision.reason
            if decision.verdict != "refused":
                state = ASKING
            if decision.verdict == "ask":
                needs = rules.people
        except PolicyError as error:
            why = error.message
        return Asked(
            contract=job.id,
            initiator=job.contract.peer_of[job.contract.initiator],
            time=self._seconds(),
            until=job.created + job.contract.rules.answer_s,
            state=state,
            needs=needs,
            form=contract.form(job.contract),
            epsilon=epsilon,
            data=data,
            answer=codec.encode(answer),
            why=why[: approvals.MAX_WHY],
        )

    async def facts(self, read: Contract, contract_id: bytes, data: Sequence[Data], rules: Policy) -> Facts:
        """What this peer knows about a contract beside what is in it, with these contents of its datasets.

        Raises PolicyError for a dataset with more rows than can be remembered.
        """
        partners = [peer for peer in read.peers if peer != self._mesh.me]
        return await gathering.gather(
            read,
            contract_id,
            rules,
            {
                item.name: Snapshot(item.version, item.rows, item.columns, item.id, item.label, item.source)
                for item in data
            },
            store=self._store,
            run_in_thread=self._run_in_thread,
            name_of=self._roster.name_of,
            now=self._now(),
            spent=lambda tx, dataset, source: budget.most_spent(
                tx, dataset, source, partners, rules, self._seconds(), self._roster.name_of
            ),
            sandbox_missing=tuple(f"{layer} ({remedy})" for layer, remedy in sandbox.probe().missing()),
            memory=sandbox.usable_memory(),
        )

    def _bring(self, job: Job, taken: Mapping[str, Snapshot]) -> tuple[Answer, list[Data]]:
        """What we would say of these snapshots, and what we keep of them."""
        datasets = job.contract.datasets(job.view.me)
        told = {
            name
            for (stage_id, _), name in datasets.items()
            if lifecycle.has_common_columns(entry := job.contract.stage(stage_id), entry.role_of[job.view.me])
        }
        said, data = [], []
        for name, snapshot in taken.items():
            data.append(_data(name, snapshot))
            columns = [(column, kind) for column, kind in snapshot.columns if column != snapshot.id]
            said.append(
                lifecycle.brought(name, snapshot.version, job.salt, columns, snapshot.label or "", told=name in told)
            )
        return Answer(True, "", tuple(said), has_aes()), data

    # what is said

    def _said(self, job: Job) -> bool:
        return self._mesh.find(job.id, lifecycle.COUNTERSIGN, "", self._mesh.me) is not None

    def say(self, tx: Transaction, job: Job, answer: Answer) -> None:
        """Say it to all, once this is on disk."""
        self._mesh.publish(tx, job.id, lifecycle.COUNTERSIGN, "", codec.encode(answer))

    def _give_up(self, tx: Transaction, job: Job) -> None:
        """The deadline: a refusal, unless it was approved at the last moment."""
        asked = approvals.give_up(tx, job.id, f"nobody approved it within {job.contract.rules.answer_s} s")
        if asked.state == APPROVED:
            return
        tx.after_commit(lambda: setattr(job, "failure", _refusal(asked)))  # before anybody reads the record
        self.say(tx, job, Answer(False, "policy", ()))

    def _seconds(self) -> int:
        return seconds_of(self._now())


def _data(name: str, snapshot: Snapshot) -> Data:
    return Data(name, snapshot.version, snapshot.rows, snapshot.columns, snapshot.id, snapshot.label, snapshot.source)


def _refusal(asked: Asked) -> PolicyError:
    """What our operator reads; whatever the reason, it is one class: what the others read is of the class."""
    return PolicyError(asked.why)
