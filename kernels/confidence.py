"""Head confidence: the most likely token of each row and its probability.

Owns the step from head logits to (token, p), p = exp(max - logsumexp) (paper, "Confidence"). The
torch implementation is what every platform runs today.
"""

import torch


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
