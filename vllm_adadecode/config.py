"""The speculative configuration of the method, and every check made before an engine starts.

Owns `AdaDecodeSpeculativeConfig` and `build_config`, which turns what the user wrote into one. All
checks that need no weights are here, so that a mistake is one line in the front-end process.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ValidationError
from vllm import envs
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
from vllm.config.speculative import SpeculativeMethod
from vllm.config.utils import config
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.hashing import safe_hash
from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

from vllm_adadecode.constants import METHOD
from vllm_adadecode.errors import AdaDecodeError, one_line
from vllm_adadecode.heads import HeadsConfig, check_fits, check_weights, find_heads
from vllm_adadecode.heads.config import is_heads_folder
from vllm_adadecode.heads.hub import HubOptions, commit_of
from vllm_adadecode.model.target import check_architectures
from vllm_adadecode.versions import SUPPORTED_VLLM, is_newer, vllm_version

# Under vLLM's logger, whose level and format users know.
logger = init_logger(f"vllm.{__name__}")

# vLLM's own options that mean for this method what they mean for others.
PASSED_ON = frozenset(
    {
        "revision",
        "draft_sample_method",
        "rejection_sample_method",
        "synthetic_acceptance_rates",
        "synthetic_acceptance_length",
        "num_speculative_tokens_per_batch_size",
    }
)
# What a user may set; everything else of vLLM's speculative options belongs to other methods.
USER_OPTIONS = PASSED_ON | {
    "method",
    "model",
    "num_speculative_tokens",
    "confidence_threshold",
    "gate_threshold",
    "exit_layers",
    "cost_aware",
    "draft_loop",
}
# KV connectors that were tried. Another one may take what is generated layer by layer as a batch
# runs, and a verification leaves layers out.
KV_CONNECTORS = ("ExampleConnector", "OffloadingConnector")


@config
class AdaDecodeSpeculativeConfig(SpeculativeConfig):
    """vLLM's speculative configuration with the method's own fields, all resolved."""

    method: SpeculativeMethod | Literal["adadecode"] | None = None
    confidence_threshold: list[float] | None = None
    """Gamma per exit layer, in [0, 1]; 1 turns an exit off."""
    gate_threshold: list[float] | None = None
    """Per exit layer, in [0, 1]; None for heads without a gate."""
    exit_layers: list[int] | None = None
    """Layers after which the heads sit, strictly increasing."""
    cost_aware: bool = True
    """Whether the number of drafts of a round follows what rounds cost, measured at start."""
    draft_loop: Literal["auto", "host", "device"] = "auto"
    """Who drives the draft loop; see `resolve_draft_loop`."""
    heads_path: str | None = None
    """Folder of the heads checkpoint; None for the training-free logit lens."""

    def __post_init__(self) -> Self | None:
        # The drafter is the target: every consumer of the draft's configuration sees the target's.
        self.draft_model_config = self.target_model_config
        self.draft_parallel_config = self.target_parallel_config
        self.prompt_lookup_max = self.prompt_lookup_min = 0
        return self

    def __repr__(self) -> str:
        return (
            f"AdaDecodeSpeculativeConfig(heads={self.heads_path or 'logit lens'}, "
            f"num_speculative_tokens={self.num_speculative_tokens}, "
            f"exit_layers={self.exit_layers}, confidence_threshold={self.confidence_threshold}, "
            f"gate_threshold={self.gate_threshold}, "
            f"draft_sample_method={self.draft_sample_method!r})"
        )

    __str__ = __repr__

    def compute_hash(self) -> str:
        # Also what decides on memory beside the KV cache: vLLM keeps its size under this hash.
        factors = [super().compute_hash(), self.method, self.exit_layers]
        factors += [self.num_speculative_tokens, self.draft_loop, self.heads_path]
        return safe_hash(str(factors).encode(), usedforsecurity=False).hexdigest()


def build_config(
    options: Mapping[str, Any],
    model_config: ModelConfig,
    parallel_config: ParallelConfig,
    *,
    download_dir: str | None = None,
) -> AdaDecodeSpeculativeConfig:
    """Check the user's options against the target and resolve them.

    Args:
        options: the ``speculative_config`` mapping, method included.
        model_config, parallel_config: the target's.
        download_dir: where the target's weights, and heads, are downloaded to; None: the hub's
            usual cache.

    Raises:
        AdaDecodeError: one line that says what is wrong and what to do.
    """
    unknown = sorted(set(options) - USER_OPTIONS)
    if unknown:
        raise AdaDecodeError(
            f"speculative_config has unknown options for adadecode: {', '.join(unknown)}; "
            f"known: {', '.join(sorted(USER_OPTIONS))}"
        )
    _check_engine(model_config, parallel_config)
    hub_options = HubOptions.of_target(model_config, download_dir)
    heads, heads_path = _load_heads(options, model_config, hub_options)
    if (exit_layers := options.get("exit_layers")) is not None:
        heads = _select_exits(heads, exit_layers)
    fields = {
        "method": METHOD,
        # As named: workers on other machines look there.
        "model": options.get("model") or model_config.model,
        "num_speculative_tokens": _num_speculative_tokens(
            options.get("num_speculative_tokens"), heads
        ),
        "exit_layers": list(heads.exit_layers),
        "confidence_threshold": _thresholds(
            "confidence_threshold", options.get("confidence_threshold"), heads, heads.thresholds
        ),
        "gate_threshold": _gate_thresholds(options.get("gate_threshold"), heads),
        "heads_path": heads_path,
        "target_model_config": model_config,
        "target_parallel_config": parallel_config,
    }
    if (cost_aware := options.get("cost_aware")) is not None:
        if not isinstance(cost_aware, bool):
            raise AdaDecodeError(f"cost_aware must be true or false, not {cost_aware!r}")
        fields["cost_aware"] = cost_aware
    fields["draft_loop"] = _draft_loop(options.get("draft_loop"))
    if options.get("rejection_sample_method") == "fly":
        raise AdaDecodeError(
            "adadecode is lossless, which rejection_sample_method 'fly' is not: use 'standard' or "
            "'block'"
        )
    fields |= {name: options[name] for name in PASSED_ON & set(options)}
    if options.get("model") and heads_path and (commit := commit_of(Path(heads_path))):
        fields["revision"] = commit
    try:
        if (schedule := options.get("num_speculative_tokens_per_batch_size")) is not None:
            # vLLM itself looks at it in the scheduler only.
            validate_and_normalize_dynamic_sd_schedule(schedule)
        return AdaDecodeSpeculativeConfig(**fields)
    except ValidationError as error:
        raise AdaDecodeError(f"speculative_config: {one_line(error)}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise AdaDecodeError(f"speculative_config: {error}") from None


def _check_engine(model_config: ModelConfig, parallel_config: ParallelConfig) -> None:
    """What the method can't be combined with, apart from options (engine_args.py)."""
    if is_newer(version := vllm_version()):
        logger.warning(
            "adadecode was tested with vLLM %s, and this is the newer %s", SUPPORTED_VLLM, version
        )
    # Of the platforms like CUDA, ROCm was never tested.
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        raise AdaDecodeError(
            "adadecode runs on CPUs and on GPUs with CUDA, which "
            f"{current_platform.device_name or 'this platform'!r} is not: drop the method"
        )
    if envs.VLLM_USE_V2_MODEL_RUNNER is False:
        raise AdaDecodeError(
            "adadecode needs Model Runner V2: unset VLLM_USE_V2_MODEL_RUNNER (it is 0)"
        )
    if model_config.is_encoder_decoder:
        raise AdaDecodeError("adadecode serves decoder-only models, this one is encoder-decoder")
    if model_config.is_multimodal_model:
        raise AdaDecodeError("adadecode serves text-only models, this one is multimodal")
    if model_config.runner_type != "generate":
        raise AdaDecodeError("adadecode serves generation, not pooling: drop the method")
    check_architectures(model_config.architectures)
    if model_config.enable_prompt_embeds:
        raise AdaDecodeError(
            "adadecode does not serve prompt embeddings: drop --enable-prompt-embeds or the method"
        )
    if parallel_config.data_parallel_size > 1 and model_config.is_moe:
        raise AdaDecodeError("adadecode does not support data parallelism for MoE models")


