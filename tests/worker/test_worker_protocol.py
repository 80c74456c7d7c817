"""The bytes between a worker and its daemon: what is said comes out again, and what lies is refused."""

from __future__ import annotations

import fcntl
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeer import codec
from fedpeer.errors import LocalProtocolError, RemoteProtocolError
from fedpeer.worker import protocol
from fedpeer.worker.protocol import (
    Agree,
    Answer,
    Checkpoint,
    Done,
    Failed,
    Progress,
    Receive,
    Request,
    Resume,
    Send,
    Start,
    Sum,
    TotalAnswer,
    Value,
)

KEY = bytes(range(32))
SMALL, LARGE = memoryview(b"abc"), memoryview(bytes(range(256)) * 1000)
SEALED_BUT_ONE = [protocol.SEALS & ~seal for seal in (1, 2, 4, 8)]


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = list(Path("/proc/self/fd").iterdir())
    yield
    assert list(Path("/proc/self/fd").iterdir()) == before


def across(message: Any, kind: Any, **options: Any) -> Any:
    frame, descriptors = protocol.pack(message)
    assert protocol.size_of(frame[:4]) == len(frame) - 4
    return protocol.unpack(kind, frame[4:], descriptors, **options)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, protocol.Message):
        return type(a) is type(b) and all(same(getattr(a, f), getattr(b, f)) for f in a.__struct_fields__)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return bool(a == b)


@pytest.mark.parametrize(
    "message",
    [
        Send("bob", "note", b"header", [SMALL, LARGE, memoryview(b""), LARGE[:70_001], SMALL]),
        Receive("bob", "note"),
        Sum("g", [["x", "float64", [2, 2], ["fixed", 32, 55]]], np.arange(256, dtype=np.uint32)),
        Sum("g", [], np.arange(100_000, dtype=np.uint32)),
        Sum("g", [], np.empty(0, dtype=np.uint32)),
        Agree("same", b"h" * 70_000, []),
        Checkpoint(3, (b"h", [LARGE]), (b"", []), KEY),
        Progress(1, 2, {"loss": 0.5}),
        Done([("model", ("model", b"m" * 100_000)), ("report", ("report", b"{}"))]),
        Failed("stage", "it failed – so", "do this"),
    ],
)
def test_a_request_comes_out_as_it_went_in(message: Any) -> None:
    assert same(across(message, Request), message)


@pytest.mark.parametrize(
    "message",
    [Value(b"header", [SMALL, LARGE]), TotalAnswer(np.full(70_000, 2**24 - 1, dtype=np.uint32), ["a", "b"])],
)
def test_an_answer_comes_out_as_it_went_in(message: Any) -> None:
    assert same(across(message, Answer), message)


