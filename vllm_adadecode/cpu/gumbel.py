"""Replacements of the kernels in ``gpu/sample/gumbel.py``: temperature, Gumbel sampling.

Also owns the argmax per vocabulary block that resampling after a rejection shares.
"""
# ruff: noqa: N803 (arguments bear the kernels' names)

from __future__ import annotations

import numpy as np
import torch

from vllm_adadecode.cpu.registry import replacement
from vllm_adadecode.kernels.noise import DRAFT_NOISE_SALT, draft_seed, gumbel_noise


@replacement("sample.gumbel._temperature_kernel")
def temperature(
    logits_ptr: torch.Tensor,  # [num_tokens, vocab_size]
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,  # [num_tokens]
    temperature_ptr: torch.Tensor,  # [max_num_reqs]
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    # [num_tokens, 1]; dividing by 1 leaves greedy rows as they are.
    divisor = temperature_ptr[expanded_idx_mapping_ptr].float().unsqueeze_(1)
    divisor[divisor == 0] = 1
    logits_ptr.div_(divisor)


def block_argmax(
    values: torch.Tensor,  # [num_rows, vocab_size]
    block_size: int,
    out_argmax: torch.Tensor,  # [num_rows, num_blocks]
    out_max: torch.Tensor,  # [num_rows, num_blocks]
) -> None:
    """The first largest value, and its token id, of every block of the vocabulary."""
    # NumPy's argmax is vectorised; torch's is not on a CPU.
    array = values.numpy()
    num_rows, vocab_size = array.shape
    argmax, largest = out_argmax.numpy(), out_max.numpy()
    num_full = vocab_size // block_size
    begin = num_full * block_size
    if num_full:
        blocks = array[:, :begin].reshape(num_rows, num_full, block_size)
        idx = blocks.argmax(-1)
        idx += np.arange(0, begin, block_size)
        argmax[:, :num_full] = idx
        largest[:, :num_full] = array[np.arange(num_rows)[:, None], idx]
    if begin < vocab_size:
        tail = array[:, begin:]
        idx = tail.argmax(-1)
        argmax[:, num_full] = idx + begin
        largest[:, num_full] = tail[np.arange(num_rows), idx]


@replacement("sample.gumbel._gumbel_sample_kernel")
def gumbel_sample(
    local_argmax_ptr: torch.Tensor,  # [num_tokens, num_blocks]
    local_argmax_stride: int,
    local_max_ptr: torch.Tensor,  # [num_tokens, num_blocks]
    local_max_stride: int,
    logits_cache_ptr: torch.Tensor | None,  # [max_num_reqs, num_cols, >= vocab_size]
    logits_cache_stride_0: int,
    logits_cache_stride_1: int,
    logits_cache_col_ptr: torch.Tensor | None,  # scalar or [num_tokens]
    logits_cache_source_ptr: torch.Tensor | None,  # [num_tokens, vocab_size]
    logits_cache_source_stride: int,
    logits_ptr: torch.Tensor,  # [num_tokens, vocab_size]
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,  # [num_tokens], -1: a padding row
    seeds_ptr: torch.Tensor,  # [max_num_reqs]
    pos_ptr: torch.Tensor,  # [num_tokens]
    temp_ptr: torch.Tensor,  # [max_num_reqs]
    vocab_size: int,
    BLOCK_SIZE: int,
    IS_DRAFTING: bool,
    APPLY_TEMPERATURE: bool,
    USE_FP64: bool,
    PER_TOKEN_COL: bool,
) -> None:
    req_idx = expanded_idx_mapping_ptr.numpy()
    columns = None
    if logits_cache_ptr is not None:
        assert logits_cache_col_ptr is not None
        assert logits_cache_source_ptr is not None
        columns = np.broadcast_to(logits_cache_col_ptr.numpy(), req_idx.shape)
        # Before temperature: the rejection sampler divides by it again when it loads.
        for row in np.flatnonzero(req_idx >= 0).tolist():
            cache = logits_cache_ptr[int(req_idx[row]), int(columns[row]), :vocab_size]
            cache.copy_(logits_cache_source_ptr[row])

    temperatures = np.where(req_idx < 0, 0, temp_ptr.numpy()[req_idx])
    logits = logits_ptr.to(torch.float32)
    random_rows = np.flatnonzero(temperatures)
    if len(random_rows):
        # A copy in any case: the caller's logits are not ours to add noise to.
        logits = logits.to(torch.float64 if USE_FP64 else torch.float32, copy=True)
        seeds, positions = seeds_ptr.numpy(), pos_ptr.numpy()
        for row in random_rows.tolist():
            pos = int(positions[row]) + (DRAFT_NOISE_SALT if IS_DRAFTING else 0)
            seed = int(seeds[req_idx[row]])
            if columns is not None:
                seed = draft_seed(seed, int(columns[row]))
            noise = gumbel_noise(seed, pos, vocab_size, USE_FP64)
            if APPLY_TEMPERATURE:
                logits[row] = logits_ptr[row].to(torch.float32) / float(temperatures[row])
            logits[row].add_(noise)
    block_argmax(logits, BLOCK_SIZE, local_argmax_ptr, local_max_ptr)
