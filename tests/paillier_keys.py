"""Paillier keys of tests/vectors/paillier.txt."""

from __future__ import annotations

from pathlib import Path

from fedpeer.secure.paillier import PrivateKey

FILE = Path(__file__).resolve().parent / "vectors" / "paillier.txt"


def primes(what: str, bits: int) -> list[tuple[int, int]]:
    """p and q of each line "what bits p q"."""
    lines = [line.split() for line in FILE.read_text().splitlines() if not line.startswith("#")]
    return [(int(p, 16), int(q, 16)) for kind, length, p, q in lines if (kind, int(length)) == (what, bits)]


def key(bits: int = 2048, number: int = 0) -> PrivateKey:
    return PrivateKey(*primes("key", bits)[number])
