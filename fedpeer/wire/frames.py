"""What is inside one Noise message of an established session: a frame.

    frame = length of the head (1 byte) ‖ head (msgpack array, canonical) ‖ payload (data frames only)

Rules
* Six kinds; the first element of the head names the kind. `Data` is what the caller sends; the others keep the
  session going and are never seen outside wire/.
* `parse` accepts exactly what `build` makes: a head of at most 238 bytes, of these types, in the shortest form,
  with nothing after it unless it is data. Everything else is RemoteProtocolError.

The head is decoded by msgspec straight into these types: nothing of another type is ever built.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from fedpeer.errors import LocalProtocolError, RemoteProtocolError
from fedpeer.wire.constants import (
    BULK_CHANNELS,
    BULK_WINDOW,
    CONTROL_CHANNELS,
    MAX_HEAD,
    MAX_HEADER,
    MAX_NAME,
    MAX_PAYLOAD,
)

Buffer = bytes | bytearray | memoryview
Name = tuple[str | bytes | int, ...]
"""The name of a channel, for example ("mail", contract, stage)."""

_Number = Annotated[int, msgspec.Meta(ge=0, lt=CONTROL_CHANNELS + BULK_CHANNELS)]


class Data(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=0):
    """A message on an open channel: the caller's header, and a payload behind the head."""

    channel: _Number
    header: Annotated[bytes, msgspec.Meta(max_length=MAX_HEADER)]


class Open(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=1):
    """From here on this number means this name; allowed when nothing of the number's credit is out."""

    channel: _Number
    name: Annotated[tuple[Any, ...], msgspec.Meta(min_length=1, max_length=8)]  # of text, bytes and integers


class Credit(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=2):
    """So much of the window is free again."""

    channel: _Number
    amount: Annotated[int, msgspec.Meta(ge=1, le=BULK_WINDOW)]


class Ping(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=3):
    """Answer at once. At most one is unanswered."""


class Pong(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=4):
    """The answer."""


class Rekey(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=5):
    """The last frame under this key of this direction."""


Head = Data | Open | Credit | Ping | Pong | Rekey

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Head).decode


def build(head: Head, size: int = 0) -> bytes:
    """What stands before a payload of `size` bytes. Raises LocalProtocolError for what exceeds the caps."""
    try:
        encoded = _encode(head)
    except (TypeError, ValueError, OverflowError) as error:
        raise LocalProtocolError(f"no encoding for this frame: {error}") from None
    if len(encoded) > MAX_HEAD or size > MAX_PAYLOAD or not _is_named(head):
        raise LocalProtocolError(
            f"a frame of {len(encoded)} + {size} bytes; at most {MAX_HEADER} for a header, {MAX_NAME} for a "
            f"name (of text, bytes and integers) and {MAX_PAYLOAD} for a payload are allowed"
        )
    return bytes((len(encoded),)) + encoded


def parse(frame: Buffer) -> tuple[Head, memoryview]:
    """The head and the payload (a view) of one frame. Raises RemoteProtocolError."""
    size = frame[0] if frame else 0
    encoded = bytes(frame[1 : 1 + size])
    try:
        head = _decode(encoded)
        canonical = _encode(head) == encoded
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise RemoteProtocolError("a frame that is none") from None
    payload = memoryview(frame)[1 + size :]
    if (
        not canonical
        or size > MAX_HEAD
        or len(payload) > (MAX_PAYLOAD if type(head) is Data else 0)
        or not _is_named(head)
    ):
        raise RemoteProtocolError("a frame that is none")
    return head, payload


def _is_named(head: Head) -> bool:
    return type(head) is not Open or all(type(part) in (str, bytes, int) for part in head.name)
