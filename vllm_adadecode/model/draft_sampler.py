"""Probabilistic draft tokens: what a draw from a head's distribution needs, and the draw itself.

Owns the cache of logits that rejection sampling divides by, as far as a round writes it: by vLLM's
sampler from stored logits (`DraftSampler.sample`) or by the fused kernels (fused_head.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample


def draft_columns(num_drafts: int, device: torch.device) -> list[torch.Tensor]:
    """The number of each draft, int64 without dimensions, on the device.

    Each has memory of its own: for an address that is no multiple of 16, as inside of a longer
    tensor, Triton would compile the kernels a second time.
    """
    return [torch.full((), i, dtype=torch.int64, device=device) for i in range(num_drafts)]


@dataclass(frozen=True)
class DraftSampler:
    """How drafts are drawn in one round.

    Attributes:
        temperature: float32 ``[max_num_reqs]`` by request slot.
        seeds: int64 ``[max_num_reqs]`` by request slot.
        logits: ``[max_num_reqs, num_drafts, vocab_size]``, the cache that rejection sampling reads.
            Kernels write the draft vocabulary's columns alone, so the others must hold -inf.
        columns: from `draft_columns`.
        use_fp64: whether the noise is float64, which the fused kernels do not have.
    """

    temperature: torch.Tensor
    seeds: torch.Tensor
    logits: torch.Tensor
    columns: Sequence[torch.Tensor]
    use_fp64: bool

    def column(self, draft: int | torch.Tensor) -> torch.Tensor:
        """The place of a draft's logits in the cache, on the device.

        Args:
            draft: number of the draft in the window; where only the device knows it, int64 without
                dimensions.
        """
        return draft if isinstance(draft, torch.Tensor) else self.columns[draft]

    def sample(
        self,
        # [num_rows, vocab_size] over all tokens
        logits: torch.Tensor,
        # [num_rows] request slot
        slots: torch.Tensor,
        # [num_rows] int64, of the token that the head looked at
        positions: torch.Tensor,
        draft: int | torch.Tensor,
    ) -> torch.Tensor:
        """Token ids int64 ``[num_rows]``, drawn from softmax(logits / temperature).

        Also caches the logits. A row that goes to the next exit overwrites them there; one that
        stops never has them read.

        Args:
            draft: as for `column`.
        """
        return gumbel_sample(
            logits,
            slots,
            self.temperature,
            self.seeds,
            positions,
            apply_temperature=True,
            is_drafting=True,
            logits_cache=self.logits,
            logits_cache_col=self.column(draft),
            use_fp64=self.use_fp64,
        )
