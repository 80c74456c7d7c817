"""What the policy says to a contract: refused, to be asked, or allowed, and every reason for it.

    decision = decide(policy, ask)      # ask: the contract as it concerns this peer, and this peer's own facts
    decision.verdict                    # "refused" | "ask" | "auto"
    decision.failed                     # the findings that do not hold; their texts are for our own operator

Rules
* From local facts alone: what stages are is known here, rows are counted here, earlier answers are remembered here.
  Nothing that the initiator says of itself, of its data or of the others makes a difference, but the purpose, which a
  rule may ask for, and which all sign.
* Bounds come first and are checked for every stage; each gives a Finding, held or not. Then the rules decide, in order;
  the strictest answer to any stage is the answer to the contract.
* A stage that does not say what a bound needs to know (its parameters, the size of its cells) fails that bound.
* The texts hold exact figures. They stay here: a partner reads one coarse word, at the deadline.

Source: the bounds are those of DataSHIELD (nfilter.glm: parameters for each row), of OpenSAFELY and statistical offices
(small cells), and of the attacks named beside them in policy.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from fedpeer.governance.policy import BOUNDS, Do, Policy, Rule, matches, stricter
from fedpeer.stage import Model, Params, Report, Rows, Stage, Sum, is_own

Verdict = Literal["refused", "ask", "auto"]

CELLS = ("min_cell", "min_rows", "min_leaf", "min_samples_leaf")
"""Names of parameters that say how many rows are behind a cell, a cluster or a leaf at least."""
AT_LEAST = {**dict.fromkeys(CELLS, "min_cell"), "batch_size": "min_batch", "min_intersection": "min_intersection"}
AT_MOST = {"max_depth": "max_depth", "max_ids": "psi_max_ids"}
"""Name of a stage's parameter → the policy's bound for it."""


@dataclass(frozen=True)
class DatasetAsk:
    """An own dataset that goes into a stage, directly or through earlier stages, and what this peer knows of it."""

    name: str
    version: bytes
    rows: int
    """exact; of the whole dataset, where an earlier stage chooses among them"""
    columns: tuple[str, ...]
    """what the stage reads, without the id"""
    label: str | None = None
    source: str = ""
    """what it is read from: several names of it have one budget"""
    spent: float = 0.0
    """ε in the last year, the largest over the partners of the job"""
    aligned: Mapping[str, int] = field(default_factory=dict)
    """peer → how often this version was aligned with it"""
    nearest: int | None = None
    """rows by which an earlier answer differs from the whole dataset, the least that is not 0; None: none differs"""
    other_parties: tuple[tuple[frozenset[str], bool], ...] = ()
    """the participants of earlier sums without noise over these rows"""
    cells: frozenset[int] = frozenset()
    """the least cells of earlier sums without noise over these rows, by the same stage"""


@dataclass(frozen=True)
class StageAsk:
    """A stage of the contract in which this peer has a role."""

    id: str
    run: str
    stage: Stage
    params: Params
    role: str
    parties: tuple[str, ...]
    """peer ids of all who have a role in it, this peer among them"""
    datasets: tuple[DatasetAsk, ...]
    survivors: int = 0
    """its sums are opened over so many at least"""
    honest: int = 0
    """so many of these are taken to keep what they see to themselves: noise is drawn for so few"""

    @property
    def aligns(self) -> bool:
        """Whether it tells which rows are common (a private set intersection)."""
        return Rows in self.stage.outputs.values() and bool(self.stage.messages)

    @property
    def sums(self) -> bool:
        return any(isinstance(message, Sum) for message in self.stage.messages.values())

    @property
    def cell(self) -> int:
        """Rows behind its cells at least; 0 where no parameter says so."""
        return next((value for name in CELLS if (value := getattr(self.params, name, None)) is not None), 0)

    @property
    def cost(self) -> tuple[float, float] | None:
        """(ε, δ) of its noise, None without."""
        return self.stage.cost(self.params) if self.stage.cost is not None else None


@dataclass(frozen=True)
class Ask:
    """A contract as it concerns this peer."""

    contract: str
    me: str
    initiator: str
    """a peer id, as in `partners`"""
    partners: tuple[str, ...]
    """all participants but this peer"""
    purpose: str
    now: datetime
    min_parties: int
    """of the contract's rules: no sum over fewer is opened"""
    stages: tuple[StageAsk, ...]
    jobs_today: int
    """earlier jobs of the initiator's organization in the last 24 hours, this one not among them"""
    names: Mapping[str, str] = field(default_factory=dict)
    """peer id → its name in our roster"""
    sandbox_missing: tuple[str, ...] = ()
    """layers of the workers' sandbox that this machine does not have"""
    memory: int = 0
    """bytes that a worker may take here; 0: not looked at"""

    def name(self, peer: str) -> str:
        return self.names.get(peer, peer)


