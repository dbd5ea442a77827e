"""What drafters have in common: what they learn from, their loss, and the training loop.

Owns no architecture: `medusa.py`, `eagle3.py` and `draft.py` have one each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import Progress
from tokenizers import Tokenizer

from benchmarks.demo import corpus as text
from benchmarks.demo.recipe import Recipe, rate_factor
from benchmarks.demo.target import autocast
from benchmarks.demo.train import make_sequences
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.training.batches import MicroBatch, TokenRow, micro_batches, step_rows
from vllm_adadecode.training.target_model import FrozenTarget

ROWS = 16  # of a step, as the heads'
HELD_OUT = 20  # one row of the target's own text in so many

# --- what they learn from ------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """
    Attributes:
        sets: rows to learn from; a step takes as many from each.
        held_out: rows that nothing is learned from.
    """

    sets: tuple[tuple[TokenRow, ...], ...]
    held_out: tuple[TokenRow, ...]

    def batch(self, step: int, seed: int, rows: int = ROWS) -> MicroBatch:
        """What optimizer step number `step` sees: about `rows` rows, padded to one length."""
        share = max(1, rows // len(self.sets))
        chosen = []
        for i, of in enumerate(self.sets):
            chosen += step_rows(of, share, seed + i, step, -(-len(of) // share))
        return next(micro_batches(chosen, 1 << 62))


def make_data(target: FrozenTarget, recipe: Recipe, show: Progress) -> Data:
    """Text of the demo's corpus and the target's own, as `benchmarks.demo.train` gives to heads.

    Raises:
        AdaDecodeError: the target has no `tokenizer.json`.
    """
    path = Path(target.name, "tokenizer.json")
    if not path.is_file():
        raise AdaDecodeError(f"{target.name} has no tokenizer.json: choose a target that has one")
    tokenizer, corpus = Tokenizer.from_file(str(path)), text.load_corpus()
    sets = ("train", "second_stage")
    tokens = {files: text.encode(tokenizer, corpus.for_heads(files)) for files in sets}
    found = make_sequences(target.model, tokens, recipe.heads, recipe.seed, show)
    plain, own = (
        [TokenRow(s.ids, 0) for s in found if (s.source == "own") == is_own]
        for is_own in (False, True)
    )
    learned = (tuple(row for i, row in enumerate(of) if i % HELD_OUT) for of in (plain, own))
    return Data(tuple(learned), tuple(own[::HELD_OUT]))


# --- learning ------------------------------------------------------------------------------------


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
        """The loss, and the share of positions where each draft token, first to last, is the
        target's first choice, the text being right up to it."""
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
        guesses: logits of each draft token for the target's last positions, ``[N, <= T, V]``.
        decay: weight of a draft token's loss, to that of the one before.
    """
    total, agreement = torch.zeros((), device=seen.logits.device), []
    # Weighted, not picked out: that would copy every guess there and back.
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
    rate: float,
    seed: int,
    progress: Progress,
) -> list[float]:
    """Train the drafter.

    Args:
        rate: of AdamW, with warm-up and linear decay.

    Returns:
        Agreement of each draft token with the target on the held-out rows.
    """
    parameters = list(drafter.parameters())
    optimizer = torch.optim.AdamW(parameters, rate, (0.9, 0.95), weight_decay=0.0)
    task = progress.add_task(f"training, rate {rate:g}", total=steps)
    for step in range(steps):
        # As the demo's heads: large products in bfloat16 where the CPU has instructions for it.
        with autocast():
            seen = look(target, data.batch(step, seed), drafter.layers)
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
    return evaluate(target, drafter, data)


@torch.no_grad()
def evaluate(target: FrozenTarget, drafter: Drafter, data: Data) -> list[float]:
    """Agreement of each draft token on the held-out rows."""
    found = []
    for batch in micro_batches(data.held_out, 4096):
        found.append(drafter.learn(look(target, batch, drafter.layers))[1])
    return [round(sum(shares) / len(shares), 4) for shares in zip(*found, strict=True)]
