"""Rows of a table in a given order: what comes after an alignment."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from fedpeer.errors import DataError
from fedpeer.peers import Peers
from fedpeer.stage import Params, Rows, Table, at_least, stage


@stage(
    version=1,
    roles={"member": at_least(1)},
    inputs={"rows": Rows, "table": Table},
    outputs={"table": Table},
    messages={},
)
async def run(peers: Peers, params: Params, rows: Rows, table: Table) -> dict[str, Any]:
    """The chosen rows of the table, in the order of `rows`; all columns, id and label stay. No message.

    After vertical.align:run the i-th row of this table is the same entity at every participant. DataError if `rows`
    was made for a table with more rows than this one.
    """
    wrong = np.flatnonzero(rows.index >= table.n_samples)
    if wrong.size:
        raise DataError(
            f"row {rows.index[wrong[0]]} is asked for, and the table has {table.n_samples} (counted from 0)",
            hint="use the dataset that was aligned",
        )
    return {"table": Table(table.data.take(pa.array(rows.index)).combine_chunks(), table.id, table.label)}
