"""Values as bytes and back, with hard caps; typed records; arrays as raw bytes beside their description.

Rules
* msgpack, arrays only, shortest forms. What does not re-encode to the very same bytes is refused, so one
  value has one encoding. Hash and sign *received* bytes, never a re-encoding.
* No extension type, no map with keys that are not text, depth at most `MAX_DEPTH`; sizes are capped before
  anything is built.
* A record is a `Record`: a frozen msgspec struct encoded as an array. Extra elements, wrong types and
  booleans in the place of integers are refused.
* A *message value* (what a stage sends) is None, bool, int, float, str, bytes, a list, a dict with text keys,
  or a numpy array of the dtypes in `DTYPES`. Its arrays travel as raw little-endian bytes after the header.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import msgpack
import msgspec
import numpy as np
import numpy.typing as npt

from fedpeer.errors import LocalProtocolError, RemoteProtocolError

MAX_RECORD = 64 * 1024
MAX_DEPTH = 12
MAX_ARRAY = 65_536
MAX_MESSAGE_HEADER = 1 << 20
MAX_DIMENSIONS = 8
DTYPES = frozenset({"|b1", "|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f4", "<f8"})

Buffer = bytes | bytearray | memoryview


class Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A typed record: an array on the wire, its fields in the order of the class."""


R = TypeVar("R")


def encode(value: Any) -> bytes:
    """Encode plain data or a Record canonically. Raises LocalProtocolError for what has no encoding."""
    try:
        packed = msgpack.packb(msgspec.to_builtins(value, builtin_types=(bytes,)), use_bin_type=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise LocalProtocolError(f"no encoding for this value: {error}") from None
    return bytes(packed)


def decode(data: Buffer, *, limit: int = MAX_RECORD) -> Any:
    """Decode canonical bytes of at most `limit` bytes to plain data. Raises RemoteProtocolError."""
    if len(data) > limit:
        raise RemoteProtocolError(f"{len(data)} bytes where at most {limit} are allowed")
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=limit,
            max_bin_len=limit,
            max_array_len=MAX_ARRAY,
            max_map_len=1024,
            max_ext_len=0,
        )
    except Exception as error:  # msgpack raises many kinds; none may escape as itself
        raise RemoteProtocolError(f"not msgpack: {type(error).__name__}") from None
    _check_depth(value, MAX_DEPTH)
    try:
        same = msgpack.packb(value, use_bin_type=True) == bytes(data)
    except Exception as error:
        raise RemoteProtocolError(f"not canonical: {type(error).__name__}") from None
    if not same:
        raise RemoteProtocolError("not the canonical encoding")
    return value


