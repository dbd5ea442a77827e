"""Our counts on their way to vLLM's `/metrics` and log: differences, the wire, both displays.

With a server in processes of its own: test_server.py.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import REGISTRY
from vllm import LLM, EngineArgs
from vllm.config import VllmConfig
from vllm.v1 import utils as vllm_utils
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import LoggingStatLogger, PrometheusStatLogger
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from tests.support.engines import DEMO_MODEL, EnginePool, generate, greedy, speculative, stats
from vllm_adadecode.metrics.counters import Counters, ExitCounters
from vllm_adadecode.metrics.prometheus import AdaDecodeStats, UnsentCounts, attach_counts, pass_on

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
NUM_LAYERS = 8


def create(spec: Any) -> VllmConfig:
    return EngineArgs(
        model=str(DEMO_MODEL),
        max_model_len=128,
        skip_tokenizer_init=True,
        speculative_config=dict(spec),
    ).create_engine_config()


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    """Ours; making one applies the patches."""
    return create(speculative(num_speculative_tokens=3))


@pytest.fixture
def exit_layers(config: VllmConfig) -> list[int]:
    return config.speculative_config.exit_layers


def counted(exit_layers: list[int]) -> Counters:
    """Every count another number."""
    counters = Counters.create(NUM_LAYERS, tuple(exit_layers))
    numbers = iter(range(1, 1000))
    for counts in [*counters.exits.values(), counters]:
        for name, value in vars(counts).items():
            if value == 0:
                setattr(counts, name, next(numbers))
    return counters


def step(counts: Counters | None, vllms: SpecDecodingStats | None = None) -> SchedulerStats:
    """The statistics that the scheduler makes of a step whose output had these counts."""
    output = SimpleNamespace()
    attach_counts(output, counts)
    outputs = EngineCoreOutputs(scheduler_stats=SchedulerStats(spec_decoding_stats=vllms))
    pass_on(output, [EngineCoreOutputs(), outputs], num_spec_tokens=3)
    assert outputs.scheduler_stats is not None
    return outputs.scheduler_stats


def one_window(drafted: int, accepted: int) -> SpecDecodingStats:
    observed = SpecDecodingStats.new(3)
    observed.observe_draft(drafted, accepted)
    return observed


# --- differences -------------------------------------------------------------------------------


def test_differences_add_up() -> None:
    later = counted([2, 4])
    earlier = deepcopy(later)
    later += counted([2, 4])
    later.exits[4].draft_tokens += 5
    difference = later - earlier
    assert difference.exits[4].draft_tokens == earlier.exits[4].draft_tokens + 5
    assert difference.exits[2] == earlier.exits[2]
    assert difference.num_layers == NUM_LAYERS
    assert earlier + difference == later
    assert later - later == Counters.create(NUM_LAYERS, (2, 4))


def test_everything_is_sent_once() -> None:
    counters = Counters.create(NUM_LAYERS, (2, 4))
    unsent = UnsentCounts(counters)
    assert unsent.take() is None
    counters.prefill_steps += 1
    counters.exits[2].draft_tokens += 3
    first = unsent.take()
    counters.exits[2].draft_tokens += 1
    counters.exits[4].rejected_tokens += 1
    second = unsent.take()
    assert unsent.take() is None
    assert first is not None
    assert second is not None
    assert (first.exits[2].draft_tokens, second.exits[2].draft_tokens) == (3, 1)
    assert first + second == counters


# --- between processes -------------------------------------------------------------------------


def over_the_wire(stats: SchedulerStats) -> SchedulerStats:
    sent = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    received = MsgpackDecoder(EngineCoreOutputs).decode(sent).scheduler_stats
    assert received is not None
    return received


@pytest.mark.parametrize("vllms", [None, one_window(3, 2)], ids=["no draft", "drafts"])
def test_counts_cross_processes(
    config: VllmConfig, exit_layers: list[int], vllms: SpecDecodingStats | None
) -> None:
    counts = counted(exit_layers)
    received = over_the_wire(step(counts, vllms)).spec_decoding_stats
    assert isinstance(received, AdaDecodeStats)
    assert received.adadecode == counts
    # vLLM's are what they were.
    ours = asdict(received) | {"adadecode": None}
    assert ours == asdict(vllms or SpecDecodingStats.new(3)) | {"adadecode": None}


def test_numbers_of_numpy_cross_processes(config: VllmConfig) -> None:
    counters = Counters.create(NUM_LAYERS, (2,))
    unsent = UnsentCounts(counters)
    counters.generated_tokens += np.int64(3)  # type: ignore[assignment]
    counters.exits[2].accepted_tokens += np.bool_(True)  # type: ignore[assignment]
    received = over_the_wire(step(unsent.take())).spec_decoding_stats
    assert received.adadecode.generated_tokens == 3
    assert received.adadecode.exits == {2: ExitCounters(accepted_tokens=1)}


@pytest.mark.parametrize("vllms", [None, one_window(2, 1)], ids=["no draft", "drafts"])
def test_statistics_of_other_methods_cross_as_before(
    config: VllmConfig, vllms: SpecDecodingStats | None
) -> None:
    stats = step(None, vllms)
    assert stats.spec_decoding_stats is vllms
    received = over_the_wire(stats).spec_decoding_stats
    if vllms is None:
        assert received is None
    else:
        assert asdict(received) == asdict(vllms) | {"adadecode": None}


def test_no_statistics_are_wanted(config: VllmConfig, exit_layers: list[int]) -> None:
    output = SimpleNamespace()
    attach_counts(output, counted(exit_layers))
    outputs = [EngineCoreOutputs(), EngineCoreOutputs()]
    pass_on(output, outputs, num_spec_tokens=3)
    assert [o.scheduler_stats for o in outputs] == [None, None]


# --- Prometheus --------------------------------------------------------------------------------


def samples(prefix: str = "vllm:adadecode") -> dict[tuple[str, ...], float]:
    """Values by name and labels, in the order of the labels' names."""
    return {
        (
            sample.name.removeprefix("vllm:adadecode_"),
            *(v for _, v in sorted(sample.labels.items())),
        ): sample.value
        for metric in REGISTRY.collect()
        if metric.name.startswith(prefix)
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }


