"""Other methods' drafters of the small model, made to fit the wide one.

Owns what of the small model's folder is widened beside its AdaDecode heads. A draft model is a
Llama like its target and widened as one, to as many layers as keep its share. A Medusa head reads
the normed state, which holds the small one's first channels, times f (`Plan.feature_scale`), and
zeros: its block writes into the channels behind, where nothing is, and its LM head reads both, so
that f does not get into the block's activation. `eagle3.py` has EAGLE-3's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.widening.plan import ADDED_TOKEN_WEIGHT, Plan
from vllm_adadecode.errors import AdaDecodeError

MEDUSA, DRAFT, EAGLE3 = "medusa", "draft", "eagle3"


def has_drafter(source: Path, name: str) -> bool:
    """Whether the small model's folder holds one."""
    return (source / name / "config.json").is_file()


def draft_layers(plan: Plan, layers: int) -> int:
    """Layers of the wide draft model, for ``layers`` of the small one."""
    return max(layers, round(layers * plan.wide.num_hidden_layers / plan.small.num_hidden_layers))


def wide_provenance(plan: Plan, config: dict[str, Any], fingerprint: str | None) -> dict[str, Any]:
    """Of a wide drafter: of the wide target, and trained as the small one was."""
    known: dict[str, Any] = config.get("provenance", {})
    return known | {"target_fingerprint": fingerprint, "widened_from": str(plan.small)}


def widen_medusa(plan: Plan, source: Path, folder: Path, fingerprint: str | None) -> None:
    """Write the wide model's Medusa heads.

    Args:
        source: the small ones' folder.
        fingerprint: of the wide model.

    Raises:
        AdaDecodeError: there is no room for the blocks.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    small = load_file(source / "model.safetensors")
    wide = {name: _widen(plan, name, tensor) for name, tensor in small.items()}
    config |= {
        "hidden_size": plan.wide.hidden_size,
        "vocab_size": plan.wide.vocab_size,
        "truncated_vocab_size": plan.wide.vocab_size,
        "provenance": wide_provenance(plan, config, fingerprint),
    }
    folder.mkdir()
    save_file(wide, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=1) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def check_medusa(plan: Plan) -> None:
    """
    Raises:
        AdaDecodeError: the wide state has no channels for the blocks to write.
    """
    needed = _block_channels(plan).stop
    if needed > plan.wide.hidden_size:
        raise AdaDecodeError(
            f"hidden size {plan.wide.hidden_size} is too small for Medusa heads, which need "
            f"{needed}: move their folder away to go without"
        )


def _block_channels(plan: Plan) -> slice:
    """Where blocks write: channels that are zero in the normed state."""
    d = plan.small.hidden_size
    # One copy only is in the normed state. Behind a single one may be the constant.
    begin = d if plan.channels.copies > 1 or plan.channels.constant is None else d + 1
    return slice(begin, begin + d)


def _widen(plan: Plan, name: str, small: torch.Tensor) -> torch.Tensor:
    d, features = plan.small.hidden_size, plan.feature_scale
    block, width, vocab = _block_channels(plan), plan.wide.hidden_size, plan.wide.vocab_size
    values = small.double()
    if name.startswith("lm_heads."):
        matrix = torch.zeros(vocab, width, dtype=torch.float64)
        matrix[: len(small), :d] = values / features
        matrix[: len(small), block] = values
        if plan.channels.constant is not None:
            matrix[plan.small.vocab_size :, plan.channels.constant] = ADDED_TOKEN_WEIGHT
        return matrix.to(small.dtype)
    if name.endswith(".bias"):
        vector = torch.zeros(width, dtype=torch.float64)
        vector[block] = values
        return vector.to(small.dtype)
    matrix = torch.zeros(width, width, dtype=torch.float64)
    matrix[block, :d] = values / features
    return matrix.to(small.dtype)
