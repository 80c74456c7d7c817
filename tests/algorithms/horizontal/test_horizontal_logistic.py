"""horizontal.logistic against scikit-learn on the pooled rows."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler

from fedpeer import artifact
from fedpeer.algorithms.horizontal import logistic
from fedpeer.algorithms.horizontal.logistic import Evaluate, Fit, evaluate, fit, predict, solve
from fedpeer.errors import DataError
from fedpeer.secure import exact
from fedpeer.stage import Model, Params, Sum, Table
from fedpeer.testing.stages import Run, check_stage, run_stage

BREAST = load_breast_cancer()
NAMES = [str(name) for name in BREAST.feature_names]


def table(x: np.ndarray, y: np.ndarray | None = None, names: list[str] | None = None) -> Table:
    names = [f"x{j}" for j in range(x.shape[1])] if names is None else names
    columns = {name: pa.array(x[:, j], from_pandas=True) for j, name in enumerate(names)}
    if y is not None:
        columns["y"] = pa.array(np.asarray(y, dtype=np.float64), from_pandas=True)
    return Table(pa.table(columns), label=None if y is None else "y")


def dealt(n: int, x: np.ndarray, y: np.ndarray, names: list[str] | None = None) -> list[dict[str, Table]]:
    return [{"table": table(x[i::n], y[i::n], names)} for i in range(n)]


def toy(rows: int = 90, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    x = chance.normal(size=(rows, 3)) * [1, 1e3, 1e-6] + [0, 1e5, 1]
    y = (x[:, 0] + (x[:, 1] - 1e5) / 1e3 + chance.normal(size=rows) > 0).astype(float)
    return x, y


def pooled_model(x: np.ndarray, y: np.ndarray, reg_lambda: float) -> tuple[LogisticRegression, np.ndarray]:
    """scikit-learn's model of the pooled rows, and the standardized rows."""
    filled = np.where(np.isnan(x), np.nanmean(x, axis=0), x)
    present = ~np.isnan(x)
    scale = np.sqrt(((filled - filled.mean(axis=0)) ** 2).sum(axis=0) / present.sum(axis=0))
    z = (filled - filled.mean(axis=0)) / np.where(scale > 0, scale, 1)
    fitted = LogisticRegression(C=1 / (reg_lambda * len(y)), tol=1e-12, max_iter=100_000).fit(z, y)
    return fitted, z


def trained(run: Run) -> Model:
    assert len({digests["model"] for digests in run.digests.values()}) == 1
    model = run.outputs["alice"]["model"]
    assert isinstance(model, Model)
    return model


def assert_as_pooled(model: Model, x: np.ndarray, y: np.ndarray, reg_lambda: float) -> None:
    fitted, _ = pooled_model(x, y, reg_lambda)
    assert model.arrays["coef"] == pytest.approx(fitted.coef_[0], abs=1e-4)
    assert model.arrays["intercept"] == pytest.approx(fitted.intercept_, abs=1e-4)


def test_fit_is_pooled_training_and_stands_every_kill_and_an_older_processor():
    x, y = toy()

    def pooled(outputs: Any) -> None:
        assert_as_pooled(outputs["bob"]["model"], x, y, 0.01)

    check_stage(fit, Fit(), lambda n: dealt(n, x, y), pooled)


@pytest.fixture(scope="module")
def breast() -> Model:
    run = run_stage(fit, Fit(), dealt(4, BREAST.data, BREAST.target, NAMES))
    assert all(message.metrics.keys() == {"objective", "gradient"} for message in run.progress["dave"])
    return trained(run)


def test_breast_cancer_in_four_parts_gives_the_pooled_model(breast: Model):
    order = np.argsort(NAMES)
    assert breast.facts["columns"] == sorted(NAMES)
    assert (breast.facts["n_samples"], breast.facts["positives"], breast.facts["label"]) == (569, 357, "y")
    assert breast.facts["converged"]
    assert breast.facts["iterations"] <= 12
    assert_as_pooled(breast, BREAST.data[:, order], BREAST.target, 0.01)
    scaler = StandardScaler().fit(BREAST.data[:, order])
    assert breast.arrays["mean"] == pytest.approx(scaler.mean_, rel=1e-12)
    assert breast.arrays["scale"] == pytest.approx(scaler.scale_, rel=1e-12)


