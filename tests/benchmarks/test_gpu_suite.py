"""The GPU suite: outputs that differ, parts that fail, results that are kept, the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.gpu_suite import __main__ as command
from benchmarks.gpu_suite import correctness, parts, prompts, settings, table
from benchmarks.gpu_suite.correctness import Difference
from benchmarks.gpu_suite.engine import EngineError
from benchmarks.gpu_suite.parts import Part
from benchmarks.gpu_suite.result import DONE, FAILED, PARTIAL, SKIPPED, Result
from benchmarks.gpu_suite.settings import full
from benchmarks.gpu_suite.suite import PLAIN, Suite
from tests.support.engines import DEMO_MODEL
from tests.support.suite_fakes import (
    SETTINGS,
    FakeClock,
    make_suite,
)
from vllm_adadecode.errors import AdaDecodeError


def outputs_of(
    changes: dict[tuple[int, int], list[int]], scores: dict[str, float] | None = None
) -> Callable[..., Any]:
    """An engine that continues prompt p with [p, 1, 2, 3], but as told at (batch, prompt)."""

    def answer(
        do: str, prompts: Any, tokens: int, at_once: int, logprobs: int | None = None
    ) -> dict[str, Any]:
        if logprobs is not None:
            return {"logprobs": [scores] * len(prompts)}
        ids = [changes.get((at_once, i), [p[0], 1, 2, 3]) for i, p in enumerate(prompts)]
        return {"token_ids": ids, "seconds": 1.0, "stats": None}

    return answer


def test_identical_outputs(tmp_path: Path) -> None:
    suite = make_suite(tmp_path, {"vanilla": outputs_of({}), "adadecode": outputs_of({})})
    found: dict[str, Any] = {}
    correctness.compare(suite, PLAIN, found)
    assert (found["identical"], found["outputs"], found["divergences"]) == (True, 6, 0)
    assert (found["beyond_bound"], found["largest_gap"]) == (0, None)
    assert found["vanilla_against_itself"] == {"1 and 4": 0}


def test_ties_are_told_from_differences(tmp_path: Path) -> None:
    """Each output against vanilla's of the same batch size; vanilla says how close the two were."""
    # Vanilla itself differs at batch 1, and ours in the same way: that is no divergence.
    same = {(1, 1): [20, 1, 9, 9]}
    scores = {"2": -0.7, "7": -0.9, "8": -1.5, "5": -0.6}
    answers = {
        "vanilla": outputs_of(same, scores),
        "adadecode": outputs_of(same | {(4, 2): [30, 1, 7, 3], (4, 3): [40, 1, 8, 3]}),
    }
    found: dict[str, Any] = {}
    suite = make_suite(tmp_path, answers, replace(SETTINGS, tie_bound=0.5))
    correctness.compare(suite, PLAIN, found)
    assert (found["identical"], found["divergences"], found["beyond_bound"]) == (False, 2, 1)
    assert found["vanilla_against_itself"] == {"1 and 4": 1}
    first, second = found["differences"]
    assert first == {
        "batch": 4,
        "prompt": 2,
        "position": 2,
        "vanilla": 2,
        "adadecode": 7,
        # Behind the best one, which neither chose.
        "gap": pytest.approx(0.3),
    }
    assert second["gap"] == pytest.approx(found["largest_gap"]) == pytest.approx(0.9)
    # Vanilla was asked after what both agree on.
    engine: Any = suite.engines["vanilla"]
    assert engine.asked[-1][1]["prompts"] == [[30, 1, 2, 30, 1], [40, 1, 2, 40, 1]]


def test_token_that_vanilla_finds_unlikely_is_no_tie() -> None:
    difference = Difference(1, 0, 0, 3, 4)
    assert correctness.gap(difference, {"3": -0.1, "9": -5.0}) is None
    assert correctness.gap(difference, {"3": -0.1, "4": -2.1}) == pytest.approx(2.0)


def test_prompts() -> None:
    found = prompts.load(DEMO_MODEL)
    assert len(found) == 352 == len({tuple(ids) for ids in found})
    assert max(full().compared_batches.values()) == len(found)
    # What is asked first is of all lengths and both kinds.
    assert {len(ids) for ids in found[:8]} == {48, 64, 96, 112}
    longest = max(map(len, found)) + full().speed_tokens
    assert longest < full().engine["max_model_len"]


def fake_part(name: str, run: Callable[[Suite, dict[str, Any]], None]) -> Part:
    return Part(name, run, (), False, 1)


def fine(suite: Suite, found: dict[str, Any]) -> None:
    found["1"] = 1


def test_a_part_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    clock = FakeClock()

    def broken(suite: Suite, found: dict[str, Any]) -> None:
        found["before"] = 1
        raise EngineError("adadecode: has ended; its log: x\nline")

    def late(suite: Suite, found: dict[str, Any]) -> None:
        found["before"] = 2
        clock.seconds = -1.0
        suite.ask("vanilla", "generate")

    suite = make_suite(tmp_path, clock=clock)
    todo = [fake_part(n, f) for n, f in (("a", broken), ("b", fine), ("c", late), ("d", fine))]
    parts.run_all(suite, todo)
    written = json.loads((tmp_path / "result.json").read_text())
    assert {n: p["status"] for n, p in written["parts"].items()} == {
        "a": FAILED,
        "b": DONE,
        "c": PARTIAL,
        "d": SKIPPED,
    }
    assert written["parts"]["a"]["data"] == {"before": 1}
    assert written["parts"]["c"]["data"] == {"before": 2}
    assert written["missing"]["a"].startswith("failed: adadecode: has ended")
    assert written["missing"]["d"] == "skipped: the time is over"
    assert written["bit_identical"] is None
    assert written["efficiency"] == {} == written["ratio_by_concurrency"]
    assert all(goal["met"] is None for goal in written["goals"].values())


