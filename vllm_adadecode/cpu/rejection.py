"""Replacements of the kernels in ``gpu/spec_decode/rejection_sampler*.py``: verification of drafts.

A request's logits rows are its drafts' rows followed by one bonus row. ``draft_sampled`` holds the
input token of each row, so the draft that row i verifies is at i + 1; -1 marks a placeholder that
can never be accepted.
"""
# ruff: noqa: N803 (arguments bear the kernels' names)

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from vllm_adadecode.cpu.gumbel import block_argmax
from vllm_adadecode.cpu.registry import replacement
from vllm_adadecode.kernels.noise import draft_seed, gumbel_noise, philox_uniform

FloatArray = npt.NDArray[np.float32]

_NEG_INF = float("-inf")
_UTILS = "spec_decode.rejection_sampler_utils"


@replacement("spec_decode.rejection_sampler._flatten_sampled_kernel")
def flatten_sampled(
    flat_sampled_ptr: torch.Tensor,  # [num_logits]
    sampled_ptr: torch.Tensor,  # [num_reqs, num_speculative_steps + 1]
    sampled_stride: int,
    num_sampled_ptr: torch.Tensor,  # [num_reqs]
    cu_num_logits_ptr: torch.Tensor,  # [num_reqs + 1]
    *,
    num_warps: int = 1,
) -> None:
    sampled = sampled_ptr.numpy()
    num_sampled = num_sampled_ptr.numpy()
    rows, steps = np.nonzero(np.arange(sampled.shape[1]) < num_sampled[:, None])
    flat_sampled_ptr.numpy()[cu_num_logits_ptr.numpy()[rows] + steps] = sampled[rows, steps]


@replacement("spec_decode.rejection_sampler._gather_draft_sampled_kernel")
def gather_draft_sampled(
    draft_sampled_ptr: torch.Tensor,  # [num_logits]
    pos_ptr: torch.Tensor,  # [num_logits]
    input_ids_ptr: torch.Tensor,  # [num_tokens]
    positions_ptr: torch.Tensor,  # [num_tokens]
    logits_indices_ptr: torch.Tensor,  # [num_logits]
    expanded_idx_mapping_ptr: torch.Tensor,  # [num_logits]
    expanded_local_pos_ptr: torch.Tensor,  # [num_logits]
    prefill_len_ptr: torch.Tensor,  # [max_num_reqs]
    num_logits: int,
    BLOCK_SIZE: int,
) -> None:
    logits_indices = logits_indices_ptr.numpy()
    pos = positions_ptr.numpy()[logits_indices]
    local_pos = expanded_local_pos_ptr.numpy()
    prefill_len = prefill_len_ptr.numpy()[expanded_idx_mapping_ptr.numpy()]
    # No draft is proposed before a request has sampled past its prefill.
    is_placeholder = (local_pos > 0) & (pos - local_pos < prefill_len)
    tokens = input_ids_ptr.numpy()[logits_indices]
    draft_sampled_ptr.numpy()[:] = np.where(is_placeholder, -1, tokens)
    pos_ptr.numpy()[:] = pos


def _global_logsumexp(local_max: FloatArray, local_sumexp: FloatArray) -> float:
    """Log-sum-exp of one row from its vocabulary blocks' maxima and sums."""
    largest = local_max.max()
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(largest + np.log((local_sumexp * np.exp(local_max - largest)).sum()))


def _block_max_and_sumexp(
    logits: torch.Tensor,  # [num_rows, vocab_size]
    block_size: int,
    out_max: torch.Tensor,  # [num_rows, num_blocks]
    out_sumexp: torch.Tensor,  # [num_rows, num_blocks]
    rows: torch.Tensor,  # [num_rows] rows of the outputs
) -> None:
    for block, values in enumerate(logits.split(block_size, dim=-1)):
        largest = values.amax(-1)
        # A block without a possible token sums to 0 (and not to NaN).
        finite = largest.clamp(min=torch.finfo(torch.float32).min)
        out_max[rows, block] = largest
        out_sumexp[rows, block] = (values - finite.unsqueeze(-1)).exp_().sum(-1)


def _is_bonus(expanded_local_pos: torch.Tensor) -> npt.NDArray[np.bool_]:
    """Which rows ``[num_logits]`` are the last of their request."""
    return np.append(expanded_local_pos.numpy()[1:], 0) == 0


