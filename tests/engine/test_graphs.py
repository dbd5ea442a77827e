"""Captured steps and verifications, recorded on a CPU: replays on other data are right.

A recording (recorded_graphs.py) does the same operations with the same numbers on the same memory
each time, as a CUDA graph does: whatever a step decides in Python, or leaves in memory that the
next one does not read, shows as other tokens.

Starts three engines, and uses vanilla and that of test_device_loop.py.
"""

from dataclasses import replace
from typing import Any

import pytest

from tests.support.engines import (
    DEVICE_LOOP,
    EnginePool,
    assert_same,
    divergences,
    generate,
    greedy,
    stats,
    token_ids,
)
from tests.support.graph_engines import get_graph_engine, replays
from vllm_adadecode.verify.graphs import VerificationGraphs, graph_sizes
from vllm_adadecode.verify.passes import VerificationPasses


@pytest.mark.parametrize(
    ("loop", "asynchronous"),
    [
        ("host", False),
        pytest.param("host", True, marks=pytest.mark.slow),
        ("device", False),
        ("device", True),
    ],
    ids=["host", "host-async", "device", "device-async"],
)
def test_output_is_vanillas(
    engines: EnginePool, prompts: list[str], loop: str, asynchronous: bool
) -> None:
    """With chunked prefill beside them, of batches of every size, and rounds without drafts."""
    engine = get_graph_engine(engines, loop, asynchronous)
    params = [greedy(8 + 4 * i) for i in range(12)]
    outputs = generate(engine, prompts[:12], params)
    vanilla = engines.get()
    assert_same(vanilla, outputs, generate(vanilla, prompts[:12], params))
    counts, replayed = stats(engine), replays(engine)
    assert counts["draft_acceptance_rate"] > 0.5
    rounds = counts["deferred_steps"]
    assert rounds > 10
    # Each round without a depth or prefill is vLLM's; but one that nobody knew to have no drafts.
    unseen = counts["plain_steps"] - replayed["all layers"]
    assert unseen in (range(3) if asynchronous else [0])
    assert replayed["all layers"] > 4
    assert replayed["draft"] == 0 if loop == "host" else replayed["draft"] >= rounds
    # Each takes the last span, and most take others.
    assert replayed["verification"] > 1.5 * rounds


@pytest.mark.parametrize("loop", ["host", "device"])
def test_sampling_is_the_same_as_without_graphs(
    engines: EnginePool, prompts: list[str], loop: str
) -> None:
    """Draws, cached logits and temperatures by request, all the same numbers."""
    params = [greedy(24, temperature=0.8 if i % 3 else 0.0, seed=i) for i in range(8)]
    engine = get_graph_engine(engines, loop)
    engine.collective_rpc(
        lambda worker: vars(worker.model_runner.speculator.ledger).pop("allowed", None)
    )
    outputs = token_ids(generate(engine, prompts[:8], params))
    assert replays(engine)["verification"] > 30
    plain = engines.get(speculative_config=DEVICE_LOOP)
    assert outputs == token_ids(generate(plain, prompts[:8], params))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_stale_plan_shows(
    engines: EnginePool, prompts: list[str], monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """The control: replays that read what they were captured with give other tokens."""
    engine = get_graph_engine(engines, "device", asynchronous)
    # Of overlapped rounds the device makes the plan.
    name = "load_overlapped" if asynchronous else "load"
    load = getattr(VerificationPasses, name)

    def one_off(self: VerificationPasses, *args: Any) -> None:
        load(self, *args)
        self.plans.offsets.copy_((self.plans.offsets - 1).clamp(min=0))

    monkeypatch.setattr(VerificationPasses, name, one_off)
    vanilla = engines.get()
    params = [greedy(32)] * 6
    reference = generate(vanilla, prompts[:6], params)
    found = divergences(vanilla, generate(engine, prompts[:6], params), reference)
    assert any(d.gap > 1e-3 for d in found)


def test_what_does_not_fit_runs_without_graphs(
    engines: EnginePool, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer exits in use, and more tokens than any graph has."""
    fitting: list[bool] = []
    descriptors = VerificationGraphs.descriptors

    def noted(self: VerificationGraphs, plan: Any) -> Any:
        found = descriptors(self, plan)
        fitting.append(found is not None)
        return found

    monkeypatch.setattr(VerificationGraphs, "descriptors", noted)
    engine = get_graph_engine(engines, "device")

    def fit_less(worker: Any) -> None:
        speculator = worker.model_runner.speculator
        graphs, thresholds = speculator.verification_graphs, speculator.ledger.thresholds
        speculator.fitting = graphs.sizes, thresholds
        graphs.sizes = graphs.sizes[graphs.sizes <= 4]
        confidence = (None, *thresholds.confidence[1:])
        speculator.ledger.thresholds = replace(thresholds, confidence=confidence)

    def fit_again(worker: Any) -> None:
        speculator = worker.model_runner.speculator
        graphs, ledger = speculator.verification_graphs, speculator.ledger
        graphs.sizes, ledger.thresholds = speculator.fitting

    engine.collective_rpc(fit_less)
    try:
        outputs = generate(engine, prompts[:6], greedy(24))
    finally:
        engine.collective_rpc(fit_again)
    vanilla = engines.get()
    assert_same(vanilla, outputs, generate(vanilla, prompts[:6], greedy(24)))
    assert stats(engine)["draft_tokens"] > 20
    assert replays(engine)["draft"] == 0
    assert {True, False} == set(fitting)
    assert replays(engine)["verification"] >= sum(fitting)


def test_a_step_s_graph_serves_several_drafts(engines: EnginePool) -> None:
    engine = get_graph_engine(engines, "device")

    def shapes(worker: Any) -> set[tuple[int, int, int]]:
        graphs = worker.model_runner.speculator.draft_graphs.graphs
        return {(desc.num_reqs, desc.row_tokens, desc.exit_index) for desc in graphs}

    expected = set()
    for rows in (1, 2, 4, 8):
        # The last of five drafts is tried from windows of five tokens.
        expected |= {(rows, tokens, e) for tokens in (1, 2, 4, 5) for e in (1, 2)} | {(rows, 1, 0)}
    assert engine.collective_rpc(shapes)[0] == expected


def test_graph_sizes() -> None:
    sizes = [1, 2, 4, *range(8, 257, 8)]
    # Full windows of all requests have one, however close the one before is.
    assert graph_sizes(sizes, 48) == [1, 2, 4, 8, 16, 24, 32, 40, 48]
    assert graph_sizes(sizes, 300)[-4:] == [152, 192, 240, 256]
    assert graph_sizes(sizes, 0) == graph_sizes([], 48) == []
