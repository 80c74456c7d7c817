"""Which rows of this peer's datasets really go into a stage: read from the very files that its worker gets.

Rules
* A dataset that is an input is all rows of its snapshot; with rows of an alignment beside it, those rows.
* A table that an earlier stage made is told by its ids, if all of them are ids of the dataset, and counts as these rows
  of it: a stage that scales values must not make a corrected value look like other rows. (Where the dataset repeats an
  id, the table counts as it is.) Without ids it counts as the whole dataset if it has as many rows; any other table
  could be of any rows, and is refused.
* What is said of columns, labels and values by the stage that made a table counts for nothing here.

Blocks while it reads; called in a thread.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedpeer import artifact
from fedpeer.crypto import hash_
from fedpeer.errors import DataError, PolicyError
from fedpeer.governance.answered import Cohort, cohort_of
from fedpeer.jobs.answer.gathering import mapped
from fedpeer.stage import Rows, Table


@dataclass(frozen=True)
class Source:
    """An input of a stage: a file of the store, and the names of the own datasets whose rows are in it."""

    kind: str
    path: Path
    digest: bytes
    datasets: Collection[str]
    whole: bool
    """whether it is the dataset itself"""


def cohorts_of(sources: Sequence[Source], snapshots: Mapping[str, Source]) -> list[Cohort]:
    """The rows of each dataset that come in by these inputs; `snapshots`: every own dataset of the job, by name.

    Raises PolicyError where it cannot be told which rows they are, DataError for a file that cannot be read.
    """
    chosen = [source for source in sources if source.kind == "rows"]
    found: list[Cohort] = []
    for source in sources:
        if source.kind != "table":
            continue
        table, version = _table(source), source.digest
        for rows in chosen:
            table, version = _take(table, rows), hash_("fp.rows", version, rows.digest)
        for name in sorted(source.datasets):
            if source.whole:
                found.append(cohort_of(name, version, table))
            else:
                found.append(_made(name, version, table, snapshots[name]))
    return found


def _made(name: str, version: bytes, table: Table, snapshot: Source) -> Cohort:
    """The rows of a dataset that are in a table made of it."""
    whole = _table(snapshot)
    if table.id is not None and whole.id is not None:
        ids = whole.data.column(whole.id)
        places = pc.index_in(table.data.column(table.id), value_set=ids)
        if not places.null_count:
            told = pc.count_distinct(ids, mode="all").as_py() == len(ids)  # else an id does not say which of its rows
            return cohort_of(name, version, Table(whole.data.take(places), whole.id) if told else table)
    elif table.n_samples == whole.n_samples:
        return cohort_of(name, snapshot.digest, whole)
    raise PolicyError(
        f"it cannot be told which rows of {name!r} a table that an earlier stage made is of",
        hint="an earlier stage keeps the dataset's ids in its tables, or all of its rows",
    )


def _take(table: Table, rows: Source) -> Table:
    loaded = artifact.load("rows", mapped(rows.path))
    assert isinstance(loaded, Rows)
    if loaded.index.size and int(np.max(loaded.index)) >= table.n_samples:
        raise DataError(f"a row is asked for that a table of {table.n_samples} rows does not have")
    return Table(table.data.take(pa.array(loaded.index)).combine_chunks(), table.id, table.label)


def _table(source: Source) -> Table:
    loaded = artifact.load("table", mapped(source.path))
    assert isinstance(loaded, Table)
    return loaded
