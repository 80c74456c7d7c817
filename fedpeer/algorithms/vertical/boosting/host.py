"""Boosted trees at a host, who has features only."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedpeer.algorithms.vertical.boosting import route
from fedpeer.algorithms.vertical.boosting.guest import records
from fedpeer.algorithms.vertical.boosting.params import (
    ALGORITHM,
    ALIGN,
    MAX_FEATURES,
    Fit,
    bins_of,
    drawn_of,
    how_many,
    pairs_of,
    refuse,
    turns,
)
from fedpeer.errors import DataError, RemoteProtocolError
from fedpeer.peers import Peers
from fedpeer.secure import paillier
from fedpeer.secure.forest import OWN, importance
from fedpeer.secure.packing import readable
from fedpeer.secure.paillier import Ciphertexts, Stranger, spread
from fedpeer.secure.trees import MIN_ROWS, Bools, Floats, Ints, candidates, histograms, left_of, offered
from fedpeer.stage import Model, Table


async def fit(peers: Peers, params: Fit, table: Table, earlier: Model | None = None) -> Model:
    """The host's part of the model: its own splits. `earlier`: what it goes on from."""
    (guest,), rows, columns = peers.having("guest"), table.n_samples, table.features
    if table.label is not None:
        raise DataError(f"the table has a label, {table.label!r}, and it is the guest that has one")
    if not 0 < len(columns) <= MAX_FEATURES:
        raise DataError(f"the table has {len(columns)} feature columns; a host has 1 to {MAX_FEATURES}")
    bins, ends = bins_of(table, columns, params.max_bin)
    if earlier is not None:
        await route.answer(peers, earlier, table)
    await peers.send(guest, "shape", [rows, how_many(params, len(columns))])
    forest, place = _check_start(guest, await peers.receive(guest, "start"), rows, earlier, columns)

    public = paillier.key_of(peers, guest)
    pairs = pairs_of(params, public, rows)
    per_node = how_many(params, len(columns)) * (params.max_bin - 1) * 2
    stranger = Stranger(public, peers.random, turns(params) * pairs.ciphertexts(per_node))
    none = np.zeros((0, public.width), np.uint8)
    state: dict[str, Any] = {
        "level": 0,
        "gradients": none,
        "features": np.zeros(0, np.int64),
        "node": np.zeros(rows, np.int16),
        "histograms": none,
        **{name: earlier.arrays[name].tolist() if earlier else [] for name in OWN},
    }
    prepared: Ciphertexts | None = None
    for _ in peers.rounds(turns(params), shared={}, own=state):
        said = await peers.receive(guest, "nodes")
        if said is None:
            break
        node = _check_nodes(guest, said, state["node"], 0 < state["level"] < params.max_depth)
        if not len(said):
            array = await peers.receive(guest, "gradients")
            prepared = _ciphertexts(guest, public, array, rows).prepare()
            state |= {"level": 0, "gradients": array, "features": drawn_of(peers, params, len(columns))}
        elif prepared is None:
            prepared = _ciphertexts(guest, public, state["gradients"], rows).prepare()
        chosen = bins[state["features"]]
        above = _by_node(public, state["histograms"], len(chosen) * (params.max_bin + 1)) if len(said) else []
        sums = histograms(peers, prepared, chosen, node, state["node"], above, params.max_bin)
        allowed = [_offered(chosen[:, node == place], params.max_bin) for place in range(len(sums))]
        orders = [peers.random.permutation(per_node) for _ in sums]
        shuffled = [
            candidates(histogram, may, params.max_bin)[order]
            for histogram, may, order in zip(sums, allowed, orders, strict=True)
        ]
        size = pairs.slots.count
        chunks = [each[at : at + size] for each in shuffled for at in range(0, per_node, size)]
        packed = spread(peers, public, lambda chunk: readable(chunk, pairs.slots, stranger, peers.random), chunks)
        await peers.send(guest, "sums", packed.to_array())

        wanted = _check_splits(guest, await peers.receive(guest, "splits"), orders, allowed)
        goes: list[Bools] = []
        for at, split in enumerate(wanted):
            if split is not None:
                number, t, side = split
                feature = int(state["features"][number])
                state["feature"].append(feature)
                state["threshold"].append(float(ends[feature, t]))
                state["missing_left"].append(bool(side))
                goes.append(left_of(bins[feature, node == at], t, bool(side), params.max_bin))
        if goes:
            await peers.send(guest, "left", np.concatenate(goes))
        state |= {"node": node, "level": state["level"] + 1, "histograms": Ciphertexts.concatenate(sums).to_array()}

    gains = _check_gains(guest, await peers.receive(guest, "gains"), len(state["feature"]))
    own = records(state, len(gains))
    facts = {
        "forest": forest,
        "place": place,
        "max_depth": params.max_depth,
        "n_samples": rows,
        "columns": columns,
        "importance": importance(columns, own["feature"], gains),
    }
    return Model(ALGORITHM, facts, own)


