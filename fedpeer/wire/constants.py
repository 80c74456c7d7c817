"""Every number of the wire protocol, and nothing else. A change of any of them is a new `WIRE_VERSION`.

Units are in the names or beside them; times are seconds, sizes are bytes.
"""

from __future__ import annotations

from typing import Final

WIRE_VERSION: Final = 1
PROLOGUE: Final = b"fedpeer" + bytes([WIRE_VERSION])
PROTOCOL: Final = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2b"
PSK_UNSET: Final = bytes(32)

# sizes on the stream: every Noise message goes behind its length, two bytes, big-endian
LENGTH_BYTES: Final = 2
TAG_BYTES: Final = 16
MAC1_BYTES: Final = 16
MESSAGE_1_BYTES: Final = 32 + (32 + TAG_BYTES) + TAG_BYTES + MAC1_BYTES  # e, sealed s, sealed empty payload, mac1
MESSAGE_2_BYTES: Final = 32 + TAG_BYTES  # e, sealed empty payload
MAX_UNAUTHENTICATED: Final = 512  # no message before authentication is larger, in any version
MAX_NOISE_MESSAGE: Final = 65_535

# a frame: one byte with the length of the head, the head (msgpack), the payload
MAX_PLAINTEXT: Final = MAX_NOISE_MESSAGE - TAG_BYTES
MAX_PAYLOAD: Final = 65_280
MAX_HEAD: Final = MAX_PLAINTEXT - MAX_PAYLOAD - 1  # 238
MAX_HEADER: Final = 224  # what the caller puts into the head of a data frame
MAX_NAME: Final = 224  # a channel's name, encoded

# flow: what a data frame costs is its header, its payload, and what it costs to keep it
FRAME_COST: Final = 64
MAX_COST: Final = MAX_HEADER + MAX_PAYLOAD + FRAME_COST
CONTROL_CHANNELS: Final = 16  # channel numbers 0 … 15
BULK_CHANNELS: Final = 3  # channel numbers 16 … 18
CONTROL_WINDOW: Final = 2 * MAX_COST
BULK_WINDOW: Final = 32 * MAX_COST  # about 2 MiB; all windows of one session together: about 8 MiB

# time
HANDSHAKE_S: Final = 5.0
KEEPALIVE_S: Final = 10.0  # nothing came for so long: ask
SILENCE_S: Final = 30.0  # nothing came, or nothing was taken, for so long: the peer is gone

# keys
REKEY_BYTES: Final = 1 << 30
REKEY_S: Final = 600.0
MAX_KEY_BYTES: Final = 2 * REKEY_BYTES  # what comes under one key beyond this is refused