def test_any_sizes_of_buffers_come_out_as_they_went_in(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(60):
        sizes = [chance.choice([0, 1, 63, 64, 65, 4095, 65_535, 65_536, 65_537]) for _ in range(chance.randrange(9))]
        message = Send("bob", "t", chance.randbytes(9), [memoryview(chance.randbytes(size)) for size in sizes])
        assert same(across(message, Request), message)


def test_a_start_carries_bytes_files_and_a_checkpoint(tmp_path: Path) -> None:
    table, empty = tmp_path / "table", tmp_path / "empty"
    table.write_bytes(LARGE)
    empty.write_bytes(b"")
    inputs = [("table", "table", table), ("rows", "rows", bytes(LARGE)), ("x", "rows", b"small"), ("e", "rows", empty)]
    resume = Resume(2, (b"h", [LARGE, SMALL]), (b"", []), KEY)
    start = Start("a.b:c", b"{}", "alice", [("alice", "guest"), ("bob", "host")], KEY, resume, inputs)
    arrived = across(start, Start, files=True)
    assert same(arrived.resume, resume)
    assert arrived.roles == start.roles
    assert [bytes(content) for _, _, content in arrived.inputs] == [bytes(LARGE), bytes(LARGE), b"small", b""]


def test_what_lies_beside_a_message_is_mapped_and_cannot_be_written() -> None:
    frame, (descriptor,) = protocol.pack(Value(b"", [LARGE]))
    with pytest.raises(PermissionError):
        os.pwrite(descriptor, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)
    reopened = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.pwrite(reopened, b"x", 0)
    os.close(reopened)
    arrived = protocol.unpack(Answer, frame[4:], [descriptor])
    assert arrived.buffers[0].readonly
    assert arrived.buffers[0].obj.__class__.__name__ == "mmap"


# what lies


def memory_file(data: bytes, seals: int) -> int:
    descriptor = os.memfd_create("lie", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(descriptor, data)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def frame_of(message: Any) -> bytes:
    frame, descriptors = protocol.pack(message)
    protocol.close(descriptors)
    return frame[4:]


BESIDE = Send("bob", "note", b"", [memoryview(b"x" * 70_016)])


@pytest.mark.parametrize("seals", SEALED_BUT_ONE)
def test_a_memory_file_without_one_of_its_seals_is_refused(seals: int) -> None:
    with pytest.raises(RemoteProtocolError, match="not sealed"):
        protocol.unpack(Request, frame_of(BESIDE), [memory_file(b"x" * 70_016, seals)])
    assert protocol.unpack(Request, frame_of(BESIDE), [memory_file(b"x" * 70_016, protocol.SEALS)]) == BESIDE


def test_a_descriptor_that_is_no_memory_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 70_016)
    reading, writing = os.pipe()
    for descriptor in (os.open(file, os.O_RDONLY), os.open("/dev/zero", os.O_RDONLY), reading):
        with pytest.raises(RemoteProtocolError, match="not sealed"):
            protocol.unpack(Request, frame_of(BESIDE), [descriptor])
    os.close(writing)


@pytest.mark.parametrize("size", [0, 70_015, 70_017, 140_032])
def test_a_memory_file_of_another_size_than_was_said_is_refused(size: int) -> None:
    with pytest.raises(RemoteProtocolError, match="of the size that was said"):
        protocol.unpack(Request, frame_of(BESIDE), [memory_file(b"x" * size, protocol.SEALS)])


def test_a_size_beyond_the_cap_is_refused_before_anything_is_mapped() -> None:
    sparse = os.memfd_create("lie", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(sparse, protocol.MAX_BESIDE + 64)
    fcntl.fcntl(sparse, fcntl.F_ADD_SEALS, protocol.SEALS)
    body = codec.encode(["send", "bob", "note", b"\0", [b"\1" + (protocol.MAX_BESIDE + 64).to_bytes(8, "little")]])
    with pytest.raises(RemoteProtocolError, match="of the size that was said"):
        protocol.unpack(Request, body, [sparse])


def test_fewer_and_more_descriptors_than_a_message_names_are_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="fewer descriptors"):
        protocol.unpack(Request, frame_of(BESIDE), [])
    with pytest.raises(RemoteProtocolError, match="more descriptors"):
        protocol.unpack(Request, frame_of(Receive("bob", "note")), [memory_file(b"", protocol.SEALS)])
    with pytest.raises(RemoteProtocolError, match="more descriptors"):
        protocol.unpack(Request, frame_of(BESIDE), [memory_file(b"x" * 70_016, protocol.SEALS) for _ in range(2)])


def test_a_worker_cannot_hand_over_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100)
    body = codec.encode(["send", "bob", "note", b"\0", [b"\2" + (100).to_bytes(8, "little")]])
    with pytest.raises(RemoteProtocolError):
        protocol.unpack(Request, body, [os.open(file, os.O_RDONLY)])
    with pytest.raises(RemoteProtocolError, match="a file where none may be"):
        protocol.unpack(Request, body, [])


