"""Replacements of the kernels in ``gpu/input_batch.py``: what a step feeds the model, and leaves.

Batches are described by ``idx_mapping`` [num_reqs] (batch row -> request slot) and by
``query_start_loc`` / ``cu_num_logits`` [num_reqs + 1] (where a row's tokens / logits begin).
"""
# ruff: noqa: N803 (arguments bear the kernels' names)

from __future__ import annotations

import numpy as np
import torch

from vllm_adadecode.cpu.registry import replacement


@replacement("input_batch._prepare_prefill_inputs_kernel")
def prepare_prefill_inputs(
    input_ids_ptr: torch.Tensor,  # [max_num_tokens]
    next_prefill_tokens_ptr: torch.Tensor,  # [num_lookahead, max_num_reqs]
    next_prefill_tokens_stride: int,
    num_lookahead: int,
    idx_mapping_ptr: torch.Tensor,  # [num_reqs]
    query_start_loc_ptr: torch.Tensor,  # [>= num_reqs + 1]
    all_token_ids_ptr: torch.Tensor,  # [max_num_reqs, max_model_len]
    all_token_ids_stride: int,
    prefill_lens_ptr: torch.Tensor,  # [max_num_reqs]
    num_computed_tokens_ptr: torch.Tensor,  # [max_num_reqs]
    BLOCK_SIZE: int,
    LOOKAHEAD_BLOCK: int,
) -> None:
    req_idx = idx_mapping_ptr.numpy()
    prefill_lens = prefill_lens_ptr.numpy()[req_idx]
    num_computed = num_computed_tokens_ptr.numpy()[req_idx]
    starts = query_start_loc_ptr.numpy()
    input_ids = input_ids_ptr.numpy()
    all_token_ids = all_token_ids_ptr.numpy()
    next_prefill_tokens = next_prefill_tokens_ptr.numpy()
    for row in np.flatnonzero(num_computed < prefill_lens).tolist():
        slot = req_idx[row]
        start, end = starts[row], starts[row + 1]
        first = num_computed[row]
        last = first + end - start
        input_ids[start:end] = all_token_ids[slot, first:last]
        lookahead = all_token_ids[slot, last : min(last + num_lookahead, prefill_lens[row])]
        next_prefill_tokens[: len(lookahead), slot] = lookahead
        next_prefill_tokens[len(lookahead) : num_lookahead, slot] = 0


