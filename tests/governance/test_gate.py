"""Nothing leaves but what the stage declared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedpeer import codec
from fedpeer.errors import GateClosed
from fedpeer.governance.gate import MAX_AGREED_BYTES, Gate
from fedpeer.secure import fixedpoint
from fedpeer.stage import Agreed, Open, Params, Report, Sealed, Sum, Table, at_least, exactly, stage


@stage(
    version=1,
    roles={"guest": exactly(1), "host": at_least(1)},
    inputs={"table": Table},
    outputs={"report": Report},
    messages={
        "gh": Sealed("guest", "host", "gradients", per_turn=2, max_bytes=200),
        "split": Open("host", "guest", "which rows go left"),
        "total": Sum("a total", per_turn=2),
        "clipped": Sum("a total of clipped values", clip=0.5, bits=12),
        "value": Agreed("a value"),
    },
)
async def train(peers: Any, params: Params, table: Table) -> dict[str, Any]:
    return {}


ROLES = {"bank": "guest", "telco": "host", "shop": "host"}
SMALL = codec.pack_value([1, 2])
SUM = fixedpoint.encode({"n": np.array([1, 2, 3])})


@pytest.fixture
def gate() -> Gate:
    return Gate(train, ROLES, "bank")


def test_what_is_declared_passes(gate: Gate) -> None:
    gate.send("telco", "gh", *SMALL)
    gate.receive("telco", "split")
    gate.sum("total", *SUM)
    gate.agree("value", 100)


@pytest.mark.parametrize(
    ("to", "tag", "words"),
    [
        ("telco", "hg", "is not declared"),
        ("telco", "split", "declared from host to guest"),
        ("telco", "total", "is declared as sum"),
        ("telco", "value", "is declared as agreed"),
        ("bank", "gh", "not two participants"),
        ("mallory", "gh", "not two participants"),
    ],
)
def test_a_message_of_another_tag_or_to_another_does_not(gate: Gate, to: str, tag: str, words: str) -> None:
    with pytest.raises(GateClosed, match=words):
        gate.send(to, tag, *SMALL)


def test_a_host_may_not_say_what_the_guest_may() -> None:
    with pytest.raises(GateClosed, match="not from host to host"):
        Gate(train, ROLES, "telco").send("shop", "gh", *SMALL)
    with pytest.raises(GateClosed, match="not from host to host"):
        Gate(train, ROLES, "telco").send("shop", "split", *SMALL)
    with pytest.raises(GateClosed, match="not from host to guest"):
        Gate(train, ROLES, "telco").send("bank", "gh", *SMALL)
    Gate(train, ROLES, "telco").send("bank", "split", *SMALL)


def test_a_message_is_capped_to_the_byte(gate: Gate) -> None:
    header, _ = codec.pack_value(np.zeros(150, np.uint8))
    room = 200 - len(header)
    gate.send("telco", "gh", *codec.pack_value(np.zeros(room, np.uint8)))
    with pytest.raises(GateClosed, match="at most 200"):
        gate.send("telco", "gh", *codec.pack_value(np.zeros(room + 1, np.uint8)))


def test_only_message_values_pass(gate: Gate) -> None:
    header, buffers = codec.pack_value(np.arange(3))
    for bad in ((b"", []), (b"\x93", []), (header, []), (header, [b"12"]), (header, [*buffers, b""])):
        with pytest.raises(GateClosed, match="not a message value"):
            gate.send("telco", "gh", *bad)


def test_each_receiver_gets_so_many_in_a_turn(gate: Gate) -> None:
    for turn in range(3):
        gate.turn(turn)
        for to in ("telco", "shop"):
            gate.send(to, "gh", *SMALL)
            gate.send(to, "gh", *SMALL)
            with pytest.raises(GateClosed, match="2 times in a turn"):
                gate.send(to, "gh", *SMALL)


def test_sums_and_agreed_values_are_counted_too(gate: Gate) -> None:
    for turn in range(2):
        gate.turn(turn)
        gate.sum("total", *SUM)
        gate.sum("total", *SUM)
        with pytest.raises(GateClosed, match="2 times"):
            gate.sum("total", *SUM)
        gate.agree("value", 1)
        with pytest.raises(GateClosed, match="1 times"):
            gate.agree("value", 1)


def test_a_refused_message_is_not_counted_as_sent(gate: Gate) -> None:
    for _ in range(5):
        with pytest.raises(GateClosed):
            gate.send("telco", "gh", b"", [])
    gate.send("telco", "gh", *SMALL)


def test_sums_that_are_not_what_their_layout_says_do_not_pass(gate: Gate) -> None:
    layout, vector = SUM
    outside = vector.copy()
    outside[0] = 1 << 16
    for bad_layout, bad in (
        (layout, outside),
        (layout, vector[:-1]),
        ([], vector),
        ("x", vector),
        ([["n", "int64", [4], layout[0][3]]], vector[:3]),
    ):
        with pytest.raises(GateClosed, match="not what a sum takes"):
            gate.sum("total", bad_layout, bad)
    for tag in ("gh", "value", "nothing"):
        with pytest.raises(GateClosed):
            gate.sum(tag, layout, vector)


def test_a_sum_passes_in_the_codecs_that_are_declared_only(gate: Gate) -> None:
    values = {"x": np.array([0.1, 7.0])}
    layout, vector = fixedpoint.encode(values, Sum("", clip=0.5, bits=12).codecs, bytes(32))
    for tag, wrong in (
        ("total", (layout, vector)),
        ("clipped", fixedpoint.encode(values)),
        ("clipped", fixedpoint.encode(values, Sum("", clip=0.5).codecs, bytes(32))),
        ("clipped", fixedpoint.encode(values, Sum("", clip=1.0, bits=12).codecs, bytes(32))),
    ):
        with pytest.raises(GateClosed, match="not what a sum takes"):
            gate.sum(tag, *wrong)
    gate.sum("clipped", layout, vector)


def test_agreed_values_are_capped_and_declared(gate: Gate) -> None:
    with pytest.raises(GateClosed, match="at most"):
        gate.agree("value", MAX_AGREED_BYTES + 1)
    with pytest.raises(GateClosed, match="declared as sum"):
        gate.agree("total", 1)


def test_one_receives_what_the_other_may_send(gate: Gate) -> None:
    for sender, tag in (("telco", "gh"), ("bank", "split"), ("mallory", "split"), ("telco", "total")):
        with pytest.raises(GateClosed):
            gate.receive(sender, tag)
