"""What nobody may ever know: judged on everything that was said, over the whole life of each group of sums.

The observer is the strongest coalition the protocol speaks of: the liars, and as many honest parties as may pool what
they see, t_c in all. It has every masked vector and every message, and each share that was ever dealt to one of its
members. It states no rule of the protocol; it says what must not be known, or must not be said:

1. of no honest party both the self-mask seed b and the pairwise secret σ of one key set;
2. of one group not the sums of two sets of honest parties (of one instance, where the group is not pinned);
3. of no honest party two masked vectors of one instance, or one under two contexts;
4. nobody's b, nor a share of one, from an honest party before t parties have released for one set of survivors;
5. from no honest party two RELEASEs for different survivors: in an instance any, in a group any that are not empty;
6. from no honest party two different messages in the place of one: nothing that could ever convict it;
7. from no honest party a masked vector under a START that follows an abort, before t parties have released for nobody
   in the aborted instance. (What a party has heard nobody sees; it is at most what was said.)
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fedpeer.aggregation import keyset, names
from fedpeer.aggregation.messages import START, Advertise, Proposal, Signed, StartValue, value_of
from fedpeer.aggregation.names import Parties, Profile, parties_of
from fedpeer.crypto import Secret
from fedpeer.errors import RemoteProtocolError, TrustError

Key = tuple[bytes, int, bytes]
"""one key set: (sid, party, advert id)"""


@dataclass(frozen=True)
class Instance:
    """What a sid stands for."""

    group: bytes
    seq: int
    pinned: bool


@dataclass(frozen=True)
class Said:
    """A message that left a process: one line of the transcript."""

    at: float
    party: int
    honest: bool
    signed: Signed
    to: int | None
    """the only party it is for, or None"""


def observe(
    transcript: Sequence[Said], profile: Profile, publics: Sequence[bytes], known: Mapping[bytes, Instance]
) -> list[str]:
    """Everything wrong with a transcript, in words; `known`: the instances by sid (others are nobody's)."""
    seen = _Seen(profile, publics, known)
    for said in transcript:
        if said.signed.sid in known:
            seen.hear(said)
    liars = frozenset(said.party for said in transcript if not said.honest)
    return [*seen.wrong, *seen.known_too_well(liars)]


_PLACES: Final[dict[str, tuple[str, ...]]] = {  # kind → the fields that name the place
    "ADVERTISE": ("inc",),
    "PROPOSAL": ("stage", "view"),
    "PREVOTE": ("stage", "view"),
    "PRECOMMIT": ("stage", "view"),
    "SCATTER": ("chunk",),
    "CUT": ("view",),
    "SUM": ("survivors", "chunk"),
    "RELEASE": (),
    "FINAL": (),
}


class _Seen:
    """What all messages together say."""

    def __init__(self, profile: Profile, publics: Sequence[bytes], known: Mapping[bytes, Instance]) -> None:
        self.profile, self.publics, self.known = profile, publics, known
        self.wrong: list[str] = []
        self.adverts: defaultdict[tuple[bytes, int], dict[bytes, Advertise]] = defaultdict(dict)
        self.dealt: defaultdict[tuple[bytes, int], set[int]] = defaultdict(set)
        """(sid, dealer) → the holders that shares were sent to"""
        self.shown: dict[str, defaultdict[Key, set[int]]] = {"b": defaultdict(set), "s": defaultdict(set)}
        """key set → the holders whose share everybody has seen"""
        self.open: dict[str, set[Key]] = {"b": set(), "s": set()}
        self.released: defaultdict[tuple[bytes, Parties], set[int]] = defaultdict(set)
        self.own: defaultdict[tuple[int, bytes], set[Parties]] = defaultdict(set)
        """(honest party, sid or group) → the sets it released for"""
        self.starts: dict[bytes, tuple[Parties, bool]] = {}
        """ctx → contributors, whether the instance before was aborted"""
        self.sids = {(instance.group, instance.seq): sid for sid, instance in known.items()}
        self.masked: defaultdict[tuple[bytes, int], set[bytes]] = defaultdict(set)
        """(sid, honest party) → the contexts under which it masked its vector"""
        self.chunks: dict[tuple[bytes, int, int], bytes] = {}
        self.places: dict[tuple[object, ...], bytes] = {}
        """(sid, honest party, kind, place) → the body of what it said there"""

    def hear(self, said: Said) -> None:
        message, sid, party = said.signed.message, said.signed.sid, said.party
        place = _PLACES.get(said.signed.kind)
        if said.honest and place is not None:
            key = sid, party, said.signed.kind, *(getattr(message, name) for name in place)
            if self.places.setdefault(key, said.signed.body) != said.signed.body:
                self._say(said, f"a second {said.signed.kind} in the place of another")
        match said.signed.kind:
            case "ADVERTISE":
                self.adverts[sid, party][names.advert_id(said.signed.body)] = message
            case "SHARE":
                self.dealt[sid, party].add(message.holder)
            case "PROPOSAL" if message.stage == START:
                self._start(message, sid)
            case "SCATTER" if said.honest:
                self._scatter(message, sid, party)
            case "RELEASE":
                survivors = parties_of(message.survivors, self.profile.n)
                self.released[sid, survivors].add(party)
                self._show("s", said)
                if said.honest:
                    self._release(sid, party, survivors)
            case "SHARE_B":
                self._show("b", said)
                if said.honest and not self._gate(sid, parties_of(message.survivors, self.profile.n)):
                    self._say(said, "a share of a b before enough parties released for these survivors")
            case "OPEN":
                self._open(said)

    def _say(self, said: Said, what: str) -> None:
        self.wrong.append(f"party {said.party} says at {said.at:.3f} s in {said.signed.sid.hex()[:8]}: {what}")

    def _start(self, message: Proposal, sid: bytes) -> None:
        try:
            value = value_of(START, message.value)
            assert isinstance(value, StartValue)
            contributors, owners, pin = (
                None if raw is None else parties_of(raw, self.profile.n)
                for raw in (value.contributors, value.owners, value.pin)
            )
        except RemoteProtocolError:
            return
        assert contributors is not None
        assert owners is not None
        ctx = names.context(sid, value.model, value.params, contributors, owners, value.root, pin)
        self.starts[ctx] = contributors, value.prev is not None and value.prev[:1] == ["ABORT"]

    def _scatter(self, message: object, sid: bytes, party: int) -> None:
        ctx, chunk, digest = (getattr(message, name) for name in ("ctx", "chunk", "digest"))
        self.masked[sid, party].add(ctx)
        if len(self.masked[sid, party]) > 1 or self.chunks.setdefault((sid, party, chunk), digest) != digest:
            self.wrong.append(f"party {party} sent two masked vectors in {sid.hex()[:8]}")
        if ctx in self.starts and self.starts[ctx][1]:
            before = self.sids[self.known[sid].group, self.known[sid].seq - 1]
            if len(self.released[before, frozenset()]) < self.profile.t:
                self.wrong.append(
                    f"party {party} masked its vector again before t released for nobody, {sid.hex()[:8]}"
                )

    def _release(self, sid: bytes, party: int, survivors: Parties) -> None:
        instance = self.known[sid]
        self.own[party, sid].add(survivors)
        if survivors and instance.pinned:
            self.own[party, instance.group].add(survivors)
        for place in (sid, instance.group):
            if len(self.own[party, place]) > 1:
                sets = sorted(map(sorted, self.own[party, place]))
                self.wrong.append(f"party {party} released for {sets} in {place.hex()[:8]} (seq {instance.seq})")

    def _gate(self, sid: bytes, survivors: Parties | None = None) -> bool:
        """Whether t parties have released for one set (for this one) up to now."""
        return any(
            len(parties) >= self.profile.t
            for (place, released), parties in self.released.items()
            if place == sid and released and survivors in (None, released)
        )

    def _show(self, which: keyset.Which, said: Said) -> None:
        sid, holder = said.signed.sid, said.party
        for dealer, share, other, signature in said.signed.message.shares:
            for advert in self.adverts[sid, dealer]:
                try:
                    keyset.check_opened(
                        sid,
                        dealer,
                        advert,
                        holder,
                        which,
                        share,
                        other,
                        signature,
                        self.publics[dealer],
                    )
                except TrustError:
                    continue
                self.shown[which][sid, dealer, advert].add(holder)

    def _open(self, said: Said) -> None:
        message, sid = said.signed.message, said.signed.sid
        advert = self.adverts[sid, message.dealer].get(message.advert)
        if advert is not None and keyset.is_secret_of(advert, message.which, Secret(message.secret)):
            self.open[message.which].add((sid, message.dealer, message.advert))
            if said.honest and message.which == "b" and not self._gate(sid):
                self._say(said, f"the b of party {message.dealer} before enough parties released for one set")

    # what a coalition makes of it

    def known_too_well(self, liars: Parties) -> Iterator[str]:
        """Violations for every coalition of t_c parties that has all liars in it."""
        others = [party for party in range(self.profile.n) if party not in liars]
        for friends in itertools.combinations(others, max(self.profile.t_c - len(liars), 0)):
            yield from self._coalition(liars | set(friends))

    def _coalition(self, coalition: Parties) -> Iterator[str]:
        sums: defaultdict[bytes, set[Parties]] = defaultdict(set)
        for (sid, party), contexts in self.masked.items():
            if party not in coalition:
                for advert in self.adverts[sid, party]:
                    if all(self._computable(which, (sid, party, advert), coalition) for which in ("b", "s")):
                        yield f"{sorted(coalition)} can compute the vector of party {party} in {sid.hex()[:8]}"
            for ctx in contexts & self.starts.keys():
                opened = self._opened(sid, ctx, coalition)
                if opened:
                    instance = self.known[sid]
                    sums[instance.group if instance.pinned else sid].add(opened)
        for group, sets in sums.items():
            if len(sets) > 1:
                yield f"{sorted(coalition)} can compute the sums over {sorted(map(sorted, sets))} of {group.hex()[:8]}"

    def _opened(self, sid: bytes, ctx: bytes, coalition: Parties) -> Parties:
        """The honest parties whose sum the coalition can compute from this instance; empty: none."""
        honest = self.starts[ctx][0] - coalition
        b, sigma = (
            {
                party
                for party in honest
                if any(self._computable(which, (sid, party, advert), coalition) for advert in self.adverts[sid, party])
            }
            for which in ("b", "s")
        )
        return frozenset(b) if honest <= b | sigma else frozenset()

    def _computable(self, which: str, key: Key, coalition: Parties) -> bool:
        """Whether a secret is open, or t of its shares are."""
        if key in self.open[which]:
            return True
        shown = self.shown[which].get(key, set())
        return len(shown | (self.dealt[key[0], key[1]] & coalition)) >= self.profile.t
