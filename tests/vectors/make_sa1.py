"""Writes sa1.txt: cases of secure aggregation with what must become of them, most of which is to be refused.

    .venv/bin/python tests/vectors/make_sa1.py > tests/vectors/sa1.txt

Run it only when the protocol changes: the file is what other implementations, and this one tomorrow, are held to.
"""

import itertools

import numpy as np

from fedpeer import codec
from fedpeer.aggregation import keyset, messages, names, shamir, vectors
from fedpeer.aggregation.evidence import Dealt, bad_dealing
from fedpeer.crypto import Secret, SigningKey, hash_

P = shamir.P
CONTRACT = hash_("fp.test", b"contract")
SID = names.sid_of(CONTRACT, names.group_of(CONTRACT, b""), 0)
OTHER = names.sid_of(CONTRACT, names.group_of(CONTRACT, b""), 1)
A, B = bytes(32), b"\1" * 32
SIGNERS = [SigningKey(Secret(hash_("fp.test", b"id", names.u32(party)))) for party in range(5)]


def keys_of(party, inc=0):
    draws = itertools.count()
    return keyset.KeySet.fresh(
        party, SID, inc, lambda size: hash_("fp.test", *map(names.u32, (party, inc, next(draws))), size=size)
    )


KEYS = [keys_of(party) for party in range(5)]


def show(value):
    if isinstance(value, bytes | bytearray):
        return value.hex() or "-"
    return str(value)


def case(verb, *values, to):
    print(verb, *map(show, values), "=", show(to))


def title(text):
    print(f"\n# {text}")


def flipped(raw, bit):
    out = bytearray(raw)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


print("# Secure aggregation SA1, version 1: cases and what must become of them. Bytes are hex, - is none.")

title("element BYTES: whether it is one of GF(2^255 - 19)")
for number in (0, 1, P - 1):
    case("element", number.to_bytes(32, "little"), to="yes")
for number in (P, P + 1, 2**255 - 1, 2**255, 2**256 - 1):
    case("element", number.to_bytes(32, "little"), to="no")
for size in (0, 31, 33, 64):
    case("element", bytes(size), to="no")

title("interpolate HOLDER:SHARE,...: the secret")
secret, coefficients = hash_("fp.test", b"secret")[:31] + b"\0", [(P - 1).to_bytes(32, "little"), A, B]
shares = shamir.split(secret, coefficients, range(6))


def interpolate(*pairs, to=b""):
    text = ",".join(f"{holder}:{show(share)}" for holder, share in pairs)
    case("interpolate", text, to=to or "refused")


interpolate(*enumerate(shares[:4]), to=secret)
interpolate(*((i, shares[i]) for i in (5, 1, 0, 3)), to=secret)
interpolate((0, shares[0]), (0, shares[0]), (1, shares[1]), (2, shares[2]))
interpolate((0, P.to_bytes(32, "little")), (1, shares[1]))
interpolate((0, shares[0][:31]), (1, shares[1]))
interpolate((0, shares[0] + b"\0"), (1, shares[1]))

title("pk BYTES: whether it may be used")
for keys in KEYS[:2]:
    case("pk", keys.pk, to="yes")
low = [0, 1, P - 1, P, P + 1]
low += [
    int.from_bytes(bytes.fromhex(raw), "little")
    for raw in (
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    )
]
for number in low:
    case("pk", number.to_bytes(32, "little"), to="no")
    case("pk", (number | 1 << 255).to_bytes(32, "little"), to="no")
for raw in (b"", KEYS[0].pk[:31], KEYS[0].pk + b"\0"):
    case("pk", raw, to="no")

title("set N BYTES: its members")
case("set", 4, b"\x0b", to="0,1,3")
case("set", 4, b"\x00", to="-")
case("set", 9, b"\xff\x01", to="0,1,2,3,4,5,6,7,8")
for n, raw in ((4, b"\x10"), (4, b"\x80"), (4, b""), (4, b"\x0b\x00"), (8, b"\xff\x00"), (9, b"\xff\x02"), (9, b"\xff")):
    case("set", n, raw, to="refused")

