"""The audit logs of the participants of one job, each witnessed by the others (governance/heads.py has the rules).

Rules
* Responsible for what this peer says and hears of heads in one job: once it is agreed, and once it is over here. A job
  never fails by it: what a partner did not show is told to the operator, and is an entry of our own log.
* Everything is found again in the scope's records and in the store after a restart; what was said is not said again.
* A head waits for what all others know of ours; when the job is over, `GRACE_S` at most.
"""

from __future__ import annotations

from typing import Any, TypeVar

import trio

from fedpeer import codec
from fedpeer.errors import FedpeerError, RemoteProtocolError, StoreError
from fedpeer.governance import heads
from fedpeer.governance.heads import AGREED, COSIGN, ENDED, GROWTH, HEAD, KNOWN, Cosign, Growth, Known, SignedHead
from fedpeer.jobs import lifecycle
from fedpeer.jobs.job.service import Facts, Job
from fedpeer.mesh.service import Mesh
from fedpeer.store import Transaction

GRACE_S = 30.0
R = TypeVar("R", bound=codec.Record)
Line = tuple[str, Facts]


class Witness:
    """For one job. `look` does what is due; call it whenever a record may have come."""

    def __init__(self, job: Job, mesh: Mesh, log: Any) -> None:
        self._job, self._mesh, self._log = job, mesh, log
        self._others = [peer for peer in job.contract.peers if peer != mesh.me]
        self._positions = dict.fromkeys(heads.KINDS, 0)
        self._known: dict[str, Known] = {}
        self._heads: dict[tuple[str, str], SignedHead | None] = {}  # (peer, when); None: it is no head
        self._growths: dict[tuple[str, str], Growth] = {}  # (peer, slot)
        self._cosigns: list[tuple[str, str, Cosign]] = []  # (peer, slot, …) not kept yet
        self._said: dict[str, SignedHead] = {}  # when → ours
        self._judged: set[tuple[str, str]] = set()
        self._backed: set[tuple[str, str]] = set()  # (peer, when): who co-signed ours
        self._over_since: float | None = None
        self._broken = False
        self._begun = False

    async def live(self) -> None:
        """Look whenever something was said, until cancelled."""
        while True:
            await self.look()
            await self._mesh.changed(self._job.id)

    async def look(self) -> None:
        """Do what is due, until nothing new was said meanwhile. Nothing but the store's failure escapes."""
        try:
            self._hear()
            while not self._broken:
                await self._look()
                if not self._hear():
                    break
        except StoreError:
            raise
        except Exception as error:  # also one that bytes of others made: a fault in here ends no job, and no daemon
            self._broken = True
            code = error.code if isinstance(error, FedpeerError) else type(error).__name__
            self._log.error("audit_not_witnessed", job=self._job.id.hex(), code=code, exc_info=error)

    def done(self) -> bool:
        """Whether this peer neither awaits anything of the others here, nor they of it."""
        if self._broken or not self._agreed():
            return True
        asked = [(peer, ENDED) for peer in self._others]
        return ENDED in self._said and self._judged.issuperset(asked) and self._backed.issuperset(asked)

    def _agreed(self) -> bool:
        return lifecycle.agreed(self._job.contract, self._job.hear())

    async def _look(self) -> None:
        job, me = self._job, self._mesh.me
        if not self._begun:
            await self._begin()
        if job.over.is_set() and self._over_since is None:
            self._over_since = trio.current_time()
        answer = job.hear().answers.get(me)
        if answer is not None and answer.approved and me not in self._known:
            await self._say_known()
        if self._agreed():
            if not job.over.is_set() and AGREED not in self._said and self._all_known():
                await self._say_head(AGREED)
            if job.over.is_set() and ENDED not in self._said and (self._all_known() or self._waited()):
                await self._say_head(ENDED)
        await self._judge()
        await self._keep_cosigns()

    async def _begin(self) -> None:
        """What was said and found before this daemon started."""
        alarmed = await self._mesh.store.read(lambda tx: heads.alarms(tx, self._job.id))
        self._judged |= {(peer, when) for peer in alarmed for when in (AGREED, ENDED)}
        self._begun = True

    # what is heard

    def _hear(self) -> bool:
        """Take what was said since; whether there was something."""
        before = dict(self._positions)
        for sender, _slot, body in self._new(KNOWN):
            self._known[sender] = self._read(Known, body) or Known(())
        for sender, when, body in self._new(HEAD):
            head = self._read(SignedHead, body)
            if sender != self._mesh.me and when in (AGREED, ENDED):
                self._heads[sender, when] = head
            elif head is not None:
                self._said[when] = head
        for sender, slot, body in self._new(GROWTH):
            self._growths[sender, slot] = self._read(Growth, body) or Growth(())
        for sender, slot, body in self._new(COSIGN):
            cosign = self._read(Cosign, body)
            if sender != self._mesh.me and cosign is not None:
                self._cosigns.append((sender, slot, cosign))
            elif cosign is not None:
                self._counted(cosign)
        return self._positions != before

    def _new(self, kind: str) -> list[tuple[str, str, bytes]]:
        new, self._positions[kind] = self._mesh.since(self._job.id, kind, self._positions[kind])
        return [said for said in new if said[0] in self._job.contract.peers]

    def _read(self, kind: type[R], body: bytes) -> R | None:
        try:
            return codec.decode_as(kind, body)
        except RemoteProtocolError:
            return None

    def _counted(self, cosign: Cosign) -> None:
        """What we co-signed here, before a restart perhaps."""
        for peer, number, root in cosign.heads:
            for when in (AGREED, ENDED):
                head = self._heads.get((peer, when))
                if head is not None and (head.number, head.root) == (number, root):
                    self._judged.add((peer, when))

    def _all_known(self) -> bool:
        return self._known.keys() >= set(self._job.contract.peers)

    def _waited(self) -> bool:
        return self._over_since is not None and trio.current_time() >= self._over_since + GRACE_S

    # what is said

    def _publish(self, tx: Transaction, kind: str, slot: str, record: codec.Record) -> None:
        self._mesh.publish(tx, self._job.id, kind, slot, codec.encode(record))

    async def _say_known(self) -> None:
        self._known[self._mesh.me] = await self._job.write(self._write_known)

    def _write_known(self, tx: Transaction) -> Known:
        known = heads.known(tx, self._others)
        self._publish(tx, KNOWN, "", known)
        return known

    async def _say_head(self, when: str) -> None:
        me, job = self._mesh.me, self._job
        points = {peer: heads.named([known], me) for peer, known in self._known.items() if peer != me}
        mine = {(head.number, head.root) for head in self._said.values()}

        def write(tx: Transaction) -> tuple[SignedHead, list[str]]:
            held = heads.begins_with(tx, set().union(mine, *points.values()))
            head, growths = heads.shown(tx, held)
            self._publish(tx, HEAD, when, head)
            for i, growth in enumerate(growths):
                self._publish(tx, GROWTH, f"{when}/{i}", growth)
            heads.keep(tx, me, head, heads.signed(tx, job.id, HEAD, when, me), job.id, self._mesh.roster.card_text(me))
            return head, sorted(peer for peer, named in points.items() if not named <= held)

        first = not self._said
        self._said[when], lost = await job.write(write)
        if lost and first:
            names = [self._mesh.roster.name_of(peer) for peer in lost]
            self._log.error("own_history_lost", job=job.id.hex(), peers=", ".join(names))
            await job.write(lambda tx: None, ("own_history_lost", {"peers": names}))

    # what others showed

    async def _judge(self) -> None:
        """Co-sign the heads that were shown to have grown only; tell the operator of the others."""
        if self._mesh.me not in self._known:
            return
        passed: list[tuple[str, str, SignedHead, set[heads.Point]]] = []
        failed: dict[str, tuple[str, set[heads.Point]]] = {}
        for (peer, when), head in sorted(self._heads.items(), key=lambda item: item[0]):
            if (peer, when) in self._judged or peer in failed:
                continue
            slots = [f"{when}/{i}" for i in range(head.growths if head is not None else 0)]
            if any((peer, slot) not in self._growths for slot in slots):
                continue
            required = heads.named([self._known[self._mesh.me]], peer)
            before = self._heads.get((peer, AGREED))
            if when == ENDED and before is not None:
                if (peer, AGREED) not in self._judged and not any(peer == one[0] for one in passed):
                    continue  # its proofs are still to come
                required |= {(before.number, before.root)}
            if head is not None and heads.only_grew(required, head, [self._growths[peer, slot] for slot in slots]):
                passed.append((peer, when, head, required))
            else:
                failed[peer] = when, required
        if passed:
            await self._cosign(passed)
        for peer, (when, required) in failed.items():
            await self._sound_alarm(peer, when, required)

    async def _cosign(self, passed: list[tuple[str, str, SignedHead, set[heads.Point]]]) -> None:
        me, scope = self._mesh.me, self._job.id
        slot = str(len(self._mesh.held(scope, COSIGN)))  # no slot of ours is as high

        def write(tx: Transaction) -> None:
            named = tuple((peer, head.number, head.root) for peer, _, head, _ in passed)
            self._publish(tx, COSIGN, slot, Cosign(named))
            raw = heads.signed(tx, scope, COSIGN, slot, me)
            for peer, when, head, required in passed:
                heads.keep(
                    tx, peer, head, heads.signed(tx, scope, HEAD, when, peer), scope, self._mesh.roster.card_text(peer)
                )
                heads.co_signed(tx, peer, (head.number, head.root), me, raw, self._mesh.roster.card_text(me))
                heads.move_tip(tx, peer, required, (head.number, head.root))

        await self._job.write(write)
        self._judged |= {(peer, when) for peer, when, _, _ in passed}

    async def _sound_alarm(self, peer: str, when: str, required: set[heads.Point]) -> None:
        scope, name = self._job.id, self._mesh.roster.name_of(peer)
        slots = [slot for sender, slot in self._growths if sender == peer and slot.startswith(f"{when}/")]

        def write(tx: Transaction) -> None:
            places = [(HEAD, when), *((GROWTH, slot) for slot in sorted(slots))]
            raws = [heads.signed(tx, scope, kind, slot, peer) for kind, slot in places]
            heads.sound_alarm(tx, peer, scope, self._job.time(), required, raws)

        facts = {"peer": peer, "name": name, "known": max((number for number, _ in required), default=0)}
        await self._job.write(write, ("history_changed", facts))
        self._judged |= {(peer, AGREED), (peer, ENDED)}
        self._log.error("history_changed", job=scope.hex(), peer=name)

    async def _keep_cosigns(self) -> None:
        """What others signed under our heads."""
        cosigns = list(self._cosigns)
        mine = {(head.number, head.root): when for when, head in self._said.items()}
        ours = [
            (peer, slot, (number, root))
            for peer, slot, cosign in cosigns
            for owner, number, root in cosign.heads
            if owner == self._mesh.me and (number, root) in mine
        ]

        def write(tx: Transaction) -> None:
            for peer, slot, point in ours:
                raw = heads.signed(tx, self._job.id, COSIGN, slot, peer)
                heads.co_signed(tx, self._mesh.me, point, peer, raw, self._mesh.roster.card_text(peer))

        if ours:
            await self._job.write(write)
        del self._cosigns[: len(cosigns)]
        self._backed |= {(peer, mine[point]) for peer, _, point in ours}
