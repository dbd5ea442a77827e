"""Costs measured at start: what is asked of the engine, and what is made of the times.

The engine's part runs on a real one: its first requests must not notice that there were others.
"""

from __future__ import annotations

import random
from typing import Any
from unittest.mock import patch

import pytest
from vllm import SamplingParams
from vllm.v1.worker.gpu.warmup import warmup_kernels

from tests.support.engines import EnginePool, assert_same, generate, greedy, speculative, stats
from tests.support.fake_target import draft
from vllm_adadecode.adaptive.draft_length import AdaptiveDraftLength, Choice, RoundCosts
from vllm_adadecode.adaptive.profile import _costs, all_alike
from vllm_adadecode.heads.thresholds import ExitThresholds

REAL = ExitThresholds.of((0.7, 1.0, 0.9), (0.5, 0.5, 0.25))


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("accept_at", "open_gates", "heads"),
    [(None, False, []), (0, False, [0]), (2, False, [2]), (None, True, [0, 2])],
)
def test_every_request_does_the_same(
    accept_at: int | None, open_gates: bool, heads: list[int], probability: float
) -> None:
    """Whatever heads and gates say, at the exits and gates of the real thresholds."""
    run = draft(
        lambda *_: min(max(probability, 1e-3), 1 - 1e-3),
        [3],
        thresholds=all_alike(REAL, accept_at, open_gates),
        gate=lambda *_: probability,
    )
    drafts = 0 if accept_at is None else 3
    assert run.state.num_drafts.tolist() == [drafts]
    assert set(run.state.exits[0, :drafts].tolist()) == ({accept_at} if drafts else set())
    assert [e for e, _ in run.target.checks] == heads * max(1, drafts)
    gates = [0] if accept_at == 0 else [0, 2]
    assert [e for e, _ in run.target.gates_evaluated] == gates * max(1, drafts)


def test_costs_are_differences_of_rounds() -> None:
    # Without drafts, in vain, a draft at each of three exits, in vain with open gates.
    table = [(1, [10.0, 11.0, 20.0, 10.0, 60.0, 15.0]), (4, [20.0, 19.0, 70.0, 20.0, 60.0, 29.0])]
    found = _costs(table, drafts=5, real=REAL)
    assert found == RoundCosts(
        batch_sizes=(1, 4),
        plain=(10.0, 20.0),
        failed=(1.0, 0.0),
        # The second exit is turned off; at 4, the third seemed cheaper than the first.
        extended=((2.0, 2.0, 10.0), (10.0, 10.0, 10.0)),
        check=(2.0, 5.0),
    )
    without_gates = [(size, times[:-1]) for size, times in table]
    assert _costs(without_gates, 5, REAL).check == (0.0, 0.0)


def _budget(worker: Any) -> dict[str, Any]:
    speculator = worker.model_runner.speculator
    ledger, config = speculator.ledger, speculator.speculative_config
    thresholds = config.confidence_threshold, config.gate_threshold
    return {
        "costs": ledger.draft_length.costs,
        "statistics": ledger.draft_length.statistics,
        "windows": len(ledger.windows._windows),
        "thresholds": (ledger.thresholds, ExitThresholds.of(*thresholds)),
        "requests": len(worker.model_runner.req_states.req_id_to_index),
    }


def _make_drafts_dear(worker: Any) -> None:
    """Drafts that cost a hundred rounds each."""
    draft_length = worker.model_runner.speculator.ledger.draft_length
    costs = draft_length.costs
    exits = len(costs.extended[0])
    dear = tuple((100 * seconds,) * exits for seconds in costs.plain)
    draft_length.costs = RoundCosts(costs.batch_sizes, costs.plain, costs.plain, dear, costs.check)
    draft_length._plans.clear()


