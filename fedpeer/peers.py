"""What a stage may do: one of the two pages an algorithm author reads (the other is stage.py).

    async def fit(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
        model = {"weights": np.zeros(d)}                            # equal at every peer
        for turn in peers.rounds(params.max_iter, shared=model):
            total = await peers.sum("gradient", {"g": gradient(model["weights"]), "n": np.array([table.n_samples])})
            model["weights"] = model["weights"] - 0.1 * total["g"] / total["n"]
            peers.progress(turn + 1, params.max_iter)
        return {"model": Model("horizontal.mine", {}, {"weights": model["weights"]})}

Everything a stage does is a request to its own daemon; `Peers` is nothing but these requests. There is no clock and
no timeout here: waiting for others, dropped links and restarts are the daemon's business. A worker that is killed is
started again at the last turn of `rounds`: what was received and summed since is given again, what was sent is not
sent twice. Hence two rules: values and chance come only from the inputs and from `peers`, and what must outlive a
turn lies in the dicts given to `rounds`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fedpeer import codec
from fedpeer.crypto import Secret, chacha20_stream, hash_
from fedpeer.errors import StageError

T = TypeVar("T")
Array = npt.NDArray[Any]


# requests: what travels from a stage to its daemon. Only Receive, Sum and Agree are answered.


@dataclass(frozen=True)
class SendRequest:
    to: str
    tag: str
    value: Any


@dataclass(frozen=True)
class ReceiveRequest:
    sender: str
    tag: str


@dataclass(frozen=True)
class SumRequest:
    tag: str
    values: Mapping[str, Array]
    chance: bytes = field(repr=False)
    """32 secret bytes for rounding"""


@dataclass(frozen=True)
class AgreeRequest:
    tag: str
    value: Any


@dataclass(frozen=True)
class CheckpointRequest:
    """`turn` turns are complete. `chance` is the key of the next one; the former is to be erased."""

    turn: int
    shared: Mapping[str, Any]
    own: Mapping[str, Any]
    chance: bytes


@dataclass(frozen=True)
class ProgressRequest:
    done: int
    of: int
    metrics: Mapping[str, float]


Request = SendRequest | ReceiveRequest | SumRequest | AgreeRequest | CheckpointRequest | ProgressRequest


@dataclass(frozen=True)
class Total:
    """What a sum gives: `values` by name (int64 for integers, float64 for floats) and who contributed."""

    values: Mapping[str, Array]
    survivors: Sequence[str]

    def __getitem__(self, name: str) -> Array:
        return self.values[name]


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from: `turn` turns are complete."""

    turn: int
    shared: Mapping[str, Any]
    own: Mapping[str, Any]
    chance: bytes


@dataclass(frozen=True)
class Keys:
    """The Paillier keys of a stage that declares some (secure/paillier.py). The daemon made and checked them."""

    own: Secret | None = None
    """p and q, big-endian, one after the other; None where this peer's role has no key"""
    moduli: Mapping[str, int] = field(default_factory=dict)
    """n of each participant that has a key, by alias"""


class Driver(Protocol):
    """Takes the requests that have no answer. The worker's driver writes them to the daemon's socket."""

    def post(self, request: Request) -> None: ...

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]: ...


