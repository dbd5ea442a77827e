"""The parts of the suite in their order, and what becomes of one that fails."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_suite import correctness, speed
from benchmarks.gpu_suite.engine import ROOT, EngineError, OutOfTimeError
from benchmarks.gpu_suite.result import DONE, FAILED, PARTIAL, SKIPPED, Result
from benchmarks.gpu_suite.settings import Settings
from benchmarks.gpu_suite.suite import CONTROLLED, INVARIANT, PLAIN, Clock, Suite
from vllm_adadecode.errors import AdaDecodeError


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        run: called with the suite and a dict that takes what is found, while it is found.
        engines: names of those that it asks.
        timed: whether it measures time.
        steps: calls of `Suite.advance`, at most.
    """

    name: str
    run: Callable[[Suite, dict[str, Any]], None]
    engines: tuple[str, ...]
    timed: bool
    steps: int


def all_parts(settings: Settings) -> list[Part]:
    """Correctness, then speed; what would be missed least comes last."""
    compared = len(settings.compared_batches)
    batches = len(settings.speed_batches)
    pair = INVARIANT if settings.invariant else PLAIN
    rates = len(settings.coverages) * len(settings.precisions)
    levels = len(settings.concurrencies) * settings.concurrency_repeats
    traced = rates * batches * settings.traces_repeats
    return [
        Part("bit_identical", bit_identical, pair, False, compared),
        Part("ties", ties, PLAIN, False, compared),
        Part("host_syncs", host_syncs, PLAIN, False, batches),
        Part("speed", speed.speed, PLAIN, True, batches * settings.speed_repeats),
        Part("concurrency", speed.concurrency, PLAIN, True, levels),
        Part("traces", speed.traces, ("vanilla", CONTROLLED), True, traced),
    ]


def run_all(
    suite: Suite, parts: Sequence[Part], announce: Callable[[str], object] = lambda _: None
) -> None:
    """All of them; one that fails does not end the others. The result is written after each."""
    for number, part in enumerate(parts):
        announce(part.name)
        begin = time.monotonic()
        found: dict[str, Any] = {}
        status, reason = DONE, None
        try:
            if suite.clock.left() <= 0:
                raise OutOfTimeError("the time is over")
            needed = [name for later in parts[number:] for name in later.engines]
            suite.prepare(needed, part.timed)
            part.run(suite, found)
        except OutOfTimeError as error:
            status, reason = PARTIAL if found else SKIPPED, str(error)
        except (EngineError, AdaDecodeError, OSError) as error:
            status, reason = FAILED, str(error)
        suite.result.about["engines"] = suite.result.about.get("engines", {}) | {
            name: engine.description
            for name, engine in suite.engines.items()
            if engine.description is not None
        }
        suite.result.put(part.name, status, found, time.monotonic() - begin, reason)


def bit_identical(suite: Suite, found: dict[str, Any]) -> None:
    """Greedy outputs, batch invariant where there is such a mode."""
    invariant = suite.settings.invariant
    found["mode"] = "VLLM_BATCH_INVARIANT=1" if invariant else suite.settings.dtype
    correctness.compare(suite, INVARIANT if invariant else PLAIN, found)


def ties(suite: Suite, found: dict[str, Any]) -> None:
    """Greedy outputs of the engines as users have them."""
    correctness.compare(suite, PLAIN, found)


def host_syncs(suite: Suite, found: dict[str, Any]) -> None:
    """Waiting calls in a round, vanilla's and ours."""
    on_gpu = suite.settings.device == "cuda"
    for batch in suite.settings.speed_batches:
        found[str(batch)] = {"counted": "on a GPU" if on_gpu else "calls that would wait on a GPU"}
        for name in PLAIN:
            # Once before: what is done once only is no round's.
            for _ in range(2):
                counted = suite.ask(
                    name,
                    "count_syncs",
                    prompts=suite.prompts[:batch],
                    tokens=suite.settings.compared_tokens,
                    at_once=batch,
                )
            found[str(batch)][name] = counted
        suite.advance()


def measure_bandwidth(device: str, clock: Clock, result: Result) -> None:
    """The part `bandwidth`: needs no engine, and the device for itself."""
    command = [sys.executable, "-m", "benchmarks.gpu_suite.bandwidth", device]
    begin = time.monotonic()
    found: dict[str, Any] = {}
    status, reason = DONE, None
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, clock.left())
        )
        if done.returncode == 0:
            found = json.loads(done.stdout)
        else:
            status, reason = FAILED, (done.stderr.strip().splitlines() or ["no output"])[-1]
    except subprocess.TimeoutExpired:
        status, reason = SKIPPED, "the time is over"
    result.put("bandwidth", status, found, time.monotonic() - begin, reason)
