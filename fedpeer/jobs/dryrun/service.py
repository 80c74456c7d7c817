"""A dry run: a contract's stages on synthetic twins of our datasets, among simulated participants, on this machine.

Rules
* Nothing is proposed, sent, kept or counted. No row is read: the data are twins (data/twin.py) of the schemas.
* The others are simulated with twins of our own datasets, for theirs are not known here; of each role as many as the
  stage asks for, and up to PARTICIPANTS of it. What they say passes their gates as ours passes ours.
* Every participant's part runs in a real worker, confined as in a job; the sums are plain ones, for nothing is secret.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import numpy as np
import trio

from fedpeer import artifact
from fedpeer.crypto import random_bytes
from fedpeer.data import offers, twin
from fedpeer.data.catalog import Catalog
from fedpeer.errors import FedpeerError, JobError, TimedOut
from fedpeer.governance.gate import Gate
from fedpeer.jobs import keyring
from fedpeer.jobs.contract import DATASET, Contract, FindStage, StageEntry, read_params
from fedpeer.jobs.execution import Outputs, StartWorker, Worker, checked_outputs, failure
from fedpeer.secure import fixedpoint, paillier
from fedpeer.stage import Stage
from fedpeer.store import RunInThread
from fedpeer.worker import protocol as ask

PARTICIPANTS = 3
MAX_S = 600.0
LABEL = "label"
"""A simulated participant of another role than ours has one, for its role may need it where ours does not."""


class DryMessageView(msgspec.Struct, kw_only=True):
    """What one participant would say under one tag in one stage."""

    tag: str
    kind: str
    text: str
    """what the stage declares of it"""
    count: int
    bytes: int
    """of the values, without the frames around them"""


class DryStageView(msgspec.Struct, kw_only=True):
    id: str
    run: str
    participants: list[str]
    """aliases; the first is this peer"""
    rows: dict[str, int]
    """rows of the twin at each port of ours"""
    seconds: float
    messages: list[DryMessageView]
    outputs: dict[str, str]
    """name → kind of what this peer would have"""


class DryRunView(msgspec.Struct, kw_only=True):
    name: str
    seconds: float
    stages: list[DryStageView]


class DryRuns:
    """Runs contracts that nobody proposed."""

    def __init__(
        self, catalog: Catalog, *, start_worker: StartWorker, run_in_thread: RunInThread, find: FindStage
    ) -> None:
        self._catalog, self._start_worker, self._run_in_thread, self._stage = catalog, start_worker, run_in_thread, find

    async def run(self, read: Contract, me: str) -> DryRunView:
        """Our part of a contract, which has been checked. `me`: our alias. Raises what a stage fails with, TimedOut."""
        began, views = trio.current_time(), []
        kept = self._participants(read, me)
        made: dict[tuple[str, str], tuple[str, bytes]] = {}  # (alias, "stage.output") → (kind, bytes)
        with trio.move_on_after(MAX_S) as limit:
            for entry in read.in_order():
                roles = {alias: role for alias, role in entry.roles if alias in kept}
                if me not in roles:
                    continue
                views.append(await self._one(read, entry, roles, me, made))
        if limit.cancelled_caught:
            raise TimedOut(f"the dry run took more than {MAX_S:g} s")
        return DryRunView(name=read.name, seconds=round(trio.current_time() - began, 3), stages=views)

    def _participants(self, read: Contract, me: str) -> set[str]:
        """Us, and of each role of each stage as many as it asks for."""
        kept = {me}
        for entry in read.stages:
            counts = self._stage(entry.run).roles
            for role, count in counts.items():
                holders = sorted(
                    (alias for alias, held in entry.roles if held == role), key=lambda alias: alias not in kept
                )
                kept.update(holders[: max(count.least, PARTICIPANTS)])
        return kept

    async def _one(
        self,
        read: Contract,
        entry: StageEntry,
        roles: Mapping[str, str],
        me: str,
        made: dict[tuple[str, str], tuple[str, bytes]],
    ) -> DryStageView:
        declared, began = self._stage(entry.run), trio.current_time()
        rows: dict[str, int] = {}
        inputs: dict[str, list[tuple[str, str, Any]]] = {}
        for alias in roles:
            inputs[alias] = []
            for port, source in sorted(entry.sources(alias).items()):
                if source.startswith(DATASET):
                    table = await self._twin(read, entry, port, alias, me)
                    inputs[alias].append((port, *await self._run_in_thread(partial(artifact.dump, table))))
                    if alias == me:
                        rows[port] = table.n_samples
                elif (alias, source) in made:
                    inputs[alias].append((port, *made[alias, source]))
                else:
                    raise JobError(f"dry run of stage {entry.id!r}: {source!r} was not made at {alias}")
        rehearsal = _Rehearsal(entry, declared, roles, await self._keys(entry, declared, roles))
        outputs = await rehearsal.run(inputs, self._start_worker)
        for alias, given in outputs.items():
            made |= {(alias, f"{entry.id}.{name}"): output for name, output in given.items()}
        return DryStageView(
            id=entry.id,
            run=entry.run,
            participants=sorted(roles, key=lambda alias: alias != me),
            rows=rows,
            seconds=round(trio.current_time() - began, 3),
            messages=rehearsal.said[me].views(declared),
            outputs={name: kind for name, (kind, _) in sorted(outputs[me].items())},
        )

    async def _keys(self, entry: StageEntry, declared: Stage, roles: Mapping[str, str]) -> dict[str, bytes]:
        """A key for each simulated participant that has one: alias → p and q."""
        owners = [alias for alias, role in roles.items() if role in declared.keys]
        bits = read_params(entry, declared).key_bits if owners else 0  # type: ignore[attr-defined]
        return {alias: await self._run_in_thread(partial(keyring.make, bits)) for alias in owners}

    async def _twin(self, read: Contract, entry: StageEntry, port: str, alias: str, me: str) -> Any:
        """A twin of our dataset at this port, or of our first where we have none there; for us, or as another's."""
        ours = read.datasets(me)
        name = ours.get((entry.id, port)) or next(iter(ours.values()), None)
        if name is None:
            raise JobError(f"dry run of stage {entry.id!r}: the contract has no dataset of ours to make a twin of")
        view = await self._catalog.get(name)
        columns, label = [(column, kind) for column, kind in view.columns], view.label
        if entry.role_of[alias] != entry.role_of[me] and label is None and LABEL not in dict(columns):
            columns, label = [*columns, (LABEL, "number")], LABEL
        number = list(read.peer_of).index(alias)
        rows = max(offers.FEWEST, offers.rounded(view.rows))  # as partners may see them, and enough to compute on
        return await self._run_in_thread(lambda: twin.make(columns, rows, id_=view.id, label=label, participant=number))


