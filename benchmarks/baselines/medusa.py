"""Medusa heads (arXiv 2401.10774, Medusa-1): one residual block and one LM head for each draft.

Owns the architecture and the format that vLLM's `medusa` model loads. Head `k` reads the last
hidden state and says what comes `k + 2` tokens behind its position, the next one being sampled by
the target.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from benchmarks.baselines.training import Seen, distil
from vllm_adadecode.training.target_model import FrozenTarget

DECAY = 0.8  # Medusa's own


class Medusa(nn.Module):
    """Starts, as its authors' does, as the target's LM head behind blocks that change nothing."""

    layers: tuple[int, ...] = ()

    def __init__(self, target: FrozenTarget, heads: int) -> None:
        super().__init__()
        weight = target.lm_head_weight.float()
        vocab, width = weight.shape
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(heads))
        self.lm_heads = nn.ModuleList(nn.Linear(width, vocab, bias=False) for _ in range(heads))
        with torch.no_grad():
            for block in self.blocks:
                block.weight.zero_()
                block.bias.zero_()
            for head in self.lm_heads:
                head.weight.copy_(weight)

    def learn(self, seen: Seen) -> tuple[torch.Tensor, list[float]]:
        x = seen.normed.float()
        guesses = [
            head(x + functional.silu(block(x)))[:, : x.shape[1] - 1 - k]
            for k, (block, head) in enumerate(zip(self.blocks, self.lm_heads, strict=True))
        ]
        # The position that head `k` speaks for lies k + 1 further on.
        return distil(seen, guesses, DECAY)

    def save(self, folder: Path, provenance: dict[str, Any]) -> None:
        vocab, width = self.lm_heads[0].weight.shape
        config = {
            "model_type": "medusa",
            "architectures": ["MedusaModel"],
            "hidden_size": width,
            "vocab_size": vocab,
            "truncated_vocab_size": vocab,
            "num_heads": len(self.blocks),
            "num_hidden_layers": 1,
            "medusa_fc_bias": True,
            "dtype": "bfloat16",
            "provenance": provenance,
        }
        tensors = dict(_named(self))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _named(medusa: Medusa) -> Iterable[tuple[str, torch.Tensor]]:
    """As vLLM calls them."""
    for k, (block, head) in enumerate(zip(medusa.blocks, medusa.lm_heads, strict=True)):
        yield f"blocks.{k}.layers.0.weight", block.weight.detach().bfloat16()
        yield f"blocks.{k}.layers.0.bias", block.bias.detach().bfloat16()
        yield f"lm_heads.{k}.weight", head.weight.detach().bfloat16()
