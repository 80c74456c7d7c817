"""One party of SecretFlow's private set intersection (the package spu), unmodified: a file in, a file out.

    psi_spu.py RANK PROTOCOL PORT IN OUT      says "ready", waits for a line, and says the seconds

Run by bench_psi.py, in an environment of its own.
"""

import os
import sys
import time

from spu import libspu, psi


def main() -> None:
    rank, protocol, port, source, target = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5]
    about = libspu.link.Desc()
    about.recv_timeout_ms = 600_000
    about.add_party("a", f"127.0.0.1:{port}")
    about.add_party("b", f"127.0.0.1:{port + 1}")
    link = libspu.link.create_brpc(about, rank)
    how = psi.PsiProtocolConfig(
        protocol=getattr(psi.PsiProtocol, f"PROTOCOL_{protocol}"), receiver_rank=0, broadcast_result=True
    )
    if protocol == "ECDH":
        how.ecdh_params = psi.EcdhParams(curve=psi.EllipticCurveType.CURVE_25519)
    config = psi.PsiExecuteConfig(
        protocol_conf=how,
        input_params=psi.InputParams(path=source, selected_keys=["id"], keys_unique=True),
        output_params=psi.OutputParams(path=target),
    )
    print("ready", flush=True)
    sys.stdin.readline()
    begun = time.perf_counter()
    psi.psi_execute(config, link)
    print(time.perf_counter() - begun, flush=True)
    os._exit(0)  # brpc's threads do not end by themselves


main()
