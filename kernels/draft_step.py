"""Bookkeeping between two passes of the draft loop, on the device, in one launch.

Owns the step from a head's results to the next pass: windows grow by a draft token, go deeper or
stop; depths follow the pass that just ran; the inputs of the next pass (token ids, positions,
lengths, KV slots) are laid out; and a few bytes say what there is left to do. The host reads
nothing, so the passes of a whole round can be queued, or captured, one after the other: a pass
without a token to run has empty inputs.

Batch rows stay where they are during a round. A row that has no part in a pass has no token in it.
"""

import torch
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import next_power_of_2

from vllm_adadecode.kernels.draft_state import DraftRows, KVBlocks, PassInputs, RoundStatus
from vllm_adadecode.kernels.draft_step_reference import draft_step_reference
from vllm_adadecode.kernels.launch import register_references

# In place of an exit index: no head was evaluated. Differs from STOPPED.
NO_EXIT = -2

# --- kernel --------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=[
        "exit_index",
        "next_span",
        "num_exits",
        "num_rows",
        "capacity",
        "num_early_spans",
    ]
)
def _draft_step_kernel(  # type: ignore[no-untyped-def]
    # DraftRows
    slots_ptr,
    first_pos_ptr,
    limits_ptr,
    tokens_ptr,
    num_drafts_ptr,
    depths_ptr,
    exits_ptr,
    next_span_ptr,
    counts_ptr,
    # [num_rows] int64, bool; of the head at exit_index
    token_ptr,
    confident_ptr,
    # PassInputs
    input_ids_ptr,
    positions_ptr,
    token_slots_ptr,
    offsets_ptr,
    slot_mapping_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    newest_ptr,
    # KVBlocks
    table_ptrs,
    table_strides_ptr,
    block_sizes_ptr,
    enabled_ptr,
    # RoundStatus
    numbers_ptr,
    allowed_ptr,
    offset_ptr,
    exit_index,
    next_span,
    num_exits,
    num_rows,
    capacity,
    num_early_spans,
    WINDOW: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # One program: rows are laid out by a running sum, and nothing is large.
    w = tl.arange(0, BLOCK_W)[None, :]
    num_tokens = 0
    num_checked = 0
    num_extended = 0
    early_span = tl.arange(0, BLOCK_E)
    num_waiting = tl.zeros((BLOCK_E,), dtype=tl.int32)
    num_pending = tl.zeros((BLOCK_E,), dtype=tl.int32)
    newest_offset = tl.zeros((), dtype=tl.int32)
    for start in range(0, num_rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = row < num_rows
        tile = (row * WINDOW)[:, None] + w
        in_window = inside[:, None] & (w < WINDOW)
        waits_for = tl.load(next_span_ptr + row, mask=inside, other=-1)
        num_drafts = tl.load(num_drafts_ptr + row, mask=inside, other=0)
        depths = tl.load(depths_ptr + tile, mask=in_window, other=0)
        tokens = tl.load(tokens_ptr + tile, mask=in_window, other=0)

        # The head that was just evaluated; no row waits for NO_EXIT.
        checked = inside & (waits_for == exit_index)
        ran = checked[:, None] & (w <= num_drafts[:, None]) & (depths <= exit_index)
        depths = tl.where(ran, exit_index + 1, depths)
        confident = tl.load(confident_ptr + row, mask=checked, other=0) != 0
        extended = checked & confident
        draft = tl.load(token_ptr + row, mask=extended, other=0)
        is_new = extended[:, None] & (w == num_drafts[:, None] + 1)
        tokens = tl.where(is_new, draft[:, None], tokens)
        tl.store(
            exits_ptr + row * (WINDOW - 1) + num_drafts,
            tl.zeros((BLOCK_R,), dtype=tl.int32) + exit_index,
            mask=extended,
        )
        num_drafts += extended.to(tl.int32)
        limit = tl.load(limits_ptr + row, mask=inside, other=0)
        after_draft = tl.where(num_drafts < limit, 0, -1)
        after_doubt = tl.where(exit_index + 1 < num_exits, exit_index + 1, -1)
        waits_for = tl.where(checked, tl.where(extended, after_draft, after_doubt), waits_for)
        tl.store(tokens_ptr + tile, tokens, mask=in_window)
        tl.store(depths_ptr + tile, depths, mask=in_window)
        tl.store(num_drafts_ptr + row, num_drafts, mask=inside)
        tl.store(next_span_ptr + row, waits_for, mask=inside)
        num_checked += tl.sum(checked.to(tl.int32), axis=0)
        num_extended += tl.sum(extended.to(tl.int32), axis=0)
        waits = waits_for[:, None] == early_span[None, :]
        num_waiting += tl.sum(waits.to(tl.int32), axis=0)
        slot = tl.load(slots_ptr + row, mask=inside, other=-1)
        is_pending = (slot >= 0)[:, None] & (w <= num_drafts[:, None])
        for span in range(num_early_spans + 1):
            # Those that have been through all early spans are at the last one.
            behind = (is_pending & (depths <= span)).to(tl.int32)
            num_pending += tl.where(early_span == span, tl.sum(tl.sum(behind, axis=1), axis=0), 0)

        # The next pass: each row's tokens that have not been through its span.
        runs = inside & (waits_for == next_span)
        newest_offset = tl.maximum(newest_offset, tl.max(tl.where(runs, num_drafts, 0), axis=0))
        in_pass = runs[:, None] & (w <= num_drafts[:, None]) & (depths <= next_span)
        count = tl.sum(in_pass.to(tl.int32), axis=1)
        end = num_tokens + tl.cumsum(count, 0)
        # Depths never increase along a window, so these tokens are its end.
        place = (end - 1 - num_drafts)[:, None] + w
        first_pos = tl.load(first_pos_ptr + row, mask=inside, other=0)
        position = first_pos[:, None] + w
        if next_span == 0:
            tl.store(input_ids_ptr + place, tokens.to(tl.int32), mask=in_pass)
        tl.store(positions_ptr + place, position, mask=in_pass)
        tl.store(token_slots_ptr + place, slot[:, None] + w * 0, mask=in_pass)
        tl.store(offsets_ptr + place, (w + 0 * place).to(tl.int64), mask=in_pass)
        for group in range(NUM_GROUPS):
            mapping_ptr = slot_mapping_ptr + group * capacity + place
            if tl.load(enabled_ptr + group) != 0:
                block_size = tl.load(block_sizes_ptr + group)
                table = tl.cast(tl.load(table_ptrs + group), tl.pointer_type(tl.int32))
                table += slot[:, None] * tl.load(table_strides_ptr + group)
                block = tl.load(table + position // block_size, mask=in_pass, other=0)
                kv_slot = block.to(tl.int64) * block_size + position % block_size
                tl.store(mapping_ptr, kv_slot, mask=in_pass)
            else:
                tl.store(mapping_ptr, -1, mask=in_pass)
        tl.store(query_start_loc_ptr + row, end - count, mask=inside)
        length = (first_pos + num_drafts + 1).to(tl.int32)
        tl.store(seq_lens_ptr + row, tl.where(runs, length, 0), mask=inside)
        tl.store(newest_ptr + row, tl.where(runs, end - 1, -1).to(tl.int64), mask=inside)
        num_tokens += tl.sum(count, axis=0)

    tl.store(query_start_loc_ptr + num_rows, num_tokens)
    is_early = early_span < num_early_spans
    num_waiting = tl.where(early_span < tl.load(allowed_ptr), num_waiting, 0)
    tl.store(numbers_ptr + early_span, num_waiting, mask=is_early)
    pending_ptr = numbers_ptr + num_early_spans
    tl.store(pending_ptr + early_span, num_pending, mask=early_span <= num_early_spans)
    tl.store(offset_ptr, newest_offset.to(tl.int64))
    if exit_index >= 0:
        count_ptr = counts_ptr + exit_index * 2
        tl.store(count_ptr, tl.load(count_ptr) + num_checked)
        tl.store(count_ptr + 1, tl.load(count_ptr + 1) + num_extended)
    # Tokens past the end: ids and positions stay, valid as they are; nothing is stored for them.
    for start in range(num_tokens, capacity, BLOCK_T):
        place = start + tl.arange(0, BLOCK_T)
        tl.store(token_slots_ptr + place, -1, mask=place < capacity)
        for group in range(NUM_GROUPS):
            tl.store(slot_mapping_ptr + group * capacity + place, -1, mask=place < capacity)


# --- wrapper -------------------------------------------------------------------------------------


def draft_step(
    rows: DraftRows,
    inputs: PassInputs,
    blocks: KVBlocks,
    status: RoundStatus,
    *,
    exit_index: int | None,
    next_span: int,
    token: torch.Tensor | None = None,
    confident: torch.Tensor | None = None,
) -> None:
    """Take up a head's results and lay out the next pass; all on the device, in place.

    Rows that waited for span ``exit_index`` have been through it and its head. A confident one
    takes the token as its next draft and waits for span 0, or stops at its limit; another waits for
    the next span, or stops after the last head.

    Args:
        rows: the windows; updated.
        inputs: the next pass's inputs; written. Entries past its tokens keep ids and positions and
            get slot -1.
        blocks: where the requests' KV lies.
        status: where the round is after this; written.
        exit_index: head that was evaluated; None at the start of a round.
        next_span: span that runs next; rows that wait for another are not in it.
        token: int64 ``[num_rows]`` by batch row; None at the start.
        confident: bool ``[num_rows]``.
    """
    num_rows, window = rows.tokens.shape
    if num_rows == 0:
        return
    if token is None or confident is None:
        assert exit_index is None, "a head's results are missing"
        token, confident = rows.first_pos, rows.first_pos.bool()
    block_w = next_power_of_2(window)
    _draft_step_kernel[(1,)](
        rows.slots,
        rows.first_pos,
        rows.limits,
        rows.tokens,
        rows.num_drafts,
        rows.depths,
        rows.exits,
        rows.next_span,
        rows.counts,
        token,
        confident,
        inputs.input_ids,
        inputs.positions,
        inputs.token_slots,
        inputs.offsets,
        inputs.slot_mapping,
        inputs.query_start_loc,
        inputs.seq_lens,
        inputs.newest,
        blocks.table_ptrs,
        blocks.table_strides,
        blocks.block_sizes,
        blocks.enabled,
        status.numbers,
        status.allowed,
        status.offset,
        NO_EXIT if exit_index is None else exit_index,
        next_span,
        len(rows.counts),
        num_rows,
        num_rows * window,
        len(status.num_waiting),
        WINDOW=window,
        NUM_GROUPS=len(blocks.block_sizes),
        BLOCK_E=next_power_of_2(len(status.num_pending)),
        BLOCK_W=block_w,
        BLOCK_R=min(next_power_of_2(num_rows), max(16, 2048 // block_w)),
        BLOCK_T=1024,
        num_warps=8,
    )


register_references(__name__, {"_draft_step_kernel": draft_step_reference})