@dataclass(frozen=True)
class Finding:
    """One bound or rule, and whether the contract is within it."""

    rule: str
    """the policy's key, or "rule 2", "approve" """
    stage: str
    """"" for the contract as a whole"""
    holds: bool
    text: str


@dataclass(frozen=True)
class Decision:
    verdict: Verdict
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if not finding.holds)

    @property
    def reason(self) -> str:
        """What our own operator reads of a refusal, with figures; "" if it is none."""
        return "; ".join(
            f"{finding.stage}: {finding.text}" if finding.stage else finding.text for finding in self.failed
        )


def decide(policy: Policy, ask: Ask) -> Decision:
    """What the policy says to a contract, and every bound that was checked."""
    findings = list(_of_the_contract(policy, ask))
    answers: list[Do] = [] if ask.stages else [policy.approve]
    for stage in ask.stages:
        findings += check_stage(policy, ask, stage)
        _, rule = deciding(policy, ask, stage)
        answers.append(rule.do if rule else policy.approve)
    if not ask.stages:
        findings.append(Finding("approve", "", policy.approve != "refuse", "no stage has a part for this peer"))
    if not all(finding.holds for finding in findings):
        return Decision("refused", tuple(findings))
    return Decision("ask" if "ask" in answers else "auto", tuple(findings))


def check_stage(policy: Policy, ask: Ask, stage: StageAsk) -> tuple[Finding, ...]:
    """Every bound of one stage, and the rule that decides about it; asking the operator holds."""
    number, rule = deciding(policy, ask, stage)
    do, where = (rule.do, f"rule {number}") if rule else (policy.approve, "approve")
    said = {"auto": "allows it", "ask": "has the operator asked", "refuse": "refuses it"}[do]
    decided = Finding(where, stage.id, do != "refuse", f"{where} {said}")
    return (*_of_a_stage(policy, bounds_of(policy, ask, stage), ask, stage), decided)


def widest_cell(policy: Policy) -> int:
    """The largest min_cell that any stage may have: earlier answers further off than that need not be looked for."""
    return max([policy.min_cell, *(rule.min_cell for rule in policy.rule if rule.min_cell is not None)])


# rules


def deciding(policy: Policy, ask: Ask, stage: StageAsk) -> tuple[int, Rule | None]:
    """The first rule that matches a stage, with its number from 1; (0, None) if none does."""
    for number, rule in enumerate(policy.rule, start=1):
        if _matches(rule, ask, stage, whole=rule.do == "auto"):
            return number, rule
    return 0, None


def bounds_of(policy: Policy, ask: Ask, stage: StageAsk) -> dict[str, Any]:
    """The bounds of a stage: the policy's, but those that the deciding rule names.

    A rule that does not cover all of the stage's datasets, columns and partners can make a bound stricter only.
    """
    bounds = {bound: getattr(policy, bound) for bound in BOUNDS}
    _, rule = deciding(policy, ask, stage)
    if rule is None:
        return bounds
    covers = _matches(rule, ask, stage, whole=True)
    for bound in BOUNDS:
        named = getattr(rule, bound)
        if named is not None:
            bounds[bound] = named if covers else stricter(bound, named, bounds[bound])
    return bounds


def _matches(rule: Rule, ask: Ask, stage: StageAsk, *, whole: bool) -> bool:
    """Whether a rule speaks of a stage: of `whole` of what goes into it, or of any part."""
    if rule.from_ is not None and ask.now < rule.from_:
        return False
    if rule.until is not None and ask.now >= rule.until:
        return False
    if rule.stages is not None and not matches([stage.run], rule.stages):
        return False
    if rule.purpose is not None and not matches([ask.purpose], rule.purpose):
        return False
    datasets = [[dataset.name] for dataset in stage.datasets]
    columns = [[column] for dataset in stage.datasets for column in dataset.columns]
    partners = [[peer, ask.name(peer)] for peer in ask.partners]
    some = all if whole else any
    for patterns, items in ((rule.datasets, datasets), (rule.columns, columns), (rule.partners, partners)):
        if patterns is not None and not (items and some(matches(words, patterns) for words in items)):
            return False
    return True


# bounds