@replacement(f"{_UTILS}._compute_local_logits_stats_kernel")
def compute_local_logits_stats(
    target_local_argmax_ptr: torch.Tensor,  # [num_logits, num_blocks]
    target_local_argmax_stride: int,
    target_local_max_ptr: torch.Tensor,  # [num_logits, num_blocks]
    target_local_max_stride: int,
    target_local_sumexp_ptr: torch.Tensor,  # [num_logits, num_blocks]
    target_local_sumexp_stride: int,
    draft_local_max_ptr: torch.Tensor,  # [num_logits, num_blocks]
    draft_local_max_stride: int,
    draft_local_sumexp_ptr: torch.Tensor,  # [num_logits, num_blocks]
    draft_local_sumexp_stride: int,
    target_logits_ptr: torch.Tensor,  # [num_logits, >= vocab_size]
    target_logits_stride: int,
    draft_logits_ptr: torch.Tensor | None,  # [max_num_reqs, num_speculative_steps, >= vocab_size]
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    expanded_idx_mapping_ptr: torch.Tensor,  # [num_logits]
    expanded_local_pos_ptr: torch.Tensor,  # [num_logits]
    temp_ptr: torch.Tensor,  # [max_num_reqs]
    vocab_size: int,
    BLOCK_SIZE: int,
    HAS_DRAFT_LOGITS: bool,
    num_speculative_steps: int = 0,  # until vLLM 0.32
    num_logits: int = 0,  # from 0.33 on
) -> None:
    temperatures = temp_ptr.numpy()[expanded_idx_mapping_ptr.numpy()]
    # The bonus row needs no statistics. Filling them in costs less than leaving it out.
    target = target_logits_ptr[:, :vocab_size].to(torch.float32)
    is_random = temperatures != 0
    if not is_random.all():
        block_argmax(target, BLOCK_SIZE, target_local_argmax_ptr, target_local_max_ptr)
    rows = np.flatnonzero(is_random & ~_is_bonus(expanded_local_pos_ptr))
    if not len(rows):
        return
    row_idx = torch.from_numpy(rows)
    _block_max_and_sumexp(
        target[row_idx], BLOCK_SIZE, target_local_max_ptr, target_local_sumexp_ptr, row_idx
    )
    if HAS_DRAFT_LOGITS:
        assert draft_logits_ptr is not None
        slots = expanded_idx_mapping_ptr[row_idx].long()
        draft = draft_logits_ptr[slots, expanded_local_pos_ptr[row_idx].long(), :vocab_size]
        # Stored before temperature.
        draft = draft.to(torch.float32) / temp_ptr[slots].float().unsqueeze(-1)
        _block_max_and_sumexp(
            draft, BLOCK_SIZE, draft_local_max_ptr, draft_local_sumexp_ptr, row_idx
        )


@replacement(f"{_UTILS}._compute_cumulative_log_p_kernel")
def compute_cumulative_log_p(
    cumulative_log_p_ptr: torch.Tensor,  # [num_logits]
    target_logits_ptr: torch.Tensor,  # [num_logits, vocab_size]
    target_logits_stride: int,
    target_local_max_ptr: torch.Tensor,  # [num_logits, num_blocks]
    target_local_max_stride: int,
    target_local_sumexp_ptr: torch.Tensor,  # [num_logits, num_blocks]
    target_local_sumexp_stride: int,
    draft_sampled_ptr: torch.Tensor,  # [num_logits]
    draft_logits_ptr: torch.Tensor | None,  # [max_num_reqs, num_speculative_steps, vocab_size]
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    draft_local_max_ptr: torch.Tensor,  # [num_logits, num_blocks]
    draft_local_max_stride: int,
    draft_local_sumexp_ptr: torch.Tensor,  # [num_logits, num_blocks]
    draft_local_sumexp_stride: int,
    cu_num_logits_ptr: torch.Tensor,  # [num_reqs + 1]
    idx_mapping_ptr: torch.Tensor,  # [num_reqs]
    temp_ptr: torch.Tensor,  # [max_num_reqs]
    vocab_num_blocks: int,
    PADDED_VOCAB_NUM_BLOCKS: int,
    HAS_DRAFT_LOGITS: bool,
    *,
    num_warps: int = 1,
) -> None:
    target_max, target_sumexp = target_local_max_ptr.numpy(), target_local_sumexp_ptr.numpy()
    draft_max, draft_sumexp = draft_local_max_ptr.numpy(), draft_local_sumexp_ptr.numpy()
    cumulative_log_p = cumulative_log_p_ptr.numpy()
    drafts = draft_sampled_ptr.tolist()
    temperatures = temp_ptr.numpy()
    bounds = cu_num_logits_ptr.tolist()
    for row, slot in enumerate(idx_mapping_ptr.tolist()):
        temp = float(temperatures[slot])
        if temp == 0:
            continue
        log_p = 0.0
        for step, i in enumerate(range(bounds[row], bounds[row + 1] - 1)):
            token = drafts[i + 1]
            # A placeholder carries the last value on.
            if token >= 0:
                log_ratio = float(target_logits_ptr[i, token])
                log_ratio -= _global_logsumexp(target_max[i], target_sumexp[i])
                if HAS_DRAFT_LOGITS:
                    assert draft_logits_ptr is not None
                    log_ratio -= float(draft_logits_ptr[slot, step, token]) / temp
                    log_ratio += _global_logsumexp(draft_max[i], draft_sumexp[i])
                log_p = min(log_p + log_ratio, 0.0)
            cumulative_log_p[i] = log_p


