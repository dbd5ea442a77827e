"""The host's side of a round without an engine: draft loop, windows, thresholds, counters."""

import json

import numpy as np
import pytest
import torch

from tests.support.fake_target import (
    EXIT_LAYERS,
    MAX_SLOTS,
    SPANS,
    VOCAB,
    Confidence,
    FakeTarget,
    SpanCall,
    at,
    draft,
    head_token,
)
from vllm_adadecode.draft.windows import PendingWindow, PendingWindows
from vllm_adadecode.heads.thresholds import ExitThresholds
from vllm_adadecode.metrics.counters import Counters

# --- by hand -----------------------------------------------------------------------------------


def test_never_confident_goes_through_all_spans_once() -> None:
    run = draft(at(), [5])
    assert run.target.calls == [SpanCall(s, [(0, 0)]) for s in range(3)]
    assert run.state.num_drafts.tolist() == [0]
    assert run.state.depths.tolist() == [[3, 0, 0, 0, 0, 0]]
    assert run.state.tokens.tolist() == [[1000, 0, 0, 0, 0, 0]]
    assert run.counters.draft_layers == 7
    assert run.counters.draft_token_layers == 7


def test_always_confident_at_the_first_exit() -> None:
    run = draft(lambda *_: 0.9, [5])
    assert run.target.calls == [SpanCall(0, [(0, offset)]) for offset in range(5)]
    assert run.state.tokens.tolist() == [[1000, *(head_token(0, o, 0) for o in range(5))]]
    # Nothing was predicted from the last draft: it is left for verification.
    assert run.state.depths.tolist() == [[1, 1, 1, 1, 1, 0]]
    assert run.state.exits.tolist() == [[0] * 5]
    assert run.counters.draft_layers == 10


def test_fill_in() -> None:
    """Offset 0 extends at exit 0, 1 at exit 0, 2 not before exit 2: 0 and 1 go along."""
    run = draft(at((0, 0, 0), (0, 1, 0), (0, 2, 2), (0, 3, 1)), [5])
    assert run.target.calls == [
        SpanCall(0, [(0, 0)]),
        SpanCall(0, [(0, 1)]),
        SpanCall(0, [(0, 2)]),
        SpanCall(1, [(0, 0), (0, 1), (0, 2)]),
        SpanCall(2, [(0, 0), (0, 1), (0, 2)]),
        # Shallower tokens only: offsets 0 to 2 have been through.
        SpanCall(0, [(0, 3)]),
        SpanCall(1, [(0, 3)]),
        SpanCall(0, [(0, 4)]),
        SpanCall(1, [(0, 4)]),
        SpanCall(2, [(0, 3), (0, 4)]),
    ]
    assert run.state.num_drafts.tolist() == [4]
    assert run.state.depths.tolist() == [[3, 3, 3, 3, 3, 0]]
    assert run.state.exits[0, :4].tolist() == [0, 0, 2, 1]
    assert run.state.tokens[0, 1:5].tolist() == [
        head_token(0, 0, 0),
        head_token(0, 1, 0),
        head_token(0, 2, 2),
        head_token(0, 3, 1),
    ]
    # Layers: 5 x span 0 (2), 3 x span 1 (1), 2 x span 2 (4).
    assert run.counters.draft_layers == 5 * 2 + 3 * 1 + 2 * 4
    assert run.counters.draft_token_layers == 5 * 2 + 5 * 1 + 5 * 4


