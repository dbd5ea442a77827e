"""The figures of AdaDecode's variants: a comparison's rows, and what the paper's experiments add.

Owns `Point` and what its figures mean; all others are `benchmarks.compare.metrics`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.compare import metrics, report
from benchmarks.compare.load import Measurement
from benchmarks.compare.metrics import Row
from benchmarks.compare.run import Plan
from benchmarks.compare.store import Cell, Store
from benchmarks.paper.settings import gamma_of


@dataclass(frozen=True)
class Point:
    """A variant in a setting.

    Attributes:
        gamma: threshold of all exits in use; None: vanilla, or a variant outside the sweep.
        row: its figures in the comparison.
        drafts_per_token: early predictions made, for each output token behind a request's first;
            those that verification rejects are among them.
        predicted_early: share of these output tokens that were early predictions.
    """

    gamma: float | None
    row: Row
    drafts_per_token: float | None = None
    predicted_early: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Flat but for the ratio; plain numbers."""
        values = asdict(self)
        return values | values.pop("row")


def read(plan: Plan, store: Store) -> list[Point]:
    """All points of a comparison, as far as they are measured, in the order of its rows."""
    cells = plan.all_cells()
    measured = store.load(cells)
    rows = metrics.rows(cells, measured, report.turns_of(plan, store))
    return [point(row, measured) for row in rows]


def point(row: Row, measured: Mapping[Cell, Measurement]) -> Point:
    """A row with what the measurements of its cells say besides."""
    own = [
        found
        for cell, found in measured.items()
        if cell.method == row.method
        and (cell.part, cell.temperature, cell.concurrency) == row.setting
    ]
    behind_first = sum(found.output_tokens - len(found.ttft_ms) for found in own)
    per_verification = row.mean_acceptance_length
    return Point(
        gamma_of(row.method),
        row,
        sum(found.draft_tokens for found in own) / behind_first if behind_first else None,
        # Each verification gives one token of its own.
        1 - 1 / per_verification if per_verification else None,
    )


def swept(points: Iterable[Point]) -> list[Point]:
    """Those of the sweep that were measured, by setting and gamma."""
    found = [p for p in points if p.gamma is not None and p.row.repetitions]
    settings = list(dict.fromkeys(p.row.setting for p in found))
    return sorted(found, key=lambda p: (settings.index(p.row.setting), p.gamma))


def by_setting(points: Sequence[Point]) -> dict[tuple[str, float, int], list[Point]]:
    """Points that differ in their method only, in their order."""
    found: dict[tuple[str, float, int], list[Point]] = {}
    for each in points:
        found.setdefault(each.row.setting, []).append(each)
    return found


def title(point: Point) -> str:
    """Where a point was measured, in words."""
    part, _, concurrency = point.row.setting
    return f"{part}, {concurrency} at once"
