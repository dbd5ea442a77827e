"""What a round drafts with, from the moment the target is loaded.

Owns how heads and their sampler are put together for a round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.v1.worker.gpu.states import RequestState

from vllm_adadecode.draft.head_evaluation import Heads, make_heads
from vllm_adadecode.engine.ledger import RoundLedger
from vllm_adadecode.kernels.deferred import DeferredStates
from vllm_adadecode.model.draft_sampler import DraftSampler
from vllm_adadecode.model.target import StagedTarget

# Under vLLM's logger, whose level and format users know.
logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True)
class DraftContext:
    """Collaborators of the rounds of either loop.

    Attributes:
        req_states: vLLM's.
        temperature, seeds: float32 and int64 ``[max_num_reqs]`` by request slot, where the device's
            loop reads them.
        draft_logits: the cache that rejection sampling reads; None for draft method `greedy`.
        draft_columns: from `draft_columns`.
        use_fp64: whether sampling noise is float64.
        dtype: of hidden states.
        faults: found at the start, with what was given up for each; a line each.
    """

    vllm_config: VllmConfig
    target: StagedTarget
    deferred: DeferredStates
    ledger: RoundLedger
    req_states: RequestState
    temperature: torch.Tensor
    seeds: torch.Tensor
    draft_logits: torch.Tensor | None
    draft_columns: Sequence[torch.Tensor]
    use_fp64: bool
    dtype: torch.dtype
    faults: list[str] = field(default_factory=list)

    def fall_back(self, fault: str) -> None:
        """Say so, once. The same on every tensor-parallel rank."""
        if fault not in self.faults and get_tp_group().is_first_rank:
            logger.warning("AdaDecode falls back: %s", fault)
        self.faults.append(fault)

    def host_heads(self, temperature: torch.Tensor, seeds: torch.Tensor) -> Heads:
        """For the host's loop, which may read what passes a gate."""
        return make_heads(self.target, self._sampler(temperature, seeds), self.dtype, True)

    def device_heads(self) -> Heads:
        """For the device's loop: nothing is read by the host."""
        sampler = self._sampler(self.temperature, self.seeds)
        return make_heads(self.target, sampler, self.dtype, False)

    def _sampler(self, temperature: torch.Tensor, seeds: torch.Tensor) -> DraftSampler | None:
        if self.draft_logits is None:
            return None
        return DraftSampler(
            temperature, seeds, self.draft_logits, self.draft_columns, self.use_fp64
        )

    def no_drafts(self, num_reqs: int) -> torch.Tensor:
        """What `propose` gives vLLM in a round whose draft tokens it is not to know."""
        shape = num_reqs, self.ledger.max_drafts
        return torch.zeros(shape, dtype=torch.int64, device=self.temperature.device)
