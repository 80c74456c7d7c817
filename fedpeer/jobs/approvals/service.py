"""What the operators of this peer say to jobs that ask for it.

Rules
* Responsible for the way from a person at the door to the store: what is shown before it says yes, that the policy of
  now is asked once more, and that the last yes and the countersignature are one commit.
* Who said what is in the job's log by uid, and stays here: the others read that this peer takes part, or at the
  deadline that it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from fedpeer import codec
from fedpeer.admin.caller import Caller
from fedpeer.errors import PolicyError, UsageError
from fedpeer.governance import approvals, policy
from fedpeer.governance.approvals import APPROVED, REFUSED, Asked, Standing, who
from fedpeer.governance.decision import Ask, Decision, decide
from fedpeer.jobs import archive, contract
from fedpeer.jobs.answer.asking import ask_of
from fedpeer.jobs.answer.review import review, utc
from fedpeer.jobs.answer.service import Answers
from fedpeer.jobs.job.service import Job, seconds_of
from fedpeer.jobs.lifecycle import Answer
from fedpeer.jobs.views import ApprovalsView, AskedView, JobView, ReviewView, StandingView
from fedpeer.mesh.service import Mesh
from fedpeer.store import Record, Store, Transaction, unrecorded


class Approvals:
    """The operators' part of all jobs. `find_job`: by reference; `job_of`: by id, None if it is not here any more."""

    def __init__(
        self,
        answers: Answers,
        mesh: Mesh,
        store: Store,
        *,
        find_job: Callable[[str], Job],
        job_of: Callable[[bytes], Job | None],
        find: contract.FindStage,
        now: Callable[[], datetime],
    ) -> None:
        self._answers, self._mesh, self._store = answers, mesh, store
        self._find_job, self._job_of, self._stage, self._now = find_job, job_of, find, now

    async def list(self) -> ApprovalsView:
        """The jobs that wait for the operators, and the standing approvals that hold."""

        def look(tx: Transaction) -> ApprovalsView:
            return ApprovalsView(
                asking=[
                    AskedView(
                        id=asked.contract.hex(),
                        name=job.view.name,
                        purpose=job.view.purpose,
                        initiator=self._mesh.roster.name_of(asked.initiator),
                        until=utc(asked.until),
                        needs=asked.needs,
                        approved=[approval.who for approval in approvals.approvals(tx, asked.contract)],
                    )
                    for asked in approvals.asking(tx)
                    if (job := self._job_of(asked.contract)) is not None and not job.over.is_set()
                ],
                standing=[self._standing(given) for given in approvals.standing(tx, self._seconds())],
            )

        return await self._store.read(look)

    async def review(self, ref: str) -> ReviewView:
        """All that an operator should know before it approves. Raises NotFound, UsageError where nothing was asked."""
        job = self._find_job(ref)
        asked = await self._store.read(lambda tx: _asked(tx, job))
        ask, decision = await self._consider(job, asked)

        def look(tx: Transaction) -> ReviewView:
            last = approvals.last_approved(tx, asked.initiator, but=job.id)
            body = archive.body(tx, last.contract) if last else None
            return review(
                job.contract,
                asked,
                ask,
                decision,
                approved=approvals.approvals(tx, job.id),
                previous=(contract.read(body), last) if last and body else None,
                find=self._stage,
                name_of=self._mesh.roster.name_of,
            )

        return await self._store.read(look)

    async def approve(self, ref: str, by: Caller | None = None, *, always: int = 0) -> JobView:
        """A person approves: once, or (`always` 1) every job like it, or (2) also on other rows of the same datasets.

        Raises UsageError when it is too late, PolicyError when the policy refuses by now what it would have asked.
        """
        job = self._find_job(ref)
        _, decision = await self._consider(job, await self._store.read(lambda tx: _asked(tx, job)))
        if decision.verdict == "refused":
            raise PolicyError(f"the policy refuses it: {decision.reason}", hint="fedpeer policy show")

        def say(tx: Transaction) -> None:
            now = self._seconds()
            if _asked(tx, job).until <= now:
                raise UsageError("it is too late: the others read that this peer does not allow it")
            wanted = policy.current(tx).people
            asked = approvals.approve(tx, job.id, by, now, name=job.contract.name, always=always, people=wanted)
            if asked.state == APPROVED:
                self._answers.say(tx, job, codec.decode_as(Answer, asked.answer))

        await job.write(say, ("approved", {"by": _person(by), "always": always}))
        return job.seen()

    async def deny(self, ref: str, by: Caller | None = None, *, reason: str = "") -> JobView:
        """A person denies; the others read so at the deadline, and never why. Raises UsageError when it is too late."""
        job = self._find_job(ref)
        why = f"denied by {_person(by)}" + (f": {reason}" if reason else "")
        await job.write(lambda tx: approvals.deny(tx, job.id, why), ("denied", {"by": _person(by), "why": why}))
        return job.seen()

    async def revoke(self, number: int, by: Caller | None = None, *, record: Record = unrecorded) -> StandingView:
        """A standing approval covers nothing from now on; what it approved goes on. Raises NotFound."""

        def revoke(tx: Transaction) -> Standing:
            given = approvals.revoke(tx, number, by, self._seconds())
            record(tx, {"number": number, "job": given.contract.hex()})
            return given

        return self._standing(await self._store.write(revoke))

    async def _consider(self, job: Job, asked: Asked) -> tuple[Ask, Decision]:
        """What the policy of now says, from the facts of now, on the data that was pinned. Raises PolicyError."""
        if asked.state == REFUSED:  # its data is not kept
            raise PolicyError(f"it was refused: {asked.why}", hint="fedpeer job logs")
        rules = await self._store.read(policy.current)
        facts = await self._answers.facts(job.contract, job.id, asked.data, rules)
        ask = ask_of(job.contract, self._mesh.me, self._stage, facts)
        return ask, decide(rules, ask)

    def _standing(self, given: Standing) -> StandingView:
        return StandingView(
            number=given.number,
            job=given.contract.hex(),
            name=given.name,
            initiator=self._mesh.roster.name_of(given.initiator),
            datasets=[item.name for item in given.data],
            new_rows=given.any_version,
            epsilon=given.epsilon,
            people=[who(*person) for person in given.people],
            created=utc(given.created),
            expires=utc(given.expires),
        )

    def _seconds(self) -> int:
        return seconds_of(self._now())


def _asked(tx: Transaction, job: Job) -> Asked:
    asked = approvals.find(tx, job.id)
    if asked is None or job.over.is_set():
        raise UsageError(f"the job {job.view.name!r} asks nothing of this operator", hint="fedpeer approvals")
    return asked


def _person(by: Caller | None) -> str:
    return who(by.uid, by.user) if by else who(approvals.DAEMON, "")
