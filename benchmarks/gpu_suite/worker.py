"""What the suite needs inside vLLM's worker, mixed into it by vLLM (`worker_extension_cls`).

Owns the requests `suite_*` of `collective_rpc`: counting what a round waits for, drafts whose
coverage and precision are set, and what became of the engine's options.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu_suite.syncs import RoundCounter
from vllm_adadecode.draft.buffers import LoopBuffers
from vllm_adadecode.draft.device_loop import DeviceLoop
from vllm_adadecode.draft.host_loop import HostLoop
from vllm_adadecode.heads.thresholds import ExitThresholds
from vllm_adadecode.kernels.draft_state import DraftRows


class SuiteWorker:
    """Added to the bases of vLLM's worker class, which must not have attributes of these names."""

    model_runner: Any

    def suite_describe(self) -> dict[str, Any]:
        """How the model runs."""
        config = self.model_runner.compilation_config
        return {
            "cuda_graphs": str(getattr(config.cudagraph_mode, "name", config.cudagraph_mode)),
            "compilation": str(getattr(config.mode, "name", config.mode)),
            "runner": type(self.model_runner).__name__,
        }

    def suite_count_syncs(self, on: bool) -> dict[str, Any] | None:
        """Begin to count in every round, or end and say what was counted."""
        if on:
            vars(self)["_suite_counter"] = RoundCounter(self, self.model_runner.device.type)
            return None
        counter: RoundCounter = vars(self).pop("_suite_counter")
        counter.remove()
        return counter.as_dict()

    def suite_set_drafts(self, coverage: float, precision: float) -> None:
        """Draft with probability ``coverage`` at each exit, accept with ``precision``.

        The engine must have been started with vLLM's synthetic rejection sampling: all passes run,
        and the output is no model's.
        """
        runner = self.model_runner
        speculator = runner.speculator
        speculator.resolve(everything=True)
        is_first = "_suite_thresholds" not in vars(self)
        real = vars(self).setdefault("_suite_thresholds", speculator.ledger.thresholds)
        speculator.ledger.thresholds = covering(real, coverage)
        if is_first:
            follow_noise()
            if speculator.draft_graphs is not None:
                # They hold the real gates and confidences.
                speculator.init_cudagraph_manager(runner.compilation_config.cudagraph_mode)
                speculator.capture()
        # Of a draft whose predecessors were accepted; see vLLM's rejection sampler.
        runner.rejection_sampler.synthetic_conditional_rates.fill_(precision)


def covering(real: ExitThresholds, coverage: float) -> ExitThresholds:
    """Thresholds that `noise` exceeds with that probability, at every exit that is used.

    Heads run and give the tokens; no gate keeps them from it, and their confidence is ignored.
    """
    exits = range(len(real.confidence))
    return ExitThresholds(
        tuple(1.0 - coverage if real.uses(e) else None for e in exits), (None,) * len(exits)
    )


def noise(rows: DraftRows, exit_index: int) -> torch.Tensor:
    """Float32 ``[num_rows]`` in [0, 1), by request, position and exit: no generator is asked."""
    x = (rows.first_pos + rows.num_drafts) * 0x9E3779B1 + rows.slots * 0x85EBCA6B
    x = x + (exit_index + 1) * 0xC2B2AE35
    for multiplier in (0x7FEB352D, 0x846CA68B):
        x = x & 0xFFFFFFFF
        x = (x ^ (x >> 16)) * multiplier
    x = x & 0xFFFFFFFF
    return ((x ^ (x >> 16)) & 0xFFFFFF).to(torch.float32) / 2**24


def follow_noise() -> None:
    """From now on, have the draft loops compare noise with thresholds, not confidences."""
    accept, confident = DeviceLoop.accept, HostLoop._confident

    def accept_noise(
        self: DeviceLoop, buffers: LoopBuffers, token: Any, p: Any, live: Any, exit_index: int
    ) -> None:
        accept(self, buffers, token, noise(buffers.rows, exit_index), live, exit_index)

    def confident_instead(self: HostLoop, exit_index: int, p: torch.Tensor) -> torch.Tensor:
        return confident(self, exit_index, torch.rand_like(p))

    DeviceLoop.accept = accept_noise  # type: ignore[method-assign]
    HostLoop._confident = confident_instead  # type: ignore[method-assign]