title("message BYTES: its kind; body and signature, of which only the length counts here")
share = KEYS[0].share_for(1, KEYS[1].adv_id, KEYS[1].epk, 4, 5, SIGNERS[0])
entry = [0, A, B, bytes(64)]
bodies = {
    "ADVERTISE": KEYS[0].advertise_fields,
    "SHARE": (1, share),
    "ACK": (7, [[0, bytes(16)], [1, bytes(16)]]),
    "READY": (["fit", 0, 0], A, B, A),
    "PROPOSAL": ("START", 0, ["U"], None),
    "PREVOTE": ("START", 0, A),
    "PRECOMMIT": ("COMMIT", 4294967295, None),
    "SCATTER": (A, 0, 768, B),
    "RECEIPT": (A, 3, b"\x0b"),
    "CUT": (A, 1, b"\x0b"),
    "SUM": (A, b"\x0b", 0, B),
    "RELEASE": (A, b"\x0b", [entry]),
    "OPEN": (0, bytes(16), "b", A),
    "SHARE_B": (A, b"\x0b", [entry]),
    "FINAL": (A, b"\x0b", 0, B),
    "EVIDENCE": ("E1", [b"\x01", b"\x02"]),
}
SIG = bytes(64)
for kind, fields in bodies.items():
    head = [1, SID, kind, 2]
    body = codec.encode([*head, *fields])
    case("message", body + SIG, to=kind)
    for wrong in (
        [*head, *fields, 0],
        [*head, *fields[:-1]],
        [2, *head[1:], *fields],
        [1, SID[:31], kind, 2, *fields],
        [1, SID + b"\0", kind, 2, *fields],
        [1, SID, kind.lower(), 2, *fields],
        [1, SID, kind, 200, *fields],
        [1, SID, kind, -1, *fields],
        [1, SID, kind, 2.0, *fields],
        [1, SID, kind, True, *fields],
        [1, SID.hex(), kind, 2, *fields],
        [*head, {}, *fields[1:]],
        [*head, *fields[:-1], False],
    ):
        case("message", codec.encode(wrong) + SIG, to="refused")
    long = b"\xdc" + len([*head, *fields]).to_bytes(2, "big") + body[1:]  # a longer form of the array's head
    case("message", long + SIG, to="refused")
    case("message", body + b"\xc0" + SIG, to="refused")
    case("message", body + SIG[1:], to="refused")
for wrong in (
    ("SHARE", (1, bytes(99))),
    ("SHARE", (1, bytes(201))),
    ("ACK", (1, [[0, bytes(16), 0]])),
    ("ACK", (1, [[0, bytes(15)]])),
    ("ACK", (2**32, [])),
    ("PREVOTE", ("FINISH", 0, A)),
    ("PREVOTE", ("START", 0, bytes(31))),
    ("PREVOTE", ("START", -1, A)),
    ("PROPOSAL", ("START", 0, [bytes(640)], None)),
    ("OPEN", (0, bytes(16), "c", A)),
    ("FINAL", (A, b"\x0b", 2, B)),
    ("RECEIPT", (A, 0, bytes(26))),
    ("RELEASE", (A, b"\x0b", [entry] * 101)),
    ("RELEASE", (A, b"\x0b", [[0, bytes(31), B, bytes(64)]])),
    ("EVIDENCE", ("E10", [])),
    ("ADVERTISE", (0, A, B, A[:31])),
):
    case("message", codec.encode([1, SID, wrong[0], 2, *wrong[1]]) + SIG, to="refused")
for raw in (b"", SIG, b"\xc0" + SIG, b"\x90" + SIG, codec.encode([1, SID, "ACK"]) + SIG, b"\xff" * 70, b"\xc1" * 65):
    case("message", raw, to="refused")

title("signed KEY BYTES: whether the message is by that key")
vote = messages.sign(SIGNERS[2], SID, "PREVOTE", 2, "START", 0, A)
case("signed", SIGNERS[2].public, vote.raw, to="yes")
for bit in (3 * 8, 8 * len(vote.body) - 1, 8 * len(vote.body), 8 * len(vote.raw) - 1):
    case("signed", SIGNERS[2].public, flipped(vote.raw, bit), to="no")
case("signed", SIGNERS[1].public, vote.raw, to="no")
case("signed", A, vote.raw, to="no")
case("signed", SIGNERS[2].public[:31], vote.raw, to="no")
case("signed", SIGNERS[2].public, vote.body + SIGNERS[2].sign("PREVOTE", vote.body), to="no")
case("signed", SIGNERS[2].public, vote.body + SIGNERS[2].sign("PRECOMMIT", vote.body, label=messages.LABEL), to="no")
order = 2**252 + 27742317777372353535851937790883648493
s = int.from_bytes(vote.signature[32:], "little") + order  # the same signature with a greater s
case("signed", SIGNERS[2].public, vote.body + vote.signature[:32] + s.to_bytes(32, "little"), to="no")

