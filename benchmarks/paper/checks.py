"""The paper's three sanity checks: does what was measured come out as it must?

Owns the three verdicts. Two rest on counts and outputs alone, which are exact; the first one on
times as well, and says how much these differ between two servers without the method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from benchmarks.compare.figures import Row, setting_of
from benchmarks.paper.settings import CONTROL, OFF, UNVERIFIED, VANILLA, gamma_of, name_of
from benchmarks.tables import text

# Nearer to 1 than this, a speed-up is called the same: repetitions differ by as much.
SAME = 0.02
# A line on the rows of a setting, by method, and whether it is as it must be.
Verdict = Callable[[dict[str, Row]], tuple[str, bool]]


def judge(rows: Sequence[Row], gammas: Sequence[float]) -> list[dict[str, Any]]:
    """All three: ``name``, what is ``expected``, what was ``found``, a line for each setting, and
    whether it ``passed`` in all of them (None: not everything that it needs was measured).

    Args:
        rows: of `Settings.variants`.
        gammas: of the sweep, from low to high.
    """
    low = name_of(gammas[0])
    swept = [name_of(gamma) for gamma in gammas]
    return [
        _check(
            "gamma 1: no draft token",
            "none, and as fast as vanilla, but for what two vanilla servers differ by",
            rows,
            (VANILLA, CONTROL, name_of(OFF)),
            _as_fast,
        ),
        _check(
            f"verification off at gamma {gammas[0]:g}",
            "outputs are vanilla's with verification, and drift without",
            rows,
            (VANILLA, low, low + UNVERIFIED),
            lambda by_name: _drift(by_name[low], by_name[low + UNVERIFIED]),
        ),
        _check(
            "gamma from low to high",
            "fewer draft tokens, of which more are accepted",
            rows,
            (VANILLA, *swept),
            lambda by_name: _trade(by_name[low], by_name[swept[-1]]),
        ),
    ]


def _check(
    name: str, expected: str, rows: Sequence[Row], needs: Sequence[str], verdict: Verdict
) -> dict[str, Any]:
    result: dict[str, Any] = {"name": name, "expected": expected}
    lines, passed = [], True
    for _, group in groupby(rows, key=setting_of):
        # A method that was measured, but never beside vanilla, has no speed-up.
        known = {row["method"]: row for row in group if row["speedup"]}
        missing = [method for method in needs if method not in known]
        if missing:
            return result | {"found": [f"not measured: {', '.join(missing)}"], "passed": None}
        line, as_it_must = verdict(known)
        lines.append(f"{where(known[VANILLA])}: {line}")
        passed &= as_it_must
    return result | {"found": lines, "passed": passed if lines else None}


def _as_fast(by_name: dict[str, Row]) -> tuple[str, bool]:
    """No draft tokens, and the median no farther from 1 than the control's farthest."""
    row, control = by_name[name_of(OFF)], by_name[CONTROL]["speedup"]
    noise = max(1 - control["least"], control["most"] - 1, SAME)
    drafts = row["draft_tokens_per_token"] or 0
    spread = "{0[median]:.3f} ({0[least]:.3f} to {0[most]:.3f})"
    line = (
        f"{drafts:.2f} draft tokens a token, speed-up {text(spread, row, 'speedup')}; of a second "
        f"vanilla {spread.format(control)}"
    )
    return line, not drafts and abs(row["speedup"]["median"] - 1) <= noise


def _drift(on: Row, off: Row) -> tuple[str, bool]:
    line = (
        f"with verification {on['identical']} of {on['compared']} outputs are vanilla's, "
        f"without {off['identical']} of {off['compared']}"
    )
    return line, on["identical"] == on["compared"] and off["identical"] < on["identical"]


def _trade(low: Row, high: Row) -> tuple[str, bool]:
    drafts, rates = (
        [row[name] or 0 for row in (low, high)]
        for name in ("draft_tokens_per_token", "draft_acceptance_rate")
    )
    line = "; ".join(
        f"at {gamma_of(row['method']):g} {draft:.2f} draft tokens a token, {rate:.1%} accepted, "
        f"speed-up {row['speedup']['median']:.2f}"
        for row, draft, rate in zip((low, high), drafts, rates, strict=True)
    )
    better = high["draft_acceptance_rate"] is None or rates[0] <= rates[1]
    return line, drafts[0] > drafts[1] and better


def where(row: Row) -> str:
    """A setting in words."""
    return f"{row['part']}, {row['concurrency']} at once"
