"""Masks: known answers of the stream, exact cancelling, packing, and the statistics of what leaves."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedpeer.aggregation import keys, masks
from fedpeer.aggregation.keys import PairMask
from fedpeer.crypto import Secret, aegis256_stream, hash_
from fedpeer.errors import LocalProtocolError, SumError
from fedpeer.testing.uniformity import correlation, looks_uniform

NAME = bytes(range(32))


@pytest.fixture(scope="module")
def known(shared: Path) -> dict[str, Any]:
    answers: dict[str, Any] = json.loads((shared / "vectors/secagg_kat.json").read_text())
    return answers


@pytest.fixture(scope="module")
def reference(shared: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("secagg_ref", shared / "reference/secagg_ref.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def key_of(party: int) -> keys.DhKey:
    return keys.mask_key(Secret(hash_("fp.test", keys.u32(party))))


def masked_by_all(vectors: list[masks.Vector], ctx: bytes) -> list[bytearray]:
    own = [key_of(i) for i in range(len(vectors))]
    publics = [key.public for key in own]
    return [masks.mask(x, keys.pair_masks(ctx, i, own[i], publics), masks.label(ctx, i)) for i, x in enumerate(vectors)]


def added(files: list[bytearray], count: int, ctx: bytes) -> masks.Vector:
    total = np.zeros(count, np.uint32)
    for i, data in enumerate(files):
        masks.add(total, io.BytesIO(data), masks.label(ctx, i))
    return total


# the stream


def test_the_stream_is_the_public_vector_of_aegis_256() -> None:
    """draft-irtf-cfrg-aegis-aead, test vector 1 for AEGIS-256: sixteen zero bytes."""
    key, nonce = bytes.fromhex("1001" + "00" * 30), bytes.fromhex("100002" + "00" * 29)
    assert aegis256_stream(key, nonce, bytes(16)).hex() == "754fc3d8c973246dcc6d741412a4b236"


def test_the_stream_of_a_segment_is_the_known_one(known: dict[str, Any]) -> None:
    seed = Secret(bytes.fromhex(known["prg"]["seed"]))
    for segment in (0, 1):
        want = known["prg"]["aegis256"][f"seg{segment}_first64"]
        assert masks.stream(seed, segment, 16).tobytes().hex() == want
        assert masks.stream(seed, segment, masks.SEGMENT)[:16].tobytes().hex() == want


@pytest.mark.parametrize("count", [1, masks.SEGMENT - 1, masks.SEGMENT, masks.SEGMENT + 1])
def test_masks_are_those_of_the_reference_around_a_segment(reference: ModuleType, count: int) -> None:
    seed = hash_("fp.test", b"around")
    zeros = np.zeros(count, np.uint32)
    ours = masks.unpack(masks.mask(zeros, [PairMask(1, Secret(seed))], NAME)[masks.LABEL_BYTES :])
    assert np.array_equal(ours, reference.mask(seed, count) & np.uint32(0xFFFFFF))


def test_masked_vectors_are_the_known_ones_once_the_self_mask_is_added(known: dict[str, Any]) -> None:
    """SA1's self mask is not part of this first form: the test adds it as one more mask."""
    group = known["group"]
    instance = group["instance_1_one_dropout_after_START"]
    ctx = bytes.fromhex(instance["ctx"])
    sets = {entry["i"]: entry for entry in instance["keys"]["sets"]}
    for i in instance["U"]:
        x = np.zeros(group["d_padded"], np.uint32)
        x[: group["d"]] = group["x"][str(i)]
        own = keys.mask_key(Secret(bytes.fromhex(sets[i]["sigma"])))
        pairs = [
            PairMask(1 if j > i else -1, keys.pair_seed(ctx, i, j, own, bytes.fromhex(sets[j]["pk"])))
            for j in instance["U"]
            if j != i
        ]
        self_seed = hash_("fp.sa1.self", ctx, keys.u32(i), key=bytes.fromhex(sets[i]["b"]))
        y = masks.mask(x, [*pairs, PairMask(1, Secret(self_seed))], NAME)
        assert y[masks.LABEL_BYTES :].hex() == instance["y_packed"][str(i)]


# cancelling


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(3, 10),
    count=st.integers(1, 700),
    ctx=st.binary(min_size=32, max_size=32),
    seed=st.integers(0, 2**32 - 1),
    top=st.sampled_from([1, 2**16, 2**24]),
)
@example(n=3, count=masks.SEGMENT + 3, ctx=bytes(32), seed=0, top=2**16)
@example(n=10, count=2 * masks.SEGMENT, ctx=bytes(32), seed=1, top=2**24)
def test_masks_cancel_exactly(n: int, count: int, ctx: bytes, seed: int, top: int) -> None:
    chance = np.random.default_rng(seed)
    vectors = [chance.integers(0, top, count, np.uint32) for _ in range(n)]
    before = [vector.copy() for vector in vectors]
    files = masked_by_all(vectors, ctx)
    assert [len(data) for data in files] == [masks.masked_bytes(count)] * n
    assert np.array_equal(added(files, count, ctx), sum(v.astype(np.uint64) for v in vectors) % 2**24)
    assert all(np.array_equal(a, b) for a, b in zip(before, vectors, strict=True))


