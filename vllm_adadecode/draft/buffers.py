"""The buffers of the draft loop on the device, made once for the largest batch.

Owns their memory and the sizes that batches are padded to. A smaller batch uses the beginning of
the same memory, so the addresses are the same in all rounds.
"""

from dataclasses import dataclass

import torch
from vllm.utils.math_utils import cdiv, next_power_of_2

from vllm_adadecode.kernels.deferred import DeferredStates
from vllm_adadecode.kernels.draft_state import DraftRows, PassInputs, RoundStatus

# Batches above the first are padded to a multiple of the second, smaller ones to a power of two.
POWERS_UP_TO, SIZE_STEP = 32, 8


def padded_size(num_reqs: int, max_num_reqs: int) -> int:
    """Rows that a round of ``num_reqs`` requests has."""
    if num_reqs <= POWERS_UP_TO:
        return min(int(next_power_of_2(num_reqs)), max_num_reqs)
    return min(cdiv(num_reqs, SIZE_STEP) * SIZE_STEP, max_num_reqs)


def pass_states(deferred: DeferredStates) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden, residual) of the largest pass: all windows.

    Apart from the other buffers, beside which they are large: they are made where vLLM's memory
    profiling sees them.
    """
    shape = (-1, deferred.hidden.shape[2])
    hidden, residual = torch.zeros_like(deferred.hidden), torch.zeros_like(deferred.residual)
    return hidden.view(shape), residual.view(shape)


@dataclass
class LoopBuffers:
    """Everything that a round writes but KV and deferred states, for one padded batch size.

    Attributes:
        rows: the windows.
        inputs: of the pass that runs.
        hidden, residual: ``[num_rows * window, hidden_size]``, of a pass after the first span.
        token: int64 ``[num_rows]``, prediction of the head that was just evaluated.
        confident: bool ``[num_rows]``, rows that accept it.
        heads_evaluated, head_batches, span_passes: int64 ``[num_exits]``, of the round, as in
            `ExitCounts`.
        status: what is left to do.
        accept_above, gate_above: float32 ``[num_exits]``, the numbers of `ExitThresholds`; of no
            meaning at exits without.
    """

    rows: DraftRows
    inputs: PassInputs
    hidden: torch.Tensor
    residual: torch.Tensor
    token: torch.Tensor
    confident: torch.Tensor
    heads_evaluated: torch.Tensor
    head_batches: torch.Tensor
    span_passes: torch.Tensor
    status: RoundStatus
    accept_above: torch.Tensor
    gate_above: torch.Tensor

    @staticmethod
    def empty(
        num_rows: int,
        max_drafts: int,
        num_exits: int,
        num_kv_groups: int,
        states: tuple[torch.Tensor, torch.Tensor],
    ) -> "LoopBuffers":
        """For as many rows and exits as there may ever be.

        Args:
            states: ``hidden`` and ``residual``, from `pass_states`.
        """
        hidden, residual = states
        window, device = 1 + max_drafts, hidden.device
        counts = torch.zeros(num_exits, dtype=torch.int64, device=device)
        return LoopBuffers(
            rows=DraftRows.empty(num_rows, max_drafts, num_exits, device),
            inputs=PassInputs.empty(num_rows, window, num_kv_groups, device),
            hidden=hidden,
            residual=residual,
            token=counts.new_zeros(num_rows),
            confident=torch.zeros(num_rows, dtype=torch.bool, device=device),
            heads_evaluated=counts,
            head_batches=torch.zeros_like(counts),
            span_passes=torch.zeros_like(counts),
            status=RoundStatus.empty(num_exits, device),
            accept_above=torch.zeros_like(counts, dtype=torch.float32),
            gate_above=torch.zeros_like(counts, dtype=torch.float32),
        )

    def first(self, num_rows: int, num_exits: int) -> "LoopBuffers":
        """The same memory with so many rows and exits."""
        window = self.rows.tokens.shape[1]
        return LoopBuffers(
            rows=self.rows.first(num_rows, num_exits),
            inputs=self.inputs.first(num_rows, window),
            hidden=self.hidden[: num_rows * window],
            residual=self.residual[: num_rows * window],
            token=self.token[:num_rows],
            confident=self.confident[:num_rows],
            heads_evaluated=self.heads_evaluated[:num_exits],
            head_batches=self.head_batches[:num_exits],
            span_passes=self.span_passes[:num_exits],
            status=self.status,
            accept_above=self.accept_above[:num_exits],
            gate_above=self.gate_above[:num_exits],
        )
