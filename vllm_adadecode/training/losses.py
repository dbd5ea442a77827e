"""What a head is trained to reduce, per position, from two distributions over the same classes.

A class is a token, or behind all tokens the one class "some other token" of heads with a draft
vocabulary. Everything takes log-probabilities, float32 ``[rows, classes]``, and gives ``[rows]``.
The formulas hold for saturated distributions: a class of probability 0 adds 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["kl", "reverse_kl", "top_k_kl"]


@dataclass(frozen=True)
class Loss:
    """A loss by name.

    Attributes:
        kind: ``kl`` is the paper's, KL(final || head); ``reverse_kl`` is KL(head || final);
            ``top_k_kl`` the former over the ``top_k`` likeliest classes and their rest as one.
        top_k: of ``top_k_kl``.
        confidence_weight: of `confidence_loss`, which is added.
        temperature: the final logits are divided by it; below 1 the head learns a sharper
            distribution, nearer to what greedy decoding asks: is this the likeliest token?
    """

    kind: Kind = "kl"
    top_k: int = 64
    confidence_weight: float = 0.0
    temperature: float = 1.0

    def __call__(
        self,
        # [rows, classes]
        head: torch.Tensor,
        # [rows, classes]
        final: torch.Tensor,
        num_tokens: int,
    ) -> torch.Tensor:
        """Loss of each row; the first ``num_tokens`` classes are tokens."""
        if self.kind == "reverse_kl":
            loss = kl(head, final)
        elif self.kind == "top_k_kl" and self.top_k < final.shape[-1]:
            loss = top_k_kl(final, head, self.top_k)
        else:
            loss = kl(final, head)
        if self.confidence_weight:
            loss = loss + self.confidence_weight * confidence_loss(head, final, num_tokens)
        return loss


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum p (log p - log q)."""
    # The floor keeps 0 * (-inf) from being NaN; exp of it is 0 in float32. There is none for q: it
    # would take the gradient from a head that is far off.
    return (p.exp() * (p.clamp_min(-200.0) - q)).sum(-1)


def top_k_kl(final: torch.Tensor, head: torch.Tensor, k: int) -> torch.Tensor:
    """KL(final || head) after all but the ``k`` likeliest classes of ``final`` became one."""
    top, classes = final.topk(k, dim=-1)
    p = torch.cat([top, _rest(final, classes)], dim=-1)
    q = torch.cat([head.gather(-1, classes), _rest(head, classes)], dim=-1)
    return kl(p, q)


def confidence_loss(head: torch.Tensor, final: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Cross-entropy of "the head's likeliest token is the final one" under the head's confidence.

    The confidence is what a threshold is compared with, and in greedy decoding that event is what
    verification asks: -log p where they agree, else -log (1 - p).
    """
    confidence, token = head[:, :num_tokens].max(dim=-1)
    doubt = _rest(head, token.unsqueeze(-1)).squeeze(-1)
    return -torch.where(token == final.argmax(dim=-1), confidence, doubt)


def _rest(log_probs: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Log-probability of all but ``classes`` ``[rows, k]``, ``[rows, 1]``, without cancellation."""
    masked = log_probs.scatter(-1, classes, float("-inf"))
    return masked.logsumexp(dim=-1, keepdim=True)
