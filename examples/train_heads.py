"""Train heads for a model on a few prompts: `train_heads.py [OUTPUT [MODEL]]`.

The same as `adadecode train MODEL --data PROMPTS.jsonl --output OUTPUT` with a few options: the
model continues the prompts with vLLM, and heads learn to predict from intermediate layers what its
last layer says. A minute on a CPU with the demo model; real heads want thousands of prompts.
"""

import json
import sys
import tempfile
from pathlib import Path

from vllm_adadecode.cli import main as adadecode

DEMO = Path(__file__).parents[1] / "benchmarks" / "demo"
# Small and quick to start; leave these out for a model of your own.
ENGINE = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}


def main(output: str = "trained-heads", model: str = str(DEMO / "model")) -> int:
    prompts = json.loads((DEMO / "prompts.json").read_text())[:16]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as data:
        data.writelines(json.dumps({"prompt": prompt["text"]}) + "\n" for prompt in prompts)
        data.flush()
        command = ["train", model, "--data", data.name, "--output", output]
        command += ["--max-tokens", "64", "--epochs", "2", "--batch-size", "4"]
        # Cheaper heads: a gate that foresees confidence, and only the 1024 most frequent tokens.
        command += ["--held-out", "0.25", "--gate", "--draft-vocab", "1024"]
        trained = adadecode([*command, "--engine-args", json.dumps(ENGINE)])
    return trained or adadecode(["info", output, "--target", model])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
