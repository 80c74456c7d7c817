"""Frames: exactly what build makes is accepted, and nothing else."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedpeer.errors import LocalProtocolError, RemoteProtocolError
from fedpeer.wire.constants import BULK_WINDOW, MAX_HEAD, MAX_HEADER, MAX_PAYLOAD, MAX_PLAINTEXT
from fedpeer.wire.frames import Credit, Data, Head, Open, Ping, Pong, Rekey, build, parse

EXAMPLES: list[Head] = [
    Data(0, b""),
    Data(18, b"h" * MAX_HEADER),
    Open(3, ("mail", b"\x01\x02", 7)),
    Credit(2, BULK_WINDOW),
    Ping(),
    Pong(),
    Rekey(),
]


def frame(value: object, payload: bytes = b"") -> bytes:
    head = value if isinstance(value, bytes) else msgpack.packb(value)
    return bytes([len(head)]) + head + payload


@pytest.mark.parametrize("head", EXAMPLES, ids=lambda head: type(head).__name__)
def test_what_was_built_is_parsed(head: Head) -> None:
    parsed, payload = parse(build(head))
    assert parsed == head
    assert bytes(payload) == b""


def test_the_largest_frame_fits_into_one_noise_message() -> None:
    head = Data(18, b"h" * MAX_HEADER)
    built = build(head, MAX_PAYLOAD)
    assert len(built) + MAX_PAYLOAD <= MAX_PLAINTEXT
    assert parse(built + bytes(MAX_PAYLOAD))[0] == head


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"\x00",
        frame([0, 1]),  # a field is missing
        frame([0, 1, b"", b""]),  # one too many
        frame([3, 0]),
        frame([6]),  # no such kind
        frame([True, 1, b""]),  # a boolean for an integer
        frame([0, True, b""]),
        frame([0, 1.0, b""]),
        frame([0, -1, b""]),
        frame([0, 19, b""]),  # no such channel
        frame([0, 1, "text"]),
        frame([0, 1, b"h" * (MAX_HEADER + 1)]),
        frame([0, 1, b"h" * (MAX_HEADER + 1)])[:-1],
        frame([1, 1, []]),  # a name of nothing
        frame([1, 1, [1.5]]),
        frame([1, 1, [None]]),
        frame([1, 1, [True]]),
        frame([1, 1, [["nested"]]]),
        frame([1, 1, [{"a": 1}]]),
        frame([1, 1, [msgpack.ExtType(5, b"x")]]),
        frame([1, 1, [msgpack.Timestamp(1, 0)]]),
        frame([1, 1, list(range(9))]),
        frame([2, 1, 0]),
        frame([2, 1, BULK_WINDOW + 1]),
        frame([2, 1, 2**64 - 1]),
        frame([3], b"payload"),  # only data has a payload
        frame([2, 1, 5], b"\x00"),
        frame(b"\x91\xcc\x03"),  # [3], not in the shortest form
        frame(b"\xdc\x00\x01\x03"),
        frame(b"\x93\x00\x01\xc5\x00\x01x"),
        frame(b"\x93\x01\x01\x91\xa1\xff"),  # text that is not UTF-8
    ],
    ids=repr,
)
def test_everything_else_is_refused(wrong: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse(wrong)


@given(st.binary(max_size=300))
@example(b"\x01\x91")
@example(b"\xff" + b"\x91" * 255)
def test_garbage_is_refused_or_is_exactly_a_frame(garbage: bytes) -> None:
    try:
        head, payload = parse(garbage)
    except RemoteProtocolError:
        return
    assert build(head, len(payload)) + payload == garbage


@pytest.mark.parametrize(
    ("head", "size"),
    [
        (Data(0, b"h" * (MAX_HEAD + 1)), 0),
        (Data(0, b""), MAX_PAYLOAD + 1),
        (Open(0, ("x" * 240,)), 0),
        (Open(0, (1.5,)), 0),
        (Open(0, (True,)), 0),
        (Open(0, (object(),)), 0),
        (Open(0, (2**70,)), 0),
    ],
)
def test_our_own_faults_are_named(head: Head, size: int) -> None:
    with pytest.raises(LocalProtocolError):
        build(head, size)
