"""One of the others in bench_paillier.py: `paillier_peers.py fate | heu`, each in an environment of its own.

Each line of its input is the name of a case; each line of its output says how many CPU seconds an operation took. Every
result is decrypted and compared with that of the plaintexts. Both run as their own projects call them: FATE's Rust
(fate_utils, fixed-point floats as in FATE 2, obfuscated; "integers" where that is faster), HEU's ZPaillier.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import process_time
from typing import Any

import numpy as np

BITS = 2048
COUNT = 256
ENCRYPTED = 64
ROWS = 512
COLUMNS = 8
SCALE = 1 << 20
CHANCE = np.random.default_rng(7)
VECTOR = CHANCE.normal(size=ROWS)
MATRIX = CHANCE.normal(size=(COLUMNS, ROWS))
WHOLE_VECTOR, WHOLE_MATRIX = (np.rint(values * SCALE).astype(np.int64) for values in (VECTOR, MATRIX))


def timed(action: Callable[[], Any], operations: int, times: int = 1) -> tuple[float, Any]:
    """CPU seconds of one of the operations that the action does, and what it gives."""
    begun = process_time()
    for _ in range(times):
        result = action()
    return (process_time() - begun) / (operations * times), result


def fate() -> Callable[[str], float]:
    from fate_utils import paillier  # type: ignore[import-not-found]

    secret, public, coder = paillier.keygen(BITS)
    codecs = {
        "integers": (coder.encode_i64_vec, coder.decode_i64_vec, WHOLE_VECTOR, WHOLE_MATRIX),
        "floats": (coder.encode_f64_vec, coder.decode_f64_vec, VECTOR, MATRIX),
    }
    encrypted = {
        kind: [public.encrypt_encoded(encode(part.copy()), True) for part in (vector, vector[:COUNT], vector[COUNT:])]
        for kind, (encode, _, vector, _) in codecs.items()
    }

    def run(case: str) -> float:
        kind = "integers" if case.endswith("integers") else "floats"
        (encode, decode, vector, matrix), (whole, first, second) = codecs[kind], encrypted[kind]
        if case.startswith("encrypt"):
            encoded = encode(vector[:ENCRYPTED].copy())
            seconds, found = timed(lambda: public.encrypt_encoded(encoded, True), ENCRYPTED)
            wanted = vector[:ENCRYPTED]
        elif case.startswith("add"):
            seconds, found = timed(lambda: first.add(public, second), COUNT, 20)
            wanted = vector[:COUNT] + vector[COUNT:]
        else:
            factors = encode(matrix.reshape(-1))
            shapes = [ROWS, 1], [COLUMNS, ROWS]  # of what is encrypted, and of what stands to the left of it
            seconds, found = timed(lambda: whole.rmatmul(public, factors, *shapes), ROWS * COLUMNS)
            wanted = matrix @ vector
        assert np.allclose(decode(secret.decrypt_to_encoded(found)), wanted, rtol=1e-9, atol=1e-9)
        return seconds

    return run


def heu() -> Callable[[str], float]:
    from heu import numpy as hnp  # type: ignore[import-not-found]
    from heu import phe  # type: ignore[import-not-found]

    kit = hnp.setup(phe.SchemaType.ZPaillier, BITS)
    encryptor, evaluator, decryptor = kit.encryptor(), kit.evaluator(), kit.decryptor()

    def run(case: str) -> float:
        if case == "encrypt":
            plain = kit.array(WHOLE_VECTOR)
            seconds, found = timed(lambda: encryptor.encrypt(plain), ROWS)
            wanted = WHOLE_VECTOR
        else:
            ciphertexts, factors = encryptor.encrypt(kit.array(WHOLE_VECTOR)), kit.array(WHOLE_MATRIX)
            seconds, found = timed(lambda: evaluator.matmul(factors, ciphertexts), ROWS * COLUMNS)
            wanted = WHOLE_MATRIX @ WHOLE_VECTOR
        assert np.array_equal(decryptor.decrypt(found).to_numpy(), wanted)
        return seconds

    return run


def main() -> None:
    run = {"fate": fate, "heu": heu}[sys.argv[1]]()
    for line in sys.stdin:
        print(run(line.strip()), flush=True)


if __name__ == "__main__":
    main()
