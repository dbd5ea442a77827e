"""Head checks by the fused kernels: gate, head and draw in a row, nothing read by the host.

Owns what is launched for one head check where kernels run. Elsewhere, and where they can't do what
is asked, the draft loop takes the way over stored logits, which gives the same. Nothing is decided
here: which rows pass the gate is the policy's word, as is what follows from a confidence.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm

from vllm_adadecode.draft.policy import PassesGate
from vllm_adadecode.draft.sampling import DraftSampler
from vllm_adadecode.heads import EarlyHead
from vllm_adadecode.heads.head import Transform
from vllm_adadecode.kernels.gate import MAX_ORDERED_ROWS, head_input, live_first
from vllm_adadecode.kernels.sampling import head_sample

if TYPE_CHECKING:
    from vllm_adadecode.model.target import StagedTarget


@dataclass(frozen=True)
class HeadCheck:
    """What a head says about each row.

    Attributes:
        token: int64 ``[num_rows]``, the most likely token, or one drawn.
        p: float32 ``[num_rows]``, probability of the most likely token.
        live: bool ``[num_rows]``, rows that passed the gate; the other rows of ``token`` and ``p``
            say nothing. None: no gate was asked.
    """

    token: torch.Tensor
    p: torch.Tensor
    live: torch.Tensor | None


class FusedHeads:
    """The heads of a staged target, by the fused kernels.

    Args:
        staged: the target; its projection runs kernels (`HeadProjection.kernel_weight`).
        draws: for probabilistic drafts; None for the most likely token.
    """

    def __init__(self, staged: "StagedTarget", draws: DraftSampler | None) -> None:
        self.staged = staged
        self.draws = draws

    @classmethod
    def make(
        cls, staged: "StagedTarget", draws: DraftSampler | None, dtype: torch.dtype
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
        if draws is not None and (draws.use_fp64 or projection.num_ranks() > 1):
            return None
        return cls(staged, draws)

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
        passes_gate: PassesGate | None,
    ) -> HeadCheck:
        """Gate and head of every row; rows that fail the gate never load the LM head.

        Args:
            draft: number of the draft in the window, as for `DraftSampler.column`.
            passes_gate: None to leave the gate out.
        """
        head: EarlyHead = self.staged.head(exit_index)
        x, gate = fused_features(head, hidden, residual, self.staged.inner.norm, passes_gate)
        live: torch.Tensor | None = None
        rows: dict[str, Any] = {}
        if passes_gate is not None:
            assert gate is not None
            live = passes_gate(gate)
            # So many rows leave no tile of the LM head without a live one.
            if len(live) <= MAX_ORDERED_ROWS:
                # The policy has held the gate against its threshold: 1 passes, 0 does not.
                rows["order"], rows["num_live"] = live_first(live.float(), 0.5)
        other = head.other_logit(x)
        projection = self.staged.projection
        if self.draws is None:
            token, p = projection.top1(x, other, **rows)
            return HeadCheck(token, p, live)
        weight = projection.kernel_weight(x.dtype)
        assert weight is not None, "the projection does not run kernels"
        # A row that is promoted overwrites its logits at its next head; those of one that stops
        # are never read. The threshold is the policy's: it looks at p.
        drawn = head_sample(
            x,
            weight,
            0.0,
            slots,
            positions,
            self.draws.temperature,
            self.draws.seeds,
            logits_cache=self.draws.logits,
            logits_cache_col=self.draws.column(draft),
            other=other,
            **rows,
        )
        return HeadCheck(drawn.sampled, drawn.head.p, live)

    def rehearse(
        self,
        exit_index: int,
        # [num_rows, hidden_size]
        hidden: torch.Tensor,
        # [num_rows, hidden_size]
        residual: torch.Tensor,
        passes_gate: PassesGate | None,
    ) -> None:
        """The launches of `check`, for rows that belong to no request; nothing is cached."""
        padding = torch.full((len(hidden),), -1, dtype=torch.int64, device=hidden.device)
        self.check(
            exit_index,
            hidden,
            residual,
            slots=padding,
            positions=torch.zeros_like(padding),
            draft=0,
            passes_gate=passes_gate,
        )


def fused_features(
    head: EarlyHead,
    # [num_rows, hidden_size]
    hidden: torch.Tensor,
    # [num_rows, hidden_size]
    residual: torch.Tensor,
    norm: nn.Module,
    passes_gate: PassesGate | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`EarlyHead.features` and the gate's probability, with as much as possible in one launch.

    Args:
        norm: the target's final norm. It is fused if nothing comes between the sum and it, and it
            is vLLM's RMSNorm and no other platform's or model's.
        passes_gate: None to leave the gate out.

    Returns:
        ``x`` ``[num_rows, hidden_size]`` and float32 ``[num_rows]`` or None. The inputs are left.
    """
    parts: dict[str, Any] = {}
    if passes_gate is not None:
        assert head.gate_weight is not None, "the policy asks for a gate that the heads do not have"
        parts = {"gate_weight": head.gate_weight, "gate_bias": head.gate_bias}
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
