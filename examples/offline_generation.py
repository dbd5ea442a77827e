"""Generate text offline with AdaDecode: `offline_generation.py [MODEL]`.

Without a model it runs the bundled demo model, which continues Python code, on a CPU or a GPU.
"""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams

DEMO_MODEL = Path(__file__).parents[1] / "benchmarks" / "demo" / "model"
PROMPTS = ["def main():\n    parser = argparse.ArgumentParser(", "import os\nimport sys\n"]


def main(model: str = str(DEMO_MODEL)) -> None:
    llm = LLM(
        model,
        # The one option that matters. Heads are found beside the model, in its folder adadecode/.
        speculative_config={"method": "adadecode"},
        # Small and quick to start; leave these out for a model of your own.
        dtype="float32",
        max_num_seqs=4,
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
    )
    for output in llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=64)):
        print(f"--- {output.prompt!r}\n{output.outputs[0].text}")
    stats = llm.collective_rpc("adadecode_stats")[0]
    print(f"mean acceptance length: {stats['mean_acceptance_length']:.2f}")


# vLLM starts processes of its own, which import this file again.
if __name__ == "__main__":
    main(*sys.argv[1:])
