"""Trains the target: the stages of a recipe one after another, resumable after a kill.

Which rows a step sees depends on the step number and the seed alone, so a checkpoint needs no state
of a data loader, and a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.demo.recipe import Recipe, Shape, Stage, rate_factor
from vllm_adadecode.files import write_file

Tokens = NDArray[np.int64]
SAVE_EVERY = 50  # steps: about a minute on two cores


def new_model(shape: Shape) -> Any:
    config = LlamaConfig(
        **vars(shape),
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
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
    offset = int(rng.integers(0, length))
    starts = np.arange(offset, len(tokens) - length - 1, length)
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


@torch.no_grad()
def text_loss(model: Any, tokens: Tokens, exit_layers: tuple[int, ...]) -> list[float]:
    """Loss per exit layer and of the last layer, on 96 evenly spread rows of 256 tokens."""
    starts = np.linspace(0, len(tokens) - 257, 96).astype(np.int64)
    rows = rows_at(tokens, starts, 257)
    parts = [losses(model, part, exit_layers) for part in rows.split(16)]
    return [float(torch.stack(column).mean()) for column in zip(*parts, strict=True)]


def optimizers(model: Any, stage: Stage) -> list[torch.optim.Optimizer]:
    # Our own batched Muon would save about 0.1 s of a step of 1.1 s: not worth keeping one.
    layers = set(model.model.layers.parameters())
    matrices = [p for p in layers if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2 or p not in layers]
    # A set has no stable order, and the saved state is matched by position.
    order = {p: i for i, p in enumerate(model.parameters())}
    matrices.sort(key=order.__getitem__)
    return [
        torch.optim.Muon(matrices, lr=stage.matrix_rate, weight_decay=stage.weight_decay),
        torch.optim.AdamW(others, lr=stage.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train_stage(
    model: Any, tokens: Tokens, recipe: Recipe, number: int, checkpoint: Path, progress: Progress
) -> float:
    """Brings `model` to the end of a stage, from `checkpoint` if one was left there.

    Returns the seconds of CPU time the stage took, those before a kill included."""
    stage = recipe.stages[number]
    steps = max(1, round(stage.epochs * steps_in_epoch(tokens, recipe, stage)))
    opts = optimizers(model, stage)
    for opt in opts:
        for group in opt.param_groups:
            group["peak"] = group["lr"]
    start, seconds = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start, seconds = saved["step"], saved["seconds"]
        model.load_state_dict(saved["model"])
        for opt, state in zip(opts, saved["optimizers"], strict=True):
            opt.load_state_dict(state)
        progress.console.print(f"{stage.name}: goes on at step {start} of {steps}")

    exits = recipe.exit_layers if stage.exit_weight else ()
    weights = torch.tensor([stage.exit_weight] * len(exits))
    weights = torch.cat([weights, 1 - weights.sum(dim=0, keepdim=True)])
    task = progress.add_task(stage.name, total=steps, completed=start)
    begun = time.process_time() - seconds
    for step in range(start, steps):
        parts = torch.stack(losses(model, batch(tokens, recipe, number, step), exits))
        (parts * weights).sum().backward()
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group["peak"] * rate_factor(step, steps)
            opt.step()
            opt.zero_grad()
        progress.advance(task)
        done = step + 1
        if done % SAVE_EVERY == 0 or done == steps:
            shown = " ".join(f"{x:.3f}" for x in parts.tolist())
            progress.console.print(f"{stage.name}: step {done} of {steps}, loss {shown}")
            seconds = time.process_time() - begun
            state = {
                "step": done,
                "seconds": seconds,
                "model": model.state_dict(),
                "optimizers": [opt.state_dict() for opt in opts],
            }
            write_file(checkpoint, partial(torch.save, state))
    return seconds


def train_target(
    model: Any,
    tokens: dict[str, Tokens],
    recipe: Recipe,
    corpus_digest: str,
    build: Path,
    progress: Progress,
) -> float:
    """All stages; those already finished in `build` are read, not run again.

    Returns the seconds of CPU time they took, whenever they ran."""
    seconds = 0.0
    for number, stage in enumerate(recipe.stages):
        key = recipe.key(number, corpus_digest)
        finished = build / f"{stage.name}-{key}.pt"
        if finished.exists():
            progress.console.print(f"{stage.name}: already in {finished.name}")
            saved = torch.load(finished, weights_only=True)
            model.load_state_dict(saved["model"])
            seconds += saved["seconds"]
            continue
        checkpoint = build / f"{stage.name}-{key}.part.pt"
        spent = train_stage(model, tokens[stage.files], recipe, number, checkpoint, progress)
        saved = {"model": model.state_dict(), "seconds": spent}
        write_file(finished, partial(torch.save, saved))
        checkpoint.unlink()
        seconds += spent
    return seconds
