"""A tiny target, sequences and heads for the tests of training."""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from tests.support.tiny_models import save_tiny_model
from vllm_adadecode.heads import HeadsConfig, make_heads
from vllm_adadecode.training.distributions import Distributions
from vllm_adadecode.training.sequences import Sequence, write_sequences
from vllm_adadecode.training.target_model import FrozenTarget, load_target

HIDDEN, VOCAB, LAYERS = 48, 96, 4


def tiny_target(path: Path, **options: Any) -> Path:
    """A random Llama of 4 layers, 48 wide, 96 tokens, with a tokenizer of words w0, w1, ..."""
    shape = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": LAYERS}
    return save_tiny_model(path, vocab_size=VOCAB, **(shape | options))


def random_sequences(count: int = 40, seed: int = 0) -> list[Sequence]:
    """Prompts of 2 to 6 tokens with 3 to 20 more."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> tuple[int, ...]:
        size = int(torch.randint(low, high + 1, (), generator=generator))
        return tuple(torch.randint(1, VOCAB, (size,), generator=generator).tolist())

    return [Sequence(draw(2, 6), draw(3, 20), "random") for _ in range(count)]


def data_file(path: Path, sequences: ListOf[Sequence] | None = None) -> Path:
    write_sequences(path, random_sequences() if sequences is None else sequences)
    return path


def heads_config(**changes: Any) -> HeadsConfig:
    fields: dict[str, Any] = {
        "exit_layers": [1, 3],
        "transform": "full",
        "norm": "after",
        "target": {"hidden_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": LAYERS},
        "speculators_config": {"verifier": {"name_or_path": ".."}},
    }
    return HeadsConfig(**(fields | changes))


def distributions(
    target: Path | FrozenTarget, draft_vocab: torch.Tensor | None = None, **changes: Any
) -> Distributions:
    """New heads of a tiny target, float32."""
    if isinstance(target, Path):
        target = load_target(target, torch.float32)
    if draft_vocab is not None:
        changes["draft_vocab_size"] = len(draft_vocab)
    torch.manual_seed(0)
    heads = make_heads(heads_config(**changes), torch.float32, "cpu")
    return Distributions(target, heads, dict.fromkeys(heads, 0.5), draft_vocab, "fp32")


def silent() -> Progress:
    return Progress(disable=True)
