"""What a party may let go of, and when: the rules R1 to R5 and R7, one function each way, over one log.

Rules
* Nothing is released without q votes for it, and for one set only in an instance (the empty one after an abort): R1.
* Of a dealer in the survivor set S only shares of b, of another contributor only shares of σ: R2.
* One's own b, and any share of any b, goes only when t parties have said that they release for the very same S; one's
  own statement counts: R3. As 2t > n + f, this holds whatever the agreement did.
* S has at least m_min members, all of them contributors: R4.
* After an abort the empty set is released, which takes R1's one slot: R5.
* One survivor set for each group: R7.

The log is what this party itself has said (its RELEASE messages) and seen decided; both are on disk before anything
leaves. What is not allowed raises `Refused` with the name of the rule.

Source: SA1, version 1, section 9.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from fedpeer.aggregation.names import Parties, Profile


class Refused(Exception):
    """A rule forbids it."""


@dataclass
class Log:
    """What this party has released, and the survivor set that each group is bound to."""

    released: dict[bytes, Parties] = field(default_factory=dict)
    """sid → the set of this party's RELEASE"""
    pins: dict[bytes, Parties] = field(default_factory=dict)
    """group → the first set that was released or seen decided"""

    def release(self, sid: bytes, group: bytes, survivors: Parties, *, pinned: bool) -> None:
        """A RELEASE of ours is on disk."""
        self.released.setdefault(sid, survivors)
        if survivors and pinned:
            self.pins.setdefault(group, survivors)


@dataclass(frozen=True)
class Decided:
    """The instance a release is about, from its START."""

    sid: bytes
    group: bytes
    contributors: Parties
    pin: Parties | None
    pinned: bool = True


def may_scatter(log: Log, decided: Decided) -> None:
    """R7: a masked vector leaves only under a START that carries the pin of our own log."""
    if decided.pinned and decided.group in log.pins and log.pins[decided.group] != decided.pin:
        raise Refused("R7: START does not carry the survivors that this group is bound to here")


def may_release(log: Log, profile: Profile, decided: Decided, survivors: Parties, voters: Collection[int]) -> None:
    """R1, R4, R5, R7: the RELEASE message for this set (none: after an abort)."""
    if len(set(voters)) < profile.q:
        raise Refused("R1: no certificate")
    if log.released.get(decided.sid, survivors) != survivors:
        raise Refused("R1: this party has released for other survivors of this instance")
    if not survivors:
        return
    if not survivors <= decided.contributors or len(survivors) < profile.m_min:
        raise Refused("R4: these survivors are too few, or no contributors")
    if decided.pinned:
        if decided.pin is not None and survivors != decided.pin:
            raise Refused("R7: other survivors than START says")
        if log.pins.get(decided.group, survivors) != survivors:
            raise Refused("R7: this group is bound to other survivors here")


def may_open(log: Log, profile: Profile, sid: bytes, survivors: Parties, said: Mapping[int, Iterable[Parties]]) -> None:
    """R3: one's own b, and any share of a b. `said`: party → the sets that its RELEASEs of this instance name."""
    if not survivors or log.released.get(sid) != survivors:
        raise Refused("R3: this party has not released for these survivors")
    if sum(survivors in sets for sets in said.values()) < profile.t:
        raise Refused("R3: fewer than t parties have released for these survivors")


def may_share_b(
    log: Log, profile: Profile, sid: bytes, survivors: Parties, said: Mapping[int, Iterable[Parties]], dealer: int
) -> None:
    """R2, R3: our share of this dealer's b."""
    may_open(log, profile, sid, survivors, said)
    if dealer not in survivors:
        raise Refused("R2: shares of b are for survivors only")


def may_share_sigma(decided: Decided, survivors: Parties, dealer: int) -> None:
    """R2: our share of this dealer's σ, which goes with the RELEASE."""
    if not survivors or dealer in survivors or dealer not in decided.contributors:
        raise Refused("R2: shares of σ are for contributors that did not survive")
