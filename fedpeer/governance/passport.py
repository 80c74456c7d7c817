"""A model's passport: where it is from, in one document that all who made it sign.

Rules
* The document is canonical JSON of what is equal at all who hold the model: the contract and its purpose, who
  contributed, rounds, over whom its sums went, the privacy spent, the model's digest and metrics. Its bytes are the
  same at each of them; each signs their hash by a record of the contract's scope.
* A passport as a file holds the document, the signatures, and the cards of the signers: it verifies anywhere. It is
  signed by all, or says who is missing.
* Caps: MAX_METRICS metrics, MAX_NAMES names in the sets of survivors; how many were left out beyond them is told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec

from fedpeer.crypto import hash_
from fedpeer.errors import CardError, FedpeerError, TrustError
from fedpeer.identity import Card
from fedpeer.mesh import records
from fedpeer.store import Schema, Transaction

PASSPORT: Final = "passport"
FORMAT: Final = 1
MAX_METRICS: Final = 64
MAX_NAMES: Final = 2048
MAX_DOCUMENT: Final = 256 * 1024
MAX_FILE: Final = 1 << 20
_MAX_TEXT = 200

SCHEMA = Schema(
    "governance.passport",
    [
        """
        CREATE TABLE passport_stage (       -- how a stage went, as far as it is equal at all
            contract BLOB NOT NULL,
            stage TEXT NOT NULL,
            rounds INTEGER NOT NULL,
            sums TEXT NOT NULL,             -- JSON: [[survivors, first turn, last turn, sums], …]
            PRIMARY KEY (contract, stage)
        ) STRICT;
        CREATE TABLE passport (
            contract BLOB NOT NULL,
            stage TEXT NOT NULL,
            output TEXT NOT NULL,
            document BLOB NOT NULL,
            PRIMARY KEY (contract, stage, output)
        ) STRICT;
        CREATE TABLE passport_signature (
            contract BLOB NOT NULL,
            stage TEXT NOT NULL,
            output TEXT NOT NULL,
            signer TEXT NOT NULL,
            card TEXT NOT NULL,
            raw BLOB NOT NULL,
            PRIMARY KEY (contract, stage, output, signer)
        ) STRICT;
        """
    ],
)


@dataclass(frozen=True)
class Sums:
    """Sums of a stage that went over the same participants."""

    survivors: tuple[str, ...]
    first_turn: int
    last_turn: int
    count: int


@dataclass(frozen=True)
class Ran:
    """How a stage went."""

    rounds: int
    sums: Sequence[Sums]


class Passport(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The document. Participants are named by the aliases of the contract; `participants` has their ids."""

    contract: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    job: str
    purpose: str
    initiator: str
    participants: dict[str, str]
    stage: str
    output: str
    run: str
    declaration: str
    params: dict[str, Any]
    contributors: list[str]
    """who had a role in the stage; they hold the model, and sign"""
    rounds: int
    history: str
    """the hash over all that was summed and agreed in the stage"""
    sums: list[dict[str, Any]]
    sums_left_out: int
    epsilon: float | None
    """spent for the stage at each owner; None: it adds no noise"""
    delta: float | None
    model: str
    """the digest of its file"""
    algorithm: str
    metrics: dict[str, Any]
    metrics_left_out: int


class File(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What `fedpeer model passport` writes."""

    fedpeer_passport: int
    passport: Passport
    cards: list[str]
    signatures: list[bytes]


class Verified(msgspec.Struct, kw_only=True):
    """A passport whose signatures are all good."""

    model: str
    contract: str
    job: str
    signed_by: list[str]
    """alias (id)"""
    missing: list[str]
    """contributors whose signature is not there"""


def document(passport: Passport) -> bytes:
    """The bytes whose hash is signed. Raises TrustError if they are too many."""
    plain = msgspec.to_builtins(passport)
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    data = text.encode()
    if len(data) > MAX_DOCUMENT:
        raise TrustError(f"a passport of {len(data)} bytes, where at most {MAX_DOCUMENT} are allowed")
    return data


def digest(data: bytes) -> bytes:
    return hash_("fp.passport", data)


def metrics(facts: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The numbers and short words that a model says of itself, and how many facts were left out."""
    plain = {
        key: value
        for key, value in sorted(facts.items())
        if len(key) <= _MAX_TEXT
        and (isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= _MAX_TEXT))
    }
    kept = dict(list(plain.items())[:MAX_METRICS])
    return kept, len(facts) - len(kept)


