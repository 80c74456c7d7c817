"""Each default of the policy by itself, the rules, and that only this peer's own facts decide."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeer.algorithms.horizontal import kmeans, logistic, statistics
from fedpeer.algorithms.vertical import align
from fedpeer.errors import ConfigError, PolicyError
from fedpeer.governance import policy
from fedpeer.governance.decision import Ask, DatasetAsk, Decision, StageAsk, decide
from fedpeer.governance.policy import BOUNDS, DEFAULT, TEXT, Policy, parse
from fedpeer.stage import Model, Params, Report, Stage, Sum, Table, at_least, stage
from fedpeer.store import Store

NOW = datetime(2026, 6, 1, tzinfo=UTC)
ALICE, BOB, CAROL, DAVE = ("fp1" + letter * 20 for letter in "abcd")
NAMES = {ALICE: "alice", BOB: "bob", CAROL: "carol", DAVE: "dave"}
COLUMNS = tuple(f"x{i}" for i in range(30))
AUTO = msgspec.structs.replace(DEFAULT, approve="auto")


class Grow(Params, frozen=True):
    max_depth: int = 6
    min_leaf: int = 10
    batch_size: int = 64


class Noise(Params, frozen=True):
    epsilon: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    delta: float = 1e-9


def declared(params: type[Params] = Params, **more: Any) -> Stage:
    async def fit(peers: Any, params: Any, table: Table) -> dict[str, Any]:
        return {}

    fit.__module__ = "fedpeer.algorithms.horizontal.trial"
    given: dict[str, Any] = {
        "version": 1, "params": params, "roles": {"member": at_least(1)}, "inputs": {"table": Table},
        "outputs": {"model": Model}, "messages": {"total": Sum("a total")}, "parameters": lambda params, n: n + 1,
    }  # fmt: skip
    return stage(**given | more)(fit)


DATA = DatasetAsk("breast", b"v" * 32, 455, (*COLUMNS, "benign"), "benign")


def stage_ask(
    of: Stage = logistic.fit, params: Params | None = None, data: DatasetAsk | None = DATA, **more: Any
) -> StageAsk:
    given: dict[str, Any] = {"id": "fit", "run": of.name, "role": "member", "parties": (ALICE, BOB, CAROL)}
    return StageAsk(
        stage=of,
        params=params if params is not None else msgspec.convert({}, of.params),
        datasets=(data,) if data else (),
        **given | more,
    )


def ask(*stages: StageAsk, **more: Any) -> Ask:
    given: dict[str, Any] = {
        "contract": "ab" * 32, "me": ALICE, "initiator": BOB, "partners": (BOB, CAROL), "purpose": "a risk model",
        "now": NOW, "min_parties": 3, "jobs_today": 0, "names": NAMES,
    }  # fmt: skip
    return Ask(stages=stages or (stage_ask(),), **given | more)


def refused(decision: Decision, rule: str, *figures: str) -> None:
    """By this rule alone, with these figures for our own operator."""
    assert decision.verdict == "refused"
    assert {finding.rule for finding in decision.failed} == {rule}, decision.reason
    for figure in figures:
        assert figure in decision.reason


def allowed(decision: Decision) -> None:
    assert decision.verdict == "auto", decision.reason


# the defaults, one by one


def test_what_no_rule_decides_is_asked() -> None:
    decision = decide(DEFAULT, ask())
    assert decision.verdict == "ask", decision.reason
    assert decide(AUTO, ask()).verdict == "auto"
    refused(decide(msgspec.structs.replace(DEFAULT, approve="refuse"), ask()), "approve")
    assert decide(DEFAULT, ask(replace(stage_ask(), datasets=()))).verdict == "ask"
    nothing = replace(ask(), stages=())
    assert decide(DEFAULT, nothing).verdict == "ask"
    refused(decide(msgspec.structs.replace(DEFAULT, approve="refuse"), nothing), "approve")


def test_a_sum_of_two_is_refused_for_each_reads_the_others_value() -> None:
    lax = msgspec.structs.replace(AUTO, assumed_colluders=0)
    two = stage_ask(parties=(ALICE, BOB))
    refused(decide(lax, ask(two)), "min_parties", "2 organizations hold data, min_parties = 3")
    allowed(decide(lax, ask()))


def test_a_contract_that_opens_sums_over_two_survivors_is_refused() -> None:
    lax = msgspec.structs.replace(AUTO, assumed_colluders=0)
    refused(decide(lax, ask(min_parties=2)), "min_parties", "opens sums over 2, maybe 2")


def test_beside_those_who_may_pool_what_they_see_two_more_are_in_every_sum() -> None:
    two = msgspec.structs.replace(AUTO, assumed_colluders=2)
    refused(decide(two, ask()), "assumed_colluders", "2 may pool")
    four = stage_ask(parties=(ALICE, BOB, CAROL, DAVE))
    refused(decide(two, ask(four)), "assumed_colluders", "3 in a sum at least")  # three may survive
    allowed(decide(two, ask(four, min_parties=4)))
    refused(decide(msgspec.structs.replace(AUTO, min_parties=2), ask(min_parties=2)), "assumed_colluders")


def test_an_alignment_of_two_is_no_sum() -> None:
    allowed(decide(AUTO, ask(psi())))


BOTH = {"min_parties", "assumed_colluders"}


def test_keys_of_one_organization_count_once() -> None:
    grouped = parse('approve = "auto"\norganizations = { group = ["bob", "carol"] }')
    assert {finding.rule for finding in decide(grouped, ask()).failed} == BOTH
    four = stage_ask(parties=(ALICE, BOB, CAROL, DAVE))
    assert {finding.rule for finding in decide(grouped, ask(four)).failed} == BOTH, "both of the group may survive"
    allowed(decide(grouped, ask(four, min_parties=4)))


def test_who_is_not_named_as_a_holder_of_data_does_not_count() -> None:
    named = parse('approve = "auto"\ntrusted = ["bob"]')
    assert {finding.rule for finding in decide(named, ask()).failed} == BOTH
    both = parse(f'approve = "auto"\ntrusted = ["bob", "{CAROL}"]')
    allowed(decide(both, ask()))
    four = stage_ask(parties=(ALICE, BOB, CAROL, DAVE))
    assert {finding.rule for finding in decide(both, ask(four)).failed} == BOTH, "the other may survive"
    allowed(decide(both, ask(four, min_parties=4)))


@pytest.mark.parametrize("of", [logistic.fit, statistics.run, kmeans.fit])
def test_fewer_own_rows_than_100_are_refused(of: Stage) -> None:
    small = [replace(DATA, rows=rows, columns=("x",), label=None) for rows in (99, 100)]
    refused(decide(AUTO, ask(stage_ask(of, data=small[0]))), "min_rows", "99 rows in 'breast', min_rows = 100")
    allowed(decide(AUTO, ask(stage_ask(of, data=small[1]))))


@pytest.mark.parametrize(
    ("of", "few", "enough"),
    [
        (statistics.run, statistics.Statistics(min_cell=9), statistics.Statistics(min_cell=10)),
        (logistic.evaluate, logistic.Evaluate(min_cell=9), logistic.Evaluate(min_cell=10)),
        (kmeans.fit, kmeans.Fit(k=2, min_rows=9), kmeans.Fit(k=2, min_rows=10)),
        (declared(Grow), Grow(min_leaf=9), Grow(min_leaf=10)),
    ],
)
def test_a_cell_a_cluster_or_a_leaf_of_fewer_than_10_rows_is_refused(of: Stage, few: Params, enough: Params) -> None:
    refused(decide(AUTO, ask(stage_ask(of, few))), "min_cell", "= 9 in the contract, min_cell = 10")
    allowed(decide(AUTO, ask(stage_ask(of, enough))))


def test_a_report_of_sums_that_does_not_say_how_small_its_cells_are_is_refused() -> None:
    silent = stage_ask(declared(outputs={"report": Report}))
    refused(decide(AUTO, ask(silent)), "min_cell", "reports sums, and has no parameter min_cell")
    allowed(decide(AUTO, ask(stage_ask(declared(Grow, outputs={"report": Report})))))
    allowed(decide(AUTO, ask(stage_ask(logistic.evaluate))))
    allowed(decide(msgspec.structs.replace(AUTO, min_cell=1), ask(silent)))


def test_a_model_of_more_than_a_third_of_a_parameter_for_a_row_is_refused() -> None:
    wide = [replace(DATA, rows=rows) for rows in (100, 93, 94)]  # 31 parameters
    lax = msgspec.structs.replace(AUTO, min_rows=0)
    allowed(decide(AUTO, ask(stage_ask(data=wide[0]))))
    refused(decide(lax, ask(stage_ask(data=wide[1]))), "max_parameters_per_row", "31 parameters from 93 rows")
    allowed(decide(lax, ask(stage_ask(data=wide[2]))))
    many = kmeans.Fit(k=8)  # 8 x 30
    refused(decide(AUTO, ask(stage_ask(kmeans.fit, many))), "max_parameters_per_row", "240 parameters from 455 rows")


def test_a_model_that_does_not_say_how_many_parameters_it_has_is_refused() -> None:
    silent = stage_ask(declared(parameters=None))
    refused(decide(AUTO, ask(silent)), "max_parameters_per_row", "does not say")
    allowed(decide(parse('approve = "auto"\nmax_parameters_per_row = inf'), ask(silent)))


def test_a_tree_deeper_than_6_is_refused() -> None:
    refused(decide(AUTO, ask(stage_ask(declared(Grow), Grow(max_depth=7)))), "max_depth", "max_depth = 7")
    allowed(decide(AUTO, ask(stage_ask(declared(Grow), Grow(max_depth=6)))))


def test_a_gradient_of_fewer_than_64_rows_is_refused() -> None:
    refused(decide(AUTO, ask(stage_ask(declared(Grow), Grow(batch_size=63)))), "min_batch", "63")
    allowed(decide(AUTO, ask(stage_ask(declared(Grow), Grow(batch_size=64)))))


def test_rows_that_differ_from_an_earlier_answer_in_1_to_9_are_refused() -> None:
    for nearest in (1, 9):
        near = stage_ask(data=replace(DATA, nearest=nearest))
        refused(decide(AUTO, ask(near)), "no_row_differencing", f"{nearest} rows")
        allowed(decide(msgspec.structs.replace(AUTO, no_row_differencing=False), ask(near)))
    allowed(decide(AUTO, ask(stage_ask(data=replace(DATA, nearest=10)))))


def among(*parties: str, of_all: bool = True) -> tuple[tuple[frozenset[str], bool], ...]:
    return ((frozenset(parties), of_all),)


def test_the_same_statistic_among_a_few_more_or_less_is_refused() -> None:
    def told(*parties: str) -> StageAsk:
        return stage_ask(data=replace(DATA, other_parties=among(*parties)))

    refused(decide(AUTO, ask(told(ALICE, BOB, CAROL, DAVE))), "no_party_differencing", "1 participants differ")
    allowed(decide(AUTO, ask(told(ALICE, BOB, CAROL))))
    swapped = told(ALICE, BOB, DAVE)
    refused(decide(AUTO, ask(swapped)), "no_party_differencing", "2 participants differ", "at least 3")
    allowed(decide(msgspec.structs.replace(AUTO, no_party_differencing=False), ask(swapped)))
    allowed(decide(AUTO, ask(told(ALICE, BOB, CAROL, *"456"))))


def test_the_same_statistic_again_is_refused_where_another_may_be_away() -> None:
    """Who is away from one of two sums of the same participants is told by the difference."""
    four = (ALICE, BOB, CAROL, DAVE)
    surely, maybe = (replace(DATA, other_parties=among(*four, of_all=of_all)) for of_all in (True, False))
    allowed(decide(AUTO, ask(stage_ask(data=surely, parties=four), min_parties=4)))
    refused(decide(AUTO, ask(stage_ask(data=surely, parties=four))), "no_party_differencing", "min_parties = 4 in both")
    refused(decide(AUTO, ask(stage_ask(data=maybe, parties=four), min_parties=4)), "no_party_differencing", "be away")


def test_noise_that_is_made_for_more_honest_organizations_than_there_may_be_is_refused() -> None:
    noisy, five = replace(logistic.fit, cost=lambda _: (0.5, 1e-9)), (ALICE, BOB, CAROL, DAVE, "4")
    for honest, colluders, holds in ((4, 1, True), (4, 2, False), (3, 2, True)):
        rules = msgspec.structs.replace(AUTO, assumed_colluders=colluders)
        stage = stage_ask(of=noisy, parties=five, survivors=5, honest=honest)
        decision = decide(rules, ask(stage, min_parties=5))
        if holds:
            allowed(decision)
        else:
            refused(decision, "assumed_colluders", "made for 4 organizations", "may be of 3")


def test_more_than_20_jobs_of_an_initiator_in_a_day_are_refused() -> None:
    allowed(decide(AUTO, ask(jobs_today=19)))
    refused(decide(AUTO, ask(jobs_today=20)), "jobs_per_day", "20 jobs of bob")


def psi(data: DatasetAsk = DATA, **params: Any) -> StageAsk:
    return stage_ask(align.run, align.Align(**params), data, role="host", parties=(ALICE, BOB))


def test_a_second_alignment_of_a_version_with_one_peer_is_refused() -> None:
    refused(decide(AUTO, ask(psi(replace(DATA, aligned={BOB: 1})))), "psi_per_version", "1 alignments", "with bob")
    allowed(decide(AUTO, ask(psi(replace(DATA, aligned={CAROL: 1})))))
    grouped = parse('approve = "auto"\norganizations = { group = ["bob", "carol"] }')
    refused(decide(grouped, ask(psi(replace(DATA, aligned={CAROL: 1})))), "psi_per_version")


def test_a_partner_may_not_ask_about_more_ids_than_the_policy_says() -> None:
    few = msgspec.structs.replace(AUTO, psi_max_ids=500)
    refused(decide(few, ask(psi())), "psi_max_ids", "max_ids = 10000 in the contract, psi_max_ids = 500")
    allowed(decide(few, ask(psi(max_ids=500))))
    allowed(decide(AUTO, ask(psi())))


def test_an_intersection_below_100_must_fail_as_too_small() -> None:
    refused(decide(AUTO, ask(psi(min_intersection=99))), "min_intersection", "99")
    allowed(decide(AUTO, ask(psi(min_intersection=100))))


def test_an_alignment_without_these_limits_is_refused() -> None:
    unlimited = replace(align.run, params=Params)
    decision = decide(AUTO, ask(stage_ask(unlimited, Params(), parties=(ALICE, BOB))))
    assert {finding.rule for finding in decision.failed} == {"min_intersection", "psi_max_ids"}


def test_what_is_not_among_the_stages_or_the_named_modules_does_not_run() -> None:
    own = stage_ask(run="acme.risk:fit")
    refused(decide(AUTO, ask(own)), "stages", "acme.risk:fit is not among what may run")
    allowed(decide(parse('approve = "auto"\nmodules = ["acme.risk"]'), ask(own)))
    refused(decide(parse('approve = "auto"\nmodules = ["acme.ris"]'), ask(own)), "stages")
    everything = parse('approve = "auto"\nstages = ["horizontal.statistics:*"]\n[[rule]]\ndo = "auto"')
    refused(decide(everything, ask()), "stages")


def test_a_missing_layer_of_the_sandbox_is_refused_where_it_is_required() -> None:
    refused(decide(AUTO, ask(sandbox_missing=("landlock",))), "sandbox", "landlock")
    allowed(decide(msgspec.structs.replace(AUTO, sandbox="best-effort"), ask(sandbox_missing=("landlock",))))


def test_what_cannot_fit_in_a_worker_is_refused_with_its_size() -> None:
    table = 8 * 455 * 31
    plain = stage_ask(declared())
    allowed(decide(AUTO, ask(plain, memory=table)))
    refused(decide(AUTO, ask(plain, memory=table - 1)), "memory", "0 MB or more, and may take 0 MB")
    matrix = table + 8 * 455 * 30  # and the features beside it
    allowed(decide(AUTO, ask(stage_ask(logistic.fit), memory=matrix)))
    refused(decide(AUTO, ask(stage_ask(logistic.fit), memory=matrix - 1)), "memory")
    large = stage_ask(kmeans.fit, data=replace(DATA, rows=10**9))
    refused(decide(AUTO, ask(large, memory=16 * 10**9)), "memory", "488,000 MB or more, and may take 16,000 MB here")
    allowed(decide(AUTO, ask(large)))  # not looked at


NOISY = declared(Noise, cost=lambda params: (params.epsilon, params.delta))


def noisy(epsilon: float, data: DatasetAsk = DATA, delta: float = 1e-9, **more: Any) -> StageAsk:
    return stage_ask(NOISY, Noise(epsilon=epsilon, delta=delta), data, **more)


def test_two_names_of_one_source_in_a_contract_are_paid_together() -> None:
    one, other = (noisy(0.6, replace(DATA, name=name, source="/rows.csv"), id=name) for name in ("one", "other"))
    refused(decide(AUTO, ask(one, other)), "budget.per_job", "1.2")
    allowed(decide(AUTO, ask(one, replace(other, datasets=(replace(DATA, name="other", source="/more.csv"),)))))


def test_more_privacy_than_one_of_a_dataset_in_a_job_is_refused() -> None:
    allowed(decide(AUTO, ask(noisy(1.0))))
    refused(decide(AUTO, ask(noisy(1.01))), "budget.per_job", "1.01")
    refused(decide(AUTO, ask(noisy(0.6), noisy(0.6, id="more"))), "budget.per_job", "1.2")


def test_more_privacy_than_three_of_a_dataset_in_a_year_is_refused() -> None:
    allowed(decide(AUTO, ask(noisy(1.0, replace(DATA, spent=2.0)))))
    refused(decide(AUTO, ask(noisy(1.0, replace(DATA, spent=2.01)))), "budget.epsilon", "2.01")


def test_a_delta_above_a_tenth_of_a_row_is_refused() -> None:
    allowed(decide(AUTO, ask(noisy(1.0, delta=1 / 4550))))
    refused(decide(AUTO, ask(noisy(1.0, delta=1 / 4540))), "budget.delta")


def test_what_has_noise_may_differ_from_earlier_answers() -> None:
    allowed(decide(AUTO, ask(noisy(1.0, replace(DATA, nearest=1)))))


def test_a_stage_from_which_nothing_leaves_has_no_bounds() -> None:
    tiny = replace(DATA, rows=1)
    allowed(decide(AUTO, ask(stage_ask(logistic.predict, data=tiny, parties=(ALICE,)))))


# rules


RULES = """
[[rule]]
do = "auto"
stages = ["horizontal.*"]
datasets = ["breast"]
columns = ["x*"]
partners = ["bob", "carol"]
purpose = ["*risk*"]
from = 2026-01-01T00:00:00Z
until = 2027-01-01T00:00:00Z
"""
LESS = replace(DATA, columns=COLUMNS, label=None)


@pytest.mark.parametrize(
    "other",
    [
        ask(stage_ask(data=replace(LESS, name="other"))),
        ask(stage_ask(data=DATA)),  # with the label
        ask(stage_ask(data=LESS), partners=(BOB, CAROL, DAVE)),
        ask(stage_ask(data=LESS), purpose="advertising"),
        ask(stage_ask(data=LESS), now=NOW - timedelta(days=200)),
        ask(stage_ask(data=LESS), now=datetime(2027, 1, 1, tzinfo=UTC)),
        ask(stage_ask(data=None)),
        ask(stage_ask(align.run, data=LESS, parties=(ALICE, BOB))),
    ],
)
def test_a_rule_allows_what_matches_in_everything(other: Ask) -> None:
    rules = parse(RULES)
    allowed(decide(rules, ask(stage_ask(data=LESS))))
    assert decide(rules, other).verdict == "ask"


@pytest.mark.parametrize("do", ["ask", "refuse"])
@pytest.mark.parametrize("criterion", ['columns = ["benign"]', 'partners = ["dave"]', f'partners = ["{DAVE}"]'])
def test_a_rule_that_restricts_matches_any_part(do: str, criterion: str) -> None:
    rules = parse(f'approve = "auto"\n[[rule]]\ndo = "{do}"\n{criterion}')
    asked = ask(partners=(BOB, CAROL, DAVE))
    assert decide(rules, asked).verdict == {"ask": "ask", "refuse": "refused"}[do]
    allowed(decide(rules, ask(stage_ask(data=LESS))))


def test_the_first_rule_that_matches_decides_and_the_strictest_answer_of_all_stages_counts() -> None:
    both = '[[rule]]\ndo = "{}"\nstages = ["horizontal.logistic:*"]\n[[rule]]\ndo = "{}"\n'
    allowed(decide(parse(both.format("auto", "refuse")), ask()))
    refused(decide(parse(both.format("refuse", "auto")), ask()), "rule 1")
    two = ask(stage_ask(), stage_ask(statistics.run, id="look"))
    refused(decide(parse(both.format("auto", "refuse")), two), "rule 2")
    assert decide(parse(both.format("auto", "ask")), two).verdict == "ask"


def test_bounds_hold_whatever_a_rule_allows_but_those_that_it_names() -> None:
    small = ask(stage_ask(data=replace(DATA, rows=95)))
    refused(decide(parse('[[rule]]\ndo = "auto"'), small), "min_rows")
    allowed(decide(parse('[[rule]]\ndo = "auto"\nmin_rows = 50'), small))
    refused(decide(parse('[[rule]]\ndo = "auto"\nmin_rows = 96'), small), "min_rows")


def test_a_rule_that_matches_a_part_only_cannot_lower_a_bound_but_raise_it() -> None:
    rule = '[[rule]]\ndo = "ask"\ncolumns = ["benign"]\nmin_rows = {}'
    refused(decide(parse(rule.format(50)), ask(stage_ask(data=replace(DATA, rows=95)))), "min_rows", "100")
    refused(decide(parse(rule.format(500)), ask()), "min_rows", "500")


def test_every_bound_knows_which_way_is_stricter() -> None:
    for bound in BOUNDS:
        lower = policy.stricter(bound, 1, 2)
        assert lower == (2 if bound.startswith(("min_", "assumed_")) else 1)
        assert bound.split("_")[0] in ("min", "max", "assumed", "psi"), "is more of it stricter?"


# only own facts decide


PARTIES = st.permutations([BOB, CAROL, DAVE])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 500), st.integers(2, 4), PARTIES, st.sampled_from([BOB, CAROL, DAVE]), st.text(max_size=20))
def test_nothing_that_the_initiator_says_of_itself_or_the_others_changes_the_decision(
    rows: int, survivors: int, order: list[str], initiator: str, purpose: str
) -> None:
    data = replace(DATA, rows=rows)
    first, other = (
        ask(stage_ask(data=data, parties=(ALICE, *parties)), initiator=who, partners=tuple(parties), purpose=why,
            min_parties=survivors, contract=contract)
        for parties, who, why, contract in (
            ([BOB, CAROL, DAVE], BOB, "", "00" * 32), (order, initiator, purpose, "ff" * 32)
        )
    )  # fmt: skip
    one, two = (decide(AUTO, each) for each in (first, other))
    assert one.verdict == two.verdict
    assert [(f.rule, f.holds) for f in one.findings] == [(f.rule, f.holds) for f in two.findings]


WORDS = st.lists(st.sampled_from(["breast", "x1", "x*", "*", "benign", "bob", "dave", "horizontal.*"]), max_size=3)
RULE = st.fixed_dictionaries(
    {"do": st.sampled_from(["auto", "ask", "refuse"])},
    optional=dict.fromkeys(("stages", "datasets", "columns", "partners"), WORDS),
)
ORDER = {"refused": 0, "ask": 1, "auto": 2}


@settings(max_examples=300, deadline=None)
@given(st.lists(RULE, max_size=4), RULE, st.integers(0, 4), st.sampled_from(["auto", "ask", "refuse"]))
def test_one_more_rule_that_refuses_never_allows_more(
    rules: list[dict[str, Any]], more: dict[str, Any], at: int, approve: str
) -> None:
    def policy_of(rules: list[dict[str, Any]]) -> Policy:
        return msgspec.convert({"approve": approve, "rule": rules}, Policy)

    more = {**more, "do": "refuse"}
    asked = ask(stage_ask(), stage_ask(statistics.run, id="look", data=LESS))
    before = decide(policy_of(rules), asked).verdict
    after = decide(policy_of([*rules[:at], more, *rules[at:]]), asked).verdict
    assert ORDER[after] <= ORDER[before]


# its text


def test_the_commented_defaults_say_nothing_and_uncommented_they_say_the_defaults() -> None:
    assert parse(TEXT) == parse("") == DEFAULT
    whole = re.sub(r"^# (\w+ = |\[budget\])", r"\1", TEXT.partition("# Rules come last")[0], flags=re.MULTILINE)
    assert parse(whole) == DEFAULT
    said = set(re.findall(r"^(\w+) = ", whole, re.MULTILINE))
    assert said == {*Policy.__struct_fields__, *policy.Budget.__struct_fields__} - {"rule", "budget"}
    example = "\n".join(
        line.removeprefix("# ") for line in TEXT.partition("unless a rule names one.\n#\n")[2].splitlines()
    )
    assert parse(example).rule[0].min_rows == 200


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        ("min_row = 5", "the policy: unknown key 'min_row'", "did you mean 'min_rows'?"),
        ("[budget]\nepsilom = 1", "[budget]: unknown key 'epsilom'", "did you mean 'epsilon'?"),
        ("[[rule]]\ndo = 'ask'\n[[rule]]\ndo = 'auto'\ncolumn = []", "rule 2: unknown key 'column'", "'columns'"),
        ("[[rule]]\ndo = 'ask'\nfrom_ = 1", "rule 1: unknown key 'from_'", "'from'"),
        ("[rule]\ndo = 'ask'", "[[rule]], in double brackets", ""),
        ("[[rule]]\ndo = 'allow'", "Invalid enum value 'allow'", ""),
        ("[[rule]]\nstages = ['*']", "missing required field `do`", ""),
        ("[[rule]]\ndo = 'refuse'\nmin_rows = 5", "rule 1: what is refused has no bounds", ""),
        ("[[rule]]\ndo = 'auto'\nuntil = 2026-01-01T00:00:00", "has no time zone", "2026-12-01T00:00:00Z"),
        ("[[rule]]\ndo = 'auto'\nfrom = 2026-01-01T00:00:00Z\nuntil = 2025-01-01T00:00:00Z", "ends before", ""),
        ("min_rows = -1", "`int` >= 0", ""),
        ("min_rows = '5'", "Expected `int`", ""),
        ("min_parties = 1", "`int` >= 2", ""),
        ("max_parameters_per_row = nan", "`float` >= 0.0", ""),
        ("[budget]\nepsilon = nan", "`float` >= 0.0", ""),
        ("[[rule]]\ndo = 'auto'\nmax_parameters_per_row = nan", "`float` >= 0.0", ""),
        ("min_rows = ", "is not TOML", ""),
        ("# " + "x" * policy.MAX_TEXT, "more than 65536 bytes", ""),
    ],
)
def test_a_text_that_is_no_policy_is_refused_with_its_place(text: str, says: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert says in error.value.message
    assert hint in error.value.hint


async def test_the_latest_text_counts_and_who_set_it_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path, [policy.SCHEMA])
    assert (await store.read(policy.kept)).number == 0
    assert await store.read(policy.current) == DEFAULT
    first = await store.write(lambda tx: policy.keep(tx, "min_rows = 5", 1000, "2026-01-01"))
    assert (first.number, first.uid, first.time) == (1, 1000, "2026-01-01")
    await store.write(lambda tx: policy.keep(tx, "min_rows = 6", 0, "2026-01-02", after=1))
    assert (await store.read(policy.current)).min_rows == 6
    for wrong in (
        lambda tx: policy.keep(tx, "min_rows = 7", 0, "2026-01-03", after=1),  # edited from what is no more
        lambda tx: policy.keep(tx, "min_row = 7", 0, "2026-01-03"),
    ):
        with pytest.raises(ConfigError):
            await store.write(wrong)
    store.close()
    again = Store(tmp_path, [policy.SCHEMA])
    assert (await again.read(policy.current)).min_rows == 6
    again.close()


async def test_a_kept_text_that_cannot_be_read_allows_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path, [policy.SCHEMA])
    await store.write(lambda tx: tx.execute("INSERT INTO policy VALUES (1, 'of_a_newer_release = 1', 0, '')"))
    with pytest.raises(PolicyError, match="policy 1 of this peer cannot be read"):
        await store.read(policy.current)
    store.close()
