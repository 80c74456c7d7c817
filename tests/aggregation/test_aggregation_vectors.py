"""Vectors: streams at the edges of segments, exact cancelling, packing, and the statistics of what leaves."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nacl.bindings import crypto_aead_aegis256_encrypt

from fedpeer.aggregation import keyset, names, shamir, vectors
from fedpeer.aggregation.keyset import KeySet
from fedpeer.aggregation.vectors import SEGMENT, Prg, Vector, Width
from fedpeer.crypto import Secret, chacha20_stream, hash_
from fedpeer.errors import LocalProtocolError
from fedpeer.testing.uniformity import correlation, looks_uniform

WIDTHS: tuple[Width, ...] = get_args(Width)
PRGS: tuple[Prg, ...] = get_args(Prg)
BITS: dict[Width, int] = {16: 8, 24: 16, 32: 24}


def seed(*numbers: int) -> Secret:
    return Secret(hash_("fp.test", *map(names.u32, numbers)))


def stream_by_the_book(of: Secret, count: int, prg: Prg) -> npt.NDArray[np.uint64]:
    """One call of the plain binding for each segment."""
    parts = []
    for segment, start in enumerate(range(0, count, SEGMENT)):
        zeros = bytes(4 * min(SEGMENT, count - start))
        number = struct.pack("<Q", segment)
        if prg == "aegis256":
            sealed = crypto_aead_aegis256_encrypt(zeros, None, number + bytes(24), of.reveal())
            parts.append(sealed[: len(zeros)])
        else:
            parts.append(chacha20_stream(of.reveal(), bytes(4) + number, zeros))
    return np.frombuffer(b"".join(parts), "<u4").astype(np.uint64)


def packed_by_the_book(values: npt.NDArray[Any], w: Width) -> bytes:
    return b"".join((int(value) % 2**w).to_bytes(w // 8, "little") for value in values)


# streams


@pytest.mark.parametrize("prg", PRGS)
@pytest.mark.parametrize("count", [1, 255, 256, SEGMENT - 256, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 256])
def test_masks_are_the_streams_of_their_seeds(prg: Prg, count: int) -> None:
    total = np.arange(count, dtype=np.uint32)
    vectors.add_masks(total, [seed(1), seed(2)], [seed(3)], 32, prg)
    streams = [stream_by_the_book(seed(number), count, prg) for number in (1, 2, 3)]
    expected = (np.arange(count, dtype=np.uint64) + streams[0] + streams[1] - streams[2]) % 2**32
    assert np.array_equal(total, expected)


@pytest.mark.parametrize("prg", PRGS)
def test_a_segment_is_a_stream_of_its_own(prg: Prg) -> None:
    parts = [vectors.stream(seed(1), segment, 8, prg).tobytes() for segment in (0, 1, 2, 255, 256, 2**32)]
    parts += [
        vectors.stream(seed(2), 0, 8, prg).tobytes(),
        vectors.stream(seed(1), 0, 8, PRGS[prg == PRGS[0]]).tobytes(),
    ]
    assert len(set(parts)) == len(parts)
    assert vectors.stream(seed(1), 7, 3, prg).tobytes() == vectors.stream(seed(1), 7, SEGMENT, prg)[:3].tobytes()


# packing


@given(st.sampled_from(WIDTHS), st.lists(st.integers(0, 2**32 - 1), max_size=40))
@example(24, [0xFFFFFF, 0, 0xFFFFFF, 1])
def test_packing(w: Width, values: list[int]) -> None:
    vector = np.array(values, np.uint32)
    packed = vectors.pack(vector, w)
    assert packed == packed_by_the_book(vector, w)
    unpacked = vectors.unpack(packed, w)
    assert unpacked.tolist() == [value % 2**w for value in values]
    total = np.array(values[::-1], np.uint32) & np.uint32(2**w - 1)
    vectors.add_packed(total, memoryview(bytes(packed)), w)
    assert total.tolist() == [(a + b) % 2**w for a, b in zip(values, values[::-1], strict=True)]


@pytest.mark.parametrize("w", WIDTHS)
def test_packing_across_segments(w: Width) -> None:
    vector = np.random.default_rng(1).integers(0, 2**32, 2 * SEGMENT + 3, np.uint32)
    packed = vectors.pack(vector, w)
    assert packed == packed_by_the_book(vector, w)
    assert np.array_equal(vectors.unpack(packed, w), vector & np.uint32(2**w - 1))


@pytest.mark.parametrize("w", WIDTHS)
@pytest.mark.parametrize("size", [0, 1, 29, 31, 33, 120])
def test_another_number_of_elements_is_refused(w: Width, size: int) -> None:
    if size * 8 == 10 * w:
        return
    total = np.zeros(10, np.uint32)
    with pytest.raises(LocalProtocolError):
        vectors.add_packed(total, bytes(size), w)


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(0, np.uint32),
        np.zeros((2, 2), np.uint32),
        np.zeros(4, np.int64),
        np.zeros(4, np.float64),
        np.zeros(4, ">u4"),
        np.array([0, 1 << 16], np.uint32),
    ],
)
def test_what_is_no_vector_is_refused(vector: Vector) -> None:
    vectors.check(np.array([0, (1 << 16) - 1], np.uint32), 16)
    with pytest.raises(LocalProtocolError):
        vectors.check(vector, 16)


# chunk by chunk


@given(st.sampled_from(WIDTHS), st.sampled_from(PRGS), st.integers(1, 5), st.integers(1, 9), st.randoms())
@settings(max_examples=15, deadline=None)
@example(24, "aegis256", 2 * SEGMENT // 256, 3, None)
def test_chunks_are_the_slices_of_the_whole(w: Width, prg: Prg, blocks: int, owners: int, order: Any) -> None:
    count = 256 * blocks
    x = np.arange(count, dtype=np.uint32)
    plus, minus = [seed(1), seed(2)], [seed(3)]
    whole = vectors.mask(x, plus, minus, w, prg)
    expected = x + sum(stream_by_the_book(s, count, prg) for s in plus) - stream_by_the_book(minus[0], count, prg)
    assert whole == vectors.pack((expected % 2**32).astype(np.uint32), w)
    size = 256 * -(-blocks // owners)
    chunks = [(start, min(start + size, count)) for start in range(0, count, size)]
    if order is not None:
        order.shuffle(chunks)
    for (start, stop), data in zip(chunks, vectors.mask_chunks(x, chunks, plus, minus, w, prg), strict=True):
        assert data == whole[start * w // 8 : stop * w // 8]
    assert np.array_equal(x, np.arange(count))


def test_each_mask_is_made_once_when_chunks_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[bytes, int]] = []
    original = vectors._stream

    def counted(of: Secret, segment: int, count: int, prg: Prg, buffer: bytearray) -> Vector:
        made.append((of.reveal(), segment))
        return original(of, segment, count, prg, buffer)

    monkeypatch.setattr(vectors, "_stream", counted)
    x = np.zeros(2 * SEGMENT + 512, np.uint32)
    chunks = [(start, min(start + 768, len(x))) for start in range(0, len(x), 768)]
    for _ in vectors.mask_chunks(x, chunks, [seed(1)], [seed(2)], 24, "aegis256"):
        pass
    assert len(made) == len(set(made)) == 2 * 3
    made.clear()
    next(vectors.mask_chunks(x, [(SEGMENT, SEGMENT + 256)], [seed(1)], [], 24, "aegis256"))
    assert made == [(seed(1).reveal(), 1)]  # and of one chunk, those of the segment it lies in


@pytest.mark.parametrize("chunk", [(-1, 2), (2, 1), (0, 11)])
def test_a_chunk_outside_of_its_vector_is_refused(chunk: tuple[int, int]) -> None:
    with pytest.raises(LocalProtocolError):
        next(vectors.mask_chunks(np.zeros(10, np.uint32), [chunk], [], [], 24, "aegis256"))


def test_memory_is_the_result_and_a_few_segments() -> None:
    x = np.zeros(8 * SEGMENT, np.uint32)
    packed = bytes(3 * len(x))
    segment = 4 * SEGMENT
    for act, result in (
        (lambda: vectors.mask(x, [seed(1)], [seed(2)], 24, "aegis256"), 6 * segment),
        (lambda: vectors.add_masks(x, [seed(1)], [seed(2)], 24, "aegis256"), 0),
        (lambda: vectors.add_packed(x, packed, 24), 0),
    ):
        tracemalloc.start()
        try:
            act()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < result + 2.5 * segment


# a whole sum, without messages


class Instance:
    """n parties with their keys and vectors."""

    def __init__(self, n: int, w: Width, count: int = 256) -> None:
        self.n, self.w = n, w
        draws = iter(range(10**6))
        self.keys = [
            KeySet.fresh(i, bytes(32), 0, lambda size: hash_("fp.test", names.u32(next(draws)), size=size))
            for i in range(n)
        ]
        self.publics = {keys.party: keys.pk for keys in self.keys}
        random = np.random.default_rng(n)
        top = min(1 << BITS[w], (1 << w) // n)
        self.x = [random.integers(0, top, count, np.uint32) for _ in range(n)]
        for x in self.x:
            x[-4:] = 0

    def masked(self, party: int, ctx: bytes = bytes(32), x: Vector | None = None, prg: Prg = "aegis256") -> bytearray:
        seeds = keyset.masking_seeds(self.keys[party], ctx, self.publics)
        return vectors.mask(self.x[party] if x is None else x, *seeds, self.w, prg)

    def total(self, survivors: frozenset[int], parts: dict[int, bytearray], prg: Prg = "aegis256") -> Vector:
        total = np.zeros(len(self.x[0]), np.uint32)
        for party in survivors:
            vectors.add_packed(total, parts[party], self.w)
        b = {party: self.keys[party].b for party in survivors}
        sigma = {party: self.keys[party].sigma for party in set(range(self.n)) - survivors}
        vectors.add_masks(total, *keyset.unmasking_seeds(bytes(32), survivors, self.publics, b, sigma), self.w, prg)
        return total


@given(st.integers(3, 12), st.sampled_from(WIDTHS), st.sampled_from(PRGS), st.data())
@settings(max_examples=40, deadline=None)
def test_the_sum_of_any_survivors_is_exact(n: int, w: Width, prg: Prg, data: st.DataObject) -> None:
    instance = Instance(n, w)
    survivors = frozenset(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    parts = {party: instance.masked(party, prg=prg) for party in survivors}
    total = instance.total(survivors, parts, prg)
    assert np.array_equal(total, sum(instance.x[party].astype(np.uint64) for party in survivors))
    assert vectors.status(total, 252, len(survivors), BITS[w]) == "SUM"


@pytest.mark.parametrize("party", range(4))
def test_a_party_with_another_history_gives_noise(party: int) -> None:
    instance = Instance(4, 24, 50_000)
    other = hash_("fp.test", b"another model")
    parts = {i: instance.masked(i, other if i == party else bytes(32)) for i in range(4)}
    everybody = frozenset(range(4))
    total = instance.total(everybody, parts)
    assert vectors.status(total, 49_996, 4, 16) == "NOISE"
    right = total == sum(x.astype(np.uint64) for x in instance.x)
    assert right.sum() <= 1  # of 50,000, where chance alone gives one in 2^24
    assert looks_uniform(vectors.pack(total, 24))


@pytest.mark.parametrize(
    ("place", "value", "expected"), [(0, 3 * 255, "SUM"), (0, 3 * 255 + 1, "NOISE"), (3, 1, "NOISE"), (2, 765, "SUM")]
)
def test_status(place: int, value: int, expected: str) -> None:
    total = np.zeros(7, np.uint32)
    total[place] = value
    assert vectors.status(total, 3, 3, 8) == expected


# what leaves looks like chance


@pytest.mark.parametrize("w", WIDTHS)
@pytest.mark.parametrize("value", [0, 255])
def test_a_masked_constant_looks_uniform(w: Width, value: int) -> None:
    instance = Instance(4, w)
    x = np.full(200_000, value, np.uint32)
    for party in range(4):
        assert looks_uniform(instance.masked(party, x=x), w // 8)
    assert not looks_uniform(vectors.pack(x, w), w // 8)


def test_a_masked_vector_is_independent_of_its_own_and_of_the_others() -> None:
    instance = Instance(4, 24, 200_000)
    y = [vectors.unpack(instance.masked(party), 24) for party in range(4)]
    for party in range(4):
        assert correlation(y[party], instance.x[party]) < 5
        assert all(correlation(y[party], y[other]) < 5 for other in range(party))


def test_nobody_tells_zeros_from_the_largest_values() -> None:
    from sklearn.metrics import roc_auc_score

    def seen(masked: bool) -> float:
        """The area under the curve of a linear classifier of the bits of two elements, on pairs it has not seen."""
        instance = Instance(4, 24)
        d = 80_000
        blocks = []
        for value, party in ((0, 1), (65535, 2)):
            x = np.full(d, value, np.uint32)
            data = instance.masked(party, x=x) if masked else vectors.pack(x, 24)
            blocks.append(np.unpackbits(np.frombuffer(bytes(data), np.uint8).reshape(-1, 6), axis=1))
        features, labels = np.vstack(blocks), np.repeat([0, 1], d // 2)
        train = np.arange(d) % 2 == 0
        weights = np.linalg.lstsq(features[train] - 0.5, labels[train] - 0.5)[0]
        return float(roc_auc_score(labels[~train], (features[~train] - 0.5) @ weights))

    assert abs(seen(masked=True) - 0.5) < 0.01
    assert seen(masked=False) == 1.0


def test_after_sigma_was_opened_the_vector_is_still_hidden_by_b() -> None:
    instance = Instance(4, 24)
    gone, x = 2, np.full(200_000, 65535, np.uint32)
    y = vectors.unpack(instance.masked(gone, x=x), 24)
    key = keyset.mask_key(instance.keys[gone].sigma)  # as everybody can make it now
    pairs = {j: keyset.pair_seed(bytes(32), gone, j, key, instance.publics[j]) for j in range(4) if j != gone}
    plus, minus = [seed for j, seed in pairs.items() if j < gone], [seed for j, seed in pairs.items() if j > gone]
    vectors.add_masks(y, plus, minus, 24, "aegis256")
    assert looks_uniform(vectors.pack(y, 24))
    assert correlation(y, np.arange(len(y))) < 5
    vectors.add_masks(y, [], [keyset.self_seed(bytes(32), gone, instance.keys[gone].b)], 24, "aegis256")
    assert np.array_equal(y, x)  # and by nothing else


def joint_difference(a: list[Vector], b: list[Vector]) -> float:
    """How far two samples of three vectors differ in the joint distribution of their highest four bits, in standard
    deviations of chi-square over 4096 cells: for one distribution above 6 has probability below 10^-6."""
    counts = [np.bincount(sum((v >> 20) << 4 * place for place, v in enumerate(s)), minlength=4096) for s in (a, b)]
    first, second = counts[0].astype(float), counts[1].astype(float)
    both = first + second
    seen = both > 0
    chi = float((((first - second) ** 2)[seen] / both[seen]).sum())
    degrees = int(seen.sum()) - 1
    return (chi - degrees) / (2 * degrees) ** 0.5


def test_what_one_of_four_sees_of_an_opened_sum_is_what_the_sum_and_chance_would_give() -> None:
    d, me, others = 400_000, 3, (0, 1, 2)
    instance = Instance(4, 24)
    x = [np.full(d, value, np.uint32) for value in (65535, 0, 65535, 1)]

    def view(hidden: bool) -> list[Vector]:
        """The others' vectors without every mask that party 3 knows once all b are open."""
        seen = []
        for i in others:
            y = vectors.unpack(instance.masked(i, x=x[i]), 24)
            pairs = {
                j: keyset.pair_seed(bytes(32), j, i, keyset.mask_key(instance.keys[j].sigma), instance.publics[i])
                for j in {me, *(() if hidden else others)} - {i}
            }
            minus = [keyset.self_seed(bytes(32), i, instance.keys[i].b), *(pairs[j] for j in pairs if j > i)]
            vectors.add_masks(y, [pairs[j] for j in pairs if j < i], minus, 24, "aegis256")
            seen.append(y)
        return seen

    random = np.random.default_rng(4)
    chance = [random.integers(0, 1 << 24, d, np.uint32) for _ in range(2)]
    total = sum(x[i].astype(np.uint64) for i in others)
    simulated = [*chance, ((total - chance[0] - chance[1]) % (1 << 24)).astype(np.uint32)]
    real = view(hidden=True)
    assert np.array_equal(sum(v.astype(np.uint64) for v in real) % (1 << 24), total)
    assert joint_difference(real, simulated) < 6
    assert joint_difference(view(hidden=False), simulated) > 1000, "without pair masks anybody sees the difference"


def test_t_minus_one_shares_leave_the_self_mask_unknown() -> None:
    n, t = 4, 3
    keys = Instance(n, 24).keys[0]
    shares = shamir.split(keys.b.reveal(), keys.coefficients("b", t), range(n))
    guess = shamir.Weights([0, 1]).interpolate(shares[:2])
    assert guess != keys.b.reveal()
    assert shamir.Weights([3, 0, 2]).interpolate([shares[3], shares[0], shares[2]]) == keys.b.reveal()
