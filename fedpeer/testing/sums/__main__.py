"""Many seeds, and a table of what was injected and how it ended.

    python -m fedpeer.testing.sums --seeds 1000 [--first K]     seeds K, K+1, …; exit 1 if one of them fails
        --stop                                                  no more seeds once one has failed
        --calm                                                  without faults, and only the totals are looked at
    python -m fedpeer.testing.sums --seed S                     one seed, and everything about it

A seed that fails prints the command that repeats it. The whole run fails, too, if it injected less than it claims to,
or if of the sums that are promised a result fewer than 95 % had one.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from concurrent.futures import ProcessPoolExecutor

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedpeer.testing.sums.faults import CLAIMS
from fedpeer.testing.sums.tally import Tally, command, simulate, simulate_calm


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="./scripts/test sim", description="Secure sums under simulated faults.")
    parser.add_argument("--seeds", type=int, default=1000, metavar="N", help="so many seeds (default 1000)")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="the first of them (default 0)")
    parser.add_argument("--seed", type=int, metavar="S", help="this one only, with everything about it")
    parser.add_argument("--stop", action="store_true", help="no more seeds once one has failed")
    parser.add_argument("--calm", action="store_true", help="without faults; only the totals are looked at")
    chosen = parser.parse_args(arguments)
    console = Console()
    if chosen.seed is not None:
        return _one(chosen.seed, console)
    tally = Tally()
    bar = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[failed]} failed")
    seeds = range(chosen.first, chosen.first + chosen.seeds)
    # A world is short and small: its garbage can wait.
    pools = ProcessPoolExecutor(os.cpu_count(), initializer=gc.set_threshold, initargs=(50_000,))
    with pools as pool, Progress(*bar, console=console) as progress:
        task = progress.add_task("", total=len(seeds), failed=0)
        for outcome in pool.map(simulate_calm if chosen.calm else simulate, seeds, chunksize=4):
            tally.add(outcome)
            for failure in outcome.failures[:3]:
                progress.console.print(f"seed {outcome.seed}: {failure}", style="red", markup=False, soft_wrap=True)
            progress.update(task, advance=1, failed=len(tally.failed))
            if tally.failed and chosen.stop:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    console.print(_table(tally))
    wrong = tally.wrong(shares=not chosen.calm and not chosen.stop)
    for line in wrong:
        console.print(line, style="red", markup=False, soft_wrap=True)
    if tally.failed:
        console.print(f"to repeat it:  {command(tally.failed[0])}", markup=False)
    return 1 if wrong else 0


def _one(seed: int, console: Console) -> int:
    outcome = simulate(seed)
    for line in (
        f"{outcome.profile}",
        f"{outcome.faults}",
        f"injected: {dict(outcome.injected)}",
        f"steps of the protocol: {dict(outcome.notes)}",
        f"ends: {dict(outcome.ended)}, {outcome.instances} instances, {outcome.seconds:.1f} s, {outcome.steps} events",
        f"fingerprint: {outcome.fingerprint.hex()}",
        *outcome.failures,
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 1 if outcome.failures else 0


def _table(tally: Tally) -> Table:
    table = Table(title=f"{tally.seeds} seeds, {tally.instances} instances, {tally.steps} events", title_justify="left")
    table.add_column("injected")
    table.add_column("times", justify="right")
    table.add_column("seeds", justify="right")
    table.add_column("claimed", justify="right")
    for name in sorted(tally.injected, key=lambda name: (name not in CLAIMS, name)):
        seeds = tally.seeds_with[name]
        claimed = f"{CLAIMS[name]:.0%}" if name in CLAIMS else ""
        table.add_row(name, f"{tally.injected[name]}", f"{seeds / tally.seeds:.0%}", claimed)
    table.add_section()
    for status, count in sorted(tally.ended.items()):
        table.add_row(f"a sum ended at a party: {status}", f"{count}")
    share = f"{tally.kept / tally.promised:.1%}" if tally.promised else ""
    table.add_row("sums that must nearly all give a result", f"{tally.promised}", share, "95%")
    return table


if __name__ == "__main__":
    sys.exit(main())
