"""The way of the counts from the worker to vLLM's `/metrics` and its log.

Owns what is attached to a worker's output, the type by which it crosses processes, and our part of
vLLM's log line and Prometheus metrics. It counts nothing itself (counters.py), and is put in
vLLM's place by vllm_patches/scheduler_and_metrics.py.

worker: `attach_counts` -> scheduler: `pass_on` -> front end: `AdaDecodeLogging`, `AdaDecodeProm`.
Counts travel as the difference to those sent before, so what the front end adds up is a total
whichever of several front ends gets which part.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

from prometheus_client import Counter
from vllm.logger import init_logger
from vllm.v1.metrics.utils import create_metric_per_engine
from vllm.v1.spec_decode.metrics import SpecDecodingLogging, SpecDecodingProm, SpecDecodingStats

from vllm_adadecode.constants import METHOD
from vllm_adadecode.metrics.counters import Counters

# Under vLLM's logger, whose level and format users know.
logger = init_logger(f"vllm.{__name__}")


@dataclass
class AdaDecodeStats(SpecDecodingStats):
    """vLLM's statistics of a scheduler's step, with ours; None for other methods."""

    adadecode: Counters | None = None


class UnsentCounts:
    """What a worker has counted and not sent yet."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._sent = deepcopy(counters)

    def take(self) -> Counters | None:
        """What was counted since the last call; None if nothing."""
        counts = self._counters - self._sent
        if not counts:
            return None
        self._sent += counts
        return counts


def attach_counts(model_runner_output: Any, counts: Counters | None) -> None:
    """Send ``counts`` along with a worker's `ModelRunnerOutput`, with which they are pickled."""
    if counts is not None:
        model_runner_output.adadecode_counts = counts


def pass_on(
    model_runner_output: Any, engine_core_outputs: Iterable[Any], num_spec_tokens: int
) -> None:
    """Add counts that came with a worker's output to the statistics made of the same step.

    Args:
        model_runner_output: the worker's `ModelRunnerOutput`.
        engine_core_outputs: `EngineCoreOutputs` of all front ends; at most one has statistics, none
            where they are off.
        num_spec_tokens: most draft tokens of a request in a step.
    """
    counts = getattr(model_runner_output, "adadecode_counts", None)
    if counts is None:
        return
    for outputs in engine_core_outputs:
        if (stats := outputs.scheduler_stats) is not None:
            # A step that verified no draft token has no statistics of vLLM's.
            vllms = stats.spec_decoding_stats or SpecDecodingStats.new(num_spec_tokens)
            values = {field.name: getattr(vllms, field.name) for field in fields(SpecDecodingStats)}
            stats.spec_decoding_stats = AdaDecodeStats(**values, adadecode=counts)
            return


class AdaDecodeLogging(SpecDecodingLogging):
    """vLLM's log line on speculative decoding, followed by ours for the same interval."""

    def reset(self) -> None:
        super().reset()
        self.counts: Counters | None = None

    def observe(self, spec_decoding_stats: SpecDecodingStats) -> None:
        counts = getattr(spec_decoding_stats, METHOD, None)
        if counts is not None:
            self.counts = counts if self.counts is None else self.counts + counts
        # vLLM would divide by the number of verifications with draft tokens, and it has no
        # statistics at all of a step without one.
        if counts is None or spec_decoding_stats.num_drafts:
            super().observe(spec_decoding_stats)

    def log(self, log_fn: Callable[..., None] = logger.info) -> None:
        counts = self.counts
        super().log(log_fn=log_fn)
        self.counts = None
        if counts is not None:
            _log(counts.snapshot(), log_fn)


def _log(stats: dict[str, Any], log_fn: Callable[..., None]) -> None:
    """One line; a figure without data, as of an interval with prefill alone, is left out."""
    parts: list[str] = []
    values: list[float | str] = []
    for text, name, scale in (
        ("Mean acceptance length: %.2f", "mean_acceptance_length", 1),
        ("Target layers executed per token: %.3f", "layers_executed_per_token", 1),
        ("Avg Draft acceptance rate: %.1f%%", "draft_acceptance_rate", 100),
    ):
        if stats[name] is not None:
            parts.append(text)
            values.append(scale * stats[name])
    if stats["draft_tokens"] or stats["accepted_tokens"]:
        parts.append("Draft/accepted tokens by exit layer: %s")
        values.append(
            ", ".join(
                f"{layer}: {e['draft_tokens']}/{e['accepted_tokens']}"
                for layer, e in stats["exits"].items()
            )
        )
    if parts:
        log_fn("AdaDecode metrics: " + ", ".join(parts), *values)


