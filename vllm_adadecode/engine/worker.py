"""Workers: where the runner mixin meets vLLM's worker of the platform.

Owns the worker classes that the configuration names (``worker_cls``), and the RPCs they answer.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.gpu_worker import Worker

from vllm_adadecode.adaptive.draft_length import AdaptiveDraftLength
from vllm_adadecode.adaptive.profile import measure_round_costs
from vllm_adadecode.adaptive.ranks import LateFactors
from vllm_adadecode.engine.kv_transfer import hidden_from
from vllm_adadecode.engine.model_runner import AdaDecodeRunnerMixin
from vllm_adadecode.engine.self_check import check
from vllm_adadecode.engine.speculator import AdaDecodeSpeculator
from vllm_adadecode.metrics.counters import Counters
from vllm_adadecode.vllm_patches.config_and_cli import check_not_refused
from vllm_adadecode.vllm_patches.runtime import CPU_RUNNER, SPECULATOR
from vllm_adadecode.vllm_patches.table import apply_on_load

# Under vLLM's logger, whose level and format users know.
logger = init_logger(f"vllm.{__name__}")

# vLLM only logs a plugin that fails to load, and a vLLM that has moved makes it refuse the method;
# a worker that is ours must not start in either case.
apply_on_load()
check_not_refused()
SPECULATOR.apply(AdaDecodeSpeculator)

RoundsResult = TypeVar("RoundsResult")


def _with_mixin(runner_class: type) -> type:
    """vLLM's runner class with ours in front."""
    return type(f"AdaDecode{runner_class.__name__}", (AdaDecodeRunnerMixin, runner_class), {})


class _AdaDecodeWorkerMixin(Worker):
    # The counters at the last reset. They themselves only rise, as Prometheus expects.
    _at_reset: Counters | None = None

    def adadecode_stats(self, reset: bool = False) -> dict[str, Any]:
        """Counts and ratios since start or the last reset (see `counters.Counters.snapshot`)."""
        self.model_runner.speculator.resolve(everything=True)
        counters = self.model_runner.speculator.ledger.counters
        stats = counters if self._at_reset is None else counters - self._at_reset
        if reset:
            self._at_reset = deepcopy(counters)
        return stats.snapshot()

    def compile_or_warm_up_model(self) -> Any:
        # Before vLLM warms up and captures what will run, and again with what was captured.
        self._run_own_rounds(check)
        times = super().compile_or_warm_up_model()
        speculator = self.model_runner.speculator
        ledger, costs = speculator.ledger, None
        if speculator.verification_graphs or speculator.draft_graphs:
            self._run_own_rounds(check)
        if self.vllm_config.speculative_config.cost_aware and ledger.thresholds.num_used_exits:
            costs = self._run_own_rounds(measure_round_costs)
        # As at the end of vLLM's own warm-up: what ran until here must not be seen in samples.
        set_random_seed(
            self.model_config.seed, self.vllm_config.parallel_config.data_parallel_index
        )
        # vLLM's own warm-up runs rounds as well.
        ledger.windows.clear()
        self.model_runner.start_counting()
        if costs is not None:
            ledger.draft_length = AdaptiveDraftLength(
                costs, ledger.max_drafts, ledger.thresholds.num_used_exits, LateFactors()
            )
        if get_tp_group().is_first_rank:
            logger.info(speculator.describe())
        return times

    def _run_own_rounds(self, run: Callable[[Any], RoundsResult]) -> RoundsResult:
        try:
            with hidden_from(self.model_runner.kv_connector):
                return run(self)
        except Exception:
            if self.vllm_config.parallel_config.tensor_parallel_size == 1:
                raise
            # The other ranks wait for this one, and vLLM for the first of them to answer; a worker
            # that has ended it sees at once.
            logger.exception("adadecode could not run rounds of its own")
            raise SystemExit(1) from None

    def sleep(self, level: int = 1) -> None:
        # The KV cache, and with level 2 the weights, that the deferred states belong to go away.
        self.model_runner.speculator.resolve(everything=True)
        self.model_runner.speculator.ledger.windows.clear()
        super().sleep(level)

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        # A weight transfer goes past the runner's `reload_weights`.
        self.model_runner.weights_changed()


class AdaDecodeGPUWorker(_AdaDecodeWorkerMixin):
    """vLLM's GPU worker with the AdaDecode runner."""

    def _make_model_runner(self) -> Any:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        return _with_mixin(GPUModelRunner)(self.vllm_config, self.device)


def make_cpu_worker() -> type:
    """vLLM's CPU worker with the AdaDecode runner (its import only works on a CPU platform)."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    class AdaDecodeCPUWorker(_AdaDecodeWorkerMixin, CPUWorker):
        def init_device(self) -> None:
            super().init_device()
            # Nothing that the mixin has is called while a runner is made.
            CPU_RUNNER.apply_to(self.model_runner, _with_mixin(type(self.model_runner)))

    return AdaDecodeCPUWorker


def __getattr__(name: str) -> Any:
    if name == "AdaDecodeCPUWorker":
        return make_cpu_worker()
    raise AttributeError(name)
