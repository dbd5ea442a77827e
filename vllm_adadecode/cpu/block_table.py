"""Replacements of the kernels in ``gpu/block_table.py``: the paged KV cache's tables and slots."""
# ruff: noqa: N803 (arguments bear the kernels' names)

from __future__ import annotations

import numpy as np
import torch

from vllm_adadecode.cpu.memory import int32_table
from vllm_adadecode.cpu.registry import replacement


@replacement("block_table._gather_block_tables_kernel")
def gather_block_tables(
    batch_idx_to_req_idx: torch.Tensor,  # [num_reqs]
    src_block_table_ptrs: torch.Tensor,  # [num_kv_cache_groups]
    dst_block_table_ptrs: torch.Tensor,  # [num_kv_cache_groups]
    block_table_strides: torch.Tensor,  # [num_kv_cache_groups]
    num_blocks_ptr: torch.Tensor,  # [num_kv_cache_groups, max_num_reqs]
    num_blocks_stride: int,
    num_reqs: int,
    BLOCK_SIZE: int,
    # From vLLM 0.33 on
    num_computed_tokens_ptr: torch.Tensor | None = None,  # [max_num_reqs]
    sliding_window_reach_ptr: torch.Tensor | None = None,  # [num_kv_cache_groups], 0: no window
    block_sizes_ptr: torch.Tensor | None = None,  # [num_kv_cache_groups]
    MASK_SLIDING_WINDOW: bool = False,
) -> None:
    req_idx = batch_idx_to_req_idx.numpy()
    all_num_blocks = num_blocks_ptr.numpy()
    groups = zip(
        src_block_table_ptrs.tolist(),
        dst_block_table_ptrs.tolist(),
        block_table_strides.tolist(),
        all_num_blocks,
        strict=True,
    )
    for group, (src_address, dst_address, stride, num_blocks) in enumerate(groups):
        src = int32_table(src_address, stride)
        dst = int32_table(dst_address, stride)
        # Past a row's own blocks the kernel leaves what was there; nothing reads it, so one copy as
        # wide as the widest row serves all rows.
        width = int(num_blocks[req_idx].max(initial=0))
        dst[:num_reqs, :width] = src[req_idx, :width]
        # The number of padded rows is in the grid, which a replacement is not given: clear all of
        # them.
        dst[num_reqs:] = 0
        if not MASK_SLIDING_WINDOW:
            continue
        assert num_computed_tokens_ptr is not None
        assert sliding_window_reach_ptr is not None
        assert block_sizes_ptr is not None
        if reach := int(sliding_window_reach_ptr[group]):
            # Blocks wholly below the window may be another request's by now.
            below = num_computed_tokens_ptr.numpy()[req_idx] - reach
            num_null = np.maximum(below, 0) // int(block_sizes_ptr[group])
            dst[:num_reqs, :width][np.arange(width) < num_null[:, None]] = 0


@replacement("block_table._compute_slot_mappings_kernel")
def compute_slot_mappings(
    max_num_tokens: int,
    idx_mapping: torch.Tensor,  # [num_reqs], -1: a row without blocks
    query_start_loc: torch.Tensor,  # [>= num_reqs + 1]
    pos: torch.Tensor,  # [>= num_tokens]
    block_table_ptrs: torch.Tensor,  # [num_kv_cache_groups]
    block_table_strides: torch.Tensor,  # [num_kv_cache_groups]
    block_sizes: torch.Tensor,  # [num_kv_cache_groups]
    slot_mapping_enabled: torch.Tensor,  # [num_kv_cache_groups]
    dcp_sharded: torch.Tensor,  # [num_kv_cache_groups]
    slot_mappings_ptr: torch.Tensor,  # [num_kv_cache_groups, >= max_num_tokens]
    slot_mappings_stride: int,
    cp_rank: int,
    CP_SIZE: int,
    CP_INTERLEAVE: int,
    PAD_ID: int,
    TRITON_BLOCK_SIZE: int,
) -> None:
    if CP_SIZE != 1:
        raise NotImplementedError("context parallelism has no CPU replacement")
    req_idx = idx_mapping.numpy()
    num_reqs = req_idx.shape[0]
    starts = query_start_loc.numpy()[: num_reqs + 1]
    num_tokens = int(starts[num_reqs])
    # [num_tokens]
    positions = pos.numpy()[:num_tokens]
    if num_tokens != num_reqs:
        req_idx = np.repeat(req_idx, starts[1:] - starts[:-1])
    no_blocks = req_idx < 0
    any_without_blocks = bool(no_blocks.any())

    slot_mappings = slot_mappings_ptr.numpy()
    groups = zip(
        slot_mappings,
        block_table_ptrs.tolist(),
        block_table_strides.tolist(),
        block_sizes.tolist(),
        slot_mapping_enabled.tolist(),
        strict=True,
    )
    for slots, address, stride, block_size, enabled in groups:
        slots[num_tokens:max_num_tokens] = PAD_ID
        if not enabled:
            slots[:num_tokens] = PAD_ID
            continue
        block_table = int32_table(address, stride)
        block_idx, block_offset = np.divmod(positions, block_size)
        # Row -1 of the view would be its last, so such rows look up row 0 instead.
        rows = np.maximum(req_idx, 0) if any_without_blocks else req_idx
        if any_without_blocks:
            block_idx[no_blocks] = 0
        blocks = block_table[rows, block_idx].astype(np.int64)
        slots[:num_tokens] = blocks * block_size + block_offset
        if any_without_blocks:
            slots[:num_tokens][no_blocks] = PAD_ID
