"""Which of vLLM's engine options the method was tested with: the others are refused.

Owns the table. An option is looked at where the user sets it, as a field of `EngineArgs`; what is
off, or left at its default, is never refused, so no vLLM's options need a list of their own.
"""

from dataclasses import MISSING, Field, fields
from typing import Any

from vllm_adadecode.errors import AdaDecodeError

# With engines, by themselves or as what they stand for; or checked where the value is known.
TESTED = """
    async_scheduling block_size compilation_config cudagraph_capture_sizes
    disable_custom_all_reduce dtype enable_chunked_prefill enable_prefix_caching
    enable_prompt_embeds enable_sleep_mode enforce_eager gpu_memory_utilization
    kv_cache_memory_bytes kv_offloading_size kv_transfer_config logprobs_mode
    long_prefill_token_threshold max_cudagraph_capture_size max_logprobs max_model_len
    max_num_batched_tokens max_num_seqs num_gpu_blocks_override optimization_level quantization
    quantization_config runner scheduling_policy seed spec_method spec_model spec_tokens
    speculative_config structured_outputs_config tensor_parallel_size use_fp64_gumbel
    weight_transfer_config worker_extension_cls
"""
# How the target, its tokenizer and its defaults are found and read; what requests are accepted;
# which kernels compute the target's own layers; logs, metrics and profiles; multimodal inputs,
# which no model of ours has. The method has no part in any of it.
NOT_CONCERNED = """
    _api_process_count _api_process_rank aggregate_engine_logging allow_deprecated_quantization
    allowed_local_media_path allowed_media_domains attention_backend attention_config code_revision
    config_format convert cpu_distributed_timeout_seconds custom_histogram_buckets device_ids
    disable_cascade_attn disable_chunked_mm_input disable_hybrid_kv_cache_manager disable_log_stats
    disable_sliding_window distributed_timeout_seconds download_dir enable_flashinfer_autotune
    enable_log_requests enable_logging_iteration_details fail_on_environ_validation
    generation_config hf_config_path hf_overrides hf_token ignore_patterns ir_op_priority
    jit_monitor_mode jit_monitor_verbose kernel_config kv_cache_metrics kv_cache_metrics_sample
    language_model_only limit_mm_per_prompt linear_backend load_format log_config_file log_level
    logging_config max_num_active_seqs max_num_queued_reqs max_num_queued_tokens
    max_parallel_loading_workers mm_processor_cache_gb mm_processor_kwargs model
    model_loader_extra_config model_weights moe_backend numa_bind numa_bind_cpus numa_bind_nodes
    otlp_traces_endpoint override_generation_config performance_mode prefix_caching_hash_algo
    profiler_config pt_load_map_location reasoning_parser reasoning_parser_plugin
    renderer_num_workers revision safetensors_load_strategy safetensors_prefetch_block_size
    safetensors_prefetch_num_threads scheduler_reserve_full_isl served_model_name
    show_hidden_metrics_for_version shutdown_timeout skip_mm_profiling skip_tokenizer_init
    stream_interval tokenizer tokenizer_mode tokenizer_revision tokens_only trust_remote_code
    use_tqdm_on_load watermark
"""
# Options with values that were tested, and others that were not.
TESTED_VALUES: dict[str, tuple[Any, ...]] = {
    "distributed_executor_backend": ("mp", "uni"),
    "kv_cache_dtype": ("bfloat16", "float16", "fp8", "fp8_e4m3"),
    "model_impl": ("vllm",),
}
ALLOWED = frozenset((TESTED + NOT_CONCERNED).split())


def check_engine_args(engine_args: Any) -> None:
    """Refuse options that the method was not tested with.

    Args:
        engine_args: vLLM's `EngineArgs`.

    Raises:
        AdaDecodeError: one line with the options as the command line has them.
    """
    flags = [
        _flag(field.name, value)
        for field in fields(engine_args)
        if field.name not in ALLOWED
        and (value := getattr(engine_args, field.name))
        and value != _default(field)
        and value not in TESTED_VALUES.get(field.name, ())
    ]
    if flags:
        raise AdaDecodeError(
            f"adadecode was not tested with {', '.join(flags)}: leave that out, or the method"
        )


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _flag(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True or not isinstance(value, int | float | str) else f"{flag} {value}"
