"""Merging partial results of the fused head, over splits of a vocabulary and over ranks.

Owns stage 2: (max, argmax, sum of exponentials) per split become the token, its probability
p = exp(max - logsumexp) and whether p passes the exit's threshold. The same kernel first merges the
splits of a tensor-parallel rank and then, after one all-gather of three words a row, the ranks:
logits are not gathered.
"""

from collections.abc import Callable

import torch
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import next_power_of_2

from vllm_adadecode.kernels.launch import register_references
from vllm_adadecode.kernels.merge_reference import HeadResult, merge_partials_reference
from vllm_adadecode.kernels.projection import NO_TOKEN, PARTIAL_WORDS, finite_shift

# [rows, words] of every rank -> [ranks * rows, words], ranks in order.
AllGather = Callable[[torch.Tensor], torch.Tensor]

# --- kernel --------------------------------------------------------------------------------------


@triton.jit
def load_partial(part_ptr, word: tl.constexpr, mask, other):  # type: ignore[no-untyped-def]
    """A float32 word of partial results."""
    bits = tl.load(part_ptr + word, mask=mask, other=0)
    return tl.where(mask, bits.to(tl.float32, bitcast=True), other)


@triton.jit
def merge_tops(part_ptr, mask):  # type: ignore[no-untyped-def]
    """Max, its token, sum of exponentials relative to the max, and each part's own max."""
    tops = load_partial(part_ptr, 0, mask, float("-inf"))
    totals = load_partial(part_ptr, 1, mask, 0.0)
    ids = tl.load(part_ptr + 2, mask=mask, other=NO_TOKEN)
    top = tl.max(tops, axis=0)
    token = tl.min(tl.where(tops == top, ids, NO_TOKEN), axis=0)
    total = tl.sum(tl.where(mask, totals * tl.exp(tops - finite_shift(top)), 0.0), axis=0)
    return top, token, total, tops


@triton.jit
def store_result(  # type: ignore[no-untyped-def]
    token_ptr,
    p_ptr,
    confident_ptr,
    row,
    top,
    token,
    total,
    other_ptr,
    vocab_ids_ptr,
    threshold,
):
    """Finish a row: the other tokens' mass, p, the threshold, the token's id."""
    shift = finite_shift(top)
    if other_ptr is not None:
        # A logit for all tokens outside the draft vocabulary.
        total += tl.exp(tl.load(other_ptr + row) - shift)
    p = tl.exp(top - shift) / total
    token_id = token.to(tl.int64)
    if vocab_ids_ptr is not None:
        token_id = tl.load(vocab_ids_ptr + token_id)
    tl.store(token_ptr + row, token_id)
    tl.store(p_ptr + row, p)
    # NaN compares false.
    tl.store(confident_ptr + row, p > threshold)


@triton.jit
def place_of_row(order_ptr, num_live_ptr, num_rows):  # type: ignore[no-untyped-def]
    """This program's place, the row at it, and whether it is live."""
    place = tl.program_id(0)
    num_live = num_rows
    if num_live_ptr is not None:
        num_live = tl.load(num_live_ptr)
    row = place
    if order_ptr is not None:
        row = tl.load(order_ptr + place)
    return place, row, place < num_live


@triton.jit
def store_dead(token_ptr, p_ptr, confident_ptr, row):  # type: ignore[no-untyped-def]
    """A row that no head was run on."""
    tl.store(token_ptr + row, 0)
    tl.store(p_ptr + row, 0.0)
    tl.store(confident_ptr + row, False)


@triton.jit(do_not_specialize=["num_parts", "num_rows", "part_stride", "row_stride"])
def _merge_partials_kernel(  # type: ignore[no-untyped-def]
    # [num_parts, num_rows, >= 3] int32
    partials_ptr,
    part_stride,
    row_stride,
    num_parts,
    num_rows,
    # [num_rows] int32, [1] int32, or None
    order_ptr,
    num_live_ptr,
    # [num_rows, 3] int32 by place: merged, not finished; None: finish
    merged_ptr,
    # [num_rows] float32 or None
    other_ptr,
    # [vocab_size] int64 or None
    vocab_ids_ptr,
    threshold,
    # [num_rows] each
    token_ptr,
    p_ptr,
    confident_ptr,
    BLOCK_PARTS: tl.constexpr,
):
    place, row, live = place_of_row(order_ptr, num_live_ptr, num_rows)
    if not live:
        if merged_ptr is None:
            store_dead(token_ptr, p_ptr, confident_ptr, row)
        return
    part = tl.arange(0, BLOCK_PARTS)
    part_ptr = partials_ptr + part.to(tl.int64) * part_stride + place * row_stride
    top, token, total, _ = merge_tops(part_ptr, part < num_parts)
    if merged_ptr is not None:
        tl.store(merged_ptr + place * 3, top.to(tl.int32, bitcast=True))
        tl.store(merged_ptr + place * 3 + 1, total.to(tl.int32, bitcast=True))
        tl.store(merged_ptr + place * 3 + 2, token)
    else:
        store_result(
            token_ptr,
            p_ptr,
            confident_ptr,
            row,
            top,
            token,
            total,
            other_ptr,
            vocab_ids_ptr,
            threshold,
        )


