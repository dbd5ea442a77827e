"""From measurements to the figures of a comparison: one row for each method in each setting.

Owns what a figure means. Ratios are taken within one repetition,
where both servers met the same machine, and only then summed up. What methods cost is told of
requests that come one at a time: in a batch one step serves several.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from benchmarks import costs
from benchmarks.compare.methods import Arguments
from benchmarks.compare.run import Plan, Store, Turn
from benchmarks.counts import ratio, total
from benchmarks.load import Measurement
from vllm_adadecode.errors import AdaDecodeError

BASELINE, OURS = "vanilla", "adadecode"

# JSON-ready; see `_row`.
Row = Mapping[str, Any]
Setting = tuple[str, float, int]


def setting_of(row: Row) -> Setting:
    return row["part"], row["temperature"], row["concurrency"]


def rows(plan: Plan, store: Store) -> tuple[list[Row], list[str]]:
    """All rows, setting by setting, methods in the order of the plan; and why costs are missing."""
    cells = plan.all_cells()
    found: list[Row] = []
    accounts = _Accounts(plan)
    for setting in dict.fromkeys(cell.setting for cell in cells):
        measured = {
            method: {
                c.repetition: store.measured[c]
                for c in cells
                if c.setting == setting and c.method == method and c in store.measured
            }
            for method in plan.methods
        }
        for method, own in measured.items():
            turns = [turn for turn in store.turns.values() if turn.method == method]
            row = _row(method, setting, own, measured.get(BASELINE, {}), turns)
            alone = setting[2] == 1 and own
            cost = accounts.of(method, own.values()) if alone else None
            found.append(row | {"costs": cost})
    return found, list(accounts.notes)


def _row(
    method: str,
    setting: Setting,
    own: Mapping[int, Measurement],
    base: Mapping[int, Measurement],
    turns: Sequence[Turn],
) -> dict[str, Any]:
    """A method in a setting. None: not measured, or it has no meaning there.

    Args:
        own, base: its measurements and vanilla's, by repetition.

    Returns:
        ``tokens_per_s``: output tokens, median of the repetitions. ``speedup``: their ratio to
        vanilla's in the same repetition. ``ttft_ms``, ``tpot_ms``: over the requests of all
        repetitions. ``mean_acceptance_length``: behind the first token of each request; 1 without a
        method. ``layers_executed_per_token``: of AdaDecode with one request at once, 1 is plain
        decoding. ``identical``, ``compared``: outputs that are vanilla's, of how many; at
        temperature 0 only, and with the same concurrency; vanilla's own are compared with its first
        repetition. ``memory_gib``: of the server's processes, the largest. ``failed``:
        requests without an answer.
    """
    of = list(own.values())
    steps, drafted = sum(m.steps for m in of), sum(m.drafted for m in of)
    # In a batch a step serves several requests.
    stats = [m.stats for m in of if m.stats is not None and setting[2] == 1]
    identical, compared = same_outputs(method, own, base) if setting[1] == 0 else (None, None)
    return {
        "method": method,
        **dict(zip(("part", "temperature", "concurrency"), setting, strict=True)),
        "runner": next((t.runner for t in turns if t.runner), None),
        "repetitions": len(own),
        "tokens_per_s": _median(m.tokens_per_s for m in of),
        "speedup": _speedup(own, base),
        "ttft_ms": _percentiles(x for m in of for x in m.ttft_ms),
        "tpot_ms": _percentiles(x for m in of for x in m.tpot_ms),
        "mean_acceptance_length": ratio(sum(m.behind_first for m in of), steps),
        "draft_acceptance_rate": ratio(sum(m.accepted for m in of), drafted),
        "draft_tokens_per_token": ratio(drafted, sum(m.behind_first for m in of)),
        "layers_executed_per_token": total(stats)["layers_executed_per_token"] if stats else None,
        "identical": identical,
        "compared": compared,
        "memory_gib": max((t.peak_memory / 2**30 for t in turns if t.peak_memory), default=None),
        "startup_s": _median(t.startup_s for t in turns if t.startup_s is not None),
        "failed": sum(m.failed for m in of),
    }


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.median(known) if known else None


def _percentiles(values: Iterable[float]) -> dict[str, float] | None:
    known = list(values)
    if not known:
        return None
    return {f"p{p}": float(np.percentile(known, p)) for p in (50, 99)}


def _speedup(
    own: Mapping[int, Measurement], base: Mapping[int, Measurement]
) -> dict[str, float] | None:
    ratios = [own[r].tokens_per_s / base[r].tokens_per_s for r in own.keys() & base.keys()]
    if not ratios:
        return None
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def same_outputs(
    method: str, own: Mapping[int, Measurement], base: Mapping[int, Measurement]
) -> tuple[int | None, int | None]:
    """How many outputs are vanilla's in the same repetition, and of how many."""
    if method == BASELINE:
        pairs = [(own[r], base[min(base)]) for r in own if r != min(base)]
    else:
        pairs = [(own[r], base[r]) for r in own if r in base]
    if not pairs:
        return None, None
    same = sum(
        a == b for mine, his in pairs for a, b in zip(mine.outputs, his.outputs, strict=True)
    )
    return same, sum(len(mine.outputs) for mine, _ in pairs)


class _Accounts:
    """What methods have cost.

    Attributes:
        notes: why some have no account.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.notes: dict[str, None] = {}
        flags = options_of(plan.flags)
        self.target = None
        try:
            self.target = costs.load_target(
                plan.target, flags.get("dtype", "auto"), flags.get("quantization")
            )
        except AdaDecodeError as error:
            self._note("methods", error)

    def of(self, method: str, measured: Iterable[Measurement]) -> dict[str, Any] | None:
        if self.target is None:
            return None
        try:
            return self._account(self.target, method, list(measured))
        except AdaDecodeError as error:
            self._note(method, error)
            return None

    def _note(self, what: str, error: Exception) -> None:
        self.notes[f"What {what} cost is not told: {error}"] = None

    def _account(
        self, target: costs.Target, method: str, measured: Sequence[Measurement]
    ) -> dict[str, Any] | None:
        how = self.plan.methods[method]
        if not isinstance(how, Arguments):
            raise AdaDecodeError(str(how))
        given = options_of(how.flags).get("speculative-config", "{}")
        options: dict[str, Any] = json.loads(given)
        if options.get("method") == OURS:
            stats = [m.stats for m in measured if m.stats is not None]
            if not stats:
                raise AdaDecodeError("its counts were not kept")
            heads = costs.load_heads(self.plan.target, options)
            return costs.account(total(stats), target, heads)
        drafter = costs.load_drafter(target, options)
        if drafter is None:
            raise AdaDecodeError(f"the size of the drafter in {options['model']} is not known")
        return costs.account_drafter(
            target,
            drafter,
            tokens=sum(m.behind_first for m in measured),
            steps=sum(m.steps for m in measured),
            drafted=sum(m.drafted for m in measured),
            accepted=sum(m.accepted for m in measured),
        )


def options_of(flags: Sequence[str]) -> dict[str, str]:
    """Values of `--name value` and `--name=value`, the last of each, by name."""
    found = {}
    for flag, following in zip_longest(flags, flags[1:], fillvalue=""):
        name, equals, value = flag.partition("=")
        if name.startswith("--"):
            found[name.removeprefix("--")] = value if equals else following
    return found
