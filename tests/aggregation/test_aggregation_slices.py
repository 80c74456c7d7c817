"""Slices: each element has one owner; digests name place and context."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeer.aggregation import slices
from fedpeer.crypto import Hasher
from fedpeer.errors import LocalProtocolError

CTX = bytes(range(32))
parties = st.sets(st.integers(0, 199), min_size=1, max_size=200)


@given(st.integers(1, 10**7))
def test_a_vector_has_a_pad_of_at_least_four(d: int) -> None:
    length = slices.padded(d)
    assert length % 256 == 0
    assert 4 <= length - d < 4 + 256


@given(st.integers(1, 10**6), parties, st.binary(min_size=32, max_size=32))
def test_each_element_has_one_owner(d: int, owners: set[int], sid: bytes) -> None:
    length = slices.padded(d)
    chunks = slices.chunks(length, len(owners))
    assert [start for start, _ in chunks] == [0, *(stop for _, stop in chunks[:-1])]
    assert chunks[-1][1] == length
    assert all(start % 256 == 0 and start < stop for start, stop in chunks)
    owned = [slices.owner_of(chunk, owners, sid) for chunk in range(len(chunks))]
    assert len(set(owned)) == len(owned) <= len(owners)
    assert set(owned) <= owners
    sizes = [stop - start for start, stop in chunks]
    assert max(sizes) == slices.slice_length(length, len(owners))
    assert max(sizes) * len(owners) < length + 256 * len(owners)  # nobody has more than its part, rounded up


@given(st.integers(1, 3000), st.integers(1, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_a_second_implementation_agrees_element_by_element(d: int, owners: int, rotation: int) -> None:
    length, sid = slices.padded(d), rotation.to_bytes(4, "little") + bytes(28)
    ascending = [3 * party + 1 for party in range(owners)]
    per = -(-length // 256 // owners) if length // 256 % owners == 0 else length // 256 // owners + 1
    chunks = slices.chunks(length, owners)
    for block in range(length // 256):
        chunk = block // per
        assert chunks[chunk][0] <= 256 * block < chunks[chunk][1]
        assert slices.owner_of(chunk, ascending, sid) == ascending[(chunk + rotation) % owners]


@pytest.mark.parametrize(("length", "owners"), [(256, 0), (0, 1), (255, 1), (257, 3), (-256, 1)])
def test_what_has_no_slices_is_refused(length: int, owners: int) -> None:
    with pytest.raises(LocalProtocolError):
        slices.chunks(length, owners)


HASHERS: list[tuple[Callable[[bytes], bytes], Callable[[int], Hasher]]] = [
    (lambda data: slices.chunk_digest(CTX, 3, 1, data), lambda size: slices.chunk_hasher(CTX, 3, 1, size)),
    (lambda data: slices.sum_digest(CTX, 1, data), lambda size: slices.sum_hasher(CTX, 1, size)),
    (slices.sum_hash, slices.total_hasher),
]


@pytest.mark.parametrize(("whole", "in_parts"), HASHERS)
def test_a_digest_in_parts_is_the_digest_of_the_whole(
    whole: Callable[[bytes], bytes], in_parts: Callable[[int], Hasher]
) -> None:
    data = bytes(range(256)) * 3
    for cut in (0, 1, 255, 768):
        hasher = in_parts(len(data))
        hasher.update(data[:cut])
        hasher.update(memoryview(data)[cut:])
        assert hasher.digest() == whole(data)
    hasher = in_parts(2)
    hasher.update(b"a")
    with pytest.raises(LocalProtocolError, match="fewer"):
        hasher.digest()
    with pytest.raises(LocalProtocolError, match="more"):
        hasher.update(b"bc")


def test_every_part_of_a_place_is_in_its_digest() -> None:
    other = bytes(32)
    digests = [
        slices.chunk_digest(CTX, 3, 1, b"x"),
        slices.chunk_digest(other, 3, 1, b"x"),
        slices.chunk_digest(CTX, 1, 1, b"x"),
        slices.chunk_digest(CTX, 3, 3, b"x"),
        slices.chunk_digest(CTX, 3, 1, b"y"),
        slices.sum_digest(CTX, 1, b"x"),
        slices.sum_digest(other, 1, b"x"),
        slices.sum_digest(CTX, 2, b"x"),
        slices.sum_hash(b"x"),
        slices.root([CTX, other]),
        slices.root([other, CTX]),
        slices.root([CTX]),
        slices.root([CTX + other]),
    ]
    assert len(set(digests)) == len(digests)
