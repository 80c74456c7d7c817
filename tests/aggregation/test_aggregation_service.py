"""Sums and agreed values over real meshes on a network in memory: restarts, cuts, liars, and what is left behind."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import trio

from fedpeer import codec
from fedpeer.aggregation import masks
from fedpeer.aggregation.attempt import Begin, Mask, MaskedRecord, Slot, Sum, proposer
from fedpeer.aggregation.service import INLINE_BYTES, Aggregation, AgreedRecord, Total
from fedpeer.crypto import Secret, hash_
from fedpeer.errors import FedpeerError, LocalProtocolError, NotDeterministic, RemoteProtocolError, SumError, TrustError
from fedpeer.events import Events
from fedpeer.identity import Identity
from fedpeer.mesh.service import Mesh
from fedpeer.store import RunInThread, Store, call_directly
from fedpeer.testing.network import MemoryNetwork
from fedpeer.testing.uniformity import looks_uniform

CONTRACT = b"c" * 32
HISTORY = b"h" * 32
COUNT = 3000


class Log:
    """Fails the test for what an operator should never see."""

    def debug(self, event: str, **facts: object) -> None: ...

    info = warning = debug

    def exception(self, event: str, **_facts: object) -> None:
        raise AssertionError(event)

    error = exception


class Daemon:
    """An organization's home on disk and, between `start` and `stop`, its mesh and its aggregation."""

    def __init__(self, name: str, folder: Path, network: MemoryNetwork) -> None:
        self.name, self.folder, self.host = name, folder / name, network.host(name)
        self.identity = Identity(Secret(name.encode().ljust(32, b".")))
        self.id = self.identity.id
        self.address = f"{name}:7420"
        self.card = self.identity.card(name, (self.address,)).text
        self.journal: list[list[int]] = []
        self.is_open = False
        self.scope = trio.CancelScope()

    def open(self, run_in_thread: RunInThread = call_directly, store_thread: RunInThread = call_directly) -> None:
        self.store = Store(self.folder, [*Mesh.SCHEMAS, *Aggregation.SCHEMAS], store_thread)
        self.events: list[Any] = []
        events = Events()
        events.subscribe(self.events.append)
        facts: dict[str, Any] = {"events": events, "log": Log()}
        self.mesh = Mesh(
            self.identity, self.name, self.store, self.host, listen=(self.address,), addresses=(self.address,), **facts
        )
        self.aggregation = Aggregation(self.mesh, self.store, self.identity, run_in_thread=run_in_thread, **facts)
        self.is_open = True

    async def live(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run the mesh and `work` until `work` is done or `scope` is cancelled: then the daemon is gone."""
        self.scope = trio.CancelScope()
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.mesh.run)
                    await work()
                    nursery.cancel_scope.cancel()
        finally:
            self.store.close()
            self.is_open = False

    async def sum(
        self,
        parties: Sequence[Daemon],
        k: int = 0,
        *,
        turn: int = 1,
        vector: masks.Vector | None = None,
        params: bytes = b"params",
        history: bytes = HISTORY,
    ) -> Total:
        vector = vector_of(self.name, k) if vector is None else vector
        ids = [party.id for party in parties]
        return await self.aggregation.sum(CONTRACT, ids, "fit", turn, k, vector, params, history)

    async def agree(self, parties: Sequence[Daemon], mine: bytes, k: int = 0, turn: int = 1) -> bytes:
        return await self.aggregation.agree(CONTRACT, [party.id for party in parties], "fit", turn, k, mine)

    def files(self) -> list[Path]:
        fetched = self.folder / "fetched" / CONTRACT.hex()
        return [*self.store.files.iterdir(), *(fetched.iterdir() if fetched.exists() else ())]

    def rows(self) -> int:
        return int(self.store.write_now(lambda tx: tx.one("SELECT COUNT(*) FROM aggregation_sum"))[0])


def vector_of(name: str, k: int, count: int = COUNT) -> masks.Vector:
    return np.random.default_rng([*name.encode(), k]).integers(0, 2**16, count, np.uint32)


def expected(parties: Sequence[Daemon], k: int, count: int = COUNT) -> list[int]:
    total: list[int] = sum(vector_of(party.name, k, count).astype(np.uint64) for party in parties).tolist()  # type: ignore[union-attr]
    return total


@pytest.fixture
def home() -> Iterator[Path]:
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fedpeer-sums-", dir=memory if memory.is_dir() else None))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork()


async def introduced(home: Path, network: MemoryNetwork, *names: str, **threads: RunInThread) -> list[Daemon]:
    """Daemons that know each other and have the contract's scope open; their meshes do not run yet."""
    daemons = [Daemon(name, home, network) for name in names]
    for daemon in daemons:
        daemon.open(**threads)
        for other in daemons:
            if other is not daemon:
                await daemon.mesh.add_peer(other.card)
        ids = [other.id for other in daemons]
        await daemon.store.write(partial(daemon.mesh.open_scope, scope=CONTRACT, audience=ids))
    return daemons


async def together(daemons: Sequence[Daemon], work: Callable[[Daemon], Awaitable[Any]]) -> list[Any]:
    """What `work` gave at each daemon, or the FedpeerError that it raised; all meshes run until all are done."""
    results: dict[str, Any] = {}
    all_done = trio.Event()

    async def one(daemon: Daemon) -> None:
        try:
            results[daemon.name] = await work(daemon)
        except FedpeerError as error:
            results[daemon.name] = error
        if len(results) == len(daemons):
            all_done.set()
        await all_done.wait()

    async with trio.open_nursery() as nursery:
        for daemon in daemons:
            nursery.start_soon(daemon.live, partial(one, daemon))
    return [results[daemon.name] for daemon in daemons]


@pytest.mark.parametrize("names", [["alice", "bob", "carol"], ["alice", "bob", "carol", "dave", "erin"]], ids=len)
async def test_everybody_gets_the_exact_sum(
    names: list[str], home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, *names)
    for total in await together(daemons, lambda daemon: daemon.sum(daemons)):
        assert total.values.tolist() == expected(daemons, 0)
        assert total.values.dtype == np.uint32
        assert total.survivors == [daemon.id for daemon in daemons]
    assert [[event["k"] for event in daemon.events if event["event"] == "sum"] for daemon in daemons] == [[0]] * len(
        daemons
    )


async def test_a_vector_of_several_segments_is_summed(home: Path, network: MemoryNetwork, autojump_clock: Any) -> None:
    daemons = await introduced(home, network, "alice", "bob", "carol")
    count = 2 * masks.SEGMENT + 5
    vectors = {daemon.name: vector_of(daemon.name, 0, count) for daemon in daemons}
    for total in await together(daemons, lambda daemon: daemon.sum(daemons, vector=vectors[daemon.name])):
        assert total.values.tolist() == expected(daemons, 0, count)


async def test_sums_run_with_real_threads(home: Path, network: MemoryNetwork) -> None:
    async def in_store_thread(function: Callable[[], Any], /) -> Any:
        return await trio.to_thread.run_sync(function, limiter=one_at_a_time)

    async def in_thread(function: Callable[[], Any], /) -> Any:
        return await trio.to_thread.run_sync(function)

    one_at_a_time = trio.CapacityLimiter(1)
    daemons = await introduced(
        home, network, "alice", "bob", "carol", run_in_thread=in_thread, store_thread=in_store_thread
    )
    for total in await together(daemons, lambda daemon: daemon.sum(daemons)):
        assert total.values.tolist() == expected(daemons, 0)


async def test_what_lies_on_disk_and_travels_is_uniform(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    """Everybody holds the same constant; neither a masked vector nor a part of them shows it."""
    daemons = await introduced(home, network, "alice", "bob", "carol")
    constant = np.full(20_000, 5, np.uint32)
    seen: list[bytes] = []

    async def work(daemon: Daemon) -> None:
        await daemon.sum(daemons, vector=constant)
        seen.extend(path.read_bytes()[masks.LABEL_BYTES :] for path in daemon.files())

    await together(daemons, work)
    assert len(set(seen)) == 3
    assert len(seen) == 9
    assert all(looks_uniform(data) for data in seen)


async def test_a_later_sum_leaves_nothing_of_earlier_ones(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, "alice", "bob", "carol")
    left: list[tuple[set[str], int, int]] = []

    async def work(daemon: Daemon) -> None:
        for k in range(4):
            await daemon.agree(daemons, b"v" * (INLINE_BYTES + 1), 2 * k)
            await daemon.sum(daemons, 2 * k + 1)
        left.append(
            (
                {slot for kind in ("key", "masked", "agreed") for slot, _ in daemon.mesh.held(CONTRACT, kind)},
                len(daemon.files()),
                daemon.rows(),
            )
        )

    await together(daemons, work)
    assert left == [({"fit/1/7/0"}, 3, 1)] * 3


async def test_records_of_what_is_over_are_not_taken_again(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    alice, bob, carol = daemons = await introduced(home, network, "alice", "bob", "carol")
    slots = ["fit/1/0/5", "fit/0/9/0", "no slot", "fit/1/1/64", "fit/1/1/1", "fit/2/0/0", "other/0/0/0"]

    async def work(daemon: Daemon) -> None:
        for k in range(2):
            await daemon.sum(daemons, k)
        await trio.sleep(5)
        if daemon is bob:
            for slot in slots:
                await bob.store.write(lambda tx, slot=slot: bob.mesh.publish(tx, CONTRACT, "key", slot, b"late"))  # type: ignore[misc]
            await bob.store.write(lambda tx: bob.mesh.publish(tx, CONTRACT, "countersign", "no slot", b"of others"))
        await trio.sleep(5)

    await together(daemons, work)
    for daemon in (alice, carol):
        taken = [slot for slot, sender in daemon.mesh.held(CONTRACT, "key") if sender == bob.id]
        assert taken == ["fit/1/1/0", "fit/1/1/1", "fit/2/0/0", "other/0/0/0"]
        assert daemon.mesh.held(CONTRACT, "countersign") == {("no slot", bob.id): b"of others"}


async def test_nothing_is_left_when_the_contract_is_over(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, "alice", "bob", "carol")

    def over(daemon: Daemon, tx: Any) -> None:
        daemon.aggregation.forget(tx, CONTRACT)
        daemon.mesh.close_scope(tx, CONTRACT)

    async def work(daemon: Daemon) -> None:
        await daemon.sum(daemons)
        await daemon.agree(daemons, b"v" * (INLINE_BYTES + 1), 1)
        await trio.sleep(5)  # the others are done, too
        await daemon.store.write(partial(over, daemon))
        assert daemon.files() == []
        assert daemon.rows() == 0

    assert await together(daemons, work) == [None] * 3


# restarts and cuts


async def sums_with_kills(home: Path, seed: int) -> tuple[int, int]:
    """Three sums by three to five daemons, some of them killed and started again. (kills, highest attempt)"""
    random = Random(seed)
    network = MemoryNetwork(random=random)
    network.limits = lambda _from, _to: (breaks(), breaks())
    names = ["alice", "bob", "carol", "dave", "erin"][: random.randint(3, 5)]
    daemons = await introduced(home, network, *names)
    sums, kills, attempts = 3, 0, [0]
    finished: set[str] = set()
    everybody = trio.Event()

    def breaks() -> int | None:
        return random.randrange(100, 60_000) if random.random() < 0.3 else None

    async def stage(daemon: Daemon) -> None:
        while len(daemon.journal) < sums:
            k = len(daemon.journal)
            total = await daemon.sum(daemons, k, history=hash_("fp.test", repr(daemon.journal).encode()))
            daemon.journal.append(total.values.tolist())
            attempts.append(max(event.get("attempt", 0) for event in daemon.events))
        finished.add(daemon.name)
        if len(finished) == len(daemons):
            everybody.set()
        await everybody.wait()

    async def lifetime(daemon: Daemon) -> None:
        while not everybody.is_set():
            if not daemon.is_open:
                daemon.open()
            await daemon.live(partial(stage, daemon))
            await trio.sleep(random.random())

    async with trio.open_nursery() as nursery:
        for daemon in daemons:
            nursery.start_soon(lifetime, daemon)
        for _ in range(random.randint(2, 12)):
            await trio.sleep(random.choice([0, 0, random.random() / 10, random.random()]))
            for _ in range(random.randrange(150)):  # hardly any time passes while they work: count their steps
                await trio.lowlevel.checkpoint()
            if random.random() < 0.3:
                a, b = random.sample(names, 2)
                network.cut(a, b)
                await trio.sleep(random.random())
                network.heal(a, b)
            elif (daemon := random.choice(daemons)).is_open and not everybody.is_set():
                daemon.scope.cancel()
                kills += 1
        await everybody.wait()
    for daemon in daemons:
        assert daemon.journal == [expected(daemons, k) for k in range(sums)]
    return kills, max(attempts)


@pytest.mark.parametrize("block", range(3))
async def test_sums_are_exact_whoever_is_killed_and_whatever_is_cut(
    block: int, home: Path, seed: int, autojump_clock: Any
) -> None:
    kills = repeated = 0  # of federations that tried again
    for number in range(8 * block, 8 * (block + 1)):
        print(f"federation {number} of FEDPEER_SEED={seed}")
        with trio.fail_after(3600):
            killed, attempt = await sums_with_kills(home / str(number), 1_000_003 * seed + number)
        kills, repeated = kills + killed, repeated + (attempt > 0)
    assert kills > 16
    assert repeated > 2


async def killed_before_the_others_came(daemons: Sequence[Daemon]) -> Daemon:
    """The first one has begun a sum alone, and was started again."""
    alice = daemons[0]
    with trio.move_on_after(5):
        await alice.live(lambda: alice.sum(daemons))  # type: ignore[arg-type, return-value]
    assert [slot for slot, _ in alice.mesh.held(CONTRACT, "key")] == ["fit/1/0/0"]
    alice.open()
    return alice


async def test_who_lost_its_key_makes_all_try_again(home: Path, network: MemoryNetwork, autojump_clock: Any) -> None:
    daemons = await introduced(home, network, "alice", "bob", "carol")
    await killed_before_the_others_came(daemons)
    for total in await together(daemons, lambda daemon: daemon.sum(daemons)):
        assert total.values.tolist() == expected(daemons, 0)
    assert {event["attempt"] for daemon in daemons for event in daemon.events if event["event"] == "sum"} == {1}


async def test_other_values_for_the_same_sum_are_refused_before_they_leave(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, "alice", "bob", "carol")
    alice = await killed_before_the_others_came(daemons)
    before = dict(alice.mesh.held(CONTRACT, "key"))
    for change in ({"vector": vector_of("mallory", 0)}, {"params": b"other"}, {"history": b"x" * 32}):
        with pytest.raises(NotDeterministic, match="sum 0 of turn 1 of stage 'fit'"):
            await alice.sum(daemons, **change)  # type: ignore[arg-type]
    assert alice.mesh.held(CONTRACT, "key") == before
    for daemon in daemons:
        daemon.store.close()


async def test_a_decided_sum_asked_again_gives_the_same(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, "alice", "bob", "carol")
    first = await together(daemons, lambda daemon: daemon.sum(daemons))
    for daemon in daemons:
        daemon.open()
    records = [daemons[0].mesh.held(CONTRACT, kind) for kind in ("key", "masked")]
    again = await together(daemons, lambda daemon: daemon.sum(daemons))
    assert [total.values.tolist() for total in again] == [total.values.tolist() for total in first]
    assert [daemons[0].mesh.held(CONTRACT, kind) for kind in ("key", "masked")] == records


# what is refused


async def test_two_parties_are_refused_and_nothing_is_sent(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, "alice", "bob")
    for error in await together(daemons, lambda daemon: daemon.sum(daemons)):
        assert isinstance(error, SumError)
        assert "over 2 parties" in error.message
    assert daemons[0].mesh.held(CONTRACT, "key") == {}


@pytest.mark.parametrize(
    ("change", "says"), [({"history": b"x" * 32}, "another history"), ({"params": b"other"}, "something else")]
)
async def test_a_peer_that_would_sum_something_else_is_named(
    change: dict[str, bytes], says: str, home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, "alice", "bob", "carol")
    bob = daemons[1]
    errors = await together(daemons, lambda daemon: daemon.sum(daemons, **(change if daemon is bob else {})))  # type: ignore[arg-type]
    for daemon, error in zip(daemons, errors, strict=True):
        assert isinstance(error, SumError)
        assert says in error.message
        if daemon is not bob:
            assert error.message.startswith("bob ")
            assert error.peer == bob.id
        assert daemon.mesh.held(CONTRACT, "masked") == {}


async def mallory_sends(
    daemon: Daemon, daemons: Sequence[Daemon], data: Callable[[Mask], bytes], spoilt: bool = False
) -> None:
    """One party that keeps to the protocol, save for the bytes of its masked vector, or their digest."""
    slot = Slot("fit", 1, 0)
    ids = [party.id for party in daemons]
    one = Sum(CONTRACT, slot, ids, daemon.id, HISTORY, hash_("fp.sa1.prm", b"params"), COUNT)
    while True:
        match one.next(daemon.mesh.held(CONTRACT, "key"), daemon.mesh.held(CONTRACT, "masked")):
            case Begin(attempt):
                body = one.begin(attempt, Secret.random())
                await daemon.store.write(lambda tx: daemon.mesh.publish(tx, CONTRACT, "key", str(slot), body))  # noqa: B023
            case Mask() as step:
                lie = data(step)
                digest = await daemon.store.put_file(lie)
                body = codec.encode(MaskedRecord(step.context, digest, masks.masked_bytes(COUNT)))

                def publish(tx: Any, digest: bytes = digest, size: int = len(lie), body: bytes = body) -> None:
                    daemon.mesh.offer(tx, CONTRACT, digest, size)
                    daemon.mesh.publish(tx, CONTRACT, "masked", str(slot), body)

                await daemon.store.write(publish)
                if spoilt:
                    daemon.store.remove_file(digest)
                    daemon.store.path_of(digest).write_bytes(lie[::-1])
                return
            case _:
                await daemon.mesh.changed(CONTRACT)


async def test_a_file_that_is_no_masked_vector_of_this_sum_names_its_peer_and_is_kept_out(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, "alice", "bob", "mallory")
    mallory = daemons[2]

    async def work(daemon: Daemon) -> Any:
        if daemon is mallory:
            return await mallory_sends(mallory, daemons, lambda step: bytes(masks.masked_bytes(COUNT)))
        return await daemon.sum(daemons)

    for error in (await together(daemons, work))[:2]:
        assert isinstance(error, SumError)
        assert error.message == "mallory: the bytes are not the masked vector of this sum"
        assert error.peer == mallory.id


async def test_a_file_that_does_not_fit_its_digest_ends_the_sum(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, "alice", "bob", "mallory")
    mallory = daemons[2]

    async def work(daemon: Daemon) -> Any:
        if daemon is not mallory:
            return await daemon.sum(daemons)
        return await mallory_sends(
            mallory,
            daemons,
            lambda step: bytes(masks.mask(vector_of("mallory", 0), step.masks, step.label)),
            spoilt=True,
        )

    for error in (await together(daemons, work))[:2]:
        assert isinstance(error, TrustError)
        assert error.message == "mallory sent another file than it offered"


async def test_a_masked_vector_copied_from_another_names_the_copier(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, "alice", "bob", "mallory")
    mallory = daemons[2]

    async def work(daemon: Daemon) -> Any:
        if daemon is not mallory:
            return await daemon.sum(daemons)
        return await mallory_sends(
            mallory,
            daemons,
            lambda step: bytes(masks.mask(vector_of("mallory", 0), step.masks, masks.label(step.context, 0))),
        )

    for error in (await together(daemons, work))[:2]:
        assert isinstance(error, SumError)
        assert error.peer == mallory.id


# agreed values


@pytest.mark.parametrize("size", [0, 10, INLINE_BYTES, INLINE_BYTES + 1, 300_000])
@pytest.mark.parametrize("n", [2, 4])
async def test_all_take_the_value_of_one(
    size: int, n: int, home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, *["alice", "bob", "carol", "dave"][:n])
    values = {daemon.id: Random(daemon.name).randbytes(size) for daemon in daemons}
    for k in range(3):
        leader = proposer(CONTRACT, Slot("fit", 1, k), list(values))
        agreed = await together(daemons, lambda daemon, k=k: daemon.agree(daemons, values[daemon.id], k))  # type: ignore[misc]
        assert agreed == [values[leader]] * n
        for daemon in daemons:
            daemon.open()
    for daemon in daemons:
        daemon.store.close()


async def test_the_first_value_that_was_proposed_stays(home: Path, network: MemoryNetwork, autojump_clock: Any) -> None:
    daemons = await introduced(home, network, "alice", "bob", "carol")
    first = await together(daemons, lambda daemon: daemon.agree(daemons, b"first"))
    for daemon in daemons:
        daemon.open()
    again = await together(daemons, lambda daemon: daemon.agree(daemons, b"again"))
    assert first == again == [b"first"] * 3


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (codec.encode(AgreedRecord(None, bytes(32), 1 << 30)), "proposed a value of 1073741824 bytes"),
        (codec.encode(AgreedRecord(None, bytes(32), 5)), "proposed a value of 5 bytes"),
        (codec.encode([1, 2]), "not a AgreedRecord"),
    ],
)
async def test_a_proposal_that_cannot_be_is_refused_by_the_name_of_its_peer(
    body: bytes, says: str, home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, "alice", "bob", "carol")
    leader = proposer(CONTRACT, Slot("fit", 1, 0), [daemon.id for daemon in daemons])

    async def work(daemon: Daemon) -> Any:
        if daemon.id == leader:
            return await daemon.store.write(lambda tx: daemon.mesh.publish(tx, CONTRACT, "agreed", "fit/1/0/0", body))
        return await daemon.agree(daemons, b"mine")

    errors = [result for result in await together(daemons, work) if result is not None]
    assert len(errors) == 2
    for error in errors:
        assert isinstance(error, RemoteProtocolError)
        assert says in error.message
        assert error.peer == leader


async def test_a_proposed_file_that_belongs_to_something_else_is_not_taken(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, "alice", "bob", "carol")
    leader = proposer(CONTRACT, Slot("fit", 1, 0), [daemon.id for daemon in daemons])
    data = b"another file of the leader's" * 10

    async def work(daemon: Daemon) -> Any:
        if daemon.id != leader:
            return await daemon.agree(daemons, b"mine")
        digest = await daemon.store.put_file(data)

        def publish(tx: Any) -> None:
            daemon.mesh.offer(tx, CONTRACT, digest, len(data))
            body = codec.encode(AgreedRecord(None, digest, len(data)))
            daemon.mesh.publish(tx, CONTRACT, "agreed", "fit/1/0/0", body)

        return await daemon.store.write(publish)

    errors = [result for result in await together(daemons, work) if result is not None]
    assert len(errors) == 2
    for error in errors:
        assert isinstance(error, RemoteProtocolError)
        assert "belong to something else" in error.message
        assert error.peer == leader


async def test_a_sum_in_a_scope_that_is_not_open_is_an_error_of_the_program(home: Path, network: MemoryNetwork) -> None:
    daemons = await introduced(home, network, "alice", "bob", "carol")
    with pytest.raises(LocalProtocolError):
        await daemons[0].aggregation.sum(
            b"d" * 32, [d.id for d in daemons], "fit", 0, 0, vector_of("alice", 0), b"", HISTORY
        )
    for daemon in daemons:
        daemon.store.close()