def test_one_party_with_another_context_turns_the_sum_to_noise() -> None:
    count = 4096
    vectors = [np.full(count, 5, np.uint32)] * 4
    files = masked_by_all(vectors, bytes(32))
    other = masked_by_all(vectors, b"\x01" * 32)[2]
    other[: masks.LABEL_BYTES] = files[2][: masks.LABEL_BYTES]
    files[2] = other
    total = added(files, count, bytes(32))
    assert np.count_nonzero(total == 20) < 4
    assert looks_uniform(masks.pack(total))


def test_any_part_of_the_masked_vectors_without_one_looks_uniform() -> None:
    """n − 1 of n masked vectors add up to nothing but chance."""
    count = 50_000
    files = masked_by_all([np.full(count, 7, np.uint32)] * 4, bytes(32))
    for missing in range(4):
        total = np.zeros(count, np.uint32)
        for i, data in enumerate(files):
            if i != missing:
                masks.add(total, io.BytesIO(data), masks.label(bytes(32), i))
        assert looks_uniform(masks.pack(total))


# what leaves (secure-aggregation test plan T1 and T2)

COUNT = 200_000


@pytest.fixture(scope="module")
def wide() -> list[masks.Vector]:
    """A constant, a ramp, small numbers, and one bit."""
    chance = np.random.default_rng(1)
    return [
        np.full(COUNT, 40_000, np.uint32),
        (np.arange(COUNT) % 65_536).astype(np.uint32),
        chance.integers(0, 16, COUNT, np.uint32),
        chance.integers(0, 2, COUNT, np.uint32),
    ]


@pytest.fixture(scope="module")
def wide_masked(wide: list[masks.Vector]) -> list[masks.Vector]:
    return [masks.unpack(data[masks.LABEL_BYTES :]) for data in masked_by_all(wide, b"\x07" * 32)]


def test_every_byte_of_a_masked_vector_is_uniform(wide: list[masks.Vector], wide_masked: list[masks.Vector]) -> None:
    assert all(looks_uniform(masks.pack(y)) for y in wide_masked)
    assert not any(looks_uniform(masks.pack(x)) for x in wide)  # the test can fail


def test_a_masked_vector_tells_nothing_of_any_vector_or_other_masked_one(
    wide: list[masks.Vector], wide_masked: list[masks.Vector]
) -> None:
    for i, y in enumerate(wide_masked):
        assert all(correlation(x, y) < 5 for x in wide[1:])
        assert all(correlation(y, z) < 5 for z in wide_masked[i + 1 :])
        assert correlation(wide[1] + y % 65_536, wide[1]) > 5  # the test can fail


def test_a_constant_zero_and_a_largest_vector_cannot_be_told_apart() -> None:
    """T3: the rank of y(0) among y(max) is a coin's, for each of the three bytes and the whole element."""
    low = masks.unpack(masked_by_all([np.zeros(COUNT, np.uint32)] * 3, b"\x08" * 32)[0][masks.LABEL_BYTES :])
    high = masks.unpack(masked_by_all([np.full(COUNT, 65_535, np.uint32)] * 3, b"\x09" * 32)[0][masks.LABEL_BYTES :])
    for shift, width in ((0, 24), (0, 8), (8, 8), (16, 8)):
        a, b = (low >> shift) % 2**width, (high >> shift) % 2**width
        ranks = np.searchsorted(np.sort(a), b, "left") + np.searchsorted(np.sort(a), b, "right")
        assert abs(ranks.mean() / (2 * COUNT) - 0.5) < 0.01


# packing, and what is refused


@given(st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=50))
def test_packing_is_three_bytes_little_endian_and_back(values: list[int]) -> None:
    vector = np.array(values, np.uint32)
    packed = masks.pack(vector)
    assert packed == b"".join(value.to_bytes(3, "little") for value in values)
    assert np.array_equal(masks.unpack(packed), vector)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[: masks.LABEL_BYTES],
        lambda data: b"",
        lambda data: bytes([data[0] ^ 1]) + data[1:],
    ],
    ids=["short", "long", "no elements", "nothing", "another label"],
)
def test_bytes_that_are_not_the_masked_vector_are_refused(change: Any) -> None:
    data = bytes(masks.mask(np.arange(10, dtype=np.uint32), [], NAME))
    masks.add(np.zeros(10, np.uint32), io.BytesIO(data), NAME)
    with pytest.raises(SumError):
        masks.add(np.zeros(10, np.uint32), io.BytesIO(change(data)), NAME)


def test_a_label_names_context_and_contributor() -> None:
    assert len({masks.label(bytes(32), 0), masks.label(bytes(32), 1), masks.label(b"\x01" * 32, 0)}) == 3


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(3, np.int64),
        np.zeros((2, 2), np.uint32),
        np.zeros(0, np.uint32),
        np.array([2**24], np.uint32),
    ],
    ids=["dtype", "shape", "empty", "range"],
)
def test_only_a_vector_of_the_ring_is_masked(vector: Any) -> None:
    with pytest.raises(LocalProtocolError, match="below"):
        masks.check(vector)
    masks.check(np.array([2**24 - 1], np.uint32))
