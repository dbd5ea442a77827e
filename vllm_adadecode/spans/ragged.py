"""Running one span on part of a batch: a suffix of each chosen request's tokens.

Owns the input buffers, block tables and attention metadata of such a batch, so that the target
runner's own, which the verification batch still needs, are never touched. The draft
loop (early spans, fill-in) and verification (spans that not all tokens run, prefill among them)
both go through here.
"""

import inspect
import os
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, get_forward_context, set_forward_context
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.utils import record_function_or_nullcontext
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.utils import AttentionGroup

from vllm_adadecode.model.target import StagedTarget

# Tests switch this on: every position written is checked against the blocks the scheduler gave.
CHECK_KV_BOUNDS = os.environ.get("ADADECODE_CHECK_KV", "0") == "1"


def run_span(
    vllm_config: VllmConfig,
    staged: StagedTarget,
    span: int,
    # [num_tokens] int64
    positions: torch.Tensor,
    # [num_tokens, hidden_size]
    hidden: torch.Tensor,
    # [num_tokens, hidden_size], None for span 0
    residual: torch.Tensor | None,
    attn_metadata: dict[str, Any] | None = None,
    slot_mappings: dict[str, torch.Tensor] | None = None,
    # [num_tokens] bool, None: no token is
    is_padding: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One span in a forward context of its own; without metadata, no attention and no KV.

    Experts leave padding out.
    """
    num_tokens = len(positions)
    with (
        record_function_or_nullcontext(f"adadecode: span {span}"),
        set_forward_context(
            attn_metadata,
            vllm_config,
            num_tokens=num_tokens,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            batch_descriptor=BatchDescriptor(num_tokens=num_tokens),
            slot_mapping=slot_mappings,
            is_padding=is_padding,
        ),
    ):
        find_moe_layers_by_name()
        return staged.run_span(span, positions, hidden, residual)


def find_moe_layers_by_name() -> None:
    """Make the current forward context fit for a span.

    vLLM may find a MoE layer by counting calls from the model's first one; a span does not start
    there. Without the list, layers are found by name.
    """
    get_forward_context().all_moe_layers = None


# From vLLM 0.33 on.
MASKS_SLIDING_WINDOW = (
    "num_computed_tokens" in inspect.signature(BlockTables.gather_block_tables).parameters
)


class RaggedSpans:
    """Runs spans below the last one on ragged batches of suffixes."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        staged: StagedTarget,
        input_buffers: InputBuffers,
        block_tables: BlockTables,
        kv_cache_config: KVCacheConfig,
        attn_groups: list[list[AttentionGroup]],
        # [max_num_reqs] int32, on the device
        num_computed_tokens: torch.Tensor,
    ) -> None:
        self.vllm_config = vllm_config
        self.device = device
        self.staged = staged
        self.buffers = input_buffers
        self.block_tables = block_tables
        self.kv_cache_config = kv_cache_config
        self.attn_groups = attn_groups
        self.gather_options = {}
        if MASKS_SLIDING_WINDOW:
            self.gather_options["num_computed_tokens"] = num_computed_tokens
        # num_kv_cache_groups x [max_num_reqs, max_num_blocks]
        self.input_block_tables = tuple(
            torch.zeros_like(table) for table in block_tables.input_block_tables
        )
        self.input_block_table_ptrs = block_tables._make_ptr_tensor(self.input_block_tables)
        # [num_kv_cache_groups, max_num_tokens]
        self.slot_mappings = torch.zeros_like(block_tables.slot_mappings)
        self.none_prefilling = np.zeros(input_buffers.max_num_reqs, dtype=np.bool_)

    def gather_block_tables(
        self,
        # [num_reqs] int64 request slots, on the device
        slots: torch.Tensor,
        num_rows: int,
    ) -> tuple[torch.Tensor, ...]:
        """Block tables ``[num_rows, max_num_blocks]`` of each KV cache group, zeros past `slots`.

        What lies wholly below a sliding window is masked, as in vLLM's own passes: its blocks may
        be another request's. A pass starts where vLLM's next step does, or later.
        """
        return self.block_tables.gather_block_tables(
            slots,
            num_reqs_padded=num_rows,
            out=self.input_block_tables,
            out_ptrs=self.input_block_table_ptrs,
            **self.gather_options,
        )

    def run_span(
        self,
        span: int,
        # [num_reqs] request slots
        slots: np.ndarray,
        # [num_reqs] tokens of each request, all >= 1
        num_tokens: np.ndarray,
        # [num_reqs] upper bound of each request's length up to its last token here
        seq_lens_upper: np.ndarray,
        # [sum(num_tokens)] int64
        positions: torch.Tensor,
        # [sum(num_tokens), hidden_size]
        hidden: torch.Tensor,
        # [sum(num_tokens), hidden_size], None for span 0
        residual: torch.Tensor | None,
        # [num_reqs] bool, None: no request is
        is_prefilling: np.ndarray | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run ``span`` on the given tokens; their KV goes into the target's cache.

        Each request's tokens are consecutive positions. All earlier positions of the request
        already have their KV in this span's layers.

        Returns:
            (hidden, residual) after the span, ``[sum(num_tokens), hidden_size]`` each.
        """
        num_reqs, total = len(slots), len(positions)
        if is_prefilling is None:
            is_prefilling = self.none_prefilling[:num_reqs]
        buffers = self.buffers
        query_start_loc = np.zeros(num_reqs + 1, dtype=np.int32)
        np.cumsum(num_tokens, out=query_start_loc[1:])
        query_start_loc_cpu = torch.from_numpy(query_start_loc)
        buffers.query_start_loc[: num_reqs + 1] = query_start_loc_cpu
        buffers.query_start_loc[num_reqs + 1 :] = total
        buffers.positions[:total] = positions
        last = query_start_loc_cpu[1:].to(self.device, torch.int64) - 1
        buffers.seq_lens[:num_reqs] = positions[last] + 1
        buffers.seq_lens[num_reqs:] = 0

        slots_device = torch.from_numpy(slots.astype(np.int64)).to(self.device)
        if CHECK_KV_BOUNDS:
            lengths = buffers.seq_lens[:num_reqs].cpu().numpy()
            self.check_kv_bounds(self.kv_capacity(slots), lengths)
        tables = self.gather_block_tables(slots_device, num_reqs)
        slot_mappings = self.block_tables.compute_slot_mappings(
            slots_device,
            buffers.query_start_loc[: num_reqs + 1],
            buffers.positions,
            num_tokens_padded=total,
            out=self.slot_mappings,
        )
        metadata = build_attn_metadata(
            attn_groups=self.attn_groups,
            num_reqs=num_reqs,
            num_tokens=total,
            query_start_loc_gpu=buffers.query_start_loc[: num_reqs + 1],
            query_start_loc_cpu=query_start_loc_cpu,
            max_query_len=int(num_tokens.max()),
            seq_lens=buffers.seq_lens[:num_reqs],
            max_seq_len=int(seq_lens_upper.max()),
            block_tables=tables,
            slot_mappings=slot_mappings,
            kv_cache_config=self.kv_cache_config,
            seq_lens_cpu_upper_bound=torch.from_numpy(seq_lens_upper.astype(np.int32)),
            positions=buffers.positions[:total],
            is_prefilling=torch.from_numpy(is_prefilling),
        )
        return run_span(
            self.vllm_config,
            self.staged,
            span,
            buffers.positions[:total],
            hidden,
            residual,
            metadata,
            build_slot_mappings_by_layer(slot_mappings, self.kv_cache_config),
        )

    def kv_capacity(
        self,
        # [num_reqs] request slots
        slots: np.ndarray,
    ) -> np.ndarray:
        """Tokens that each request has blocks for, ``[num_kv_groups, num_reqs]``."""
        sizes = np.array(self.block_tables.block_sizes)
        return np.asarray(self.block_tables.num_blocks.np[:, slots] * sizes[:, None])

    @staticmethod
    def check_kv_bounds(
        # [num_kv_groups, num_reqs]
        capacity: np.ndarray,
        # [num_reqs] tokens of each that KV was, or will be, written for
        lengths: np.ndarray,
    ) -> None:
        """Fail where KV belongs to blocks that the scheduler has not given."""
        assert (lengths <= capacity).all(), (
            f"KV written past the allocated blocks: lengths {lengths.tolist()}, "
            f"capacity {capacity.tolist()}"
        )
