"""Gradient-boosted trees over columns of several owners: only the guest knows the label, and each keeps its splits.

The guest encrypts what its trees need of the labels under its own Paillier key; hosts add it up by bin of their
features; the guest decrypts the sums of unnamed candidates and takes the best. The trees are those of the joined
table, to the bit (secure/trees.py, secure/forest.py; the parties are in boosting/).
"""

from __future__ import annotations

from typing import Any, Final

import pyarrow as pa

from fedpeer.algorithms.vertical.boosting import guest, host, route
from fedpeer.algorithms.vertical.boosting.params import MAX_DEPTH, MAX_ROWS, Fit
from fedpeer.peers import Peers
from fedpeer.secure.forest import margins
from fedpeer.secure.losses import Loss
from fedpeer.stage import Message, Model, Open, Params, Sealed, Table, at_least, exactly, stage

HEADER: Final = 4096
"""More than a message takes beside its arrays."""
BYTES: Final = (1 << 30) + HEADER

TRAINING: Final[dict[str, Message]] = {
    "start": Open("guest", "host", "how many rows are aligned, and which of the hosts this one is", max_bytes=HEADER),
    "shape": Open(
        "host", "guest", "how many rows this host has, and how many features it draws for a tree", max_bytes=HEADER
    ),
    "gradients": Sealed(
        "guest",
        "host",
        "the derivatives of the loss, encrypted under the guest's key, one for each row: 0 for rows that the tree does "
        "not learn from",
        max_bytes=BYTES,
    ),
    "nodes": Open(
        "guest",
        "host",
        "which rows lie together in each node that may be split, but for the last level: rows with like labels often "
        "do. And when training ends",
        max_bytes=2 * MAX_ROWS + HEADER,
    ),
    "sums": Open(
        "host",
        "guest",
        "the sums of the derivatives over the left sides of this host's possible splits of each node, of 20 rows or "
        "more, in random order, without feature, bin or count",
        max_bytes=BYTES,
    ),
    "splits": Open(
        "guest",
        "host",
        "of each node whether a split of this host was the best, and which of its splits were equally good",
        max_bytes=64 << 20,
    ),
    "left": Open("host", "guest", "which rows go left at this host's best splits", max_bytes=MAX_ROWS + HEADER),
    "gains": Open("guest", "host", "by how much each split of this host lowered the loss", max_bytes=64 << 20),
}


ROUTING: Final[dict[str, Message]] = {
    "which": Open("host", "guest", "the name of the model, and which of its hosts this one is", max_bytes=HEADER),
    "rows": Open("guest", "host", "how many rows are to be scored", max_bytes=HEADER),
    "ask": Open(
        "guest",
        "host",
        "which rows come to which of this host's splits",
        per_turn=MAX_DEPTH,
        max_bytes=BYTES,
    ),
    "answer": Open("host", "guest", "whether they go left there", per_turn=MAX_DEPTH, max_bytes=BYTES),
}


def parameters(params: Any, n_features: int) -> int:
    """Leaves, and thresholds of the own splits, at most."""
    groups = params.num_class if params.objective == "multi:ce" else 1
    return int(params.n_estimators * groups * (2 ** (params.max_depth + 1) - 1))


