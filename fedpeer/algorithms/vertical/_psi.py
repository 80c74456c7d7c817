"""What the participants of an alignment say to each other: sizes and nonces, then one of two protocols, in blocks.

Both protocols tell the guest which of its ids all hosts have, and the hosts nothing; align.py tells them the result.

Rules
* Sizes are said before nonces: nobody chooses its list when it knows the session.
* Everything before the loop over blocks is computed again after a restart, from the same answers and the same chance.
* What was received is checked before it is used, and an error names who sent it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedpeer.crypto import Secret, edwards_scalar
from fedpeer.errors import DataError, RemoteProtocolError
from fedpeer.peers import Peers
from fedpeer.secure import bins, ids, psi, transfer
from fedpeer.secure.ids import Bytes, Digests, Ids

NONCE_BYTES = 32
BLOCK = 1 << 16
"""points of a turn: 2 MiB, and some seconds"""
BINS = 1 << 19
"""bins of a turn: 32 MiB"""
CHUNK = 512
"""points that one call of a mapped function works on"""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Opening:
    """What all know when the protocol begins."""

    session: bytes
    sizes: dict[str, int]
    """the padded number of ids of each participant that I hear of, mine too"""
    transfers: bool
    """whether it is the one by oblivious transfer"""


async def opened(peers: Peers, own: Ids, max_ids: int, wanted: str) -> Opening:
    """Sizes and nonces. `wanted`: auto, ecdh or kkrt; the last is taken if both of two participants are for it.

    Raises DataError if the own list is too long for the protocol, or "kkrt" cannot be.
    """
    accepts = wanted != "ecdh" and len(peers.all) == 2 and peers.semi_honest.issuperset(peers.others)
    if wanted == "kkrt" and not accepts:
        raise DataError(
            'psi = "kkrt" is for two participants who take each other to follow the protocol',
            hint='both policies name the other in trust_semi_honest, and the contract\'s rules say profile = "crash"',
        )
    if not accepts:
        _check_fits(own)
    guest, size = peers.role == "guest", psi.padded(len(own))
    hosts = peers.having("host") if guest else []
    await peers.broadcast("guest_size" if guest else "host_size", [size, accepts], role="host" if guest else "guest")
    others = hosts if guest else peers.having("guest")
    said = {
        alias: from_(alias, _check_opening, await peers.receive(alias, "host_size" if guest else "guest_size"), max_ids)
        for alias in others
    }
    transfers = accepts and all(accepted for _, accepted in said.values())
    if wanted == "kkrt" and not transfers:
        raise RemoteProtocolError(f'{others[0]} does not take part in psi = "kkrt"', peer=others[0])
    if not transfers:
        _check_fits(own)
        for alias, (theirs, _) in said.items():
            from_(alias, psi.check_size, theirs, psi.MAX_IDS)
    sizes = {alias: theirs for alias, (theirs, _) in said.items()}
    return Opening(await _session(peers), {**sizes, peers.me: size}, transfers)


def _check_fits(own: Ids) -> None:
    if len(own) > psi.MAX_IDS:
        raise DataError(
            f'the table has {len(own)} ids; psi = "ecdh" aligns up to {psi.MAX_IDS} a participant',
            hint="more, and faster, goes with a partner whom both policies name in trust_semi_honest",
        )


def _check_opening(value: Any, max_ids: int) -> tuple[int, bool]:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], bool):
        raise RemoteProtocolError(f"not a padded number of at most {max_ids} ids")
    return psi.check_size(value[0], max_ids), value[1]


async def _session(peers: Peers) -> bytes:
    """The key of all hashes, of everybody's nonce."""
    if peers.role == "guest":
        nonces = await peers.gather("host", "host_nonce")
        nonces[peers.me] = peers.random.bytes(NONCE_BYTES)
        nonces = {alias: from_(alias, _check_nonce, nonces[alias]) for alias in peers.all}
        await peers.broadcast("nonces", list(nonces.values()))
        return psi.session_key(nonces)
    (guest,) = peers.having("guest")
    nonce = peers.random.bytes(NONCE_BYTES)
    await peers.send(guest, "host_nonce", nonce)
    nonces = from_(guest, _check_nonces, await peers.receive(guest, "nonces"), peers.all)
    if nonces[peers.me] != nonce:
        raise RemoteProtocolError(f"{guest} sent a list without my nonce", peer=guest)
    return psi.session_key(nonces)


