"""A real worker process: what it says of a stage, how it ends, and what it has."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import trio

from fedpeer import artifact, codec
from fedpeer.crypto import DhKey, Secret, random_bytes
from fedpeer.errors import WorkerCrashed
from fedpeer.identity import Identity
from fedpeer.peers import SumRequest
from fedpeer.secure import fixedpoint
from fedpeer.stage import Model, Sum, Table, find
from fedpeer.testing.stages import run_stage
from fedpeer.worker import main as worker_main
from fedpeer.worker import protocol as ask
from fedpeer.worker.connection import Connection
from fedpeer.worker.service import COMMAND, ENVIRONMENT, LOG_BYTES, WorkerProcess

KEY = bytes(range(32))
STAGES = Path(__file__).parent / "algorithms"
TRIAL = (
    *COMMAND[:2],
    "-c",
    f"import fedpeer.algorithms as a; a.__path__.append({str(STAGES)!r}); import fedpeer.worker.main as m; m.main()",
)
"""The worker itself, which finds the stages in tests/worker/algorithms too."""


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = descriptors_of("self")
    yield
    assert children_of(os.getpid()) == []
    left = descriptors_of("self").items() - before.items()
    assert [target for _, target in left if not target.startswith("anon_inode:")] == []  # those are event loops'


def descriptors_of(process: str) -> dict[str, str]:
    """The open descriptors of a process and what they are."""
    found = {}
    for path in Path(f"/proc/{process}/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that reads this folder
            found[path.name] = str(path.readlink())
    return found


def state(pid: int) -> str:
    """One letter of proc(5); a process that is gone is X, and Z is one that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


