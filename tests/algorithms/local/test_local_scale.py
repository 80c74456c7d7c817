"""Scaled features against scikit-learn's."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from fedpeer.algorithms.local import scale
from fedpeer.algorithms.local.scale import Scale
from fedpeer.errors import DataError
from fedpeer.stage import Model, Params, Table
from fedpeer.testing.stages import check_stage, run_stage


def rows(n: int = 200, seed: int = 1) -> np.ndarray[Any, Any]:
    """Five columns of very different size, with gaps."""
    chance = np.random.default_rng(seed)
    x = chance.normal(size=(n, 5)) * [1, 1e3, 1e-9, 1e150, 2] + [0, 1e6, 5e-9, 0, -7]
    x[chance.random(x.shape) < 0.1] = np.nan
    return x


def table(x: np.ndarray[Any, Any]) -> Table:
    ids = pa.array([f"P-{i}" for i in range(len(x))], pa.string())
    columns = {f"x{j}": pa.array(x[:, j], from_pandas=True) for j in range(x.shape[1])}
    label = pa.array(np.arange(float(len(x))) % 3)
    return Table(pa.table({"x9": columns.pop("x0"), "id": ids, "y": label, **columns}), "id", "y")


def scaled(params: Scale, given: Table) -> tuple[Table, Model, dict[str, float]]:
    run = run_stage(scale.run, params, [{"table": given}])
    out, model = run.outputs["alice"]["table"], run.outputs["alice"]["model"]
    assert isinstance(out, Table)
    assert isinstance(model, Model)
    return out, model, dict(run.progress["alice"][-1].metrics)


def applied(model: Model, given: Table) -> Table:
    out = run_stage(scale.apply, Params(), [{"model": model, "table": given}]).outputs["alice"]["table"]
    assert isinstance(out, Table)
    return out


def close(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    return np.allclose(one, other, rtol=1e-12, atol=1e-12, equal_nan=True)


def plain(column: pa.ChunkedArray) -> list[Any]:
    return list(column.to_pylist())


@pytest.mark.parametrize(("method", "judge"), [("standard", StandardScaler), ("minmax", MinMaxScaler)])
def test_features_are_scaled_as_by_scikit_learn_and_all_else_stays(method: Any, judge: type) -> None:
    x = [rows(seed=k) for k in range(5)]

    def right(outputs: dict) -> None:  # type: ignore[type-arg]
        for k, output in enumerate(outputs.values()):
            given, out = table(x[k]), output["table"]
            assert close(out.matrix(), judge().fit_transform(x[k]))
            assert out.data.schema.equals(given.data.schema)
            assert [c.null_count for c in out.data.columns] == [c.null_count for c in given.data.columns]
            assert (out.id, out.label) == ("id", "y")
            for name in ("id", "y"):
                assert plain(out.data.column(name)) == plain(given.data.column(name))

    check_stage(scale.run, Scale(method=method), lambda n: [{"table": table(x[k])} for k in range(n)], right, equal=())


@pytest.mark.parametrize(("method", "judge"), [("standard", StandardScaler), ("minmax", MinMaxScaler)])
def test_another_table_is_put_on_the_same_scale_whatever_the_order_of_its_columns(method: Any, judge: type) -> None:
    x, other = rows(), rows(seed=2)
    _, model, _ = scaled(Scale(method=method), table(x))
    turned = table(other)
    turned = Table(turned.data.select(turned.data.column_names[::-1]), "id", "y")

    def right(outputs: dict) -> None:  # type: ignore[type-arg]
        for output in outputs.values():
            out = output["table"]
            assert out.data.column_names == turned.data.column_names
            assert close(out.matrix()[:, ::-1], judge().fit(x).transform(other))

    check_stage(scale.apply, Params(), lambda n: [{"model": model, "table": turned}] * n, right)


def test_a_constant_column_becomes_0_and_is_named_and_one_without_a_value_stays_missing() -> None:
    for method in ("standard", "minmax"):
        x = np.array([[0.1, np.nan, 1.0], [0.1, np.nan, 2.0], [np.nan, np.nan, 3.0]])
        given = Table(pa.table({name: pa.array(x[:, j], from_pandas=True) for j, name in enumerate("abc")}))
        out, model, told = scaled(Scale(method=method), given)  # type: ignore[arg-type]
        assert close(out.matrix()[:, :2], np.array([[0.0, np.nan], [0.0, np.nan], [np.nan, np.nan]]))
        assert model.facts["constant"] == ["a", "b"]
        assert told == {"clipped": 0, "constant": 2}
        later = Table(pa.table({"a": [9.0], "b": [9.0], "c": [2.0]}))
        assert applied(model, later).matrix()[0, :2].tolist() == [0.0, 0.0]


def test_values_beyond_the_clip_are_put_there_and_counted_for_the_operator() -> None:
    x = rows(500)
    z = StandardScaler().fit_transform(x)
    out, model, told = scaled(Scale(clip=1.5), table(x))
    assert close(out.matrix(), np.clip(z, -1.5, 1.5))
    assert told["clipped"] == np.count_nonzero(np.abs(z) > 1.5)
    assert told["clipped"] > 100
    other = rows(seed=2)
    assert close(applied(model, table(other)).matrix(), np.clip(StandardScaler().fit(x).transform(other), -1.5, 1.5))


def test_true_and_false_are_scaled_as_1_and_0() -> None:
    out, _, _ = scaled(Scale(), Table(pa.table({"b": [True, False, None, True]})))
    assert close(out.column("b"), StandardScaler().fit_transform([[1.0], [0.0], [np.nan], [1.0]])[:, 0])


def test_values_near_the_ends_of_float64_are_scaled_or_refused_by_name() -> None:
    small = np.array([1e308, 1.1e308, 1.2e308])
    out, _, _ = scaled(Scale(), Table(pa.table({"x": small})))
    assert close(out.column("x"), StandardScaler().fit_transform(small[:, None] / 1e300)[:, 0])
    far = Table(pa.table({"x": [-1.7e308, 1.7e308]}))
    with pytest.raises(DataError, match="the column 'x' spans more than a float64 holds"):
        scaled(Scale(method="minmax"), far)
    _, model, _ = scaled(Scale(), Table(pa.table({"x": [0.0, 1e-3]})))
    with pytest.raises(DataError, match=r"the column 'x' is beyond a float64 on this scale, in row 1 \(from 0\)"):
        applied(model, Table(pa.table({"x": [0.0, 1.7e308]})))


def test_a_column_of_text_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="the column 't' is not numeric"):
        scaled(Scale(), Table(pa.table({"x": [1.0, 2.0], "t": ["a", "b"]})))


def test_a_table_without_features_is_refused() -> None:
    with pytest.raises(DataError, match="no feature column"):
        scaled(Scale(), Table(pa.table({"id": ["a"]}), "id"))


def test_other_features_than_the_scale_was_fitted_to_are_refused_by_name() -> None:
    _, model, _ = scaled(Scale(), Table(pa.table({"a": [1.0, 2.0], "b": [1.0, 2.0]})))
    with pytest.raises(DataError, match="lacks features that the scale was fitted to: 'b'"):
        applied(model, Table(pa.table({"a": [1.0], "b": [1.0]}), label="b"))
    with pytest.raises(DataError, match="fitted without the features 'c'"):
        applied(model, Table(pa.table({"a": [1.0], "b": [1.0], "c": [1.0]})))
    with pytest.raises(DataError, match=r"the model is of 'horizontal.logistic'"):
        applied(Model("horizontal.logistic", {}), Table(pa.table({"a": [1.0]})))


def test_no_rows_give_no_rows() -> None:
    out, model, _ = scaled(Scale(), Table(pa.table({"a": pa.array([], pa.float64())})))
    assert out.n_samples == 0
    assert model.facts["constant"] == ["a"]


@pytest.mark.parametrize("wrong", [{"clip": 0.0}, {"clip": -1.0}, {"method": "robust"}])
def test_parameters_have_bounds(wrong: dict) -> None:  # type: ignore[type-arg]
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, Scale)
