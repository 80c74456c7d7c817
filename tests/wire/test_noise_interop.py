"""Our link with an independent implementation (PyPI's noiseprotocol) at the other end of a real TCP connection."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import msgpack
import pytest
import trio

noise = pytest.importorskip("noise.connection", reason="noiseprotocol is not installed")

from fedpeer.crypto import DhKey, Secret  # noqa: E402
from fedpeer.errors import SessionError  # noqa: E402
from fedpeer.network import TcpNetwork  # noqa: E402
from fedpeer.wire import service  # noqa: E402

OURS, THEIRS = bytes([1]) * 32, bytes([2]) * 32
NAME = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2b"


def label(parts: bytes, *, key: bytes = b"", size: int = 32) -> bytes:
    return hashlib.blake2b(
        struct.pack("<Q", len(parts)) + parts, digest_size=size, key=key, person=b"fp.lk.mac1".ljust(16, b"\0")
    ).digest()


def other(*, initiator: bool, remote: bytes | None = None, ephemeral: bytes | None = None) -> noise.NoiseConnection:  # type: ignore[name-defined]
    connection = noise.NoiseConnection.from_name(NAME)
    connection.set_prologue(b"fedpeer\x01")
    connection.set_psks(psks=[bytes(32)])
    (connection.set_as_initiator if initiator else connection.set_as_responder)()
    connection.set_keypair_from_private_bytes(noise.Keypair.STATIC, THEIRS)
    if ephemeral is not None:
        connection.set_keypair_from_private_bytes(noise.Keypair.EPHEMERAL, ephemeral)
    if remote is not None:
        connection.set_keypair_from_public_bytes(noise.Keypair.REMOTE_STATIC, remote)
    connection.start_handshake()
    return connection


async def receive(stream: trio.abc.Stream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = await stream.receive_some(size - len(data))
        assert part, "the connection ended"
        data += part
    return data


async def receive_message(stream: trio.abc.Stream) -> bytes:
    return await receive(stream, int.from_bytes(await receive(stream, 2), "big"))


async def send_message(stream: trio.abc.Stream, message: bytes) -> None:
    await stream.send_all(len(message).to_bytes(2, "big") + message)


def frame(head: list[object], payload: bytes = b"") -> bytes:
    packed = msgpack.packb(head)
    return bytes([len(packed)]) + packed + payload


async def talk(stream: trio.abc.Stream, connection: noise.NoiseConnection, link: service.Link) -> None:  # type: ignore[name-defined]
    """Data both ways, a ping each way, and a rekey, as the other implementation sees them."""
    came = []

    async def on_message(name: service.Name, header: bytes, payload: memoryview) -> None:
        came.append((name, header, bytes(payload)))

    async def run() -> None:
        with pytest.raises(SessionError):
            await link.run(on_message)

    async def theirs() -> list[object]:
        plain = connection.decrypt(await receive_message(stream))
        head = msgpack.unpackb(plain[1 : 1 + plain[0]])
        return [*head, bytes(plain[1 + plain[0] :])] if head[0] == 0 else head

    assert connection.get_handshake_hash() == link.handshake_hash
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            assert await theirs() == ([3] if link.initiator else [4])  # our first ping; the answer to theirs
            await send_message(stream, connection.encrypt(frame([4] if link.initiator else [3])))
            if not link.initiator:
                assert await theirs() == [4]
            await link.send(("records",), b"header", b"x" * 65280)
            number = (await theirs())[1]
            assert await theirs() == [0, number, b"header", b"x" * 65280]
            for message in (
                frame([1, 0, ["mail", b"\x01", 7]]),
                frame([0, 0, b"h"], b"payload" * 9000),
                frame([5]),
            ):
                await send_message(stream, connection.encrypt(message))
            connection.noise_protocol.cipher_state_encrypt.rekey()
            await send_message(stream, connection.encrypt(frame([0, 0, b"rekeyed"])))
            while len(came) < 2:
                await trio.lowlevel.checkpoint()
            assert came == [(("mail", b"\x01", 7), b"h", b"payload" * 9000), (("mail", b"\x01", 7), b"rekeyed", b"")]
            await link.aclose()


async def test_the_other_implementation_dials_us() -> None:
    ours = DhKey(Secret(OURS))
    listener = await TcpNetwork().listen("127.0.0.1:0")
    stream = await TcpNetwork().connect(listener.address)
    accepted, _ = await listener.accept()
    connection = other(initiator=True, remote=ours.public)
    links: list[service.Link] = []

    async def respond() -> None:
        links.append(await service.respond(accepted, ours, lambda key: key == DhKey(Secret(THEIRS)).public))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(respond)
        message = bytes(connection.write_message())
        await send_message(stream, message + label(message, key=label(ours.public), size=16))
        connection.read_message(await receive_message(stream))
        await send_message(stream, connection.encrypt(frame([3])))
    await talk(stream, connection, links[0])
    await stream.aclose()
    await listener.aclose()


async def test_we_dial_the_other_implementation() -> None:
    listener = await TcpNetwork().listen("127.0.0.1:0")
    stream = await TcpNetwork().connect(listener.address)
    accepted, _ = await listener.accept()
    connection = other(initiator=False)
    links: list[service.Link] = []

    async def initiate() -> None:
        links.append(await service.initiate(stream, DhKey(Secret(OURS)), DhKey(Secret(THEIRS)).public))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(initiate)
        first = await receive_message(accepted)
        message, mac = first[:-16], first[-16:]
        assert mac == label(message, key=label(DhKey(Secret(THEIRS)).public), size=16)
        connection.read_message(message)
        await send_message(accepted, bytes(connection.write_message()))
    await talk(accepted, connection, links[0])
    await accepted.aclose()
    await listener.aclose()


def test_the_other_implementation_agrees_with_our_own_vectors() -> None:
    vector = json.loads((Path(__file__).resolve().parent.parent / "vectors" / "wire.json").read_text())
    assert vector["resp_static"] == THEIRS.hex()
    connection = other(initiator=False, ephemeral=bytes.fromhex(vector["resp_ephemeral"]))
    first, second, *transport = vector["messages"]
    connection.read_message(bytes.fromhex(first["ciphertext"]))
    assert bytes(connection.write_message()).hex() == second["ciphertext"]
    assert connection.get_handshake_hash().hex() == vector["handshake_hash"]
    assert bytes(connection.decrypt(bytes.fromhex(transport[0]["ciphertext"]))).hex() == transport[0]["payload"]
    assert bytes(connection.encrypt(bytes.fromhex(transport[1]["payload"]))).hex() == transport[1]["ciphertext"]