def decode_as(kind: type[R], data: Buffer, *, limit: int = MAX_RECORD) -> R:
    """Decode bytes as one typed record; everything that is not exactly that is refused (RemoteProtocolError)."""
    value = decode(data, limit=limit)
    try:
        record = msgspec.convert(value, kind, strict=True, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise RemoteProtocolError(f"not a {kind.__name__}: {error}") from None
    if encode(record) != bytes(data):  # a field left to its default, an integer given as float
        raise RemoteProtocolError(f"not the canonical encoding of a {kind.__name__}")
    return record


def _check_depth(value: Any, depth: int) -> None:
    if isinstance(value, list | dict):
        if depth == 0:
            raise RemoteProtocolError("nested too deeply")
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(item, depth - 1)


# message values: a header and the arrays beside it


class _Array(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]


def pack_value(value: Any) -> tuple[bytes, list[memoryview]]:
    """Split a message value into its header and the raw bytes of its arrays, in the order they occur.

    Arrays are not copied when they are C-contiguous and little-endian. Raises LocalProtocolError for
    objects, text arrays, and numbers msgpack cannot carry.
    """
    buffers: list[memoryview] = []
    shapes: list[list[Any]] = []
    tree = _strip(value, MAX_DEPTH // 2, buffers, shapes)
    return encode([tree, shapes]), buffers


def unpack_value(header: Buffer, buffers: Sequence[Buffer]) -> Any:
    """The message value of a header and its buffers; arrays are read-only views where possible.

    Raises RemoteProtocolError if the lengths, dtypes or the shape of the tree are not exactly right.
    """
    parts = decode(header, limit=MAX_MESSAGE_HEADER)
    if not (isinstance(parts, list) and len(parts) == 2 and isinstance(parts[1], list)):
        raise RemoteProtocolError("not a message value")
    tree, described = parts
    if len(described) != len(buffers):
        raise RemoteProtocolError("a message value with other arrays than it names")
    arrays = [unpack_array(item, buffer) for item, buffer in zip(described, buffers, strict=True)]
    used: list[int] = []
    value = _build(tree, arrays, used)
    if len(used) != len(arrays):
        raise RemoteProtocolError("a message value with arrays it does not use")
    return value


def _strip(item: Any, depth: int, buffers: list[memoryview], shapes: list[list[Any]]) -> Any:
    """The tree of a value; its arrays go to `buffers`, their descriptions to `shapes`."""
    if depth == 0:
        raise LocalProtocolError("a message value is nested too deeply")
    if isinstance(item, np.generic):
        item = item.item()
    if item is None or isinstance(item, bool | int | float | str | bytes):
        return ["v", item]
    if isinstance(item, np.ndarray):
        array = np.ascontiguousarray(item).reshape(item.shape)
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        if array.dtype.str not in DTYPES:
            raise LocalProtocolError(f"an array of dtype {item.dtype} cannot be sent")
        buffers.append(memoryview(array.reshape(-1).view(np.uint8).data))
        shapes.append([array.dtype.str, list(array.shape)])
        return ["a", len(shapes) - 1]
    if isinstance(item, list | tuple):
        return ["l", [_strip(element, depth - 1, buffers, shapes) for element in item]]
    if isinstance(item, dict):
        if not all(isinstance(key, str) for key in item):
            raise LocalProtocolError("the keys of a message value are text")
        return ["d", [[key, _strip(item[key], depth - 1, buffers, shapes)] for key in sorted(item)]]
    raise LocalProtocolError(f"a {type(item).__name__} cannot be sent")


def _build(node: Any, arrays: Sequence[npt.NDArray[Any]], used: list[int]) -> Any:
    """The value of a tree; `used` counts its arrays, each of which occurs once and in order."""
    match node:
        case ["v", None | bool() | int() | float() | str() | bytes() as leaf]:
            return leaf
        case ["a", int(index)] if type(index) is int and index == len(used) < len(arrays):
            used.append(index)
            return arrays[index]
        case ["l", list(items)]:
            return [_build(item, arrays, used) for item in items]
        case ["d", list(items)]:
            built: dict[str, Any] = {}
            for pair in items:
                if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
                    raise RemoteProtocolError("not a message value")
                if built and pair[0] <= next(reversed(built)):
                    raise RemoteProtocolError("keys of a message value are sorted")
                built[pair[0]] = _build(pair[1], arrays, used)
            return built
    raise RemoteProtocolError("not a message value")


def unpack_array(described: Any, data: Buffer) -> npt.NDArray[Any]:
    """One array from [dtype, shape] and its raw bytes; length, dtype and shape are checked."""
    try:
        meta = msgspec.convert(described, _Array, strict=True)
    except msgspec.ValidationError as error:
        raise RemoteProtocolError(f"not an array: {error}") from None
    if meta.dtype not in DTYPES or len(meta.shape) > MAX_DIMENSIONS or any(n < 0 for n in meta.shape):
        raise RemoteProtocolError("not an allowed array")
    dtype = np.dtype(meta.dtype)
    count = 1
    for n in meta.shape:
        count *= n
    if count * dtype.itemsize != memoryview(data).nbytes:
        raise RemoteProtocolError("an array of another length than its shape says")
    array = np.frombuffer(data, dtype=dtype).reshape(meta.shape)
    array.flags.writeable = False
    return array
