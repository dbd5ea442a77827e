"""Model Runner V2 on a machine without a GPU, and without Triton.

vLLM's Model Runner V2 writes its bookkeeping as Triton kernels. This package holds a *replacement*
of each such kernel in NumPy and torch, one file for each vLLM module that it serves:

==================== =============================================================================
``registry``         the table of replacements
``memory``           views on the memory that kernels are handed
``tokens``           helpers on bit masks and token sequences
``input_batch``      inputs of a step, bookkeeping after it
``buffer_utils``     staged writes into request state
``block_table``      paged KV cache: tables, slots
``penalties``        repetition, frequency and presence penalties
``constraints``      min-p, logit bias, allowed and stop tokens, bad words, grammars
``thinking_budget``  an end forced on long reasoning
``gumbel``           temperature, sampling
``outputs``          log-probabilities, ranks, masks
``rejection``        verification of drafts
==================== =============================================================================

``enable_model_runner_v2`` makes vLLM choose that runner on a CPU; ``support`` says for which
configurations, and ``install`` puts the replacements in place in the worker process. What is
changed in vLLM to that end stands in ``vllm_adadecode/vllm_patches/cpu_runner.py``.

This module imports nothing of vLLM, so that the plugin's entry point can import it in any process.
"""

from __future__ import annotations


def enable_model_runner_v2() -> None:
    """Let vLLM choose Model Runner V2 on a CPU. Call it in every process, as often as you like.

    Does nothing where vLLM's platform is not the CPU, where a Triton that runs on the CPU is
    installed (vLLM then needs no help), or where the user asked for the V1 runner by
    ``VLLM_USE_V2_MODEL_RUNNER=0``.
    """
    import vllm.envs as envs
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if not current_platform.is_cpu() or HAS_TRITON or envs.VLLM_USE_V2_MODEL_RUNNER is False:
        return

    from vllm_adadecode.vllm_patches.cpu_runner import CPU_PATCHES

    for patch in CPU_PATCHES:
        patch.apply()
