"""What an operator reads of a contract: nothing that differs is left out, and nothing that does not is shown."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from fedpeer.governance.approvals import Data
from fedpeer.jobs.answer.review import differences
from fedpeer.jobs.contract import Contract, Input, Participant, Release, Rules, StageEntry, form

ALIASES = ("north", "south", "west")
BASE = Contract(
    1,
    "risk",
    "a model of risk",
    bytes(16),
    2_000_000_000,
    "north",
    tuple(Participant(alias, f"fp1{alias}") for alias in ALIASES),
    (
        StageEntry(
            "fit",
            "horizontal.logistic:fit",
            3,
            b"d" * 32,
            tuple((alias, "member") for alias in ALIASES),
            (Input("table", "", "dataset:rows"),),
            '{"columns":["a","b"],"reg_lambda":0.1}',
        ),
        StageEntry("score", "horizontal.logistic:evaluate", 1, b"e" * 32, (("north", "member"),), (), "{}"),
    ),
    (Release("fit.model", "all"),),
    Rules(),
)
DATA = Data("rows", b"v" * 32, 100, [["a", "number"], ["b", "text"]], "id", "y")


def changed(fit: StageEntry | None = None, **more: Any) -> Contract:
    return msgspec.structs.replace(BASE, **({"stages": (fit, BASE.stages[1])} if fit else {}), **more)


def stage(**more: Any) -> Contract:
    return changed(msgspec.structs.replace(BASE.stages[0], **more))


NUMBERS = sorted(set(Rules.__struct_fields__) - {"profile"})
OTHERS = {
    "name": changed(name="risk2"),
    "purpose": changed(purpose="a model of risk."),
    "initiator": changed(initiator="south"),
    "a participant": changed(participants=(*BASE.participants[:2], Participant("west", "fp1other"))),
    "an alias": changed(participants=(*BASE.participants[:2], Participant("east", "fp1west"))),
    "one more": changed(participants=(*BASE.participants, Participant("east", "fp1east"))),
    "their order": changed(participants=BASE.participants[::-1]),
    "the order of stages": changed(stages=BASE.stages[::-1]),
    "one stage less": changed(stages=BASE.stages[:1]),
    "id": stage(id="fit2"),
    "run": stage(run="horizontal.logistic:fit2"),
    "version": stage(version=4),
    "declaration": stage(declaration=b"D" * 32),
    "roles": stage(roles=(("north", "guest"), *BASE.stages[0].roles[1:])),
    "fewer roles": stage(roles=BASE.stages[0].roles[:2]),
    "input": stage(inputs=(Input("table", "", "dataset:rows2"),)),
    "of one": stage(inputs=(Input("table", "north", "dataset:rows"),)),
    "port": stage(inputs=(Input("tables", "", "dataset:rows"),)),
    "params": stage(params='{"columns":["a","b"],"reg_lambda":0.01}'),
    "columns": stage(params='{"columns":["a","c"],"reg_lambda":0.1}'),
    "one parameter less": stage(params='{"columns":["a","b"]}'),
    "release": changed(release=()),
    **{
        f"rules.{name}": changed(
            rules=msgspec.structs.replace(BASE.rules, **{name: "crash" if name == "profile" else 7})
        )
        for name in Rules.__struct_fields__
    },
}
SAME = {"nonce": changed(nonce=b"n" * 16), "expiry": changed(expires=2_100_000_000)}


@given(st.sampled_from(sorted(OTHERS)))
def test_a_contract_that_differs_in_any_one_field_is_another_and_the_field_is_shown(what: str) -> None:
    assert form(OTHERS[what]) != form(BASE)
    assert differences(BASE, [DATA], OTHERS[what], [DATA])


@given(st.sampled_from(sorted(OTHERS)), st.sampled_from(sorted(OTHERS)))
def test_two_have_one_form_exactly_when_they_have_no_differences(one: str, other: str) -> None:
    same = form(OTHERS[one]) == form(OTHERS[other])
    assert same is (differences(OTHERS[one], [], OTHERS[other], []) == [])
    assert same is (one == other)


def test_nonce_and_expiry_make_no_other_contract() -> None:
    for other in SAME.values():
        assert form(other) == form(BASE)
        assert differences(BASE, [DATA], other, [DATA]) == []


def test_every_field_of_a_contract_was_changed_here() -> None:
    """A field that a later release adds must be shown, too."""
    shown = {field for other in [*OTHERS.values(), *SAME.values()] for field in Contract.__struct_fields__
             if getattr(other, field) != getattr(BASE, field)}  # fmt: skip
    assert shown == set(Contract.__struct_fields__) - {"version"}
    of_a_stage = {field for other in OTHERS.values() for field in StageEntry.__struct_fields__
                  if getattr(other.stages[0], field) != getattr(BASE.stages[0], field)}  # fmt: skip
    assert of_a_stage == set(StageEntry.__struct_fields__)


def test_the_difference_is_one_field_with_both_values() -> None:
    (change,) = differences(BASE, [DATA], OTHERS["params"], [DATA])
    assert (change.field, change.before, change.after) == ("stages.fit.params.reg_lambda", "0.1", "0.01")
    (change,) = differences(BASE, [DATA], OTHERS["one parameter less"], [DATA])
    assert (change.before, change.after) == ("0.1", "")


def test_other_data_is_a_difference() -> None:
    new = msgspec.structs.replace(DATA, version=b"w" * 32, rows=101, columns=[["a", "number"], ["b", "number"]])
    found = {change.field: (change.before, change.after) for change in differences(BASE, [DATA], BASE, [new])}
    assert found == {
        "dataset rows.columns": ("a (number), b (text)", "a (number), b (number)"),
        "dataset rows.rows": ("100", "101"),
        "dataset rows.version": ("767676767676", "777777777777"),
    }
