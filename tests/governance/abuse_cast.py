"""The cast of the privacy-abuse suite: mallory, whose daemon checks nothing that she submits, and alice, who has data.

    async with cast(folder, secret=1) as play:
        async with play.watched():                      # from here on all that alice sends is kept
            job = await play.propose(play.contract(STATISTICS, rules="min_parties = 2"))
            await play.ended(job)

Rules
* alice is unpatched and has the default policy, which asks nobody (`approve = "auto"`) and what a play adds. bob and
  carol are honest and allow everything: no refusal is theirs, but for what the plays say.
* mallory writes contracts that her own daemon would refuse, and skips its checks. She cannot sign for others.
* `secret` chooses alice's rows, in number and content. Everything else is the same in two plays of one attack, the
  contract's nonce too, so that what alice sends may differ only if it depends on her rows.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import trio

from fedpeer import codec, stage
from fedpeer.crypto import Secret, hash_
from fedpeer.governance import audit, heads
from fedpeer.identity import Identity
from fedpeer.jobs import contract, lifecycle
from fedpeer.jobs.contract import Contract, FindStage, Participant
from fedpeer.jobs.views import JobView
from fedpeer.mesh import records
from fedpeer.mesh.messages import DIGEST_BYTES, RECORDS, SYNC, Near, Sync
from fedpeer.mesh.records import Signed
from fedpeer.mesh.service import Mesh
from fedpeer.testing.federation import EPOCH, LAX, Federation, Organization, federation

NAMES = ["mallory", "alice", "bob", "carol"]
THREE = NAMES[:3]
AUTO = 'approve = "auto"\n'
ANSWER_S = 30
ALICE = Identity(Secret(hash_("fp.testing", b"alice"))).id

STAGE = '[[stage]]\nid = "ask"\nrun = "{run}"\ninputs = {{ table = "dataset:{dataset}" }}\nparams = {{ {params} }}\n'


def stages(run: str, params: str = "", dataset: str = "rows") -> str:
    return STAGE.format(run=run, params=params, dataset=dataset)


STATISTICS = stages("horizontal.statistics:run")
FIT = stages("horizontal.logistic:fit", "max_iter = 1")
"""Two sums: moments, exact to the last bit, and a gradient."""
ALIGN = """
[[stage]]
id = "align"
run = "vertical.align:run"
roles = { guest = "mallory", host = "alice" }
inputs = { table = "dataset:people" }
params = { PARAMS }
"""


@dataclass
class Watch:
    """What alice sent while she was watched."""

    frames: list[tuple[float, Any, bytes, bytes]] = field(default_factory=list)
    """(seconds since it began, channel, header, payload), before they are sealed"""
    digests: set[bytes] = field(default_factory=set)
    """of all records that she has, her own and others'"""

    def told(self) -> list[tuple[Any, ...]]:
        """What alice herself said, each with its second: a record by its signed bytes, or by its size if it is salted.

        Not here is what can tell nothing of her rows: what others signed and she passed on, of which records she has
        the digests, whom she is connected to, and heads of audit logs (test_audit.py shows that of them).
        """
        told: list[tuple[Any, ...]] = []
        for at, name, header, payload in self.frames:
            if name == RECORDS:
                record = records.parse(payload).record
                if record.sender == ALICE and record.kind not in heads.KINDS:
                    what = len(payload) if is_salted(record) else payload
                    told.append((round(at), record.kind, record.slot, what))
            elif name == SYNC and header:
                codec.decode_as(Near, header)
            elif name == SYNC:
                sync = codec.decode_as(Sync, payload)
                known = [
                    sync.digests[i : i + DIGEST_BYTES] in self.digests
                    for i in range(0, len(sync.digests), DIGEST_BYTES)
                ]
                if sync.received or not all(known):
                    told.append((round(at), name, payload))
            else:
                told.append((round(at), name, header, payload))
        return sorted(told, key=repr)

    def of_stages(self) -> list[tuple[Any, ...]]:
        """What comes of a stage: letters and files, their receipts, and records that are not a job's own."""
        return [item for item in self.told() if not (isinstance(item[1], str) and item[1] in lifecycle.KINDS)]


def is_salted(record: records.Record) -> bool:
    """Whether chance is in it: the commitments of who takes part."""
    return record.kind == lifecycle.COUNTERSIGN and codec.decode_as(lifecycle.Answer, record.body).approved