@dataclass
class _Said:
    """How often and how much one participant said, by tag."""

    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    sizes: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, tag: str, size: int) -> None:
        self.counts[tag] += 1
        self.sizes[tag] += size

    def views(self, declared: Stage) -> list[DryMessageView]:
        return [
            DryMessageView(tag=tag, kind=message.kind, text=message.text, count=self.counts[tag], bytes=self.sizes[tag])
            for tag, message in declared.messages.items()
            if self.counts[tag]
        ]


class _Rehearsal:
    """One stage by all its participants at once."""

    def __init__(self, entry: StageEntry, declared: Stage, roles: Mapping[str, str], keys: Mapping[str, bytes]) -> None:
        self._entry, self._declared, self._roles, self._keys = entry, declared, dict(roles), keys
        self._moduli = [
            (alias, keyring.as_bytes(paillier.private_key(primes).public.n)) for alias, primes in keys.items()
        ]
        self.said = {alias: _Said() for alias in roles}
        self._mail: dict[tuple[str, str, str], tuple[Any, Any]] = defaultdict(lambda: trio.open_memory_channel(1 << 16))
        self._meetings: dict[tuple[str, int], _Meeting] = defaultdict(lambda: _Meeting(len(roles)))
        self._error: FedpeerError | None = None

    async def run(
        self, inputs: Mapping[str, Sequence[tuple[str, str, Any]]], start_worker: StartWorker
    ) -> dict[str, Outputs]:
        """alias → its outputs. Raises the first error of any of them."""
        outputs: dict[str, Outputs] = {}

        async def live(alias: str, scope: trio.CancelScope) -> None:
            try:
                outputs[alias] = await self._live(alias, list(inputs[alias]), start_worker)
            except FedpeerError as error:
                if self._error is None:
                    where = f"dry run of stage {self._entry.id!r} at {alias}"
                    self._error = type(error)(f"{where}: {error.message}", hint=error.hint)
                scope.cancel()

        async with trio.open_nursery() as nursery:
            for alias in self._roles:
                nursery.start_soon(live, alias, nursery.cancel_scope)
        if self._error is not None:
            raise self._error
        return outputs

    async def _live(self, alias: str, inputs: list[tuple[str, str, Any]], start_worker: StartWorker) -> Outputs:
        worker = await start_worker(
            ask.Start(
                self._declared.name,
                self._entry.params.encode(),
                alias,
                list(self._roles.items()),
                random_bytes(32),
                None,
                inputs,
                own_key=self._keys.get(alias, b""),
                moduli=self._moduli,
            )
        )
        try:
            return await self._serve(alias, worker)
        finally:
            with trio.CancelScope(shield=True):
                await worker.aclose()

    async def _serve(self, alias: str, worker: Worker) -> Outputs:
        gate, said, asked = Gate(self._declared, self._roles, alias), self.said[alias], defaultdict[str, int](int)

        def place(kind: str) -> tuple[str, int]:
            asked[kind] += 1
            return kind, asked[kind]

        while True:
            match await worker.next():
                case ask.Done() as done:
                    return checked_outputs(self._declared, done)
                case ask.Failed() as failed:
                    raise failure(failed)
                case ask.Send(to, tag, header, buffers):
                    gate.send(to, tag, header, buffers)
                    said.add(tag, _size(header, buffers))
                    await self._mail[alias, to, tag][0].send((header, buffers))
                case ask.Receive(sender, tag):
                    gate.receive(sender, tag)
                    await worker.answer(ask.Value(*await self._mail[sender, alias, tag][1].receive()))
                case ask.Sum(tag, layout, vector):
                    gate.sum(tag, layout, vector)
                    said.add(tag, len(vector) * fixedpoint.WIDTH // 8)
                    parts = await self._meetings[place(f"sum {tag}")].meet(alias, (layout, vector))
                    await worker.answer(ask.TotalAnswer(_total(tag, parts), list(self._roles)))
                case ask.Agree(tag, header, buffers):
                    gate.agree(tag, _size(header, buffers))
                    said.add(tag, _size(header, buffers))
                    values = await self._meetings[place(f"agree {tag}")].meet(alias, (header, buffers))
                    await worker.answer(ask.Value(*values[next(iter(self._roles))]))
                case ask.Checkpoint(turn):
                    gate.turn(turn + 1)
                case ask.Progress():
                    pass


class _Meeting:
    """What all participants bring to one place, for each of them once all have come."""

    def __init__(self, count: int) -> None:
        self._count, self._brought, self._full = count, dict[str, Any](), trio.Event()

    async def meet(self, alias: str, brought: Any) -> dict[str, Any]:
        self._brought[alias] = brought
        if len(self._brought) == self._count:
            self._full.set()
        await self._full.wait()
        return self._brought


def _total(tag: str, parts: Mapping[str, tuple[Any, Any]]) -> Any:
    layouts = [layout for layout, _ in parts.values()]
    if any(layout != layouts[0] for layout in layouts):
        raise JobError(f"the participants do not add the same things in {tag!r}")
    total = np.zeros(len(next(iter(parts.values()))[1]), dtype=np.uint32)
    for _, vector in parts.values():
        total = (total + vector) & np.uint32((1 << fixedpoint.WIDTH) - 1)
    return total


def _size(header: bytes, buffers: Sequence[Any]) -> int:
    return len(header) + sum(len(buffer) for buffer in buffers)
