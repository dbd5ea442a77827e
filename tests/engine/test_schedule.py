"""Hundreds of requests of all kinds come and go at random: each one's output is its own.

Few seats, small steps, too few KV blocks, shared prefixes, aborts: requests wait, are chunked, are
preempted, hit the prefix cache and are verified in batches of any mix. All of it follows from one
seed.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
from vllm import LLM, RequestOutput, SamplingParams

from tests.support.engines import (
    EnginePool,
    assert_same,
    set_thresholds,
    slow_outputs,
    speculative,
    stats,
)

NUM_REQUESTS = 200
VOCAB = 2048
SPEC = speculative(num_speculative_tokens=5, exit_layers=[2, 4, 6])
# After processors, so that ties are told by what was compared.
PLAIN: dict[str, Any] = {"logprobs_mode": "processed_logprobs"}
TIGHT: dict[str, Any] = PLAIN | {
    "max_model_len": 384,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 96,
    "enable_prefix_caching": True,
    "block_size": 32,
    # 32 tokens each; 8 requests of up to 360 tokens want 96.
    "num_gpu_blocks_override": 24,
    "disable_log_stats": False,
}


@dataclass
class Request:
    """What is asked, when it comes, and when it is aborted (steps after its arrival)."""

    prompt: list[int]
    params: SamplingParams
    arrival: int
    abort_after: int | None = None

    @property
    def is_deterministic(self) -> bool:
        """Whether the output follows from the logits alone."""
        return self.params.temperature == 0 or self.params.top_k == 1


def random_params(rng: np.random.Generator) -> SamplingParams:
    """Greedy, or sampling that can only be greedy, or (one in ten) truly sampled."""

    def maybe(probability: float = 0.2) -> bool:
        return bool(rng.random() < probability)

    def some_tokens(count: int) -> list[int]:
        return rng.integers(1, VOCAB, count).tolist()

    max_tokens = int(rng.integers(1, 61))
    options: dict[str, Any] = {"max_tokens": max_tokens, "ignore_eos": maybe(0.5)}
    sampling = {"temperature": 1.0, "seed": int(rng.integers(1 << 30))}
    kind = rng.choice(["greedy", "top_k", "sampled"], p=[0.7, 0.2, 0.1])
    match kind:
        case "greedy":
            options["temperature"] = 0.0
        case "top_k":
            options |= sampling | {"top_k": 1, "min_p": 0.1}
        case "sampled":
            options |= sampling | {"temperature": 0.8, "min_p": 0.1}
    if maybe():
        options["presence_penalty"] = float(rng.uniform(-1, 2))
    if maybe():
        options["frequency_penalty"] = float(rng.uniform(-0.5, 1))
    if maybe():
        options["repetition_penalty"] = float(rng.uniform(1.02, 1.5))
    if maybe(0.15):
        # Of few tokens, the end of the sequence (0) is soon the best.
        options["allowed_token_ids"] = [0, *sorted(set(some_tokens(int(rng.choice([3, 600])))))]
    if maybe():
        options["bad_words"] = ["self", "return", " =", "):\n"][: rng.integers(1, 5)]
    if maybe(0.3):
        # Many, so that some are met.
        options["stop_token_ids"] = some_tokens(100)
    if maybe(0.3):
        options["min_tokens"] = int(rng.integers(1, max_tokens + 1))
    if maybe(0.15):
        options["stop"] = ["\n\n", "):"]
    if maybe():
        # Of many tokens, so that some become the best.
        options["logit_bias"] = {t: float(rng.uniform(-9, 9)) for t in some_tokens(300)}
    if maybe(0.3):
        options["logprobs"] = int(rng.integers(1, 4))
    elif maybe(0.3):
        options["logprob_token_ids"] = some_tokens(int(rng.integers(1, 9)))
    return SamplingParams(**options)


def random_requests(
    seed: int, texts: list[list[int]], count: int = NUM_REQUESTS, last_arrival: int = 330
) -> list[Request]:
    """Requests in order of their arrival."""
    rng = np.random.default_rng(seed)
    # Pieces of real text; many start at the start of one, so that they share prefixes.
    stream = list(chain.from_iterable(texts))
    starts = np.cumsum([0, *map(len, texts)])[:8]
    requests = []
    for arrival in sorted(rng.integers(0, last_arrival, count).tolist()):
        length = int(rng.integers(1, 301)) if rng.random() < 0.3 else int(rng.integers(1, 60))
        start = int(rng.choice(starts) if rng.random() < 0.6 else rng.integers(len(stream) - 400))
        requests.append(
            Request(
                prompt=stream[start : start + length],
                params=random_params(rng),
                arrival=arrival,
                abort_after=int(rng.integers(0, 40)) if rng.random() < 0.1 else None,
            )
        )
    return requests


def serve(engine: LLM, requests: list[Request]) -> dict[int, RequestOutput]:
    """Run a schedule step by step; outputs of the requests that finished."""
    core = engine.llm_engine
    waiting = list(enumerate(requests))
    aborts = [(r.arrival + r.abort_after, i) for i, r in waiting if r.abort_after is not None]
    aborted: set[int] = set()
    finished: dict[int, RequestOutput] = {}
    step = 0
    while waiting or core.has_unfinished_requests():
        while waiting and waiting[0][1].arrival <= step:
            i, request = waiting.pop(0)
            core.add_request(str(i), {"prompt_token_ids": request.prompt}, request.params.clone())
        due = [i for when, i in aborts if when == step and i not in finished]
        if due:
            core.abort_request([str(i) for i in due])
            aborted.update(due)
        for output in core.step() if core.has_unfinished_requests() else ():
            i = int(output.request_id)
            assert i not in finished, "an output after the last"
            assert i not in aborted, "an output after its abort"
            if output.finished:
                finished[i] = output
        step += 1
    assert set(finished) == set(range(len(requests))) - aborted
    return finished


@pytest.fixture(scope="module")
def vanilla(engines: EnginePool) -> LLM:
    return engines.get(**PLAIN, max_num_seqs=64)


@pytest.fixture(scope="module")
def texts(vanilla: LLM, prompts: list[str]) -> list[list[int]]:
    tokenizer = vanilla.get_tokenizer()
    return [tokenizer.encode(p) for p in prompts]


@pytest.fixture(scope="module")
def requests_(texts: list[list[int]]) -> list[Request]:
    return random_requests(3, texts)


@pytest.fixture(scope="module")
def reference(vanilla: LLM, requests_: list[Request]) -> list[RequestOutput]:
    """The references: vanilla, all at once, with room for all."""
    return vanilla.generate(
        [{"prompt_token_ids": r.prompt} for r in requests_],
        [r.params.clone() for r in requests_],
        use_tqdm=False,
    )


@pytest.mark.parametrize(
    ("loop", "asynchronous"),
    [
        pytest.param("host", False, marks=pytest.mark.slow),
        pytest.param("host", True, marks=pytest.mark.slow),
        ("device", True),
    ],
    ids=["sync", "async", "device-async"],
)
def test_each_request_as_its_vanilla_reference(
    engines: EnginePool,
    vanilla: LLM,
    requests_: list[Request],
    reference: list[RequestOutput],
    loop: str,
    asynchronous: bool,
) -> None:
    options: dict[str, Any] = {"async_scheduling": True} if asynchronous else {}
    engine = engines.get(speculative_config=SPEC | {"draft_loop": loop}, **TIGHT, **options)
    set_thresholds(engine, 0.4, 0.5, 0.3)
    stats(engine, reset=True)
    with slow_outputs() if asynchronous else nullcontext():
        finished = serve(engine, requests_)

    chosen = [i for i in sorted(finished) if requests_[i].is_deterministic]
    ours, theirs = [finished[i] for i in chosen], [reference[i] for i in chosen]
    assert_same(vanilla, ours, theirs, [requests_[i].params for i in chosen])
    for i, a, b in zip(chosen, ours, theirs, strict=True):
        mine, its = a.outputs[0], b.outputs[0]
        if mine.token_ids != its.token_ids:
            continue  # a tie, allowed by assert_same
        assert mine.text == its.text
        assert (mine.finish_reason, mine.stop_reason) == (its.finish_reason, its.stop_reason)
        assert (mine.logprobs is None) == (its.logprobs is None)
        for x, y in zip(mine.logprobs or (), its.logprobs or (), strict=True):
            assert not requests_[i].params.logprob_token_ids or x.keys() == y.keys()
            for token in set(x) & set(y):
                assert x[token].logprob == pytest.approx(y[token].logprob, abs=2e-3)
    for i in set(finished) - set(chosen):
        tokens = finished[i].outputs[0].token_ids
        assert 1 <= len(tokens) <= (requests_[i].params.max_tokens or 0)

    # Whoever left took its window along; the runner hears of the last ones with the next step.
    windows = engine.collective_rpc(lambda worker: worker.model_runner.speculator.ledger.windows)[0]
    assert len(windows._windows) <= 8

    # The schedule was as hard as it was meant to be.
    assert len(finished) < len(requests_)
    preemptions = [m for m in engine.get_metrics() if m.name == "vllm:num_preemptions"]
    assert preemptions[0].value > 10
    assert sum((o.num_cached_tokens or 0) > 0 for o in finished.values()) > 10
    counts = stats(engine)
    assert min(counts["mixed_steps"], counts["deferred_steps"]) > 50
    assert (counts["overlapped_steps"] > 50) == (loop == "device")
    assert counts["accepted_tokens"] > 700
    assert counts["draft_tokens"] - counts["accepted_tokens"] > 200
    reasons = {(o.outputs[0].finish_reason, type(o.outputs[0].stop_reason)) for o in ours}
    assert reasons == {
        ("length", type(None)),
        ("stop", type(None)),
        ("stop", int),
        ("stop", str),
    }


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["host", "device"])
def test_drafts_by_batch_size(
    engines: EnginePool,
    vanilla: LLM,
    requests_: list[Request],
    reference: list[RequestOutput],
    loop: str,
) -> None:
    """K follows the batch from step to step while async scheduling is ahead of the outputs."""
    by_batch_size = [(1, 2, 5), (3, 4, 2), (5, 6, 0), (7, 8, 3)]
    options = {"num_speculative_tokens_per_batch_size": by_batch_size, "draft_loop": loop}
    engine = engines.get(speculative_config=SPEC | options, async_scheduling=True, **TIGHT)
    set_thresholds(engine, 0.0)
    some = [replace(r, arrival=2 * r.arrival) for r in requests_[:60]]
    stats(engine, reset=True)
    with slow_outputs():
        finished = serve(engine, some)
    chosen = [i for i in sorted(finished) if some[i].is_deterministic]
    ours, theirs = [finished[i] for i in chosen], [reference[i] for i in chosen]
    assert_same(vanilla, ours, theirs, [some[i].params for i in chosen])
    counts = stats(engine)
    assert counts["accepted_tokens"] > 120
    assert counts["plain_steps"] > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draft_sample_method", "loop"),
    [("greedy", "host"), ("probabilistic", "device")],
    ids=["greedy", "probabilistic-device-async"],
)
def test_seeded_sampling_in_another_schedule(
    engines: EnginePool, texts: list[list[int]], draft_sample_method: str, loop: str
) -> None:
    """A seeded request samples the same tokens, whoever shares its batches.

    Noise is keyed by seed and position, and drafts depend on the request alone. It need not hold
    for a request that is preempted, or whose drafts do not all fit into a step: then its windows
    are cut elsewhere, and a token that was a draft in one schedule (accepted or not, by one random
    number) may be sampled after the last draft in the other (by others). Both follow the target's
    distribution, as test_sampling.py shows. So this engine has room for all.
    """
    room: dict[str, Any] = TIGHT | {"max_num_batched_tokens": 512, "num_gpu_blocks_override": 160}
    options: dict[str, Any] = {"async_scheduling": True} if loop == "device" else {}
    spec = SPEC | {"draft_sample_method": draft_sample_method, "draft_loop": loop}
    engine = engines.get(speculative_config=spec, **room, **options)
    set_thresholds(engine, 0.4, 0.5, 0.3)
    first = random_requests(1, texts, count=48, last_arrival=70)
    rng = np.random.default_rng(2)
    for r in first:
        r.params.temperature, r.params.top_k = 0.8, 0
        r.params.seed = int(rng.integers(1 << 30))
        r.abort_after = None
    order = rng.permutation(len(first))
    arrivals = sorted(rng.integers(0, 180, len(first)).tolist())
    second = [
        Request(first[i].prompt, first[i].params, arrival)
        for i, arrival in zip(order, arrivals, strict=True)
    ]
    stats(engine, reset=True)
    once = serve(engine, first)
    again = serve(engine, second)
    preemptions = [m for m in engine.get_metrics() if m.name == "vllm:num_preemptions"]
    assert preemptions[0].value == 0
    assert stats(engine)["accepted_tokens"] > 180
    different = [
        int(i)
        for place, i in enumerate(order)
        if once[int(i)].outputs[0].token_ids != again[place].outputs[0].token_ids
    ]
    # A confidence or an acceptance may lie within rounding of its threshold: about 1e-5 a token.
    assert len(different) <= 1
