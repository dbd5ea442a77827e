"""The draft loop on the device: the same as the host's, and the same work whatever the data.

On the demo target with its heads, gates and draft vocabulary; tests/unit/test_device_loop.py has
more without an engine. Starts two engines, and uses vanilla.
"""

from dataclasses import dataclass
from typing import Any

import pytest
from vllm import LLM

from tests.support.engines import (
    DEVICE_LOOP,
    EnginePool,
    EveryStep,
    assert_same,
    generate,
    greedy,
    poll_with,
    set_draft_loop,
    stats,
    token_ids,
)
from tests.support.op_trace import OpTrace, first_difference, traced
from vllm_adadecode.draft.buffers import padded_size
from vllm_adadecode.draft.readback import RoundReadback
from vllm_adadecode.draft.status_poll import StatusPoll


def note_rounds(worker: Any) -> None:
    """Have the worker keep every round's windows, by batch row, with their drafts."""
    ledger = worker.model_runner.speculator.ledger
    keep_windows = ledger.keep_windows
    ledger.noted = []

    def keep_and_note(input_batch: Any, num_sampled: Any, result: Any) -> None:
        keep_windows(input_batch, num_sampled, result)
        if not result.limits.any():
            return  # the host's loop does not run in such a round
        state = result.state
        ledger.noted.append(
            [
                (ids, state.depths[row, : len(ids) + 1].tolist(), state.exits[row, : len(ids)])
                for row, ids in enumerate(ledger.last_drafts)
            ]
        )

    ledger.keep_windows = keep_and_note


def rounds_of(
    engine: LLM, prompts: list[str], params: list[Any]
) -> tuple[list[list[int]], Any, dict[str, Any]]:
    """Outputs, every round's windows, and counts."""
    engine.collective_rpc(note_rounds)
    stats(engine, reset=True)
    outputs = token_ids(generate(engine, prompts, params))
    counts = stats(engine)

    def take(worker: Any) -> Any:
        ledger = worker.model_runner.speculator.ledger
        del ledger.keep_windows
        return ledger.noted

    return outputs, engine.collective_rpc(take)[0], counts