@replacement("input_batch._prepare_pos_seq_lens_kernel")
def prepare_pos_seq_lens(
    pos_ptr: torch.Tensor,  # [max_num_tokens]
    seq_lens_ptr: torch.Tensor,  # [max_num_reqs]
    idx_mapping_ptr: torch.Tensor,  # [num_reqs]
    query_start_loc_ptr: torch.Tensor,  # [>= num_reqs + 1]
    num_computed_tokens_ptr: torch.Tensor,  # [max_num_reqs]
    max_num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    req_idx = idx_mapping_ptr.numpy()
    num_reqs = req_idx.shape[0]
    starts = query_start_loc_ptr.numpy()[: num_reqs + 1]
    num_computed = num_computed_tokens_ptr.numpy()[req_idx]
    query_lens = starts[1:] - starts[:-1]

    seq_lens = seq_lens_ptr.numpy()
    seq_lens[:num_reqs] = num_computed + query_lens
    seq_lens[num_reqs:max_num_reqs] = 0

    pos = pos_ptr.numpy()
    num_tokens = int(starts[num_reqs])
    if num_tokens == num_reqs:
        pos[:num_tokens] = num_computed
    else:
        # A token's position is its index in the batch, shifted by one constant per request.
        pos[:num_tokens] = np.arange(num_tokens)
        pos[:num_tokens] += np.repeat(num_computed - starts[:-1], query_lens)


@replacement("input_batch._combine_sampled_and_draft_tokens_kernel")
def combine_sampled_and_draft_tokens(
    input_ids_ptr: torch.Tensor,  # [max_num_tokens]
    idx_mapping_ptr: torch.Tensor,  # [num_reqs]
    last_sampled_tokens_ptr: torch.Tensor,  # [max_num_reqs, 1]
    query_start_loc_ptr: torch.Tensor,  # [>= num_reqs + 1]
    seq_lens_ptr: torch.Tensor,  # [>= num_reqs]
    prefill_len_ptr: torch.Tensor,  # [max_num_reqs]
    draft_tokens_ptr: torch.Tensor,  # [max_num_reqs, num_speculative_steps]
    draft_tokens_stride: int,
    cu_num_logits_ptr: torch.Tensor,  # [num_reqs + 1]
    logits_indices_ptr: torch.Tensor,  # [num_logits]
    BLOCK_SIZE: int,
    NUM_NEW_SAMPLED_TOKENS: int = 1,
) -> None:
    req_idx = idx_mapping_ptr.numpy()
    num_reqs = req_idx.shape[0]
    ends = query_start_loc_ptr.numpy()[1 : num_reqs + 1]
    cu_num_logits = cu_num_logits_ptr.numpy()[: num_reqs + 1]
    num_logits = cu_num_logits[1:] - cu_num_logits[:-1]
    total_num_logits = int(cu_num_logits[num_reqs])

    # [num_reqs] index in the batch of a request's first logits row
    logits_starts = ends - num_logits
    logits_indices = logits_indices_ptr.numpy()
    one_each = total_num_logits == num_reqs and NUM_NEW_SAMPLED_TOKENS == 1
    if one_each:
        logits_indices[:num_reqs] = logits_starts
    else:
        logits_indices[:total_num_logits] = np.arange(total_num_logits)
        logits_indices[:total_num_logits] += np.repeat(
            logits_starts - cu_num_logits[:-1], num_logits
        )

    input_ids = input_ids_ptr.numpy()
    seq_lens = seq_lens_ptr.numpy()[:num_reqs]
    prefill_lens = prefill_len_ptr.numpy()[req_idx]
    if NUM_NEW_SAMPLED_TOKENS > 0:
        # The first logits row lies past the prefill, so the token there was sampled.
        rows = np.flatnonzero(seq_lens - num_logits >= prefill_lens)
        last_sampled = last_sampled_tokens_ptr.numpy().reshape(-1)
        input_ids[logits_starts[rows]] = last_sampled[req_idx[rows]]
    if one_each:
        return
    num_draft_tokens = num_logits - NUM_NEW_SAMPLED_TOKENS
    draft_tokens = draft_tokens_ptr.numpy()
    for row in np.flatnonzero((seq_lens > prefill_lens) & (num_draft_tokens > 0)).tolist():
        n = num_draft_tokens[row]
        input_ids[ends[row] - n : ends[row]] = draft_tokens[req_idx[row], :n]


@replacement("input_batch._get_num_sampled_and_rejected_kernel")
def get_num_sampled_and_rejected(
    num_sampled_ptr: torch.Tensor,  # [num_reqs], updated
    num_rejected_ptr: torch.Tensor,  # [num_reqs]
    seq_lens_ptr: torch.Tensor,  # [>= num_reqs]
    cu_num_logits_ptr: torch.Tensor,  # [num_reqs + 1]
    idx_mapping_ptr: torch.Tensor,  # [num_reqs]
    prefill_len_ptr: torch.Tensor,  # [max_num_reqs]
) -> None:
    req_idx = idx_mapping_ptr.numpy()
    num_reqs = req_idx.shape[0]
    cu_num_logits = cu_num_logits_ptr.numpy()[: num_reqs + 1]
    num_sampled = num_sampled_ptr.numpy()[:num_reqs]
    num_rejected = num_rejected_ptr.numpy()[:num_reqs]
    mid_prefill = seq_lens_ptr.numpy()[:num_reqs] < prefill_len_ptr.numpy()[req_idx]
    num_sampled[mid_prefill] = 0
    np.subtract(cu_num_logits[1:] - cu_num_logits[:-1], num_sampled, out=num_rejected)
    num_rejected[mid_prefill] = 0


@replacement("input_batch._post_update_kernel")
def post_update(
    idx_mapping_ptr: torch.Tensor,  # [num_reqs], -1: leave the row alone
    num_computed_tokens_ptr: torch.Tensor,  # [max_num_reqs]
    last_sampled_tokens_ptr: torch.Tensor,  # [max_num_reqs, 1]
    output_bin_counts_ptr: torch.Tensor | None,  # [max_num_reqs, vocab_size]
    output_bin_counts_stride: int,
    sampled_tokens_ptr: torch.Tensor,  # [num_reqs, num_speculative_steps + 1]
    sampled_tokens_stride: int,
    num_sampled_ptr: torch.Tensor,  # [num_reqs]
    num_rejected_ptr: torch.Tensor,  # [num_reqs]
    query_start_loc_ptr: torch.Tensor | None,  # [>= num_reqs + 1]
    all_token_ids_ptr: torch.Tensor,  # [max_num_reqs, max_model_len]
    all_token_ids_stride: int,
    total_len_ptr: torch.Tensor,  # [max_num_reqs]
    # From vLLM 0.33 on, of pipeline parallelism: None without it
    draft_tokens_ptr: None = None,
    draft_tokens_out_ptr: None = None,
    num_draft_tokens: int = 0,
    *,
    num_warps: int = 1,
) -> None:
    req_idx = idx_mapping_ptr.numpy()
    num_reqs = req_idx.shape[0]
    num_sampled = num_sampled_ptr.numpy()[:num_reqs]
    delta = -num_rejected_ptr.numpy()[:num_reqs]
    if query_start_loc_ptr is not None:
        starts = query_start_loc_ptr.numpy()[: num_reqs + 1]
        delta = delta + (starts[1:] - starts[:-1])
    sampled = sampled_tokens_ptr.numpy()
    if (req_idx < 0).any():
        rows = np.flatnonzero(req_idx >= 0)
        req_idx, num_sampled, delta = req_idx[rows], num_sampled[rows], delta[rows]
        sampled = sampled[rows]

    num_computed_tokens_ptr.numpy()[req_idx] += delta

    total_len = total_len_ptr.numpy()
    # [num_reqs, num_speculative_steps + 1] -> the (row, step) of every sampled token
    rows, steps = np.nonzero(np.arange(sampled.shape[1]) < num_sampled[:, None])
    slots = req_idx[rows]
    tokens = sampled[rows, steps]
    all_token_ids_ptr.numpy()[slots, total_len[slots] + steps] = tokens
    if output_bin_counts_ptr is not None:
        np.add.at(output_bin_counts_ptr.numpy(), (slots, tokens), 1)
    # Steps ascend within a row, so of one slot's tokens the last is the one that stays.
    last_sampled_tokens_ptr.numpy().reshape(-1)[slots] = tokens
    total_len[req_idx] += num_sampled


@replacement("input_batch._post_update_num_computed_tokens_kernel")
def post_update_num_computed_tokens(
    idx_mapping_ptr: torch.Tensor,  # [num_reqs]
    num_computed_tokens_ptr: torch.Tensor,  # [max_num_reqs]
    query_start_loc_ptr: torch.Tensor,  # [>= num_reqs + 1]
) -> None:
    req_idx = idx_mapping_ptr.numpy()
    starts = query_start_loc_ptr.numpy()[: req_idx.shape[0] + 1]
    num_computed_tokens_ptr.numpy()[req_idx] += starts[1:] - starts[:-1]


@replacement("input_batch._expand_idx_mapping_kernel")
def expand_idx_mapping(
    idx_mapping_ptr: torch.Tensor,  # [num_reqs]
    expanded_idx_mapping_ptr: torch.Tensor,  # [num_logits]
    expanded_local_pos_ptr: torch.Tensor,  # [num_logits]
    cu_num_logits_ptr: torch.Tensor,  # [num_reqs + 1]
    BLOCK_SIZE: int,
) -> None:
    req_idx = idx_mapping_ptr.numpy()
    num_reqs = req_idx.shape[0]
    cu_num_logits = cu_num_logits_ptr.numpy()[: num_reqs + 1]
    num_logits = cu_num_logits[1:] - cu_num_logits[:-1]
    total = int(cu_num_logits[num_reqs])
    expanded_idx_mapping_ptr.numpy()[:total] = np.repeat(req_idx, num_logits)
    local_pos = np.arange(total) - np.repeat(cu_num_logits[:-1], num_logits)
    expanded_local_pos_ptr.numpy()[:total] = local_pos
