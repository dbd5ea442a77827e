"""Projection on the LM head with running statistics: logits are made tile by tile, never stored.

Owns stage 1 of the fused head: for every row and every split of the vocabulary the largest logit,
its token and the sum of exponentials. `merge.py` makes (token, p) of them; `sampling.py` does the
same with a draw. Rows that failed a gate come last in `order`, and a tile without a live row ends
before it has read anything of the LM head.

The vocabulary is the tensor cores' M side and the rows are their N side. So one row wastes little,
and the order in which a row's products are added is the same at every number of rows.
"""

from typing import Any

import torch
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import cdiv

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.kernels.head_weight import HeadWeight
from vllm_adadecode.kernels.launch import check_matrix, register_references, rows_contiguous
from vllm_adadecode.kernels.projection_reference import head_partials_reference
from vllm_adadecode.kernels.tuning import HeadBlocks, head_blocks

# Words of a partial result: largest logit and sum of exponentials (float32 bits), token id.
PARTIAL_WORDS = 3

NO_TOKEN = tl.constexpr(2**31 - 1)

# --- kernel --------------------------------------------------------------------------------------


@triton.jit
def head_logits_tile(  # type: ignore[no-untyped-def]
    x_ptr,
    x_stride,
    weight_ptr,
    weight_stride,
    row_scale_ptr,
    # [BLOCK_R] rows of x, all valid
    row,
    # [BLOCK_V] rows of weight, all valid
    vocab,
    soft_cap,
    logit_scale,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
):
    """Logits [BLOCK_V, BLOCK_R] in float32."""
    k = tl.arange(0, BLOCK_K)
    # A large vocabulary times a large hidden size passes 2^31.
    weight_ptrs = weight_ptr + vocab.to(tl.int64)[:, None] * weight_stride + k[None, :]
    x_ptrs = x_ptr + row.to(tl.int64)[None, :] * x_stride + k[:, None]
    acc = tl.zeros((BLOCK_V, BLOCK_R), dtype=tl.float32)
    for start in range(0, HIDDEN_SIZE, BLOCK_K):
        if HIDDEN_SIZE % BLOCK_K == 0:
            weight = tl.load(weight_ptrs + start)
            x = tl.load(x_ptrs + start)
        else:
            weight = tl.load(weight_ptrs + start, mask=k[None, :] < HIDDEN_SIZE - start, other=0.0)
            x = tl.load(x_ptrs + start, mask=k[:, None] < HIDDEN_SIZE - start, other=0.0)
        # int8 fits into bfloat16 and float16. "ieee": float32 rows are not rounded to tf32.
        acc = tl.dot(weight.to(x.dtype), x, acc, input_precision="ieee")
    if row_scale_ptr is not None:
        acc *= tl.load(row_scale_ptr + vocab)[:, None]
    if HAS_SOFT_CAP:
        # tanh(z) = 1 - 2 / (exp(2z) + 1), which is right at both infinities.
        acc = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 * acc / soft_cap) + 1.0))
    return acc * logit_scale


@triton.jit
def online_top(  # type: ignore[no-untyped-def]
    # [BLOCK_V, BLOCK_R]
    values,
    # [BLOCK_V] token or row of each
    ids,
    # [BLOCK_V]
    valid,
    # [BLOCK_R] of the tiles before
    top,
    top_id,
):
    """The larger of the tile's largest value and that so far; the lowest id wins. NaN is passed."""
    clean = tl.where(valid[:, None] & (values == values), values, float("-inf"))
    tile_top = tl.max(clean, axis=0)
    tile_id = tl.min(tl.where(clean == tile_top[None, :], ids[:, None], NO_TOKEN), axis=0)
    # Ids grow from tile to tile: an equal value does not replace an earlier one.
    return tl.maximum(top, tile_top), tl.where(tile_top > top, tile_id, top_id)


@triton.jit
def finite_shift(top):  # type: ignore[no-untyped-def]
    """What exponents are relative to: a row without a finite logit must not give -inf + inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def live_rows(order_ptr, num_live_ptr, num_rows, row_tile, BLOCK_R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Places of a row tile, the rows at them (clamped to valid ones), and how many are live."""
    place = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    num_live = num_rows
    if num_live_ptr is not None:
        num_live = tl.load(num_live_ptr)
    row = tl.minimum(place, num_rows - 1)
    if order_ptr is not None:
        row = tl.load(order_ptr + row)
    return place, row, num_live