def _of_the_contract(policy: Policy, ask: Ask) -> Iterator[Finding]:
    yield Finding(
        "jobs_per_day",
        "",
        ask.jobs_today < policy.jobs_per_day,
        f"{ask.jobs_today} jobs of {ask.name(ask.initiator)} in the last 24 hours, jobs_per_day = "
        f"{policy.jobs_per_day}",
    )
    if policy.sandbox == "required":
        missing = ", ".join(ask.sandbox_missing)
        yield Finding(
            "sandbox",
            "",
            not missing,
            f"the workers' sandbox lacks {missing}" if missing else "the workers' sandbox is whole",
        )
    spending: dict[str, float] = {}
    spent: dict[str, float] = {}
    names: dict[str, str] = {}
    for stage in ask.stages:
        for dataset in stage.datasets:
            if stage.cost is not None:
                data = dataset.source or dataset.name
                spending[data] = spending.get(data, 0.0) + stage.cost[0]
                spent[data], names[data] = max(spent.get(data, 0.0), dataset.spent), dataset.name
    for data, epsilon in sorted(spending.items()):
        name = names[data]
        yield Finding(
            "budget.per_job",
            "",
            epsilon <= policy.budget.per_job,
            f"ε = {epsilon:g} of {name!r} in one job, per_job = {policy.budget.per_job:g}",
        )
        yield Finding(
            "budget.epsilon",
            "",
            spent[data] + epsilon <= policy.budget.epsilon,
            f"ε = {epsilon:g} of {name!r} and {spent[data]:g} in the year before, epsilon = {policy.budget.epsilon:g}",
        )


def _of_a_stage(policy: Policy, bounds: Mapping[str, Any], ask: Ask, stage: StageAsk) -> Iterator[Finding]:
    def finding(rule: str, holds: bool, text: str) -> Finding:
        return Finding(rule, stage.id, bool(holds), text)

    allowed = matches([stage.run], policy.stages) or is_own(stage.run, policy.modules)
    yield finding("stages", allowed, f"{stage.run} is {'' if allowed else 'not '}among what may run")
    if ask.memory:
        needs = _memory(stage)
        text = f"a worker takes {_megabytes(needs)} or more, and may take {_megabytes(ask.memory)} here"
        yield finding("memory", needs <= ask.memory, text)
    if not stage.stage.messages:
        return  # nothing leaves
    if stage.sums:
        yield from _of_parties(policy, bounds, ask, stage, finding)
    yield from _of_params(bounds, stage, finding)
    if stage.aligns:
        yield from _of_alignments(policy, bounds, ask, stage, finding)
        return
    for dataset in stage.datasets:
        least = bounds["min_rows"]
        yield finding("min_rows", dataset.rows >= least, f"{dataset.rows} rows in {dataset.name!r}, min_rows = {least}")
        if stage.cost is not None:
            delta = 1 / (10 * max(dataset.rows, 1))
            yield finding(
                "budget.delta", stage.cost[1] <= delta, f"δ = {stage.cost[1]:g}, at most 1 / (10 · rows) = {delta:g}"
            )
            continue  # with noise, a difference of answers tells what the budget says and no more
        if policy.no_row_differencing:
            near, k = dataset.nearest, bounds["min_cell"]
            yield finding(
                "no_row_differencing",
                near is None or near >= k,
                f"no earlier answer is of other rows of {dataset.name!r}"
                if near is None
                else f"{near} rows of {dataset.name!r} differ from an earlier answer, min_cell = {k}",
            )
            if others := dataset.cells - {stage.cell}:  # what the one hides and the other does not is a few rows
                told = f"{stage.run} answered of these rows of {dataset.name!r} with cells of {min(others)}"
                yield finding("no_row_differencing", False, f"{told}, and not of {stage.cell}")
        if policy.no_party_differencing and stage.sums:
            yield _of_others(bounds["assumed_colluders"] + 2, ask, stage, dataset, finding)
    if stage.datasets and Model in stage.stage.outputs.values():
        yield _of_size(bounds, stage, finding)


def _memory(stage: StageAsk) -> int:
    """Bytes that a worker takes at least: its tables, 8 for each value, and what the stage says for itself.

    Of a table that an earlier stage makes, all rows of the dataset count.
    """
    values = sum(dataset.rows * len(dataset.columns) for dataset in stage.datasets)
    if stage.stage.memory is None:
        return 8 * values
    rows = max((dataset.rows for dataset in stage.datasets), default=0)
    features = sum(column != dataset.label for dataset in stage.datasets for column in dataset.columns)
    return 8 * values + stage.stage.memory(stage.params, rows, features)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


Make = Callable[[str, bool, str], Finding]


def of_all(ask: Ask, stage: StageAsk) -> bool:
    """Whether the sums of a stage can only be opened over all its participants."""
    return ask.min_parties >= len(stage.parties)


