"""The fused head for probabilistic drafts: confidence, and a draw by Gumbel-max, in one pass.

Owns the variant of projection.py and merge.py that also samples. The noise is vLLM's: a function of
the request's seed, the position and the token, salted so that a draft and its verification do not
share it (`vllm/v1/worker/gpu/sample/gumbel.py`). So it draws what `gumbel_sample` would draw from
the stored logits.

Rejection sampling divides by the distribution drawn from. vLLM's sampler reads its logits from a
cache; given one, the kernel writes them there on the way, and draws from the values as rounded to
the cache's dtype, so that both use the same distribution.
"""

from dataclasses import dataclass

import torch
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import cdiv, next_power_of_2
from vllm.v1.worker.gpu.sample.gumbel import (
    _DRAFT_NOISE_SALT,
    _log1p_neg_stable,
    murmur3_uniform32,
)

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.kernels.head_weight import HeadWeight
from vllm_adadecode.kernels.launch import register_references
from vllm_adadecode.kernels.merge import (
    empty_result,
    load_partial,
    merge_tops,
    place_of_row,
    store_dead,
    store_result,
)
from vllm_adadecode.kernels.merge_reference import HeadResult
from vllm_adadecode.kernels.noise import draft_has_own_seed
from vllm_adadecode.kernels.projection import (
    NO_TOKEN,
    check_head_inputs,
    finite_shift,
    head_logits_tile,
    live_rows,
    online_top,
    tile_options,
)
from vllm_adadecode.kernels.sampling_reference import (
    merge_samples_reference,
    sample_partials_reference,
)
from vllm_adadecode.kernels.tuning import HeadBlocks, head_blocks

# A row of a tile also holds its noise, so tiles are narrower than those that do not draw.
MAX_TILE_ROWS = 32

# Words of a partial result: those of projection.py, then the largest noised logit, its row of the
# LM head, that row's logit, and the sum of exponentials at the request's temperature.
SAMPLE_WORDS = 7


@dataclass(frozen=True)
class SampledHead:
    """A draw from the head's distribution.

    Attributes:
        head: the most likely token, its probability at temperature 1, and confidence.
        sampled: int64 ``[num_rows]``, drawn from softmax(logits / temperature); the most likely
            token at temperature 0; 0 in rows that are not live.
        log_prob: float32 ``[num_rows]``, log of the probability it was drawn with; 0 at
            temperature 0 and in rows that are not live.
    """

    head: HeadResult
    sampled: torch.Tensor
    log_prob: torch.Tensor


# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def row_temperature(slot_ptr, temperature_ptr, row, mask):  # type: ignore[no-untyped-def]
    """Slots of rows, and their requests' temperatures; a padding row (slot -1) is greedy."""
    slot = tl.load(slot_ptr + row, mask=mask, other=-1).to(tl.int64)
    temperature = tl.load(temperature_ptr + slot, mask=slot >= 0, other=0.0).to(tl.float32)
    return slot, temperature, tl.where(temperature == 0.0, 1.0, temperature)


