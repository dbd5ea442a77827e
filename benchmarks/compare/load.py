"""One measurement: prompts sent to one server by vLLM's load generator, and what came back.

The generator is `vllm.benchmarks.serve.benchmark`, the function behind `vllm bench serve`, with the
requests that its traces use, which hold token ids. The command itself would read text only, need
pandas, and import vLLM anew for each measurement. Owns the differences of `/metrics` as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.demo.server import Server

MODEL = "target"  # as servers are told to call it
TIMEOUT_S = 3600.0
COUNTERS = {
    # One observation for each request in each step behind its first token: a verification.
    "vllm:inter_token_latency_seconds_count": "steps",
    "vllm:spec_decode_num_draft_tokens_total": "draft_tokens",
    "vllm:spec_decode_num_accepted_tokens_total": "accepted_tokens",
}


@dataclass(frozen=True)
class Measurement:
    """
    Attributes:
        seconds: from the first request to the last answer.
        output_tokens: over all requests, the first token of each included.
        ttft_ms, tpot_ms: of each request.
        steps, draft_tokens, accepted_tokens: of the server meanwhile; no draft tokens without a
            method.
        outputs: text of each answer, in the order of the prompts.
        layers_executed_per_token: with AdaDecode, one request at a time; 1 is plain decoding. In a
            batch one pass serves several requests.
        stats: what AdaDecode's worker counted, in the same case.
        failed: requests without an answer.
    """

    seconds: float
    output_tokens: int
    ttft_ms: tuple[float, ...]
    tpot_ms: tuple[float, ...]
    steps: int
    draft_tokens: int
    accepted_tokens: int
    outputs: tuple[str, ...]
    layers_executed_per_token: float | None = None
    stats: Mapping[str, Any] | None = None
    failed: int = 0


def measure(
    server: Server,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    concurrency: int,
    temperature: float,
    adadecode: bool = False,
) -> Measurement:
    """Send all prompts, at most `concurrency` at once.

    Raises:
        ServerError: no request was answered, or the server is gone.
    """
    if adadecode:
        server.stats(reset=True)
    before = counters(server)
    result = _send(server, prompts, max_tokens, concurrency, temperature)
    if result["completed"] == 0:
        reason = next((e for e in result["errors"] if e), "no reason given").strip().splitlines()
        raise server.error(f"no request was answered: {reason[-1]}")
    if not server.is_healthy():
        raise server.error("vllm serve ended")
    after = counters(server)
    stats = server.stats() if adadecode else None
    ttft, tpot = latencies(result)
    counted = {name: int(after[name] - before[name]) for name in COUNTERS.values()}
    if stats is not None:
        counted |= verified_drafts(stats)
    if concurrency > 1:
        stats = None
    return Measurement(
        seconds=result["duration"],
        output_tokens=result["total_output_tokens"],
        ttft_ms=ttft,
        tpot_ms=tpot,
        steps=counted["steps"],
        draft_tokens=counted["draft_tokens"],
        accepted_tokens=counted["accepted_tokens"],
        outputs=tuple(result["generated_texts"]),
        layers_executed_per_token=stats["layers_executed_per_token"] if stats else None,
        stats=stats,
        failed=result["failed"],
    )


def verified_drafts(stats: Mapping[str, Any]) -> dict[str, int]:
    """AdaDecode's own count of drafts that were verified. With async scheduling `/metrics` does not
    have it: vLLM then counts the places that it reserved, whether there was a draft or not.

    Args:
        stats: `vllm_adadecode.metrics.counters.Counters.snapshot`.
    """
    exits = stats["exits"].values()
    accepted = sum(counts["accepted_tokens"] for counts in exits)
    return {
        "draft_tokens": accepted + sum(c["rejected_tokens"] for c in exits),
        "accepted_tokens": accepted,
    }


def warm_up(server: Server, prompts: Sequence[Sequence[int]], concurrency: int) -> None:
    """Answer a few prompts before anything is measured.

    Raises:
        ServerError: no request was answered.
    """
    chosen = [prompts[i % len(prompts)] for i in range(max(2, concurrency))]
    for temperature in (0.0, 0.7):
        result = _send(server, chosen, 16, concurrency, temperature)
        if result["completed"] == 0:
            raise server.error("the server answers no request")


def _send(
    server: Server,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    concurrency: int,
    temperature: float,
) -> dict[str, Any]:
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    base = f"http://127.0.0.1:{server.port}"
    # The generator obeys proxies, which have no way to this machine.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    run = benchmark(
        task_type=TaskType.GENERATION,
        endpoint_type="vllm",
        api_url=f"{base}/v1/completions",
        base_url=base,
        model_id=MODEL,
        model_name=MODEL,
        tokenizer=None,
        input_requests=[
            SampleRequest(prompt=list(p), prompt_len=len(p), expected_output_len=max_tokens)
            for p in prompts
        ],
        logprobs=None,
        request_rate=float("inf"),
        burstiness=1.0,
        disable_tqdm=True,
        num_warmups=0,
        profile=False,
        selected_percentile_metrics=[],
        selected_percentiles=[],
        ignore_eos=True,
        goodput_config_dict={},
        max_concurrency=concurrency,
        lora_modules=None,
        extra_headers=None,
        extra_body={"temperature": temperature},
        ready_check_timeout_sec=0,
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result: dict[str, Any] = asyncio.run(asyncio.wait_for(run, TIMEOUT_S))
    except TimeoutError:
        raise server.error(f"not all requests were answered after {TIMEOUT_S:.0f} s") from None
    return result


def latencies(result: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Milliseconds to the first token of each answered request, and for each one behind it."""
    rows = zip(
        result["errors"], result["ttfts"], result["latencies"], result["output_lens"], strict=True
    )
    answered = [(ttft, latency, length) for error, ttft, latency, length in rows if not error]
    behind_first = (
        1e3 * (latency - ttft) / (length - 1) for ttft, latency, length in answered if length > 1
    )
    return tuple(1e3 * ttft for ttft, _, _ in answered), tuple(behind_first)


def counters(server: Server) -> dict[str, float]:
    """What `/metrics` counts; 0 for what it does not have.

    Raises:
        ServerError: no answer.
    """
    try:
        text = server.client.get("/metrics").text
    except Exception as error:
        raise server.error(f"no answer to /metrics: {error!r}") from error
    return parse_counters(text)


def parse_counters(text: str) -> dict[str, float]:
    found = dict.fromkeys(COUNTERS.values(), 0.0)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if name := COUNTERS.get(sample.name):
                found[name] += sample.value
    return found


def percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None


def peak_memory(server: Server) -> int:
    """Bytes: the sum of what each of the server's processes had resident at its peak."""
    total = 0
    for process in server.processes():
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{process.pid}/status", encoding="ascii", errors="ignore") as status:
                peaks = [line for line in status if line.startswith("VmHWM:")]
            total += sum(int(line.split()[1]) * 1024 for line in peaks)
    return total
