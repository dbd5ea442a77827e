"""The worker of `vllm_adadecode.training.generate`, with an engine that only pretends.

A prompt is continued by its first token and the request's number in the shard. ``FAKE_ENGINE`` in
the environment lets it misbehave: ``die:N`` at the N-th shard, ``full:N`` writing it, ``hang``.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

from vllm_adadecode.training import generate_worker

behaviour, _, number = os.environ.get("FAKE_ENGINE", "").partition(":")


class LLM:
    def __init__(self, model: str, **options: Any) -> None:
        if "refuse" in options:
            raise ValueError("the engine does not like\nthese arguments")
        if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "1":
            raise ValueError("vLLM's V1 runner can't prefill seeded requests in chunks on a CPU")
        longest = options["max_model_len"]
        config = SimpleNamespace(max_model_len=1000 if longest == -1 else longest)
        self.llm_engine = SimpleNamespace(model_config=config)
        self.shards = 0

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        print("engines talk", flush=True)
        if behaviour == "hang":
            time.sleep(600)
        if self.shards == int(number or -1):
            if behaviour == "die":
                os._exit(9)
            vars(os)["fsync"] = no_space
        self.shards += 1
        outputs = []
        for i, (prompt, chosen) in enumerate(zip(prompts, params, strict=True)):
            ids = [prompt["prompt_token_ids"][0], i][: chosen.max_tokens]
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)]))
        return outputs


def no_space(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if __name__ == "__main__":
    vllm: Any = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = LLM, SimpleNamespace
    platforms: Any = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: True)
    utils: Any = ModuleType("vllm.utils")
    utils.cpu_resource_utils = SimpleNamespace(
        get_allowed_cpu_list=lambda: [SimpleNamespace(numa_node=0)],
        get_memory_node_info=lambda node: SimpleNamespace(available_memory=1, total_memory=2),
    )
    sys.modules |= {"vllm": vllm, "vllm.platforms": platforms, "vllm.utils": utils}
    generate_worker.main()
