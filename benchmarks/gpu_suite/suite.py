"""What all parts share: the target, its prompts, the engines, and the time that is left.

Owns when engines start and stop: all that can be started beside each other are started at once, an
engine that no part to come needs is stopped, and nothing starts while something is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.engine import EngineError, EngineProcess, OutOfTimeError
from benchmarks.gpu_suite.ideal import Reading
from benchmarks.gpu_suite.result import Result
from benchmarks.gpu_suite.settings import Settings
from vllm_adadecode.heads import HeadsConfig
from vllm_adadecode.heads.resolve import SUBFOLDER

PLAIN = ("vanilla", "adadecode")
INVARIANT = ("vanilla_invariant", "adadecode_invariant")
CONTROLLED = "controlled"
METHOD = {"method": "adadecode"}


class Clock:
    """Seconds that are left of so many."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds

    def left(self) -> float:
        """Below 0 when the time is over."""
        return self._deadline - time.monotonic()


class Suite:
    """See the module.

    Args:
        engines: by name, not started.
        advance: called after each step of a part.
    """

    def __init__(
        self,
        settings: Settings,
        result: Result,
        clock: Clock,
        engines: dict[str, EngineProcess],
        prompts: Sequence[Sequence[int]],
        reading: Reading,
        advance: Callable[[], object] = lambda: None,
    ) -> None:
        self.settings = settings
        self.result = result
        self.clock = clock
        self.engines = engines
        self.prompts = prompts
        self.reading = reading
        self.advance = advance
        self._started: list[str] = []

    def prepare(self, needed: Iterable[str], timed: bool) -> None:
        """Start and stop engines.

        Args:
            needed: by this part and those to come.
            timed: whether this part measures time: no engine may be starting meanwhile.
        """
        needed = list(dict.fromkeys(needed))
        for name in [n for n in self._started if n not in needed]:
            self.engines[name].stop()
            self._started.remove(name)
        crowded = any(name in needed for name in INVARIANT)
        for name in needed:
            # A device holds four; the one that is needed last waits for two to end.
            if name not in self._started and not (name == CONTROLLED and crowded):
                self.engines[name].start()
                self._started.append(name)
        if timed:
            self.wait(self._started)

    def wait(self, names: Iterable[str]) -> None:
        """Until they have started or failed; whoever asks a failed one is told."""
        for name in names:
            try:
                self.engines[name].wait(max(0.0, self.clock.left()))
            except (EngineError, OutOfTimeError):
                continue

    def ask(self, name: str, do: str, **arguments: Any) -> Any:
        """A request to an engine.

        Raises:
            EngineError: it failed.
            OutOfTimeError: the time is over.
        """
        left = self.clock.left()
        if left <= 0:
            raise OutOfTimeError("the time is over")
        return self.engines[name].ask(do, left, **arguments)

    def generate(
        self,
        name: str,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        at_once: int,
        **options: Any,
    ) -> dict[str, Any]:
        """Greedy continuations (`child.Engine.generate`)."""
        arguments = {"prompts": prompts, "tokens": tokens, "at_once": at_once, **options}
        done: dict[str, Any] = self.ask(name, "generate", **arguments)
        return done

    def close(self) -> None:
        """Stop all engines."""
        for name in self._started:
            self.engines[name].hang_up()
        while self._started:
            self.engines[self._started.pop()].stop()


def make_engines(settings: Settings, target: Path, logs: Path) -> dict[str, EngineProcess]:
    """All that any part needs, by name."""
    plain = settings.engine | {"model": str(target)}
    method = METHOD | settings.speculative_config
    ours = plain | {"speculative_config": method}
    found: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
        "vanilla": (plain, {}),
        "adadecode": (ours, {}),
        CONTROLLED: (controlled(settings, ours, target), {}),
    }
    if settings.invariant:
        batch_invariant = {"VLLM_BATCH_INVARIANT": "1"}
        found |= zip(INVARIANT, ((plain, batch_invariant), (ours, batch_invariant)), strict=True)
    return {
        name: EngineProcess(name, options, settings.environment | environment, logs / f"{name}.log")
        for name, (options, environment) in found.items()
    }


def controlled(settings: Settings, ours: dict[str, Any], target: Path) -> dict[str, Any]:
    """Options of an engine whose drafts are accepted at a rate that is set later."""
    method = ours["speculative_config"]
    heads = HeadsConfig.load(target / SUBFOLDER)
    drafts = method.get("num_speculative_tokens", heads.num_speculative_tokens)
    most = max(settings.speed_batches)
    return ours | {
        "speculative_config": method
        | {
            # Coverage is what is set, not what would pay.
            "cost_aware": False,
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": [
                settings.precisions[0] ** (i + 1) for i in range(drafts)
            ],
        },
        "max_num_seqs": most,
        "kv_cache_memory_bytes": min(settings.engine["kv_cache_memory_bytes"], 1 << 30),
    }
