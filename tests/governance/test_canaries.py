"""No value of a row, and no key, is in what daemons write or show: log, audit, views, answers of the admin API.

Jobs end in every way: done, refused, failed by the data, failed by a fault of a stage that quotes a row.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import structlog
from trio.abc import Clock

from fedpeer import log
from fedpeer import stage as algorithms
from fedpeer.admin.caller import Caller, calling
from fedpeer.admin.commands import COMMANDS
from fedpeer.crypto import hash_
from fedpeer.governance import audit
from fedpeer.peers import Peers
from fedpeer.stage import Agreed, Params, Report, Stage, Table, at_least, stage
from fedpeer.testing.federation import LAX, Federation, Organization, federation

pytestmark = pytest.mark.system  # a minute of whole federations

NAMES = ["alice", "bob", "carol"]
ROWS = 200


@stage(
    version=1,
    roles={"member": at_least(3)},
    inputs={"table": Table},
    outputs={"report": Report},
    messages={"one": Agreed("nothing")},
)
async def clumsy(peers: Peers, params: Params, table: Table) -> dict[str, Any]:
    raise ValueError(f"cannot make sense of {table.data.slice(0, 200).to_pylist()}")


def find(name: str) -> Stage:
    return clumsy if name == clumsy.name else algorithms.find(name)


def stages(run: str, dataset: str = "rows", params: str = "") -> str:
    return f"""
[[stage]]
id = "ask"
run = "{run}"
inputs = {{ table = "dataset:{dataset}" }}
params = {{ {params} }}
"""


ALIGN = """
[[stage]]
id = "align"
run = "vertical.align:run"
roles = { guest = "alice", host = ["bob", "carol"] }
inputs = { table = "dataset:rows" }
[[stage]]
id = "choose"
run = "local.select:run"
inputs = { rows = "align.rows", table = "dataset:rows" }
[[stage]]
id = "ask"
run = "horizontal.logistic:fit"
inputs = { table = "choose.table" }
"""
JOBS = [
    (stages("horizontal.logistic:fit", params="max_iter = 2"), "done"),
    (stages("horizontal.kmeans:fit", params="k = 2, max_iter = 2"), "done"),
    (ALIGN, "done"),
    (stages("horizontal.statistics:run", params="min_cell = 1"), "failed"),  # bob's policy
    (stages("horizontal.logistic:fit", "spoilt"), "failed"),  # its label is none
    (stages(clumsy.name), "failed"),
]


def forms(canary: bytes) -> Iterator[bytes]:
    """A value of a row, or a key, as it might be written."""
    number = int.from_bytes(canary, "big")
    yield from (canary, canary.hex().encode(), base64.b64encode(canary), str(number).encode(), repr(canary).encode())


def forms_of(value: float) -> Iterator[bytes]:
    packed = struct.pack("<d", value)
    yield from (repr(value).encode(), f"{value:.9f}".encode(), packed.hex().encode(), base64.b64encode(packed)[:10])
    yield from (packed, packed[::-1])


async def shown(peer: Organization) -> bytes:
    """All that the admin API of a daemon answers to who asks everything."""
    daemon, said = peer.daemon, []
    refs = {"job": [view.id for view in await daemon.jobs.list()], "dataset": ["rows", "spoilt"]}
    refs["model"] = [view.digest for view in await daemon.jobs.models.list()]
    refs["peer"] = [name for name in NAMES if name != peer.name]
    for name, command in COMMANDS.items():
        if command.method != "GET" or name in ("job.wait", "model.predict"):
            continue
        fields = {field.name for field in msgspec.structs.fields(command.arguments) if field.required}
        for ref in refs.get(name.partition(".")[0], [""]) if fields == {"ref"} else [None]:
            given = {"ref": ref} if ref is not None else {"number": 1} if fields == {"number"} else {}
            try:
                answer = await command.handler(daemon, msgspec.convert(given, command.arguments))
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            said.append(answer if isinstance(answer, bytes) else msgspec.json.encode(answer))
    return b"\n".join(said)


async def add_rows(peers: Federation, canaries: list[bytes], values: np.ndarray[Any, Any]) -> None:
    for number, peer in enumerate(peers.values()):
        for dataset, label in (("rows", ""), ("spoilt", ".5")):
            lines = [
                f"{canary.hex()},{float(a)!r},{float(b)!r},{i % 2}{label}"
                for i, (canary, (a, b)) in enumerate(zip(canaries, values[number], strict=True))
            ]
            path = peers.folder / f"{peer.name}-{dataset}.csv"
            path.write_text("\n".join(["id,a,b,y", *lines]) + "\n")
            await peer.daemon.catalog.add(dataset, str(path), "id", "y")


async def test_no_value_of_a_row_is_in_anything_that_is_written_or_shown(
    autojump_clock: Clock, quick_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = np.random.Generator(np.random.PCG64(44))
    canaries = [chance.bytes(12) for _ in range(ROWS)]
    values = chance.normal(size=(3, ROWS, 2))
    log.configure("debug")
    try:
        async with federation(quick_path, NAMES, find=find) as peers:
            await add_rows(peers, canaries, values)
            await peers["bob"].set_policy(LAX.replace("min_cell = 0", "min_cell = 10"))
            said = []
            with calling(Caller(1000, 11, "ann")):
                for text, state in JOBS:
                    job = await peers["alice"].daemon.jobs.submit(peers.contract(text, rules="answer_s = 5"))
                    for peer in peers.values():
                        view = await peer.daemon.jobs.wait(job.id)
                        assert view.state == state, view.error
                for peer in peers.values():
                    said.append(await shown(peer))
                    kept = await peer.daemon.store.read(lambda tx: audit.stored(tx, 0, 10_000))
                    said += [body for _, body, _ in kept]
            keys = [peer.identity.sealing.reveal() for peer in peers.values()]
            keys += [hash_("fp.testing", name.encode()) for name in NAMES]  # their seeds
    finally:
        structlog.reset_defaults()
    written = capsys.readouterr()
    everything = b"\n".join([*said, written.err.encode(), written.out.encode()])
    assert b'"job_event": "stage_done"' in everything  # the log is there
    assert b'"bytes_received"' in everything  # and the status,
    assert everything.count(b"countersigned") > 3 * 3 * len(JOBS)  # and what happened, told in several places
    assert b"the first in row 0" in everything  # a place is told, and no value
    wanted = [form for canary in [*canaries, *keys] for form in forms(canary)]
    wanted += [form for value in values.ravel().tolist() for form in forms_of(value)]
    assert [form for form in wanted if form in everything] == []
