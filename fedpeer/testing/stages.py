"""Run a stage at all its participants in one thread, and break it: for the authors of algorithms.

    run = run_stage(fit, Fit(), [{"table": a}, {"table": b}, {"table": c}])
    run.outputs["alice"]["model"]

    check_stage(fit, Fit(), split, pooled)      # everything below, for 2, 3 and 5 participants

A stage is a coroutine that does nothing but ask its daemon, so the daemons are played here, with the rules of
fedpeer/jobs/execution.py:

* A place is (turn, k), the k-th request of a turn; turn 0 is everything before the loop over `rounds`.
* Every answer is in a journal before the worker has it. A worker that is killed is started again with the last
  checkpoint, and is given the same answers; what it says again must be the same bytes (NotDeterministic).
* What leaves passes the gate (GateClosed) and is encoded, added modulo 2^24 and decoded as in a real sum; messages
  arrive in order per pair; one peer's value is agreed on.
* The order in which the participants run is chance, from `seed`.

Beyond a real run, the `shared` state of `rounds` is compared at every turn, and everything said is kept in `Run.said`.

`check_stage` adds what a real federation has and one machine has not: processors of different age. What one
participant was given is given again to a process with the vector units of numpy, OpenBLAS and the C library turned
off (testing/replay.py), and must come to the same shared state and outputs.
"""

from __future__ import annotations

import inspect
import os
import random
import subprocess
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Container, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from fedpeer import artifact, codec
from fedpeer.crypto import Secret, hash_
from fedpeer.errors import NotDeterministic, StageError, SumError
from fedpeer.governance.gate import Gate
from fedpeer.jobs import keyring
from fedpeer.peers import (
    AgreeRequest,
    CheckpointRequest,
    Keys,
    Peers,
    ProgressRequest,
    ReceiveRequest,
    Request,
    Resume,
    SendRequest,
    SumRequest,
    Total,
)
from fedpeer.secure import fixedpoint, paillier
from fedpeer.stage import Model, Output, Params, Report, Stage
from fedpeer.testing.replay import pack, split, unpack, waits_for

CAST = ("alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi")
Place = tuple[int, int]
Totals = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Said:
    """One thing that a stage let out. `to` is None for a sum and an agreed value; `value` as the stage gave it."""

    kind: str
    """sum | agreed | message"""
    sender: str
    to: str | None
    tag: str
    turn: int
    k: int
    value: Any


@dataclass
class Run:
    """What came out of a stage, and what was said on the way."""

    outputs: dict[str, dict[str, Output | None]] = field(default_factory=dict)
    """Of each participant."""
    digests: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Of each participant's outputs, as daemons compare them."""
    said: list[Said] = field(default_factory=list)
    """In the order it was said. The value of a sum is one peer's own part, which nobody else sees."""
    totals: dict[Place, dict[str, Any]] = field(default_factory=dict)
    """Values of each sum, which all see."""
    turns: int = 0
    """Complete turns of `rounds`."""
    requests: dict[str, int] = field(default_factory=dict)
    """How many requests each participant made, repeated ones not counted."""
    progress: dict[str, list[ProgressRequest]] = field(default_factory=dict)
    transcripts: dict[str, Transcript] = field(default_factory=dict)
    """Of each participant."""


@dataclass
class Transcript:
    """Everything that one participant was given, in order: enough to run it again alone."""

    chance: bytes
    inputs: list[tuple[str, str, bytes]]
    """port, kind, bytes"""
    answers: list[tuple[str, bytes]] = field(default_factory=list)
    """What was asked for, and the answer, packed."""
    shared: list[bytes] = field(default_factory=list)
    """Its shared state at each checkpoint, packed."""
    own_key: bytes = field(default=b"", repr=False)
    moduli: Mapping[str, int] = field(default_factory=dict)
    """Paillier keys, as the stage has them."""


