"""Boosted trees at the guest, who has the label."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedpeer.algorithms.horizontal.statistics import numbers
from fedpeer.algorithms.vertical.boosting import route
from fedpeer.algorithms.vertical.boosting.params import (
    ALGORITHM,
    ALIGN,
    MAX_FEATURES,
    Fit,
    bins_of,
    drawn_of,
    pairs_of,
    refuse,
    turns,
)
from fedpeer.errors import DataError, RemoteProtocolError
from fedpeer.peers import Peers
from fedpeer.secure import paillier
from fedpeer.secure.forest import FOREST, GUEST, LEAF, OWN, Best, Growing, empty, gains_of, importance, margins
from fedpeer.secure.losses import Loss
from fedpeer.secure.paillier import Ciphertexts, Owner, PrivateKey, spread
from fedpeer.secure.trees import MIN_ROWS, Bools, Floats, Ints, Pairs, Rules, Sums
from fedpeer.stage import Model, Table

DECRYPTED = 8
"""Ciphertexts that a process decrypts at a time."""
NOTHING = np.zeros(0, np.int64)


async def fit(peers: Peers, params: Fit, table: Table, earlier: Model | None = None) -> Model:
    """The guest's part of the model; `earlier`: what it goes on from."""
    hosts, rows = peers.having("host"), table.n_samples
    labels, columns = table.labels(), [name for name in table.features if name != params.weight]
    bins, ends = bins_of(table, columns, params.max_bin)
    weights = _weights(params, table)
    if earlier is None:
        loss = Loss.of(params.objective, params.num_class, labels)
        forest = peers.random.bytes(16).hex()
    else:
        loss = _same(params, earlier, columns)
        forest = earlier.facts["forest"]
        leaves, hosts = await route.ask(peers, earlier, table)
    for place, host in enumerate(hosts):
        await peers.send(host, "start", [rows, forest, place])
    drawn = {host: _check_shape(host, said, rows) for host, said in (await peers.gather("host", "shape")).items()}

    targets = loss.targets(labels)
    validation = np.zeros(rows, np.bool_)
    validation[peers.random.permutation(rows)[: int(params.validation * rows)]] = True
    learning = np.where(validation, 0.0, weights)
    new = empty(params.n_estimators * loss.groups, params.max_depth)
    if earlier is None:
        base = loss.base(targets, learning)
        arrays: dict[str, Any] = new
        state: dict[str, Any] = {name: [] for name in OWN}
        at_start = np.repeat(base[None, :], rows, axis=0)
    else:
        base = earlier.arrays["base"]
        arrays = {name: np.concatenate([earlier.arrays[name], new[name]]) for name in FOREST}
        state = {name: earlier.arrays[name].tolist() for name in OWN}
        at_start = margins(earlier.arrays, base, leaves)
    first = len(arrays["owner"]) - len(new["owner"])
    count = len(arrays["owner"])
    state |= {
        "tree": first,
        "open": [],
        "node": np.zeros(rows, np.int16),
        "margins": at_start,
        "records": [int((arrays["owner"] == owner).sum()) for owner in range(len(hosts) + 1)],
        "best": [np.inf, first],
        **arrays,
    }
    rules = Rules(params.reg_lambda, params.gamma, params.min_child_weight)
    growing = Growing(bins, ends, targets, learning, loss, rules, params.learning_rate, params.max_depth, state)
    _note_best(growing, validation, weights)
    private = paillier.own_key(peers)
    pairs = pairs_of(params, private.public, rows)
    encryption = Owner(private, peers.random, (count - first) * rows)
    if params.complete_secure and earlier is None:
        for _ in range(loss.groups):
            growing.grow_alone(_learning(peers, params, validation), drawn_of(peers, params, len(columns)))
        _note_best(growing, validation, weights)

    for _ in peers.rounds(turns(params), shared={}, own=state):
        if growing.open:
            await peers.broadcast("nodes", growing.places(), role="host")
        elif _stopped(growing, params, count):
            await peers.broadcast("nodes", None, role="host")
            break
        else:
            growing.begin(_learning(peers, params, validation), drawn_of(peers, params, len(columns)))
            await peers.broadcast("nodes", np.zeros(0, np.int16), role="host")
            plain = paillier.parts(pairs.join(state["g"], state["h"]))
            gradients = spread(peers, private.public, lambda part: encryption.encrypt(part, peers.random), plain)
            await peers.broadcast("gradients", gradients.to_array(), role="host")
        await _level(peers, growing, private, pairs, hosts, drawn)
        if not growing.open and growing.tree % loss.groups == 0:
            _note_best(growing, validation, weights)
            peers.progress(growing.tree, count, **_losses(growing, validation, weights))

    kept = int(state["best"][1]) if params.early_stopping else growing.tree
    trained = {name: state[name][:kept] for name in FOREST}
    for number, host in enumerate(hosts, GUEST + 1):
        await peers.send(host, "gains", gains_of(trained, number))
    gains = gains_of(trained, GUEST)
    own = records(state, len(gains))
    facts = {
        "forest": forest,
        "hosts": len(hosts),
        "objective": params.objective,
        "num_class": loss.classes,
        "middle": loss.middle,
        "half": loss.half,
        "max_depth": params.max_depth,
        "n_trees": kept,
        "n_samples": rows,
        "label": table.label,
        "columns": columns,
        "importance": importance(columns, own["feature"], gains),
    }
    return Model(ALGORITHM, facts, {"base": base, **trained, **own})