class Peers:
    """The other participants of a stage, and chance. One object per run of a stage; given by whoever runs it."""

    def __init__(
        self,
        driver: Driver,
        me: str,
        roles: Mapping[str, str],
        chance: bytes,
        resume: Resume | None = None,
        honest: int = 1,
        keys: Keys | None = None,
        semi_honest: Collection[str] = (),
    ) -> None:
        self._driver = driver
        self._roles = dict(roles)
        self._resume = resume
        self._in_rounds = False
        self.me = me
        """My alias in the contract."""
        self.role = roles[me]
        """My role in this stage."""
        self.honest = honest
        """So many contributors of every sum, at least, do not pool what they see; see secure/dp.py."""
        self.keys = keys or Keys()
        """Of the roles that the stage declares keys for: one key for each contract, at each start of a worker."""
        self.semi_honest = frozenset(semi_honest)
        """Aliases whom the contract (its profile) and my organization (its policy) take to follow the protocol."""
        self.random = Chance(chance)
        """The only source of chance in a stage, another at each peer. What all must draw alike comes from a total."""

    @property
    def all(self) -> list[str]:
        """Aliases of all participants of the stage, me too, in the contract's order (equal at every peer)."""
        return list(self._roles)

    @property
    def others(self) -> list[str]:
        return [alias for alias in self._roles if alias != self.me]

    def having(self, role: str) -> list[str]:
        """Aliases that hold this role, in the contract's order."""
        return [alias for alias, held in self._roles.items() if held == role]

    async def sum(self, tag: str, values: Array | Mapping[str, Array]) -> Total:
        """The exact sum of `values` over the participants; nobody learns one peer's part.

        `values`: an array (named "values" in the total) or a dict of arrays; shapes and dtypes equal at all peers.
        Integers: |v| < 2^54, exact. Floats: |x| < 2^22, each rounded once to a multiple of 2^-32, the sum exact and
        equal, bit for bit, at every peer. NaN, infinity or a value out of range fails the stage before anything leaves.
        A sum may declare other ranges, or `clip` for large models (stage.Sum).
        """
        given = values if isinstance(values, Mapping) else {"values": values}
        arrays = {name: np.asarray(given[name]) for name in sorted(given)}
        total: Total = await _ask(SumRequest(tag, arrays, self.random.bytes(32)))
        self.random.absorb(codec.pack_value([dict(total.values), list(total.survivors)]))
        return total

    async def agree(self, tag: str, value: T) -> T:
        """One value for all, where arithmetic may differ by processor in the last bits (relative 1e-9).

        `value` must be derived from totals. One peer's is taken; another that differs by more fails the job.
        """
        agreed: T = await _ask(AgreeRequest(tag, value))
        if not _close(value, agreed):
            raise StageError(f"the value {tag!r} that was proposed to all is not what came out here")
        self.random.absorb(codec.pack_value(agreed))
        return agreed

    async def send(self, to: str, tag: str, value: Any) -> None:
        """Send a message value (codec.py) to a participant; goes on at once, delivered exactly once and in order."""
        if to not in self._roles or to == self.me:
            raise StageError(f"{to!r} is not another participant of this stage")
        self._driver.post(SendRequest(to, tag, value))

    async def receive(self, sender: str, tag: str) -> Any:
        """The next message with this tag from this participant."""
        if sender not in self._roles or sender == self.me:
            raise StageError(f"{sender!r} is not another participant of this stage")
        value = await _ask(ReceiveRequest(sender, tag))
        self.random.absorb(codec.pack_value(value))
        return value

    async def broadcast(self, tag: str, value: Any, *, role: str | None = None) -> None:
        """Send the same value to all others, or to all others that hold a role."""
        for alias in self.others:
            if role is None or self._roles[alias] == role:
                await self.send(alias, tag, value)

    async def gather(self, role: str, tag: str) -> dict[str, Any]:
        """One message with this tag from each other participant that holds a role, by alias."""
        return {alias: await self.receive(alias, tag) for alias in self.having(role) if alias != self.me}

    def rounds(self, count: int, *, shared: dict[str, Any], own: dict[str, Any] | None = None) -> Iterator[int]:
        """Count turns 0 … count-1, with a checkpoint after each; at most one such loop in a stage.

        `shared` is equal at all peers (it is digested and compared with each sum), `own` never leaves. Both are dicts
        of message values, changed in place by the loop; after a crash they are filled from the last checkpoint and the
        loop goes on there. Code before the loop runs again then, and is given the same answers as the first time.

        So read the state from the dicts (`shared["w"]`), not from a name bound to it before the loop, and count turns
        in them: after a restart at the end the loop has no turn left, and its variable was never set. A tuple comes
        back as a list, a numpy scalar as a Python number. The loop may be left by `break`; what follows it then belongs
        to the turn it was left in, and asks and sums as anywhere; that turn may be repeated whole after a crash.

        Shared state comes from totals by + - * / and square roots, comparisons and sums along columns (`math.fsum` for
        a long sum), or is finished with `agree`: exp, log, `@` and numpy.linalg give other bits on other processors. A
        peer's own part of a sum may use anything.
        """
        if self._in_rounds:
            raise StageError("a stage has one loop over peers.rounds")
        self._in_rounds = True
        own = {} if own is None else own
        first = 0
        if self._resume is not None:
            first = self._resume.turn
            for state, saved in ((shared, self._resume.shared), (own, self._resume.own)):
                state.clear()
                state.update({name: _writable(value) for name, value in saved.items()})
            self.random.become(self._resume.chance)
            self._post_checkpoint(first, shared, own)  # the daemon knows it; it marks where the answers go on
        else:
            self._checkpoint(0, shared, own)
        for turn in range(first, count):
            yield turn
            self._checkpoint(turn + 1, shared, own)

    def progress(self, done: int, of: int, **metrics: float) -> None:
        """Tell the own operator how far it is; the metrics are shown and kept at this peer only."""
        self._driver.post(ProgressRequest(done, of, {name: float(value) for name, value in metrics.items()}))

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """[function(item) for item in items] on all cores, the same result whatever their number.

        The function is called in other processes: it returns a message value, what it changes is lost, and it asks
        nothing of `peers` but `peers.random`, which is another one for each item.
        """
        outer, seed = self.random, self.random.bytes(32)

        def one(numbered: tuple[int, Any]) -> Any:
            index, item = numbered
            self.random = Chance(hash_("fp.chance.item", index.to_bytes(8, "little"), key=seed))
            return function(item)

        try:
            return self._driver.map(one, list(enumerate(items)))
        finally:
            self.random = outer

    def _checkpoint(self, turn: int, shared: dict[str, Any], own: dict[str, Any]) -> None:
        self.random.ratchet()
        self._post_checkpoint(turn, shared, own)

    def _post_checkpoint(self, turn: int, shared: dict[str, Any], own: dict[str, Any]) -> None:
        self._driver.post(CheckpointRequest(turn, dict(shared), dict(own), self.random.key))


