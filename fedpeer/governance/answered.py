"""What this peer has answered: which rows, in which run, among whom. So that no two answers tell a row by difference.

The mean of 1,000 rows and that of 999 of them tell the one row exactly. So every table that goes into something that
leaves is remembered by its rows, before it is used, and one that differs from an earlier one in 1 to k - 1 rows is
refused. In the same way a sum among a few participants more or less would tell theirs: of any stage, for the same
moments are in what several stages sum.

How it works
    A row has two keys of 64 bits: of its id, and of everything in it. Ids find a row that came, went or got a new
    column; contents find a value that was changed, rows without ids, and the same rows under another dataset's name.
    The lesser difference that is not 0 counts. The keys of a table are kept once, in the order of its rows; of a table
    whose rows are all in one that is kept, only a bit for each row of that one.

Rules
* A stage hides small cells of the same rows by one size only: what it hides for 11 and not for 10 is a row.
* What is remembered is of this peer's own rows, never leaves it, and is written before the first byte that tells of
  them. A run that is repeated after a crash is the same run, and does not count against itself.
* Two keys are the same by accident with probability 2^-64 for each pair of rows.
* At most `MAX_ROWS` rows in a table and `MAX_ANSWERS` different tables of a dataset are remembered. When there are so
  many, those of which nothing was answered for a year (the time that a budget is for) make room; if none did, nothing
  new is answered, for it could not be told from what was. An operator may forget them all, which the audit shows.

Source: differencing attacks as in Denning, Denning and Schwartz, The tracker: a threat to statistical database
security, ACM TODS 4(1), 1979.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedpeer.crypto import hash_
from fedpeer.errors import PolicyError
from fedpeer.governance.decision import Ask, DatasetAsk, Finding, StageAsk, check_stage, of_all, widest_cell
from fedpeer.governance.policy import Policy
from fedpeer.stage import Table
from fedpeer.store import INLINE_BYTES, Schema, Transaction

Keys = npt.NDArray[np.uint64]

MAX_ROWS = 10_000_000
MAX_ANSWERS = 1000
"""tables of a dataset"""
YEAR = timedelta(days=365)

SCHEMA = Schema(
    "answered",
    [
        """
        CREATE TABLE answered_table (
            number INTEGER PRIMARY KEY,
            dataset TEXT NOT NULL,
            version BLOB NOT NULL,      -- digest of the table's file
            rows INTEGER NOT NULL,
            part_of INTEGER REFERENCES answered_table, -- its rows are bits over those of this one
            UNIQUE (dataset, version)
        ) STRICT;
        CREATE TABLE answered_piece (
            number INTEGER NOT NULL REFERENCES answered_table ON DELETE CASCADE,
            kind TEXT NOT NULL,         -- ids | contents | bits
            piece INTEGER NOT NULL,
            bytes BLOB NOT NULL,
            PRIMARY KEY (number, kind, piece)
        ) STRICT;
        CREATE TABLE answered_run (
            contract BLOB NOT NULL,
            stage TEXT NOT NULL,
            number INTEGER NOT NULL REFERENCES answered_table,
            run TEXT NOT NULL,
            parties TEXT NOT NULL,      -- JSON: peer ids
            time TEXT NOT NULL,
            PRIMARY KEY (contract, stage, number)
        ) STRICT;
        CREATE TABLE answered_alignment (
            contract BLOB NOT NULL,
            stage TEXT NOT NULL,
            dataset TEXT NOT NULL,
            version BLOB NOT NULL,
            peer TEXT NOT NULL,
            time TEXT NOT NULL,
            PRIMARY KEY (contract, stage, dataset, peer)
        ) STRICT;
        """,
        """
        ALTER TABLE answered_run ADD COLUMN exact_sum INTEGER NOT NULL DEFAULT 1; -- a sum, and without noise
        ALTER TABLE answered_run ADD COLUMN of_all INTEGER NOT NULL DEFAULT 0; -- none of its participants may be away
        """,
        """
        ALTER TABLE answered_run ADD COLUMN cell INTEGER NOT NULL DEFAULT 0; -- rows behind a cell at least; 0: not said
        """,
    ],
)


@dataclass(frozen=True)
class Cohort:
    """The rows of a table by their keys, in its order."""

    dataset: str
    version: bytes
    contents: Keys
    ids: Keys | None

    @property
    def rows(self) -> int:
        return int(self.contents.size)


def cohort_of(dataset: str, version: bytes, table: Table) -> Cohort:
    """The rows of a table that goes into a stage: a snapshot of the dataset, or what earlier stages made of it.

    `version`: digest of the table's file. Takes some 5 to 10 s for a million rows with an id. Raises PolicyError for
    more than MAX_ROWS.
    """
    if table.n_samples > MAX_ROWS:
        raise PolicyError(
            f"{dataset!r} has {table.n_samples} rows, and {MAX_ROWS} can be remembered",
            hint="offer fewer of them",
        )
    contents, ids = np.empty(table.n_samples, np.uint64), np.empty(table.n_samples, np.uint64)
    at = 0
    for batch in table.data.to_batches():
        part = slice(at, at + batch.num_rows)
        keys = np.zeros(batch.num_rows, np.uint64)
        for name in table.data.column_names:
            hashed = _hashed(batch.column(name))
            keys = _mixed(keys + hashed)
            if name == table.id:
                ids[part] = hashed
        contents[part] = keys
        at += batch.num_rows
    return Cohort(dataset, version, _told_apart(contents), None if table.id is None else _told_apart(ids))


def difference(one: Cohort, other: Cohort) -> int:
    """Rows that are in one of them only, by ids or by contents: the lesser number that is not 0, or 0."""
    return min((size for size in _differences(one, other) if size), default=0)


def _differences(one: Cohort, other: Cohort) -> list[int]:
    """Rows that are in one of them only, by contents and by ids. Ids mean the same within one dataset only."""
    sizes = [np.setxor1d(one.contents, other.contents, assume_unique=True).size]
    if one.dataset == other.dataset and one.ids is not None and other.ids is not None:
        sizes.append(np.setxor1d(one.ids, other.ids, assume_unique=True).size)
    return [int(size) for size in sizes]


# facts for a decision


def nearest(tx: Transaction, cohort: Cohort, below: int, beside: Sequence[Cohort] = ()) -> int | None:
    """Rows by which an earlier answer differs from these, the least that is not 0 and less than `below`, else None.

    `beside`: other tables of the same answer.
    """
    sizes = [difference(cohort, other) for other in beside]
    for number, dataset, version, rows in tx.all(
        "SELECT DISTINCT number, dataset, version, rows FROM answered_run JOIN answered_table USING (number)"
    ):
        # not the same content, and as many rows but for some: only then the keys are read
        if version != cohort.version and abs(rows - cohort.rows) < below:
            sizes.append(difference(cohort, _load(tx, number, dataset, version)))
    return min((size for size in sizes if 0 < size < below), default=None)


def parties(
    tx: Transaction, version: bytes, but: bytes = b"", cohort: Cohort | None = None
) -> tuple[tuple[frozenset[str], bool], ...]:
    """The participants of each earlier sum without noise over this version, by whatever stage of another contract.

    With each, whether it could only be opened over all of them. With its `cohort`: over the very same rows, by ids or
    by contents, under whatever version and name. Inside one contract the sums themselves see to it.
    """
    tables = _same(tx, version, cohort)
    told = tx.all("SELECT DISTINCT number, parties, of_all FROM answered_run WHERE exact_sum AND contract != ?", (but,))
    found = {(frozenset(json.loads(names)), bool(of_all)) for number, names, of_all in told if number in tables}
    return tuple(sorted(found, key=lambda one: (sorted(one[0]), one[1])))


def cells(tx: Transaction, cohort: Cohort, run: str, but: tuple[bytes, str]) -> frozenset[int]:
    """The least cells of each earlier sum without noise over the very same rows, by this stage function."""
    tables = _same(tx, cohort.version, cohort)
    told = tx.all(
        "SELECT DISTINCT number, cell FROM answered_run WHERE exact_sum AND cell > 0 AND run = ?"
        " AND NOT (contract = ? AND stage = ?)",
        (run, *but),
    )
    return frozenset(cell for number, cell in told if number in tables)


def _same(tx: Transaction, version: bytes, cohort: Cohort | None) -> set[int]:
    """The tables of this version, and with its `cohort`: of the very same rows, by ids or by contents."""
    return {
        number
        for number, dataset, other, rows in tx.all("SELECT number, dataset, version, rows FROM answered_table")
        if other == version
        or (cohort and rows == cohort.rows and 0 in _differences(cohort, _load(tx, number, dataset, other)))
    }


def aligned(tx: Transaction, version: bytes, but: tuple[bytes, str] = (b"", "")) -> dict[str, int]:
    """peer → how often this version was aligned with it."""
    rows = tx.all(
        "SELECT peer, count(*) FROM answered_alignment WHERE version = ? AND NOT (contract = ? AND stage = ?)"
        " GROUP BY peer",
        (version, *but),
    )
    return dict(rows)


def aligned_peers(tx: Transaction) -> set[str]:
    """Everybody with whom anything was aligned: a policy may know by their names whose organization they are of."""
    return {peer for (peer,) in tx.all("SELECT DISTINCT peer FROM answered_alignment")}


# a stage begins


def check_cohort(
    tx: Transaction, policy: Policy, ask: Ask, stage: StageAsk, cohorts: Sequence[Cohort], time: str
) -> tuple[Finding, ...]:
    """Whether a stage may begin with these rows of its datasets; if every finding holds they count as answered.

    Everything that was decided about the stage is decided again, now with the rows that really go in, the policy of
    today and all that was answered meanwhile. Only what was approved holds: a rule that asks is settled by then.
    """
    if not stage.stage.messages:
        return ()  # nothing leaves
    run = bytes.fromhex(ask.contract), stage.id
    facts = {dataset.name: dataset for dataset in stage.datasets}
    real = [_now(tx, policy, facts[cohort.dataset], cohort, cohorts, run, stage) for cohort in cohorts]
    rest = facts.keys() - {cohort.dataset for cohort in cohorts}
    findings = check_stage(policy, ask, replace(stage, datasets=(*real, *(facts[name] for name in sorted(rest)))))
    for cohort in () if stage.aligns else cohorts:
        if not _has_room(tx, cohort, time):
            text = (
                f"{MAX_ANSWERS} tables of {cohort.dataset!r} are remembered, and no more can be until nothing was "
                f"answered of one for a year (fedpeer budget show {cohort.dataset})"
            )
            findings = (*findings, Finding("no_row_differencing", stage.id, False, text))
    if all(finding.holds for finding in findings):
        _remember(tx, run, ask, stage, cohorts, time)
    return findings


def _now(
    tx: Transaction,
    policy: Policy,
    facts: DatasetAsk,
    cohort: Cohort,
    cohorts: Sequence[Cohort],
    run: tuple[bytes, str],
    stage: StageAsk,
) -> DatasetAsk:
    """A dataset as it goes into a stage, whatever was known of it when the job was agreed."""
    return replace(
        facts,
        rows=cohort.rows,
        nearest=nearest(tx, cohort, widest_cell(policy), cohorts) if policy.no_row_differencing else None,
        other_parties=parties(tx, cohort.version, run[0], cohort) if policy.no_party_differencing else (),
        cells=cells(tx, cohort, stage.run, run) if policy.no_row_differencing and stage.sums else frozenset(),
        aligned=aligned(tx, facts.version, run),  # of the whole dataset: a choice of its rows is no new version
    )


def _remember(
    tx: Transaction, run: tuple[bytes, str], ask: Ask, stage: StageAsk, cohorts: Sequence[Cohort], time: str
) -> None:
    if stage.aligns:
        tx.executemany(
            "INSERT OR IGNORE INTO answered_alignment VALUES (?, ?, ?, ?, ?, ?)",
            [
                (*run, dataset.name, dataset.version, peer, time)
                for dataset in stage.datasets
                for peer in stage.parties
                if peer != ask.me
            ],
        )
        return
    exact = stage.sums and stage.cost is None
    for cohort in cohorts:
        told = (stage.run, json.dumps(sorted(stage.parties)), time, exact, of_all(ask, stage), stage.cell)
        tx.execute(
            "INSERT OR IGNORE INTO answered_run VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*run, _keep(tx, cohort), *told)
        )


def remembered(tx: Transaction, dataset: str) -> int:
    """How many tables of a dataset are remembered; at most MAX_ANSWERS."""
    (count,) = tx.one("SELECT count(*) FROM answered_table WHERE dataset = ?", (dataset,))
    return int(count)


def forget(tx: Transaction, dataset: str, before: str = "~") -> int:
    """How many tables of a dataset are forgotten now: of which nothing was answered since `before` (ISO 8601), or all.

    From now on an answer may differ from one of theirs in a few rows. Alignments are counted on.
    """
    kept = remembered(tx, dataset)
    tx.execute(
        "DELETE FROM answered_run WHERE number IN (SELECT number FROM answered_run JOIN answered_table USING (number)"
        " WHERE dataset = ? GROUP BY number HAVING max(time) < ?)",
        (dataset, before),
    )
    for of_parts in ("part_of IS NOT NULL", "number NOT IN (SELECT part_of FROM answered_table WHERE part_of > 0)"):
        tx.execute(
            f"DELETE FROM answered_table WHERE dataset = ? AND {of_parts} AND number NOT IN"  # noqa: S608
            " (SELECT number FROM answered_run)",
            (dataset,),
        )
    return kept - remembered(tx, dataset)


def _has_room(tx: Transaction, cohort: Cohort, time: str) -> bool:
    """Whether a table can be remembered, after those of long ago made room if they must."""
    if _known(tx, cohort) is not None or remembered(tx, cohort.dataset) < MAX_ANSWERS:
        return True
    return forget(tx, cohort.dataset, (datetime.fromisoformat(time) - YEAR).isoformat()) > 0


# in the store


def _known(tx: Transaction, cohort: Cohort) -> int | None:
    place = cohort.dataset, cohort.version
    row = tx.one("SELECT number FROM answered_table WHERE dataset = ? AND version = ?", place)
    return None if row is None else int(row[0])


def _keep(tx: Transaction, cohort: Cohort) -> int:
    """The number of a table, whose keys are kept now if they are not yet."""
    if (known := _known(tx, cohort)) is not None:
        return known
    part_of, pieces = None, {"contents": cohort.contents.tobytes()}
    for number, version in tx.all(
        "SELECT number, version FROM answered_table WHERE dataset = ? AND rows >= ? AND part_of IS NULL",
        (cohort.dataset, cohort.rows),
    ):
        whole = _load(tx, number, cohort.dataset, version)
        bits = np.isin(whole.contents, cohort.contents)
        if bits.sum() == cohort.rows:
            part_of, pieces = number, {"bits": np.packbits(bits).tobytes()}
            break
    if part_of is None and cohort.ids is not None:
        pieces["ids"] = cohort.ids.tobytes()
    number = tx.execute(
        "INSERT INTO answered_table (dataset, version, rows, part_of) VALUES (?, ?, ?, ?)",
        (cohort.dataset, cohort.version, cohort.rows, part_of),
    ).lastrowid
    assert number is not None
    for kind, data in pieces.items():
        cut = (data[at : at + INLINE_BYTES] for at in range(0, len(data), INLINE_BYTES))
        tx.executemany(
            "INSERT INTO answered_piece VALUES (?, ?, ?, ?)", [(number, kind, i, piece) for i, piece in enumerate(cut)]
        )
    return number


def _load(tx: Transaction, number: int, dataset: str, version: bytes) -> Cohort:
    (part_of,) = tx.one("SELECT part_of FROM answered_table WHERE number = ?", (number,))
    of = number if part_of is None else part_of
    contents = np.frombuffer(b"".join(_pieces(tx, of, "contents")), np.uint64)
    ids = np.frombuffer(b"".join(_pieces(tx, of, "ids")), np.uint64) if contents.size else contents
    keys = [contents, ids if ids.size == contents.size else None]
    if part_of is not None:
        packed = np.frombuffer(b"".join(_pieces(tx, number, "bits")), np.uint8)
        bits = np.unpackbits(packed, count=contents.size).astype(bool)
        keys = [None if column is None else column[bits] for column in keys]
    assert keys[0] is not None
    return Cohort(dataset, version, keys[0], keys[1])


def _pieces(tx: Transaction, number: int, kind: str) -> Iterator[bytes]:
    for (piece,) in tx.all(
        "SELECT bytes FROM answered_piece WHERE number = ? AND kind = ? ORDER BY piece", (number, kind)
    ):
        yield piece


# keys


_NULL = np.uint64(0x9E3779B97F4A7C15)


def _hashed(column: pa.Array) -> Keys:
    """A hash of each value: equal for equal values, and for missing ones."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        coded = column.dictionary_encode()
        words = [hash_("fp.row", word.encode(), size=8) for word in coded.dictionary.to_pylist()]
        values = np.frombuffer(b"".join(words) or bytes(8), np.uint64)[coded.indices.fill_null(0).to_numpy()]
    elif pa.types.is_boolean(kind):
        values = column.fill_null(False).to_numpy(zero_copy_only=False).astype(np.uint64)
    else:
        numbers = column.cast(pa.float64()).fill_null(0.0).to_numpy(zero_copy_only=False) + 0.0  # -0.0 becomes 0.0
        values = numbers.view(np.uint64)
    missing = column.is_null().to_numpy(zero_copy_only=False)
    return _mixed(np.where(missing, _NULL, values + np.uint64(1)))


def _mixed(x: Keys) -> Keys:
    """The finalizer of SplitMix64: a permutation of 64 bits in which every bit depends on all."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _told_apart(keys: Keys) -> Keys:
    """The same keys, but of equal ones the second, third … become others: rows that are alike are several rows."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    place = np.arange(keys.size)
    first = np.maximum.accumulate(np.where(np.append(True, ordered[1:] != ordered[:-1])[: keys.size], place, 0))
    repeats = (place - first).astype(np.uint64)
    told = keys.copy()
    told[order] = np.where(repeats > 0, _mixed(ordered + repeats * _NULL), ordered)
    return told
