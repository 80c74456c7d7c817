"""The observer: each thing that must never be known or said, planted into the transcript of a faultless world."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import msgspec
import pytest

from fedpeer.aggregation import keyset, names
from fedpeer.aggregation.messages import Signed, sign
from fedpeer.crypto import Secret
from fedpeer.testing.sums.faults import Faults, Liar
from fedpeer.testing.sums.observer import Instance, Said, observe
from fedpeer.testing.sums.world import Sum, World

N = 4


@pytest.fixture(scope="module")
def world() -> World:
    """Two sums of one group, which is not pinned."""
    sums = [Sum(("fit", 0, k), "turn", False, 0) for k in range(2)]
    made = World(2, n=N, faults=Faults(), sums=sums)
    assert not made.run().failures
    return made


def look(world: World, transcript: Iterable[Said], *, pinned: bool = False) -> list[str]:
    known = {sid: dataclasses.replace(instance, pinned=pinned) for sid, instance in world._instances().items()}
    return observe(list(transcript), world.profile, [key.public for key in world.keys], known)


def first(world: World, kind: str, party: int, seq: int = 0) -> Said:
    sid = sid_of(world, seq)
    return next(
        said for said in world.transcript if said.signed.kind == kind and said.party == party and said.signed.sid == sid
    )


def sid_of(world: World, seq: int) -> bytes:
    (ask, *_) = world.asked.values()
    return names.sid_of(world.contract, ask.group, seq)


def say(world: World, party: int, kind: str, *fields: object, seq: int = 0, honest: bool = True) -> Said:
    signed: Signed = sign(world.keys[party], sid_of(world, seq), kind, party, *fields)
    return Said(world.now, party, honest, signed, None)


def secret(world: World, party: int, which: keyset.Which, seq: int = 0) -> bytes:
    advert = first(world, "ADVERTISE", party, seq).signed.message
    (found,) = {raw for raw in world.nodes[party].drawn for raw in elements(raw) if fits(advert, which, raw)}
    return found


def elements(raw: bytes) -> list[bytes]:
    return [raw, raw[:31] + bytes([raw[31] & 0x7F])] if len(raw) == 32 else []


def fits(advert: object, which: keyset.Which, raw: bytes) -> bool:
    return keyset.is_secret_of(advert, which, Secret(raw))  # type: ignore[arg-type]


def opened(world: World, party: int, which: keyset.Which, *, by: int, honest: bool = True, seq: int = 0) -> Said:
    advert = names.advert_id(first(world, "ADVERTISE", party, seq).signed.body)
    return say(world, by, "OPEN", party, advert, which, secret(world, party, which, seq), honest=honest, seq=seq)


def test_the_transcript_of_a_faultless_world_shows_nothing(world: World) -> None:
    assert look(world, world.transcript) == []
    assert look(world, world.transcript, pinned=True) == [], "both sums have the same survivors"


def test_b_and_sigma_of_one_party(world: World) -> None:
    wrong = look(world, [*world.transcript, opened(world, 1, "s", by=1)])
    assert wrong
    assert all("can compute the vector of party 1" in line for line in wrong)


def test_b_and_sigma_of_different_key_sets_are_nothing(world: World) -> None:
    transcript = [
        said for said in world.transcript if said.signed.sid == sid_of(world, 0) or said.signed.kind != "OPEN"
    ]
    assert look(world, [*transcript, opened(world, 1, "s", by=1, seq=1)]) == []


def test_shares_of_sigma_in_the_hands_of_the_coalition_count(world: World) -> None:
    """t = 3: one share is the coalition's, two are shown."""

    def shown(*holders: int) -> list[Said]:
        said = []
        for holder in holders:
            entry = share_of_sigma(world, 1, holder)
            release = first(world, "RELEASE", holder).signed.message
            said.append(say(world, holder, "RELEASE", release.ctx, release.survivors, [entry]))
        return said

    assert not any("vector of party 1" in line for line in look(world, [*world.transcript, *shown(2)]))
    assert any("vector of party 1" in line for line in look(world, [*world.transcript, *shown(2, 3)]))


def share_of_sigma(world: World, dealer: int, holder: int) -> tuple[int, bytes, bytes, bytes]:
    """As the dealer would have dealt it: any polynomial will do for the observer, which checks the signature."""
    advert = names.advert_id(first(world, "ADVERTISE", dealer).signed.body)
    share_b, share_s = bytes([1, *bytes(31)]), bytes([2, holder, *bytes(30)])
    digests = keyset.share_digests(share_b, share_s)
    body = keyset.share_body(sid_of(world, 0), advert, holder, *digests)
    return dealer, share_s, digests[0], world.keys[dealer].sign("SHARE", body, label="fp.sa1.sig")


def test_a_share_that_its_dealer_did_not_sign_is_nothing(world: World) -> None:
    dealer, share, digest, signature = share_of_sigma(world, 1, 2)
    release = first(world, "RELEASE", 3).signed.message
    said = [
        say(world, holder, "RELEASE", release.ctx, release.survivors, [(dealer, share, digest, signature)])
        for holder in (0, 3)  # signed for party 2
    ]
    assert not any("vector of party 1" in line for line in look(world, [*world.transcript, *said]))


