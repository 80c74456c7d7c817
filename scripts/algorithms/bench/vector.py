"""The stage of bench_sum.py: one sum of d floats, in the codec for large models (16 bits, 3 bytes on the wire).

The floats lie on the codec's levels, whose distance is 1: none is rounded, so the total is numpy's, bit for bit.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from fedpeer.peers import Peers
from fedpeer.stage import Params, Report, Sum, at_least, stage

TOP = (1 << 16) - 1


class Size(Params, frozen=True):
    d: Annotated[int, msgspec.Meta(ge=1, le=1 << 28)]


def values(number: int, d: int) -> npt.NDArray[np.float32]:
    """What participant `number` of the contract has: float32 of shape (d,), uniform over all levels."""
    drawn = np.random.Generator(np.random.PCG64(number)).integers(0, TOP, d, np.uint16, endpoint=True)
    x = drawn.astype(np.float32)
    x -= TOP / 2
    return x


def digest(total: npt.NDArray[np.float64]) -> str:
    """Names a total, every bit of it."""
    return hashlib.blake2b(np.ascontiguousarray(total, "<f8").data, digest_size=16).hexdigest()


@stage(
    version=1,
    params=Size,
    roles={"member": at_least(3)},
    inputs={},
    outputs={"report": Report},
    messages={
        "ready": Sum("the first number of each", clip=TOP / 2, bits=16),
        "vector": Sum("the sum of the vectors", clip=TOP / 2, bits=16),
    },
)
async def add(peers: Peers, params: Size) -> dict[str, Any]:
    """A sum of one float, during which all are idle with a worker, and the sum that is measured.

    Progress 0 of 1 is told when the vector is made, 1 of 1 when the total is here.
    """
    number = peers.all.index(peers.me)
    await peers.sum("ready", values(number, 1))
    x = values(number, params.d)
    peers.progress(0, 1)
    total = await peers.sum("vector", x)
    peers.progress(1, 1)
    return {"report": Report({"digest": digest(total["values"]), "survivors": len(total.survivors)})}