def test_requests_wait_for_each_other_and_share_passes() -> None:
    """Three requests: one extends at once, one after exit 1, one stops; slots are not rows."""
    run = draft(at((6, 0, 0), (2, 0, 1), (6, 1, 0), (2, 1, 0)), [2, 1, 2], slots=[6, 4, 2])
    assert run.target.calls == [
        SpanCall(0, [(6, 0), (4, 0), (2, 0)]),
        SpanCall(1, [(4, 0), (2, 0)]),
        SpanCall(2, [(4, 0)]),
        SpanCall(0, [(6, 1), (2, 1)]),
    ]
    assert run.target.checks == [
        (0, [(6, 0), (4, 0), (2, 0)]),
        (1, [(4, 0), (2, 0)]),
        (2, [(4, 0)]),
        (0, [(6, 1), (2, 1)]),
    ]
    assert run.state.num_drafts.tolist() == [2, 0, 2]
    assert run.state.depths[:, :3].tolist() == [[1, 1, 0], [3, 0, 0], [2, 1, 0]]
    exits = run.counters.exits
    assert [exits[e].heads_evaluated for e in EXIT_LAYERS] == [5, 2, 1]
    assert [exits[e].head_batches for e in EXIT_LAYERS] == [2, 1, 1]
    assert [exits[e].draft_tokens for e in EXIT_LAYERS] == [3, 1, 0]
    # After the last exit there is nowhere to go.
    assert [exits[e].next_exit for e in EXIT_LAYERS] == [2, 1, 0]


def test_exit_turned_off_is_passed_through_unchecked() -> None:
    run = draft(lambda *_: 0.9, [2], thresholds=ExitThresholds.of((1.0, 0.5, 1.0)))
    assert run.target.checks == [(1, [(0, 0)]), (1, [(0, 1)])]
    assert run.target.calls == [
        SpanCall(0, [(0, 0)]),
        SpanCall(1, [(0, 0)]),
        SpanCall(0, [(0, 1)]),
        SpanCall(1, [(0, 1)]),
    ]
    assert run.state.exits[0, :2].tolist() == [1, 1]


def test_limits() -> None:
    run = draft(lambda *_: 0.9, [0, 1, 3, 5], max_drafts=5)
    assert run.state.num_drafts.tolist() == [0, 1, 3, 5]
    assert {slot for call in run.target.calls for slot, _ in call.tokens} == {1, 2, 3}
    # Columns past a request's drafts are a valid token id.
    assert run.state.tokens[1, 2:].tolist() == [0, 0, 0, 0]
    assert run.state.depths[0].tolist() == [0] * 6


def test_exits_that_a_request_may_not_use() -> None:
    """Each stops behind the last one it may use, also where that is turned off."""
    run = draft(at((1, 0, 2), (2, 0, 0)), [2, 2, 2], used_exits=[1, 3, 1])
    assert run.target.calls == [
        SpanCall(0, [(0, 0), (1, 0), (2, 0)]),
        SpanCall(1, [(1, 0)]),
        SpanCall(2, [(1, 0)]),
        SpanCall(0, [(1, 1), (2, 1)]),
        SpanCall(1, [(1, 1)]),
        SpanCall(2, [(1, 1)]),
    ]
    assert run.state.num_drafts.tolist() == [0, 1, 1]
    assert run.state.depths[:, :2].tolist() == [[1, 0], [3, 3], [1, 1]]
    assert [run.counters.exits[e].next_exit for e in EXIT_LAYERS] == [2, 2, 0]
    thresholds = ExitThresholds.of((0.95, 1.0, 0.5))
    off = draft(lambda *_: 0.9, [2], thresholds=thresholds, used_exits=[2])
    assert off.target.calls == [SpanCall(0, [(0, 0)]), SpanCall(1, [(0, 0)])]
    assert off.state.num_drafts.tolist() == [0]


def test_no_request_drafts() -> None:
    run = draft(lambda *_: 0.9, [0, 0])
    assert run.target.calls == []
    assert run.state.tokens[:, 0].tolist() == [1000, 1001]


def test_threshold_is_exceeded_not_met() -> None:
    # float32 of exp(log 0.5) need not be 0.5: compare with what the loop sees.
    target = FakeTarget(lambda *_: 0.5, {0: 0})
    hidden = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    p = float(target.head_top1(0, hidden, -hidden)[1])
    for threshold, drafts in ((p, 0), (p - 1e-6, 1)):
        run = draft(lambda *_: 0.5, [1], thresholds=ExitThresholds.of((threshold, 1.0, 1.0)))
        assert run.state.num_drafts.tolist() == [drafts]


