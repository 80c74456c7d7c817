"""Parsing decodes a message once, by its type; here against the codec, which decodes it step by step."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedpeer import codec
from fedpeer.aggregation.messages import KINDS, Signed, parse
from fedpeer.errors import RemoteProtocolError

SIGNATURE = bytes(64)
D, A = b"d" * 32, b"a" * 16
FIELDS: dict[str, list[Any]] = {
    "ADVERTISE": [0, D, D, D],
    "SHARE": [4, bytes(120)],
    "ACK": [1, [[3, A], [199, A]]],
    "READY": [["fit", 1, 0], D, D, D],
    "PROPOSAL": ["START", 300, ["U", D, D, b"\x0f", b"\x0f", D, None, ["ABORT", D]], None],
    "PREVOTE": ["COMMIT", 0, D],
    "PRECOMMIT": ["COMMIT", 70_000, None],
    "SCATTER": [D, 2, 300_000, D],
    "RECEIPT": [D, 1, b"\x0f"],
    "CUT": [D, 1, b"\x0f"],
    "SUM": [D, b"\x0f", 3, D],
    "RELEASE": [D, b"\x0f", [[1, D, D, bytes(64)]]],
    "OPEN": [1, A, "b", D],
    "SHARE_B": [D, b"\x0f", [[1, D, D, bytes(64)]]],
    "FINAL": [D, b"\x0f", 1, D],
    "CERTIFICATE": ["COMMIT", 1, ["S", D, b"\x0f", D], [[0, bytes(64)], [2, bytes(64)]]],
    "EVIDENCE": ["E1", [b"one", b"two"]],
}
KEYS = st.text(max_size=2) | st.integers(-5, 1 << 33)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 33) | st.floats() | st.binary(max_size=40) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=2),
    max_leaves=6,
)


def step_by_step(raw: bytes) -> Signed:
    body = raw[:-64]
    match codec.decode(body):
        case [1, bytes(), str(kind), int(), *_] if kind in KINDS and len(body) <= KINDS[kind][1]:
            message = codec.decode_as(KINDS[kind][0], body)
            return Signed(message, body, raw[-64:], kind, message.sender, message.sid)
    raise RemoteProtocolError("no message")


def outcome(function: Any, raw: bytes) -> Any:
    try:
        return function(raw)
    except RemoteProtocolError:
        return None


def encoded(kind: str, fields: list[Any]) -> bytes:
    return msgpack.packb([1, D, kind, 5, *fields], use_bin_type=True) + SIGNATURE


def test_there_is_an_example_of_each_kind() -> None:
    assert FIELDS.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", FIELDS)
def test_a_message_of_each_kind_is_taken_as_the_codec_takes_it(kind: str) -> None:
    raw = encoded(kind, FIELDS[kind])
    assert parse(raw) == step_by_step(raw)


@given(st.sampled_from(sorted(FIELDS)), st.data())
def test_a_message_with_another_field_is_taken_only_if_the_codec_takes_it(kind: str, data: st.DataObject) -> None:
    whole = [1, D, kind, 5, *FIELDS[kind]]
    place = data.draw(st.integers(0, len(whole)))
    whole[place : place + data.draw(st.integers(0, 1))] = data.draw(st.lists(VALUES, max_size=2))
    raw = msgpack.packb(whole, use_bin_type=True) + SIGNATURE
    assert outcome(parse, raw) == outcome(step_by_step, raw)


@given(st.sampled_from(sorted(FIELDS)), st.integers(0, 400), st.binary(max_size=3), st.integers(0, 2))
@example("PREVOTE", 0, b"\xdc\x00\x07", 1)  # the length of an array in three bytes instead of one
@example("FINAL", 0, b"\xc7", 1)
def test_a_message_with_other_bytes_is_taken_only_if_the_codec_takes_it(
    kind: str, place: int, put: bytes, instead_of: int
) -> None:
    raw = encoded(kind, FIELDS[kind])
    place = min(place, len(raw) - 64)
    raw = raw[:place] + put + raw[place + instead_of :]
    assert outcome(parse, raw) == outcome(step_by_step, raw)


@pytest.mark.parametrize(
    "value",
    [
        [msgpack.ExtType(1, b"x")],
        [msgpack.Timestamp(1)],
        [{1: 2}],
        [1.0, float("nan")],
        [[[[[[[[[[[[[[1]]]]]]]]]]]]]],
    ],
)
def test_a_proposal_may_only_say_what_has_one_encoding(value: Any) -> None:
    raw = encoded("PROPOSAL", ["START", 0, value, None])
    taken = outcome(parse, raw)
    assert (taken is None) == (outcome(step_by_step, raw) is None)
    assert (taken is None) == (value[0] != 1.0)
    whole = encoded("PROPOSAL", ["START", 0.0, [1], None])  # an integer given as a float
    assert outcome(parse, whole) is None


@pytest.mark.parametrize("raw", [b"", bytes(64), bytes(63), b"\xc0" + bytes(64), b"\x91" * 60_000, b"\x91" * 70_000])
def test_what_is_no_message_is_refused_by_its_name_only(raw: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse(raw)


@pytest.mark.parametrize(("size", "taken"), [(500, True), (700, False)])
def test_a_message_over_the_cap_of_its_kind_is_refused(size: int, taken: bool) -> None:
    assert (outcome(parse, encoded("PROPOSAL", ["START", 0, [bytes(size)], None])) is not None) == taken
