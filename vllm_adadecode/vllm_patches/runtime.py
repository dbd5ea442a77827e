"""What is changed in a worker process, and on the objects of an engine that runs the method.

The replacements are the engine's, which hands them in; so they apply to engines with the method
only, whatever else runs in the process.
"""

import functools
from collections.abc import Callable
from typing import Any

from vllm_adadecode.constants import METHOD
from vllm_adadecode.vllm_patches.patch import Patch, When


def _init_speculator(original: Callable[..., Any], speculator: type) -> Callable[..., Any]:
    @functools.wraps(original)
    def init_speculator(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        is_ours = vllm_config.speculative_config.method == METHOD
        return (speculator if is_ours else original)(vllm_config, *args, **kwargs)

    return init_speculator


SPECULATOR = Patch(
    "speculator",
    "vllm.v1.worker.gpu.model_runner:init_speculator",
    "speculators are made by method name",
    When.WORKER,
    _init_speculator,
)
CPU_RUNNER = Patch(
    "cpu-runner",
    "vllm.v1.worker.cpu.model_runner:CPUModelRunner.__class__",
    "the CPU worker names the class of its runner instead of asking `_make_model_runner`",
    When.INSTANCE,
)
MODEL_FORWARD = Patch(
    "forward",
    "vllm.model_executor.models.interfaces_base:VllmModel.forward",
    "the runner calls the model that it loaded, and that call is where a batch from deferred "
    "states runs as spans; a wrapped model would hide what vLLM asks models for",
    When.INSTANCE,
)
PREPARE_ATTENTION = Patch(
    "attention-metadata",
    "vllm.v1.worker.gpu.model_states.interface:ModelState.prepare_attn",
    "metadata is built for one pass over the whole batch, and an overlapped step runs several, "
    "each of its own tokens",
    When.INSTANCE,
)
CUDAGRAPH_DISPATCH = Patch(
    "cudagraph-dispatch",
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.dispatch",
    "the runner makes its manager by name, and would replay a graph of all layers for a batch "
    "that starts at a depth",
    When.INSTANCE,
)
REJECTION_SAMPLER = Patch(
    "rejection-sampler",
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler.__class__",
    "it gives no log-probabilities of the tokens that a request names, and the runner makes it by "
    "name while it loads the model",
    When.INSTANCE,
)
PATCHES = (
    SPECULATOR,
    CPU_RUNNER,
    MODEL_FORWARD,
    PREPARE_ATTENTION,
    CUDAGRAPH_DISPATCH,
    REJECTION_SAMPLER,
)
