"""What leaves the peers in a whole run, frame by frame before it is sealed, and what can be had of it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from fedpeer.aggregation.attempt import MaskedRecord
from trio.testing import MockClock

from fedpeer import codec
from fedpeer.aggregation import keys, masks
from fedpeer.aggregation.service import Aggregation
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
class Transcript:
    """All frames of all peers, and what they must not tell."""

    frames: list[tuple[Any, bytes, bytes]] = field(default_factory=list)
    """(channel, header, payload), as they were given to be sealed"""
    vectors: dict[tuple[str, str], masks.Vector] = field(default_factory=dict)
    """(place of the sum, peer) → what it contributed"""
    cells: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def masked(self) -> dict[tuple[str, str], masks.Vector]:
        """The masked vectors, read from the frames alone: (place of the sum, peer) → vector."""
        files: dict[bytes, dict[int, bytes]] = defaultdict(dict)
        said: dict[tuple[str, str], MaskedRecord] = {}
        for name, header, payload in self.frames:
            if name[0] == "blob":
                chunk = codec.decode_as(Chunk, header)
                files[chunk.digest][chunk.offset] = payload
            elif name == ("records",):
                record = records.parse(payload).record
                if record.kind == "masked":
                    place = record.slot.rpartition("/")[0]
                    said[place, record.sender] = codec.decode_as(MaskedRecord, record.body)
        return {
            key: masks.unpack(b"".join(files[m.digest][at] for at in sorted(files[m.digest]))[masks.LABEL_BYTES :])
            for key, m in said.items()
        }

    def check(self) -> None:
        """Raise AssertionError if any peer's vector, or a sum over some peers only, can be seen in the frames."""
        masked = self.masked()
        places = sorted({place for place, _ in masked})
        peers = sorted({peer for _, peer in masked})
        assert len(peers) == len(NAMES)
        assert set(masked) == set(self.vectors), "not every sum went over the wire"

        def together(vectors: dict[tuple[str, str], masks.Vector], some: tuple[str, ...]) -> masks.Vector:
            total = [sum(vectors[place, peer].astype(np.uint64) for peer in some) % 2**masks.WIDTH for place in places]
            return np.concatenate(total).astype(np.uint32)

        for count in range(1, len(peers)):
            for some in itertools.combinations(peers, count):
                seen, true = together(masked, some), together(self.vectors, some)
                assert looks_uniform(masks.pack(seen)), f"the sum of {count} masked vectors is biased"
                assert looks_uniform(masks.pack((seen - true) % 2**masks.WIDTH)), f"the masks of {count} are biased"
                assert correlation(seen, true) < 5
        everybody = tuple(peers)
        assert (together(masked, everybody) == together(self.vectors, everybody)).all(), "masks do not cancel"

        sent = b"".join(part for _, header, payload in self.frames for part in (header, payload))
        for vector in self.vectors.values():
            for form in (masks.pack(vector), vector.astype("<u4").tobytes(), vector.astype("<u2").tobytes()):
                for at in range(0, len(form) - 24, 24):
                    window = form[at : at + 24]
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

    async def recording_sum(self: Aggregation, contract: Any, parties: Any, stage: str, turn: int, k: int, vector: Any,
                            *more: Any, **named: Any) -> Any:  # fmt: skip
        transcript.vectors[f"{stage}/{turn}/{k}", self._mesh.me] = vector.copy()
        return await summed(self, contract, parties, stage, turn, k, vector, *more, **named)

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


async def test_the_same_check_fails_when_the_masks_are_taken_away(
    autojump_clock: MockClock, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "pair_masks", lambda *_: [])
    transcript = await run(quick_path, monkeypatch)
    with pytest.raises(AssertionError, match="biased"):
        transcript.check()


async def test_the_same_check_fails_when_one_peer_is_masked_from_nobody(
    autojump_clock: MockClock, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = keys.pair_masks

    def without_the_first(ctx: bytes, me: int, *more: Any) -> list[keys.PairMask]:
        return whole(ctx, me, *more)[1:] if me else []  # pairs are by the index of the other

    monkeypatch.setattr(keys, "pair_masks", without_the_first)
    transcript = await run(quick_path, monkeypatch)
    with pytest.raises(AssertionError, match="biased"):
        transcript.check()
