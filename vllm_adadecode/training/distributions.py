"""What the heads and the last layer predict, as log-probabilities over the same classes.

Owns the step from hidden states to distributions, for some rows at a time: nothing here is ever of
the size of a batch times the vocabulary, the caller gives as many rows as `rows_per_chunk` allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from vllm_adadecode.heads import EarlyHead
from vllm_adadecode.training.batches import MicroBatch
from vllm_adadecode.training.request import Precision
from vllm_adadecode.training.target_model import FrozenTarget

# Of one chunk of float32 log-probabilities; a handful of such tensors exist at a time.
CHUNK_BYTES = 128 << 20


@dataclass
class Distributions:
    """Distributions of a target and its heads.

    The classes are the tokens; with a draft vocabulary its tokens, then "some other token".

    Attributes:
        target: the frozen target.
        heads: by exit layer, on the target's device.
        thresholds: confidence threshold by exit layer; above it a head is confident.
        draft_vocab: int64 ``[draft_vocab_size]`` token ids, or None.
        precision: of the large products; ``bf16`` is autocast. Softmax, gates and "other" logits
            are float32.
        chunk_bytes: memory of one chunk of log-probabilities.
    """

    target: FrozenTarget
    heads: Mapping[int, EarlyHead]
    thresholds: Mapping[int, float]
    draft_vocab: torch.Tensor | None = None
    precision: Precision = "bf16"
    chunk_bytes: int = CHUNK_BYTES

    def __post_init__(self) -> None:
        if self.draft_vocab is not None:
            self.draft_vocab = self.draft_vocab.to(self.target.device)
            self._draft_rows = self.target.lm_head_weight[self.draft_vocab]

    @property
    def num_tokens(self) -> int:
        """Classes that are tokens."""
        if self.draft_vocab is not None:
            return len(self.draft_vocab)
        return self.target.lm_head_weight.shape[0]

    @property
    def rows_per_chunk(self) -> int:
        """Rows whose distributions fit into ``chunk_bytes``."""
        return max(1, self.chunk_bytes // (4 * self.target.lm_head_weight.shape[0]))

    def autocast(self) -> Any:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.target.device.type, dtype=torch.bfloat16)

    def states(self, batch: MicroBatch) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """Hidden states at the exits and at the end, ``[P, d]`` each, of the trained positions."""
        with self.autocast():
            hidden, final = self.target.hidden_states(batch.ids, self.heads)
        mask = batch.trained.to(final.device)
        return {e: h[mask] for e, h in hidden.items()}, final[mask]

    def chunks(self, num_rows: int) -> Iterator[slice]:
        """Cut rows so that the distributions of each part fit into memory."""
        for start in range(0, num_rows, self.rows_per_chunk):
            yield slice(start, start + self.rows_per_chunk)

    @torch.no_grad()
    def final(
        self,
        # [rows, d], after the final norm
        hidden: torch.Tensor,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """What the last layer predicts, float32 ``[rows, classes]``."""
        with self.autocast():
            logits = self.target.lm_head(hidden)
        log_probs = (logits.float() / temperature).log_softmax(-1)
        if self.draft_vocab is None:
            return log_probs
        kept = log_probs[:, self.draft_vocab]
        log_probs[:, self.draft_vocab] = float("-inf")
        return torch.cat([kept, log_probs.logsumexp(-1, keepdim=True)], dim=-1)

    def head(
        self,
        exit_layer: int,
        # [rows, d], residual added
        hidden: torch.Tensor,
    ) -> torch.Tensor:
        """What a head predicts, float32 ``[rows, classes]``, with gradients to its weights."""
        head = self.heads[exit_layer]
        with self.autocast():
            x = head.features(hidden.to(head_dtype(head, hidden)), self.target.norm)
            if self.draft_vocab is None:
                logits = self.target.lm_head(x.to(self.target.dtype)).float()
            else:
                logits = functional.linear(x.to(self.target.dtype), self._draft_rows).float()
        other = head.other_logit(x)
        if other is not None:
            logits = torch.cat([logits, other.unsqueeze(-1)], dim=-1)
        return logits.log_softmax(-1)

    def start(self, batch: MicroBatch) -> None:
        """Bring new heads as near to the logit lens as they can be, from one batch.

        T starts as the identity; the "other" logit as the mean of what it stands for.
        """
        hidden, _ = self.states(batch)
        with torch.no_grad():
            for e, head in self.heads.items():
                if head.other_bias is not None:
                    rows = hidden[e][: self.rows_per_chunk]
                    with self.autocast():
                        x = head.features(rows.to(head_dtype(head, rows)), self.target.norm)
                        logits = self.target.lm_head(x.to(self.target.dtype)).float()
                    logits[:, self.draft_vocab] = float("-inf")
                    head.other_bias.fill_(logits.logsumexp(-1).mean())


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum p (log p - log q), the paper's loss with the final distribution for p.

    Takes log-probabilities, float32 ``[rows, classes]``, and gives ``[rows]``. A class of
    probability 0 in p adds 0.
    """
    # The floor keeps 0 * (-inf) from being NaN; exp of it is 0 in float32. There is none for q: it
    # would take the gradient from a head that is far off.
    return (p.exp() * (p.clamp_min(-200.0) - q)).sum(-1)


def head_dtype(head: EarlyHead, hidden: torch.Tensor) -> torch.dtype:
    """The dtype of T; that of the hidden states where T has no weights."""
    weight = next(head.transform.parameters(), None)
    return hidden.dtype if weight is None else weight.dtype