def test_evaluate_says_what_scikit_learn_says_of_the_pooled_rows(breast: Model):
    x, y = BREAST.data[:, np.argsort(NAMES)], BREAST.target
    fitted, z = pooled_model(x, y, 0.01)
    p = fitted.predict_proba(z)[:, 1]

    def pooled(outputs: Any) -> None:
        told = outputs["carol"]["report"].values
        assert told["auc"] == pytest.approx(roc_auc_score(y, p), abs=told["auc_error"] + 1e-6)
        assert told["auc_error"] < 1e-4
        assert told["accuracy"] == accuracy_score(y, p > 0.5)
        assert told["log_loss"] == pytest.approx(log_loss(y, p), rel=1e-5)
        assert (told["n_samples"], told["positives"], sum(told["counts"].values())) == (569, 357, 569)

    def split(n: int) -> list[dict[str, Any]]:
        return [{"model": breast, **part} for part in dealt(n, BREAST.data, BREAST.target, NAMES)]

    check_stage(evaluate, Evaluate(min_cell=1), split, pooled)


def test_scores_in_one_cell_count_as_ties_within_the_error_that_is_told():
    chance = np.random.default_rng(5)
    x = chance.normal(size=(3000, 1)) * 1e-3  # nearly all scores in a few cells
    y = (chance.random(3000) < 0.5).astype(float)
    model = Model(
        logistic.ALGORITHM,
        {"columns": ["x0"]},
        {"coef": np.ones(1), "intercept": np.zeros(1), "mean": np.zeros(1), "scale": np.ones(1)},
    )
    run = run_stage(evaluate, Evaluate(min_cell=1), [{"model": model, **part} for part in dealt(3, x, y)])
    told = run.outputs["alice"]["report"].values
    assert abs(told["auc"] - roc_auc_score(y, x[:, 0])) <= told["auc_error"]
    cell = np.ceil((1 + x[:, 0] / (1 + np.abs(x[:, 0]))) / 2 * logistic.CELLS)
    assert told["auc"] == pytest.approx(roc_auc_score(y, cell), abs=1e-12)
    assert told["auc_error"] > 0.01


def test_with_scores_in_groups_of_ten_evaluate_says_nearly_the_same(breast: Model):
    x, y = BREAST.data[:, np.argsort(NAMES)], BREAST.target
    fitted, z = pooled_model(x, y, 0.01)
    p = fitted.predict_proba(z)[:, 1]
    parts = [{"model": breast, **part} for part in dealt(4, BREAST.data, y, NAMES)]
    told = run_stage(evaluate, Evaluate(), parts).outputs["carol"]["report"].values
    assert told["auc"] == pytest.approx(roc_auc_score(y, p), abs=0.005)
    assert told["accuracy"] == pytest.approx(accuracy_score(y, p > 0.5), abs=0.03)
    assert told["log_loss"] == pytest.approx(log_loss(y, p), rel=1e-5)
    assert (told["n_samples"], told["positives"]) == (569, 357)


def test_whoever_takes_the_other_parts_out_of_a_total_finds_no_cell_of_fewer_than_ten_rows(breast: Model):
    parts = dealt(3, BREAST.data, BREAST.target, NAMES)
    order = np.argsort(-BREAST.target[2::3], kind="stable")[: BREAST.target[2::3].sum() + 9]
    parts[2] = {"table": table(BREAST.data[2::3][order], BREAST.target[2::3][order], NAMES)}  # 9 of label 0
    done = run_stage(evaluate, Evaluate(), [{"model": breast, **part} for part in parts])
    for said in done.said:
        told = said.value["cells"]
        assert not ((told > 0) & (told < 10)).any(), said.sender
        assert np.count_nonzero(told) <= said.value["cells"].sum() / 10
        if said.sender == "carol":
            assert not told[0].any()
            clear = logistic._margins(breast, Table(parts[2]["table"].data.slice(0, len(order) - 9), label="y"))
            assert said.value["losses"].tolist() == exact.sum_limbs(np.logaddexp(0.0, -clear)).tolist()
    told = done.outputs["alice"]["report"].values
    assert told["n_samples"] == sum(part["table"].n_samples for part in parts) - 9


def test_evaluate_without_one_of_the_labels_has_no_auc(breast: Model):
    rows = BREAST.target == 1
    parts = dealt(3, BREAST.data[rows], BREAST.target[rows], NAMES)
    told = (
        run_stage(evaluate, Evaluate(), [{"model": breast, **part} for part in parts]).outputs["bob"]["report"].values
    )
    assert (told["auc"], told["auc_error"], told["positives"]) == (None, None, 357)


