"""Rows of the target's LM head, as a copy for the early heads is made of them.

Owns reading them as floating point, however vLLM stores them (quantised, repacked, on other
tensor-parallel ranks), and rounding them to int8.
"""

from typing import Any

import torch
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

# Magnitude that a row's largest weight is mapped to.
LARGEST = 127
# Rows that are converted at once: bounds the float32 copies.
CHUNK_ROWS = 8192
# Columns that are multiplied out at once: bounds the logits, [columns, rank's rows].
CHUNK_COLUMNS = 256


def stored_weight(lm_head: Any) -> torch.Tensor | None:
    """This rank's matrix, ``[rank's rows, hidden_size]``; None if it is quantised or repacked.

    Not to be kept: a reload of weights may put another in its place.

    Args:
        lm_head: vLLM's ``ParallelLMHead``.
    """
    if not isinstance(lm_head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod):
        return None
    weight: torch.Tensor = lm_head.weight.detach()
    # On a CPU vLLM may keep nothing but a packed form of its own.
    return weight if weight.numel() else None


def own_rows(lm_head: Any) -> tuple[int, int]:
    """The token ids, from first to before last, whose rows this tensor-parallel rank holds."""
    shard = lm_head.shard_indices
    return shard.org_vocab_start_index, shard.org_vocab_end_index


def read_rows(
    lm_head: Any,
    # [num_rows] int64, on the weights' device
    token_ids: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows of the LM head, ``[num_rows, hidden_size]``, all of them on every rank.

    Every tensor-parallel rank must ask for the same rows. What a quantised LM head makes of the
    unit vectors are its columns: exact for quantised weights; with quantised inputs, too, up to
    their rounding of 1.

    Args:
        lm_head: vLLM's ``ParallelLMHead``.
        token_ids: of the target's vocabulary, in any order; None for all, in theirs.
        dtype: of the model's hidden states, and of the rows unless weights are stored in another.

    Returns:
        A copy, or with ``token_ids`` None the weights themselves where they are all here.
    """
    weight = stored_weight(lm_head)
    if token_ids is None:
        if weight is not None and lm_head.tp_size == 1:
            return weight[: lm_head.org_vocab_size]
        device = next(lm_head.parameters()).device
        token_ids = torch.arange(lm_head.org_vocab_size, device=device)
    first, end = own_rows(lm_head)
    # Others' rows read something, too: all ranks do the same work.
    local = (token_ids - first).clamp(0, max(end - first - 1, 0))
    rows = _multiply_out(lm_head, local, dtype) if weight is None else weight[local]
    if lm_head.tp_size == 1:
        return rows
    mine = (token_ids >= first) & (token_ids < end)
    # All but one rank add zeros: the sum is exact.
    whole: torch.Tensor = tensor_model_parallel_all_reduce(
        torch.where(mine[:, None], rows, torch.zeros_like(rows))
    )
    return whole


def _multiply_out(
    lm_head: Any,
    # [num_rows] int64, rows of this rank
    local: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    size = lm_head.embedding_dim
    rows = torch.empty(len(local), size, dtype=dtype, device=local.device)
    for start in range(0, size, CHUNK_COLUMNS):
        columns = torch.arange(start, min(start + CHUNK_COLUMNS, size), device=local.device)
        unit = torch.zeros(len(columns), size, dtype=dtype, device=local.device)
        unit[columns - start, columns] = 1
        logits = lm_head.quant_method.apply(lm_head, unit)
        rows[:, columns] = logits[:, local].t()
    return rows


def quantize_rows(
    # [num_rows, hidden_size]
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix to int8 with one scale per row, in steps of ``max|row| / 127``.

    Args:
        weight: ``[num_rows, hidden_size]``, floating point.

    Returns:
        ``rows`` ``[num_rows, hidden_size]`` int8, and ``scales`` float32 ``[num_rows]``, with
        ``weight`` about ``rows * scales[:, None]``. A row of zeros stays so.
    """
    rows = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for start in range(0, len(weight), CHUNK_ROWS):
        chunk = weight[start : start + CHUNK_ROWS].float()
        scale = chunk.abs().amax(-1) / LARGEST
        scaled = chunk / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        rows[start : start + CHUNK_ROWS] = scaled.round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
        scales[start : start + CHUNK_ROWS] = scale
    return rows, scales
