"""What is changed in vLLM so that Model Runner V2 runs on a CPU, for the engines that ask for it.

These are engines with the method, and all of a process whose user asked for that runner by
``VLLM_USE_V2_MODEL_RUNNER=1`` (`vllm_adadecode.cpu.support`); any other stays on vLLM's own choice,
V1, and no kernel is replaced in its worker. Also owns where that is needed: on a CPU platform
without a Triton of its own.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.vllm_patches.config_and_cli import refuse_method
from vllm_adadecode.vllm_patches.patch import Patch, When, apply


def _triton_not_needed(original: bool) -> bool:
    return True


def _unsupported_features(original: Callable[[Any], list[str]]) -> Callable[[Any], list[str]]:
    @functools.wraps(original)
    def _get_v2_model_runner_unsupported_features(self: Any) -> list[str]:
        from vllm_adadecode.cpu.support import unsupported_features

        return original(self) + unsupported_features(self)

    return _get_v2_model_runner_unsupported_features


def _register_triton_kernel_overrides(original: Any) -> Any:
    @functools.wraps(original.__func__)
    def register_triton_kernel_overrides(cls: type) -> None:
        original.__func__(cls)
        try:
            CPU_WORKER.apply()
        except AdaDecodeError as error:
            # Raised by our worker when it is loaded; others can go on.
            refuse_method(error)

    return classmethod(register_triton_kernel_overrides)


def _make_ptr_tensor(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _make_ptr_tensor(self: Any, x: Iterable[Any]) -> Any:
        from vllm_adadecode.cpu.memory import note_tables

        tables = list(x)
        note_tables(tables)
        return original(self, tables)

    return _make_ptr_tensor


def _init_worker(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if vllm_config.use_v2_model_runner:
            from vllm_adadecode.cpu.install import install_replacements

            install_replacements()
            apply(PATCHES, When.CPU_RUNNER)
        original(self, vllm_config, *args, **kwargs)

    return __init__


def _with_next_power_of_2(triton: Any) -> Any:
    from vllm.utils.math_utils import next_power_of_2

    if not hasattr(triton, "next_power_of_2"):
        triton.next_power_of_2 = next_power_of_2
    return triton


TABLE_ADDRESSES = Patch(
    "cpu-table-addresses",
    "vllm.v1.worker.gpu.block_table:BlockTables._make_ptr_tensor",
    "kernels are handed block tables as bare addresses, which do not tell how many rows there are",
    When.CPU_RUNNER,
    _make_ptr_tensor,
)
CPU_WORKER = Patch(
    "cpu-worker",
    "vllm.v1.worker.cpu_worker:CPUWorker.__init__",
    "which runner an engine has is known here first; its module is for worker processes only, for "
    "it replaces parts of PyTorch",
    When.CPU_WORKER,
    _init_worker,
)
PATCHES = (
    TABLE_ADDRESSES,
    Patch(
        "cpu-without-triton",
        "vllm.config.vllm:HAS_TRITON",
        "the V2 runner is refused without Triton, which its kernels' replacements make needless; "
        "the module reads the name for nothing else",
        When.CPU,
        _triton_not_needed,
    ),
    Patch(
        "cpu-limits",
        "vllm.config.vllm:VllmConfig._get_v2_model_runner_unsupported_features",
        "engines without the method, and models whose kernels have no replacement, stay on the V1 "
        "runner, as without us",
        When.CPU,
        _unsupported_features,
    ),
    Patch(
        "cpu-replacements",
        "vllm.platforms.cpu:CpuPlatform.register_triton_kernel_overrides",
        "this is vLLM's place to replace kernels, called in a worker process before it makes its "
        "worker; a platform plugin could override it, but would have to stand in for the whole "
        "platform",
        When.CPU,
        _register_triton_kernel_overrides,
    ),
    CPU_WORKER,
    Patch(
        "cpu-worker-without-triton",
        "vllm.v1.worker.gpu_worker:HAS_TRITON",
        "as in the configuration, once more; the module reads the name for nothing else",
        When.CPU_RUNNER,
        _triton_not_needed,
        since="0.33",
    ),
    Patch(
        "cpu-block-sizes",
        "vllm.triton_utils:triton",
        "vLLM's placeholder for a missing Triton has no next_power_of_2, by which the functions "
        "around the kernels choose block sizes",
        When.CPU_RUNNER,
        _with_next_power_of_2,
    ),
)


def is_needed() -> bool:
    """Whether vLLM has to be told that Model Runner V2 runs here.

    Not where the platform is not the CPU, where a Triton that runs on the CPU is installed (vLLM
    then needs no help), nor where the user asked for the V1 runner by
    ``VLLM_USE_V2_MODEL_RUNNER=0``.
    """
    import vllm.envs as envs
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    return (
        current_platform.is_cpu() and not HAS_TRITON and envs.VLLM_USE_V2_MODEL_RUNNER is not False
    )
