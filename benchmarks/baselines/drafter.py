"""What drafters have in common: what they see of the target, their loss, and the training loop.

Owns no architecture: `medusa.py`, `eagle3.py` and `draft.py` have one each.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import Progress

from benchmarks.baselines.checkpoint import Checkpoint
from benchmarks.baselines.data import Data
from benchmarks.demo.recipe import rate_factor
from benchmarks.demo.stages import autocast
from vllm_adadecode.training.batches import MicroBatch, micro_batches
from vllm_adadecode.training.target_model import FrozenTarget

SAVE_EVERY = 20  # steps


@dataclass(frozen=True)
class Seen:
    """A batch, and what the frozen target says about it.

    Attributes:
        ids: ``[N, T]`` int64.
        trained: ``[N, T]`` bool, positions whose distribution is learned.
        hidden: residual stream after so many layers, ``[N, T, d]`` each.
        normed: last hidden state behind the final norm, ``[N, T, d]``.
        logits: ``[N, T, V]`` float32; those at a position are of the token behind it.
    """

    ids: torch.Tensor
    trained: torch.Tensor
    hidden: dict[int, torch.Tensor]
    normed: torch.Tensor
    logits: torch.Tensor


class Drafter(Protocol):
    """A method's drafter while it is trained.

    Attributes:
        layers: of the target, whose states it reads.
    """

    layers: tuple[int, ...]

    def parameters(self) -> Iterable[torch.nn.Parameter]: ...

    def learn(self, seen: Seen) -> tuple[torch.Tensor, list[float]]:
        """The loss, and the share of positions where each draft, first to last, is the target's
        first choice, the text being right up to it."""
        ...

    def save(self, folder: Path, provenance: dict[str, Any]) -> None: ...


def look(target: FrozenTarget, batch: MicroBatch, layers: Sequence[int]) -> Seen:
    with torch.no_grad():
        hidden, normed = target.hidden_states(batch.ids, layers)
        logits = target.lm_head(normed).float()
    device = target.device
    return Seen(batch.ids.to(device), batch.trained.to(device), hidden, normed, logits)


def distil(
    seen: Seen, guesses: Sequence[torch.Tensor], decay: float
) -> tuple[torch.Tensor, list[float]]:
    """What `Drafter.learn` returns, of KL divergences from the target's distribution.

    Args:
        guesses: logits of each draft for the target's last positions, ``[N, <= T, V]``.
        decay: weight of a draft's loss, to that of the one before.
    """
    total, agreement = torch.zeros((), device=seen.logits.device), []
    # Weighted, not picked out: that would copy every draft's logits there and back.
    goal = seen.logits.log_softmax(-1)
    chances = goal.exp()
    against_itself, first = (chances * goal).sum(-1), goal.argmax(-1)
    for k, guess in enumerate(guesses):
        skipped = seen.ids.shape[1] - guess.shape[1]
        weight = seen.trained[:, skipped:].float()
        weight = weight / weight.sum().clamp(min=1)
        crossed = (chances[:, skipped:] * guess.float().log_softmax(-1)).sum(-1)
        total = total + decay**k * ((against_itself[:, skipped:] - crossed) * weight).sum()
        same = guess.detach().argmax(-1) == first[:, skipped:]
        agreement.append(float((same * weight).sum()))
    return total, agreement


def train(
    target: FrozenTarget,
    drafter: Drafter,
    data: Data,
    *,
    steps: int,
    rows: int,
    rate: float,
    seed: int,
    progress: Progress,
    kept: Checkpoint | None = None,
) -> list[float]:
    """Bring the drafter to its end, from where ``kept`` was stopped.

    Args:
        rate: of AdamW, with warm-up and linear decay.

    Returns:
        Agreement of each draft with the target on the held-out rows.
    """
    kept = kept or Checkpoint()
    parameters = list(drafter.parameters())
    optimizer = torch.optim.AdamW(parameters, rate, (0.9, 0.95), weight_decay=0.0)
    start, known = kept.load(parameters, optimizer)
    task = progress.add_task(f"training, rate {rate:g}", total=steps, completed=start)
    if start:
        progress.console.print(f"rate {rate:g}: goes on at step {start} of {steps}")
    if known is not None:
        return known
    begin = time.process_time() - kept.seconds
    for step in range(start, steps):
        # As the demo's heads: large products in bfloat16 where the CPU has instructions for it.
        with autocast():
            seen = look(target, data.batch(step, rows, seed), drafter.layers)
            loss, agreement = drafter.learn(seen)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_factor(step, steps)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.advance(task)
        if (step + 1) % max(1, steps // 5) == 0:
            shown = " ".join(f"{share:.2f}" for share in agreement)
            progress.console.print(f"step {step + 1}: loss {loss.item():.3f}, agreement {shown}")
        if (step + 1) % SAVE_EVERY == 0:
            kept.save(step + 1, time.process_time() - begin, parameters, optimizer)
    found = evaluate(target, drafter, data)
    kept.save(steps, time.process_time() - begin, parameters, optimizer, found)
    return found


@torch.no_grad()
def evaluate(target: FrozenTarget, drafter: Drafter, data: Data) -> list[float]:
    """Agreement of each draft on the held-out rows."""
    found = []
    for batch in micro_batches(data.held_out, 4096):
        found.append(drafter.learn(look(target, batch, drafter.layers))[1])
    return [round(sum(shares) / len(shares), 4) for shares in zip(*found, strict=True)]
