"""Trains the heads of all exits at once, towards what the last layer predicts; then their gates.

Owns the loops: steps, learning rate, evaluation on held-out rows, early stopping, resuming. One
forward of the frozen target serves all heads. Its final distribution is made for a chunk of
positions, every head's loss on the chunk goes back at once, and the next chunk takes its place.
The heads have nothing in common, so each is trained, clipped and kept as if it were alone. A gate
is a logistic regression: is the finished head's confidence above its threshold here?
"""

from __future__ import annotations

import math
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch.nn import functional

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.training.batches import TokenRow, micro_batches, step_rows
from vllm_adadecode.training.distributions import Distributions, kl
from vllm_adadecode.training.request import TrainSettings
from vllm_adadecode.training.state import RunState, load_state, save_state

GATE_RATE = 1e-2
MIN_GATE_STEPS = 100


@dataclass(frozen=True)
class HeldOut:
    """One head on held-out rows.

    Attributes:
        loss: mean over positions.
        agreement: share of positions where its likeliest token is the last layer's.
        coverage: share of positions where its confidence is above the threshold.
        precision: agreement among those; 1 if there are none.
        gate_passed: share of positions that its gate lets pass at gate threshold 1/2, that is,
            where the head would be evaluated; None without a gate.
        gate_recall: share of the covered positions that it lets pass; 1 if there are none.
    """

    loss: float
    agreement: float
    coverage: float
    precision: float
    gate_passed: float | None = None
    gate_recall: float | None = None


def train_heads(
    distributions: Distributions,
    rows: ListOf[TokenRow],
    held_out: ListOf[TokenRow],
    settings: TrainSettings,
    state_file: Path,
    progress: Progress,
) -> RunState:
    """Train, and leave in the heads the weights that were best on held-out rows, exit by exit.

    A state left in ``state_file`` is gone on from, with the same result bit for bit (on the same
    machine with the same number of threads).

    Args:
        distributions: the target and its new heads.
        rows: to train on.
        held_out: to evaluate on.
        state_file: of this very run: same settings, data and target.
        progress: gets a bar.

    Raises:
        AdaDecodeError: a loss is NaN or infinite.
        OSError: the disk refuses.
    """
    parameters = trained_parameters(distributions)
    if not parameters:
        state = RunState(finished=True)
        _evaluate_and_keep(distributions, held_out, settings, state, parameters)
        return state
    epoch_steps = math.ceil(len(rows) / settings.batch_size)
    steps = max(1, round(settings.epochs * epoch_steps))
    eval_every = settings.eval_every or max(1, steps // 10)
    # Decay would draw T to zero, not to the identity.
    optimizer = torch.optim.AdamW(
        list(parameters.values()), settings.learning_rate, weight_decay=0.0
    )
    state = load_state(state_file, parameters, optimizer) or RunState()
    if not state.history:
        first = step_rows(rows, settings.batch_size, settings.seed, 0, epoch_steps)
        distributions.start(next(micro_batches(first, settings.micro_batch_tokens)))
        _evaluate_and_keep(distributions, held_out, settings, state, parameters)
    else:
        progress.console.print(f"training goes on at step {state.step} of {steps}")
    task = progress.add_task("training heads", total=steps, completed=state.step)
    while not state.finished:
        batch = step_rows(rows, settings.batch_size, settings.seed, state.step, epoch_steps)
        losses = accumulate_gradients(distributions, batch, settings)
        for e, loss in losses.items():
            _refuse_nan(loss, e, state.step, settings)
            state.running[e] = state.running.get(e, 0.0) + loss
        for head in distributions.heads.values():
            torch.nn.utils.clip_grad_norm_(head.parameters(), settings.max_gradient)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate_factor(state.step, steps, settings.warmup)
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        ended = state.step == steps
        if ended or state.step % eval_every == 0:
            _evaluate_and_keep(distributions, held_out, settings, state, parameters)
            state.finished = ended or state.stale >= settings.patience
        if state.finished or state.step % settings.checkpoint_every == 0:
            save_state(state_file, state, parameters, optimizer)
        shown = sum(losses.values()) / len(losses)
        progress.update(task, advance=1, description=f"training heads, loss {shown:.4f}")
    if state.step < steps:
        progress.update(task, total=state.step)
        progress.console.print(f"no better head in {state.stale} evaluations: training ends")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.best_weights[name])
    return state


def train_gates(
    distributions: Distributions,
    rows: ListOf[TokenRow],
    settings: TrainSettings,
    progress: Progress,
) -> None:
    """Train the gates of all exits on one pass over the rows (at least `MIN_GATE_STEPS` steps).

    Starts anew each time it is called: it is the shorter part of a run. The heads are finished.

    Args:
        settings: batch sizes, warm-up and seed are those of the heads' training.

    Raises:
        AdaDecodeError: a loss is NaN or infinite.
    """
    heads = distributions.heads
    weights = [p for head in heads.values() for p in (head.gate_weight, head.gate_bias)]
    parameters = [p for p in weights if p is not None]
    epoch_steps = math.ceil(len(rows) / settings.batch_size)
    steps = max(MIN_GATE_STEPS, epoch_steps)
    optimizer = torch.optim.AdamW(parameters, GATE_RATE, weight_decay=0.0)
    for step in progress.track(range(steps), description="training gates"):
        # Another order than the heads': their last rows are those they fit best.
        batch = step_rows(rows, settings.batch_size, settings.seed + 1, step, epoch_steps)
        total = sum(row.num_trained for row in batch)
        for micro in micro_batches(batch, settings.micro_batch_tokens):
            hidden, _ = distributions.states(micro)
            for e, h in hidden.items():
                label = _confident(distributions, e, h).float()
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