@replacement(f"{_UTILS}._compute_local_residual_mass_kernel")
def compute_local_residual_mass(
    local_residual_mass_ptr: torch.Tensor,  # [num_logits, num_blocks]
    local_residual_mass_stride: int,
    cumulative_log_p_ptr: torch.Tensor,  # [num_logits]
    target_logits_ptr: torch.Tensor,  # [num_logits, >= vocab_size]
    target_logits_stride: int,
    target_local_max_ptr: torch.Tensor,  # [num_logits, num_blocks]
    target_local_max_stride: int,
    target_local_sumexp_ptr: torch.Tensor,  # [num_logits, num_blocks]
    target_local_sumexp_stride: int,
    draft_logits_ptr: torch.Tensor,  # [max_num_reqs, num_speculative_steps, >= vocab_size]
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    draft_local_max_ptr: torch.Tensor,  # [num_logits, num_blocks]
    draft_local_max_stride: int,
    draft_local_sumexp_ptr: torch.Tensor,  # [num_logits, num_blocks]
    draft_local_sumexp_stride: int,
    draft_sampled_ptr: torch.Tensor,  # [num_logits]
    expanded_idx_mapping_ptr: torch.Tensor,  # [num_logits]
    expanded_local_pos_ptr: torch.Tensor,  # [num_logits]
    temp_ptr: torch.Tensor,  # [max_num_reqs]
    vocab_size: int,
    vocab_num_blocks: int,
    BLOCK_SIZE: int,
    PADDED_VOCAB_NUM_BLOCKS: int,
    num_speculative_steps: int = 0,  # until vLLM 0.32
    num_logits: int = 0,  # from 0.33 on
) -> None:
    target_max, target_sumexp = target_local_max_ptr.numpy(), target_local_sumexp_ptr.numpy()
    draft_max, draft_sumexp = draft_local_max_ptr.numpy(), draft_local_sumexp_ptr.numpy()
    slots = expanded_idx_mapping_ptr.tolist()
    steps = expanded_local_pos_ptr.tolist()
    drafts = draft_sampled_ptr.tolist()
    for i in np.flatnonzero(~_is_bonus(expanded_local_pos_ptr)).tolist():
        temp = float(temp_ptr[slots[i]])
        # Used one step back, so neither for a first row nor for a bonus row.
        if steps[i] == 0 or drafts[i + 1] < 0 or temp == 0:
            continue
        m_b = target_logits_ptr[i, :vocab_size].float()
        m_b = (m_b - _global_logsumexp(target_max[i], target_sumexp[i])).exp_()
        m_s = draft_logits_ptr[slots[i], steps[i], :vocab_size].float() / temp
        m_s = (m_s - _global_logsumexp(draft_max[i], draft_sumexp[i])).exp_()
        p = math.exp(float(cumulative_log_p_ptr[i - 1]))
        mass = m_b.mul_(p).sub_(m_s).clamp_(min=0)
        for block, values in enumerate(mass.split(BLOCK_SIZE)):
            local_residual_mass_ptr[i, block] = values.sum()


