"""What each method cost in a comparison: bytes of weights and FLOPs a token, and what was wasted.

Owns the second table, for requests that come one at a time: in a batch one pass serves several, and
cannot be told apart. The arithmetic is `cost_accounting.py`'s.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.compare.load import Measurement
from benchmarks.compare.methods import Arguments
from benchmarks.compare.metrics import Row
from benchmarks.compare.page import simple_table
from benchmarks.compare.run import Plan
from benchmarks.compare.store import Cell
from benchmarks.compare.table import NONE
from benchmarks.cost_accounting import Account, Emitted, Ledger, account, account_drafter
from benchmarks.demo.report import total
from benchmarks.served import Target, load_drafter, load_heads, load_target
from vllm_adadecode.errors import AdaDecodeError

TITLE = "What it cost, one request at a time (wasted: of all bytes / of all FLOPs)"
EXPLAINED = (
    "Weights read, and floating-point operations, behind the first token of each request; without "
    "the KV cache, and without prompts. A step of the target, and a pass of a drafter, read their "
    "weights once. Wasted: on drafts that verification rejected, on head checks without a draft, "
    "on gates; shares of all bytes / of all FLOPs. An accepted draft costs, in bytes of vanilla "
    "tokens, what went beyond one of them for each verification: below 1 it pays. Predicted: the "
    "speed-up if time were spent on reading weights alone. Measured: tokens/s of vanilla's, over "
    "whole requests."
)


@dataclass(frozen=True)
class CostRow:
    """A method in a setting.

    Attributes:
        measured: tokens/s of vanilla's, median of the repetitions.
    """

    method: str
    part: str
    temperature: float
    account: Account
    measured: float | None

    def as_dict(self) -> dict[str, Any]:
        where = {"method": self.method, "part": self.part, "temperature": self.temperature}
        return where | self.account.as_dict() | {"measured_speedup": self.measured}


def rows(
    plan: Plan, measured: Mapping[Cell, Measurement], figures: Sequence[Row]
) -> tuple[list[CostRow], list[str]]:
    """A row for each of ``figures`` whose cost can be told, and why others have none."""
    alone = [row for row in figures if row.concurrency == 1 and row.repetitions]
    if not alone:
        return [], []
    flags = options_of(plan.flags)
    try:
        target = load_target(plan.target, flags.get("dtype", "auto"), flags.get("quantization"))
    except AdaDecodeError as error:
        return [], [f"What methods cost is not told: {error}"]
    accounts = {name: _account_of(plan, name, target) for name in {r.method for r in alone}}
    found, notes = [], []
    for row in alone:
        cells = [
            m
            for cell, m in measured.items()
            if (cell.method, cell.part, cell.temperature, cell.concurrency)
            == (row.method, *row.setting)
        ]
        try:
            spent = accounts[row.method](cells)
        except AdaDecodeError as error:
            notes.append(f"What {row.method} cost is not told: {error}")
            continue
        if spent is not None:
            ratio = row.ratio.median if row.ratio else None
            found.append(CostRow(row.method, row.part, row.temperature, spent, ratio))
    return found, list(dict.fromkeys(notes))


def options_of(flags: Sequence[str]) -> dict[str, str]:
    """Values of `--name value` and `--name=value`, the last of each, by name."""
    found = {}
    for flag, following in zip_longest(flags, flags[1:], fillvalue=""):
        name, equals, value = flag.partition("=")
        if name.startswith("--"):
            found[name.removeprefix("--")] = value if equals else following
    return found


def _account_of(
    plan: Plan, method: str, target: Target
) -> Callable[[Sequence[Measurement]], Account | None]:
    """How to count what a method's measurements have cost; may raise `AdaDecodeError`."""
    how = plan.methods[method]
    flags = options_of(how.flags) if isinstance(how, Arguments) else {}
    options: dict[str, Any] = json.loads(flags.get("speculative-config", "{}"))

    def of_none(cells: Sequence[Measurement]) -> Account | None:
        raise AdaDecodeError(str(how))

    def of_adadecode(cells: Sequence[Measurement]) -> Account | None:
        stats = [dict(m.stats) for m in cells if m.stats is not None]
        if not stats:
            raise AdaDecodeError("its counts were not kept")
        return account(total(stats), target, load_heads(plan.target, target, options))

    def of_another(cells: Sequence[Measurement]) -> Account | None:
        drafter = load_drafter(target, options)
        if drafter is None:
            raise AdaDecodeError(f"the size of the drafter in {options['model']} is not known")
        return account_drafter(emitted(cells), target, drafter)

    if not isinstance(how, Arguments):
        return of_none
    return of_adadecode if options.get("method") == "adadecode" else of_another


