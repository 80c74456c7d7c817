"""Who a peer is: its keys, its id for ever, its card for others, and the file its seed lies in.

Rules
* The key file holds one 32-byte seed; the Ed25519 key (signatures) and the X25519 key (sessions) are derived from it.
* Peer id = BLAKE2b-160 of the first identity record (version, both public keys), for ever; later keys would be
  versioned under it. Contracts, audit and policy name ids.
* A card is the public identity as one line of text: id, name, keys, addresses to dial, signature. One changed
  character is found. People compare its fingerprint, twelve words of 96 bits, by voice.
* The key file is made with O_EXCL, mode 0600, in a folder 0700, and read as private.py does.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from fedpeer import codec, private
from fedpeer.crypto import KEY_BYTES, DhKey, Secret, SigningKey, hash_, verify
from fedpeer.errors import CardError, ConfigError, KeyFileError, RemoteProtocolError, TrustError
from fedpeer.words import WORDS

CARD_PREFIX = "fedpeer-card-1."
KEY_PREFIX = "fedpeer-key-1 "
NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
MAX_ADDRESSES = 8
_LABEL = "[A-Za-z0-9_-]{1,63}"
ADDRESS = re.compile(
    rf"(?:tcp://)?(?:(?P<name>{_LABEL}(?:\.{_LABEL})*\.?)|\[(?P<v6>[0-9A-Za-z:.%_-]+)\]):(?P<port>[0-9]+)"
)
"""a host outside of it is not only unknown: the resolver refuses to look for it"""

Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]


def check_name(name: str) -> str:
    """A peer's name: 1–32 of a–z, 0–9 and inner hyphens. Raises ConfigError."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is not a name for a peer", hint="1 to 32 of a-z, 0-9 and hyphens, e.g. hospital-a")
    return name


def peer_id(signing: bytes, dh: bytes) -> str:
    """The id of a peer with these first public keys: "fp1" and 32 characters of base32."""
    digest = hash_("fp.identity", codec.encode([1, signing, dh]), size=20)
    return "fp1" + base64.b32encode(digest).decode().lower()


class CardBody(codec.Record, frozen=True):
    version: Annotated[int, msgspec.Meta(ge=1, le=1)]
    id: str
    key_version: Annotated[int, msgspec.Meta(ge=1, le=1)]
    name: str
    signing: Key
    dh: Key
    addresses: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_ADDRESSES)]


@dataclass(frozen=True)
class Card:
    """A verified card. `text` is the line that people exchange."""

    body: CardBody
    text: str

    @property
    def id(self) -> str:
        return self.body.id

    @property
    def name(self) -> str:
        return self.body.name

    @property
    def fingerprint(self) -> str:
        """Twelve words (96 bits) over id and keys."""
        digest = hash_("fp.words", self.body.id.encode(), self.body.signing, self.body.dh, size=12)
        return " ".join(WORDS[byte] for byte in digest)

    @classmethod
    def parse(cls, text: str) -> Card:
        """Read and verify a card. Raises CardError; white space that a mail program put in is tolerated."""
        text = "".join(text.split())
        if not text.startswith(CARD_PREFIX):
            raise CardError(f"a card is one line that starts with {CARD_PREFIX}")
        encoded = text.removeprefix(CARD_PREFIX)
        try:
            raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
            if base64.urlsafe_b64encode(raw).decode().rstrip("=") != encoded or len(raw) > 4096:
                raise CardError
            signed, signature = raw[:-64], raw[-64:]
            body = codec.decode_as(CardBody, signed)
            verify(body.signing, "card", signed, signature)
            check_name(body.name)
            for address in body.addresses:
                split_address(address)
        except (binascii.Error, ValueError, RemoteProtocolError, TrustError, ConfigError):
            raise CardError from None
        if body.id != peer_id(body.signing, body.dh):
            raise CardError
        return cls(body, text)


def split_address(address: str) -> tuple[str, int]:
    """host and port of "host:port", "[v6]:port" or "tcp://host:port". Raises ConfigError, also where no host can be."""
    found = ADDRESS.fullmatch(address) if len(address) <= 255 else None
    if found is None or int(found["port"]) > 65535 or (found["v6"] and not _is_ipv6(found["v6"])):
        raise ConfigError(f"{address!r} is not an address", hint="written as host:port, for example bank.example:7420")
    return found["v6"] or found["name"], int(found["port"])


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


class Identity:
    """This peer's own keys."""

    def __init__(self, seed: Secret) -> None:
        self.signing = SigningKey(Secret(hash_("fp.key.sign", key=seed.reveal())))
        self.dh = DhKey(Secret(hash_("fp.key.dh", key=seed.reveal())))
        self.sealing = Secret(hash_("fp.key.seal", key=seed.reveal()))  # for secrets at rest
        self.id = peer_id(self.signing.public, self.dh.public)

    def card(self, name: str, addresses: tuple[str, ...] = ()) -> Card:
        """A signed card with the addresses at which others may dial this peer (none: it only dials)."""
        body = CardBody(1, self.id, 1, check_name(name), self.signing.public, self.dh.public, addresses)
        signed = codec.encode(body)
        raw = signed + self.signing.sign("card", signed)
        return Card.parse(CARD_PREFIX + base64.urlsafe_b64encode(raw).decode().rstrip("="))

    def __repr__(self) -> str:
        return f"Identity({self.id})"


def create_key_file(path: Path) -> Identity:
    """Make a new identity's key file; never overwrites. Raises KeyFileError."""
    seed = Secret.random()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        private.check_folder(path.parent)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise KeyFileError(
            f"{path} exists: this peer has an identity already", hint="another --home makes another peer"
        ) from None
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write((KEY_PREFIX + seed.reveal().hex() + "\n").encode())
        file.flush()
        os.fsync(descriptor)
    return load_key_file(path)


def load_key_file(path: Path) -> Identity:
    """The identity of a key file that only its owner can read or replace. Raises KeyFileError with the remedy."""
    text = private.read(path, 256, missing="fedpeer init --name NAME makes it").decode("ascii", "replace").strip()
    seed = text.removeprefix(KEY_PREFIX.strip()).strip()
    if not text.startswith(KEY_PREFIX) or not re.fullmatch("[0-9a-f]{64}", seed):
        raise KeyFileError(
            f"{path} is not a fedpeer key file", hint="restore it from your copy; a new one is a new peer"
        )
    return Identity(Secret(bytes.fromhex(seed)))
