"""What the suite needs inside vLLM's worker, mixed into it by vLLM (`worker_extension_cls`).

Owns the requests `suite_*` of `collective_rpc`.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_suite.syncs import StepCounter


class SuiteWorker:
    """Added to the bases of vLLM's worker class, which must not have attributes of these names."""

    model_runner: Any

    def suite_describe(self) -> dict[str, Any]:
        """How the model runs: what the engine has made of its options."""
        config = self.model_runner.vllm_config
        mode = config.compilation_config
        return {
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "cuda_graphs": str(getattr(mode.cudagraph_mode, "name", mode.cudagraph_mode)),
            "compilation": str(getattr(mode.mode, "name", mode.mode)),
            "runner": type(self.model_runner).__name__,
        }

    def suite_count_syncs(self, on: bool) -> dict[str, Any] | None:
        """Begin to count in every step, or end and say what was counted."""
        if on:
            vars(self)["_suite_counter"] = StepCounter(self)
            return None
        counter: StepCounter = vars(self).pop("_suite_counter")
        counter.remove()
        return counter.as_dict()
