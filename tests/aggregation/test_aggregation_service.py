"""Sums over real meshes on a network in memory: who is there, who is not, restarts, cuts, and what is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import trio
from sums_cast import (
    CONTRACT,
    HISTORY,
    NAMES,
    STALL_S,
    Daemon,
    expected,
    introduced,
    open_scope,
    together,
    until,
    vector_of,
)

from fedpeer.aggregation import ahead, party, service, slices, vectors
from fedpeer.aggregation.keyset import HeldShare, KeySet
from fedpeer.aggregation.messages import Signed, parse, sign
from fedpeer.aggregation.request import Terms, Total
from fedpeer.aggregation.seat import Seat, Step
from fedpeer.aggregation.service import KIND, _slot, root_of
from fedpeer.aggregation.work import Add
from fedpeer.crypto import hash_
from fedpeer.errors import (
    BelowQuorum,
    LocalProtocolError,
    NotDeterministic,
    RemoteProtocolError,
    StoreError,
    SumError,
    SumIsNoise,
    SumLost,
    SurvivorsChanged,
)
from fedpeer.mesh import blobs, records
from fedpeer.testing.network import MemoryNetwork
from fedpeer.testing.uniformity import looks_uniform


@pytest.mark.parametrize(("n", "profile"), [(3, "byz"), (4, "byz"), (4, "crash"), (5, "byz")])
async def test_everybody_gets_the_exact_sum(
    n: int, profile: Any, home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, *NAMES[:n])
    for total in await together(daemons, lambda daemon: daemon.sum(daemons, profile=profile)):
        assert total.values.tolist() == expected(daemons)
        assert total.values.dtype == np.uint32
        assert total.survivors == [daemon.id for daemon in daemons]
    for daemon in daemons:
        assert {"started", "scattered", "committed", "released", "opened", "final"} <= set(daemon.steps())
        assert not {"aborted", "noise"} & set(daemon.steps())
    assert trio.current_time() < 2, "nothing waited for a timer"


async def test_a_vector_of_several_segments_is_summed(home: Path, network: MemoryNetwork, autojump_clock: Any) -> None:
    daemons = await introduced(home, network, *NAMES[:3])
    count = 3 * vectors.SEGMENT + 5
    parts = {daemon.name: vector_of(daemon.name, 0, count) for daemon in daemons}
    for total in await together(daemons, lambda daemon: daemon.sum(daemons, vector=parts[daemon.name], used=count)):
        assert total.values.tolist() == expected(daemons, 0, count)


async def test_sums_run_with_real_threads(home: Path, network: MemoryNetwork) -> None:
    async def in_store_thread(function: Callable[[], Any], /) -> Any:
        return await trio.to_thread.run_sync(function, limiter=one_at_a_time)

    async def in_thread(function: Callable[[], Any], /) -> Any:
        return await trio.to_thread.run_sync(function)

    one_at_a_time = trio.CapacityLimiter(1)
    threads: dict[str, Any] = {"run_in_thread": in_thread, "store_thread": in_store_thread}
    daemons = await introduced(home, network, *NAMES[:3], **threads)

    async def work(daemon: Daemon) -> list[list[int]]:
        return [(await daemon.sum(daemons, k)).values.tolist() for k in range(2)]

    for totals in await together(daemons, work):
        assert totals == [expected(daemons, k) for k in range(2)]


@pytest.mark.parametrize(("shape", "n"), [("line", 3), ("star", 5), ("line", 5)])
async def test_not_every_pair_need_be_connected(
    shape: str, n: int, home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    names = NAMES[:n]
    daemons = await introduced(home, network, *names)
    edges = list(pairwise(names)) if shape == "line" else [(names[0], name) for name in names[1:]]
    for a, b in combinations(names, 2):
        if (a, b) not in edges:
            network.cut(a, b)
    totals = await together(daemons, lambda daemon: daemon.sum(daemons))
    (survivors,) = {tuple(total.survivors) for total in totals}
    for total in totals:
        assert total.values.tolist() == expected([daemon for daemon in daemons if daemon.id in survivors])
    if (shape, n) != ("line", 5):  # files pass over one peer, not over two: there it takes some attempts
        assert len(survivors) == n, "nobody was left out for being far"
        assert trio.current_time() < 5


async def test_what_lies_on_disk_and_travels_before_the_end_is_uniform(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    """Everybody holds the same constant; neither a masked vector, nor a part of one, nor a sum of them shows it."""
    daemons = await introduced(home, network, *NAMES[:3])
    used = 3 * 20_224 - 4
    constant = np.pad(np.full(used, 5, np.uint32), (0, 4))
    seen: dict[str, bytes] = {}

    def look(_event: Any) -> None:
        for daemon in daemons:
            seen.update((path.name, path.read_bytes()) for path in daemon.files() if path.suffix == "")

    for daemon in daemons:
        daemon.aggregation.events.subscribe(look)
    totals = await together(daemons, lambda daemon: daemon.sum(daemons, vector=constant, used=used))
    (total,) = {bytes(vectors.pack(total.values, 24)) for total in totals}
    masked = [data for data in seen.values() if data != total]
    assert len(masked) == 3 * 3 + 3, "each of three contributors to each of three owners; the sums"
    assert all(looks_uniform(data) for data in masked)
    assert not looks_uniform(total)


# who is not there


async def test_the_others_go_on_without_one_that_never_comes(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    *here, erin = daemons = await introduced(home, network, *NAMES)
    for total in await together(here, lambda daemon: daemon.sum(daemons)):
        assert total.survivors == [daemon.id for daemon in here]
        assert total.values.tolist() == expected(here)
    assert trio.current_time() < 60
    erin.store.close()


@pytest.mark.parametrize(("late_s", "waited_for"), [(15.0, True), (40.0, False)])
async def test_who_needs_a_quarter_longer_for_its_turn_is_waited_for(
    late_s: float, waited_for: bool, home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    *fast, erin = daemons = await introduced(home, network, *NAMES)

    async def work(daemon: Daemon) -> Any:
        await daemon.sum(daemons, turn=1)
        await trio.sleep(80.0 + (late_s if daemon is erin else 0.0))
        return await daemon.sum(daemons, turn=2)

    for total in await together(daemons, work):
        assert total.survivors == [daemon.id for daemon in (daemons if waited_for else fast)]


@pytest.mark.parametrize("sums_before", [0, 1])
async def test_a_vector_that_does_not_come_is_waited_for_as_long_as_the_network_was_seen_to_need(
    sums_before: int, home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    count = 2_000_000  # 6 MB a vector: 21 s at the rate that is taken for granted
    *here, erin = daemons = await introduced(home, network, *NAMES)
    begun: list[float] = []

    def killed(event: Any) -> None:
        if event.get("step") == "started" and event["turn"] == sums_before + 1:
            begun.append(trio.current_time())
            erin.scope.cancel()

    erin.aggregation.events.subscribe(killed)

    async def work(daemon: Daemon) -> Any:
        for turn in range(1, sums_before + 2):
            vector = vector_of(daemon.name, 0, count)
            total = await daemon.sum(daemons, turn=turn, vector=vector, used=count)
        if daemon is erin:
            await trio.sleep_forever()
        return total

    async with trio.open_nursery() as nursery:
        nursery.start_soon(erin.live, partial(work, erin))
        for total in await together(here, work):
            assert total.survivors == [daemon.id for daemon in here]
        nursery.cancel_scope.cancel()
    waited = trio.current_time() - begun[0]
    assert (waited < 60.0) is (sums_before > 0)  # erin owned a slice: the attempt ends without a sum, then another


@pytest.mark.parametrize("profile", ["byz", "crash"])
async def test_one_that_vanishes_after_it_contributed_still_counts_and_one_that_did_not_is_left_out(
    profile: Any, home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    results: dict[str, list[list[str]]] = {}
    for number, step in enumerate(["started", "scattered", "committed"]):
        folder = home / str(number)
        *here, erin = daemons = await introduced(folder, network, *NAMES)

        def killed(event: Any, step: str = step, erin: Daemon = erin) -> None:
            if event.get("step") == step:
                erin.scope.cancel()

        erin.aggregation.events.subscribe(killed)

        async def work(daemon: Daemon, daemons: Sequence[Daemon] = daemons, erin: Daemon = erin) -> Any:
            total = await daemon.sum(daemons, profile=profile)
            if daemon is erin:
                await trio.sleep_forever()
            return total

        async with trio.open_nursery() as nursery:
            nursery.start_soon(erin.live, partial(work, erin))
            totals = await together(here, work)
            nursery.cancel_scope.cancel()
        for total in totals:
            survivors = [daemon for daemon in daemons if daemon.id in total.survivors]
            assert total.values.tolist() == expected(survivors)
            results.setdefault(step, []).append([daemon.name for daemon in survivors])
    assert results["committed"] == [NAMES] * 4
    assert results["started"] == [NAMES[:4]] * 4
    assert all(survivors in (NAMES, NAMES[:4]) for survivors in results["scattered"])


async def test_three_wait_for_one_that_is_absent_and_end_by_its_name(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    *here, carol = daemons = await introduced(home, network, *NAMES[:3])
    for error in await together(here, lambda daemon: daemon.sum(daemons)):
        assert isinstance(error, BelowQuorum)
        assert "too few participants answered; missing: carol" in error.message
    assert STALL_S <= trio.current_time() < STALL_S + 10
    assert all(daemon.steps() == [] for daemon in here), "nothing was masked"
    carol.store.close()


async def test_a_sum_that_waits_says_truthfully_who_is_missing_and_who_has_another_history(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    *here, erin = daemons = await introduced(home, network, *NAMES)

    async def work(daemon: Daemon) -> Total:
        return await daemon.sum(daemons, history=b"x" * 32 if daemon is here[3] else HISTORY)

    *alike, dave = await together(here, work)
    for error in (*alike, dave):
        assert isinstance(error, BelowQuorum)
        _, _, why = error.message.partition("too few participants answered; missing: erin; ")
        differing = "alice, bob, carol" if error is dave else "dave"
        assert why == f"with another history or other parameters: {differing}"
    erin.store.close()


async def test_the_same_statistic_asked_again_after_one_left_waits_and_ends_by_name_never_with_a_difference(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    *here, dave = daemons = await introduced(home, network, *NAMES[:4])
    same = {daemon.name: vector_of(daemon.name, 0) for daemon in daemons}

    async def first(daemon: Daemon) -> Total:
        return await daemon.sum(daemons, 0, group="data", vector=same[daemon.name])

    for total in await together(daemons, first):
        assert len(total.survivors) == 4
    for daemon in here:
        daemon.open()
    began = trio.current_time()
    before = {daemon.name: 0 for daemon in here}

    async def again(daemon: Daemon) -> Total:
        before[daemon.name] = len(daemon.messages("SCATTER", daemon))
        try:
            return await daemon.sum(daemons, 1, group="data", vector=same[daemon.name])
        finally:
            assert len(daemon.messages("SCATTER", daemon)) == before[daemon.name]

    for error in await together(here, again):
        assert isinstance(error, SurvivorsChanged)
        assert "waited 600 s for dave: over other participants it would tell their values" in error.message
        assert "new contract" in error.hint
    assert STALL_S <= trio.current_time() - began < STALL_S + 10
    assert not dave.is_open


async def test_who_was_left_out_gets_the_total_when_it_is_back(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    *here, erin = daemons = await introduced(home, network, *NAMES)
    late = trio.Event()

    async def work(daemon: Daemon) -> Total:
        if daemon is erin:
            await late.wait()
        total = await daemon.sum(daemons)
        late.set()
        return total

    for name in NAMES[:4]:
        network.cut(name, "erin")

    async def heal() -> None:
        await late.wait()
        for name in NAMES[:4]:
            network.heal(name, "erin")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(heal)
        totals = await together(daemons, work)
    for total in totals:
        assert total.survivors == [daemon.id for daemon in here]
        assert total.values.tolist() == expected(here)


async def test_a_total_among_the_files_of_another_contract_is_not_relied_on_for_it_goes_with_that_contract(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    """Two contracts over the same rows have the same total."""
    alice, bob, _ = daemons = await introduced(home, network, *NAMES[:3])
    ids, total = [daemon.id for daemon in daemons], bytes(3072)
    root, name = root_of(CONTRACT, ids), slices.sum_hash(total)
    for daemon in (alice, bob):
        daemon.store.put_file_now(total, name)
    bob.store.write_now(lambda tx: bob.mesh.files.offer(tx, root, name, len(total)))

    async def work(daemon: Daemon) -> None:
        if daemon is alice:
            driver = await alice.aggregation._driver(CONTRACT, ids, Terms("byz", 3, STALL_S))
            await driver._fetch(name, len(total), [1], slices.sum_hash)
            alice.store.claimed(name)
            alice.store.remove_file(name)  # the other contract is over
            assert driver.read(name) == total

    assert await together(daemons, work) == [None] * 3


async def test_who_comes_late_takes_the_total_that_it_made_itself_and_offers_it(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    """Others had finished before it could say so; nobody sends it what it has."""
    alice, *_ = daemons = await introduced(home, network, *NAMES[:3])
    ids, total = [daemon.id for daemon in daemons], bytes(3072)
    root, name = root_of(CONTRACT, ids), slices.sum_hash(total)

    async def work(daemon: Daemon) -> None:
        if daemon is alice:
            driver = await alice.aggregation._driver(CONTRACT, ids, Terms("byz", 3, STALL_S))
            driver.write(name, total)
            with trio.fail_after(60):
                await driver._fetch(name, len(total), [1, 2], slices.sum_hash)  # neither of them has it
            assert driver.read(name) == total
            assert await alice.store.read(lambda tx: blobs.offered(tx, root, name))

    assert await together(daemons, work) == [None] * 3


# what is left behind


async def test_many_turns_leave_no_more_than_the_last_ones(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, *NAMES[:4])
    old: dict[str, dict[tuple[str, str], bytes]] = {}
    left: dict[str, list[tuple[int, int, int, int]]] = {daemon.name: [] for daemon in daemons}

    async def work(daemon: Daemon) -> None:
        for turn in range(1, 6):
            for k in range(2):
                await daemon.sum(daemons, k, turn=turn)
            (driver,) = daemon.aggregation._drivers.values()
            old.setdefault(daemon.name, daemon.held())
            await trio.sleep(40)  # neighbours looked around: what is over did not come back
            left[daemon.name].append(
                (
                    len(daemon.files()),
                    len(daemon.rows("mesh_record")) // 50,
                    len(daemon.rows("aggregation_secret")),
                    len(driver._paths),
                )
            )

        before = daemon.held()
        other = daemons[0] if daemon is daemons[1] else daemons[1]
        for (slot, sender), body in old[other.name].items():  # as from one that was away and has it still
            if sender == other.id and not slot.count("/SCATTER/") + slot.count("/SHARE/"):
                record = records.seal(
                    records.Record(root_of(CONTRACT, [d.id for d in daemons]), KIND, slot, sender, body)
                )
                await daemon.mesh.record_came(daemon.connections.sessions[other.id], record.raw)
        assert daemon.held().keys() == before.keys()

    assert await together(daemons, work) == [None] * 4
    for counts in left.values():
        assert counts[-1] == counts[2], "what a turn leaves goes with a later one"
        files, _, secrets, paths = counts[-1]
        assert (files, secrets, paths) == (2, 0, 0)


async def test_one_that_is_gone_for_good_costs_the_others_no_more_than_the_last_turns(
    home: Path, network: MemoryNetwork, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(party, "KEPT_MESSAGES", 3 * (20 + 2 * 5))  # three sums
    *here, erin = daemons = await introduced(home, network, *NAMES)
    left: list[int] = []

    async def work(daemon: Daemon) -> None:
        for turn in range(1, 9):
            await daemon.sum(daemons, turn=turn)
            if daemon is here[0]:
                left.append(len({slot[:33] for slot, _ in daemon.held()}))

    await together(here, work)
    assert max(left) == left[-1] <= 3 + 2, "three, the last one, and the one that all have just passed"
    assert len(here[0].files()) <= 5
    erin.store.close()


@pytest.mark.parametrize("error", [LocalProtocolError, RemoteProtocolError])
async def test_what_the_protocol_does_not_allow_ends_the_sums_of_its_contract_by_name_and_no_daemon(
    home: Path, network: MemoryNetwork, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    alice, *_ = daemons = await introduced(home, network, *NAMES[:4])
    advance = party.Party.advance

    def broken(self: party.Party, now: float) -> Any:
        if self.setting.me == 1:
            raise error("a message that nobody would take")
        return advance(self, now)

    async def work(daemon: Daemon) -> None:
        if daemon is alice:
            with pytest.raises(SumError, match="the sums of this contract cannot go on here: a message that nobody"):
                await daemon.sum([daemons[1], alice, *daemons[2:]])

    monkeypatch.setattr(party.Party, "advance", broken)
    assert await together(daemons, work) == [None] * 4


async def test_one_that_is_many_turns_behind_comes_to_every_sum_though_it_had_no_room_for_what_was_ahead(
    home: Path, network: MemoryNetwork, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "MAX_AHEAD", 4000)
    *here, erin = daemons = await introduced(home, network, *NAMES)
    far = trio.Event()

    async def work(daemon: Daemon) -> list[list[float]]:
        await daemon.sum(daemons, turn=1)
        if daemon is erin:
            await far.wait()
        totals = [(await daemon.sum(daemons, turn=turn)).values.tolist() for turn in range(2, 7)]
        far.set()
        return totals

    *totals, of_erin = await together(daemons, work)
    assert of_erin == totals[0] == [expected(here)] * 5


def secrets_of(driver: Any) -> Iterator[bytes]:
    """What the disk keeps of one party, unsealed."""
    kept, _ = driver._store.write_now(driver._load)
    for key, raw in kept.items():
        if key[32:36] == b"keys":
            keys = KeySet.from_bytes(raw)
            yield from (secret.reveal() for secret in (keys.b, keys.sigma))
        else:
            share = HeldShare.from_bytes(raw)
            yield from (entry[1] for entry in (share.opened("b"), share.opened("s")))


async def test_secrets_are_sealed_on_disk_while_they_are_needed_and_erased_at_the_end(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, *NAMES[:4])
    revealed: set[bytes] = set()
    seen: dict[str, int] = {}

    def look(_event: Any) -> None:
        for daemon in daemons:
            rows = daemon.rows("aggregation_secret")
            seen[daemon.name] = max(seen.get(daemon.name, 0), len(rows))
            if rows:
                opened = {signed.message.secret for signed in daemon.messages("OPEN")}
                on_disk = b"".join(path.read_bytes() for path in daemon.folder.glob("fedpeer.sqlite*"))
                for driver in daemon.aggregation._drivers.values():
                    for raw in secrets_of(driver):
                        revealed.add(raw)
                        assert raw in opened or raw not in on_disk

    for daemon in daemons:
        daemon.aggregation.events.subscribe(look)

    async def work(daemon: Daemon) -> int:
        await daemon.sum(daemons)
        return len(daemon.rows("aggregation_secret"))

    assert await together(daemons, work) == [0] * 4
    assert min(seen.values()) >= 4, "own keys, and a share of each other party"
    assert len(revealed) >= 4 * 2 + 4 * 3 * 2


@pytest.mark.parametrize("ends", ["with a sum", "waiting"])
async def test_nothing_is_left_when_the_contract_is_over(
    ends: str, home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, *NAMES[:4])
    asking = daemons if ends == "with a sum" else daemons[:2]

    async def work(daemon: Daemon) -> list[Any]:
        if daemon in asking:
            try:
                await daemon.sum(daemons)
            except SumError:
                assert ends == "waiting"
        await trio.sleep(STALL_S + 60)  # the others are done, too
        await daemon.forget()
        await trio.sleep(1)
        tables = ("aggregation_sum", "aggregation_party", "aggregation_secret", "aggregation_lost", "mesh_record")
        assert not daemon.aggregation._drivers
        return [daemon.files(), *(row for table in tables for row in daemon.rows(table))]

    assert await together(daemons, work) == [[[]]] * 4


async def test_two_contracts_of_the_same_parties_never_meet(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, *NAMES[:4])
    other = b"d" * 32
    for daemon in daemons:
        await open_scope(daemon, daemons, other)

    async def work(daemon: Daemon) -> list[Total]:
        totals: dict[bytes, Total] = {}

        async def one(contract: bytes, k: int) -> None:
            totals[contract] = await daemon.sum(daemons, contract=contract, vector=vector_of(daemon.name, k))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, CONTRACT, 0)
            nursery.start_soon(one, other, 1)
        ones, others = daemon.messages(), daemon.messages(contract=other)
        assert len(ones) > 40
        assert len(others) > 40
        assert {signed.sid for signed in ones}.isdisjoint(signed.sid for signed in others)
        await daemon.forget()
        assert len(daemon.messages(contract=other)) == len(others)
        return [totals[CONTRACT], totals[other]]

    for one, two in await together(daemons, work):
        assert one.values.tolist() == expected(daemons, 0)
        assert two.values.tolist() == expected(daemons, 1)


# restarts and cuts


async def sums_with_kills(home: Path, seed: int) -> tuple[int, int]:
    """Three sums by three to five daemons, some of them killed and started again: (kills, cuts)."""
    random = Random(seed)
    network = MemoryNetwork(random=random)
    network.limits = lambda _from, _to: (breaks(), breaks())
    names = NAMES[: random.randint(3, 5)]
    daemons = await introduced(home, network, *names)
    journals: dict[str, list[tuple[list[str], list[int]]]] = {name: [] for name in names}
    sums, kills, cuts = 3, 0, 0
    finished: set[str] = set()
    everybody = trio.Event()

    def breaks() -> int | None:
        return random.randrange(100, 60_000) if random.random() < 0.3 else None

    async def stage(daemon: Daemon) -> None:
        journal = journals[daemon.name]
        while len(journal) < sums:
            k = len(journal)
            total = await daemon.sum(daemons, k, history=hash_("fp.test", repr(journal).encode()))
            journal.append((total.survivors, total.values.tolist()))
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
                cuts += 1
            elif (daemon := random.choice(daemons)).is_open and not everybody.is_set():
                daemon.scope.cancel()
                kills += 1
        await everybody.wait()
    assert len({repr(journal) for journal in journals.values()}) == 1, "the same survivors and values at all"
    for k, (survivors, values) in enumerate(journals[names[0]]):
        assert values == expected([daemon for daemon in daemons if daemon.id in survivors], k)
    return kills, cuts


@pytest.mark.system  # chaos
@pytest.mark.parametrize("block", range(3))
async def test_sums_are_exact_whoever_is_killed_and_whatever_is_cut(
    block: int, home: Path, seed: int, autojump_clock: Any
) -> None:
    kills = cuts = 0
    for number in range(3 * block, 3 * (block + 1)):
        print(f"federation {number} of FEDPEER_SEED={seed}")
        with trio.fail_after(3600):
            killed, cut = await sums_with_kills(home / str(number), 1_000_003 * seed + number)
        kills, cuts = kills + killed, cuts + cut
    assert kills > 0


async def test_other_values_for_the_same_sum_are_refused_before_they_leave(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, *NAMES[:3])
    alice = daemons[0]
    with trio.move_on_after(5):
        await alice.live(lambda: alice.sum(daemons))  # type: ignore[arg-type, return-value]
    before = {signed.digest for signed in alice.messages()}
    assert before, "she was ready"
    alice.open()

    async def ask_again() -> None:
        for change in ({"vector": vector_of("mallory", 0)}, {"params": b"other"}, {"history": b"x" * 32}):
            with pytest.raises(NotDeterministic, match="sum 0 of turn 1 of stage 'fit'"):
                await alice.sum(daemons, **change)  # type: ignore[arg-type]
        assert {signed.digest for signed in alice.messages()} == before

    await alice.live(ask_again)
    for daemon in daemons:
        daemon.store.close()


async def test_a_decided_sum_asked_again_gives_the_same_and_masks_nothing(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, *NAMES[:3])
    first = await together(daemons, lambda daemon: daemon.sum(daemons))
    for daemon in daemons:
        daemon.open()
    before = {signed.digest for signed in daemons[0].messages()}
    again = await together(daemons, lambda daemon: daemon.sum(daemons))
    assert [total.values.tolist() for total in again] == [total.values.tolist() for total in first]
    assert [total.survivors for total in again] == [total.survivors for total in first]
    assert {signed.digest for signed in daemons[0].messages()} == before


async def test_a_full_disk_at_a_record_sends_nothing_of_it(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    """Each kind in turn: when the commit fails the others never see the message, and the daemon ends."""
    for number, kind in enumerate(["ADVERTISE", "PREVOTE", "SCATTER", "PRECOMMIT", "RELEASE", "OPEN", "FINAL"]):
        *here, dave = daemons = await introduced(home / str(number), network, *NAMES[:4])
        publish, full = dave.mesh.publish, trio.Event()
        refused: list[bytes] = []

        def failing(
            tx: Any, scope: bytes, name: str, slot: str, body: bytes, *, to: str = "",
            publish: Any = publish, kind: str = kind, full: trio.Event = full, refused: list[bytes] = refused,
        ) -> None:  # fmt: skip
            publish(tx, scope, name, slot, body, to=to)
            if f"/{kind}/" in slot:
                refused.append(body)
                full.set()
                raise StoreError("the disk is full")

        dave.mesh.publish = failing  # type: ignore[method-assign]

        async def ends(dave: Daemon = dave, daemons: Sequence[Daemon] = daemons) -> None:
            with pytest.RaisesGroup(StoreError, flatten_subgroups=True, allow_unwrapped=True):
                await dave.live(lambda: dave.sum(daemons))  # type: ignore[arg-type, return-value]

        async def work(daemon: Daemon, full: trio.Event = full, daemons: Sequence[Daemon] = daemons) -> Any:
            with trio.move_on_after(600):
                await daemon.sum(daemons)
            await full.wait()
            await trio.sleep(5)
            return [signed.raw for signed in daemon.messages()]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ends)
            heard = await together(here, work)
        assert refused, kind
        for raws in heard:
            assert not set(refused) & set(raws)


async def test_a_restored_old_copy_of_the_state_says_nothing_more_in_that_instance(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    *here, dave = daemons = await introduced(home, network, *NAMES[:4])
    dave.store.close()
    copy = {path: path.read_bytes() for path in dave.folder.rglob("*") if path.is_file()}
    dave.open()
    scattered = trio.Event()
    dave.aggregation.events.subscribe(lambda event: scattered.set() if event.get("step") == "scattered" else None)
    said: set[bytes] = set()

    def instances() -> set[bytes]:
        """Those in which it said something before: a later attempt is another."""
        assert said
        return {parse(raw).sid for raw in said}

    async def life_of_dave() -> None:
        with trio.move_on_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(dave.live, lambda: dave.sum(daemons))  # type: ignore[arg-type, return-value]
                await scattered.wait()
                said.update(signed.raw for signed in dave.messages(sender=dave))
                nursery.cancel_scope.cancel()
        for path in dave.folder.rglob("*"):
            if path.is_file() and path not in copy:
                path.unlink()
        for path, data in copy.items():
            path.write_bytes(data)
        for alone in (False, True):  # and as well after another restart, before it hears of anybody
            for daemon in here:
                (network.cut if alone else network.heal)("dave", daemon.name)
            dave.open()
            await dave.live(partial(restored, dave, alone))

    async def restored(dave: Daemon, alone: bool) -> None:
        if alone:
            with trio.move_on_after(60):
                await dave.sum(daemons)
            assert instances().isdisjoint(signed.sid for signed in dave.messages(sender=dave))
            return
        await until(lambda: len(dave.connections.sessions) == 3)
        await trio.sleep(1)
        total = await dave.sum(daemons)
        assert total.values.tolist() == expected([d for d in daemons if d.id in total.survivors])
        assert instances().isdisjoint(signed.sid for signed in dave.messages(sender=dave))

    dave_done = trio.Event()

    async def work(daemon: Daemon) -> Total:
        total = await daemon.sum(daemons)
        await dave_done.wait()
        assert {signed.raw for signed in daemon.messages(sender=dave) if signed.sid in instances()} <= said
        return total

    async def whole_life() -> None:
        await life_of_dave()
        dave_done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(whole_life)
        totals = await together(here, work)
    for total in totals:
        assert total.values.tolist() == expected([d for d in daemons if d.id in total.survivors])


# ends by name


async def ends_of_a_sum_that_two_leave(daemons: Sequence[Daemon], returns_after_s: float) -> list[Any]:
    """The last two are killed when they have released; one of them comes back, perhaps."""
    *here, dave, erin = daemons

    async def leaves(gone: Daemon) -> None:
        gone.aggregation.events.subscribe(
            lambda event: gone.scope.cancel() if event.get("step") == "released" else None
        )
        await gone.live(partial(gone.sum, daemons))  # type: ignore[arg-type]
        await trio.sleep(returns_after_s)
        if gone is dave:
            gone.open()
            await gone.live(partial(gone.sum, daemons))  # type: ignore[arg-type]

    async with trio.open_nursery() as nursery:
        for gone in (dave, erin):
            nursery.start_soon(leaves, gone)
        ends = await together(here, lambda daemon: daemon.sum(daemons))
        nursery.cancel_scope.cancel()
    return ends


async def test_a_sum_that_waits_for_a_secret_ends_well_when_who_owes_it_is_back(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, *NAMES)
    for total in await ends_of_a_sum_that_two_leave(daemons, returns_after_s=300.0):
        assert total.survivors == [daemon.id for daemon in daemons]
        assert total.values.tolist() == expected(daemons)
    assert 300 < trio.current_time() < STALL_S


async def test_a_sum_whose_secrets_two_took_away_for_good_is_lost_by_their_names(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, *NAMES)
    for end in await ends_of_a_sum_that_two_leave(daemons, returns_after_s=10_000.0):
        assert isinstance(end, SumLost), end
        assert {"dave", "erin"} <= set(end.message.replace(",", "").split())
        assert "alice" not in end.message


async def test_an_owner_that_adds_up_something_else_makes_noise_for_all_and_never_a_wrong_sum(
    home: Path, network: MemoryNetwork, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, mallory = daemons = await introduced(home, network, *NAMES[:4])
    perform = service.perform

    def lies(job: Any, files: Any, vector: Any = None) -> Any:
        if isinstance(job, Add) and files.parties[files._me] == mallory.id:
            data = bytes(job.length * 3)
            digest = slices.sum_digest(job.ctx, job.chunk, data)
            files.write(digest, data)
            return len(data), digest
        return perform(job, files, vector)

    monkeypatch.setattr(service, "perform", lies)
    for end in await together(daemons, lambda daemon: daemon.sum(daemons)):
        assert isinstance(end, SumIsNoise), end
        assert "is noise" in end.message


# what is refused


async def test_two_parties_are_refused_and_nothing_is_sent(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, *NAMES[:2])

    async def work(daemon: Daemon) -> None:
        with pytest.raises(SumError, match="over 2 parties"):
            await daemon.sum(daemons)
        assert daemon.messages() == []

    assert await together(daemons, work) == [None] * 2


async def test_fewer_parties_than_the_rules_ask_for_are_refused(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, *NAMES[:3])

    async def work(daemon: Daemon) -> None:
        with pytest.raises(SumError, match="at least 4 contributors of 3"):
            await daemon.sum(daemons, min_parties=4)

    assert await together(daemons, work) == [None] * 3


@pytest.mark.parametrize("change", [{"history": b"x" * 32}, {"params": b"other"}], ids=["history", "params"])
async def test_a_peer_that_would_sum_something_else_is_left_out_by_the_others_and_gets_nothing(
    change: dict[str, Any], home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, *NAMES[:4])
    bob = daemons[1]
    here = [daemon for daemon in daemons if daemon is not bob]
    results = await together(daemons, lambda daemon: daemon.sum(daemons, **(change if daemon is bob else {})))
    for daemon, result in zip(daemons, results, strict=True):
        if daemon is bob:
            assert isinstance(result, SumError)
        else:
            assert result.survivors == [other.id for other in here]
            assert result.values.tolist() == expected(here)
    assert "scattered" not in bob.steps()


async def test_what_one_says_in_the_name_of_another_counts_for_nobody(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    """Signed by itself with the index of another, or as a record of another: neither is heard."""
    *here, mallory = daemons = await introduced(home, network, *NAMES[:4])

    async def work(daemon: Daemon) -> Any:
        if daemon is not mallory:
            total = await daemon.sum(daemons)
            assert len(daemon.messages("RELEASE", mallory)) == 1, "it is here, and stands for nothing"
            assert not any(signed.message.sender == 3 for signed in daemon.messages())
            return total
        scope = root_of(CONTRACT, [daemon.id for daemon in daemons])
        await until(lambda: len(mallory.messages("READY")) == 3 and mallory.id in here[1].connections.sessions)
        sid = mallory.messages("READY")[0].sid
        forged = sign(mallory.identity.signing, sid, "RELEASE", 0, bytes(32), b"\x0f", [])
        slot = _slot(forged)
        await mallory.store.write(lambda tx: mallory.mesh.publish(tx, scope, KIND, slot, forged.raw))
        record, bob = records.seal(records.Record(scope, KIND, slot, here[0].id, forged.raw)), here[1]
        with pytest.raises(RemoteProtocolError):
            await bob.mesh.record_came(bob.connections.sessions[mallory.id], record.raw)
        return None

    totals = await together(daemons, work)
    for total in totals[:3]:
        assert total.values.tolist() == expected(here)


async def test_a_message_is_one_record_however_it_is_wrapped_and_convicts_nobody(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    alice, bob, carol, mallory = daemons = await introduced(home, network, *NAMES[:4])
    accused: list[str] = []
    scope = root_of(CONTRACT, [daemon.id for daemon in daemons])

    def wrapped(signed: Signed, author: Daemon, *, to: str = "", prefix: str = "") -> bytes:
        return records.seal(records.Record(scope, KIND, prefix + _slot(signed), author.id, signed.raw, to)).raw

    async def attack() -> None:
        await until(lambda: mallory.id in bob.connections.sessions and len(alice.messages("SHARE", alice)) == 3)
        session = bob.connections.sessions[mallory.id]
        (for_bob,) = (s for s in alice.messages("SHARE", alice) if s.message.holder == 1)
        advert, own = alice.messages("ADVERTISE", alice)[0], bob.messages("ADVERTISE", bob)[0]
        before = bob.mesh.count(scope, alice.id)
        for to in ("", carol.id):  # a share for bob that is said to be for all, or for another
            with pytest.raises(RemoteProtocolError, match="addressed to another"):
                await bob.mesh.record_came(session, wrapped(for_bob, alice, to=to))
        for signed, author in ((advert, alice), (own, bob)):
            with pytest.raises(RemoteProtocolError, match="under another name"):
                await bob.mesh.record_came(session, wrapped(signed, author, prefix="0" * 16 + "/"))
        assert bob.mesh.count(scope, alice.id) - before <= 1
        await until(lambda: bool(alice.messages("SCATTER", alice)))
        scatter = next(s for s in alice.messages("SCATTER", alice) if s.message.chunk == 0)
        for to in (carol.id, bob.id, mallory.id, carol.id):
            await bob.mesh.record_came(session, wrapped(scatter, alice, to=to))
        assert scatter.digest in {s.digest for s in bob.messages("SCATTER", alice)}, "the one for itself it can read"

    async def work(daemon: Daemon) -> Any:
        daemon.mesh.on_equivocation = lambda _scope, peer: accused.append(peer)
        async with trio.open_nursery() as nursery:
            if daemon is mallory:
                nursery.start_soon(attack)
            return await daemon.sum(daemons)

    for total in await together(daemons, work):
        assert total.values.tolist() == expected(daemons)
    assert accused == []


async def test_what_is_not_known_leaves_half_of_its_authors_room_to_what_is(
    home: Path, network: MemoryNetwork, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAX_RECORDS", 100)
    *here, mallory = daemons = await introduced(home, network, *NAMES[:4])
    scope = root_of(CONTRACT, [daemon.id for daemon in daemons])

    async def work(daemon: Daemon) -> Any:
        if daemon is mallory:
            await until(lambda: mallory.id in here[0].connections.sessions)
            for number in range(200):
                stray = sign(mallory.identity.signing, bytes([number]) * 32, "ACK", 3, 0, [])
                record = records.seal(records.Record(scope, KIND, _slot(stray), mallory.id, stray.raw))
                await here[0].mesh.record_came(here[0].connections.sessions[mallory.id], record.raw)
            return None
        total = await daemon.sum(daemons, turn=2)
        if daemon is here[0]:
            assert 50 <= daemon.mesh.count(scope, mallory.id) < 60
        return total

    for total in (await together(daemons, work))[:3]:
        assert total.values.tolist() == expected(here)


async def test_a_file_that_is_not_what_was_said_counts_as_none_and_its_peer_is_left_out(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    *here, mallory = daemons = await introduced(home, network, *NAMES[:4])
    offer = mallory.mesh.files.offer

    def offer_another(tx: Any, scope: bytes, digest: bytes, size: int) -> None:
        offer(tx, scope, digest, size)
        mallory.store.remove_file(digest)
        mallory.store.path_of(digest).write_bytes(bytes(size))

    mallory.mesh.files.offer = offer_another  # type: ignore[method-assign]

    async def work(daemon: Daemon) -> Any:
        if daemon is not mallory:
            return await daemon.sum(daemons)
        with trio.move_on_after(1200):
            await daemon.sum(daemons)
        return None

    for total in (await together(daemons, work))[:3]:
        assert total.survivors == [daemon.id for daemon in here]
        assert total.values.tolist() == expected(here)


async def test_a_sum_in_a_scope_that_is_not_open_is_an_error(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    daemons = await introduced(home, network, *NAMES[:3])

    async def work(daemon: Daemon) -> None:
        with pytest.raises((LocalProtocolError, SumError), match="not open"):
            await daemon.sum(daemons, contract=b"d" * 32)
        with pytest.raises((LocalProtocolError, SumError), match="not open"):
            await daemon.sum(daemons, 1, contract=b"d" * 32, history=HISTORY)

    assert await together(daemons, work) == [None] * 3


async def test_a_sum_whose_scope_could_not_be_opened_can_be_asked_for_again(
    home: Path, network: MemoryNetwork, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemons = await introduced(home, network, *NAMES[:3])
    alice = daemons[0]

    async def work(daemon: Daemon) -> list[int]:
        if daemon is alice:
            with monkeypatch.context() as fault:
                fault.setattr(alice.mesh, "open_scope", lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    await alice.sum(daemons)
        with trio.fail_after(60):
            return (await daemon.sum(daemons)).values.tolist()

    assert await together(daemons, work) == [expected(daemons)] * 3


async def test_what_comes_while_a_driver_begins_is_looked_at_without_another_message(
    home: Path, network: MemoryNetwork, autojump_clock: Any
) -> None:
    alice, *_ = daemons = await introduced(home, network, *NAMES[:3])
    ids = [daemon.id for daemon in daemons]
    root, changed, told = root_of(CONTRACT, ids), alice.mesh.changed, []

    def comes_first(scope: bytes) -> Any:
        """Between the first look of the driver and the first moment from which it would be woken."""
        if not told:
            told.append(sign(alice.identity.signing, bytes(32), "READY", 0, ["fit", 1, 0], *[HISTORY] * 3))
            alice.store.write_now(lambda tx: alice.mesh.publish(tx, root, KIND, _slot(told[0]), told[0].raw))
        return changed(scope)

    alice.mesh.changed = comes_first  # type: ignore[method-assign]

    async def work() -> None:
        driver = await alice.aggregation._driver(CONTRACT, ids, Terms("byz", 3, STALL_S))
        await trio.sleep(10)
        assert told
        assert driver._position == len(told)

    await alice.live(work)


async def test_a_file_of_ours_that_a_contributor_names_as_its_own_is_added_to_nothing(
    home: Path, network: MemoryNetwork, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else who knows the digest of a private file would read the file in the sum, its own masks taken off."""
    daemons = await introduced(home, network, *NAMES[:4])
    alice = daemons[0]
    private = np.random.default_rng(1).bytes(256 * 3)
    digest = await alice.store.put_file(private)
    say, sizes = Seat.say, list[int]()

    def lie(seat: Seat, step: Step, kind: str, *fields: Any, to: int | None = None) -> None:
        if (kind, seat.me, to) == ("SCATTER", 3, 0):
            sizes.append(fields[2])
            fields = *fields[:3], digest
        say(seat, step, kind, *fields, to=to)

    waiting: list[int] = []

    async def work(daemon: Daemon) -> Total:
        total = await daemon.sum(daemons)
        await trio.sleep(1)
        waiting.extend(len(driver._working) for driver in daemon.aggregation._drivers.values())
        return total

    monkeypatch.setattr(Seat, "say", lie)
    totals = await together(daemons, work)
    assert not any(waiting), "what is not wanted any more is not waited for"
    honest = daemons[:3]
    assert sizes == [len(private)]
    assert [total.survivors for total in totals] == [[daemon.id for daemon in honest]] * 4
    assert all(total.values.tolist() == expected(honest) for total in totals)
    alice.open()
    assert alice.store.path_of(digest).read_bytes() == private, "nor does it go with the sum"
    alice.store.close()
