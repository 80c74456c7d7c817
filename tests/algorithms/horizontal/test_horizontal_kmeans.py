"""horizontal.kmeans against planted clusters and scikit-learn on the pooled rows."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from sklearn.cluster import KMeans
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

from fedpeer import artifact
from fedpeer.algorithms.horizontal.kmeans import Fit, fit, predict
from fedpeer.errors import DataError
from fedpeer.stage import Model, Params, Sum, Table
from fedpeer.testing.stages import Run, check_stage, run_stage


def table(x: np.ndarray) -> Table:
    columns = {f"x{j}": pa.array(x[:, j], from_pandas=True) for j in range(x.shape[1])}
    return Table(pa.table({"id": pa.array([f"r{i}" for i in range(len(x))], pa.string()), **columns}), id="id")


def dealt(n: int, x: np.ndarray) -> list[dict[str, Table]]:
    """The rows in order, n unequal parts."""
    cuts = [len(x) * i * (i + 1) // (n * (n + 1)) for i in range(1, n)]
    return [{"table": table(part)} for part in np.split(x, cuts)]


def planted(rows: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows about five points that are well apart, and which one each is of."""
    chance = np.random.default_rng(seed)
    points = np.array([[0, 0, 0], [8, 0, 1], [0, 8, 0], [8, 8, -1], [4, 4, 9]])
    which = chance.integers(0, len(points), rows)
    return (points[which] + chance.normal(size=(rows, 3))) * [1, 1e3, 1e-6], which


def trained(run: Run) -> Model:
    assert len({digests["model"] for digests in run.digests.values()}) == 1
    model = run.outputs["alice"]["model"]
    assert isinstance(model, Model)
    return model


def pooled_inertia(x: np.ndarray, k: int) -> float:
    """The best of ten runs of scikit-learn."""
    return float(KMeans(k, n_init=10, random_state=0).fit(StandardScaler().fit_transform(x)).inertia_)


def test_fit_finds_planted_clusters_and_stands_every_kill_and_an_older_processor():
    x, which = planted()
    means = np.array([x[which == c].mean(axis=0) for c in range(5)])

    def pooled(outputs: Any) -> None:
        model = outputs["bob"]["model"]
        assert model.facts["converged"]
        assert model.facts["sizes"] == sorted(np.bincount(which).tolist(), reverse=True)
        assert model.facts["inertia"] == pytest.approx(pooled_inertia(x, 5), rel=1e-9)
        found = model.arrays["mean"] + model.arrays["scale"] * model.arrays["centres"]
        assert sorted(found[:, 0]) == pytest.approx(sorted(means[:, 0]), rel=1e-9, abs=1e-9)

    check_stage(fit, Fit(k=5), lambda n: dealt(n, x), pooled)


def test_a_restart_after_the_last_turn_counts_the_same_turns():
    def pooled(outputs: Any) -> None:
        facts = outputs["alice"]["model"].facts
        assert (facts["iterations"], facts["converged"]) == (6, False)  # five splits and one move

    x = np.random.default_rng(5).normal(size=(300, 3))
    check_stage(fit, Fit(k=6, max_iter=1, tol=0.0), lambda n: dealt(n, x), pooled, sizes=[3])


@pytest.mark.parametrize("k", [3, 8, 15])
def test_the_inertia_is_within_a_tenth_of_scikit_learns_best_of_ten(k: int):
    x = load_breast_cancer().data
    model = trained(run_stage(fit, Fit(k=k, min_rows=3), dealt(4, x)))
    assert model.facts["clusters"] == k
    assert model.facts["inertia"] < 1.1 * pooled_inertia(x, k)


def test_predict_gives_id_and_cluster_by_the_names_of_columns():
    x, which = planted()
    model = trained(run_stage(fit, Fit(k=5), dealt(3, x)))
    rows = table(x).data.select(["x2", "id", "x0", "x1"]).append_column("unknown", pa.array(np.ones(len(x))))
    told = run_stage(predict, Params(), [{"model": model, "table": Table(rows, id="id")}]).outputs["alice"]["clusters"]
    assert isinstance(told, Table)
    assert (told.id, told.label, told.data.column_names) == ("id", None, ["id", "cluster"])
    assert told.ids()[:2] == ["r0", "r1"]
    cluster = told.column("cluster").astype(int)
    assert len(set(zip(which.tolist(), cluster.tolist(), strict=True))) == 5
    assert np.bincount(cluster).tolist() == model.facts["sizes"]


def test_predict_takes_missing_values_and_values_far_out():
    model = trained(run_stage(fit, Fit(k=5), dealt(3, planted()[0])))
    x = np.array([[np.nan] * 3, [1.7e308] * 3, [-1.7e308] * 3])
    rows = Table(table(x).data.drop_columns("id"))
    told = run_stage(predict, Params(), [{"model": model, "table": rows}]).outputs["alice"]["clusters"]
    assert told.ids() == ["0", "1", "2"]
    centres = model.arrays["centres"]
    nearest_to_the_mean = (centres**2).sum(axis=1).argmin()
    assert told.column("cluster").tolist() == [nearest_to_the_mean, centres.sum(1).argmax(), centres.sum(1).argmin()]


def test_predict_names_the_columns_that_are_missing_and_refuses_another_model():
    x, _ = planted()
    model = trained(run_stage(fit, Fit(k=5), dealt(3, x)))
    with pytest.raises(DataError, match=r"'x1', 'x2'"):
        run_stage(predict, Params(), [{"model": model, "table": table(x[:, :1])}])
    other = Model("horizontal.other", model.facts, model.arrays)
    with pytest.raises(DataError, match=r"horizontal\.other"):
        run_stage(predict, Params(), [{"model": other, "table": table(x)}])