def records(state: dict[str, Any], count: int) -> dict[str, Any]:
    """The first splits of an owner, as arrays."""
    dtypes = zip(OWN, (np.int64, np.float64, np.bool_), strict=True)
    return {name: np.array(state[name][:count], dtype) for name, dtype in dtypes}


async def _level(
    peers: Peers, growing: Growing, private: PrivateKey, pairs: Pairs, aliases: list[str], drawn: dict[str, int]
) -> None:
    """What the hosts offer for each node, which is the best, and the rows that go left there."""
    nodes, hosts = growing.open, dict(enumerate(aliases, GUEST + 1))
    best = [growing.own_best(node) for node in nodes]
    for number, host in hosts.items():
        candidates = drawn[host] * (growing.max_bin - 1) * 2
        offered = _decrypted(peers, private, pairs, host, await peers.receive(host, "sums"), len(nodes), candidates)
        for place, (node, left) in enumerate(zip(nodes, offered, strict=True)):
            g, h = growing.of_node(node)
            if (np.abs(left.g) > np.abs(g).sum()).any() or (left.h < 0).any() or (left.h > h.sum()).any():
                refuse(host, "sums that no rows of the node have")
            best[place] = growing.better(best[place], number, left, node)
    for number, host in hosts.items():
        await peers.send(host, "splits", [each.places if each.owner == number else NOTHING for each in best])
    chosen: dict[int, Any] = {}
    for number, host in hosts.items():
        if any(each.owner == number for each in best):
            chosen[number] = await peers.receive(host, "left")
    for node, each in zip(nodes, best, strict=True):
        if each.owner == GUEST:
            growing.split_own(node, each)
        elif each.owner != LEAF:
            goes, chosen[each.owner] = _check_left(hosts[each.owner], chosen[each.owner], *growing.of_node(node), each)
            growing.split(node, each, goes)
    for number, rest in chosen.items():
        if len(rest):
            refuse(hosts[number], "more rows than the nodes have that it splits")
    growing.end_level()


def _decrypted(
    peers: Peers, private: PrivateKey, pairs: Pairs, host: str, array: Any, nodes: int, candidates: int
) -> list[Sums]:
    """The sums of each node's candidates, in the order in which they came."""
    each, width = pairs.ciphertexts(candidates), private.public.width // 2
    try:
        came = Ciphertexts.from_array(private.public, array, nodes * each)
        read = peers.map(
            lambda place: b"".join(m.to_bytes(width, "big") for m in private.decrypt(came[place : place + DECRYPTED])),
            range(0, len(came), DECRYPTED),
        )
        plain = [int.from_bytes(part[at : at + width], "big") for part in read for at in range(0, len(part), width)]
        by_node = [plain[start : start + each] for start in range(0, len(plain), each)]
        return [pairs.part(pairs.slots.unpack(part, candidates)) for part in by_node]
    except RemoteProtocolError as error:
        refuse(host, error.message)


