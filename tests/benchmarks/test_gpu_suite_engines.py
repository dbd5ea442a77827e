"""The GPU suite: when engines run, their processes, and what is counted in their workers."""

from __future__ import annotations

import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from benchmarks.gpu_suite import syncs
from benchmarks.gpu_suite.engine import EngineError, EngineProcess, OutOfTimeError
from benchmarks.gpu_suite.settings import Settings, full
from benchmarks.gpu_suite.suite import CONTROLLED, INVARIANT, PLAIN, make_engines
from tests.support.engines import DEMO_MODEL
from tests.support.suite_fakes import (
    make_suite,
)


def test_engines_start_and_stop_when_they_may(tmp_path: Path) -> None:
    names = (*PLAIN, *INVARIANT, CONTROLLED)
    suite = make_suite(tmp_path, dict.fromkeys(names, lambda do: None))
    calls = {name: suite.engines[name].calls for name in names}  # type: ignore[attr-defined]
    suite.prepare(names, timed=False)
    assert all(calls[name] == ["start"] for name in (*PLAIN, *INVARIANT))
    assert calls[CONTROLLED] == []
    suite.prepare((*PLAIN, CONTROLLED), timed=False)
    assert all(calls[name] == ["start", "stop"] for name in INVARIANT)
    assert calls[CONTROLLED] == ["start"]
    suite.prepare((*PLAIN, CONTROLLED), timed=True)
    assert all(calls[name] == ["start", "wait"] for name in (*PLAIN, CONTROLLED))
    suite.prepare(("vanilla", CONTROLLED), timed=True)
    assert calls["adadecode"][-1] == "stop"
    suite.close()
    assert all(calls[name][-1] == "stop" for name in names)


def test_engines_differ_in_what_is_compared_alone() -> None:
    settings = replace(full(), speculative_config={"num_speculative_tokens": 3})
    engines = make_engines(settings, DEMO_MODEL, Path("logs"))
    assert engines.keys() == {*PLAIN, *INVARIANT, CONTROLLED}
    vanilla, ours = (engines[name].options for name in PLAIN)
    assert ours == vanilla | {
        "speculative_config": {"method": "adadecode", "num_speculative_tokens": 3}
    }
    for name, reference in zip(INVARIANT, PLAIN, strict=True):
        assert engines[name].options == engines[reference].options
        difference = set(engines[name].environment.items()) - set(
            engines[reference].environment.items()
        )
        assert difference == {("VLLM_BATCH_INVARIANT", "1")}
    rates = engines[CONTROLLED].options["speculative_config"]["synthetic_acceptance_rates"]
    assert rates == pytest.approx([0.8, 0.64, 0.512])
    heads_own = controlled_rates(replace(full(), speculative_config={}))
    assert len(heads_own) == 16


def controlled_rates(settings: Settings) -> list[float]:
    engines = make_engines(settings, DEMO_MODEL, Path("logs"))
    rates: list[float] = engines[CONTROLLED].options["speculative_config"][
        "synthetic_acceptance_rates"
    ]
    return rates


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[..., EngineProcess]]:
    made: list[EngineProcess] = []

    def make(**options: Any) -> EngineProcess:
        engine = EngineProcess("vanilla", options, {}, tmp_path / "vanilla.log")
        engine.child = "tests.support.fake_suite_child"
        made.append(engine)
        engine.start()
        return engine

    yield make
    for engine in made:
        engine.stop()


def has_ended(process: psutil.Process) -> bool:
    """Perhaps not reaped yet."""
    for _ in range(100):
        try:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_engine_answers_and_ends_whole(process: Callable[..., EngineProcess]) -> None:
    engine = process()
    assert engine.ask("echo", 30, x=[1, 2]) == {"do": "echo", "x": [1, 2]}
    assert engine.description is not None
    grandchild = psutil.Process(engine.description["grandchild"])
    engine.stop()
    assert has_ended(grandchild)
    with pytest.raises(EngineError, match="was stopped"):
        engine.ask("echo", 30)


def test_engine_that_does_not_start(process: Callable[..., EngineProcess]) -> None:
    engine = process(fails="ValueError: no such model")
    with pytest.raises(
        EngineError, match=r"vanilla: ValueError: no such model; its log: .*log"
    ) as e:
        engine.wait(30)
    assert str(e.value).splitlines()[1:] == ["a line of the log"]
    with pytest.raises(EngineError, match="no such model"):
        engine.ask("echo", 30)