def test_prometheus(config: VllmConfig, exit_layers: list[int]) -> None:
    logger = PrometheusStatLogger(config, [0, 1])
    # All there from the start, so that a rate over the first increase is right.
    assert set(samples().values()) == {0}
    counts = counted(exit_layers)
    logger.record(step(counts, one_window(3, 2)), None, engine_idx=1)
    logger.record(step(counts), None, engine_idx=1)
    found = samples()
    model = config.model_config.served_model_name

    # Labels of exits sort as engine, exit_layer, model_name.
    for layer, exit_counts in counts.exits.items():
        for name, value in (
            ("gates_evaluated", exit_counts.gates_evaluated),
            ("heads_evaluated", exit_counts.heads_evaluated),
            ("draft_tokens", exit_counts.draft_tokens),
            ("next_exit", exit_counts.next_exit),
            ("accepted_tokens", exit_counts.accepted_tokens),
            ("rejected_tokens", exit_counts.rejected_tokens),
        ):
            assert found[f"{name}_total", "1", str(layer), model] == 2 * value
            assert found[f"{name}_total", "0", str(layer), model] == 0
    for key, value in {
        ("steps_total", "1", "deferred", model): counts.deferred_steps,
        ("steps_total", "1", "plain", model): counts.plain_steps,
        ("steps_total", "1", "prefill", model): counts.prefill_steps,
        ("layers_executed_total", "1", model, "draft"): counts.draft_layers,
        ("layers_executed_total", "1", model, "verification"): counts.verification_layers,
        ("verification_steps_total", "1", model): counts.verification_steps,
        ("generated_tokens_total", "1", model): counts.generated_tokens,
        ("deferred_tokens_total", "1", model): counts.deferred_tokens,
    }.items():
        assert found[key] == 2 * value

    # A bucket counts what is not above its bound.
    emitted = 0
    for layer in exit_layers:
        emitted += 2 * counts.exits[layer].accepted_tokens
        assert found["exit_depth_bucket", "1", str(float(layer)), model] == emitted
    emitted += 2 * counts.sampled_tokens
    assert found["exit_depth_bucket", "1", str(float(NUM_LAYERS)), model] == emitted
    assert found["exit_depth_count", "1", model] == emitted
    depths = [*((layer, c.accepted_tokens) for layer, c in counts.exits.items())]
    depths.append((NUM_LAYERS, counts.sampled_tokens))
    assert found["exit_depth_sum", "1", model] == 2 * sum(layer * n for layer, n in depths)

    # vLLM's own go on as before, one step of two having had drafts.
    assert (
        samples("vllm:spec_decode_num_drafts")["vllm:spec_decode_num_drafts_total", "1", model] == 1
    )


