"""The keys of one party for one instance, the shares of its secrets, and the seeds of its masks.

Rules
* One masked vector per key set, ever. A key set lives under (sid, adv_id), in the store before it is advertised.
* The coefficients of both polynomials follow from one stored seed: shares sent again are the same bytes.
* A share is sealed to its holder, bound to both key sets, and its digest is signed by the dealer; whoever sees it
  opened checks it against that. Of three parties σ is never shared: zeros stand in its place.
* Opened secrets certify themselves: b against hb, σ against pk.
* What a peer sent is checked when it comes: key of low order, share that is no element, other digest, other holder.

How it works.  σ → sk = H('fp.sa1.sk'; key=σ) → pk = X25519(sk, 9) is published. Two parties i < j share
X25519(sk_i, pk_j) and hash it, with the context and both public keys, to the seed of one mask, which i adds and j
takes away. b gives the mask that a party adds alone. e and epk seal the shares and are erased when they are dealt.

Source: SA1, version 1, section 4; Bonawitz et al., CCS 2017 (eprint 2017/281), section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Final, Literal, TypeVar

from fedpeer import codec
from fedpeer.aggregation import shamir
from fedpeer.aggregation.messages import LABEL, VERSION, AdvertId, Advertise, Count, Digest, Opened, Party, Signature
from fedpeer.aggregation.names import MIN_PARTIES, Parties, advert_id, u32
from fedpeer.crypto import KEY_BYTES, Aead, Buffer, DhKey, Secret, SigningKey, equal, hash_, verify, x25519
from fedpeer.errors import LocalProtocolError, RemoteProtocolError, StoreError, TrustError

Which = Literal["b", "s"]
"""of which secret: the self mask's b, or the mask key's σ"""

NO_SHARE: Final = bytes(shamir.ELEMENT_BYTES)
_PLAINTEXT_BYTES: Final = 135
_NONCE: Final = bytes(12)  # each key seals one plaintext
_LOW_ORDER: Final = {  # u of the points that give zero with every scalar (RFC 7748, section 6.1), below p
    0,
    1,
    0x00B8495F16056286FDB1329CEB8D09DA6AC49FF1FAE35616AEB8413B7C7AEBE0,
    0x57119FD0DD4E22D8868E1C58C45C44045BEF839C55B1D0B1248C50A3BC959C5F,
    shamir.P - 1,
}


# public keys, seeds and secrets that certify themselves


def is_usable(public: bytes) -> bool:
    """Whether a public key may be used: 32 bytes and not of low order. An ADVERTISE with another counts as absent."""
    u = int.from_bytes(public, "little") & ((1 << 255) - 1)  # X25519 ignores the top bit, and reduces
    return len(public) == KEY_BYTES and u % shamir.P not in _LOW_ORDER


def mask_key(sigma: Secret) -> DhKey:
    """The X25519 key behind σ."""
    return DhKey(Secret(hash_("fp.sa1.sk", key=sigma.reveal())))


def pk_of(sigma: Secret) -> bytes:
    """What σ is published as."""
    return mask_key(sigma).public


def hb_of(party: int, b: Secret) -> bytes:
    """What b is published as."""
    return hash_("fp.sa1.hb", u32(party), b.reveal())


def is_secret_of(advert: Advertise, which: Which, secret: Secret) -> bool:
    """Whether this is the b or σ behind an ADVERTISE."""
    if len(secret.reveal()) != shamir.ELEMENT_BYTES:
        return False
    if which == "b":
        return equal(hb_of(advert.sender, secret), advert.hb)
    return equal(pk_of(secret), advert.pk)


def pair_seed(ctx: bytes, me: int, other: int, key: DhKey, public: bytes) -> Secret:
    """The seed that `me` (holding `key`) and `other` (with this pk) share; both get the same.

    Raises TrustError if the public key is of low order.
    """
    shared = key.exchange(public)
    (low, public_low), (high, public_high) = sorted([(me, key.public), (other, public)])
    return Secret(hash_("fp.sa1.pair", ctx, u32(low), u32(high), public_low, public_high, key=shared))


def self_seed(ctx: bytes, party: int, b: Secret) -> Secret:
    """The seed of the mask that this party adds alone."""
    return Secret(hash_("fp.sa1.self", ctx, u32(party), key=b.reveal()))


Seeds = tuple[list[Secret], list[Secret]]
"""The seeds of the masks to add, and of those to take away."""


def masking_seeds(keys: KeySet, ctx: bytes, publics: Mapping[int, bytes]) -> Seeds:
    """The masks of y = x + PRG(β) + Σ_{j>i} PRG(s_ij) − Σ_{j<i} PRG(s_ij); `publics`: pk of every contributor."""
    me, key = keys.party, keys.mask_key
    if publics.get(me) != key.public:
        raise LocalProtocolError("these keys are not those of the instance")
    plus, minus = [self_seed(ctx, me, keys.b)], list[Secret]()
    for other, public in publics.items():
        if other != me:
            (plus if other > me else minus).append(pair_seed(ctx, me, other, key, public))
    return plus, minus


def unmasking_seeds(
    ctx: bytes,
    survivors: Parties,
    publics: Mapping[int, bytes],
    opened_b: Mapping[int, Secret],
    opened_sigma: Mapping[int, Secret],
) -> Seeds:
    """What turns the sum of the survivors' masked vectors into the sum of their vectors.

    b of every survivor, σ of every other contributor (`publics`: pk of every contributor). Raises LocalProtocolError
    unless it is exactly these.
    """
    if opened_b.keys() != survivors or opened_sigma.keys() != publics.keys() - survivors or not survivors:
        raise LocalProtocolError("unmasking takes b of the survivors and σ of the other contributors")
    plus: list[Secret] = []
    minus = [self_seed(ctx, party, b) for party, b in opened_b.items()]
    for gone, sigma in opened_sigma.items():
        key = mask_key(sigma)
        for other in survivors:  # what it added for the one who is gone is taken away
            (minus if other < gone else plus).append(pair_seed(ctx, gone, other, key, publics[other]))
    return plus, minus


# shares


def share_digests(share_b: bytes, share_s: bytes) -> tuple[bytes, bytes]:
    return hash_("fp.sa1.shr", b"b", share_b), hash_("fp.sa1.shr", b"s", share_s)


def share_body(sid: bytes, adv_id: bytes, holder: int, dig_b: bytes, dig_s: bytes) -> bytes:
    """What a dealer signs, as kind SHARE, for each holder."""
    return codec.encode([sid, adv_id, holder, dig_b, dig_s])


def check_opened(
    sid: bytes,
    dealer: int,
    adv_id: bytes,
    holder: int,
    which: Which,
    share: bytes,
    other_digest: bytes,
    signature: bytes,
    dealer_public: bytes,
) -> None:
    """Raise TrustError unless the dealer gave exactly this share to this holder, under this key set."""
    if not shamir.is_element(share):
        raise TrustError(f"party {holder} shows a share of party {dealer} that is no element of the field")
    mine = hash_("fp.sa1.shr", which.encode(), share)
    digests = (mine, other_digest) if which == "b" else (other_digest, mine)
    try:
        verify(dealer_public, "SHARE", share_body(sid, adv_id, holder, *digests), signature, label=LABEL)
    except TrustError:
        raise TrustError(f"party {holder} shows a share that party {dealer} did not sign for it") from None


class _Dealt(codec.Record, frozen=True):
    """The plaintext of a SHARE."""

    share_b: Digest
    share_s: Digest
    signature: Signature


class _StoredShare(codec.Record, frozen=True):
    version: Literal[1]
    dealer: Party
    adv_id: AdvertId
    share_b: Digest
    share_s: Digest
    signature: Signature


@dataclass(frozen=True, eq=False)
class HeldShare:
    """The shares of one dealer that this party holds: checked, and to be on disk before they are acknowledged."""

    dealer: int
    adv_id: bytes
    share_b: Secret
    share_s: Secret
    dig_b: bytes
    dig_s: bytes
    signature: bytes

    def opened(self, which: Which) -> Opened:
        """The entry of a RELEASE ("s") or SHARE_B ("b"). Raises LocalProtocolError for a σ that is not shared."""
        if which == "b":
            return self.dealer, self.share_b.reveal(), self.dig_s, self.signature
        if self.share_s.reveal() == NO_SHARE:
            raise LocalProtocolError("σ is not shared among three parties")
        return self.dealer, self.share_s.reveal(), self.dig_b, self.signature

    def to_bytes(self) -> bytes:
        """For the store, to be sealed there."""
        shares = self.share_b.reveal(), self.share_s.reveal()
        return codec.encode([1, self.dealer, self.adv_id, *shares, self.signature])

    @classmethod
    def from_bytes(cls, raw: Buffer) -> HeldShare:
        """Raises StoreError."""
        stored = _stored(_StoredShare, raw)
        digests = share_digests(stored.share_b, stored.share_s)
        shares = Secret(stored.share_b), Secret(stored.share_s)
        return cls(stored.dealer, stored.adv_id, *shares, *digests, stored.signature)


# key sets


class _StoredKeys(codec.Record, frozen=True):
    version: Literal[1]
    party: Party
    sid: Digest
    inc: Count
    sigma: Digest
    b: Digest
    e: Digest | None
    epk: Digest
    seed: Digest


@dataclass(eq=False)
class KeySet:
    """The keys of one party for one instance. Made by `fresh`, or by `from_bytes` after a restart."""

    party: int
    sid: bytes
    inc: int
    sigma: Secret
    b: Secret
    e: Secret | None
    epk: bytes
    seed: Secret
    """the coefficients of both polynomials follow from it"""
    _polynomials: dict[tuple[Which, int], shamir.Polynomial] = field(default_factory=dict, init=False, repr=False)
    _exchanged: dict[bytes, bytes] = field(default_factory=dict, init=False, repr=False)
    """epk of another → X25519 with e: one for what is dealt to it and for what it dealt"""

    @classmethod
    def fresh(cls, party: int, sid: bytes, inc: int, random: Callable[[int], bytes]) -> KeySet:
        """New keys; `inc` grows whenever keys of this instance were lost. `random(size)`: secret bytes."""

        def draw() -> bytes:
            return random(32)

        sigma, b, e, seed = _element(draw), _element(draw), draw(), draw()
        return cls(party, sid, inc, Secret(sigma), Secret(b), Secret(e), DhKey(Secret(e)).public, Secret(seed))

    @cached_property
    def mask_key(self) -> DhKey:
        return mask_key(self.sigma)

    @property
    def pk(self) -> bytes:
        return self.mask_key.public

    @property
    def hb(self) -> bytes:
        return hb_of(self.party, self.b)

    @property
    def advertise_fields(self) -> tuple[int, bytes, bytes, bytes]:
        """The fields of this key set's ADVERTISE: inc, pk, epk, hb."""
        return self.inc, self.pk, self.epk, self.hb

    @cached_property
    def adv_id(self) -> bytes:
        """What this key set is called (16 bytes): of the body of its ADVERTISE."""
        return advert_id(codec.encode([VERSION, self.sid, "ADVERTISE", self.party, *self.advertise_fields]))

    def coefficients(self, which: Which, t: int) -> list[bytes]:
        """The t − 1 coefficients of the polynomial whose value at 0 is this secret; always the same."""
        key = self.seed.reveal()
        numbered = (hash_("fp.sa1.coef", which.encode(), u32(number), key=key) for number in count())
        return [_element(numbered.__next__) for _ in range(t - 1)]

    def share_for(
        self, holder: int, holder_adv_id: bytes, holder_epk: bytes, t: int, n: int, signer: SigningKey
    ) -> bytes:
        """The ciphertext of the SHARE for one of n parties (ourselves included), of whom t can open a secret.

        Raises TrustError for a key of low order, LocalProtocolError once e is erased.
        """
        share_b = self._share("b", self.b, holder, t)
        share_s = self._share("s", self.sigma, holder, t) if n > MIN_PARTIES else NO_SHARE
        signed = share_body(self.sid, self.adv_id, holder, *share_digests(share_b, share_s))
        plaintext = codec.encode([share_b, share_s, signer.sign("SHARE", signed, label=LABEL)])
        key = self._share_key(self.party, holder, self.epk, holder_epk)
        return key.seal(_NONCE, plaintext, self._associated(self.party, self.adv_id, holder_adv_id))

    def own_share(self, t: int, n: int, signer: SigningKey) -> HeldShare:
        """What this party holds of its own secrets: as of anybody's, and as long as it has the keys."""
        share_b = self._share("b", self.b, self.party, t)
        share_s = self._share("s", self.sigma, self.party, t) if n > MIN_PARTIES else NO_SHARE
        digests = share_digests(share_b, share_s)
        signature = signer.sign("SHARE", share_body(self.sid, self.adv_id, self.party, *digests), label=LABEL)
        return HeldShare(self.party, self.adv_id, Secret(share_b), Secret(share_s), *digests, signature)

    def open_share(
        self, dealer: int, dealer_adv_id: bytes, dealer_epk: bytes, ciphertext: bytes, dealer_public: bytes, n: int
    ) -> HeldShare:
        """The shares that this dealer sealed to this key set. Raises TrustError unless all of it is as it must be."""
        associated = self._associated(dealer, dealer_adv_id, self.adv_id)
        try:
            key = self._share_key(dealer, self.party, dealer_epk, self.epk)
            dealt = codec.decode_as(_Dealt, key.open(_NONCE, ciphertext, associated), limit=_PLAINTEXT_BYTES)
        except (TrustError, RemoteProtocolError):
            raise TrustError(f"the shares of party {dealer} cannot be opened with this party's keys") from None
        if not shamir.is_element(dealt.share_s) or (dealt.share_s == NO_SHARE) != (n <= MIN_PARTIES):
            raise TrustError(f"party {dealer} dealt a share of σ that is none")
        digests = share_digests(dealt.share_b, dealt.share_s)
        check_opened(
            self.sid, dealer, dealer_adv_id, self.party, "b", dealt.share_b, digests[1], dealt.signature, dealer_public
        )
        shares = Secret(dealt.share_b), Secret(dealt.share_s)
        return HeldShare(dealer, dealer_adv_id, *shares, *digests, dealt.signature)

    def erase_e(self) -> None:
        """After START no share is dealt or opened any more."""
        self.e = None
        self._polynomials.clear()
        self._exchanged.clear()

    def to_bytes(self) -> bytes:
        """For the store, to be sealed there."""
        e = None if self.e is None else self.e.reveal()
        secrets = self.sigma.reveal(), self.b.reveal(), e, self.epk, self.seed.reveal()
        return codec.encode([1, self.party, self.sid, self.inc, *secrets])

    @classmethod
    def from_bytes(cls, raw: Buffer) -> KeySet:
        """Raises StoreError for anything but what `to_bytes` gave."""
        stored = _stored(_StoredKeys, raw)
        e = None if stored.e is None else Secret(stored.e)
        sound = shamir.is_element(stored.sigma) and shamir.is_element(stored.b)
        if not sound or (e is not None and DhKey(e).public != stored.epk):
            raise StoreError("a key set in the store is damaged")
        sigma, b, seed = Secret(stored.sigma), Secret(stored.b), Secret(stored.seed)
        return cls(stored.party, stored.sid, stored.inc, sigma, b, e, stored.epk, seed)

    def _share(self, which: Which, secret: Secret, holder: int, t: int) -> bytes:
        polynomial = self._polynomials.get((which, t))
        if polynomial is None:
            polynomial = shamir.Polynomial(secret.reveal(), self.coefficients(which, t))
            self._polynomials[which, t] = polynomial
        return polynomial.share(holder)

    def _share_key(self, dealer: int, holder: int, dealer_epk: bytes, holder_epk: bytes) -> Aead:
        if self.e is None:
            raise LocalProtocolError("after START no share is dealt or opened")
        other = holder_epk if dealer == self.party else dealer_epk
        shared = self._exchanged.get(other)
        if shared is None:
            shared = self._exchanged[other] = x25519(self.e.reveal(), other)
        return Aead(hash_("fp.sa1.share", self.sid, u32(dealer), u32(holder), dealer_epk, holder_epk, key=shared))

    def _associated(self, dealer: int, dealer_adv_id: bytes, holder_adv_id: bytes) -> bytes:
        return codec.encode([VERSION, self.sid, "SHARE", dealer]) + dealer_adv_id + holder_adv_id


def _element(draw: Callable[[], bytes]) -> bytes:
    """A uniform element: 32 drawn bytes without their top bit, drawn again if not below p."""
    while True:
        raw = draw()
        element = raw[:31] + bytes([raw[31] & 0x7F])
        if shamir.is_element(element):
            return element


R = TypeVar("R", bound=codec.Record)


def _stored(kind: type[R], raw: Buffer) -> R:
    try:
        return codec.decode_as(kind, raw, limit=512)
    except RemoteProtocolError as error:
        raise StoreError(f"keys or shares in the store are damaged: {error}") from None
