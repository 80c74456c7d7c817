"""The Paillier keys of a contract: who has one makes it once, keeps it, and shows the others that it is one.

Rules
* A key is of one peer, one contract and one length. It is in the store before its public part is said, so a worker or a
  daemon that is started again has the same one; it goes with the job's end.
* What is said is a record of the contract's scope, kind `KEY`, slot = bits: n, and the certificate that is bound to its
  owner and to the contract (secure/paillier.py). Another record in the same slot is equivocation, as everywhere.
* phe makes the keys, in the daemon. No worker makes one.

Functions on a transaction, and the check of what others say.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from phe import paillier as phe

from fedpeer import codec
from fedpeer.errors import TrustError
from fedpeer.secure import paillier
from fedpeer.secure.paillier import PublicKey
from fedpeer.store import Schema, Transaction

KEY: Final = "paillier"

SCHEMA = Schema(
    "keyring",
    [
        """
        CREATE TABLE paillier_key (
            contract BLOB NOT NULL,
            bits INTEGER NOT NULL,
            primes BLOB NOT NULL,           -- p and q, big-endian, one after the other
            PRIMARY KEY (contract, bits)
        ) STRICT;
        """
    ],
)


class Said(codec.Record, frozen=True):
    """What the others get of a key."""

    n: Annotated[bytes, msgspec.Meta(max_length=max(paillier.LENGTHS) // 8)]
    certificate: Annotated[bytes, msgspec.Meta(max_length=paillier.ROOTS * max(paillier.LENGTHS) // 8)]


def make(bits: int) -> bytes:
    """A new key, p and q; it takes a second or so. Never in a worker."""
    _, private = phe.generate_paillier_keypair(n_length=bits)
    half = bits // 16
    return bytes(private.p.to_bytes(half, "big") + private.q.to_bytes(half, "big"))


def said_of(primes: bytes, peer: str, contract: bytes) -> Said:
    """What its owner says of it."""
    private = paillier.private_key(primes)
    return Said(as_bytes(private.public.n), paillier.certify(private, peer.encode(), contract))


def checked(body: bytes, peer: str, contract: bytes, bits: int) -> int:
    """n of what a peer said. Raises TrustError, RemoteProtocolError."""
    said = codec.decode_as(Said, body)
    public = PublicKey(int.from_bytes(said.n, "big"))
    if public.bits != bits:
        raise TrustError(f"a Paillier key of {public.bits} bits where the contract says {bits}")
    paillier.verify_certificate(public, peer.encode(), contract, said.certificate)
    return public.n


def as_bytes(n: int) -> bytes:
    """As it is said, and as a worker gets it."""
    return int(n).to_bytes(-(-int(n).bit_length() // 8), "big")


def find(tx: Transaction, contract: bytes, bits: int) -> bytes | None:
    """p and q of our key."""
    row = tx.one("SELECT primes FROM paillier_key WHERE contract = ? AND bits = ?", (contract, bits))
    return None if row is None else bytes(row[0])


def keep(tx: Transaction, contract: bytes, bits: int, primes: bytes) -> None:
    tx.execute("INSERT INTO paillier_key VALUES (?, ?, ?)", (contract, bits, primes))


def drop(tx: Transaction, contract: bytes) -> None:
    """The job is over here."""
    tx.execute("DELETE FROM paillier_key WHERE contract = ?", (contract,))