def emitted(cells: Sequence[Measurement]) -> Emitted:
    """What vLLM counted."""
    return Emitted(
        tokens=sum(m.output_tokens - len(m.ttft_ms) for m in cells),
        steps=sum(m.steps for m in cells),
        draft_tokens=sum(m.draft_tokens for m in cells),
        accepted_tokens=sum(m.accepted_tokens for m in cells),
    )


def _megabytes(row: CostRow) -> str:
    return f"{row.account.bytes.per_token / 1e6:.4g}"


def _gigaflops(row: CostRow) -> str:
    return f"{row.account.flops.per_token / 1e9:.4g}"


def _of_vanilla(name: str) -> Callable[[CostRow], str]:
    return lambda row: f"{getattr(row.account, name).of_vanilla:.3f}"


def _wasted(why: str) -> Callable[[CostRow], str]:
    def share(ledger: Ledger) -> float:
        return ledger.wasted.get(why, 0.0)

    def show(row: CostRow) -> str:
        both = share(row.account.bytes), share(row.account.flops)
        return f"{both[0]:.1%} / {both[1]:.1%}" if any(both) else NONE

    return show


def _accepted_draft(row: CostRow) -> str:
    one = row.account.bytes.accepted_draft_of_vanilla
    return NONE if one is None else f"{one:.2f}"


def _measured(row: CostRow) -> str:
    return NONE if row.measured is None else f"{row.measured:.2f}"


# Title, and what a row has in that column.
COLUMNS: tuple[tuple[str, Callable[[CostRow], str]], ...] = (
    ("method", lambda row: row.method),
    ("data", lambda row: row.part),
    ("temperature", lambda row: f"{row.temperature:g}"),
    ("MB a token", _megabytes),
    ("of vanilla's", _of_vanilla("bytes")),
    ("GFLOP a token", _gigaflops),
    ("of vanilla's", _of_vanilla("flops")),
    ("wasted: rejected drafts", _wasted("rejected_drafts")),
    ("wasted: checks", _wasted("checks_not_followed")),
    ("wasted: gates", _wasted("gates")),
    ("an accepted draft, tokens", _accepted_draft),
    ("predicted", lambda row: f"{row.account.predicted_speedup:.2f}"),
    ("measured", _measured),
)


def print_table(console: Console, spent: Sequence[CostRow], notes: Sequence[str]) -> None:
    if spent:
        table = Table(title=TITLE, title_justify="left")
        for title, _ in COLUMNS:
            named = title in ("data", "method")
            table.add_column(title, justify="left" if named else "right", no_wrap=named)
        for row in spent:
            table.add_row(*(show(row) for _, show in COLUMNS))
        console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)


def html(spent: Sequence[CostRow], notes: Sequence[str]) -> str:
    """The part of the page; empty if there is nothing to say."""
    if not spent and not notes:
        return ""
    lines = "".join(f"<p>{escape(note)}</p>" for note in notes)
    shown = f'<div class="wide">{simple_table(COLUMNS, spent)}</div>' if spent else ""
    return f'<h2>{escape(TITLE)}</h2><p class="note">{escape(EXPLAINED)}</p>{shown}{lines}'


def as_csv(spent: Sequence[CostRow]) -> str:
    """One line a row, plain numbers; what is inside something is named with a dot."""
    flat = [_flat(row.as_dict()) for row in spent]
    # Methods differ in what they spend something on.
    names = list(dict.fromkeys(name for values in flat for name in values))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return stream.getvalue()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
