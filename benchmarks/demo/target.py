"""Trains the demo target: the stages of a recipe one after another.

Owns the Llama, its losses and optimizers, and what it generates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.demo.recipe import Recipe, Shape, Stage, rate_factor

Tokens = NDArray[np.int64]
SAID_EVERY = 50  # steps


def new_model(shape: Shape) -> Any:
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = LlamaConfig(**vars(shape), **ids, tie_word_embeddings=True)
    return LlamaForCausalLM(config)


def steps_in_epoch(tokens: Tokens, recipe: Recipe, stage: Stage) -> int:
    rows = (len(tokens) - stage.length) // stage.length - 1  # one less: the offset varies
    return max(1, rows // (recipe.batch_tokens // stage.length))


def rows_at(tokens: Tokens, starts: Tokens, length: int) -> torch.Tensor:
    """[starts, length]"""
    return torch.from_numpy(np.stack([tokens[i : i + length] for i in starts]))


def batch(tokens: Tokens, recipe: Recipe, number: int, step: int) -> torch.Tensor:
    """[rows, length + 1]: inputs and, shifted by one, targets, for a step of stage `number`."""
    length = recipe.stages[number].length
    epoch, index = divmod(step, steps_in_epoch(tokens, recipe, recipe.stages[number]))
    rng = np.random.default_rng((recipe.seed, number, epoch))
    starts = np.arange(int(rng.integers(0, length)), len(tokens) - length - 1, length)
    rng.shuffle(starts)
    rows = recipe.batch_tokens // length
    return rows_at(tokens, starts[index * rows : (index + 1) * rows], length + 1)


def native_bf16() -> bool:
    """Whether the CPU has instructions for bfloat16; emulated it takes twice float32's time."""
    features = torch.cpu.get_capabilities()
    return any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=native_bf16())


def losses(model: Any, rows: torch.Tensor, exit_layers: tuple[int, ...]) -> list[torch.Tensor]:
    """Cross-entropy at each exit layer through the shared norm and LM head, then the last one."""
    with autocast():
        out = model.model(rows[:, :-1], use_cache=False, output_hidden_states=bool(exit_layers))
        # hidden_states[l] is the residual stream after l layers; last_hidden_state is normed.
        normed = [model.model.norm(out.hidden_states[layer]) for layer in exit_layers]
        logits = [model.lm_head(h) for h in (*normed, out.last_hidden_state)]
    targets = rows[:, 1:].reshape(-1)
    return [functional.cross_entropy(x.float().flatten(0, 1), targets) for x in logits]


def optimizers(model: Any, stage: Stage) -> list[torch.optim.Optimizer]:
    in_layers = set(model.model.layers.parameters())
    matrices = [p for p in model.parameters() if p.dim() == 2 and p in in_layers]
    others = [p for p in model.parameters() if p.dim() != 2 or p not in in_layers]
    return [
        torch.optim.Muon(matrices, lr=stage.matrix_rate, weight_decay=stage.weight_decay),
        torch.optim.AdamW(others, lr=stage.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train_stage(
    model: Any, tokens: Tokens, recipe: Recipe, number: int, progress: Progress
) -> None:
    """One stage, from what the model is."""
    stage = recipe.stages[number]
    steps = max(1, round(stage.epochs * steps_in_epoch(tokens, recipe, stage)))
    opts = optimizers(model, stage)
    groups = [group for opt in opts for group in opt.param_groups]
    peaks = [group["lr"] for group in groups]
    exits = recipe.exit_layers if stage.exit_weight else ()
    weights = torch.tensor([*[stage.exit_weight] * len(exits), 1 - stage.exit_weight * len(exits)])
    task = progress.add_task(stage.name, total=steps)
    for step in range(steps):
        parts = torch.stack(losses(model, batch(tokens, recipe, number, step), exits))
        (parts * weights).sum().backward()
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * rate_factor(step, steps)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        progress.advance(task)
        if (step + 1) % SAID_EVERY == 0 or step + 1 == steps:
            shown = " ".join(f"{x:.3f}" for x in parts.tolist())
            progress.console.print(f"{stage.name}: step {step + 1} of {steps}, loss {shown}")


def windows(tokens: Tokens, count: int, length: int, seed: int) -> torch.Tensor:
    """[count, length], drawn anywhere in `tokens`."""
    starts = np.random.default_rng(seed).integers(0, len(tokens) - length, count)
    return rows_at(tokens, starts, length)


@torch.no_grad()
def generate(model: Any, rows: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy, a batch of equally long prompts; an end-of-text token does not end a row."""
    cache, newest, columns = None, rows, [rows]
    for _ in range(new_tokens):
        out = model(newest, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, newest = out.past_key_values, out.logits[:, -1:].argmax(-1)
        columns.append(newest)
    return torch.cat(columns, 1)
