"""The stages that are installed, by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpeer import codec, stage
from fedpeer.errors import ContractError
from fedpeer.stage import Params, Stage, Sum, at_least, check_own, find


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
        {"fraction_bits": 56},
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


# stages of one's own


OWN = """
from fedpeer.stage import Params, Report, at_least, stage

@stage(version=1, params=Params, roles={"member": at_least(1)}, inputs={}, outputs={"report": Report}, messages={})
async def fit(peers, params):
    return {"report": Report({})}

not_a_stage = 1
"""


@pytest.fixture
def bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An organization's package of stages, installed."""
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "__init__.py").touch()
    (tmp_path / "bank" / "scoring.py").write_text(OWN)
    (tmp_path / "bank" / "broken.py").write_text("import absent_elsewhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "bank"]:
        del sys.modules[name]


@pytest.mark.usefixtures("bank")
def test_a_stage_of_ones_own_is_found_where_it_is_named_and_nowhere_else() -> None:
    for own in (["bank.scoring:fit"], ["bank.scoring"]):
        assert find("bank.scoring:fit", own).name == "bank.scoring:fit"
    del sys.modules["bank.scoring"]
    for own in ([], ["bank"], ["bank.scoring:other"], ["bank.scoring:fit2"], ["bank.*"], ["*"]):
        with pytest.raises(ContractError, match=r"there is no algorithm 'bank.scoring'") as told:
            find("bank.scoring:fit", own)
        assert "modules" in told.value.hint
    assert "bank.scoring" not in sys.modules, "a module that the policy does not name was imported"
    with pytest.raises(ContractError, match="has no stage 'not_a_stage'"):
        find("bank.scoring:not_a_stage", ["bank.scoring"])
    with pytest.raises(ContractError, match=r"there is no module 'bank.absent' here, which the policy names"):
        find("bank.absent:fit", ["bank.absent"])
    with pytest.raises(ModuleNotFoundError, match="absent_elsewhere"):
        find("bank.broken:fit", ["bank.broken"])


@pytest.mark.parametrize(
    "name", ["horizontal.logistic:fit", "vertical.mine:fit", "local", "fedpeer.stage:find", "os:system", "json.tool"]
)
def test_a_stage_of_ones_own_takes_no_name_of_fedpeers_or_pythons(name: str) -> None:
    with pytest.raises(ContractError, match=r"is a name of fedpeer's or of Python's"):
        check_own(name)


@pytest.mark.parametrize(
    "name", ["", ":", "bank.scoring:", "bank.scoring:fit:it", "bank..scoring:fit", "a b:c", "../x:y"]
)
def test_what_is_no_name_is_none_of_ones_own(name: str) -> None:
    with pytest.raises(ContractError, match="is not the name of a stage"):
        check_own(name)
