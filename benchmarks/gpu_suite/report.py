"""What the suite says: the figures on top of its result, the goals, the exit code, the tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape

from benchmarks.tables import Figure, figure, table, text

WHAT = (
    "python -m benchmarks.gpu_suite: vLLM with AdaDecode against vLLM as it is, on the demo target "
    "widened to a large shape. efficiency: measured over ideal speed-up, the ratio of the bytes of "
    "weights that both must read"
)
# What a result is held against, and whether more is better.
GOALS = {
    "efficiency, one request at a time": (0.95, True),
    "efficiency, eight at a time": (0.90, True),
    "least ratio of tokens/s at any concurrency": (0.98, True),
    "host syncs in a step": (0.0, False),
}
TOP = (
    *("efficiency", "speedup", "ideal_speedup", "ratio"),
    *("draft_acceptance_rate", "mean_acceptance_length"),
)
Parts = dict[str, dict[str, Any]]


def summary(parts: Parts) -> dict[str, Any]:
    """The figures on top; None, or without an entry, where nothing was measured.

    Args:
        parts: by name, ``data`` found, and ``error`` of one that was not finished.
    """
    data = {name: part["data"] for name, part in parts.items()}
    speed = data.get("speed", {})
    syncs = [cell["adadecode"]["syncs_per_step"] for cell in data.get("host_syncs", {}).values()]
    found: dict[str, Any] = {n: {level: cell[n] for level, cell in speed.items()} for n in TOP}
    found["host_syncs_per_step"] = max((s for s in syncs if s is not None), default=None)
    found["bit_identical"] = data.get("bit_identical", {}).get("identical")
    ties = data.get("ties", {})
    found["ties"] = {k: v for k, v in ties.items() if k not in ("differences", "batch_sizes")}
    measured = (
        found["efficiency"].get("1"),
        found["efficiency"].get("8"),
        min(found["ratio"].values(), default=None),
        found["host_syncs_per_step"],
    )
    found["goals"] = {
        name: {
            "goal": goal,
            "measured": value,
            "met": None if value is None else (value >= goal if more else value <= goal),
        }
        for (name, (goal, more)), value in zip(GOALS.items(), measured, strict=True)
    }
    return found | {"errors": {n: part["error"] for n, part in parts.items() if "error" in part}}


def exit_code(result: dict[str, Any]) -> int:
    """1: outputs differ that may not, or a part was not finished."""
    wrong = result["bit_identical"] is False or result["ties"].get("beyond_bound")
    return 1 if wrong or result["errors"] else 0


COLUMNS = (
    figure("at a time", "{}", "name"),
    figure("vanilla tokens/s", "{:.0f}", "tokens_per_s", "vanilla"),
    figure("AdaDecode tokens/s", "{:.0f}", "tokens_per_s", "adadecode"),
    figure("ratio", "{:.2f}", "ratio"),
    figure("decoding speed-up", "{:.2f}", "speedup"),
    figure("ideal", "{:.2f}", "ideal_speedup"),
    figure("efficiency", "{:.2f}", "efficiency"),
    figure("draft acceptance rate", "{:.1%}", "draft_acceptance_rate"),
    figure("mean acceptance length", "{:.2f}", "mean_acceptance_length"),
    figure("layers, of vanilla's", "{:.3f}", "layers_of_vanilla"),
)
MET = {True: "yes", False: "no", None: "not measured"}
GOAL_COLUMNS = (
    figure("goal", "{}", "name"),
    figure("", "{:g}", "goal"),
    figure("measured", "{:.3f}", "measured"),
    Figure("met", lambda goal: MET[goal["met"]]),
)


def show(console: Console, result: dict[str, Any]) -> None:
    """Everything that was measured; what was not is said, with the reason."""
    data = {name: part["data"] for name, part in result["parts"].items()}
    where = result["gpu"] or f"{result['machine']['cpu']}: no GPU, and no measure of one"
    console.print(f"{where}; {result['target']['shape']}, {result['settings']['dtype']}")
    for line in correctness_lines(data):
        console.print(line)
    shown = (("Both servers", COLUMNS, data.get("speed")), ("Goals", GOAL_COLUMNS, result["goals"]))
    for title, columns, rows in shown:
        if rows:
            console.print(table(title, columns, [{"name": n, **row} for n, row in rows.items()]))
    for name, error in result["errors"].items():
        console.print(f"[yellow]{name}: {escape(error.splitlines()[0])}[/yellow]")


def correctness_lines(data: dict[str, Any]) -> Iterator[str]:
    """One for each part about outputs, and one for each batch size about waits."""
    for name, title in (("bit_identical", "bit for bit"), ("ties", "as served")):
        part = data.get(name, {})
        if "identical" not in part:
            continue
        same = part["outputs"] - part["divergences"]
        style = "bold green" if part["identical"] else "bold yellow"
        line = f"[{style}]identical output, {title}: {same} of {part['outputs']}[/{style}]"
        if part["divergences"]:
            line += (
                f"; {part['beyond_bound']} differences are no ties (bound {part['tie_bound']}, "
                f"largest gap {text('{:.3f}', part, 'largest_gap')})"
            )
        yield line
    for batch, cell in data.get("host_syncs", {}).items():
        counts = (f"{name} {text('{:.1f}', of, 'syncs_per_step')}" for name, of in cell.items())
        yield f"waits a step at batch {batch}: {', '.join(counts)}"
