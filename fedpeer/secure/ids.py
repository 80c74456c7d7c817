"""Ids of rows: their normal form, whole columns at once, and what stands for them in a session.

Rules
* What is compared is bytes: the normal form in UTF-8, or of a composite id each part after its length.
* A normal form is declared for each column, equal at all participants, and applied twice it is the same.
* A row without an id, with a blank part or with one that has no such form is left out, and counted.
* Hashes are keyed by the session. Of one hash of 48 bytes are: the block that is computed with, what stands for the id
  in a result, and its place in the order of a result. Two ids of 3 · 10^7 share a block with probability 2^-79.
* Ids stay in Arrow's buffers: a million of them are hashed in about a second, and are never a list.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fedpeer.crypto import hash_rows
from fedpeer.errors import DataError
from fedpeer.stage import Table

Bytes = npt.NDArray[np.uint8]
Form = Literal["text", "digits", "integer", "phone"]
"""text: NFKC without white space around it. digits: of that the digits 0 to 9 alone. integer: a sign and digits,
without zeros before them ("007" is "7"). phone: + and 7 to 15 digits as in E.164; 00 may stand for the +, and blanks,
hyphens, dots, slashes and brackets anywhere. Each begins with NFKC."""

NAME_BYTES: Final = 16
_DIGEST_BYTES: Final = 48
_SPACE: Final = "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f "
"""what str.strip takes away, of ASCII"""
_CHUNK: Final = 1 << 16


@dataclass(frozen=True)
class Ids:
    """The ids of a table. `values`: Arrow binary, all different, in the order in which they come first."""

    values: pa.Array
    rows: npt.NDArray[np.int64]
    """the rows that have an id, ascending"""
    id_of: npt.NDArray[np.int64]
    """of each of these rows, the number of its id in `values`"""
    left_out: int

    def __len__(self) -> int:
        return len(self.values)


def ids_of(table: Table, forms: Mapping[str, Form], casefold: bool, *, repeated: bool) -> Ids:
    """The ids of a table from the columns in `forms`, in its order.

    Raises DataError for a column that is not there or not text, and for a repeated id unless `repeated`.
    """
    parts = [_column(table, name, form, casefold) for name, form in forms.items()]
    present = parts[0].is_valid()
    for part in parts[1:]:
        present = pc.and_(present, part.is_valid())
    rows = np.flatnonzero(present.to_numpy(zero_copy_only=False)).astype(np.int64)
    parts = [part.filter(present) for part in parts]
    joined = parts[0] if len(parts) == 1 else composite(parts)
    coded = joined.cast(pa.large_binary()).dictionary_encode()
    id_of = coded.indices.to_numpy().astype(np.int64)
    if not repeated and len(coded.dictionary) < len(rows):
        first = np.unique(id_of, return_index=True)[1]
        again = int(np.setdiff1d(np.arange(len(rows)), first)[0])
        raise DataError(
            f"the id column {next(iter(forms))!r} has one id, in normal form, in rows "
            f"{rows[first[id_of[again]]]} and {rows[again]} (from 0)",
            hint="keep one row for each id",
        )
    return Ids(coded.dictionary, rows, id_of, table.n_samples - len(rows))


def _column(table: Table, name: str, form: Form, casefold: bool) -> pa.Array:
    """A column in normal form, null where a row has none."""
    if name not in table.data.column_names:
        raise DataError(f"the table has no column {name!r}, which belongs to its ids")
    column = table.data.column(name)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise DataError(f"the id column {name!r} is {column.type}, not text")
    column = column.cast(pa.large_string()).combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # of no rows
        column = pa.concat_arrays([*column.chunks, pa.array([], pa.large_string())])
    if form == "text" and pc.all(pc.string_is_ascii(column)).as_py() is not False:  # NFKC changes nothing then
        column = pc.utf8_trim(pc.ascii_lower(column) if casefold else column, characters=_SPACE)
    else:
        words = [None if word is None else normal_form(word, casefold, form) for word in column.to_pylist()]
        column = pa.array(words, pa.large_string())
    return pc.if_else(pc.equal(pc.binary_length(column), 0), pa.scalar(None, pa.large_string()), column)


def composite(parts: Sequence[pa.Array]) -> pa.Array:
    """Ids of several parts: each after its length in bytes and a colon, so that ("ab", "c") is not ("a", "bc")."""
    pieces: list[Any] = []
    for part in parts:
        pieces += [pc.binary_length(part).cast(pa.large_string()), pa.scalar(":", pa.large_string()), part]
    return pc.binary_join_element_wise(*pieces, pa.scalar("", pa.large_string()))


def normal_form(value: str, casefold: bool, form: Form = "text") -> str:
    """What ids are compared by; "" for a value that is blank or has no such form."""
    text = unicodedata.normalize("NFKC", value)
    if form == "digits":
        return re.sub(r"[^0-9]", "", text)
    if form == "integer":
        found = re.fullmatch(r"([+-]?)0*([0-9]+)", text.strip())
        return "" if found is None else ("-" if found[1] == "-" and found[2] != "0" else "") + found[2]
    if form == "phone":
        found = re.fullmatch(r"(?:\+|00)([1-9][0-9]{6,14})", re.sub(r"[\s()./-]", "", text))
        return "" if found is None else "+" + found[1]
    if casefold:
        text = unicodedata.normalize("NFKC", text.casefold())
    return text.strip()


# what stands for them


@dataclass(frozen=True)
class Digests:
    """Of each id, three parts of its hash. They are known to whoever knows the session and can guess the id."""

    blocks: npt.NDArray[np.uint64]
    """(n, 2), what an oblivious function is evaluated at"""
    names: Bytes
    """(n, 16), what a result says"""
    order: Bytes
    """(n, 16), what a result is ordered by"""


def digests(session: bytes, values: pa.Array) -> Digests:
    """The hashes of ids, shape (n, 48) in all."""
    parts = [hash_rows("fp.psi.id", chunk, key=session, size=_DIGEST_BYTES) for chunk in chunks(values, _CHUNK)]
    rows = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, _DIGEST_BYTES)
    blocks, names, order = (np.ascontiguousarray(rows[:, at : at + NAME_BYTES]) for at in (0, 16, 32))
    return Digests(blocks.view(np.uint64), names, order)


def chunks(values: pa.Array, size: int) -> list[Any]:
    """The ids as arrays of bytes, `size` at a time."""
    return [values[at : at + size].to_numpy(zero_copy_only=False) for at in range(0, len(values), size)]


def ascending(rows: Bytes) -> npt.NDArray[np.int64]:
    """The places of rows of 8 to 16 bytes in the order of their bytes."""
    first, rest = _keys(rows)
    order = np.argsort(first)
    ordered = first[order]
    if (ordered[1:] == ordered[:-1]).any():
        order = np.lexsort([rest, first])
    return order.astype(np.int64, copy=False)


def are_ascending(rows: Bytes) -> bool:
    """Whether rows of 8 to 16 bytes come in the order of their bytes, and none twice."""
    first, rest = _keys(rows)
    less, same = first[:-1] < first[1:], first[:-1] == first[1:]
    return bool((less | (same & (rest[:-1] < rest[1:]))).all())


def places_in(rows: Bytes, wanted: Bytes) -> npt.NDArray[np.int64]:
    """Of each row of `wanted`, its place in `rows`, -1 where it is not there. Rows of `rows` are all different."""
    out = np.full(len(wanted), -1, np.int64)
    if not len(rows) or not len(wanted):
        return out
    order, asked = ascending(rows), np.argsort(_keys(wanted)[0])
    (first, rest), (first_asked, rest_asked) = _keys(rows), _keys(wanted)
    ordered, sought = first[order], first_asked[asked]
    begin, end = (np.searchsorted(ordered, sought, side) for side in ("left", "right"))
    for i in range(int((end - begin).max())):  # as many as begin alike: one, but for a rare accident
        may = np.flatnonzero(begin + i < end)
        place, question = order[begin[may] + i], asked[may]
        same = rest[place] == rest_asked[question]
        out[question[same]] = place[same]
    return out


def all_different(rows: Bytes) -> bool:
    """Whether no two of these rows of 8 bytes or more are equal."""
    if rows.shape[1] <= 16:
        return are_ascending(rows[ascending(rows)])
    return len({row.tobytes() for row in rows}) == len(rows)


def _keys(rows: Bytes) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Rows of 8 to 16 bytes as two numbers, of the first eight and of the rest, in the order of the bytes."""
    both = np.zeros((2, len(rows), 8), np.uint8)
    both[0], both[1, :, : rows.shape[1] - 8] = rows[:, :8], rows[:, 8:]
    first, rest = both.view(">u8")[:, :, 0].astype(np.uint64)
    return first, rest