@triton.jit(do_not_specialize=["num_rows"])
def _sample_partials_kernel(  # type: ignore[no-untyped-def]
    # [num_splits, num_rows, 7] int32
    partials_ptr,
    # [num_rows, hidden_size]
    x_ptr,
    x_stride,
    # [vocab_size, hidden_size]
    weight_ptr,
    weight_stride,
    # [vocab_size] or None
    row_scale_ptr,
    # [num_rows] int32, [1] int32, or None
    order_ptr,
    num_live_ptr,
    # [vocab_size] int64 or None
    vocab_ids_ptr,
    # [num_rows] request slot, -1: padding
    slot_ptr,
    # [num_rows] int64
    pos_ptr,
    # [max_num_reqs]
    temperature_ptr,
    # [max_num_reqs] int64
    seed_ptr,
    # [max_num_reqs, num_cols, full vocab] or None
    cache_ptr,
    cache_stride_0,
    cache_stride_1,
    # [1] column
    cache_col_ptr,
    num_rows,
    vocab_size,
    soft_cap,
    logit_scale,
    HIDDEN_SIZE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    DRAFT_SEED: tl.constexpr,
    TILES_PER_SPLIT: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_row_tiles = tl.cdiv(num_rows, BLOCK_R)
    row_tile = tl.program_id(0) % num_row_tiles
    split = tl.program_id(0) // num_row_tiles
    place, row, num_live = live_rows(order_ptr, num_live_ptr, num_rows, row_tile, BLOCK_R)
    if row_tile * BLOCK_R >= num_live:
        return
    live = place < num_live
    slot, temperature, divisor = row_temperature(slot_ptr, temperature_ptr, row, live)
    seed = tl.load(seed_ptr + slot, mask=slot >= 0, other=0)
    if DRAFT_SEED and cache_ptr is not None:
        seed = seed ^ (tl.load(cache_col_ptr).to(tl.int64) << 32)
    pos = tl.load(pos_ptr + row).to(tl.int64) + _DRAFT_NOISE_SALT

    first = split * TILES_PER_SPLIT * BLOCK_V
    top = tl.full((BLOCK_R,), float("-inf"), dtype=tl.float32)
    top_id = tl.full((BLOCK_R,), 0, dtype=tl.int32) + first
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    noised, noised_id = top, top_id
    chosen, tempered = total, total
    for tile in range(TILES_PER_SPLIT):
        start = first + tile * BLOCK_V
        vocab = start + tl.arange(0, BLOCK_V)
        valid = vocab < vocab_size
        inside = tl.minimum(vocab, vocab_size - 1)
        logits = head_logits_tile(
            x_ptr,
            x_stride,
            weight_ptr,
            weight_stride,
            row_scale_ptr,
            row,
            inside,
            soft_cap,
            logit_scale,
            HIDDEN_SIZE,
            BLOCK_V,
            BLOCK_R,
            BLOCK_K,
            HAS_SOFT_CAP,
        )
        token = inside.to(tl.int64)
        if vocab_ids_ptr is not None:
            token = tl.load(vocab_ids_ptr + inside)
        if cache_ptr is not None:
            rounded = logits.to(cache_ptr.dtype.element_ty)
            row_ptr = cache_ptr + slot * cache_stride_0 + tl.load(cache_col_ptr) * cache_stride_1
            tl.store(
                row_ptr[None, :] + token[:, None],
                rounded,
                mask=valid[:, None] & (live & (slot >= 0))[None, :],
            )
            logits = rounded.to(tl.float32)

        new_top, top_id = online_top(logits, vocab, valid, top, top_id)
        shift = finite_shift(new_top)
        above = logits - shift[None, :]
        total = total * tl.exp(top - shift) + tl.sum(
            tl.where(valid[:, None], tl.exp(above), 0.0), axis=0
        )
        tempered = tempered * tl.exp((top - shift) / divisor) + tl.sum(
            tl.where(valid[:, None], tl.exp(above / divisor[None, :]), 0.0), axis=0
        )
        top = new_top

        uniform = murmur3_uniform32(seed[None, :], pos[None, :], token[:, None])
        noise = -tl.log(-_log1p_neg_stable(uniform))
        values = tl.where((temperature == 0.0)[None, :], logits, logits / divisor[None, :] + noise)
        noised, noised_id = online_top(values, vocab, valid, noised, noised_id)
        is_chosen = vocab[:, None] == noised_id[None, :]
        tile_chosen = tl.sum(tl.where(is_chosen, logits, 0.0), axis=0)
        chosen = tl.where(noised_id >= start, tile_chosen, chosen)

    partial = partials_ptr + (split.to(tl.int64) * num_rows + place) * 7
    tl.store(partial, top.to(tl.int32, bitcast=True), mask=live)
    tl.store(partial + 1, total.to(tl.int32, bitcast=True), mask=live)
    tl.store(partial + 2, top_id, mask=live)
    tl.store(partial + 3, noised.to(tl.int32, bitcast=True), mask=live)
    tl.store(partial + 4, noised_id, mask=live)
    tl.store(partial + 5, chosen.to(tl.int32, bitcast=True), mask=live)
    tl.store(partial + 6, tempered.to(tl.int32, bitcast=True), mask=live)


@triton.jit(do_not_specialize=["num_parts", "num_rows"])
def _merge_samples_kernel(  # type: ignore[no-untyped-def]
    # [num_parts, num_rows, 7] int32
    partials_ptr,
    num_parts,
    num_rows,
    order_ptr,
    num_live_ptr,
    other_ptr,
    vocab_ids_ptr,
    slot_ptr,
    temperature_ptr,
    threshold,
    # [num_rows] each
    token_ptr,
    p_ptr,
    confident_ptr,
    sampled_ptr,
    log_prob_ptr,
    BLOCK_PARTS: tl.constexpr,
):
    place, row, live = place_of_row(order_ptr, num_live_ptr, num_rows)
    if not live:
        store_dead(token_ptr, p_ptr, confident_ptr, row)
        tl.store(sampled_ptr + row, 0)
        tl.store(log_prob_ptr + row, 0.0)
        return
    part = tl.arange(0, BLOCK_PARTS)
    mask = part < num_parts
    part_ptr = partials_ptr + (part.to(tl.int64) * num_rows + place) * 7
    top, token, total, tops = merge_tops(part_ptr, mask)
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

    noised = load_partial(part_ptr, 3, mask, float("-inf"))
    ids = tl.load(part_ptr + 4, mask=mask, other=NO_TOKEN)
    best = tl.min(tl.where(noised == tl.max(noised, axis=0), ids, NO_TOKEN), axis=0)
    sampled = best.to(tl.int64)
    if vocab_ids_ptr is not None:
        sampled = tl.load(vocab_ids_ptr + sampled)
    tl.store(sampled_ptr + row, sampled)

    _, temperature, divisor = row_temperature(slot_ptr, temperature_ptr, row, row >= 0)
    shift = finite_shift(top)
    chosen = load_partial(part_ptr, 5, mask, 0.0)
    chosen = tl.sum(tl.where(ids == best, chosen, 0.0), axis=0)
    tempered = load_partial(part_ptr, 6, mask, 0.0) * tl.exp((tops - shift) / divisor)
    tempered = tl.sum(tl.where(mask, tempered, 0.0), axis=0)
    log_prob = (chosen - shift) / divisor - tl.log(tempered)
    tl.store(log_prob_ptr + row, tl.where(temperature == 0.0, 0.0, log_prob))


# --- wrapper -------------------------------------------------------------------------------------


def head_sample(
    # [num_rows, hidden_size]
    x: torch.Tensor,
    head: HeadWeight,
    threshold: float,
    # [num_rows] request slot, -1: padding
    slots: torch.Tensor,
    # [num_rows] int64
    positions: torch.Tensor,
    # [max_num_reqs]
    temperature: torch.Tensor,
    # [max_num_reqs] int64
    seeds: torch.Tensor,
    *,
    logits_cache: torch.Tensor | None = None,
    logits_cache_col: torch.Tensor | None = None,
    other: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    num_live: torch.Tensor | None = None,
    blocks: HeadBlocks | None = None,
) -> SampledHead:
    """`confidence.head_confidence` with a draw from the head's distribution.

    Args:
        slots, positions, temperature, seeds: as `gumbel_sample` takes them, with
            ``is_drafting=True``: position of the token that the head was computed from.
        logits_cache: ``[max_num_reqs, num_cols, full vocab_size]``; the logits of live rows are
            written to ``[slot, col]``, before temperature. With a draft vocabulary only its
            columns are written: fill the cache with -inf once.
        logits_cache_col: integer ``[1]`` (or 0-d), on the device.
        other: counts for confidence, not for the draw: its mass can't be drawn.
        the rest: as in `confidence.head_confidence`.

    Raises:
        AdaDecodeError: a shard of a vocabulary, whose noise would be another's, or bad shapes.
    """
    if head.first_id or (head.vocab_ids is not None and len(head.vocab_ids) > head.vocab_size):
        raise AdaDecodeError("a shard of the LM head can't sample: pass the whole LM head")
    x = check_head_inputs(x, head)
    num_rows, vocab_size = len(x), head.vocab_size
    blocks = blocks or head_blocks(head.weight, min(num_rows, MAX_TILE_ROWS))
    num_splits = cdiv(vocab_size, blocks.BLOCK_V * blocks.tiles_per_split)
    partials = torch.empty((num_splits, num_rows, SAMPLE_WORDS), dtype=torch.int32, device=x.device)
    result = SampledHead(
        empty_result(num_rows, x.device),
        torch.empty(num_rows, dtype=torch.int64, device=x.device),
        torch.empty(num_rows, dtype=torch.float32, device=x.device),
    )
    if num_rows == 0:
        return result
    slots, positions = slots.contiguous(), positions.contiguous()
    _sample_partials_kernel[(num_splits * cdiv(num_rows, blocks.BLOCK_R),)](
        partials,
        x,
        x.stride(0),
        head.weight,
        head.weight.stride(0),
        head.row_scale,
        order,
        num_live,
        head.vocab_ids,
        slots,
        positions,
        temperature,
        seeds,
        logits_cache,
        logits_cache.stride(0) if logits_cache is not None else 0,
        logits_cache.stride(1) if logits_cache is not None else 0,
        logits_cache_col,
        num_rows,
        vocab_size,
        head.soft_cap or 1.0,
        float(head.logit_scale),
        DRAFT_SEED=draft_has_own_seed(),
        **tile_options(head, blocks),
    )
    _merge_samples_kernel[(num_rows,)](
        partials,
        num_splits,
        num_rows,
        order,
        num_live,
        other,
        head.vocab_ids,
        slots,
        temperature,
        float(threshold),
        result.head.token,
        result.head.p,
        result.head.confident,
        result.sampled,
        result.log_prob,
        BLOCK_PARTS=next_power_of_2(num_splits),
        num_warps=4 if num_splits >= 128 else 1,
    )
    return result


register_references(
    __name__,
    {
        "_sample_partials_kernel": sample_partials_reference,
        "_merge_samples_kernel": merge_samples_reference,
    },
)
