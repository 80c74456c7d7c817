"""Rows chosen by an alignment."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from fedpeer.algorithms.local import select
from fedpeer.errors import DataError
from fedpeer.stage import Params, Rows, Table
from fedpeer.testing.stages import check_stage, run_stage

TABLE = Table(
    pa.table({"id": ["a", "b", "c", "d"], "x": [1.0, None, 3.0, 4.0], "y": [True, False, True, False]}), "id", "y"
)


def rows(*index: int) -> Rows:
    return Rows(np.array(index, dtype=np.int64))


def test_the_chosen_rows_come_in_the_given_order_with_all_columns() -> None:
    def right(outputs: dict) -> None:  # type: ignore[type-arg]
        for output in outputs.values():
            table = output["table"]
            assert table.data.to_pydict() == {"id": ["d", "b", "a"], "x": [4.0, None, 1.0], "y": [False, False, True]}
            assert (table.id, table.label) == ("id", "y")

    check_stage(select.run, Params(), lambda n: [{"rows": rows(3, 1, 0), "table": TABLE}] * n, right)


def test_no_rows_give_an_empty_table_of_the_same_columns() -> None:
    table = run_stage(select.run, Params(), [{"rows": rows(), "table": TABLE}]).outputs["alice"]["table"]
    assert isinstance(table, Table)
    assert table.n_samples == 0
    assert table.data.schema.equals(TABLE.data.schema)


def test_rows_of_another_table_are_refused() -> None:
    with pytest.raises(DataError, match="row 4 is asked for, and the table has 4"):
        run_stage(select.run, Params(), [{"rows": rows(0, 4, 5), "table": TABLE}])
