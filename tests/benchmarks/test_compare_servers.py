"""The comparison from end to end: real servers of the demo target, one of which does not start."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "INFO", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("compare")
    options = [
        *("--methods", "vanilla,adadecode,eagle3,ngram", "--drafter", "eagle3=no/such/folder"),
        *("--data", "demo", "--prompts", "3", "--tokens", "32", "--repetitions", "1"),
        *("--concurrency", "1,3", "--out", str(out)),
        # What is counted would depend on how fast the tests run.
        *("--spec", 'adadecode={"cost_aware": false}'),
        "--serve-args=--enforce-eager --kv-cache-memory-bytes 100663296",
    ]
    command = [sys.executable, "-m", "benchmarks.compare", *options]
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | ENVIRONMENT
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return {"out": out, "printed": ended.stdout, **json.loads((out / "compare.json").read_text())}


def rows(result: Any, method: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["method"] == method and row["repetitions"]]


@pytest.mark.slow
def test_every_method_is_measured_in_every_setting(result: Any) -> None:
    settings = {
        (part, temperature, at_once)
        for part in ("held-out files", "trained files")
        for temperature in (0.0, 0.7)
        for at_once in (1, 3)
    }
    for method in ("vanilla", "adadecode", "ngram"):
        found = rows(result, method)
        assert {(r["part"], r["temperature"], r["concurrency"]) for r in found} == settings
        assert all(r["speedup"]["median"] > 0 and not r["failed"] for r in found)
        assert all(r["tpot_ms"]["p99"] >= r["tpot_ms"]["p50"] > 0 for r in found)
        assert all(r["memory_gib"] > 1 / 8 and r["startup_s"] > 0 for r in found)


@pytest.mark.slow
def test_outputs_are_vanillas(result: Any) -> None:
    for method in ("adadecode", "ngram"):
        greedy = [r for r in rows(result, method) if r["temperature"] == 0]
        assert [(r["identical"], r["compared"]) for r in greedy] == [(3, 3)] * 4


@pytest.mark.slow
def test_counts_come_from_the_servers(result: Any) -> None:
    assert all(r["mean_acceptance_length"] == 1 for r in rows(result, "vanilla"))
    found = rows(result, "adadecode")
    assert all(
        r["mean_acceptance_length"] > 1 and 0.5 < r["draft_acceptance_rate"] <= 1 for r in found
    )
    alone = [r["layers_executed_per_token"] for r in found if r["concurrency"] == 1]
    assert all(0.3 < passes < 1 for passes in alone)
    # The method's own counts do not depend on how many requests run at once.
    greedy = [r for r in found if r["temperature"] == 0 and r["part"] == "trained files"]
    assert len({round(r["mean_acceptance_length"], 6) for r in greedy}) == 1


@pytest.mark.slow
def test_costs_are_counted_alone(result: Any) -> None:
    """One row a method and setting with one request at a time, nothing unaccounted for."""
    methods = ("vanilla", "adadecode", "ngram")
    found = {m: [r["costs"] for r in rows(result, m) if r["costs"]] for m in methods}
    assert all(len(of) == 4 for of in found.values())
    assert all(cost["bytes"]["of_vanilla"] == 1 for cost in found["vanilla"])
    for cost in found["adadecode"]:
        assert cost["wasted"]["layers"]["never_verified"] == [0, 0]
        assert cost["tokens"] == 3 * 31
        assert 0.5 < cost["bytes"]["of_vanilla"] < 1
    assert all(cost["flops"]["of_vanilla"] > 1 for cost in found["ngram"])


@pytest.mark.slow
def test_each_runner_is_named(result: Any) -> None:
    runners = {row["method"]: row["runner"] for row in result["rows"] if row["runner"]}
    assert runners == {"vanilla": "V1", "adadecode": "V2", "ngram": "V1"}


@pytest.mark.slow
def test_a_server_that_does_not_start_is_reported(result: Any) -> None:
    assert not rows(result, "eagle3")
    assert list(result["failed"]) == ["eagle3"]
    assert "no/such/folder" in result["failed"]["eagle3"]
    line = next(x for x in result["printed"].splitlines() if x.startswith("eagle3 failed: "))
    assert "Invalid repository ID or local directory" in line
    assert not result["complete"]


@pytest.mark.slow
def test_all_files_are_there(result: Any) -> None:
    names = {path.name for path in result["out"].iterdir()}
    wanted = {"compare.json", "compare.html", "speedup.png", "serving.png"}
    assert wanted <= names
    html = (result["out"] / "compare.html").read_text()
    assert "no/such/folder" in html
    assert len(result["rows"]) == 4 * 8
