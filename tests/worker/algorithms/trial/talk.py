"""Stages that only the tests of the worker run: each does one thing that a worker must carry, or must refuse."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

import numpy as np

from fedpeer.errors import ColumnsDiffer
from fedpeer.peers import Peers
from fedpeer.stage import Agreed, Model, Open, Params, Report, Sum, Table, at_least, exactly, stage


class Numbers(Params):
    count: int = 3
    factor: float = 1.0


def talk(**declared: Any) -> Any:
    return stage(
        version=1,
        params=Numbers,
        roles={"guest": exactly(1), "host": at_least(1)},
        inputs=declared.pop("inputs", {}),
        outputs={"report": Report},
        messages={
            "note": Open("guest", "host", "a note"),
            "reply": Open("host", "guest", "its answer"),
            "sum": Sum("a sum", per_turn=9),
            "clipped": Sum("a sum of clipped values", clip=0.5, bits=20),
            "same": Agreed("a value"),
        },
    )


@talk()
async def clipped(peers: Peers, params: Numbers) -> dict[str, Any]:
    """A sum with chance in it."""
    total = await peers.sum("clipped", {"x": np.linspace(-1, 1, 200_000), "n": np.array(params.count)})
    return {"report": Report({"x": total["x"][:3], "n": total["n"]})}


@talk(inputs={"table": Table, "model": Model})
async def everything(peers: Peers, params: Numbers, table: Table, model: Model) -> dict[str, Any]:
    """Each kind of request once, with arrays small and large."""
    large = np.arange(100_000, dtype=np.float64)
    await peers.send("bob", "note", {"small": np.arange(3), "large": large, "text": "é"})
    reply = await peers.receive("bob", "reply")
    total = await peers.sum("sum", {"x": np.array([0.5, 0.25]), "n": np.array(table.n_samples)})
    same = await peers.agree("same", [1.5, "word"])
    peers.progress(1, 2, loss=0.25)
    return {
        "report": Report(
            {
                "me": peers.me,
                "role": peers.role,
                "all": peers.all,
                "count": params.count,
                "columns": table.data.column_names,
                "id": table.id,
                "algorithm": model.algorithm,
                "w": float(model.arrays["w"].sum()),
                "reply": float(reply["large"].sum()),
                "x": total["x"],
                "n": total["n"],
                "survivors": total.survivors,
                "same": same,
                "chance": peers.random.bytes(4).hex(),
            }
        )
    }


@talk()
async def loop(peers: Peers, params: Numbers) -> dict[str, Any]:
    """A running total over turns, with a state that is large and a chance per turn."""
    shared: dict[str, Any] = {"total": np.zeros(20_000)}
    own: dict[str, Any] = {"drawn": []}
    for turn in peers.rounds(params.count, shared=shared, own=own):
        reply = await peers.receive("bob", "reply")
        shared["total"] += reply
        own["drawn"].append(peers.random.bytes(4).hex())
        peers.progress(turn + 1, params.count)
    return {"report": Report({"total": float(shared["total"].sum()), "drawn": own["drawn"]})}


@talk()
async def mapped(peers: Peers, params: Numbers) -> dict[str, Any]:
    """peers.map over more items than cores, large and small, with chance inside."""

    def one(item: int) -> dict[str, Any]:
        return {
            "square": item * item,
            "array": np.full(item * 3000, float(item)),
            "chance": peers.random.bytes(8).hex(),
        }

    parts = peers.map(one, list(range(params.count)))
    return {
        "report": Report(
            {
                "squares": [part["square"] for part in parts],
                "sums": [part["array"].sum() for part in parts],
                "chances": [part["chance"] for part in parts],
                "after": peers.random.bytes(8).hex(),
            }
        )
    }


@talk()
async def mapped_with_errors(peers: Peers, params: Numbers) -> dict[str, Any]:
    def one(item: int) -> int:
        if item == 2:
            raise ColumnsDiffer("columns differ in part 2", hint="look at part 2")
        if item >= 3:
            raise ValueError("a secret: 4711")
        return item

    peers.map(one, list(range(8)))
    return {}


@talk()
async def mapped_and_aborted(peers: Peers, params: Numbers) -> dict[str, Any]:
    def one(item: int) -> int:
        if item == 1:
            os.abort()
        return item

    peers.map(one, [0, 1, 2])
    return {}


@talk()
async def mapped_and_asking(peers: Peers, params: Numbers) -> dict[str, Any]:
    """A request in a child has nobody to go to."""
    peers.map(lambda item: peers.progress(item, 3), [0, 1])
    return {}


@talk()
async def mapped_for_ever(peers: Peers, params: Numbers) -> dict[str, Any]:
    def one(item: int) -> None:
        print("child", os.getpid(), file=sys.stderr, flush=True)
        while True:
            signal.pause()

    peers.map(one, [0, 1])
    return {}


@talk()
async def other_await(peers: Peers, params: Numbers) -> dict[str, Any]:
    await asyncio.sleep(0)
    return {}


@talk()
async def error_of_ours(peers: Peers, params: Numbers) -> dict[str, Any]:
    raise ColumnsDiffer("bob has no column 'age'", hint="add it")


@talk()
async def error_of_python(peers: Peers, params: Numbers) -> dict[str, Any]:
    float("the patient is 4711 years old")
    return {}


@talk()
async def error_like_a_lost_daemon(peers: Peers, params: Numbers) -> dict[str, Any]:
    raise BrokenPipeError("4711")


@talk()
async def leaves(peers: Peers, params: Numbers) -> dict[str, Any]:
    sys.exit("4711")


@talk()
async def sum_out_of_range(peers: Peers, params: Numbers) -> dict[str, Any]:
    await peers.sum("sum", {"x": np.array([1e9])})
    return {}


@talk()
async def other_outputs(peers: Peers, params: Numbers) -> dict[str, Any]:
    return {"model": None}


@talk()
async def output_of_another_kind(peers: Peers, params: Numbers) -> dict[str, Any]:
    return {"report": Model("x", {})}


@talk()
async def no_output_for_me(peers: Peers, params: Numbers) -> dict[str, Any]:
    return {"report": None}


@talk()
async def killed(peers: Peers, params: Numbers) -> dict[str, Any]:
    os.kill(os.getpid(), params.count)
    return {}


@talk()
async def hoards(peers: Peers, params: Numbers) -> dict[str, Any]:
    """Says that it begins, and takes memory until there is no more."""
    await peers.receive("bob", "reply")
    held = []
    while True:
        held.append(np.ones(1 << 20))


@talk()
async def exits(peers: Peers, params: Numbers) -> dict[str, Any]:
    os._exit(params.count)


@talk()
async def noisy(peers: Peers, params: Numbers) -> dict[str, Any]:
    """More on standard error than a pipe holds, before anything is asked."""
    print("hello\tworld \x1b[31m", file=sys.stderr)
    for number in range(params.count):
        print(f"line {number} " + "x" * 100, file=sys.stderr)
    print("nobody hears this")
    return {"report": Report({})}


@talk()
async def look_around(peers: Peers, params: Numbers) -> dict[str, Any]:
    """What this process has: modules, and whether standard input is of use."""
    return {"report": Report({"modules": sorted(sys.modules), "path": sys.path, "stdin": sys.stdin is None})}


@talk()
async def waits(peers: Peers, params: Numbers) -> dict[str, Any]:
    await peers.receive("bob", "reply")
    return {"report": Report({})}


@talk()
async def works(peers: Peers, params: Numbers) -> dict[str, Any]:
    """Busy without an end, and asks nothing."""
    peers.progress(0, 1)
    while True:
        pass


@talk()
async def rude(peers: Peers, params: Numbers) -> dict[str, Any]:
    """Writes on the daemon's socket what is no message."""
    os.write(0, bytes.fromhex("04000000ffffffff"))
    return {"report": Report({})}