@replacement(f"{_UTILS}._rejection_kernel")
def rejection(
    sampled_ptr: torch.Tensor,  # [num_reqs, num_speculative_steps + 1]
    sampled_stride: int,
    rejected_steps_ptr: torch.Tensor,  # [num_reqs]
    target_rejected_logsumexp_ptr: torch.Tensor,  # [num_reqs]
    draft_rejected_logsumexp_ptr: torch.Tensor,  # [num_reqs]
    target_logits_ptr: torch.Tensor,  # [num_logits, vocab_size]
    target_logits_stride: int,
    target_local_argmax_ptr: torch.Tensor,  # [num_logits, num_blocks]
    target_local_argmax_stride: int,
    target_local_max_ptr: torch.Tensor,  # [num_logits, num_blocks]
    target_local_max_stride: int,
    target_local_sumexp_ptr: torch.Tensor,  # [num_logits, num_blocks]
    target_local_sumexp_stride: int,
    draft_sampled_ptr: torch.Tensor,  # [num_logits]
    draft_logits_ptr: torch.Tensor | None,  # [max_num_reqs, num_speculative_steps, vocab_size]
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    draft_local_max_ptr: torch.Tensor,  # [num_logits, num_blocks]
    draft_local_max_stride: int,
    draft_local_sumexp_ptr: torch.Tensor,  # [num_logits, num_blocks]
    draft_local_sumexp_stride: int,
    cu_num_logits_ptr: torch.Tensor,  # [num_reqs + 1]
    idx_mapping_ptr: torch.Tensor,  # [num_reqs]
    temp_ptr: torch.Tensor,  # [max_num_reqs]
    seed_ptr: torch.Tensor,  # [max_num_reqs]
    pos_ptr: torch.Tensor,  # [num_logits]
    synthetic_conditional_rates_ptr: torch.Tensor | None,  # [num_speculative_steps]
    cumulative_log_p_ptr: torch.Tensor | None,  # [num_logits]
    local_residual_mass_ptr: torch.Tensor | None,  # [num_logits, num_blocks]
    local_residual_mass_stride: int,
    vocab_num_blocks: int,
    PADDED_VOCAB_NUM_BLOCKS: int,
    HAS_DRAFT_LOGITS: bool,
    SYNTHETIC_MODE: bool,
    USE_BLOCK_VERIFICATION: bool,
    # From vLLM 0.33 on, of a method that is not lossless: None and 0 without it
    fly_entropy_ptr: None = None,
    fly_entropy_threshold: float = 0.0,
    FLY_WINDOW_SIZE: int = 0,
    *,
    num_warps: int = 1,
) -> None:
    if FLY_WINDOW_SIZE:
        raise NotImplementedError("FLy verification has no CPU replacement")
    sampled = sampled_ptr.numpy()
    accepted_lengths = rejected_steps_ptr.numpy()
    target_max, target_sumexp = target_local_max_ptr.numpy(), target_local_sumexp_ptr.numpy()
    draft_max, draft_sumexp = draft_local_max_ptr.numpy(), draft_local_sumexp_ptr.numpy()
    target_argmax = target_local_argmax_ptr.numpy()
    drafts = draft_sampled_ptr.tolist()
    bounds = cu_num_logits_ptr.tolist()
    temperatures, seeds, positions = temp_ptr.numpy(), seed_ptr.numpy(), pos_ptr.numpy()

    for row, slot in enumerate(idx_mapping_ptr.tolist()):
        start, num_drafts = bounds[row], bounds[row + 1] - bounds[row] - 1
        temp = float(temperatures[slot])
        accepted = 0
        target_lse = draft_lse = 0.0
        for step in range(num_drafts):
            i = start + step
            token = drafts[i + 1]
            if temp == 0:
                block_max = np.where(np.isnan(target_max[i]), _NEG_INF, target_max[i])
                best = int(target_argmax[i, block_max.argmax()])
                if SYNTHETIC_MODE:
                    assert synthetic_conditional_rates_ptr is not None
                    u = philox_uniform(int(seeds[slot]), int(positions[i]))
                    accept = token >= 0 and bool(u < float(synthetic_conditional_rates_ptr[step]))
                else:
                    accept = token == best
                # The target's own token on rejection: greedy rows are not resampled.
                sampled[row, step] = token if accept else best
            else:
                if token < 0:
                    break
                sampled[row, step] = token
                seed = int(seeds[slot])
                if USE_BLOCK_VERIFICATION:
                    seed = draft_seed(seed, step)
                u = philox_uniform(seed, int(positions[i]))
                if USE_BLOCK_VERIFICATION:
                    assert cumulative_log_p_ptr is not None
                    ratio = math.exp(float(cumulative_log_p_ptr[i]))
                    h = ratio
                    if step < num_drafts - 1 and drafts[i + 2] >= 0:
                        if HAS_DRAFT_LOGITS:
                            assert local_residual_mass_ptr is not None
                            mass = float(local_residual_mass_ptr[i + 1].sum())
                        else:
                            # A one-hot draft's residual in closed form.
                            lse = _global_logsumexp(target_max[i + 1], target_sumexp[i + 1])
                            log_m_b = float(target_logits_ptr[i + 1, drafts[i + 2]]) - lse
                            mass = ratio * (1 - math.exp(log_m_b))
                        denominator = mass + 1 - ratio
                        h = mass / denominator if denominator > 0 else 1.0
                    if u <= h:
                        accepted = step + 1
                    # The longest accepted prefix counts, so a rejection does not end the block.
                    continue
                target_lse = _global_logsumexp(target_max[i], target_sumexp[i])
                log_p = float(target_logits_ptr[i, token]) - target_lse
                log_q = 0.0
                if HAS_DRAFT_LOGITS:
                    assert draft_logits_ptr is not None
                    draft_lse = _global_logsumexp(draft_max[i], draft_sumexp[i])
                    log_q = float(draft_logits_ptr[slot, step, token]) / temp - draft_lse
                if SYNTHETIC_MODE:
                    assert synthetic_conditional_rates_ptr is not None
                    accept = bool(u < float(synthetic_conditional_rates_ptr[step]))
                else:
                    accept = log_p > math.log(u) + log_q
            if not accept:
                break
            accepted += 1

        accepted_lengths[row] = accepted
        if USE_BLOCK_VERIFICATION and temp != 0 and accepted < num_drafts:
            i = start + accepted
            target_lse = _global_logsumexp(target_max[i], target_sumexp[i])
            if HAS_DRAFT_LOGITS:
                draft_lse = _global_logsumexp(draft_max[i], draft_sumexp[i])
        target_rejected_logsumexp_ptr[row] = target_lse
        draft_rejected_logsumexp_ptr[row] = draft_lse