def run_stage(
    stage: Stage,
    params: Params,
    inputs: Mapping[str, Mapping[str, Output]] | Sequence[Mapping[str, Output]],
    *,
    roles: Mapping[str, str] | None = None,
    seed: int = 1,
    kills: Mapping[str, Container[int]] | None = None,
    keys: Mapping[str, bytes] | None = None,
    semi_honest: Mapping[str, Collection[str]] | None = None,
) -> Run:
    """Run `stage` at every participant to its end; whatever error ends it at one is raised, with the alias as a note.

    `inputs`: by alias, or a list (then the participants are alice, bob, carol …). `roles`: alias → role, not needed
    when the stage has one. `kills`: alias → numbers of requests (from 0, repeated ones not counted) at which its worker
    is killed: when the daemon has the request, and before the worker has an answer. range(n) kills at each of the first
    n, so that every place is also one where a worker goes on. `keys`: alias → p and q of its Paillier key, as
    jobs/keyring.py makes them, for those whose roles have one; by default some that are made once in this process.
    `semi_honest`: alias → whom its policy and the contract take to follow the protocol.
    """
    given = dict(inputs) if isinstance(inputs, Mapping) else dict(zip(CAST, inputs, strict=False))
    if not isinstance(inputs, Mapping) and len(given) != len(inputs):
        raise ValueError(f"name the participants: a list has room for {len(CAST)}")
    if roles is None:
        if len(stage.roles) != 1:
            raise ValueError(f"{stage.name} has the roles {', '.join(stage.roles)}: say who holds which")
        roles = dict.fromkeys(given, next(iter(stage.roles)))
    if list(roles) != list(given):
        raise ValueError("`roles` and `inputs` name the same participants in the same order")
    for role, count in stage.roles.items():
        if list(roles.values()).count(role) not in count:
            raise ValueError(f"{stage.name}: {count.least} to {count.most} participants are {role!r}")
    owners = [alias for alias, role in roles.items() if role in stage.keys]
    if owners and keys is None:
        keys = {alias: _key(place, params.key_bits) for place, alias in enumerate(owners)}  # type: ignore[attr-defined]
    return _Federation(stage, params, given, roles, seed, kills or {}, keys or {}, semi_honest or {}).run()


@cache
def _key(_place: int, bits: int) -> bytes:
    return keyring.make(bits)


def check_stage(
    stage: Stage,
    params: Params,
    split: Callable[[int], Mapping[str, Mapping[str, Output]] | Sequence[Mapping[str, Output]]],
    pooled: Callable[[Mapping[str, Mapping[str, Any]]], None],
    *,
    roles: Callable[[int], Mapping[str, str]] | None = None,
    sizes: Collection[int] = (2, 3, 5),
    equal: Collection[str] | None = None,
    seed: int = 1,
    keys: Callable[[int], Mapping[str, bytes]] | None = None,
) -> None:
    """Everything that an algorithm has to stand; AssertionError or the stage's own error otherwise.

    With 2, 3 and 5 participants (those that the roles allow; else the least that they do):
    * the outputs are right: `pooled` is given them by alias and compares them with the data in one place;
    * the outputs named in `equal` (by default the models and reports of a stage of members) have the same bytes at all;
    * one worker of each role, and then all of them, are killed at every request and go on from every turn: the outputs
      are the same to the bit, and nothing is said that was not said without, or twice;
    * one participant, on an older processor, comes to the same shared state and the same equal outputs.

    `split(n)` gives the inputs of n participants, `roles(n)` who holds which role, `keys(n)` their keys (run_stage).
    """
    if equal is None:
        alike = [port for port, cls in stage.outputs.items() if cls in (Model, Report)]
        equal = alike if set(stage.roles) == {"member"} else []
    least, most = (sum(getattr(count, end) for count in stage.roles.values()) for end in ("least", "most"))
    for n in [n for n in sizes if least <= n <= most] or [least]:
        inputs, held, given = split(n), roles(n) if roles else None, keys(n) if keys else None

        def run(kills: Mapping[str, Container[int]], inputs: Any = inputs, held: Any = held, given: Any = given) -> Run:
            return run_stage(stage, params, inputs, roles=held, seed=seed, kills=kills, keys=given)

        whole = run({})
        pooled(whole.outputs)
        first = next(iter(whole.digests.values()))
        for alias, digests in whole.digests.items():
            for port in equal:
                assert digests.get(port) == first.get(port), f"the output {port!r} of {alias} has other bytes"
        always = range(sys.maxsize)
        last = {role: alias for alias, role in (held or dict.fromkeys(whole.outputs, "member")).items()}
        for victims in [*([alias] for alias in last.values()), list(whole.outputs)]:
            killed = run(dict.fromkeys(victims, always))
            who = " and ".join(victims)
            assert killed.digests == whole.digests, f"with {who} killed at every request the outputs have other bytes"
            assert _places(killed) == _places(whole), f"with {who} killed at every request something else is said"
    alias = next(reversed(whole.outputs))
    replayed = _on_older_processor(stage, params, alias, held or dict.fromkeys(whole.outputs, "member"), whole)
    where = f"{alias}, on an older processor,"
    states = list(zip(replayed["shared"], whole.transcripts[alias].shared, strict=False))
    for turn, (there, here) in enumerate([(unpack(there.tobytes()), unpack(here)) for there, here in states]):
        other = [repr(key) for key in sorted(here) if pack(here[key]) != pack(there.get(key))]
        assert not other, (
            f"{where} has another shared state after {turn} turns: {', '.join(other)}. Derive it from totals by "
            f"+ - * / and square roots, or finish it with peers.agree"
        )
    assert len(replayed["shared"]) == len(whole.transcripts[alias].shared), f"{where} makes another number of turns"
    for port in equal:
        assert replayed["digests"].get(port) == whole.digests[alias].get(port), f"{where} has another {port!r}"


