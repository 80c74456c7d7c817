"""A whole audit log as one file, which anybody can verify elsewhere with public keys only.

One JSON object a line: what it is and whose, the cards of all who signed, their signed statements, then the entries.

    {"fedpeer_audit":1,"owner":"fp1…"}
    {"card":"fedpeer-card-1.…"}
    {"head":"<base64 of a signed record>"}           heads of this log, and of the others' that it co-signed
    {"cosign":"<base64 of a signed record>"}
    {"number":1,"entry":"<base64>","nodes":"<base64>"}      without "entry": hidden, its hash in "nodes" stands for it

Rules
* Every signature is verified. A card's id is the hash of its keys: who compares the ids or the fingerprints of the
  co-signers with those it knows knows that they signed; `trusted` counts no others.
* The statements of all files given together count for each of them: a log whose owner cut it, and the signatures
  beyond the cut, is found by the file of any partner.
* A file without the entries shows others that the log is whole and what was signed, and nothing of what is in it: an
  entry's hash tells nothing, for 16 random bytes are in it. Who verifies is told how many are hidden.
* A line has at most `MAX_LINE` bytes. What is wrong is named: AuditBroken with the first wrong entry.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from fedpeer import codec
from fedpeer.errors import AuditBroken, CardError, FedpeerError
from fedpeer.governance import audit, heads
from fedpeer.identity import Card
from fedpeer.mesh import records
from fedpeer.store import Transaction

FORMAT: Final = 1
MAX_LINE: Final = 256 * 1024
PAGE: Final = 2000


class Line(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    fedpeer_audit: int = 0
    owner: str = ""
    card: str = ""
    head: bytes = b""
    cosign: bytes = b""
    number: int = 0
    entry: bytes = b""
    nodes: bytes = b""


class Signer(msgspec.Struct, kw_only=True):
    """Who co-signed a log, and up to which entry."""

    id: str
    name: str
    fingerprint: str
    number: int


class Verified(msgspec.Struct, kw_only=True):
    """A log that is whole and unaltered, as far as it is signed."""

    file: str
    id: str
    name: str
    entries: int
    hidden: int
    """entries that are not in the file, but their hashes"""
    root: str
    heads: int
    """heads of it that were found, and fit"""
    signed: int
    """up to this entry somebody else co-signed it; what came later only its owner can vouch for"""
    cosigners: list[Signer]


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Line)


def page(tx: Transaction, owner: str, card: str, since: int, *, redacted: bool = False) -> bytes:
    """The lines of the file from entry `since` on, at most PAGE; with 0 all that stands before the entries.

    `redacted`: the entries are hidden.
    """
    if since:
        rows = audit.stored(tx, since, PAGE)
        return lines(Line(number=number, entry=b"" if redacted else body, nodes=nodes) for number, body, nodes in rows)
    kept = heads.statements(tx)
    cards = {**kept.cards, owner: card}
    return lines(
        [
            Line(fedpeer_audit=FORMAT, owner=owner),
            *(Line(card=text) for text in cards.values()),
            *(Line(head=raw) for raw in kept.heads),
            *(Line(cosign=raw) for raw in kept.cosigns),
        ]
    )


def lines(of: Iterable[Line]) -> bytes:
    """As they stand in the file."""
    return b"".join(_encoder.encode(line) + b"\n" for line in of)


@dataclass
class _Statement:
    """Somebody's word on a log: number and root."""

    signer: str
    number: int
    root: bytes


@dataclass
class _File:
    """A file up to its first entry."""

    name: str
    owner: str
    first: Line | None
    rest: Iterator[Line]
    statements: dict[str, list[_Statement]] = field(default_factory=lambda: defaultdict(list))


def verify(files: Sequence[tuple[str, Iterable[bytes]]], trusted: Collection[str] | None = None) -> list[Verified]:
    """Verify logs, each given as (name of the file, its lines), against all that is signed in any of the files.

    `trusted`: ids of the co-signers that count; None: all. Raises AuditBroken.
    """
    cards: dict[str, Card] = {}
    opened = [_open(name, lines, cards) for name, lines in files]
    said: dict[str, list[_Statement]] = defaultdict(list)
    for file in opened:
        for owner, statements in file.statements.items():
            said[owner] += [one for one in statements if trusted is None or one.signer in (owner, *trusted)]
    return [_verify(file, said[file.owner], cards) for file in opened]


