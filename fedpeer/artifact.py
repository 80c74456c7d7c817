"""What passes between stages, as bytes: the same value gives the same bytes at every peer.

Rules
* A table is an Arrow IPC file of float64, string and bool columns, in batches of `BATCH_ROWS`; its schema's metadata
  says which columns are id and label. However the rows arrived (in chunks, as slices, with anything under their
  nulls), a column has a validity bitmap only where a value is missing, and zeros there.
* Rows are one int64 array as a message value: length of the header, header, raw numbers (codec.py).
* A model is one safetensors file; its only metadata entry is the canonical JSON of `algorithm` and `facts`.
* A report is canonical JSON: sorted keys, no space, no NaN or infinity, keys are text.
* What is loaded may come from another peer or from a faulty worker: kinds, sizes, types and bounds are checked before
  anything is used, and only DataError is raised. Large arrays are views of the given bytes, not copies.

Source: the Arrow columnar format 1.x (IPC file), safetensors 0.4+ (8-byte length, JSON header, raw tensors).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import safetensors
import safetensors.numpy

from fedpeer import codec
from fedpeer.crypto import hash_
from fedpeer.errors import DataError, ProtocolError
from fedpeer.stage import Model, Output, Report, Rows, Table

Buffer = bytes | bytearray | memoryview
ID, LABEL = b"fedpeer.id", b"fedpeer.label"
BATCH_ROWS = 65_536
COLUMN_TYPES = (pa.float64(), pa.string(), pa.bool_())
TENSOR_TYPES = {
    "BOOL": "|b1",
    "U8": "|u1",
    "I8": "|i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F32": "<f4",
    "F64": "<f8",
}
MAX_JSON_BYTES = 16 << 20
MAX_JSON_DEPTH = 32
FACTS = "fedpeer"


def dump(output: Output) -> tuple[str, bytes]:
    """The kind ("table", "rows", "model" or "report") and the bytes. DataError for what the kind cannot hold."""
    match output:
        case Table():
            return "table", _dump_table(output)
        case Rows():
            return "rows", _dump_rows(output)
        case Model():
            return "model", _dump_model(output)
        case Report():
            return "report", _dump_json(output.values, "the report")
    raise DataError(f"a {type(output).__name__} is not a Table, Rows, Model or Report")


def load(kind: str, data: Buffer) -> Output:
    """The value of `dump`'s bytes. DataError if they are not exactly of this kind."""
    match kind:
        case "table":
            return _load_table(data)
        case "rows":
            return _load_rows(data)
        case "model":
            return _load_model(data)
        case "report":
            return Report(_load_json(data, "the report"))
    raise DataError(f"there is no output of kind {kind!r}")


def digest(data: Buffer) -> bytes:
    """The name of these bytes (32 bytes), the same as of the store's file of them."""
    return hash_("fp.file", data)


# tables


def _dump_table(table: Table) -> bytes:
    return b"".join(table_pieces(table.data.schema, table.data.to_batches(), table.id, table.label))


def table_pieces(
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    id: str | None,  # noqa: A002 - the word of a Table
    label: str | None,
) -> Iterator[bytes]:
    """`dump` of a table that need not fit in memory: the same bytes, piece by piece, from batches of any sizes.

    Raises DataError for columns that a table cannot hold.
    """
    for field in schema:
        if field.type not in COLUMN_TYPES:
            raise DataError(
                f"the column {field.name!r} is of type {field.type}", hint="cast to float64, string or bool"
            )
    marks = {key: name.encode() for key, name in ((ID, id), (LABEL, label)) if name is not None}
    plain = pa.schema([pa.field(field.name, field.type) for field in schema], metadata=marks)
    _check_schema(plain)
    sink = _Pieces()
    with pa.ipc.new_file(sink, plain) as file:
        for rows in _in_batches_of(BATCH_ROWS, batches):
            file.write_batch(pa.record_batch([_plain(column) for column in rows.columns], schema=plain))
            yield sink.taken()
    yield sink.taken()


class _Pieces(io.RawIOBase):
    """What was written since it was last taken."""

    def __init__(self) -> None:
        self._written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._written += data
        return len(data)

    def taken(self) -> bytes:
        taken, self._written = bytes(self._written), bytearray()
        return taken


