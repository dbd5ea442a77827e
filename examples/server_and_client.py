"""Serve a model with AdaDecode and send it a request: `server_and_client.py [MODEL [PORT]]`.

The server is vLLM's own, with one more flag; the request is one of the OpenAI API.
"""

import subprocess
import sys
import time
from pathlib import Path

from openai import APIConnectionError, OpenAI

DEMO_MODEL = Path(__file__).parents[1] / "benchmarks" / "demo" / "model"
# Small and quick to start; leave these out for a model of your own.
SMALL = "--dtype float32 --max-num-seqs 4 --enforce-eager --kv-cache-memory-bytes 67108864"


def main(model: str = str(DEMO_MODEL), port: str = "8000") -> None:
    vllm = Path(sys.executable).with_name("vllm")
    command = [str(vllm), "serve", model, "--speculative-config", "adadecode", *SMALL.split()]
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    with subprocess.Popen([*command, "--host", "127.0.0.1", "--port", port]) as server:
        try:
            while server.poll() is None:
                try:
                    answer = client.completions.create(
                        model=model, prompt="import os\nimport sys\n", max_tokens=64, temperature=0
                    )
                except APIConnectionError:  # it is still starting
                    time.sleep(1)
                    continue
                return print(answer.choices[0].text)
            sys.exit("vllm serve has ended: the reason is in its output above")
        finally:
            server.terminate()


if __name__ == "__main__":
    main(*sys.argv[1:])
