"""For the tests of the GPU suite: a clock, engines and counts that are as the test says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.ideal import Reading
from benchmarks.gpu_suite.result import Result
from benchmarks.gpu_suite.settings import Settings, quick
from benchmarks.gpu_suite.suite import Suite
from vllm_adadecode.evaluation.costs import Costs
from vllm_adadecode.metrics.counters import Counters, ExitCounters

COSTS = Costs(num_layers=32, head=1.5, gate=0.01, lm_head=2.0)
SETTINGS = replace(
    quick("cpu"),
    compared_batches={1: 2, 4: 4},
    compared_tokens=4,
    speed_batches={1: 2},
    speed_tokens=5,
    concurrencies=(1, 2),
    concurrency_tokens=10,
    concurrency_repeats=2,
)
PROMPTS = [[10 * i, 1, 2] for i in range(1, 5)]


class FakeClock:
    """Time as the test says."""

    def __init__(self, left: float = 100.0) -> None:
        self.seconds = left

    def left(self) -> float:
        return self.seconds


class FakeEngine:
    """Answers requests by a function; keeps what was asked."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self.answer = answer
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.calls: list[str] = []
        self.description: dict[str, Any] | None = {"async_scheduling": True}

    def ask(self, do: str, timeout: float, **arguments: Any) -> Any:
        self.asked.append((do, arguments))
        return self.answer(do, **arguments)

    def start(self) -> None:
        self.calls.append("start")

    def wait(self, timeout: float) -> None:
        self.calls.append("wait")

    def hang_up(self) -> None:
        pass

    def stop(self) -> None:
        self.calls.append("stop")


def snapshot(**counts: int) -> dict[str, Any]:
    exits = {
        8: ExitCounters(
            gates_evaluated=30,
            heads_evaluated=20,
            head_batches=20,
            draft_tokens=10,
            accepted_tokens=9,
            rejected_tokens=1,
        ),
        16: ExitCounters(
            gates_evaluated=10, heads_evaluated=5, head_batches=4, draft_tokens=2, accepted_tokens=2
        ),
    }
    return Counters(32, exits, **counts).snapshot()


TRACE = {
    "draft_layers": 100,
    "verification_layers": 60,
    "deferred_steps": 8,
    "plain_steps": 2,
    "verification_steps": 10,
    "generated_tokens": 21,
}


def make_suite(
    tmp_path: Path,
    answers: dict[str, Callable[..., Any]] | None = None,
    settings: Settings = SETTINGS,
    clock: FakeClock | None = None,
    result: Result | None = None,
) -> Suite:
    if result is None:
        result = Result(tmp_path / "result.json", {"settings": {}, "gpu": None})
    engines: Any = {name: FakeEngine(answer) for name, answer in (answers or {}).items()}
    reading = Reading(COSTS, 1000)
    return Suite(settings, result, clock or FakeClock(), engines, PROMPTS, reading)  # type: ignore[arg-type]
