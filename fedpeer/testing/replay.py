"""One participant of a stage again, alone, given the answers it was given the first time.

    python -m fedpeer.testing.replay < task > result

The first run recorded them (fedpeer/testing/stages.py); this process runs on what its environment makes an older
processor, and reports the shared state of each turn and the digests of the outputs. Its own parts of sums may differ
in the last bits, that is arithmetic; what it makes of the totals may not.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np

from fedpeer import artifact, codec
from fedpeer.crypto import Secret
from fedpeer.errors import StageError
from fedpeer.peers import AgreeRequest, CheckpointRequest, Keys, Peers, ReceiveRequest, Request, SumRequest, Total
from fedpeer.secure import fixedpoint
from fedpeer.stage import Stage


class Again:
    """The driver of a stage that has a recorded answer to everything."""

    def __init__(self, stage: Stage, answers: Sequence[tuple[str, Any]]) -> None:
        self.stage, self.answers = stage, list(answers)
        self.shared: list[bytes] = []

    def post(self, request: Request) -> None:
        if isinstance(request, CheckpointRequest):
            self.shared.append(pack(dict(request.shared)))

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return [function(item) for item in items]

    def answer(self, request: Any) -> Any:
        if not self.answers:
            raise StageError(f"it asks for more than the first time: {request.tag!r}")
        what, packed = self.answers.pop(0)
        if what != waits_for(request):
            raise StageError(f"it asks for {waits_for(request)} where it asked for {what} the first time")
        value = unpack(packed)
        if isinstance(request, SumRequest):
            layout, _ = fixedpoint.encode(request.values, self.stage.codecs(request.tag), request.chance)
            return Total(fixedpoint.decode(layout, value[0], len(value[1])), value[1])
        return value


def waits_for(request: ReceiveRequest | SumRequest | AgreeRequest) -> str:
    """What the participant waits for with this request, in words."""
    match request:
        case ReceiveRequest(sender, tag):
            return f"{tag!r} of {sender}"
        case SumRequest(tag):
            return f"the others at {tag!r}"
        case AgreeRequest(tag):
            return f"the proposer of {tag!r}"


def run(task: dict[str, Any]) -> dict[str, Any]:
    """The shared states and the digests of the outputs of a participant."""
    stage = _find(task["module"], task["file"], task["name"])
    driver = Again(stage, [(what, packed.tobytes()) for what, packed in task["answers"]])
    params = msgspec.json.decode(task["params"], type=stage.params)
    inputs = {port: artifact.load(kind, data.tobytes()) for port, kind, data in task["inputs"]}
    own, moduli = task["keys"]
    keys = Keys(Secret(own) if own else None, {alias: int.from_bytes(n, "big") for alias, n in moduli})
    coroutine = stage(Peers(driver, task["me"], dict(task["roles"]), task["chance"], keys=keys), params, **inputs)
    answer = None
    while True:
        try:
            request = coroutine.send(answer)
        except StopIteration as end:
            outputs = stage.check_outputs(end.value)
            break
        answer = driver.answer(request)
    digests = {port: artifact.digest(artifact.dump(value)[1]) for port, value in outputs.items() if value is not None}
    return {"shared": [np.frombuffer(state, np.uint8) for state in driver.shared], "digests": digests}


def _find(module: str, file: str, name: str) -> Stage:
    if module.startswith("fedpeer."):
        loaded = importlib.import_module(module)
    else:  # a stage of a test, which may be importable only there
        spec = importlib.util.spec_from_file_location(module, file)
        if spec is None or spec.loader is None:
            raise StageError(f"{file} cannot be loaded")
        loaded = sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    found = attrgetter(name)(loaded)
    assert isinstance(found, Stage), f"{name} in {file} is not a stage"
    return found


# message values in one piece


def pack(value: Any) -> bytes:
    """A message value as one piece of bytes: header and arrays, each after its length."""
    header, buffers = codec.pack_value(value)
    return b"".join(len(part).to_bytes(8, "little") + bytes(part) for part in (header, *buffers))


def split(packed: bytes) -> tuple[bytes, list[memoryview]]:
    """The header and the arrays of `pack`."""
    view, parts = memoryview(packed), []
    while view:
        size = int.from_bytes(view[:8], "little")
        parts.append(view[8 : 8 + size])
        view = view[8 + size :]
    return bytes(parts[0]), parts[1:]


def unpack(packed: bytes) -> Any:
    return codec.unpack_value(*split(packed))


if __name__ == "__main__":
    sys.stdout.buffer.write(pack(run(unpack(sys.stdin.buffer.read()))))
