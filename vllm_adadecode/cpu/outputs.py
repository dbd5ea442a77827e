"""Replacements of the kernels that report on sampling: log-probabilities, ranks, prompt scores.

They serve ``gpu/sample/{logprob,prompt_logprob,output,trace_replay}.py`` and
``gpu/metrics/logits.py``.
"""
# ruff: noqa: N803 (arguments bear the kernels' names)

from __future__ import annotations

import numpy as np
import torch

from vllm_adadecode.cpu.registry import replacement


@replacement("sample.logprob._topk_log_softmax_kernel")
def topk_log_softmax(
    output_ptr: torch.Tensor,  # [num_rows, topk]
    logits_ptr: torch.Tensor,  # [num_rows, vocab_size]
    logits_stride: int,
    topk_ids_ptr: torch.Tensor,  # [num_rows, topk]
    topk_ids_stride: int,
    topk: int,
    vocab_size: int,
    BLOCK_SIZE: int,
    TOPK_BLOCK_SIZE: int,
) -> None:
    logits = logits_ptr.to(torch.float32)
    torch.gather(logits, 1, topk_ids_ptr, out=output_ptr)
    output_ptr.sub_(logits.logsumexp(-1, keepdim=True))


@replacement("sample.logprob._ranks_kernel")
def ranks(
    output_ptr: torch.Tensor,  # [num_rows]
    logits_ptr: torch.Tensor,  # [num_rows, vocab_size]
    logits_stride: int,
    token_ids_ptr: torch.Tensor,  # [num_rows]
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    # [num_rows, 1]
    chosen = logits_ptr.gather(1, token_ids_ptr.long().unsqueeze(1))
    torch.sum(logits_ptr >= chosen, dim=-1, out=output_ptr)


@replacement("sample.logprob._fill_logprob_token_ids_kernel")
def fill_logprob_token_ids(
    out_token_ids_ptr: torch.Tensor,  # [num_rows, 1 + num_cols]
    out_token_ids_stride: int,
    out_valid_mask_ptr: torch.Tensor,  # [num_rows, 1 + num_cols]
    out_valid_mask_stride: int,
    sampled_token_ids_ptr: torch.Tensor,  # [num_rows]
    topk_indices_ptr: torch.Tensor,  # [num_rows, NUM_TOPK]; any tensor where NUM_TOPK is 0
    topk_indices_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,  # [num_rows]
    num_per_req_token_ids_ptr: torch.Tensor,  # [max_num_reqs]
    per_req_token_ids_ptr: torch.Tensor,  # [max_num_reqs, max_token_ids]
    per_req_token_ids_stride: int,
    NUM_TOPK: int,
    PADDED_COLS: int,
) -> None:
    out_token_ids_ptr[:, 0] = sampled_token_ids_ptr
    out_valid_mask_ptr[:, 0] = True
    for row, slot in enumerate(expanded_idx_mapping_ptr.tolist()):
        # A request's own list of tokens comes in place of the most likely ones.
        if n := int(num_per_req_token_ids_ptr[slot]):
            out_token_ids_ptr[row, 1 : n + 1] = per_req_token_ids_ptr[slot, :n]
        elif n := NUM_TOPK:
            out_token_ids_ptr[row, 1 : n + 1] = topk_indices_ptr[row, :n]
        out_valid_mask_ptr[row, 1 : n + 1] = True


@replacement("sample.prompt_logprob._prompt_logprobs_token_ids_kernel")
def prompt_logprobs_token_ids(
    prompt_logprobs_token_ids_ptr: torch.Tensor,  # [num_tokens]
    query_start_loc_ptr: torch.Tensor,  # [>= num_reqs + 1]
    idx_mapping_ptr: torch.Tensor,  # [num_reqs]
    num_computed_tokens_ptr: torch.Tensor,  # [max_num_reqs]
    all_token_ids_ptr: torch.Tensor,  # [max_num_reqs, max_model_len]
    all_token_ids_stride: int,
    BLOCK_SIZE: int,
) -> None:
    starts = query_start_loc_ptr.tolist()
    # Flat: the last position of a full row has no next token, and takes whatever follows in memory.
    all_token_ids = all_token_ids_ptr.numpy().reshape(-1)
    out = prompt_logprobs_token_ids_ptr.numpy()
    for row, slot in enumerate(idx_mapping_ptr.tolist()):
        # A position is scored by the token after it.
        first = slot * all_token_ids_stride + int(num_computed_tokens_ptr[slot]) + 1
        tokens = all_token_ids[first : first + starts[row + 1] - starts[row]]
        out[starts[row] : starts[row] + len(tokens)] = tokens


@replacement("sample.trace_replay._trace_replay_kernel")
def trace_replay(
    sampled_ptr: torch.Tensor,  # [num_reqs]
    idx_mapping_ptr: torch.Tensor,  # [num_reqs], -1: leave the row alone
    trace_token_ids_ptr: torch.Tensor,  # [max_num_reqs, max_model_len]
    trace_token_ids_stride: int,
    trace_len_ptr: torch.Tensor,  # [max_num_reqs]
    total_len_ptr: torch.Tensor,  # [max_num_reqs]
    prompt_len_ptr: torch.Tensor,  # [max_num_reqs]
) -> None:
    req_idx = idx_mapping_ptr.numpy()
    # [num_reqs] index of the output token that is being sampled
    steps = total_len_ptr.numpy()[req_idx] - prompt_len_ptr.numpy()[req_idx]
    replayed = (req_idx >= 0) & (steps >= 0) & (steps < trace_len_ptr.numpy()[req_idx])
    rows = np.flatnonzero(replayed)
    sampled_ptr.numpy()[rows] = trace_token_ids_ptr.numpy()[req_idx[rows], steps[rows]]


@replacement("sample.output._compact_sampling_mask_kernel")
def compact_sampling_mask(
    logits_ptr: torch.Tensor,  # [num_logits, vocab_size]
    logits_row_stride: int,
    logits_col_stride: int,
    cu_num_logits_ptr: torch.Tensor,  # [num_reqs + 1]
    num_sampled_tokens_ptr: torch.Tensor,  # [num_reqs]
    token_ids_ptr: torch.Tensor,  # [num_reqs * ROWS_PER_REQUEST, max_num_kept]
    token_ids_row_stride: int,
    packed_mask_ptr: torch.Tensor,  # [num_reqs * ROWS_PER_REQUEST, cdiv(vocab_size, 8)]
    packed_mask_row_stride: int,
    counts_ptr: torch.Tensor,  # [num_reqs * ROWS_PER_REQUEST]
    vocab_size: int,
    max_num_kept: int,
    ROWS_PER_REQUEST: int,
    BLOCK_SIZE: int,
) -> None:
    cu_num_logits, num_sampled = cu_num_logits_ptr.tolist(), num_sampled_tokens_ptr.tolist()
    token_ids, packed_mask = token_ids_ptr.numpy(), packed_mask_ptr.numpy()
    counts = counts_ptr.numpy()
    for row in range(counts.shape[0]):
        req, step = divmod(row, ROWS_PER_REQUEST)
        if step >= num_sampled[req]:
            counts[row] = 0
            continue
        kept = logits_ptr[cu_num_logits[req] + step].isfinite().numpy()
        kept_ids = np.flatnonzero(kept)
        counts[row] = len(kept_ids)
        kept_ids = kept_ids[:max_num_kept]
        token_ids[row, : len(kept_ids)] = kept_ids
        packed_mask[row] = np.packbits(kept, bitorder="little")


@replacement("metrics.logits._num_nans_kernel")
def num_nans(
    logits_ptr: torch.Tensor,  # [num_rows, vocab_size]
    logits_stride: int,
    num_nans_ptr: torch.Tensor,  # [num_rows]
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    num_nans_ptr.copy_(logits_ptr.isnan().sum(-1))
