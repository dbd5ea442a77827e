"""What the host knows of a padded pass: upper bounds, and what is prefilled in it.

Owns the shape that attention metadata is built from, and the part of a batch that is prefilled in
it, of which all is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch

# Shapes that are kept: more than any server is likely to be in the midst of.
KEPT_SHAPES = 1024


@dataclass(frozen=True)
class PassShape:
    """What attention is told of a pass on the host: nothing of it depends on the data.

    Attributes:
        row_tokens: most tokens of a row.
        query_start_loc: int32 ``[num_rows + 1]`` where a row's tokens start at most.
        lengths: int32 ``[num_rows]``, upper bounds.
        is_prefilling: bool ``[num_rows]``.
    """

    row_tokens: int
    query_start_loc: torch.Tensor
    lengths: torch.Tensor
    is_prefilling: torch.Tensor

    def after(self, prefill: PrefillPart) -> PassShape:
        """The same after rows that are prefilled."""
        return PassShape(
            max(self.row_tokens, prefill.most_tokens),
            torch.cat([prefill.starts_cpu, prefill.num_tokens + self.query_start_loc]),
            torch.cat([prefill.lengths_cpu, self.lengths]),
            torch.cat([torch.ones(prefill.num_reqs, dtype=torch.bool), self.is_prefilling]),
        )


@lru_cache(KEPT_SHAPES)
def padded_shape(num_rows: int, row_tokens: int, num_tokens: int, max_model_len: int) -> PassShape:
    """A pass without prefill, of as many rows, tokens of a row, and tokens at most."""
    return PassShape(
        row_tokens,
        (torch.arange(num_rows + 1, dtype=torch.int32) * row_tokens).clamp(max=num_tokens),
        torch.full((num_rows,), max_model_len, dtype=torch.int32),
        torch.zeros(num_rows, dtype=torch.bool),
    )


@dataclass
class PrefillPart:
    """What is prefilled in a batch that verifies an overlapped round, on its way through the spans.

    Attributes:
        num_reqs, num_tokens: of this part.
        most_tokens: of a request.
        order: int64 ``[requests of the batch]``, on the device as all that follow, batch rows: of
            these requests, then of the others.
        tokens: int64 ``[num_tokens]`` place of each token in the batch, request by request.
        starts: int64 ``[num_reqs]`` first token of each request in ``tokens``.
        starts_cpu: int32 ``[num_reqs]``, on the host, the same.
        lengths_cpu: int32 ``[num_reqs]``, on the host, each request's tokens up to its last here.
        states: (hidden, residual), ``[num_tokens, hidden_size]`` each, after the last span that
            ran; None before the first.
    """

    num_reqs: int
    num_tokens: int
    most_tokens: int
    order: torch.Tensor
    tokens: torch.Tensor
    starts: torch.Tensor
    starts_cpu: torch.Tensor
    lengths_cpu: torch.Tensor
    states: tuple[torch.Tensor, torch.Tensor] | None = None

    @staticmethod
    def of(
        input_batch: InputBatch,
        # [num_reqs] batch rows
        rows: np.ndarray,
        device: torch.device,
    ) -> PrefillPart:
        counts = input_batch.num_scheduled_tokens[rows].astype(np.int64)
        starts = np.cumsum(counts) - counts
        first = input_batch.query_start_loc_np[rows] - starts
        tokens = np.repeat(first, counts) + np.arange(counts.sum())
        order = np.append(rows, np.setdiff1d(np.arange(input_batch.num_reqs), rows))
        parts = order, starts, tokens
        on_device = async_tensor_h2d(np.concatenate(parts).astype(np.int64), device=device)
        on_order, on_starts, on_tokens = on_device.split([len(part) for part in parts])
        return PrefillPart(
            num_reqs=len(rows),
            num_tokens=len(tokens),
            most_tokens=int(counts.max()),
            order=on_order,
            starts=on_starts,
            tokens=on_tokens,
            starts_cpu=torch.from_numpy(starts.astype(np.int32)),
            lengths_cpu=input_batch.seq_lens_cpu_upper_bound[torch.from_numpy(rows)],
        )