def children_of(pid: int) -> list[int]:
    """Of any of its threads (trio starts processes in one of its own)."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def start_of(stage: str, params: bytes = b"{}", **changed: Any) -> ask.Start:
    facts: dict[str, Any] = {"chance": KEY, "resume": None, "inputs": [], **changed}
    return ask.Start(f"trial.talk:{stage}", params, "alice", [("alice", "guest"), ("bob", "host")], **facts)


@asynccontextmanager
async def worker_of(
    start: ask.Start, command: Sequence[str] = TRIAL, log: list[str] | None = None
) -> AsyncIterator[WorkerProcess]:
    worker = await WorkerProcess.start(start, command=command, log=[].append if log is None else log.append)
    try:
        with trio.fail_after(60):
            yield worker
    finally:
        await worker.aclose()


async def end_of(stage: str, params: bytes = b"{}", log: list[str] | None = None) -> Any:
    """The last word of a stage that asks nothing."""
    async with worker_of(start_of(stage, params), log=log) as worker:
        return await worker.next()


def report(done: ask.Done) -> Any:
    (name, (kind, data)) = done.outputs[0]
    assert (name, len(done.outputs)) == ("report", 1)
    return artifact.load(kind, data).values  # type: ignore[union-attr]


# what it says


async def test_a_stage_asks_and_is_answered(tmp_path: Path) -> None:
    table = Table(pa.table({"key": ["a", "b"], "x": [1.0, 2.0]}), id="key")
    model = Model("trial.talk", {}, {"w": np.arange(50_000.0)})
    path = tmp_path / "table"
    path.write_bytes(artifact.dump(table)[1])
    inputs = [("table", "table", path), ("model", *artifact.dump(model))]
    async with worker_of(start_of("everything", b'{"count":5}', inputs=inputs)) as worker:
        sent = await worker.next()
        assert isinstance(sent, ask.Send)
        assert (sent.to, sent.tag) == ("bob", "note")
        value = codec.unpack_value(sent.header, sent.buffers)
        assert value["text"] == "é"
        assert np.array_equal(value["large"], np.arange(100_000.0))
        assert await worker.next() == ask.Receive("bob", "reply")
        await worker.answer(ask.Value(*codec.pack_value({"large": np.full(100_000, 0.5)})))
        summed = await worker.next()
        assert isinstance(summed, ask.Sum)
        fixedpoint.check(summed.layout, summed.vector)
        twice = (summed.vector * 2) % (1 << fixedpoint.WIDTH)
        await worker.answer(ask.TotalAnswer(twice.astype(np.uint32), ["alice", "bob"]))
        agreed = await worker.next()
        assert isinstance(agreed, ask.Agree)
        assert agreed.tag == "same"
        await worker.answer(ask.Value(agreed.header, agreed.buffers))
        assert await worker.next() == ask.Progress(1, 2, {"loss": 0.25})
        done = await worker.next()
        assert isinstance(done, ask.Done)
    said = report(done)
    chance = said.pop("chance")
    assert re.fullmatch("[0-9a-f]{8}", chance)
    assert said == {
        "me": "alice",
        "role": "guest",
        "all": ["alice", "bob"],
        "count": 5,
        "columns": ["key", "x"],
        "id": "key",
        "algorithm": "trial.talk",
        "w": 50_000 * 49_999 / 2,
        "reply": 50_000.0,
        "x": [1.0, 0.5],
        "n": 4,
        "survivors": ["alice", "bob"],
        "same": [1.5, "word"],
    }


async def run_loop(start: ask.Start, kill_after: int | None = None) -> tuple[list[ask.Checkpoint], Any]:
    """Answer turn t with t + 1 everywhere; the checkpoints, and the report unless killed after one of them."""
    checkpoints: list[ask.Checkpoint] = []
    async with worker_of(start) as worker:
        while True:
            request = await worker.next()
            match request:
                case ask.Checkpoint():
                    checkpoints.append(request)
                    if request.turn == kill_after:
                        os.kill(worker.pid, signal.SIGKILL)
                        return checkpoints, None
                case ask.Receive():
                    await worker.answer(ask.Value(*codec.pack_value(np.full(20_000, checkpoints[-1].turn + 1.0))))
                case ask.Done():
                    return checkpoints, report(request)


async def test_a_clipped_sum_is_said_in_the_same_bytes_by_every_worker_of_a_turn() -> None:
    codecs = Sum("", clip=0.5, bits=20).codecs
    vectors = []
    for key in (KEY, KEY, bytes(32)):
        async with worker_of(start_of("clipped", b'{"count":7}', chance=key)) as worker:
            summed = await worker.next()
            assert isinstance(summed, ask.Sum)
            fixedpoint.check(summed.layout, summed.vector, codecs)
            assert fixedpoint.used(summed.layout) == 200_000 + 4
            vectors.append(summed.vector.tobytes())
            await worker.answer(ask.TotalAnswer((summed.vector * 2).astype(np.uint32), ["alice", "bob"]))
            done = await worker.next()
            assert isinstance(done, ask.Done)
            said = report(done)
            assert said["n"] == 14
            assert np.asarray(said["x"]).tolist() == [-1.0, -1.0, -1.0]
    assert vectors[0] == vectors[1] != vectors[2]


def test_a_vector_is_let_go_while_it_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    encode = fixedpoint.encode

    def watched(*given: Any) -> Any:
        layout, vector = encode(*given)
        made.append(weakref.ref(vector))
        return layout, vector

    class Answers:
        def send(self, said: ask.Sum) -> None:
            self.total = ask.TotalAnswer(said.vector.copy(), ["alice"])

        def receive(self, kind: Any) -> ask.TotalAnswer:
            assert made[0]() is None
            return self.total

    monkeypatch.setattr(fixedpoint, "encode", watched)
    declared = SimpleNamespace(codecs=lambda tag: Sum("", clip=0.5).codecs)
    daemon = worker_main.Daemon(Answers(), declared)  # type: ignore[arg-type]
    total = daemon.ask(SumRequest("sum", {"x": np.array([0.5, -0.5])}, KEY))
    assert total["x"].tolist() == [0.5, -0.5]


async def test_a_worker_goes_on_from_its_checkpoint_as_if_it_had_not_been_killed() -> None:
    whole, result = await run_loop(start_of("loop"))
    assert [checkpoint.turn for checkpoint in whole] == [0, 1, 2, 3]
    assert result["total"] == 20_000 * (1 + 2 + 3)
    before, _ = await run_loop(start_of("loop"), kill_after=2)
    last = before[-1]
    resume = ask.Resume(last.turn, last.shared, last.own, last.chance)
    after, again = await run_loop(start_of("loop", resume=resume))
    assert again == result
    assert [checkpoint.turn for checkpoint in after] == [2, 3]
    assert after == whole[2:]


@pytest.mark.parametrize("count", [0, 1, 2, 9])
async def test_map_gives_the_same_whatever_the_number_of_cores(count: int) -> None:
    cores = os.sched_getaffinity(0)
    results = []
    for used in ({min(cores)}, cores):
        command = (*TRIAL[:-1], f"import os; os.sched_setaffinity(0, {used}); {TRIAL[-1]}")
        async with worker_of(start_of("mapped", b'{"count":%d}' % count), command) as worker:
            results.append(report(await worker.next()))
    assert results[0] == results[1]
    assert results[0]["squares"] == [number * number for number in range(count)]
    assert results[0]["sums"] == [3000.0 * number * number for number in range(count)]
    assert len(set(results[0]["chances"])) == count


async def test_an_error_in_map_is_the_stages_error() -> None:
    assert await end_of("mapped_with_errors") == ask.Failed(
        "columns_differ", "columns differ in part 2", "look at part 2"
    )


async def test_a_process_of_map_that_crashes_is_a_crash() -> None:
    failed = await end_of("mapped_and_aborted")
    assert isinstance(failed, ask.Failed)
    assert failed.code == "worker_crashed"


async def test_a_process_of_map_has_no_way_to_the_daemon() -> None:
    failed = await end_of("mapped_and_asking")
    assert isinstance(failed, ask.Failed)
    assert failed.code == "stage"
    assert failed.message.startswith("BrokenPipeError in trial/talk.py")


async def test_an_error_of_ours_keeps_its_code_message_and_hint() -> None:
    assert await end_of("error_of_ours") == ask.Failed("columns_differ", "bob has no column 'age'", "add it")


async def test_another_error_is_told_by_type_and_place_and_without_its_words() -> None:
    log: list[str] = []
    failed = await end_of("error_of_python", log=log)
    line = 1 + (STAGES / "trial/talk.py").read_text().splitlines().index('    float("the patient is 4711 years old")')
    assert failed == ask.Failed("stage", f"ValueError in trial/talk.py, line {line}, in error_of_python", "")
    assert any(f"line {line}" in said for said in log)
    assert not any("could not convert" in said for said in log)


@pytest.mark.parametrize(("stage", "kind"), [("error_like_a_lost_daemon", "BrokenPipeError"), ("leaves", "SystemExit")])
async def test_no_error_of_a_stage_is_taken_for_the_end_of_the_worker(stage: str, kind: str) -> None:
    failed = await end_of(stage)
    assert isinstance(failed, ask.Failed)
    assert failed.message.startswith(f"{kind} in trial/talk.py")
    assert "4711" not in failed.message


async def test_a_stage_that_awaits_something_else_is_told_so() -> None:
    failed = await end_of("other_await")
    assert failed.code == "stage"
    assert "awaited something else than a method of its peers" in failed.message
    assert "asyncio" in failed.hint


async def test_a_value_out_of_range_fails_before_anything_is_asked() -> None:
    failed = await end_of("sum_out_of_range")
    assert isinstance(failed, ask.Failed)
    assert (failed.code, "'x'" in failed.message) == ("stage", True)


@pytest.mark.parametrize("stage", ["other_outputs", "output_of_another_kind"])
async def test_outputs_that_are_not_declared_are_an_error(stage: str) -> None:
    failed = await end_of(stage)
    assert isinstance(failed, ask.Failed)
    assert failed.code == "stage"


async def test_an_output_that_this_role_does_not_have_is_left_out() -> None:
    assert await end_of("no_output_for_me") == ask.Done([])


async def test_the_installed_worker_finds_its_stages_and_only_those() -> None:
    async with worker_of(start_of("waits"), command=COMMAND) as worker:
        failed = await worker.next()
    assert isinstance(failed, ask.Failed)
    assert (failed.code, failed.message) == ("contract", "there is no algorithm 'trial.talk'")


@pytest.mark.parametrize("stage", ["horizontal.statistics:run", "horizontal.logistic:fit"])
async def test_installed_workers_compute_what_the_stage_computes_in_one_process(stage: str) -> None:
    chance = np.random.default_rng(1)
    declared = find(stage)
    tables = []
    for rows in (30, 41, 52):
        x = chance.normal(size=rows)
        y = (x + chance.normal(size=rows) > 0).astype(float)
        tables.append(Table(pa.table({"x": x, "y": y}), label="y"))
    expected = run_stage(declared, declared.params(), [{"table": table} for table in tables]).outputs
    roles = [(alias, "member") for alias in ("alice", "bob", "carol")]
    done: list[ask.Done] = []
    async with AsyncExitStack() as stack:
        workers = []
        for (alias, _), table in zip(roles, tables, strict=True):
            inputs = [("table", *artifact.dump(table))]
            start = ask.Start(stage, msgspec.json.encode(declared.params()), alias, roles, KEY, None, inputs)
            workers.append(await stack.enter_async_context(worker_of(start, command=COMMAND)))
        while len(done) < len(workers):
            requests = [await next_to_answer(worker) for worker in workers]
            done += [request for request in requests if isinstance(request, ask.Done)]
            sums = [request for request in requests if isinstance(request, ask.Sum)]
            if sums:
                vector = sum(request.vector for request in sums) % np.uint32(1 << fixedpoint.WIDTH)
                for worker in workers:
                    await worker.answer(ask.TotalAnswer(vector, [alias for alias, _ in roles]))
    for (alias, _), finished in zip(roles, done, strict=True):
        outputs = expected[alias].items()
        assert finished.outputs == [(name, artifact.dump(output)) for name, output in outputs if output is not None]


async def next_to_answer(worker: WorkerProcess) -> ask.Request:
    """The next request that waits for an answer, or the last word."""
    while True:
        request = await worker.next()
        if not isinstance(request, ask.Checkpoint | ask.Progress):
            assert not isinstance(request, ask.Failed), request
            return request


# how it ends


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
async def test_a_signal_that_ends_a_worker_is_named(number: signal.Signals) -> None:
    with pytest.raises(WorkerCrashed, match=rf"was ended by {number.name}.* without a result"):
        await end_of("killed", b'{"count":%d}' % number)


async def test_an_exit_status_of_a_worker_is_named() -> None:
    with pytest.raises(WorkerCrashed, match="ended with exit status 7 without a result"):
        await end_of("exits", b'{"count":7}')


async def test_a_stage_that_needs_more_memory_than_its_worker_has_is_told_so_by_name() -> None:
    async with worker_of(start_of("hoards", memory=256 << 20)) as worker:
        assert await worker.next() == ask.Receive("bob", "reply")
        await worker.answer(ask.Value(*codec.pack_value(0)))
        failed = await worker.next()
    assert isinstance(failed, ask.Failed)
    assert failed.message.startswith("out of memory in trial/talk.py")
    assert "fewer rows" in failed.hint


@pytest.fixture
def control_group() -> Iterator[Path]:
    """A control group of 256 MiB of memory, as the system has them; skips where none can be made."""
    for folder, limit in (("memory", "memory.limit_in_bytes"), (".", "memory.max")):
        made = Path("/sys/fs/cgroup", folder, f"fedpeer-test-{os.getpid()}")
        with suppress(OSError):
            made.mkdir()
            try:
                (made / limit).write_text(str(256 << 20))
                yield made
            finally:
                made.rmdir()
            return
    pytest.skip("needs root and a control group of memory")


@pytest.mark.system
async def test_a_worker_that_a_control_group_kills_for_its_memory_says_so(control_group: Path) -> None:
    async with worker_of(start_of("hoards")) as worker:
        assert await worker.next() == ask.Receive("bob", "reply")
        (control_group / "cgroup.procs").write_text(str(worker.pid))
        await worker.answer(ask.Value(*codec.pack_value(0)))
        with pytest.raises(WorkerCrashed, match=r"SIGKILL \(as by a limit of memory: of its control group"):
            await worker.next()


async def test_a_worker_that_was_killed_while_it_was_answered_is_a_crash() -> None:
    async with worker_of(start_of("waits")) as worker:
        assert await worker.next() == ask.Receive("bob", "reply")
        os.kill(worker.pid, signal.SIGKILL)
        for _ in range(3):
            await worker.answer(ask.Value(*codec.pack_value(np.zeros(1_000_000))))
        with pytest.raises(WorkerCrashed, match="SIGKILL"):
            await worker.next()


async def test_a_worker_that_breaks_the_protocol_is_ended() -> None:
    with pytest.raises(WorkerCrashed, match="broke the protocol"):
        await end_of("rude")


@pytest.mark.parametrize("script", ["pass", "import os; os.write(0, b'ab')", "import os; os.write(0, b'\\xff' * 9)"])
async def test_a_process_that_is_no_worker_is_a_crash(script: str) -> None:
    async with worker_of(start_of("waits"), command=(sys.executable, "-I", "-c", script)) as worker:
        with pytest.raises(WorkerCrashed):
            await worker.next()


@pytest.mark.parametrize("stage", ["waits", "works"])
async def test_closing_ends_a_worker_that_waits_or_works(stage: str) -> None:
    async with worker_of(start_of(stage)) as worker:
        await worker.next()
    assert not Path(f"/proc/{worker.pid}").exists()


async def test_closing_ends_a_worker_that_does_not_even_run() -> None:
    async with worker_of(start_of("waits")) as worker:
        await worker.next()
        os.kill(worker.pid, signal.SIGSTOP)
        while state(worker.pid) != "T":
            await trio.sleep(0.02)
    assert not Path(f"/proc/{worker.pid}").exists()


@pytest.mark.parametrize("stage", ["waits", "works"])
def test_a_worker_ends_when_its_daemon_is_gone(stage: str) -> None:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(TRIAL, stdin=theirs, env=ENVIRONMENT, start_new_session=True)
    theirs.close()
    frame, _ = ask.pack(start_of(stage))
    ours.sendall(frame)
    assert Connection(ours).receive(ask.Request) is not None
    ours.close()
    assert process.wait(timeout=60) == 1


async def test_the_processes_of_map_end_with_their_worker() -> None:
    log: list[str] = []
    async with worker_of(start_of("mapped_for_ever"), log=log) as worker, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def kill_when_all_run() -> None:
            while len(log) < min(2, len(os.sched_getaffinity(0))):
                await trio.sleep(0.02)
            os.kill(worker.pid, signal.SIGKILL)

        with pytest.raises(WorkerCrashed):
            await worker.next()
    forked = [int(line.split()[1]) for line in log]
    assert forked
    with trio.fail_after(30):
        while any(state(pid) not in "ZX" for pid in forked):
            await trio.sleep(0.02)


async def test_a_start_that_is_cancelled_leaves_no_process() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await WorkerProcess.start(start_of("waits"), command=TRIAL)
    assert children_of(os.getpid()) == []


async def test_a_start_with_a_missing_file_leaves_no_process(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await WorkerProcess.start(start_of("waits", inputs=[("x", "table", tmp_path / "none")]), command=TRIAL)
    assert children_of(os.getpid()) == []


# what it has


async def test_standard_error_goes_to_the_log_printable_and_up_to_a_cap() -> None:
    log: list[str] = []
    done = await end_of("noisy", b'{"count":3000}', log=log)
    assert report(done) == {}
    assert log[:2] == ["hello\\tworld \\x1b[31m", "line 0 " + "x" * 100]
    assert log[-1] == "(the worker wrote more than that; the rest is not kept)"
    assert LOG_BYTES <= sum(len(line) + 1 for line in log) <= LOG_BYTES + 1000
    assert not any("nobody hears this" in line for line in log)


async def test_a_worker_has_none_of_the_daemons_modules() -> None:
    seen = report(await end_of("look_around"))
    foreign = {"trio", "sqlite3", "structlog", "h11", "starlette", "click"}
    ours = {"wire", "mesh", "governance", "jobs", "store", "aggregation", "data", "admin", "daemon", "network", "cli"}
    modules = [name.split(".") for name in seen["modules"]]
    assert [path for path in modules if path[0] in foreign] == []
    assert [path for path in modules if path[0] == "fedpeer" and len(path) > 1 and path[1] in ours] == []
    assert [path for path in modules if path[0] == "fedpeer" and path[-1] == "service"] == []
    assert ["fedpeer", "worker", "main"] in modules
    assert seen["stdin"] is True


async def test_a_worker_has_its_socket_its_streams_an_empty_environment_and_no_secret_of_the_daemon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can look into a worker: it is closed to others of its user")
    monkeypatch.setenv("FEDPEER_TEST_SECRET", "in the daemon's environment")
    identity_seed, session_key, planted = Secret.random(), Secret.random(), random_bytes(32)
    daemon = Identity(identity_seed), DhKey(session_key)
    opened = os.open("/etc/hostname", os.O_RDONLY)
    os.set_inheritable(opened, True)
    try:
        async with worker_of(start_of("waits", chance=planted)) as worker:
            assert await worker.next() == ask.Receive("bob", "reply")
            process = Path(f"/proc/{worker.pid}")
            descriptors = descriptors_of(str(worker.pid))
            environment = (process / "environ").read_text().rstrip("\0").split("\0")
            status = dict(re.findall(r"^(\w+):\s+(.*)$", (process / "status").read_text(), re.M))
            limits = (process / "limits").read_text()
            mapped = {line.split(maxsplit=5)[5] for line in (process / "maps").read_text().splitlines() if "/" in line}
            found = {
                name: sum(occurrences(worker.pid, needle))
                for name, needle in (("identity", identity_seed.reveal()), ("session", session_key.reveal()))
            }
            found_planted = sum(occurrences(worker.pid, planted))
            found_here = any(occurrences(os.getpid(), identity_seed.reveal()))
            assert str((process / "cwd").readlink()) == "/"
    finally:
        os.close(opened)
    assert descriptors.keys() == {"0", "1", "2"}
    assert re.fullmatch(r"socket:\[\d+\]", descriptors["0"])
    assert descriptors["1"] == "/dev/null"
    assert re.fullmatch(r"pipe:\[\d+\]", descriptors["2"])
    assert sorted(environment) == sorted(f"{name}={value}" for name, value in ENVIRONMENT.items())
    assert status["NoNewPrivs"] == "1"
    assert re.search(r"Max core file size\s+0\s+0 ", limits)
    assert [path for path in mapped if "sqlite" in path or "fedpeer.key" in path or "memfd" in path] == []
    assert found == {"identity": 0, "session": 0}
    assert found_planted > 0, "the search does not find what is there"
    assert found_here
    assert daemon


def occurrences(pid: int, needle: bytes) -> Iterator[int]:
    """How often these bytes are in each readable region of a process's memory."""
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in maps:
            span, mode = line.split()[:2]
            first, last = (int(edge, 16) for edge in span.split("-"))
            if mode.startswith("r") and not line.rstrip().endswith(("[vvar]", "[vvar_vclock]", "[vsyscall]")):
                memory.seek(first)
                yield memory.read(last - first).count(needle)
