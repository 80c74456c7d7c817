"""Bad weather: every connection breaks at a random byte, daemons are killed at random points, and everything arrives.

Two organizations send each other letters (small and large), records and blobs. Each connection gets a limit of bytes in
one direction or both, from the first byte of the handshake to far into a blob; either daemon is killed at random times
(everything of it cancelled wherever it is, its store closed) and started again on the same home. After `cuts` broken
connections the weather clears, and what was said is compared with what was heard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

import trio
from mesh_cast import SCOPE, Organization, homes

from fedpeer.store import call_directly
from fedpeer.testing.network import MemoryNetwork

T = TypeVar("T")
STAGES = ("align", "fit")
AHEAD = 8
"""how many letters of a stream an author is ahead of the other's taking"""


class Disk:
    """Runs one function of a store at a time, and lets others run before and after it: kills fall in between, too."""

    def __init__(self) -> None:
        self._lock = trio.Lock()

    async def __call__(self, function: Callable[[], T], /) -> T:
        async with self._lock:
            result = function()
            await trio.lowlevel.checkpoint()
            return result


@dataclass
class Author:
    """One organization as its jobs see it. What it said and heard is noted with the commit, so it is the oracle."""

    one: Organization
    other: Organization
    random: Random
    said: dict[str, list[bytes]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    heard: dict[str, list[bytes]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    records: dict[str, bytes] = field(default_factory=dict)
    seen: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[bytes, bytes] = field(default_factory=dict)
    fetched: set[bytes] = field(default_factory=set)
    kills: int = 0
    quiet: bool = False
    slow_disk: bool = False

    async def live(self, nursery: trio.Nursery) -> None:
        """The daemon, killed and started again and again."""
        while True:
            async with trio.open_nursery() as life:
                await self.one.start(life, run_in_thread=Disk() if self.slow_disk else call_directly)
                for stage in STAGES:
                    life.start_soon(self._write, stage)
                    life.start_soon(self._take, stage)
                life.start_soon(self._publish)
                life.start_soon(self._listen)
                await trio.sleep(self.random.expovariate(1 / 8))
                if self.quiet:
                    await trio.sleep_forever()
                self.kills += 1
                life.cancel_scope.cancel()
            await trio.sleep(self.random.uniform(0, 3))

    def _size(self) -> int:
        return int(self.random.choice([10, 10, 100, 1000, 20_000, 33_000, 120_000]) * self.random.uniform(0.9, 1.1))

    async def _write(self, stage: str) -> None:
        while not self.quiet:
            await trio.sleep(self.random.expovariate(4))
            said = self.said[stage]
            if len(said) - len(self.author_of_other.heard[stage]) >= AHEAD:
                continue
            letter = f"{self.one.name} {stage} {len(said)} ".encode() + self.random.randbytes(self._size())
            cut = self.random.randrange(len(letter))

            def commit(tx, letter=letter, cut=cut, said=said) -> None:
                parts = [letter[:cut], letter[cut:]]
                seq = self.one.mesh.post(tx, SCOPE, stage, self.other.id, "t", b"h", parts)
                assert seq == len(said)
                tx.after_commit(lambda: said.append(letter))

            await self.one.store.write(commit)

    async def _take(self, stage: str) -> None:
        while True:
            letter = await self.one.mesh.next_mail(SCOPE, stage, self.other.id)
            if self.random.random() < 0.2:
                await trio.sleep(self.random.expovariate(1))
            content = b"".join(letter.buffers)

            def commit(tx, letter=letter, content=content) -> None:
                self.one.mesh.take(tx, SCOPE, stage, self.other.id, letter)
                tx.after_commit(lambda: self.heard[stage].append(content))

            await self.one.store.write(commit)

    async def _publish(self) -> None:
        while not self.quiet:
            await trio.sleep(self.random.expovariate(1 / 8))
            slot = str(len(self.records))
            body = self.random.randbytes(self.random.choice([0, 32, 300, 10_000]))
            if self.random.random() < 0.5:
                data = self.random.randbytes(self.random.choice([0, 1000, 70_000, 250_000]) + len(self.records))
                body = await self.one.store.put_file(data)
                self.blobs[body] = data

            def commit(tx, slot=slot, body=body) -> None:
                if body in self.blobs:
                    self.one.mesh.files.offer(tx, SCOPE, body, len(self.blobs[body]))
                self.one.mesh.publish(tx, SCOPE, "note", slot, body)
                tx.after_commit(lambda: self.records.update({slot: body}))

            await self.one.store.write(commit)

    async def _listen(self) -> None:
        """See the other's records; fetch the blobs they name."""
        async with trio.open_nursery() as nursery:
            started: set[bytes] = set()
            while True:
                mine = self.one.mesh
                for (slot, sender), body in mine.held(SCOPE, "note").items():
                    if sender == self.other.id:
                        self.seen[slot] = body
                        if body in self.author_of_other.blobs and body not in self.fetched | started:
                            started.add(body)
                            nursery.start_soon(self._fetch, body)
                await mine.changed(SCOPE)

    async def _fetch(self, digest: bytes) -> None:
        data = self.author_of_other.blobs[digest]
        path = await self.one.mesh.files.fetch(SCOPE, digest, len(data), [self.other.id])
        assert path.read_bytes() == data
        self.fetched.add(digest)

    author_of_other: Author = field(init=False)

    def all_heard(self) -> bool:
        other = self.author_of_other
        lengths = [len(self.heard[stage]) == len(other.said[stage]) for stage in STAGES]
        return all(lengths) and self.seen.keys() == other.records.keys() and len(self.fetched) >= len(other.offered())

    def offered(self) -> set[bytes]:
        return {body for body in self.records.values() if body in self.blobs}


async def weather(seed: int, cuts: int) -> None:
    """Run until so many connections broke and all arrived."""
    random = Random(seed)
    network = MemoryNetwork(random=Random(seed + 1) if seed % 5 == 0 else None)
    reachable = [("alice", "bob"), ("alice",), ("bob",)][seed % 3]  # sometimes only one of the two can be dialled

    def limits(_dialler: str, _acceptor: str) -> tuple[int | None, int | None]:
        if network.broken >= cuts:
            return None, None
        there, back = (random.randrange(random.choice([100, 300, 800, 3_000, 30_000, 300_000])) for _ in range(2))
        return random.choice([(there, None), (None, back), (there, back)])

    network.limits = limits
    with homes() as home:
        alice, bob = (
            Organization(name, home, network.host(name), f"{name}:7420" if name in reachable else None)
            for name in ("alice", "bob")
        )
        authors = [Author(alice, bob, Random(seed + 2)), Author(bob, alice, Random(seed + 3))]
        for author in authors:
            author.slow_disk = seed % 2 == 0
        authors[0].author_of_other, authors[1].author_of_other = authors[1], authors[0]
        for one, other in ((alice, bob), (bob, alice)):
            async with trio.open_nursery() as nursery:
                await one.start(nursery, connect=False)
                await one.connections.add_peer(other.card.text)
                await one.open(other)
                one.store.close()
        with trio.fail_after(1e7):
            async with trio.open_nursery() as nursery:
                for author in authors:
                    nursery.start_soon(author.live, nursery)
                while network.broken < cuts:
                    await trio.sleep(1)
                for author in authors:
                    author.quiet = True
                while not all(author.all_heard() for author in authors):
                    await trio.sleep(1)
                nursery.cancel_scope.cancel()
        sessions = sum(event["event"] == "peer_connected" for event in alice.happened)
        kills = sum(author.kills for author in authors)
        letters = sum(len(author.said[stage]) for author in authors for stage in STAGES)
        records, blobs = (
            sum(len(x) for x in xs) for xs in ([a.records for a in authors], [a.fetched for a in authors])
        )
        print(
            f"seed {seed}: {network.broken} of {network.connections} connections broke, {sessions} sessions,"
            f" {kills} kills, {letters} letters, {records} records, {blobs} blobs, {trio.current_time():.0f} s"
        )
        for author in authors:
            assert author.heard == author.author_of_other.said
            assert author.seen == author.author_of_other.records
            assert author.one.log.faults == []
        assert network.broken >= cuts
        assert kills >= cuts // 50
        assert letters >= cuts // 5
        assert records >= cuts // 50
        assert blobs >= cuts // 200
