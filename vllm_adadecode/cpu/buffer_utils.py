"""Replacement of the kernel in ``gpu/buffer_utils.py``: staged writes into request-state tables."""
# ruff: noqa: N803 (arguments bear the kernels' names)

from __future__ import annotations

import torch

from vllm_adadecode.cpu.memory import int32_table
from vllm_adadecode.cpu.registry import replacement


@replacement("buffer_utils._apply_write_kernel")
def apply_write(
    output_ptr: torch.Tensor,  # the table, or [num_groups] addresses of tables
    output_stride: int | torch.Tensor,  # of a row, or [num_groups]
    write_indices_ptr: torch.Tensor,  # [num_writes]
    write_starts_ptr: torch.Tensor,  # [num_writes]
    write_contents_ptr: torch.Tensor,  # [num_writes' contents]
    write_cu_lens_ptr: torch.Tensor,  # [num_writes]
    write_group_ids_ptr: torch.Tensor | None,  # [num_writes]
    BLOCK_SIZE: int,
    MULTI_GROUP: bool,
) -> None:
    contents = write_contents_ptr.numpy()
    rows = write_indices_ptr.tolist()
    starts = write_starts_ptr.tolist()
    ends = write_cu_lens_ptr.tolist()
    if MULTI_GROUP:
        assert write_group_ids_ptr is not None
        assert isinstance(output_stride, torch.Tensor)
        addresses, strides = output_ptr.tolist(), output_stride.tolist()
        tables = [int32_table(a, s) for a, s in zip(addresses, strides, strict=True)]
        outputs = [tables[group] for group in write_group_ids_ptr.tolist()]
    else:
        # [num_rows, row_stride]; a vector is a table of one column.
        table = output_ptr.numpy()
        outputs = [table.reshape(-1, 1) if table.ndim == 1 else table] * len(rows)

    begin = 0
    for output, row, start, end in zip(outputs, rows, starts, ends, strict=True):
        length = end - begin
        if output.shape[1] == 1:
            output[row + start : row + start + length, 0] = contents[begin:end]
        else:
            output[row, start : start + length] = contents[begin:end]
        begin = end
