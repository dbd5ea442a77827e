"""Engines for the tests: real vLLM, in the tests' process, shared between tests.

Owns how an engine is started, kept and stopped, and how outputs of two engines are compared.
"""

import gc
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.platforms import current_platform
from vllm.v1.engine import core

from vllm_adadecode.draft.status_poll import StatusPoll

DEMO_MODEL = Path(__file__).parents[2] / "benchmarks" / "demo" / "model"
# With 96 MiB of KV cache each.
MAX_ENGINES = 8
# float32 logits of one token computed in batches of different shape differ by about 1e-5; two
# candidates closer than this are a tie, which either engine may break.
TIE_GAP = 1e-3

DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 16,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "kv_cache_memory_bytes": 96 << 20,
}


@contextmanager
def async_scheduling_on_cpu() -> Iterator[None]:
    """vLLM turns async scheduling off on a CPU; nothing in the method depends on that."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    with patch.object(CpuPlatform, "check_and_update_config", classmethod(check_and_update_config)):
        yield


@contextmanager
def slow_outputs(seconds: float = 0.005) -> Iterator[None]:
    """Let async scheduling be ahead of the outputs, now and then by two steps.

    They are read in a thread, here within microseconds: the scheduler would mostly know them before
    it schedules the next step.
    """
    from vllm.v1.worker.gpu.async_utils import AsyncOutput

    original = AsyncOutput.get_output
    rng = random.Random(0)

    def get_output(self: Any) -> Any:
        time.sleep(seconds * rng.random())
        return original(self)

    with patch.object(AsyncOutput, "get_output", get_output):
        yield


class EnginePool:
    """Starts engines on demand and keeps the last few.

    Attributes:
        started: how often an engine was started, by the options that it has beside `DEFAULTS`.
    """

    def __init__(self) -> None:
        self._engines: OrderedDict[str, LLM] = OrderedDict()
        self.started: Counter[str] = Counter()
        # An engine that ends, here or when it is collected, would take down the process groups that
        # all engines of a process share, whatever another one is doing.
        core.cleanup_dist_env_and_memory = gc.collect

    def restart(self) -> None:
        """Stop all engines, and let the next one make process groups for a model of its kind."""
        self.close()
        cleanup_dist_env_and_memory()

    def get(self, model: Path | str = DEMO_MODEL, **options: Any) -> LLM:
        """An engine with these options over `DEFAULTS`; the same one for the same options."""
        name = f"{Path(model).name} {describe(options)}"
        options = DEFAULTS | options
        key = repr((str(model), sorted(options.items(), key=lambda item: item[0])))
        if key in self._engines:
            self._engines.move_to_end(key)
            return self._engines[key]
        while len(self._engines) >= MAX_ENGINES:
            stop(self._engines.popitem(last=False)[1])
        if options.get("async_scheduling"):
            with async_scheduling_on_cpu():
                engine = LLM(str(model), **options)
            assert engine.llm_engine.vllm_config.scheduler_config.async_scheduling
        else:
            engine = LLM(str(model), **options)
        # Each engine on its own runner, whichever came before it in this process.
        ours = engine.llm_engine.vllm_config.speculative_config is not None
        assert runs_on_v2(engine) == (ours or not current_platform.is_cpu())
        self._engines[key] = engine
        self.started[name] += 1
        return engine

    def close(self) -> None:
        while self._engines:
            stop(self._engines.popitem()[1])


def runs_on_v2(engine: LLM) -> bool:
    (kinds,) = engine.collective_rpc(lambda worker: type(worker.model_runner).__mro__)
    return "vllm.v1.worker.gpu.model_runner" in {kind.__module__ for kind in kinds}


def describe(options: dict[str, Any]) -> str:
    """What sets an engine apart from one with `DEFAULTS`, in one line."""
    words = []
    for name, value in sorted(options.items()):
        if name == "speculative_config" and isinstance(value, dict):
            value = {k: v for k, v in value.items() if k not in ("method", "cost_aware")}
            words.append(f"adadecode={value}" if value else "adadecode")
        elif value != DEFAULTS.get(name):
            words.append(f"{name}={value}")
    return ", ".join(words) or "defaults"


def stop(engine: LLM) -> None:
    """Free an engine's memory now rather than when Python gets to it."""
    engine.llm_engine.engine_core.shutdown()
    gc.collect()


def speculative(**options: Any) -> dict[str, Any]:
    """Without `cost_aware`: what is drafted would depend on how fast the tests run."""
    return {"method": "adadecode", "cost_aware": False, **options}


# With the draft loop on the device. What is sampled greedily is drafted so as well.
DEVICE_LOOP = speculative(
    num_speculative_tokens=5, draft_sample_method="probabilistic", draft_loop="device"
)