def _of_others(least: int, ask: Ask, stage: StageAsk, dataset: DatasetAsk, make: Make) -> Finding:
    """Two sums over the same rows are of the same participants, all of them, or of `least` different ones.

    Who is away from a sum is not known beforehand, and one more in the other sum is told by the difference.
    """
    differences = [len(earlier ^ set(stage.parties)) for earlier, _ in dataset.other_parties]
    near = min((size for size in differences if size), default=least)
    told = f"of a sum over these rows of {dataset.name!r}"
    if near < least:
        return make("no_party_differencing", False, f"{near} participants differ from those {told}, at least {least}")
    surely = stage.cost is not None or (
        all(sure for _, sure in dataset.other_parties) and (not differences or of_all(ask, stage))
    )
    if not surely:
        text = f"one may be away from this sum or be away {told}: min_parties = {len(stage.parties)} in both holds"
        return make("no_party_differencing", False, text)
    return make("no_party_differencing", True, f"nobody's part shows between this and those {told}")


def _of_parties(policy: Policy, bounds: Mapping[str, Any], ask: Ask, stage: StageAsk, make: Make) -> Iterator[Finding]:
    held = Counter(
        policy.organization(peer, ask.name(peer))
        for peer in stage.parties
        if peer == ask.me or policy.is_counted(peer, ask.name(peer))
    )
    least, colluders = bounds["min_parties"], bounds["assumed_colluders"]
    yield make("min_parties", len(held) >= least, f"{len(held)} organizations hold data, min_parties = {least}")
    fewest = _fewest(held, len(stage.parties) - held.total(), ask.min_parties)
    yield make(
        "min_parties",
        fewest >= least,
        f"the contract opens sums over {ask.min_parties}, maybe {fewest} organizations that hold data, min_parties = "
        f"{least}",
    )
    yield make(
        "assumed_colluders",
        fewest - colluders >= 2,
        f"{fewest} in a sum at least, and {colluders} may pool what they see; two more are needed",
    )
    if stage.cost is not None and stage.honest:
        left = _fewest(held, len(stage.parties) - held.total(), stage.survivors) - colluders
        yield make(
            "assumed_colluders",
            left >= stage.honest,
            f"the noise is made for {stage.honest} organizations that do not pool what they see, and may be of {left}",
        )


def _fewest(held: Mapping[str, int], others: int, survivors: int) -> int:
    """Organizations that hold data among so many survivors, at the worst: who has many keys, and all others, stay."""
    left, fewest = survivors - others, 0
    for keys in sorted(held.values(), reverse=True):
        if left > 0:
            left, fewest = left - keys, fewest + 1
    return fewest


def _of_params(bounds: Mapping[str, Any], stage: StageAsk, make: Make) -> Iterator[Finding]:
    for names, at_least in ((AT_LEAST, True), (AT_MOST, False)):
        for name, bound in names.items():
            value = getattr(stage.params, name, None)
            if value is not None:
                holds = value >= bounds[bound] if at_least else value <= bounds[bound]
                yield make(bound, holds, f"{name} = {value} in the contract, {bound} = {bounds[bound]}")
    reports = stage.sums and stage.cost is None and Report in stage.stage.outputs.values()
    if reports and bounds["min_cell"] > 1 and not any(hasattr(stage.params, name) for name in CELLS):
        yield make("min_cell", False, f"{stage.run} reports sums, and has no parameter min_cell that bounds its cells")


def _of_size(bounds: Mapping[str, Any], stage: StageAsk, make: Make) -> Finding:
    """Numbers that the model fits, for each own row: others may know all rows but ours."""
    most = bounds["max_parameters_per_row"]
    rule = "max_parameters_per_row"
    if math.isinf(most):
        return make(rule, True, "no bound")
    if stage.stage.parameters is None:
        return make(rule, False, f"{stage.run} does not say how many parameters its model has")
    features = sum(column != dataset.label for dataset in stage.datasets for column in dataset.columns)
    rows = min(dataset.rows for dataset in stage.datasets)
    count = stage.stage.parameters(stage.params, features)
    return make(rule, count <= most * rows, f"{count} parameters from {rows} rows, {rule} = {most:g}")


def _of_alignments(
    policy: Policy, bounds: Mapping[str, Any], ask: Ask, stage: StageAsk, make: Make
) -> Iterator[Finding]:
    for name, bound in (("min_intersection", "min_intersection"), ("max_ids", "psi_max_ids")):
        if not hasattr(stage.params, name):
            yield make(bound, False, f"{stage.run} has no parameter {name!r}")
    most = bounds["psi_per_version"]
    for dataset in stage.datasets:
        done: dict[str, int] = {}
        for peer, count in dataset.aligned.items():
            organization = policy.organization(peer, ask.name(peer))
            done[organization] = done.get(organization, 0) + count
        for peer in stage.parties:
            if peer == ask.me:
                continue
            count = done.get(policy.organization(peer, ask.name(peer)), 0)
            yield make(
                "psi_per_version",
                count < most,
                f"{count} alignments of this version of {dataset.name!r} with {ask.name(peer)}, "
                f"psi_per_version = {most}",
            )
