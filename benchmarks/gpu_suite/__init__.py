"""All that needs a GPU, in one command: correctness, then speed, one JSON and one table.

    python -m benchmarks.gpu_suite [--quick] [--device cpu] [--minutes 10]

Makes its own target: the shipped demo model, which is trained and has heads, widened to the 8 B
shape (`benchmarks/widening`). So acceptance is real, the cost is that of 8 B, and no minute of the
device goes into training. Then, with vLLM's engine as users have it, in a process of its own for
each kind (vanilla and AdaDecode, both also batch invariant, AdaDecode with controlled drafts):

- `bit_identical`: greedy outputs with VLLM_BATCH_INVARIANT=1, over hundreds of prompts;
- `ties`: without it, where outputs differ, and how close the two tokens were;
- `host_syncs`: calls in a round for which the host waits;
- `speed`: decoding time at batch 1 and 8, and *efficiency*: the speed-up over the ideal one, which
  is the ratio of the bytes of weights that both must read;
- `concurrency`: throughput over vanilla's with 1 to 256 requests at a time;
- `traces`: speed and efficiency where coverage and precision of the heads are set, not learned.

The same code runs on a CPU, at a tiny size: that shows that it works, and says nothing about speed.

`settings.py` says how much of what is measured; `suite.py` owns order, time and failures;
`correctness.py`, `syncs.py`, `speed.py` measure; `engine.py` and `child.py` are the two ends of an
engine's process, `worker.py` what runs in vLLM's worker; `result.py` is what is written,
`table.py` what is printed.
"""
