"""Where everything of the small model goes in the wide one, and what can't be done.

Owns the choices that the package's docstring explains; no weights are seen here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import log2, sqrt
from typing import Any

import torch

from benchmarks.widening.shape import Shape
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
    def energy(self) -> float:
        """Mean square of the wide state over that of the small one."""
        return self.copies * self.scale**2 * self.small / self.wide

    @property
    def first(self) -> torch.Tensor:
        """int64 ``[small]``: channels of the copy that is read."""
        return torch.arange(self.small)

    @property
    def written(self) -> torch.Tensor:
        """int64 ``[copies * small]``: channels of all copies."""
        return torch.arange(self.copies * self.small)


def choose_channels(small: int, wide: int, constant: bool) -> Channels:
    """A layout with energy 1 if there is one, with two copies or more if there is such a one.

    Args:
        constant: whether a channel is needed for the constant.

    Raises:
        AdaDecodeError: there is no room.
    """
    room = wide - constant
    if room < small:
        raise AdaDecodeError(
            f"hidden size {wide} is too small: the source needs {small} channels"
            + (", and a larger vocabulary one more" if constant else "")
        )
    exact = [
        (copies, scale)
        for scale in (2.0**a for a in range(16))
        for copies in [int(wide // (small * scale**2))]
        if copies * small * scale**2 == wide and 0 < copies * small <= room
    ]
    if exact:
        copies, scale = min(exact, key=lambda found: (found[0] < 2, found[0]))
    else:
        copies = min(2, room // small)
        scale = 2.0 ** round(log2(sqrt(wide / (copies * small))))
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
        return sqrt(self.channels.energy) / self.channels.scale

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
    def rotary_stride(self) -> int:
        ratio, rest = divmod(self.wide.head_dim, self.small.head_dim)
        return 1 if rest else ratio

    def theta(self, theta: float) -> float:
        """The wide model's rotary base."""
        if self.wide.head_dim % self.small.head_dim == 0:
            return theta
        return float(theta ** (self.wide.head_dim / self.small.head_dim))

    @property
    def query_scale(self) -> float:
        return sqrt(self.wide.head_dim / self.small.head_dim)

    @cached_property
    def rotary(self) -> torch.Tensor:
        """int64 ``[small head_dim]``: places in a wide head of queries and keys."""
        pairs = torch.arange(self.small.head_dim // 2) * self.rotary_stride
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
        kv, place = divmod_tensor(self.small.num_attention_heads, group(self.small))
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


def divmod_tensor(count: int, divisor: int) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.arange(count)
    return numbers // divisor, numbers % divisor


def make_plan(config: Any, wide: Shape, dtype: torch.dtype) -> Plan:
    """The plan for a model.

    Args:
        config: the small model's `LlamaConfig`.
        wide: the shape to reach.
        dtype: of the wide weights.

    Raises:
        AdaDecodeError: one line with what can't be done.
    """
    small = Shape.of(config)
    _check_source(config)
    _check_sizes(small, wide)
    if wide.head_dim != small.head_dim:
        kind = (config.rope_parameters or {}).get("rope_type", "default")
        if kind not in ROPE_BY_FREQUENCY:
            raise AdaDecodeError(
                f"rotary scaling {kind!r} depends on the head width: keep head_dim {small.head_dim}"
            )
    channels = choose_channels(
        small.hidden_size, wide.hidden_size, wide.vocab_size > small.vocab_size
    )
    return Plan(small, wide, channels, dtype)


def _check_source(config: Any) -> None:
    if config.model_type != "llama":
        raise AdaDecodeError(f"a model of type {config.model_type!r} can't be widened, only Llama")
    for flag in ("attention_bias", "mlp_bias", "quantization_config"):
        if getattr(config, flag, None):
            raise AdaDecodeError(f"a Llama with {flag} can't be widened")
    if config.hidden_act != "silu":
        raise AdaDecodeError(f"a Llama with activation {config.hidden_act!r} can't be widened")


def _check_sizes(small: Shape, wide: Shape) -> None:
    for name in (
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
    ):
        has, wanted = getattr(small, name), getattr(wide, name)
        if wanted < has:
            raise AdaDecodeError(f"{name} {wanted} is less than the source's {has}: raise it")
    if wide.num_attention_heads % wide.num_key_value_heads:
        raise AdaDecodeError(
            f"num_attention_heads {wide.num_attention_heads} is no multiple of "
            f"num_key_value_heads {wide.num_key_value_heads}"
        )
    if wide.hidden_size % wide.num_attention_heads:
        # transformers insists on it, whatever head_dim is.
        raise AdaDecodeError(
            f"hidden_size {wide.hidden_size} is no multiple of num_attention_heads "
            f"{wide.num_attention_heads}"
        )
    if wide.head_dim % 2:
        raise AdaDecodeError(f"head_dim {wide.head_dim} is odd: rotary embedding needs pairs")
    needed = small.num_key_value_heads * -(-group(small) // group(wide))
    if needed > wide.num_key_value_heads:
        raise AdaDecodeError(
            f"num_key_value_heads {wide.num_key_value_heads} are too few: with "
            f"{group(wide)} queries to each, the source needs {needed}"
        )
    if wide.tie_word_embeddings and not small.tie_word_embeddings:
        raise AdaDecodeError("the source's LM head is not tied to its embedding: add --no-tie")
