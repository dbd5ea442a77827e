"""Torch reference of projection.py: the same numbers from stored logits.

Owns the reference that takes the kernel's launch arguments where there is no Triton, and what the
other references share with it.
"""

from typing import Any

import torch

# The token of a part of the vocabulary without one; larger than every token.
LAST_TOKEN = 2**31 - 1


def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Products float32 ``[num_rows, vocab_size]``, multiplied in the dtype of the inputs.

    That is what the target's own LM head does on a CPU. Against the kernels, whose sums are
    float32, tests put float32 products in its place.
    """
    return torch.nn.functional.linear(x, weight).float()


def finish_logits(
    logits: torch.Tensor,
    row_scale: torch.Tensor | None,
    soft_cap: float | None,
    logit_scale: float,
) -> torch.Tensor:
    """Products to logits, float32 ``[num_rows, vocab_size]``: row scales, cap, scale."""
    if row_scale is not None:
        logits = logits * row_scale
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    return logits if logit_scale == 1.0 else logits * logit_scale


def launched_logits(
    x: torch.Tensor,
    weight: torch.Tensor,
    row_scale: torch.Tensor | None,
    order: torch.Tensor | None,
    num_live: torch.Tensor | None,
    soft_cap: float | None,
    logit_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For references: the live rows in order, and their logits from a kernel's launch arguments."""
    rows = torch.arange(len(x), device=x.device) if order is None else order.long()
    if num_live is not None:
        rows = rows[: int(num_live)]
    if row_scale is not None:
        weight = weight.to(x.dtype)
    live = x if order is None and num_live is None else x[rows]
    return rows, finish_logits(project(live, weight), row_scale, soft_cap, logit_scale)


def top_of(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest value of each row and where it is, passing over NaN; the lowest index wins."""
    return torch.where(values.isnan(), -torch.inf, values).max(dim=-1)


def write_partials(partials: torch.Tensor, num_rows: int, words: list[torch.Tensor]) -> None:
    """Put one split's words ``[num_rows]``, float32 or integers, and make the others neutral."""
    partials[:, :num_rows] = 0
    partials[1:, :num_rows, 0] = torch.tensor(-torch.inf).view(torch.int32).item()
    partials[1:, :num_rows, 2] = LAST_TOKEN
    for index, word in enumerate(words):
        bits = word.contiguous().view(torch.int32) if word.is_floating_point() else word.int()
        partials[0, :num_rows, index] = bits


def head_partials_reference(
    partials: torch.Tensor,
    x: torch.Tensor,
    x_stride: int,
    weight: torch.Tensor,
    weight_stride: int,
    row_scale: torch.Tensor | None,
    order: torch.Tensor | None,
    num_live: torch.Tensor | None,
    num_rows: int,
    vocab_size: int,
    first_id: int,
    soft_cap: float,
    logit_scale: float,
    *,
    HAS_SOFT_CAP: bool,
    **options: Any,
) -> None:
    _, logits = launched_logits(
        x,
        weight,
        row_scale,
        order,
        num_live,
        soft_cap if HAS_SOFT_CAP else None,
        logit_scale,
    )
    top, token = top_of(logits)
    shift = torch.where(top == -torch.inf, 0.0, top)
    total = torch.exp(logits - shift[:, None]).sum(dim=-1)
    write_partials(partials, len(top), [top, total, token + first_id])
