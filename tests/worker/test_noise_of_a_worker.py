"""A real worker process that draws noise: what it says, and that a second one says the same."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import trio

from fedpeer import artifact
from fedpeer.algorithms.horizontal.statistics import Private, private, squared_sensitivity
from fedpeer.secure import dp, fixedpoint
from fedpeer.stage import Table
from fedpeer.worker import protocol as ask
from fedpeer.worker.service import WorkerProcess

pytestmark = pytest.mark.system  # processes, or whole federations, for a while

PARAMS = Private(epsilon=0.5, columns={"a": (0.0, 1.0)}, bins=2)
HONEST = 3


async def test_a_worker_goes_on_with_the_noise_of_the_one_before() -> None:
    table = Table(pa.table({"a": pa.array([0.25, 0.75, None], pa.float64())}))
    aliases = ["alice", "bob", "carol"]

    def start(resume: ask.Resume | None) -> ask.Start:
        return ask.Start(
            private.name,
            msgspec.json.encode(PARAMS, order="sorted"),
            "alice",
            [(alias, "member") for alias in aliases],
            bytes(32),
            resume,
            [("table", *artifact.dump(table))],
            HONEST,
        )

    said = []
    resume = None
    for _ in range(2):
        worker = await WorkerProcess.start(start(resume))
        try:
            with trio.fail_after(60):
                saved = await worker.next()
                summed = await worker.next()
                assert isinstance(saved, ask.Checkpoint)
                assert isinstance(summed, ask.Sum)
                resume = ask.Resume(saved.turn, saved.shared, saved.own, saved.chance)
                said.append(summed.vector.tobytes())
                if len(said) == 2:
                    await worker.answer(ask.TotalAnswer(summed.vector, ["alice"]))
                    assert isinstance(await worker.next(), ask.Checkpoint)
                    done = await worker.next()
                    assert isinstance(done, ask.Done)
                    (_, (_, data)) = done.outputs[0]
        finally:
            await worker.aclose()
    assert said[0] == said[1]

    noisy = fixedpoint.decode(summed.layout, summed.vector, 1)["values"]
    exact = np.array([[2, 1, 0, 0.5, 1, 1]]) * dp.GRID  # count, missing, Σz, Σz², below and above the middle
    scale = dp.scale(dp.multiplier(0.5, 1e-8), squared_sensitivity(1), HONEST)
    assert np.count_nonzero(noisy - exact) == 6
    assert np.abs(noisy - exact).max() < 8 * scale
    report = artifact.load("report", data).values  # type: ignore[union-attr]
    assert report["columns"]["a"]["standard_error"]["count"] == scale * math.sqrt(1) / dp.GRID
