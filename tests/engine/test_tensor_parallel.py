"""Two tensor-parallel ranks, each its own process, decide alike and say what vLLM's two say."""

import time
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
from vllm import LLM, RequestOutput, SamplingParams

from tests.support.engines import (
    DEFAULTS,
    DEMO_MODEL,
    EnginePool,
    assert_same,
    async_scheduling_on_cpu,
    generate,
    greedy,
    speculative,
    stop,
)
from tests.support.heads_samples import demo_heads

# Few seats and small steps: prefill in chunks beside pending tokens.
OPTIONS: dict[str, Any] = DEFAULTS | {
    "tensor_parallel_size": 2,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 64,
}
SPEC = speculative(num_speculative_tokens=5, exit_layers=[2, 4, 6], confidence_threshold=0.5)


@pytest.fixture(scope="module")
def plain_heads(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Without a draft vocabulary: they read each rank's part of the target's own LM head."""
    return demo_heads(tmp_path_factory.mktemp("plain") / "heads")


def requests(prompts: list[str]) -> tuple[list[str], list[SamplingParams]]:
    return [prompts[i] * (1 + i % 3) for i in range(10)], [greedy(8 + 3 * i) for i in range(10)]


@pytest.fixture(scope="module")
def reference(prompts: list[str]) -> list[RequestOutput]:
    """vLLM's own two ranks."""
    engine = LLM(str(DEMO_MODEL), **OPTIONS)
    try:
        return generate(engine, *requests(prompts))
    finally:
        stop(engine)


def note_rounds(worker: Any) -> None:
    """Have a rank keep every window that it drafts, and what it lets each round draft."""
    ledger = worker.model_runner.speculator.ledger
    windows_of, allowed = ledger.windows_of, ledger.allowed
    ledger.noted = []

    def noted_windows(*args: Any) -> Any:
        windows = windows_of(*args)
        ledger.noted.append(
            [(r, w.depths.tolist(), w.exits.tolist(), w.limit) for r, w in windows.items()]
        )
        return windows

    def noted_allowed(*args: Any) -> Any:
        caps, exits = allowed(*args)
        ledger.noted.append((caps.tolist(), exits.tolist()))
        return caps, exits

    ledger.windows_of, ledger.allowed = noted_windows, noted_allowed


def see_copies_at_different_times(worker: Any) -> None:
    """As of a GPU: what has come from the device is not the same on all ranks, nor their times."""
    from vllm.distributed.parallel_state import get_tp_group

    from vllm_adadecode.draft.readback import RoundReadback

    rank = get_tp_group().rank_in_group
    looks = iter(range(1 << 30))

    def has_arrived(_: RoundReadback) -> bool:
        return next(looks) % 3 == rank

    patch.object(RoundReadback, "has_arrived", has_arrived).start()
    ledger = worker.model_runner.speculator.ledger
    if (draft_length := ledger.draft_length) is not None:
        ended = draft_length.round_ended

        def late(*args: Any) -> None:
            time.sleep(0.002 * rank)
            ended(*args)

        draft_length.round_ended = late


def check_with_a_fault_on_one_rank(worker: Any) -> tuple[bool, int]:
    """The check at the start; whether the device's loop is kept, and how many faults are known."""
    from vllm.distributed.parallel_state import get_tp_group

    from vllm_adadecode.engine import self_check

    def difference(found: Any, plain: Any, allowed: float) -> str | None:
        # The plain way is compared with itself.
        return None if found is plain or get_tp_group().rank_in_group == 0 else "a bit was flipped"

    speculator = worker.model_runner.speculator
    speculator.ledger.draft_length = None
    with patch.object(self_check, "difference", difference):
        self_check.check(worker)
    return speculator.device_rounds is not None, len(speculator.context.faults)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "of_the_demo"),
    [
        ({}, False),
        # With a draft vocabulary, whose copy of the LM head is spread over the ranks.
        ({"draft_sample_method": "probabilistic"}, True),
        ({"draft_loop": "device", "cost_aware": True}, True),
    ],
    ids=["own-lm-head", "copy", "device"],
)
def test_ranks_decide_alike(
    engines: EnginePool,
    prompts: list[str],
    reference: list[RequestOutput],
    plain_heads: str,
    options: dict[str, Any],
    of_the_demo: bool,
) -> None:
    on_device = "draft_loop" in options
    heads = {} if of_the_demo else {"model": plain_heads}
    with async_scheduling_on_cpu() if on_device else nullcontext():
        engine = LLM(
            str(DEMO_MODEL),
            **OPTIONS | {"async_scheduling": on_device},
            speculative_config=SPEC | heads | options,
        )
    try:
        engine.collective_rpc(note_rounds)
        engine.collective_rpc(see_copies_at_different_times)
        outputs = generate(engine, *requests(prompts))
        sampled = SamplingParams(temperature=0.8, max_tokens=16, ignore_eos=True)
        generate(engine, prompts[:6], sampled)
        counts = engine.collective_rpc("adadecode_stats")
        noted = engine.collective_rpc(lambda worker: worker.model_runner.speculator.ledger.noted)
        found = engine.collective_rpc(check_with_a_fault_on_one_rank) if on_device else []
    finally:
        stop(engine)
    # One rank breaks a tie like two do, or not.
    assert_same(engines.get(), outputs, reference)
    assert len(noted) == len(counts) == 2
    assert noted[0] == noted[1]
    assert counts[0] == counts[1]
    drafted = [w for of_round in noted[0] if isinstance(of_round, list) for w in of_round]
    assert sum(len(exits) for _, _, exits, _ in drafted) == counts[0]["draft_tokens"]
    if on_device:
        # How much drafting pays on this machine is not known; that it was tried is.
        assert min(counts[0]["draft_tokens"], counts[0]["overlapped_steps"]) > 5
        # One rank tells of what only the other has seen.
        assert found == [(False, 1), (False, 1)]
    else:
        assert counts[0]["draft_tokens"] > 100
        assert min(counts[0]["mixed_steps"], counts[0]["deferred_steps"]) > 5


def fail_on_the_second_rank(worker: Any) -> None:
    """Measure rounds as at start, where that rank's first step fails before it tells the other."""
    from vllm.distributed.parallel_state import get_tp_group

    from vllm_adadecode.adaptive.profile import Requests

    def start(requests: Requests) -> None:
        raise ValueError("out of memory")

    if get_tp_group().rank_in_group == 1:
        patch.object(Requests, "start", start).start()
    worker.vllm_config.speculative_config.cost_aware = True
    worker.compile_or_warm_up_model()


@pytest.mark.slow
def test_no_rank_waits_for_one_that_has_failed() -> None:
    engine = LLM(str(DEMO_MODEL), **OPTIONS, speculative_config=SPEC)
    try:
        with pytest.raises(RuntimeError, match=r"cancelled|Executor failed"):
            engine.collective_rpc(fail_on_the_second_rank)
    finally:
        stop(engine)