def test_two_survivor_sets_of_one_group(world: World) -> None:
    """In the second instance b of party 3 was not opened, but its σ."""
    mine = opened(world, 3, "s", by=0, honest=False, seq=1)
    transcript = [
        said
        for said in world.transcript
        if not (said.signed.sid == mine.signed.sid and said.signed.kind == "OPEN" and said.signed.message.dealer == 3)
    ]
    pinned = look(world, [*transcript, mine], pinned=True)
    assert any("can compute the sums over" in line for line in pinned)
    assert not any("can compute the sums over" in line for line in look(world, [*transcript, mine]))


def test_a_second_masked_vector(world: World) -> None:
    scatter = first(world, "SCATTER", 2).signed.message
    again = say(world, 2, "SCATTER", scatter.ctx, scatter.chunk, scatter.nbytes, bytes(32))
    assert f"party 2 sent two masked vectors in {sid_of(world, 0).hex()[:8]}" in look(world, [*world.transcript, again])
    other = say(world, 2, "SCATTER", bytes(32), scatter.chunk, scatter.nbytes, scatter.digest)
    assert look(world, [*world.transcript, other])
    assert look(world, [*world.transcript, dataclasses.replace(again, honest=False)]) == []


@pytest.mark.parametrize("kind", ["OPEN", "SHARE_B"])
def test_a_b_before_its_time(world: World, kind: str) -> None:
    open_ = first(world, "OPEN", 2)
    early: Callable[[], Said] = lambda: open_  # noqa: E731
    if kind == "SHARE_B":
        release = first(world, "RELEASE", 2).signed.message
        entry = share_of_sigma(world, 1, 2)
        early = lambda: say(world, 2, "SHARE_B", release.ctx, release.survivors, [entry])  # noqa: E731
    before = [said for said in world.transcript if said.signed.kind != "RELEASE"]
    releases = [said for said in world.transcript if said.signed.kind == "RELEASE"]
    assert world.profile.t == 3
    wrong = look(world, [*before, *releases[:2], early()])
    assert any("before enough parties released" in line for line in wrong)


def test_two_releases(world: World) -> None:
    release = first(world, "RELEASE", 1).signed.message
    nobody = say(world, 1, "RELEASE", release.ctx, names.bitmap((), N), [])
    fewer = say(world, 1, "RELEASE", release.ctx, names.bitmap((0, 1, 2), N), [])
    for other in (nobody, fewer):
        assert any("party 1 released for" in line for line in look(world, [*world.transcript, other]))
        assert look(world, [*world.transcript, dataclasses.replace(other, honest=False)]) == []


def test_releases_for_two_sets_in_one_group(world: World) -> None:
    at = [
        dataclasses.replace(
            said,
            signed=sign(
                world.keys[said.party],
                said.signed.sid,
                "RELEASE",
                said.party,
                said.signed.message.ctx,
                names.bitmap((0, 1, 2), N),
                [],
            ),
        )
        if said.signed.kind == "RELEASE" and said.party == 1 and said.signed.sid == sid_of(world, 1)
        else said
        for said in world.transcript
    ]
    assert any("party 1 released for" in line for line in look(world, at, pinned=True))
    assert not any("party 1 released for" in line for line in look(world, at))


@pytest.mark.parametrize("kind", ["ADVERTISE", "PREVOTE", "PRECOMMIT", "SCATTER", "RELEASE", "FINAL"])
def test_two_messages_in_one_place(world: World, kind: str) -> None:
    one = first(world, kind, 2)
    change = {"ADVERTISE": "hb", "SCATTER": "digest", "RELEASE": "ctx", "FINAL": "ctx"}.get(kind, "id")
    message = msgspec.structs.replace(one.signed.message, **{change: bytes(32)})
    other = say(world, 2, kind, *msgspec.structs.astuple(message)[4:])
    where = f"a second {kind} in the place of another"
    assert any(where in line for line in look(world, [*world.transcript, other]))
    assert look(world, [*world.transcript, dataclasses.replace(other, honest=False)]) == []
    assert look(world, [*world.transcript, one]) == [], "the same again is nothing"


def test_an_instance_is_what_its_name_says(world: World) -> None:
    (ask, *_) = world.asked.values()
    assert world._instances()[sid_of(world, 1)] == Instance(ask.group, 1, False)


def test_a_vector_masked_again_before_enough_have_released_for_nobody() -> None:
    liars = {1: Liar(mute=frozenset({"SUM"}))}
    world = World(2, n=5, faults=Faults(liars=liars), sums=[Sum(("fit", 0, 0), "turn", True, 0, 2304)])
    assert not world.run().failures
    releases = [
        said for said in world.transcript if said.signed.kind == "RELEASE" and not any(said.signed.message.survivors)
    ]
    assert len(releases) == 5, "the first instance was aborted"
    for late, wrong in ((0, False), (1, False), (2, True)):  # t is 4
        others = [said for said in world.transcript if said not in releases[:late]]
        found = look(world, [*others, *releases[:late]], pinned=True)
        assert any("masked its vector again before t released for nobody" in line for line in found) == wrong
