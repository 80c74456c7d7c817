"""Reports of scores against scikit-learn, on random rows with many ties."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn import metrics

from fedpeer import artifact
from fedpeer.algorithms.local import evaluate
from fedpeer.algorithms.local.evaluate import Evaluate
from fedpeer.errors import DataError
from fedpeer.stage import Report, Table
from fedpeer.testing.stages import check_stage, run_stage

Array = np.ndarray[Any, Any]
SEEDS = range(20)


def ids(n: int) -> list[str]:
    return [f"P-{i}" for i in range(n)]


def rows(y: Array, names: list[str] | None = None) -> Table:
    names = ids(len(y)) if names is None else names
    return Table(pa.table({"id": pa.array(names, pa.string()), "y": pa.array(y, from_pandas=True)}), "id", "y")


def scores(values: Array, names: list[str] | None = None, column: str = "score") -> Table:
    names = ids(len(values)) if names is None else names
    columns = {"id": pa.array(names, pa.string()), column: pa.array(values, pa.float64(), from_pandas=True)}
    return Table(pa.table(columns), "id")


def report(task: Any, y: Array, values: Array) -> dict[str, Any]:
    column = "class" if task == "multi" else "score"
    return evaluated(task, scores(values, column=column), rows(np.asarray(y, float)))


def evaluated(task: Any, given: Table, table: Table) -> dict[str, Any]:
    out = run_stage(evaluate.run, Evaluate(task=task), [{"scores": given, "table": table}]).outputs["alice"]["report"]
    assert isinstance(out, Report)
    return dict(json.loads(artifact.dump(out)[1]))


def tied(seed: int, n: int = 0) -> tuple[Array, Array]:
    """Labels, and scores of a few levels that go with them, 0, 1 and 0.5 among them."""
    chance = np.random.default_rng(seed)
    n = n or int(chance.integers(2, 400))
    y = np.append([0.0, 1.0], (chance.random(n) < 0.3).astype(float))
    levels = int(chance.integers(1, 40))
    p = np.clip(np.round((chance.random(n + 2) + 0.3 * y - 0.15) * levels) / levels, 0, 1)
    return y, p


def near(one: Any, other: Any) -> bool:
    return bool(np.allclose(one, other, rtol=1e-12, atol=1e-12))


def confusion(part: dict[str, Any]) -> list[list[int]]:
    return [[part["tn"], part["fp"]], [part["fn"], part["tp"]]]


# binary


@pytest.mark.parametrize("seed", SEEDS)
def test_a_binary_report_is_that_of_scikit_learn(seed: int) -> None:
    y, p = tied(seed)
    out = report("binary", y, p)
    assert (out["n_samples"], out["positives"]) == (len(y), y.sum())
    assert near(out["auc"], metrics.roc_auc_score(y, p))
    assert near(out["log_loss"], metrics.log_loss(y, p))
    assert near(out["average_precision"], metrics.average_precision_score(y, p))
    fpr, tpr, thresholds = metrics.roc_curve(y, p, drop_intermediate=False)
    assert near(out["ks"], (tpr - fpr).max())
    at = out["confusion"]["ks"]["threshold"]
    assert near((tpr - fpr)[list(thresholds).index(at)], out["ks"])
    assert out["confusion"]["half"]["threshold"] == 0.5
    for part in out["confusion"].values():
        guess = (p >= part["threshold"]).astype(float)
        assert confusion(part) == metrics.confusion_matrix(y, guess).tolist()
        assert near(part["accuracy"], metrics.accuracy_score(y, guess))
        assert near(part["precision"], metrics.precision_score(y, guess, zero_division=0))
        assert near(part["recall"], metrics.recall_score(y, guess))
        assert near(part["f1"], metrics.f1_score(y, guess))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_points_of_the_curve_are_points_of_scikit_learns_and_where_the_recall_reaches_each_hundredth(
    seed: int,
) -> None:
    y, p = tied(seed, n=3000 if seed % 2 else 30)
    points = report("binary", y, p)["pr_curve"]
    precision, recall, thresholds = metrics.precision_recall_curve(y, p)
    place = {threshold: (a, b) for threshold, a, b in zip(thresholds, precision, recall, strict=False)}
    assert all(near((a, b), place[threshold]) for threshold, a, b in points)
    wanted = {max(t for t, r in zip(thresholds, recall, strict=False) if r >= k / 100 - 1e-12) for k in range(1, 101)}
    assert [point[0] for point in points] == sorted(wanted, reverse=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_lift_is_that_of_rows_that_are_cut_in_ten_and_equal_scores_mixed_evenly(seed: int) -> None:
    y, p = tied(seed)
    cut: list[tuple[float, float]] = []  # ten parts of each row, sorted by score, each with the mean label of its ties
    for row in np.argsort(-p, kind="stable"):
        cut += [(float(p[row]), float(y[p == p[row]].mean()))] * 10
    n, lift = len(y), report("binary", y, p)["lift"]
    assert len(lift) == 10
    for k, line in enumerate(lift, start=1):
        inside, above = [[label for _, label in cut[a : k * n]] for a in ((k - 1) * n, 0)]
        assert near(line["share"], k / 10)
        assert line["min_score"] == cut[k * n - 1][0]
        assert near(line["rate"], np.mean(inside))
        assert near(line["gain"], sum(above) / 10 / y.sum())
        assert near(line["lift"], np.mean(above) / y.mean())


def test_no_number_depends_on_the_order_of_the_rows() -> None:
    y, p = tied(7)
    order = np.random.default_rng(7).permutation(len(y))
    assert report("binary", y, p) == report("binary", y[order], p[order])


def test_scores_without_any_difference_are_chance() -> None:
    y = np.array([0.0, 0.0, 0.0, 1.0])
    out = report("binary", y, np.full(4, 0.2))
    assert (out["auc"], out["ks"], out["average_precision"]) == (0.5, 0.0, 0.25)
    assert [line["lift"] for line in out["lift"]] == pytest.approx([1.0] * 10, rel=1e-12)
    assert confusion(out["confusion"]["half"]) == [[3, 0], [1, 0]]


def test_certainty_that_is_wrong_costs_what_it_does_in_scikit_learn() -> None:
    y, p = np.array([0.0, 1.0, 1.0]), np.array([1.0, 0.0, 1.0])
    assert near(report("binary", y, p)["log_loss"], metrics.log_loss(y, p))


def test_a_report_does_not_grow_with_the_rows() -> None:
    chance = np.random.default_rng(5)
    y = (chance.random(20_000) < 0.5).astype(float)
    out = report("binary", y, chance.random(y.size))
    assert len(out["pr_curve"]) == 100
    assert len(json.dumps(out)) < 10_000
    assert near(out["auc"], 0.5) is False


# the other tasks


@pytest.mark.parametrize("seed", SEEDS)
def test_a_report_of_classes_is_that_of_scikit_learn(seed: int) -> None:
    chance = np.random.default_rng(seed)
    n, k = int(chance.integers(5, 300)), int(chance.integers(2, 8))
    y = np.append([0.0, 1.0], chance.integers(0, k, n)) * 1.5
    guess = np.where(chance.random(n + 2) < 0.5, y, chance.integers(0, k + 1, n + 2) * 1.5)
    out = report("multi", y, guess)
    classes = sorted({*y, *guess})
    assert out["classes"] == classes
    codes = [[classes.index(value) for value in values] for values in (y, guess)]
    assert out["confusion"] == metrics.confusion_matrix(*codes).tolist()
    assert near(out["accuracy"], metrics.accuracy_score(*codes))
    assert near(out["macro_f1"], metrics.f1_score(*codes, average="macro"))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_report_of_a_regression_is_that_of_scikit_learn(seed: int) -> None:
    chance = np.random.default_rng(seed)
    y = chance.normal(size=int(chance.integers(2, 300))) * 10.0 ** chance.integers(-3, 4) + 1
    guess = y + chance.normal(size=y.size)
    out = report("regression", y, guess)
    assert near(out["rmse"], metrics.root_mean_squared_error(y, guess))
    assert near(out["mae"], metrics.mean_absolute_error(y, guess))
    assert near(out["r2"], metrics.r2_score(y, guess))


def test_r2_is_none_where_all_labels_are_the_same_or_too_close_to_tell() -> None:
    for y in (np.full(7, 0.1), np.full(3, 0.7), np.full(11, 0.3), np.array([0.0, 1e-200])):
        out = report("regression", y, y + 0.2)
        assert out["r2"] is None
        assert near(out["rmse"], 0.2)


# whose score is whose


def test_who_has_the_label_gets_the_report_and_others_none() -> None:
    y, p = tied(3)
    label = rows(y)
    without = Table(label.data.select(["id"]), "id")
    given = {alias: {"scores": scores(p), "table": table} for alias, table in (("bank", label), ("shop", without))}
    run = run_stage(evaluate.run, Evaluate(), given)
    assert isinstance(run.outputs["bank"]["report"], Report)
    assert run.outputs["shop"]["report"] is None


def test_it_stands_what_a_stage_has_to_stand() -> None:
    y, p = tied(4)

    def right(outputs: dict) -> None:  # type: ignore[type-arg]
        for output in outputs.values():
            assert near(output["report"].values["auc"], metrics.roc_auc_score(y, p))

    check_stage(evaluate.run, Evaluate(), lambda n: [{"scores": scores(p), "table": rows(y)}] * n, right, equal=())


def test_scores_are_matched_by_id_in_whatever_order_they_come() -> None:
    y, p = tied(5)
    order = np.random.default_rng(5).permutation(len(y))
    shuffled = scores(p[order], [ids(len(y))[i] for i in order])
    assert evaluated("binary", shuffled, rows(y)) == report("binary", y, p)


def test_without_ids_rows_are_matched_by_number_or_by_order() -> None:
    y, p = tied(6)
    n = len(y)
    table = Table(pa.table({"y": y}), label="y")
    order = np.random.default_rng(6).permutation(n)
    numbered = scores(p[order], [str(row) for row in order])
    assert evaluated("binary", numbered, table) == report("binary", y, p)
    plain = Table(pa.table({"score": p}))
    assert evaluated("binary", plain, table) == report("binary", y, p)
    assert evaluated("binary", plain, rows(y)) == report("binary", y, p)


def test_a_repeated_id_is_taken_by_order_where_both_have_the_same_and_refused_otherwise() -> None:
    y, p, names = np.array([0.0, 1.0, 1.0]), np.array([0.1, 0.4, 0.9]), ["a", "b", "b"]
    assert evaluated("binary", scores(p, names), rows(y, names))["auc"] == 1.0
    with pytest.raises(DataError, match="the scores have an id twice, and their orders differ"):
        evaluated("binary", scores(p, names), rows(y, ["b", "a", "b"]))
    with pytest.raises(DataError, match="the table has an id twice, and their orders differ"):
        evaluated("binary", scores(p, ["a", "b", "c"]), rows(y, ["b", "a", "b"]))


def test_ids_without_a_partner_are_refused_by_row_and_not_by_id() -> None:
    y, p = np.array([0.0, 1.0, 1.0]), np.array([0.1, 0.4, 0.9])
    with pytest.raises(DataError, match=r"1 of 3 rows have no score, the first is row 1 \(from 0\)") as error:
        evaluated("binary", scores(p, ["a", "c", "d"]), rows(y, ["a", "secret", "c"]))
    assert "secret" not in str(error.value)
    for given, n in ((scores(p), 2), (scores(p[:2]), 3)):
        with pytest.raises(DataError, match=f"{given.n_samples} scores for {n} rows"):
            evaluated("binary", given, rows(y[:n]))


@pytest.mark.parametrize(
    ("task", "y", "values", "words"),
    [
        ("binary", [0, 1, 1], [0.1, np.nan, 0.3], r"1 scores have no 'score', the first is in row 1"),
        ("multi", [0, 1, 2], [0, 1, np.nan], r"1 scores have no 'class', the first is in row 2"),
        ("binary", [0, 0, 0], [0.1, 0.2, 0.3], "all 3 labels are the same"),
        ("binary", [1, 1, 1], [0.1, 0.2, 0.3], "all 3 labels are the same"),
        ("binary", [], [], "all 0 labels are the same"),
        ("multi", [2, 2, 2], [0, 1, 2], "all 3 labels are the same"),
        ("binary", [0, 1, 2], [0.1, 0.2, 0.3], r"a label is neither 0 nor 1, in row 2"),
        ("binary", [0, 1, 1], [0.1, 0.2, 1.5], r"the score of row 2 \(from 0\) is not a probability"),
        ("binary", [0, 1, 1], [-0.1, 0.2, 0.5], r"the score of row 0 \(from 0\) is not a probability"),
        ("binary", [0, np.nan, 1], [0.1, 0.2, 0.5], "the label column 'y' has missing values"),
        ("multi", np.arange(101), np.arange(101), "101 classes, and at most 100"),
        ("regression", [], [], "the table has no row"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_by_name(task: str, y: Any, values: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        report(task, np.array(y, float), np.array(values, float))


def test_scores_without_the_column_of_the_task_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="no column 'class'"):
        evaluated("multi", scores(np.array([0.1, 0.2])), rows(np.array([0.0, 1.0])))
