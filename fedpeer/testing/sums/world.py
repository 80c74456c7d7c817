"""One contract's parties and everything between them: a clock, messages and files on their way, disks, kills.

    outcome = World(seed).run()

Rules
* It moves bytes. What a message means, when it is due and whom it convicts is the cores' business alone.
* There is one source of chance, the seed, and no other time than the clock of events: the same seed is the same run.
* A message reaches everybody it is for in the end, as in the mesh: from its sender or from anybody who holds it, after
  a delay, lost and offered again, twice, in any order. A directed one (`to`) reaches its addressee only.
* The driver does what the daemon must do: what a core says and keeps is one transaction, synced before anything of it
  leaves; a file is durable before its work is reported done; an end is on disk before the worker has the total.
* A process that is killed keeps what was synced and nothing else. It is made again from its disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import math
import random
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedpeer import codec
from fedpeer.aggregation import names, slices, vectors, work
from fedpeer.aggregation.evidence import PINNED
from fedpeer.aggregation.messages import Signed, SumName, id_of
from fedpeer.aggregation.names import Parties, Profile
from fedpeer.aggregation.party import Party
from fedpeer.aggregation.seat import Ask, Ended, Setting, Step
from fedpeer.crypto import Buffer, Secret, SigningKey, hash_
from fedpeer.testing.sums.disk import Disk, Full, Write
from fedpeer.testing.sums.faults import Faults, Kill, beside, draw, in_place_of, withheld
from fedpeer.testing.sums.observer import Instance, Said, observe

PAD: Final = 16
W: Final = 24
BITS: Final = 16
STALL_S: Final = 3600.0
SOON: Final = 0.4
"""seconds, at most, after which a core is asked what follows from what came"""

Vector = npt.NDArray[np.uint32]


class Wrong(AssertionError):
    """Something happened that must not happen; the text says what and where."""


class Killed(Exception):
    """The process ended here."""


_UNLESS_IT_ENDS: Final = contextlib.suppress(Killed, Full)


class Dropped(Exception):
    """A file that was dropped while work with it was under way: that work is void."""


@dataclass(frozen=True)
class Sum:
    """One call of Peers.sum that every party makes, in this order."""

    name: SumName
    kind: str
    """the group: "data" or "turn" """
    pinned: bool
    input: int
    """sums of equal number (and length) sum the same vectors"""
    d: int = 256
    """elements, with PAD zeros: one slice for each 256 of them, or for each owner"""


@dataclass(frozen=True)
class End:
    """What a party's disk says about a sum that is over."""

    status: str
    survivors: Parties
    sum_hash: bytes
    total: bytes
    """what the worker was given"""


@dataclass
class Letter:
    """A message on its way to everybody it is for."""

    signed: Signed
    author: int
    """the process that said it"""
    to: frozenset[int]
    """the parties that get it in the end"""
    holders: set[int]
    """the processes that can pass it on"""
    flying: set[int] = field(default_factory=set)


@dataclass
class Outcome:
    """How a world ended."""

    seed: int
    profile: Profile
    faults: Faults
    injected: Counter[str]
    ended: Counter[str]
    """how the sums ended, at each honest party"""
    promised: int = 0
    """unpinned sums with an honest proposer and at most one party gone"""
    kept: int = 0
    """those of them that gave a result"""
    instances: int = 0
    steps: int = 0
    seconds: float = 0.0
    """on the clock of the world"""
    fingerprint: bytes = b""
    """of everything that was said: equal for equal seeds"""
    notes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def job(rng: random.Random) -> list[Sum]:
    """A few sums of both groups; some over the same vectors within one group."""
    groups = [(("count", 0), "data", 0.9, rng.choice((0, 1, 1, 2)))]
    groups += [(("fit", turn), "turn", 0.8, rng.choice((1, 1, 2))) for turn in range(rng.choice((0, 1, 1, 2)))]
    if not any(calls for *_, calls in groups):
        groups = [(("count", 0), "data", 0.9, 1)]
    sums, alike = [], rng.random() < 0.2
    for number, ((stage, turn), kind, pinned, calls) in enumerate(groups):
        bound, d = rng.random() < pinned, rng.choices((256, 768, 2304), (5, 3, 1))[0]
        first = 0 if alike else 2 * number
        sums += [Sum((stage, turn, k), kind, bound, first + rng.randrange(2), d) for k in range(calls)]
    return sums


