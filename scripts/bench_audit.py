"""How long a million entries take to verify: an exported log, as `fedpeer audit verify FILE` does it offline.

The file is written here as `fedpeer audit export` would, with a head that is signed and co-signed every 1,000 entries;
appending to the store is measured for 20,000 entries in one transaction. Target: 10^6 entries verify within 30 s.

    ./scripts/bench audit [--json] [--entries N]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from fedpeer import codec
from fedpeer.crypto import Secret
from fedpeer.governance import audit, export, heads, tree
from fedpeer.governance.heads import Cosign, SignedHead
from fedpeer.identity import Identity
from fedpeer.mesh import records
from fedpeer.store import Store

APPENDED = 20_000
SIGNED_EVERY = 1_000
JOB = bytes(32)
TIME = "2026-01-01T00:00:00.000+00:00"
FACTS = {"stage": "fit", "done": 17, "of": 50, "metrics": {"loss": 0.12345, "auc": 0.912}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--entries", type=int, default=10**6)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), given.entries)
    if given.json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name:16} {value:,}" for name, value in figures.items()))


def measure(folder: Path, entries: int) -> dict[str, Any]:
    start = time.perf_counter()
    store = Store(folder, [audit.SCHEMA])
    store.write_now(lambda tx: [audit.append(tx, TIME, "progress", JOB, FACTS) for _ in range(APPENDED)])
    appended = time.perf_counter()
    file = folder / "log"
    write(file, entries)
    written = time.perf_counter()
    with file.open("rb") as opened:
        (log,) = export.verify([(str(file), opened)])
    verified = time.perf_counter()
    assert (log.entries, log.signed) == (entries, entries)
    return {
        "entries": entries,
        "append_us": round((appended - start) / APPENDED * 1e6, 1),
        "verify_s": round(verified - written, 1),
        "file_bytes": file.stat().st_size,
    }


def write(file: Path, entries: int) -> None:
    owner, partner = Identity(Secret(b"owner".ljust(32))), Identity(Secret(b"partner".ljust(32)))
    log, statements = tree.Growing(), []

    def signed(signer: Identity, kind: str, body: codec.Record) -> bytes:
        scope = log.number.to_bytes(32, "little")
        return records.sign(signer.signing, records.Record(scope, kind, "0", signer.id, codec.encode(body))).raw

    with (file.with_suffix(".entries")).open("wb") as opened:
        for number in range(1, entries + 1):
            body = codec.encode(audit.Entry(number, TIME, "progress", JOB, FACTS, bytes(16)))
            nodes = b"".join(log.add(tree.leaf(number, body)))
            opened.write(export.lines([export.Line(number=number, entry=body, nodes=nodes)]))
            if number % SIGNED_EVERY == 0:
                root = log.root()
                statements.append(export.Line(head=signed(owner, heads.HEAD, SignedHead(number, root, 0))))
                cosign = Cosign(((owner.id, number, root),))
                statements.append(export.Line(cosign=signed(partner, heads.COSIGN, cosign)))
    cards = [export.Line(card=owner.card("owner").text), export.Line(card=partner.card("partner").text)]
    with file.open("wb") as whole, file.with_suffix(".entries").open("rb") as opened:
        whole.write(export.lines([export.Line(fedpeer_audit=1, owner=owner.id), *cards, *statements]))
        shutil.copyfileobj(opened, whole)


if __name__ == "__main__":
    main()
