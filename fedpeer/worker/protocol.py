"""What a worker and its daemon say to each other, as bytes beside descriptors.

    frame     = u32 little-endian length, then msgpack [kind, field, …]            at most MAX_FRAME bytes
    binary    = 00, the bytes                while those of one frame come to at most INLINE_BYTES
              | 01, u64 size                 beside: the next part of the frame's memory file, aligned to ALIGN
              | 02, u64 size                 beside: the next file of its own (an input of `Start`)
    beside    = descriptors (SCM_RIGHTS) that come with the frame's first byte: the memory file, then the files

Rules
* Every binary field of a message (bytes, memoryview, array) is one `binary`; they are numbered by their order.
* A memory file is sealed before it is sent and refused without its four seals: after a check nobody can change or
  shorten it. It is mapped privately (kernels before 6.7 refuse a shared mapping of a sealed file), never copied.
* Neither side trusts the other's words: lengths, kinds, types, the number of descriptors, sizes and seals are checked
  here (RemoteProtocolError), and every descriptor that came is closed whatever happens.
* Only Receive, Sum and Agree have an answer. After Done or Failed nothing is said.

Source: architecture, section 3; memfd_create(2), fcntl(2) F_ADD_SEALS, unix(7) SCM_RIGHTS.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from fedpeer import codec
from fedpeer.errors import FedpeerError, LocalProtocolError, RemoteProtocolError
from fedpeer.stage import MAX_PEERS

INLINE_BYTES = 64 * 1024
MAX_FRAME = 1 << 20
MAX_BESIDE = 4 << 30
MAX_DESCRIPTORS = 64
PREFIX_BYTES = 4
ALIGN = 64
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_INLINE, _MEMORY, _FILE = 0, 1, 2

Name = Annotated[str, msgspec.Meta(max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Key = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Packed = tuple[bytes, list[memoryview]]
"""A message value: header and buffers (flat bytes) of codec.pack_value."""


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of what is said: an array of the kind and the fields in the order of the class."""


# from the daemon, first


class Resume(Message, frozen=True):
    """The checkpoint to go on from: `turn` turns are complete."""

    turn: Count
    shared: Packed
    own: Packed
    chance: Key


class Start(Message, frozen=True, tag="start"):
    """What the worker runs. `params` is the contract's JSON of them; `roles` is [[alias, role], …] in its order."""

    stage: Name
    params: bytes
    me: Name
    roles: list[tuple[Name, Name]]
    chance: Key
    resume: Resume | None
    inputs: list[tuple[Name, Name, Any]]
    """[(port, kind, content)]; content is bytes, or a Path, which arrives as the bytes of that file"""
    honest: Annotated[int, msgspec.Meta(ge=1, le=MAX_PEERS)] = 1
    """so many contributors of every sum do not pool what they see"""
    semi_honest: list[Name] = []
    """whom the contract and the policy take to follow the protocol"""
    own: bool = False
    """whether the stage is the organization's own (stage.find): of an installed module that its policy names"""
    best_effort: bool = False
    """whether it may run without a layer of the sandbox that the kernel does not have"""
    own_key: bytes = b""
    """p and q of this peer's Paillier key, as peers.Keys has them"""
    moduli: list[tuple[Name, bytes]] = []
    """[(alias, n)], big-endian, of each participant with a key"""
    memory: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)] = 0
    """bytes that the process may take beyond what it has at its start (0: sandbox.default_memory)"""


# requests


class Send(Message, frozen=True, tag="send"):
    to: Name
    tag: Name
    header: bytes
    buffers: list[memoryview]


class Receive(Message, frozen=True, tag="receive"):
    """Answered by Value."""

    sender: Name
    tag: Name


class Sum(Message, frozen=True, tag="sum"):
    """Answered by TotalAnswer. `vector` is encoded as `layout` says (secure/fixedpoint.py)."""

    tag: Name
    layout: list[Any]
    vector: npt.NDArray[np.uint32]


class Agree(Message, frozen=True, tag="agree"):
    """Answered by Value."""

    tag: Name
    header: bytes
    buffers: list[memoryview]


