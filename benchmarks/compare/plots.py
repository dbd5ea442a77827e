"""Figures, PNG, of comparisons. Owns their looks: one colour a method, the same in all of them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

from benchmarks.compare.figures import BASELINE, Row

matplotlib.use("Agg")
from matplotlib import pyplot

STYLE: dict[str, Any] = {
    "figure.dpi": 200,
    "font.size": 9,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
# Draws rows of one panel, given the colour of each method.
Panel = Callable[[Any, Sequence[Row], dict[str, str]], None]


def draw(rows: Sequence[Row]) -> dict[str, bytes]:
    """PNG files by name, without those that there is nothing to show in."""
    measured = [row for row in rows if row["repetitions"]]
    methods = [m for m in dict.fromkeys(r["method"] for r in measured) if m != BASELINE]
    colors = {BASELINE: "0.45"} | {method: f"C{i}" for i, method in enumerate(methods)}
    compared = [r for r in measured if r["speedup"] and r["method"] != BASELINE]
    return {
        f"{name}.png": _figure(of, panel, colors)
        for name, of, panel in (
            ("speedup", compared, _speedup),
            ("serving", measured, _serving),
        )
        if of
    }


def _figure(rows: Sequence[Row], panel: Panel, colors: dict[str, str]) -> bytes:
    """A line of panels for each part of the data, a panel for each temperature."""
    parts = list(dict.fromkeys(r["part"] for r in rows))
    temperatures = sorted({r["temperature"] for r in rows})
    colors = {m: color for m, color in colors.items() if any(r["method"] == m for r in rows)}
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            len(parts),
            len(temperatures),
            figsize=(4.2 * len(temperatures) + 0.4, 2.6 * len(parts) + 0.4),
            squeeze=False,
            sharey=panel is not _serving,
            layout="constrained",
        )
        for line, part in zip(axes, parts, strict=True):
            for axis, temperature in zip(line, temperatures, strict=True):
                of = [r for r in rows if (r["part"], r["temperature"]) == (part, temperature)]
                panel(axis, of, colors)
                axis.set_title(f"{part}, temperature {temperature:g}", fontsize=9)
        handles = [pyplot.Line2D([], [], color=color, linewidth=4) for color in colors.values()]
        columns = min(7, len(colors))
        figure.legend(handles, list(colors), loc="outside lower center", ncols=columns)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        pyplot.close(figure)
    return buffer.getvalue()


def _speedup(axis: Any, rows: Sequence[Row], colors: dict[str, str]) -> None:
    """Groups of bars, by concurrency, and a line at 1."""
    levels, methods = sorted({r["concurrency"] for r in rows}), list(colors)
    axis.axhline(1.0, color="0.4", linewidth=0.8, linestyle="--")
    axis.set_xticks(range(len(levels)), levels)
    axis.set_xlabel("requests at once")
    axis.grid(False, axis="x")
    width = 0.8 / len(methods)
    for row in rows:
        x = levels.index(row["concurrency"]) - 0.4 + (methods.index(row["method"]) + 0.5) * width
        middle, least, most = (row["speedup"][name] for name in ("median", "least", "most"))
        error, color = [[middle - least], [most - middle]], colors[row["method"]]
        axis.bar(x, middle, width * 0.9, color=color, yerr=error, ecolor="0.2")
    axis.set_ylabel("speed-up over vanilla")


def _serving(axis: Any, rows: Sequence[Row], colors: dict[str, str]) -> None:
    """What all requests get together against what one of them gets."""
    for method, color in colors.items():
        of = [r for r in rows if r["method"] == method and r["tpot_ms"]]
        points = [
            (1e3 / r["tpot_ms"]["p50"], r["tokens_per_s"], r["concurrency"])
            for r in sorted(of, key=lambda r: r["concurrency"])
        ]
        x, y = [p[0] for p in points], [p[1] for p in points]
        axis.plot(x, y, marker="o", markersize=3, linewidth=1.2, color=color)
        for at, up, label in points:
            offset = {"xytext": (3, 3), "textcoords": "offset points"}
            axis.annotate(str(label), (at, up), fontsize=7, color="0.3", **offset)
    axis.set_xlabel("tokens/s of one request (1 / TPOT p50)")
    axis.set_ylabel("tokens/s of the server")
    axis.set_ylim(bottom=0)
