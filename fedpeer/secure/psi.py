"""Private set intersection on Curve25519: what one party computes. Who sends what is algorithms/vertical/align.py.

How it works
    Each id becomes a point H(id) of the curve, keyed by a session that no two runs share. A party multiplies its points
    by a fresh secret scalar and sends them; the other multiplies them by its own. H(id)^ab is equal for equal ids, and
    under decisional Diffie-Hellman nothing else can be told from H(id)^a.

Rules
* One scalar serves one pair of parties in one session, and is never zero or of small order (clamped).
* A list is filled up with random points to a size of `padded`, and shuffled, before its points are raised.
* Points of others are canonical, distinct, and exactly as many as were announced. Raised to a clamped scalar, a
  multiple of 8, they lose every part of small order; a point that has nothing else becomes zero and is refused. A point
  and its opposite have one coordinate, and points of the twist are as hard as those of the curve: both are harmless.
* Hashes are keyed by the session, each use with a label of its own. A tag is 16 bytes: for two full lists a false match
  has probability 2^-101.

Source: Meadows (1986); Huberman, Franklin, Hogg (1999); the map to the curve is a sum of two Elligator 2 points
(Bernstein, Hamburg, Krasnova, Lange, 2013; as in RFC 9380, hash_to_curve); RFC 7748 for X25519.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import gmpy2
import numpy as np
import numpy.typing as npt

from fedpeer import codec, crypto
from fedpeer.crypto import Secret, hash_
from fedpeer.errors import RemoteProtocolError, TrustError

Bytes = npt.NDArray[np.uint8]
"""Rows of equal length: points, tags or hashes, shape (n, 32) or (n, 16)."""

MAX_IDS: Final = 10_000
PRIME: Final = 2**255 - 19
POINT_BYTES: Final = 32
UNIFORM_BYTES: Final = 64
"""Of what is mapped to the curve: the hash of an id, or as many random bytes to fill up."""
TAG_BYTES: Final = 16


def padded(count: int) -> int:
    """The least of 2^k, 1.25·2^k, 1.5·2^k and 1.75·2^k, k ≥ 2, that is not below `count`."""
    shift = max(count - 1, 4).bit_length() - 3
    return max(-(-count >> shift) << shift, 4)


MAX_PADDED: Final = padded(MAX_IDS)


def session_key(nonces: Mapping[str, bytes]) -> bytes:
    """The key of every hash of a run: of all participants' nonces by alias, in the contract's order."""
    return hash_("fp.psi.session", codec.encode([[alias, nonce] for alias, nonce in nonces.items()]))


# ids


def uniform_of(session: bytes, ids: Sequence[str]) -> Bytes:
    """What `points` maps to the curve: 64 bytes for each id (in normal form)."""
    return _rows([hash_("fp.psi1", name.encode(), key=session, size=UNIFORM_BYTES) for name in ids], UNIFORM_BYTES)


def names_of(session: bytes, ids: Sequence[str]) -> list[bytes]:
    """What stands for each id in the result, 16 bytes."""
    return [hash_("fp.psi.id", name.encode(), key=session, size=TAG_BYTES) for name in ids]


def order_of(session: bytes, ids: Sequence[str]) -> list[int]:
    """The places of `ids` in the order of a result: the same at each party, and unrelated to any order of theirs."""
    keys = [hash_("fp.psi.order", name.encode(), key=session) for name in ids]
    return sorted(range(len(keys)), key=keys.__getitem__)


# points


def points(uniform: Bytes) -> Bytes:
    """Points of the main subgroup as X25519 takes them, from (n, 64) uniform bytes; uniform themselves."""
    halves = [(row[:32].tobytes(), row[32:].tobytes()) for row in uniform]
    edwards = [crypto.edwards_add(crypto.edwards_from_uniform(a), crypto.edwards_from_uniform(b)) for a, b in halves]
    return _rows([_coordinate(point) for point in edwards], POINT_BYTES)


def _coordinate(edwards: bytes) -> bytes:
    """The Montgomery u = (1 + y) / (1 - y) of a point; 37 times faster than where its subgroup is checked as well."""
    y = int.from_bytes(edwards, "little") & (2**255 - 1)
    return int((1 + y) * gmpy2.invert(1 - y, PRIME) % PRIME).to_bytes(POINT_BYTES, "little")


def raised(scalar: Secret, base: Bytes) -> Bytes:
    """Each point multiplied by the clamped scalar. Raises RemoteProtocolError for one of low order."""
    key = scalar.reveal()
    try:
        return _rows([crypto.x25519(key, row.tobytes()) for row in base], POINT_BYTES)
    except TrustError:
        raise RemoteProtocolError("a point of low order") from None


def tags(session: bytes, direction: bytes, twice_raised: Bytes) -> Bytes:
    """A tag for each point that both have raised, shape (n, 16): it is compared, the point itself never leaves."""
    rows = [hash_("fp.psi.tag", direction, row.data, key=session, size=TAG_BYTES) for row in twice_raised]
    return _rows(rows, TAG_BYTES)


# what others send; all raise RemoteProtocolError


def check_size(value: Any, most: int = MAX_IDS) -> int:
    """A number of points that a party may announce, if it has `most` ids at most."""
    if type(value) is not int or not 0 < value <= padded(most) or padded(value) != value:
        raise RemoteProtocolError(f"not a padded number of at most {most} ids")
    return value


def check_points(value: Any, count: int) -> Bytes:
    """`count` points: canonical coordinates, all different. Those of low order are found when they are raised."""
    found = _distinct(value, count, POINT_BYTES, "points")
    if any(int.from_bytes(row.tobytes(), "little") >= PRIME for row in found):
        raise RemoteProtocolError("points that are not in canonical form")
    return found


def check_tags(value: Any, count: int) -> list[bytes]:
    """`count` tags, all different, in the order of the points they answer."""
    return [row.tobytes() for row in _distinct(value, count, TAG_BYTES, "tags")]


def check_result(value: Any, most: int) -> list[bytes]:
    """At most `most` hashes of ids, ascending, all different."""
    if not isinstance(value, np.ndarray) or value.ndim != 2 or len(value) > most:
        raise RemoteProtocolError("not a result")
    names = [row.tobytes() for row in _distinct(value, len(value), TAG_BYTES, "hashes")]
    if names != sorted(names):
        raise RemoteProtocolError("a result that is not sorted")
    return names


def result(names: Sequence[bytes]) -> Bytes:
    """The message of a result: hashes of ids, sorted, so that their order tells nothing."""
    return _rows(sorted(names), TAG_BYTES)


def _distinct(value: Any, count: int, width: int, what: str) -> Bytes:
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.shape != (count, width):
        raise RemoteProtocolError(f"not {count} {what} of {width} bytes")
    if len({row.tobytes() for row in value}) != count:
        raise RemoteProtocolError(f"{what} that are not all different")
    return value


def _rows(rows: Sequence[bytes], width: int) -> Bytes:
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(rows), width)