@triton.jit(do_not_specialize=["num_rows", "first_id"])
def _head_partials_kernel(  # type: ignore[no-untyped-def]
    # [num_splits, num_rows, 3] int32
    partials_ptr,
    # [num_rows, hidden_size]
    x_ptr,
    x_stride,
    # [vocab_size, hidden_size]
    weight_ptr,
    weight_stride,
    # [vocab_size] or None
    row_scale_ptr,
    # [num_rows] int32, live rows first; None: all rows in order
    order_ptr,
    # [1] int32; None: all
    num_live_ptr,
    num_rows,
    vocab_size,
    first_id,
    soft_cap,
    logit_scale,
    HIDDEN_SIZE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    TILES_PER_SPLIT: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Row tiles of one split run side by side: the second finds the weights in the cache.
    num_row_tiles = tl.cdiv(num_rows, BLOCK_R)
    row_tile = tl.program_id(0) % num_row_tiles
    split = tl.program_id(0) // num_row_tiles
    place, row, num_live = live_rows(order_ptr, num_live_ptr, num_rows, row_tile, BLOCK_R)
    if row_tile * BLOCK_R >= num_live:
        return

    first = split * TILES_PER_SPLIT * BLOCK_V
    top = tl.full((BLOCK_R,), float("-inf"), dtype=tl.float32)
    top_id = tl.full((BLOCK_R,), 0, dtype=tl.int32) + first
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for tile in range(TILES_PER_SPLIT):
        vocab = first + tile * BLOCK_V + tl.arange(0, BLOCK_V)
        valid = vocab < vocab_size
        logits = head_logits_tile(
            x_ptr,
            x_stride,
            weight_ptr,
            weight_stride,
            row_scale_ptr,
            row,
            tl.minimum(vocab, vocab_size - 1),
            soft_cap,
            logit_scale,
            HIDDEN_SIZE,
            BLOCK_V,
            BLOCK_R,
            BLOCK_K,
            HAS_SOFT_CAP,
        )
        new_top, top_id = online_top(logits, vocab, valid, top, top_id)
        shift = finite_shift(new_top)
        # NaN stays in the sum, and the row is never confident.
        terms = tl.where(valid[:, None], tl.exp(logits - shift[None, :]), 0.0)
        total = total * tl.exp(top - shift) + tl.sum(terms, axis=0)
        top = new_top

    partial = partials_ptr + (split.to(tl.int64) * num_rows + place) * 3
    mask = place < num_live
    tl.store(partial, top.to(tl.int32, bitcast=True), mask=mask)
    tl.store(partial + 1, total.to(tl.int32, bitcast=True), mask=mask)
    tl.store(partial + 2, top_id + first_id, mask=mask)


# --- wrapper -------------------------------------------------------------------------------------


def tile_options(head: HeadWeight, blocks: HeadBlocks) -> dict[str, Any]:
    """What is compiled into a kernel that calls `head_logits_tile`, and Triton's own options."""
    return {
        "HIDDEN_SIZE": head.hidden_size,
        "HAS_SOFT_CAP": head.soft_cap is not None,
        "TILES_PER_SPLIT": blocks.tiles_per_split,
        "BLOCK_V": blocks.BLOCK_V,
        "BLOCK_R": blocks.BLOCK_R,
        "BLOCK_K": blocks.BLOCK_K,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }


def check_head_inputs(x: torch.Tensor, head: HeadWeight) -> torch.Tensor:
    """Rows fit for the kernels.

    Raises:
        AdaDecodeError: ``x`` is no ``[rows, hidden_size]``, or of another dtype than the weights.
    """
    check_matrix("the head's input", x, head.hidden_size)
    if head.row_scale is None and x.dtype != head.weight.dtype:
        raise AdaDecodeError(
            f"the head's input is {x.dtype}, but the LM head is {head.weight.dtype}: cast one"
        )
    return rows_contiguous(x)


def head_partials(
    x: torch.Tensor,
    head: HeadWeight,
    *,
    order: torch.Tensor | None = None,
    num_live: torch.Tensor | None = None,
    blocks: HeadBlocks | None = None,
) -> torch.Tensor:
    """Per row and split of the vocabulary: largest logit, sum of exponentials, token.

    Args:
        x: ``[num_rows, hidden_size]``; rows may be strided.
        head: what to project on.
        order: int32 ``[num_rows]``, a permutation with the live rows first; None: all in order.
        num_live: int32 ``[1]`` on the device; later places are not computed.
        blocks: how to cut the work; None: tuned or default.

    Returns:
        int32 ``[num_splits, num_rows, 3]`` by *place in order*: the bits of max(logits) and of
        sum(exp(logits - max)) as float32, and the token of the max. The token is a row of
        ``head.weight`` plus ``first_id``. Places that are not live are undefined.
    """
    x = check_head_inputs(x, head)
    num_rows, vocab_size = len(x), head.vocab_size
    blocks = blocks or head_blocks(head.weight, num_rows)
    num_splits = cdiv(vocab_size, blocks.BLOCK_V * blocks.tiles_per_split)
    partials = torch.empty(
        (num_splits, num_rows, PARTIAL_WORDS), dtype=torch.int32, device=x.device
    )
    if num_rows == 0:
        return partials
    _head_partials_kernel[(num_splits * cdiv(num_rows, blocks.BLOCK_R),)](
        partials,
        x,
        x.stride(0),
        head.weight,
        head.weight.stride(0),
        head.row_scale,
        order,
        num_live,
        num_rows,
        vocab_size,
        head.first_id,
        head.soft_cap or 1.0,
        float(head.logit_scale),
        **tile_options(head, blocks),
    )
    return partials


register_references(__name__, {"_head_partials_kernel": head_partials_reference})
