"""Which configurations Model Runner V2 serves on a CPU; kernels that therefore need no replacement.

Those with the method, and with ``VLLM_USE_V2_MODEL_RUNNER=1`` those without any. vLLM's V1 runner
keeps the others, as without the plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_adadecode.constants import METHOD

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def unsupported_features(vllm_config: VllmConfig) -> list[str]:
    """What of a configuration that runner does not serve on a CPU, worded for the log."""
    from vllm import envs

    speculative = vllm_config.speculative_config
    method = None if speculative is None else speculative.method
    if method != METHOD and not envs.VLLM_USE_V2_MODEL_RUNNER:
        return ["CPUs without Triton"]
    unsupported = []
    if method not in (None, METHOD):
        unsupported.append(f"speculative method '{method}'")
    elif speculative is not None and speculative.enable_adaptive_verification:
        unsupported.append("adaptive verification")
    if vllm_config.lora_config is not None:
        unsupported.append("LoRA")
    if getattr(vllm_config, "watermark_config", None) is not None:
        unsupported.append("watermarking")
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        unsupported.append("pipeline parallelism")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        unsupported.append("context parallelism")

    model = vllm_config.model_config
    if model is None:
        return unsupported
    if model.runner_type != "generate":
        unsupported.append(f"'{model.runner_type}' models")
    if model.is_encoder_decoder:
        unsupported.append("encoder-decoder models")
    if model.is_multimodal_model:
        unsupported.append("multimodal models")
    if model.is_hybrid or model.is_attention_free:
        unsupported.append("state-space models")
    if model.enable_prompt_embeds:
        unsupported.append("prompt embeddings")
    return unsupported


# Triton kernels below vllm/v1/worker/gpu that have no replacement, by module, and why none is
# needed.
WITHOUT_REPLACEMENT = {
    "cp_utils": "context parallelism",
    "mm.rope": "multimodal models",
    "model_states.mamba_hybrid": "state-space models",
    "model_states.prompt_embeds": "prompt embeddings",
    "model_states.recoverssm": "state-space models",
    "sample.batch_shard": "sampling sharded over the GPUs of a tensor-parallel group",
    "sample.watermark": "watermarking",
    "spec_decode.acceptance_estimator": "adaptive verification of other speculative methods",
    "spec_decode.dflash.speculator": "another speculative method",
    "spec_decode.dflash2.speculator": "another speculative method",
    "spec_decode.multi_module_mtp.speculator": "another speculative method",
    "spec_decode.ngram.speculator": "another speculative method",
    "spec_decode.standalone_ar.speculator": "another speculative method",
    "spec_decode.target_dependent_ar.speculator": "another speculative method",
    "spec_decode.xpress.kernels": "another speculative method, from vLLM 0.33 on",
}
