"""What the suite needs inside vLLM's worker, mixed into it by vLLM (`worker_extension_cls`).

Owns the requests `suite_*` of `collective_rpc`: counting what a round waits for, drafts whose
coverage and precision are set, and what became of the engine's options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_suite.syncs import RoundCounter
from vllm_adadecode.draft.device_loop import Steps
from vllm_adadecode.draft.policy import Action, Cutoffs, DraftPolicy
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
        speculator.settle(everything=True)
        real = policy.real if isinstance(policy := speculator.policy, CoveragePolicy) else policy
        speculator.policy = CoveragePolicy(real, coverage)
        if policy is real and speculator.device_rounds is not None:
            follow_noise()
            if speculator.draft_graphs is not None:
                # They hold the real policy's gates and confidences.
                speculator.init_cudagraph_manager(runner.compilation_config.cudagraph_mode)
                speculator.capture()
        # Of a draft whose predecessors were accepted; see vLLM's rejection sampler.
        runner.rejection_sampler.synthetic_conditional_rates.fill_(precision)


@dataclass(frozen=True)
class CoveragePolicy:
    """At every exit that the real policy uses, a head is followed with the same probability.

    Heads run and give the tokens; no gate keeps them from it, and their confidence is ignored.
    """

    real: DraftPolicy
    coverage: float

    @property
    def num_used_exits(self) -> int:
        return self.real.num_used_exits

    def uses(self, exit_index: int) -> bool:
        return self.real.uses(exit_index)

    def uses_gate(self, exit_index: int) -> bool:
        return False

    def passes_gate(self, exit_index: int, gate: torch.Tensor) -> torch.Tensor:
        raise AssertionError("no gate is used")

    def decide(self, exit_index: int, confidence: torch.Tensor) -> torch.Tensor:
        otherwise = Action.STOP if exit_index + 1 >= self.num_used_exits else Action.PROMOTE
        actions = torch.full_like(confidence, int(otherwise), dtype=torch.int8)
        follow = torch.rand_like(confidence, dtype=torch.float32) < self.coverage
        return actions.masked_fill_(follow, int(Action.EXTEND))

    def cutoffs(self) -> Cutoffs:
        # Of `noise`, with the draft loop on the device.
        exits = range(self.num_used_exits)
        return Cutoffs(tuple(1.0 - self.coverage for _ in exits), tuple(0.0 for _ in exits))


def noise(rows: DraftRows, exit_index: int) -> torch.Tensor:
    """Float32 ``[num_rows]`` in [0, 1), by request, position and exit: no generator is asked.

    PyTorch's can't be in bodies of IF nodes.
    """
    x = (rows.first_pos + rows.num_drafts) * 0x9E3779B1 + rows.slots * 0x85EBCA6B
    x = x + (exit_index + 1) * 0xC2B2AE35
    for multiplier in (0x7FEB352D, 0x846CA68B):
        x = x & 0xFFFFFFFF
        x = (x ^ (x >> 16)) * multiplier
    x = x & 0xFFFFFFFF
    return ((x ^ (x >> 16)) & 0xFFFFFF).to(torch.float32) / 2**24


def follow_noise() -> None:
    """From now on, have the draft loop on the device follow `noise`, not confidences."""
    follow = Steps._follow

    def follow_noise_instead(
        self: Steps, exit_index: int, token: torch.Tensor, p: torch.Tensor, live: Any
    ) -> None:
        follow(self, exit_index, token, noise(self.round_.rows, exit_index), live)

    Steps._follow = follow_noise_instead  # type: ignore[method-assign]