def memory(params: Any, rows: int, n_features: int) -> int:
    """A host's ciphertexts, as they came and split, and anybody's bins."""
    return int(rows * (8 * n_features + 3 * params.key_bits // 4))


@stage(
    version=1,
    params=Fit,
    roles={"guest": exactly(1), "host": at_least(1)},
    inputs={"table": Table},
    outputs={"model": Model},
    messages=TRAINING,
    parameters=parameters,
    memory=memory,
    keys=("guest",),
)
async def fit(peers: Peers, params: Fit, table: Table) -> dict[str, Any]:
    """Trees over the columns of all, whose tables have the same entity in each row (local.select after vertical.align).

    ```
    turn               from → to      message     what                                             shape
    -                  both           start …     rows, which host; rows, features
    a tree's first     guest → hosts  nodes       nothing: a tree begins                           0
                                      gradients   [[g·2^s + h]]                                    rows × |n²|/8 bytes
    a tree's others    guest → hosts  nodes       the node of each row, -1 where it is in none     rows
    each               host → guest   sums        packed, shuffled sums of the left sides          nodes × ciphertexts
                       guest → host   splits      places of the best ones in the shuffled order    nodes lists
                       host → guest   left        of the rows of nodes that it splits              rows
    the last           guest → hosts  nodes       None: the end
                                      gains       of each split of that host                       splits
    ```
    Every node gets a new shuffle, so that no candidate is followed from one to another, and always as many candidates.
    A host adds up the smaller child only and has its sibling by the difference. Ties go to the guest, then to hosts in
    the contract's order, then to the first feature, bin and side (secure/trees.py). The guest looks at whether
    the rows that a host sends left add up to the sum that won.

    What is not hidden: hosts see rows of like labels together (`nodes`); a guest that encrypts other numbers than
    derivatives reads which rows lie in a bin, some 80 rows for each tree and feature; a host can spoil the model.

    Source: SecureBoost (Cheng et al., 2019), semi-honest.
    """
    party = guest.fit if peers.role == "guest" else host.fit
    return {"model": await party(peers, params, table)}


@stage(
    version=1,
    params=Fit,
    roles={"guest": exactly(1), "host": at_least(1)},
    inputs={"table": Table, "model": Model},
    outputs={"model": Model},
    messages={**TRAINING, **ROUTING},
    parameters=parameters,
    memory=memory,
    keys=("guest",),
)
async def refit(peers: Peers, params: Fit, table: Table, model: Model) -> dict[str, Any]:
    """Go on from an earlier model: n_estimators more trees, over the same columns, of the same hosts.

    First each row falls through the earlier trees, as in `predict`; then what `fit` does, from there. The base and the
    scale of labels stay those of the earlier model. The parameters may be others, but for objective, num_class and
    max_depth. complete_secure is about the first tree, which is there already.
    """
    party = guest.fit if peers.role == "guest" else host.fit
    return {"model": await party(peers, params, table, model)}


@stage(
    version=1,
    roles={"guest": exactly(1), "host": at_least(1)},
    inputs={"model": Model, "table": Table},
    outputs={"scores": Table},
    messages=ROUTING,
)
async def predict(peers: Peers, params: Params, model: Model, table: Table) -> dict[str, Any]:
    """At the guest the id and the score of each row of tables that are aligned; hosts get nothing.

    ```
    from → to       message   what                                                      shape
    host → guest    which     the model's name, and which of its hosts this one is      2
    guest → hosts   rows      how many rows, how many levels                            2
    each level      ask       which rows are at which split of that host                2 × such pairs
                    answer    whether they go left                                      such pairs
    ```
    `score` is the probability of label 1, or the value; of several classes `class` is the likeliest, and `score_0` …
    their probabilities, which add up to 1. A row without an id column is named by its number, from 0.
    """
    if peers.role != "guest":
        await route.answer(peers, model, table)
        return {"scores": None}
    leaves, _ = await route.ask(peers, model, table)
    facts = model.facts
    loss = Loss(facts["objective"], facts["num_class"], facts["middle"], facts["half"])
    scores = loss.scores(margins(model.arrays, model.arrays["base"], leaves))
    return {"scores": _named(table, scores)}


@stage(
    version=1,
    roles={"guest": exactly(1), "host": at_least(1)},
    inputs={"model": Model, "table": Table},
    outputs={"leaves": Table},
    messages=ROUTING,
)
async def encode(peers: Peers, params: Params, model: Model, table: Table) -> dict[str, Any]:
    """At the guest the id of each row and the number of its leaf in each tree, for another model to learn from.

    The messages are those of `predict`. Node i has the children 2i + 1 and 2i + 2.
    """
    if peers.role != "guest":
        await route.answer(peers, model, table)
        return {"leaves": None}
    leaves, _ = await route.ask(peers, model, table)
    return {"leaves": _named(table, {f"tree_{number}": each.astype(float) for number, each in enumerate(leaves)})}


def _named(table: Table, columns: dict[str, Any]) -> Table:
    """These columns beside the ids of the table."""
    name = table.id if table.id is not None and table.id not in columns else "row"
    ids = table.ids() if table.id is not None else [str(row) for row in range(table.n_samples)]
    arrays = {each: pa.array(values, pa.float64()) for each, values in columns.items()}
    return Table(pa.table({name: pa.array(ids, pa.string()), **arrays}), id=name)
