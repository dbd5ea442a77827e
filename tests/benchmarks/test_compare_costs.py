"""What a comparison says that methods cost, from measurements without servers."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.compare import costs, metrics, report, run, workload
from benchmarks.compare.load import Measurement
from benchmarks.compare.methods import Arguments, NotReadyError
from benchmarks.compare.store import Cell, Store
from tests.support.engines import DEMO_MODEL
from vllm_adadecode.metrics.counters import Counters, ExitCounters

# A verification of 8 layers behind which 3 tokens come, and 4 layers for the rejected draft.
STATS = Counters(
    8,
    {
        2: ExitCounters(heads_evaluated=4, draft_tokens=2, accepted_tokens=2),
        4: ExitCounters(gates_evaluated=1, heads_evaluated=1, draft_tokens=1, rejected_tokens=1),
    },
    verification_steps=1,
    deferred_steps=1,
    generated_tokens=3,
    draft_layers=10,
    verification_layers=6,
    draft_token_layers=12,
    verify_token_layers=20,
).snapshot()
METHODS: dict[str, Arguments | NotReadyError] = {
    "vanilla": Arguments(),
    "adadecode@0.5": Arguments(("--speculative-config", '{"method": "adadecode"}')),
    "ngram": Arguments(("--speculative-config", '{"method": "ngram"}')),
    "eagle3": Arguments(("--speculative-config", '{"method": "eagle3", "model": "no/such"}')),
    "medusa": NotReadyError("no drafter in X"),
}
PLAN = run.Plan(
    target=str(DEMO_MODEL),
    methods=METHODS,
    parts=[workload.Part("one", ((1, 2),), 10)],
    temperatures=[0.0],
    concurrencies=[1, 4],
    repetitions=2,
    flags=("--host", "127.0.0.1", "--dtype", "auto", "--dtype=float32", "--enforce-eager"),
)


def measurement(**values: Any) -> Measurement:
    base = Measurement(
        seconds=1.0,
        output_tokens=20,
        ttft_ms=(5.0, 7.0),
        tpot_ms=(1.0, 2.0),
        steps=18,
        draft_tokens=0,
        accepted_tokens=0,
        outputs=("a", "b"),
    )
    return replace(base, **values)


def measured() -> dict[Cell, Measurement]:
    found = {}
    for cell in PLAN.all_cells():
        values: dict[str, Any] = {}
        if cell.method.startswith("adadecode"):
            values = {"seconds": 0.5, "stats": STATS if cell.concurrency == 1 else None}
        elif cell.method != "vanilla":
            values = {"steps": 9, "draft_tokens": 12, "accepted_tokens": 9}
        if cell.method != "medusa":
            found[cell] = measurement(**values)
    return found


def rows(
    measured: Mapping[Cell, Measurement], plan: run.Plan = PLAN
) -> tuple[dict[str, costs.CostRow], list[str]]:
    figures = metrics.rows(plan.all_cells(), measured, [])
    found, notes = costs.rows(plan, measured, figures)
    assert len({row.method for row in found}) == len(found)
    return {row.method: row for row in found}, notes


def test_each_method_is_counted_in_its_own_way() -> None:
    found, notes = rows(measured())
    assert list(found) == ["vanilla", "adadecode@0.5", "ngram"]
    assert notes == [
        "What eagle3 cost is not told: the size of the drafter in no/such is not known"
    ]
    vanilla = found["vanilla"].account
    assert (vanilla.bytes.of_vanilla, vanilla.tokens) == (1, 36)
    # In float32: the last of two says so.
    layer = 256 * (2 * 256 + 2 * 128) + 3 * 256 * 704
    assert vanilla.bytes.per_token == 4 * (8 * layer + 256 * 2048)
    assert found["ngram"].account.predicted_speedup == pytest.approx(2)
    mine = found["adadecode@0.5"]
    # Both repetitions together.
    assert mine.account.tokens == 6
    passes = mine.account.counts["layers_executed"]
    assert passes == {"all": 32, "rejected_drafts": 8, "never_verified": 0}
    assert mine.measured == pytest.approx(2)


def test_costs_that_can_not_be_told() -> None:
    """A line for each method, or one for all; the comparison itself does not fail."""
    before = {cell: replace(m, stats=None) for cell, m in measured().items()}
    found, notes = rows(before)
    assert "adadecode@0.5" not in found
    assert "What adadecode@0.5 cost is not told: its counts were not kept" in notes
    several = STATS | {"verification_steps": 2}
    _, notes = rows({cell: replace(m, stats=several) for cell, m in measured().items()})
    assert any("one request at a time" in note for note in notes)
    # Measured once; its drafter is gone.
    gone = replace(PLAN, methods=METHODS | {"ngram": NotReadyError("no drafter")})
    found, notes = rows(measured(), gone)
    assert "ngram" not in found
    assert "What ngram cost is not told: no drafter" in notes
    found, notes = rows(measured(), replace(PLAN, target="no/such/model"))
    assert not found
    assert len(notes) == 1
    assert "no/such/model can't be read" in notes[0]


def test_batches_have_no_costs() -> None:
    many = {cell: m for cell, m in measured().items() if cell.concurrency == 4}
    assert rows(many) == ({}, [])


def test_everything_is_written(tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    for cell, of in measured().items():
        store.save(cell, of)
    console = Console(width=200, record=True)
    report.write(PLAN, store, {"target": "T"}, console)
    text = console.export_text()
    assert costs.TITLE in text
    assert "What eagle3 cost is not told" in text
    html = (tmp_path / "compare.html").read_text()
    for title, _ in costs.COLUMNS:
        assert escape(title) in html
    (mine,) = [
        row
        for row in json.loads((tmp_path / "compare.json").read_text())["costs"]
        if row["method"] == "adadecode@0.5"
    ]
    assert mine["predicted_speedup"] == pytest.approx(1 / mine["bytes"]["of_vanilla"])
    assert mine["measured_speedup"] == pytest.approx(2)
    lines = list(csv.DictReader(io.StringIO((tmp_path / "costs.csv").read_text())))
    assert [line["method"] for line in lines] == ["vanilla", "adadecode@0.5", "ngram"]
    assert float(lines[1]["bytes.wasted.rejected_drafts"]) == pytest.approx(
        mine["bytes"]["wasted"]["rejected_drafts"]
    )
    assert lines[0]["bytes.wasted.gates"] == ""
    assert float(lines[0]["bytes.of_vanilla"]) == 1


def test_options_of_a_command() -> None:
    flags = ("--a", "1", "--b=2", "--a", "3", "--d={}", "--e")
    assert costs.options_of(flags) == {"a": "3", "b": "2", "d": "{}", "e": ""}
    assert costs.options_of(()) == {}
