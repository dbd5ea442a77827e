"""Everything that a comparison leaves behind: tables, JSON, figures and one HTML page.

Owns which files there are and the titles of columns. Made of what the store holds, so a run that is
not finished can be reported on.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from benchmarks.compare import figures, plots
from benchmarks.compare.figures import Row
from benchmarks.compare.run import Plan, Store
from benchmarks.costs import WASTED
from benchmarks.tables import NONE, Figure, figure, of, table, text
from vllm_adadecode.files import write_json, write_whole


def speedup(row: Mapping[str, Any]) -> str:
    """The median, and in brackets the least and the most of several repetitions."""
    if row["repetitions"] < 2:
        return text("{:.2f}", row, "speedup", "median")
    return text("{0[median]:.2f} ({0[least]:.2f}-{0[most]:.2f})", row, "speedup")


WHERE = (
    figure("data", "{}", "part"),
    figure("temperature", "{:g}", "temperature"),
    figure("at once", "{}", "concurrency"),
)
METHOD = figure("method", "{}", "method")
SPEED = (figure("tokens/s", "{:.1f}", "tokens_per_s"), Figure("speed-up", speedup))
COUNTS = (
    figure("mean acceptance length", "{:.2f}", "mean_acceptance_length"),
    figure("draft acceptance rate", "{:.1%}", "draft_acceptance_rate"),
    figure("layers executed per token", "{:.3f}", "layers_executed_per_token"),
    Figure("as vanilla's", lambda row: of(row, "identical", "compared")),
)
COLUMNS = (
    METHOD,
    *WHERE,
    figure("runner", "{}", "runner"),
    *SPEED,
    figure("TPOT ms, p50 / p99", "{0[p50]:.3g} / {0[p99]:.3g}", "tpot_ms"),
    figure("TTFT ms, p50 / p99", "{0[p50]:.3g} / {0[p99]:.3g}", "ttft_ms"),
    *COUNTS,
    Figure("no answer", lambda row: str(row["failed"] or NONE)),
)
SERVER_COLUMNS = (
    METHOD,
    figure("runner", "{}", "runner"),
    figure("start s", "{:.0f}", "startup_s"),
    figure("memory GiB", "{:.2f}", "memory_gib"),
)


def _wasted(why: str, name: str) -> Figure:
    def show(row: Mapping[str, Any]) -> str:
        both = [row["costs"][kind]["wasted"].get(why, 0.0) for kind in ("bytes", "flops")]
        return f"{both[0]:.1%} / {both[1]:.1%}" if any(both) else NONE

    return Figure(f"wasted: {name}", show)


COST_COLUMNS = (
    METHOD,
    *WHERE[:2],
    Figure("MB a token", lambda row: f"{row['costs']['bytes']['per_token'] / 1e6:.4g}"),
    figure("of vanilla's", "{:.3f}", "costs", "bytes", "of_vanilla"),
    Figure("GFLOP a token", lambda row: f"{row['costs']['flops']['per_token'] / 1e9:.4g}"),
    figure("of vanilla's", "{:.3f}", "costs", "flops", "of_vanilla"),
    *(_wasted(why, name) for why, name in WASTED.items()),
    figure("an accepted draft token", "{:.2f}", "costs", "bytes", "accepted_token_of_vanilla"),
    figure("predicted speed-up", "{:.2f}", "costs", "predicted_speedup"),
    figure("measured", "{:.2f}", "speedup", "median"),
)
COSTS_TITLE = "What it cost, one request at a time (wasted: of all bytes / of all FLOPs)"
EXPLAINED = (
    "Each method has a server of its own. In every repetition all of them take one turn, in the "
    "opposite order each time. A speed-up is the ratio of tokens/s to vanilla's in the same "
    "repetition: median (least-most). TTFT is the time to the first token, TPOT the time for each "
    "one behind it. The mean acceptance length is counted behind a request's first token. Memory "
    "is the sum of the peaks of the server's processes, of the host's memory. Outputs are compared "
    "at temperature 0 with vanilla's at the same concurrency; vanilla's own with those of its "
    "first repetition. The runner is the one that vLLM chooses; where it is not vanilla's, the "
    "speed-up holds the difference of the two runners, too.",
    "Costs: weights read, and floating-point operations, behind the first token of each request; "
    "without the KV cache, and without prompts. A step of the target, and a pass of a drafter, "
    "read their weights once. An accepted draft token costs, in bytes of vanilla tokens, what went "
    "beyond one of them for each verification step: below 1 it pays. Predicted: the speed-up if "
    "time were spent on reading weights alone. Measured: over whole requests.",
)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em; }} img {{ max-width: 100%; }}
pre {{ font: 12px/1.35 ui-monospace, monospace; overflow-x: auto; }}
</style></head><body><h1>{title}</h1><pre>{text}</pre>{images}</body></html>
"""


