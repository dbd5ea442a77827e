"""The wide model's tensors, made from the small one's, and how they are written.

Owns what each tensor holds: the small one's values in their places among zeros.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from benchmarks.widen.plan import ADDED_TOKEN_WEIGHT, CONSTANT, Plan

# Gives a tensor of the small model by name, float64.
Read = Callable[[str], torch.Tensor]
# Rows and columns (int64) of a wide tensor, and their values, float64 [rows, columns] or a number.
Block = tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]
Tensors = dict[str, torch.Tensor]
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
CHUNK_BYTES = 16 << 20


def place(plan: Plan, shape: tuple[int, int], *blocks: Block) -> torch.Tensor:
    """A matrix of zeros but for its blocks, which do not overlap."""
    matrix = torch.zeros(shape, dtype=plan.dtype)
    for rows, columns, values in blocks:
        if isinstance(values, torch.Tensor):
            values = values.to(plan.dtype)
        matrix[rows[:, None], columns[None, :]] = values
    return matrix


def one(index: int) -> torch.Tensor:
    """A single row or column."""
    return torch.tensor([index])


def wide_tensors(plan: Plan, read: Read) -> Iterator[Tensors]:
    """The tensors of the wide model, a shard at a time: the embedding, each layer, the rest."""
    yield {"model.embed_tokens.weight": embedding(plan, read("model.embed_tokens.weight"))}
    for layer in range(plan.wide.num_hidden_layers):
        yield layer_tensors(plan, read, layer)
    yield _end(plan, read)


def embedding(plan: Plan, table: torch.Tensor) -> torch.Tensor:
    channels = plan.channels
    tokens = torch.arange(len(table))
    blocks: list[Block] = [
        (tokens, channels.written, table.repeat(1, channels.copies) * channels.scale)
    ]
    if channels.constant is not None:
        blocks.append((tokens, one(channels.constant), CONSTANT))
        if plan.wide.tie_word_embeddings:
            blocks += added_tokens(plan)
    return place(plan, (plan.wide.vocab_size, channels.wide), *blocks)


def added_tokens(plan: Plan) -> list[Block]:
    """The rows of an LM head that no small token has."""
    if plan.channels.constant is None:
        return []
    added = torch.arange(plan.small.vocab_size, plan.wide.vocab_size)
    return [(added, one(plan.channels.constant), ADDED_TOKEN_WEIGHT)]


def _end(plan: Plan, read: Read) -> Tensors:
    channels = plan.channels
    # The other copies are for the layers' norms: a tied LM head would count them.
    values = read("model.norm.weight") * (plan.norm_gain * plan.feature_scale)
    blocks: list[Block] = [(channels.first, one(0), values[:, None])]
    if channels.constant is not None:
        blocks.append((one(channels.constant), one(0), 1.0))
    found = {"model.norm.weight": place(plan, (channels.wide, 1), *blocks)[:, 0]}
    if not plan.wide.tie_word_embeddings:
        source = "model.embed_tokens" if plan.small.tie_word_embeddings else "lm_head"
        table = read(f"{source}.weight") / plan.feature_scale
        block = torch.arange(len(table)), channels.first, table
        shape = plan.wide.vocab_size, channels.wide
        found["lm_head.weight"] = place(plan, shape, block, *added_tokens(plan))
    return found


def layer_tensors(plan: Plan, read: Read, layer: int) -> Tensors:
    """An added layer has zeros in all matrices, and with them any gains."""
    wide, channels, prefix = plan.wide, plan.channels, f"model.layers.{layer}"
    source = plan.small_layers.get(layer)
    found: Tensors = {}

    def small(name: str) -> torch.Tensor:
        return read(f"model.layers.{source}.{name}.weight")

    for name in LAYER_NORMS:
        gains = torch.ones(channels.small).double() if source is None else small(name)
        values = (gains * plan.norm_gain).repeat(channels.copies)[:, None]
        norm = place(plan, (channels.wide, 1), (channels.written, one(0), values))
        found[f"{prefix}.{name}.weight"] = norm[:, 0]

    inside = torch.arange(plan.small.intermediate_size)
    queries, keys = plan.query_heads(), [plan.kv_heads(i) for i in range(plan.kv_copies)]
    width = wide.head_dim
    query_size, key_size = wide.num_attention_heads * width, wide.num_key_value_heads * width
    # What reads the state: rows, their places, and a factor.
    reading: dict[str, tuple[int, list[torch.Tensor], float]] = {
        "self_attn.q_proj": (query_size, [_rows(queries, plan.rotary, width)], plan.query_scale),
        "self_attn.k_proj": (key_size, [_rows(heads, plan.rotary, width) for heads in keys], 1.0),
        "self_attn.v_proj": (key_size, [_rows(heads, plan.plain, width) for heads in keys], 1.0),
        "mlp.gate_proj": (wide.intermediate_size, [inside], 1.0),
        "mlp.up_proj": (wide.intermediate_size, [inside], 1.0),
    }
    for name, (size, places, scale) in reading.items():
        blocks: list[Block] = []
        if source is not None:
            weight = small(name) * scale
            blocks = [block for rows in places for block in reads(plan, rows, weight)]
        found[f"{prefix}.{name}.weight"] = place(plan, (size, channels.wide), *blocks)
    # What writes it.
    for name, size, columns in (
        ("self_attn.o_proj", query_size, _rows(queries, plan.plain, width)),
        ("mlp.down_proj", wide.intermediate_size, inside),
    ):
        blocks = []
        if source is not None:
            values = (small(name) * channels.scale).repeat(channels.copies, 1)
            blocks = [(channels.written, columns, values)]
        found[f"{prefix}.{name}.weight"] = place(plan, (channels.wide, size), *blocks)
    return found


def reads(plan: Plan, rows: torch.Tensor, weight: torch.Tensor) -> list[Block]:
    """``weight`` on the first copy of the state, and what its rounding drops on the second."""
    first = plan.channels.first
    blocks: list[Block] = [(rows, first, weight)]
    dropped = weight - weight.to(plan.dtype).double()
    if plan.channels.copies > 1 and dropped.any():
        blocks.append((rows, first + plan.small.hidden_size, dropped))
    return blocks


def _rows(heads: torch.Tensor, places: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of ``places`` in each of ``heads``, in the order of the small model's rows."""
    return (heads[:, None] * head_dim + places).flatten()


def write(
    file: Path, tensors: Mapping[str, torch.Tensor], advance: Callable[[int], object] = lambda _: 0
) -> None:
    """Write a safetensors file; zeros are left as holes, which read as zeros and take no disk.

    Args:
        advance: called with the bytes of tensors that were done since the last call.

    Raises:
        OSError: the disk refuses.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        offsets = {"shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[name] = {"dtype": DTYPES[tensor.dtype], **offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for part in tensor.contiguous().view(torch.uint8).flatten().split(CHUNK_BYTES):
                if part.any():
                    stream.write(part.numpy().data)
                else:
                    stream.seek(len(part), 1)
                advance(len(part))
        stream.truncate(8 + len(text) + end)
