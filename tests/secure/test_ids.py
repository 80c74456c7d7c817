"""Ids: one normal form whichever way a column is read, composite ids, and what stands for them in a session."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedpeer.errors import DataError
from fedpeer.secure import ids
from fedpeer.secure.ids import Form, ids_of, normal_form
from fedpeer.stage import Table

SESSION = bytes(range(32))
VECTOR = "eb917bf200c937b01c6bfa74693851506110a96547cd39ca566af1ef2a8081cf402c746cc750da1041c88b7c1028837e"
FORMS: tuple[Form, ...] = ("text", "digits", "integer", "phone")


def table(**columns: list[str | None]) -> Table:
    return Table(pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}), id="id")


def values(given: list[str | None], form: Form = "text", casefold: bool = False) -> list[bytes]:
    found = ids_of(table(id=given), {"id": form}, casefold, repeated=True)
    words: list[bytes] = found.values.to_pylist()
    return [words[i] for i in found.id_of]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=12), st.sampled_from(FORMS))
def test_the_normal_form_of_a_normal_form_is_itself(text: str, form: Form) -> None:
    for casefold in (False, True):
        once = normal_form(text, casefold, form)
        assert normal_form(once, casefold, form) == once


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.text(st.characters(max_codepoint=127), max_size=6)), max_size=6), st.booleans())
@example([chr(i) + "x Y" + chr(i) for i in range(128)], True)
@example([], False)
@example([None], True)
def test_a_column_read_at_once_has_the_normal_forms_of_its_values(given_: list[str | None], casefold: bool) -> None:
    """Plain text goes another way than text with other letters; one more value sends it that way, too."""
    expected = [normal_form(value, casefold).encode() for value in given_ if value is not None]
    expected = [word for word in expected if word]
    assert values(given_, casefold=casefold) == expected
    assert values([*given_, "ß"], casefold=casefold) == [*expected, b"ss" if casefold else "ß".encode()]


@pytest.mark.parametrize(
    ("form", "one", "other"),
    [
        ("digits", "12-34 56", "123456"),
        ("digits", "１２", "12"),
        ("integer", "007", " 7 "),
        ("integer", "+7", "7"),
        ("integer", "-0", "0"),
        ("phone", "+49 (171) 123-4567", "0049171/123.4567"),
    ],
)
def test_a_declared_form_makes_these_one(form: Form, one: str, other: str) -> None:
    assert normal_form(one, False, form) == normal_form(other, False, form) != ""


def test_zeros_before_a_number_count_unless_it_is_declared_as_one() -> None:
    assert normal_form("007", False) != normal_form("7", False)
    assert normal_form("007", False, "digits") != normal_form("7", False, "digits")
    assert normal_form("-7", False, "integer") != normal_form("7", False, "integer")


@pytest.mark.parametrize(
    ("form", "value"), [("integer", "7a"), ("integer", ""), ("phone", "0171 1234567"), ("digits", "x")]
)
def test_a_value_without_the_declared_form_is_left_out_and_counted(form: Form, value: str) -> None:
    found = ids_of(table(id=["+49 171 1234567", value, "12", None]), {"id": form}, False, repeated=True)
    assert 1 not in found.rows
    assert found.left_out == 4 - len(found.rows) >= 2


def test_parts_of_a_composite_id_do_not_run_into_each_other() -> None:
    two = table(id=["ab", "a", "a", "", "x"], town=["c", "bc", None, "y", "1:z"])
    found = ids_of(two, {"id": "text", "town": "text"}, False, repeated=False)
    assert found.values.to_pylist() == [b"2:ab1:c", b"1:a2:bc", b"1:x3:1:z"]
    assert found.rows.tolist() == [0, 1, 4]
    with pytest.raises(DataError, match="no column 'city'"):
        ids_of(two, {"id": "text", "city": "text"}, False, repeated=False)


def test_a_repeated_id_is_refused_with_its_rows_or_kept_with_all_of_them() -> None:
    given_ = table(id=["a", None, "b", " a", "c", "a"])
    with pytest.raises(DataError, match=r"in rows 0 and 3 \(from 0\)"):
        ids_of(given_, {"id": "text"}, False, repeated=False)
    found = ids_of(given_, {"id": "text"}, False, repeated=True)
    assert found.values.to_pylist() == [b"a", b"b", b"c"]
    assert found.id_of.tolist() == [0, 1, 0, 2, 0]
    assert found.rows.tolist() == [0, 2, 3, 4, 5]


def test_an_id_column_in_pieces_is_read_as_one() -> None:
    pieces = pa.chunked_array([pa.array(["a", "b"]), pa.array([], pa.string()), pa.array(["c"])])
    assert ids_of(Table(pa.table({"id": pieces}), id="id"), {"id": "text"}, False, repeated=False).rows.tolist() == [
        0,
        1,
        2,
    ]
    empty = pa.chunked_array([], pa.string())
    assert len(ids_of(Table(pa.table({"id": empty}), id="id"), {"id": "text"}, False, repeated=False)) == 0


def test_hashes_of_one_id_are_unrelated_between_sessions_and_uses() -> None:
    found = set()
    for session in (SESSION, bytes(32)):
        each = ids.digests(session, pa.array([b"x"], pa.large_binary()))
        found |= {each.blocks.tobytes(), each.names.tobytes(), each.order.tobytes()}
    assert len(found) == 6


def test_the_hash_of_an_id_in_this_version_is_this() -> None:
    each = ids.digests(SESSION, pa.array([b"alice@example.org"], pa.large_binary()))
    assert (each.blocks.tobytes() + each.names.tobytes() + each.order.tobytes()).hex() == VECTOR


def test_rows_that_begin_alike_are_ordered_by_their_rest() -> None:
    rows = np.zeros((300, 12), np.uint8)
    rows[:, 10] = np.random.Generator(np.random.PCG64(3)).permutation(300) % 256
    rows[:, 11] = np.arange(300) % 251
    there = [row.tobytes() for row in rows[ids.ascending(rows)]]
    assert there == sorted(row.tobytes() for row in rows)
    assert ids.are_ascending(np.unique(rows, axis=0))
    assert not ids.are_ascending(np.array([list(row) for row in there[:3]] + [list(there[1])], np.uint8))


def test_places_are_those_of_whole_rows() -> None:
    rows = np.array([[1] * 16, [1] * 15 + [2], [0] * 16], np.uint8)
    assert ids.places_in(rows, rows[[2, 0, 1, 1]]).tolist() == [2, 0, 1, 1]
    assert ids.places_in(rows, np.array([[1] * 15 + [3]], np.uint8)).tolist() == [-1]
    assert ids.places_in(rows, rows[:0]).tolist() == []
    assert ids.all_different(rows)
    assert not ids.all_different(rows[[0, 1, 2, 0]])
