"""Tables are added and kept by a catalog that does not hold them in memory: 300 MB as Parquet, 100 MB as CSV."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

pytestmark = pytest.mark.system

COLUMNS, PART = 14, 100_000
PROGRAM = """
import sys, pyarrow as pa, trio
from pathlib import Path
from fedpeer.data import csv, parquet, source
from fedpeer.data.catalog import Catalog
from fedpeer.store import Store

def resident(what):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(what))

async def main(folder, path):
    catalog = Catalog(Store(Path(folder), Catalog.SCHEMAS), trio.to_thread.run_sync)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before = resident("VmRSS")
    await catalog.add("large", path, "id", None)
    snapshot = await catalog.snapshot("large")
    resident_peak = resident("VmHWM") - before
    print(snapshot.rows, snapshot.version.hex(), resident_peak, pa.default_memory_pool().max_memory())

trio.run(main, *sys.argv[1:])
"""


def parts(rows: int) -> pa.RecordBatchReader:
    """The rows, in parts that are made when they are needed."""
    names = ["id", *(f"x{number}" for number in range(COLUMNS))]
    schema = pa.schema([(name, pa.string() if name == "id" else pa.float64()) for name in names])

    def made():
        for start in range(0, rows, PART):
            numbers = np.arange(start, start + PART)
            ids = pa.array(numbers).cast(pa.string())
            columns = [pa.array(np.round(np.sin(numbers * (column + 1)), 3)) for column in range(COLUMNS)]
            yield pa.record_batch([ids, *columns], schema=schema)

    return pa.RecordBatchReader.from_batches(schema, made())


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "rows", "may_take", "arrow_may_take"),
    [("parquet", 2_800_000, 200 << 20, 80 << 20), ("csv", 900_000, 200 << 20, 80 << 20)],
)
def test_a_table_is_kept_that_is_larger_than_what_is_taken_of_memory(
    tmp_path: Path, kind: str, rows: int, may_take: int, arrow_may_take: int
) -> None:
    path, size = tmp_path / f"large.{kind}", rows * COLUMNS * 8
    reader = parts(rows)
    if kind == "parquet":
        with pyarrow.parquet.ParquetWriter(path, reader.schema) as file:
            # one row group: what is read of it at once is for the reader to decide
            file.write_table(reader.read_all(), row_group_size=rows)
    else:
        with pyarrow.csv.CSVWriter(path, reader.schema) as file:
            for part in reader:
                file.write_batch(part)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "state"), str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found, version, taken, arrow_taken = done.stdout.split()
    assert int(found) == rows
    assert (tmp_path / "state/files" / version).stat().st_size > size > arrow_may_take
    assert int(taken) < may_take, f"{int(taken) >> 20} MiB were taken for a table of {size >> 20} MiB"
    assert int(arrow_taken) < arrow_may_take, f"Arrow took {int(arrow_taken) >> 20} MiB of a table of {size >> 20} MiB"
