"""Which leaf of each tree the rows fall into: level by level, each split asked of who has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedpeer.algorithms.horizontal.statistics import numbers
from fedpeer.algorithms.vertical.boosting.params import ALGORITHM, ALIGN, MAX_DEPTH, refuse
from fedpeer.errors import DataError
from fedpeer.peers import Peers
from fedpeer.secure.forest import GUEST, LEAF, goes_left
from fedpeer.secure.trees import Bools, Floats, Ints
from fedpeer.stage import Model, Table

Array = npt.NDArray[Any]


async def ask(peers: Peers, model: Model, table: Table) -> tuple[Ints, list[str]]:
    """At the guest: the leaf of each row, (trees, rows), and the hosts as the model numbers them."""
    check(model, "hosts")
    hosts = await _hosts(peers, model)
    values = columns_of(model, table)
    owner, record = model.arrays["owner"], model.arrays["record"]
    tree = np.arange(len(owner))[:, None]
    node = np.zeros((len(owner), table.n_samples), np.int64)
    for host in hosts:
        await peers.send(host, "rows", [table.n_samples, int(model.facts["max_depth"])])
    for _ in range(int(model.facts["max_depth"])):
        owners = owner[tree, node]
        left = np.zeros(node.shape, np.bool_)
        wanted = {}
        for number, host in enumerate(hosts, GUEST + 1):
            trees, rows = wanted[host] = np.nonzero(owners == number)
            records = record[trees, node[trees, rows]]
            await peers.send(host, "ask", [records.astype(np.int32), rows.astype(np.int32)])
        trees, rows = np.nonzero(owners == GUEST)
        left[trees, rows] = _left(model, values, record[trees, node[trees, rows]], rows)
        for host, places in wanted.items():
            left[places] = _bits(host, await peers.receive(host, "answer"), len(places[0]))
        node = np.where(owners == LEAF, node, 2 * node + np.where(left, 1, 2))
    return node, hosts


async def answer(peers: Peers, model: Model, table: Table) -> None:
    """At a host."""
    check(model, "place")
    (guest,) = peers.having("guest")
    await peers.send(guest, "which", [model.facts["forest"], model.facts["place"]])
    values, known = columns_of(model, table), len(model.arrays["feature"])
    match await peers.receive(guest, "rows"):
        case [int(rows), int(depth)] if 0 <= depth <= MAX_DEPTH:
            if rows != table.n_samples:
                raise DataError(f"{guest} has {rows} rows, and here are {table.n_samples}", hint=ALIGN)
        case _:
            refuse(guest, "no number of rows")
    for _ in range(depth):
        match await peers.receive(guest, "ask"):
            case [np.ndarray() as records, np.ndarray() as places] if _below(records, known) and _below(places, rows):
                if records.shape != places.shape:
                    refuse(guest, "splits and rows that are not as many")
            case _:
                refuse(guest, "splits or rows that do not exist")
        await peers.send(guest, "answer", _left(model, values, records, places))


def check(model: Model, fact: str) -> None:
    """DataError unless it is the part of a model of this algorithm that has this fact."""
    if model.algorithm != ALGORITHM or fact not in model.facts:
        raise DataError(f"the model is not what {ALGORITHM} left at {'the guest' if fact == 'hosts' else 'a host'}")


def columns_of(model: Model, table: Table) -> Floats:
    """(features, rows) of the columns that the model was trained on."""
    columns = list(model.facts["columns"])
    if missing := [name for name in columns if name not in table.data.column_names]:
        raise DataError(f"the table lacks what the model was trained on: {', '.join(map(repr, missing))}")
    return np.array([numbers(table, name) for name in columns]).reshape(len(columns), table.n_samples)


async def _hosts(peers: Peers, model: Model) -> list[str]:
    """The hosts in the order in which the model numbers them."""
    found: dict[int, str] = {}
    for host, said in (await peers.gather("host", "which")).items():
        match said:
            case [str(forest), int(place)] if 0 <= place < model.facts["hosts"] and place not in found:
                if forest != model.facts["forest"]:
                    raise DataError(f"{host} has a part of another model", hint="use what one run left at each")
                found[place] = host
            case _:
                refuse(host, "no place in the model")
    if len(found) != model.facts["hosts"]:
        raise DataError(f"{len(found)} of the {model.facts['hosts']} hosts that trained the model take part")
    return [found[place] for place in sorted(found)]


def _left(model: Model, values: Floats, records: Array, rows: Array) -> Bools:
    arrays: Mapping[str, Array] = model.arrays
    asked = values[arrays["feature"][records], rows]
    return goes_left(asked, arrays["threshold"][records], arrays["missing_left"][records])


def _below(array: Array, bound: int) -> bool:
    return bool(array.dtype == np.int32 and array.ndim == 1 and ((array >= 0) & (array < bound)).all())


def _bits(host: str, array: Any, count: int) -> Bools:
    if not isinstance(array, np.ndarray) or array.dtype != np.bool_ or array.shape != (count,):
        refuse(host, f"not which of {count} rows go left")
    return array
