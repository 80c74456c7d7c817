"""A peer that is away for six minutes at any moment of a job: the job goes on when it is back."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from test_federation import TRAIN, add_rows, ends, outputs
from trio.abc import Clock

from fedpeer.testing.federation import Federation, federation

NAMES = ["alice", "bob", "carol", "dave"]
AWAY_S = 360.0
MOMENTS = ["proposed", "countersigned", "agreed", "stage_started", "sum", "progress", "stage_done", "done"]
"""What carol tells her operator when she is cut off."""


async def cut_off(peers: Federation, name: str, event: str) -> None:
    """Cut a peer off from all others at the first such event there, and heal it six minutes later."""
    reached = trio.Event()
    peers[name].daemon.events.subscribe(lambda told: reached.set() if told["event"] == event else None)
    await reached.wait()
    others = [other for other in peers if other != name]
    for other in others:
        peers.network.cut(name, other, silent=True)
    await trio.sleep(AWAY_S)
    for other in others:
        peers.network.heal(name, other)


@pytest.mark.system  # half a minute of simulations
@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_job_goes_on_after_one_was_away_for_six_minutes(
    autojump_clock: Clock, quick_path: Path, moment: str
) -> None:
    async with federation(quick_path, NAMES) as peers:
        await add_rows(peers)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut_off, peers, "carol", moment)
            await trio.sleep(0)
            job = await peers["alice"].daemon.jobs.submit(peers.contract(TRAIN))
            begun = trio.current_time()
            views = await ends(peers, job.id, within=3600)
            assert trio.current_time() - begun > (0 if moment == "done" else AWAY_S)
            nursery.cancel_scope.cancel()
        assert {view.state for view in views.values()} == {"done"}, [view.error for view in views.values()]
        assert len({outputs(view)["fit.model"] for view in views.values()}) == 1
