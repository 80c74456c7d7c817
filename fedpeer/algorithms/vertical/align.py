"""Alignment: which rows of all participants belong to the same entity, by private set intersection of their ids."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from fedpeer.algorithms.vertical._psi import (
    BINS,
    BLOCK,
    from_,
    opened,
    points_guest,
    points_host,
    transfer_guest,
    transfer_host,
)
from fedpeer.errors import DataError, RemoteProtocolError
from fedpeer.peers import Peers
from fedpeer.secure import ids, psi, transfer
from fedpeer.secure.ids import NAME_BYTES, Form, Ids
from fedpeer.stage import MAX_PEERS, Open, Params, Report, Rows, Sealed, Table, at_least, exactly, stage

Numbers = npt.NDArray[np.int64]

MAX_IDS = 1 << 24
"""of a participant, by oblivious transfer"""
MAX_COUNTED = BLOCK
HEADER = 256
"""More than the description of an array or a number takes in a message."""


class _Named(Params, frozen=True):
    casefold: bool = False
    """Whether ids that differ only between upper and lower case are the same."""
    form: Form = "text"
    """What is compared of the id column: text, digits, integer or phone (secure/ids.py)."""
    also: Annotated[dict[str, Form], msgspec.Meta(max_length=7)] = {}  # noqa: RUF012 - msgspec copies it
    """More columns that belong to an id, of the same names at all, and what is compared of them."""
    min_intersection: Annotated[int, msgspec.Meta(ge=0, le=MAX_IDS)] = 100
    """With fewer common ids the stage fails as too small, and says no number. The hosts get no result; what the guest
    computes with knows the common ids by then."""


class Align(_Named, frozen=True):
    max_ids: Annotated[int, msgspec.Meta(ge=1, le=MAX_IDS)] = 10_000
    """Nobody may ask about more ids, but for rounding up: a longer list is refused before it is answered."""
    repeated: bool = False
    """Whether the guest may have an id in several rows. Then hosts are told in how many each common id is."""
    psi: Literal["auto", "ecdh", "kkrt"] = "auto"
    """kkrt is 20 times faster, for two who take each other to follow the protocol: a guest that does not may learn all
    of the host's ids that it can guess. auto: kkrt where the contract's profile is "crash" and both policies name the
    other in trust_semi_honest, else ecdh."""


class Count(_Named, frozen=True):
    max_ids: Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNTED)] = 10_000
    """As for `run`; at most 65,536, which are answered at once, or parts of the number would show."""


_OPENING: dict[str, Any] = {
    f"{role}_size": Open(
        role,
        other,
        f"how many ids {whose} has, rounded up to 1, 1.25, 1.5 or 1.75 times a power of two, and whether its policy "
        "and the contract take the other to follow the protocol",
        max_bytes=HEADER,
    )
    for role, other, whose in (("guest", "host", "the guest"), ("host", "guest", "this host"))
} | {
    "host_nonce": Open("host", "guest", "random bytes", max_bytes=HEADER),
    "nonces": Open("guest", "host", "random bytes of each participant", max_bytes=HEADER + 64 * MAX_PEERS),
    "guest_points": Sealed(
        "guest",
        "host",
        "the guest's ids and random ones, in random order, as points of a curve raised to a secret that is used "
        "for this host and this run alone",
        max_bytes=HEADER + BLOCK * psi.POINT_BYTES,
    ),
    "host_points": Sealed(
        "host",
        "guest",
        "this host's ids and random ones, in random order, as points of a curve raised to a secret that is used "
        "for this run alone",
        max_bytes=HEADER + BLOCK * psi.POINT_BYTES,
    ),
}


@stage(
    version=2,
    params=Align,
    roles={"guest": exactly(1), "host": at_least(1)},
    inputs={"table": Table},
    outputs={"rows": Rows},
    messages={
        **_OPENING,
        "tags": Open(
            "host",
            "guest",
            "which of its own ids the guest has in common with this host, and nothing of any other id. With several "
            "hosts it learns this of each one by itself, which is more than which ids are common to all",
            max_bytes=HEADER + BLOCK * psi.TAG_BYTES,
        ),
        "offer": Sealed("guest", "host", "a random point, for kkrt", max_bytes=HEADER),
        "choices": Sealed(
            "host", "guest", "512 random points, for kkrt", max_bytes=HEADER + transfer.WIDTH * transfer.POINT_BYTES
        ),
        "rows": Sealed(
            "guest",
            "host",
            "the guest's ids and random ones, for kkrt, under a one-time pad of which the host has half",
            max_bytes=HEADER + BINS * transfer.ROW_BYTES,
        ),
        "list": Open(
            "host",
            "guest",
            "for kkrt: which of its own ids the guest has in common with this host, and nothing of any other id, if "
            "the guest follows the protocol. A guest that deviates may learn all ids of the host that it can guess",
            per_turn=3,
            max_bytes=HEADER + psi.padded(MAX_IDS) * transfer.TAG_BYTES,
        ),
        "result": Open(
            "guest",
            "host",
            "which of its own ids are common to all participants; nothing of any id that it does not have, nor who has "
            "those that are not common to all",
            max_bytes=HEADER + MAX_IDS * NAME_BYTES,
        ),
        "repeats": Open(
            "guest",
            "host",
            "in how many rows of the guest each common id is, where the guest may repeat ids",
            max_bytes=HEADER + MAX_IDS * 4,
        ),
    },
    memory=lambda params, rows, features: 160 * rows + (400 << 20 if params.max_ids > BLOCK else 0),
)
async def run(peers: Peers, params: Align, table: Table) -> dict[str, Any]:
    """The rows whose ids all participants have: `rows.index[i]` is the same entity at each of them.

    ```
    from → to       message        content                                                        shape
    guest ↔ hosts   guest_size …   padded number of ids, whether kkrt is accepted                 2
    host → guest    host_nonce     random                                                         32 bytes
    guest → hosts   nonces         random, of all: they make the session key                      parties × 32
                    ecdh, in each block of 65,536
    guest → host    guest_points   H(x)^a, shuffled, filled up; another a for each host           guest's size × 32
    host → guest    host_points    H(y)^b, shuffled, filled up                                    host's size × 32
    host → guest    tags           BLAKE2b-128(H(x)^ab), in the order of guest_points             guest's size × 16
                    kkrt
    guest → host    offer          A = a·G                                                        32 bytes
    host → guest    choices        B_i = b_i·G + s_i·A                                            512 × 32
    guest → host    rows           U, in blocks of 2^19 bins; bins = 1.31 · guest's size          bins × 64
    host → guest    list           three times: tags of all ids for their k-th bin, filled up,    host's size × 12
                                   sorted
                    both
    guest → hosts   result         BLAKE2b-128 of each common id under the session key, sorted    common × 16
    guest → hosts   repeats        rows of the guest with each common id, if `repeated`           common
    ```
    All lengths but those of the last two follow from the padded sizes. No position in anybody's table leaves. The order
    of the common rows is that of a hash of the id under the session key; rows of one id keep the guest's order.

    Ids are text, compared in a declared normal form (secure/ids.py); `also` adds columns to them. A row without an id
    is left out. A host's ids are unique. By ecdh a participant has up to 2^20 ids, by kkrt up to 2^24.

    What each learns is said with the messages, for participants that follow the protocol. In ecdh one that does not can
    ask about ids that it made up, at most `max_ids` in a run (rounded up; 1.31 times as many by kkrt), and can spoil
    the result; of ids that it does not submit it learns nothing either. In kkrt a guest that deviates may learn all ids
    of the host that it can guess. `min_intersection` ends the stage after the guest knows the common ids, and before
    the hosts do.
    With several hosts the guest intersects with each of them by itself, by ecdh: a protocol that tells it the
    intersection of all and no pairwise one is to come.

    Source: private set intersection by commutative exponentiation (secure/psi.py), and by an oblivious function of
    Kolesnikov et al. (secure/transfer.py), with cuckoo hashing (secure/bins.py); semi-honest.
    """
    own = _own(table, params, params.max_ids, repeated=params.repeated and peers.role == "guest")
    opening = await opened(peers, own, params.max_ids, params.psi)
    hashed = ids.digests(opening.session, own.values)
    if peers.role == "guest":
        if opening.transfers:
            common = await transfer_guest(peers, opening, hashed)
        else:
            common = await points_guest(peers, opening, own)
        found = np.flatnonzero(common[: len(own)])
        _check_common(len(found), params)
        found = found[ids.ascending(hashed.names[found])]
        repeats = np.bincount(own.id_of, minlength=len(own))[found]
        await peers.broadcast("result", hashed.names[found])
        if params.repeated:
            await peers.broadcast("repeats", repeats.astype(np.uint32))
    else:
        if opening.transfers:
            await transfer_host(peers, opening, hashed)
        else:
            await points_host(peers, opening, own)
        found, repeats = await _told(peers, params, hashed.names, min(*opening.sizes.values(), len(own)))
    order = ids.ascending(hashed.order[found])
    chosen = _rows(own, found[order], repeats[order])
    peers.progress(1, 1, ids=len(own), without_id=own.left_out, common=len(found))
    return {"rows": Rows(chosen)}


async def _told(peers: Peers, params: Align, names: ids.Bytes, most: int) -> tuple[Numbers, Numbers]:
    """At a host: which of my ids are common, in the order of the result, and how many rows of the guest have each."""
    (guest,) = peers.having("guest")
    said = from_(guest, psi.check_result, await peers.receive(guest, "result"), most)
    found = ids.places_in(names, said)
    if (found < 0).any():
        raise RemoteProtocolError(f"{guest} sent a result that cannot be", peer=guest)
    _check_common(len(found), params)
    repeats = np.ones(len(found), np.int64)
    if params.repeated:
        repeats = from_(guest, _check_repeats, await peers.receive(guest, "repeats"), len(found))
    return found, repeats


def _rows(own: Ids, found: Numbers, repeats: Numbers) -> Numbers:
    """The rows of these ids: all rows of each (the guest's), or its one row as often as the guest has it."""
    if len(own.rows) == len(own):
        return np.repeat(own.rows[found], repeats)
    by_id = np.argsort(own.id_of, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(own.id_of, minlength=len(own)))])[:-1]
    within = np.arange(int(repeats.sum())) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    return own.rows[by_id[np.repeat(starts[found], repeats) + within]]


