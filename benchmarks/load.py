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

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.counts import Stats
from benchmarks.server import Server

TIMEOUT_S = 3600.0
COUNTERS = {
    # One observation for each request in each step behind its first token: a verification step.
    "vllm:inter_token_latency_seconds_count": "steps",
    "vllm:spec_decode_num_draft_tokens_total": "drafted",
    "vllm:spec_decode_num_accepted_tokens_total": "accepted",
}


@dataclass(frozen=True)
class Measurement:
    """
    Attributes:
        seconds: from the first request to the last answer.
        output_tokens: over all requests, the first token of each included.
        ttft_ms, tpot_ms: of each request.
        steps, drafted, accepted: of the server meanwhile; drafted is 0 without a method.
        outputs: text of each answer, in the order of the prompts.
        stats: what AdaDecode's worker counted; of several requests at once, a step serves them all.
        failed: requests without an answer.
    """

    seconds: float
    output_tokens: int
    ttft_ms: Sequence[float]
    tpot_ms: Sequence[float]
    steps: int
    drafted: int
    accepted: int
    outputs: Sequence[str]
    stats: Stats | None = None
    failed: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Output tokens, over whole requests."""
        return self.output_tokens / self.seconds

    @property
    def behind_first(self) -> int:
        """Output tokens behind the first one of each request."""
        return self.output_tokens - len(self.ttft_ms)


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
    result = send(server, prompts, max_tokens, concurrency, temperature)
    if not server.is_healthy():
        raise server.error("vllm serve ended")
    after = counters(server)
    counted = {name: int(after[name] - before[name]) for name in COUNTERS.values()}
    stats = server.stats() if adadecode else None
    if stats is not None:
        counted |= verified_drafts(stats)
    ttft, tpot = latencies(result)
    return Measurement(
        seconds=result["duration"],
        output_tokens=result["total_output_tokens"],
        ttft_ms=ttft,
        tpot_ms=tpot,
        outputs=result["generated_texts"],
        stats=stats,
        failed=result["failed"],
        **counted,
    )


def verified_drafts(stats: Stats) -> dict[str, int]:
    """AdaDecode's own count of draft tokens that were verified. With async scheduling `/metrics`
    does not have it: vLLM then counts the token slots that it reserved, padding included."""
    exits = stats["exits"].values()
    accepted = sum(counts["accepted_tokens"] for counts in exits)
    return {
        "drafted": accepted + sum(counts["rejected_tokens"] for counts in exits),
        "accepted": accepted,
    }


def warm_up(server: Server, prompts: Sequence[Sequence[int]], concurrency: int) -> None:
    """Answer a few prompts before anything is measured.

    Raises:
        ServerError: no request was answered.
    """
    chosen = [prompts[i % len(prompts)] for i in range(max(2, concurrency))]
    for temperature in (0.0, 0.7):
        send(server, chosen, 16, concurrency, temperature)


def send(
    server: Server,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    concurrency: int,
    temperature: float,
) -> dict[str, Any]:
    """What vLLM's generator says of the requests.

    Raises:
        ServerError: none was answered, or not all in time.
    """
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
        model_id=server.model,
        model_name=server.model,
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
    if result["completed"] == 0:
        reason = next((e for e in result["errors"] if e), "no reason given").strip().splitlines()
        raise server.error(f"no request was answered: {reason[-1]}")
    return result


def latencies(result: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Milliseconds to the first token of each answered request, and for each one behind it."""
    names = ("errors", "ttfts", "latencies", "output_lens")
    rows = zip(*(result[name] for name in names), strict=True)
    answered = [(ttft, latency, length) for error, ttft, latency, length in rows if not error]
    return [1e3 * ttft for ttft, _, _ in answered], [
        1e3 * (latency - ttft) / (length - 1) for ttft, latency, length in answered if length > 1
    ]


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


def peak_memory(server: Server) -> int:
    """Bytes: the sum of what each of the server's processes had resident at its peak."""
    total = 0
    for process in server.processes():
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{process.pid}/status", encoding="ascii", errors="ignore") as status:
                peaks = [line for line in status if line.startswith("VmHWM:")]
            total += sum(int(line.split()[1]) * 1024 for line in peaks)
    return total
