"""The paper's experiments: the figures of a threshold sweep, its report, and the three verdicts."""

import csv
import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from benchmarks.compare.load import Measurement
from benchmarks.compare.metrics import Ratio, Row
from benchmarks.compare.store import Cell
from benchmarks.paper import checks, points, sweep
from benchmarks.paper.points import Point

# --- figures --------------------------------------------------------------------------------------


def measurement(seconds: float = 1.0, **values: Any) -> Measurement:
    """Of two requests of ten tokens each."""
    base = Measurement(seconds, 20, (5.0, 7.0), (1.0, 2.0), 18, 0, 0, ("a", "b"))
    return replace(base, **values)


def test_figures_of_a_point() -> None:
    cells = [Cell("adadecode@0.7", "one", 0.0, 1, repetition) for repetition in range(2)]
    own = {cells[0]: measurement(draft_tokens=12), cells[1]: measurement(draft_tokens=15)}
    others = {
        replace(cells[0], method="adadecode@0.9"): measurement(draft_tokens=1000),
        replace(cells[0], part="two"): measurement(draft_tokens=1000),
    }
    row = replace(make_row("adadecode@0.7"), mean_acceptance_length=2.5)
    found = points.point(row, own | others)
    assert found.gamma == 0.7
    # 27 drafts for the 18 tokens behind the first ones of two requests, twice.
    assert found.drafts_per_token == 0.75
    assert found.predicted_early == pytest.approx(0.6)
    assert found.as_dict()["ratio"]["median"] == 1.0
    assert found.as_dict()["method"] == "adadecode@0.7"


def make_row(method: str, part: str = "one", **values: Any) -> Row:
    same = Ratio(1.0, 0.99, 1.01)
    fields: dict[str, Any] = {"tokens_per_s": 100.0, "ratio": same, "identical": 6, "compared": 6}
    return Row(method, part, 0.0, 1, "V2", 3, **fields | values)


def make_points(part: str = "one") -> list[Point]:
    """All that the sanity experiments need, all as it must be."""
    sweep_row = {"mean_acceptance_length": 2.0, "layers_executed_per_token": 0.7}
    off = {"draft_acceptance_rate": 1.0, "identical": 1}
    fast = {"ratio": Ratio(1.3, 1.2, 1.4), **sweep_row}
    slow = {"ratio": Ratio(0.9, 0.8, 1.1), **sweep_row}
    return [
        Point(1.0, make_row("adadecode@1", part, ratio=Ratio(0.98, 0.97, 1.0)), 0.0, 0.0),
        Point(None, make_row("vanilla", part, mean_acceptance_length=1.0)),
        Point(None, make_row("vanilla@again", part, ratio=Ratio(1.0, 0.96, 1.01))),
        # Out of order: they are sorted by gamma.
        Point(0.9, make_row("adadecode@0.9", part, draft_acceptance_rate=0.95, **fast), 0.6, 0.5),
        Point(0.5, make_row("adadecode@0.5", part, draft_acceptance_rate=0.6, **slow), 0.9, 0.54),
        Point(None, make_row("adadecode@0.5-unverified", part, **off)),
    ]


def test_the_table_is_sorted_by_gamma() -> None:
    console = Console(width=150, record=True)
    sweep.print_table(console, [*make_points(), *make_points("two")])
    lines = [line.split("│") for line in console.export_text().splitlines() if "│" in line]
    assert [(line[1].strip(), line[2].strip()) for line in lines] == [
        (part, gamma) for part in ("one", "two") for gamma in ("vanilla", "0.5", "0.9", "1")
    ]
    assert [cell.strip() for cell in lines[1][3:-1]] == [
        *("100.0", "0.90 (0.80-1.10)", "2.00", "60.0%", "0.700", "6 of 6", "54.0%")
    ]


def test_sentences_of_a_sweep() -> None:
    (found,) = sweep.findings(make_points()[3:])
    assert found == (
        "one, 1 at once: fastest at 0.9 (1.30 of vanilla's tokens/s); slower than vanilla at 0.5. "
        "At 0.5, 60.0% of the early predictions are accepted, and 54.0% of the tokens were "
        "predicted early. At 0.9, 95.0% of the early predictions are accepted, and 50.0% of the "
        "tokens were predicted early."
    )