class TestEngine:
    @pytest.fixture(
        params=[("host", False), ("host", True), ("device", True)],
        ids=["host-sync", "host-async", "device-async"],
    )
    def engine(self, request: pytest.FixtureRequest, engines: EnginePool) -> Any:
        loop, async_scheduling = request.param
        return engines.get(
            speculative_config=speculative(cost_aware=True, draft_loop=loop),
            async_scheduling=async_scheduling,
        )

    def test_measured_before_the_first_request(self, engine: Any) -> None:
        found = engine.collective_rpc(_budget)[0]
        costs = found["costs"]
        assert costs.batch_sizes[0] == 1
        assert all(seconds > 0 for seconds in costs.plain)
        assert all(list(row) == sorted(row) for row in costs.extended)
        now, configured = found["thresholds"]
        assert now == configured
        assert found["requests"] == found["windows"] == 0

    def test_warm_up_is_nobodys_request(self, engine: Any) -> None:
        """As on a GPU, and with vLLM 0.33 on a CPU: with or without costs, it is not counted."""

        def warm_up(worker: Any) -> list[Any]:
            from vllm.v1.worker.cpu_worker import CPUWorker

            runner, ledger = worker.model_runner, worker.model_runner.speculator.ledger
            kept, ledger.draft_length = ledger.draft_length, None
            found = []

            def of_vllm(self: Any) -> None:
                warmup_kernels(runner, worker.execute_model, worker.sample_tokens)
                runner.speculator.resolve(everything=True)
                found.append(bool(ledger.counters))

            spec = worker.vllm_config.speculative_config
            with (
                patch.object(CPUWorker, "compile_or_warm_up_model", of_vllm),
                patch.object(spec, "cost_aware", False),
            ):
                worker.compile_or_warm_up_model()
            ledger.draft_length = kept
            return [*found, bool(ledger.counters), len(ledger.windows._windows)]

        assert engine.collective_rpc(warm_up) == [[True, False, 0]]

    def test_output_is_vanilla_s_whatever_is_chosen(
        self, engine: Any, engines: EnginePool, prompts: list[str]
    ) -> None:
        vanilla = engines.get()
        reference = generate(vanilla, prompts[:12], greedy())
        for batch in (1, 12):
            stats(engine, reset=True)
            assert_same(vanilla, generate(engine, prompts[:12], greedy(), batch), reference)
        assert stats(engine)["generated_tokens"] > 0

    def test_output_is_vanilla_s_with_any_choices(
        self,
        engine: Any,
        engines: EnginePool,
        prompts: list[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        rng, made = random.Random(0), []

        def any_choice(draft_length: AdaptiveDraftLength, num_reqs: int) -> Choice:
            made.append(Choice(rng.randint(0, draft_length.most.drafts), rng.randint(1, 3)))
            return made[-1]

        monkeypatch.setattr(AdaptiveDraftLength, "choose", any_choice)
        vanilla = engines.get()
        reference = generate(vanilla, prompts[:12], greedy())
        stats(engine, reset=True)
        assert_same(vanilla, generate(engine, prompts[:12], greedy(), 12), reference)
        assert {choice.exits for choice in made} == {1, 2, 3}
        exits = stats(engine)["exits"].values()
        assert all(counts["accepted_tokens"] > 0 for counts in exits)

    def test_drafts_that_do_not_pay_are_not_made(
        self, engine: Any, engines: EnginePool, prompts: list[str]
    ) -> None:
        prompts = prompts[:12]
        # Enough windows for an opinion.
        generate(engine, prompts, greedy())
        engine.collective_rpc(_make_drafts_dear)
        stats(engine, reset=True)
        vanilla = engines.get()
        reference = generate(vanilla, prompts, greedy())
        assert_same(vanilla, generate(engine, prompts, greedy(), 4), reference)
        counted = stats(engine)
        # All but the rounds that probe.
        assert counted["verification_steps"] > 0.9 * counted["generated_tokens"]

    def test_requests_with_a_seed_draft_all_the_same(
        self, engine: Any, prompts: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def never(draft_length: AdaptiveDraftLength, num_reqs: int) -> Choice:
            return Choice(0, 1)

        monkeypatch.setattr(AdaptiveDraftLength, "choose", never)
        for params, drafts in (
            (greedy(), False),
            (greedy(seed=1), False),
            (SamplingParams(temperature=0.8, max_tokens=16, ignore_eos=True), False),
            (SamplingParams(temperature=0.8, max_tokens=16, ignore_eos=True, seed=1), True),
        ):
            stats(engine, reset=True)
            generate(engine, prompts[:2], params)
            assert (stats(engine)["draft_tokens"] > 0) == drafts, params
