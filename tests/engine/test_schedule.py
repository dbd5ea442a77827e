"""Hundreds of requests of all kinds come and go at random: each one's output is its own.

Few seats, small steps, too few KV blocks, shared prefixes, aborts: requests wait, are chunked, are
preempted, hit the prefix cache and are verified in batches of any mix. All of it follows from one
seed.
"""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from vllm import LLM, RequestOutput

from tests.soak import MODES, Soak
from tests.support.engines import (
    EnginePool,
    set_thresholds,
    slow_outputs,
    speculative,
    stats,
)
from tests.support.schedules import (
    PLAIN,
    TIGHT,
    Request,
    compare,
    random_events,
    random_requests,
    serve,
    twins,
)

NUM_REQUESTS, LAST_ARRIVAL = 200, 330
SPEC = speculative(num_speculative_tokens=5, exit_layers=[2, 4, 6])


@pytest.fixture(scope="module")
def vanilla(engines: EnginePool) -> LLM:
    return engines.get(**PLAIN, max_num_seqs=64)


@pytest.fixture(scope="module")
def texts(vanilla: LLM, prompts: list[str]) -> list[list[int]]:
    tokenizer = vanilla.get_tokenizer()
    return [tokenizer.encode(p) for p in prompts]


@pytest.fixture(scope="module")
def requests_(texts: list[list[int]]) -> list[Request]:
    return random_requests(3, texts, NUM_REQUESTS, LAST_ARRIVAL)


@pytest.fixture(scope="module")
def reference(vanilla: LLM, requests_: list[Request]) -> list[RequestOutput]:
    return twins(vanilla, requests_)


def assert_as_plain(
    vanilla: LLM,
    requests: list[Request],
    finished: dict[int, RequestOutput],
    reference: list[RequestOutput],
) -> None:
    found = compare(vanilla, requests, finished, reference)
    assert [d for d in found if d.kind != "tie"] == []
    # Ties are rare; many of them would hide something else.
    assert len(found) <= len(finished) // 10


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
        finished = serve(engine, requests_, random_events(3, LAST_ARRIVAL))
    assert_as_plain(vanilla, requests_, finished, reference)

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
    reasons = {
        (o.outputs[0].finish_reason, type(o.outputs[0].stop_reason)) for o in finished.values()
    }
    assert reasons == {
        ("length", type(None)),
        ("stop", type(None)),
        ("stop", int),
        ("stop", str),
    }


@pytest.mark.parametrize(
    ("kinds", "change", "told"),
    [
        ({"greedy"}, lambda o: None, []),
        ({"greedy"}, lambda o: setattr(o.outputs[0], "token_ids", [7, 7]), ["tokens"]),
        ({"greedy"}, lambda o: setattr(o.outputs[0], "text", "x"), ["text"]),
        ({"greedy"}, lambda o: setattr(o.outputs[0], "stop_reason", "x"), ["finish"]),
        ({"greedy", "logprobs"}, lambda o: o.outputs[0].logprobs.pop(), ["logprobs"]),
        ({"greedy", "logprobs"}, lambda o: less_likely(o.outputs[0].logprobs), ["logprobs"]),
        (
            {"greedy", "prompt_logprobs"},
            lambda o: less_likely(o.prompt_logprobs),
            ["prompt_logprobs"],
        ),
        ({"n > 1"}, lambda o: o.outputs.pop(), ["completions"]),
        ({"sampled"}, lambda o: setattr(o.outputs[0], "token_ids", []), ["length"]),
    ],
)
def test_what_is_not_as_plain_is_told(
    vanilla: LLM,
    requests_: list[Request],
    reference: list[RequestOutput],
    kinds: set[str],
    change: Callable[[Any], object],
    told: list[str],
) -> None:
    """Negative control: one output is another, by one thing each."""
    at = next(i for i, r in enumerate(requests_) if kinds <= set(r.kinds) and len(r.prompt) > 1)
    changed = deepcopy(reference[at])
    change(changed)
    found = compare(vanilla, requests_, dict(enumerate(reference)) | {at: changed}, reference)
    assert [(d.request, d.kind) for d in found] == [(at, kind) for kind in told]


def less_likely(logprobs: Any) -> None:
    for score in logprobs[-1].values():
        score.logprob -= 0.01


def test_the_soak(engines: EnginePool) -> None:
    """A short schedule of it, on the engine above; and with verification broken, which it tells."""
    seed = list(MODES).index("device, async")
    line = Soak(engines, 30).schedule(seed)
    assert line["differences"] == []
    assert line["counts"]["accepted_tokens"] > 50
    assert line["probe"][1] > 10
    broken = Soak(engines, 12, is_broken=True).schedule(seed)
    assert "tokens" in [kind for _, kind, _ in broken["differences"]]


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
    assert_as_plain(vanilla, some, finished, reference)
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
    first = random_requests(1, texts, 48, 70)
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
