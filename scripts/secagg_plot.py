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

AXES = {"n": "organizations (d = 100,000 values)", "d": "values (n = 10 organizations)"}


def draw(measured: dict[str, list[dict[str, Any]]], path: str) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for panel, (axis, points) in zip(panels, measured.items(), strict=True):
        at = [point[axis] for point in points]
        panel.plot(at, [point["seconds"] for point in points], "o-", color="#1f5fa8", label="CPU seconds of one peer")
        panel.plot(
            at, [point["floor"] for point in points], ":", color="#1f5fa8", label="floor: masks, signatures, packing"
        )
        sent = panel.twinx()
        sent.plot(at, [point["bytes"] / 1e6 for point in points], "s--", color="#b0552b", label="MB sent by one peer")
        if axis == "d":
            for scale in (panel, sent):
                scale.set_xscale("log")
                scale.set_yscale("log")
        else:
            panel.set_ylim(0)
            sent.set_ylim(0)
        panel.set_xlabel(AXES[axis])
        panel.set_ylabel("CPU seconds")
        sent.set_ylabel("MB")
        panel.spines["top"].set_visible(False)
        sent.spines["top"].set_visible(False)
    lines = [*panels[0].get_lines(), *sent.get_lines()]
    figure.legend(handles=lines, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


if __name__ == "__main__":
    draw(json.load(sys.stdin), sys.argv[1])