def tables(rows: Sequence[Row], notes: Sequence[str]) -> Group:
    """All figures, the servers, and what methods cost."""
    measured = [row for row in rows if row["repetitions"]]
    servers = {row["method"]: row for row in measured}.values()
    costly = [row for row in measured if row["costs"]]
    title = "Speculative methods on one target"
    shown: list[RenderableType] = [
        table(title, COLUMNS, measured, figures.setting_of),
        table("Servers", SERVER_COLUMNS, servers),
    ]
    if costly:
        shown.append(table(COSTS_TITLE, COST_COLUMNS, costly, figures.setting_of))
    return Group(*shown, *map(Text, notes))


def failures(plan: Plan, store: Store) -> dict[str, str]:
    """Why methods are missing or incomplete, by method: one line, then the end of a log."""
    turns = (store.turns.get((name, repetition)) for repetition, name in plan.turns())
    return {turn.method: turn.error for turn in turns if turn is not None and turn.error}


def failed_lines(failed: Mapping[str, str]) -> list[Text]:
    return [Text(f"{m} failed: {e.splitlines()[0]}", "bold red") for m, e in failed.items()]


def write(plan: Plan, store: Store, about: Mapping[str, Any], console: Console) -> Path:
    """Print the tables and write all files.

    Args:
        about: how it was made: at least the target.

    Returns:
        The page.
    """
    rows, notes = figures.rows(plan, store)
    failed = failures(plan, store)
    shown = Group(tables(rows, notes), *failed_lines(failed))
    console.print(shown)
    folder = store.folder
    result = {
        **about,
        "complete": all(cell in store.measured for cell in plan.all_cells()),
        "failed": failed,
        "speedup": {
            row["method"]: row["speedup"]["median"]
            for row in rows
            if figures.setting_of(row) == figures.setting_of(rows[0]) and row["speedup"]
        },
        "rows": rows,
        "servers": [asdict(turn) for turn in store.turns.values()],
    }
    write_json(folder / "compare.json", result)
    images = plots.draw(rows)
    for name, content in images.items():
        write_whole(folder / name, content)
    facts = {f"{name}": value for name, value in about.items()}
    facts |= {m: " ".join(turn.command) for (m, _), turn in store.turns.items() if turn.command}
    told = [*EXPLAINED, *failed.values(), *(f"{name}: {value}" for name, value in facts.items())]
    page = render(f"Speculative methods on {about['target']}", [shown, *map(Text, told)], images)
    return write_whole(folder / "compare.html", page.encode())


def render(title: str, shown: Sequence[RenderableType], images: Mapping[str, bytes]) -> str:
    """One page that needs no other file: what a terminal would show, and figures."""
    console = Console(record=True, file=io.StringIO(), width=260)
    for part in shown:
        console.print(part, "")
    body = console.export_html(inline_styles=True, code_format="{code}")
    data = {name: base64.b64encode(content).decode() for name, content in images.items()}
    tags = (f'<p><img alt="{n}" src="data:image/png;base64,{d}"></p>' for n, d in data.items())
    return PAGE.format(title=escape(title), text=body, images="".join(tags))