title("opened SID DEALER ADV_ID HOLDER WHICH SHARE OTHER_DIGEST SIGNATURE DEALER_KEY: whether it was dealt")
held = KEYS[1].open_share(0, KEYS[0].adv_id, KEYS[0].epk, share, SIGNERS[0].public, 5)
for which, value, other in (("b", held.share_b, held.dig_s), ("s", held.share_s, held.dig_b)):
    right = [SID, 0, KEYS[0].adv_id, 1, which, value.reveal(), other, held.signature, SIGNERS[0].public]
    case("opened", *right, to="yes")
    for place, wrong in (
        (0, OTHER),
        (2, KEYS[1].adv_id),
        (3, 2),
        (3, 0),
        (4, "s" if which == "b" else "b"),
        (5, flipped(right[5], 0)),
        (5, (int.from_bytes(right[5], "little") + P).to_bytes(33, "little")),
        (5, right[5][:31]),
        (5, P.to_bytes(32, "little")),
        (6, flipped(other, 255)),
        (6, held.dig_b if which == "b" else held.dig_s),
        (7, flipped(held.signature, 0)),
        (7, flipped(held.signature, 511)),
        (7, held.signature[:63]),
        (8, SIGNERS[1].public),
    ):
        case("opened", *right[:place], wrong, *right[place + 1 :], to="no")

title("sealed N HOLDER'S_KEY_SET DEALER ADV_ID EPK CIPHERTEXT DEALER_KEY: the shares of b and σ")
right = [5, KEYS[1].to_bytes(), 0, KEYS[0].adv_id, KEYS[0].epk, share, SIGNERS[0].public]
case("sealed", *right, to=f"{show(held.share_b.reveal())},{show(held.share_s.reveal())}")
three = KEYS[0].share_for(1, KEYS[1].adv_id, KEYS[1].epk, 2, 3, SIGNERS[0])
unshared = KEYS[1].open_share(0, KEYS[0].adv_id, KEYS[0].epk, three, SIGNERS[0].public, 3)
case("sealed", 3, *right[1:5], three, right[6], to=f"{show(unshared.share_b.reveal())},{'00' * 32}")
case("sealed", 5, *right[1:5], three, right[6], to="refused")
case("sealed", 3, *right[1:], to="refused")
for place, wrong in (
    (1, KEYS[2].to_bytes()),
    (1, keys_of(1, inc=1).to_bytes()),
    (2, 1),
    (2, 2),
    (3, KEYS[1].adv_id),
    (3, keys_of(0, inc=1).adv_id),
    (4, KEYS[2].epk),
    (4, A),
    (5, flipped(share, 0)),
    (5, flipped(share, 8 * len(share) - 1)),
    (5, share[:-1]),
    (5, share + b"\0"),
    (5, b""),
    (6, SIGNERS[1].public),
):
    case("sealed", *right[:place], wrong, *right[place + 1 :], to="refused")
key = KEYS[1]._share_key(0, 1, KEYS[0].epk, KEYS[1].epk)
associated = KEYS[1]._associated(0, KEYS[0].adv_id, KEYS[1].adv_id)
good_b, good_s = held.share_b.reveal(), held.share_s.reveal()
for values in (
    [good_b, good_s, bytes(64)],
    [good_b, good_s],
    [good_b, good_s, held.signature, 0],
    [good_s, good_b, held.signature],
    [P.to_bytes(32, "little"), good_s, held.signature],
    [good_b, b"\xff" * 32, held.signature],
):
    case("sealed", *right[:5], key.seal(bytes(12), codec.encode(values), associated), right[6], to="refused")

title("evidence N TYPE MESSAGE,...: whom it convicts, of n parties with the keys below")
print("keys", *(signer.public.hex() for signer in SIGNERS), "=", CONTRACT.hex())


def said(kind, *fields, by=2):
    return messages.sign(SIGNERS[by], SID, kind, by, *fields)


def evidence(n, kind, raws, to="nobody"):
    case("evidence", n, kind, ",".join(map(show, raws)) or "-", to=to)