# --- wrappers ------------------------------------------------------------------------------------


def empty_result(num_rows: int, device: torch.device) -> HeadResult:
    """Memory for a result."""
    return HeadResult(
        torch.empty(num_rows, dtype=torch.int64, device=device),
        torch.empty(num_rows, dtype=torch.float32, device=device),
        torch.empty(num_rows, dtype=torch.bool, device=device),
    )


def _launch(
    partials: torch.Tensor,
    order: torch.Tensor | None,
    num_live: torch.Tensor | None,
    merged: torch.Tensor | None,
    other: torch.Tensor | None,
    vocab_ids: torch.Tensor | None,
    threshold: float,
    result: HeadResult | None,
) -> None:
    num_parts, num_rows, _ = partials.shape
    if num_rows == 0:
        return
    _merge_partials_kernel[(num_rows,)](
        partials,
        partials.stride(0),
        partials.stride(1),
        num_parts,
        num_rows,
        order,
        num_live,
        merged,
        other,
        vocab_ids,
        float(threshold),
        result.token if result is not None else None,
        result.p if result is not None else None,
        result.confident if result is not None else None,
        BLOCK_PARTS=next_power_of_2(num_parts),
        num_warps=4 if num_parts >= 128 else 1,
    )


def merge_partials(
    partials: torch.Tensor,
    *,
    order: torch.Tensor | None = None,
    num_live: torch.Tensor | None = None,
) -> torch.Tensor:
    """Merge the splits of one shard of a vocabulary into what is sent to the other ranks.

    Args:
        partials: int32 ``[num_splits, num_rows, 3]`` from `projection.head_partials`.
        order, num_live: as there.

    Returns:
        int32 ``[num_rows, 3]`` by place: bits of max and of sum, token.
    """
    merged = partials.new_empty((partials.shape[1], PARTIAL_WORDS))
    _launch(partials, order, num_live, merged, None, None, 0.0, None)
    return merged


def finish_partials(
    partials: torch.Tensor,
    threshold: float,
    *,
    order: torch.Tensor | None = None,
    num_live: torch.Tensor | None = None,
    other: torch.Tensor | None = None,
    vocab_ids: torch.Tensor | None = None,
) -> HeadResult:
    """Merge partial results of splits, or of ranks, into tokens and probabilities.

    Args:
        partials: int32 ``[num_parts, num_rows, 3]``; parts in the order of their tokens.
        threshold: a row is confident where ``p > threshold``.
        order, num_live: as in `projection.head_partials`.
        other: float32 ``[num_rows]``, a logit for all tokens that are in no part:
            ``p = exp(max - logaddexp(logsumexp, other))``.
        vocab_ids: int64 ``[vocab_size]`` token of each row of the LM head; None: the row itself.
    """
    result = empty_result(partials.shape[1], partials.device)
    _launch(partials, order, num_live, None, other, vocab_ids, threshold, result)
    return result


def merge_shards(
    # int32 [num_rows, 3] from `merge_partials`
    merged: torch.Tensor,
    threshold: float,
    all_gather: AllGather,
    *,
    order: torch.Tensor | None = None,
    num_live: torch.Tensor | None = None,
    other: torch.Tensor | None = None,
    vocab_ids: torch.Tensor | None = None,
) -> HeadResult:
    """Merge the ranks of a tensor-parallel LM head with one all-gather of 12 bytes a row.

    Args:
        merged: this rank's, for its rows ``first_id ...`` of the vocabulary.
        all_gather: ``[num_rows, 3]`` of every rank -> ``[num_ranks * num_rows, 3]``, ranks in
            order, e.g. ``lambda x: tensor_model_parallel_all_gather(x, dim=0)``.
        threshold, order, num_live, other, vocab_ids: as in `finish_partials`; the same on every
            rank. ``vocab_ids`` are of the whole draft vocabulary.
    """
    gathered = all_gather(merged)
    parts = gathered.view(-1, len(merged), PARTIAL_WORDS) if len(merged) else merged[None]
    return finish_partials(
        parts, threshold, order=order, num_live=num_live, other=other, vocab_ids=vocab_ids
    )


register_references(__name__, {"_merge_partials_kernel": merge_partials_reference})
