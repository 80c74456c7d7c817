"""Private set intersection, the arithmetic: against other implementations, and points that a cheat would send."""

from __future__ import annotations

import gmpy2
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeer import crypto
from fedpeer.crypto import Secret
from fedpeer.errors import RemoteProtocolError, TrustError
from fedpeer.secure import psi

SESSION = psi.session_key({"alice": bytes(32), "bob": bytes(range(32))})
A, B = Secret(bytes(range(32))), Secret(bytes(range(32, 64)))
ORDER = 2**252 + 27742317777372353535851937790883648493
LOW_ORDER = [  # every X25519 coordinate whose multiple by 8 is zero, and how the last three may also be written
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]
TORSION = [  # Edwards points of order 2, 4, 8 and 8
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
]


def rows(*values: bytes) -> psi.Bytes:
    return np.frombuffer(b"".join(values), dtype=np.uint8).reshape(len(values), -1)


def some_points(count: int) -> psi.Bytes:
    return psi.points(psi.uniform_of(SESSION, [str(i).encode() for i in range(count)]))


def montgomery(edwards: bytes) -> bytes:
    y = int.from_bytes(edwards, "little") & (2**255 - 1)
    return ((1 + y) * pow(1 - y, -1, psi.PRIME) % psi.PRIME).to_bytes(32, "little")


# sizes


def test_a_padded_size_is_the_least_of_four_in_each_power_of_two() -> None:
    allowed = sorted({m << k for m in (4, 5, 6, 7) for k in range(14)})
    for count in range(10_001):
        assert psi.padded(count) == next(size for size in allowed if size >= count), count
    assert psi.padded(1_000_000) == psi.padded(psi.MAX_IDS) == psi.MAX_IDS == 2**20


@pytest.mark.parametrize("size", [0, -4, 3, 9, 11, 12_288, 2**60, True, 8.0, "8", None, [8]])
def test_an_announced_size_that_is_not_padded_or_too_large_is_refused(size: object) -> None:
    with pytest.raises(RemoteProtocolError, match="padded"):
        psi.check_size(size, 10_000)


def test_every_padded_size_may_be_announced() -> None:
    for count in (0, 1, 4, 5, 9, 1000, psi.MAX_IDS):
        assert psi.check_size(psi.padded(count), psi.MAX_IDS) == psi.padded(count)


# points


def test_the_session_the_points_and_the_tags_of_this_version_are_these() -> None:
    point = psi.points(psi.uniform_of(SESSION, [b"alice@example.org"]))
    twice = psi.raised(B, psi.raised(A, point))
    assert SESSION.hex() == "30edd8c27cb578380e53c3d7059a2280a0851b2c550527fcf0f31c2c9c21adcb"
    assert point.tobytes().hex() == "d7e5e6b6842f88561f3d64cde24fadaaee20be89aade4ffa957376e7d0f7487e"
    assert psi.tags(SESSION, b"bob", twice).tobytes().hex() == "7eb2f37141a9d1d992c7e1b07a12f11a"


def test_points_are_uniform_in_the_main_subgroup_whatever_is_mapped() -> None:
    uniform = psi.uniform_of(SESSION, [str(i).encode() for i in range(64)])
    for row, u in zip(uniform, psi.points(uniform), strict=True):
        halves = [crypto.edwards_from_uniform(part.tobytes()) for part in (row[:32], row[32:])]
        point = crypto.edwards_add(*halves)
        assert crypto.edwards_is_valid(point)
        assert crypto.edwards_to_x25519(point) == u.tobytes()


def test_each_multiplication_is_that_of_another_implementation() -> None:
    points = some_points(20)
    own = X25519PrivateKey.from_private_bytes(A.reveal())
    expected = [own.exchange(X25519PublicKey.from_public_bytes(point.tobytes())) for point in points]
    assert [point.tobytes() for point in psi.raised(A, points)] == expected


def test_a_multiplication_of_another_length_than_32_bytes_is_refused() -> None:
    point = some_points(1).tobytes()
    for scalar, base in ((A.reveal()[:31], point), (A.reveal(), point[:31]), (A.reveal(), point + b"\0"), (b"", b"")):
        with pytest.raises(TrustError, match="length"):
            crypto.x25519(scalar, base)


@settings(max_examples=25, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32), st.binary(max_size=40))
def test_the_order_of_the_two_multiplications_does_not_matter(a: bytes, b: bytes, name: bytes) -> None:
    point = psi.points(psi.uniform_of(SESSION, [name]))
    ab, ba = psi.raised(Secret(a), psi.raised(Secret(b), point)), psi.raised(Secret(b), psi.raised(Secret(a), point))
    assert ab.tobytes() == ba.tobytes()


