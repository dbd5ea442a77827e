"""Our counts on their way to vLLM's `/metrics` and log: differences, the wire, both displays.

With engines: tests/engine/test_metrics.py.
"""

from copy import deepcopy
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import REGISTRY
from vllm import EngineArgs
from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import LoggingStatLogger, PrometheusStatLogger
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from tests.support.engines import DEMO_MODEL, speculative
from tests.support.vllm_log import log_of_vllm
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


def over_the_wire(stats: SchedulerStats) -> Any:
    sent = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    received = MsgpackDecoder(EngineCoreOutputs).decode(sent).scheduler_stats
    assert received is not None
    return received.spec_decoding_stats


@pytest.mark.parametrize("vllms", [None, one_window(3, 2)], ids=["no draft", "drafts"])
def test_counts_cross_processes(
    config: VllmConfig, exit_layers: list[int], vllms: SpecDecodingStats | None
) -> None:
    counts = counted(exit_layers)
    received = over_the_wire(step(counts, vllms))
    assert isinstance(received, AdaDecodeStats)
    assert received.adadecode == counts
    # vLLM's are what they were.
    ours = asdict(received) | {"adadecode": None}
    assert ours == asdict(vllms or SpecDecodingStats.new(3)) | {"adadecode": None}
    # Those of other methods cross as before.
    stats = step(None, vllms)
    assert stats.spec_decoding_stats is vllms
    received = over_the_wire(stats)
    assert (received and asdict(received)) == (vllms and asdict(vllms) | {"adadecode": None})


def test_numbers_of_numpy_cross_processes(config: VllmConfig) -> None:
    counters = Counters.create(NUM_LAYERS, (2,))
    unsent = UnsentCounts(counters)
    counters.generated_tokens += np.int64(3)  # type: ignore[assignment]
    counters.exits[2].accepted_tokens += np.bool_(True)  # type: ignore[assignment]
    received = over_the_wire(step(unsent.take()))
    assert received.adadecode.generated_tokens == 3
    assert received.adadecode.exits == {2: ExitCounters(accepted_tokens=1)}


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
        for name, value in asdict(exit_counts).items():
            assert found.pop((f"{name}_total", "1", str(layer), model)) == 2 * value
            assert found.pop((f"{name}_total", "0", str(layer), model)) == 0
    for key, value in {
        ("steps_total", "1", "deferred", model): counts.deferred_steps,
        ("steps_total", "1", "plain", model): counts.plain_steps,
        ("steps_total", "1", "prefill", model): counts.prefill_steps,
        ("layers_executed_total", "1", model, "draft"): counts.draft_layers,
        ("layers_executed_total", "1", model, "verification"): counts.verification_layers,
        ("verification_steps_total", "1", model): counts.verification_steps,
        ("generated_tokens_total", "1", model): counts.generated_tokens,
        ("deferred_tokens_total", "1", model): counts.deferred_tokens,
        ("sampled_tokens_total", "1", model): counts.sampled_tokens,
    }.items():
        assert found.pop(key) == 2 * value
    # That was all; the other engine has counted nothing.
    assert {key[1] for key in found} == {"0"}
    assert set(found.values()) == {0}

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


def logged(logger: LoggingStatLogger, *steps: SchedulerStats) -> list[str]:
    """What follows vLLM's first line on an interval with these steps."""
    with log_of_vllm() as lines:
        for stats in steps:
            logger.record(stats, None)
        logger.log()
    return lines[1:]


def test_log_line(config: VllmConfig, exit_layers: list[int]) -> None:
    logger = LoggingStatLogger(config)
    first, *others = exit_layers
    counts = Counters.create(NUM_LAYERS, tuple(exit_layers))
    counts.verification_steps, counts.generated_tokens = 2, 5
    counts.draft_layers, counts.verification_layers = 6, 4
    counts.exits[first] = ExitCounters(draft_tokens=5, accepted_tokens=3, rejected_tokens=1)
    exits = ", ".join([f"{first}: 10/6", *(f"{layer}: 0/0" for layer in others)])
    vllms, ours = logged(logger, step(counts, one_window(3, 2)), step(counts))
    assert vllms.startswith("SpecDecoding metrics: Mean acceptance length: 3.00")
    assert ours == (
        "AdaDecode metrics: Mean acceptance length: 2.50, Target layers executed per token: 0.250, "
        f"Avg Draft acceptance rate: 75.0%, Draft/accepted tokens by exit layer: {exits}"
    )
    # Once an interval, and the next one starts from nothing.
    assert logged(logger) == []
    counts.exits[first] = ExitCounters(draft_tokens=1)
    assert f"layer: {first}: 1/0" in logged(logger, step(counts))[-1]


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
    (line,) = logged(LoggingStatLogger(create(NGRAM)), step(None, one_window(3, 2)))
    assert line.startswith("SpecDecoding metrics: ")
