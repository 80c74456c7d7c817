"""What convicts a party: messages that it signed and that no honest party ever signs together.

Rules
* Evidence proves itself: to the signed messages nothing is added but the keys of the parties and the numbers of their
  contract. Whoever brought it does not matter, nor what this peer has seen.
* Only what an honest party logs before it sends can convict. A wrong share, a wrong sum or silence convicts nobody.
* Statements are compared, never signatures.
* What is no evidence is None, whatever is wrong with it; nothing escapes.

What `messages` of an EVIDENCE holds:

    E1 to E4, E7, E6 in one instance    the two messages
    E6 in one group                     the two RELEASEs, the group, a `Place` for each
    E5                                  the ADVERTISE, then t times `Dealt`

A RELEASE names its instance and its context, but not its group, nor whether the group is bound to one survivor set.
A `Place` opens both hashes: the sid is that of (contract, group, seq), and the context is that of a START value whose
parameters say "group".

Source: SA1, version 1, section 10.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from fedpeer import codec
from fedpeer.aggregation import shamir
from fedpeer.aggregation.keyset import Which, check_opened, is_secret_of
from fedpeer.aggregation.messages import Count, Digest, Evidence, Party, Signature, Signed, StartValue, parse
from fedpeer.aggregation.names import MIN_PARTIES, Profile, advert_id, context, params_hash, parties_of, sid_of
from fedpeer.crypto import Secret
from fedpeer.errors import RemoteProtocolError, TrustError

PINNED: Final = "group"
"""the last of the parameters, of sums that share one survivor set"""


class Dealt(codec.Record, frozen=True):
    """A share that its dealer signed for this holder."""

    holder: Party
    which: Which
    share: Digest
    other: Digest
    """the digest of the share of the other secret"""
    signature: Signature


class Place(codec.Record, frozen=True):
    """Where in its group an instance is, and what it was started with."""

    seq: Count
    start: StartValue
    params: bytes
    """the encoded parameters behind start.params"""


def contradiction(a: Signed, b: Signed) -> str | None:
    """ "E1" to "E7" if no honest party says both in one instance, else None. Looks at no signature."""
    if (a.kind, a.sender, a.sid) != (b.kind, b.sender, b.sid):
        return None
    x, y = a.message, b.message
    match a.kind:
        case "PREVOTE" | "PRECOMMIT" if (x.stage, x.view) == (y.stage, y.view):
            return "E1" if x.id != y.id else None
        case "PROPOSAL" if (x.stage, x.view) == (y.stage, y.view):
            return "E2" if a.body != b.body else None
        case "CUT" if x.view == y.view:
            return "E2" if a.body != b.body else None
        case "SUM" if (x.survivors, x.chunk) == (y.survivors, y.chunk):
            return "E3" if x.digest != y.digest else None
        case "SCATTER" if x.chunk == y.chunk:
            return "E4" if x.digest != y.digest else None
        case "RELEASE":
            return "E6" if x.survivors != y.survivors else None
        case "ADVERTISE" if x.inc == y.inc:
            return "E7" if a.body != b.body else None
    return None


def two_releases(a: Signed, b: Signed, group: bytes, places: tuple[Place, Place]) -> list[bytes]:
    """The messages of E6 for two instances of one group."""
    return [a.raw, b.raw, group, *map(codec.encode, places)]


def bad_dealing(advert: Signed, shares: Sequence[Dealt]) -> list[bytes]:
    """The messages of E5: t shares of one secret, by different holders."""
    return [advert.raw, *map(codec.encode, shares)]


def convict(
    evidence: Evidence, profile: Profile, publics: Sequence[bytes], contract: bytes, convicted: Collection[int] = ()
) -> int | None:
    """The party that this convicts, or None.

    `publics`: the Ed25519 key of every party of the contract; `contract`: its hash. The envelope's own signature is
    the caller's to check, and means nothing here. `convicted`: of these parties nothing more is looked at.
    """
    try:
        if evidence.messages and parse(evidence.messages[0]).sender in convicted:  # whom it is about
            return None
        match evidence.type, evidence.messages:
            case "E5", [advert, *shares]:
                return _bad_dealing(_signed(advert, publics), shares, profile, publics)
            case "E6", [first, second, group, *places]:
                return _two_releases(first, second, group, places, profile, publics, contract)
            case kind, [first, second]:
                a, b = _signed(first, publics), _signed(second, publics)
                return a.sender if contradiction(a, b) == kind else None
    except (RemoteProtocolError, TrustError):
        pass
    return None


def _signed(raw: bytes, publics: Sequence[bytes]) -> Signed:
    signed = parse(raw)
    if signed.sender >= len(publics):
        raise TrustError("a message of a party that does not exist")
    signed.verify(publics[signed.sender])
    return signed


def _two_releases(
    first: bytes,
    second: bytes,
    group: bytes,
    places: Sequence[bytes],
    profile: Profile,
    publics: Sequence[bytes],
    contract: bytes,
) -> int | None:
    a, b = _signed(first, publics), _signed(second, publics)
    if not (a.kind == b.kind == "RELEASE" and a.sender == b.sender and len(places) == 2):
        return None
    sets = []
    for signed, raw in zip((a, b), places, strict=True):
        place = codec.decode_as(Place, raw)
        if not _is_at(signed, group, place, profile, contract):
            return None
        sets.append(parties_of(signed.message.survivors, profile.n))
    return a.sender if all(sets) and sets[0] != sets[1] else None


def _is_at(release: Signed, group: bytes, place: Place, profile: Profile, contract: bytes) -> bool:
    """Whether this RELEASE is of that instance of the group, and the group is bound to one survivor set."""
    start = place.start
    contributors, owners = (parties_of(raw, profile.n) for raw in (start.contributors, start.owners))
    pin = None if start.pin is None else parties_of(start.pin, profile.n)
    params = codec.decode(place.params)
    return (
        release.sid == sid_of(contract, group, place.seq)
        and release.message.ctx
        == context(release.sid, start.model, start.params, contributors, owners, start.root, pin)
        and start.params == params_hash(place.params)
        and isinstance(params, list)
        and params[-1:] == [PINNED]
    )


def _bad_dealing(advert: Signed, raws: Sequence[bytes], profile: Profile, publics: Sequence[bytes]) -> int | None:
    if advert.kind != "ADVERTISE" or len(raws) != profile.t:
        return None
    shares = [codec.decode_as(Dealt, raw) for raw in raws]
    holders, which = [share.holder for share in shares], shares[0].which
    if len(set(holders)) != profile.t or max(holders) >= profile.n or any(share.which != which for share in shares):
        return None
    if which == "s" and profile.n <= MIN_PARTIES:  # zeros stand in the place of its shares
        return None
    dealer, adv_id = advert.sender, advert_id(advert.body)
    for share in shares:
        public = publics[dealer]
        check_opened(advert.sid, dealer, adv_id, share.holder, which, share.share, share.other, share.signature, public)
    secret = Secret(shamir.Weights(holders).interpolate([share.share for share in shares]))
    return None if is_secret_of(advert.message, which, secret) else dealer
