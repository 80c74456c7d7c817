"""The text vectors of SA1 (tests/vectors/sa1.txt): what must be accepted, and the many ways in which it must not be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedpeer.aggregation import evidence, keyset, messages, names, shamir, vectors
from fedpeer.errors import FedpeerError, LocalProtocolError, RemoteProtocolError, TrustError

FILE = Path(__file__).resolve().parent.parent / "vectors/sa1.txt"
LINES = [line for line in FILE.read_text().splitlines() if line and not line.startswith("#")]
((_, *KEYS, _, CONTRACT),) = (line.split() for line in LINES if line.startswith("keys "))
CASES = [line.split() for line in LINES if not line.startswith("keys ")]


def raw(text: str) -> bytes:
    return bytes.fromhex(text) if text != "-" else b""


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def element(value: str) -> str:
    return "yes" if shamir.is_element(raw(value)) else "no"


def interpolate(pairs: str) -> str:
    split = [pair.split(":") for pair in pairs.split(",")]
    return shamir.Weights([int(holder) for holder, _ in split]).interpolate([raw(share) for _, share in split]).hex()


def pk(value: str) -> str:
    return "yes" if keyset.is_usable(raw(value)) else "no"


def set_(n: str, value: str) -> str:
    return ",".join(map(str, sorted(names.parties_of(raw(value), int(n))))) or "-"


def message(value: str) -> str:
    return messages.parse(raw(value)).kind


def signed(key: str, value: str) -> str:
    try:
        messages.parse(raw(value)).verify(raw(key))
    except (TrustError, RemoteProtocolError):
        return "no"
    return "yes"


def opened(
    sid: str, dealer: str, adv: str, holder: str, which: keyset.Which, share: str, other: str, sig: str, key: str
) -> str:
    try:
        keyset.check_opened(
            raw(sid), int(dealer), raw(adv), int(holder), which, raw(share), raw(other), raw(sig), raw(key)
        )
    except TrustError:
        return "no"
    return "yes"


def sealed(n: str, holder: str, dealer: str, adv: str, epk: str, ciphertext: str, key: str) -> str:
    keys = keyset.KeySet.from_bytes(raw(holder))
    held = keys.open_share(int(dealer), raw(adv), raw(epk), raw(ciphertext), raw(key), int(n))
    return f"{held.share_b.reveal().hex()},{held.share_s.reveal().hex()}"


def convicted(n: str, kind: str, raws: str) -> str:
    given = messages.Evidence(1, bytes(32), "EVIDENCE", 0, kind, [raw(value) for value in raws.split(",")])
    publics = [raw(key) for key in KEYS[: int(n)]]
    culprit = evidence.convict(given, names.profile(int(n)), publics, raw(CONTRACT))
    return "nobody" if culprit is None else str(culprit)


def width(w: str) -> vectors.Width:
    return {"16": 16, "24": 24, "32": 32}[w]  # type: ignore[return-value]


def packed(w: str, values: str) -> str:
    return vectors.pack(np.array(numbers(values), "<u4"), width(w)).hex()


def unpacked(w: str, value: str) -> str:
    return ",".join(map(str, vectors.unpack(raw(value), width(w)).tolist()))


def status(d: str, count: str, bits: str, values: str) -> str:
    return vectors.status(np.array(numbers(values), "<u4"), int(d), int(count), int(bits))


VERBS: dict[str, tuple[Callable[..., str], type[FedpeerError] | tuple[type[FedpeerError], ...]]] = {
    "element": (element, ()),
    "interpolate": (interpolate, (TrustError, LocalProtocolError)),
    "pk": (pk, ()),
    "set": (set_, RemoteProtocolError),
    "message": (message, RemoteProtocolError),
    "signed": (signed, ()),
    "opened": (opened, ()),
    "sealed": (sealed, TrustError),
    "evidence": (convicted, ()),
    "packed": (packed, ()),
    "unpacked": (unpacked, LocalProtocolError),
    "status": (status, ()),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_case_ends_as_the_file_says(verb: str) -> None:
    act, refusals = VERBS[verb]
    seen: Counter[str] = Counter()
    for number, (_, *arguments, equals, expected) in enumerate(case for case in CASES if case[0] == verb):
        assert equals == "="
        try:
            got = act(*arguments)
        except refusals:
            got = "refused"
        assert got == expected, f"{verb} case {number + 1}: {' '.join(arguments)[:200]}"
        seen[expected] += 1
    assert len(seen) > 1  # each verb has an accepted case and a refused one, or two outcomes


def test_the_file_has_no_case_that_nobody_reads() -> None:
    assert {case[0] for case in CASES} == VERBS.keys()
    bad = sum(case[-1] in ("no", "refused", "nobody", "NOISE") for case in CASES)
    assert bad > 0.8 * len(CASES)
