"""Overlapped rounds without an engine: their states, which batches overlap, what is counted."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput

from vllm_adadecode.draft.windows import PendingWindow
from vllm_adadecode.engine.device_rounds import DeviceRounds
from vllm_adadecode.engine.next_batch import NextBatch
from vllm_adadecode.engine.round_states import DraftRound, IllegalTransitionError, RoundState
from vllm_adadecode.metrics.counters import Counters
from vllm_adadecode.spans.padded import in_any_order
from vllm_adadecode.spans.shapes import PrefillPart
from vllm_adadecode.verify.overlapped_plan import OverlappedPlan

DRAFTING, OVERLAPPED, VERIFYING, READBACK, RESOLVED = RoundState
LEGAL = {
    (DRAFTING, OVERLAPPED),
    (OVERLAPPED, VERIFYING),
    (VERIFYING, READBACK),
    # Nothing was drafted, or the next batch has to know the draft tokens.
    (DRAFTING, READBACK),
    (READBACK, RESOLVED),
}


NUMBERS = np.array([1, 1])
BATCH: Any = SimpleNamespace(
    req_ids=["a", "b"],
    num_reqs=2,
    idx_mapping=torch.tensor([0, 1]),
    idx_mapping_np=np.array([0, 1]),
    num_computed_prefill_tokens_np=NUMBERS,
    num_scheduled_tokens=NUMBERS,
    prefill_len_np=NUMBERS,
)


def make_round(state: RoundState = DRAFTING) -> DraftRound:
    anything: Any = None
    return DraftRound(BATCH, anything, np.array([True, True]), 1, {}, state=state)


@pytest.mark.parametrize(("before", "after"), list(product(RoundState, RoundState)))
def test_states_follow_each_other_in_one_order(before: RoundState, after: RoundState) -> None:
    this = make_round(before)
    if (before, after) in LEGAL:
        this.move_to(after)
        assert this.state is after
        return
    with pytest.raises(IllegalTransitionError, match=f"{before.name} can't become {after.name}"):
        this.move_to(after)
    assert this.state is before


def test_a_round_begins_drafting_and_ends_resolved() -> None:
    """Both ways through the states, and no other, lead from one to the other."""

    def ways(state: RoundState) -> list[list[RoundState]]:
        following = [after for before, after in LEGAL if before is state]
        return [[state, *way] for after in following for way in ways(after)] or [[state]]

    assert make_round().state is DRAFTING
    assert sorted(ways(DRAFTING), key=len) == [
        [DRAFTING, READBACK, RESOLVED],
        [DRAFTING, OVERLAPPED, VERIFYING, READBACK, RESOLVED],
    ]


@pytest.mark.parametrize("state", [None, *RoundState])
def test_what_the_model_runner_calls_out_of_order_is_refused(
    monkeypatch: pytest.MonkeyPatch, state: RoundState | None
) -> None:
    anything: Any = SimpleNamespace(ledger=None)
    # With passes, rounds may overlap: the last one is left as it is when the next starts.
    rounds = DeviceRounds(anything, anything, passes=anything)
    rounds._last = None if state is None else make_round(state)
    if state is not OVERLAPPED:
        with pytest.raises(IllegalTransitionError, match="is not OVERLAPPED"):
            rounds.most_drafts("a")
        with pytest.raises(IllegalTransitionError, match="is not OVERLAPPED"):
            rounds.plan(anything)
    if state is not VERIFYING:
        with pytest.raises(IllegalTransitionError, match="is not VERIFYING"):
            rounds.verify(anything)
    if state in (DRAFTING, OVERLAPPED, VERIFYING):
        monkeypatch.setattr(rounds, "_allowed", lambda *_: (np.zeros(2), 1))
        with pytest.raises(IllegalTransitionError, match=f"while the last is {state.name}"):
            rounds.propose(BATCH, anything, anything, anything, anything, 5)


def test_a_round_that_could_not_start_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """With async scheduling the next batch comes before vLLM hears of the error."""

    class FailingLoop:
        def start(self, *_: Any, **__: Any) -> None:
            raise ValueError("out of memory")

    zeros = torch.zeros(2)
    ledger = SimpleNamespace(
        in_verification={}, thresholds=None, last_starts=lambda slots: np.array([9, 9])
    )
    context: Any = SimpleNamespace(
        ledger=ledger,
        req_states=SimpleNamespace(num_computed_tokens=SimpleNamespace(gpu=zeros)),
        temperature=zeros,
        seeds=zeros.clone(),
        device_heads=lambda: None,
    )
    loop: Any = FailingLoop()
    rounds = DeviceRounds(context, loop, passes=SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setattr(rounds, "_allowed", lambda *_: (np.ones(2), 1))
    with pytest.raises(ValueError, match="out of memory"):
        rounds.propose(BATCH, torch.ones(2), zeros[:, None], zeros, zeros, 5)
    assert (rounds._last, list(rounds._unresolved)) == (None, [])
    assert not rounds.overlap(scheduled({"a": 5, "b": 5}))


# --- which batches ------------------------------------------------------------------------------


def scheduled(drafts: dict[str, int], **options: Any) -> SchedulerOutput:
    """A batch of decoding, with so many draft tokens of each request."""
    output = SchedulerOutput.make_empty()
    output.scheduled_cached_reqs = CachedRequestData.make_empty()
    output.num_scheduled_tokens = {r: 1 + n for r, n in drafts.items()}
    output.scheduled_spec_decode_tokens = {r: [-1] * n for r, n in drafts.items() if n}
    for name, value in options.items():
        setattr(output, name, value)
    return output


NEW = [SimpleNamespace(req_id="new")]


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (scheduled({"b": 5, "a": 2}), (["a", "b"], [], [], False)),
        (scheduled({"a": 0, "b": 5}), (["a", "b"], [], [], False)),
        (scheduled({"a": 5, "b": 5}, finished_req_ids={"another"}), (["a", "b"], [], [], False)),
        (scheduled({"a": 5}, finished_req_ids={"b"}), (["a"], [], ["b"], False)),
        (scheduled({"a": 5}), (["a"], ["b"], [], False)),
        # Prefill: of a request that is new, or of one that was in the midst of its prompt.
        (
            scheduled({"a": 5, "new": 20, "b": 5}, scheduled_new_reqs=NEW),
            (["a", "b"], [], [], True),
        ),
        (scheduled({"a": 5, "b": 5, "half": 30}), (["a", "b"], [], [], True)),
        (scheduled({"a": 5, "half": 30}, finished_req_ids={"b"}), (["a"], [], ["b"], True)),
        (scheduled({"a": 5, "b": 5}, finished_req_ids={"half"}), (["a", "b"], [], ["half"], False)),
        (scheduled({"half": 30}), None),
        (scheduled({"new": 20}, scheduled_new_reqs=NEW), None),
        # It was left out of an earlier batch.
        (scheduled({"a": 5, "c": 5}), None),
        (scheduled({"a": 5, "b": 5}, num_scheduled_tokens={"a": 6, "b": 20}), None),
        (scheduled({"a": 5, "b": 5}, scheduled_new_reqs=[SimpleNamespace(req_id="b")]), None),
        (scheduled({"a": 5, "b": 5}, preempted_req_ids={"c"}), None),
        (scheduled({"a": 5, "b": 5}, has_structured_output_requests=True), None),
        (scheduled({"a": 5, "b": 5}, has_sync_kv_loads=True), None),
    ],
)
def test_which_batches_may_overlap(
    output: SchedulerOutput, expected: tuple[list[str], list[str], list[str], bool] | None
) -> None:
    found = NextBatch.of(output, ["a", "b"], ["half"])
    assert (found and (found.decoding, found.left_out, found.gone, found.prefills)) == expected


def test_a_session_that_goes_on_has_no_window() -> None:
    """It was left out of a batch, its round is not resolved, and it comes with more of a prompt."""
    anything: Any = None
    rounds = DeviceRounds(anything, anything)
    unresolved = make_round(VERIFYING)
    unresolved.left_out = {"session", "other"}
    rounds._unresolved.append(unresolved)
    new = [SimpleNamespace(req_id="session")]
    assert not rounds.overlap(scheduled({"session": 20}, scheduled_new_reqs=new))
    assert unresolved.left_out == {"other"}


@pytest.mark.parametrize(("thresholds", "expected"), [((None, None), True), ((None, 1), False)])
def test_which_backends_run_prefill_apart(
    thresholds: tuple[int | None, ...], expected: bool
) -> None:
    """FlashInfer's builder has such a threshold, FlashAttention's and Triton's have none."""
    groups: Any = [
        [
            SimpleNamespace(
                get_metadata_builder=lambda t=t: SimpleNamespace(reorder_batch_threshold=t)
            )
        ]
        for t in thresholds
    ]
    assert in_any_order(groups) == expected