def test_predict_gives_id_and_score_by_the_names_of_columns(breast: Model):
    x, y = BREAST.data, BREAST.target
    fitted, z = pooled_model(x[:, np.argsort(NAMES)], y, 0.01)
    backwards = {name: x[:, j] for j, name in reversed(list(enumerate(NAMES)))}
    rows = pa.table({"patient": [f"p{i}" for i in range(569)], "unknown": np.ones(569), **backwards})
    scores = run_stage(predict, Params(), [{"model": breast, "table": Table(rows, id="patient")}]).outputs["alice"]
    told = scores["scores"]
    assert isinstance(told, Table)
    assert (told.id, told.label, told.data.column_names) == ("patient", None, ["patient", "score"])
    assert told.ids()[:2] == ["p0", "p1"]
    assert told.column("score") == pytest.approx(fitted.predict_proba(z)[:, 1], abs=1e-5)


def test_predict_takes_missing_values_and_values_far_out(breast: Model):
    x = np.vstack([np.full(30, np.nan), np.full(30, 1.7e308), np.full(30, -1.7e308)])
    run = run_stage(predict, Params(), [{"model": breast, "table": table(x, names=NAMES)}])
    score = run.outputs["alice"]["scores"].column("score")
    assert score[0] == pytest.approx(1 / (1 + np.exp(-breast.arrays["intercept"][0])))
    assert np.isfinite(score).all()
    assert run.outputs["alice"]["scores"].ids() == ["0", "1", "2"]


def test_predict_names_the_columns_that_are_missing_and_refuses_another_model(breast: Model):
    with pytest.raises(DataError, match=r"'area error', 'worst texture'"):
        run_stage(predict, Params(), [{"model": breast, "table": table(np.ones((2, 28)), names=sorted(NAMES)[1:29])}])
    other = Model("horizontal.other", breast.facts, breast.arrays)
    with pytest.raises(DataError, match=r"horizontal\.other"):
        run_stage(predict, Params(), [{"model": other, "table": table(BREAST.data, names=NAMES)}])


@pytest.mark.parametrize("reg_lambda", [1e-4, 1.0])
def test_the_penalty_is_that_of_scikit_learn(reg_lambda: float):
    x, y = toy()
    assert_as_pooled(trained(run_stage(fit, Fit(reg_lambda=reg_lambda), dealt(3, x, y))), x, y, reg_lambda)


def test_a_missing_value_is_the_mean_of_all():
    x, y = toy()
    x[np.random.default_rng(2).random(x.shape) < 0.3] = np.nan
    x[::3, 1] = np.nan  # one peer has no value of a column at all
    model = trained(run_stage(fit, Fit(), dealt(3, x, y)))
    assert model.arrays["mean"] == pytest.approx(np.nanmean(x, axis=0), rel=1e-12)
    assert_as_pooled(model, x, y, 0.01)


@pytest.mark.parametrize("reg_lambda", [0.0, 0.01])
def test_constant_and_repeated_columns_do_no_harm(reg_lambda: float):
    x, y = toy()
    wide = np.column_stack([x, np.full(len(x), 0.1), x[:, 0], np.full(len(x), np.nan)])
    model = trained(run_stage(fit, Fit(reg_lambda=reg_lambda), dealt(3, wide, y)))
    assert model.facts["converged"]
    assert model.arrays["coef"][3] == model.arrays["coef"][5] == 0.0
    alone = trained(run_stage(fit, Fit(reg_lambda=reg_lambda), dealt(3, x, y)))
    if reg_lambda == 0:
        assert model.arrays["coef"][0] + model.arrays["coef"][4] == pytest.approx(alone.arrays["coef"][0], abs=1e-6)
    assert model.facts["objective"] <= alone.facts["objective"] + 1e-12


@pytest.mark.parametrize("reg_lambda", [1e-1, 1e-6])
def test_separable_classes_are_held_by_the_penalty(reg_lambda: float):
    x = np.linspace(-1, 1, 60)[:, None]
    y = (x[:, 0] > 0).astype(float)
    model = trained(run_stage(fit, Fit(reg_lambda=reg_lambda), dealt(3, x, y)))
    assert model.facts["converged"]
    z = (x - x.mean()) / x.std()
    p = 1 / (1 + np.exp(-(z[:, 0] * model.arrays["coef"][0] + model.arrays["intercept"][0])))
    slope = np.mean((p - y) * z[:, 0]) + reg_lambda * model.arrays["coef"][0]  # zero at the optimum
    assert slope == pytest.approx(0, abs=2e-8)


def test_separable_classes_without_a_penalty_end_at_max_iter_with_finite_weights():
    x = np.linspace(-1, 1, 60)[:, None]
    model = trained(run_stage(fit, Fit(reg_lambda=0.0, max_iter=60, tol=1e-300), dealt(3, x, (x[:, 0] > 0) * 1.0)))
    assert (model.facts["iterations"], model.facts["converged"]) == (60, False)
    assert np.isfinite(model.arrays["coef"]).all()


