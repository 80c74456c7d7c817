"""The Noise protocol framework: handshakes of any pattern over 25519 and ChaChaPoly, and what they leave behind.

Rules
* `Handshake` is one side of one handshake. `write` and `read` alternate as the pattern says; after the last
  message `split` gives the two ciphers and `hash` names the session. It is used once.
* Chance is an argument: the caller makes the ephemeral key, and makes it new for each handshake.
* Whatever is wrong with a message that came in, `read` raises HandshakeError, and this handshake is over.
* `mac1` lets a responder drop, for the price of a hash, whoever does not know its static key.

How it works: a pattern is text as in the specification, one line a message. `SymmetricState` and
`CipherState` of the specification are `_Symmetric` and `Cipher` here. fedpeer itself uses IKpsk2 only
(`constants.PROTOCOL`); the other patterns cost a line each and let public vectors check every token.

Source: The Noise Protocol Framework, revision 34 (noiseprotocol.org); mac1 after WireGuard, section 5.4.4.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

from fedpeer.crypto import KEY_BYTES, Aead, DhKey, Secret, hash_
from fedpeer.errors import HandshakeError, LocalProtocolError, TrustError
from fedpeer.wire.constants import MAC1_BYTES, MAX_NOISE_MESSAGE, TAG_BYTES

Buffer = bytes | bytearray | memoryview

# What both sides know before (initiator's, responder's), then the tokens of each message in turn.
PATTERNS: Final[dict[str, tuple[str, str, list[str]]]] = {
    "N": ("", "s", ["e es"]),
    "K": ("s", "s", ["e es ss"]),
    "X": ("", "s", ["e es s ss"]),
    "NN": ("", "", ["e", "e ee"]),
    "NK": ("", "s", ["e es", "e ee"]),
    "KK": ("s", "s", ["e es ss", "e ee se"]),
    "XK": ("", "s", ["e es", "e ee", "s se"]),
    "XX": ("", "", ["e", "e ee s es", "s se"]),
    "IX": ("", "", ["e s", "e ee se s es"]),
    "IK": ("", "s", ["e es s ss", "e ee se"]),
    "IK1": ("", "s", ["e s", "e ee se es"]),
}
HASHES: Final[dict[str, Callable[..., Any]]] = {
    "BLAKE2b": hashlib.blake2b,
    "BLAKE2s": hashlib.blake2s,
    "SHA256": hashlib.sha256,
}
_LAST_NONCE: Final = 2**64 - 1  # reserved for REKEY
_nonce = struct.Struct("<4xQ").pack


class Cipher:
    """A key and a counter: one direction of a session."""

    __slots__ = ("_aead", "_key", "_n")

    def __init__(self, key: bytes) -> None:
        self._key = Secret(key)
        self._aead = Aead(key)
        self._n = 0

    def _next(self) -> bytes:
        if self._n >= _LAST_NONCE:
            raise LocalProtocolError("a session key is used up")
        nonce = _nonce(self._n)
        self._n += 1
        return nonce

    def seal(self, plaintext: Buffer, associated: Buffer = b"") -> bytes:
        return self._aead.seal(self._next(), plaintext, associated)

    def seal_into(self, plaintext: Buffer, out: memoryview) -> int:
        """Seal into `out`, which is 16 bytes longer than the plaintext; the number of bytes written."""
        return self._aead.seal_into(self._next(), plaintext, b"", out)

    def open(self, sealed: Buffer, associated: Buffer = b"") -> bytes:
        """The plaintext. Raises TrustError if a bit was changed, a message left out or repeated."""
        return self._aead.open(self._next(), sealed, associated)

    def open_into(self, sealed: Buffer, out: memoryview) -> int:
        """Open into `out`, which is 16 bytes shorter; the number of bytes written. Raises TrustError as `open` does."""
        return self._aead.open_into(self._next(), sealed, b"", out)

    def rekey(self) -> None:
        """REKEY of the specification (11.3): from here on the old key opens nothing; the counter goes on."""
        key = self._aead.seal(_nonce(_LAST_NONCE), bytes(KEY_BYTES))[:KEY_BYTES]
        self._key = Secret(key)
        self._aead = Aead(key)


class _Symmetric:
    """The chaining key, the transcript hash, and the cipher of the handshake (section 5.2)."""

    def __init__(self, protocol: str, hash_name: str) -> None:
        self._hash = HASHES[hash_name]
        size: int = self._hash().digest_size
        name = protocol.encode()
        self.h: bytes = name.ljust(size, b"\0") if len(name) <= size else self._hash(name).digest()
        self._ck = self.h
        self._cipher: Cipher | None = None

    @property
    def keyed(self) -> bool:
        return self._cipher is not None

    def _hkdf(self, material: bytes, outputs: int) -> list[bytes]:
        secret = hmac.digest(self._ck, material, self._hash)
        found: list[bytes] = []
        for i in range(1, outputs + 1):
            found.append(hmac.digest(secret, (found[-1] if found else b"") + bytes([i]), self._hash))
        return found

    def mix_hash(self, data: Buffer) -> None:
        self.h = self._hash(self.h + bytes(data)).digest()

    def mix_key(self, material: bytes) -> None:
        self._ck, key = self._hkdf(material, 2)
        self._cipher = Cipher(key[:KEY_BYTES])

    def mix_key_and_hash(self, material: bytes) -> None:
        self._ck, mixed, key = self._hkdf(material, 3)
        self.mix_hash(mixed)
        self._cipher = Cipher(key[:KEY_BYTES])

    def seal(self, plaintext: Buffer) -> bytes:
        sealed = bytes(plaintext) if self._cipher is None else self._cipher.seal(plaintext, self.h)
        self.mix_hash(sealed)
        return sealed

    def open(self, sealed: Buffer) -> bytes:
        plaintext = bytes(sealed) if self._cipher is None else self._cipher.open(sealed, self.h)
        self.mix_hash(sealed)
        return plaintext

    def split(self) -> tuple[Cipher, Cipher]:
        first, second = self._hkdf(b"", 2)
        return Cipher(first[:KEY_BYTES]), Cipher(second[:KEY_BYTES])


class Handshake:
    """One side of one Noise handshake.

    `protocol` is a full Noise name with 25519 and ChaChaPoly; `own` and `remote` are the static keys that the
    pattern needs before it starts; `psks` are used in the order of the pattern's psk tokens.
    """

    def __init__(
        self,
        protocol: str,
        *,
        initiator: bool,
        ephemeral: DhKey,
        prologue: bytes = b"",
        own: DhKey | None = None,
        remote: bytes | None = None,
        psks: Sequence[Secret] = (),
    ) -> None:
        match = re.fullmatch(r"Noise_([A-Z]+1?)((?:\+?psk\d)*)_25519_ChaChaPoly_(BLAKE2b|BLAKE2s|SHA256)", protocol)
        if match is None or match[1] not in PATTERNS:
            raise LocalProtocolError(f"no Noise protocol of the name {protocol!r} is known here")
        ours, theirs, lines = PATTERNS[match[1]]
        messages = [line.split() for line in lines]
        places = [int(digit) for digit in re.findall(r"psk(\d)", match[2])]
        if len(places) != len(psks) or any(len(psk.reveal()) != KEY_BYTES for psk in psks):
            raise LocalProtocolError(f"{protocol} takes {len(places)} pre-shared keys of {KEY_BYTES} bytes")
        for place in places:  # psk0 begins the first message, pskN ends the N-th
            messages[max(place - 1, 0)].insert(0 if place == 0 else len(messages[place - 1]), "psk")

        self.initiator = initiator
        self.remote = remote
        """The static key of the other side, once it is known."""
        self._own = own
        self._ephemeral = ephemeral
        self._remote_ephemeral: bytes | None = None
        self._psks = list(psks)
        self._psk_mode = bool(psks)
        self._messages = messages
        self._turn = 0
        self._failed = False
        self._state = _Symmetric(protocol, match[3])
        self._state.mix_hash(prologue)
        for premessage, mine in ((ours, initiator), (theirs, not initiator)):
            if premessage == "s":
                self._state.mix_hash(self._own_static().public if mine else self._remote_static())

    # state

    @property
    def finished(self) -> bool:
        return self._turn == len(self._messages) and not self._failed

    @property
    def hash(self) -> bytes:
        """The transcript hash; of a finished handshake it names the session and nothing else."""
        return self._state.h

    def split(self) -> tuple[Cipher, Cipher]:
        """The ciphers to send with and to receive with."""
        if not self.finished:
            raise LocalProtocolError("the handshake is not finished")
        first, second = self._state.split()
        return (first, second) if self.initiator else (second, first)

    # messages

    def write(self, payload: bytes = b"") -> bytes:
        """The next message, with a payload that is as secret as the pattern says for this message."""
        steps = self._steps(writing=True)
        message = bytearray()
        for step in steps:
            if step == "e":
                message += self._ephemeral.public
                self._mix_ephemeral(self._ephemeral.public)
            elif step == "s":
                message += self._state.seal(self._own_static().public)
            else:
                self._mix(step)
        message += self._state.seal(payload)
        if len(message) > MAX_NOISE_MESSAGE:
            raise LocalProtocolError(f"a handshake message of {len(message)} bytes")
        self._turn += 1
        return bytes(message)

    def read(self, message: Buffer) -> bytes:
        """The payload of the next message. Raises HandshakeError, always the same, for whatever is wrong with it."""
        steps = self._steps(writing=False)
        rest = memoryview(message)

        def take(size: int) -> bytes:
            nonlocal rest
            if len(rest) < size:
                raise HandshakeError
            taken, rest = bytes(rest[:size]), rest[size:]
            return taken

        try:
            if len(rest) > MAX_NOISE_MESSAGE:
                raise HandshakeError
            for step in steps:
                if step == "e":
                    self._remote_ephemeral = take(KEY_BYTES)
                    self._mix_ephemeral(self._remote_ephemeral)
                elif step == "s":
                    self.remote = self._state.open(take(KEY_BYTES + (TAG_BYTES if self._state.keyed else 0)))
                else:
                    self._mix(step)
            payload = self._state.open(rest)
        except (TrustError, HandshakeError):
            self._failed = True
            raise HandshakeError(
                "a handshake message that does not fit: garbage, changed, or meant for another key"
            ) from None
        self._turn += 1
        return payload

    def _steps(self, *, writing: bool) -> list[str]:
        if self._failed or self._turn >= len(self._messages) or (self._turn % 2 == 0) != (self.initiator == writing):
            raise LocalProtocolError("the handshake has no such message now")
        return self._messages[self._turn]

    def _mix_ephemeral(self, public: bytes) -> None:
        self._state.mix_hash(public)
        if self._psk_mode:
            self._state.mix_key(public)

    def _mix(self, step: str) -> None:
        if step == "psk":
            self._state.mix_key_and_hash(self._psks.pop(0).reveal())
            return
        # "es" is the initiator's ephemeral with the responder's static; which of them is ours depends on the side
        mine, other = list(step) if self.initiator else list(reversed(step))
        key = self._ephemeral if mine == "e" else self._own_static()
        public = self._remote_ephemeral if other == "e" else self._remote_static()
        if public is None:
            raise LocalProtocolError("the pattern uses a key before it came")
        self._state.mix_key(key.exchange(public))

    def _own_static(self) -> DhKey:
        if self._own is None:
            raise LocalProtocolError("this pattern needs a static key of ours")
        return self._own

    def _remote_static(self) -> bytes:
        if self.remote is None:
            raise LocalProtocolError("this pattern needs the static key of the other side")
        return self.remote


def mac1(message: Buffer, responder: bytes) -> bytes:
    """16 bytes that show that the sender of message 1 knows the responder's static key."""
    return hash_("fp.lk.mac1", message, key=hash_("fp.lk.mac1", responder), size=MAC1_BYTES)