def test_a_missing_value_is_the_mean_of_all():
    x, _ = planted()
    x[np.random.default_rng(2).random(x.shape) < 0.2] = np.nan
    x[-100:, 1] = np.nan  # the last peer has few values of a column
    filled = np.where(np.isnan(x), np.nanmean(x, axis=0), x)
    model = trained(run_stage(fit, Fit(k=5), dealt(3, x)))
    assert model.arrays["mean"] == pytest.approx(np.nanmean(x, axis=0), rel=1e-12)
    z = (filled - np.nanmean(x, axis=0)) / np.nanstd(x, axis=0)
    distances = ((z[:, None] - model.arrays["centres"]) ** 2).sum(axis=2)
    assert model.facts["inertia"] == pytest.approx(distances.min(axis=1).sum(), rel=1e-3)


def test_a_participant_tells_nothing_of_its_rows_in_a_cluster_of_which_it_has_few():
    done = run_stage(fit, Fit(k=5), dealt(3, planted(300)[0]))
    assert min(trained(done).facts["sizes"]) >= 10
    counts = {(said.sender, said.turn): said for said in done.said if said.tag == "counts"}
    assert any(said.value["values"].sum() < 50 for said in counts.values()), "there is something to hide"
    for said in done.said:
        if said.tag == "sums":
            own = counts[said.sender, said.turn]
            told = own.value["values"]
            assert not ((told > 0) & (told < 10)).any()
            hidden = told[done.totals[own.turn, own.k]["values"] >= 10] == 0
            assert not said.value["sum"][hidden].any()
            assert not said.value["squares"][hidden].any()


def test_four_rows_far_out_do_not_keep_the_others_from_being_split():
    x, which = planted()
    model = trained(run_stage(fit, Fit(k=5, min_rows=5), dealt(3, np.vstack([x, np.full((4, 3), [50, 5e4, 5e-5])]))))
    assert model.facts["clusters"] == 5
    assert np.abs(np.array(model.facts["sizes"]) - np.sort(np.bincount(which))[::-1]).sum() <= 4


def test_rows_of_two_values_make_two_clusters_whatever_k():
    x = np.repeat([[0.0, 1.0], [5.0, 1.0]], [75, 55], axis=0)
    facts = trained(run_stage(fit, Fit(k=5), dealt(3, x))).facts
    assert (facts["clusters"], facts["sizes"], facts["converged"]) == (2, [75, 55], True)
    assert facts["inertia"] == pytest.approx(0, abs=1e-9)


def test_equal_rows_make_one_cluster():
    facts = trained(run_stage(fit, Fit(k=2), dealt(3, np.ones((60, 2))))).facts
    assert (facts["sizes"], facts["inertia"], facts["converged"]) == ([60], 0.0, True)


def test_a_peer_without_rows_is_fine():
    x, _ = planted()
    model = trained(run_stage(fit, Fit(k=5), [*dealt(2, x), {"table": table(x[:0])}]))
    assert model.arrays["centres"].tolist() == pytest.approx(
        trained(run_stage(fit, Fit(k=5), dealt(3, x))).arrays["centres"], rel=1e-9
    )


def test_a_coarser_tol_ends_earlier_and_tol_0_where_nothing_moves():
    x = np.random.default_rng(5).normal(size=(600, 3))
    coarse, fine = (trained(run_stage(fit, Fit(k=6, tol=tol, max_iter=1000), dealt(3, x))) for tol in (0.1, 0.0))
    assert coarse.facts["converged"]
    assert fine.facts["converged"]
    assert coarse.facts["iterations"] < fine.facts["iterations"]
    z = (x - fine.arrays["mean"]) / fine.arrays["scale"]
    nearest = ((z[:, None] - fine.arrays["centres"]) ** 2).sum(axis=2).argmin(axis=1)
    means = np.array([z[nearest == c].mean(axis=0) for c in range(6)])
    assert fine.arrays["centres"] == pytest.approx(means, abs=1e-9)


@pytest.mark.parametrize("scale", [1e-300, 1e-9, 1e9, 1e300])
def test_the_scale_of_a_column_does_not_matter(scale: float):
    x, which = planted()
    facts = trained(run_stage(fit, Fit(k=5), dealt(3, x * [scale, 1, 1]))).facts
    assert facts["sizes"] == sorted(np.bincount(which).tolist(), reverse=True)


def test_too_few_rows_text_and_no_features_are_refused():
    x, _ = planted(400)
    with pytest.raises(DataError, match="400 rows of all participants are too few for 41"):
        run_stage(fit, Fit(k=41), dealt(3, x))
    with pytest.raises(DataError, match="'word' is not numeric"):
        run_stage(fit, Fit(), [{"table": Table(pa.table({"word": ["a"]}))}] * 3)
    with pytest.raises(DataError, match="no feature"):
        run_stage(fit, Fit(), [{"table": Table(pa.table({"id": ["a"]}), id="id")}] * 3)


@pytest.mark.parametrize("bad", [{"k": 1}, {"k": 257}, {"min_rows": 2}, {"max_iter": 0}, {"tol": -1.0}, {"seed": 1}])
def test_parameters_out_of_bounds_are_refused(bad: dict[str, float]):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(bad, Fit)


def test_members_say_nothing_but_sums():
    assert all(isinstance(message, Sum) for message in fit.messages.values())
    assert predict.messages == {}


def test_a_model_survives_the_way_to_another_stage():
    model = trained(run_stage(fit, Fit(k=5), dealt(3, planted()[0])))
    again = artifact.load(*artifact.dump(model))
    assert isinstance(again, Model)
    assert again.facts == model.facts
    assert again.arrays["centres"].tolist() == model.arrays["centres"].tolist()
