"""Alignment: which rows of all participants belong to the same entity, by private set intersection of their ids."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa

from fedpeer.crypto import Secret
from fedpeer.errors import DataError, RemoteProtocolError
from fedpeer.peers import Peers
from fedpeer.secure import psi
from fedpeer.secure.psi import MAX_PADDED, POINT_BYTES, TAG_BYTES, Bytes
from fedpeer.stage import MAX_PEERS, Open, Params, Rows, Sealed, Table, at_least, exactly, stage

NONCE_BYTES = 32
CHUNK = 512
"""Points that one call of a mapped function works on."""
HEADER = 256
"""More than the description of an array or a number takes in a message."""


class Align(Params, frozen=True):
    casefold: bool = False
    """Whether ids that differ only between upper and lower case are the same."""
    min_intersection: Annotated[int, msgspec.Meta(ge=0, le=psi.MAX_IDS)] = 100
    """With fewer common ids the stage fails as too small, and says no number. The hosts get no result; what the guest
    computes with knows the common ids by then."""
    max_ids: Annotated[int, msgspec.Meta(ge=1, le=psi.MAX_IDS)] = psi.MAX_IDS
    """Nobody may ask about more ids, but for rounding up: a longer list is refused before it is answered."""


@stage(
    version=1,
    params=Align,
    roles={"guest": exactly(1), "host": at_least(1)},
    inputs={"table": Table},
    outputs={"rows": Rows},
    messages={
        "guest_size": Open(
            "guest",
            "host",
            "how many ids the guest has, rounded up to 1, 1.25, 1.5 or 1.75 times a power of two",
            max_bytes=HEADER,
        ),
        "host_size": Open(
            "host",
            "guest",
            "how many ids this host has, rounded up to 1, 1.25, 1.5 or 1.75 times a power of two",
            max_bytes=HEADER,
        ),
        "host_nonce": Open("host", "guest", "random bytes", max_bytes=HEADER),
        "nonces": Open("guest", "host", "random bytes of each participant", max_bytes=HEADER + 64 * MAX_PEERS),
        "guest_points": Sealed(
            "guest",
            "host",
            "the guest's ids and random ones, in random order, as points of a curve raised to a secret that is used "
            "for this host and this run alone",
            max_bytes=HEADER + MAX_PADDED * POINT_BYTES,
        ),
        "host_points": Sealed(
            "host",
            "guest",
            "this host's ids and random ones, in random order, as points of a curve raised to a secret that is used "
            "for this run alone",
            max_bytes=HEADER + MAX_PADDED * POINT_BYTES,
        ),
        "tags": Open(
            "host",
            "guest",
            "which of its own ids the guest has in common with this host, and nothing of any other id. With several "
            "hosts it learns this of each one by itself, which is more than which ids are common to all",
            max_bytes=HEADER + MAX_PADDED * TAG_BYTES,
        ),
        "result": Open(
            "guest",
            "host",
            "which of its own ids are common to all participants; nothing of any id that it does not have, nor who has "
            "those that are not common to all",
            max_bytes=HEADER + psi.MAX_IDS * TAG_BYTES,
        ),
    },
)
async def run(peers: Peers, params: Align, table: Table) -> dict[str, Any]:
    """The rows whose ids all participants have: `rows.index[i]` is the same entity at each of them.

    ```
    from → to       message        content                                                        shape
    guest ↔ hosts   guest_size …   padded number of ids                                           1
    host → guest    host_nonce     random                                                         32 bytes
    guest → hosts   nonces         random, of all: they make the session key                      parties × 32
    guest → host    guest_points   H(x)^a, shuffled, filled up; another a for each host           guest's size × 32
    host → guest    host_points    H(y)^b, shuffled, filled up                                    host's size × 32
    host → guest    tags           BLAKE2b-128(H(x)^ab), in the order of guest_points             guest's size × 16
    guest → hosts   result         BLAKE2b-128 of each common id under the session key, sorted    common × 16
    ```
    All lengths but that of `result` follow from the two padded sizes. No position in anybody's table leaves. The order
    of the common rows is that of BLAKE2b-256 of the id under the session key.

    Ids are text, compared in normal form: Unicode NFKC, folded if `casefold`, without white space around them. A row
    with a missing or blank id is left out. An id that occurs twice is refused, as are more than 10,000 of them.

    What each learns is said with the messages, for participants that follow the protocol. One that does not can ask
    about ids that it made up, at most `max_ids` in a run, and can spoil the result; of ids that it does not submit it
    learns nothing either. `min_intersection` ends the stage after the guest knows the common ids, and before the hosts
    do.
    With several hosts the guest intersects with each of them by itself: a protocol that tells it the intersection of
    all and no pairwise one is to come.

    Source: private set intersection by commutative exponentiation (secure/psi.py), semi-honest; two parties, repeated.
    """
    ids, rows, left_out = _ids(table, params.casefold)
    if len(ids) > params.max_ids:
        raise DataError(f"the table has {len(ids)} ids, and max_ids = {params.max_ids}")
    party = _guest if peers.role == "guest" else _host
    session, common = await party(peers, params, ids)
    chosen = np.array([rows[i] for i in common], dtype=np.int64)
    order = psi.order_of(session, [ids[i] for i in common])
    peers.progress(3, 3, ids=len(ids), without_id=left_out, common=len(common))
    return {"rows": Rows(chosen[order])}


async def _guest(peers: Peers, params: Align, ids: list[str]) -> tuple[bytes, list[int]]:
    """The session key, and which of my ids (places in `ids`) all hosts have."""
    hosts, size = peers.having("host"), psi.padded(len(ids))
    await peers.broadcast("guest_size", size)
    sizes = {
        host: _from(host, psi.check_size, said, params.max_ids)
        for host, said in (await peers.gather("host", "host_size")).items()
    }
    nonces = await peers.gather("host", "host_nonce")
    nonces[peers.me] = peers.random.bytes(NONCE_BYTES)
    nonces = {alias: _from(alias, _check_nonce, nonces[alias]) for alias in peers.all}
    await peers.broadcast("nonces", list(nonces.values()))
    session = psi.session_key(nonces)

    points = _points(peers, session, ids, size)
    scalars = {host: Secret(peers.random.bytes(POINT_BYTES)) for host in hosts}
    orders = {host: peers.random.permutation(size) for host in hosts}
    for host in hosts:
        await peers.send(host, "guest_points", _raised(peers, scalars[host], points[orders[host]]))
    peers.progress(1, 3)

    common = set(range(len(ids)))
    for host in hosts:
        theirs = _from(host, psi.check_points, await peers.receive(host, "host_points"), sizes[host])
        answers = _from(host, psi.check_tags, await peers.receive(host, "tags"), size)
        twice = _from(host, _raised, peers, scalars[host], theirs)
        held = {tag.tobytes() for tag in psi.tags(session, host.encode(), twice)}
        common &= {int(i) for i, tag in zip(orders[host], answers, strict=True) if tag in held}
    peers.progress(2, 3)
    _check_common(len(common), params)
    found = sorted(common)
    await peers.broadcast("result", psi.result(psi.names_of(session, [ids[i] for i in found])))
    return session, found


async def _host(peers: Peers, params: Align, ids: list[str]) -> tuple[bytes, list[int]]:
    """The session key, and which of my ids (places in `ids`) all participants have."""
    (guest,), size = peers.having("guest"), psi.padded(len(ids))
    await peers.send(guest, "host_size", size)
    guest_size = _from(guest, psi.check_size, await peers.receive(guest, "guest_size"), params.max_ids)
    nonce = peers.random.bytes(NONCE_BYTES)
    await peers.send(guest, "host_nonce", nonce)
    nonces = _from(guest, _check_nonces, await peers.receive(guest, "nonces"), peers.all)
    if nonces[peers.me] != nonce:
        raise RemoteProtocolError(f"{guest} sent a list without my nonce", peer=guest)
    session = psi.session_key(nonces)

    points = _points(peers, session, ids, size)
    theirs = _from(guest, psi.check_points, await peers.receive(guest, "guest_points"), guest_size)
    scalar = Secret(peers.random.bytes(POINT_BYTES))  # after what it is used on: other points meet another one
    twice = _from(guest, _raised, peers, scalar, theirs)
    mine = _raised(peers, scalar, points[peers.random.permutation(size)])
    await peers.send(guest, "host_points", mine)
    await peers.send(guest, "tags", psi.tags(session, peers.me.encode(), twice))
    peers.progress(2, 3)

    names = _from(guest, psi.check_result, await peers.receive(guest, "result"), min(guest_size, len(ids)))
    place = {name: i for i, name in enumerate(psi.names_of(session, ids))}
    if not place.keys() >= set(names):
        raise RemoteProtocolError(f"{guest} sent a result that cannot be", peer=guest)
    _check_common(len(names), params)
    return session, [place[name] for name in names]


def _points(peers: Peers, session: bytes, ids: list[str], size: int) -> Bytes:
    """The points of my ids, then random ones, `size` together."""
    filling = np.frombuffer(peers.random.bytes((size - len(ids)) * psi.UNIFORM_BYTES), dtype=np.uint8)
    uniform = np.concatenate([psi.uniform_of(session, ids), filling.reshape(-1, psi.UNIFORM_BYTES)])
    return _mapped(peers, psi.points, uniform)


def _raised(peers: Peers, scalar: Secret, points: Bytes) -> Bytes:
    return _mapped(peers, lambda chunk: psi.raised(scalar, chunk), points)


def _mapped(peers: Peers, function: Callable[[Bytes], Bytes], rows: Bytes) -> Bytes:
    return np.concatenate(peers.map(function, [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]))


def _from(sender: str, function: Callable[..., Any], *given: Any) -> Any:
    """function(*given), whose error about what was received names the sender."""
    try:
        return function(*given)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"{sender} sent {error.message}", peer=sender) from None


def _check_nonce(value: Any) -> bytes:
    if not isinstance(value, bytes) or len(value) != NONCE_BYTES:
        raise RemoteProtocolError("no nonce")
    return value


def _check_nonces(value: Any, aliases: list[str]) -> dict[str, bytes]:
    if not isinstance(value, list) or len(value) != len(aliases):
        raise RemoteProtocolError(f"not {len(aliases)} nonces")
    return {alias: _check_nonce(nonce) for alias, nonce in zip(aliases, value, strict=True)}


def _check_common(count: int, params: Align) -> None:
    if count < params.min_intersection:
        raise DataError(
            f"too small: fewer than min_intersection = {params.min_intersection} ids are common to all participants",
            hint="are the ids of one kind, and written alike, at all participants?",
        )


# a participant's own ids


def normal_form(value: str, casefold: bool) -> str:
    """What ids are compared by: NFKC, case folded if wanted, no white space around it. "" for a blank one."""
    text = unicodedata.normalize("NFKC", value)
    if casefold:
        text = unicodedata.normalize("NFKC", text.casefold())
    return text.strip()


def _ids(table: Table, casefold: bool) -> tuple[list[str], list[int], int]:
    """The ids in normal form, the row of each, and how many rows have none. DataError for repeated or too many ids."""
    if table.id is None:
        raise DataError("the table has no id column", hint="fedpeer dataset add NAME URI --id COL")
    column = table.data.column(table.id)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise DataError(f"the id column {table.id!r} is {column.type}, not text")
    row_of: dict[str, int] = {}
    for row, value in enumerate(column.to_pylist()):
        name = normal_form(value, casefold) if value is not None else ""
        if not name:
            continue
        first = row_of.setdefault(name, row)
        if first != row:
            raise DataError(
                f"the id column {table.id!r} has one id, in normal form, in rows {first} and {row} (from 0)",
                hint="keep one row for each id",
            )
    if len(row_of) > psi.MAX_IDS:
        raise DataError(
            f"the id column {table.id!r} has {len(row_of)} ids; this version aligns up to {psi.MAX_IDS} a participant"
        )
    return list(row_of), list(row_of.values()), table.n_samples - len(row_of)
