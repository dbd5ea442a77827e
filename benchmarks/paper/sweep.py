"""What a threshold sweep leaves behind: a table, sentences, CSV, one figure.

Owns their looks and what the sentences say; the figures themselves are `points.py`'s.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

from benchmarks.compare.plots import STYLE
from benchmarks.compare.store import Store
from benchmarks.compare.table import COLUMNS, NONE
from benchmarks.paper.points import Point, by_setting, swept, title
from vllm_adadecode.files import write_whole

matplotlib.use("Agg")
from matplotlib import pyplot

NAME = "threshold_sweep"
# Of a comparison's columns, those that a threshold moves.
COMPARED = (
    *("tokens/s", "of vanilla's", "mean acceptance length", "draft acceptance rate"),
    *("layers executed per token", "as vanilla's"),
)


def write(points: Sequence[Point], store: Store, console: Console) -> list[str]:
    """Print table and sentences, and write the CSV and the figure into the store's folder.

    Returns:
        The sentences.
    """
    print_table(console, points)
    sentences = findings(points)
    for sentence in sentences:
        console.print(sentence, markup=False)
    write_whole(store.folder / f"{NAME}.csv", as_csv(points).encode())
    if swept(points):
        write_whole(store.folder / f"{NAME}.png", draw(points))
    return sentences


def print_table(console: Console, points: Sequence[Point]) -> None:
    shown = {name: show for name, show in COLUMNS if name in COMPARED}
    table = Table(title="AdaDecode by confidence threshold", title_justify="left")
    table.add_column("data")
    for name in ("gamma", *shown, "predicted early"):
        table.add_column(name, justify="right")
    for setting, group in by_setting(points).items():
        table.add_section()
        baseline = [p for p in group if p.row.method == "vanilla" and p.row.repetitions]
        for point in baseline + swept(group):
            early = NONE if point.gamma is None else _percent(point.predicted_early)
            gamma = "vanilla" if point.gamma is None else f"{point.gamma:g}"
            where = title(point) if setting[2] > 1 else setting[0]
            table.add_row(where, gamma, *(show(point.row) for show in shown.values()), early)
    console.print(table)


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.1%}"


def findings(points: Sequence[Point]) -> list[str]:
    """For each setting the fastest threshold, those that lose, and what the outer ones do."""
    return [_finding(group) for group in by_setting(swept(points)).values()]


def _finding(group: Sequence[Point]) -> str:
    low, high = group[0], group[-1]
    with_ratio = [(p.row.ratio.median, p) for p in group if p.row.ratio is not None]
    text = f"{title(low)}: "
    if with_ratio:
        ratio, best = max(with_ratio, key=lambda found: found[0])
        slower = [f"{p.gamma:g}" for ratio, p in with_ratio if ratio < 1]
        text += f"fastest at {best.gamma:g} ({ratio:.2f} of vanilla's tokens/s); "
        text += f"slower than vanilla at {', '.join(slower)}. " if slower else "nowhere slower. "
    ends = [p for p in dict.fromkeys((low, high)) if p.row.draft_acceptance_rate is not None]
    return text + " ".join(
        f"At {p.gamma:g}, {_percent(p.row.draft_acceptance_rate)} of the early predictions are "
        f"accepted, and {_percent(p.predicted_early)} of the tokens were predicted early."
        for p in ends
    )


def as_csv(points: Sequence[Point]) -> str:
    """One line a point, vanilla's and others beside the sweep included; plain numbers."""
    flat = []
    for point in points:
        values = point.as_dict()
        ratio = values.pop("ratio") or {}
        names = ("median", "least", "most")
        flat.append(values | {f"ratio_{name}": ratio.get(name) for name in names})
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(flat[0]) if flat else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return stream.getvalue()


def draw(points: Sequence[Point]) -> bytes:
    """PNG: a column for each setting; above the speed-up, below what explains it."""
    groups = list(by_setting(swept(points)).values())
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            2,
            len(groups),
            figsize=(3.6 * len(groups) + 0.6, 5.2),
            squeeze=False,
            sharex=True,
            sharey="row",
            layout="constrained",
        )
        for column, group in enumerate(groups):
            _speedup(axes[0][column], group)
            _counts(axes[1][column], group)
            axes[0][column].set_title(title(group[0]), fontsize=9)
            axes[1][column].set_xlabel("confidence threshold")
        axes[0][0].set_ylabel("tokens/s, of vanilla's")
        handles, labels = axes[1][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        pyplot.close(figure)
    return buffer.getvalue()


def _speedup(axis: Any, group: Sequence[Point]) -> None:
    """The median of the repetitions, and a band from least to most."""
    of = [(p.gamma, p.row.ratio) for p in group if p.row.ratio is not None]
    gammas = [gamma for gamma, _ in of]
    axis.axhline(1.0, color="0.4", linewidth=0.8, linestyle="--")
    axis.plot(gammas, [ratio.median for _, ratio in of], marker="o", markersize=3, color="C0")
    least, most = [ratio.least for _, ratio in of], [ratio.most for _, ratio in of]
    axis.fill_between(gammas, least, most, color="C0", alpha=0.2, linewidth=0)


def _counts(axis: Any, group: Sequence[Point]) -> None:
    gammas = [p.gamma for p in group]
    for color, name, values in (
        ("C2", "draft acceptance rate", [p.row.draft_acceptance_rate for p in group]),
        ("C1", "predicted early", [p.predicted_early for p in group]),
        ("C3", "layers executed per token", [p.row.layers_executed_per_token for p in group]),
    ):
        known = [(g, v) for g, v in zip(gammas, values, strict=True) if v is not None]
        axis.plot(
            [g for g, _ in known],
            [v for _, v in known],
            marker="o",
            markersize=3,
            color=color,
            label=name,
        )
    axis.set_ylim(bottom=0)
