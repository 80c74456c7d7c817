"""No two answers tell a row, or a participant, by their difference."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeer.algorithms.horizontal import logistic, statistics
from fedpeer.algorithms.vertical import align
from fedpeer.crypto import hash_
from fedpeer.errors import PolicyError
from fedpeer.governance import answered
from fedpeer.governance.answered import Cohort, check_cohort, cohort_of, difference
from fedpeer.governance.decision import Ask, DatasetAsk, Finding, StageAsk
from fedpeer.governance.policy import DEFAULT
from fedpeer.stage import Params, Stage, Table
from fedpeer.store import INLINE_BYTES, Store

NOW = datetime(2026, 6, 1, tzinfo=UTC)
ALICE, BOB, CAROL, DAVE = ("fp1" + letter * 20 for letter in "abcd")
POLICY = msgspec.structs.replace(DEFAULT, approve="auto", min_rows=0, max_parameters_per_row=1e9)
K = POLICY.min_cell


def table(rows: Sequence[int], *, changed: int = 0, ids: bool = True, more: bool = False, chunks: int = 1) -> Table:
    """Rows with these numbers; `changed` of them with another value; with one column `more`."""
    x = np.array([row * 1.5 for row in rows])
    x[:changed] += 1
    columns = {"id": pa.array([f"P-{row}" for row in rows])} if ids else {}
    columns |= {"x": pa.array(x), "y": pa.array([None if row % 7 == 0 else float(row % 2) for row in rows])}
    columns |= {
        "sex": pa.array([("f", "m", None)[row % 3] for row in rows]),
        "old": pa.array([row > 9 for row in rows]),
    }
    columns |= {"z": pa.array(x * x)} if more else {}
    data = pa.table(columns)
    step = max(1, len(rows) // chunks)
    parts = [data.slice(at, step) for at in range(0, max(len(rows), 1), step)]
    return Table(pa.concat_tables(parts), id="id" if ids else None)


def cohort(rows: Sequence[int], dataset: str = "patients", **more: Any) -> Cohort:
    made = table(rows, **more)
    version = hash_("test", dataset.encode(), str((list(rows), sorted(more.items()))).encode())
    return cohort_of(dataset, version, made)


class Owner:
    """Alice's memory, and what she says to runs of a stage on cohorts."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder, [answered.SCHEMA])
        self.policy = POLICY
        self.runs = 0

    def ask(
        self,
        *cohorts: Cohort,
        of: Stage = statistics.run,
        parties: tuple[str, ...] = (ALICE, BOB, CAROL),
        contract: int | None = None,
        stage: str = "look",
        time: str = "2026-06-01",
        params: Params | None = None,
    ) -> list[Finding]:
        """What fails; [] when it was answered. A `contract` is a new one each time, if none is given."""
        self.runs += 1
        number = self.runs if contract is None else contract
        datasets = tuple(
            DatasetAsk(name, bytes(32), 10**6, ("x",)) for name in sorted({cohort.dataset for cohort in cohorts})
        )
        datasets = tuple(replace(d, version=next(c.version for c in cohorts if c.dataset == d.name)) for d in datasets)
        params = params or (align.Align() if of is align.run else of.params())
        asked = StageAsk(stage, of.name, of, params, "member", parties, datasets)
        others = tuple(peer for peer in parties if peer != ALICE)
        ask = Ask(f"{number:064x}", ALICE, BOB, others, "", NOW, len(parties), (asked,), 0)
        findings = self.store.write_now(lambda tx: check_cohort(tx, self.policy, ask, asked, cohorts, time))
        return [finding for finding in findings if not finding.holds]

    def refuses(self, rule: str, *cohorts: Cohort, **more: Any) -> str:
        (failed,) = self.ask(*cohorts, **more)
        assert failed.rule == rule
        return failed.text


@pytest.fixture
def alice(tmp_path: Path) -> Iterator[Owner]:
    owner = Owner(tmp_path)
    yield owner
    owner.store.close()


# rows


def test_the_mean_of_1000_rows_and_then_of_999_is_refused(alice: Owner) -> None:
    assert alice.ask(cohort(range(1000))) == []
    assert "1 rows of 'patients' differ" in alice.refuses("no_row_differencing", cohort(range(999)))
    assert alice.ask(cohort(range(1000))) == []  # the same rows again tell nothing new


