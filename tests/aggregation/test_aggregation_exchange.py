"""What a key set remembers of its exchanges: one for each other party, and nothing after START."""

from __future__ import annotations

import pytest

from fedpeer.aggregation import keyset
from fedpeer.aggregation.keyset import KeySet
from fedpeer.crypto import Secret, SigningKey
from fedpeer.errors import LocalProtocolError

N, T, SID = 5, 4, b"s" * 32
SIGNERS = [SigningKey(Secret(bytes([party]) * 32)) for party in range(2)]


def test_dealing_to_a_party_and_opening_what_it_dealt_takes_one_exchange_that_start_erases(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exchanges: list[bytes] = []
    x25519 = keyset.x25519
    monkeypatch.setattr(keyset, "x25519", lambda *of: exchanges.append(of[1]) or x25519(*of))
    us, other = (KeySet.fresh(party, SID, 0, lambda size, party=party: bytes([party + 1]) * size) for party in (0, 1))
    ours = us.share_for(1, other.adv_id, other.epk, T, N, SIGNERS[0])
    theirs = other.share_for(0, us.adv_id, us.epk, T, N, SIGNERS[1])
    us.open_share(1, other.adv_id, other.epk, theirs, SIGNERS[1].public, N)
    other.open_share(0, us.adv_id, us.epk, ours, SIGNERS[0].public, N)
    assert exchanges == [other.epk, us.epk]
    shared = x25519(us.e.reveal(), other.epk)
    assert shared in us._exchanged.values()
    us.erase_e()
    assert not us._exchanged
    assert not us._polynomials
    assert us.e is None
    with pytest.raises(LocalProtocolError):
        us.share_for(1, other.adv_id, other.epk, T, N, SIGNERS[0])