def _open(name: str, lines: Iterable[bytes], cards: dict[str, Card]) -> _File:
    """Read what stands before the entries; its cards are added to `cards`."""
    rest = _parse(name, lines)
    top = next(rest, Line())
    if not top.owner or top.fedpeer_audit < 1:
        raise AuditBroken(f"{name} is no audit log", hint="fedpeer audit export FILE makes one")
    if top.fedpeer_audit != FORMAT:
        raise AuditBroken(f"{name} was written by a newer fedpeer", hint="verify it with that release")
    file = _File(name, top.owner, None, rest)
    for line in rest:
        if line.number:
            file.first = line
            break
        try:
            if line.card:
                card = Card.parse(line.card)
                cards[card.id] = card
            elif line.head:
                signed = _signed(line.head, heads.HEAD, cards)
                head = codec.decode_as(heads.SignedHead, signed.body)
                file.statements[signed.sender].append(_Statement(signed.sender, head.number, head.root))
            else:
                signed = _signed(line.cosign, heads.COSIGN, cards)
                for owner, number, root in codec.decode_as(heads.Cosign, signed.body).heads:
                    file.statements[owner].append(_Statement(signed.sender, number, root))
        except FedpeerError as error:
            what = "card" if line.card else "signed head" if line.head else "co-signature"
            raise AuditBroken(f"{name}: a {what} was altered: {error.message}") from None
    if file.owner not in cards:
        raise AuditBroken(f"{name}: the card of its owner is missing")
    return file


def _signed(raw: bytes, kind: str, cards: dict[str, Card]) -> records.Record:
    signed = records.parse(raw)
    if signed.record.kind != kind or not signed.signature:
        raise CardError(f"it is not a signed {kind}")
    card = cards.get(signed.record.sender)
    if card is None:
        raise CardError("the card of its signer is missing")
    signed.verify(card.body.signing)
    return signed.record


def _verify(file: _File, said: Sequence[_Statement], cards: dict[str, Card]) -> Verified:
    def name_of(peer: str) -> str:
        return cards[peer].name if peer in cards else peer

    heads = {(one.number, one.root) for one in said if one.signer == file.owner}
    said = [one for one in said if (one.number, one.root) in heads]  # under what is no head of theirs anybody may sign
    signed: dict[int, list[tuple[bytes, str]]] = defaultdict(list)
    for one in said:
        signed[one.number].append((one.root, name_of(one.signer)))
    checker = audit.Checker(signed)
    try:
        for line in _entries(file):
            checker.add(line.number, line.entry, line.nodes)
        head = checker.end()
    except AuditBroken as error:
        what = error.message.removeprefix(f"{file.name}, ")  # of a line that cannot be read
        raise AuditBroken(
            f"{file.name}, the log of {name_of(file.owner)}: {what}", hint=error.hint, number=error.number
        ) from None
    by: dict[str, int] = {}
    for one in said:
        if one.signer != file.owner:
            by[one.signer] = max(by.get(one.signer, 0), one.number)
    return Verified(
        file=file.name,
        id=file.owner,
        name=name_of(file.owner),
        entries=head.number,
        hidden=checker.hidden,
        root=head.digest.hex(),
        heads=len({(one.number, one.root) for one in said}),
        signed=max(by.values(), default=0),
        cosigners=[
            Signer(id=peer, name=name_of(peer), fingerprint=cards[peer].fingerprint, number=number)
            for peer, number in sorted(by.items(), key=lambda item: name_of(item[0]))
        ],
    )


def _entries(file: _File) -> Iterator[Line]:
    if file.first is not None:
        yield file.first
        yield from file.rest


def _parse(name: str, lines: Iterable[bytes]) -> Iterator[Line]:
    number = 0
    for count, text in enumerate(lines, start=1):
        try:
            if len(text) > MAX_LINE:
                raise msgspec.DecodeError(f"longer than {MAX_LINE} bytes")
            line = _decoder.decode(text)
            if _encoder.encode(line) != text.removesuffix(b"\n"):  # the same said otherwise: a byte was changed
                raise msgspec.DecodeError("not as it was written")
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if count == 1:
                hint = "fedpeer audit export FILE makes one"
                raise AuditBroken(
                    f"{name} is no audit log, or its first line was altered: {error}", hint=hint
                ) from None
            where = f"entry {number + 1}" if number else "what stands before the entries"
            raise AuditBroken(
                f"{name}, line {count}: {where} cannot be read: {error}", number=number + 1 if number else 0
            ) from None
        number = line.number or number
        yield line