# by points of a curve


async def points_guest(peers: Peers, opening: Opening, own: Ids) -> Mask:
    """Which of my ids all hosts have; of the length of my padded list. (Or how many: points_host, `count_only`.)"""
    hosts, size = peers.having("host"), opening.sizes[peers.me]
    scalars = {host: Secret(peers.random.bytes(psi.POINT_BYTES)) for host in hosts}
    order = peers.random.permutation(size)
    empty = np.zeros((0, psi.TAG_BYTES), np.uint8)
    kept: dict[str, Any] = {f"{what} {host}": empty for host in hosts for what in ("held", "answers")}
    turns = _blocks(max(opening.sizes.values()))
    for turn in peers.rounds(turns, shared={}, own=kept):
        places = order[turn * BLOCK : (turn + 1) * BLOCK]
        mine = _points(peers, opening.session, own, places)
        shuffled = {host: peers.random.permutation(len(places)) for host in hosts}
        for host in hosts if len(places) else ():
            await peers.send(host, "guest_points", _raised(peers, scalars[host], mine[shuffled[host]]))
        for host in hosts:
            if count := _in_block(opening.sizes[host], turn):
                theirs = from_(host, psi.check_points, await peers.receive(host, "host_points"), count)
                twice = from_(host, _raised, peers, scalars[host], theirs)
                tags = psi.tags(opening.session, host.encode(), twice)
                kept[f"held {host}"] = np.concatenate([kept[f"held {host}"], tags])
            if len(places):
                answers = np.empty((len(places), psi.TAG_BYTES), np.uint8)
                answers[shuffled[host]] = from_(host, psi.check_tags, await peers.receive(host, "tags"), len(places))
                kept[f"answers {host}"] = np.concatenate([kept[f"answers {host}"], answers])
        peers.progress(turn + 1, turns + 1)
    common = np.ones(size, bool)
    for host in hosts:
        for what, rows in (("points", kept[f"held {host}"]), ("tags", kept[f"answers {host}"])):
            if not ids.all_different(rows):
                raise RemoteProtocolError(f"{host} sent {what} that are not all different", peer=host)
        common[order] &= ids.places_in(kept[f"held {host}"], kept[f"answers {host}"]) >= 0
    return common


async def points_host(peers: Peers, opening: Opening, own: Ids, *, count_only: bool = False) -> None:
    """Answer the guest; `count_only`: in random order, so that it learns how many and not which."""
    (guest,), size = peers.having("guest"), opening.sizes[peers.me]
    scalar, order = Secret(peers.random.bytes(psi.POINT_BYTES)), peers.random.permutation(size)
    guest_size = opening.sizes[guest]
    turns = _blocks(max(opening.sizes.values()))
    for turn in peers.rounds(turns, shared={}):
        places = order[turn * BLOCK : (turn + 1) * BLOCK]
        if len(places):
            mine = _points(peers, opening.session, own, places)
            await peers.send(guest, "host_points", _raised(peers, scalar, mine))
        if count := _in_block(guest_size, turn):
            theirs = from_(guest, psi.check_points, await peers.receive(guest, "guest_points"), count)
            twice = from_(guest, _raised, peers, scalar, theirs)
            tags = psi.tags(opening.session, peers.me.encode(), twice)
            await peers.send(guest, "tags", tags[peers.random.permutation(count)] if count_only else tags)
        peers.progress(turn + 1, turns + 1)


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _in_block(size: int, turn: int) -> int:
    """How many of `size` points are in the block of a turn."""
    return max(0, min(BLOCK, size - turn * BLOCK))


def _points(peers: Peers, session: bytes, own: Ids, places: npt.NDArray[np.int64]) -> Bytes:
    """The points of the ids at these places, and random ones where a place is beyond the last id."""
    uniform = np.frombuffer(peers.random.bytes(len(places) * psi.UNIFORM_BYTES), np.uint8)
    uniform = uniform.reshape(-1, psi.UNIFORM_BYTES).copy()
    real = places < len(own)
    uniform[real] = psi.uniform_of(session, own.values.take(places[real]).to_numpy(zero_copy_only=False))
    return _mapped(peers, psi.points, uniform)