@replacement(f"{_UTILS}._resample_kernel")
def resample(
    resampled_local_argmax_ptr: torch.Tensor,  # [num_reqs, num_blocks]
    resampled_local_argmax_stride: int,
    resampled_local_max_ptr: torch.Tensor,  # [num_reqs, num_blocks]
    resampled_local_max_stride: int,
    target_logits_ptr: torch.Tensor,  # [num_logits, >= vocab_size]
    target_logits_stride: int,
    target_rejected_logsumexp_ptr: torch.Tensor,  # [num_reqs]
    draft_logits_ptr: torch.Tensor | None,  # [max_num_reqs, num_speculative_steps, >= vocab_size]
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    draft_rejected_logsumexp_ptr: torch.Tensor,  # [num_reqs]
    rejected_step_ptr: torch.Tensor,  # [num_reqs]
    cu_num_logits_ptr: torch.Tensor,  # [num_reqs + 1]
    expanded_idx_mapping_ptr: torch.Tensor,  # [num_logits]
    draft_sampled_ptr: torch.Tensor,  # [num_logits]
    temp_ptr: torch.Tensor,  # [max_num_reqs]
    seed_ptr: torch.Tensor,  # [max_num_reqs]
    pos_ptr: torch.Tensor,  # [num_logits]
    cumulative_log_p_ptr: torch.Tensor | None,  # [num_logits]
    contexts_ptr: torch.Tensor | None,  # [num_logits, CONTEXT_WIDTH]
    contexts_stride: int,
    watermarking_ptr: torch.Tensor | None,  # [max_num_reqs]
    watermarking_skip_mask_ptr: torch.Tensor | None,  # [num_logits]
    watermark_key_0: int,
    watermark_key_1: int,
    vocab_size: int,
    BLOCK_SIZE: int,
    HAS_DRAFT_LOGITS: bool,
    USE_FP64: bool,
    USE_BLOCK_VERIFICATION: bool,
    CONTEXT_WIDTH: int,
    WATERMARK: bool,
    DEDUPLICATE_CONTEXTS: bool,
) -> None:
    if WATERMARK:
        raise NotImplementedError("watermarking has no CPU replacement")
    drafts = draft_sampled_ptr.tolist()
    slots = expanded_idx_mapping_ptr.tolist()
    temperatures, seeds, positions = temp_ptr.numpy(), seed_ptr.numpy(), pos_ptr.numpy()
    bounds = cu_num_logits_ptr.tolist()
    for row, step in enumerate(rejected_step_ptr.tolist()):
        i = bounds[row] + step
        slot = slots[i]
        temp = float(temperatures[slot])
        is_bonus = i == bounds[row + 1] - 1
        if temp == 0 and not is_bonus:
            continue
        logits = target_logits_ptr[i, :vocab_size].to(torch.float32)
        if not is_bonus and drafts[i + 1] >= 0:
            if HAS_DRAFT_LOGITS:
                assert draft_logits_ptr is not None
                log_q = draft_logits_ptr[slot, step, :vocab_size].to(torch.float32) / temp
                log_q -= draft_rejected_logsumexp_ptr[row]
                log_p = logits - target_rejected_logsumexp_ptr[row]
                if USE_BLOCK_VERIFICATION and step > 0:
                    assert cumulative_log_p_ptr is not None
                    log_p += cumulative_log_p_ptr[i - 1]
                # log(max(p - q, 0)) = log p + log(max(1 - q / p, 0))
                ratio = (log_q - log_p).exp_()
                logits = torch.where(ratio < 1, log_p + (-ratio).log1p(), _NEG_INF)
            else:
                # What is left of the target beside a one-hot draft.
                logits = logits.clone()
                if drafts[i + 1] < vocab_size:
                    logits[drafts[i + 1]] = _NEG_INF
        if temp != 0:
            noise = gumbel_noise(int(seeds[slot]), int(positions[i]), vocab_size, USE_FP64)
            logits = logits + noise
        block_argmax(
            logits.unsqueeze(0),
            BLOCK_SIZE,
            resampled_local_argmax_ptr[row : row + 1],
            resampled_local_max_ptr[row : row + 1],
        )


