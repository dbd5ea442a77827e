"""The figures of a comparison as text: columns, the table in the terminal, CSV.

Owns titles and number formats, for the page as well.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table

from benchmarks.compare.metrics import Row
from benchmarks.compare.store import Turn

NONE = "-"
RATIO = "of vanilla's"


def _number(form: str, name: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = getattr(row, name)
        return NONE if value is None else form.format(value)

    return show


def _ratio(row: Row) -> str:
    ratio = row.ratio
    if ratio is None:
        return NONE
    if row.repetitions == 1:
        return f"{ratio.median:.2f}"
    return f"{ratio.median:.2f} ({ratio.least:.2f}-{ratio.most:.2f})"


def _pair(name: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        middle, high = getattr(row, f"{name}_p50"), getattr(row, f"{name}_p99")
        return NONE if middle is None else f"{middle:.3g} / {high:.3g}"

    return show


def _memory(row: Row) -> str:
    return NONE if row.peak_memory is None else f"{row.peak_memory / 2**30:.2f}"


def _identical(row: Row) -> str:
    return NONE if row.compared is None else f"{row.identical} of {row.compared}"


# Title, and what a row has in that column.
COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("method", lambda row: row.method),
    ("runner", _number("{}", "runner")),
    ("tokens/s", _number("{:.1f}", "tokens_per_s")),
    (RATIO, _ratio),
    ("TPOT ms, p50 / p99", _pair("tpot_ms")),
    ("TTFT ms, p50 / p99", _pair("ttft_ms")),
    ("mean acceptance length", _number("{:.2f}", "mean_acceptance_length")),
    ("draft acceptance rate", _number("{:.1%}", "draft_acceptance_rate")),
    ("layers executed per token", _number("{:.3f}", "layers_executed_per_token")),
    ("as vanilla's", _identical),
    ("no answer", lambda row: str(row.failed) if row.failed else NONE),
)


# Of a server, whatever it is asked.
SERVER_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("method", lambda row: row.method),
    ("runner", _number("{}", "runner")),
    ("start s", _number("{:.0f}", "startup_s")),
    ("memory GiB", _memory),
)


def servers(rows: Sequence[Row]) -> list[Row]:
    """A row of each method that ran."""
    return list({row.method: row for row in rows if row.repetitions}.values())


def failures(turns: Sequence[Turn]) -> dict[str, str]:
    """Why methods are missing or incomplete, by method."""
    return {turn.method: turn.error for turn in turns if turn.error is not None}


def short(error: str) -> str:
    """What went wrong, without the end of a log."""
    return error.splitlines()[0]


def print_table(
    console: Console, rows: Sequence[Row], turns: Sequence[Turn], sentences: Sequence[str]
) -> None:
    failed = failures(turns)
    table = Table(title="Speculative methods on one target", title_justify="left")
    for title in ("data", "temperature", "at once", *(title for title, _ in COLUMNS)):
        named = title in ("data", "method")
        table.add_column(title, justify="left" if named else "right", no_wrap=named)
    for setting, group in groupby(rows, key=lambda row: row.setting):
        table.add_section()
        for row in group:
            if row.repetitions or row.method not in failed:
                where = (setting[0], f"{setting[1]:g}", str(setting[2]))
                table.add_row(*where, *(show(row) for _, show in COLUMNS))
    console.print(table)
    table = Table(title="Servers", title_justify="left")
    for title, _ in SERVER_COLUMNS:
        table.add_column(title, justify="left" if title == "method" else "right")
    for row in servers(rows):
        table.add_row(*(show(row) for _, show in SERVER_COLUMNS))
    console.print(table)
    for sentence in sentences:
        console.print(sentence, markup=False)
    for method, error in failed.items():
        console.print(f"{method} failed: {short(error)}", style="bold red", markup=False)


def as_csv(rows: Sequence[Row]) -> str:
    """One line a row, plain numbers."""
    stream = io.StringIO()
    flat = [
        {k: v for k, v in row.as_dict().items() if k != "ratio"}
        | {
            f"ratio_{name}": getattr(row.ratio, name) if row.ratio else None
            for name in ("median", "least", "most")
        }
        for row in rows
    ]
    writer = csv.DictWriter(stream, list(flat[0]) if flat else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return stream.getvalue()
