"""Shapes of Llamas, where everything of the small one goes in the wide one, what can't be done.

Owns the choices that the package's docstring explains; no weights are seen here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from math import sqrt
from typing import Any, Self

import torch

from vllm_adadecode.errors import AdaDecodeError

# Of the channel that added tokens read. Its square is lost in the sum of squares of any real state,
# its product with the weight outweighs any logit even after a division by a large norm.
CONSTANT = 2.0**-16
ADDED_TOKEN_WEIGHT = -(2.0**40)
# Kinds of rotary scaling that change each frequency by itself.
ROPE_BY_FREQUENCY = ("default", "linear", "llama3")


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


@dataclass(frozen=True)
class Channels:
    """The hidden state: ``copies`` of the small one, each times ``scale``, then spare channels.

    Attributes:
        constant: channel of the constant; None if the vocabulary does not grow.
    """

    small: int
    wide: int
    copies: int
    scale: float
    constant: int | None

    @property
    def first(self) -> torch.Tensor:
        """int64 ``[small]``: channels of the copy that is read."""
        return torch.arange(self.small)

    @property
    def written(self) -> torch.Tensor:
        """int64 ``[copies * small]``: channels of all copies."""
        return torch.arange(self.copies * self.small)


def choose_channels(small: int, wide: int, constant: bool) -> Channels:
    """A layout with the small state's mean of squares, with two copies or more if there is one.

    Args:
        constant: whether a channel is needed for the constant.

    Raises:
        AdaDecodeError: there is none.
    """
    layouts = [
        (copies, scale)
        for scale in (2.0**a for a in range(16))
        for copies in [int(wide // (small * scale**2))]
        if copies * small * scale**2 == wide and 0 < copies * small <= wide - constant
    ]
    if not layouts:
        times = 4 if constant else 1
        reason = " where the vocabulary grows" if constant else ""
        raise AdaDecodeError(
            f"hidden size {wide} must be a multiple of {times * small}{reason}: give such a one"
        )
    copies, scale = min(layouts, key=lambda found: (found[0] < 2, found[0]))
    return Channels(small, wide, copies, scale, copies * small if constant else None)


@dataclass(frozen=True)
class Plan:
    """From one shape to another.

    Attributes:
        channels: layout of the hidden state.
        dtype: of the wide weights.
        grow_draft_vocab: whether a draft vocabulary keeps its share of the tokens, so that a head
            check costs its share of the LM head; else it keeps its tokens.
    """

    small: Shape
    wide: Shape
    channels: Channels
    dtype: torch.dtype
    grow_draft_vocab: bool = False

    # --- norms and head features ----------------------------------------------------------------

    @property
    def norm_gain(self) -> float:
        """Factor of a norm's gains that makes its output the small one's."""
        return 1.0 / self.channels.scale

    @property
    def feature_scale(self) -> float:
        """What the LM head multiplies, over what the small one does."""
        scale = self.channels.scale
        # A tied LM head has the embedding's factor already.
        return 1 / scale if self.wide.tie_word_embeddings else scale

    def draft_vocab_size(self, small: int) -> int:
        """Of the wide heads, for a draft vocabulary of ``small`` tokens."""
        if not self.grow_draft_vocab:
            return small
        return small * self.wide.vocab_size // self.small.vocab_size

    # --- attention ------------------------------------------------------------------------------

    @property
    def query_scale(self) -> float:
        return sqrt(self.wide.head_dim / self.small.head_dim)

    @cached_property
    def rotary(self) -> torch.Tensor:
        """int64 ``[small head_dim]``: places in a wide head of queries and keys."""
        stride = self.wide.head_dim // self.small.head_dim
        pairs = torch.arange(self.small.head_dim // 2) * stride
        return torch.cat([pairs, pairs + self.wide.head_dim // 2])

    @cached_property
    def plain(self) -> torch.Tensor:
        """int64 ``[small head_dim]``: places in a wide head of values."""
        return torch.arange(self.small.head_dim)

    @property
    def kv_copies(self) -> int:
        """Wide key-value heads for each small one."""
        return -(-group(self.small) // group(self.wide))

    def query_heads(self) -> torch.Tensor:
        """int64 ``[small heads]``: the wide query head of each."""
        heads = torch.arange(self.small.num_attention_heads)
        kv, place = heads // group(self.small), heads % group(self.small)
        copy, rest = place // group(self.wide), place % group(self.wide)
        return (kv * self.kv_copies + copy) * group(self.wide) + rest

    def kv_heads(self, copy: int) -> torch.Tensor:
        """int64 ``[small kv heads]``: the wide key-value head of each that is its ``copy``-th."""
        return torch.arange(self.small.num_key_value_heads) * self.kv_copies + copy

    # --- depth ----------------------------------------------------------------------------------

    def wide_layer(self, layer: int) -> int:
        """The wide layer that is the small ``layer``; also maps exits (layers that have run)."""
        return layer * self.wide.num_hidden_layers // self.small.num_hidden_layers

    @cached_property
    def small_layers(self) -> dict[int, int]:
        """The small layer of each wide one that is not added."""
        return {self.wide_layer(i): i for i in range(self.small.num_hidden_layers)}


def group(shape: Shape) -> int:
    """Query heads to a key-value head."""
    return shape.num_attention_heads // shape.num_key_value_heads


def make_plan(config: Any, wide: Shape, dtype: torch.dtype, grow_draft_vocab: bool = False) -> Plan:
    """The plan for a model.

    Args:
        config: the small model's `LlamaConfig`.
        wide: the shape to reach.
        dtype: of the wide weights.

    Raises:
        AdaDecodeError: one line with what can't be done.
    """
    small = Shape.of(config)
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    kv_heads = small.num_key_value_heads * -(-group(small) // group(wide))
    parts = ("intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    checks = {
        f"a model of type {config.model_type!r}": config.model_type != "llama",
        "biases or quantised weights": any(
            getattr(config, flag, None)
            for flag in ("attention_bias", "mlp_bias", "quantization_config")
        ),
        f"activation {config.hidden_act!r}": config.hidden_act != "silu",
        f"rotary scaling {rope!r}": rope not in ROPE_BY_FREQUENCY,
        "an LM head of its own, to a tied one": wide.tie_word_embeddings
        and not small.tie_word_embeddings,
        f"head_dim {small.head_dim}, to {wide.head_dim}": wide.head_dim % small.head_dim,
        f"{kv_heads} key-value heads needed, to {wide.num_key_value_heads}": kv_heads
        > wide.num_key_value_heads,
        **{
            f"{name} {getattr(small, name)}, to {getattr(wide, name)}": getattr(wide, name)
            < getattr(small, name)
            for name in parts
        },
    }
    for what, wrong in checks.items():
        if wrong:
            raise AdaDecodeError(f"a source with {what}, can't be widened: choose others")
    channels = choose_channels(
        small.hidden_size, wide.hidden_size, wide.vocab_size > small.vocab_size
    )
    return Plan(small, wide, channels, dtype, grow_draft_vocab)
