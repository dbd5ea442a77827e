"""What is changed in vLLM so that counts reach its metrics and log, draft tokens its scheduler.

Each side of vLLM has its rows, applied where its modules are needed anyway: they are heavy, and
worker processes have no use for them.
"""

import functools
from collections.abc import Callable
from typing import Any, get_args

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.vllm_patches.patch import Patch, When


def _update_from_output(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_adadecode.metrics.draft_ids import hand_over
    from vllm_adadecode.metrics.prometheus import pass_on

    @functools.wraps(original)
    def update_from_output(
        self: Any, scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        outputs = original(self, scheduler_output, model_runner_output, *args, **kwargs)
        pass_on(model_runner_output, outputs.values(), self.num_spec_tokens)
        hand_over(self, model_runner_output)
        return outputs

    return update_from_output


def _post_step(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_adadecode.metrics.draft_ids import has_taken

    @functools.wraps(original)
    def post_step(self: Any, model_executed: bool, *args: Any, **kwargs: Any) -> None:
        original(self, model_executed and not has_taken(self.scheduler), *args, **kwargs)

    return post_step


def _annotations(original: dict[str, Any]) -> dict[str, Any]:
    from vllm.v1.spec_decode.metrics import SpecDecodingStats

    from vllm_adadecode.metrics.prometheus import AdaDecodeStats

    present = original.get("spec_decoding_stats")
    if not any(
        isinstance(kind, type) and issubclass(kind, SpecDecodingStats) for kind in get_args(present)
    ):
        raise AdaDecodeError(
            f"patch 'statistics-type': vLLM's SchedulerStats.spec_decoding_stats is {present}, not "
            "an optional SpecDecodingStats; install a supported vLLM or a newer vllm-adadecode"
        )
    return original | {"spec_decoding_stats": AdaDecodeStats | None}


def _logging(original: type) -> type:
    from vllm_adadecode.metrics.prometheus import AdaDecodeLogging

    return AdaDecodeLogging


def _prom(original: type) -> type:
    from vllm_adadecode.metrics.prometheus import AdaDecodeProm

    return AdaDecodeProm


PATCHES = (
    Patch(
        "scheduler-statistics",
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        "the statistics of a step are made from its outputs by the scheduler itself, and draft "
        "tokens may come with them; a scheduler class of our own would be announced as "
        "unsupported and take the place of the user's",
        When.ENGINE,
        _update_from_output,
    ),
    Patch(
        "draft-ids",
        "vllm.v1.engine.core:EngineCore.post_step",
        "without async scheduling the engine asks the worker for draft tokens after every step, a "
        "round trip between processes, also where they have come with the step's output",
        When.ENGINE,
        _post_step,
    ),
    Patch(
        "statistics-type",
        "vllm.v1.metrics.stats:SchedulerStats.__annotations__",
        "statistics are decoded in the front end by the types that are declared for them: what "
        "vLLM's own type lacks is dropped",
        When.FRONT_END,
        _annotations,
    ),
    Patch(
        "log-line",
        "vllm.v1.metrics.loggers:SpecDecodingLogging",
        "made by name in vLLM's logger; loggers of our own would have to be asked for, replace "
        "vLLM's, or as plugins are only made for servers",
        When.FRONT_END,
        _logging,
    ),
    Patch(
        "prometheus",
        "vllm.v1.metrics.loggers:PrometheusStatLogger._spec_decoding_cls",
        "vLLM removes all metrics named like its own when it makes these, and with them what any "
        "logger plugin has made",
        When.FRONT_END,
        _prom,
    ),
)