@replacement(f"{_UTILS}._insert_resampled_kernel")
def insert_resampled(
    sampled_ptr: torch.Tensor,  # [num_reqs, num_speculative_steps + 1]
    sampled_stride: int,
    num_sampled_ptr: torch.Tensor,  # [num_reqs]
    resampled_local_argmax_ptr: torch.Tensor,  # [num_reqs, num_blocks]
    resampled_local_argmax_stride: int,
    resampled_local_max_ptr: torch.Tensor,  # [num_reqs, num_blocks]
    resampled_local_max_stride: int,
    resample_num_blocks: int,
    cu_num_logits_ptr: torch.Tensor,  # [num_reqs + 1]
    expanded_idx_mapping_ptr: torch.Tensor,  # [num_logits]
    temp_ptr: torch.Tensor,  # [max_num_reqs]
    PADDED_RESAMPLE_NUM_BLOCKS: int,
) -> None:
    num_sampled = num_sampled_ptr.numpy()
    bounds = cu_num_logits_ptr.numpy()
    rows = np.arange(num_sampled.shape[0])
    idx = bounds[:-1] + num_sampled
    temperatures = temp_ptr.numpy()[expanded_idx_mapping_ptr.numpy()[idx]]
    # A greedy rejection has its token in place already.
    rows = rows[(temperatures != 0) | (idx == bounds[1:] - 1)]
    local_max = resampled_local_max_ptr.numpy()[rows]
    best_block = np.where(np.isnan(local_max), _NEG_INF, local_max).argmax(-1)
    resampled = resampled_local_argmax_ptr.numpy()[rows, best_block]
    sampled_ptr.numpy()[rows, num_sampled[rows]] = resampled
    num_sampled += 1
