"""A table in two parts, one to train with and one to test with: the same parts at all participants, without a message.

Rules
* On which side a row falls follows from its id and `random_state` alone: not from the other rows, their order, their
  values or their label. So participants of a vertical job split alike, an id is on one side in every table, and rows
  of one id stay together.
* An id counts in the normal form of vertical.align with `casefold`: ids that any alignment takes for the same do here.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa

from fedpeer.crypto import hash_
from fedpeer.errors import DataError
from fedpeer.peers import Peers
from fedpeer.secure.ids import normal_form
from fedpeer.stage import Params, Table, at_least, stage


class Split(Params, frozen=True):
    test_size: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.3
    """The probability of an id to fall into `test`."""
    random_state: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)] | Annotated[str, msgspec.Meta(max_length=200)] = 0
    """Another one is another split. It is in the contract, so it is the same at all participants and no secret."""


@stage(
    version=1,
    params=Split,
    roles={"member": at_least(1)},
    inputs={"table": Table},
    outputs={"train": Table, "test": Table},
    messages={},
)
async def run(peers: Peers, params: Split, table: Table) -> dict[str, Any]:
    """The rows of the table in two tables, each in the table's order, all columns kept. No message.

    Each id falls into `test` with probability `test_size`, so the parts are about as large as asked for: of n ids,
    within 3·√(n·test_size·(1 - test_size)) nearly always. After vertical.align:run and local.select:run the i-th rows
    of the parts are the same entity at every participant. DataError if an id is missing or blank, or a part is empty.

    A table without an id column is split by row number, from 0, and the operator is told (`by_row_number` = 1). Such
    parts are alike where the rows are in the same order; what leaves in a later stage needs ids (jobs/cohorts.py).

    There is no `stratify`: who has no label could not follow.
    """
    in_test = np.array([_draw(params.random_state, name) for name in _names(table)], np.float64) < params.test_size
    if in_test.all() or not in_test.any():
        raise DataError(
            f"all {table.n_samples} rows fall into one part, test_size = {params.test_size:g}",
            hint="take more rows, another test_size or another random_state",
        )
    parts = {"train": ~in_test, "test": in_test}
    peers.progress(
        1, 1, **{part: float(mask.sum()) for part, mask in parts.items()}, by_row_number=float(table.id is None)
    )
    return {
        part: Table(table.data.filter(pa.array(mask)).combine_chunks(), table.id, table.label)
        for part, mask in parts.items()
    }


def _names(table: Table) -> list[str]:
    """What each row is split by."""
    if table.id is None:
        return [str(row) for row in range(table.n_samples)]
    names = ["" if name is None else normal_form(str(name), True) for name in table.data.column(table.id).to_pylist()]
    if "" in names:
        raise DataError(
            f"row {names.index('')} (from 0) has no id in the column {table.id!r}", hint="leave such rows out"
        )
    return names


def _draw(random_state: int | str, name: str) -> float:
    """A number in [0, 1), uniform over random states."""
    word = hash_("fp.split", str(random_state).encode(), name.encode(), size=8)
    return int.from_bytes(word, "little") / 2**64
