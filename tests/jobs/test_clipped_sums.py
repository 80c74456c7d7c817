"""Sums with declared codecs through whole daemons: the same numbers at all, within the steps that were declared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import trio
from trio.abc import Clock

from fedpeer import stage as stages
from fedpeer.peers import Peers
from fedpeer.stage import Params, Report, Stage, Sum, Table, at_least, stage
from fedpeer.testing.federation import federation

NAMES = ["alice", "bob", "carol"]
SIZE = 500


@stage(
    version=1,
    roles={"member": at_least(3)},
    inputs={"table": Table},
    outputs={"report": Report},
    messages={
        "update": Sum("clipped updates and the count of rows", clip=0.5, bits=20),
        "few": Sum("counts", value_bits=12),
    },
)
async def average(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    mine = np.linspace(-0.7, 0.7, SIZE) * (1 + len(peers.me)) / 6
    update = await peers.sum("update", {"u": mine, "n": np.array([table.n_samples])})
    few = await peers.sum("few", np.array([-2048, 2047, len(peers.me)]))
    facts = {"u": update["u"].tolist(), "n": update["n"].tolist(), "few": few["values"].tolist()}
    return {"report": Report(facts)}


def find(name: str) -> Stage:
    return average if name == average.name else stages.find(name)


async def test_clipped_and_narrow_sums_are_equal_at_all_and_as_exact_as_declared(
    autojump_clock: Clock, quick_path: Path
) -> None:
    reports: list[Any] = []
    async with federation(quick_path, NAMES, find=find) as peers:
        for number, peer in enumerate(peers.values()):
            path = peers.folder / f"{peer.name}.csv"
            path.write_text("\n".join(["id,a", *(f"{number}-{i},{i}" for i in range(10 + number))]) + "\n")
            await peer.daemon.catalog.add("rows", str(path), "id", None)
        text = f'[[stage]]\nid = "mean"\nrun = "{average.name}"\ninputs = {{ table = "dataset:rows" }}\n'
        job = await peers["alice"].daemon.jobs.submit(peers.contract(text))
        with trio.fail_after(900):
            for peer in peers.values():
                while not (view := await peer.daemon.jobs.get(job.id)).finished:
                    await trio.sleep(0.2)
                assert view.state == "done", view.error
                reports.append(view.outputs[0].values)
    assert reports[0] == reports[1] == reports[2]
    exact = sum(np.clip(np.linspace(-0.7, 0.7, SIZE) * (1 + len(name)) / 6, -0.5, 0.5) for name in NAMES)
    assert np.abs(np.array(reports[0]["u"]) - exact).max() < 3 / (2**20 - 1)
    assert reports[0]["n"] == [10 + 11 + 12]
    assert reports[0]["few"] == [-3 * 2048, 3 * 2047, 5 + 3 + 5]