def test_csv_has_plain_numbers() -> None:
    found = list(csv.DictReader(io.StringIO(sweep.as_csv(make_points()))))
    assert len(found) == 6
    assert [float(found[3][name]) for name in ("gamma", "ratio_least", "predicted_early")] == [
        *(0.9, 1.2, 0.5)
    ]
    assert found[1]["gamma"] == ""


def test_figure_of_a_sweep() -> None:
    one = sweep.draw(make_points())
    assert one.startswith(b"\x89PNG")
    assert len(sweep.draw([*make_points(), *make_points("two")])) > len(one)


# --- verdicts -------------------------------------------------------------------------------------


def changed(found: list[Point], method: str, **values: Any) -> list[Point]:
    """The points with other values in one method's row, or in its point."""

    def change(point: Point) -> Point:
        if point.row.method != method:
            return point
        of_row = {k: v for k, v in values.items() if hasattr(point.row, k)}
        of_point = {k: v for k, v in values.items() if k not in of_row}
        return replace(point, row=replace(point.row, **of_row), **of_point)

    return [change(point) for point in found]


def verdicts(found: list[Point]) -> list[bool | None]:
    return [experiment.passed for experiment in checks.judge(found, 0.5)]


def test_what_comes_out_as_it_must_passes() -> None:
    experiments = checks.judge([*make_points(), *make_points("two")], 0.5)
    assert [e.passed for e in experiments] == [True, True, True]
    assert [len(e.found) for e in experiments] == [2, 2, 2]
    assert experiments[0].found[1] == (
        "two, 1 at once: 0.00 early predictions a token, 0.980 (0.970 to 1.000) of vanilla's "
        "tokens/s; a second vanilla 1.000 (0.960 to 1.010)"
    )
    assert experiments[1].found[0] == (
        "one, 1 at once: with verification 6 of 6 outputs are vanilla's, without 1 of 6"
    )
    assert "at 0.5 0.90 early predictions a token, 60.0% accepted, 0.90" in experiments[2].found[0]


@pytest.mark.parametrize(
    ("method", "values", "wrong"),
    [
        # Two vanilla servers differ by up to 0.04.
        ("adadecode@1", {"ratio": Ratio(0.95, 0.94, 0.99)}, 0),
        ("adadecode@1", {"ratio": Ratio(1.05, 1.0, 1.1)}, 0),
        ("adadecode@1", {"drafts_per_token": 0.1}, 0),
        ("adadecode@0.5", {"identical": 5}, 1),
        # Accepted unseen, and nothing drifts: then verification was not what made it right.
        ("adadecode@0.5-unverified", {"identical": 6}, 1),
        ("adadecode@0.9", {"drafts_per_token": 0.9}, 2),
        ("adadecode@0.5", {"draft_acceptance_rate": 0.96}, 2),
    ],
)
def test_what_does_not_fails_in_any_setting(
    method: str, values: dict[str, Any], wrong: int
) -> None:
    found = verdicts([*make_points("two"), *changed(make_points(), method, **values)])
    assert [passed for i, passed in enumerate(found) if i != wrong] == [True, True]
    assert found[wrong] is False


def test_the_worse_of_two_vanillas_is_the_noise() -> None:
    slower = changed(make_points(), "adadecode@1", ratio=Ratio(0.95, 0.94, 0.99))
    assert verdicts(slower)[0] is False
    assert verdicts(changed(slower, checks.CONTROL, ratio=Ratio(1.0, 1.0, 1.06)))[0] is True


def test_what_was_not_measured_is_no_pass() -> None:
    found = [p for p in make_points() if p.row.method != "adadecode@0.5-unverified"]
    experiments = checks.judge(found, 0.5)
    assert [e.passed for e in experiments] == [True, None, True]
    assert experiments[1].found == ("not measured: adadecode@0.5-unverified",)
    assert verdicts(changed(make_points(), "vanilla", ratio=None)) == [None] * 3
