"""Running one span on a padded batch of fixed shape, which the device alone knows the contents of.

Owns the attention metadata of such a pass. Its tokens come first, request by request; the rest of
the batch is padding with KV slot -1, for which no KV is written and no attention computed. How many
tokens each request has, and how long it is, is on the device: the host gives attention upper bounds
that do not depend on the data. The draft loop's passes are laid out by `kernels.draft_step`, those
of a verification by verify/passes.py.
"""

from collections.abc import Sequence

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.attn_utils import (
    build_attn_metadata,
    build_slot_mappings_by_layer,
    get_query_lens_mismatch_unsupported_backend,
    get_varlen_cudagraph_unsupported_backend,
)
from vllm.v1.worker.utils import AttentionGroup

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.kernels.draft_state import KVBlocks, PassInputs
from vllm_adadecode.spans.ragged import RaggedSpans, run_span
from vllm_adadecode.spans.shapes import PassShape, padded_shape


def why_not_captured(
    attn_groups: list[list[AttentionGroup]], vllm_config: VllmConfig
) -> str | None:
    """What of an attention backend rules out graphs of padded passes; None if nothing does."""
    if (name := get_query_lens_mismatch_unsupported_backend(attn_groups)) is not None:
        return f"attention backend {name} needs query lengths on the host"
    window = 1 + vllm_config.num_speculative_tokens
    found = get_varlen_cudagraph_unsupported_backend(attn_groups, vllm_config, window)
    if found is not None:
        return f"attention backend {found[0]} can't replay up to {window} tokens a request"
    return None


def in_any_order(attn_groups: list[list[AttentionGroup]]) -> bool:
    """Whether rows with long and short queries may come in any order, with bounds for the latter.

    Backends that run the two apart find where one ends in the batch by lengths on the host.
    """
    return all(
        group.get_metadata_builder().reorder_batch_threshold is None
        for groups in attn_groups
        for group in groups
    )


class PaddedSpans:
    """Runs spans for the draft loop on the device, and for captured verifications.

    Args:
        spans: the ragged runner; its block tables and metadata builders are used, never at a time
            when it needs them itself.
        max_model_len: longest request.

    Raises:
        AdaDecodeError: the attention backend has to know the lengths on the host.
    """

    def __init__(self, spans: RaggedSpans, max_model_len: int) -> None:
        backend = get_query_lens_mismatch_unsupported_backend(spans.attn_groups)
        if backend is not None:
            raise AdaDecodeError(
                f"draft_loop device does not run with attention backend {backend}, which needs the "
                "batch on the host: use draft_loop host, or choose another --attention-backend"
            )
        self.spans = spans
        self.max_model_len = max_model_len
        # Whether passes may have prefill in them.
        self.takes_prefill = in_any_order(spans.attn_groups)
        tables = spans.block_tables
        self.blocks = KVBlocks(
            table_ptrs=tables.block_table_ptrs,
            table_strides=tables.block_table_strides,
            block_sizes=tables.block_sizes_tensor,
            enabled=tables.slot_mapping_enabled,
        )

    def shape(self, num_rows: int, row_tokens: int, num_tokens: int) -> PassShape:
        """Of a pass without prefill; see `padded_shape`."""
        return padded_shape(num_rows, row_tokens, num_tokens, self.max_model_len)

    def begin(
        self,
        # [n] int64 request slots
        slots: torch.Tensor,
        num_rows: int,
    ) -> None:
        """Collect the block tables of a round; those of rows past ``n`` are cleared."""
        self.spans.gather_block_tables(slots, num_rows)

    def run_span(
        self,
        span: int,
        inputs: PassInputs,
        # most tokens of a row
        row_tokens: int,
        # [num_rows * row_tokens, hidden_size]
        hidden: torch.Tensor,
        # [num_rows * row_tokens, hidden_size], None for span 0
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run ``span`` on the tokens of ``inputs``; their KV goes into the target's cache.

        Returns:
            (hidden, residual) after the span, ``[num_rows * row_tokens, hidden_size]`` each; rows
            of padding hold anything.
        """
        num_rows = len(inputs.seq_lens)
        num_tokens = num_rows * row_tokens
        return self.run_rows(
            span,
            self.shape(num_rows, row_tokens, num_tokens),
            positions=inputs.positions[:num_tokens],
            slot_mappings=inputs.slot_mapping[:, :num_tokens],
            query_start_loc=inputs.query_start_loc,
            seq_lens=inputs.seq_lens,
            block_tables=[table[:num_rows] for table in self.spans.input_block_tables],
            is_padding=inputs.token_slots[:num_tokens] < 0,
            hidden=hidden,
            residual=residual,
        )

    def run_rows(
        self,
        span: int,
        shape: PassShape,
        *,
        # [num_tokens] int64
        positions: torch.Tensor,
        # [num_kv_groups, num_tokens] int64
        slot_mappings: torch.Tensor,
        # [num_rows + 1] int32
        query_start_loc: torch.Tensor,
        # [num_rows] int32, 0 for a row without tokens
        seq_lens: torch.Tensor,
        # num_kv_groups x [num_rows, max_blocks]
        block_tables: Sequence[torch.Tensor],
        # [num_tokens] bool
        is_padding: torch.Tensor,
        # [num_tokens, hidden_size]
        hidden: torch.Tensor,
        # [num_tokens, hidden_size], None for span 0
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run ``span`` on what these tensors say, which may change after this call was captured.

        Returns:
            (hidden, residual) after the span, ``[num_tokens, hidden_size]`` each; rows of padding
            hold anything.
        """
        spans = self.spans
        num_rows, num_tokens = len(seq_lens), len(positions)
        metadata = build_attn_metadata(
            attn_groups=spans.attn_groups,
            num_reqs=num_rows,
            num_tokens=num_tokens,
            query_start_loc_gpu=query_start_loc,
            query_start_loc_cpu=shape.query_start_loc,
            max_query_len=shape.row_tokens,
            seq_lens=seq_lens,
            max_seq_len=self.max_model_len,
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=spans.kv_cache_config,
            seq_lens_cpu_upper_bound=shape.lengths,
            positions=positions,
            is_prefilling=shape.is_prefilling,
        )
        return run_span(
            spans.vllm_config,
            spans.staged,
            span,
            positions,
            hidden,
            residual,
            metadata,
            build_slot_mappings_by_layer(slot_mappings, spans.kv_cache_config),
            is_padding,
        )