def test_the_file_is_whole_after_every_part(tmp_path: Path) -> None:
    file = tmp_path / "result.json"

    def interrupted(suite: Suite, found: dict[str, Any]) -> None:
        assert list(json.loads(file.read_text())["parts"]) == ["a"]
        raise KeyboardInterrupt

    suite = make_suite(tmp_path)
    suite.result.expected = ("a", "b")
    with pytest.raises(KeyboardInterrupt):
        parts.run_all(suite, [fake_part("a", fine), fake_part("b", interrupted)])
    written = json.loads(file.read_text())
    assert (list(written["parts"]), written["missing"]) == (["a"], {"b": "not run yet"})


def test_resumption(tmp_path: Path) -> None:
    file, identity = tmp_path / "result.json", {"git": "1", "settings": {"batches": {1: 2}}}
    result = Result.open(file, identity, again=False)
    result.put("a", DONE, {"x": 1}, 1.0, None)
    result.put("b", FAILED, {}, 1.0, "why")
    again = Result.open(file, identity, again=False)
    assert (again.is_done("a"), again.is_done("b"), again.is_done("c")) == (True, False, False)
    assert again.data("a") == {"x": 1}
    assert Result.open(file, identity, again=True).parts == {}
    assert Result.open(file, identity | {"git": "2"}, again=False).parts == {}
    file.write_text("[]")
    with pytest.raises(AdaDecodeError, match="no result of this suite"):
        Result.open(file, identity, again=False)


def test_goals() -> None:
    result = Result(Path("x"), {})
    speeds = {
        batch: {
            "efficiency": value,
            "speedup": 1.5,
            "ideal_speedup": 1.6,
            "draft_acceptance_rate": 0.9,
            "mean_acceptance_length": 3.0,
        }
        for batch, value in (("1", 0.96), ("8", 0.85))
    }
    waits = {"1": {"adadecode": {"syncs_per_round": 0.0}}, "8": {"vanilla": {}}}
    levels = {"1": {"ratio": 1.4}, "256": {"ratio": 0.97}}
    for name, data in (("speed", speeds), ("concurrency", levels), ("host_syncs", waits)):
        result.parts[name] = {"status": DONE, "data": data}
    written = result.as_dict()
    assert written["efficiency"] == {"1": 0.96, "8": 0.85}
    assert written["ratio_by_concurrency"] == {"1": 1.4, "256": 0.97}
    assert written["host_syncs_per_round"] == 0.0
    assert {name: goal["met"] for name, goal in written["goals"].items()} == {
        "efficiency at batch 1": True,
        "efficiency at batch 8": False,
        "least ratio at any concurrency": False,
        "host syncs in a round": True,
    }


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, 0),
        ({"bit_identical": False}, 1),
        ({"ties": {"beyond_bound": 1}}, 1),
        ({"ties": {"beyond_bound": 0, "divergences": 3}}, 0),
        ({"parts": {"a": {"status": FAILED}}, "missing": {"a": "failed: x"}}, 1),
        ({"parts": {"a": {"status": PARTIAL}}, "missing": {"a": "partial: x"}}, 3),
    ],
)
def test_exit_codes(changes: dict[str, Any], code: int) -> None:
    written: dict[str, Any] = {"ties": None, "bit_identical": True, "missing": {}, "parts": {}}
    assert command.exit_code(written | changes) == code


def test_table_of_nothing(tmp_path: Path) -> None:
    """What was not measured is said; no number stands in for it."""
    suite = make_suite(tmp_path, clock=FakeClock(-1.0))
    parts.run_all(suite, parts.all_parts(SETTINGS))
    written = suite.result.as_dict() | {
        "machine": {"cpu": "a CPU"},
        "target": {"shape": "a shape"},
        "settings": SETTINGS.as_dict(),
    }
    text = StringIO()
    table.show(Console(file=text, width=120), written)
    assert "no GPU" in text.getvalue()
    assert text.getvalue().count("not measured") == 4
    assert text.getvalue().count("skipped: the time is over") == 6


@pytest.mark.parametrize("found", [None, object()], ids=["without", "with"])
def test_hosts_without_flashinfer(found: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM imports its sampler on CUDA whatever is installed."""
    monkeypatch.setattr(settings, "find_spec", lambda name: found)
    switch = full().environment.get("VLLM_USE_FLASHINFER_SAMPLER")
    assert switch == ("0" if found is None else None)


def test_without_a_gpu_it_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"no CUDA device answers here"):
        command.main([])


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--speculative-config", "[1]"]])
def test_bad_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--device", "cpu", *arguments])
    assert "must be" in capsys.readouterr().err
