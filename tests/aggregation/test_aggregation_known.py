"""The known answers of SA1: one group of four parties, made again from its seed, and every byte of it compared."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeer import codec, crypto
from fedpeer.aggregation import keyset, messages, names, shamir, slices, vectors
from fedpeer.aggregation.keyset import KeySet
from fedpeer.crypto import Secret, SigningKey
from fedpeer.errors import TrustError

INSTANCES = ["instance_0_aborted", "instance_1_one_dropout_after_START", "instance_2_pinned"]
SEED = b"fedpeer-kat-2"


@pytest.fixture(scope="module")
def known(shared: Path) -> dict[str, Any]:
    answers: dict[str, Any] = json.loads((shared / "vectors/secagg_kat.json").read_text())
    return answers


@dataclass
class Dice:
    """The chance behind the known answers: a counter for each party."""

    party: int
    sid: bytes
    counter: int
    left: list[bytes] = field(default_factory=list)

    def __call__(self, _size: int) -> bytes:
        self.counter += 1
        return names.hash_(
            "fp.sa1.kat", SEED, self.sid, names.u32(self.party), self.left.pop(0), names.u32(self.counter)
        )


class KnownKeys(KeySet):
    """Whose coefficients are drawn, not derived."""

    def coefficients(self, which: keyset.Which, t: int) -> list[bytes]:
        counter = self.inc_counter + (0 if which == "b" else t - 1)
        dice = Dice(self.party, self.sid, counter, [b"cb" if which == "b" else b"cs"] * (t - 1))
        return [keyset._element(lambda: dice(32)) for _ in range(t - 1)]

    inc_counter: int = 0


def signer(party: int) -> SigningKey:
    return SigningKey(Secret(Dice(party, b"id", 0, [b""])(32)))


def keys_of(party: int, sid: bytes, seq: int) -> KeySet:
    first = 1 + 7 * seq  # the identity, and seven draws for each instance before
    keys = KnownKeys.fresh(party, sid, 0, Dice(party, sid, first, [b"sigma", b"b", b"e", b"unused"]))
    keys.inc_counter = first + 3
    return keys


def test_streams(known: dict[str, Any]) -> None:
    seed = Secret(bytes.fromhex(known["prg"]["seed"]))
    for prg in ("aegis256", "chacha20"):
        for segment in (0, 1):
            stream = vectors.stream(seed, segment, 16, prg)
            assert stream.tobytes().hex() == known["prg"][prg][f"seg{segment}_first64"]
    public = known["prg"]["aegis256_public_vector_1"]
    out = bytearray(16 + crypto.STREAM_SLACK)
    crypto.aegis256_into(bytes.fromhex(public["key"]), bytes.fromhex(public["nonce"]), out, public["zeros"])
    assert out[:16].hex() == public["ciphertext"]


def test_hashes_and_encodings(known: dict[str, Any]) -> None:
    assert crypto.hash_("fp.sa1.ctx", b"a", b"bc").hex() == known["H"]['H("fp.sa1.ctx", "a", "bc")']
    assert crypto.hash_("fp.sa1.self", b"x", key=bytes(32)).hex() == known["H"]['H("fp.sa1.self", "x"; key=32*00)']
    hasher = crypto.Hasher("fp.sa1.ctx", b"a", last=2)
    hasher.update(b"b")
    hasher.update(b"c")
    assert hasher.digest().hex() == known["H"]['H("fp.sa1.ctx", "a", "bc")']
    values = (None, 0, 127, 128, 256, 65536, 1 << 32, 0.5, b"\x01", "START", [1, [], None])
    assert [codec.encode(value).hex() for value in values] == [entry["bytes"] for entry in known["encoding"]]


def test_shares(known: dict[str, Any]) -> None:
    secret, *coefficients = (
        number.to_bytes(32, "little") for number in (known["shamir"]["secret"], *known["shamir"]["coefficients"])
    )
    shares = shamir.split(secret, coefficients, [0, 1, 2])
    assert [int.from_bytes(share, "little") for share in shares] == list(known["shamir"]["shares"].values())
    assert shamir.Weights([2, 0]).interpolate([shares[2], shares[0]]) == secret


def test_refused_keys(known: dict[str, Any]) -> None:
    assert not any(keyset.is_usable(bytes.fromhex(raw)) for raw in known["refused_public_keys"])


def test_profiles(known: dict[str, Any]) -> None:
    for entry in known["profiles"]:
        made = names.profile(entry["n"], entry["profile"])
        assert (made.f, made.t, made.q, made.t_c, made.m_min) == tuple(
            entry[k] for k in ("f", "t", "q", "t_c", "m_min")
        )


def test_names(known: dict[str, Any]) -> None:
    entry = {k: v for k, v in known["names"].items() if k != "identity_keys"}
    contract = bytes.fromhex(entry["contract_hash"])
    first = names.first_history(contract, entry["stage"], bytes.fromhex(entry["params"]))
    group = names.group_of(contract, b"")
    assert first.hex() == entry["h0"]
    assert group.hex() == entry["group_data"]
    assert names.group_of(contract, first).hex() == entry["group_turn_at_h0"]
    assert names.sid_of(contract, group, 0).hex() == entry["sid_of_group_data_seq_0"]
    assert names.params_hash(bytes.fromhex(entry["params_list"])).hex() == entry["params_hash"]
    one = known["group"][INSTANCES[1]]
    after = names.history_after_sum(first, one["S"], bytes.fromhex(one["sum_hash"]))
    assert after.hex() == entry["h_after_instance_1"]
    assert names.history_after_turn(after, b"\x11" * 32).hex() == entry["h_after_turn_with_shared_digest_32x11"]
    assert [signer(party).public.hex() for party in range(4)] == known["names"]["identity_keys"]


@pytest.mark.parametrize("seq", [0, 1, 2])
def test_an_instance_from_its_keys_to_its_end(known: dict[str, Any], seq: int) -> None:
    group, entry = known["group"], known["group"][INSTANCES[seq]]
    n, w, sid = group["n"], group["w"], bytes.fromhex(entry["sid"])
    contract = bytes.fromhex(known["names"]["contract_hash"])
    assert names.sid_of(contract, names.group_of(contract, b""), seq) == sid
    leads = [names.proposer(contract, names.group_of(contract, b""), seq, view, n) for view in (0, 1)]
    assert leads == entry["proposer_of_view_0_1"]

    sets = [keys_of(party, sid, seq) for party in range(n)]
    adverts = [messages.sign(signer(keys.party), sid, "ADVERTISE", keys.party, *keys.advertise_fields) for keys in sets]
    for keys, advert in zip(sets, adverts, strict=True):
        expected = entry["adv"][str(keys.party)]
        assert advert.body.hex() == expected["body"]
        assert keys.adv_id.hex() == expected["adv_id"]
        assert names.advert_id(advert.body) == keys.adv_id
    root = names.advert_root([sets[party].adv_id for party in entry["U"]])
    assert root.hex() == entry["adv_root"]
    model = bytes.fromhex(known["names"]["h_after_instance_1" if seq == 2 else "h0"])
    params = bytes.fromhex(known["names"]["params_hash"])
    ctx = names.context(sid, model, params, entry["U"], entry["O"], root, entry["pin"])
    assert ctx.hex() == entry["ctx"]
    decisions: tuple[tuple[messages.Stage, str], ...] = (("START", "start"), ("COMMIT", "commit"))
    for stage, name in decisions:
        raw, certificate = bytes.fromhex(entry[f"{name}_value"]), entry[f"{name}_dc"]
        value = codec.decode(raw)
        assert messages.id_of(stage, messages.value_of(stage, value)).hex() == certificate["id"]
        for party, signature in certificate["sigs"].items():
            i = int(party)
            vote = messages.sign(signer(i), sid, "PRECOMMIT", i, stage, 0, bytes.fromhex(certificate["id"]))
            assert vote.signature.hex() == signature
        vote = messages.sign(signer(0), sid, "PRECOMMIT", 0, stage, 0, bytes.fromhex(certificate["id"]))
        assert vote.body.hex() == certificate["precommit_body_of_0"]

    masked: dict[int, bytearray] = {}
    publics = {party: sets[party].pk for party in entry["U"]}
    for party in entry["U"]:
        x = np.zeros(group["d_padded"], np.uint32)
        x[: group["d"]] = group["x"][str(party)]
        plus, minus = keyset.masking_seeds(sets[party], ctx, publics)
        masked[party] = vectors.mask(x, plus, minus, w, "aegis256")
        assert masked[party].hex() == entry["y_packed"][str(party)]
    if seq == 0:
        return

    total = np.zeros(group["d_padded"], np.uint32)
    for party in entry["S"]:
        vectors.add_packed(total, masked[party], w)
    packed = vectors.pack(total, w)
    assert packed.hex() == entry["Y_packed"]
    places = slices.chunks(group["d_padded"], len(entry["O"]))
    digests = [slices.sum_digest(ctx, c, packed[a * 3 : z * 3]) for c, (a, z) in enumerate(places)]
    assert slices.root(digests).hex() == entry["root"]
    opened_b = {party: sets[party].b for party in entry["S"]}
    opened_sigma = {party: sets[party].sigma for party in set(entry["U"]) - set(entry["S"])}
    seeds = keyset.unmasking_seeds(ctx, frozenset(entry["S"]), publics, opened_b, opened_sigma)
    vectors.add_masks(total, *seeds, w, "aegis256")
    assert total[:8].tolist() == entry["R_first_8"]
    packed = vectors.pack(total, w)
    assert packed.hex() == entry["R_packed"]
    assert slices.sum_hash(packed).hex() == entry["sum_hash"]
    assert vectors.status(total, group["d"], len(entry["S"]), group["bits"]) == entry["status"]
    survivors = names.bitmap(entry["S"], n)
    final = messages.sign(signer(0), sid, "FINAL", 0, ctx, survivors, 0, bytes.fromhex(entry["sum_hash"]))
    assert final.body.hex() == entry["final_body_of_0"]


def test_keys_and_shares_of_an_instance(known: dict[str, Any]) -> None:
    entry = known["group"][INSTANCES[1]]
    n, t, sid, ctx = 4, 3, bytes.fromhex(entry["sid"]), bytes.fromhex(entry["ctx"])
    sets = [keys_of(party, sid, 1) for party in range(n)]
    for expected in entry["keys"]["sets"]:
        keys = sets[expected["i"]]
        assert keys.e is not None
        made = (keys.sigma.reveal(), keys.b.reveal(), keys.e.reveal(), keys.pk, keys.hb, keys.epk)
        assert [raw.hex() for raw in made] == [expected[name] for name in ("sigma", "b", "e", "pk", "hb", "epk")]
        assert keyset.pk_of(keys.sigma) == keys.pk
    for pair, seed in entry["keys"]["pair_seeds"].items():
        i, j = map(int, pair.split("-"))
        for one, other in ((i, j), (j, i)):
            made_seed = keyset.pair_seed(ctx, one, other, sets[one].mask_key, sets[other].pk)
            assert made_seed.reveal().hex() == seed
    for party, seed in entry["keys"]["self_seeds"].items():
        assert keyset.self_seed(ctx, int(party), sets[int(party)].b).reveal().hex() == seed

    expected = entry["keys"]["share_2_to_0"]
    dealer, holder = sets[2], sets[0]
    ciphertext = dealer.share_for(0, holder.adv_id, holder.epk, t, n, signer(2))
    assert ciphertext.hex() == expected["ciphertext"]
    held = holder.open_share(2, dealer.adv_id, dealer.epk, ciphertext, signer(2).public, n)
    assert (held.dig_b.hex(), held.dig_s.hex()) == (expected["digest_b"], expected["digest_sigma"])
    body = keyset.share_body(sid, dealer.adv_id, 0, held.dig_b, held.dig_s)
    assert body.hex() == expected["signed_body"]
    for name, party in (("shares_of_b_0", 0), ("shares_of_sigma_2", 2)):
        for point, share in entry["keys"][name].items():
            to = sets[int(point) - 1]
            sealed = sets[party].share_for(to.party, to.adv_id, to.epk, t, n, signer(party))
            got = to.open_share(party, sets[party].adv_id, sets[party].epk, sealed, signer(party).public, n)
            assert (got.share_b if party == 0 else got.share_s).reveal().hex() == share
    shares = [bytes.fromhex(share) for share in entry["keys"]["shares_of_sigma_2"].values()]
    opened = Secret(shamir.Weights([0, 1, 3]).interpolate([shares[0], shares[1], shares[3]]))
    assert opened.reveal().hex() == entry["opened_sigma"]["2"]
    for party, b in entry["opened_b"].items():
        assert sets[int(party)].b.reveal().hex() == b

    places = slices.chunks(256, len(entry["O"]))
    for number, scatter in enumerate(entry["keys"]["scatter_0"]):
        start, stop = places[number]
        data = bytes.fromhex(entry["y_packed"]["0"])[3 * start : 3 * stop]
        assert scatter["chunk"] == number
        assert slices.owner_of(number, entry["O"], sid) == scatter["owner"]
        assert slices.chunk_digest(ctx, 0, number, data).hex() == scatter["digest"]
    with pytest.raises(TrustError):
        sets[1].open_share(2, dealer.adv_id, dealer.epk, ciphertext, signer(2).public, n)


def test_chunks_and_root(known: dict[str, Any]) -> None:
    for layout in known["chunks"]["layout"]:
        sid = bytes.fromhex(layout["sid_first4"]) + bytes(28)
        places = slices.chunks(layout["d_padded"], len(layout["O"]))
        assert [list(place) for place in places] == layout["ranges"]
        assert [slices.owner_of(c, layout["O"], sid) for c in range(len(places))] == layout["owners"]
    entry = known["chunks"]["root"]
    v = (np.arange(1280, dtype=np.uint64) * 2654435761 % (1 << 24)).astype(np.uint32)
    ctx, packed = bytes.fromhex(entry["ctx"]), vectors.pack(v, entry["w"])
    assert packed[:12].hex() == entry["packed_first_12"]
    places = slices.chunks(1280, entry["owners"])
    parts = [packed[3 * start : 3 * stop] for start, stop in places]
    digests = [slices.sum_digest(ctx, c, part) for c, part in enumerate(parts)]
    assert [digest.hex() for digest in digests] == entry["digests"]
    assert slices.root(digests).hex() == entry["root"]
    of_7 = [slices.chunk_digest(ctx, 7, c, part).hex() for c, part in enumerate(parts)]
    assert of_7 == entry["chunk_digests_of_contributor_7"]


def test_status(known: dict[str, Any]) -> None:
    for entry in known["values"]["status"]:
        total = np.array(entry["R"], np.uint32)
        assert vectors.status(total, entry["d"], entry["count"], entry["bits"]) == entry["status"]