def _check_shape(host: str, said: Any, rows: int) -> int:
    match said:
        case [int(theirs), int(features)] if 0 < features <= MAX_FEATURES:
            if theirs != rows:
                raise DataError(f"{host} has {theirs} rows, and here are {rows}", hint=ALIGN)
            return features
    refuse(host, "no number of rows and features")


def _check_left(host: str, bits: Any, g: Ints, h: Ints, best: Best) -> tuple[Bools, Bools]:
    """Which rows of a node go left, and what is left of the message. They have to be those of the sum that won."""
    if not isinstance(bits, np.ndarray) or bits.dtype != np.bool_ or bits.ndim != 1 or len(bits) < len(g):
        refuse(host, "not which rows go left")
    left, rest = bits[: len(g)], bits[len(g) :]
    if (int(g[left].sum()), int(h[left].sum())) not in zip(best.sums.g.tolist(), best.sums.h.tolist(), strict=True):
        refuse(host, "rows to go left that do not add up to the sum that won")
    if not MIN_ROWS <= int(left.sum()) <= len(left) - MIN_ROWS:
        refuse(host, f"a split with fewer than {MIN_ROWS} rows on one side")
    return left, rest


def _same(params: Fit, earlier: Model, columns: list[str]) -> Loss:
    """The loss of the earlier model. DataError unless it can be gone on with."""
    route.check(earlier, "hosts")
    facts = earlier.facts
    loss = Loss(params.objective, facts["num_class"], facts["middle"], facts["half"])
    wanted = {"objective": params.objective, "max_depth": params.max_depth, "columns": columns}
    if params.objective == "multi:ce":
        wanted["num_class"] = params.num_class
    for name, value in wanted.items():
        if facts[name] != value:
            raise DataError(f"the model that is to be gone on with has {name} = {facts[name]!r}, not {value!r}")
    return loss


def _weights(params: Fit, table: Table) -> Floats:
    if not params.weight:
        return np.ones(table.n_samples)
    weights = numbers(table, params.weight)
    if not ((weights >= 0) & (weights <= params.max_weight)).all():
        raise DataError(
            f"the column {params.weight!r} has weights that are missing, or not from 0 to max_weight = "
            f"{params.max_weight}"
        )
    return weights


def _learning(peers: Peers, params: Fit, validation: Bools) -> Bools:
    """The rows that a tree learns from."""
    rows = np.flatnonzero(~validation)
    learns = np.zeros(len(validation), np.bool_)
    learns[rows[peers.random.permutation(len(rows))[: max(1, round(len(rows) * params.subsample))]]] = True
    return learns


def _losses(growing: Growing, validation: Bools, weights: Floats) -> dict[str, float]:
    """Of training and validation rows; for the guest's own operator."""
    parts = {"training": np.where(validation, 0.0, weights), "validation": np.where(validation, weights, 0.0)}
    at, targets = growing.state["margins"], growing.targets
    return {name: growing.loss.mean(at, targets, part) for name, part in parts.items() if part.any()}


def _note_best(growing: Growing, validation: Bools, weights: Floats) -> None:
    """Remembers how many trees had the lowest loss of the validation rows."""
    loss = _losses(growing, validation, weights).get("validation", np.inf)
    if loss < growing.state["best"][0]:
        growing.state["best"] = [loss, growing.tree]


def _stopped(growing: Growing, params: Fit, count: int) -> bool:
    since = (growing.tree - int(growing.state["best"][1])) // growing.loss.groups
    whole = growing.tree % growing.loss.groups == 0
    return growing.tree == count or bool(params.early_stopping and whole and since >= params.early_stopping)
