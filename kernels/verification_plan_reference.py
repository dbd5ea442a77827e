"""Torch reference of verification_plan.py."""

from typing import Any

import torch


def verification_plan_reference(
    tokens: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    starts: torch.Tensor,
    plan_stride: int,
    row_slots: torch.Tensor,
    row_first_pos: torch.Tensor,
    row_num_drafts: torch.Tensor,
    row_depths: torch.Tensor,
    row_tokens: torch.Tensor,
    row_of: torch.Tensor,
    query_start_loc: torch.Tensor,
    input_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    is_padding: torch.Tensor,
    num_reqs: int,
    most_rows: int,
    num_token_slots: int,
    **options: Any,
) -> None:
    has_row, row = row_of >= 0, row_of.long().clamp(min=0)
    begin = query_start_loc[:num_reqs].long()
    scheduled = torch.where(has_row, query_start_loc[1 : num_reqs + 1].long() - begin, 0)
    length = torch.minimum(row_num_drafts[row] + 1, scheduled)
    w = torch.arange(row_tokens.shape[1], device=row_tokens.device)
    pending = w < length[:, None]
    for span in range(len(tokens)):
        in_pass = pending & (row_depths[row] <= span)
        req, offset = in_pass.nonzero(as_tuple=True)
        total = len(req)
        tokens[span, :total] = begin[req] + offset
        slots[span, :total] = row_slots[row[req]]
        offsets[span, :total] = offset
        for part, padding in ((tokens, -1), (slots, -1), (offsets, 0)):
            part[span, total:num_token_slots] = padding
        starts[span, 0] = 0
        starts[span, 1 : num_reqs + 1] = in_pass.sum(dim=1).cumsum(0)
        starts[span, num_reqs + 1 :] = total
    req, offset = (w < scheduled[:, None]).nonzero(as_tuple=True)
    token = torch.where(pending[req, offset], row_tokens[row[req], offset], 0)
    input_ids[begin[req] + offset] = token.int()
    is_padding[begin[req] + offset] = ~pending[req, offset]
    ends = (row_first_pos[row] + length).int()
    seq_lens[:num_reqs] = torch.where(has_row, ends, seq_lens[:num_reqs])
