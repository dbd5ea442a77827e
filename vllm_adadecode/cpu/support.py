"""Which configurations Model Runner V2 serves on a CPU; vLLM's V1 runner keeps the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def unsupported_features(vllm_config: VllmConfig) -> list[str]:
    """What of a configuration needs kernels that have no CPU twin, in words for a log line."""
    unsupported = []
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method != "adadecode":
        unsupported.append(f"speculative method '{speculative.method}'")
    if vllm_config.lora_config is not None:
        unsupported.append("LoRA")
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
