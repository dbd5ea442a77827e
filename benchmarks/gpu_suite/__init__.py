"""All that needs a GPU, in one command: correctness, then speed, one JSON and one table.

Makes its own target: the shipped demo model, which is trained and has heads, widened to the 8 B
shape (`benchmarks/widen`). So acceptance is real, the cost is that of 8 B, and no minute of the
device goes into training. Then, with `vllm serve` as users have it, vanilla and AdaDecode, both
also batch invariant:

- `bit_identical`: greedy outputs with VLLM_BATCH_INVARIANT=1, over hundreds of prompts;
- `ties`: without it, where outputs differ, and how close the two tokens were;
- `host_syncs`: calls in a decode step for which the host waits;
- `speed`: throughput and decoding time with 1 to 256 requests at a time, and *efficiency*: the
  speed-up over the ideal one, which is the ratio of the bytes of weights that both must read.

The same code runs on a CPU, at a tiny size: that shows that it works, and says nothing about speed.

`settings.py` says how much of what is measured; `suite.py` owns servers and prompts;
`parts.py` measures; `report.py` is what is said of it; `worker.py` and `syncs.py` are what
runs in vLLM's worker.
"""
