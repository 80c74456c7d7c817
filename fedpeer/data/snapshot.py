"""A table as bytes: an Arrow IPC file whose digest names the content, so equal content gives equal bytes.

However the rows arrived (in chunks, as slices, with anything under their nulls), the file has batches of
`BATCH_ROWS`, columns without a validity bitmap unless a value is missing, and zeros where one is. The schema's
metadata says which columns are id and label.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as ipc

from fedpeer.stage import Table

ID, LABEL = b"fedpeer.id", b"fedpeer.label"
BATCH_ROWS = 65_536


def dump(table: Table) -> bytes:
    """The bytes of a table of float64, string and bool columns."""
    marks = {key: name.encode() for key, name in ((ID, table.id), (LABEL, table.label)) if name is not None}
    schema = pa.schema([pa.field(field.name, field.type) for field in table.data.schema], metadata=marks)
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, schema) as file:
        for start in range(0, table.n_samples, BATCH_ROWS):
            rows = table.data.slice(start, BATCH_ROWS)
            file.write_batch(pa.record_batch([_plain(column) for column in rows.columns], schema=schema))
    return bytes(sink.getvalue())


def _plain(column: pa.ChunkedArray) -> pa.Array:
    """The same values in fresh buffers: no offset, no bitmap without need, zeros under the nulls."""
    missing = pc.is_null(column).to_numpy() if column.null_count else None
    if pa.types.is_string(column.type):
        return pa.array(column.to_pylist(), pa.string())
    filled = column.fill_null(False if pa.types.is_boolean(column.type) else 0.0)
    return pa.array(np.ascontiguousarray(filled.to_numpy()), column.type, mask=missing)
