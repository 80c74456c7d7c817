"""The Paillier keys of the stages of jobs: ours is made when the first stage needs it, the others' are waited for.

Rules
* Responsible for what keyring.py says, in the one task of a job: nothing of a stage begins before all its keys are here
  and checked. Making and checking are a second of arithmetic, in a thread.
* A key that is none ends the job, naming its owner.
"""

from __future__ import annotations

from functools import partial

from fedpeer import codec
from fedpeer.crypto import Secret
from fedpeer.errors import ProtocolError, RemoteProtocolError, TrustError
from fedpeer.jobs import keyring
from fedpeer.jobs.contract import StageEntry, read_params
from fedpeer.jobs.job.service import Job
from fedpeer.mesh.service import Mesh
from fedpeer.peers import Keys
from fedpeer.stage import Stage
from fedpeer.store import RunInThread, Store, Transaction


class KeyRing:
    """Of all jobs."""

    def __init__(self, mesh: Mesh, store: Store, run_in_thread: RunInThread) -> None:
        self._mesh, self._store, self._run_in_thread = mesh, store, run_in_thread

    async def of(self, job: Job, entry: StageEntry, declared: Stage) -> Keys:
        """The keys of a stage, once all of them are there. Raises TrustError, RemoteProtocolError."""
        owners = {alias: job.contract.peer_of[alias] for alias, role in entry.roles if role in declared.keys}
        if not owners:
            return Keys()
        bits = read_params(entry, declared).key_bits  # type: ignore[attr-defined]
        own = await self._own(job, bits) if job.view.me in owners else None
        moduli = {alias: await self._modulus(job, peer, bits) for alias, peer in owners.items()}
        return Keys(own, moduli)

    async def _own(self, job: Job, bits: int) -> Secret:
        primes = await self._store.read(lambda tx: keyring.find(tx, job.id, bits))
        if primes is None:
            primes = made = await self._run_in_thread(partial(keyring.make, bits))
            said = await self._run_in_thread(partial(keyring.said_of, made, self._mesh.me, job.id))

            def keep(tx: Transaction) -> None:
                keyring.keep(tx, job.id, bits, made)
                self._mesh.publish(tx, job.id, keyring.KEY, str(bits), codec.encode(said))

            await job.write(keep, ("key_made", {"bits": bits}))
        return Secret(primes)

    async def _modulus(self, job: Job, peer: str, bits: int) -> int:
        try:
            while (body := self._mesh.held(job.id, keyring.KEY).get((str(bits), peer))) is None:
                job.awaits = peer
                await self._mesh.changed(job.id)
        finally:
            job.awaits = ""
        try:
            return await self._run_in_thread(partial(keyring.checked, body, peer, job.id, bits))
        except (TrustError, ProtocolError) as error:
            name = self._mesh.roster.name_of(peer)
            raise RemoteProtocolError(f"{name} has no good key for this job: {error.message}", peer=name) from None
