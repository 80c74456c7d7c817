"""Run a stage at all its participants in one thread, and break it: for the authors of algorithms.

    run = run_stage(fit, Params(), [{"table": a}, {"table": b}, {"table": c}])
    run.outputs["alice"]["model"]

A stage is a coroutine that does nothing but ask its daemon, so the daemons are played here, with the rules of
fedpeer/jobs/execution.py:

* A place is (turn, k), the k-th request of a turn; turn 0 is everything before the loop over `rounds`.
* Every answer is in a journal before the worker has it. A worker that is killed is started again with the last
  checkpoint, and is given the same answers; what it says again must be the same bytes (NotDeterministic).
* What leaves passes the gate (GateClosed) and is encoded, added modulo 2^24 and decoded as in a real sum; messages
  arrive in order per pair; one peer's value is agreed on.
* The order in which the participants run is chance, from `seed`.

Beyond a real run, the `shared` state of `rounds` is compared at every turn, and everything said is kept in `Run.said`.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Container, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedpeer import codec
from fedpeer.crypto import hash_
from fedpeer.errors import NotDeterministic, StageError, SumError
from fedpeer.governance.gate import Gate
from fedpeer.peers import (
    AgreeRequest,
    CheckpointRequest,
    Peers,
    ProgressRequest,
    ReceiveRequest,
    Request,
    Resume,
    SendRequest,
    SumRequest,
    Total,
)
from fedpeer.secure import fixedpoint
from fedpeer.stage import Output, Params, Stage

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
    answers: list[bytes] = field(default_factory=list)
    shared: list[bytes] = field(default_factory=list)
    """Its shared state at each checkpoint, packed."""


def run_stage(
    stage: Stage,
    params: Params,
    inputs: Mapping[str, Mapping[str, Output]] | Sequence[Mapping[str, Output]],
    *,
    roles: Mapping[str, str] | None = None,
    seed: int = 1,
    kills: Mapping[str, Container[int]] | None = None,
) -> Run:
    """Run `stage` at every participant to its end; whatever error ends it at one is raised, with the alias as a note.

    `inputs`: by alias, or a list (then the participants are alice, bob, carol …). `roles`: alias → role, not needed
    when the stage has one. `kills`: alias → numbers of requests (from 0, repeated ones not counted) at which its worker
    is killed: when the daemon has the request, and before the worker has an answer. range(n) kills at each of the first
    n, so that every place is also one where a worker goes on.
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
    return _Federation(stage, params, given, roles, seed, kills or {}).run()


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
    ) -> None:
        self.stage, self.params, self.inputs, self.roles = stage, params, inputs, dict(roles)
        self.done = Run()
        self.order = random.Random(seed)
        self.sums: dict[Place, dict[str, _Part]] = defaultdict(dict)
        self.proposed: dict[Place, dict[str, tuple[str, bytes]]] = defaultdict(dict)
        self.mail: dict[tuple[str, str], deque[tuple[str, bytes]]] = defaultdict(deque)
        self.shared: dict[int, tuple[str, bytes]] = {}
        self.members = [_Member(self, alias, seed, kills.get(alias, ())) for alias in roles]

    def run(self) -> Run:
        while running := [member for member in self.members if member.outputs is None]:
            self.order.shuffle(running)
            if not any(member.step() for member in running):
                waiting = "; ".join(f"{member.alias} waits for {member.waits_for}" for member in running)
                raise StageError(f"{self.stage.name} hangs: {waiting}")
        for member in self.members:
            self.done.outputs[member.alias] = member.outputs or {}
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
        self.transcript = Transcript(hash_("fp.test.chance", str(seed).encode(), alias.encode()))
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
        self._at(0, hash_("fp.test.hist", self.federation.stage.declaration_hash()))
        resume = None
        if (saved := self.saved) is not None:
            resume = Resume(saved.turn, unpack(saved.shared), unpack(saved.own), saved.chance)
        peers = Peers(self, self.alias, self.federation.roles, self.transcript.chance, resume)
        self.worker: Coroutine[Request, Any, dict[str, Any]] = self.federation.stage(
            peers, self.federation.params, **self.federation.inputs[self.alias]
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
                self._run_worker()
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
            self.outputs = self.federation.stage.check_outputs(end.value)
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
                    f"the message {tag!r} of {sender}",
                    codec.encode(["receive", sender, tag]),
                    lambda _: self.federation.receive(sender, self.alias, tag),
                    unpack,
                )
            case SumRequest(tag, values):
                self._sum(tag, values)
            case AgreeRequest(tag, value):
                packed = pack(value)
                self.gate.agree(tag, len(packed))
                self._ask(
                    f"the agreed {tag!r}",
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

    def _sum(self, tag: str, values: Totals) -> None:
        layout, vector = fixedpoint.encode(values)
        self.gate.sum(tag, layout, vector)
        part = _Part(tag, layout, self.history, vector, values)
        said = hash_("fp.test.said", codec.encode(["sum", tag, layout]), vector.tobytes())

        def total(answer: bytes) -> Total:
            added, survivors = unpack(answer)
            self.history = hash_("fp.test.hist", self.history, answer)
            return Total(fixedpoint.decode(layout, added, len(survivors)), survivors)

        self._ask(f"others at the sum {tag!r}", said, lambda place: self.federation.sum(place, self.alias, part), total)

    def _ask(
        self,
        waits_for: str,
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
            self.transcript.answers.append(answer)
            self.answer, self.waiting = value_of(answer), None
            return True

        self.waiting, self.waits_for = waiting, waits_for
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


# packed values in one piece


def pack(value: Any) -> bytes:
    """A message value as one piece of bytes: header and arrays, each after its length."""
    header, buffers = codec.pack_value(value)
    return b"".join(len(part).to_bytes(8, "little") + bytes(part) for part in (header, *buffers))


def split(packed: bytes) -> tuple[bytes, list[memoryview]]:
    """The header and the arrays of `pack`."""
    view, parts = memoryview(packed), []
    while view:
        size = int.from_bytes(view[:8], "little")
        parts.append(view[8 : 8 + size])
        view = view[8 + size :]
    return bytes(parts[0]), parts[1:]


def unpack(packed: bytes) -> Any:
    return codec.unpack_value(*split(packed))
