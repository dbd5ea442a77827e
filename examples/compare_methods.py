"""The same prompts with and without AdaDecode: `compare_methods.py [MODEL]`.

Shows that the outputs are identical and how many tokens a verification step gives. For speed see
`make demo` and docs/benchmarks.md: a fair comparison of times takes more than this.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

DEMO = Path(__file__).parents[1] / "benchmarks" / "demo"
# float32: in bfloat16 equally likely tokens may fall either way. The rest is for a quick start.
ENGINE = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}


def run(model: str, method: dict[str, Any] | None) -> tuple[list[str], dict[str, Any]]:
    llm = LLM(model, speculative_config=method, **ENGINE)
    prompts = [prompt["text"] for prompt in json.loads((DEMO / "prompts.json").read_text())[:8]]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=64))
    stats = llm.collective_rpc("adadecode_stats")[0] if method else {}
    return [output.outputs[0].text for output in outputs], stats


def main(model: str = str(DEMO / "model")) -> int:
    expected, _ = run(model, None)
    # cost_aware off: always draft up to K tokens, so that counts do not depend on the machine.
    texts, stats = run(model, {"method": "adadecode", "cost_aware": False})
    same = sum(a == b for a, b in zip(texts, expected, strict=True))
    print(f"identical outputs: {same} of {len(expected)}")
    print(f"mean acceptance length: {stats['mean_acceptance_length']:.2f} (without: 1)")
    return 0 if same == len(expected) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
