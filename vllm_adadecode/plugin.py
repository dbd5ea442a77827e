"""Entry points of the plugin; `register` (`vllm.general_plugins`) runs in every process of vLLM.

Owns when patches are applied. Re-entrant. On an unsupported vLLM, or one that has moved what is
patched, the method is refused and vLLM without it goes on working.
"""

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.versions import SUPPORTED_VLLM, is_supported, vllm_version
from vllm_adadecode.vllm_patches import config_and_cli as patches


def register() -> None:
    """Make `adadecode` a speculative method of the vLLM in this process."""
    version = vllm_version()
    if not is_supported(version):
        patches.refuse_method(
            AdaDecodeError(
                f"adadecode supports vLLM {SUPPORTED_VLLM}, this is {version}: install a "
                "supported version, or a newer vllm-adadecode"
            )
        )
        return
    from vllm_adadecode.cpu import enable_model_runner_v2
    from vllm_adadecode.heads import speculators
    from vllm_adadecode.vllm_patches.scheduler_and_metrics import apply_scheduler_patches

    try:
        patches.apply_config_patches()
        apply_scheduler_patches()
        speculators.register()
        enable_model_runner_v2()
    except AdaDecodeError as error:
        # Raised here, it would stop every start of vLLM, with or without the method.
        patches.refuse_method(error)
    except (ImportError, AttributeError) as error:
        reason = f"adadecode does not fit this vLLM ({version}): {error}".splitlines()[0]
        patches.refuse_method(AdaDecodeError(f"{reason}; install another of {SUPPORTED_VLLM}"))


def prepare_command() -> None:
    """Names no platform, though it is called when vLLM looks for one (`vllm.platform_plugins`).

    That comes before the `vllm` command looks up its version, `register` only after.
    """
    patches.apply_command_patches()
