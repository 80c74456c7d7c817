"""Makes wire.json: one session as bytes, for whoever writes the protocol anew. Run it after a change of WIRE_VERSION.

    .venv/bin/python tests/vectors/make_wire.py > tests/vectors/wire.json
"""

from __future__ import annotations

import json

from fedpeer.crypto import DhKey, Secret
from fedpeer.wire.constants import PROLOGUE, PROTOCOL, PSK_UNSET
from fedpeer.wire.noise import Handshake, mac1
from fedpeer.wire.session import Session

keys = {name: bytes([number]) * 32 for number, name in enumerate(("init_static", "resp_static", "init_ephemeral", "resp_ephemeral"), 1)}
dh = {name: DhKey(Secret(secret)) for name, secret in keys.items()}
initiator, responder = (
    Handshake(
        PROTOCOL,
        initiator=prefix == "init",
        ephemeral=dh[f"{prefix}_ephemeral"],
        prologue=PROLOGUE,
        own=dh[f"{prefix}_static"],
        remote=dh["resp_static"].public if prefix == "init" else None,
        psks=[Secret(PSK_UNSET)],
    )
    for prefix in ("init", "resp")
)
first = initiator.write()
responder.read(first)
second = responder.write()
initiator.read(second)
messages = [{"payload": "", "ciphertext": first.hex()}, {"payload": "", "ciphertext": second.hex()}]
out, back = initiator.split()
reply, _ = responder.split()
for cipher, text in ((out, b"from the initiator"), (reply, b"from the responder"), (out, b"")):
    messages.append({"payload": text.hex(), "ciphertext": cipher.seal(text).hex()})

fresh = Handshake(
    PROTOCOL,
    initiator=True,
    ephemeral=dh["init_ephemeral"],
    prologue=PROLOGUE,
    own=dh["init_static"],
    remote=dh["resp_static"].public,
    psks=[Secret(PSK_UNSET)],
)
fresh.write()
fresh.read(second)
session = Session(*fresh.split(), now=0.0)
steps = [
    (1.0, [(("records",), "", "00ff", False), (("mail", "0x0102", 7), "c0ffee", "", False)]),
    (2.0, [(("records",), "02", "", False), (("blob", 1), "01", "ab" * 40, True)]),
    (601.0, [(("records",), "", "after the rekey".encode().hex(), False)]),
]
frames = []
for now, batch in steps:
    for name, header, payload, bulk in batch:
        real = tuple(bytes.fromhex(part[2:]) if str(part).startswith("0x") else part for part in name)
        assert session.send(real, bytes.fromhex(header), bytes.fromhex(payload), bulk=bulk)
    stream = bytes(session.data_to_send(now)).hex()
    frames.append(
        {
            "now": now,
            "send": [dict(zip(("name", "header", "payload", "bulk"), message, strict=True)) for message in batch],
            "stream": stream,
        }
    )

print(
    json.dumps(
        {
            "protocol_name": PROTOCOL,
            "init_prologue": PROLOGUE.hex(),
            "resp_prologue": PROLOGUE.hex(),
            **{name: secret.hex() for name, secret in keys.items()},
            "init_remote_static": dh["resp_static"].public.hex(),
            "init_psks": [PSK_UNSET.hex()],
            "resp_psks": [PSK_UNSET.hex()],
            "handshake_hash": initiator.hash.hex(),
            "mac1": mac1(first, dh["resp_static"].public).hex(),
            "messages": messages,
            "frames": frames,
        },
        indent=1,
    )
)
