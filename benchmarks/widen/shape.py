"""Shapes of Llama models: the ones to widen to, and the one of a model that is there."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self


@dataclass(frozen=True)
class Shape:
    """What a Llama's step costs depends on these alone (and on the precision of its weights)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool

    @classmethod
    def of(cls, config: Any) -> Self:
        """Of a transformers `LlamaConfig`."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    def change(self, **changes: Any) -> Self:
        """With those of ``changes`` that are not None."""
        return replace(self, **{k: v for k, v in changes.items() if v is not None})

    @property
    def layer_weights(self) -> int:
        """Weights of one decoder layer."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        matrices = heads * self.head_dim + 3 * self.intermediate_size
        return self.hidden_size * (matrices + 2)

    @property
    def weights(self) -> int:
        """Weights of the model; a tied matrix counts once."""
        tables = 1 if self.tie_word_embeddings else 2
        last = self.hidden_size * (tables * self.vocab_size + 1)
        return self.num_hidden_layers * self.layer_weights + last

    @property
    def step_weights(self) -> int:
        """Weights that a decoding step of one request reads: of an embedding only a row."""
        layers = self.num_hidden_layers * self.layer_weights
        return layers + self.hidden_size * (self.vocab_size + 1)

    def __str__(self) -> str:
        return (
            f"{self.num_hidden_layers} layers of {self.hidden_size}, "
            f"intermediate {self.intermediate_size}, {self.num_attention_heads} heads of "
            f"{self.head_dim} ({self.num_key_value_heads} for keys and values), "
            f"vocabulary {self.vocab_size}, {'tied' if self.tie_word_embeddings else 'untied'}"
        )


PRESETS = {
    # For two cores: more than a cache holds, in few enough layers that what surrounds one is small.
    "cpu": Shape(1024, 4096, 12, 16, 8, 64, 12288, True),
    "0.5b": Shape(1024, 4096, 24, 16, 8, 64, 128256, True),
    # Llama 3.2 3B and Llama 3.1 8B.
    "3b": Shape(3072, 8192, 28, 24, 8, 128, 128256, True),
    "8b": Shape(4096, 14336, 32, 32, 8, 128, 128256, False),
}
