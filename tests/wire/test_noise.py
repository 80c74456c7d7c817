"""The Noise engine against public vectors, our own, and whatever else may come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeer.crypto import DhKey, Secret
from fedpeer.errors import HandshakeError, LocalProtocolError, RemoteProtocolError, TrustError
from fedpeer.wire.constants import PROLOGUE, PROTOCOL, PSK_UNSET
from fedpeer.wire.noise import Cipher, Handshake, mac1
from fedpeer.wire.session import MAX_FRAME, Session

VECTORS = Path(__file__).resolve().parent.parent / "vectors"
# Points whose product with every scalar is zero (RFC 7748, section 6.1; libsodium's list).
LOW_ORDER = [
    bytes(32),
    bytes([1]) + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
]


def key(vector: dict[str, Any], name: str) -> DhKey | None:
    return DhKey(Secret(bytes.fromhex(vector[name]))) if vector.get(name) else None


def side(vector: dict[str, Any], prefix: str) -> Handshake:
    remote = vector.get(f"{prefix}_remote_static")
    psks = vector.get(f"{prefix}_psks") or ([vector[f"{prefix}_psk"]] if vector.get(f"{prefix}_psk") else [])
    return Handshake(
        vector["protocol_name"],
        initiator=prefix == "init",
        ephemeral=key(vector, f"{prefix}_ephemeral") or DhKey.random(),
        prologue=bytes.fromhex(vector[f"{prefix}_prologue"]),
        own=key(vector, f"{prefix}_static"),
        remote=bytes.fromhex(remote) if remote else None,
        psks=[Secret(bytes.fromhex(psk)) for psk in psks],
    )


def check(vector: dict[str, Any]) -> None:
    """Both sides make, and understand, exactly the vector's messages."""
    initiator, responder = side(vector, "init"), side(vector, "resp")
    one_way = vector["protocol_name"].split("_")[1].rstrip("psk0123456789") in ("N", "K", "X")
    ciphers = None
    for turn, message in enumerate(vector["messages"]):
        payload, expected = bytes.fromhex(message["payload"]), bytes.fromhex(message["ciphertext"])
        forward = turn % 2 == 0 or one_way
        if not initiator.finished:
            sender, receiver = (initiator, responder) if forward else (responder, initiator)
            assert sender.write(payload) == expected
            assert receiver.read(expected) == payload
            continue
        if ciphers is None:
            assert initiator.hash == responder.hash
            if "handshake_hash" in vector:
                assert initiator.hash.hex() == vector["handshake_hash"]
            ciphers = (initiator.split(), responder.split())
        seal, open_ = (ciphers[0][0], ciphers[1][1]) if forward else (ciphers[1][0], ciphers[0][1])
        assert seal.seal(payload) == expected
        assert open_.open(expected) == payload
    assert ciphers is not None, "the vector has no transport message"


def test_every_public_vector_passes(shared: Path) -> None:
    checked = 0
    for file in sorted((shared / "vectors" / "noise").glob("*.json")):
        for vector in json.loads(file.read_text())["vectors"]:
            check(vector)
            checked += 1
    assert checked == 135


def test_our_own_vectors_pass() -> None:
    """Handshake, mac1, frames and rekey as bytes; made by make_wire.py, checked against noiseprotocol elsewhere."""
    vector = json.loads((VECTORS / "wire.json").read_text())
    assert vector["protocol_name"] == PROTOCOL
    assert vector["init_prologue"] == PROLOGUE.hex()
    check(vector)
    first = bytes.fromhex(vector["messages"][0]["ciphertext"])
    responder = bytes.fromhex(vector["init_remote_static"])
    assert mac1(first, responder).hex() == vector["mac1"]


def test_our_own_frames_are_the_bytes_of_the_vector() -> None:
    vector = json.loads((VECTORS / "wire.json").read_text())
    initiator, responder = side(vector, "init"), side(vector, "resp")
    responder.read(initiator.write())
    initiator.read(responder.write())
    sender, receiver = Session(*initiator.split(), now=0.0), Session(*responder.split(), now=0.0)
    for step in vector["frames"]:
        for message in step["send"]:
            name = tuple(bytes.fromhex(part[2:]) if str(part).startswith("0x") else part for part in message["name"])
            assert sender.send(
                name, bytes.fromhex(message["header"]), bytes.fromhex(message["payload"]), bulk=message["bulk"]
            )
        sealed = bytes(sender.data_to_send(step["now"]))
        assert sealed.hex() == step["stream"]
        receiver.buffer[: len(sealed)] = sealed
        came = receiver.received(len(sealed), step["now"])
        assert [(e.header.hex(), bytes(e.payload).hex()) for e in came] == [
            (m["header"], m["payload"]) for m in step["send"]
        ]  # type: ignore[union-attr]