class Node:
    """One process and its disk. Usually one for each party; a twin is a second one of the same party."""

    def __init__(self, number: int, party: int, seed: int) -> None:
        self.number, self.party = number, party
        self.disk = Disk()
        self.core: Party | None = None
        self.life = 0
        """counts the starts; what was under way in an earlier life is void"""
        self.chance = random.Random(f"{seed} node {number}")
        self.drawn: list[bytes] = []
        """everything the core ever drew: its secrets"""
        self.dropped: set[bytes] = set()
        """names of files that its core said nobody needs any more"""
        self.points: Counter[str] = Counter()
        self.missing: dict[bytes, Letter] = {}
        self.due = False
        """an advance is on the clock"""
        self.wake = -1.0
        self.sweeping = False
        self.pause = 1.0
        self.backup: dict[str, dict[Any, Any]] = {}
        self.ahead_s = random.Random(f"{seed} clock {number}").uniform(0, 1200)
        """so much its clock is ahead of the world's: no two agree"""

    @property
    def up(self) -> bool:
        return self.core is not None

    def random(self, size: int) -> bytes:
        self.drawn.append(self.chance.randbytes(size))
        return self.drawn[-1]

    def ends(self) -> dict[SumName, End]:
        return self.disk.tables["ends"]


class World:
    """n parties of one contract, their job, and the faults of one seed."""

    def __init__(
        self,
        seed: int,
        *,
        n: int | None = None,
        profile: Profile | None = None,
        faults: Faults | None = None,
        sums: list[Sum] | None = None,
    ) -> None:
        rng = random.Random(f"{seed} plan")
        size = n or rng.choices((3, 4, 5, 6, 7, 8, 11), (10, 45, 30, 8, 4, 2, 1))[0]
        self.seed = seed
        self.profile = profile or names.profile(size, "crash" if rng.random() < 0.15 else "")
        self.n = self.profile.n
        self.sums = sums if sums is not None else job(rng)
        self.faults = faults if faults is not None else draw(rng, self.profile)
        self.gone = self.faults.gone
        self.rng = random.Random(f"{seed} run")
        self.contract = hash_("fp.sim.contract", str(seed).encode())
        self.keys = [SigningKey(Secret(hash_("fp.sim.key", f"{seed} {i}".encode()))) for i in range(self.n)]
        twins = [party for party, liar in sorted(self.faults.liars.items()) if liar.twin]
        self.nodes = [Node(number, party, seed) for number, party in enumerate((*range(self.n), *twins))]
        self.now = 0.0
        self.transcript: list[Said] = []
        self.returned: list[tuple[float, int, bytes]] = []
        """(when, party, sid): a message came back to its sender, whose disk has lost it"""
        self.letters: dict[tuple[bytes, int], Letter] = {}
        self.injected: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.steps = 0
        self.asked: dict[SumName, Ask] = {}
        """as the first honest party asked"""
        self.asked_at: dict[tuple[int, SumName], float] = {}
        """(process, sum) → when it asked since its last start"""
        self.ended_at: dict[tuple[int, SumName], float] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._ids: dict[tuple[bytes, str], list[bytes]] = {}
        self._known: dict[bytes, Instance] = {}
        self._vectors: dict[tuple[int, int, int], Vector] = {}
        self._perhaps_over = False
        self._garbage: set[tuple[int, bytes]] = set()

    # who is who

    def honest(self, party: int) -> bool:
        return party not in self.faults.liars

    def vector(self, sum_: Sum, party: int) -> Vector:
        """x of one party, padded."""
        key = sum_.input, sum_.d, party
        if key not in self._vectors:
            rng = np.random.default_rng([self.seed, sum_.input, party])
            self._vectors[key] = x = np.zeros(sum_.d, np.uint32)
            x[:-PAD] = rng.integers(0, 1 << BITS, sum_.d - PAD)
        return self._vectors[key].copy()

    # the clock

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + seconds, self._count, event))

    def after_for(self, node: Node, seconds: float, event: Callable[[], None]) -> None:
        """An event of a process, void when it was killed until then."""
        life = node.life

        def run() -> None:
            if node.up and node.life == life:
                with _UNLESS_IT_ENDS:
                    event()

        self.after(seconds, run)

    def run(self, *, watched: bool = True) -> Outcome:
        """Until every honest party's job is over, or long after it should be; `watched`: the observer looks at it."""
        horizon = (len(self.sums) + 2) * 2 * STALL_S
        for node in self.nodes:
            start = self.faults.late.get(node.party, self.rng.random())
            if start > 1.0:
                self.injected["party gone for good" if math.isinf(start) else "party late"] += 1
            if not math.isinf(start):
                self.after(start, lambda node=node: self._start(node))  # type: ignore[misc]
        for partition in self.faults.partitions:
            self.after(partition.start, lambda: self.injected.update({"partition": 1}))
            for node in self.nodes:
                self.after(partition.stop, lambda node=node: self._sweep_soon(node, again=True))  # type: ignore[misc]
        failures: list[str] = []
        try:
            while self._events and self.now < horizon and not (self._perhaps_over and self._over()):
                self.now, _, event = heapq.heappop(self._events)
                self.steps += 1
                event()
        except Exception as error:
            failures.append(f"at {self.now:.3f} s: {error!r}\n{traceback.format_exc()}")
        outcome = self._outcome(failures)
        if watched:
            publics = [key.public for key in self.keys]
            outcome.failures.extend(observe(self.transcript, self.profile, publics, self._instances()))
        return outcome

    def _over(self) -> bool:
        self._perhaps_over = False
        gone = self.gone
        return all(
            node.up and self._next(node) is None
            for node in self.nodes[: self.n]
            if self.honest(node.party) and node.party not in gone
        )

    # processes

    def _start(self, node: Node) -> None:
        node.life += 1
        self._perhaps_over = True
        tables = node.disk.tables
        setting, key = self._setting(node), self.keys[node.party]
        node.core = core = Party(setting, key, node.random, dict(tables["kept"]), tuple(tables["lost"]))
        self._add_all(node)
        for ask in tables["asks"].values():
            if self._may_ask(node, ask):
                self.asked_at[node.number, ask.name] = self.now
                core.ask(ask, self.now + node.ahead_s)
        for signed, to in tables["said"].values():
            self._publish(node, signed, to)
        node.missing = {}
        for letter in self.letters.values():
            if self._lacks(node, letter):
                node.missing[letter.signed.digest] = letter
        self._sweep_soon(node, again=True)
        self._ask_next(node)
        self._advance_soon(node, 0.0)

    def _add_all(self, node: Node) -> None:
        """What the disk has of messages, its log first."""
        core, tables = node.core, node.disk.tables
        assert core is not None
        for signed, _to in tables["said"].values():
            core.add(signed, logged=True)
        for signed in tables["heard"].values():
            core.add(signed)

    def _setting(self, node: Node) -> Setting:
        return Setting(
            contract=self.contract,
            profile=self.profile,
            me=node.party,
            publics=[key.public for key in self.keys],
            prg="chacha20" if self.seed % 4 == 0 else "aegis256",
            stall_s=STALL_S,
        )

    def _point(self, node: Node, point: str) -> None:
        """Here a process may be killed."""
        node.points[point] += 1
        for kill in self.faults.kills.get(node.party, ()):
            if kill.point == point and kill.at == node.points[point]:
                self._kill(node, kill)
            elif kill.point == point and kill.roll_back and kill.at // 2 == node.points[point]:
                node.backup = node.disk.copy()

    def _kill(self, node: Node, kill: Kill) -> None:
        self.injected.update({"kill": 1, f"kill {kill.point}": 1})
        if kill.point.endswith("a commit"):
            self.injected["kill before or after a commit"] += 1
        unsynced = node.disk.unsynced
        if unsynced:
            self.injected["kill with writes unsynced"] += 1
            node.disk.lose(self.rng.randint(0, unsynced) if self.rng.random() < 0.3 else unsynced)
        if kill.roll_back:
            self.injected["disk rolled back"] += 1
            node.disk.restore(node.backup)
        self._stop(node, kill.down_s)
        raise Killed

    def _stop(self, node: Node, down_s: float) -> None:
        node.core, node.due, node.sweeping, node.wake = None, False, False, -1.0
        for letter in self.letters.values():
            if self._lacks(node, letter):
                letter.holders.discard(node.number)
        if math.isinf(down_s):
            self.injected["party gone for good"] += 1
        else:
            self.after(down_s, lambda: self._start(node))

    def _write(self, node: Node, *writes: tuple[str, Any, Any], sync: bool = True) -> None:
        node.points["write"] += sync
        full = sync and self.faults.full.get(node.party) == node.points["write"]
        try:
            node.disk.write(writes, full=full)
        except Full:
            self.injected["disk full"] += 1
            node.disk.lose(node.disk.unsynced)
            self._stop(node, 20.0)
            raise
        if sync:
            node.disk.sync()

    # a core and its driver

    def _advance_soon(self, node: Node, seconds: float | None = None) -> None:
        if not node.due:
            node.due = True
            self.after_for(node, self.rng.uniform(0, SOON) if seconds is None else seconds, lambda: self._advance(node))

    def _advance(self, node: Node) -> None:
        node.due = False
        core = node.core
        assert core is not None
        step = core.advance(self.now + node.ahead_s)
        if step.keep or step.say:
            self._point(node, "before a commit")
            self._write(
                node,
                *(("kept", key, value) for key, value in step.keep.items()),
                *(("said", signed.digest, (signed, to)) for signed, to in step.say),
            )
            self._point(node, "after a commit")
        for signed, _to in step.say:
            core.add(signed, logged=True)
        for note in step.notes:
            self.notes[note.step] += 1
        for item in step.work:
            self._begin(node, item)
        for signed, to in step.say:
            self._publish(node, signed, to)
            self._point(node, "between two messages")
        for ended in step.ended:
            self._ended(node, ended)
        self._clear(node, step)
        if step.again:
            self._add_all(node)
        if step.say or step.ended or step.again:
            self._advance_soon(node)
        wake = core.wake_at()
        if wake is not None and wake != node.wake:
            node.wake = wake
            self.after_for(node, max(wake - node.ahead_s - self.now, 0.0) + 1e-3, lambda: self._advance_soon(node, 0.0))

    def _clear(self, node: Node, step: Step) -> None:
        """What nobody needs any more goes away, at leisure."""
        if not step.drop and not step.forget:
            return
        sids, tables = set(step.forget), node.disk.tables
        node.dropped |= set(step.drop)
        writes: list[Write] = [("files", digest, None) for digest in step.drop]
        if sids:
            groups = {instance.group for sid, instance in self._instances().items() if sid in sids}
            writes += [("asks", name, None) for name, ask in tables["asks"].items() if ask.group in groups]
            writes += [("said", key, None) for key, (signed, _) in tables["said"].items() if signed.sid in sids]
            writes += [("heard", key, None) for key, signed in tables["heard"].items() if signed.sid in sids]
            writes += [("gone", sid, True) for sid in step.forget]
        node.disk.write(writes)

    def _ended(self, node: Node, ended: Ended) -> None:
        before = node.ends().get(ended.name)
        total = before.total if before else node.disk.tables["files"].get(ended.sum_hash, b"")
        end = End(ended.status, ended.survivors, ended.sum_hash, total)
        if before is not None:
            if before.status == "SUM" and before != end and self.honest(node.party):
                raise Wrong(f"party {node.party} says of {ended.name} first {before}, then {end}")
            return
        self._point(node, "before an end")
        self._write(node, ("ends", ended.name, end))
        self.ended_at[node.number, ended.name] = self.now
        self._perhaps_over = True
        self._point(node, "after an end")
        self._ask_next(node, self.rng.choice((0.0, 0.0, 1.0, 10.0)) * self.rng.random())

    # the worker

    def _next(self, node: Node) -> Sum | None:
        """The sum that this party is at; None: its job is over."""
        ends = node.ends()
        for sum_ in self.sums:
            end = ends.get(sum_.name)
            if end is None:
                return sum_
            if end.status != "SUM":
                return None
        return None

    def _ask_next(self, node: Node, pause: float = 0.0) -> None:
        sum_ = self._next(node)
        if sum_ is not None and sum_.name not in node.disk.tables["asks"]:
            self.after_for(node, pause, lambda: self._ask(node, sum_))

    def _ask(self, node: Node, sum_: Sum) -> None:
        ask = self._request(node, sum_)
        self._write(node, ("asks", sum_.name, ask))
        assert node.core is not None
        self.asked_at[node.number, ask.name] = self.now
        node.core.ask(ask, self.now + node.ahead_s)
        if self.honest(node.party):
            first = self.asked.setdefault(sum_.name, ask)
            if first != ask:
                raise Wrong(f"party {node.party} comes to {sum_.name} with another history than others")
        self._advance_soon(node)

    def _may_ask(self, node: Node, ask: Ask) -> bool:
        """A stage that failed with its sum does not ask again; one that goes on may, and is told the same."""
        end = node.ends().get(ask.name)
        return end is None or end.status == "SUM"

    def _request(self, node: Node, sum_: Sum) -> Ask:
        """What the daemon makes of a call of Peers.sum: the history so far, the group, the parameters."""
        stage, _turn, _ = sum_.name
        history = names.first_history(self.contract, stage, b"params")
        began, at = history, 0
        for earlier in self.sums[: self.sums.index(sum_) + 1]:
            if earlier.name[0] != stage:
                continue
            while at < earlier.name[1]:
                history = began = names.history_after_turn(history, hash_("fp.sim.shared", history))
                at += 1
            if earlier != sum_:
                end = node.ends()[earlier.name]
                history = names.history_after_sum(history, end.survivors, end.sum_hash)
        scope = b"" if sum_.kind == "data" else began
        encoded = codec.encode([*sum_.name, sum_.kind, PINNED if sum_.pinned else "none"])
        return Ask(
            name=sum_.name,
            group=names.group_of(self.contract, scope),
            pinned=sum_.pinned,
            model=history,
            shared=hash_("fp.sim.shared", began),
            params=names.params_hash(encoded),
            d=sum_.d,
            used=sum_.d - PAD,
            w=W,
            bits=BITS,
            data=sum_.kind == "data",
            encoded=encoded,
        )

    # messages

    def _publish(self, node: Node, signed: Signed, to: int | None) -> None:
        """A message leaves its process; a liar may say something else."""
        liar = self.faults.liars.get(node.party)
        if liar is None:
            self._send(node, signed, to, frozenset())
            return
        if (signed.digest, node.number) in self.letters:
            return
        if signed.kind == "PROPOSAL":
            self._ids.setdefault((signed.sid, signed.message.stage), []).append(
                id_of(signed.message.stage, signed.message.value)
            )
        key = self.keys[node.party]
        said = in_place_of(liar, signed, key, self.rng, self.n)
        without = frozenset(party for party in range(self.n) if withheld(liar, said, party))
        if said is not signed or any(to in (None, party) for party in without):
            self.injected["silent dealer or stingy owner"] += 1
        ids = self._ids.get((signed.sid, getattr(signed.message, "stage", "")), [])
        second = beside(liar, signed, key, self.rng, self.n, ids)
        if liar.twin:
            self.injected["equivocation"] += 1
        if second is not None and second.digest != said.digest:
            self.injected["equivocation"] += 1
            self._send(node, second, to, without, self.rng.choice((0.0, 2.0)))
            if self.rng.random() < 0.3:
                return
        self._send(node, said, to, without)

    def _send(self, node: Node, signed: Signed, to: int | None, without: frozenset[int], late: float = 0.0) -> None:
        key = (signed.digest, node.number)
        if key in self.letters:
            return
        honest = self.honest(node.party)
        if honest and signed.kind == "PROPOSAL":
            self._ids.setdefault((signed.sid, signed.message.stage), []).append(
                id_of(signed.message.stage, signed.message.value)
            )
        receivers = frozenset(party for party in range(self.n) if to in (None, party) and party not in without)
        if not receivers:
            return
        self.transcript.append(Said(self.now, node.party, honest, signed, to))
        letter = self.letters[key] = Letter(signed, node.number, receivers, {node.number})
        for other in self.nodes:
            if self._lacks(other, letter):
                if not other.missing:
                    other.pause = 1.0
                other.missing[signed.digest] = letter
                self._post(other, letter, late * self.rng.random())
                self._sweep_soon(other)

    def _lacks(self, node: Node, letter: Letter) -> bool:
        """Whether this process still has to get it. Its own come back to it, when its disk has lost them."""
        digest, author = letter.signed.digest, self.nodes[letter.author]
        if letter.signed.sid in node.disk.tables["gone"]:
            return False
        if node is author:
            liar = self.faults.liars.get(node.party)
            return (liar is None or liar.rolled_back) and digest not in node.disk.tables["said"]
        return (
            node.party != author.party  # twins do not hear each other
            and node.party in letter.to
            and digest not in node.disk.tables["heard"]
        )

    def _parted(self, a: Node, b: Node) -> bool:
        return any(partition.parts(a.party, b.party, self.now) for partition in self.faults.partitions)

    def _reached(self, node: Node, letter: Letter) -> bool:
        """Whether somebody who has it can hand it over now."""
        for holder in letter.holders:
            other = self.nodes[holder]
            if other.core is not None and not (self.faults.partitions and self._parted(node, other)):
                return True
        return False

    def _delay(self, node: Node) -> float:
        return self.rng.uniform(0.01, 0.15) * (20.0 if node.party in self.faults.slow else 1.0)

    def _post(self, node: Node, letter: Letter, late: float = 0.0) -> None:
        """It is offered once."""
        faults, rng = self.faults, self.rng
        if not node.up or not self._reached(node, letter):
            return
        if rng.random() < faults.loss:
            self.injected["a message lost"] += 1
            return
        delay = self._delay(node) + late
        if rng.random() < faults.reordering:
            self.injected["a message late"] += 1
            delay += rng.uniform(0, 3.0)
        letter.flying.add(node.number)
        self.after(delay, lambda: self._arrive(node, letter))
        if rng.random() < faults.duplication:
            self.injected["a message twice"] += 1
            self.after(delay + rng.expovariate(1.0), lambda: self._arrive(node, letter))

    def _arrive(self, node: Node, letter: Letter) -> None:
        letter.flying.discard(node.number)
        if node.core is None or not self._reached(node, letter):
            return
        node.missing.pop(letter.signed.digest, None)
        if node.number == letter.author:
            if self._lacks(node, letter):  # still; it may have said the same again
                self.returned.append((self.now, node.party, letter.signed.sid))
                node.disk.write([("lost", letter.signed.sid, True)])
        else:
            letter.holders.add(node.number)
            node.disk.write([("heard", letter.signed.digest, letter.signed)])
        node.core.add(letter.signed)
        self._advance_soon(node)
        with contextlib.suppress(Killed):
            self._point(node, "after a message")

    def _sweep_soon(self, node: Node, *, again: bool = False) -> None:
        """Anti-entropy: what a process misses is offered to it again, for as long as it misses anything."""
        if again:
            node.pause = 1.0
        if node.up and node.missing and (again or not node.sweeping):
            node.sweeping = True
            self.after_for(node, node.pause * (0.5 + self.rng.random()), lambda: self._sweep(node))

    def _sweep(self, node: Node) -> None:
        node.sweeping = False
        node.pause = min(1.5 * node.pause, 5.0)
        for letter in list(node.missing.values()):
            if node.number not in letter.flying:
                self._post(node, letter)
        self._sweep_soon(node)

    # work

    def _begin(self, node: Node, item: work.Work) -> None:
        self.after_for(node, self.rng.uniform(0.0, 0.3), lambda: self._work(node, item))

    def _work(self, node: Node, item: work.Work) -> None:
        core = node.core
        assert core is not None
        files = node.disk.tables["files"]
        match item:
            case work.Fetch():
                result: Any = item.digest in files or self._fetch(node, item.digest, (item.party,), item)
            case work.FetchTotal():
                result = item.sum_hash in files or self._fetch(node, item.sum_hash, item.holders, item)
            case work.Mask() if item.name in node.ends():
                return  # the stage has ended, and its vector with it
            case _:
                try:
                    result = work.perform(item, _Files(self, node), self._vector_for(node, item))
                except Dropped:
                    return
        if not result:
            self.after_for(node, self.rng.uniform(0.5, 5.0), lambda: self._work(node, item))
            return
        core.done(item, result)
        self._advance_soon(node)

    def _vector_for(self, node: Node, item: work.Work) -> Vector | None:
        if not isinstance(item, work.Mask):
            return None
        return self.vector(next(sum_ for sum_ in self.sums if sum_.name == item.name), node.party)

    def keep_file(self, node: Node, digest: bytes, data: bytes) -> None:
        self._point(node, "before a file")
        self._write(node, ("files", digest, data))
        self._point(node, "after a file")

    def _fetch(self, node: Node, digest: bytes, holders: Iterable[int], item: work.Fetch | work.FetchTotal) -> bool:
        """One attempt to get a file; what is not the file of this name is thrown away, as the daemon does."""
        for holder in self.rng.sample(self.nodes, len(self.nodes)):
            if holder.party not in holders or not holder.up or self._parted(node, holder):
                continue
            data = holder.disk.tables["files"].get(digest)
            if data is None or holder is node:
                continue
            liar = self.faults.liars.get(holder.party)
            if liar is not None and liar.files_for is not None and node.party not in liar.files_for:
                self.injected["silent dealer or stingy owner"] += 1
                continue
            if liar is not None and liar.garbage_files and (node.number, digest) not in self._garbage:
                self._garbage.add((node.number, digest))
                self.injected["garbage for a file"] += 1
                data = self.rng.choice((b"", data[:-1], self.rng.randbytes(len(data))))
            if _digest(item, data) == digest:
                self.keep_file(node, digest, data)
                return True
        return False

    # how it ended

    def _outcome(self, failures: list[str]) -> Outcome:
        outcome = Outcome(
            self.seed, self.profile, self.faults, self.injected, Counter(), notes=self.notes, failures=failures
        )
        outcome.steps, outcome.seconds = self.steps, self.now
        outcome.instances = len({said.signed.sid for said in self.transcript if said.signed.kind == "SCATTER"})
        state = hashlib.blake2b(digest_size=16)
        for said in self.transcript:
            state.update(repr((said.at, said.party, said.to)).encode() + said.signed.digest)
        outcome.fingerprint = state.digest()
        here = [node for node in self.nodes[: self.n] if self.honest(node.party)]
        for node in here:
            for end in node.ends().values():
                outcome.ended[end.status] += 1
            framed = sorted(party for party in node.core.convicted if self.honest(party)) if node.core else []
            if framed:
                failures.append(f"party {node.party} takes {framed} for convicted, which are honest")
            sum_ = self._next(node)
            if sum_ is not None and node.party not in self.gone and not failures:
                failures.append(f"party {node.party} still waits for {sum_.name} at {self.now:.0f} s")
            failures.extend(
                f"{name}: {end.status} at party {node.party}, though nobody lied or went for good"
                for name, end in node.ends().items()
                if end.status != "SUM" and not self.gone and not self.faults.liars
            )
        for sum_ in self.sums:
            failures.extend(self._check(sum_, here))
            self._promise(sum_, here, outcome)
        return outcome

    def _check(self, sum_: Sum, here: list[Node]) -> Iterator[str]:
        """One sum at all honest parties: exact, of enough contributors, and it ends alike everywhere.

        One case of two ends is the protocol's: whose patience ran out (`STALL_S` after it asked) before any honest
        party had the total has given up; the others, who asked later, may still get what it was part of, as if it had
        gone away. Noise never is beside a total.
        """
        ends = {node.party: end for node in here if (end := node.ends().get(sum_.name)) and end.status == "SUM"}
        if len({(end.survivors, end.sum_hash) for end in ends.values()}) > 1:
            yield f"{sum_.name}: parties have different totals: {ends}"
        came = min((self.ended_at[party, sum_.name] for party in ends), default=math.inf)
        for node in here:
            other, place = node.ends().get(sum_.name), (node.number, sum_.name)
            if other is None or other.status == "SUM" or not ends:
                continue
            patient = self.ended_at[place] >= self.asked_at[place] + STALL_S
            if other.status == "NOISE" or not patient or self.ended_at[place] > came:
                yield f"{sum_.name}: {other.status} at party {node.party}, though {sorted(ends)} have the total"
        for party, end in ends.items():
            if len(end.survivors) < self.profile.m_min:
                yield f"{sum_.name}: party {party} took a sum of {sorted(end.survivors)}, which are too few"
            exact = sum((self.vector(sum_, i) for i in end.survivors), np.zeros(sum_.d, np.uint32))
            if not np.array_equal(vectors.unpack(end.total, W), exact):
                yield f"{sum_.name}: the total at party {party} is not the sum of {sorted(end.survivors)}"

    def _promise(self, sum_: Sum, here: list[Node], outcome: Outcome) -> None:
        """Count the sums of which nearly all must give a result."""
        ask = self.asked.get(sum_.name)
        if ask is None or len(self.gone) > 1 or self.n - len(self.gone) < self.profile.m_min:
            return
        earlier = self.sums[: self.sums.index(sum_)]
        if sum_.pinned and any(self._same_group(sum_, other) for other in earlier):
            return
        seqs = [
            self._instances()[said.signed.sid].seq
            for said in self.transcript
            if said.honest and said.signed.kind == "READY" and said.signed.message.params == ask.params
        ]
        leader = names.proposer(self.contract, ask.group, min(seqs, default=0), 0, self.n)
        if not self.honest(leader) or leader in self.gone:
            return
        staying = [node.ends().get(sum_.name) for node in here if node.party not in self.gone]
        outcome.promised += 1
        outcome.kept += all(end is not None and end.status == "SUM" for end in staying)

    def _same_group(self, a: Sum, b: Sum) -> bool:
        return a.kind == b.kind and (a.kind == "data" or a.name[:2] == b.name[:2])

    def _instances(self) -> dict[bytes, Instance]:
        """All that can have been run, by sid."""
        if len(self._known) < 64 * len({ask.group for ask in self.asked.values()}):
            for ask in sorted(self.asked.values(), key=lambda ask: ask.name):
                for seq in range(64):
                    sid = names.sid_of(self.contract, ask.group, seq)
                    self._known[sid] = Instance(ask.group, seq, ask.pinned)
        return self._known


class _Files:
    """The files of one process, for work.perform."""

    def __init__(self, world: World, node: Node) -> None:
        self.world, self.node = world, node

    def read(self, digest: bytes) -> bytes:
        if digest in self.node.dropped:
            raise Dropped
        data: bytes = self.node.disk.tables["files"][digest]
        return data

    def write(self, digest: bytes, data: Buffer) -> None:
        self.world.keep_file(self.node, digest, bytes(data))


def _digest(item: work.Fetch | work.FetchTotal, data: bytes) -> bytes:
    """The name that these bytes have, as what was asked for."""
    match item:
        case work.Fetch(what="chunk"):
            return slices.chunk_digest(item.ctx, item.party, item.chunk, data)
        case work.Fetch():
            return slices.sum_digest(item.ctx, item.chunk, data)
    return slices.sum_hash(data)
