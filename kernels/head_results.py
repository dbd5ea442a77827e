"""What the draft loop records of a head's results, in one launch.

Owns the comparison with the exit's threshold (paper, "Confidence") and the counts of heads
evaluated; `draft_step.py` moves the rows on by it.
"""

from typing import Any

import torch
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import next_power_of_2

from vllm_adadecode.kernels.launch import register_references


# The exit is no constant: a round would have a kernel for each, and pointers of each alignment.
@triton.jit(do_not_specialize=["exit_index", "num_rows"])
def _record_head_results_kernel(  # type: ignore[no-untyped-def]
    # [num_rows] int64
    token_out_ptr,
    # [num_rows] bool
    confident_ptr,
    # [num_exits] int64, accumulated
    heads_evaluated_ptr,
    head_batches_ptr,
    # [num_rows] int64
    token_ptr,
    # [num_rows] float32
    p_ptr,
    # [num_rows] bool
    live_ptr,
    # [num_exits] float32
    thresholds_ptr,
    exit_index,
    num_rows,
    BLOCK: tl.constexpr,
):
    row = tl.arange(0, BLOCK)
    inside = row < num_rows
    live = tl.load(live_ptr + row, mask=inside, other=0).to(tl.int32)
    p = tl.load(p_ptr + row, mask=inside, other=0.0)
    # NaN compares false: a broken row is never confident.
    confident = (p > tl.load(thresholds_ptr + exit_index)) & (live == 1)
    tl.store(token_out_ptr + row, tl.load(token_ptr + row, mask=inside, other=0), mask=inside)
    tl.store(confident_ptr + row, confident, mask=inside)
    num_live = tl.sum(live, axis=0).to(tl.int64)
    evaluated_ptr, batches_ptr = heads_evaluated_ptr + exit_index, head_batches_ptr + exit_index
    tl.store(evaluated_ptr, tl.load(evaluated_ptr) + num_live)
    tl.store(batches_ptr, tl.load(batches_ptr) + (num_live > 0).to(tl.int64))


def record_head_results(
    # [num_rows] int64
    token: torch.Tensor,
    # [num_rows] float32
    p: torch.Tensor,
    # [num_rows] bool
    live: torch.Tensor,
    exit_index: int,
    *,
    thresholds: torch.Tensor,
    token_out: torch.Tensor,
    confident: torch.Tensor,
    heads_evaluated: torch.Tensor,
    head_batches: torch.Tensor,
) -> None:
    """Keep each row's token, and whether it is accepted; count the heads.

    Args:
        token: what the head predicts, of no meaning where ``live`` is false.
        p: its probability.
        live: rows whose head was evaluated.
        thresholds: float32 ``[num_exits]``; a live row is confident where ``p`` is above it.
        token_out: int64 ``[num_rows]``, written.
        confident: bool ``[num_rows]``, written.
        heads_evaluated: int64 ``[num_exits]``, plus the number of live rows.
        head_batches: int64 ``[num_exits]``, plus 1 if there is one.
    """
    num_rows = len(token)
    _record_head_results_kernel[(1,)](
        token_out,
        confident,
        heads_evaluated,
        head_batches,
        token.contiguous(),
        p.contiguous(),
        live.contiguous(),
        thresholds,
        exit_index,
        num_rows,
        BLOCK=max(16, next_power_of_2(num_rows)),
        num_warps=4,
    )


def _record_head_results_reference(
    token_out: torch.Tensor,
    confident: torch.Tensor,
    heads_evaluated: torch.Tensor,
    head_batches: torch.Tensor,
    token: torch.Tensor,
    p: torch.Tensor,
    live: torch.Tensor,
    thresholds: torch.Tensor,
    exit_index: int,
    num_rows: int,
    **options: Any,
) -> None:
    token_out.copy_(token)
    torch.logical_and(p > thresholds[exit_index], live, out=confident)
    heads_evaluated[exit_index].add_(live.sum())
    head_batches[exit_index].add_(live.any())


register_references(__name__, {"_record_head_results_kernel": _record_head_results_reference})