def send_fields(**changed: Any) -> list[Any]:
    return list({"kind": "send", "to": "bob", "tag": "t", "header": b"\0h", "buffers": [b"\0b"], **changed}.values())


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        ["steal"],
        ["value", b"\0", []],  # an answer is no request
        send_fields(to=1),
        send_fields(to="b" * 257),
        send_fields(header="h"),
        send_fields(header=b""),
        send_fields(header=b"\3h"),
        send_fields(header=b"\1h"),
        send_fields(buffers=b"\0"),
        send_fields(buffers=["text"]),
        send_fields(more=1),
        send_fields()[:-1],
        ["sum", "t", [], b"\0abc"],
        ["sum", "t", [], 7],
        ["sum", "t", [], []],
        ["checkpoint", -1, [b"\0", []], [b"\0", []], b"\0" + KEY],
        ["checkpoint", True, [b"\0", []], [b"\0", []], b"\0" + KEY],
        ["checkpoint", 1, [b"\0", []], [b"\0", []], b"\0" + KEY[1:]],
        ["checkpoint", 1, [b"\0"], [b"\0", []], b"\0" + KEY],
        ["progress", 1, 2, {"loss": "high"}],
        ["progress", 1, 1 << 31, {}],
        ["progress", 1, 2, {str(number): 0.5 for number in range(65)}],
        ["done", [["model", "model", b"\0"]]],
        ["done", {"model": b"\0"}],
        ["failed", "stage", "m" * 4097, ""],
    ],
)
def test_what_is_not_exactly_a_request_is_refused(value: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        protocol.unpack(Request, codec.encode(value), [])


def test_only_the_one_encoding_of_a_message_is_taken() -> None:
    body = frame_of(Receive("bob", "note"))
    assert protocol.unpack(Request, body, []) == Receive("bob", "note")
    for other in (body + b"\0", body[:-1], body.replace(b"\xa3bob", b"\xd9\x03bob"), b"\xc1", b""):
        with pytest.raises(RemoteProtocolError):
            protocol.unpack(Request, other, [])


def test_no_damaged_frame_raises_anything_else(seed: int) -> None:
    chance = random.Random(seed)
    frames = [
        frame_of(BESIDE),
        frame_of(Checkpoint(3, (b"h", [SMALL]), (b"", []), KEY)),
        frame_of(Progress(1, 2, {"a": 1.0})),
    ]
    refused = 0
    for _ in range(3000):
        body = bytearray(chance.choice(frames))
        for _ in range(chance.randrange(1, 4)):
            body[chance.randrange(len(body))] = chance.randrange(256)
        descriptors = [memory_file(b"x" * 70_016, protocol.SEALS) for _ in range(chance.randrange(2))]
        try:
            protocol.unpack(Request, bytes(body), descriptors)
        except RemoteProtocolError:
            refused += 1
    assert refused > 1000


def test_the_length_of_a_frame_has_a_cap() -> None:
    assert protocol.size_of((1 << 20).to_bytes(4, "little")) == 1 << 20
    for prefix in (bytes(4), (2**20 + 1).to_bytes(4, "little"), b"\xff" * 4, b"\1", b"\1\0\0"):
        with pytest.raises(RemoteProtocolError):
            protocol.size_of(prefix)


def test_a_message_that_would_be_refused_is_not_sent(tmp_path: Path) -> None:
    with pytest.raises(LocalProtocolError):
        protocol.pack(Sum("t", [["x" * 1000] * 2000], np.empty(0, np.uint32)))
    file = tmp_path / "file"
    file.write_bytes(b"x")
    many = [(str(number), "rows", file) for number in range(protocol.MAX_DESCRIPTORS)]
    with pytest.raises(LocalProtocolError):
        protocol.pack(Start("a.b:c", b"{}", "alice", [], KEY, None, many))
    with pytest.raises(FileNotFoundError):
        protocol.pack(Start("a.b:c", b"{}", "a", [], KEY, None, [("x", "rows", file), ("y", "rows", tmp_path / "no")]))