def check_runner(vllm_config: VllmConfig) -> None:
    """Refuse a configuration for which vLLM would choose its V1 model runner.

    Raises:
        AdaDecodeError: one line with what the V2 runner lacks.
    """
    if not vllm_config.use_v2_model_runner:
        reasons = vllm_config._get_v2_model_runner_unsupported_features()
        raise AdaDecodeError(
            "adadecode needs Model Runner V2, which does not support "
            f"{', '.join(reasons) or 'this machine'} yet: drop that or the method"
        )


def check_kv_connector(vllm_config: VllmConfig) -> None:
    """Refuse KV connectors that were not tried, and the one that vLLM has for GPUs on a CPU.

    Raises:
        AdaDecodeError: one line with the connector.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return
    if transfer.kv_connector not in KV_CONNECTORS:
        raise AdaDecodeError(
            f"adadecode was not tried with {transfer.kv_connector}: drop it or the method, or use "
            f"one of {', '.join(KV_CONNECTORS)}"
        )
    spec = transfer.get_from_extra_config("spec_name", "CPUOffloadingSpec")
    offloads = transfer.kv_connector == "OffloadingConnector" and spec == "CPUOffloadingSpec"
    if offloads and current_platform.is_cpu():
        raise AdaDecodeError(
            "vLLM offloads KV from GPUs only: drop --kv-offloading-size or OffloadingConnector"
        )


def _load_heads(
    options: Mapping[str, Any], model_config: ModelConfig, hub_options: HubOptions
) -> tuple[HeadsConfig, str | None]:
    """The heads given, else those beside the target, else the logit lens."""
    for name in ("model", "revision"):
        if not isinstance(options.get(name), str | None):
            raise AdaDecodeError(f"{name} must be a string, not {options[name]!r}")
    path = find_heads(
        options.get("model"), model_config.model, options.get("revision"), hub_options
    )
    shape = _shape(model_config)
    if path is None:
        heads = HeadsConfig.logit_lens(**shape, exit_layers=options.get("exit_layers"))
        logger.warning(
            "No heads for %s: adadecode runs training-free with the logit lens, which predicts "
            "less. Train heads with: adadecode train %s",
            model_config.model,
            model_config.model,
        )
        return heads, None
    heads = HeadsConfig.load(path)
    check_fits(heads, **shape, target_path=model_config.model, options=hub_options)
    check_weights(path, heads)
    return heads, str(path)


def _shape(model_config: ModelConfig) -> dict[str, int]:
    return {
        "hidden_size": model_config.get_hidden_size(),
        "vocab_size": model_config.get_vocab_size(),
        "num_hidden_layers": model_config.get_total_num_hidden_layers(),
    }


def heads_of_worker(vllm_config: VllmConfig) -> str | None:
    """The heads' folder on the machine of a worker whose target is loaded, so that its files are
    here; None: the logit lens.

    Raises:
        AdaDecodeError: they are not here and can't be had, or are not for this target.
    """
    spec = vllm_config.speculative_config
    assert isinstance(spec, AdaDecodeSpeculativeConfig)
    if spec.heads_path is None:
        return None
    target = spec.target_model_config
    hub_options = HubOptions.of_target(target, vllm_config.load_config.download_dir)
    path = spec.heads_path
    if not is_heads_folder(path):
        # Found by the front end on another machine.
        named = spec.model if spec.model != target.model else None
        found = find_heads(named, target.model, spec.revision, hub_options)
        if found is None:
            raise AdaDecodeError(
                f"heads {path} are not on the machine of this worker: every machine needs them at "
                "this place, or name a hub repository"
            )
        path = str(found)
    heads = HeadsConfig.load(path)
    shape = _shape(target)
    if not check_fits(heads, **shape, target_path=target.model, options=hub_options):
        logger.warning_once(
            "Nothing tells whether the heads were trained on %s or another model of its shape: "
            "its weights are not read from safetensors files",
            target.model,
        )
    return path


def _select_exits(heads: HeadsConfig, exit_layers: Any) -> HeadsConfig:
    if not isinstance(exit_layers, list | tuple) or not exit_layers:
        raise AdaDecodeError(f"exit_layers must be a list of layer numbers, not {exit_layers!r}")
    return heads.select(exit_layers)


def _num_speculative_tokens(value: Any, heads: HeadsConfig) -> int:
    if value is None:
        return heads.num_speculative_tokens
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdaDecodeError(f"num_speculative_tokens must be a whole number >= 1, not {value!r}")
    if value > heads.max_speculative_tokens:
        raise AdaDecodeError(
            f"num_speculative_tokens is {value}, these heads allow at most "
            f"{heads.max_speculative_tokens}"
        )
    return value


def _draft_loop(value: Any) -> str:
    if value is None:
        return "auto"
    if value not in ("auto", "host", "device"):
        raise AdaDecodeError(f"draft_loop must be 'auto', 'host' or 'device', not {value!r}")
    return str(value)


def check_device_loop(vllm_config: VllmConfig) -> None:
    """Refuse batches that a pass of the draft loop on the device would not fit.

    Raises:
        AdaDecodeError: one line with what would fit.
    """
    spec, scheduler = vllm_config.speculative_config, vllm_config.scheduler_config
    if not isinstance(spec, AdaDecodeSpeculativeConfig) or spec.draft_loop != "device":
        return
    needed = _most_pass_tokens(vllm_config)
    if needed > scheduler.max_num_batched_tokens:
        raise AdaDecodeError(
            f"draft_loop 'device' runs up to {needed} tokens at once (max_num_seqs x "
            "(1 + num_speculative_tokens)): raise --max-num-batched-tokens, which is "
            f"{scheduler.max_num_batched_tokens}, or lower one of these"
        )


def _most_pass_tokens(vllm_config: VllmConfig) -> int:
    return vllm_config.scheduler_config.max_num_seqs * (1 + vllm_config.num_speculative_tokens)


def resolve_draft_loop(vllm_config: VllmConfig, device_type: str) -> tuple[str, str]:
    """Who drives the draft loop, "host" or "device", and why.

    "auto" is the device where reading from it would hold a GPU up and the loop can be on it, the
    host everywhere else.
    """
    spec = vllm_config.speculative_config
    assert isinstance(spec, AdaDecodeSpeculativeConfig)
    if spec.draft_loop != "auto":
        return spec.draft_loop, "as set"
    needed = _most_pass_tokens(vllm_config)
    most = vllm_config.scheduler_config.max_num_batched_tokens
    mode = vllm_config.compilation_config.cudagraph_mode
    if device_type != "cuda":
        return "host", f"nothing to wait for on {device_type}"
    if not mode.has_full_cudagraphs():
        return "host", f"cudagraph_mode {mode.name} captures no full graphs"
    if needed > most:
        return "host", (
            f"max_num_seqs x (1 + num_speculative_tokens) is {needed}, above "
            f"max_num_batched_tokens, which is {most}"
        )
    return "device", "a GPU with full CUDA graphs"


def _thresholds(
    name: str, value: Any, heads: HeadsConfig, default: tuple[float, ...]
) -> list[float]:
    """One number per exit, from one number or one per exit."""
    if value is None:
        return list(default)
    values = list(value) if isinstance(value, list | tuple) else [value] * len(heads.exit_layers)
    if len(values) != len(heads.exit_layers):
        raise AdaDecodeError(
            f"{name} has {len(values)} values for {len(heads.exit_layers)} exit "
            f"layers {list(heads.exit_layers)}: give one number, or one per exit layer"
        )
    for threshold in values:
        if isinstance(threshold, bool) or not isinstance(threshold, int | float):
            raise AdaDecodeError(f"{name} must be a number, not {threshold!r}")
        if not 0.0 <= threshold <= 1.0:
            raise AdaDecodeError(f"{name} must lie in [0, 1], not {threshold}")
    return [float(threshold) for threshold in values]


def _gate_thresholds(value: Any, heads: HeadsConfig) -> list[float] | None:
    if heads.gate_thresholds is None:
        if value is not None:
            raise AdaDecodeError(
                "gate_threshold is for heads with a gate, which these do not have: drop it"
            )
        return None
    return _thresholds("gate_threshold", value, heads, heads.gate_thresholds)
