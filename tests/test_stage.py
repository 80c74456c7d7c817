"""The stages that are installed, by name."""

from __future__ import annotations

import pytest

from fedpeer import stage
from fedpeer.errors import ContractError


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
