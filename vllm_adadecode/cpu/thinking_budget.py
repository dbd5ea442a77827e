"""Replacements of the kernels in ``gpu/sample/thinking_budget.py``: reasoning that is ended."""
# ruff: noqa: N803 (arguments bear the kernels' names)

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_adadecode.cpu.registry import replacement
from vllm_adadecode.cpu.tokens import effective_tokens, ends_with


def _last_match(tokens: Sequence[int], marker: Sequence[int], first: int) -> int:
    """Where the marker last begins at or after index ``first``, or -1."""
    for i in range(len(tokens) - len(marker), first - 1, -1):
        if tokens[i : i + len(marker)] == marker:
            return i
    return -1


@replacement("sample.thinking_budget._update_committed_marker_cache_kernel")
def update_committed_marker_cache(
    req_ids_ptr: torch.Tensor,  # [num_reqs]
    thinking_token_budget_ptr: torch.Tensor,  # [max_num_reqs], -1: none
    all_token_ids_ptr: torch.Tensor,  # [max_num_reqs, max_model_len]
    all_token_ids_stride: int,
    total_len_ptr: torch.Tensor,  # [max_num_reqs]
    cached_last_start_ptr: torch.Tensor,  # [max_num_reqs]
    cached_last_end_ptr: torch.Tensor,  # [max_num_reqs]
    cached_scan_pos_ptr: torch.Tensor,  # [max_num_reqs]
    reasoning_start_token_ids_ptr: torch.Tensor,  # [START_LEN]
    natural_reasoning_end_token_ids_ptr: torch.Tensor,  # [NATURAL_END_LEN]
    START_LEN: int,
    NATURAL_END_LEN: int,
    MAX_LEN: int,
    BLOCK: int,
) -> None:
    budgets, total_lens = thinking_token_budget_ptr.numpy(), total_len_ptr.numpy()
    scan_pos, all_token_ids = cached_scan_pos_ptr.numpy(), all_token_ids_ptr.numpy()
    markers = (
        (reasoning_start_token_ids_ptr.tolist(), cached_last_start_ptr.numpy()),
        (natural_reasoning_end_token_ids_ptr.tolist(), cached_last_end_ptr.numpy()),
    )
    for slot in req_ids_ptr.tolist():
        if budgets[slot] < 0:
            continue
        total_len = int(total_lens[slot])
        if scan_pos[slot] > total_len:
            # Fewer tokens than at the last scan: another request has the slot.
            scan_pos[slot] = 0
            for _, cached in markers:
                cached[slot] = -1
        first = int(scan_pos[slot])
        cold = first == 0 and all(cached[slot] < 0 for _, cached in markers)
        tokens = all_token_ids[slot, :total_len].tolist()
        found = [_last_match(tokens, marker, first) for marker, _ in markers]
        if cold:
            # The kernel walks back in blocks and stops at the first block with a marker: what lies
            # before is not looked for. Only the order of the two positions matters later on.
            newest = max(found)
            if newest >= 0:
                block_lo = max(0, total_len - -(-(total_len - newest) // BLOCK) * BLOCK)
                found = [position if position >= block_lo else -1 for position in found]
        for position, (_, cached) in zip(found, markers, strict=True):
            if position >= 0:
                cached[slot] = position
        scan_pos[slot] = max(0, total_len - (MAX_LEN - 1))


@replacement("sample.thinking_budget._thinking_budget_kernel")
def thinking_budget(
    logits_ptr: torch.Tensor,  # [num_tokens, vocab_size]
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,  # [num_tokens]
    thinking_token_budget_ptr: torch.Tensor,  # [max_num_reqs], -1: none
    all_token_ids_ptr: torch.Tensor,  # [max_num_reqs, max_model_len]
    all_token_ids_stride: int,
    total_len_ptr: torch.Tensor,  # [max_num_reqs]
    input_ids_ptr: torch.Tensor,  # [num_tokens]
    expanded_local_pos_ptr: torch.Tensor,  # [num_tokens]
    cached_last_start_ptr: torch.Tensor,  # [max_num_reqs]
    cached_last_end_ptr: torch.Tensor,  # [max_num_reqs]
    reasoning_start_token_ids_ptr: torch.Tensor,  # [START_LEN]
    natural_reasoning_end_token_ids_ptr: torch.Tensor,  # [NATURAL_END_LEN]
    reasoning_end_token_ids_ptr: torch.Tensor,  # [END_LEN]
    START_LEN: int,
    NATURAL_END_LEN: int,
    END_LEN: int,
) -> None:
    budgets, local_pos = thinking_token_budget_ptr.numpy(), expanded_local_pos_ptr.numpy()
    start_marker = reasoning_start_token_ids_ptr.tolist()
    natural_end = natural_reasoning_end_token_ids_ptr.tolist()
    forced_end = reasoning_end_token_ids_ptr.tolist()
    for row, slot in enumerate(expanded_idx_mapping_ptr.tolist()):
        budget = int(budgets[slot])
        if budget < 0:
            continue
        total_len = int(total_len_ptr[slot])
        # A marker that drafts complete begins among these.
        first = max(0, total_len - max(START_LEN, NATURAL_END_LEN, END_LEN) + 1)
        tail = effective_tokens(
            all_token_ids_ptr.numpy()[slot, :total_len],
            input_ids_ptr.numpy(),
            row,
            int(local_pos[row]),
            first,
        )
        effective_len = first + len(tail)
        last_start, last_end = int(cached_last_start_ptr[slot]), int(cached_last_end_ptr[slot])
        in_tail = max(0, total_len - START_LEN + 1) - first
        if (i := _last_match(tail, start_marker, in_tail)) >= 0:
            last_start = first + i
        in_tail = max(0, total_len - NATURAL_END_LEN + 1) - first
        if (i := _last_match(tail, natural_end, in_tail)) >= 0:
            last_end = first + i
        if last_start < 0 or last_start <= last_end:
            continue
        if effective_len - (last_start + START_LEN) < budget:
            continue
        # Go on with an end marker that the tail has begun.
        longest = min(END_LEN - 1, effective_len)
        begun = max(n for n in range(longest + 1) if ends_with(tail, forced_end[:n]))
        logits_ptr[row, forced_end[begun]] = 1.0e9
