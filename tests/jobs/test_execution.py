"""One stage at three peers, each with a store of its own: killed at every step, it gives what it would have given.

What lies between the peers is in memory here (the mesh and the sums have tests of their own, and the federation's test
has all of it together); the stores, the journal and the bytes of the workers are the real ones.
"""

from __future__ import annotations

import random
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import trio

from fedpeer import artifact, codec
from fedpeer.aggregation.request import Request
from fedpeer.errors import DataError, GateClosed, NotDeterministic, StageError, WorkerCrashed
from fedpeer.jobs import checkpoint
from fedpeer.jobs.execution import Execution, join, run_alone, split
from fedpeer.peers import Peers
from fedpeer.secure import fixedpoint
from fedpeer.stage import Agreed, Open, Params, Report, Stage, Sum, at_least, exactly, stage
from fedpeer.store import Schema, Store, Transaction, call_directly
from fedpeer.testing.workers import CoroutineWorker
from fedpeer.worker import protocol

CONTRACT = b"c" * 32
ROLES = {"bank": "guest", "telco": "host", "shop": "host"}
PEER_OF = {alias: f"fp1{alias}" for alias in ROLES}
BIG = 30_000  # numbers: larger than what lies in a row of the store


@stage(
    version=1,
    roles={"guest": exactly(1), "host": at_least(1)},
    inputs={"report": Report},
    outputs={"report": Report},
    messages={
        "ask": Open("guest", "host", "a random number"),
        "tell": Open("host", "guest", "numbers", per_turn=2),
        "total": Sum("a total", per_turn=2),
        "common": Agreed("a value"),
    },
)
async def talk(peers: Peers, params: Params, report: Report) -> dict[str, Any]:
    """Everything a stage can do, before, in and after its loop."""
    size = int(report.values["size"])
    start = await peers.sum("total", {"n": np.array([peers.random.integers(0, 100, 1)[0]])})
    shared = {"sum": int(start["n"][0]), "x": np.zeros(size)}
    own: dict[str, Any] = {"heard": 0}
    for turn in peers.rounds(3, shared=shared, own=own):
        if peers.role == "guest":
            await peers.broadcast("ask", int(peers.random.integers(0, 1000, 1)[0]), role="host")
            told = await peers.gather("host", "tell")
            again = await peers.gather("host", "tell")
            own["heard"] += sum(int(v.sum()) for v in (*told.values(), *again.values()))
        else:
            number = await peers.receive("bank", "ask")
            await peers.send("bank", "tell", np.full(size, number + turn))
            await peers.send("bank", "tell", peers.random.integers(0, 9, size))
            own["heard"] += number
        total = await peers.sum("total", {"x": np.full(size, float(own["heard"] % 1000))})
        shared["x"] = shared["x"] + total["x"]
        shared["sum"] += await peers.agree("common", int(total["x"][0]))
        peers.progress(turn + 1, 3, heard=own["heard"])
    last = await peers.sum("total", {"n": np.array([shared["sum"]])})
    values = {"last": int(last["n"][0]), "x": float(shared["x"][0]), "heard": own["heard"], "of": last.survivors}
    return {"report": Report(values)}


class Died(Exception):
    """A daemon was killed."""


@dataclass
class Mail:
    seq: int
    tag: str
    header: bytes
    buffers: list[bytes]