def sums(ran: Ran) -> tuple[list[dict[str, Any]], int]:
    """Over whom the sums of a stage went, and how many sets of survivors were left out."""
    kept = [s for i, s in enumerate(ran.sums) if (i + 1) * len(s.survivors) <= MAX_NAMES]
    told = [
        {"survivors": list(s.survivors), "first_turn": s.first_turn, "last_turn": s.last_turn, "sums": s.count}
        for s in kept
    ]
    return told, len(ran.sums) - len(kept)


# what is kept


def keep_ran(tx: Transaction, contract: bytes, stage: str, ran: Ran) -> None:
    rows = [[list(s.survivors), s.first_turn, s.last_turn, s.count] for s in ran.sums]
    tx.execute(
        "INSERT OR REPLACE INTO passport_stage VALUES (?, ?, ?, ?)", (contract, stage, ran.rounds, json.dumps(rows))
    )


def ran(tx: Transaction, contract: bytes, stage: str) -> Ran:
    """How a complete stage went."""
    rounds, text = tx.one("SELECT rounds, sums FROM passport_stage WHERE contract = ? AND stage = ?", (contract, stage))
    return Ran(
        rounds, [Sums(tuple(survivors), first, last, count) for survivors, first, last, count in json.loads(text)]
    )


def keep(tx: Transaction, contract: bytes, stage: str, output: str, data: bytes) -> None:
    tx.execute("INSERT OR REPLACE INTO passport VALUES (?, ?, ?, ?)", (contract, stage, output, data))


def gather(tx: Transaction, contract: bytes, card_of: Callable[[str], str]) -> None:
    """Keep the signatures that are in the contract's scope by now. `card_of`: peer id → card, "" if it is not known."""
    for stage, output, data in tx.all("SELECT stage, output, document FROM passport WHERE contract = ?", (contract,)):
        passport = msgspec.json.decode(data, type=Passport)
        for alias in passport.contributors:
            peer = passport.participants[alias]
            signed = records.find(tx, contract, PASSPORT, f"{stage}.{output}", peer)
            if signed is not None and signed.record.body == digest(data) and card_of(peer):
                tx.execute(
                    "INSERT OR IGNORE INTO passport_signature VALUES (?, ?, ?, ?, ?, ?)",
                    (contract, stage, output, peer, card_of(peer), signed.raw),
                )


def find(tx: Transaction, contract: bytes, stage: str, output: str) -> File | None:
    """The passport of a model, with the signatures that are kept."""
    place = (contract, stage, output)
    row = tx.one("SELECT document FROM passport WHERE contract = ? AND stage = ? AND output = ?", place)
    if row is None:
        return None
    signed = tx.all(
        "SELECT card, raw FROM passport_signature WHERE contract = ? AND stage = ? AND output = ? ORDER BY signer",
        place,
    )
    return File(
        fedpeer_passport=FORMAT,
        passport=msgspec.json.decode(row[0], type=Passport),
        cards=[card for card, _ in signed],
        signatures=[raw for _, raw in signed],
    )


# anywhere


def verify(data: bytes) -> Verified:
    """Verify a passport's file. Raises TrustError for what is altered or not signed by a contributor."""
    if len(data) > MAX_FILE:
        raise TrustError(f"a passport has at most {MAX_FILE} bytes")
    try:
        file = msgspec.json.decode(data, type=File)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TrustError(f"this is not a model's passport: {error}") from None
    if file.fedpeer_passport != FORMAT:
        raise TrustError("this passport was written by a newer fedpeer", hint="verify it with that release")
    passport = file.passport
    hashed = digest(document(passport))
    contributors = {passport.participants.get(alias, ""): alias for alias in passport.contributors}
    try:
        cards = {card.id: card for card in map(Card.parse, file.cards)}
    except CardError:
        raise TrustError("a card in this passport was altered", hint="ask one of the signers for theirs") from None
    signed: set[str] = set()
    for raw in file.signatures:
        try:
            statement = records.parse(raw)
        except FedpeerError:
            raise TrustError("a signature of this passport cannot be read") from None
        record = statement.record
        if record.sender not in contributors or record.sender not in cards:
            raise TrustError(f"a signature by {record.sender}, who is no contributor, or whose card is missing")
        alias = contributors[record.sender]
        place = (bytes.fromhex(passport.contract), PASSPORT, f"{passport.stage}.{passport.output}", hashed)
        if (record.scope, record.kind, record.slot, record.body) != place or not statement.signature:
            raise TrustError(f"what {alias} signed is another passport: this one was altered", peer=alias)
        statement.verify(cards[record.sender].body.signing)
        signed.add(record.sender)
    return Verified(
        model=passport.model,
        contract=passport.contract,
        job=passport.job,
        signed_by=[f"{alias} ({peer})" for peer, alias in contributors.items() if peer in signed],
        missing=[alias for peer, alias in contributors.items() if peer not in signed],
    )