def test_engine_that_fails_or_ends(process: Callable[..., EngineProcess]) -> None:
    engine = process()
    with pytest.raises(EngineError, match="ValueError: no"):
        engine.ask("fail", 30)
    engine = process()
    with pytest.raises(EngineError, match="has ended") as e:
        engine.ask("die", 30)
    assert "the last words" in str(e.value)


def test_engine_out_of_time(process: Callable[..., EngineProcess]) -> None:
    """One that is busy is stopped; one that is only starting may go on."""
    engine = process()
    engine.wait(30)
    assert engine.description is not None
    grandchild = psutil.Process(engine.description["grandchild"])
    with pytest.raises(OutOfTimeError, match=r"vanilla: no answer in 0 s"):
        engine.ask("sleep", 0.2, seconds=60)
    assert has_ended(grandchild)
    with pytest.raises(EngineError):
        engine.ask("echo", 30)
    slow = process(start_s=1)
    with pytest.raises(OutOfTimeError):
        slow.wait(0.1)
    slow.wait(30)


class FakeWorker:
    """A worker whose rounds do as told."""

    def __init__(self, in_round: Callable[[], object]) -> None:
        self.in_round = in_round

    def execute_model(self, output: Any) -> None:
        self.in_round()

    def sample_tokens(self, grammar: None = None) -> None:
        self.in_round()


def step(worker: FakeWorker, tokens: int = 1, new: int = 0) -> None:
    worker.execute_model(
        SimpleNamespace(total_num_scheduled_tokens=tokens, scheduled_new_reqs=[None] * new)
    )
    worker.sample_tokens()


def test_reads_on_a_cpu_are_counted_by_round() -> None:
    x = torch.arange(4)

    def in_round() -> None:
        x.cpu()
        bool(x[0] == 0)
        x.to("cpu")
        x.to("cpu", non_blocking=True)
        x.to(torch.float32)
        x + 1

    worker = FakeWorker(in_round)
    counter = syncs.RoundCounter(worker, "cpu")
    step(worker, new=1)
    step(worker, tokens=0)
    assert (counter.rounds, counter.sites.total()) == (0, 0)
    step(worker)
    step(worker)
    counter.remove()
    step(worker)
    found = counter.as_dict()
    assert (found["rounds"], found["syncs"], found["syncs_per_round"]) == (2, 12, 6.0)
    assert len(found["places"]) == 3
    assert all("test_gpu_suite_engines.py" in n and "in_round" in n for n in found["places"])


def test_waits_on_a_gpu_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's warnings, each time, and explicit waits; other warnings and threads not."""
    modes = []

    @contextmanager
    def debug_mode() -> Iterator[None]:
        modes.append("warn")
        yield
        modes.append("default")

    class Event:
        """Not PyTorch's own: an engine of an earlier test may have put vLLM's in its place."""

        def synchronize(self) -> None:
            return None

    monkeypatch.setattr(syncs, "_debug_mode", debug_mode)
    original = Event.synchronize
    monkeypatch.setattr(syncs, "WAITS", ((Event, "synchronize"),))

    def in_round() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        Event().synchronize()
        thread = threading.Thread(target=Event().synchronize)
        thread.start()
        thread.join()

    worker = FakeWorker(in_round)
    counter = syncs.RoundCounter(worker, "cuda")
    step(worker)
    counter.remove()
    assert counter.sites.total() == 2 * 3
    assert all("in_round" in name for name in counter.sites)
    assert modes == ["warn", "default"] * 2
    assert Event.synchronize is original


def test_place_is_the_callers() -> None:
    frames = [
        traceback.FrameSummary("/a/vllm_adadecode/draft/host_loop.py", 7, "run", line=""),
        traceback.FrameSummary("/a/torch/_tensor.py", 8, "__bool__", line=""),
        traceback.FrameSummary(str(syncs.SELF), 9, "note", line=""),
    ]
    stack = traceback.StackSummary.from_list(frames)
    assert syncs.place(stack) == "a/vllm_adadecode/draft/host_loop.py:7 run"
    for file, name in (
        ("/b/site-packages/vllm/v1/worker/gpu/input_batch.py", "vllm/v1/worker/gpu/input_batch.py"),
        (__file__, "tests/benchmarks/test_gpu_suite_engines.py"),
    ):
        frames[0] = traceback.FrameSummary(file, 7, "run", line="")
        assert syncs.place(traceback.StackSummary.from_list(frames)) == f"{name}:7 run"