class Chance:
    """Uniform bytes and numbers keyed by the turn: same inputs, same bytes; other inputs, independent ones.

    The key becomes H(key, digest) of everything received or summed, and moves through a one-way step at each
    checkpoint, so that a stored key says nothing about the turns before it.
    Source: a keyed BLAKE2b ratchet over a ChaCha20 stream.
    """

    def __init__(self, key: bytes) -> None:
        self.become(key)

    def become(self, key: bytes) -> None:
        self.key = key
        self._counter = 0

    def absorb(self, packed: tuple[bytes, list[memoryview]]) -> None:
        header, buffers = packed
        self.become(hash_("fp.chance.in", hash_("fp.chance.value", header, *buffers), key=self.key))

    def ratchet(self) -> None:
        self.become(hash_("fp.chance.turn", key=self.key))

    def bytes(self, size: int) -> bytes:
        """`size` uniform bytes."""
        seed = hash_("fp.chance.draw", self._counter.to_bytes(8, "little"), key=self.key)
        self._counter += 1
        return chacha20_stream(seed, b"\0" * 12, b"\0" * size)

    def integers(self, low: int, high: int, size: int) -> npt.NDArray[np.int64]:
        """`size` integers uniform in [low, high), at most 2^63 apart; without bias."""
        return self.generator().integers(low, high, size=size, dtype=np.int64)

    def below(self, bound: int, size: int) -> list[int]:
        """`size` integers uniform in [0, bound), of any length; without bias, and good for masks and keys."""
        bits = (bound - 1).bit_length()
        width = max(-(-bits // 8), 1)
        found: list[int] = []
        while len(found) < size:  # what is too large is drawn again, less than every second one
            raw = self.bytes(width * (size - len(found)))
            drawn = (int.from_bytes(raw[at : at + width], "little") for at in range(0, len(raw), width))
            found += [value for value in (one & ((1 << bits) - 1) for one in drawn) if value < bound]
        return found

    def permutation(self, n: int) -> npt.NDArray[np.int64]:
        """A uniform order of 0 … n-1."""
        keys = np.frombuffer(self.bytes(16 * n), dtype="<u8").reshape(2, n)
        return np.lexsort(keys).astype(np.int64)

    def generator(self) -> np.random.Generator:
        """A numpy generator seeded from here, for simulation-grade numbers (not for keys, masks or noise)."""
        return np.random.Generator(np.random.PCG64(int.from_bytes(self.bytes(32), "little")))

    def __repr__(self) -> str:
        return "<chance>"


@types.coroutine
def _ask(request: Request) -> Generator[Request, Any, Any]:
    """The one way a stage waits: its driver takes the request and sends the answer back in."""
    return (yield request)


def _close(mine: Any, theirs: Any) -> bool:
    """Whether two message values have one shape and differ by rounding only (relative 1e-9)."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return mine.keys() == theirs.keys() and all(_close(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, list | tuple) and isinstance(theirs, list | tuple):
        return len(mine) == len(theirs) and all(_close(a, b) for a, b in zip(mine, theirs, strict=True))
    if isinstance(mine, float | np.ndarray | np.floating) and np.shape(mine) == np.shape(theirs):
        return bool(np.allclose(mine, theirs, rtol=1e-9, atol=1e-12, equal_nan=False))
    return bool(mine == theirs)


def _writable(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, list):
        return [_writable(item) for item in value]
    if isinstance(value, dict):
        return {key: _writable(item) for key, item in value.items()}
    return value
