"""Figures of a comparison, PNG. Owns their looks: one colour a method, the same in all of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

from benchmarks.compare.metrics import BASELINE, Row

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


def draw(rows: Sequence[Row]) -> dict[str, bytes]:
    """PNG files by name, without those that there is nothing to show in."""
    measured = [row for row in rows if row.repetitions]
    methods = [m for m in dict.fromkeys(r.method for r in measured) if m != BASELINE]
    colors = {BASELINE: "0.45"} | {method: f"C{i}" for i, method in enumerate(methods)}
    figures = {}
    with pyplot.rc_context(STYLE):
        for name, of, draw_panel in (
            ("speedup", [r for r in measured if r.ratio and r.method != BASELINE], _speedup),
            ("serving", measured, _serving),
            ("tokens", [r for r in measured if r.mean_acceptance_length], _tokens),
        ):
            if of:
                figures[f"{name}.png"] = _figure(of, draw_panel, colors)
    return figures


def _figure(rows: Sequence[Row], draw_panel: Any, colors: dict[str, str]) -> bytes:
    """A line of panels for each part of the data, a panel for each temperature."""
    parts = list(dict.fromkeys(r.part for r in rows))
    temperatures = sorted({r.temperature for r in rows})
    figure, axes = pyplot.subplots(
        len(parts),
        len(temperatures),
        figsize=(4.2 * len(temperatures) + 0.4, 2.6 * len(parts) + 0.4),
        squeeze=False,
        sharey=draw_panel is not _serving,
        layout="constrained",
    )
    methods = [m for m in colors if any(r.method == m for r in rows)]
    for line, part in zip(axes, parts, strict=True):
        for axis, temperature in zip(line, temperatures, strict=True):
            of = [r for r in rows if (r.part, r.temperature) == (part, temperature)]
            draw_panel(axis, of, methods, colors)
            axis.set_title(f"{part}, temperature {temperature:g}", fontsize=9)
    handles = [pyplot.Line2D([], [], color=colors[m], linewidth=4) for m in methods]
    figure.legend(handles, methods, loc="outside lower center", ncols=min(7, len(methods)))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    pyplot.close(figure)
    return buffer.getvalue()


def _groups(axis: Any, rows: Sequence[Row]) -> list[int]:
    """The concurrencies, as places on the axis."""
    found = sorted({r.concurrency for r in rows})
    axis.set_xticks(range(len(found)), found)
    axis.set_xlabel("requests at once")
    axis.grid(False, axis="x")
    return found


def _bars(
    axis: Any, rows: Sequence[Row], methods: Sequence[str], colors: dict[str, str], value: Any
) -> None:
    places = _groups(axis, rows)
    width = 0.8 / len(methods)
    for row in rows:
        x = places.index(row.concurrency) + (methods.index(row.method) + 0.5) * width - 0.4
        height, error = value(row)
        axis.bar(x, height, width * 0.9, color=colors[row.method], yerr=error, ecolor="0.2")


def _speedup(axis: Any, rows: Any, methods: Any, colors: Any) -> None:
    def value(row: Row) -> tuple[float, list[list[float]]]:
        assert row.ratio is not None
        middle = row.ratio.median
        return middle, [[middle - row.ratio.least], [row.ratio.most - middle]]

    axis.axhline(1.0, color="0.4", linewidth=0.8, linestyle="--")
    _bars(axis, rows, methods, colors, value)
    axis.set_ylabel("tokens/s, of vanilla's")


def _tokens(axis: Any, rows: Any, methods: Any, colors: Any) -> None:
    axis.axhline(1.0, color="0.4", linewidth=0.8, linestyle="--")
    _bars(axis, rows, methods, colors, lambda row: (row.mean_acceptance_length, None))
    axis.set_ylabel("mean acceptance length")


def _serving(axis: Any, rows: Any, methods: Any, colors: Any) -> None:
    """What all get against what one gets."""
    for method in methods:
        of = sorted((r for r in rows if r.method == method), key=lambda r: r.concurrency)
        of = [r for r in of if r.tpot_ms_p50]
        x, y = [1e3 / r.tpot_ms_p50 for r in of], [r.tokens_per_s for r in of]
        axis.plot(x, y, marker="o", markersize=3, linewidth=1.2, color=colors[method])
        for row, at, up in zip(of, x, y, strict=True):
            label = str(row.concurrency)
            offset = {"xytext": (3, 3), "textcoords": "offset points"}
            axis.annotate(label, (at, up), fontsize=7, color="0.3", **offset)
    axis.set_xlabel("tokens/s of one request (1 / TPOT p50)")
    axis.set_ylabel("tokens/s of the server")
    axis.set_ylim(bottom=0)
