"""The stages that are installed, by name."""

from __future__ import annotations

from typing import Any

import pytest

from fedpeer import codec, stage
from fedpeer.errors import ContractError
from fedpeer.stage import Params, Stage, Sum, at_least


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("horizontal.logistik:fit", "no algorithm 'horizontal.logistik'", "did you mean 'horizontal.logistic'?"),
        ("vertikal.align:run", "no algorithm 'vertikal.align'", "did you mean 'vertical.align'?"),
        ("a.b:run", "no algorithm 'a.b'", "there is: horizontal.kmeans, horizontal.logistic, "),
        ("horizontal.logistic:fot", "has no stage 'fot'", "it has: evaluate, fit, predict"),
        ("logistic", "not the name of a stage", "horizontal.logistic:fit"),
    ],
)
def test_a_stage_that_is_not_there_is_answered_with_what_is(name: str, message: str, hint: str) -> None:
    with pytest.raises(ContractError) as caught:
        stage.find(name)
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "bad",
    [
        {"clip": 0.0},
        {"clip": -1.0},
        {"clip": float("nan")},
        {"clip": float("inf")},
        {"clip": 1},
        {"clip": "1"},
        {"clip": 1.0, "bits": 0},
        {"clip": 1.0, "bits": 23},
        {"bits": 8},
        {"value_bits": 56},
        {"value_bits": 1},
        {"value_bits": 16, "fraction_bits": 17},
        {"fraction_bits": -1},
    ],
)
def test_a_sum_of_values_that_cannot_be_written_is_refused_at_import(bad: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        Sum("a sum", **bad)


def test_how_values_are_written_is_part_of_what_all_must_agree_on() -> None:
    async def run(peers: Any, params: Params) -> dict[str, Any]:
        return {}

    def declared(message: Sum) -> bytes:
        return Stage(run, 1, Params, {"member": at_least(3)}, {}, {}, {"sum": message}).declaration_hash()

    sums = [
        Sum("a"),
        Sum("a", clip=1.0),
        Sum("a", clip=0.5),
        Sum("a", clip=1.0, bits=8),
        Sum("a", value_bits=32, fraction_bits=16),
        Sum("a", value_bits=32, fraction_bits=17),
    ]
    assert len({declared(message) for message in sums}) == len(sums)
    assert len({codec.encode([codecs[dtype] for dtype in sorted(codecs)]) for codecs in (s.codecs for s in sums)}) == 6