class Checkpoint(Message, frozen=True, tag="checkpoint"):
    """`turn` turns are complete; `chance` is the key of the next one."""

    turn: Count
    shared: Packed
    own: Packed
    chance: Key


class Progress(Message, frozen=True, tag="progress"):
    done: Count
    of: Count
    metrics: Annotated[dict[Name, float], msgspec.Meta(max_length=64)]


class Done(Message, frozen=True, tag="done"):
    """The stage's outputs, (name, (kind, bytes)) as artifact.dump gives them; an absent one is None in the stage."""

    outputs: Annotated[list[tuple[Name, tuple[Name, bytes]]], msgspec.Meta(max_length=64)]


class Failed(Message, frozen=True, tag="failed"):
    """`code` is of errors.py; the message holds no value of the data."""

    code: Name
    message: Text
    hint: Text


Request = Send | Receive | Sum | Agree | Checkpoint | Progress | Done | Failed


# answers


class Value(Message, frozen=True, tag="value"):
    header: bytes
    buffers: list[memoryview]


class TotalAnswer(Message, frozen=True, tag="total"):
    """The sum of the survivors' vectors (mod 2^24, same shape) and their aliases."""

    vector: npt.NDArray[np.uint32]
    survivors: list[Name]


Answer = Value | TotalAnswer

M = TypeVar("M")


def failure(error: FedpeerError) -> Failed:
    """An error as it is said to the daemon."""
    message, hint = (text[:4096].encode(errors="replace").decode() for text in (error.message, error.hint))
    return Failed(error.code, message, hint)


def pack(message: Message) -> tuple[bytes, list[int]]:
    """The frame and the descriptors that go with its first byte; the caller sends and then closes them.

    Raises LocalProtocolError for a message that is too large.
    """
    placing = _Placing()
    try:
        body = codec.encode(placing.place(message))
        if len(body) > MAX_FRAME or len(placing.files) >= MAX_DESCRIPTORS:
            raise LocalProtocolError(f"a message of {len(body)} bytes and {len(placing.files)} files")
        descriptors = ([_memory_file(placing.beside)] if placing.beside else []) + placing.files
    except BaseException:
        close(placing.files)
        raise
    return len(body).to_bytes(PREFIX_BYTES, "little") + body, descriptors


def size_of(prefix: bytes) -> int:
    """The length of the frame after its prefix. Raises RemoteProtocolError if it is not allowed."""
    size = int.from_bytes(prefix, "little")
    if len(prefix) != PREFIX_BYTES or not 0 < size <= MAX_FRAME:
        raise RemoteProtocolError(f"a frame of {size} bytes")
    return size


def unpack(kind: Any, body: bytes, descriptors: Sequence[int], *, files: bool = False) -> Any:
    """The message of a frame, one of `kind` (a Message or a union of them). RemoteProtocolError for anything else.

    The descriptors are closed. Binary fields beside the frame are read-only views of a mapping that lives as long as
    they do. `files`: whether whole files may come beside (a worker takes them from its daemon; never the reverse).
    """
    left = list(descriptors)
    try:
        tree = codec.decode(body, limit=MAX_FRAME)
        leaves = [_read_leaf(leaf) for leaf in _binaries(tree)]
        sizes = [size for place, size in leaves if place == _MEMORY]
        parts = _map_parts(left, sizes) if sizes else []
        wholes = [_map_file(left, size) for place, size in leaves if place == _FILE and files]
        if left:
            raise RemoteProtocolError("more descriptors than the message names")
        filled = _fill(tree, iter(parts), iter(wholes))
        return msgspec.convert(filled, kind, strict=True, builtin_types=(bytes, memoryview), dec_hook=_vector)
    except StopIteration:
        raise RemoteProtocolError("a file where none may be") from None
    except msgspec.ValidationError as error:
        raise RemoteProtocolError(f"not a message: {error}") from None
    finally:
        close(left)


def close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


# binaries


