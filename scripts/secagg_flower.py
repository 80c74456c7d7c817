"""One round of Flower's SecAgg+ in one process, by Flower's own functions: the other side of bench_secagg.py.

It runs in an environment of its own (requirements-bench.lock). Each line of its input is [n, d, drop]; each line of its
output says how many CPU seconds each stage took, of all clients together and of the server.

Rules
* The functions are Flower's, unmodified, with the defaults of its workflow (clipping 8, 22 bits, ring of 2^32). What
  stands here is what flwr.server.workflow.SecAggPlusWorkflow does around them, without its messages: forwarding,
  adding up, unmasking.
* Parties drop out after they have dealt their shares. The result is checked, as ours is.

Source: flwr 1.41.0, client/mod/secure_aggregation/secaggplus_mod.py and server/workflow/secure_aggregation.
"""

from __future__ import annotations

import importlib
import json
import logging
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import process_time
from typing import Any

import numpy as np
from secagg_case import BITS, CLIP, Case, check, fingerprint, values

logging.disable(logging.CRITICAL)

from flwr.app import ConfigRecord  # noqa: E402
from flwr.common.secure_aggregation.crypto.shamir import combine_shares  # noqa: E402
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key  # noqa: E402
from flwr.common.secure_aggregation.ndarrays_arithmetic import (  # noqa: E402
    factor_extract,
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize  # noqa: E402
from flwr.common.secure_aggregation.secaggplus_constants import Key  # noqa: E402
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen  # noqa: E402
from flwr.compat.common.parameter import bytes_to_ndarray, ndarrays_to_parameters  # noqa: E402
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key  # noqa: E402

client = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
RING = 1 << 32
TARGET = 1 << BITS
WEIGHT = 1000


def run(case: Case) -> dict[str, float]:
    """CPU seconds by stage; those named "server…" are the server's, the others of all clients together."""
    seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        begun = process_time()
        yield
        seconds[stage] += process_time() - begun

    ids = [random.getrandbits(63) for _ in range(case.n)]
    near = {ids[party]: {ids[other] for other in case.neighbours(party)} for party in range(case.n)}
    gone = set(ids[case.n - case.drop :])
    states: dict[int, Any] = {}
    publics: dict[int, list[bytes]] = {}
    settings = {
        Key.SAMPLE_NUMBER: case.n,
        Key.SHARE_NUMBER: case.k,
        Key.THRESHOLD: case.threshold,
        Key.CLIPPING_RANGE: CLIP,
        Key.TARGET_RANGE: TARGET,
        Key.MOD_RANGE: RING,
        Key.MAX_WEIGHT: float(WEIGHT),
    }
    with timed("set-up"):
        for id_ in ids:
            states[id_] = client.SecAggPlusState()
            states[id_].nid = id_
            said = client._setup(states[id_], ConfigRecord(settings))
            publics[id_] = [said[Key.PUBLIC_KEY_1], said[Key.PUBLIC_KEY_2]]
    sources: dict[int, list[int]] = {id_: [] for id_ in ids}
    sealed: dict[int, list[bytes]] = {id_: [] for id_ in ids}
    with timed("shares"):
        for id_ in ids:
            said = client._share_keys(states[id_], {str(other): publics[other] for other in near[id_]})
            for holder, ciphertext in zip(said[Key.DESTINATION_LIST], said[Key.CIPHERTEXT_LIST], strict=True):
                sources[holder].append(id_)
                sealed[holder].append(ciphertext)
    total: Any = None
    for party in case.alive:
        id_, vector = ids[party], values(case, party)
        with timed("masks"):
            received = ConfigRecord({Key.CIPHERTEXT_LIST: sealed[id_], Key.SOURCE_LIST: sources[id_]})
            said = client._collect_masked_vectors(states[id_], received, WEIGHT, ndarrays_to_parameters([vector]))
        with timed("server sum"):
            masked = [bytes_to_ndarray(raw) for raw in said[Key.MASKED_PARAMETERS]]
            total = masked if total is None else parameters_addition(total, masked)
    shares: dict[int, list[bytes]] = {id_: [] for id_ in ids}
    with timed("unmask"):
        for party in case.alive:
            nearby = near[ids[party]]
            asked = {Key.ACTIVE_NODE_ID_LIST: list(nearby - gone), Key.DEAD_NODE_ID_LIST: list(nearby & gone)}
            said = client._unmask(states[ids[party]], ConfigRecord(asked))
            for dealer, share in zip(said[Key.NODE_ID_LIST], said[Key.SHARE_LIST], strict=True):
                shares[dealer].append(share)
    with timed("server unmask"):
        mean = unmask(case, parameters_mod(total, RING), shares, gone, near, publics)
    check(case, mean)
    return dict(seconds)


def unmask(
    case: Case,
    total: Any,
    shares: dict[int, list[bytes]],
    gone: set[int],
    near: dict[int, set[int]],
    publics: dict[int, list[bytes]],
) -> Any:
    """SecAggPlusWorkflow.unmask_stage."""
    for dealer, held in shares.items():
        secret = combine_shares(held)
        if dealer not in gone:
            total = parameters_subtraction(total, pseudo_rand_gen(secret, RING, get_parameters_shape(total)))
            continue
        for other in near[dealer] - {dealer}:
            key = generate_shared_key(bytes_to_private_key(secret), bytes_to_public_key(publics[other][0]))
            mask = pseudo_rand_gen(key, RING, get_parameters_shape(total))
            total = (parameters_addition if dealer > other else parameters_subtraction)(total, mask)
    factor, total = factor_extract(parameters_mod(total, RING))
    mean = dequantize(total, CLIP, TARGET)[0]
    mean += -(len(case.alive) - 1) * CLIP
    mean *= TARGET / factor
    return mean


def main() -> None:
    for line in sys.stdin:
        case = Case(*json.loads(line))
        print(json.dumps({"fingerprint": fingerprint(case), "seconds": run(case)}), flush=True)


if __name__ == "__main__":
    assert np.dtype("<f4") == np.dtype(np.float32)
    main()