def _in_batches_of(size: int, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The same rows in parts of `size`, but for the last."""
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        start = 0
        while count + batch.num_rows - start >= size:
            held.append(batch.slice(start, size - count))
            start += size - count
            yield pa.Table.from_batches(held)
            held, count = [], 0
        if start < batch.num_rows:
            held.append(batch.slice(start))
            count += batch.num_rows - start
    if held:
        yield pa.Table.from_batches(held)


def _plain(column: pa.ChunkedArray) -> pa.Array:
    """The same values in fresh buffers: no offset, no bitmap without need, zeros under the nulls."""
    if pa.types.is_string(column.type):
        return pa.array(column.to_pylist(), pa.string())
    filled = column.fill_null(False if pa.types.is_boolean(column.type) else 0.0)
    return pa.array(np.ascontiguousarray(filled.to_numpy()), column.type, mask=pc.is_null(column).to_numpy())


def _load_table(data: Buffer) -> Table:
    try:
        rows = pa.ipc.open_file(pa.py_buffer(data)).read_all()
        rows.validate(full=True)  # offsets and lengths that point outside are refused here
        marks = {key: name.decode() for key, name in (rows.schema.metadata or {}).items()}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"not a table: {type(error).__name__}") from None
    _check_schema(rows.schema)
    return Table(rows, marks.get(ID), marks.get(LABEL))


def _check_schema(schema: pa.Schema) -> None:
    if len(set(schema.names)) != len(schema.names):
        raise DataError("a table has two columns of one name")
    for field in schema:
        if field.type not in COLUMN_TYPES:
            raise DataError(f"the column {field.name!r} is of type {field.type}")
    for key, name in (schema.metadata or {}).items():
        if key not in (ID, LABEL) or name.decode() not in schema.names:
            raise DataError("a table names an id or label column that it does not have")


# rows


def _dump_rows(rows: Rows) -> bytes:
    header, (buffer,) = codec.pack_value(np.asarray(rows.index))
    data = len(header).to_bytes(8, "little") + header + buffer
    _load_rows(data)
    return data


def _load_rows(data: Buffer) -> Rows:
    view = memoryview(data)
    end = 8 + int.from_bytes(view[:8], "little")
    try:
        index = codec.unpack_value(view[8:end], [view[end:]])
    except ProtocolError as error:
        raise DataError(f"not an alignment: {error.message}") from None
    if not isinstance(index, np.ndarray) or index.dtype != np.int64 or index.ndim != 1 or (index < 0).any():
        raise DataError("an alignment is a list of row numbers (int64, not negative)")
    return Rows(index)


# models


def _dump_model(model: Model) -> bytes:
    arrays = {}
    for name, given in model.arrays.items():
        array = np.asarray(given)
        arrays[name] = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(array.shape)
        if arrays[name].dtype.str not in TENSOR_TYPES.values():
            raise DataError(f"the model's array {name!r} is of dtype {array.dtype}")
    facts = _dump_json({"algorithm": model.algorithm, "facts": model.facts}, "the model's facts")
    return bytes(safetensors.numpy.save(arrays, {FACTS: facts.decode()}))


def _load_model(data: Buffer) -> Model:
    view = memoryview(data).toreadonly()
    size = int.from_bytes(view[:8], "little")
    if not len(view) >= 8 + size or size > MAX_JSON_BYTES:
        raise DataError("not a model: its header is longer than the file, or than is allowed")
    try:
        safetensors.deserialize(bytes(view))  # type: ignore[no-untyped-call]  # refuses holes, overlaps and lengths that do not fit
        header = json.loads(bytes(view[8 : 8 + size]))
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise DataError(f"not a model: {type(error).__name__}") from None
    metadata = header.pop("__metadata__", {})
    if metadata.keys() != {FACTS}:
        raise DataError("not a model: its facts are missing")
    told = _load_json(metadata[FACTS].encode(), "the model's facts")
    if told.keys() != {"algorithm", "facts"} or not isinstance(told["algorithm"], str):
        raise DataError("not a model: its facts are not of the form that is known")
    if not isinstance(told["facts"], dict):
        raise DataError("not a model: its facts are not a table of names")
    arrays = {}
    for name, told_array in sorted(header.items()):
        if told_array["dtype"] not in TENSOR_TYPES:
            raise DataError(f"the model's array {name!r} is of type {told_array['dtype']}")
        first, last = told_array["data_offsets"]
        try:
            described = [TENSOR_TYPES[told_array["dtype"]], told_array["shape"]]
            arrays[name] = codec.unpack_array(described, view[8 + size + first : 8 + size + last])
        except ProtocolError as error:
            raise DataError(f"the model's array {name!r}: {error.message}") from None
    return Model(told["algorithm"], told["facts"], arrays)


# JSON


def _dump_json(value: Any, what: str) -> bytes:
    plain = _plain_json(value, what, MAX_JSON_DEPTH)
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    data = text.encode()
    if len(data) > MAX_JSON_BYTES:
        raise DataError(f"{what} is larger than {MAX_JSON_BYTES >> 20} MiB", hint="put arrays into a model or a table")
    return data


def _plain_json(value: Any, what: str, depth: int) -> Any:
    """Dicts with text keys, lists, text, finite numbers, booleans and None; numpy's become Python's."""
    if depth == 0:
        raise DataError(f"{what}: nested too deeply")
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not np.isfinite(value):
            raise DataError(f"{what}: a number is not finite", hint="None says that there is no number")
        return value
    if isinstance(value, list | tuple):
        return [_plain_json(item, what, depth - 1) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain_json(item, what, depth - 1) for key, item in value.items()}
    raise DataError(f"{what}: a {type(value).__name__} cannot be written as JSON")


def _load_json(data: Buffer, what: str) -> dict[str, Any]:
    if len(data) > MAX_JSON_BYTES:
        raise DataError(f"{what} is larger than {MAX_JSON_BYTES >> 20} MiB")
    try:
        value = json.loads(bytes(data))
        same = isinstance(value, dict) and _dump_json(value, what) == bytes(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what}: not JSON ({type(error).__name__})") from None
    if not same:
        raise DataError(f"{what}: not in canonical form")
    return dict(value)
