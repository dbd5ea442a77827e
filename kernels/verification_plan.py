"""Which tokens each span of a verification runs: planned on the device, in one launch.

Owns the plan's buffers, which the host fills in where it knows the windows, and the kernel that
fills them in from a draft loop's rows where only the device does. The batch was then prepared for
as many draft tokens as there might be: token slots that none has come to are padding. They are in
no pass, and sampling is told of them.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import next_power_of_2

from vllm_adadecode.kernels.draft_state import DraftRows
from vllm_adadecode.kernels.launch import register_references
from vllm_adadecode.kernels.verification_plan_reference import verification_plan_reference

# --- kernel --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_reqs", "most_rows", "num_token_slots"])
def _verification_plan_kernel(  # type: ignore[no-untyped-def]
    # PassPlans
    tokens_ptr,
    slots_ptr,
    offsets_ptr,
    starts_ptr,
    plan_stride,
    # DraftRows
    row_slots_ptr,
    row_first_pos_ptr,
    row_num_drafts_ptr,
    row_depths_ptr,
    row_tokens_ptr,
    # [num_reqs] int32, row of each request; -1: it has none
    row_of_ptr,
    # [>= num_reqs + 1] int32
    query_start_loc_ptr,
    # [>= num_tokens] int32
    input_ids_ptr,
    # [>= num_reqs] int32
    seq_lens_ptr,
    # [>= num_tokens] bool
    is_padding_ptr,
    num_reqs,
    most_rows,
    num_token_slots,
    WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # One program a span: its tokens are laid out by a running sum, and nothing is large.
    span = tl.program_id(0)
    tokens_ptr += span * plan_stride
    slots_ptr += span * plan_stride
    offsets_ptr += span * plan_stride
    starts_ptr += span * plan_stride
    w = tl.arange(0, BLOCK_W)[None, :]
    num_tokens = 0
    for start in range(0, num_reqs, BLOCK_R):
        req = start + tl.arange(0, BLOCK_R)
        inside = req < num_reqs
        row = tl.load(row_of_ptr + req, mask=inside, other=0)
        has_row = inside & (row >= 0)
        row = tl.maximum(row, 0)
        begin = tl.load(query_start_loc_ptr + req, mask=inside, other=0)
        scheduled = tl.load(query_start_loc_ptr + req + 1, mask=inside, other=0) - begin
        num_drafts = tl.load(row_num_drafts_ptr + row, mask=has_row, other=0)
        length = tl.minimum(num_drafts + 1, scheduled)
        pending = has_row[:, None] & (w < length[:, None])
        tile = (row * WINDOW)[:, None] + w
        depths = tl.load(row_depths_ptr + tile, mask=pending, other=0)
        in_pass = pending & (depths <= span)
        count = tl.sum(in_pass.to(tl.int32), axis=1)
        end = num_tokens + tl.cumsum(count, 0)
        # Depths never increase along a window, so these tokens are its end.
        place = (end - length)[:, None] + w
        slot = tl.load(row_slots_ptr + row, mask=has_row, other=-1)
        batch_place = begin[:, None] + w
        tl.store(tokens_ptr + place, batch_place.to(tl.int64), mask=in_pass)
        tl.store(slots_ptr + place, slot[:, None] + w * 0, mask=in_pass)
        tl.store(offsets_ptr + place, (w + 0 * place).to(tl.int64), mask=in_pass)
        tl.store(starts_ptr + req, (end - count).to(tl.int64), mask=inside)
        num_tokens += tl.sum(count, axis=0)
        if span == 0:
            # The batch as it was prepared knows neither drafts nor lengths.
            is_scheduled = has_row[:, None] & (w < scheduled[:, None])
            token = tl.load(row_tokens_ptr + tile, mask=pending, other=0)
            tl.store(input_ids_ptr + batch_place, token.to(tl.int32), mask=is_scheduled)
            tl.store(is_padding_ptr + batch_place, w >= length[:, None], mask=is_scheduled)
            first_pos = tl.load(row_first_pos_ptr + row, mask=has_row, other=0)
            tl.store(seq_lens_ptr + req, (first_pos + length).to(tl.int32), mask=has_row)
    for start in range(num_reqs, most_rows + 1, BLOCK_T):
        req = start + tl.arange(0, BLOCK_T)
        ends = tl.zeros((BLOCK_T,), dtype=tl.int64) + num_tokens
        tl.store(starts_ptr + req, ends, mask=req <= most_rows)
    for start in range(num_tokens, num_token_slots, BLOCK_T):
        place = start + tl.arange(0, BLOCK_T)
        tl.store(tokens_ptr + place, -1, mask=place < num_token_slots)
        tl.store(slots_ptr + place, -1, mask=place < num_token_slots)
        tl.store(offsets_ptr + place, 0, mask=place < num_token_slots)


# --- buffers and wrapper -------------------------------------------------------------------------


@dataclass(frozen=True)
class PassPlans:
    """The passes of a verification, one for each span; parts of one tensor, for one copy.

    Attributes:
        data: int64 ``[num_spans, ...]``; the others are columns of it.
        tokens: ``[num_spans, most_tokens]`` place of each token in the batch; -1: padding.
        slots: ``[num_spans, most_tokens]`` request slot of each token; -1: padding.
        offsets: ``[num_spans, most_tokens]`` window offset of each token.
        starts: ``[num_spans, most_rows + 1]`` first token of each request, then the total.
    """

    data: torch.Tensor
    tokens: torch.Tensor
    slots: torch.Tensor
    offsets: torch.Tensor
    starts: torch.Tensor

    @staticmethod
    def of(data: torch.Tensor, most_tokens: int) -> "PassPlans":
        """The columns of ``data``."""
        ends = [*range(0, 4 * most_tokens, most_tokens), data.shape[1]]
        return PassPlans(data, *(data[:, a:b] for a, b in pairwise(ends)))

    @staticmethod
    def empty(
        num_spans: int, most_tokens: int, most_rows: int, device: torch.device
    ) -> "PassPlans":
        """Passes without tokens."""
        data = torch.zeros(
            num_spans, 3 * most_tokens + most_rows + 1, dtype=torch.int64, device=device
        )
        plans = PassPlans.of(data, most_tokens)
        plans.clear()
        return plans

    def clear(self) -> None:
        """No token in any pass."""
        self.tokens.fill_(-1)
        self.slots.fill_(-1)
        self.offsets.zero_()
        self.starts.zero_()


def plan_verification(
    plans: PassPlans,
    rows: DraftRows,
    *,
    # [num_reqs] int32
    row_of: torch.Tensor,
    # [>= num_reqs + 1] int32
    query_start_loc: torch.Tensor,
    # [>= num_token_slots] int32
    input_ids: torch.Tensor,
    # [>= num_reqs] int32
    seq_lens: torch.Tensor,
    # [>= num_token_slots] bool
    is_padding: torch.Tensor,
    num_token_slots: int,
) -> None:
    """Plan the verification of a draft loop's windows, and put the batch right; all in place.

    Args:
        plans: written, as far as ``num_token_slots`` tokens.
        rows: the windows.
        row_of: row of each request of the batch, one of its own; -1 for one that is prefilled: it
            has no token in these passes, and nothing is written for it.
        query_start_loc: scheduled tokens; a window is verified as far as there are.
        input_ids: of scheduled tokens: draft tokens are written; 0, a valid id, for padding.
        seq_lens: written: up to each request's last pending token.
        is_padding: of scheduled tokens: written, whether it is a slot without a token.
        num_token_slots: most tokens of a pass, padding among them.
    """
    window = rows.tokens.shape[1]
    block_w = next_power_of_2(window)
    num_reqs = len(row_of)
    _verification_plan_kernel[(len(plans.data),)](
        plans.tokens,
        plans.slots,
        plans.offsets,
        plans.starts,
        plans.data.stride(0),
        rows.slots,
        rows.first_pos,
        rows.num_drafts,
        rows.depths,
        rows.tokens,
        row_of,
        query_start_loc,
        input_ids,
        seq_lens,
        is_padding,
        num_reqs,
        plans.starts.shape[1] - 1,
        num_token_slots,
        WINDOW=window,
        BLOCK_W=block_w,
        BLOCK_R=min(next_power_of_2(num_reqs), max(16, 2048 // block_w)),
        BLOCK_T=1024,
        num_warps=8,
    )


register_references(__name__, {"_verification_plan_kernel": verification_plan_reference})
