"""Figures of a comparison, PNG. Owns their looks: one colour a method, the same in all of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

from benchmarks.compare.metrics import BASELINE, Row
from vllm_adadecode.evaluation.plots import STYLE

matplotlib.use("Agg")
from matplotlib import pyplot


def draw(rows: Sequence[Row]) -> dict[str, bytes]:
    """PNG files by name, without those that there is nothing to show in."""
    measured = [row for row in rows if row.repetitions]
    figures = {}
    with pyplot.rc_context(STYLE):
        for name, of, draw_panel in (
            ("speedup", [r for r in measured if r.ratio and r.method != BASELINE], _speedup),
            ("serving", measured, _serving),
            ("tokens", [r for r in measured if r.tokens_per_verification], _tokens),
        ):
            if of:
                figures[f"{name}.png"] = _figure(of, draw_panel)
    return figures


def _figure(rows: Sequence[Row], draw_panel: Any) -> bytes:
    """A panel for each part and temperature."""
    panels = list(dict.fromkeys((r.part, r.temperature) for r in rows))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines,
        columns,
        figsize=(3.4 * columns + 0.4, 2.8 * lines),
        squeeze=False,
        layout="constrained",
    )
    methods = list(dict.fromkeys(r.method for r in rows))
    colors = {m: f"C{i}" if m != BASELINE else "0.45" for i, m in enumerate(methods)}
    for axis, (part, temperature) in zip(axes.flat, panels, strict=False):
        of = [r for r in rows if (r.part, r.temperature) == (part, temperature)]
        draw_panel(axis, of, methods, colors)
        axis.set_title(f"{part}, temperature {temperature:g}", fontsize=9)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    handles = [pyplot.Line2D([], [], color=c, linewidth=4) for c in colors.values()]
    figure.legend(handles, list(colors), loc="outside lower center", ncols=min(7, len(colors)))
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
    _bars(axis, rows, methods, colors, lambda row: (row.tokens_per_verification, None))
    axis.set_ylabel("tokens a verification")


def _serving(axis: Any, rows: Any, methods: Any, colors: Any) -> None:
    """What all get against what one gets: up and to the right is better."""
    for method in methods:
        of = sorted((r for r in rows if r.method == method), key=lambda r: r.concurrency)
        of = [r for r in of if r.tpot_ms_p50]
        x, y = [1e3 / r.tpot_ms_p50 for r in of], [r.tokens_per_s for r in of]
        axis.plot(x, y, marker="o", markersize=3, linewidth=1.2, color=colors[method])
        for row, at, up in zip(of, x, y, strict=True):
            axis.annotate(str(row.concurrency), (at, up), fontsize=6, color="0.3")
    axis.set_xlabel("tokens/s of one request (1 / TPOT p50)")
    axis.set_ylabel("tokens/s of the server")
    axis.set_ylim(bottom=0)