@pytest.mark.parametrize("fused", [False, True])
def test_nan_is_never_confident(fused: bool) -> None:
    nan = float("nan")
    zero = ExitThresholds.of((0.0, 0.0, 0.0), (0.5, 0.0, 0.0))
    run = draft(lambda *_: nan, [2], thresholds=zero, fused=fused)
    assert run.state.num_drafts.tolist() == [0]
    # Nor does a gate let a row through.
    run = draft(lambda *_: 0.1, [1], thresholds=zero, gate=lambda *_: nan, fused=fused)
    assert run.target.checks == [(1, [(0, 0)])]
    assert run.state.exits[0, 0] == 1


def test_sampled_draft_replaces_the_token_and_not_the_decision() -> None:
    asked: list[tuple[list[int], list[int], int]] = []

    def sample(
        logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, draft: int
    ) -> torch.Tensor:
        assert logits.shape == (len(slots), VOCAB)
        asked.append((slots.tolist(), positions.tolist(), draft))
        # The least likely token: confidence must not be its.
        return logits.argmin(-1) + 5

    confidence = at((3, 0, 1), (5, 0, 0), (3, 1, 0), (5, 1, 0))
    run = draft(confidence, [2, 2], slots=[3, 5], sample=sample)
    p3, p5 = run.target.first_pos[3], run.target.first_pos[5]
    assert asked == [
        ([3, 5], [p3, p5], 0),
        ([3], [p3], 0),
        ([3, 5], [p3 + 1, p5 + 1], 1),
    ]
    assert run.state.num_drafts.tolist() == [2, 2]
    assert run.state.exits[:, :2].tolist() == [[1, 0], [0, 0]]
    assert run.state.tokens[:, 1:3].tolist() == [[5, 5], [5, 5]]


# --- the gate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_the_gate_decides_which_heads_are_evaluated(fused: bool) -> None:
    """Slots 0 and 2 pass the first gate, 1 and 2 the second, none the third."""
    opened = {(0, 0), (2, 0), (1, 1), (2, 1)}
    run = draft(
        at((0, 0, 0), (1, 0, 0), (1, 0, 1), (1, 0, 2)),
        [1, 1, 1],
        gate=lambda slot, _, exit_index: 0.8 if (slot, exit_index) in opened else 0.2,
        thresholds=ExitThresholds.of((0.5,) * 3, (0.5,) * 3),
        fused=fused,
    )
    # 0 extends at once. 1, held back, is not asked at exit 0, where it would have been confident.
    assert run.target.gates_evaluated == [
        (0, [(0, 0), (1, 0), (2, 0)]),
        (1, [(1, 0), (2, 0)]),
        (2, [(2, 0)]),
    ]
    assert run.target.checks == [(0, [(0, 0), (2, 0)]), (1, [(1, 0), (2, 0)])]
    assert run.state.exits[:2, 0].tolist() == [0, 1]
    # Who is held back at the last exit stops.
    assert run.state.num_drafts.tolist() == [1, 1, 0]
    assert run.state.depths[:, 0].tolist() == [1, 2, 3]
    exits = run.counters.exits
    assert [exits[e].gates_evaluated for e in EXIT_LAYERS] == [3, 2, 1]
    assert [exits[e].heads_evaluated for e in EXIT_LAYERS] == [2, 2, 0]
    assert [exits[e].head_batches for e in EXIT_LAYERS] == [1, 1, 0]
    assert [exits[e].draft_tokens for e in EXIT_LAYERS] == [1, 1, 0]
    assert [exits[e].next_exit for e in EXIT_LAYERS] == [2, 1, 0]


def test_gate_threshold_0_leaves_the_gate_out_and_1_the_exit() -> None:
    thresholds = ExitThresholds.of((0.5,) * 3, (1.0, 0.0, 0.5))
    run = draft(lambda *_: 0.9, [2], gate=lambda *_: 0.0, thresholds=thresholds)
    assert run.target.gates_evaluated == []
    assert run.target.checks == [(1, [(0, 0)]), (1, [(0, 1)])]
    assert run.state.exits[0, :2].tolist() == [1, 1]
    assert all(e.gates_evaluated == 0 for e in run.counters.exits.values())