def test_hashes_of_one_id_are_unrelated_between_sessions_and_uses() -> None:
    other = psi.session_key({"alice": bytes(32), "bob": bytes(31) + b"\1"})
    assert other != SESSION
    assert psi.session_key({"bob": bytes(range(32)), "alice": bytes(32)}) != SESSION
    found = {bytes(psi.uniform_of(key, [b"x"])[0])[:16] for key in (SESSION, other)}
    found |= {psi.tags(key, who, rows(b"x" * 32)).tobytes() for key in (SESSION, other) for who in (b"bob", b"carol")}
    assert len(found) == 2 + 4


# what a cheat sends


@pytest.mark.parametrize("point", LOW_ORDER)
@pytest.mark.parametrize("high_bit", [0, 0x80])
def test_a_point_of_low_order_is_refused_in_every_form(point: str, high_bit: int) -> None:
    encoded = bytearray(bytes.fromhex(point))
    encoded[31] |= high_bit
    value = np.concatenate([some_points(3), rows(bytes(encoded))])
    with pytest.raises(RemoteProtocolError, match=r"low order|canonical"):
        psi.raised(A, psi.check_points(value, 4))
    with pytest.raises(RemoteProtocolError, match="low order"):
        psi.raised(A, value)


@pytest.mark.parametrize("torsion", TORSION)
def test_a_part_of_small_order_tells_nothing_of_the_scalar(torsion: str) -> None:
    point = crypto.edwards_add(crypto.edwards_from_uniform(bytes(range(32))), crypto.edwards_from_uniform(bytes(32)))
    mixed = crypto.edwards_add(point, bytes.fromhex(torsion))
    assert not crypto.edwards_is_valid(mixed)
    assert montgomery(mixed) != montgomery(point)
    raised = {psi.raised(A, rows(montgomery(each))).tobytes() for each in (point, mixed)}
    assert len(raised) == 1


def test_a_coordinate_that_is_not_reduced_is_refused() -> None:
    for above in (0, 2, 18):  # p, p + 2, 2^255 - 1: the second and third are other names of points not of low order
        value = rows(*some_points(3), (psi.PRIME + above).to_bytes(32, "little"))
        with pytest.raises(RemoteProtocolError, match="canonical"):
            psi.check_points(value, 4)
    high_bit = some_points(4).copy()
    high_bit[2, 31] |= 0x80
    with pytest.raises(RemoteProtocolError, match="canonical"):
        psi.check_points(high_bit, 4)
    assert psi.check_points(rows(*some_points(3), (psi.PRIME - 2).to_bytes(32, "little")), 4).shape == (4, 32)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda points: points[:3],
        lambda points: np.concatenate([points, some_points(5)[4:]]),
        lambda points: points[:, :31],
        lambda points: points.reshape(2, 64),
        lambda points: points.reshape(-1),
        lambda points: points.view(np.int8),
        lambda points: points.tobytes(),
        lambda points: [row.tobytes() for row in points],
        lambda _: None,
    ],
)
def test_points_of_another_number_or_form_are_refused(spoil: object) -> None:
    with pytest.raises(RemoteProtocolError, match="not 4 points of 32 bytes"):
        psi.check_points(spoil(some_points(4)), 4)  # type: ignore[operator]


def test_a_point_that_is_there_twice_is_refused() -> None:
    points = some_points(4).copy()
    points[3] = points[0]
    with pytest.raises(RemoteProtocolError, match="not all different"):
        psi.check_points(points, 4)


def test_tags_of_another_number_and_repeated_ones_are_refused() -> None:
    tags = psi.tags(SESSION, b"bob", some_points(4))
    assert len(psi.check_tags(tags, 4)) == 4
    for wrong in (tags[:3], np.concatenate([tags, tags[:1]]), tags[:, :8], tags.tobytes(), None):
        with pytest.raises(RemoteProtocolError, match="not 4 tags of 16 bytes"):
            psi.check_tags(wrong, 4)
    with pytest.raises(RemoteProtocolError, match="not all different"):
        psi.check_tags(tags[[0, 1, 2, 0]], 4)


def test_a_result_that_is_too_long_unsorted_repeated_or_of_another_form_is_refused() -> None:
    names = np.array([[i] * 16 for i in (3, 5, 8, 200)], np.uint8)
    assert psi.check_result(names, 4) is names
    assert len(psi.check_result(names[:0], 0)) == 0
    for wrong in (names[::-1], names[[0, 1, 1, 2]], names[:, :8], names.tobytes(), None, names.reshape(-1)):
        with pytest.raises(RemoteProtocolError):
            psi.check_result(wrong, 4)
    with pytest.raises(RemoteProtocolError):
        psi.check_result(names, 3)


def test_what_fills_a_list_up_lies_on_the_curve_like_the_points_of_ids(seed: int) -> None:
    chance = np.random.Generator(np.random.PCG64(seed))
    filling = psi.raised(A, psi.points(chance.integers(0, 256, (64, psi.UNIFORM_BYTES)).astype(np.uint8)))
    for row in filling:
        u = int.from_bytes(row.tobytes(), "little")
        assert gmpy2.jacobi(u**3 + 486662 * u**2 + u, psi.PRIME) == 1
