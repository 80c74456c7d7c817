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
  has probability 2^-88.

Source: Meadows (1986); Huberman, Franklin, Hogg (1999); the map to the curve is a sum of two Elligator 2 points
(Bernstein, Hamburg, Krasnova, Lange, 2013; as in RFC 9380, hash_to_curve); RFC 7748 for X25519.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import gmpy2
import numpy as np
import numpy.typing as npt

from fedpeer import codec, crypto
from fedpeer.crypto import Secret, hash_, hash_rows
from fedpeer.errors import RemoteProtocolError, TrustError
from fedpeer.secure.ids import all_different, are_ascending

Bytes = npt.NDArray[np.uint8]
"""Rows of equal length: points, tags or hashes, shape (n, 32) or (n, 16)."""

MAX_IDS: Final = 1 << 20
"""of a party: each side takes 0.1 s of a core for a thousand ids"""
PRIME: Final = 2**255 - 19
POINT_BYTES: Final = 32
UNIFORM_BYTES: Final = 64
"""Of what is mapped to the curve: the hash of an id, or as many random bytes to fill up."""
TAG_BYTES: Final = 16


def padded(count: int) -> int:
    """The least of 2^k, 1.25·2^k, 1.5·2^k and 1.75·2^k, k ≥ 2, that is not below `count`."""
    shift = max(count - 1, 4).bit_length() - 3
    return max(-(-count >> shift) << shift, 4)


def session_key(nonces: Mapping[str, bytes]) -> bytes:
    """The key of every hash of a run: of all participants' nonces by alias, in the contract's order."""
    return hash_("fp.psi.session", codec.encode([[alias, nonce] for alias, nonce in nonces.items()]))


def uniform_of(session: bytes, ids: Iterable[bytes]) -> Bytes:
    """What `points` maps to the curve: 64 bytes for each id (in normal form)."""
    return _rows(hash_rows("fp.psi1", ids, key=session, size=UNIFORM_BYTES), UNIFORM_BYTES)


# points


def points(uniform: Bytes) -> Bytes:
    """Points of the main subgroup as X25519 takes them, from (n, 64) uniform bytes; uniform themselves."""
    halves = [(row[:32].tobytes(), row[32:].tobytes()) for row in uniform]
    edwards = [crypto.edwards_add(crypto.edwards_from_uniform(a), crypto.edwards_from_uniform(b)) for a, b in halves]
    return _rows(b"".join([_coordinate(point) for point in edwards]), POINT_BYTES)


def _coordinate(edwards: bytes) -> bytes:
    """The Montgomery u = (1 + y) / (1 - y) of a point; 37 times faster than where its subgroup is checked as well."""
    y = int.from_bytes(edwards, "little") & (2**255 - 1)
    return int((1 + y) * gmpy2.invert(1 - y, PRIME) % PRIME).to_bytes(POINT_BYTES, "little")


def raised(scalar: Secret, base: Bytes) -> Bytes:
    """Each point multiplied by the clamped scalar. Raises RemoteProtocolError for one of low order."""
    key = scalar.reveal()
    try:
        return _rows(b"".join([crypto.x25519(key, row.tobytes()) for row in base]), POINT_BYTES)
    except TrustError:
        raise RemoteProtocolError("a point of low order") from None


def tags(session: bytes, direction: bytes, twice_raised: Bytes) -> Bytes:
    """A tag for each point that both have raised, shape (n, 16): it is compared, the point itself never leaves."""
    key = hash_("fp.psi.tags", direction, key=session)
    return _rows(hash_rows("fp.psi.tag", map(bytes, twice_raised), key=key, size=TAG_BYTES), TAG_BYTES)


# what others send; all raise RemoteProtocolError


def check_size(value: Any, most: int) -> int:
    """A number of points that a party may announce, if it has `most` ids at most."""
    if type(value) is not int or not 0 < value <= padded(most) or padded(value) != value:
        raise RemoteProtocolError(f"not a padded number of at most {most} ids")
    return value


def check_points(value: Any, count: int) -> Bytes:
    """`count` points: canonical coordinates, all different. Those of low order are found when they are raised."""
    found = check_rows(value, count, POINT_BYTES, "points")
    if any(int.from_bytes(row.tobytes(), "little") >= PRIME for row in found[found[:, -1] >= PRIME >> 248]):
        raise RemoteProtocolError("points that are not in canonical form")
    return found


def check_tags(value: Any, count: int) -> Bytes:
    """`count` tags, all different, in the order of the points they answer."""
    return check_rows(value, count, TAG_BYTES, "tags")


def check_result(value: Any, most: int) -> Bytes:
    """At most `most` hashes of ids, ascending, all different."""
    if not isinstance(value, np.ndarray) or value.ndim != 2 or len(value) > most:
        raise RemoteProtocolError("not a result")
    if not are_ascending(check_rows(value, len(value), TAG_BYTES, "hashes")):
        raise RemoteProtocolError("a result that is not sorted")
    return value


def check_rows(value: Any, count: int, width: int, what: str) -> Bytes:
    """So many rows of so many bytes, all different."""
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.shape != (count, width):
        raise RemoteProtocolError(f"not {count} {what} of {width} bytes")
    if not all_different(value):
        raise RemoteProtocolError(f"{what} that are not all different")
    return value


def _rows(joined: bytes, width: int) -> Bytes:
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, width)
