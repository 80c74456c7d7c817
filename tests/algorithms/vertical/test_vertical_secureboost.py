"""SecureBoost: the trees of the joined table to the bit, no message that is not declared, and cheats refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plain_boosting
import pytest
from boosting_cast import SHARES, features, key, labels, roles, split, trained

from fedpeer.algorithms.vertical import secureboost
from fedpeer.algorithms.vertical.boosting import guest, host
from fedpeer.algorithms.vertical.boosting.params import Fit
from fedpeer.secure import losses, trees
from fedpeer.stage import Model, Params, Stage
from fedpeer.testing.stages import CAST, Run, check_stage, run_stage

Array = Any


class Drawn:
    """What participants drew for their trees: rows and features, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[Array] = []
        self.features: dict[str, list[Array]] = {}
        learning, drawn = guest._learning, guest.drawn_of

        def rows(*given: Any) -> Array:
            self.rows.append(learning(*given))
            return self.rows[-1]

        def columns(peers: Any, *given: Any) -> Array:
            self.features.setdefault(peers.me, []).append(drawn(peers, *given))
            return self.features[peers.me][-1]

        monkeypatch.setattr(guest, "_learning", rows)
        monkeypatch.setattr(guest, "drawn_of", columns)
        monkeypatch.setattr(host, "drawn_of", columns)


def check_equal(
    run: Run, x: Array, y: Array, params: Fit, drawn: Drawn, weights: Array | None = None, first: int = 0
) -> Array:
    """Every node of every tree is the plain one's, gains and values to the bit; the margins of the plain one."""
    models = {alias: outputs["model"] for alias, outputs in run.outputs.items()}
    top: Model = models["alice"]
    arrays, shares, base = top.arrays, SHARES[len(models)], top.arrays["base"]
    place = [(owner, j) for owner, columns in enumerate(shares) for j in range(len(columns))]
    joined = x[[column for columns in shares for column in columns]]
    ends = [trees.edges(column, params.max_bin) for column in joined]
    bins = np.array([trees.binned(column, end) for column, end in zip(joined, ends, strict=True)])
    groups, count = len(base), len(drawn.rows)
    offset = np.cumsum([0, *map(len, shares)])
    allowed = []
    for i in range(count):
        alone = params.complete_secure and i < groups
        drawing = list(CAST[: len(shares)])
        chosen = []
        for owner, alias in enumerate(drawing):
            at = i if owner == 0 else i - (groups if params.complete_secure else 0)
            if owner == 0 or not alone:
                chosen += [int(offset[owner] + j) for j in drawn.features[alias][at]]
        allowed.append(chosen)
    w = np.ones(len(y)) if weights is None else weights
    loss = losses.Loss(params.objective, params.num_class, top.facts["middle"], top.facts["half"])
    targets = loss.targets(y)
    plain, margins = plain_boosting.boost(bins, targets, base, [w * rows for rows in drawn.rows], allowed, params)
    assert top.facts["n_trees"] <= count
    splits = 0
    for number, grown in enumerate(plain[: top.facts["n_trees"]]):
        owners = arrays["owner"][number]
        assert {node for node in grown if isinstance(grown[node], tuple)} == set(np.flatnonzero(owners >= 0))
        for node, said in grown.items():
            value = said[0] if isinstance(said, tuple) else said
            assert arrays["value"][number, node] == value, (number, node)
            if isinstance(said, tuple):
                _, gain, j, t, side, _ = said
                owner, feature = place[j]
                record = arrays["record"][number, node]
                own = models[CAST[owner]].arrays
                assert arrays["gain"][number, node] == gain, (number, node)
                assert owners[node] == owner, (number, node)
                found = own["feature"][record], own["threshold"][record], own["missing_left"][record]
                assert found == (feature, ends[j][t], bool(side)), (number, node)
                splits += 1
    assert splits > count, "the data is good for nothing"
    return margins


