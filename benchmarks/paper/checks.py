"""The paper's three sanity experiments: does what was measured come out as it must?

Owns the three verdicts. Two rest on counts and outputs alone, which are exact; the first one on
times as well, and says how much these differ between two servers without the method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.compare.metrics import SAME, Ratio
from benchmarks.paper.points import Point, by_setting, swept, title
from benchmarks.paper.settings import OFF, UNVERIFIED, name_of

VANILLA = "vanilla"
# A second server without the method: what its figures differ by is not the method's.
CONTROL = "vanilla@again"


@dataclass(frozen=True)
class Experiment:
    """
    Attributes:
        name: what is done.
        expected: what has to come out.
        found: what came out, a line for each setting.
        passed: None: not everything that it needs was measured.
    """

    name: str
    expected: str
    found: tuple[str, ...]
    passed: bool | None


def judge(points: Sequence[Point], gamma: float) -> list[Experiment]:
    """All three.

    Args:
        points: of vanilla, `CONTROL`, no early prediction, a sweep, and `gamma` unverified.
        gamma: at which verification was turned off.
    """
    return [
        _experiment(
            "gamma 1: no early prediction",
            "none, and as fast as vanilla, but for what two vanilla servers differ by",
            points,
            (VANILLA, CONTROL, name_of(OFF)),
            _as_fast,
        ),
        _experiment(
            f"verification off at gamma {gamma:g}",
            "outputs are vanilla's with verification, and drift without",
            points,
            (VANILLA, name_of(gamma), name_of(gamma) + UNVERIFIED),
            _drift,
        ),
        _experiment(
            "gamma from low to high",
            "fewer early predictions, of which more are accepted",
            [p for p in points if p.gamma != OFF],
            (VANILLA, *dict.fromkeys(p.row.method for p in points if _is_swept(p))),
            _trade,
        ),
    ]


def _is_swept(point: Point) -> bool:
    return point.gamma is not None and point.gamma != OFF


Verdict = Callable[[Sequence[Point]], tuple[str, bool]]


def _experiment(
    name: str, expected: str, points: Sequence[Point], needs: Sequence[str], verdict: Verdict
) -> Experiment:
    """Judged in every setting; passed if it is in all of them."""
    lines, all_passed = [], True
    for group in by_setting(points).values():
        # A method that was measured, but never beside vanilla, has no ratio.
        known = {p.row.method for p in group if p.row.ratio is not None}
        missing = [method for method in needs if method not in known]
        if missing:
            return Experiment(name, expected, (f"not measured: {', '.join(missing)}",), None)
        line, passed = verdict([p for p in group if p.row.method in known])
        lines.append(f"{title(group[0])}: {line}")
        all_passed &= passed
    return Experiment(name, expected, tuple(lines), all_passed if lines else None)


def _as_fast(group: Sequence[Point]) -> tuple[str, bool]:
    """No drafts, and the repetitions' median no farther from 1 than the control's farthest."""
    control, off = _ratio(group, CONTROL), _ratio(group, name_of(OFF))
    noise = max(1 - control.least, control.most - 1, SAME)
    drafts = next(p.drafts_per_token for p in group if p.gamma == OFF)
    text = (
        f"{drafts or 0:.2f} early predictions a token, {_spread(off)} of vanilla's tokens/s; a "
        f"second vanilla {_spread(control)}"
    )
    return text, not drafts and abs(off.median - 1) <= noise


def _drift(group: Sequence[Point]) -> tuple[str, bool]:
    off = next(p for p in group if p.row.method.endswith(UNVERIFIED))
    on = next(p for p in group if p.row.method == off.row.method.removesuffix(UNVERIFIED))
    assert on.row.identical is not None
    assert off.row.identical is not None
    text = (
        f"with verification {on.row.identical} of {on.row.compared} outputs are vanilla's, "
        f"without {off.row.identical} of {off.row.compared}"
    )
    return text, on.row.identical == on.row.compared and off.row.identical < on.row.identical


def _trade(group: Sequence[Point]) -> tuple[str, bool]:
    found = swept(group)
    low, high = found[0], found[-1]
    text = "; ".join(
        f"at {p.gamma:g} {p.drafts_per_token or 0:.2f} early predictions a token, "
        f"{_acceptance(p):.1%} accepted, {_ratio([p], p.row.method).median:.2f} of "
        "vanilla's tokens/s"
        for p in (low, high)
    )
    fewer = (low.drafts_per_token or 0) > (high.drafts_per_token or 0)
    return text, fewer and (
        high.row.draft_acceptance_rate is None or _acceptance(low) <= _acceptance(high)
    )


def _acceptance(point: Point) -> float:
    return point.row.draft_acceptance_rate or 0.0


def _ratio(group: Sequence[Point], method: str) -> Ratio:
    found = next(p.row.ratio for p in group if p.row.method == method)
    assert found is not None
    return found


def _spread(ratio: Ratio) -> str:
    return f"{ratio.median:.3f} ({ratio.least:.3f} to {ratio.most:.3f})"