def test_a_step_too_far_is_halved():
    chance = np.random.default_rng(192)  # heavy tails on which Newton's eighth full step makes it worse
    x = chance.standard_cauchy((60, 2))
    y = (x[:, 0] + chance.normal(size=60) * 0.3 > 0).astype(float)
    run = run_stage(fit, Fit(reg_lambda=1e-6, max_iter=100), dealt(3, x, y))
    objectives = [message.metrics["objective"] for message in run.progress["alice"]]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(objectives))
    assert trained(run).facts["converged"]
    assert any(later == earlier for earlier, later in itertools.pairwise(objectives))  # a turn that was a halved step


def test_a_restart_after_the_last_turn_counts_the_same_turns():
    def pooled(outputs: Any) -> None:
        facts = outputs["alice"]["model"].facts
        assert (facts["iterations"], facts["converged"]) == (2, False)

    check_stage(fit, Fit(max_iter=2), lambda n: dealt(n, *toy()), pooled, sizes=[3])


@pytest.mark.parametrize("scale", [1e-300, 1e-9, 1e9, 1e300])
def test_the_scale_of_a_column_does_not_matter(scale: float):
    x, y = toy()
    model = trained(run_stage(fit, Fit(), dealt(3, x * [scale, 1, 1], y)))
    assert_as_pooled(model, x, y, 0.01)


def test_labels_other_than_0_and_1_are_refused_by_column_and_row():
    x, y = toy()
    y[7] = 2.0
    with pytest.raises(DataError, match=r"'y'.*row 2"):
        run_stage(fit, Fit(), dealt(3, x, y))
    y[7] = np.nan
    with pytest.raises(DataError, match="'y' has missing values"):
        run_stage(fit, Fit(), dealt(3, x, y))


def test_one_class_at_one_peer_is_fine_and_one_class_at_all_is_refused():
    x, y = toy()
    order = np.argsort(y, kind="stable")
    parts = [{"table": table(x[rows], y[rows])} for rows in np.array_split(order, 3)]
    assert {len(set(part["table"].labels())) for part in parts} == {1, 2}
    assert_as_pooled(trained(run_stage(fit, Fit(), parts)), x, y, 0.01)
    with pytest.raises(DataError, match="same label"):
        run_stage(fit, Fit(), dealt(3, x, np.ones(len(y))))


def test_text_and_no_features_at_all_are_refused_by_name():
    words = Table(pa.table({"word": ["a", "b"], "y": [0.0, 1.0]}), label="y")
    with pytest.raises(DataError, match="'word' is not numeric"):
        run_stage(fit, Fit(), [{"table": words}] * 3)
    with pytest.raises(DataError, match="no feature"):
        run_stage(fit, Fit(), [{"table": Table(pa.table({"y": [0.0, 1.0]}), label="y")}] * 3)


@pytest.mark.parametrize("d", [1, 2, 3, 30])
def test_what_a_turn_opens_for_each_value_of_a_row_is_counted_as_its_parameters(d: int):
    x, y = np.random.default_rng(1).normal(size=(90, d)), np.arange(90) % 2
    run = run_stage(fit, Fit(max_iter=1), dealt(3, x, y))
    (total,) = [total for total in run.totals.values() if "hessian" in total]
    opened = total["gradient"].size + total["hessian"].size
    assert fit.parameters is not None
    counted = fit.parameters(Fit(), d)
    assert opened / (d + 1) <= counted, "a row has d + 1 values"
    assert d + 1 <= counted <= opened


@pytest.mark.parametrize("bad", [{"reg_lambda": -1}, {"max_iter": 0}, {"max_iter": 101}, {"tol": 0}, {"lambda": 1}])
def test_parameters_out_of_bounds_are_refused(bad: dict[str, float]):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(bad, Fit)


def test_members_say_nothing_but_sums():
    for declared in (fit, evaluate):
        assert all(isinstance(message, Sum) for message in declared.messages.values())
    assert predict.messages == {}


def test_a_model_survives_the_way_to_another_stage(breast: Model):
    again = artifact.load(*artifact.dump(breast))
    assert isinstance(again, Model)
    assert again.facts == breast.facts
    assert again.arrays["coef"].tolist() == breast.arrays["coef"].tolist()


def test_solve_is_numpys_for_definite_matrices_and_drops_what_is_determined():
    chance = np.random.default_rng(4)
    half = chance.normal(size=(50, 12))
    a, b = half.T @ half, chance.normal(size=12)
    assert solve(a, b) == pytest.approx(np.linalg.solve(a, b), rel=1e-9)
    twice = np.column_stack([half, half[:, 0], np.zeros(50)])
    x = solve(twice.T @ twice, twice.T @ half[:, 0])
    assert x == pytest.approx(np.eye(14)[0], abs=1e-9)
