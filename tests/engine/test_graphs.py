"""Captured steps and verifications, recorded on a CPU: replays on other data are right.

A recording (recorded_graphs.py) does the same operations with the same numbers on the same memory
each time, as a CUDA graph does: whatever a step decides in Python, or leaves in memory that the
next one does not read, shows as other tokens.
"""

import random
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from vllm import LLM
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

from tests.support.engines import (
    EnginePool,
    assert_same,
    divergences,
    generate,
    greedy,
    speculative,
    stats,
    token_ids,
)
from tests.support.recorded_graphs import RecordedGraph, graphs_are_recorded
from vllm_adadecode.engine import speculator as proposer
from vllm_adadecode.verify.graphs import VerificationGraphs, graph_sizes
from vllm_adadecode.verify.passes import VerificationPasses

SIZES = [1, 2, 4, 8, 16, 32, 48]
SPEC: dict[str, Any] = {"num_speculative_tokens": 5}
CROWDED: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 96}


def capture(worker: Any) -> None:
    """As vLLM does at its start where there is a GPU; its own graphs as well."""
    runner = worker.model_runner
    speculator = runner.speculator
    compilation = runner.compilation_config
    compilation.cudagraph_capture_sizes = SIZES
    compilation.max_cudagraph_capture_size = SIZES[-1]
    mode = CUDAGraphMode.FULL_DECODE_ONLY
    with graphs_are_recorded(), patch.object(proposer, "why_not_captured", lambda *_: None):
        manager = ModelCudaGraphManager(runner.vllm_config, runner.device, mode, decode_query_len=1)
        manager.capture(
            runner.model,
            runner.model_state,
            runner.input_buffers,
            None,
            runner.block_tables,
            runner.attn_groups,
            runner.kv_cache_config,
        )
        speculator.init_cudagraph_manager(mode)
        speculator.capture()
    runner.cudagraph_manager = manager
    runner._keep_from_replay(manager)
    prepare = runner.model_state.prepare_attn

    def prepare_attn(*args: Any, **kwargs: Any) -> Any:
        # A GPU's builders keep what their graphs read in one place.
        RecordedGraph.outer_metadata = prepare(*args, **kwargs)
        return RecordedGraph.outer_metadata

    runner.model_state.prepare_attn = prepare_attn


def note_replays(worker: Any) -> None:
    """From now on, count replays by what was replayed."""
    runner = worker.model_runner
    speculator = runner.speculator
    runner.replays = {"verification": 0, "draft": 0, "all layers": 0}
    for name, manager in (
        ("verification", speculator.verification_graphs),
        ("draft", speculator.draft_graphs),
        ("all layers", runner.cudagraph_manager),
    ):
        if manager is None:
            continue
        vars(manager).pop("run_fullgraph", None)

        def counted(desc: Any, name: str = name, run: Any = manager.run_fullgraph) -> Any:
            runner.replays[name] += 1
            return run(desc)

        manager.run_fullgraph = counted


def replays(engine: LLM) -> dict[str, int]:
    return engine.collective_rpc(lambda worker: dict(worker.model_runner.replays))[0]


def pause_now_and_then(worker: Any) -> None:
    """Rounds without drafts in between, as adaptive draft length would have them."""
    ledger = worker.model_runner.speculator.ledger
    rng = random.Random(0)

    def allowed(*args: Any) -> Any:
        caps, used_exits = type(ledger).allowed(ledger, *args)
        if rng.random() < 0.4:
            caps[:] = 0
        return caps, used_exits

    ledger.allowed = allowed


def get_engine(engines: EnginePool, loop: str, **options: Any) -> LLM:
    """One with captured graphs."""
    spec = speculative(**SPEC, draft_loop=loop, **options.pop("spec", {}))
    engine = engines.get(speculative_config=spec, **CROWDED, **options)
    if not engine.collective_rpc(lambda worker: hasattr(worker.model_runner, "replays"))[0]:
        engine.collective_rpc(capture)
        engine.collective_rpc(pause_now_and_then)
    engine.collective_rpc(note_replays)
    stats(engine, reset=True)
    return engine


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("loop", ["host", "device"])
def test_output_is_vanillas(
    engines: EnginePool, prompts: list[str], loop: str, async_scheduling: bool
) -> None:
    """With chunked prefill beside them, of batches of every size, and rounds without drafts."""
    engine = get_engine(engines, loop, async_scheduling=async_scheduling)
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
    assert unseen in (range(3) if async_scheduling and loop != "host" else [0])
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
    spec = {"draft_sample_method": "probabilistic"}
    engine = get_engine(engines, loop, spec=spec)
    engine.collective_rpc(
        lambda worker: vars(worker.model_runner.speculator.ledger).pop("allowed", None)
    )
    outputs = token_ids(generate(engine, prompts[:8], params))
    assert replays(engine)["verification"] > 30
    plain = engines.get(speculative_config=speculative(**SPEC, **spec), max_num_seqs=8)
    assert outputs == token_ids(generate(plain, prompts[:8], params))


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_a_stale_plan_shows(
    engines: EnginePool,
    prompts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    async_scheduling: bool,
) -> None:
    """The control: replays that read what they were captured with give other tokens."""
    engine = get_engine(engines, "device", async_scheduling=async_scheduling)
    # Of overlapped rounds the device makes the plan.
    name = "load_overlapped" if async_scheduling else "load"
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
    engine = get_engine(engines, "device", async_scheduling=False)

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
    engine = get_engine(engines, "device", async_scheduling=False)

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
