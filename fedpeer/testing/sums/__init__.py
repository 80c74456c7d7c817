"""Many secure sums in one process, under every fault that a seed draws: the cores of the daemon, and nothing but them.

`world` moves bytes and time, `disk` keeps or loses what was written, `faults` says what goes wrong, `observer` looks
for what must never be known; `python -m fedpeer.testing.sums` runs many seeds. There is no rule of the protocol here.
"""
