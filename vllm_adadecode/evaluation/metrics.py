"""The numbers of a report: what each head is worth, and all of them together under a setting.

Owns their definitions. A head *agrees* where its token is the final layer's; a draft token is
*accepted* where it is the one that was generated, which for a target's own greedy text is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.evaluation.costs import Costs
from vllm_adadecode.evaluation.simulate import Counts, Setting, Simulator
from vllm_adadecode.evaluation.trace import Trace

BINS = 15
# Below this share of positions where the text is the target's greedy choice, it is not its own.
OWN_TEXT = 0.97


@dataclass(frozen=True)
class ExitMetrics:
    """One head under a setting.

    Attributes:
        layer: its exit layer.
        threshold: of the setting; 1: turned off.
        agreement: share of positions where its token is the final layer's.
        coverage: share of positions where its token would be drafted: gate open, confidence above
            the threshold.
        precision: agreement among those; None where there are none.
        calibration_error: expected difference of confidence and agreement, in 15 bins of equal
            width.
        heads_evaluated_per_token, gates_evaluated_per_token: evaluations in the simulated decode
            steps, per generated token.
        draft_tokens: made in the simulated decode steps.
        draft_acceptance_rate: share of them that was accepted; None without any.
    """

    layer: int
    threshold: float
    agreement: float
    coverage: float
    precision: float | None
    calibration_error: float
    heads_evaluated_per_token: float
    gates_evaluated_per_token: float
    draft_tokens: int
    draft_acceptance_rate: float | None


@dataclass(frozen=True)
class Metrics:
    """Heads on one set of traces under a setting; simulated at batch 1, greedy.

    Attributes:
        sequences, generated_tokens: how much there was; tokens from the prefill do not count.
        own_text: share of positions where the text is the target's greedy choice.
        ideal_speedup: layers that vanilla decoding executes over ours.
        ideal_speedup_with_head_cost: the same with heads, gates, LM head and verification steps, in
            the units of `Costs`.
        draft_acceptance_rate: share of draft tokens that was accepted; None without any.
        mean_acceptance_length: tokens generated per verification step, 1 in vanilla decoding.
        layers_executed_per_token: as a fraction of all layers, 1 in vanilla decoding.
    """

    sequences: int
    generated_tokens: int
    own_text: float
    ideal_speedup: float
    ideal_speedup_with_head_cost: float
    draft_acceptance_rate: float | None
    mean_acceptance_length: float
    layers_executed_per_token: float
    heads_evaluated_per_token: float
    gates_evaluated_per_token: float
    exits: tuple[ExitMetrics, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; exits by layer, as in `adadecode_stats`."""
        return asdict(self) | {"exits": {str(e.layer): asdict(e) for e in self.exits}}


class Measurer:
    """Measures one set of traces under as many settings as wanted.

    Raises:
        AdaDecodeError: there is nothing to measure.
    """

    def __init__(self, traces: Sequence[Trace], costs: Costs) -> None:
        self.simulator = Simulator(traces)
        self.costs, self.sequences = costs, len(traces)
        if costs.num_layers != self.simulator.num_layers:
            raise AdaDecodeError(
                f"costs are of {costs.num_layers} layers, the target has "
                f"{self.simulator.num_layers}: give costs of this target"
            )
        # [E, total positions], [total positions]
        self.agrees = np.concatenate([t.token == t.final for t in traces], axis=1)
        self.own = np.concatenate([t.generated == t.final for t in traces])
        if not self.own.size:
            raise AdaDecodeError("no output tokens to measure: generate at least two a sequence")

    def counts(self, setting: Setting) -> Counts:
        return self.simulator.run(setting)

    def measure(self, setting: Setting) -> Metrics:
        counts = self.counts(setting)
        tokens = counts.generated_tokens
        return Metrics(
            sequences=self.sequences,
            generated_tokens=tokens,
            own_text=float(self.own.mean()),
            ideal_speedup=tokens * counts.num_layers / counts.layers_executed,
            ideal_speedup_with_head_cost=self.costs.speedup(counts),
            draft_acceptance_rate=counts.draft_acceptance_rate,
            mean_acceptance_length=counts.mean_acceptance_length,
            layers_executed_per_token=counts.layers_executed_per_token,
            heads_evaluated_per_token=counts.heads_evaluated / tokens,
            gates_evaluated_per_token=counts.gates_evaluated / tokens,
            exits=tuple(
                self._exit(i, layer, setting, counts)
                for i, layer in enumerate(self.simulator.exit_layers)
            ),
        )

    def _exit(self, index: int, layer: int, setting: Setting, counts: Counts) -> ExitMetrics:
        threshold, found = setting.thresholds[index], counts.exits[index]
        confidence, agrees = self.simulator.confidence[index], self.agrees[index]
        drafted = confidence > np.float32(threshold)
        if setting.gated[index] and setting.gate_thresholds:
            drafted &= self.simulator.gate[index] > np.float32(setting.gate_thresholds[index])
        return ExitMetrics(
            layer=layer,
            threshold=threshold,
            agreement=float(agrees.mean()),
            coverage=float(drafted.mean()),
            precision=float(agrees[drafted].mean()) if drafted.any() else None,
            calibration_error=expected_calibration_error(confidence, agrees),
            heads_evaluated_per_token=found.heads_evaluated / counts.generated_tokens,
            gates_evaluated_per_token=found.gates_evaluated / counts.generated_tokens,
            draft_tokens=found.draft_tokens,
            draft_acceptance_rate=found.accepted_tokens / found.draft_tokens
            if found.draft_tokens
            else None,
        )


def measure(traces: Sequence[Trace], setting: Setting, costs: Costs) -> Metrics:
    """`Measurer.measure` for a single setting."""
    return Measurer(traces, costs).measure(setting)


def expected_calibration_error(
    # [P] each
    confidence: NDArray[np.float32],
    agrees: NDArray[np.bool_],
    bins: int = BINS,
) -> float:
    """Mean over positions of |confidence - agreement| of their bin; 0.0 without positions.

    Bins are of equal width over [0, 1]; a NaN counts as 0.
    """
    if not len(confidence):
        return 0.0
    known = np.nan_to_num(confidence.astype(np.float64), nan=0.0).clip(0.0, 1.0)
    which = np.minimum((known * bins).astype(np.int64), bins - 1)
    # Sums over a bin: the count, which a mean divides by, is what it weighs by.
    gaps = np.bincount(which, weights=known - agrees, minlength=bins)
    return float(np.abs(gaps).sum() / len(known))