pairs = {
    "E1": (said("PREVOTE", "START", 0, A), said("PREVOTE", "START", 0, None)),
    "E2": (said("CUT", A, 0, b"\x0f"), said("CUT", A, 0, b"\x17")),
    "E3": (said("SUM", A, b"\x0f", 0, A), said("SUM", A, b"\x0f", 0, B)),
    "E4": (said("SCATTER", A, 0, 768, A), said("SCATTER", A, 0, 768, B)),
    "E6": (said("RELEASE", A, b"\x0f", []), said("RELEASE", A, b"\x00", [])),
    "E7": (said("ADVERTISE", 0, A, B, A), said("ADVERTISE", 0, A, B, B)),
}
for kind, (a, b) in pairs.items():
    evidence(5, kind, [a.raw, b.raw], to=2)
    evidence(5, kind, [a.raw, a.raw])
    evidence(5, kind, [a.raw])
    evidence(5, kind, [a.raw, b.raw, b.raw])
    evidence(5, kind, [a.raw, flipped(b.raw, 8 * len(b.raw) - 1)])
    evidence(5, kind, [a.raw, b.body + SIGNERS[1].sign(b.kind, b.body, label=messages.LABEL)])
    evidence(5, "E5", [a.raw, b.raw])
evidence(5, "E1", [said("PREVOTE", "START", 0, A).raw, said("PREVOTE", "START", 1, B).raw])
evidence(5, "E1", [said("PREVOTE", "START", 0, A).raw, said("PRECOMMIT", "START", 0, B).raw])
evidence(5, "E1", [said("PREVOTE", "START", 0, A).raw, said("PREVOTE", "START", 0, B, by=1).raw])
evidence(5, "E3", [said("SUM", A, b"\x0f", 0, A).raw, said("SUM", A, b"\x17", 0, B).raw])
evidence(5, "E7", [said("ADVERTISE", 0, A, B, A).raw, said("ADVERTISE", 1, A, B, B).raw])


def deal(n, t, off):
    keys = keys_of(2)
    dealt = []
    for holder in range(n):
        share_b = keys._share("b", keys.b, holder, t)
        if holder == off:
            share_b = flipped(share_b, 0)
        share_s = keys._share("s", keys.sigma, holder, t) if n > 3 else bytes(32)
        digests = keyset.share_digests(share_b, share_s)
        signature = SIGNERS[2].sign(
            "SHARE", keyset.share_body(SID, keys.adv_id, holder, *digests), label=messages.LABEL
        )
        dealt.append([Dealt(holder, "b", share_b, digests[1], signature), Dealt(holder, "s", share_s, digests[0], signature)])
    return said("ADVERTISE", *keys.advertise_fields), dealt


advert, dealt = deal(5, 4, 1)
of_b, of_s = [pair[0] for pair in dealt], [pair[1] for pair in dealt]
evidence(5, "E5", bad_dealing(advert, of_b[:4]), to=2)
evidence(5, "E5", bad_dealing(advert, [of_b[4], *of_b[1:4]]), to=2)
evidence(5, "E5", bad_dealing(advert, [of_b[0], *of_b[2:]]))
evidence(5, "E5", bad_dealing(advert, of_s[:4]))
evidence(5, "E5", bad_dealing(advert, of_b[:3]))
evidence(5, "E5", bad_dealing(advert, of_b))
evidence(5, "E5", bad_dealing(advert, [*of_b[:3], of_b[1]]))
evidence(5, "E5", bad_dealing(advert, [*of_b[:3], of_s[3]]))
evidence(5, "E5", bad_dealing(said("ADVERTISE", 1, *KEYS[2].advertise_fields[1:]), of_b[:4]))
advert, dealt = deal(3, 2, None)
evidence(3, "E5", bad_dealing(advert, [dealt[0][1], dealt[1][1]]))
evidence(3, "E5", bad_dealing(advert, [dealt[0][0], dealt[1][0]]))
advert, dealt = deal(3, 2, 1)
evidence(3, "E5", bad_dealing(advert, [dealt[0][0], dealt[1][0]]), to=2)

title("packed W VALUE,...: bytes; unpacked W BYTES: values")
for w in (16, 24, 32):
    values = [0, 1, (1 << w) - 1, 258]
    packed = vectors.pack(np.array(values, "<u4"), w)
    case("packed", w, ",".join(map(str, values)), to=packed)
    case("unpacked", w, packed, to=",".join(map(str, values)))
    case("unpacked", w, bytes(w // 8 + 1), to="refused")

title("status D COUNT BITS VALUE,...: of the sum of COUNT vectors")
for d, count, bits, values, to in (
    (2, 3, 8, "765,0,0,0", "SUM"),
    (2, 3, 8, "766,0,0,0", "NOISE"),
    (2, 3, 8, "765,0,0,1", "NOISE"),
    (2, 3, 8, "765,0,765,0", "NOISE"),
    (2, 1, 8, "255,255,0,0", "SUM"),
    (2, 1, 8, "256,255,0,0", "NOISE"),
):
    case("status", d, count, bits, values, to=to)
