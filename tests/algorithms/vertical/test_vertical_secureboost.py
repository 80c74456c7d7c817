"""SecureBoost: the trees of the joined table to the bit, no message that is not declared, and cheats refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plain_boosting
import pyarrow as pa
import pytest
from paillier_keys import primes

from fedpeer.algorithms.vertical import secureboost
from fedpeer.algorithms.vertical.boosting import guest, host
from fedpeer.algorithms.vertical.boosting.params import Fit
from fedpeer.secure import losses, paillier, residues, trees
from fedpeer.stage import Model, Stage, Table
from fedpeer.testing.stages import CAST, Run, check_stage, run_stage

Array = Any
SMALL = Fit(n_estimators=2, max_depth=2, max_bin=6)


def key(n: int = 2, bits: int = 2048, number: int = 0) -> dict[str, bytes]:
    return {"alice": b"".join(prime.to_bytes(bits // 16, "big") for prime in primes("key", bits)[number])}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ciphertexts without noise: what is computed is the same, in a hundredth of the time."""

    def none(self: residues.Noise, count: int, random: Any) -> residues.Split:
        random.bytes(1)
        return [residues.ONE] * count, [residues.ONE * 0] * count

    monkeypatch.setattr(residues.Noise, "draw", none)
    for name in ("OWNER_TABLE_FROM", "STRANGER_TABLE_FROM"):
        monkeypatch.setattr(paillier, name, 1 << 40)


def roles(n: int) -> dict[str, str]:
    return {alias: "host" if i else "guest" for i, alias in enumerate(CAST[:n])}


def table(x: Array, y: Array = None, **more: Array) -> Table:
    """Columns f0, f1, …; NaN is a missing value."""
    columns = {f"f{j}": pa.array(column, pa.float64(), from_pandas=True) for j, column in enumerate(x)}
    columns |= {name: pa.array(values, pa.float64()) for name, values in more.items()}
    if y is not None:
        columns["y"] = pa.array(y, pa.float64())
    ids = pa.array([f"row {i}" for i in range(x.shape[1])], pa.string())
    return Table(pa.table({"id": ids, **columns}), id="id", label=None if y is None else "y")


def features(rows: int = 150, seed: int = 1) -> Array:
    """Six columns: two alike, a constant one, one of few values, missing ones, and one that is all missing."""
    chance = np.random.default_rng(seed)
    x = chance.normal(size=(8, rows))
    x[1] = x[0]  # ties between owners
    x[2] = np.round(x[2])
    x[3, chance.random(rows) < 0.3] = np.nan
    x[4] = 7.0
    x[5] = np.nan
    x[6, :5] = np.nan  # fewer than may be told apart
    return x


def labels(x: Array, objective: str = "binary:bce") -> Array:
    score = x[0] + np.nan_to_num(x[3], nan=1.0) * np.where(x[2] > 0, 1, -1) + x[7] / 2
    if objective == "regression:l2":
        return 10 + 3 * score
    return (score > 0.2) * 1.0 if objective == "binary:bce" else np.digitize(score, [-0.7, 0.7]) * 1.0


SHARES = {2: [[0, 2, 4], [1, 3, 5, 6, 7]], 4: [[0, 4], [1, 2], [3, 5, 6], [7]]}
"""Which columns each participant has."""


def split(n: int, x: Array, y: Array, **more: Array) -> dict[str, dict[str, Any]]:
    own = [x[columns] for columns in SHARES[n]]
    tables = [table(own[0], y, **more), *(table(each) for each in own[1:])]
    return {alias: {"table": each} for alias, each in zip(CAST, tables, strict=False)}


def trained(inputs: Mapping[str, Any], params: Fit, stage: Stage = secureboost.fit, **more: Any) -> Run:
    return run_stage(stage, params, inputs, roles=roles(len(inputs)), keys=key(bits=params.key_bits), **more)


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
        min_child_weight=0.5,
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
    scored = run_stage(secureboost.predict, secureboost.Params(), inputs, roles=roles(n)).outputs
    assert [scored[alias]["scores"] for alias in CAST[1:n]] == [None] * (n - 1)
    found: Any = scored["alice"]["scores"]
    assert found.ids() == [f"row {i}" for i in range(len(y))]
    loss = losses.Loss(objective, params.num_class, top.facts["middle"], top.facts["half"])
    for name, values in loss.scores(margins).items():
        np.testing.assert_array_equal(found.column(name), values)
    leaves: Any = run_stage(secureboost.encode, secureboost.Params(), inputs, roles=roles(n)).outputs["alice"]["leaves"]
    assert len(leaves.features) == top.facts["n_trees"]
    for number, name in enumerate(leaves.features):
        assert (top.arrays["owner"][number][leaves.column(name).astype(int)] == -1).all(), "not a leaf"


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
        run_stage(secureboost.predict, secureboost.Params(), each, roles={a: roles(n)[a] for a in each}).digests
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