# --- against a plain reference, at random ------------------------------------------------------


def expected(
    slot: int,
    limit: int,
    confidence: Confidence,
    thresholds: tuple[float, ...],
    gate: Confidence = lambda *_: 1.0,
) -> tuple[list[int], list[int], list[int]]:
    """(drafts, depths, exits) of one request by the paper's rule, one token at a time."""
    used = max((i + 1 for i, t in enumerate(thresholds) if t < 1), default=0)
    drafts: list[int] = []
    depths, exits = [0], []
    for offset in range(limit):
        for e in range(used):
            depths = [max(d, e + 1) for d in depths]
            if thresholds[e] == 1 or gate(slot, offset, e) <= 0.5:
                continue
            if confidence(slot, offset, e) > thresholds[e]:
                drafts.append(head_token(slot, offset, e))
                exits.append(e)
                depths.append(0)
                break
        else:
            break
    return drafts, depths, exits


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_as_each_request_alone(seed: int, fused: bool) -> None:
    rng = np.random.default_rng(seed)
    table = rng.choice([0.1, 0.4, 0.6, 0.95], size=(MAX_SLOTS, 5, 3), p=[0.3, 0.2, 0.3, 0.2])

    def confidence(slot: int, offset: int, exit_index: int) -> float:
        return float(table[slot, offset, exit_index])

    num_reqs = int(rng.integers(1, MAX_SLOTS + 1))
    slots = rng.permutation(MAX_SLOTS)[:num_reqs].tolist()
    limits = rng.integers(0, 6, num_reqs).tolist()
    thresholds = tuple(rng.choice([0.3, 0.5, 0.8, 1.0], size=3).tolist())
    gates = rng.choice([0.1, 0.9], size=table.shape) if seed % 2 else np.ones(table.shape)

    def gate(slot: int, offset: int, exit_index: int) -> float:
        return float(gates[slot, offset, exit_index])

    run = draft(
        confidence,
        limits,
        slots=slots,
        thresholds=ExitThresholds.of(thresholds, (0.5, 0.5, 0.5) if seed % 2 else None),
        gate=gate,
        fused=fused,
    )

    through: dict[int, set[tuple[int, int]]] = {span: set() for span in range(4)}
    for call in run.target.calls:
        for slot, offset in call.tokens:
            # KV of all earlier pending tokens is there, or written in the same pass.
            assert all((slot, o) in through[call.span] | set(call.tokens) for o in range(offset))
            assert (slot, offset) not in through[call.span], "a token went through a span twice"
        through[call.span] |= set(call.tokens)
    for row, slot in enumerate(slots):
        drafts, depths, exits = expected(slot, limits[row], confidence, thresholds, gate)
        count = len(drafts)
        assert run.state.num_drafts[row] == count
        assert run.state.tokens[row, : count + 1].tolist() == [1000 + slot, *drafts]
        assert run.state.tokens[row, count + 1 :].eq(0).all()
        assert run.state.depths[row, : count + 1].tolist() == depths
        assert depths == sorted(depths, reverse=True)
        assert run.state.exits[row, :count].tolist() == exits
        for offset, depth in enumerate(depths):
            # What verification will gather is the state after the token's last span.
            if depth:
                state = [[1000 + slot, *drafts][offset], slot, offset, depth]
                hidden, residual = run.deferred.gather(torch.tensor([slot]), torch.tensor([offset]))
                assert hidden.tolist() == [state]
                assert torch.equal(residual, -hidden)
            assert [s for s in range(4) if (slot, offset) in through[s]] == list(range(depth))

    layers = [stop - start for start, stop in SPANS]
    assert run.counters.draft_layers == sum(layers[c.span] for c in run.target.calls)
    assert run.counters.draft_token_layers == sum(
        layers[c.span] * len(c.tokens) for c in run.target.calls
    )
    for i, layer in enumerate(EXIT_LAYERS):
        rows = [r for exit_index, r in run.target.checks if exit_index == i]
        assert run.counters.exits[layer].heads_evaluated == sum(map(len, rows))
        assert run.counters.exits[layer].head_batches == len(rows)
        rows = [r for exit_index, r in run.target.gates_evaluated if exit_index == i]
        assert run.counters.exits[layer].gates_evaluated == sum(map(len, rows))
    assert sum(e.draft_tokens for e in run.counters.exits.values()) == run.state.num_drafts.sum()


