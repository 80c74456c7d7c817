"""The data plane of one instance: SCATTER, RECEIPT, CUT, SUM.

Rules
* One masked vector leaves for a key set (R0), and only under a START that carries our pin (R7).
* An owner adds up a slice when it has that of all contributors, or of those whom the proposer of the view names.
* Sums over other survivors are harmless as long as nothing is released; one digest is said for each.

Source: SA1, version 1, section 6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, product
from typing import Final

from fedpeer.aggregation import keyset, slices
from fedpeer.aggregation.messages import CommitValue
from fedpeer.aggregation.names import Parties, bitmap, parties_of
from fedpeer.aggregation.release import Refused, may_scatter
from fedpeer.aggregation.seat import TRIES, Ask, Seat, Step
from fedpeer.aggregation.sharing import Sharing
from fedpeer.aggregation.work import Add, Chunk, Fetch, Mask

RECEIPT_S: Final = 0.5


class Gathering:
    """The data plane: this party's masked vector, the slices it owns, and the sums of all."""

    def __init__(self, seat: Seat, sharing: Sharing) -> None:
        self.seat, self.sharing = seat, sharing
        self.masked: Sequence[tuple[int, int, bytes]] = ()
        self.added: dict[tuple[bytes, int], bytes] = {}
        """(survivors, chunk of ours) → digest"""
        self._chunks: list[Chunk] = []

    def chunks(self, ask: Ask) -> list[Chunk]:
        """Who adds up what; always the same once START is decided."""
        assert self.seat.fixed is not None
        if not self._chunks:
            owners = sorted(self.seat.fixed.owners)
            self._chunks = [
                Chunk(number, start, stop, slices.owner_of(number, owners, self.seat.sid))
                for number, (start, stop) in enumerate(slices.chunks(ask.d, len(owners)))
            ]
        return self._chunks

    def scatter(self, step: Step) -> None:
        fixed, ask = self.seat.fixed, self.seat.ask
        assert fixed is not None
        if self.sharing.keys is None or ask is None or self.seat.me not in fixed.contributors:
            return
        if fixed.ids[self.seat.me] != self.sharing.own_advert() or self.seat.board.says("SCATTER", self.seat.me):
            return
        try:
            may_scatter(self.seat.here.log, self.seat.terms())
        except Refused:
            return
        chunks = self.chunks(ask)
        if not self.masked:
            plus, minus = keyset.masking_seeds(self.sharing.keys, fixed.ctx, fixed.publics)
            work = Mask(
                self.seat.sid, fixed.ctx, ask.name, self.seat.me, plus, minus, chunks, ask.w, self.seat.here.setting.prg
            )
            self.seat.work(step, "mask", work)
            return
        for chunk, (number, nbytes, digest) in zip(chunks, self.masked, strict=True):
            self.seat.say(step, "SCATTER", fixed.ctx, number, nbytes, digest, to=chunk.owner)
        self.seat.note(step, "scattered")

    def _received(self, chunk: Chunk, ask: Ask) -> dict[int, bytes]:
        """contributor → digest of its part of this chunk, as far as the files are here."""
        assert self.seat.fixed is not None
        here: dict[int, bytes] = {}
        for party in self.seat.fixed.contributors:
            for signed in self.seat.board.by("SCATTER", party):
                message = signed.message
                if (
                    message.ctx == self.seat.fixed.ctx
                    and message.chunk == chunk.number
                    and message.digest in self.seat.files
                ):
                    here.setdefault(party, message.digest)
        return here

    def add_up(self, now: float, step: Step) -> None:
        """An owner's part: fetch, say whose parts are here, add up."""
        fixed, ask = self.seat.fixed, self.seat.ask
        assert fixed is not None
        if self.seat.me not in fixed.owners or ask is None:
            return
        chunks = [chunk for chunk in self.chunks(ask) if chunk.owner == self.seat.me]
        for chunk in chunks:
            nbytes = (chunk.stop - chunk.start) * ask.w // 8
            for party in fixed.contributors:
                for signed in self.seat.board.by("SCATTER", party):
                    message = signed.message
                    if (message.ctx, message.chunk, message.nbytes) == (fixed.ctx, chunk.number, nbytes):
                        self._fetch(step, "chunk", party, chunk.number, nbytes, message.digest)
        received = [self._received(chunk, ask) for chunk in chunks]
        present = fixed.contributors.intersection(*received) if received else fixed.contributors
        self._receipt(now, step, present)
        wanted = {fixed.contributors} if present == fixed.contributors else set()
        for signed in self.seat.board.all("CUT"):
            cut = parties_of(signed.message.survivors, self.seat.n)
            if signed.message.ctx == fixed.ctx and signed.sender == self.seat.leader(signed.message.view):
                wanted.add(cut)
        for survivors in wanted:
            if self.seat.admissible(survivors) and survivors <= present:
                for chunk, parts in zip(chunks, received, strict=True):
                    self._add_chunk(step, ask, chunk, survivors, [parts[party] for party in sorted(survivors)])

    def _fetch(self, step: Step, what: str, party: int, chunk: int, nbytes: int, digest: bytes) -> None:
        assert self.seat.fixed is not None
        if digest not in self.seat.files:
            self.seat.work(step, digest, Fetch(self.seat.sid, what, self.seat.fixed.ctx, party, chunk, nbytes, digest))

    def _receipt(self, now: float, step: Step, present: Parties) -> None:
        assert self.seat.fixed is not None
        said = self.seat.board.receipts.get((self.seat.fixed.ctx, self.seat.me), set())
        if not present > said:
            self.seat.times.pop("receipt", None)
        elif present == self.seat.fixed.contributors or self.seat.due(now, self.seat.since("receipt", now) + RECEIPT_S):
            self.seat.times.pop("receipt", None)
            counter = len(self.seat.board.by("RECEIPT", self.seat.me))
            self.seat.say(step, "RECEIPT", self.seat.fixed.ctx, counter, bitmap(present, self.seat.n))

    def _add_chunk(self, step: Step, ask: Ask, chunk: Chunk, survivors: Parties, digests: list[bytes]) -> None:
        assert self.seat.fixed is not None
        key = bitmap(survivors, self.seat.n), chunk.number
        if any(
            (signed.message.survivors, signed.message.chunk) == key
            for signed in self.seat.board.by("SUM", self.seat.me)
        ):
            return  # said: E3 knows one digest for each
        if key in self.added:
            self.seat.say(step, "SUM", self.seat.fixed.ctx, *key, self.added[key])
            self.seat.note(step, "added")
            return
        work = Add(self.seat.sid, self.seat.fixed.ctx, *key, digests, chunk.stop - chunk.start, ask.w)
        self.seat.work(step, ("add", *key), work)

    def gather(self, step: Step) -> None:
        """Fetch every sum that could become the result, and no other."""
        fixed, ask = self.seat.fixed, self.seat.ask
        assert fixed is not None
        if ask is None:
            return
        for chunk in self.chunks(ask):
            for signed in self.seat.board.by("SUM", chunk.owner):
                message = signed.message
                survivors = parties_of(message.survivors, self.seat.n)
                if (message.ctx, message.chunk) == (fixed.ctx, chunk.number) and self.seat.admissible(survivors):
                    nbytes = (chunk.stop - chunk.start) * ask.w // 8
                    self._fetch(step, "sum", chunk.owner, chunk.number, nbytes, message.digest)

    def _sums(self, ask: Ask, survivors: bytes) -> Iterator[tuple[bytes, ...]]:
        """The digests of all chunks of the sum over these survivors; an owner may have said two."""
        assert self.seat.fixed is not None
        held = [
            [
                signed.message.digest
                for signed in self.seat.board.by("SUM", chunk.owner)
                if (signed.message.ctx, signed.message.chunk) == (self.seat.fixed.ctx, chunk.number)
                and signed.message.survivors == survivors
                and signed.message.digest in self.seat.files
            ]
            for chunk in self.chunks(ask)
        ]
        return islice(product(*held), TRIES)

    def complete(self, ask: Ask | None) -> tuple[bytes, tuple[bytes, ...]] | None:
        """The largest survivor set whose sum is here, and the digests of its chunks."""
        if ask is None:
            return None
        sets = {signed.message.survivors for signed in self.seat.board.all("SUM")}
        for survivors in sorted(sets, key=lambda raw: (-len(parties_of(raw, self.seat.n)), raw)):
            if self.seat.admissible(parties_of(survivors, self.seat.n)):
                for digests in self._sums(ask, survivors):
                    return survivors, digests
        return None

    def absent(self) -> Parties:
        """Contributors that an owner has no slice of, as far as receipts say; if none, owners that added nothing up."""
        fixed, ask, board = self.seat.fixed, self.seat.ask, self.seat.board
        assert fixed is not None
        owners = {chunk.owner for chunk in self.chunks(ask)} if ask is not None else fixed.owners
        received = [found for owner in owners if (found := board.receipts.get((fixed.ctx, owner)))]
        missing = fixed.contributors - fixed.contributors.intersection(*received)
        return missing or frozenset(owner for owner in owners if not board.says("SUM", owner))

    def cut(self, view: int, step: Step) -> None:
        """The proposer of the view names the survivors when an owner misses somebody."""
        fixed = self.seat.fixed
        assert fixed is not None
        if self.seat.leader(view) != self.seat.me or any(
            s.message.view == view for s in self.seat.board.by("CUT", self.seat.me)
        ):
            return
        if (
            fixed.pin is not None
            or (self.seat.data and self.seat.aborts < 2)
            or self.complete(self.seat.ask) is not None
        ):
            return
        survivors = fixed.contributors
        for owner in fixed.owners:
            survivors = survivors & self.seat.board.receipts.get((fixed.ctx, owner), set())
        if self.seat.admissible(survivors) and survivors != fixed.contributors:
            self.seat.say(step, "CUT", fixed.ctx, view, bitmap(survivors, self.seat.n))

    def behind(self, value: CommitValue) -> tuple[bytes, ...] | None:
        """The digests of the chunks that this decision names, if they are all here."""
        ask = self.seat.ask
        survivors = parties_of(value.survivors, self.seat.n)
        if ask is None or not self.seat.admissible(survivors):
            return None
        for digests in self._sums(ask, value.survivors):
            if slices.root(digests) == value.root:
                return digests
        return None