def test_every_round_equals_the_hosts(
    engines: EnginePool, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draft tokens, depths, exits and counts, round by round, of greedy and sampled requests."""
    # Requests end at different times, so that batches of many sizes are padded.
    params = [greedy(10 + 5 * i, temperature=0.8 if i % 3 else 0.0, seed=i) for i in range(9)]
    engine = engines.get(speculative_config=DEVICE_LOOP)
    found = {}
    for loop in ("host", "device"):
        set_draft_loop(engine, loop)
        found[loop] = rounds_of(engine, prompts[:9], params)
    tokens, windows, counts = found["host"]
    assert len(windows) > 15
    assert counts["draft_tokens"] > 100
    assert found["device"][0] == tokens
    assert str(found["device"][1]) == str(windows)
    on_device = dict(found["device"][2])
    # The first pass of a round runs unpolled, also where every request is at its end.
    assert 0 <= on_device["draft_layers"] - counts["draft_layers"] <= 2 * 2
    for name in ("draft_layers", "layers_executed_per_token"):
        on_device[name] = counts[name]
    assert on_device == counts
    assert all(e["heads_evaluated"] for e in counts["exits"].values())
    assert any(e["gates_evaluated"] for e in counts["exits"].values())

    # Running everything, and recording it as late as may be, changes nothing but the passes.
    engine.collective_rpc(poll_with(EveryStep()))
    monkeypatch.setattr(RoundReadback, "has_arrived", lambda _: False)
    try:
        outputs, all_windows, all_counts = rounds_of(engine, prompts[:9], params)
    finally:
        engine.collective_rpc(poll_with(StatusPoll()))
    assert outputs == tokens
    assert str(all_windows) == str(windows)
    assert all_counts["exits"] == counts["exits"]
    assert all_counts["draft_token_layers"] == counts["draft_token_layers"]
    assert all_counts["draft_layers"] > counts["draft_layers"]


# --- the same work whatever the data -----------------------------------------------------------


@dataclass
class Round:
    """A traced round: rows after padding, the drafts, and what was asked of the device."""

    num_rows: int
    drafts: list[list[int]]
    trace: OpTrace


def trace_rounds(engine: LLM, prompts: list[str], max_tokens: int) -> list[Round]:
    """Trace `propose` for every batch of a generation; prompts are not in the rounds."""

    def install(worker: Any) -> None:
        speculator = worker.model_runner.speculator
        propose = speculator.propose
        speculator.rounds = []

        def propose_traced(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            if input_batch.has_prefill:
                return propose(input_batch, *args, **kwargs)
            speculator.resolve()
            with traced() as trace:
                drafts = propose(input_batch, *args, **kwargs)
            size = padded_size(input_batch.num_reqs, speculator.max_num_reqs)
            speculator.rounds.append(Round(size, drafts.tolist(), trace))
            return drafts

        speculator.propose = propose_traced

    def remove(worker: Any) -> Any:
        speculator = worker.model_runner.speculator
        del speculator.propose
        return speculator.rounds

    engine.collective_rpc(install)
    try:
        generate(engine, prompts, greedy(max_tokens, temperature=0.7, seed=5))
    finally:
        rounds: list[Round] = engine.collective_rpc(remove)[0]
    return rounds


@pytest.fixture(scope="module")
def always(engines: EnginePool, prompts: list[str]) -> list[Round]:
    """Rounds of 3 and of 2 requests, on the device with all steps."""
    engine = engines.get(speculative_config=DEVICE_LOOP)
    engine.collective_rpc(poll_with(EveryStep()))
    return [r for n in (3, 2) for r in trace_rounds(engine, prompts[:n], 10)]


def test_steps_wait_for_nothing(always: list[Round]) -> None:
    assert len(always) > 6
    assert [r.trace.synchronisations for r in always] == [[]] * len(always)


def test_the_host_waits_where_it_polls(engines: EnginePool, prompts: list[str]) -> None:
    """The controls: the host's loop, and polls after each step, by which work depends on data."""
    engine = engines.get(speculative_config=DEVICE_LOOP)
    set_draft_loop(engine, "host")
    try:
        rounds = trace_rounds(engine, prompts[:2], 8)
    finally:
        set_draft_loop(engine, "device")
    assert all(len(r.trace.synchronisations) > 3 for r in rounds)
    engine.collective_rpc(poll_with(StatusPoll()))
    rounds = trace_rounds(engine, prompts[:2], 8)
    reads = [s for r in rounds for s in r.trace.synchronisations if s == "tolist"]
    assert len(reads) > 2 * len(rounds)
    names = {str([name for name, *_ in r.trace.operations]) for r in rounds if r.num_rows == 2}
    assert len(names) > 1


def loop_operations(round_: Round) -> list[tuple[Any, ...]]:
    """Of a round, what would be captured: from the first launch of a step to the last."""
    found = round_.trace.operations
    steps = [i for i, (name, *_) in enumerate(found) if name == "kernel draft_step_reference"]
    return found[steps[0] : steps[-1] + 1]


def test_work_does_not_depend_on_data(always: list[Round]) -> None:
    """Operations, shapes, scalars, addresses and allocations: equal for one batch size."""
    by_size: dict[int, list[Round]] = {}
    for r in always:
        by_size.setdefault(r.num_rows, []).append(r)
    assert set(by_size) >= {2, 4}
    for size in (2, 4):
        # The first of a size makes the host's tensors that all others read, as the warm-up before a
        # capture does.
        rounds = by_size[size][1:]
        assert len({str(r.drafts) for r in rounds}) > 1, "the rounds had the same data"
        first = loop_operations(rounds[0])
        # Five drafts through three spans: states are stored after each, and read before two.
        moved = [name for name, *_ in first].count("kernel _move_states_reference")
        assert moved == 5 * (3 + 2)
        assert len(first) > 500
        for other in rounds[1:]:
            # pytest would take minutes to tell such lists apart.
            assert first_difference(loop_operations(other), first) == ""
            assert first_difference(other.trace.allocated, rounds[0].trace.allocated) == ""
    # The control: another batch size is other work.
    two, four = by_size[2][0], by_size[4][0]
    assert first_difference(loop_operations(two), loop_operations(four))
    assert first_difference(two.trace.allocated, four.trace.allocated)


@pytest.mark.parametrize(
    "asynchronous", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sync", "async"]
)
def test_output_is_vanillas_in_crowded_batches(
    engines: EnginePool, prompts: list[str], monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """Chunked prefill beside drafting, and more requests than rows; rounds are recorded late."""
    monkeypatch.setattr(RoundReadback, "has_arrived", lambda _: False)
    crowded: dict[str, Any] = {"max_num_seqs": 6, "max_num_batched_tokens": 64}
    options: dict[str, Any] = {"async_scheduling": True} if asynchronous else {}
    engine = engines.get(speculative_config=DEVICE_LOOP, **crowded, **options)
    params = [greedy(6 + 3 * i) for i in range(9)]
    outputs = generate(engine, prompts[:9], params)
    vanilla = engines.get()
    assert_same(vanilla, outputs, generate(vanilla, prompts[:9], params))
    counts = stats(engine)
    assert min(counts["mixed_steps"], counts["deferred_steps"]) > 5