def set_thresholds(engine: LLM, *thresholds: float) -> None:
    """Change the thresholds of a running engine (one, or one per exit)."""

    def change(worker: Any) -> None:
        from vllm_adadecode.heads.thresholds import ExitThresholds

        speculator = worker.model_runner.speculator
        values = thresholds * (len(speculator.model.exit_layers) // len(thresholds))
        gates = speculator.speculative_config.gate_threshold
        speculator.ledger.thresholds = ExitThresholds.of(values, gates)

    engine.collective_rpc(change)


class EveryStep(StatusPoll):
    """Reads nothing: every step runs, needed or not."""

    def waits(self, span: int) -> bool:
        return True


def poll_with(poll: StatusPoll) -> Callable[[Any], None]:
    """For `collective_rpc`: what the draft loop on the device polls (see status_poll.py)."""

    def change(worker: Any) -> None:
        speculator = worker.model_runner.speculator
        rounds = vars(speculator).get("device_rounds_kept") or speculator.device_rounds
        rounds.loop.poll = poll

    return change


def set_draft_loop(engine: LLM, loop: str) -> None:
    """Have an engine that was started with the draft loop on the "device" drive it from "host"."""

    def change(worker: Any) -> None:
        speculator = worker.model_runner.speculator
        speculator.resolve()
        rounds = vars(speculator).setdefault("device_rounds_kept", speculator.device_rounds)
        speculator.device_rounds = rounds if loop == "device" else None

    engine.collective_rpc(change)


def stats(engine: LLM, reset: bool = False) -> dict[str, Any]:
    return engine.collective_rpc("adadecode_stats", kwargs={"reset": reset})[0]


def greedy(max_tokens: int = 48, **options: Any) -> SamplingParams:
    return SamplingParams(
        **({"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True} | options)
    )


def generate(
    engine: LLM, prompts: Sequence[Any], params: Any, batch: int | None = None
) -> list[RequestOutput]:
    """Outputs in order, at most ``batch`` requests at a time."""
    batch = batch or len(prompts)
    params = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
    outputs: list[RequestOutput] = []
    for i in range(0, len(prompts), batch):
        outputs += engine.generate(
            list(prompts[i : i + batch]), params[i : i + batch], use_tqdm=False
        )
    return outputs


def token_ids(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@dataclass
class Divergence:
    """Where an output first differs from its vanilla reference."""

    request: int
    position: int
    # Difference of the log-probabilities that vanilla gives to the two tokens.
    gap: float


def divergences(
    vanilla: LLM,
    ours: Sequence[RequestOutput],
    reference: Sequence[RequestOutput],
    params: Sequence[SamplingParams] | None = None,
) -> list[Divergence]:
    """All first differences, with how far from a tie each one is.

    ``params`` are needed where they change the logits; ``vanilla`` must then give processed
    log-probabilities.
    """
    found: list[Divergence] = []
    for i, (a, b) in enumerate(zip(ours, reference, strict=True)):
        mine, theirs = list(a.outputs[0].token_ids), list(b.outputs[0].token_ids)
        if mine == theirs:
            continue
        at = next((j for j, (x, y) in enumerate(zip(mine, theirs, strict=False)) if x != y), None)
        if at is None:
            found.append(Divergence(i, min(len(mine), len(theirs)), float("inf")))
            continue
        scores = _scores(vanilla, b, at, params[i] if params is not None else None)
        if mine[at] in scores and theirs[at] in scores:
            gap = abs(scores[theirs[at]] - scores[mine[at]])
        else:
            gap = float("inf")
        found.append(Divergence(i, at, gap))
    return found


def _scores(
    vanilla: LLM, reference: RequestOutput, at: int, params: SamplingParams | None
) -> dict[int, float]:
    """Log-probabilities of vanilla's best tokens for position ``at`` of an output of its own."""
    assert reference.prompt_token_ids is not None
    prompt, generated = list(reference.prompt_token_ids), list(reference.outputs[0].token_ids)
    if params is None:
        # The output so far may as well be prompt: one step is enough.
        prompt, at = prompt + generated[:at], 0
        probing = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
    else:
        # Penalties and the like tell the two apart: generate it again.
        probing = params.clone()
        probing.temperature, probing.top_k, probing.n = 0.0, 0, 1
        probing.logprobs, probing.logprob_token_ids = 20, None
    output = vanilla.generate([{"prompt_token_ids": prompt}], probing, use_tqdm=False)[0].outputs[0]
    if params is not None and list(output.token_ids)[:at] != generated[:at]:
        return {}
    assert output.logprobs is not None
    return {token: score.logprob for token, score in output.logprobs[at].items()}


def assert_same(
    vanilla: LLM,
    ours: Sequence[RequestOutput],
    reference: Sequence[RequestOutput],
    params: Sequence[SamplingParams] | None = None,
    tie_gap: float = TIE_GAP,
) -> None:
    """Token for token the same, but for ties between equally likely tokens (see `TIE_GAP`).

    ``params``: see `divergences`.
    """
    found = divergences(vanilla, ours, reference, params)
    real = [d for d in found if d.gap > tie_gap]
    assert not real, f"{len(real)} of {len(ours)} outputs differ from vanilla: {real[:5]}"
    # Ties are rare; many of them would hide something else.
    assert len(found) <= max(1, len(ours) // 10), f"too many ties: {found}"
