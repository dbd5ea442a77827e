"""Two engines on the stand-in, one after the other: vLLM's own, then ours as it is by default.

    python -m tests.cuda_stand_in.serve

They start as on a GPU: memory is profiled, graphs are captured (FULL_AND_PIECEWISE), scheduling is
async. What is compiled is not handed to inductor: its code would run past the recording. Prints one
JSON object: ``vanilla``, the tokens of every request, and what the other engine did, as it started
and with faults.
"""

import json
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

# Before vLLM is imported.
import tests.cuda_stand_in.device  # noqa: F401  # isort: skip

import torch
from vllm import LLM, SamplingParams
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import core

from tests.cuda_stand_in import graphs, operators
from tests.support.engines import DEMO_MODEL, stop
from tests.support.vllm_log import log_of_vllm
from vllm_adadecode.draft import device_loop
from vllm_adadecode.engine.self_check import Way, check
from vllm_adadecode.model import draft_lm_head
from vllm_adadecode.spans.padded import PaddedSpans
from vllm_adadecode.verify.passes import VerificationPasses

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 192,
    "max_num_seqs": 2,
    # Prompts come in chunks, beside requests that decode.
    "max_num_batched_tokens": 32,
    "enable_prefix_caching": False,
    "num_gpu_blocks_override": 64,
    "compilation_config": {
        "backend": "eager",
        "cudagraph_capture_sizes": [1, 2, 4, 6],
        # Their operators are those of operators.NEVER_CALLED.
        "pass_config": {"fuse_norm_quant": False, "fuse_act_quant": False},
    },
}
NUM_REQUESTS = 6
# Under which the method says what it does.
LOGGER = "vllm.vllm_adadecode.engine"


def generate(engine: LLM, num_requests: int = NUM_REQUESTS) -> list[list[int]]:
    rng = random.Random(0)
    with open(json.__file__) as file:
        text = file.read()
    prompts, params = [], []
    for _ in range(num_requests):
        at = rng.randrange(len(text) - 300)
        prompts.append(text[at : at + rng.choice([20, 80, 240])])
        tokens = rng.randrange(4, 24)
        params.append(SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    outputs = engine.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def is_noticed(engine: LLM) -> bool:
    """Negative control: replays that keep the schedule of their capture."""
    graphs.Graph.left_out = frozenset({"_vllm_fa3_C::get_scheduler_metadata"})
    try:
        generate(engine)
    except AssertionError as error:
        return "stale schedule" in str(error)
    return False


def changed(holder: Any, name: str, change: Any) -> Any:
    """A function that hands what another one returns to ``change``."""
    original = getattr(holder, name)
    return patch.object(holder, name, lambda *a, **k: change(original(*a, **k)))


def wrong_token(result: Any) -> Any:
    result.token.add_(1)
    return result


def fails_while_captured(result: Any) -> Any:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("operation not permitted when stream is capturing\nat graph.cpp:1")
    return result


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("out of resource: shared memory")


@contextmanager
def stale_states() -> Iterator[None]:
    """Replays that move no states."""
    graphs.Graph.left_out = frozenset({"_move_states_kernel"})
    try:
        yield
    finally:
        graphs.Graph.left_out = frozenset()


FAULTS: dict[str, Any] = {
    "wrong state": lambda: changed(PaddedSpans, "run_span", lambda s: (s[0] * 1.01, s[1])),
    "wrong token": lambda: changed(draft_lm_head, "head_confidence", wrong_token),
    "failing capture": lambda: changed(device_loop, "draft_step", fails_while_captured),
    "failing capture of verifications": lambda: changed(
        VerificationPasses, "_pending", fails_while_captured
    ),
    "stale replays": stale_states,
    "failing kernel": lambda: patch.object(draft_lm_head, "head_confidence", fails),
    "none": nullcontext,
}


def start_again(worker: Any) -> dict[str, Any]:
    """Capture and check again; what is said, and what is used from then on."""
    speculator = worker.model_runner.speculator
    kept = vars(speculator).setdefault("kept", speculator.device_rounds)
    speculator.device_rounds, speculator.model.projection.use_kernels = kept, True
    speculator.context.faults.clear()
    # The next step would have told it which requests have finished.
    ended = SchedulerOutput.make_empty()
    ended.finished_req_ids = set(worker.model_runner.req_states.req_id_to_index)
    worker.execute_model(ended)
    with log_of_vllm(LOGGER) as lines:
        speculator.launch_kernels(2)
        speculator.init_cudagraph_manager(CUDAGraphMode.FULL_DECODE_ONLY)
        speculator.capture()
        check(worker)
    verified = speculator.verification_graphs is not None
    return {"lines": lines, "way": [*vars(Way.of(speculator)).values(), verified]}


def serve() -> tuple[LLM, dict[str, Any]]:
    """An engine, and what it did."""
    spec = {"method": "adadecode", "num_speculative_tokens": 2}
    graphs.Graph.captured = graphs.Graph.replayed = 0
    with log_of_vllm(LOGGER) as lines:
        engine = LLM(str(DEMO_MODEL), **OPTIONS, speculative_config={**spec, "cost_aware": False})

    def describe(worker: Any) -> dict[str, Any]:
        runner = worker.model_runner
        return {
            "runner": [kind.__module__ for kind in type(runner).__mro__],
            "draft_loop": runner.speculator.draft_loop,
            "fused_heads": runner.speculator.model.projection.use_kernels,
        }

    captured = graphs.Graph.captured
    graphs.Graph.replayed = 0
    operators.CALLS.clear()
    return engine, {
        "log": lines,
        "tokens": generate(engine),
        **engine.collective_rpc(describe)[0],
        "async_scheduling": engine.llm_engine.vllm_config.scheduler_config.async_scheduling,
        "captured": captured,
        "captured_while_serving": graphs.Graph.captured - captured,
        "replayed": graphs.Graph.replayed,
        "attention": dict(operators.CALLS),
        "stats": engine.collective_rpc("adadecode_stats")[0],
    }


def main() -> None:
    graphs.install()
    # Shutting one engine down would take the others' process groups along.
    core.cleanup_dist_env_and_memory = lambda *_: None
    vanilla = LLM(str(DEMO_MODEL), **OPTIONS)
    expected = generate(vanilla)
    stop(vanilla)
    engine, found = serve()
    found |= {"vanilla": expected, "faults": {}}
    for fault in FAULTS:
        with FAULTS[fault]():
            done = engine.collective_rpc(start_again)[0]
            found["faults"][fault] = done | {"tokens": generate(engine, 2)}
    print(json.dumps(found | {"stale_schedule_noticed": is_noticed(engine)}))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # An engine that has failed, as the last one did on purpose, can't be stopped.
    os._exit(0)
