"""Plain decoding on a CPU: Model Runner V2 with our kernels against vLLM's default, V1.

What AdaDecode gains on a CPU is measured on top of the V2 runner, so this says what getting there
costs. Each measurement is a process of its own; the two runners take turns, so that a change in the
machine's load falls on both.

    python -m benchmarks.cpu_overhead MODEL [--batch 1 4] [--repeats 5]

Writes results/cpu_overhead.json: tokens/s of every run, medians, and the ratio V1 / V2 (above 1: V2
is slower).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.arguments import make_parser
from benchmarks.machine import command, machine, versions
from vllm_adadecode.cli.arguments import positive
from vllm_adadecode.files import write_json

RUNNERS = {"v1": {"VLLM_USE_V2_MODEL_RUNNER": "0"}, "v2": {}}


def measure(options: argparse.Namespace) -> None:
    """In a child: tokens/s of every round at each batch size, as JSON in a file."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        options.model,
        dtype=options.dtype,
        max_model_len=1024,
        max_num_seqs=max(options.batch),
        enforce_eager=options.eager,
        kv_cache_memory_bytes=2**28,
        enable_prefix_caching=False,
    )
    v2 = llm.llm_engine.vllm_config.use_v2_model_runner
    assert v2 == (os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "0"), "the plugin is not active"
    prompts = [{"prompt_token_ids": [5 + i, 7, 11, 13 + i] * 4} for i in range(max(options.batch))]
    rates: dict[str, list[float]] = {}
    for batch in options.batch:
        params = SamplingParams(
            temperature=options.temperature, seed=1, ignore_eos=True, max_tokens=options.tokens
        )
        llm.generate(prompts[:batch], params, use_tqdm=False)
        for _ in range(options.rounds):
            begin = time.perf_counter()
            llm.generate(prompts[:batch], params, use_tqdm=False)
            elapsed = time.perf_counter() - begin
            rates.setdefault(str(batch), []).append(batch * options.tokens / elapsed)
    options.child.write_text(json.dumps(rates))


def report(options: argparse.Namespace, runs: dict[str, list[dict[str, list[float]]]]) -> None:
    """Write what has been measured so far, after every pair of processes."""
    summary = {}
    for batch in map(str, options.batch):
        # The best round of a process is the one that the machine disturbed least.
        medians = {n: statistics.median(max(run[batch]) for run in runs[n]) for n in RUNNERS}
        pairs = [
            max(v1[batch]) / max(v2[batch]) for v1, v2 in zip(runs["v1"], runs["v2"], strict=True)
        ]
        summary[batch] = {
            **{f"{name}_tokens_per_s": round(rate, 1) for name, rate in medians.items()},
            "ratio": round(statistics.median(pairs), 3),
            "ratios": [round(ratio, 3) for ratio in pairs],
        }
    result = {
        "what": "decoding tokens/s of the V1 and the V2 runner on a CPU",
        "command": command(),
        "machine": {
            **machine(),
            **versions(),
            "load_average": [round(load, 1) for load in os.getloadavg()],
            "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto"),
        },
        "summary": summary,
        "runs": runs,
    }
    write_json(options.out, result)
    print(json.dumps({"machine": result["machine"], "summary": summary}, indent=1))


def main() -> None:
    parser = make_parser("benchmarks.cpu_overhead", __doc__)
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument(
        "--batch", type=positive, nargs="+", default=[1, 4], help="requests at once"
    )
    parser.add_argument("--tokens", type=positive, default=200, help="tokens a request and round")
    parser.add_argument("--rounds", type=positive, default=3, help="rounds a process")
    parser.add_argument("--repeats", type=positive, default=5, help="processes a runner")
    parser.add_argument("--dtype", default="float32", help="of the engines")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument(
        "--out", type=Path, default=Path("results/cpu_overhead.json"), help="JSON file"
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return measure(options)

    runs: dict[str, list[dict[str, list[float]]]] = {name: [] for name in RUNNERS}
    for repeat in range(options.repeats):
        # Alternate which of the two goes first.
        for name in sorted(RUNNERS, reverse=bool(repeat % 2)):
            command = [sys.executable, "-m", "benchmarks.cpu_overhead", *sys.argv[1:]]
            with tempfile.TemporaryDirectory() as folder:
                rates = Path(folder) / "rates.json"
                environment = {**os.environ, **RUNNERS[name]}
                subprocess.run([*command, "--child", str(rates)], env=environment, check=True)
                runs[name].append(json.loads(rates.read_text()))
            print(name, {b: round(max(r), 1) for b, r in runs[name][-1].items()}, flush=True)
        report(options, runs)


if __name__ == "__main__":
    main()