# --- what is counted ----------------------------------------------------------------------------


PREFILL = PrefillPart(
    num_reqs=1,
    num_tokens=7,
    most_tokens=7,
    order=torch.tensor([2, 0, 1]),
    tokens=torch.arange(9, 16),
    starts=torch.tensor([0]),
    starts_cpu=torch.tensor([0], dtype=torch.int32),
    lengths_cpu=torch.tensor([7], dtype=torch.int32),
)


@pytest.mark.parametrize("prefill", [None, PREFILL])
def test_what_was_verified_is_counted_later(prefill: PrefillPart | None) -> None:
    plan = OverlappedPlan(
        run=None,  # type: ignore[arg-type]
        req_ids=["b", "a"] if prefill is None else ["b", "a", "new"],
        row_of=torch.tensor([1, 0, -1], dtype=torch.int32),
        # Of b's four tokens three were prepared for; a has fewer than were.
        scheduled=np.array([3, 6] if prefill is None else [3, 6, 7]),
        prefill=prefill,
    )
    windows = {
        "a": PendingWindow(np.array([2, 1]), np.array([0])),
        "b": PendingWindow(np.array([2, 2, 2, 0]), np.array([1, 1, 1])),
    }
    counters = Counters.create(8, (2, 5))
    plan.count(windows, ((0, 2), (2, 5), (5, 8)), counters)
    assert plan.num_token_slots == 9
    assert (counters.overlapped_steps, counters.plain_steps) == (1, 0)
    assert counters.deferred_tokens == 5
    if prefill is None:
        assert (counters.deferred_steps, counters.prefill_steps) == (1, 0)
        # No token is at depth 0 of those that ran, one at depth 1, and the last span takes all.
        assert counters.verification_layers == 3 + 3
        assert counters.verify_token_layers == 3 * 1 + 3 * 5
    else:
        assert counters.deferred_steps == counters.verification_layers == 0
        assert counters.prefill_steps == counters.mixed_steps == 1
        assert counters.mixed_layers == 8
        assert counters.mixed_prefill_token_layers == 8 * 7
        assert counters.mixed_verify_token_layers == 3 * 1 + 3 * 5
