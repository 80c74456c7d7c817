"""Values as bytes: one encoding each, hard caps, exact types."""

from __future__ import annotations

from typing import Annotated, Any

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeer import codec
from fedpeer.errors import LocalProtocolError, RemoteProtocolError


class Point(codec.Record, frozen=True):
    x: int
    name: str
    weight: float = 0.0


class Small(codec.Record, frozen=True):
    n: Annotated[int, msgspec.Meta(ge=0, le=9)]


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)

arrays = st.sampled_from(sorted(codec.DTYPES)).flatmap(
    lambda dtype: st.lists(st.integers(0, 100), max_size=12).map(lambda items: np.array(items).astype(dtype))
)
messages = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=9) | st.binary(max_size=9) | arrays,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(plain)
def test_what_is_encoded_decodes_to_the_same_value(value: Any) -> None:
    assert codec.decode(codec.encode(value)) == value


@given(st.binary(max_size=64))
def test_arbitrary_bytes_are_a_value_with_this_very_encoding_or_refused(data: bytes) -> None:
    try:
        value = codec.decode(data)
    except RemoteProtocolError:
        return
    assert codec.encode(value) == data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",  # never used
        b"\xcf\0\0\0\0\0\0\0\1",  # 1 in nine bytes
        b"\xd4\xff\0",  # an extension: the timestamp type would pass a hook
        msgpack.packb({1: 2}),  # a key that is not text
        b"\x82\xa1a\x01\xa1a\x02",  # one key twice
        b"\x01\x02",  # something behind the value
        b"\xdd\xff\xff\xff\xff",  # four thousand million items
        b"\xa2\xff\xfe",  # not UTF-8
        b"\x91" * 40 + b"\x01",  # forty deep
        msgpack.packb("x" * 70_000),  # larger than a record
        b"\xca\x3f\x80\0\0",  # 1.0 as a float of four bytes
    ],
)
def test_hostile_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        codec.decode(data)


def test_a_record_is_an_array_and_comes_back_typed() -> None:
    data = codec.encode(Point(1, "a", 0.5))
    assert codec.decode(data) == [1, "a", 0.5]
    assert codec.decode_as(Point, data) == Point(1, "a", 0.5)


@pytest.mark.parametrize(
    "fields", [[1, "a", 0.5, 1], [1, "a"], ["1", "a", 0.5], [True, "a", 0.5], [1, "a", 1], {"x": 1}, [1, None, 0.5]]
)
def test_a_record_with_other_fields_or_types_is_refused(fields: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        codec.decode_as(Point, codec.encode(fields))


def test_a_number_outside_its_bounds_is_refused() -> None:
    assert codec.decode_as(Small, codec.encode([9])).n == 9
    with pytest.raises(RemoteProtocolError):
        codec.decode_as(Small, codec.encode([10]))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b) and type(a) is type(b)


@given(messages)
def test_a_message_value_comes_back_from_its_header_and_buffers(value: Any) -> None:
    header, buffers = codec.pack_value(value)
    assert same(codec.unpack_value(header, [bytes(buffer) for buffer in buffers]), value)


@pytest.mark.parametrize("value", [object(), np.array(["a"]), np.array([object()]), {1: 2}, {1, 2}, 1j, 2**70])
def test_what_has_no_encoding_is_refused_at_its_own_peer(value: Any) -> None:
    with pytest.raises(LocalProtocolError):
        codec.pack_value(value)


@given(messages)
def test_whatever_can_be_packed_can_be_unpacked_however_deep(value: Any) -> None:
    for wrap in (lambda inner: [inner], lambda inner: {"k": inner}):
        deep = value
        for _ in range(8):
            try:
                header, buffers = codec.pack_value(deep)
            except LocalProtocolError:
                break
            assert same(codec.unpack_value(header, [bytes(buffer) for buffer in buffers]), deep)
            deep = wrap(deep)
        else:
            pytest.fail("no depth was too deep")


def test_an_array_is_not_copied_into_the_header() -> None:
    array = np.arange(1000.0)
    header, buffers = codec.pack_value({"a": array})
    assert len(header) < 64
    assert np.shares_memory(np.frombuffer(buffers[0], np.float64), array)


@pytest.mark.parametrize(
    ("described", "size"),
    [
        (["<f8", [3]], 16),
        (["<f8", [-1]], 8),
        (["|O", [1]], 8),
        (["<M8[s]", [1]], 8),
        (["<f8", [1] * 9], 8),
        (["<f8", [2**40, 2**40]], 0),
        (["<f8"], 8),
    ],
)
def test_an_array_of_another_length_shape_or_type_than_it_says_is_refused(described: Any, size: int) -> None:
    with pytest.raises(RemoteProtocolError):
        codec.unpack_array(described, bytes(size))


@pytest.mark.parametrize(
    "parts",
    [
        [["a", 0], []],
        [["v", 1], [["<f8", [1]]]],
        [["l", [["a", 1], ["a", 0]]], [["|u1", [8]], ["|u1", [8]]]],
        [["l", [["a", 0], ["a", 0]]], [["|u1", [8]]]],
        [["d", [["b", ["v", 1]], ["a", ["v", 1]]]], []],
        [["x", 1], []],
        [["a", True], [["|u1", [8]]]],
    ],
)
def test_a_tree_that_does_not_fit_its_arrays_is_refused(parts: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        codec.unpack_value(codec.encode(parts), [bytes(8)] * len(parts[1]))