def trained_parameters(distributions: Distributions) -> dict[str, torch.nn.Parameter]:
    """What this stage trains, by ``{exit layer}.{parameter}``: all but the gates."""
    return {
        f"{e}.{name}": parameter
        for e, head in distributions.heads.items()
        for name, parameter in head.checkpoint_parameters().items()
        if not name.startswith("gate_")
    }


def accumulate_gradients(
    distributions: Distributions, rows: ListOf[TokenRow], settings: TrainSettings
) -> dict[int, float]:
    """Add the gradients of the mean loss over all trained positions of ``rows``.

    Returns:
        That loss by exit layer.
    """
    total = sum(row.num_trained for row in rows)
    sums = {e: torch.zeros((), device=distributions.target.device) for e in distributions.heads}
    for batch in micro_batches(rows, settings.micro_batch_tokens):
        hidden, final = distributions.states(batch)
        for chunk in distributions.chunks(len(final)):
            goal = distributions.final(final[chunk], settings.loss_temperature)
            for e, h in hidden.items():
                guess = distributions.head(e, h[chunk])
                loss = kl(goal, guess).sum() / total
                loss.backward()
                sums[e] += loss.detach()
    return {e: float(value) for e, value in sums.items()}


@torch.no_grad()
def evaluate(
    distributions: Distributions, rows: ListOf[TokenRow], settings: TrainSettings
) -> dict[int, HeldOut]:
    """Every head on rows that it is not trained on."""
    exits = list(distributions.heads)
    # Loss, right, covered, covered and right, passed, passed and covered.
    sums = torch.zeros(len(exits), 6, dtype=torch.float64, device=distributions.target.device)
    total = 0
    tokens = distributions.num_tokens
    for batch in micro_batches(rows, settings.micro_batch_tokens):
        hidden, final = distributions.states(batch)
        total += len(final)
        for chunk in distributions.chunks(len(final)):
            goal = distributions.final(final[chunk], settings.loss_temperature)
            best = goal.argmax(-1)
            for i, e in enumerate(exits):
                h = hidden[e][chunk]
                guess = distributions.head(e, h)
                confidence, token = guess[:, :tokens].max(-1)
                right, covered = token == best, confidence.exp() > distributions.thresholds[e]
                gate = distributions.heads[e].gate_logit(h)
                passed = torch.zeros_like(covered) if gate is None else gate > 0
                flags = (right, covered, right & covered, passed, passed & covered)
                sums[i] += torch.stack([kl(goal, guess).sum(), *(x.sum() for x in flags)]).double()
    found = {}
    for e, (loss, right, covered, both, passed, kept) in zip(exits, sums.tolist(), strict=True):
        gated = distributions.heads[e].gate_weight is not None
        found[e] = HeldOut(
            loss=loss / total,
            agreement=right / total,
            coverage=covered / total,
            precision=both / covered if covered else 1.0,
            gate_passed=passed / total if gated else None,
            gate_recall=(kept / covered if covered else 1.0) if gated else None,
        )
    return found


@torch.no_grad()
def _confident(
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


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then half a cosine to (nearly) zero."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm + 1) / (steps - warm + 1)))


def _evaluate_and_keep(
    distributions: Distributions,
    held_out: ListOf[TokenRow],
    settings: TrainSettings,
    state: RunState,
    parameters: dict[str, torch.nn.Parameter],
) -> None:
    """Adds to the history, and keeps the weights of every head that is better than before."""
    found = evaluate(distributions, held_out, settings)
    entry: dict[str, Any] = {"step": state.step, "exits": {}}
    since = state.step - (state.history[-1]["step"] if state.history else 0)
    better = False
    for e, result in found.items():
        _refuse_nan(result.loss, e, state.step, settings)
        entry["exits"][str(e)] = vars(result) | (
            {"train_loss": state.running[e] / since} if since and e in state.running else {}
        )
        if result.loss < state.best.get(e, math.inf):
            better = True
            state.best[e] = result.loss
            for name, parameter in parameters.items():
                if name.startswith(f"{e}."):
                    state.best_weights[name] = parameter.detach().clone()
    state.stale = 0 if better else state.stale + 1
    state.running = {}
    state.history.append(entry)


def _refuse_nan(loss: float, exit_layer: int, step: int, settings: TrainSettings) -> None:
    if not math.isfinite(loss):
        raise AdaDecodeError(
            f"the loss of the head after layer {exit_layer} is {loss} at step {step}: lower "
            f"--learning-rate (now {settings.learning_rate:g}), or train with --precision fp32; "
            "nothing was written"
        )
