"""The draft vocabulary: the most frequent tokens of the training sequences.

Owns the choice of tokens; that a head has a logit for all other tokens is `vllm_adadecode.heads`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.training.sequences import Sequence


def choose_draft_vocab(
    sequences: Iterable[Sequence], size: int, vocab_size: int
) -> tuple[torch.Tensor, float]:
    """The ``size`` tokens that occur most in outputs (in all tokens where there are no outputs).

    Ties, and what is missing to ``size``, go to lower ids: tokenizers number frequent tokens first.

    Returns:
        Their ids, int64 ``[size]``, strictly increasing, and their share of the counted tokens.

    Raises:
        AdaDecodeError: ``size`` is not below ``vocab_size``.
    """
    if not 0 < size < vocab_size:
        raise AdaDecodeError(
            f"a draft vocabulary of {size} tokens must be smaller than the target's {vocab_size}"
        )
    counts: Counter[int] = Counter()
    for s in sequences:
        counts.update(s.output_ids or s.prompt_ids)
    order = sorted(range(vocab_size), key=lambda token: (-counts[token], token))
    chosen = sorted(order[:size])
    share = sum(counts[token] for token in chosen) / max(1, counts.total())
    return torch.tensor(chosen, dtype=torch.int64), share
