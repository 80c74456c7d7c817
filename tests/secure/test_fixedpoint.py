"""The value codecs: known answers, exactness, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeer.errors import StageError, SumError
from fedpeer.secure import fixedpoint

integers = st.integers(-(2**54), 2**54 - 1)
reals = st.floats(-(2.0**22), 2.0**22, exclude_min=True, exclude_max=True, width=64)


def total_of(vectors):
    return np.sum(vectors, axis=0, dtype=np.uint64).astype(np.uint32) & np.uint32(2**24 - 1)


def test_the_public_vectors_of_the_codecs(shared: Path):
    values = json.loads((shared / "vectors" / "secagg_kat.json").read_text())["values"]
    for case in values["int_B55_b16"]:
        _, vector = fixedpoint.encode({"v": np.array([int(case["v"])])})
        assert vector[:4].tolist() == case["limbs"], case
    for case in values["fixed_F32_B55_b16"]:
        _, vector = fixedpoint.encode({"v": np.array([case["x"]])})
        assert vector[:4].tolist() == case["limbs"], case


def test_known_answers():
    layout, vector = fixedpoint.encode({"b": np.array([[1.5, -1.0]], dtype=np.float32), "a": np.array([True, False])})
    assert layout == [["a", "int64", [2], ["int", 55]], ["b", "float64", [1, 2], ["fixed", 32, 55]]]
    assert (vector.dtype, vector.shape) == (np.uint32, (256,))
    assert vector[:16].tolist() == [1, 0, 0, 0, 0, 0, 64, 64, 0, 0, 32768, 0, 1, 65535, 64, 63]
    assert not vector[16:].any()


@pytest.mark.parametrize(("count", "padded"), [(0, 256), (63, 256), (64, 512), (127, 512), (128, 768)])
def test_a_vector_always_has_four_elements_of_padding(count: int, padded: int):
    _, vector = fixedpoint.encode({"v": np.ones(count)})
    assert vector.shape == (padded,)


@given(st.lists(st.tuples(integers, integers), min_size=1, max_size=7))
def test_sums_of_integers_are_exact(rows: list[tuple[int, int]]):
    encoded = [fixedpoint.encode({"v": np.array(row, dtype=np.int64)}) for row in rows]
    decoded = fixedpoint.decode(encoded[0][0], total_of([vector for _, vector in encoded]), len(rows))
    assert decoded["v"].dtype == np.int64
    assert decoded["v"].tolist() == [sum(column) for column in zip(*rows, strict=True)]


@given(st.lists(reals, min_size=1, max_size=7))
def test_sums_of_floats_are_exact_over_values_rounded_once(values: list[float]):
    encoded = [fixedpoint.encode({"v": np.array([x])}) for x in values]
    decoded = fixedpoint.decode(encoded[0][0], total_of([vector for _, vector in encoded]), len(values))
    assert decoded["v"].dtype == np.float64
    assert float(decoded["v"][0]) == sum(round(x * 2**32) for x in values) / 2**32


def test_256_parties_at_either_end_of_the_range_do_not_wrap():
    for v in (-(2**54), 2**54 - 1):
        layout, vector = fixedpoint.encode({"v": np.array([v])})
        assert fixedpoint.decode(layout, total_of([vector] * 256), 256)["v"].tolist() == [256 * v]


def test_shapes_and_the_order_of_names_survive():
    values = {"z": np.arange(6).reshape(2, 3), "a": np.float64(0.25), "empty": np.zeros((0, 4))}
    layout, vector = fixedpoint.encode(values)
    fixedpoint.check(layout, vector)
    decoded = fixedpoint.decode(layout, vector, 1)
    assert {name: array.shape for name, array in decoded.items()} == {"a": (), "empty": (0, 4), "z": (2, 3)}
    assert decoded["z"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert decoded["a"] == 0.25


@pytest.mark.parametrize(
    "bad",
    [
        np.array([np.nan]),
        np.array([np.inf]),
        np.array([0.0, 2.0**22]),
        np.array([-(2.0**22)]),
        np.array([2**54]),
        np.array([-(2**54) - 1]),
        np.array([2**63], dtype=np.uint64),
        np.array(["text"]),
        np.array([1j]),
    ],
)
def test_what_cannot_be_summed_is_refused_by_name(bad):
    with pytest.raises(StageError, match="'age'"):
        fixedpoint.encode({"age": bad, "fine": np.ones(3)})


def test_noise_is_not_taken_for_a_sum():
    layout, vector = fixedpoint.encode({"v": np.array([5, 6])})
    fixedpoint.decode(layout, vector, 1)
    for place, value in [(8, 1), (255, 1), (0, 65536), (6, 128)]:
        noise = vector.copy()
        noise[place] = value
        with pytest.raises(SumError, match="noise"):
            fixedpoint.decode(layout, noise, 1)
        with pytest.raises(SumError, match="noise"):
            fixedpoint.check(layout, noise)
    with pytest.raises(SumError):
        fixedpoint.decode(layout, vector[:-1], 1)
    for n in (0, 257):
        with pytest.raises(SumError):
            fixedpoint.decode(layout, vector, n)


@pytest.mark.parametrize(
    "layout",
    [
        "v",
        [["v", "int64", [2]]],
        [["v", "int32", [2], ["int", 55]]],
        [["v", "int64", [2], ["fixed", 32, 55]]],
        [["v", "int64", [2], ["int", 56]]],
        [["v", "int64", [-1], ["int", 55]]],
        [["v", "int64", [True, 2], ["int", 55]]],
        [["v", "int64", [1.5], ["int", 55]]],
        [["v", "int64", [3], ["int", 55]], ["v", "int64", [60], ["int", 55]]],
        [["w", "int64", [1], ["int", 55]], ["v", "int64", [1], ["int", 55]]],
        [["", "int64", [2], ["int", 55]]],
        [["v", "int64", [10**30], ["int", 55]]],
        [["v" * 300, "int64", [2], ["int", 55]]],
    ],
)
def test_a_layout_that_encode_cannot_have_made_is_refused(layout):
    _, vector = fixedpoint.encode({"v": np.array([5, 6])})
    with pytest.raises(SumError):
        fixedpoint.check(layout, vector)


def test_a_vector_of_another_dtype_or_shape_is_refused():
    layout, vector = fixedpoint.encode({"v": np.array([5, 6])})
    for other in (vector.astype(np.int64), vector.reshape(2, 128), vector[:255]):
        with pytest.raises(SumError):
            fixedpoint.check(layout, other)
