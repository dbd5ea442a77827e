"""An engine's counts in vLLM's `/metrics` and log, and the ranges that a profiler sees.

Without engines: tests/unit/test_metrics.py. With a server in processes of its own: test_server.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm import LLM
from vllm.v1 import utils as vllm_utils
from vllm.v1.metrics.loggers import LoggingStatLogger

from tests.support.engines import EnginePool, generate, greedy, speculative, stats
from tests.support.vllm_log import log_of_vllm


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def engine(request: pytest.FixtureRequest, engines: EnginePool) -> LLM:
    """The engine made last: making one takes the metrics of others out of the registry."""
    options: dict[str, Any] = {"async_scheduling": True} if request.param else {}
    return engines.get(speculative_config=speculative(), disable_log_stats=False, **options)


def run(engine: LLM, prompts: list[str], batch: int | None = None) -> None:
    """Generate, and read the batches that async scheduling started in advance.

    A server does so by itself; in the tests' process the engine rests until the next request.
    """
    generate(engine, prompts, greedy(), batch=batch)
    while engine.llm_engine.engine_core.engine_core.batch_queue:
        engine.llm_engine.step()


def total(name: str, **labels: str) -> float:
    """Sum of a metric over the samples with these labels."""
    return sum(
        sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == f"vllm:{name}" and sample.labels.items() >= labels.items()
    )


def test_engine_agrees_with_its_worker(engine: LLM, prompts: list[str]) -> None:
    names = ("draft_tokens", "next_exit", "accepted_tokens", "rejected_tokens")

    def by_exit(layer: str) -> list[float]:
        return [total(f"adadecode_{name}_total", exit_layer=layer) for name in names]

    others = (
        *("adadecode_deferred_tokens_total", "adadecode_generated_tokens_total"),
        *("adadecode_sampled_tokens_total", "spec_decode_num_accepted_tokens_total"),
        *("generation_tokens_total", "adadecode_steps_total", "adadecode_layers_executed_total"),
    )
    layers = list(stats(engine, reset=True)["exits"])
    before, exits_before = {n: total(n) for n in others}, {e: by_exit(e) for e in layers}
    run(engine, prompts[:6], batch=3)
    first = stats(engine, reset=True)
    # What was counted up to a reset has been sent, and nothing is taken back.
    run(engine, prompts[6:8])
    second = stats(engine)

    def counts(name: str) -> int:
        return first[name] + second[name]

    for layer in layers:
        found = [b - a for a, b in zip(exits_before[layer], by_exit(layer), strict=True)]
        assert found == [first["exits"][layer][n] + second["exits"][layer][n] for n in names]
    rise = {name: total(name) - before[name] for name in others}
    assert rise["adadecode_deferred_tokens_total"] == counts("deferred_tokens") > 0
    assert rise["adadecode_generated_tokens_total"] == counts("generated_tokens")
    # vLLM counts accepted drafts from the lengths of outputs, and these drafts are all.
    assert rise["spec_decode_num_accepted_tokens_total"] == counts("accepted_tokens") > 0
    assert rise["adadecode_sampled_tokens_total"] == counts("sampled_tokens")
    # Every emitted token is one or the other; no request here ends amid a window or is preempted. A
    # batch that was started in advance may sample for requests that turn out to have ended.
    beyond = counts("accepted_tokens") + counts("sampled_tokens") - rise["generation_tokens_total"]
    is_async = engine.llm_engine.vllm_config.scheduler_config.async_scheduling
    assert 0 <= beyond <= (8 if is_async else 0)
    assert rise["generation_tokens_total"] == 8 * 48
    batches = ("deferred_steps", "plain_steps", "prefill_steps")
    assert rise["adadecode_steps_total"] == sum(map(counts, batches))
    passes = counts("draft_layers") + counts("verification_layers")
    assert rise["adadecode_layers_executed_total"] == passes


def test_engine_logs(engine: LLM, prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests' engines write no log, so they have no such logger.
    logger = LoggingStatLogger(engine.llm_engine.vllm_config)
    monkeypatch.setattr(engine.llm_engine.logger_manager, "stat_loggers", [logger])
    monkeypatch.setattr(engine.llm_engine, "do_log_stats_with_interval", lambda: None)
    stats(engine, reset=True)
    with log_of_vllm() as lines:
        run(engine, prompts[:2])
        engine.llm_engine.do_log_stats()
        engine.llm_engine.do_log_stats()
    (line,) = [line for line in lines if line.startswith("AdaDecode metrics: ")]
    counts = stats(engine)
    assert f"Mean acceptance length: {counts['mean_acceptance_length']:.2f}," in line
    assert f"Avg Draft acceptance rate: {100 * counts['draft_acceptance_rate']:.1f}%" in line


# --- profiling ---------------------------------------------------------------------------------


class Ranges:
    """Stands for `nvtx.annotate`: the ranges that were opened, each in the one around it."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.open: list[str] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if name.startswith("adadecode: "):
            self.open.append(name.removeprefix("adadecode: "))
            self.paths.append(" > ".join(self.open))
        yield
        if name.startswith("adadecode: "):
            self.open.pop()


def test_phases_are_ranges(
    engines: EnginePool, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines.get(speculative_config=speculative(), disable_log_stats=False)
    ranges = Ranges()
    monkeypatch.setattr(vllm_utils, "_PROFILER_FUNC", ranges)
    stats(engine, reset=True)
    generate(engine, prompts[:1], greedy())
    counts = stats(engine)
    paths, last = ranges.paths, len(counts["exits"])
    assert ranges.open == []
    assert paths[:3] == ["all layers", "LM head and rejection sampling", "draft loop"]
    assert paths.count("verification") == counts["deferred_steps"] > 0
    assert paths.count(f"verification > span {last}") == counts["deferred_steps"]
    rounds = counts["deferred_steps"] + counts["plain_steps"] + counts["prefill_steps"]
    assert paths.count("LM head and rejection sampling") == rounds
    # Where there is no room for a draft, there is no loop.
    assert counts["deferred_steps"] <= paths.count("draft loop") <= rounds
    for number, exit_counts in enumerate(counts["exits"].values(), start=1):
        # One request: a check is one row.
        checks = paths.count(f"draft loop > head {number}")
        assert checks == max(exit_counts["gates_evaluated"], exit_counts["heads_evaluated"])
    assert paths.count("draft loop > span 0") > 0


def test_no_ranges_unless_asked_for() -> None:
    assert isinstance(vllm_utils.record_function_or_nullcontext("adadecode: span 0"), nullcontext)
