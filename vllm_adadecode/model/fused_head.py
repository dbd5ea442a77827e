"""Heads by the fused kernels: gate, head and draw in a row, nothing read by the host.

Owns what is launched to evaluate one head where kernels run. Elsewhere, and where they can't do
what is needed, the draft loop takes the way over stored logits, which gives the same. Nothing is
decided here but which rows pass the gate: what follows from a confidence is the draft loop's.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm

from vllm_adadecode.heads import EarlyHead
from vllm_adadecode.heads.head import GATE_NORM_EPS, Transform
from vllm_adadecode.kernels.gate import MAX_ORDERED_ROWS, head_input, live_first
from vllm_adadecode.kernels.sampling import head_sample
from vllm_adadecode.model.draft_sampler import DraftSampler
from vllm_adadecode.model.target import StagedTarget


@dataclass(frozen=True)
class HeadCheck:
    """What a head says about each row.

    Attributes:
        token: int64 ``[num_rows]``, the most likely token, or one drawn.
        p: float32 ``[num_rows]``, probability of the most likely token.
        live: bool ``[num_rows]``, rows whose head was evaluated; the other rows of ``token`` and
            ``p`` have no meaning. None: all.
    """

    token: torch.Tensor
    p: torch.Tensor
    live: torch.Tensor | None


class FusedHeads:
    """The heads of a staged target, by the fused kernels.

    Args:
        staged: the target; its projection runs kernels (`HeadProjection.kernel_weight`).
        sampler: for probabilistic drafts; None for the most likely token.
    """

    def __init__(self, staged: StagedTarget, sampler: DraftSampler | None) -> None:
        self.staged = staged
        self.sampler = sampler

    @classmethod
    def make(
        cls, staged: StagedTarget, sampler: DraftSampler | None, dtype: torch.dtype
    ) -> Self | None:
        """None where kernels do not run, or can't do what is asked.

        The same answer on every tensor-parallel rank.

        Args:
            dtype: of hidden states.
        """
        projection = staged.projection
        if not projection.use_kernels or projection.kernel_weight(dtype) is None:
            return None
        # The noise is float32, and there is none of another rank's tokens.
        if sampler is not None and (sampler.use_fp64 or projection.num_ranks() > 1):
            return None
        return cls(staged, sampler)

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
        """Gate and head of every row; rows that fail the gate never load the LM head.

        Args:
            draft: number of the draft in the window, as for `DraftSampler.column`.
            gate_threshold: rows pass where the gate's probability is above it; None to leave the
                gate out.
            in_pass: other rows count as not having passed the gate.
        """
        head: EarlyHead = self.staged.head(exit_index)
        use_gate = gate_threshold is not None
        x, gate = fused_features(head, hidden, residual, self.staged.inner.norm, use_gate)
        live = in_pass
        rows: dict[str, Any] = {}
        if gate is not None:
            live = gate > gate_threshold
            if in_pass is not None:
                live &= in_pass
            # So many rows leave no tile of the LM head without a live one.
            if len(live) <= MAX_ORDERED_ROWS:
                rows["order"], rows["num_live"] = live_first(live)
        other = head.other_logit(x)
        projection = self.staged.projection
        if self.sampler is None:
            token, p = projection.top1(x, other, **rows)
            return HeadCheck(token, p, live)
        weight = projection.kernel_weight(x.dtype)
        assert weight is not None, "the projection does not run kernels"
        # A row that goes to the next exit overwrites its logits there; those of one that stops are
        # never read. The draft loop compares p with its threshold.
        drawn = head_sample(
            x,
            weight,
            0.0,
            slots,
            positions,
            self.sampler.temperature,
            self.sampler.seeds,
            logits_cache=self.sampler.logits,
            logits_cache_col=self.sampler.column(draft),
            other=other,
            **rows,
        )
        return HeadCheck(drawn.sampled, drawn.head.p, live)


def fused_features(
    head: EarlyHead,
    # [num_rows, hidden_size]
    hidden: torch.Tensor,
    # [num_rows, hidden_size]
    residual: torch.Tensor,
    norm: nn.Module,
    use_gate: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`EarlyHead.features` and the gate's probability, with as much as possible in one launch.

    Args:
        norm: the target's final norm. It is fused if nothing comes between the sum and it, and it
            is vLLM's RMSNorm and no other platform's or model's.
        use_gate: False to leave the gate out.

    Returns:
        ``x`` ``[num_rows, hidden_size]`` and float32 ``[num_rows]`` or None. The inputs are left.
    """
    parts: dict[str, Any] = {}
    if use_gate:
        assert head.gate_weight is not None, "a gate threshold for heads that have no gate"
        parts = {"gate_weight": head.gate_weight, "gate_bias": head.gate_bias}
        parts["gate_eps"] = GATE_NORM_EPS
    # The identity: T has no place.
    norm_is_first = head.norm_placement == "before" or type(head.transform) is Transform
    if norm_is_first and _is_plain(norm):
        parts |= {"norm_weight": norm.weight, "norm_eps": norm.variance_epsilon}
        x, probability = head_input(hidden, residual, **parts)
        return head.transform(x), probability
    x, probability = head_input(hidden, residual, **parts)
    return head.features(x, norm), probability


def _is_plain(norm: nn.Module) -> bool:
    """Whether it is vLLM's own RMSNorm, with a weight and over all of the hidden state."""
    return type(norm) is RMSNorm and norm.has_weight and norm.variance_size_override is None
