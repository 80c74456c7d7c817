"""An alignment counts for the organization, whichever of its peers asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.abc import Clock

from fedpeer.testing.federation import LAX, federation

ALIGN = """
version = 1
name = "{guest}"
[participants]
{guest} = "{guest}"
alice = "alice"
[[stage]]
id = "align"
run = "vertical.align:run"
roles = {{ guest = "{guest}", host = ["alice"] }}
inputs = {{ table = "dataset:rows" }}
[rules]
answer_s = 30
"""
ONE_EACH = LAX.replace("psi_per_version = 1_000_000", "psi_per_version = 1")


@pytest.mark.parametrize("organizations", ["", 'organizations = { group = ["mallory", "mate"] }\n'])
async def test_two_peers_of_one_organization_align_once_though_never_in_one_contract(
    autojump_clock: Clock, quick_path: Path, organizations: str
) -> None:
    async with federation(quick_path, ["alice", "mallory", "mate"]) as peers:
        await peers["alice"].set_policy(organizations + ONE_EACH)
        for peer in peers.values():
            path = peers.folder / f"{peer.name}.csv"
            path.write_text("\n".join(["id,x", *(f"{i},{i}" for i in range(120))]) + "\n")
            await peer.daemon.catalog.add("rows", str(path), "id", None)
        states = []
        for guest in ("mallory", "mate"):
            job = await peers[guest].daemon.jobs.submit(ALIGN.format(guest=guest))
            with trio.fail_after(600):
                states.append((await peers[guest].daemon.jobs.wait(job.id)).state)
        assert states == ["done", "failed" if organizations else "done"]
