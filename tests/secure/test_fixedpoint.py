"""The value codecs: known answers, exactness, and what is refused."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedpeer.errors import LocalProtocolError, StageError, SumError
from fedpeer.secure import fixedpoint
from fedpeer.stage import MAX_PEERS, Sum

integers = st.integers(-(2**54), 2**54 - 1)
reals = st.floats(-(2.0**22), 2.0**22, exclude_min=True, exclude_max=True, width=64)


SEED = bytes(range(32))
CLIP = Sum("", clip=0.5).codecs


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
    for case in values["clip"]:
        top = 2 ** case["bits"] - 1
        got = fixedpoint.rounded(np.array([float(case["x"])]), case["clip"], top, np.array([case["u"]]))
        assert got.tolist() == [case["q"]], case
    for codecs, error, bad in (
        (CLIP, values["clip_nan"], np.array([np.nan])),
        (CLIP, values["clip_inf"], np.array([-np.inf])),
        (fixedpoint.EXACT, values["int_out_of_range"], np.array([2**54])),
        (fixedpoint.EXACT, values["fixed_out_of_range"], np.array([2.0**22])),
    ):
        assert error.startswith("error: ")
        with pytest.raises(StageError):
            fixedpoint.encode({"v": bad}, codecs, SEED)


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


# declared ranges


def test_what_is_not_declared_otherwise_is_exact():
    assert Sum("").codecs == fixedpoint.EXACT


@given(st.integers(2, 55), st.integers(0, 55), st.integers(3, 256), st.data())
def test_declared_ranges_are_exact_up_to_their_ends(width: int, fraction: int, n: int, data: st.DataObject):
    codecs, bound = Sum("", value_bits=width, fraction_bits=fraction).codecs, 2 ** (width - 1)
    inside = st.integers(-bound, bound - 1)
    row = [*data.draw(st.lists(inside, max_size=5)), -bound, bound - 1]
    last = bound - 1 - (width == 55)  # of 55 bits a float has 53
    ends = [-last / 2**fraction, 0.3 if bound > 2**fraction else 0.0, last / 2**fraction]
    layout, vector = fixedpoint.encode({"i": np.array(row), "x": np.array(ends)}, codecs)
    fixedpoint.check(layout, vector, codecs)
    assert layout[0][3] == ["int", width]
    assert layout[1][3] == ["fixed", fraction, width]
    assert fixedpoint.used(layout) == -(-width // 16) * (len(row) + 3)
    assert int(vector.max()) < 2 ** fixedpoint.bits(layout) <= 2**16
    decoded = fixedpoint.decode(layout, vector * np.uint32(n), n)
    assert decoded["i"].tolist() == [n * v for v in row]
    assert decoded["x"].tolist() == [n * round(x * 2**fraction) / 2**fraction for x in ends]
    for bad in (np.array([bound]), np.array([-bound - 1]), np.array([bound / 2**fraction]), np.array([-1e300])):
        with pytest.raises(StageError, match="'age'"):
            fixedpoint.encode({"age": bad}, codecs)


def test_a_layout_with_another_codec_than_declared_is_refused():
    layout, vector = fixedpoint.encode({"v": np.array([0.25, -1.0])}, CLIP, SEED)
    fixedpoint.check(layout, vector, CLIP)
    for codec in (["clip", 16, 0.25], ["clip", 15, 0.5], ["clip", 16.0, 0.5], ["clip", 16], ["int", 16], []):
        with pytest.raises(SumError):
            fixedpoint.check([["v", "float64", [2], codec]], vector, CLIP)
    with pytest.raises(SumError):
        fixedpoint.check(layout, vector)
    outside = vector.copy()
    outside[0] = 2**16
    with pytest.raises(SumError, match="noise"):
        fixedpoint.check(layout, outside, CLIP)


# "clip": one element a value, rounded by chance


floats = st.floats(allow_nan=False, allow_infinity=False, width=64)


@given(
    st.lists(floats, min_size=1, max_size=9),
    st.floats(1e-30, 1e30),
    st.integers(1, 16),
    st.integers(1, 40),
    st.binary(min_size=32, max_size=32),
)
def test_a_clipped_sum_is_less_than_a_step_away_for_each_party(
    xs: list[float], c: float, bits: int, n: int, seed: bytes
):
    codecs, step = Sum("", clip=c, bits=bits).codecs, 2 * c / (2**bits - 1)
    parts = [fixedpoint.encode({"v": np.array(xs)}, codecs, bytes([k]) + seed[1:]) for k in range(n)]
    layout = parts[0][0]
    assert layout == [["v", "float64", [len(xs)], ["clip", bits, c]]]
    assert fixedpoint.used(layout) == len(xs)
    assert fixedpoint.bits(layout) == bits
    for _, vector in parts:
        fixedpoint.check(layout, vector, codecs)
        assert int(vector.max()) <= 2**bits - 1
    total = fixedpoint.decode(layout, total_of([vector for _, vector in parts]), n)["v"]
    assert np.abs(total - n * np.clip(xs, -c, c)).max() < n * step * (1 + 1e-6)
    again = fixedpoint.decode(layout, parts[0][1], 1)["v"]
    assert np.abs(again - np.clip(xs, -c, c)).max() < step * (1 + 1e-6)


@pytest.mark.parametrize("bits", [1, 8, 16, 22])
@pytest.mark.parametrize("x", [-0.5, -0.4999999, -0.123456, -1e-7, 0.0, 1e-9, 0.001, 0.31, 0.4999999, 0.5])
def test_clipped_values_are_right_on_average(x: float, bits: int):
    count = 400_000  # several segments
    codecs, step = Sum("", clip=0.5, bits=bits).codecs, 1 / (2**bits - 1)
    layout, vector = fixedpoint.encode({"v": np.full(count, x)}, codecs, SEED)
    values = vector[:count].astype(float)
    exact = (x + 0.5) / step
    share = exact - np.floor(exact)
    assert set(values) <= {np.floor(exact), np.floor(exact) + 1}
    sigma = np.sqrt(max(share * (1 - share), 1e-9) / count)
    assert abs(values.mean() - exact) < 5 * sigma + 1e-6
    mean = fixedpoint.decode(layout, vector, 1)["v"].mean()
    assert abs(mean - x) < 5 * step * sigma + 1e-6 * step + 1e-12


def test_the_chance_of_one_value_says_nothing_of_the_next():
    halves = np.zeros(1 << 19)  # v = 32767.5: each is a toss
    _, vector = fixedpoint.encode({"a": halves, "b": halves}, CLIP, SEED)
    tosses = vector[: 1 << 20].astype(int) - 32767
    assert set(tosses) == {0, 1}
    signs = 2.0 * tosses - 1
    for lag in (1, 2, 8, 1 << 17, 1 << 19):  # the next, the next segment, the next entry
        assert abs((signs[lag:] * signs[:-lag]).mean()) < 5 / np.sqrt(signs.size - lag), lag


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others():
    values = {"a": np.linspace(-1, 1, 300_000), "n": np.arange(5)}
    _, first = fixedpoint.encode(values, CLIP, SEED)
    _, again = fixedpoint.encode(values, CLIP, SEED)
    _, other = fixedpoint.encode(values, CLIP, bytes(32))
    assert first.tobytes() == again.tobytes()
    assert (first[:300_000] != other[:300_000]).mean() > 0.1
    with pytest.raises(LocalProtocolError):
        fixedpoint.encode(values, CLIP)


def test_clip_takes_large_arrays_in_any_float_and_shape_beside_exact_integers():
    rng = np.random.default_rng(1)
    values = {"w": rng.normal(0, 0.2, (3, 50_000)).astype(np.float32), "n": np.array([7, -(2**40)])}
    layout, vector = fixedpoint.encode(values, CLIP, SEED)
    decoded = fixedpoint.decode(layout, vector, 1)
    assert decoded["n"].tolist() == [7, -(2**40)]
    assert decoded["w"].shape == (3, 50_000)
    assert np.abs(decoded["w"] - np.clip(values["w"].astype(float), -0.5, 0.5)).max() < 1 / 65535
    worst = values["w"].astype(float)
    worst[2, 49_999] = np.nan
    with pytest.raises(StageError, match=r"'w' .* finite"):
        fixedpoint.encode(values | {"w": worst}, CLIP, SEED)


def test_clipped_values_are_decoded_without_a_second_array_of_their_size():
    layout, vector = fixedpoint.encode({"w": np.linspace(-1, 1, 1_000_000, dtype=np.float32)}, CLIP, SEED)
    tracemalloc.start()
    try:
        values = fixedpoint.decode(layout, vector, 3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert values["w"].nbytes <= peak < 1.1 * values["w"].nbytes
    assert values["w"].tolist() == (vector[:1_000_000] * (1 / 65535) - 1.5).tolist()


@pytest.mark.parametrize(("bits", "most"), [(1, 2**24 - 1), (16, 256), (17, 128), (20, 16), (22, 4)])
def test_no_more_vectors_are_added_than_cannot_wrap(bits: int, most: int):
    assert fixedpoint.fits(most, bits)
    assert not fixedpoint.fits(most + 1, bits)
    codecs = Sum("", clip=1.0, bits=bits).codecs
    layout, vector = fixedpoint.encode({"v": np.full(5, 9.0)}, codecs, SEED)
    assert fixedpoint.decode(layout, vector * np.uint32(most), most)["v"].tolist() == [most] * 5
    with pytest.raises(SumError, match="more than"):
        fixedpoint.decode(layout, vector, most + 1)


@given(
    st.integers(3, MAX_PEERS),
    st.one_of(
        st.builds(Sum, st.just(""), value_bits=st.integers(2, 55), fraction_bits=st.integers(0, 55)),
        st.builds(Sum, st.just(""), clip=st.sampled_from([1e-3, 1.0, 1e6]), bits=st.integers(1, 22)),
    ),
    st.booleans(),
)
@example(3, Sum("", value_bits=55, fraction_bits=0), True)
def test_whatever_a_stage_declares_its_sums_fit_or_its_contract_does_not(n: int, declared: Sum, largest: bool):
    """A contract is refused by `declared.bits`: no element of any layout that the declaration allows is larger.

    Then n contributions at either end of the range add up to n times their value, not modulo anything.
    """
    codecs = declared.codecs
    ints, (kind, *_rest) = codecs["int64"], codecs["float64"]
    whole = 2 ** (ints[1] - 1) - 1 if largest else -(2 ** (ints[1] - 1))
    if kind == "fixed":
        below = 1 if ints[1] <= 54 else 2  # what a float64 can hold
        floats = (2 ** (ints[1] - 1) - below) / 2.0**declared.fraction_bits * (1 if largest else -1)
    else:
        floats = 2.0 * (declared.clip or 0.0) * (1 if largest else -1)
    layout, vector = fixedpoint.encode({"i": np.array([whole]), "x": np.array([floats])}, codecs, SEED)
    bits = fixedpoint.bits(layout)
    assert int(vector.max()) < 2**bits <= 2 ** max(declared.bits, 16)
    if fixedpoint.fits(n, max(declared.bits, 16)):
        assert n * int(vector.max()) < 2**fixedpoint.WIDTH
        one = fixedpoint.decode(layout, vector, 1)
        total = fixedpoint.decode(layout, vector * np.uint32(n), n)
        assert total["i"].tolist() == [n * whole]
        assert total["x"][0] == pytest.approx(n * one["x"][0], rel=1e-12)
