"""The steps of the draft loop as captured CUDA graphs.

Owns what is captured and its replay: a graph for each exit, number of rows and most tokens of a
row, after which the host polls whether another one is to run. vLLM's manager captures them: in its
pool, counted by its memory profiling, before the first request.

Which draft a step tries is on the device, so that one graph serves several: a window that is
shorter than the step was captured for is padded.

All that a step reads or leaves is in buffers that are made before (buffers.py, deferred states, KV
cache). Thresholds are among them, so that they are no constants of a graph; which exits and gates
are used is one, and with others a round runs without graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.math_utils import next_power_of_2
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_adadecode.draft.buffers import padded_size
from vllm_adadecode.draft.device_loop import DeviceLoop, Steps
from vllm_adadecode.draft.head_evaluation import Heads
from vllm_adadecode.heads.thresholds import ExitThresholds

# Larger batches draft without graphs, if at all: there the passes, not their launches, take time.
MOST_ROWS = 32


@dataclass(frozen=True)
class StepDescriptor(BatchExecutionDescriptor):
    """A step: ``num_reqs`` rows of at most so many tokens each, at this exit."""

    row_tokens: int = 1
    exit_index: int = 0


def used_heads(thresholds: ExitThresholds) -> tuple[tuple[bool, bool], ...]:
    """What of them decides on the operations of a step: whether there is a head and a gate."""
    exits = range(thresholds.num_used_exits)
    return tuple((thresholds.uses(e), thresholds.uses_gate(e)) for e in exits)


class DraftGraphs(CudaGraphManager):
    """Captured steps of one draft loop.

    Args:
        loop: whose they are.
        thresholds: with the exits and gates that are captured.
        max_drafts: K.
        heads: of the steps; must leave all that is read on the device.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        loop: DeviceLoop,
        thresholds: ExitThresholds,
        max_drafts: int,
        heads: Heads,
    ) -> None:
        self.loop, self.thresholds, self.heads = loop, thresholds, heads
        self.max_drafts = max_drafts
        self.shape = used_heads(thresholds)
        super().__init__(
            vllm_config, device, CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len=1 + max_drafts
        )

    def _init_candidates(self) -> None:
        most = self.loop.max_num_rows
        sizes = {padded_size(n, most) for n in range(1, 1 + min(most, MOST_ROWS))}
        descs: list[BatchExecutionDescriptor] = []
        # The largest first: the others fit into its memory.
        for num_rows in sorted(sizes, reverse=True) if self.shape else ():
            # The same ones come again.
            descs += dict.fromkeys(
                self._step(num_rows, offset, exit_index)
                for offset in reversed(range(self.max_drafts))
                for exit_index in range(len(self.shape))
            )
        if descs:
            self._capture_descs[CUDAGraphMode.FULL] = descs

    def _step(self, num_rows: int, offset: int, exit_index: int) -> StepDescriptor:
        """The step that tries to predict the token after window offset ``offset``."""
        # Only the newest token of a row has not been through span 0.
        row_tokens = 1
        if exit_index > 0:
            row_tokens = min(int(next_power_of_2(1 + offset)), self.max_drafts)
        return StepDescriptor(
            CUDAGraphMode.FULL,
            num_rows * row_tokens,
            num_rows,
            row_tokens=row_tokens,
            exit_index=exit_index,
        )

    def capture_all(self) -> None:
        """Capture all of them; between rounds only."""

        def create_forward(
            desc: BatchExecutionDescriptor, warmup: bool
        ) -> Callable[[CUDAGraphMode], None]:
            assert isinstance(desc, StepDescriptor)
            assert desc.num_reqs is not None
            buffers = self.loop.idle(desc.num_reqs, self.thresholds)
            steps = Steps(self.loop, buffers, self.thresholds, self.heads)
            return lambda _: steps.run_step(desc.row_tokens, desc.exit_index)

        self.capture(create_forward, "Capturing drafting")

    def fits(self, thresholds: ExitThresholds) -> bool:
        """Whether the steps have the heads and gates that these use."""
        return self._graphs_captured and used_heads(thresholds) == self.shape

    def replay_step(self, num_rows: int, offset: int, exit_index: int) -> bool:
        """Run a step; False if it is not captured."""
        desc = self._step(num_rows, offset, exit_index)
        if desc not in self.graphs:
            return False
        self.run_fullgraph(desc)
        return True
