"""The door: who is let in, what a stranger learns (nothing), and what everything else ends in (HandshakeError)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import pytest
import trio

from fedpeer.crypto import DhKey, Secret
from fedpeer.errors import HandshakeError
from fedpeer.testing.network import MemoryNetwork
from fedpeer.wire import service
from fedpeer.wire.constants import HANDSHAKE_S, MAX_UNAUTHENTICATED, MESSAGE_1_BYTES, PROLOGUE, PROTOCOL, PSK_UNSET
from fedpeer.wire.noise import Handshake, mac1
from fedpeer.wire.service import Link

ALICE, BOB = DhKey(Secret(bytes([1]) * 32)), DhKey(Secret(bytes([2]) * 32))


async def streams() -> tuple[trio.abc.Stream, trio.abc.Stream]:
    network = MemoryNetwork()
    listener = await network.host("bob").listen("bob:7420")
    dialled = await network.host("alice").connect("bob:7420")
    accepted, source = await listener.accept()
    assert source == "alice"
    return dialled, accepted


def first_message(*, prologue: bytes = PROLOGUE, to: DhKey = BOB, by: DhKey = ALICE) -> bytes:
    handshake = Handshake(
        PROTOCOL,
        initiator=True,
        ephemeral=DhKey.random(),
        prologue=prologue,
        own=by,
        remote=to.public,
        psks=[Secret(PSK_UNSET)],
    )
    message = handshake.write()
    return framed(message + mac1(message, to.public))


def framed(message: bytes) -> bytes:
    return len(message).to_bytes(2, "big") + message


async def door(data: bytes, *, end: bool = True, admit: Callable[[bytes], bool] = lambda _: True) -> tuple[str, bytes]:
    """What bob says of these bytes (the message of the refusal), and every byte that he sent."""
    dialled, accepted = await streams()
    said: list[str] = []

    async def respond() -> None:
        with pytest.raises(HandshakeError) as refused:
            await service.respond(accepted, BOB, admit)
        said.append(refused.value.message)

    answer = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(respond)
        try:
            await dialled.send_all(data)
            if end:
                await dialled.send_eof()  # type: ignore[attr-defined]
            while part := await dialled.receive_some():
                answer += part
        except trio.BrokenResourceError:
            pass
    with pytest.raises(trio.ClosedResourceError):
        await accepted.receive_some()
    return said[0], bytes(answer)


async def test_two_who_know_each_other_agree_a_session(autojump_clock: Any) -> None:
    dialled, accepted = await streams()
    links: dict[str, Link] = {}

    async def keep(name: str, agreeing: Awaitable[Link]) -> None:
        links[name] = await agreeing

    for psk in (None, Secret(bytes([9]) * 32)):
        dialled, accepted = await streams()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep, "alice", service.initiate(dialled, ALICE, BOB.public, psk=psk))
            nursery.start_soon(keep, "bob", service.respond(accepted, BOB, lambda key: key == ALICE.public, psk=psk))
        alice, bob = links["alice"], links["bob"]
        assert (alice.remote, bob.remote) == (BOB.public, ALICE.public)
        assert (alice.initiator, bob.initiator) == (True, False)
        assert alice.handshake_hash == bob.handshake_hash
        assert len(alice.handshake_hash) == 64
        assert (alice.bytes_sent, alice.bytes_received) == (bob.bytes_received, bob.bytes_sent)
        assert ALICE._secret.reveal().hex() not in repr(alice)


async def test_a_stranger_gets_not_one_byte(autojump_clock: Any) -> None:
    message, answer = await door(first_message(), admit=lambda _: False)
    assert (answer, "not known here" in message) == (b"", True)
    message, answer = await door(first_message()[:-1] + b"\x00")  # mac1
    assert (answer, "does not know our key" in message) == (b"", True)
    message, answer = await door(first_message(to=ALICE))  # whoever does not know bob's key
    assert (answer, "does not know our key" in message) == (b"", True)


async def test_whatever_else_comes_is_one_counted_refusal_and_no_byte(autojump_clock: Any, seed: int) -> None:
    random = Random(seed)
    good = first_message()
    refusals: Counter[str] = Counter()
    inputs = [b"", b"\x00", b"GET / HTTP/1.1\r\n\r\n", framed(b""), framed(random.randbytes(MESSAGE_1_BYTES))]
    inputs += [good[:size] for size in range(1, len(good), 7)]
    inputs += [framed(random.randbytes(size)) for size in (1, MESSAGE_1_BYTES - 1, MESSAGE_1_BYTES + 1, 513, 65535)]
    inputs += [random.randbytes(random.randrange(200)) for _ in range(50)]
    inputs.append(first_message(prologue=b"fedpeer\x02"))
    for low in (bytes(32), bytes([1]) + bytes(31)):
        message = low + good[34:-16]
        inputs.append(framed(message + mac1(message, BOB.public)))
    for _ in range(100):
        changed = bytearray(good)
        changed[random.randrange(len(good))] ^= 1 << random.randrange(8)
        inputs.append(bytes(changed))
        message = bytes(changed[2:-16])
        inputs.append(framed(message + mac1(message, BOB.public)) if message != good[2:-16] else b"")
    for data in inputs:
        message, answer = await door(data)
        assert answer == b""
        refusals[message] += 1
    assert sum(refusals.values()) == len(inputs)
    assert len(refusals) <= 4, refusals  # a short list of reasons, none of which repeats what came


async def test_no_message_before_authentication_is_larger_than_512_bytes(autojump_clock: Any) -> None:
    assert len(first_message()) <= MAX_UNAUTHENTICATED
    dialled, accepted = await streams()
    await dialled.send_all(b"\xff\xff" + bytes(10_000))
    with pytest.raises(HandshakeError, match="length"):
        await service.respond(accepted, BOB, lambda _: True)


async def test_a_repeated_first_message_never_becomes_a_link(autojump_clock: Any) -> None:
    """It is answered, as it must be, but without the ephemeral key nobody makes a frame from the answer."""
    recorded = first_message()
    for after in (b"", framed(bytes(40)), recorded):
        message, answer = await door(recorded + after)
        assert len(answer) == 2 + 48
        assert "handshake" in message or "frame" in message


async def test_who_says_nothing_is_sent_away_after_five_seconds(autojump_clock: Any) -> None:
    begun = trio.current_time()
    message, answer = await door(first_message()[:60], end=False)
    assert trio.current_time() - begun == HANDSHAKE_S
    assert (answer, "5 seconds" in message) == (b"", True)
    dialled, _ = await streams()
    with pytest.raises(HandshakeError, match="5 seconds"):
        await service.initiate(dialled, ALICE, BOB.public)


@pytest.mark.parametrize(
    "answer", [b"", framed(b""), framed(bytes(48)), framed(b"\xff" * 48), framed(bytes(49)), b"\x00"]
)
async def test_an_answer_that_is_none_is_refused_by_who_dialled(answer: bytes, autojump_clock: Any) -> None:
    dialled, accepted = await streams()
    if answer:
        await accepted.send_all(answer)
    await accepted.send_eof()  # type: ignore[attr-defined]
    with pytest.raises(HandshakeError):
        await service.initiate(dialled, ALICE, BOB.public)
    with pytest.raises(trio.ClosedResourceError):
        await dialled.receive_some()


async def test_a_peer_with_a_key_of_low_order_cannot_be_dialled(autojump_clock: Any) -> None:
    dialled, _ = await streams()
    with pytest.raises(HandshakeError):
        await service.initiate(dialled, ALICE, bytes(32))


async def test_another_psk_on_each_side_is_refused_by_who_dialled(autojump_clock: Any) -> None:
    dialled, accepted = await streams()

    async def respond() -> None:
        with pytest.raises(HandshakeError):
            await service.respond(accepted, BOB, lambda _: True, psk=Secret(bytes([8]) * 32))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(respond)
        with pytest.raises(HandshakeError):
            await service.initiate(dialled, ALICE, BOB.public, psk=Secret(bytes([9]) * 32))


@pytest.mark.parametrize("position", range(0, 200, 9))
async def test_a_connection_cut_anywhere_in_the_handshake_is_a_refusal_or_an_ended_session(
    position: int, autojump_clock: Any
) -> None:
    for there in (True, False):
        network = MemoryNetwork(random=Random(position))
        network.limits = lambda _from, _to, there=there: (position, None) if there else (None, position)  # type: ignore[misc]
        listener = await network.host("bob").listen("bob:7420")
        outcomes: list[str] = []

        async def run(agreeing: Awaitable[Link], outcomes: list[str] = outcomes) -> None:
            try:
                link = await agreeing
                await link.aclose()
                outcomes.append("link")
            except HandshakeError:
                outcomes.append("refused")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                run, service.initiate(await network.host("alice").connect("bob:7420"), ALICE, BOB.public)
            )
            stream, _ = await listener.accept()
            nursery.start_soon(run, service.respond(stream, BOB, lambda _: True))
        assert len(outcomes) == 2
        assert ("refused" in outcomes) == (position < (135 if there else 50))  # so many bytes go each way
