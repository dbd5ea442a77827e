"""Runs one engine over a fixed list of requests and writes what came out as JSON.

python -m tests.kernels.cpu.engine MODEL OUT [--without-triton]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

PROMPTS = ["hello world", "def f(x):" * 9, "abc", "1 2 3 4" * 5]


class _WithoutTriton(PathFinder):
    """Finds every module but Triton, as if it were not installed."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] == "triton":
            return None
        return super().find_spec(fullname, path, target)


def requests() -> dict[str, Any]:
    """Name -> sampling parameters. Greedy ones must agree between runners."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    def params(**kwargs: Any) -> Any:
        return SamplingParams(
            **{"max_tokens": 24, "ignore_eos": True, "temperature": 0.0, **kwargs}
        )

    random = {"temperature": 0.8, "seed": 7}
    return {
        "greedy": params(),
        "greedy penalties": params(
            repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2
        ),
        "greedy logit bias": params(logit_bias={100: 20.0, 101: 19.0}),
        "greedy allowed": params(allowed_token_ids=[40, 50, 60]),
        "greedy minimum": params(min_tokens=20, ignore_eos=False, stop_token_ids=[123, 225]),
        "greedy bad words": params(bad_words=["C", "3", "w"]),
        "greedy log-probabilities": params(logprobs=3, prompt_logprobs=2),
        "greedy regex": params(
            structured_outputs=StructuredOutputsParams(regex="[0-9]{3}-[a-f]{5}"), ignore_eos=False
        ),
        "seeded": params(**random),
        "seeded top-k": params(top_k=20, **random),
        "seeded top-p": params(top_p=0.7, **random),
        "seeded min-p": params(min_p=0.1, **random),
        "seeded all": params(
            top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2, logprobs=2, **random
        ),
        "unseeded": params(temperature=1.0),
    }


def describe(worker: Any) -> dict[str, Any]:
    """Which runner a worker has, and what is loaded and replaced in its process."""
    from vllm.triton_utils.dispatcher import _registry

    return {
        "runner": type(worker.model_runner).__module__,
        "replaced": sorted(_registry),
        "plugin": "vllm_adadecode.plugin" in sys.modules,
    }


def main() -> None:
    if "--without-triton" in sys.argv:
        sys.meta_path[:] = [_WithoutTriton if f is PathFinder else f for f in sys.meta_path]
    from vllm import LLM

    llm = LLM(
        sys.argv[1],
        dtype="float32",
        max_model_len=512,
        max_num_seqs=8,
        # Less than some prompts: they are prefilled in chunks, beside requests that decode.
        max_num_batched_tokens=48,
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=2**26,
    )
    v2 = llm.llm_engine.vllm_config.use_v2_model_runner
    outputs: dict[str, Any] = {"v2": v2, **llm.collective_rpc(describe)[0]}
    for name, params in requests().items():
        if not v2 and not name.startswith("greedy"):
            # vLLM's V1 runner crashes on a CPU when a seeded request is prefilled in chunks.
            continue
        results = llm.generate(PROMPTS, params, use_tqdm=False)
        outputs[name] = [
            {
                "tokens": list(result.outputs[0].token_ids),
                "text": result.outputs[0].text,
                "logprobs": _plain(result.outputs[0].logprobs),
                "prompt_logprobs": _plain(result.prompt_logprobs),
            }
            for result in results
        ]
    if v2:
        # Each request alone: what is sampled must not depend on its neighbours.
        alone = [llm.generate([p], requests()["seeded"], use_tqdm=False)[0] for p in PROMPTS]
        outputs["seeded alone"] = [{"tokens": list(r.outputs[0].token_ids)} for r in alone]
    outputs["triton"] = "triton" in sys.modules
    Path(sys.argv[2]).write_text(json.dumps(outputs))


def _plain(logprobs: Any) -> Any:
    if logprobs is None:
        return None
    return [p and {str(t): [lp.logprob, lp.rank] for t, lp in p.items()} for p in logprobs]


if __name__ == "__main__":
    main()
