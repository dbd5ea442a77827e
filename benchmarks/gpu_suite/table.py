"""The result as tables in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

SPEED_ROWS = (
    ("speed-up", "speedup", "{:.2f}"),
    ("ideal", "ideal_speedup", "{:.2f}"),
    ("efficiency", "efficiency", "{:.2f}"),
    ("draft acceptance rate", "draft_acceptance_rate", "{:.1%}"),
    ("mean acceptance length", "mean_acceptance_length", "{:.2f}"),
    ("layers executed", "layers_executed_of_vanilla", "{:.3f}"),
)


def show(console: Console, result: dict[str, Any]) -> None:
    """Everything that was measured; what was not is said, with the reason."""
    data = {name: part.get("data", {}) for name, part in result["parts"].items()}
    where = result["gpu"] or f"{result['machine']['cpu']}: no GPU, and no measure of one"
    console.print(f"{where}; target: {result['target']['shape']}, {result['settings']['dtype']}")
    for line in correctness_lines(data):
        console.print(line)
    for table in (
        speed_table("Decoding, vanilla's layer passes: 1", "batch", data.get("speed", {})),
        speed_table(
            "Controlled drafts, their output is no model's",
            "coverage, precision, batch",
            data.get("traces", {}),
        ),
        concurrency_table(data.get("concurrency", {})),
        goals_table(result["goals"]),
    ):
        if table.row_count:
            console.print(table)
    for name, reason in result["missing"].items():
        console.print(f"[yellow]{name}: {escape(reason.splitlines()[0])}[/yellow]")


def correctness_lines(data: dict[str, Any]) -> list[str]:
    """One for each part about outputs and one for waits."""
    lines = []
    for name, title in (("bit_identical", "bit for bit"), ("ties", "as served")):
        part = data.get(name, {})
        if part.get("identical") is None:
            continue
        same = part["outputs"] - part["divergences"]
        style = "bold green" if part["identical"] else "bold yellow"
        text = f"[{style}]identical output, {title}: {same} of {part['outputs']}[/{style}]"
        if part["divergences"]:
            text += (
                f"; {part['beyond_bound']} differences are no ties (bound {part['tie_bound']}, "
                f"largest gap {text_of('{:.3f}', part['largest_gap'])})"
            )
        lines.append(text)
    for batch, cell in data.get("host_syncs", {}).items():
        counts = [
            f"{name} {text_of('{:.1f}', cell[name]['syncs_per_round'])}"
            for name in ("vanilla", "adadecode")
            if name in cell
        ]
        lines.append(f"waits a round at batch {batch}, {cell['counted']}: {', '.join(counts)}")
    return lines


def speed_table(title: str, setting: str, cells: dict[str, dict[str, Any]]) -> Table:
    """A row for each setting."""
    table = Table(title=title, title_justify="left")
    table.add_column(setting)
    for name, _, _ in SPEED_ROWS:
        table.add_column(name, justify="right")
    for name, cell in cells.items():
        table.add_row(name, *(text_of(form, cell[key]) for _, key, form in SPEED_ROWS))
    return table


def concurrency_table(cells: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Throughput, prefill included", title_justify="left")
    for name in ("requests at a time", "vanilla tokens/s", "AdaDecode tokens/s", "ratio"):
        table.add_column(name, justify="right")
    for level, cell in cells.items():
        rates = [f"{cell['tokens_per_second'][name]:.0f}" for name in ("vanilla", "adadecode")]
        table.add_row(level, *rates, f"{cell['ratio']:.2f}")
    return table


def goals_table(goals: dict[str, dict[str, Any]]) -> Table:
    table = Table("goal", "", "measured", "met", title="Goals", title_justify="left")
    for name, goal in goals.items():
        met = {True: "yes", False: "no", None: "not measured"}[goal["met"]]
        table.add_row(name, f"{goal['goal']:g}", text_of("{:.3f}", goal["measured"]), met)
    return table


def text_of(form: str, value: float | None) -> str:
    return "-" if value is None else form.format(value)