@stage(
    version=1,
    params=Count,
    roles={"guest": exactly(1), "host": exactly(1)},
    inputs={"table": Table},
    outputs={"report": Report},
    messages={
        **_OPENING,
        "tags": Open(
            "host",
            "guest",
            "how many of its own ids the guest has in common with this host, and not which",
            max_bytes=HEADER + BLOCK * psi.TAG_BYTES,
        ),
    },
)
async def count(peers: Peers, params: Count, table: Table) -> dict[str, Any]:
    """How many ids the guest and the host have in common: told to the guest, as {"common": …}; the host learns nothing.

    As `run` by ecdh, but that `tags` come in random order and that there is no result. A partner that submits made-up
    ids counts those: one of them, if it submits one. So it is bounded like an alignment.

    Source: as `run`, secure/psi.py; the shuffle makes it cardinality only (Huberman, Franklin, Hogg, 1999).
    """
    own = _own(table, params, params.max_ids, repeated=False)
    opening = await opened(peers, own, params.max_ids, "ecdh")
    if peers.role == "host":
        await points_host(peers, opening, own, count_only=True)
        return {"report": None}
    number = int((await points_guest(peers, opening, own)).sum())
    _check_common(number, params)
    return {"report": Report({"common": number})}


def _own(table: Table, params: _Named, max_ids: int, *, repeated: bool) -> Ids:
    """The ids of the own table. Raises DataError."""
    if table.id is None:
        raise DataError("the table has no id column", hint="fedpeer dataset add NAME URI --id COL")
    forms = {table.id: params.form, **dict(sorted(params.also.items()))}
    own = ids.ids_of(table, forms, params.casefold, repeated=repeated)
    if len(own) > max_ids:
        raise DataError(f"the table has {len(own)} ids, and max_ids = {max_ids}")
    return own


def _check_common(number: int, params: _Named) -> None:
    if number < params.min_intersection:
        raise DataError(
            f"too small: fewer than min_intersection = {params.min_intersection} ids are common to all participants",
            hint="are the ids of one kind, and written alike, at all participants?",
        )


def _check_repeats(value: Any, number: int) -> Numbers:
    if not isinstance(value, np.ndarray) or value.dtype != np.uint32 or value.shape != (number,) or not value.all():
        raise RemoteProtocolError(f"not {number} numbers of rows")
    return value.astype(np.int64)
