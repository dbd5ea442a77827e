"""Where everything of the small model goes in the wide one, and what can't be done.

Owns the choices that the package's docstring explains; no weights are seen here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Any

import torch

from benchmarks.widen.shape import Shape
from vllm_adadecode.errors import AdaDecodeError

# Of the channel that added tokens read. Its square is lost in the sum of squares of any real state,
# its product with the weight outweighs any logit even after a division by a large norm.
CONSTANT = 2.0**-16
ADDED_TOKEN_WEIGHT = -(2.0**40)
# Kinds of rotary scaling that change each frequency by itself.
ROPE_BY_FREQUENCY = ("default", "linear", "llama3")


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
