"""What leaves the peers in a whole run, frame by frame before it is sealed, and what can be had of it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import MockClock

from fedpeer import codec
from fedpeer.aggregation import keyset, slices, vectors
from fedpeer.aggregation.messages import START, parse
from fedpeer.aggregation.request import Request
from fedpeer.aggregation.service import KIND, WIDTH, Aggregation
from fedpeer.crypto import Secret
from fedpeer.mesh import records
from fedpeer.mesh.messages import Chunk
from fedpeer.testing.federation import federation
from fedpeer.testing.uniformity import correlation, looks_uniform
from fedpeer.wire.session import Session

NAMES = ["alice", "bob", "carol"]
STAGES = """
[[stage]]
id = "describe"
run = "horizontal.statistics:run"
inputs = { table = "dataset:rows" }
[[stage]]
id = "fit"
run = "horizontal.logistic:fit"
inputs = { table = "dataset:rows" }
params = { reg_lambda = 0.1 }
"""
COLUMNS, ROWS = 8, 40


@dataclass
class Wire:
    """What the frames alone tell of the sums: read as somebody would who sees them all."""

    parts: dict[tuple[bytes, int, int], vectors.Vector] = field(default_factory=dict)
    """(sid, contributor, chunk) → its part of a masked vector; an owner's own part never travels"""
    sums: dict[tuple[bytes, int], vectors.Vector] = field(default_factory=dict)
    """(sid, chunk) → the sum of the masked vectors"""
    names: dict[bytes, str] = field(default_factory=dict)
    """sid → the place of its sum"""
    opened: dict[tuple[bytes, int], Secret] = field(default_factory=dict)
    """(sid, party) → the seed of its self mask, once its b was opened"""


@dataclass
class Transcript:
    """All frames of all peers, and what they must not tell."""

    frames: list[tuple[Any, bytes, bytes]] = field(default_factory=list)
    """(channel, header, payload), as they were given to be sealed"""
    vectors: dict[tuple[str, str], vectors.Vector] = field(default_factory=dict)
    """(place of the sum, peer) → what it contributed"""
    ids: list[str] = field(default_factory=list)
    cells: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def wire(self) -> Wire:
        files: dict[bytes, dict[int, bytes]] = defaultdict(dict)
        said: dict[bytes, Any] = {}
        for name, header, payload in self.frames:
            if name[0] == "blob":
                chunk = codec.decode_as(Chunk, header)
                files[chunk.digest][chunk.offset] = payload
            elif name == ("records",):
                record = records.parse(payload).record
                if record.kind == KIND:
                    signed = parse(record.body)
                    said[signed.digest] = signed.message
        ready = {
            message.params: "/".join(map(str, message.name)) for message in said.values() if message.kind == "READY"
        }
        context, wire = {}, Wire()
        for message in said.values():
            if message.kind == "PROPOSAL" and message.stage == START:
                wire.names[message.sid] = ready[message.value[2]]
            elif message.kind in ("SCATTER", "SUM"):
                context[message.sid] = message.ctx
                data = files[message.digest]
                if data:
                    elements = vectors.unpack(b"".join(data[at] for at in sorted(data)), WIDTH)
                    if message.kind == "SUM":
                        wire.sums[message.sid, message.chunk] = elements
                    else:
                        wire.parts[message.sid, message.sender, message.chunk] = elements
        for message in said.values():
            if message.kind == "OPEN":
                seed = keyset.self_seed(context[message.sid], message.dealer, Secret(message.secret))
                wire.opened[message.sid, message.dealer] = seed
        return wire

    def check(self) -> None:
        """Raise AssertionError if any peer's vector, or a sum over some peers only, can be had from the frames."""
        wire, n = self.wire(), len(self.ids)
        places = sorted({place for place, _ in self.vectors})
        assert sorted(wire.names.values()) == places, "not every sum went over the wire"
        assert len(wire.opened) == n * len(places)

        def true(sid: bytes, some: Iterable[int], start: int, stop: int) -> vectors.Vector:
            total = sum(self.vectors[wire.names[sid], self.ids[party]].astype(np.uint64) for party in some)
            return (total[start:stop] % 2**WIDTH).astype(np.uint32)

        def without_self_masks(sid: bytes, some: Iterable[int], seen: vectors.Vector, start: int) -> vectors.Vector:
            whole = np.zeros(len(self.vectors[wire.names[sid], self.ids[0]]), np.uint32)
            whole[start : start + len(seen)] = seen
            vectors.add_masks(whole, [], [wire.opened[sid, party] for party in some], WIDTH, "aegis256")
            return whole[start : start + len(seen)]

        def uniform(pieces: list[vectors.Vector], what: str) -> None:
            assert looks_uniform(vectors.pack(np.concatenate(pieces), WIDTH)), f"{what} is biased"

        for some in (some for count in range(1, n) for some in itertools.combinations(range(n), count)):
            seen, pairs, masks, values = [], [], [], []
            for sid, name in wire.names.items():
                for number, (start, stop) in enumerate(slices.chunks(len(self.vectors[name, self.ids[0]]), n)):
                    if all((sid, party, number) in wire.parts for party in some):
                        parts = sum(wire.parts[sid, party, number].astype(np.uint64) for party in some)
                        masked = (parts % 2**WIDTH).astype(np.uint32)
                        x = true(sid, some, start, stop)
                        seen.append(masked)
                        masks.append((masked - x) % 2**WIDTH)
                        pairs.append((without_self_masks(sid, some, masked, start) - x) % 2**WIDTH)
                        values.append(x)
            assert len(np.concatenate(seen)) > 3000
            uniform(seen, f"the sum of {len(some)} masked vectors")
            uniform(masks, f"the masks of {len(some)}")
            uniform(pairs, f"what is left of the masks of {len(some)} when the self masks are known")
            assert correlation(np.concatenate(seen), np.concatenate(values)) < 5
        covered, cancelled = [], []
        for (sid, number), masked in wire.sums.items():
            start, stop = slices.chunks(len(self.vectors[wire.names[sid], self.ids[0]]), n)[number]
            x = true(sid, range(n), start, stop)
            cancelled.append((without_self_masks(sid, range(n), masked, start) == x).all())
            covered.append((masked - x) % 2**WIDTH)
        uniform(covered, "the self masks of the sum")
        assert all(cancelled), "masks do not cancel"

        sent = b"".join(part for _, header, payload in self.frames for part in (header, payload))
        for vector in self.vectors.values():
            for form in (vectors.pack(vector, WIDTH), vector.astype("<u4").tobytes(), vector.astype("<u2").tobytes()):
                for at in range(0, len(form) - 24, 24):
                    window = bytes(form[at : at + 24])
                    if len(set(window)) > 8:
                        assert window not in sent, "a part of a vector is in a frame as it is"
        for cell in self.cells:
            assert np.float64(cell).tobytes() not in sent, "a cell of a table is in a frame"
        for text in self.texts:
            assert text.encode() not in sent, "a cell of a table is in a frame, as text"


