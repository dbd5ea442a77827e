"""The demo's result: as a table for people, as JSON for everything else."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.demo.compare import METHODS, Answer, Difference, Group
from benchmarks.machine import git_revision, machine, versions
from vllm_adadecode.metrics.counters import Counters, ExitCounters

TITLES = {"held_out": "held-out files", "second_stage": "trained files", "all": "all"}
RATIOS = (
    "mean_acceptance_length",
    "layers_executed_per_token",
    "draft_acceptance_rate",
)


def build(
    groups: Sequence[Group], differences: Sequence[Difference], command: Sequence[str]
) -> dict[str, Any]:
    """Everything that was measured; the top level holds the figures over all prompts."""
    everything = Group(
        files="all",
        answers={m: [a for g in groups for a in g.answers[m]] for m in METHODS},
        stats=total([g.stats for g in groups]),
    )
    parts = {g.files: figures(g) for g in [*groups, everything]}
    outputs = parts["all"].pop("outputs")
    return {
        "what": "the same prompts to vllm serve with --speculative-config adadecode and without, "
        "temperature 0, one request at a time",
        "identical": not differences,
        "identical_outputs": outputs - len(differences),
        "outputs": outputs,
        **parts.pop("all"),
        "by_files": parts,
        "differences": [asdict(difference) for difference in differences],
        "command": ["python", "-m", "benchmarks.demo", *sys.argv[1:]],
        "server": list(command),
        "git": git_revision(),
        "versions": versions(),
        "machine": machine(),
    }


def total(stats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One snapshot for several: counts are added, ratios taken anew."""
    exits = {
        int(layer): ExitCounters(
            **{name: sum(s["exits"][layer][name] for s in stats) for name in counts}
        )
        for layer, counts in stats[0]["exits"].items()
    }
    counters = Counters(num_layers=stats[0]["num_layers"], exits=exits)
    for name in vars(counters).keys() - {"num_layers", "exits"}:
        setattr(counters, name, sum(s[name] for s in stats))
    return counters.snapshot()


def figures(group: Group) -> dict[str, Any]:
    rates = {method: tokens_per_s(group.answers[method]) for method in METHODS}
    return {
        "outputs": len(group.answers["vanilla"]),
        **{name: group.stats[name] for name in RATIOS},
        "tokens_per_s": rates,
        "speedup": rates["adadecode"] / rates["vanilla"],
        "median_speedup": statistics.median(
            theirs.seconds / mine.seconds
            for mine, theirs in zip(*(group.answers[m] for m in reversed(METHODS)), strict=True)
        ),
        "exits": {
            layer: counts
            | {
                "prediction_rate": counts["draft_tokens"] / max(1, counts["heads_evaluated"]),
                "draft_acceptance_rate": counts["accepted_tokens"]
                / max(1, counts["accepted_tokens"] + counts["rejected_tokens"]),
            }
            for layer, counts in group.stats["exits"].items()
        },
    }


def tokens_per_s(answers: Sequence[Answer]) -> float:
    """Over whole requests: prompt, HTTP and all."""
    return sum(len(a.token_ids) for a in answers) / sum(a.seconds for a in answers)


def print_report(console: Console, result: dict[str, Any]) -> None:
    columns = {**result["by_files"], "all": result}
    table = Table(title="vLLM with AdaDecode and without", title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(TITLES.get(name, name), justify="right")

    def row(title: str, form: str, *path: str) -> None:
        cells = []
        for figure in columns.values():
            for key in path:
                figure = figure[key]
            cells.append("-" if figure is None else form.format(figure))
        table.add_row(title, *cells)

    row("prompts", "{}", "outputs")
    row("tokens/s, vanilla", "{:.0f}", "tokens_per_s", "vanilla")
    row("tokens/s, AdaDecode", "{:.0f}", "tokens_per_s", "adadecode")
    row("speed-up", "{:.2f}", "speedup")
    row("speed-up, median of the prompts", "{:.2f}", "median_speedup")
    row("mean acceptance length", "{:.2f}", "mean_acceptance_length")
    row("layers executed per token (vanilla: 1)", "{:.3f}", "layers_executed_per_token")
    row("draft acceptance rate", "{:.1%}", "draft_acceptance_rate")
    for layer in result["exits"]:
        row(f"exit {layer}: confident when asked", "{:.1%}", "exits", layer, "prediction_rate")
        row(
            f"exit {layer}: draft acceptance rate",
            "{:.1%}",
            "exits",
            layer,
            "draft_acceptance_rate",
        )
    console.print(table)

    where = result["machine"]
    console.print(f"{', '.join(where['gpus']) or where['cpu']}, {where['cores']} cores, float32")
    style = "bold green" if result["identical"] else "bold red"
    console.print(
        f"identical output: {result['identical_outputs']} of {result['outputs']}", style=style
    )
    for difference in result["differences"][:1]:
        gap = difference["gap"]
        console.print(
            f"first difference: token {difference['position']} after a prompt from "
            f"{difference['prompt']['source']}; log-probabilities "
            + ("far apart" if gap is None else f"{gap:.1g} apart (below 0.001: a tie)")
        )
        for method in METHODS:
            console.print(f"  {method}: {difference[method]!r}", markup=False)
