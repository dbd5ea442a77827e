"""Two engines on the stand-in, one after the other: vLLM's own, then ours as it is by default.

    python -m tests.cuda_stand_in.serve

They start as on a GPU: memory is profiled, graphs are captured (FULL_AND_PIECEWISE), scheduling is
async. What is compiled is not handed to inductor: its code would run past the recording. Prints one
JSON object: ``vanilla``, the tokens of every request, and what the other engine did.
"""

import json
import os
import random
import sys
from typing import Any

# Before vLLM is imported.
import tests.cuda_stand_in.device  # noqa: F401  # isort: skip

from vllm import LLM, SamplingParams
from vllm.v1.engine import core

from tests.cuda_stand_in import graphs, operators
from tests.support.engines import DEMO_MODEL, stop

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


def generate(engine: LLM) -> list[list[int]]:
    rng = random.Random(0)
    with open(json.__file__) as file:
        text = file.read()
    prompts, params = [], []
    for _ in range(NUM_REQUESTS):
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


def serve() -> tuple[LLM, dict[str, Any]]:
    """An engine, and what it did."""
    spec = {"method": "adadecode", "num_speculative_tokens": 2}
    graphs.Graph.captured = graphs.Graph.replayed = 0
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
    noticed = is_noticed(engine)
    print(json.dumps(found | {"vanilla": expected, "stale_schedule_noticed": noticed}))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # An engine that has failed, as the last one did on purpose, can't be stopped.
    os._exit(0)