def _places(run: Run) -> list[tuple[Any, ...]]:
    return sorted((said.sender, said.to or "", said.turn, said.k, said.tag, said.kind) for said in run.said)


def _on_older_processor(stage: Stage, params: Params, alias: str, roles: Mapping[str, str], run: Run) -> Any:
    """One participant again, in a process whose numpy and OpenBLAS use no newer vector unit."""
    function = stage.function
    if "<locals>" in function.__qualname__:
        raise ValueError(f"{stage.name}: declare the stage at the top of its module, another process has to find it")
    given = run.transcripts[alias]
    task = {
        "file": inspect.getfile(function),
        "module": function.__module__,
        "name": function.__qualname__,
        "params": msgspec.json.encode(params),
        "me": alias,
        "roles": [[name, role] for name, role in roles.items()],
        "chance": given.chance,
        "inputs": [[port, kind, np.frombuffer(data, np.uint8)] for port, kind, data in given.inputs],
        "answers": [[what, np.frombuffer(answer, np.uint8)] for what, answer in given.answers],
        "keys": [given.own_key, [[owner, keyring.as_bytes(n)] for owner, n in given.moduli.items()]],
    }
    child = subprocess.run(
        [sys.executable, "-m", "fedpeer.testing.replay"],
        input=pack(task),
        capture_output=True,
        env={**os.environ, **older_processor()},
        check=False,
    )
    if child.returncode != 0:
        raise AssertionError(f"{alias}, on an older processor, fails:\n{child.stderr.decode(errors='replace')}")
    return unpack(child.stdout)


def older_processor() -> dict[str, str]:
    """The environment in which numpy, OpenBLAS and the C library's functions use no newer vector unit than SSE.

    Empty where this processor has none that they could do without.
    """
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    if not found:
        return {}
    return {
        "NPY_DISABLE_CPU_FEATURES": " ".join(found),
        "OPENBLAS_CORETYPE": "Prescott",
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX2,-FMA,-FMA4,-AVX2_Usable,-FMA_Usable",  # exp, log, pow, sin
    }


