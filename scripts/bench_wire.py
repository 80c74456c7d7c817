"""Bytes a second between two processes over loopback: fedpeer's Link against trio's TLS 1.3 stream.

Ours is what the daemon uses: TcpNetwork, Noise handshake, Link with its channels, credit, priorities and writer; a
message above one frame's payload is split into frames. The other side of the comparison is trio.SSLStream (TLS 1.3,
certificate made at run time) over the same TCP stream with the same options and reads of the same size. Both sides
send whole messages of the case's size one after the other and stop the clock when the receiver says that it has
everything. The two alternate; the medians count.

    ./scripts/bench wire [--json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import multiprocessing.connection
import ssl
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedpeer.crypto import DhKey, Secret
from fedpeer.errors import SessionError
from fedpeer.network import TcpNetwork
from fedpeer.wire import service
from fedpeer.wire.constants import MAX_PAYLOAD
from fedpeer.wire.session import BATCH

RUNS = 5
CASES = {"64KiB": 64 * 1024, "1MiB": 1024 * 1024}
TOTAL = 512 * 1024 * 1024
NAME = ("bench",)
SERVER, CLIENT = DhKey(Secret(bytes([1]) * 32)), DhKey(Secret(bytes([2]) * 32))


async def receive_ours(stream: trio.abc.Stream, total: int, _certificate: str) -> None:
    link = await service.respond(stream, SERVER, lambda key: key == CLIENT.public)
    received = 0

    async def on_message(_name: service.Name, _header: bytes, payload: memoryview) -> None:
        nonlocal received
        received += len(payload)
        if received == total:
            await link.send(NAME, b"all")

    try:
        await link.run(on_message)
    except SessionError:
        assert received == total


async def send_ours(stream: trio.abc.Stream, message: bytes, total: int, _certificate: str) -> float:
    link = await service.initiate(stream, CLIENT, SERVER.public)
    finished = trio.Event()

    async def on_message(_name: service.Name, _header: bytes, _payload: memoryview) -> None:
        finished.set()

    async def run() -> None:
        try:
            await link.run(on_message)
        except SessionError:
            assert finished.is_set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await link.ping()
        view = memoryview(message)
        begun = trio.current_time()
        for _ in range(total // len(message)):
            for offset in range(0, len(message), MAX_PAYLOAD):
                await link.send(NAME, b"", view[offset : offset + MAX_PAYLOAD], bulk=True)
        await finished.wait()
        seconds = trio.current_time() - begun
        await link.aclose()
    return seconds


class Reading(trio.abc.Stream):
    """The stream under TLS, read in parts as large as ours (trio reads 64 KiB otherwise)."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._stream.receive_some(max_bytes or BATCH)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


async def receive_tls(stream: trio.abc.Stream, total: int, certificate: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate)
    secure = trio.SSLStream(Reading(stream), context, server_side=True, https_compatible=True)
    received = 0
    while received < total:
        received += len(await secure.receive_some(BATCH))
    await secure.send_all(b"all")
    await secure.aclose()


async def send_tls(stream: trio.abc.Stream, message: bytes, total: int, certificate: str) -> float:
    context = ssl.create_default_context(cafile=certificate)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    secure = trio.SSLStream(Reading(stream), context, server_hostname="localhost", https_compatible=True)
    await secure.do_handshake()
    begun = trio.current_time()
    for _ in range(total // len(message)):
        await secure.send_all(message)
    assert await secure.receive_some(BATCH) == b"all"
    seconds = trio.current_time() - begun
    await trio.aclose_forcefully(secure)
    return seconds


SIDES: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
    "ours": (send_ours, receive_ours),
    "peer": (send_tls, receive_tls),
}


def serve(side: str, total: int, certificate: str, pipe: multiprocessing.connection.Connection) -> None:
    """The receiving process: one connection, then it ends."""

    async def main() -> None:
        listener = await TcpNetwork().listen("127.0.0.1:0")
        pipe.send(listener.address)
        stream, _ = await listener.accept()
        await SIDES[side][1](stream, total, certificate)  # type: ignore[misc]

    trio.run(main)


def measure(side: str, size: int, certificate: str) -> float:
    """MB/s of one run."""
    total = TOTAL // size * size
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(side, total, certificate, there))
    process.start()
    address = here.recv()

    async def main() -> float:
        stream = await TcpNetwork().connect(address)
        seconds: float = await SIDES[side][0](stream, bytes(size), total, certificate)  # type: ignore[misc]
        return seconds

    seconds = trio.run(main)
    process.join()
    assert process.exitcode == 0
    return total / seconds / 1e6


def make_certificate(path: Path) -> None:
    """A self-signed certificate for localhost and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true", help="end with one JSON object")
    options = arguments.parse_args()
    cases = []
    print(f"wire: MB/s over loopback, two processes, medians of {RUNS} alternated runs of {TOTAL >> 20} MiB")
    print(f"{'message':>10} {'fedpeer':>10} {'TLS 1.3':>10} {'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        certificate = Path(folder) / "certificate.pem"
        make_certificate(certificate)
        for case, size in CASES.items():
            runs: dict[str, list[float]] = {side: [] for side in SIDES}
            for _ in range(RUNS):
                for side, measured in runs.items():
                    measured.append(measure(side, size, str(certificate)))
            ours, peer = (statistics.median(measured) for measured in runs.values())
            print(f"{case:>10} {ours:>10.0f} {peer:>10.0f} {ours / peer:>8.2f}", flush=True)
            cases.append({"case": case, "ours": round(ours, 1), "peer": round(peer, 1), "ratio": round(ours / peer, 3)})
    if options.json:
        print(json.dumps({"bench": "wire", "cases": cases}))


if __name__ == "__main__":
    main()