def _ciphertexts(guest: str, public: paillier.PublicKey, array: Any, count: int) -> Ciphertexts:
    try:
        return Ciphertexts.from_array(public, array, count)
    except RemoteProtocolError as error:
        refuse(guest, error.message)


def _by_node(public: paillier.PublicKey, array: npt.NDArray[np.uint8], size: int) -> list[Ciphertexts]:
    whole = Ciphertexts.from_array(public, array, len(array))
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def _offered(bins: Ints, max_bin: int) -> Bools:
    """(features, max_bin - 1, 2)"""
    return np.array([offered(np.bincount(column, minlength=max_bin + 1)) for column in bins])


def _check_start(guest: str, said: Any, rows: int, earlier: Model | None, columns: list[str]) -> tuple[str, int]:
    match said:
        case [int(theirs), str(forest), int(place)] if len(forest) == 32:
            if theirs != rows:
                raise DataError(f"{guest} has {theirs} rows, and here are {rows}", hint=ALIGN)
            if earlier is not None:
                if (forest, place) != (earlier.facts["forest"], earlier.facts["place"]):
                    refuse(guest, "another model, or another place in it")
                if earlier.facts["columns"] != columns:
                    raise DataError("the model that is to be gone on with was trained on other columns")
            return forest, place
    refuse(guest, "no number of rows, model and place")


def _check_nodes(guest: str, said: Any, before: Ints, inside: bool) -> Ints:
    """Of each row its place among the nodes of this level, or -1: all are in the root, or in children of nodes before.

    A child and its sibling have MIN_ROWS rows each; together they are their parent.
    """
    if not isinstance(said, np.ndarray) or said.dtype != np.int16:
        refuse(guest, "no nodes")
    if said.shape == (0,):
        return np.zeros(len(before), np.int16)
    if not inside or said.shape != before.shape or said.min() < -1 or said.max() < 0:
        refuse(guest, "nodes that cannot be")
    children: dict[int, int] = {}
    for place in range(int(said.max()) + 1):
        parents = np.unique(before[said == place])
        if len(parents) != 1 or parents[0] < 0:
            refuse(guest, "a node that is empty, or no part of a node before")
        parent = int(parents[0])
        rows, whole = int((said == place).sum()), int((before == parent).sum())
        if not MIN_ROWS <= rows <= whole - MIN_ROWS or children.get(parent, whole - rows) != whole - rows:
            refuse(guest, f"a node that has, or leaves of the node before, fewer than {MIN_ROWS} rows")
        children[parent] = rows
    return said


def _check_splits(guest: str, said: Any, orders: list[Ints], allowed: list[Bools]) -> list[tuple[int, int, int] | None]:
    """Of each node the first of those that are equally good (feature, bin, side); None if it is not split here."""
    if not isinstance(said, list) or len(said) != len(orders):
        refuse(guest, f"not the best splits of {len(orders)} nodes")
    found: list[tuple[int, int, int] | None] = []
    for places, order, may in zip(said, orders, allowed, strict=True):
        if not isinstance(places, np.ndarray) or places.dtype != np.int64 or places.ndim != 1:
            refuse(guest, "no places of splits")
        if len(places) and not (int(places.min()) >= 0 and int(places.max()) < len(order)):
            refuse(guest, "a split that does not exist")
        if not may.ravel()[order[places]].all():
            refuse(guest, "a split that was not offered")
        first = np.unravel_index(int(order[places].min()), may.shape) if len(places) else None
        found.append(None if first is None else (int(first[0]), int(first[1]), int(first[2])))
    return found


def _check_gains(guest: str, said: Any, most: int) -> Floats:
    if not isinstance(said, np.ndarray) or said.dtype != np.float64 or said.ndim != 1 or len(said) > most:
        refuse(guest, "no gains of the splits")
    if not np.isfinite(said).all():
        refuse(guest, "a gain that is not finite")
    return said
