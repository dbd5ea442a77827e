"""Gates: one logistic regression per exit that foresees whether the head will be confident.

Owns their training, which comes after the heads': the label of a position is whether the finished
head's confidence is above its threshold there. Gate logits are `vllm_adadecode.heads`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as ListOf
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch.nn import functional

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.training.batches import TokenRow, micro_batches, step_rows
from vllm_adadecode.training.distributions import Distributions
from vllm_adadecode.training.trainer import TrainSettings, rate_factor

GATE_RATE = 1e-2
MIN_STEPS = 100


@dataclass(frozen=True)
class GateReport:
    """One gate on held-out rows, at gate threshold 1/2.

    Attributes:
        confident: share of positions where the head is confident.
        passed: share of positions that the gate lets pass, that is, where the head runs.
        recall: share of the confident positions that it lets pass; 1 if there are none.
    """

    confident: float
    passed: float
    recall: float


def train_gates(
    distributions: Distributions,
    rows: ListOf[TokenRow],
    settings: TrainSettings,
    progress: Progress,
) -> None:
    """Train the gates of all exits on one pass over the rows (at least `MIN_STEPS` steps).

    Starts anew each time it is called: it is the shorter part of a run.

    Args:
        distributions: the target and its finished heads.
        rows: to train on.
        settings: batch sizes, warm-up and seed of the heads' training.
        progress: gets a bar.

    Raises:
        AdaDecodeError: a loss is NaN or infinite.
    """
    heads = distributions.heads
    weights = [p for head in heads.values() for p in (head.gate_weight, head.gate_bias)]
    parameters = [p for p in weights if p is not None]
    epoch_steps = math.ceil(len(rows) / settings.batch_size)
    steps = max(MIN_STEPS, epoch_steps)
    optimizer = torch.optim.AdamW(parameters, GATE_RATE, weight_decay=0.0)
    for step in progress.track(range(steps), description="training gates"):
        # Another order than the heads': their last rows are those they fit best.
        batch = step_rows(rows, settings.batch_size, settings.seed + 1, step, epoch_steps)
        total = sum(row.num_trained for row in batch)
        for micro in micro_batches(batch, settings.micro_batch_tokens):
            hidden, _ = distributions.states(micro)
            for e, h in hidden.items():
                label = confident(distributions, e, h).float()
                logit = heads[e].gate_logit(h)
                assert logit is not None
                loss = functional.binary_cross_entropy_with_logits(logit, label, reduction="sum")
                if not torch.isfinite(loss):
                    raise AdaDecodeError(
                        f"the loss of the gate after layer {e} is {float(loss)}: the target's "
                        "states are not finite; train with --precision fp32; nothing was written"
                    )
                (loss / total).backward()
        for group in optimizer.param_groups:
            group["lr"] = GATE_RATE * rate_factor(step, steps, settings.warmup)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def confident(
    distributions: Distributions,
    exit_layer: int,
    # [P, d]
    hidden: torch.Tensor,
) -> torch.Tensor:
    """Where a head's largest token probability is above the threshold, bool ``[P]``."""
    tokens, threshold = distributions.num_tokens, distributions.thresholds[exit_layer]
    parts = [
        distributions.head(exit_layer, hidden[chunk])[:, :tokens].amax(-1).exp() > threshold
        for chunk in distributions.chunks(len(hidden))
    ]
    return torch.cat(parts)


@torch.no_grad()
def evaluate_gates(
    distributions: Distributions, rows: ListOf[TokenRow], settings: TrainSettings
) -> dict[int, GateReport]:
    """Every gate on rows that it is not trained on."""
    counts = {e: [0, 0, 0] for e in distributions.heads}
    total = 0
    for micro in micro_batches(rows, settings.micro_batch_tokens):
        hidden, final = distributions.states(micro)
        total += len(final)
        for e, h in hidden.items():
            label = confident(distributions, e, h)
            logit = distributions.heads[e].gate_logit(h)
            assert logit is not None
            passed = logit > 0
            for i, chosen in enumerate((label, passed, label & passed)):
                counts[e][i] += int(chosen.sum())
    return {
        e: GateReport(label / total, passed / total, both / label if label else 1.0)
        for e, (label, passed, both) in counts.items()
    }