class _Federation:
    """All participants, and what their daemons have between them."""

    def __init__(
        self,
        stage: Stage,
        params: Params,
        inputs: Mapping[str, Mapping[str, Output]],
        roles: Mapping[str, str],
        seed: int,
        kills: Mapping[str, Container[int]],
        keys: Mapping[str, bytes],
        semi_honest: Mapping[str, Collection[str]],
    ) -> None:
        self.semi_honest = semi_honest
        self.stage, self.params, self.inputs, self.roles = stage, params, inputs, dict(roles)
        self.keys = dict(keys)
        self.moduli = {alias: int(paillier.private_key(primes).public.n) for alias, primes in keys.items()}
        self.done = Run()
        self.order = random.Random(seed)
        self.sums: dict[Place, dict[str, _Part]] = defaultdict(dict)
        self.proposed: dict[Place, dict[str, tuple[str, bytes]]] = defaultdict(dict)
        self.mail: dict[tuple[str, str], deque[tuple[str, bytes]]] = defaultdict(deque)
        self.shared: dict[int, tuple[str, bytes]] = {}
        self.members = [_Member(self, alias, seed, kills.get(alias, ())) for alias in roles]

    def run(self) -> Run:
        try:
            while running := [member for member in self.members if member.outputs is None]:
                self.order.shuffle(running)
                if not any(member.step() for member in running):
                    waiting = "; ".join(f"{member.alias} waits for {member.waits_for}" for member in running)
                    raise StageError(f"{self.stage.name} hangs: {waiting}")
        finally:
            for member in self.members:
                member.worker.close()
        for member in self.members:
            self.done.outputs[member.alias] = outputs = member.outputs or {}
            self.done.digests[member.alias] = {
                port: artifact.digest(artifact.dump(value)[1]) for port, value in outputs.items() if value is not None
            }
            self.done.requests[member.alias] = member.served
            self.done.progress[member.alias] = member.progress
            self.done.transcripts[member.alias] = member.transcript
        self.done.turns = max(self.shared, default=0)
        return self.done

    def sum(self, place: Place, alias: str, part: _Part) -> bytes | None:
        """The packed total and survivors of this place, once all have handed in a part."""
        parts = self.sums[place]
        if alias not in parts:
            parts[alias] = part
            self.done.said.append(Said("sum", alias, None, part.tag, *place, part.values))
        first = next(iter(parts))
        for what in ("tag", "layout", "history"):
            here, there = getattr(part, what), getattr(parts[first], what)
            if here != there:
                raise SumError(
                    f"{alias} and {first} do not agree on request {place[1]} of turn {place[0]}: its {what} is "
                    f"{here!r:.200} here and {there!r:.200} there",
                    peer=first,
                )
        if len(parts) < len(self.members):
            return None
        vector = np.zeros(part.vector.shape, dtype=np.uint32)
        for each in parts.values():
            vector = (vector + each.vector) & np.uint32((1 << fixedpoint.WIDTH) - 1)
        self.done.totals[place] = fixedpoint.decode(part.layout, vector, len(self.members))
        return pack([vector, list(self.roles)])

    def agree(self, place: Place, alias: str, tag: str, value: bytes) -> bytes | None:
        """The value of this place's proposer, once it is there."""
        proposed = self.proposed[place]
        if alias not in proposed:
            proposed[alias] = tag, value
            self.done.said.append(Said("agreed", alias, None, tag, *place, unpack(value)))
        lead = hash_("fp.test.lead", codec.encode(list(place)))
        proposer = list(self.roles)[int.from_bytes(lead[:4], "little") % len(self.roles)]
        if proposer not in proposed:
            return None
        if proposed[proposer][0] != tag:
            raise StageError(f"{alias} agrees on {tag!r} where {proposer} agrees on {proposed[proposer][0]!r}")
        return proposed[proposer][1]

    def send(self, place: Place, sender: str, to: str, tag: str, value: bytes) -> None:
        self.mail[sender, to].append((tag, value))
        self.done.said.append(Said("message", sender, to, tag, *place, unpack(value)))

    def receive(self, sender: str, to: str, tag: str) -> bytes | None:
        """The next message, taken out of the mail."""
        mail = self.mail[sender, to]
        if not mail:
            return None
        if mail[0][0] != tag:
            raise StageError(
                f"{to} asks {sender} for {tag!r}, but its next message is {mail[0][0]!r}: messages of one sender are "
                f"received in the order they were sent"
            )
        return mail.popleft()[1]

    def compare_shared(self, turn: int, alias: str, shared: bytes) -> None:
        """Refuse a shared state that is not what another participant has at this turn."""
        first, theirs = self.shared.setdefault(turn, (alias, shared))
        if theirs != shared:
            here, there = unpack(shared), unpack(theirs)
            keys = sorted(key for key in {*here, *there} if pack(here.get(key)) != pack(there.get(key)))
            raise StageError(
                f"`shared` is not equal at all peers after {turn} turns: {', '.join(map(repr, keys))} differs between "
                f"{first} and {alias}",
                hint="derive it from totals by + - * / and square roots, or finish it with peers.agree",
            )


