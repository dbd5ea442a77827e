"""Head confidence: the most likely token of each row and its probability.

Owns the step from head logits to (token, p), p = exp(max - logsumexp) (paper, "Confidence"). The
torch implementation is what every platform runs today.
"""

import torch


def top1_confidence(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Most likely token and its softmax probability, per row.

    Args:
        logits: ``[num_rows, vocab_size]``, any floating dtype; computed in float32.

    Returns:
        ``token`` int64 ``[num_rows]`` (the lowest id wins ties) and ``p`` float32 ``[num_rows]``.
        A row with a NaN has ``p = NaN``, which no threshold accepts.
    """
    logits = logits.float()
    top, token = logits.max(dim=-1)
    return token, torch.exp(top - logits.logsumexp(dim=-1))