def pair(psk: bytes = PSK_UNSET, bob: DhKey | None = None) -> tuple[Handshake, Handshake]:
    alice, bob = DhKey.random(), bob or DhKey.random()
    common: dict[str, Any] = {"prologue": PROLOGUE, "psks": [Secret(psk)]}
    return (
        Handshake(PROTOCOL, initiator=True, ephemeral=DhKey.random(), own=alice, remote=bob.public, **common),
        Handshake(PROTOCOL, initiator=False, ephemeral=DhKey.random(), own=bob, **common),
    )


def test_each_changed_bit_of_a_handshake_is_refused() -> None:
    bob = DhKey.random()
    first = pair(bob=bob)[0].write()
    for bit in range(8 * len(first)):
        changed = bytearray(first)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(HandshakeError):
            pair(bob=bob)[1].read(changed)
    for bit in range(0, 8 * 48, 7):
        initiator, responder = pair()
        responder.read(initiator.write())
        second = bytearray(responder.write())
        second[bit // 8] ^= 1 << bit % 8
        with pytest.raises(HandshakeError):
            initiator.read(second)


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda point: point.hex()[:8])
def test_points_of_low_order_are_refused(point: bytes) -> None:
    initiator, responder = pair()
    first = initiator.write()
    with pytest.raises(HandshakeError):
        responder.read(point + first[32:])
    initiator, responder = pair()
    responder.read(initiator.write())
    with pytest.raises(HandshakeError):
        initiator.read(point + responder.write()[32:])


@given(st.binary(max_size=600))
def test_garbage_is_refused_and_never_an_exception_of_another_kind(garbage: bytes) -> None:
    initiator, responder = pair()
    with pytest.raises(HandshakeError):
        responder.read(garbage)
    with pytest.raises(LocalProtocolError):
        responder.read(garbage)  # a handshake that failed is over
    initiator.write()
    with pytest.raises(HandshakeError):
        initiator.read(garbage)


def test_another_prologue_or_key_between_them_is_refused() -> None:
    initiator, responder = pair()
    other = Handshake(
        PROTOCOL,
        initiator=False,
        ephemeral=DhKey.random(),
        prologue=b"fedpeer\x02",
        own=responder._own,
        psks=[Secret(PSK_UNSET)],
    )
    with pytest.raises(HandshakeError):
        other.read(initiator.write())
    initiator, responder = pair()
    responder._psks = [Secret(bytes([1]) * 32)]
    responder.read(initiator.write())
    with pytest.raises(HandshakeError):
        initiator.read(responder.write())


def test_messages_out_of_turn_are_our_own_fault() -> None:
    initiator, responder = pair()
    with pytest.raises(LocalProtocolError):
        responder.write()
    with pytest.raises(LocalProtocolError):
        initiator.split()
    with pytest.raises(LocalProtocolError):
        Handshake("Noise_IKpsk2_448_ChaChaPoly_BLAKE2b", initiator=True, ephemeral=DhKey.random())


def test_a_rekeyed_cipher_goes_on_and_the_old_key_opens_nothing() -> None:
    sender, receiver, old = (Cipher(bytes(32)) for _ in range(3))
    first = sender.seal(b"one")
    assert receiver.open(first) == old.open(first) == b"one"
    sender.rekey()
    receiver.rekey()
    second = sender.seal(b"two")
    assert receiver.open(second) == b"two"
    with pytest.raises(TrustError):
        old.open(second)


def test_nothing_secret_is_in_a_repr() -> None:
    secret = bytes(range(32))
    initiator, _ = pair(secret)
    shown = repr(vars(initiator)) + repr(Cipher(secret)._key) + str(initiator)
    assert secret.hex() not in shown
    assert repr(secret) not in shown


def test_a_frame_before_its_time_is_refused_by_the_session() -> None:
    session = Session(Cipher(bytes(32)), Cipher(bytes(32)), now=0.0)
    session.buffer[:MAX_FRAME] = b"\xff" * MAX_FRAME
    with pytest.raises(RemoteProtocolError):
        session.received(MAX_FRAME, 0.0)
