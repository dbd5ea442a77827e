"""Torch reference of draft_step.py."""

import ctypes
from typing import Any

import torch

from vllm_adadecode.kernels.draft_state import STOPPED

# KV slot of what is no token.
PAD_SLOT_ID = -1


def draft_step_reference(
    slots: torch.Tensor,
    first_pos: torch.Tensor,
    limits: torch.Tensor,
    tokens: torch.Tensor,
    num_drafts: torch.Tensor,
    depths: torch.Tensor,
    exits: torch.Tensor,
    waits_for: torch.Tensor,
    counts: torch.Tensor,
    token: torch.Tensor,
    confident: torch.Tensor,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    token_slots: torch.Tensor,
    offsets: torch.Tensor,
    slot_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    newest: torch.Tensor,
    table_ptrs: torch.Tensor,
    table_strides: torch.Tensor,
    block_sizes: torch.Tensor,
    enabled: torch.Tensor,
    numbers: torch.Tensor,
    allowed: torch.Tensor,
    newest_offset: torch.Tensor,
    exit_index: int,
    next_span: int,
    num_exits: int,
    num_rows: int,
    capacity: int,
    num_early_spans: int,
    **options: Any,
) -> None:
    if exit_index >= 0:
        _take_up(
            limits, tokens, num_drafts, depths, exits, waits_for, counts,
            token, confident, exit_index, num_exits,
        )  # fmt: skip
    w = torch.arange(tokens.shape[1], device=tokens.device)
    spans = torch.arange(num_early_spans + 1, device=tokens.device)
    waits = (waits_for[:, None] == spans[:-1]) & (spans[:-1] < allowed)
    pending = (slots >= 0)[:, None] & (w <= num_drafts[:, None])
    behind = pending & (depths <= spans[:, None, None])
    numbers[:num_early_spans] = waits.sum(dim=0)
    numbers[num_early_spans:] = behind.sum(dim=(1, 2))
    runs = waits_for == next_span
    newest_offset.copy_(torch.where(runs, num_drafts, 0).max())
    in_pass = runs[:, None] & (w <= num_drafts[:, None]) & (depths <= next_span)
    counts_in_pass = in_pass.sum(dim=1)
    ends = counts_in_pass.cumsum(0)
    query_start_loc[0] = 0
    query_start_loc[1:] = ends
    row, offset = in_pass.nonzero(as_tuple=True)
    total = len(row)
    if next_span == 0:
        input_ids[:total] = tokens[row, offset].int()
    positions[:total] = first_pos[row] + offset
    token_slots[:total] = slots[row]
    token_slots[total:] = -1
    offsets[:total] = offset
    slot_mapping[:, :] = PAD_SLOT_ID
    for group, size in enumerate(block_sizes.tolist()):
        if enabled[group] and total:
            stride = int(table_strides[group])
            # As far as it is read: how many rows there are is not among the arguments.
            memory = ctypes.c_int32 * ((1 + int(token_slots[:total].max())) * stride)
            table = torch.frombuffer(memory.from_address(int(table_ptrs[group])), dtype=torch.int32)
            block = table[token_slots[:total] * stride + positions[:total] // size].long()
            slot_mapping[group, :total] = block * size + positions[:total] % size
    seq_lens[:] = torch.where(runs, first_pos + num_drafts + 1, 0).int()
    newest[:] = torch.where(runs, ends - 1, -1)


def _take_up(
    limits: torch.Tensor,
    tokens: torch.Tensor,
    num_drafts: torch.Tensor,
    depths: torch.Tensor,
    exits: torch.Tensor,
    waits_for: torch.Tensor,
    counts: torch.Tensor,
    token: torch.Tensor,
    confident: torch.Tensor,
    exit_index: int,
    num_exits: int,
) -> None:
    """The first half of a step: what a head's results change."""
    w = torch.arange(tokens.shape[1], device=tokens.device)
    checked = waits_for == exit_index
    ran = checked[:, None] & (w <= num_drafts[:, None]) & (depths <= exit_index)
    depths.masked_fill_(ran, exit_index + 1)
    rows = (checked & confident).nonzero()[:, 0]
    tokens[rows, num_drafts[rows].long() + 1] = token[rows]
    exits[rows, num_drafts[rows].long()] = exit_index
    num_drafts[rows] += 1
    deeper = exit_index + 1 if exit_index + 1 < num_exits else STOPPED
    waits_for.masked_fill_(checked, deeper)
    waits_for[rows] = torch.where(num_drafts[rows] < limits[rows], 0, STOPPED).int()
    counts[exit_index, 0] += checked.sum()
    counts[exit_index, 1] += len(rows)