async def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Transcript:
    """Three organizations run statistics and a logistic regression; everything that leaves them is kept."""
    transcript = Transcript()
    send, summed = Session.send, Aggregation.sum

    def recording_send(self: Session, name: Any, header: bytes, payload: Any, *, bulk: bool) -> bool:
        queued = send(self, name, header, payload, bulk=bulk)
        if queued:
            transcript.frames.append((name, bytes(header), bytes(payload)))
        return queued

    async def recording_sum(
        self: Aggregation, contract: Any, parties: Any, terms: Any, request: Request, **told: Any
    ) -> Any:
        transcript.ids = list(parties)
        place = "/".join(map(str, request.name))
        transcript.vectors[place, self.mesh.me] = request.vector.copy()
        return await summed(self, contract, parties, terms, request, **told)

    monkeypatch.setattr(Session, "send", recording_send)
    monkeypatch.setattr(Aggregation, "sum", recording_sum)
    async with federation(folder, NAMES) as peers:
        for number, peer in enumerate(peers.values()):
            chance = np.random.Generator(np.random.PCG64(number))
            x = chance.normal(size=(ROWS, COLUMNS)) * 10.0 ** chance.integers(-2, 4, size=COLUMNS)
            y = (x[:, 0] + chance.normal(size=ROWS) * np.abs(x[:, 0]).mean() > 0).astype(int)
            lines = [",".join(["id", *(f"c{j}" for j in range(COLUMNS)), "y"])]
            for i in range(ROWS):
                cells = [f"{value:.9f}" for value in x[i]]
                transcript.texts += [f"patient-{number}-{i}", *cells]
                transcript.cells += [float(cell) for cell in cells]
                lines.append(",".join([f"patient-{number}-{i}", *cells, str(y[i])]))
            path = folder / f"{peer.name}.csv"
            path.write_text("\n".join(lines) + "\n")
            await peer.daemon.catalog.add("rows", str(path), "id", "y")
        alice = peers["alice"].daemon.jobs
        job = await alice.submit(peers.contract(STAGES))
        with trio.fail_after(600):
            view = await alice.wait(job.id)
        assert view.state == "done", view.error
    return transcript


async def test_no_peers_vector_nor_any_sum_over_some_peers_is_in_the_frames_of_a_run(
    autojump_clock: MockClock, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcript = await run(quick_path, monkeypatch)
    assert len(transcript.frames) > 100
    transcript.check()


def only_the_self_mask(keys: Any, ctx: bytes, publics: Any) -> keyset.Seeds:
    return [keyset.self_seed(ctx, keys.party, keys.b)], []


def no_pair_with_the_first(keys: Any, ctx: bytes, publics: Any) -> keyset.Seeds:
    others = {party: public for party, public in publics.items() if party == keys.party or 0 not in (party, keys.party)}
    return MASKING(keys, ctx, others)


def no_self_mask(keys: Any, ctx: bytes, publics: Any) -> keyset.Seeds:
    plus, minus = MASKING(keys, ctx, publics)
    return plus[1:], minus


MASKING = keyset.masking_seeds


@pytest.mark.parametrize(
    ("bug", "words"),
    [
        (only_the_self_mask, "when the self masks are known is biased"),
        (no_pair_with_the_first, "when the self masks are known is biased"),
        (no_self_mask, "the self masks of the sum is biased"),
    ],
)
async def test_the_same_check_fails_when_masks_are_taken_away_that_no_sum_misses(
    autojump_clock: MockClock, quick_path: Path, monkeypatch: pytest.MonkeyPatch, bug: Any, words: str
) -> None:
    monkeypatch.setattr(keyset, "masking_seeds", bug)
    if bug is no_self_mask:
        monkeypatch.setattr(keyset, "unmasking_seeds", lambda *_: ([], []))
    transcript = await run(quick_path, monkeypatch)
    with pytest.raises(AssertionError, match=words):
        transcript.check()