@pytest.mark.parametrize(("more", "fails"), [(0, False), (1, True), (K - 1, True), (K, False), (200, False)])
def test_a_difference_of_1_to_9_rows_is_refused_and_one_of_10_allowed(alice: Owner, more: int, fails: bool) -> None:
    assert alice.ask(cohort(range(1000))) == []
    assert bool(alice.ask(cohort(range(1000 + more)))) is fails
    assert bool(alice.ask(cohort(range(1000 - more)))) is fails


def test_rows_that_are_exchanged_count_on_both_sides(alice: Owner) -> None:
    assert alice.ask(cohort(range(1000))) == []
    assert "8 rows" in alice.refuses("no_row_differencing", cohort(range(4, 1004)))
    assert alice.ask(cohort(range(5, 1005))) == []


def test_what_was_refused_is_not_answered(alice: Owner) -> None:
    assert alice.ask(cohort(range(1000))) == []
    for _ in range(2):
        alice.refuses("no_row_differencing", cohort(range(995)))
    assert alice.ask(cohort(range(989))) == []  # 11 from what was answered, 6 from what was not


def test_the_same_rows_with_cells_of_another_size_are_refused(alice: Owner) -> None:
    """The means of the 10 and of the 11 smallest values tell the eleventh, and so does what is hidden in the middle."""
    rows, finer = cohort(range(1000)), statistics.Statistics(min_cell=11)
    assert alice.ask(rows, contract=1) == []
    for again in (rows, cohort(range(1000), "other name"), cohort(range(999, -1, -1))):
        assert "with cells of 10, and not of 11" in alice.refuses("no_row_differencing", again, params=finer)
    alice.refuses("no_row_differencing", rows, params=finer, contract=1, stage="again")
    assert alice.ask(rows) == []
    assert alice.ask(rows, of=logistic.evaluate, params=logistic.Evaluate(min_cell=20)) == [], "it tells something else"
    assert alice.ask(cohort(range(2000)), params=finer) == []


def test_every_earlier_answer_is_compared_with(alice: Owner) -> None:
    for rows in (1000, 900, 800):
        assert alice.ask(cohort(range(rows))) == []
    for rows in (1001, 901, 799):
        alice.refuses("no_row_differencing", cohort(range(rows)))


def test_another_stage_on_nearly_the_same_rows_is_refused_too_also_in_one_contract(alice: Owner) -> None:
    assert alice.ask(cohort(range(1000)), contract=7) == []
    alice.refuses("no_row_differencing", cohort(range(999)), of=logistic.fit)
    alice.refuses("no_row_differencing", cohort(range(999)), contract=7, stage="again")


def test_two_tables_of_one_stage_are_compared_with_each_other(alice: Owner) -> None:
    (one, other) = alice.ask(cohort(range(1000)), cohort(range(999)))
    assert one.rule == other.rule == "no_row_differencing"
    for _ in range(2):  # and again after a crash
        assert alice.ask(cohort(range(1000)), cohort(range(500)), contract=7) == []


def test_a_run_that_is_repeated_after_a_crash_does_not_count_against_itself(alice: Owner) -> None:
    for _ in range(3):
        assert alice.ask(cohort(range(1000)), contract=7) == []
    assert alice.store.write_now(lambda tx: tx.one("SELECT count(*) FROM answered_run")) == (1,)


def test_what_is_remembered_outlives_the_daemon(tmp_path: Path) -> None:
    first = Owner(tmp_path)
    assert first.ask(cohort(range(1000))) == []
    first.store.close()
    again = Owner(tmp_path)
    again.runs = 100
    again.refuses("no_row_differencing", cohort(range(999)))
    again.store.close()


# across versions


def test_a_row_that_came_or_went_in_a_new_version_is_found_by_its_id(alice: Owner) -> None:
    assert alice.ask(cohort(range(1000))) == []
    for rows in (range(1001), range(1, 1000), [*range(500), *range(501, 1000)]):
        alice.refuses("no_row_differencing", cohort(rows))


def test_the_order_of_rows_and_how_they_are_stored_make_no_difference(alice: Owner) -> None:
    shuffled = list(range(1000))
    random.Random(1).shuffle(shuffled)
    assert alice.ask(cohort(range(1000))) == []
    assert alice.ask(cohort(shuffled)) == []
    assert alice.ask(cohort(range(1000), chunks=7)) == []
    alice.refuses("no_row_differencing", cohort(shuffled[:-1], chunks=3))