def _raised(peers: Peers, scalar: Secret, points: Bytes) -> Bytes:
    return _mapped(peers, lambda chunk: psi.raised(scalar, chunk), points)


def _mapped(peers: Peers, function: Callable[[Bytes], Bytes], rows: Bytes) -> Bytes:
    parts = peers.map(function, [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)])
    return np.concatenate(parts) if parts else np.zeros((0, psi.POINT_BYTES), np.uint8)


# by oblivious transfer


async def transfer_guest(peers: Peers, opening: Opening, hashed: Digests) -> Mask:
    """Which of my ids the host has, shape (n,)."""
    (host,), session, count = peers.others, opening.session, bins.count(opening.sizes[peers.me])
    a = Secret(edwards_scalar(peers.random.bytes(transfer.SCALAR_BYTES)))
    await peers.send(host, "offer", transfer.offer(a))
    keys = transfer.keys_of(session, a, from_(host, transfer.check_choices, await peers.receive(host, "choices")))
    function = transfer.Function(session)
    held, which = bins.table(bins.of(hashed.blocks, count), count, lambda many: peers.random.integers(1, 3, many))
    kept: dict[str, Any] = {"tags": np.zeros((0, transfer.TAG_BYTES), np.uint8)}
    turns = -(-count // BINS)
    for turn in peers.rounds(turns, shared={}, own=kept):
        first = turn * BINS
        part = held[first : first + BINS]
        inputs = np.frombuffer(peers.random.bytes(16 * len(part)), np.uint64).reshape(-1, 2).copy()
        full = np.flatnonzero(part >= 0)
        inputs[full] = hashed.blocks.take(part[full], axis=0)
        u, t0 = transfer.masked(keys, first, function.codewords(inputs))
        await peers.send(host, "rows", u)
        tags = function.tags(t0.take(full, axis=0), first + full, which[part[full]])
        kept["tags"] = np.concatenate([kept["tags"], tags])
        peers.progress(turn + 1, turns + 1)
    common, found = np.zeros(len(hashed.names), bool), held[held >= 0]
    for k in range(3):
        theirs = from_(host, transfer.check_list, await peers.receive(host, "list"), opening.sizes[host])
        mine = which[found] == k
        common[found[mine]] = ids.places_in(theirs, kept["tags"].compress(mine, axis=0)) >= 0
    return common


async def transfer_host(peers: Peers, opening: Opening, hashed: Digests) -> None:
    """Let the guest evaluate the function at its ids, and send it the values at mine."""
    (guest,), session, size = peers.others, opening.session, opening.sizes[peers.me]
    count = bins.count(opening.sizes[guest])
    offered = from_(guest, transfer.check_offer, await peers.receive(guest, "offer"))
    s = Secret(peers.random.bytes(transfer.ROW_BYTES))
    scalars = Secret(peers.random.bytes(transfer.WIDTH * transfer.SCALAR_BYTES))
    chosen, keys = from_(guest, transfer.choose, session, offered, s, scalars)
    await peers.send(guest, "choices", chosen)
    function, places = transfer.Function(session), bins.of(hashed.blocks, count)
    empty = np.zeros((0, transfer.TAG_BYTES), np.uint8)
    kept: dict[str, Any] = {str(k): empty for k in range(3)}
    turns = -(-count // BINS)
    for turn in peers.rounds(turns, shared={}, own=kept):
        first, many = turn * BINS, min(BINS, count - turn * BINS)
        u = from_(guest, transfer.check_masked, await peers.receive(guest, "rows"), many)
        q = transfer.unmasked(keys, s, first, u)
        for k in range(3):
            here = np.flatnonzero((places[k] >= first) & (places[k] < first + many))
            tags = function.tags_of(q, s, hashed.blocks.take(here, axis=0), places[k][here], first, k)
            kept[str(k)] = np.concatenate([kept[str(k)], tags])
        peers.progress(turn + 1, turns + 1)
    for k in range(3):
        filling = peers.random.bytes((size - len(hashed.names)) * transfer.TAG_BYTES)
        tags = np.concatenate([kept[str(k)], np.frombuffer(filling, np.uint8).reshape(-1, transfer.TAG_BYTES)])
        await peers.send(guest, "list", tags.take(ids.ascending(tags), axis=0))


# what was received


def from_(sender: str, function: Callable[..., Any], *given: Any) -> Any:
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
