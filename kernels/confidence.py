"""Head confidence: the most likely token of each row and its probability.

Owns the step from a head's features to (token, p, confident), p = exp(max - logsumexp) (paper,
"Confidence"): `head_confidence` projects on the LM head without storing logits (projection.py,
merge.py), `top1_confidence` starts from logits that are there.
"""

from typing import Any

import torch

from vllm_adadecode.kernels.head_weight import HeadWeight
from vllm_adadecode.kernels.merge import (
    AllGather,
    finish_partials,
    merge_partials,
    merge_shards,
)
from vllm_adadecode.kernels.merge_reference import HeadResult
from vllm_adadecode.kernels.projection import head_partials
from vllm_adadecode.kernels.tuning import HeadBlocks


def head_confidence(
    # [num_rows, hidden_size]
    x: torch.Tensor,
    head: HeadWeight,
    threshold: float,
    *,
    other: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    num_live: torch.Tensor | None = None,
    all_gather: AllGather | None = None,
    blocks: HeadBlocks | None = None,
) -> HeadResult:
    """Most likely token of each row, its probability, and whether that passes the threshold.

    Two launches (for a shard three, and an all-gather of 12 bytes a row); logits stay in registers;
    nothing is read by the host. A row's result does not depend on the other rows.

    Args:
        x: ``[num_rows, hidden_size]``, output of the head's transform and norm, in the dtype of
            the weights (any of float32, bfloat16, float16 for int8 weights). Rows may be strided.
        head: the LM head or a draft vocabulary's rows of it.
        threshold: a row is confident where ``p > threshold``.
        other: float32 ``[num_rows]``, logit of all tokens outside a draft vocabulary; None: 0 mass.
        order: int32 ``[num_rows]`` from `gate.live_first`: rows that passed a gate first.
        num_live: int32 ``[1]``, how many did. The others get p = 0, and tiles of such rows read
            nothing of the LM head.
        all_gather: for a shard of a vocabulary, see `merge.merge_shards`; None: it is whole.
        blocks: how to cut the work; None: tuned or default.

    Raises:
        AdaDecodeError: shape or dtype of ``x`` does not fit the weights.
    """
    partials = head_partials(x, head, order=order, num_live=num_live, blocks=blocks)
    finish: dict[str, Any] = {
        "order": order,
        "num_live": num_live,
        "other": other,
        "vocab_ids": head.vocab_ids,
    }
    if all_gather is None:
        return finish_partials(partials, threshold, **finish)
    merged = merge_partials(partials, order=order, num_live=num_live)
    return merge_shards(merged, threshold, all_gather, **finish)


def top1_confidence(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    # [num_rows] float32
    other: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Most likely token and its probability, per row: ``p = exp(max - logsumexp)``.

    Args:
        logits: ``[num_rows, vocab_size]``, any floating dtype; computed in float32.
        other: logit of all tokens that have no column (outside a draft vocabulary), float32
            ``[num_rows]``: ``p = exp(max - logaddexp(logsumexp, other))``. It is never the token.

    Returns:
        ``token`` int64 ``[num_rows]`` (the lowest id wins ties) and ``p`` float32 ``[num_rows]``.
        A row with a NaN has ``p = NaN``, which no threshold accepts.
    """
    logits = logits.float()
    top, token = logits.max(dim=-1)
    total = logits.logsumexp(dim=-1)
    if other is not None:
        total = torch.logaddexp(total, other)
    return token, torch.exp(top - total)
