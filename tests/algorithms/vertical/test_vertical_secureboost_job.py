"""SecureBoost in a contract between real daemons: aligned, trained, and scored."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio.testing
from boosting_cast import key, labels

from fedpeer import artifact
from fedpeer.jobs import keyring
from fedpeer.testing.federation import federation

STAGES = """
[[stage]]
id = "align"
run = "vertical.align:run"
roles = { guest = "bob", host = ["alice", "carol"] }
inputs = { table = "dataset:patients" }
params = { min_intersection = 90 }
[[stage]]
id = "pick"
run = "local.select:run"
inputs = { rows = "align.rows", table = "dataset:patients" }
[[stage]]
id = "fit"
run = "vertical.secureboost:fit"
roles = { guest = "bob", host = ["alice", "carol"] }
inputs = { table = "pick.table" }
params = { n_estimators = 2, max_depth = 1, max_bin = 4 }
[[stage]]
id = "score"
run = "vertical.secureboost:predict"
roles = { guest = "bob", host = ["alice", "carol"] }
inputs = { model = "fit.model", table = "pick.table" }
"""


async def test_organizations_align_train_and_score(
    quick_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "make", lambda bits: key(bits=bits)["alice"])
    x = np.random.default_rng(1).normal(size=(8, 140))
    y = labels(x)
    owned = {"alice": [0, 7], "bob": [1], "carol": [2, 3]}
    async with federation(quick_path, list(owned)) as peers:
        for number, (name, columns) in enumerate(owned.items()):
            rows = [
                ",".join([f"P-{i}", *([str(int(y[i]))] if name == "bob" else []), *(str(x[j, i]) for j in columns)])
                for i in range(10 * number, 110 + 10 * number)
            ]
            random.Random(name).shuffle(rows)
            head = ",".join(["id", *(["y"] if name == "bob" else []), *(f"x{j}" for j in columns)])
            path = peers.folder / f"{name}.csv"
            path.write_text("\n".join([head, *rows]) + "\n")
            await peers[name].daemon.catalog.add("patients", str(path), "id", "y" if name == "bob" else None)
        job = await peers["alice"].daemon.jobs.submit(peers.contract(STAGES))
        views = {name: await peers[name].daemon.jobs.wait(job.id) for name in owned}
        assert [view.error for view in views.values()] == [None] * 3
        (output,) = [each for each in views["bob"].outputs if each.stage == "score"]
        path = peers["bob"].daemon.store.path_of(bytes.fromhex(output.digest))
        scores: Any = artifact.load("table", path.read_bytes())
        assert sorted(scores.ids()) == sorted(f"P-{i}" for i in range(20, 110))
        truth = np.array([y[int(name[2:])] for name in scores.ids()])
        high, low = (scores.column("score")[truth == label].mean() for label in (1, 0))
        assert high > low
        assert {o.stage for name in ("alice", "carol") for o in views[name].outputs} == {"align", "pick", "fit"}