@dataclass(frozen=True)
class _Part:
    """What one participant hands in for a sum."""

    tag: str
    layout: fixedpoint.Layout
    history: bytes
    vector: npt.NDArray[np.uint32]
    values: Totals


@dataclass(frozen=True)
class _Saved:
    """A checkpoint as the daemon keeps it: packed."""

    turn: int
    shared: bytes
    own: bytes
    chance: bytes
    history: bytes


class _Member:
    """One participant: what its daemon keeps, and the worker that runs now."""

    def __init__(self, federation: _Federation, alias: str, seed: int, kills: Container[int]) -> None:
        self.federation, self.alias, self.kills = federation, alias, kills
        self.transcript = Transcript(
            hash_("fp.test.chance", str(seed).encode(), alias.encode()),
            [(port, *artifact.dump(value)) for port, value in federation.inputs[alias].items()],
            own_key=federation.keys.get(alias, b""),
            moduli=federation.moduli,
        )
        self.gate = Gate(federation.stage, federation.roles, alias)
        self.journal: dict[Place, tuple[bytes, bytes | None]] = {}  # what was said or asked, and the answer
        self.saved: _Saved | None = None
        self.history = b""
        self.progress: list[ProgressRequest] = []
        self.outputs: dict[str, Output | None] | None = None
        self.served = 0
        self.reached = (-1, -1)
        self._start()

    # the worker

    def _start(self) -> None:
        """A new worker, from the checkpoint; its requests are in the first turn until it is at its loop."""
        self.asked: deque[Request] = deque()
        self.waiting: Callable[[], bool] | None = None
        self.waits_for = ""
        self.answer: Any = None
        self.returned: dict[str, Output | None] | None = None
        self._at(0, hash_("fp.test.hist", self.federation.stage.declaration_hash()))
        resume = None
        if (saved := self.saved) is not None:
            resume = Resume(saved.turn, unpack(saved.shared), unpack(saved.own), saved.chance)
        own = self.federation.keys.get(self.alias)
        keys = Keys(None if own is None else Secret(own), self.federation.moduli)
        trusted = self.federation.semi_honest.get(self.alias, ())
        peers = Peers(
            self,
            self.alias,
            self.federation.roles,
            self.transcript.chance,
            resume,
            keys=keys,
            semi_honest=trusted,
        )
        self.worker: Coroutine[Request, Any, dict[str, Any]] = self.federation.stage(
            peers,
            self.federation.params,
            **{port: artifact.load(kind, data) for port, kind, data in self.transcript.inputs},
        )

    def post(self, request: Request) -> None:
        """A request without an answer. What it carries is packed at once, for the stage may change it afterwards."""
        match request:
            case SendRequest(to, tag, value):
                request = SendRequest(to, tag, pack(value))
            case CheckpointRequest(turn, shared, own, chance):
                request = CheckpointRequest(turn, {"": pack(shared)}, {"": pack(own)}, chance)
        self.asked.append(request)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return [function(item) for item in items]

    def step(self) -> bool:
        """Serve a request, or let the worker run until it asks; False if it has to wait for others."""
        try:
            if self.waiting is not None:
                return self.waiting()
            if not self.asked:
                if self.returned is None:
                    self._run_worker()
                else:
                    self.outputs = self.returned
                return True
            mark = self.turn, self.asked_in_turn
            self.asked_in_turn += 1
            self._serve(self.asked.popleft())
            if mark > self.reached:
                self.reached = mark
                self.served += 1
                if self.served - 1 in self.kills:
                    self.worker.close()
                    self._start()
            return True
        except Exception as error:
            error.add_note(f"in {self.federation.stage.name} at {self.alias}, turn {self.turn}")
            raise

    def _run_worker(self) -> None:
        answer, self.answer = self.answer, None
        try:
            request = self.worker.send(answer)
        except StopIteration as end:
            self.returned = self.federation.stage.check_outputs(end.value)
            return
        if not isinstance(request, ReceiveRequest | SumRequest | AgreeRequest):
            raise StageError("a stage may await nothing but the methods of `peers`")
        self.asked.append(request)

    # its daemon

    def _serve(self, request: Request) -> None:
        match request:
            case SendRequest(to, tag, value):
                self._send(to, tag, value)
            case ReceiveRequest(sender, tag):
                self.gate.receive(sender, tag)
                self._ask(
                    request,
                    codec.encode(["receive", sender, tag]),
                    lambda _: self.federation.receive(sender, self.alias, tag),
                    unpack,
                )
            case SumRequest():
                self._sum(request)
            case AgreeRequest(tag, value):
                packed = pack(value)
                self.gate.agree(tag, len(packed))
                self._ask(
                    request,
                    codec.encode(["agree", tag]),
                    lambda place: self.federation.agree(place, self.alias, tag, packed),
                    unpack,
                )
            case CheckpointRequest():
                self._checkpoint(request)
            case ProgressRequest():
                self.progress.append(request)

    def _send(self, to: str, tag: str, value: bytes) -> None:
        self.gate.send(to, tag, *split(value))
        place = self._next_place()
        said = hash_("fp.test.said", codec.encode(["send", to, tag]), value)
        if self._journaled(place, said) is None:
            self.journal[place] = said, b""
            self.federation.send(place, self.alias, to, tag, value)

    def _sum(self, request: SumRequest) -> None:
        tag, values = request.tag, request.values
        layout, vector = fixedpoint.encode(values, self.federation.stage.codecs(tag), request.chance)
        self.gate.sum(tag, layout, vector)
        part = _Part(tag, layout, self.history, vector, values)
        said = hash_("fp.test.said", codec.encode(["sum", tag, layout]), vector.tobytes())

        def total(answer: bytes) -> Total:
            added, survivors = unpack(answer)
            self.history = hash_("fp.test.hist", self.history, answer)
            return Total(fixedpoint.decode(layout, added, len(survivors)), survivors)

        self._ask(request, said, lambda place: self.federation.sum(place, self.alias, part), total)

    def _ask(
        self,
        request: ReceiveRequest | SumRequest | AgreeRequest,
        said: bytes,
        attempt: Callable[[Place], bytes | None],
        value_of: Callable[[bytes], Any],
    ) -> None:
        """Answer from the journal, or else as soon as `attempt` has an answer."""
        place = self._next_place()
        kept = self._journaled(place, said)
        if kept is not None:
            self.answer = value_of(kept)
            return
        self.journal[place] = said, None

        def waiting() -> bool:
            answer = attempt(place)
            if answer is None:
                return False
            self.journal[place] = said, answer
            self.transcript.answers.append((waits_for(request), answer))
            self.answer, self.waiting = value_of(answer), None
            return True

        self.waiting, self.waits_for = waiting, waits_for(request)
        waiting()

    def _checkpoint(self, request: CheckpointRequest) -> None:
        if self.saved is None or request.turn != self.saved.turn:
            shared, own = request.shared[""], request.own[""]
            self.federation.compare_shared(request.turn, self.alias, shared)
            history = hash_("fp.test.hist", self.history, shared)
            self.saved = _Saved(request.turn, shared, own, request.chance, history)
            self.transcript.shared.append(shared)
            self.journal = {place: kept for place, kept in self.journal.items() if place[0] == 0}
        self._at(self.saved.turn + 1, self.saved.history)

    # places

    def _at(self, turn: int, history: bytes) -> None:
        self.turn, self.k, self.asked_in_turn, self.history = turn, 0, 0, history
        self.gate.turn(turn)

    def _next_place(self) -> Place:
        place = self.turn, self.k
        self.k += 1
        return place

    def _journaled(self, place: Place, said: bytes) -> bytes | None:
        kept = self.journal.get(place)
        if kept is None:
            return None
        if kept[0] != said:
            raise NotDeterministic(
                f"{self.alias} repeats turn {place[0]} after a restart, and its request {place[1]} is another one than "
                f"the first time",
                hint="values and chance come from the inputs and from `peers` alone; what must outlive a turn lies in "
                "the dicts given to `rounds`",
            )
        return kept[1]
