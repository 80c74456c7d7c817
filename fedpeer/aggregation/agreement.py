"""The agreement of an instance on one value, twice: START, then COMMIT. No clock, no file, no chance, no signing.

Rules
* Single-shot Tendermint rules. Views 0, 1, … each have a proposer; in a view every party PREVOTEs one proposal or nil,
  and PRECOMMITs what q parties PREVOTEd, or nil. q PRECOMMITs of one view for one value decide it, whenever seen.
* Who PRECOMMITs a value is *locked* on it: later it PREVOTEs another one only if q parties PREVOTEd that in a view not
  before its lock. Who leads a view proposes the newest value that q parties PREVOTEd, and says in which view.
* Votes are counted by value. Who signs two in one slot counts for each, and the two are evidence; if only the first
  one counted, an honest party that saw the other one first could wait for ever.
* What is known is a function of the messages, whatever their order and number, and of the timers that fired.
* `valid` and `held` are asked again until they are true. They must be monotone and come true at everybody, or the
  agreement may never end. Clocks say when a party gives up waiting, never what it may say.

Why the log of own messages is all that must survive. The step is what a party has said in its newest view; the lock
is its newest PRECOMMIT that is not nil; what it proposes follows from the PREVOTEs of all, which come again. A view
that it entered and said nothing in is forgotten, harmlessly: it says nothing in a view before its newest message, and
in a later one every slot is free. So a restarted party can be late, and cannot contradict itself. What `advance`
returns counts as said from then on. It is committed in this order before anything of it is sent; if that failed, this
object must not be used again.

Why memory is bounded, and nobody waits because of it. A view keeps at most `MAX_PROPOSALS` proposals, and of a party
at most `MAX_VALUES` values of a vote; honest parties say one. Who signed more values in one slot is *counted for
every value* there: it lies, so it might have signed each, and what a quorum proves rests on the honest votes in it.
So no vote is missed for want of room. A proposal without room (its proposer sent nine) comes again from every honest
party that is locked on it, when it leads. A decision needs q signatures and the value; who cannot get them so takes
the certificate, which those who have decided say when they hear of a later view (`passed`). There are `MAX_VIEWS`
views, more than honest parties pass in a day by the timeouts; the last one has no successor, but everything can still
be decided.

Source: SA1, version 1, sections 7, 10 and 11 (PROTOCOL.md); Buchman, Kwon, Milosevic, arXiv 1807.04938. Two
liberties, both only more willing to go on: f+1 parties in views from v on take us to v (there: in v itself), and the
valid value is the newest one below our view with a quorum of PREVOTEs, also if they came when we had left that view.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from fedpeer import codec
from fedpeer.aggregation.messages import LABEL, VERSION, Signed, Stage, id_of
from fedpeer.aggregation.names import Parties, Profile
from fedpeer.crypto import verify
from fedpeer.errors import LocalProtocolError, TrustError

FIRST_TIMEOUT_S: Final = 2.0
MAX_DOUBLINGS: Final = 10
MAX_VIEWS: Final = 256
MAX_PROPOSALS: Final = 8
MAX_VALUES: Final = 4

Id = bytes | None
"""What a vote names: the id of a value, or nothing."""
Step = Literal["propose", "prevote", "precommit"]
Value = list[Any]


@dataclass(frozen=True)
class Draft:
    """What this party is to say: sign(key, sid, kind, me, *fields)."""

    kind: str
    fields: tuple[Any, ...]


@dataclass(frozen=True)
class Decision:
    """The value, and the signatures of exactly q PRECOMMITs for it, of one view, by party, ascending."""

    value: Value
    id: bytes
    view: int
    signers: dict[int, bytes]


@dataclass
class _Tally:
    """The votes of one kind in one view."""

    ids: dict[Id, dict[int, bytes]] = field(default_factory=dict)  # → party → signature, b"" until it is there
    parties: dict[int, int] = field(default_factory=dict)  # → how many values it signed
    excess: set[int] = field(default_factory=set)  # signed more than MAX_VALUES

    def add(self, party: int, id_: Id, signature: bytes) -> None:
        voters = self.ids.get(id_, {})
        if party not in voters:
            if self.parties.get(party, 0) == MAX_VALUES:
                self.excess.add(party)
                return
            self.parties[party] = self.parties.get(party, 0) + 1
        self.ids.setdefault(id_, {})[party] = signature or voters.get(party, b"")

    def count(self, id_: Id) -> int:
        """How many parties voted for this."""
        voters = self.ids.get(id_, {})
        return len(voters) + len(self.excess - voters.keys())

    def signatures(self, id_: Id) -> dict[int, bytes]:
        """Party → signature, ascending."""
        return {party: signature for party, signature in sorted(self.ids.get(id_, {}).items()) if signature}


_NO_VOTES: Final = _Tally()
"""for reading only"""


class Agreement:
    """One party's part in one agreement of one instance.

    `proposer` says who leads a view. `timeout_s` is the timeout of view 0 in seconds, to be set as the caller measures;
    it doubles with every view, at most 2^10-fold.
    """

    def __init__(self, stage: Stage, profile: Profile, me: int, proposer: Callable[[int], int]) -> None:
        self.view = 0
        self.decided: Decision | None = None
        self.started = False
        self.timeout_s = FIRST_TIMEOUT_S
        self._stage, self._profile, self._me, self._proposer = stage, profile, me, proposer
        self._values: dict[bytes, Value] = {}
        self._proposals: dict[int, list[tuple[bytes, int | None]]] = {}  # view → (id, valid view)
        self._tallies: dict[tuple[str, int], _Tally] = {}
        self._voted: set[tuple[str, int]] = set()  # (kind, view) of this party's votes
        self._lock: tuple[int, bytes] | None = None  # (view, id)
        self._newest: dict[int, int] = {}  # party → the newest view it said something in
        self._quorums: dict[bytes, int] = {}  # id → a view in which q parties PRECOMMITted it
        self._deadlines: dict[Step, float] = {}

    # what comes in

    def add(self, signed: Signed) -> None:
        """Take a PROPOSAL, PREVOTE or PRECOMMIT of this instance and stage whose signature was verified.

        By anybody, in any order, any number of times. Our own ones of the log restore this party after a restart; one
        that the log does not know must not be added (its party stops for the instance: amnesia rule). Raises
        LocalProtocolError for messages that do not belong here.
        """
        message, kind, party = signed.message, signed.kind, signed.sender
        if kind not in ("PROPOSAL", "PREVOTE", "PRECOMMIT") or message.stage != self._stage or party >= self._profile.n:
            raise LocalProtocolError(f"a {kind} by party {party} is not of this agreement on {self._stage}")
        view = message.view
        if view >= MAX_VIEWS or (kind == "PROPOSAL" and party != self._proposer(view)):
            return
        if kind == "PROPOSAL":
            self._keep(view, message.value, message.valid_view)
        else:
            self._count(kind, view, party, message.id, signed.signature)
            undecided = kind == "PRECOMMIT" and message.id is not None and message.id not in self._quorums
            if undecided and len(self._tally(kind, view).signatures(message.id)) >= self._profile.q:
                self._quorums[message.id] = view
        self._newest[party] = max(view, self._newest.get(party, 0))
        if party == self._me:
            self.view = max(view, self.view)

    def settle(self, decision: Decision) -> None:
        """Take a decision whose certificate was checked, if there is none."""
        self.decided = self.decided or decision

    @property
    def passed(self) -> bool:
        """Whether it is decided, and somebody goes on in a later view: who may lack what decided it here."""
        return self.decided is not None and any(view > self.decided.view for view in self._newest.values())

    # what follows from it

    @property
    def step(self) -> Step:
        """What this party does in its view: a function of what it has said there."""
        if ("PRECOMMIT", self.view) in self._voted:
            return "precommit"
        return "prevote" if ("PREVOTE", self.view) in self._voted else "propose"

    def silent(self) -> Parties:
        """Parties whose vote is lacking here: in this view or, if none is due in it yet, in the one before."""
        kind = "PREVOTE" if self.step == "prevote" else "PRECOMMIT"
        view = self.view - (self.step == "propose")
        voters = self._tally(kind, view).parties.keys()
        return frozenset(range(self._profile.n)) - {self._me, *voters} if view >= 0 else frozenset()

    def start(self, now: float) -> None:
        """Begin to wait for the proposal of this view. The caller starts view 0, later views start by themselves."""
        self.started = True
        self._arm("propose", now)

    def wake_at(self) -> float | None:
        """When a timer fires next, if nothing comes before; to be asked after `advance`."""
        if self.decided is not None or not self._deadlines:
            return None
        return min((self._deadlines[step] for step in {self.step, "precommit"} & self._deadlines.keys()), default=None)

    def advance(
        self,
        now: float,
        valid: Callable[[Value], bool],
        held: Callable[[Value], bool],
        propose: Callable[[], Value | None],
    ) -> list[Draft]:
        """Apply the rules until nothing more follows; what is to be said now, in order, and never again.

        valid(x): may x be decided? held(x): is everything behind x here? Both are monotone. propose(): the value this
        party chooses when it is free to, None while there is none.
        """
        drafts: list[Draft] = []
        if self.view > 0 and not self.started:
            self.start(now)
        while not self.decide():
            if self._follow(now):
                continue
            draft = self._propose(held, propose) or self._prevote(valid, held) or self._precommit(held)
            draft = draft or self._give_up(now)
            if draft is not None:
                drafts.append(draft)
            elif not self._next_view(now):
                break
        return drafts

    def decide(self) -> bool:
        """PROPOSAL(v, x) and q PRECOMMIT(v, id x), any v: decide x."""
        for id_, view in self._quorums.items():
            if self.decided is None and id_ in self._values:
                signatures = self._tally("PRECOMMIT", view).signatures(id_)
                signers = dict(itertools.islice(signatures.items(), self._profile.q))
                self.decided = Decision(self._values[id_], id_, view, signers)
        return self.decided is not None

    def _follow(self, now: float) -> bool:
        """f+1 parties with messages of a higher view: start that view."""
        newest = sorted(self._newest.values(), reverse=True)[self._profile.f :]
        if newest and newest[0] > self.view:
            self._enter(newest[0], now)
            return True
        return False

    def _propose(self, held: Callable[[Value], bool], propose: Callable[[], Value | None]) -> Draft | None:
        """start(v): proposer(v): PROPOSAL(v, x, valid view or nil), x = valid value or propose()."""
        if self.step != "propose" or self._proposer(self.view) != self._me or self.view in self._proposals:
            return None
        quorums = ((view, id_) for view in reversed(range(self.view)) for id_ in self._prevoted(view))
        valid_view, id_ = next((found for found in quorums if held(self._values[found[1]])), (None, b""))
        value = propose() if valid_view is None else self._values[id_]
        if value is None:
            return None
        self._keep(self.view, value, valid_view)
        return Draft("PROPOSAL", (self._stage, self.view, value, valid_view))

    def _prevote(self, valid: Callable[[Value], bool], held: Callable[[Value], bool]) -> Draft | None:
        """What a proposal of this view makes this party PREVOTE; nothing yet: wait for the data."""
        if self.step != "propose":
            return None
        for id_, valid_view in self._proposals.get(self.view, ()):
            value = self._values[id_]
            if valid_view is None:
                if self._lock is not None and self._lock[1] != id_:
                    return self._vote("PREVOTE", None)
                if valid(value):
                    return self._vote("PREVOTE", id_)
            elif valid_view < self.view and id_ in self._prevoted(valid_view) and held(value):
                free = self._lock is None or self._lock[0] <= valid_view or self._lock[1] == id_
                return self._vote("PREVOTE", id_ if free else None)
        return None

    def _precommit(self, held: Callable[[Value], bool]) -> Draft | None:
        """PROPOSAL(v, x) and q PREVOTE(v, id x), x held: lock and PRECOMMIT x. q PREVOTE(v, nil): PRECOMMIT nil."""
        if self.step != "prevote":
            return None
        for id_ in self._prevoted(self.view):
            if held(self._values[id_]):
                return self._vote("PRECOMMIT", id_)
        if self._tally("PREVOTE", self.view).count(None) >= self._profile.q:
            return self._vote("PRECOMMIT", None)
        return None

    # timers

    def _give_up(self, now: float) -> Draft | None:
        """No proposal, or no quorum for one value, in time: nil."""
        if self.step == "prevote" and len(self._tally("PREVOTE", self.view).parties) >= self._profile.q:
            self._arm("prevote", now)
        if self.step == "propose" and self._due("propose", now):
            return self._vote("PREVOTE", None)
        if self.step == "prevote" and self._due("prevote", now):
            return self._vote("PRECOMMIT", None)
        return None

    def _next_view(self, now: float) -> bool:
        """q parties have PRECOMMITted in this view, but not the same, for long enough: the next one."""
        if self.view + 1 < MAX_VIEWS and len(self._tally("PRECOMMIT", self.view).parties) >= self._profile.q:
            self._arm("precommit", now)
            if self._due("precommit", now):
                self._enter(self.view + 1, now)
                return True
        return False

    def _enter(self, view: int, now: float) -> None:
        self.view, self._deadlines = view, {}
        self.start(now)

    def _arm(self, step: Step, now: float) -> None:
        self._deadlines.setdefault(step, now + self.timeout_s * 2.0 ** min(self.view, MAX_DOUBLINGS))

    def _due(self, step: Step, now: float) -> bool:
        return step in self._deadlines and now >= self._deadlines[step]

    # memory

    def _tally(self, kind: str, view: int) -> _Tally:
        return self._tallies.get((kind, view), _NO_VOTES)

    def _prevoted(self, view: int) -> list[bytes]:
        """The values that q parties PREVOTEd in a view, of those that are known; at most one while at most f lie.

        One of the q is honest and saw the PROPOSAL of this view, so the value may be known from that of another view.
        """
        tally = self._tally("PREVOTE", view)
        return [id_ for id_ in tally.ids if id_ in self._values and tally.count(id_) >= self._profile.q]

    def _keep(self, view: int, value: Value, valid_view: int | None) -> None:
        known = self._proposals.setdefault(view, [])
        proposal = id_of(self._stage, value), valid_view
        if proposal not in known and len(known) < MAX_PROPOSALS:
            known.append(proposal)
            self._values.setdefault(proposal[0], value)

    def _count(self, kind: str, view: int, party: int, id_: Id, signature: bytes) -> None:
        self._tallies.setdefault((kind, view), _Tally()).add(party, id_, signature)
        if party == self._me:
            self._voted.add((kind, view))
        if party == self._me and kind == "PRECOMMIT" and id_ is not None:
            self._lock = max(self._lock or (view, id_), (view, id_))

    def _vote(self, kind: Literal["PREVOTE", "PRECOMMIT"], id_: Id) -> Draft:
        self._count(kind, self.view, self._me, id_, b"")
        return Draft(kind, (self._stage, self.view, id_))


# certificates


def check_certificate(
    sid: bytes,
    stage: Stage,
    profile: Profile,
    publics: Sequence[bytes],
    value: Value,
    view: int,
    signatures: Sequence[tuple[int, bytes]],
) -> Decision:
    """The decision that these prove. Raises TrustError unless exactly q parties, ascending, PRECOMMITted this value in
    this view. `publics`: the signing key of each party."""
    parties = [party for party, _ in signatures]
    if len(parties) != profile.q or parties != sorted(set(parties) & set(range(profile.n))):
        raise TrustError(f"a certificate of {stage} takes {profile.q} parties, ascending")
    id_ = id_of(stage, value)
    for party, signature in signatures:
        body = codec.encode([VERSION, sid, "PRECOMMIT", party, stage, view, id_])
        try:
            verify(publics[party], "PRECOMMIT", body, signature, label=LABEL)
        except TrustError:
            raise TrustError(f"a certificate of {stage} in view {view} that party {party} did not sign") from None
    return Decision(value, id_, view, dict(signatures))
