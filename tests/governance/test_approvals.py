"""What the operators say: who counts, what a standing approval covers, and what it does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeer.admin.caller import Caller
from fedpeer.errors import NotFound, UsageError
from fedpeer.governance import approvals
from fedpeer.governance.approvals import APPROVED, ASKING, DENIED, REFUSED, STANDING_S, UNDECIDED, Asked, Data, Standing
from fedpeer.store import Store

ANN, BEN, CAT = Caller(1000, 1, "ann"), Caller(1001, 2, "ben"), Caller(1002, 3, "cat")
JOB, NEXT = b"j" * 32, b"n" * 32
ROWS = Data("rows", b"v1" * 16, 1000, [["id", "text"], ["age", "number"]], "id", None)
NOW = 1_800_000_000


def asked(contract: bytes = JOB, **more: Any) -> Asked:
    told: dict[str, Any] = {
        "contract": contract, "initiator": "fp1bank", "form": b"f" * 32, "epsilon": 0.5, "data": [ROWS],
        "time": NOW, "until": NOW + 3600, "state": ASKING, "needs": 1, "answer": b"yes",
    }  # fmt: skip
    return Asked(**(told | more))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path, [approvals.SCHEMA])
    yield opened
    opened.close()


def state(store: Store, contract: bytes = JOB) -> str:
    found = store.write_now(lambda tx: approvals.find(tx, contract))
    assert found is not None
    return found.state


def ask(store: Store, one: Asked) -> Asked:
    return store.write_now(lambda tx: approvals.ask(tx, one))


def approve(store: Store, by: Caller | None, contract: bytes = JOB, now: int = NOW, always: int = 0) -> Asked:
    return store.write_now(lambda tx: approvals.approve(tx, contract, by, now, name="job", always=always))


# one contract


def test_what_is_asked_is_kept_as_it_was_asked(store: Store) -> None:
    one = asked(why="the policy asks")
    assert ask(store, one) == one
    assert store.write_now(lambda tx: approvals.find(tx, JOB)) == one
    assert store.write_now(approvals.asking) == [one]
    assert store.write_now(lambda tx: approvals.find(tx, NEXT)) is None


def test_one_yes_is_enough_and_its_uid_is_kept(store: Store) -> None:
    ask(store, asked())
    assert approve(store, ANN).state == state(store) == APPROVED
    (approval,) = store.write_now(lambda tx: approvals.approvals(tx, JOB))
    assert (approval.uid, approval.user, approval.time, approval.how) == (1000, "ann", NOW, "operator")
    assert store.write_now(approvals.asking) == []


def test_two_people_are_two_uids(store: Store) -> None:
    ask(store, asked(needs=2))
    assert approve(store, ANN).state == ASKING
    with pytest.raises(UsageError, match="approved it already, and the policy wants 2 people"):
        approve(store, Caller(1000, 77, "ann-by-another-name"))
    assert state(store) == ASKING
    assert approve(store, BEN).state == state(store) == APPROVED


def test_one_no_is_enough(store: Store) -> None:
    ask(store, asked(needs=2))
    approve(store, ANN)
    assert store.write_now(lambda tx: approvals.deny(tx, JOB, "ben: not now")).state == state(store) == DENIED
    with pytest.raises(UsageError, match="denied already"):
        approve(store, CAT)


@pytest.mark.parametrize("settled", [APPROVED, DENIED, REFUSED, UNDECIDED])
def test_what_is_settled_stays_so(store: Store, settled: str) -> None:
    ask(store, asked(state=settled))
    for say in (
        lambda tx: approvals.approve(tx, JOB, ANN, NOW),
        lambda tx: approvals.deny(tx, JOB, "no"),
    ):
        with pytest.raises(UsageError, match=f"{settled} already"):
            store.write_now(say)
    assert store.write_now(lambda tx: approvals.give_up(tx, JOB, "late")).state == state(store) == settled


def test_nobody_approves_what_is_not_asked(store: Store) -> None:
    with pytest.raises(UsageError, match="not asked of this operator"):
        approve(store, ANN)


def test_who_says_nothing_has_not_approved(store: Store) -> None:
    ask(store, asked(needs=2))
    approve(store, ANN)
    assert store.write_now(lambda tx: approvals.give_up(tx, JOB, "late")).state == state(store) == UNDECIDED


def test_who_submits_approves_its_own_part(store: Store) -> None:
    store.write_now(lambda tx: approvals.submitted(tx, JOB, ANN, NOW))
    assert ask(store, asked()).state == APPROVED


def test_who_submits_is_one_of_two(store: Store) -> None:
    store.write_now(lambda tx: approvals.submitted(tx, JOB, ANN, NOW))
    assert ask(store, asked(needs=2)).state == ASKING
    with pytest.raises(UsageError, match="already"):
        approve(store, ANN)
    assert approve(store, BEN).state == APPROVED


def test_the_policys_refusal_is_no_operators_to_lift(store: Store) -> None:
    approved_always(store)
    store.write_now(lambda tx: approvals.submitted(tx, NEXT, ANN, NOW))
    assert ask(store, asked(NEXT, state=REFUSED, needs=0)).state == REFUSED


def test_what_is_forgotten_leaves_nothing_but_standing_approvals(store: Store) -> None:
    approved_always(store)
    store.write_now(lambda tx: approvals.forget(tx, JOB))
    assert store.write_now(lambda tx: (approvals.find(tx, JOB), approvals.approvals(tx, JOB))) == (None, [])
    assert len(standing(store)) == 1


def test_the_last_approved_job_of_an_initiator(store: Store) -> None:
    for number, how in enumerate((APPROVED, APPROVED, DENIED)):
        ask(store, asked(bytes([number]) * 32, time=NOW + number, state=how))
    ask(store, asked(initiator="fp1other", state=APPROVED, time=NOW + 9))
    found = store.write_now(lambda tx: approvals.last_approved(tx, "fp1bank", but=NEXT))
    assert found is not None
    assert found.contract == bytes([1]) * 32
    found = store.write_now(lambda tx: approvals.last_approved(tx, "fp1bank", but=bytes([1]) * 32))
    assert found is not None
    assert found.contract == bytes(32)


# standing approvals


def approved_always(store: Store, always: int = 1) -> None:
    ask(store, asked())
    approve(store, ANN, always=always)


def standing(store: Store, now: int = NOW) -> list[Standing]:
    return store.write_now(lambda tx: approvals.standing(tx, now))


def test_the_same_again_is_approved_by_who_approved_always(store: Store) -> None:
    approved_always(store)
    (given,) = standing(store)
    assert (given.name, given.people, given.expires) == ("job", [(1000, "ann")], NOW + STANDING_S)
    assert ask(store, asked(NEXT, time=NOW + 1)).state == APPROVED
    (approval,) = store.write_now(lambda tx: approvals.approvals(tx, NEXT))
    assert (approval.uid, approval.how) == (1000, f"standing {given.number}")


def test_approving_once_covers_nothing_else(store: Store) -> None:
    approved_always(store, always=0)
    assert standing(store) == []
    assert ask(store, asked(NEXT)).state == ASKING


def test_a_standing_approval_ends_after_thirty_days(store: Store) -> None:
    approved_always(store)
    assert ask(store, asked(NEXT, time=NOW + STANDING_S - 1)).state == APPROVED
    assert ask(store, asked(b"l" * 32, time=NOW + STANDING_S)).state == ASKING
    assert standing(store, NOW + STANDING_S) == []


def test_a_clock_that_went_back_covers_nothing(store: Store) -> None:
    approved_always(store)
    assert ask(store, asked(NEXT, time=NOW - 1)).state == ASKING


def test_a_revoked_approval_covers_nothing(store: Store) -> None:
    approved_always(store)
    (given,) = standing(store)
    store.write_now(lambda tx: approvals.revoke(tx, given.number, BEN, NOW))
    assert standing(store) == []
    assert ask(store, asked(NEXT)).state == ASKING
    assert state(store) == APPROVED  # what it approved stays so
    with pytest.raises(NotFound, match="no standing approval 1"):
        store.write_now(lambda tx: approvals.revoke(tx, given.number, BEN, NOW))


def test_one_persons_approval_is_none_where_two_are_needed(store: Store) -> None:
    approved_always(store)
    assert ask(store, asked(NEXT, needs=2)).state == ASKING


def test_two_people_approve_always_only_if_both_say_so(store: Store) -> None:
    for number, (one, other, held) in enumerate([(1, 1, True), (1, 0, False), (0, 1, False), (2, 1, True)]):
        contract = bytes([number]) * 32
        ask(store, asked(contract, form=contract, needs=2))
        approve(store, ANN, contract, always=one)
        approve(store, BEN, contract, always=other)
        found = [given for given in standing(store) if given.form == contract]
        assert bool(found) is held
        assert not any(given.any_version for given in found)  # the narrower of both
        assert (ask(store, asked(b"n" + contract[1:], form=contract, needs=2)).state == APPROVED) is held


def test_new_rows_are_covered_only_if_that_was_said(store: Store) -> None:
    new = msgspec.structs.replace(ROWS, version=b"v2" * 16, rows=1100)
    approved_always(store, always=1)
    assert ask(store, asked(NEXT, data=[new])).state == ASKING
    approve(store, ANN, NEXT, always=2)
    newer = msgspec.structs.replace(ROWS, version=b"v3" * 16, rows=1200)
    assert ask(store, asked(b"3" * 32, data=[newer])).state == APPROVED


@given(
    st.sampled_from(["initiator", "form", "epsilon", "name", "version", "columns", "id", "label", "more", "fewer"]),
    st.booleans(),
)
def test_what_differs_in_one_thing_is_not_covered(field: str, any_version: bool) -> None:
    base = asked()
    given = Standing(
        number=1, contract=JOB, name="job", any_version=any_version, people=[(1000, "ann")], created=NOW,
        expires=NOW + STANDING_S, revoked=0, initiator=base.initiator, form=base.form, epsilon=base.epsilon,
        data=base.data,
    )  # fmt: skip
    assert approvals.covers(given, base, 1, NOW)
    assert not approvals.covers(given, base, 2, NOW)  # it is one person's
    other: dict[str, Any] = {
        "initiator": "fp1other", "form": b"g" * 32, "epsilon": 0.6, "name": "rows2", "version": b"v2" * 16,
        "columns": [["id", "text"], ["age", "text"]], "id": None, "label": "age", "more": [ROWS, ROWS], "fewer": [],
    }  # fmt: skip
    if field in ("initiator", "form", "epsilon"):
        changed = msgspec.structs.replace(base, **{field: other[field]})
    elif field in ("more", "fewer"):
        changed = msgspec.structs.replace(base, data=other[field])
    else:
        changed = msgspec.structs.replace(base, data=[msgspec.structs.replace(ROWS, **{field: other[field]})])
    assert approvals.covers(given, changed, 1, NOW) is (field == "version" and any_version)
