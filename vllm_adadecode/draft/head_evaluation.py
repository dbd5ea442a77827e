"""Evaluating heads for draft tokens: by the fused kernels, or from logits in memory.

Owns the way without kernels (model/fused_head.py has the other) and the choice between them.
"""

from dataclasses import dataclass

import numpy as np
import torch

from vllm_adadecode.kernels.confidence import top1_confidence
from vllm_adadecode.model.draft_sampler import DraftSampler
from vllm_adadecode.model.fused_head import FusedHeads, HeadCheck
from vllm_adadecode.model.target import StagedTarget


@dataclass(frozen=True)
class StoredHeads:
    """The heads of a target with their gates, from logits in memory.

    Attributes:
        sampler: draws draft tokens; None: the most likely ones.
        picks_rows: whether the host reads which rows pass the gate and evaluates the head for them
            alone; else it reads nothing, and the head runs for all rows.
    """

    target: StagedTarget
    sampler: DraftSampler | None
    picks_rows: bool

    def check(
        self,
        exit_index: int,
        # [num_rows, hidden_size]
        hidden: torch.Tensor,
        # [num_rows, hidden_size]
        residual: torch.Tensor,
        *,
        # [num_rows] request slot, -1: padding
        slots: torch.Tensor,
        # [num_rows] int64, of the token that the head looks at
        positions: torch.Tensor,
        draft: int | torch.Tensor,
        gate_threshold: float | torch.Tensor | None,
        # [num_rows] bool; None: all
        in_pass: torch.Tensor | None = None,
    ) -> HeadCheck:
        """Gate and head of every row; as `FusedHeads.check`."""
        live = in_pass
        if gate_threshold is not None:
            live = self.target.gate_probability(exit_index, hidden, residual) > gate_threshold
            if in_pass is not None:
                live &= in_pass
        rows = hidden, residual, slots, positions
        if live is None:
            return HeadCheck(*self._evaluate(exit_index, draft, *rows), live)
        if not self.picks_rows:
            if self.sampler is not None and gate_threshold is not None:
                # Logits are cached for these rows alone.
                rows = hidden, residual, torch.where(live, slots, -1), positions
            return HeadCheck(*self._evaluate(exit_index, draft, *rows), live)
        # The one host synchronisation of a gate: the LM head never reads its weights for a row that
        # it is not worth.
        picked = np.flatnonzero(live.cpu().numpy())
        if picked.size == len(live):
            return HeadCheck(*self._evaluate(exit_index, draft, *rows), live)
        if picked.size == 0:
            # On the host, which need not wait once more.
            nothing = torch.zeros(len(live))
            return HeadCheck(nothing.long(), nothing, nothing.bool())
        index = torch.from_numpy(picked).to(live.device)
        token, p = torch.zeros_like(positions), torch.zeros(len(live), device=live.device)
        token[index], p[index] = self._evaluate(exit_index, draft, *(part[index] for part in rows))
        return HeadCheck(token, p, live)

    def _evaluate(
        self,
        exit_index: int,
        draft: int | torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token int64 and probability of the most likely one float32, ``[num_rows]`` each."""
        if self.sampler is None:
            return self.target.head_top1(exit_index, hidden, residual)
        logits, other = self.target.head_logits(exit_index, hidden, residual)
        _, p = top1_confidence(logits, other)
        # Drawn from the head's distribution; whether it is accepted depends on that distribution
        # alone (see thresholds.py).
        all_logits = self.target.projection.over_all_tokens(logits)
        return self.sampler.sample(all_logits, slots, positions, draft), p


Heads = FusedHeads | StoredHeads


def make_heads(
    target: StagedTarget, sampler: DraftSampler | None, dtype: torch.dtype, picks_rows: bool
) -> Heads:
    """By the fused kernels where these can do it.

    Args:
        dtype: of hidden states.
        picks_rows: as for `StoredHeads`.
    """
    return FusedHeads.make(target, sampler, dtype) or StoredHeads(target, sampler, picks_rows)