class Between:
    """What the daemons have between them. Mail is durable once the sender's transaction is."""

    SCHEMA = Schema("between", ["CREATE TABLE taken (sender TEXT PRIMARY KEY, count INTEGER NOT NULL) STRICT"])

    def __init__(self) -> None:
        self.letters: dict[tuple[str, str], list[Mail]] = defaultdict(list)
        self.taken: list[tuple[str, str, int]] = []
        self.sums: dict[tuple[int, int], dict[str, tuple[bytes, bytes, Any]]] = defaultdict(dict)
        self.answered: set[tuple[str, int, int]] = set()
        self.agreed: dict[tuple[int, int], bytes] = {}
        self.changed = trio.Event()

    def change(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


class Daemon:
    """One peer's end of it (execution.Delivery and execution.Together)."""

    def __init__(self, between: Between, alias: str, folder: Path) -> None:
        self.between, self.alias, self.me = between, alias, PEER_OF[alias]
        self.store = Store(folder, [checkpoint.SCHEMA, Between.SCHEMA])

    def post(self, tx: Transaction, contract: bytes, stage: str, to: str, tag: str, header: bytes, buffers: Any) -> int:
        letters = self.between.letters[self.me, to]
        letters.append(Mail(len(letters), tag, header, [bytes(buffer) for buffer in buffers]))
        tx.after_commit(self.between.change)
        return len(letters) - 1

    async def next_mail(self, contract: bytes, stage: str, sender: str) -> Mail:
        row = self.store.write_now(lambda tx: tx.one("SELECT count FROM taken WHERE sender = ?", (sender,)))
        seq = row[0] if row else 0
        while len(self.between.letters[sender, self.me]) <= seq:
            await self.between.changed.wait()
        return self.between.letters[sender, self.me][seq]

    def take(self, tx: Transaction, contract: bytes, stage: str, sender: str, mail: Mail) -> None:
        tx.execute("INSERT OR REPLACE INTO taken VALUES (?, ?)", (sender, mail.seq + 1))
        self.between.taken.append((sender, self.me, mail.seq))

    async def sum(self, request: Request) -> Any:
        turn, k = request.turn, request.k
        assert (self.me, turn, k) not in self.between.answered, "a decided sum is never asked again"
        parts = self.between.sums[turn, k]
        said = (request.params, request.history, request.turn_history, request.used, request.group)
        part = (said, request.name, np.array(request.vector))
        if self.me in parts:
            assert parts[self.me][:2] == part[:2]
            assert (parts[self.me][2] == part[2]).all()
        parts[self.me] = part
        self.between.change()
        while len(parts) < len(ROLES):
            await self.between.changed.wait()
        assert len({part[:2] for part in parts.values()}) == 1, "all have one history and one description of the sum"

        self.between.answered.add((self.me, turn, k))
        total = np.sum([part[2] for part in parts.values()], axis=0, dtype=np.uint32) % (1 << 24)
        return SimpleNamespace(values=total, survivors=list(PEER_OF.values()), sum_hash=b"sum")

    async def agree(self, stage: str, turn: int, k: int, mine: bytes) -> bytes:
        return self.between.agreed.setdefault((turn, k), mine)


@dataclass
class Result:
    values: dict[str, Any]
    histories: dict[str, bytes]
    between: Between
    steps: dict[str, int]
    said: list[tuple[str, str, dict[str, Any]]]
    stores: dict[str, Store]


async def run(
    folder: Path,
    *,
    size: int = 3,
    kill: Callable[[str, int], str | None] = lambda _alias, _step: None,
    what: Stage = talk,
    restarts: int = 1_000_000,
) -> Result:
    """`kill(alias, step)` → "worker" or "daemon" to kill there; steps are counted over the whole life of the peer."""
    between = Between()
    result = Result({}, {}, between, dict.fromkeys(ROLES, 0), [], {})
    _, data = artifact.dump(Report({"size": size}))

    async def live(alias: str) -> None:
        (folder / alias).mkdir(exist_ok=True)
        while True:
            daemon = Daemon(between, alias, folder / alias)
            result.stores[alias] = daemon.store

            async def step(_message: Any) -> bool:
                result.steps[alias] += 1
                victim = kill(alias, result.steps[alias])
                if victim == "daemon":
                    raise Died
                return victim == "worker"

            async def start(start: protocol.Start) -> CoroutineWorker:
                await trio.lowlevel.checkpoint()
                return CoroutineWorker(start, lambda _name: what, step)

            execution = Execution(
                CONTRACT, "talk", what, "{}", ROLES, PEER_OF, alias,
                store=daemon.store, mesh=daemon, together=daemon, start_worker=start,
                say=lambda event, **facts: result.said.append((alias, event, facts)), restarts=restarts,
                run_in_thread=call_directly,
                chance=lambda: alias.encode().ljust(32, b"\0"),
            )  # fmt: skip
            try:
                outputs, result.histories[alias] = await execution.run([("report", "report", data)])
                result.values[alias] = artifact.load(*outputs["report"]).values
                return
            except Died:
                daemon.store.close()

    async with trio.open_nursery() as nursery:
        for alias in ROLES:
            nursery.start_soon(live, alias)
    for (sender, receiver), letters in between.letters.items():
        taken = [seq for s, r, seq in between.taken if (s, r) == (sender, receiver)]
        assert taken == list(range(len(letters))), "each letter is taken once and in order"
    return result


def errors_of(group: BaseException) -> list[BaseException]:
    if isinstance(group, BaseExceptionGroup):
        return [leaf for error in group.exceptions for leaf in errors_of(error)]
    return [group]


async def test_a_stage_talks_sums_and_agrees(quick_path: Path) -> None:
    result = await run(quick_path)
    assert {v["last"] for v in result.values.values()} == {result.values["bank"]["last"]}
    assert result.values["bank"]["of"] == list(ROLES)
    assert len(set(result.histories.values())) == 1
    assert {key: len(letters) for key, letters in result.between.letters.items()} == {
        ("fp1bank", "fp1telco"): 3, ("fp1bank", "fp1shop"): 3, ("fp1telco", "fp1bank"): 6, ("fp1shop", "fp1bank"): 6,
    }  # fmt: skip
    told = [facts for alias, event, facts in result.said if (alias, event) == ("shop", "progress")]
    assert [(facts["done"], facts["of"]) for facts in told] == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("victim", ["worker", "daemon"])
async def test_killed_at_each_step_it_gives_the_same(quick_path: Path, victim: str) -> None:
    (quick_path / "whole").mkdir()
    whole = await run(quick_path / "whole")
    steps = max(whole.steps.values())
    assert steps > 30
    for at in range(1, steps + 1):
        (folder := quick_path / str(at)).mkdir()
        result = await run(folder, kill=lambda _alias, step, at=at: victim if step == at else None)
        assert result.values == whole.values
        assert result.histories == whole.histories


async def test_killed_at_random_again_and_again_it_gives_the_same(quick_path: Path, seed: int) -> None:
    (quick_path / "whole").mkdir()
    whole = await run(quick_path / "whole", size=BIG)
    for number in range(6):
        chance = random.Random(f"{seed}/{number}")
        (folder := quick_path / str(number)).mkdir()
        result = await run(
            folder,
            size=BIG,
            kill=lambda _alias, _step, chance=chance: (
                chance.choice(["worker", "daemon"]) if chance.random() < 0.12 else None
            ),
        )
        assert result.values == whole.values
        assert result.histories == whole.histories


async def test_large_answers_and_states_are_files_that_go_with_their_rows(quick_path: Path) -> None:
    result = await run(quick_path, size=BIG)
    for alias, store in result.stores.items():
        kept = {path.name for path in store.files.iterdir()}
        state, *answers = store.write_now(
            lambda tx: [
                *(row[0] for row in tx.all("SELECT state_file FROM checkpoint")),
                *(row[0] for row in tx.all("SELECT answer_file FROM journal WHERE answer_file <> x''")),
            ]
        )
        assert state
        assert kept == {digest.hex() for digest in (state, *answers)}, alias
        for digest in store.write_now(lambda tx: checkpoint.drop(tx, CONTRACT)):
            store.remove_file(digest)
        assert not list(store.files.iterdir())
        assert (
            store.write_now(lambda tx: tx.all("SELECT * FROM journal UNION ALL SELECT 1,1,1,1,1,1,1,1 FROM checkpoint"))
            == []
        )


async def test_a_worker_that_always_crashes_ends_the_stage_by_name(quick_path: Path) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        await run(
            quick_path, restarts=2, kill=lambda alias, step: "worker" if alias == "telco" and step % 3 == 0 else None
        )
    (error,) = errors_of(caught.value)
    assert isinstance(error, WorkerCrashed)
    assert "'talk' ended 3 times" in error.message
    assert "SIGKILL" in error.message


async def test_crashes_are_counted_across_restarts_of_the_daemon(quick_path: Path) -> None:
    victims = iter(["worker", "daemon", "worker", "daemon", "worker", "daemon"])
    with pytest.raises(BaseExceptionGroup) as caught:
        await run(
            quick_path,
            restarts=2,
            kill=lambda alias, step: next(victims) if alias == "telco" and step % 3 == 0 else None,
        )
    assert "ended 3 times" in str(errors_of(caught.value)[0])
    assert next(victims) == "daemon"


def moody(message: str) -> Stage:
    """A stage that says another thing the second time."""
    times: list[int] = []

    @stage(version=1, roles=talk.roles, inputs=talk.inputs, outputs=talk.outputs, messages=talk.messages)
    async def fickle(peers: Peers, params: Params, report: Report) -> dict[str, Any]:
        times.append(1)
        changes = len(times)
        if peers.role == "guest":
            await peers.broadcast("ask", changes if message == "send" else 0, role="host")
        else:
            await peers.receive("bank", "ask")
        await peers.sum("total", np.array([changes if message == "sum" else 0]))
        if message == "kind":
            if peers.me == "bank" and changes > 3:
                await peers.sum("total", np.array([0]))
            else:
                await peers.agree("common", 1)
        await peers.agree("common", 1)
        return {"report": Report({})}

    return fickle


@pytest.mark.parametrize("message", ["send", "sum"])
async def test_a_repeated_turn_that_says_other_bytes_fails(quick_path: Path, message: str) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        await run(
            quick_path, what=moody(message),
            kill=lambda alias, step: "worker" if alias == "bank" and step == 4 + (message == "sum") else None,
        )  # fmt: skip
    assert any(isinstance(error, NotDeterministic) for error in errors_of(caught.value))


# what a worker may not do


class Says:
    """A worker under somebody else's control."""

    def __init__(self, *messages: protocol.Message) -> None:
        self.messages = list(messages)
        self.answers: list[Any] = []

    async def next(self) -> Any:
        return self.messages.pop(0)

    async def answer(self, answer: Any) -> None:
        self.answers.append(answer)

    async def aclose(self) -> None:
        self.messages.clear()


EMPTY = codec.pack_value({})
REPORT = artifact.dump(Report({}))


@pytest.mark.parametrize(
    ("messages", "kind"),
    [
        ([protocol.Send("telco", "tell", *codec.pack_value(1))], GateClosed),
        ([protocol.Send("nobody", "ask", *codec.pack_value(1))], GateClosed),
        ([protocol.Receive("shop", "ask")], GateClosed),
        ([protocol.Agree("total", *codec.pack_value(1))], GateClosed),
        ([protocol.Sum("total", [], np.zeros(4, np.uint32))], GateClosed),
        ([protocol.Checkpoint(1, EMPTY, EMPTY, bytes(32))], Exception),
        ([protocol.Checkpoint(0, EMPTY, EMPTY, bytes(32)), protocol.Checkpoint(2, EMPTY, EMPTY, bytes(32))], Exception),
        ([protocol.Done([("other", REPORT)])], StageError),
        ([protocol.Done([("report", ("model", b""))])], StageError),
        ([protocol.Done([("report", REPORT), ("report", REPORT)])], StageError),
        ([protocol.Failed("store", "no space", "")], StageError),
        ([protocol.Failed("config", "x", "")], StageError),
        ([protocol.Failed("nothing", "x", "")], StageError),
        *[
            ([protocol.Failed(code, "x", "")], StageError)
            for code in ("gate", "policy", "cancelled", "aborted", "worker_crashed", "sum", "peer_absent", "job")
        ],
        ([protocol.Failed("columns_differ", "x", "")], DataError),
    ],
)
async def test_a_worker_that_lies_fails_its_job_only(quick_path: Path, messages: list[Any], kind: type) -> None:
    daemon = Daemon(Between(), "bank", quick_path)
    worker = Says(*messages)

    async def start(_start: protocol.Start) -> Says:
        return worker

    execution = Execution(
        CONTRACT, "talk", talk, "{}", ROLES, PEER_OF, "bank", store=daemon.store, mesh=daemon, together=daemon,
        start_worker=start, say=lambda event, **facts: None, restarts=2, run_in_thread=call_directly,
    )  # fmt: skip
    with pytest.raises(kind) as caught:
        await execution.run([])
    assert not worker.messages
    if kind in (StageError, DataError):
        assert caught.type is kind


@pytest.mark.parametrize("size", [3, BIG])
@pytest.mark.parametrize("request_", ["Send", "Receive", "Sum", "Agree", "Checkpoint", "resume"])
async def test_what_is_large_is_hashed_joined_and_read_beside_the_event_loop(
    quick_path: Path, size: int, request_: str
) -> None:
    between, value = Between(), codec.pack_value(np.zeros(size))
    between.letters[PEER_OF["telco"], PEER_OF["bank"]].append(Mail(0, "tell", value[0], [bytes(b) for b in value[1]]))

    class Alone(Daemon):
        async def sum(self, request: Request) -> Any:
            return SimpleNamespace(values=request.vector, survivors=list(PEER_OF.values()), sum_hash=b"sum")

    daemon = Alone(between, "bank", quick_path)
    messages: dict[str, protocol.Message] = {
        "Send": protocol.Send("telco", "ask", *value),
        "Receive": protocol.Receive("telco", "tell"),
        "Sum": protocol.Sum("total", *fixedpoint.encode({"x": np.zeros(size)})),
        "Agree": protocol.Agree("common", *value),
        "Checkpoint": protocol.Checkpoint(0, value, EMPTY, bytes(32)),
    }
    beside: list[Any] = []

    async def run_in_thread(function: Callable[[], Any]) -> Any:
        beside.append(function)
        return await trio.to_thread.run_sync(function)

    async def start(_start: protocol.Start) -> Says:
        return worker

    execution = Execution(
        CONTRACT, "talk", talk, "{}", ROLES, PEER_OF, "bank", store=daemon.store, mesh=daemon, together=daemon,
        start_worker=start, say=lambda event, **facts: None, restarts=2, run_in_thread=run_in_thread,
    )  # fmt: skip
    worker = Says(messages["Checkpoint" if request_ == "resume" else request_], protocol.Done([]))
    await execution.run([])
    first = len(beside)
    assert bool(first) == (size == BIG)
    if request_ in ("resume", "Receive", "Sum", "Agree"):  # what the first run kept is read again
        worker = Says(*([] if request_ == "resume" else [messages[request_]]), protocol.Done([]))
        await execution.run([])
        assert (len(beside) > first) == (size == BIG)


async def test_a_vector_is_let_go_for_its_total_and_the_total_when_it_is_answered(quick_path: Path) -> None:
    vector: weakref.ref[Any]
    total: weakref.ref[Any]
    seen: list[str] = []

    class Large(Says):
        async def next(self) -> Any:
            nonlocal vector
            if seen:
                assert total() is None
                seen.append("asked again")
                return protocol.Done([])
            layout, made = fixedpoint.encode({"x": np.zeros(BIG)})
            vector = weakref.ref(made)
            return protocol.Sum("total", layout, made)

        async def answer(self, answer: Any) -> None:
            assert total() is answer.vector
            seen.append("answered")

    class Alone(Daemon):
        async def sum(self, request: Request) -> Any:
            nonlocal total
            values = request.vector.copy()
            total = weakref.ref(values)
            return SimpleNamespace(values=values, survivors=list(PEER_OF.values()), sum_hash=b"sum")

    def say(event: str, **facts: Any) -> None:
        assert vector() is None, "before the total is written to the journal"
        seen.append(event)

    async def start(_start: protocol.Start) -> Says:
        return Large()

    daemon = Alone(Between(), "bank", quick_path)
    execution = Execution(
        CONTRACT, "talk", talk, "{}", ROLES, PEER_OF, "bank", store=daemon.store, mesh=daemon, together=daemon,
        start_worker=start, say=say, restarts=0, run_in_thread=call_directly,
    )  # fmt: skip
    await execution.run([])
    assert seen == ["sum", "answered", "asked again"]


async def test_alone_a_stage_talks_to_nobody() -> None:
    @stage(version=1, roles={"member": at_least(1)}, inputs={}, outputs={"report": Report}, messages={"s": Sum("s")})
    async def lonely(peers: Peers, params: Params) -> dict[str, Any]:
        for _ in peers.rounds(2, shared={}):
            peers.progress(1, 2)
        return {"report": Report({"me": peers.me})}

    async def start(start: protocol.Start) -> CoroutineWorker:
        return CoroutineWorker(start, lambda _name: lonely)

    outputs = await run_alone(lonely, "{}", [], start)
    assert artifact.load(*outputs["report"]).values == {"me": "me"}

    async def asks(_start: protocol.Start) -> Says:
        return Says(protocol.Sum("s", [], np.zeros(4, np.uint32)))

    with pytest.raises(GateClosed, match="without peers"):
        await run_alone(lonely, "{}", [], asks)


def test_joined_parts_come_apart_and_what_is_cut_off_is_refused() -> None:
    header, buffers = codec.pack_value({"a": np.arange(5), "b": [np.zeros((0, 2)), "x"]})
    joined = join(header, buffers)
    assert split(joined)[0] == header
    assert [bytes(part) for part in split(joined)[1]] == [bytes(buffer) for buffer in buffers]
    for bad in (b"", joined[:-1], joined[:5], b"\xff" * 8):
        with pytest.raises(StageError):
            split(bad)