# --- thresholds --------------------------------------------------------------------------------


def test_exit_thresholds() -> None:
    found = ExitThresholds.of([0, 0.5, 0.5, 0.5, 1], [0, 0.25, 1, 0.75, 0.5])
    assert found == ExitThresholds((0, 0.5, None, 0.5, None), (None, 0.25, None, 0.75, None))
    assert [found.uses(i) for i in range(5)] == [True, True, False, True, False]
    assert [found.uses_gate(i) for i in range(5)] == [False, True, False, True, False]
    assert found.num_used_exits == 4
    assert ExitThresholds.of([0.75]) == ExitThresholds((0.75,), (None,))
    assert ExitThresholds.of([1, 1]).num_used_exits == ExitThresholds.of([]).num_used_exits == 0


# --- windows -----------------------------------------------------------------------------------


def window(*depths: int) -> PendingWindow:
    return PendingWindow(np.array(depths), np.zeros(len(depths) - 1, dtype=np.int64))


def test_a_window_is_taken_once() -> None:
    windows = PendingWindows()
    assert windows.take("a") is None
    assert windows.num_drafts("a") == 0
    put = window(2, 1, 0)
    windows.put("a", put)
    assert windows.num_drafts("a") == 2
    assert windows.take("a") is put
    assert windows.take("a") is None
    assert windows.num_drafts("a") == 0


def test_a_new_window_replaces_the_old() -> None:
    windows = PendingWindows()
    windows.put("a", window(1, 0))
    windows.put("a", window(3))
    assert windows.num_drafts("a") == 0
    taken = windows.take("a")
    assert taken is not None
    assert taken.depths.tolist() == [3]


def test_windows_are_forgotten() -> None:
    windows = PendingWindows()
    for req_id in "abc":
        windows.put(req_id, window(1, 0))
    windows.drop({"a", "unknown"})
    windows.drop(None)
    windows.drop(set())
    assert [windows.num_drafts(r) for r in "abc"] == [0, 1, 1]
    windows.clear()
    assert [windows.take(r) for r in "abc"] == [None] * 3


# --- counters ----------------------------------------------------------------------------------


def test_ratios() -> None:
    counters = Counters.create(8, (2, 4))
    counters.verification_steps, counters.generated_tokens = 10, 25
    counters.draft_layers, counters.verification_layers = 60, 40
    counters.exits[2].draft_tokens, counters.exits[4].draft_tokens = 12, 8
    counters.exits[2].accepted_tokens, counters.exits[4].accepted_tokens = 10, 5
    counters.exits[2].rejected_tokens, counters.exits[4].rejected_tokens = 2, 3
    stats = counters.snapshot()
    assert stats["mean_acceptance_length"] == 2.5
    assert stats["draft_acceptance_rate"] == 0.75
    # 100 passes for 25 tokens of 8 layers each.
    assert stats["layers_executed_per_token"] == 0.5
    assert (stats["draft_tokens"], stats["accepted_tokens"]) == (20, 15)
    assert stats["exits"]["4"] == {
        "gates_evaluated": 0,
        "heads_evaluated": 0,
        "head_batches": 0,
        "draft_tokens": 8,
        "next_exit": 0,
        "accepted_tokens": 5,
        "rejected_tokens": 3,
    }
    assert json.loads(json.dumps(stats)) == stats


def test_nothing_counted_has_no_ratios() -> None:
    stats = Counters.create(8, (2, 4)).snapshot()
    for name in ("draft_acceptance_rate", "mean_acceptance_length", "layers_executed_per_token"):
        assert stats[name] is None
