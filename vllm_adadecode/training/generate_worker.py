"""``python -m vllm_adadecode.training.generate_worker``: the engine's process of `generate.py`.

Reads one job (a line of JSON) from stdin, writes shards, and says on stdout how far it is. It ends
when stdin does: the process that asked is then gone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from threading import Thread
from typing import Any

from vllm_adadecode.training.sequences import Sequence, write_sequences

FREE_SHARE = 0.8  # of the free memory: other programs may grow while the engine starts


def main() -> None:
    job = json.loads(sys.stdin.readline())
    Thread(target=_end_with_parent, daemon=True).start()
    # Not another process below this one: it would outlive a kill.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        _run(job)
    except Exception as error:
        told = {
            "message": " ".join(str(error).split())[:400] or type(error).__name__,
            "errno": error.errno if isinstance(error, OSError) else None,
            "file": error.filename if isinstance(error, OSError) else None,
        }
        if isinstance(error, OSError) and error.errno is not None:
            told["message"] = os.strerror(error.errno)
        print(f"\nadadecode-error {json.dumps(told)}", flush=True)
        raise


def _end_with_parent() -> None:
    while sys.stdin.readline():
        pass
    os._exit(1)


def _run(job: dict[str, Any]) -> None:
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # The V1 runner ends there when a seeded request is prefilled in chunks.
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
    prompts = [ids for shard in job["shards"] for ids, _ in shard["prompts"]]
    llm = LLM(job["target"], **engine_arguments(job))
    longest = llm.llm_engine.model_config.max_model_len
    too_long = sum(len(ids) >= longest for ids in prompts)
    if too_long:
        raise ValueError(
            f"{too_long} prompts are as long as the engine's context of {longest} tokens: lower "
            "--max-prompt-tokens"
        )
    for shard in job["shards"]:
        given = shard["prompts"]
        params = [
            sampling_params(job["sampling"], shard["first"] + i, room=longest - len(ids))
            for i, (ids, _) in enumerate(given)
        ]
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids, _ in given], params, use_tqdm=False
        )
        made = [
            Sequence(tuple(ids), tuple(output.outputs[0].token_ids), source)
            for (ids, source), output in zip(given, outputs, strict=True)
        ]
        write_sequences(Path(shard["file"]), made)
        print(f"\nadadecode-done {len(made)}", flush=True)


def engine_arguments(job: dict[str, Any]) -> dict[str, Any]:
    """vLLM's arguments: the user's, and such that the engine starts beside other programs."""
    from vllm.platforms import current_platform

    # As long a context as fits into the memory.
    engine = {"max_model_len": -1} | job["engine"]
    if not job["has_tokenizer"]:
        engine.setdefault("skip_tokenizer_init", True)
    memory_given = {"gpu_memory_utilization", "kv_cache_memory_bytes"} & engine.keys()
    if current_platform.is_cpu() and not memory_given:
        # vLLM asks for 92 % of the memory, free or not.
        from vllm.utils import cpu_resource_utils as resources

        found = resources.get_memory_node_info(resources.get_allowed_cpu_list()[0].numa_node)
        free = found.available_memory / found.total_memory
        engine["gpu_memory_utilization"] = min(0.92, FREE_SHARE * free)
    return engine


def sampling_params(chosen: dict[str, Any], number: int, room: int) -> Any:
    """vLLM's parameters for prompt ``number``, with at most ``room`` new tokens.

    Args:
        chosen: `GenerationSettings.sampling`.
    """
    from vllm import SamplingParams

    kept = {k: v for k, v in chosen.items() if k not in ("dtype", "quantization", "seed")}
    kept["max_tokens"] = min(kept["max_tokens"], room)
    seed = chosen.get("seed")
    own_seed = None if seed is None else seed + number
    return SamplingParams(**kept, seed=own_seed, detokenize=False)


if __name__ == "__main__":
    main()