def test_a_row_is_found_though_the_new_version_has_one_more_column(alice: Owner) -> None:
    assert alice.ask(cohort(range(1000))) == []
    alice.refuses("no_row_differencing", cohort(range(999), more=True))


def test_a_changed_value_is_found_though_the_ids_are_the_same(alice: Owner) -> None:
    assert alice.ask(cohort(range(1000))) == []
    assert "2 rows" in alice.refuses("no_row_differencing", cohort(range(1000), changed=1))
    assert alice.ask(cohort(range(1000), changed=K // 2)) == []


def test_rows_without_ids_are_found_by_what_is_in_them_wherever_they_stand(alice: Owner) -> None:
    assert alice.ask(cohort(range(1000), ids=False)) == []
    alice.refuses("no_row_differencing", cohort(range(1, 1000), ids=False))


def test_rows_that_are_all_alike_are_several_rows(alice: Owner) -> None:
    assert alice.ask(cohort([3] * 1000, ids=False)) == []
    alice.refuses("no_row_differencing", cohort([3] * 999, ids=False))


def test_the_same_rows_under_another_name_are_found_and_the_same_ids_of_other_people_are_not(alice: Owner) -> None:
    assert alice.ask(cohort(range(1000))) == []
    alice.refuses("no_row_differencing", cohort(range(999), dataset="patients-2"))
    assert alice.ask(cohort(range(999), dataset="staff", more=True)) == []


def test_a_choice_of_rows_is_kept_as_bits_and_compared_with_like_a_whole_table(alice: Owner) -> None:
    assert alice.ask(cohort(range(30_000))) == []
    assert alice.ask(cohort(range(0, 30_000, 2))) == []
    kept = alice.store.write_now(
        lambda tx: dict(tx.all("SELECT kind, sum(length(bytes)) FROM answered_piece GROUP BY kind"))
    )
    assert kept == {"contents": 240_000, "ids": 240_000, "bits": 3750}
    alice.refuses("no_row_differencing", cohort(range(0, 29_998, 2)))
    alice.refuses("no_row_differencing", cohort(range(0, 29_998, 2), more=True))  # by ids
    assert alice.store.write_now(lambda tx: tx.one("SELECT max(length(bytes)) FROM answered_piece")) == (INLINE_BYTES,)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)))
def test_the_difference_is_that_of_the_sets(one: set[int], other: set[int]) -> None:
    assert difference(cohort(sorted(one)), cohort(sorted(other))) == len(one ^ other)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_without_ids_it_is_that_of_the_rows_with_repetitions(one: list[int], other: list[int]) -> None:
    expected = sum(abs(one.count(row) - other.count(row)) for row in range(4))
    assert difference(cohort(one, ids=False), cohort(other, ids=False)) == expected


# caps


def test_more_rows_or_more_answers_than_can_be_remembered_are_refused(
    alice: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answered, "MAX_ROWS", 1000)
    monkeypatch.setattr(answered, "MAX_ANSWERS", 2)
    with pytest.raises(PolicyError, match="1001 rows, and 1000 can be remembered"):
        cohort(range(1001))
    assert alice.ask(cohort(range(1000))) == []
    assert alice.ask(cohort(range(500))) == []
    text = alice.refuses("no_row_differencing", cohort(range(700)))
    assert "2 tables of 'patients' are remembered" in text
    assert "fedpeer budget show patients" in text
    assert alice.ask(cohort(range(500))) == []  # this one is remembered
    assert alice.ask(cohort(range(5000, 6000), "others")) == []  # of another dataset


def test_what_was_answered_over_a_year_ago_makes_room_only_when_it_must(
    alice: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answered, "MAX_ANSWERS", 3)
    assert alice.ask(cohort(range(1000)), time="2025-01-01") == []
    assert alice.ask(cohort(range(500)), time="2025-01-01") == []  # kept as a part of the first
    alice.refuses("no_row_differencing", cohort(range(999)), time="2026-02-01")  # old, but there is room for both
    assert alice.ask(cohort(range(2000, 3000)), time="2025-09-01") == []
    alice.refuses("no_row_differencing", cohort(range(4000, 5000)), time="2025-12-31")
    assert alice.ask(cohort(range(4000, 5000)), time="2026-02-01") == []
    assert alice.store.write_now(lambda tx: answered.remembered(tx, "patients")) == 2
    alice.refuses("no_row_differencing", cohort(range(2000, 2999)), time="2026-02-01")  # younger than a year