@pytest.mark.parametrize("n", [2, 4])
def test_the_trees_are_those_of_the_joined_table_to_the_bit(
    n: int, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = features()
    y, drawn = labels(x), Drawn(monkeypatch)
    params = Fit(n_estimators=4, max_depth=3, max_bin=8, complete_secure=False)
    run = trained(split(n, x, y), params)
    check_equal(run, x, y, params, drawn)
    owners = {int(owner) for owner in run.outputs["alice"]["model"].arrays["owner"].ravel()}  # type: ignore[union-attr]
    assert owners == set(range(-1, n)), "a participant has no split"


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("objective", ["binary:bce", "multi:ce", "regression:l2"])
def test_so_they_are_for_parts_of_rows_and_features_weights_and_every_objective(
    n: int, objective: Any, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = features(200, seed=2)
    y, drawn = labels(x, objective), Drawn(monkeypatch)
    weights = np.random.default_rng(5).choice([0.0, 0.25, 0.7, 1.5], len(y))
    params = Fit(
        objective=objective,
        num_class=3 if objective == "multi:ce" else 2,
        n_estimators=3,
        max_depth=3,
        max_bin=7,
        learning_rate=0.4,
        reg_lambda=0.5,
        gamma=0.01,
        min_child_weight=4.0,
        subsample=0.8,
        subsample_feature=0.6,
        weight="w",
        max_weight=1.5,
    )
    run = trained(split(n, x, y, w=weights), params)
    margins = check_equal(run, x, y, params, drawn, weights)
    assert not np.array_equal(drawn.rows[0], drawn.rows[-1])
    models = {alias: outputs["model"] for alias, outputs in run.outputs.items()}
    top: Any = models["alice"]
    assert (top.arrays["owner"][: len(top.arrays["base"])] <= 0).all(), "a host split a node of the first trees"

    inputs = {alias: {"model": models[alias], **given} for alias, given in split(n, x, y, w=weights).items()}
    scored = run_stage(secureboost.predict, Params(), inputs, roles=roles(n)).outputs
    assert [scored[alias]["scores"] for alias in CAST[1:n]] == [None] * (n - 1)
    found: Any = scored["alice"]["scores"]
    assert found.ids() == [f"row {i}" for i in range(len(y))]
    loss = losses.Loss(objective, params.num_class, top.facts["middle"], top.facts["half"])
    for name, values in loss.scores(margins).items():
        np.testing.assert_array_equal(found.column(name), values)
    leaves: Any = run_stage(secureboost.encode, Params(), inputs, roles=roles(n)).outputs["alice"]["leaves"]
    assert len(leaves.features) == top.facts["n_trees"]
    for number, name in enumerate(leaves.features):
        assert (top.arrays["owner"][number][leaves.column(name).astype(int)] == -1).all(), "not a leaf"


@pytest.mark.system  # chaos
@pytest.mark.parametrize("sizes", [(2,), (4,)])
def test_killed_at_every_request_it_leaves_the_same_bytes(sizes: tuple[int], quick: None) -> None:
    x = features(90, seed=3)
    y = labels(x)
    params = Fit(n_estimators=3, max_depth=2, max_bin=4, subsample=0.8, subsample_feature=0.8, validation=0.1)

    def pooled(outputs: Mapping[str, Mapping[str, Any]]) -> None:
        owners = {int(owner) for owner in outputs["alice"]["model"].arrays["owner"].ravel()}
        assert owners & set(range(1, len(outputs))), "no host has a split"

    check_stage(secureboost.fit, params, lambda n: split(n, x, y), pooled, roles=roles, sizes=sizes, keys=key)


@pytest.mark.parametrize("n", [2, 4])
def test_going_on_from_a_model_gives_the_trees_of_one_run(n: int, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x = features(seed=4)
    y, drawn = labels(x, "multi:ce"), Drawn(monkeypatch)
    params = Fit(objective="multi:ce", num_class=3, n_estimators=2, max_depth=2, max_bin=6)
    inputs = split(n, x, y)
    first = trained(inputs, params)
    again = {alias: {**given, "model": first.outputs[alias]["model"]} for alias, given in inputs.items()}
    second = trained(again, params, secureboost.refit)  # type: ignore[arg-type]
    assert second.outputs["alice"]["model"].facts["n_trees"] == 12  # type: ignore[union-attr]
    check_equal(second, x, y, params, drawn)
    check = {alias: {"model": outputs["model"], **inputs[alias]} for alias, outputs in second.outputs.items()}
    swapped = {alias: check[alias] for alias in ["alice", *reversed(CAST[1:n])]}
    found = [
        run_stage(secureboost.predict, Params(), each, roles={a: roles(n)[a] for a in each}).digests
        for each in (check, swapped)
    ]
    assert found[0]["alice"] == found[1]["alice"], "the order of hosts in a later contract matters"


@pytest.mark.parametrize("n", [2, 4])
def test_training_stops_when_the_validation_rows_get_worse_and_goes_back_to_the_best(
    n: int, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = features(120, seed=6)
    y = labels(x)
    y[::7] = 1 - y[::7]  # noise, to be learned by heart
    drawn = Drawn(monkeypatch)
    params = Fit(n_estimators=30, max_bin=5, learning_rate=0.5, validation=0.3, early_stopping=3)
    run = trained(split(n, x, y), params)
    grown, top = len(drawn.rows), run.outputs["alice"]["model"]
    assert 1 < top.facts["n_trees"] == grown - 3 < 27  # type: ignore[union-attr]
    assert all(rows.sum() == 84 for rows in drawn.rows)
    assert all(np.array_equal(rows, drawn.rows[0]) for rows in drawn.rows), "a tree learned from a validation row"
    by_tree = {each.done: each.metrics["validation"] for each in run.progress["alice"]}
    assert top.facts["n_trees"] == min(by_tree, key=lambda done: by_tree[done])  # type: ignore[union-attr]
    check_equal(run, x, y, params, drawn)
    for alias in CAST[1:n]:
        model: Any = run.outputs[alias]["model"]
        number = CAST.index(alias)
        assert len(model.arrays["feature"]) == (top.arrays["owner"] == number).sum()  # type: ignore[union-attr]


@pytest.mark.system  # chaos
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("stage", [secureboost.refit, secureboost.predict, secureboost.encode])
def test_so_does_what_goes_on_from_a_model(n: int, stage: Stage, quick: None) -> None:
    x = features(90, seed=8)
    params, inputs = Fit(n_estimators=1, max_depth=2, max_bin=3, complete_secure=False), split(n, x, labels(x))
    first = trained(inputs, params)
    inputs = {alias: {**given, "model": first.outputs[alias]["model"]} for alias, given in inputs.items()}
    given = params if stage is secureboost.refit else Params()
    check_stage(stage, given, lambda _: inputs, lambda _: None, roles=roles, sizes=(n,), keys=key)


def test_of_two_siblings_only_the_rows_of_the_smaller_are_added_up(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, added = features(200), []
    summed = trees._summed

    def counted(peers: Any, gradients: Any, bins: Any, node: Array, count: int, max_bin: int) -> Any:
        added.append(int((node >= 0).sum()))
        return summed(peers, gradients, bins, node, count, max_bin)

    monkeypatch.setattr(trees, "_summed", counted)
    trained(split(2, x, labels(x)), Fit(n_estimators=1, max_depth=3, max_bin=4, complete_secure=False))
    assert added[0] == 200
    assert len(added) > 2
    assert max(added[1:]) <= 100


@pytest.mark.parametrize("n", [2, 4])
def test_each_participant_knows_how_much_its_own_features_matter(n: int, quick: None) -> None:
    x = features(seed=7)
    run = trained(split(n, x, labels(x)), Fit(n_estimators=4, max_bin=8, complete_secure=False))
    top: Any = run.outputs["alice"]["model"]
    for number, alias in enumerate(CAST[:n]):
        model: Any = run.outputs[alias]["model"]
        assert list(model.facts["importance"]) == model.facts["columns"]
        own = top.arrays["owner"] == number
        total = [sum(each[what] for each in model.facts["importance"].values()) for what in ("splits", "gain")]
        assert total == [own.sum(), pytest.approx(top.arrays["gain"][own].sum())]