class Play:
    """A federation in which mallory attacks."""

    def __init__(self, peers: Federation, secret: int) -> None:
        self.peers, self.secret, self.watch = peers, secret, Watch()
        self._nonce = 0
        self._watching = False
        self._began = 0.0
        self.epoch = trio.current_time()

    @property
    def mallory(self) -> Organization:
        return self.peers["mallory"]

    @property
    def alice(self) -> Organization:
        return self.peers["alice"]

    # data

    def values(self, name: str, rows: int, features: int) -> np.ndarray[Any, Any]:
        """The features of a participant; alice's are of `secret`."""
        seed = [NAMES.index(name), self.secret if name == "alice" else 0]
        return np.round(np.random.Generator(np.random.PCG64(seed)).normal(size=(rows, features)), 6)

    async def offer(
        self,
        dataset: str = "rows",
        rows: int = 200,
        features: int = 2,
        *,
        names: Sequence[str] = NAMES,
        first: int = 0,
        ids: str = "",
    ) -> None:
        """Everybody offers a dataset of so many rows, from `first` on; alice has a few more, other ones in each play.

        `ids`: what all ids begin with, so that those of all are the same.
        """
        for name in names:
            if name not in self.peers:
                continue
            count = rows + (5 * self.secret if name == "alice" else 0)
            x = self.values(name, count, features)
            who = ids or (f"alice{self.secret}" if name == "alice" else name)
            lines = [",".join(["id", *(f"x{j}" for j in range(features)), "y"])]
            lines += [f"{who}-{i},{','.join(map(repr, map(float, x[i])))},{i % 2}" for i in range(first, count)]
            path = self.peers.folder / f"{name}-{dataset}.csv"
            path.write_text("\n".join(lines) + "\n")
            await self.peers[name].daemon.catalog.add(dataset, str(path), "id", "y")

    # what mallory does

    def contract(self, text: str, *, names: Sequence[str] = THREE, rules: str = "", nonce: bytes = b"") -> Contract:
        """A contract as mallory would write it, that can run as far as its text says."""
        self._nonce += 1
        participants = "\n".join(f'{name} = "{self.peers[name].identity.id}"' for name in names)
        return contract.parse(
            f'version = 1\nname = "job-{self._nonce}"\n[participants]\n{participants}\n{text}\n'
            f"[rules]\nanswer_s = {ANSWER_S}\n{rules}\n",
            me=self.mallory.identity.id,
            resolve=str,
            find=self.peers.find,
            now=int(EPOCH.timestamp() + self._began - self.epoch),
            nonce=nonce or self._nonce.to_bytes(contract.NONCE_BYTES, "big"),
        )

    async def propose(self, read: Contract) -> str:
        """Have mallory's daemon say it, whatever it would say to it by itself."""
        job = await self.mallory.daemon.jobs._add(codec.encode(read), read)
        return job.id.hex()

    async def honest(self, text: str, **more: Any) -> dict[str, JobView]:
        """A job that alice allows, to its end everywhere."""
        job = await self.propose(self.contract(text, **more))
        views = await self.ended(job, more.get("names", THREE))
        assert {view.state for view in views.values()} == {"done"}, views["alice"].error
        await self.settled()
        return views

    # what comes of it

    async def ended(self, job: str, names: Sequence[str] = ("mallory", "alice", "bob")) -> dict[str, JobView]:
        with trio.fail_after(3600):
            while bytes.fromhex(job) not in self.alice.daemon.jobs._jobs:
                await trio.sleep(0.1)
            return {name: await self.peers[name].daemon.jobs.wait(job) for name in names}

    async def settled(self) -> None:
        with trio.fail_after(600):
            while any(peer.daemon.mesh.scopes for peer in self.peers.values()):
                await trio.sleep(0.2)

    def watch_from_now(self) -> None:
        self.watch, self._watching = Watch(), True

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Keep what alice sends meanwhile, until nobody needs anything of any job. It begins at a full minute."""
        self._began = self.epoch + 60.0 * ((trio.current_time() - self.epoch) // 60 + 1)
        await trio.sleep_until(self._began)
        self.watch_from_now()
        yield
        await self.settled()
        self._watching = False

    async def audited(self, job: str) -> list[audit.Entry]:
        """Alice's audit log of a job."""
        return await self.alice.daemon.store.read(lambda tx: audit.entries(tx, job=bytes.fromhex(job)))

    def note_records(self, mesh: Mesh) -> None:
        """Keep the digests of what alice has."""
        added = mesh._added

        def adding(signed: Signed, source: str | None) -> None:
            self.watch.digests.add(signed.digest)
            added(signed, source)

        mesh._added = adding  # type: ignore[method-assign]

    def record(self, converse: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap what makes alice's sessions so that what they send is kept."""

        def conversing(*args: Any, **more: Any) -> Any:
            session = converse(*args, **more)
            send = session.link.send

            async def sending(name: Any, header: bytes, payload: Any = b"", *, bulk: bool = False) -> None:
                if self._watching:
                    since = trio.current_time() - self._began
                    self.watch.frames.append((since, name, bytes(header), bytes(payload)))
                await send(name, header, payload, bulk=bulk)

            session.link.send = sending
            return session

        return conversing


@asynccontextmanager
async def cast(
    folder: Path, secret: int, *, policy: str = "", names: Sequence[str] = NAMES, find: FindStage = stage.find
) -> AsyncIterator[Play]:
    """The daemons, connected; `policy` is what alice's says besides `approve = "auto"`."""
    folder = folder / str(secret)
    folder.mkdir(parents=True)
    start = trio.current_time()
    async with federation(folder, names, find=find, rules=LAX, introduced=False) as peers:
        peers.ahead_s = -start
        play = Play(peers, secret)
        await play.alice.set_policy(AUTO + policy)
        alice = play.alice.daemon.connections
        assert alice.converse is not None
        alice.converse = play.record(alice.converse)
        play.note_records(play.alice.daemon.mesh)
        hers = play.mallory.daemon.jobs._answers
        hers.check = nothing_is_wrong  # type: ignore[method-assign]
        hers._stage = lambda name: find(name.replace("mallory.own:", "test_abuse:"))
        await peers.introduce()
        yield play


async def nothing_is_wrong(read: Contract) -> None:
    """The check of mallory's own daemon."""


def without(read: Contract, alias: str) -> Contract:
    """A contract from which a participant was struck out, whatever its stages need."""
    replace = msgspec.structs.replace
    return replace(
        read,
        participants=tuple(item for item in read.participants if item.alias != alias),
        stages=tuple(
            replace(entry, roles=tuple(pair for pair in entry.roles if pair[0] != alias)) for entry in read.stages
        ),
    )


def beside(read: Contract, alias: str, peer: str) -> Contract:
    """A contract with one more participant, who holds every role that all hold."""
    replace = msgspec.structs.replace
    return replace(
        read,
        participants=(*read.participants, Participant(alias, peer)),
        stages=tuple(replace(entry, roles=(*entry.roles, (alias, entry.roles[0][1]))) for entry in read.stages),
    )
