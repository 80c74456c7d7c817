"""Real daemons, each killed with SIGKILL at a step of a secure sum that is seen from outside, by `job watch --json`."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import FEDPEER, START_S, Daemon, environment, fedpeer, free_ports, until

from fedpeer.testing.federation import LAX

NAMES = ("north", "east", "south", "west", "center")
STEPS = ("started", "scattered", "added", "committed", "released", "opened", "unmasked", "final")
TURNS = 22
CONTRACT = """
version = 1
name = "kills"
[participants]
{participants}
[[stage]]
id = "fit"
run = "horizontal.logistic:fit"
inputs = {{ table = "dataset:rows" }}
params = {{ reg_lambda = 0.1, tol = 1e-300, max_iter = {turns} }}
"""


@pytest.fixture
def daemons() -> Iterator[list[Daemon]]:
    """Five of them, each with rows of its own, connected with each other; none is left."""
    folder = Path(tempfile.mkdtemp(prefix="fpk"))  # a short name: unix sockets lie below it
    made = [Daemon(name, folder, port) for name, port in zip(NAMES, free_ports(len(NAMES)), strict=True)]
    try:
        cards = fedpeer(
            *(
                (daemon, ["init", "--name", daemon.name, *(f"--{what}=127.0.0.1:{daemon.port}" for what in WHERE)])
                for daemon in made
            )
        )
        for daemon in made:
            daemon.start()
        for daemon in made:
            daemon.wait_ready()
        policy = folder / "policy.toml"
        policy.write_text(LAX)
        fedpeer(
            *((daemon, ["policy", "set", str(policy)]) for daemon in made),
            *(
                (daemon, ["peer", "add", card["card"]])
                for daemon in made
                for card in cards
                if card["name"] != daemon.name
            ),
            *(
                (daemon, ["dataset", "add", "rows", rows(folder, daemon.name), "--id=id", "--label=y"])
                for daemon in made
            ),
        )
        for _ in until(START_S, "the daemons are not connected"):
            if all(daemon.client.call("status")["connected"] == len(made) - 1 for daemon in made):
                break
        yield made
    finally:
        for daemon in made:
            if daemon.process is not None:
                daemon.process.terminate()
        for daemon in made:
            if daemon.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.process.wait(5)
                daemon.process.kill()
                daemon.process.wait()
        shutil.rmtree(folder)


WHERE = ("listen", "address")


def rows(folder: Path, name: str) -> str:
    """A file of rows of six features; the label follows the first two."""
    chance, lines = random.Random(name), ["id,a,b,c,d,e,f,y"]
    for i in range(40):
        x = [chance.gauss(0, 1) for _ in range(6)]
        lines.append(",".join([f"{name}{i}", *(f"{value:.4f}" for value in x), str(int(x[0] - x[1] > 0))]))
    path = folder / f"{name}.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


class Watch:
    """`fedpeer --json job watch` at one daemon."""

    def __init__(self, daemon: Daemon, job: str) -> None:
        line = [FEDPEER, "--json", "--home", str(daemon.home), "job", "watch", job]
        self._process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment())

    def sums(self) -> Iterator[dict[str, Any]]:
        """The events of its sums, until the job or the daemon has ended."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line)
            if event.get("event") == "sum" and event["stage"] == "fit":
                yield event
        self._process.wait()


def kill_at(step: str, daemon: Daemon, job: str) -> int:
    """Kill the daemon when it tells of this step, and start it again; the turn in which it died.

    Again if it came further than the sum's end before it was dead: then it did not die at this step.
    """
    tried: set[int] = set()
    while True:
        events = Watch(daemon, job).sums()
        turn = next(e["turn"] for e in events if e["step"] == step and e["turn"] > 1 and e["turn"] not in tried)
        daemon.kill()
        later = [e["step"] for e in events if e["turn"] == turn]
        daemon.start()
        daemon.wait_ready()
        if step == "final" or "total" not in later:
            return int(turn)
        tried.add(turn)


@pytest.mark.system
def test_daemons_killed_once_at_each_step_of_a_sum_end_with_one_model(daemons: list[Daemon]) -> None:
    participants = "\n".join(f'{daemon.name} = "{daemon.name}"' for daemon in daemons)
    contract = daemons[0].home.parent / "contract.toml"
    contract.write_text(CONTRACT.format(participants=participants, turns=TURNS))
    (job,) = fedpeer((daemons[0], ["job", "submit", str(contract)]))
    for daemon in daemons:
        for _ in until(START_S, f"{daemon.name} has not heard of the job"):
            with contextlib.suppress(Exception):
                daemon.client.call("job.show", ref=job["id"])
                break

    turns = [kill_at(step, daemons[i % len(daemons)], job["id"]) for i, step in enumerate(STEPS)]
    assert turns == sorted(turns)
    assert turns[-1] < TURNS, "the last kill was in mid-job"

    ended = fedpeer(*((daemon, ["job", "wait", job["id"], "--timeout", "120"]) for daemon in daemons))
    assert [view["state"] for view in ended] == ["done"] * len(daemons), [view["error"] for view in ended]
    assert len({output["digest"] for view in ended for output in view["outputs"]}) == 1
    assert all(view["stages"][0]["sums"]["survivors"] == list(NAMES) for view in ended), "all are back"
