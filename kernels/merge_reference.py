"""Torch reference of merge.py, and the result that both give."""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_adadecode.kernels.projection_reference import top_of


@dataclass(frozen=True)
class HeadResult:
    """What a head says about each row.

    Attributes:
        token: int64 ``[num_rows]``, the most likely token; the lowest id wins ties. A valid id also
            where a logit is NaN. 0 in rows that are not live.
        p: float32 ``[num_rows]``, its probability; NaN if a logit is NaN or +inf, or all are
            -inf; 0 in rows that are not live.
        confident: bool ``[num_rows]``, ``p > threshold``; never where p is NaN.
    """

    token: torch.Tensor
    p: torch.Tensor
    confident: torch.Tensor


def merged_tops(
    # int32 [num_parts, num_rows, >= 3]
    partials: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Max float32, token int64 and sum float32, ``[num_rows]`` each, in torch."""
    tops, totals = partials[..., 0].view(torch.float32), partials[..., 1].view(torch.float32)
    top = tops.max(dim=0).values
    shift = torch.where(top == -torch.inf, 0.0, top)
    # Parts are in the order of their tokens, so the first of equals has the lowest id.
    token = partials[..., 2].gather(0, top_of(tops.T)[1][None])[0].long()
    return top, token, (totals * torch.exp(tops - shift)).sum(dim=0)


def finish_in_torch(
    top: torch.Tensor,
    token: torch.Tensor,
    total: torch.Tensor,
    other: torch.Tensor | None,
    vocab_ids: torch.Tensor | None,
    threshold: float,
) -> HeadResult:
    """What `store_result` does, for all rows."""
    shift = torch.where(top == -torch.inf, 0.0, top)
    if other is not None:
        total = total + torch.exp(other - shift)
    p = torch.exp(top - shift) / total
    return HeadResult(token if vocab_ids is None else vocab_ids[token], p, p > threshold)


def live_places(
    num_rows: int, order: torch.Tensor | None, num_live: torch.Tensor | None
) -> tuple[torch.Tensor | slice, int]:
    """Rows in order, and how many of them are live."""
    count = num_rows if num_live is None else int(num_live)
    return (slice(None) if order is None else order.long()), count


def merge_partials_reference(
    partials: torch.Tensor,
    part_stride: int,
    row_stride: int,
    num_parts: int,
    num_rows: int,
    order: torch.Tensor | None,
    num_live: torch.Tensor | None,
    merged: torch.Tensor | None,
    other: torch.Tensor | None,
    vocab_ids: torch.Tensor | None,
    threshold: float,
    token: torch.Tensor | None,
    p: torch.Tensor | None,
    confident: torch.Tensor | None,
    **options: Any,
) -> None:
    rows, count = live_places(num_rows, order, num_live)
    top, top_id, total = merged_tops(partials[:, :count])
    if merged is not None:
        merged[:count, 0] = top.view(torch.int32)
        merged[:count, 1] = total.view(torch.int32)
        merged[:count, 2] = top_id
        return
    assert token is not None
    assert p is not None
    assert confident is not None
    live = torch.arange(num_rows, device=p.device)[rows][:count]
    for out in (token, p, confident):
        out.zero_()
    other = other[live] if other is not None else None
    result = finish_in_torch(top, top_id, total, other, vocab_ids, threshold)
    token[live], p[live], confident[live] = result.token, result.p, result.confident
