"""The entry points by which vLLM loads the plugin; what they do is the table of patches'."""

from vllm_adadecode.vllm_patches import table


def register() -> None:
    """Make `adadecode` a speculative method of this process (`vllm.general_plugins`).

    vLLM calls it in every process, some of them more than once.
    """
    table.apply_on_load()


def prepare_command() -> None:
    """Names no platform, though it is called when vLLM looks for one (`vllm.platform_plugins`).

    That comes before the `vllm` command looks up its version, `register` only after.
    """
    table.apply_to_command()
