"""The wide model's tensors, made from the small one's.

Owns what each tensor holds, as blocks to be placed among zeros: no wide tensor exists here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.widening.plan import ADDED_TOKEN_WEIGHT, CONSTANT, Plan

# Gives a tensor of the small model by name.
Read = Callable[[str], torch.Tensor]
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Block:
    """Values of a wide tensor at ``rows`` x ``columns`` (int64, rows increasing)."""

    rows: torch.Tensor
    columns: torch.Tensor
    # float64 [rows, columns]
    values: torch.Tensor


@dataclass(frozen=True)
class WideTensor:
    """A named tensor of one or two dimensions: zeros but for its blocks, which do not overlap."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[Block, ...]

    @property
    def row_length(self) -> int:
        return self.shape[1] if len(self.shape) == 2 else 1

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows from ``start`` to ``stop``, ``[stop - start, row_length]``."""
        part = torch.zeros(stop - start, self.row_length, dtype=self.dtype)
        for block in self.blocks:
            here = (block.rows >= start) & (block.rows < stop)
            if here.any():
                index = (block.rows[here] - start)[:, None], block.columns[None, :]
                part[index] = block.values[here].to(self.dtype)
        return part


def wide_tensors(plan: Plan, read: Read) -> Iterator[list[WideTensor]]:
    """The tensors of the wide model, a shard at a time.

    Args:
        read: see `Read`; called for one layer at a time.

    Yields:
        The embedding, each layer, and what comes after the layers.
    """
    yield [embedding_tensor(plan, read)]
    for layer in range(plan.wide.num_hidden_layers):
        yield list(layer_tensors(plan, read, layer))
    yield list(_end(plan, read))


def embedding_tensor(plan: Plan, read: Read) -> WideTensor:
    channels, blocks = plan.channels, []
    table = read("model.embed_tokens.weight").double()
    tokens = torch.arange(len(table))
    copied = table.repeat(1, channels.copies) * channels.scale
    blocks.append(Block(tokens, channels.written, copied))
    if channels.constant is not None:
        blocks.append(column_block(tokens, channels.constant, CONSTANT))
        if plan.wide.tie_word_embeddings:
            blocks.append(added_tokens(plan))
    return _matrix(plan, "model.embed_tokens", plan.wide.vocab_size, blocks)


def _end(plan: Plan, read: Read) -> Iterator[WideTensor]:
    channels = plan.channels
    gain = read("model.norm.weight").double()
    # The other copies are for the layers' norms: a tied LM head would count them.
    values = gain * plan.norm_gain * plan.feature_scale
    blocks = [Block(channels.first, torch.tensor([0]), values[:, None])]
    if channels.constant is not None:
        blocks.append(column_block(torch.tensor([channels.constant]), 0, 1.0))
    yield _vector(plan, "model.norm", blocks)
    if plan.wide.tie_word_embeddings:
        return
    source = "model.embed_tokens" if plan.small.tie_word_embeddings else "lm_head"
    table = read(f"{source}.weight").double() / plan.feature_scale
    blocks = [Block(torch.arange(len(table)), channels.first, table)]
    if channels.constant is not None:
        blocks.append(added_tokens(plan))
    yield _matrix(plan, "lm_head", plan.wide.vocab_size, blocks)


def added_tokens(plan: Plan) -> Block:
    assert plan.channels.constant is not None
    added = torch.arange(plan.small.vocab_size, plan.wide.vocab_size)
    return column_block(added, plan.channels.constant, ADDED_TOKEN_WEIGHT)


def layer_tensors(plan: Plan, read: Read, layer: int) -> Iterator[WideTensor]:
    """An added layer has zeros in all matrices, and with them any gains."""
    wide, prefix = plan.wide, f"model.layers.{layer}"
    source = plan.small_layers.get(layer)

    def small(name: str) -> torch.Tensor:
        return read(f"model.layers.{source}.{name}.weight").double()

    for name in LAYER_NORMS:
        gains = torch.ones(plan.small.hidden_size).double() if source is None else small(name)
        values = (gains * plan.norm_gain).repeat(plan.channels.copies)[:, None]
        blocks = [Block(plan.channels.written, torch.tensor([0]), values)]
        yield _vector(plan, f"{prefix}.{name}", blocks)

    queries, keys = plan.query_heads(), [plan.kv_heads(i) for i in range(plan.kv_copies)]
    inside = torch.arange(plan.small.intermediate_size)
    reading: dict[str, tuple[int, list[torch.Tensor], float]] = {
        "self_attn.q_proj": (
            wide.num_attention_heads * wide.head_dim,
            [_places(queries, plan.rotary, wide.head_dim)],
            plan.query_scale,
        ),
        "self_attn.k_proj": (
            wide.num_key_value_heads * wide.head_dim,
            [_places(heads, plan.rotary, wide.head_dim) for heads in keys],
            1.0,
        ),
        "self_attn.v_proj": (
            wide.num_key_value_heads * wide.head_dim,
            [_places(heads, plan.plain, wide.head_dim) for heads in keys],
            1.0,
        ),
        "mlp.gate_proj": (wide.intermediate_size, [inside], 1.0),
        "mlp.up_proj": (wide.intermediate_size, [inside], 1.0),
    }
    for name, (size, places, scale) in reading.items():
        blocks = []
        if source is not None:
            weight = small(name) * scale
            blocks = [block for rows in places for block in _reading(plan, rows, weight)]
        yield _matrix(plan, f"{prefix}.{name}", size, blocks)

    for name, columns, size in (
        (
            "self_attn.o_proj",
            _places(queries, plan.plain, wide.head_dim),
            wide.num_attention_heads * wide.head_dim,
        ),
        ("mlp.down_proj", inside, wide.intermediate_size),
    ):
        blocks = []
        if source is not None:
            values = (small(name) * plan.channels.scale).repeat(plan.channels.copies, 1)
            blocks = [Block(plan.channels.written, columns, values)]
        shape = (wide.hidden_size, size)
        yield WideTensor(f"{prefix}.{name}.weight", shape, plan.dtype, tuple(blocks))


def _reading(plan: Plan, rows: torch.Tensor, weight: torch.Tensor) -> list[Block]:
    """``weight`` on the first copy of the state, and what its rounding drops on the second."""
    order = rows.argsort()
    rows, weight = rows[order], weight[order]
    first = plan.channels.first
    blocks = [Block(rows, first, weight)]
    dropped = weight - weight.to(plan.dtype).double()
    if plan.channels.copies > 1 and dropped.any():
        blocks.append(Block(rows, first + plan.small.hidden_size, dropped))
    return blocks


def _places(heads: torch.Tensor, places: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of ``places`` in each of ``heads``, in the order of the small model's rows."""
    return (heads[:, None] * head_dim + places).flatten()


def column_block(rows: torch.Tensor, column: int, value: float) -> Block:
    values = torch.full((len(rows), 1), value, dtype=torch.float64)
    return Block(rows, torch.tensor([column]), values)


def _matrix(plan: Plan, name: str, size: int, blocks: list[Block]) -> WideTensor:
    """A matrix that reads the hidden state, ``[size, hidden]``."""
    shape = (size, plan.wide.hidden_size)
    return WideTensor(f"{name}.weight", shape, plan.dtype, tuple(blocks))


def _vector(plan: Plan, name: str, blocks: list[Block]) -> WideTensor:
    return WideTensor(f"{name}.weight", (plan.wide.hidden_size,), plan.dtype, tuple(blocks))