def test_what_was_answered_lately_of_an_old_table_keeps_it(alice: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answered, "MAX_ANSWERS", 1)
    assert alice.ask(cohort(range(1000)), time="2025-01-01") == []
    assert alice.ask(cohort(range(1000)), time="2026-01-01") == []
    alice.refuses("no_row_differencing", cohort(range(2000, 3000)), time="2026-02-01")


def test_what_an_operator_forgets_is_all_of_one_dataset_and_nothing_else(alice: Owner) -> None:
    assert alice.ask(cohort(range(1000))) == []
    assert alice.ask(cohort(range(500))) == []
    assert alice.ask(cohort(range(5000, 6000), "others")) == []
    assert alice.store.write_now(lambda tx: answered.forget(tx, "patients")) == 2
    assert alice.store.write_now(lambda tx: tx.one("SELECT count(DISTINCT number) FROM answered_piece")) == (1,)
    assert alice.ask(cohort(range(999))) == []
    alice.refuses("no_row_differencing", cohort(range(5000, 5999), "others"))


# what really goes in


def test_the_rows_that_really_go_in_are_counted(alice: Owner) -> None:
    alice.policy = msgspec.structs.replace(POLICY, min_rows=100)
    assert "99 rows" in alice.refuses("min_rows", cohort(range(99)))
    assert alice.ask(cohort(range(100))) == []
    alice.policy = msgspec.structs.replace(POLICY, max_parameters_per_row=0.33)
    assert alice.refuses("max_parameters_per_row", cohort(range(5)), of=logistic.fit)


def test_a_policy_that_became_stricter_holds_for_what_was_approved_before(alice: Owner) -> None:
    alice.policy = msgspec.structs.replace(POLICY, approve="ask")
    assert alice.ask(cohort(range(1000))) == []  # asked and approved
    alice.policy = msgspec.structs.replace(POLICY, approve="refuse")
    alice.refuses("approve", cohort(range(1000)))


# participants


def test_a_sum_with_one_participant_less_is_refused_until_the_data_is_other_data(alice: Owner) -> None:
    assert alice.ask(cohort(range(1000)), parties=(ALICE, BOB, CAROL, DAVE)) == []
    assert "1 participants differ" in alice.refuses("no_party_differencing", cohort(range(1000)))
    assert alice.ask(cohort(range(1200))) == []


def test_another_stage_or_name_makes_it_no_other_sum(alice: Owner) -> None:
    """The moments of a regression are those of the statistics; so are those of the same rows in another order."""
    assert alice.ask(cohort(range(1000)), of=logistic.fit, parties=(ALICE, BOB, CAROL, DAVE)) == []
    alice.refuses("no_party_differencing", cohort(range(1000)))
    alice.refuses("no_party_differencing", cohort(range(999, -1, -1)))
    alice.refuses("no_party_differencing", cohort(range(1000), dataset="again"))
    alice.refuses("no_party_differencing", cohort(range(1000), more=True))
    assert alice.ask(cohort(range(1000)), parties=(ALICE, BOB, CAROL, DAVE)) == []


def test_a_sum_with_noise_may_be_among_others(alice: Owner) -> None:
    noisy = replace(statistics.run, cost=lambda params: (0.5, 1e-9))
    assert alice.ask(cohort(range(1000)), of=noisy, parties=(ALICE, BOB, CAROL, DAVE)) == []
    assert alice.ask(cohort(range(1000))) == []
    assert alice.ask(cohort(range(1000)), of=noisy, parties=(ALICE, BOB, CAROL, DAVE)) == []


# alignments


def test_a_version_is_aligned_once_with_each_peer_whatever_rows_of_it_are_chosen(alice: Owner) -> None:
    whole, pair = cohort(range(1000)), (ALICE, BOB)
    assert alice.ask(whole, of=align.run, parties=pair, contract=7) == []
    assert alice.ask(whole, of=align.run, parties=pair, contract=7) == []  # the same run
    assert "1 alignments" in alice.refuses("psi_per_version", whole, of=align.run, parties=pair)
    assert alice.ask(whole, of=align.run, parties=(ALICE, CAROL)) == []
    assert alice.ask(cohort(range(1500)), of=align.run, parties=pair) == []


def test_an_alignment_tells_no_statistic_and_is_no_answer_about_rows(alice: Owner) -> None:
    assert alice.ask(cohort(range(1000)), of=align.run, parties=(ALICE, BOB)) == []
    assert alice.ask(cohort(range(999))) == []
