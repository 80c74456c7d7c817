"""Draws what `./scripts/bench secagg --plot FILE` measured: JSON from standard input, SVG (or PNG) to FILE.

It runs in .bench/peer (requirements-bench.lock); matplotlib is no requirement of the package.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams |= {"svg.hashsalt": "fedpeer", "svg.fonttype": "none", "font.size": 9}

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter  # noqa: E402

CPU, SENT = "#1f5fa8", "#b0552b"
AXES = {"n": "organizations (d = 100,000 values)", "d": "values (n = 10 organizations)"}


def draw(measured: dict[str, list[dict[str, Any]]], path: str) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for panel, (axis, points) in zip(panels, measured.items(), strict=True):
        at = [point[axis] for point in points]
        panel.plot(at, [point["seconds"] for point in points], "o-", color=CPU, label="CPU seconds of one peer")
        panel.plot(at, [point["floor"] for point in points], ":", color=CPU, label="floor: masks, signatures, packing")
        sent = panel.twinx()
        sent.plot(at, [point["bytes"] / 1e6 for point in points], "s--", color=SENT, label="MB sent by one peer")
        for scale in (panel, sent):
            scale.set_xscale("log")
            scale.set_yscale("log")
            scale.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            scale.xaxis.set_major_formatter(EngFormatter())
            scale.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            for side in (scale.xaxis, scale.yaxis):
                side.set_minor_formatter(NullFormatter())
        panel.set_xticks(at)
        panel.set_xlabel(AXES[axis])
        for scale, unit, color in ((panel, "CPU seconds", CPU), (sent, "MB", SENT)):
            scale.set_ylabel(unit, color=color)
            scale.tick_params(axis="y", which="both", colors=color)
        panel.spines["top"].set_visible(False)
        sent.spines["top"].set_visible(False)
    lines = [*panels[0].get_lines(), *sent.get_lines()]
    figure.legend(handles=lines, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


if __name__ == "__main__":
    draw(json.load(sys.stdin), sys.argv[1])
