"""The GPU suite: speed, efficiency and ratios from what engines answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu_suite import speed
from benchmarks.gpu_suite.engine import EngineError, OutOfTimeError
from benchmarks.gpu_suite.ideal import Reading
from benchmarks.gpu_suite.result import DONE
from benchmarks.gpu_suite.speed import Decoding
from benchmarks.gpu_suite.suite import CONTROLLED, PLAIN
from benchmarks.gpu_suite.worker import covering, follow_noise
from tests.support.engines import DEMO_MODEL
from tests.support.fake_target import MAX_SLOTS, DeviceRuns, draft
from tests.support.suite_fakes import (
    COSTS,
    PROMPTS,
    SETTINGS,
    TRACE,
    FakeClock,
    make_suite,
    snapshot,
)
from vllm_adadecode.draft.device_loop import DeviceLoop
from vllm_adadecode.draft.host_loop import HostLoop
from vllm_adadecode.draft.status_poll import StatusPoll
from vllm_adadecode.heads.thresholds import ExitThresholds
from vllm_adadecode.metrics.counters import Counters, ExitCounters


def test_bytes_of_a_trace() -> None:
    """Layers and LM head by batches, heads by batches in which they run, gates by requests."""
    reading = Reading(COSTS, 1000)
    assert reading.vanilla(10) == 10 * 34
    heads, gates, lm_heads = 24 * 1.5, 40 * 0.01, 10 * 2.0
    assert reading.adadecode(snapshot(**TRACE)) == pytest.approx(160 + heads + gates + lm_heads)
    # A round without drafts reads what a vanilla step does.
    plain = Counters(32, {8: ExitCounters()}, plain_steps=10, verification_layers=320)
    assert reading.adadecode(plain.snapshot()) == reading.vanilla(10)


def test_reading_of_a_target() -> None:
    reading = Reading.of(DEMO_MODEL, 4)
    d, layer = 256, 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 704
    assert reading.layer_bytes == 4 * layer
    assert reading.costs.head == pytest.approx((d * d + 1024 * d) / layer)
    assert reading.costs.lm_head == pytest.approx(2048 * d / layer)
    json.dumps(reading.as_dict())


def test_efficiency(tmp_path: Path) -> None:
    """Medians of times over the ratio of bytes."""
    suite = make_suite(tmp_path)
    vanilla = [Decoding(s, 42, 21, None) for s in (2.0, 9.0, 2.2)]
    ours = [Decoding(s, 42, 21, snapshot(**TRACE)) for s in (1.1, 1.0, 1.3)]
    found = speed.figures(suite, vanilla, ours)
    read = 160 + 24 * 1.5 + 40 * 0.01 + 10 * 2.0
    assert found["speedup"] == pytest.approx(2.0)
    assert found["ideal_speedup"] == pytest.approx(21 * 34 / read)
    assert found["efficiency"] == pytest.approx(2.0 / (21 * 34 / read))
    assert found["speedup_by_repeat"] == pytest.approx([2 / 1.1, 9.0, 2.2 / 1.3])
    assert found["tokens_per_second"]["adadecode"] == pytest.approx(42 / 1.1)
    assert found["layers_executed_of_vanilla"] == pytest.approx(160 / (32 * 21))
    assert found["of_bandwidth"] == {"vanilla": None, "adadecode": None}
    assert (found["draft_acceptance_rate"], found["coverage"]) == (11 / 12, 12 / 25)
    suite.result.parts["bandwidth"] = {"status": DONE, "data": {"bytes_per_second": 1e6}}
    found = speed.figures(suite, vanilla, ours)
    assert found["of_bandwidth"]["vanilla"] == pytest.approx(21 * 34 * 1000 / 2.2 / 1e6)


def test_decoding_leaves_prefill_out(tmp_path: Path) -> None:
    """The time to the first token is taken off, batch by batch; the last batch may be smaller."""

    def answer(do: str, prompts: Any, tokens: int, at_once: int) -> dict[str, Any]:
        assert at_once == 3
        seconds = 0.5 * len(prompts) + 0.25 * (tokens - 1)
        return {"seconds": seconds, "stats": snapshot(**TRACE), "token_ids": []}

    suite = make_suite(tmp_path, {"adadecode": answer})
    found = speed.decode(suite, "adadecode", PROMPTS, 5, 3)
    assert (found.seconds, found.steps, found.tokens) == (2 * 4 * 0.25, 8, 16)
    assert found.stats is not None
    assert found.stats["generated_tokens"] == 2 * 21


def test_speed_repeats_while_there_is_time(tmp_path: Path) -> None:
    clock = FakeClock(100.0)
    order: list[str] = []

    def answer(name: str, speedup: float) -> Callable[..., Any]:
        def reply(do: str, prompts: Any, tokens: int, at_once: int) -> dict[str, Any]:
            order.append(name)
            clock.seconds -= 3.0
            stats = None if name == "vanilla" else snapshot(**TRACE)
            return {"seconds": (tokens - 1) / speedup, "stats": stats, "token_ids": []}

        return reply

    answers = {"vanilla": answer("vanilla", 1.0), "adadecode": answer("adadecode", 2.0)}
    suite = make_suite(tmp_path, answers, clock=clock)
    found = speed.compare(suite, PLAIN, PROMPTS[:1], 5, 1, 3)
    assert found["speedup"] == pytest.approx(2.0)
    # Warm-up, then in turn and turned round.
    assert order[:2] == ["vanilla", "adadecode"]
    assert order[2::2] == ["vanilla", "adadecode", "adadecode", "vanilla", "vanilla", "adadecode"]
    clock.seconds = 30.0
    assert len(speed.compare(suite, PLAIN, PROMPTS[:1], 5, 1, 3)["speedup_by_repeat"]) == 1


def test_concurrency(tmp_path: Path) -> None:
    """Ratios within a repeat; what was measured before the time was over is kept."""
    clock = FakeClock()

    def answer(rate: float) -> Callable[..., Any]:
        def reply(do: str, prompts: Any, tokens: int, at_once: int) -> dict[str, Any]:
            clock.seconds -= 1
            return {"seconds": len(prompts) * tokens / (rate * at_once), "stats": None}

        return reply

    answers = {"vanilla": answer(100.0), "adadecode": answer(150.0)}
    found: dict[str, Any] = {}
    speed.concurrency(make_suite(tmp_path, answers, clock=clock), found)
    assert found["2"]["tokens_per_second"] == pytest.approx({"vanilla": 200.0, "adadecode": 300.0})
    assert {level: cell["ratio"] for level, cell in found.items()} == {
        "1": pytest.approx(1.5),
        "2": pytest.approx(1.5),
    }
    clock.seconds, found = 4.0, {}
    with pytest.raises(OutOfTimeError):
        speed.concurrency(make_suite(tmp_path, answers, clock=clock), found)
    assert list(found) == ["1"]


def test_drafts_that_are_not_controlled_are_refused(tmp_path: Path) -> None:
    """The counts have drafts in 12 of 25 head checks."""

    def answer(do: str, **arguments: Any) -> Any:
        return {"seconds": float(arguments.get("tokens", 0)), "stats": snapshot(**TRACE)}

    answers = {"vanilla": lambda do, **a: answer(do, **a) | {"stats": None}, CONTROLLED: answer}
    found: dict[str, Any] = {}
    settings = replace(SETTINGS, coverages=(0.5, 0.9), precisions=(0.8,))
    suite = make_suite(tmp_path, answers, settings)
    with pytest.raises(EngineError, match=r"drafts in 0\.90 of head checks, got 0\.48"):
        speed.traces(suite, found)
    assert list(found) == ["0.5, 0.8, 1"]
    engine: Any = suite.engines[CONTROLLED]
    assert engine.asked[0] == ("set_drafts", {"coverage": 0.5, "precision": 0.8})


def test_controlled_coverage_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostLoop, "_confident", HostLoop._confident)
    monkeypatch.setattr(DeviceLoop, "accept", DeviceLoop.accept)
    follow_noise()
    torch.manual_seed(0)
    real = ExitThresholds.of((0.5, 1.0, 0.5), (0.5, 0.5, 0.5))
    assert covering(real, 0.75) == ExitThresholds((0.25, None, 0.25), (None, None, None))
    for coverage in (0.0, 0.3, 1.0):
        checked = drafted = 0
        for _ in range(40):
            run = draft(lambda *_: 0.1, [5] * 8, thresholds=covering(real, coverage))
            checked += sum(e.heads_evaluated for e in run.counters.exits.values())
            drafted += int(run.state.num_drafts.sum())
        assert checked > 300
        assert drafted / checked == pytest.approx(coverage, abs=0.05)


def test_controlled_coverage_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise by place is as good as drawn: half of the heads are followed, at each exit."""
    monkeypatch.setattr(HostLoop, "_confident", HostLoop._confident)
    monkeypatch.setattr(DeviceLoop, "accept", DeviceLoop.accept)
    follow_noise()
    runs = DeviceRuns(StatusPoll())
    runs.thresholds = covering(ExitThresholds.of((0.9, 1.0, 0.9)), 0.5)
    checked, drafted = np.zeros(3), np.zeros(3)
    for first in range(60):
        slots = [(first + i) % MAX_SLOTS for i in range(4)]
        # Confidences, which are never enough, are not looked at.
        counters = runs.draft(lambda *_: 0.1, [5] * 4, slots, shift=first).counters
        exits = list(counters.exits.values())
        checked += [e.heads_evaluated for e in exits]
        drafted += [e.draft_tokens for e in exits]
    assert checked[1] == drafted[1] == 0
    assert drafted[[0, 2]] / checked[[0, 2]] == pytest.approx([0.5, 0.5], abs=0.06)
    assert checked[2] > 200