class _Placing:
    """Turns a message into plain data, and remembers what goes beside it."""

    def __init__(self) -> None:
        self.beside: list[memoryview] = []
        self.files: list[int] = []
        self.room = INLINE_BYTES

    def place(self, item: Any) -> Any:
        match item:
            case Message():
                tag = item.__struct_config__.tag
                fields = [self.place(getattr(item, name)) for name in item.__struct_fields__]
                return fields if tag is None else [tag, *fields]
            case np.ndarray():
                return self.place(np.ascontiguousarray(item, dtype="<u4").reshape(-1).view(np.uint8).data)
            case bytes() | bytearray() | memoryview():
                data = memoryview(item)
                if data.nbytes > self.room:
                    self.beside.append(data)
                    return _leaf(_MEMORY, data.nbytes)
                self.room -= data.nbytes
                return bytes([_INLINE]) + data
            case Path():
                self.files.append(os.open(item, os.O_RDONLY | os.O_CLOEXEC))
                return _leaf(_FILE, os.fstat(self.files[-1]).st_size)
            case list() | tuple():
                return [self.place(element) for element in item]
            case dict():
                return {key: self.place(element) for key, element in item.items()}
        return item


def _fill(item: Any, parts: Iterator[memoryview], wholes: Iterator[memoryview]) -> Any:
    """Plain data with its binaries put back."""
    match item:
        case bytes():
            place, _ = _read_leaf(item)
            return item[1:] if place == _INLINE else next(parts if place == _MEMORY else wholes)
        case list():
            return [_fill(element, parts, wholes) for element in item]
        case dict():
            return {key: _fill(element, parts, wholes) for key, element in item.items()}
    return item


def _leaf(place: int, size: int) -> bytes:
    return bytes([place]) + size.to_bytes(8, "little")


def _read_leaf(leaf: bytes) -> tuple[int, int]:
    place = leaf[0] if leaf else None
    if place == _INLINE:
        return _INLINE, len(leaf) - 1
    if place not in (_MEMORY, _FILE) or len(leaf) != 9:
        raise RemoteProtocolError("not a binary field")
    return place, int.from_bytes(leaf[1:], "little")


def _binaries(tree: Any) -> Iterator[bytes]:
    """The binary leaves, in the order `_fill` meets them."""
    if isinstance(tree, bytes):
        yield tree
    elif isinstance(tree, list | dict):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _binaries(item)


def _vector(kind: Any, value: Any) -> npt.NDArray[np.uint32]:
    """msgspec's hook for the one field type it does not know."""
    if not isinstance(value, bytes | memoryview) or len(value) % 4:
        raise ValueError("not a vector of 32-bit numbers")
    return np.frombuffer(value, dtype="<u4")


def _padded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _memory_file(parts: Sequence[memoryview]) -> int:
    """A sealed file in memory that holds the parts, each from a multiple of ALIGN."""
    descriptor = os.memfd_create("fedpeer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        size = sum(_padded(len(part)) for part in parts)
        if size > MAX_BESIDE:
            raise LocalProtocolError(f"{size} bytes in one message; at most {MAX_BESIDE} are allowed")
        os.ftruncate(descriptor, size)
        at = 0
        for part in parts:
            done = 0
            while done < len(part):
                done += os.pwrite(descriptor, part[done:], at + done)
            at += _padded(len(part))
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _map_parts(left: list[int], sizes: Sequence[int]) -> list[memoryview]:
    """The parts of the next descriptor, a memory file that was sealed as `_memory_file` does."""
    descriptor = _next(left)
    try:
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError:
            seals = 0
        if seals & SEALS != SEALS:
            raise RemoteProtocolError("a file beside a message is not sealed")
        view = _map(descriptor, sum(_padded(size) for size in sizes))
    finally:
        os.close(descriptor)
    starts = accumulate((_padded(size) for size in sizes), initial=0)
    return [view[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def _map_file(left: list[int], size: int) -> memoryview:
    descriptor = _next(left)
    try:
        return _map(descriptor, size)
    finally:
        os.close(descriptor)


def _next(left: list[int]) -> int:
    if not left:
        raise RemoteProtocolError("fewer descriptors than the message names")
    return left.pop(0)


def _map(descriptor: int, size: int) -> memoryview:
    """A read-only view of a file that has exactly this size."""
    if size > MAX_BESIDE or os.fstat(descriptor).st_size != size:
        raise RemoteProtocolError("a file beside a message is not of the size that was said")
    if size == 0:
        return memoryview(b"")
    return memoryview(mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))