def test_prometheus_of_another_method() -> None:
    config = create(NGRAM)
    logger = PrometheusStatLogger(config, [0])
    logger.record(step(None, one_window(3, 2)), None)
    assert samples() == {}
    model = config.model_config.served_model_name
    name = "vllm:spec_decode_num_accepted_tokens_total"
    assert REGISTRY.get_sample_value(name, {"model_name": model, "engine": "0"}) == 2


# --- log line ----------------------------------------------------------------------------------


@contextmanager
def log_of_vllm() -> Iterator[list[str]]:
    """Lines that vLLM's loggers write."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("vllm.v1.metrics.loggers"), Collect()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def logged(logger: LoggingStatLogger, *steps: SchedulerStats) -> list[str]:
    """What follows vLLM's first line on an interval with these steps."""
    with log_of_vllm() as lines:
        for stats in steps:
            logger.record(stats, None)
        logger.log()
    return lines[1:]


def decoded(exit_layers: list[int]) -> Counters:
    counts = Counters.create(NUM_LAYERS, tuple(exit_layers))
    counts.verification_steps, counts.generated_tokens = 2, 5
    counts.draft_layers, counts.verification_layers = 6, 4
    first = counts.exits[exit_layers[0]]
    first.draft_tokens, first.accepted_tokens, first.rejected_tokens = 5, 3, 1
    return counts


def test_log_line(config: VllmConfig, exit_layers: list[int]) -> None:
    logger = LoggingStatLogger(config)
    counts = decoded(exit_layers)
    exits = [f"{exit_layers[0]}: 10/6", *(f"{layer}: 0/0" for layer in exit_layers[1:])]
    vllms, ours = logged(logger, step(counts, one_window(3, 2)), step(counts))
    assert vllms.startswith("SpecDecoding metrics: Mean acceptance length: 3.00")
    assert ours == (
        "AdaDecode metrics: Mean acceptance length: 2.50, Target layers executed per token: 0.250, "
        f"Avg Draft acceptance rate: 75.0%, Draft/accepted tokens by exit layer: {', '.join(exits)}"
    )
    # Once an interval, and the next one starts from nothing.
    assert logged(logger) == []
    counts.exits[exit_layers[0]] = ExitCounters(draft_tokens=1)
    assert f"layer: {exit_layers[0]}: 1/0" in logged(logger, step(counts))[-1]


@pytest.mark.filterwarnings("error")
def test_log_line_without_drafts(config: VllmConfig, exit_layers: list[int]) -> None:
    """An interval with prefill, or with thresholds that were never passed."""
    logger = LoggingStatLogger(config)
    counts = Counters.create(NUM_LAYERS, tuple(exit_layers))
    counts.prefill_steps = 1
    assert logged(logger, step(counts)) == []
    counts.verification_steps = counts.generated_tokens = 4
    counts.verification_layers = 4 * NUM_LAYERS
    assert logged(logger, step(counts)) == [
        "AdaDecode metrics: Mean acceptance length: 1.00, Target layers executed per token: 1.000"
    ]


def test_log_line_of_another_method() -> None:
    lines = logged(LoggingStatLogger(create(NGRAM)), step(None, one_window(3, 2)))
    assert len(lines) == 1
    assert lines[0].startswith("SpecDecoding metrics: ")


# --- engines -----------------------------------------------------------------------------------


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
        *("adadecode_exit_depth_count", "spec_decode_num_accepted_tokens_total"),
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
    assert rise["adadecode_exit_depth_count"] == counts("accepted_tokens") + counts(
        "sampled_tokens"
    )
    # Every emitted token has a depth; no request here ends amid a window or is preempted. A batch
    # that was started in advance may sample for requests that turn out to have ended.
    beyond = rise["adadecode_exit_depth_count"] - rise["generation_tokens_total"]
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
