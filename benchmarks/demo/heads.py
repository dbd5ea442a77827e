"""Trains the demo's heads and chooses among them; the method's own head code is not used here.

A head is one matrix per exit layer before the target's own LM head. Starting from the identity it
is at first exactly what early-exit training of the target has taught; it stays only if it decodes
better than that on files nothing was trained on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from safetensors.torch import load_file
from torch.nn import functional

from benchmarks.demo.recipe import HeadRecipe, Norm, rate_factor
from benchmarks.demo.stages import autocast
from vllm_adadecode.heads import HeadsConfig, checkpoint, target_fingerprint


@dataclass
class Heads:
    """No transforms: the identity."""

    exit_layers: tuple[int, ...]
    norm: Norm = "after"
    transforms: dict[int, torch.Tensor] = field(default_factory=dict)
    temperature: float = 1.0  # at which they were trained; not stored

    def logits(self, model: Any, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        if self.norm == "before":
            hidden = model.model.norm(hidden)
        if layer in self.transforms:
            hidden = functional.linear(hidden, self.transforms[layer])
        if self.norm == "after":
            hidden = model.model.norm(hidden)
        return model.lm_head(hidden)

    @property
    def name(self) -> str:
        if not self.transforms:
            return "identity"
        return f"full, norm {self.norm}, temperature {self.temperature:g}"


def starting_heads(
    model: Any, norm: Norm, temperature: float, hidden: dict[int, torch.Tensor]
) -> Heads:
    """Every variant starts as the target's norm and LM head, or as near to it as it can."""
    transforms = {}
    for layer, h in hidden.items():
        start = torch.eye(h.shape[-1])
        if norm == "none":
            # The norm's gain and the *mean* scale it would have applied.
            start *= model.model.norm.weight / h.pow(2).mean(-1).sqrt().mean()
        transforms[layer] = start.requires_grad_()
    return Heads(tuple(hidden), norm, transforms, temperature)


def hidden_states(
    model: Any, rows: torch.Tensor, layers: tuple[int, ...]
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """The residual stream after each of `layers`, and the final logits."""
    with torch.no_grad():
        out = model.model(rows, use_cache=False, output_hidden_states=True)
        return {e: out.hidden_states[e] for e in layers}, model.lm_head(out.last_hidden_state)


def train_heads(
    model: Any,
    text: torch.Tensor,
    generated: torch.Tensor,
    exit_layers: tuple[int, ...],
    recipe: HeadRecipe,
    seed: int,
    progress: Progress,
) -> list[Heads]:
    """One trained set per variant of the recipe. Every batch is half text, half generations;
    both are [rows, length] of one length."""
    model.requires_grad_(False)
    rng = np.random.default_rng(seed)
    variants: list[Heads] = []
    optimizer: torch.optim.Optimizer | None = None
    task = progress.add_task("heads", total=recipe.steps)
    for step in range(recipe.steps):
        half = [torch.from_numpy(rng.integers(0, len(rows), 4)) for rows in (text, generated)]
        rows = torch.cat([text[half[0]], generated[half[1]]])
        with autocast():
            hidden, final = hidden_states(model, rows, exit_layers)
        if optimizer is None:
            variants = [starting_heads(model, *variant, hidden) for variant in recipe.variants]
            matrices = [t for heads in variants for t in heads.transforms.values()]
            optimizer = torch.optim.AdamW(matrices, recipe.rate, (0.9, 0.95), weight_decay=0.0)
        for heads in variants:
            goal = (final.float() / heads.temperature).log_softmax(-1).flatten(0, 1)
            for layer, h in hidden.items():
                with autocast():
                    logits = heads.logits(model, layer, h)
                guess = logits.float().log_softmax(-1).flatten(0, 1)
                functional.kl_div(guess, goal, log_target=True, reduction="batchmean").backward()
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * rate_factor(step, recipe.steps)
        optimizer.step()
        optimizer.zero_grad()
        progress.advance(task)
    for heads in variants:
        heads.transforms = {e: t.detach().bfloat16().float() for e, t in heads.transforms.items()}
    return variants


def save_heads(heads: Heads, folder: Path, model: Any, provenance: dict[str, Any]) -> None:
    """Write the heads beside their target, which must already lie in the folder above."""
    shape = model.config
    config = HeadsConfig(
        exit_layers=heads.exit_layers,
        transform="full" if heads.transforms else "identity",
        norm=heads.norm,
        target={
            "hidden_size": shape.hidden_size,
            "vocab_size": shape.vocab_size,
            "num_hidden_layers": shape.num_hidden_layers,
            "fingerprint": target_fingerprint(folder.parent),
        },
        speculators_config={
            "verifier": {"name_or_path": "..", "architectures": ["LlamaForCausalLM"]},
        },
        provenance=provenance,
    )
    tensors = {f"exit_{e}.weight": t.bfloat16() for e, t in heads.transforms.items()}
    checkpoint.save_heads(folder, config, tensors)


def load_heads(folder: Path) -> Heads:
    config = json.loads((folder / "config.json").read_text())
    layers = tuple(config["exit_layers"])
    tensors = folder / "model.safetensors"
    stored = load_file(tensors) if config["transform"] != "identity" else {}
    return Heads(
        layers, config["norm"], {e: stored[f"exit_{e}.weight"].float() for e in layers if stored}
    )
