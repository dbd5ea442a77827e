"""Figures of a report, as PNG files for papers and model cards.

Owns their looks. One colour per exit layer, from shallow to deep, the same in all figures; one
panel per set.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from vllm_adadecode.evaluation.metrics import (
    Measurer,
    reliability,
    sweep_thresholds,
    threshold_curves,
)
from vllm_adadecode.evaluation.simulate import Setting
from vllm_adadecode.files import write_whole

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
PANEL = (3.1, 3.0)  # inches
# A point that fewer positions stand for is noise.
LEAST_COUNT = 10


def save_plots(folder: str | Path, sets: Mapping[str, Measurer], setting: Setting) -> list[Path]:
    """Draw ``reliability.png``, ``coverage_precision.png`` and ``speedup.png``.

    Args:
        folder: made if absent.
        sets: traces with their costs, by name.
        setting: exits, gates and K of the speed-up curves; its thresholds are marked.

    Raises:
        OSError: the disk refuses.
    """
    draw = {
        "reliability.png": _draw_reliability,
        "coverage_precision.png": _draw_coverage,
        "speedup.png": _draw_speedup,
    }
    paths = []
    with pyplot.rc_context(STYLE):
        for name, draw_panel in draw.items():
            figure, axes = pyplot.subplots(
                1,
                len(sets),
                figsize=(PANEL[0] * len(sets) + 0.4, PANEL[1]),
                sharey=True,
                squeeze=False,
                layout="constrained",
            )
            for axis, (title, measurer) in zip(axes[0], sets.items(), strict=True):
                draw_panel(axis, measurer, setting)
                axis.set_title(title, fontsize=9)
                if axis is not axes[0][0]:
                    axis.set_ylabel("")
            handles, labels = axes[0][0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            pyplot.close(figure)
            paths.append(write_whole(Path(folder) / name, buffer.getvalue()))
    return paths


def _colors(count: int) -> Sequence[Any]:
    return list(matplotlib.colormaps["viridis"](np.linspace(0.1, 0.8, count)))


def _draw_reliability(axis: Any, measurer: Measurer, setting: Setting) -> None:
    axis.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle="--")
    layers = measurer.simulator.exit_layers
    for i, color in enumerate(_colors(len(layers))):
        found = reliability(measurer.confidence[i], measurer.agrees[i])
        enough = found.count >= LEAST_COUNT
        axis.plot(
            found.confidence[enough],
            found.agreement[enough],
            marker="o",
            markersize=3,
            linewidth=1.2,
            color=color,
            label=f"layer {layers[i]}",
        )
    axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="agreement with last layer")


def _draw_coverage(axis: Any, measurer: Measurer, setting: Setting) -> None:
    curves = threshold_curves(measurer.traces)
    positions = len(measurer.own)
    for color, (layer, curve), threshold in zip(
        _colors(len(curves)), curves.items(), setting.thresholds, strict=True
    ):
        enough = curve.coverage * positions >= LEAST_COUNT
        axis.plot(
            curve.coverage[enough],
            curve.precision[enough],
            linewidth=1.4,
            color=color,
            label=f"layer {layer}",
        )
        if threshold < 1.0:
            at = int(np.abs(curve.thresholds - threshold).argmin())
            axis.plot(curve.coverage[at], curve.precision[at], "o", color=color, markersize=4)
    axis.set(xlim=(0, 1), xlabel="coverage", ylabel="precision")


def _draw_speedup(axis: Any, measurer: Measurer, setting: Setting) -> None:
    if not any(setting.used):
        setting = Setting.uniform(len(setting.thresholds))
    sweep = sweep_thresholds(measurer, setting)
    axis.axhline(1.0, color="0.6", linewidth=0.8, linestyle="--")
    axis.plot(sweep.thresholds, sweep.in_passes, color="C0", linewidth=1.4, label="layers alone")
    axis.plot(sweep.thresholds, sweep.with_costs, color="C3", linewidth=1.4, label="heads counted")
    chosen = measurer.speedup(setting)
    # Per-exit thresholds have no place of their own on this axis: their result is a line.
    axis.axhline(chosen, color="C3", linewidth=0.8, linestyle=":", label="setting in use")
    axis.set(xlim=(0, 1), xlabel="threshold of all exits in use", ylabel="ideal speed-up")
