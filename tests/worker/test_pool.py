"""peers.map over real processes with encryption in it: the same bytes on one core as on three."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from paillier_keys import key

from fedpeer.peers import Peers
from fedpeer.secure import paillier
from fedpeer.secure.paillier import Ciphertexts, Owner, parts, spread
from fedpeer.worker.main import failure
from fedpeer.worker.pool import map_forked

VALUES = [place * (-1) ** place for place in range(23)]
CUTS = np.arange(23) % 4


class Cores:
    """The driver of a stage that has so many of them, and no daemon."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._daemon, self._other = socket.socketpair()

    def post(self, request: object) -> None:
        raise AssertionError(request)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return map_forked(function, items, self._count, failure, self._daemon.fileno())

    def close(self) -> None:
        self._daemon.close()
        self._other.close()


def work(peers: Peers) -> tuple[Ciphertexts, Ciphertexts, Ciphertexts]:
    """What a stage does: its values encrypted in parts, added up by columns, multiplied by rows."""
    private = key()
    owner = Owner(private, peers.random, len(VALUES))
    encrypted = spread(peers, private.public, lambda part: owner.encrypt(part, peers.random), parts(VALUES)).prepare()
    sums = spread(peers, private.public, lambda shift: encrypted.sums((CUTS + shift) % 5, 5), range(4))
    products = spread(peers, private.public, lambda row: encrypted.multiply([row]), [VALUES, VALUES[::-1], [1] * 23])
    return encrypted, sums, products


@pytest.fixture(scope="module")
def found() -> dict[int, tuple[Ciphertexts, Ciphertexts, Ciphertexts]]:
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paillier, "PART", 4)
        for count in (1, 2, 3):
            cores = Cores(count)
            results[count] = work(Peers(cores, "alice", {"alice": "guest", "bob": "host"}, bytes(32)))
            cores.close()
    return results


def test_ciphertexts_are_the_same_bytes_on_any_number_of_cores(
    found: dict[int, tuple[Ciphertexts, Ciphertexts, Ciphertexts]],
) -> None:
    digests = {
        count: [hashlib.sha256(vector.to_array().tobytes()).hexdigest() for vector in vectors]
        for count, vectors in found.items()
    }
    assert digests[1] == digests[2] == digests[3]


def test_work_that_was_spread_is_whole_and_in_order(
    found: dict[int, tuple[Ciphertexts, Ciphertexts, Ciphertexts]],
) -> None:
    encrypted, sums, products = found[3]
    private = key()
    plain = [private.public.centred(private.decrypt(vector)) for vector in (encrypted, sums, products)]
    assert plain[0] == VALUES
    bins = [[sum(np.array(VALUES)[(CUTS + shift) % 5 == at]) for at in range(5)] for shift in range(4)]
    assert plain[1] == [value for row in bins for value in row]
    assert plain[2] == [
        sum(a * b for a, b in zip(row, VALUES, strict=True)) for row in (VALUES, VALUES[::-1], [1] * 23)
    ]


def test_no_part_draws_what_another_drew(found: dict[int, tuple[Ciphertexts, Ciphertexts, Ciphertexts]]) -> None:
    encrypted, _, _ = found[2]
    assert len({value % encrypted.public.n for value in encrypted.values}) == len(VALUES)


def test_as_many_processes_work_as_there_are_cores_and_items() -> None:
    for cores, items, wanted in [(1, 5, 1), (3, 6, 3), (4, 2, 2)]:
        driver = Cores(cores)
        numbers = driver.map(lambda item: [item, os.getpid()], list(range(items)))
        driver.close()
        assert [item for item, _ in numbers] == list(range(items))
        assert len({process for _, process in numbers} - {os.getpid()}) == wanted