# Documentation by field of `ExitCounters`, which is the name after ``vllm:adadecode_``; labelled by
# exit layer.
EXIT_COUNTERS = {
    "gates_evaluated": "Gates evaluated at an exit layer, by requests.",
    "heads_evaluated": "Heads evaluated at an exit layer, by requests.",
    "head_batches": "Heads evaluated at an exit layer, by batches.",
    "draft_tokens": "Draft tokens from an exit layer.",
    "next_exit": "Requests that went on from an exit layer to the next.",
    "accepted_tokens": "Draft tokens from an exit layer that verification accepted.",
    "rejected_tokens": "Draft tokens from an exit layer that verification rejected.",
}
# Name, documentation, extra label and its values by field of `Counters`. The ones without a label
# have one field.
COUNTERS: tuple[tuple[str, str, str | None, dict[str, str]], ...] = (
    (
        "steps",
        "Steps: decode steps that started from deferred states (deferred) or without any (plain), "
        "and steps with prefill (prefill).",
        "kind",
        {"deferred_steps": "deferred", "plain_steps": "plain", "prefill_steps": "prefill"},
    ),
    (
        "layers_executed",
        "Target layers executed in decode steps, each once per batch of any size.",
        "phase",
        {"draft_layers": "draft", "verification_layers": "verification"},
    ),
    (
        "verification_steps",
        "Verification steps in decode steps, one per request.",
        None,
        {"verification_steps": ""},
    ),
    (
        "generated_tokens",
        "Tokens that those verification steps generated.",
        None,
        {"generated_tokens": ""},
    ),
    (
        "deferred_tokens",
        "Tokens that a verification took up from a deferred state.",
        None,
        {"deferred_tokens": ""},
    ),
    (
        "sampled_tokens",
        "Tokens sampled after the last layer: those that are no accepted draft tokens.",
        None,
        {"sampled_tokens": ""},
    ),
)


class AdaDecodeProm(SpecDecodingProm):
    """vLLM's Prometheus metrics of speculative decoding and, for this method, ours.

    Mean acceptance length: ``rate(vllm:adadecode_generated_tokens_total[$interval]) /
    rate(vllm:adadecode_verification_steps_total[$interval])``.
    """

    def __init__(
        self,
        speculative_config: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(speculative_config, labelnames, per_engine_labelvalues, *args, **kwargs)
        self.is_ours = speculative_config is not None and speculative_config.method == METHOD
        if not self.is_ours:
            return
        self._labelnames, self._engines = labelnames, per_engine_labelvalues
        exit_layers = speculative_config.exit_layers
        # Metrics by engine, by the field that they show; those of exits by layer and field.
        self.exit_counters: dict[int, dict[str, dict[int, Counter]]] = {e: {} for e in exit_layers}
        self.counters: dict[str, dict[int, Counter]] = {}
        for name, documentation in EXIT_COUNTERS.items():
            metric = self._counter(name, documentation, "exit_layer")
            for layer in exit_layers:
                self.exit_counters[layer][name] = self._per_engine(metric, str(layer))
        for name, documentation, label, values in COUNTERS:
            metric = self._counter(name, documentation, *([label] if label else []))
            for field, value in values.items():
                self.counters[field] = self._per_engine(metric, *([value] if label else []))

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return self._counter_cls(
            name=f"vllm:adadecode_{name}",
            documentation=documentation,
            labelnames=[*self._labelnames, *labels],
        )

    def _per_engine(self, metric: Any, *values: str) -> dict[int, Any]:
        engines = {engine: [*labels, *values] for engine, labels in self._engines.items()}
        return create_metric_per_engine(metric, engines)

    def observe(self, spec_decoding_stats: SpecDecodingStats, engine_idx: int = 0) -> None:
        super().observe(spec_decoding_stats, engine_idx)
        counts = getattr(spec_decoding_stats, METHOD, None)
        if counts is None or not self.is_ours:
            return
        for layer, exit_counts in counts.exits.items():
            for field, metric in self.exit_counters[layer].items():
                metric[engine_idx].inc(getattr(exit_counts, field))
        for field, metric in self.counters.items():
            metric[engine_idx].inc(getattr(counts, field))
