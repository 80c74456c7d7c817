"""`fedpeer`, with the stages of scripts/algorithms beside those of the package. A worker is told of them, too.

Nothing else differs from the command that an organization runs: what benches start is the daemon itself.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import fedpeer.algorithms
from fedpeer import cli
from fedpeer.worker import service

STAGES = str(Path(__file__).with_name("algorithms"))
WORKER = (
    *service.COMMAND[:2],
    "-c",
    f"import fedpeer.algorithms as a; a.__path__.append({STAGES!r})\n"
    "import fedpeer.algorithms.bench.vector\n"  # before the worker gives up reading files
    "import fedpeer.worker.main as m; m.main()",
)

if __name__ == "__main__":
    fedpeer.algorithms.__path__.append(STAGES)
    service.WorkerProcess.start = staticmethod(partial(service.WorkerProcess.start, command=WORKER))  # type: ignore[method-assign]
    cli.main()
