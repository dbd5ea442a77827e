"""The simulator: exact counts on hand-made traces, and against a plain transcript of the rules."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.traces import make_trace, random_trace
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.evaluation.simulate import Counts, ExitCounts, Setting, Simulator, simulate
from vllm_adadecode.evaluation.trace import Trace

TWO = Setting((0.75, 0.75), max_drafts=2)


def totals(counts: Counts) -> tuple[int, ...]:
    """generated tokens, layers, heads, verification steps, draft tokens, accepted"""
    return (
        counts.generated_tokens,
        counts.layers_executed,
        counts.heads_evaluated,
        counts.verification_steps,
        counts.draft_tokens,
        counts.accepted_tokens,
    )


class TestCounts:
    def test_never_confident_is_plain_decoding(self) -> None:
        # A threshold is to be exceeded; the last token has nothing to draft for.
        counts = simulate([make_trace([[0.1] * 3, [0.75] * 3], [[1] * 3] * 2)], TWO)
        assert totals(counts) == (3, 24, 4, 3, 0, 0)
        assert counts.draft_acceptance_rate is None

    def test_confident_and_right_fills_the_window(self) -> None:
        # First exit at positions 0 and 3, second at 1 and 4; a full window checks no head.
        confidence = [[0.9, 0, 0, 0.9, 0, 0], [0.9] * 6]
        counts = simulate([make_trace(confidence, np.ones((2, 6)))], TWO)
        assert totals(counts) == (6, 2 * (2 + 4 + 8), 2 * (1 + 2), 2, 4, 4)
        assert counts.exits == (ExitCounts(0, 4, 2, 2), ExitCounts(0, 2, 2, 2))
        assert counts.mean_acceptance_length == 3.0
        assert counts.layers_executed_per_token == 28 / (6 * 8)

    def test_drafts_behind_a_wrong_one_are_lost(self) -> None:
        # Drafts at 0 (wrong) and 1; then at 1 and 2, both right.
        counts = simulate([make_trace([[0.9] * 4, [0.0] * 4], [[0, 1, 1, 1], [0] * 4])], TWO)
        assert totals(counts) == (4, 2 * (2 + 2 + 8), 4, 2, 4, 2)

    def test_traces_do_not_run_into_each_other(self) -> None:
        one = make_trace([[0.9] * 2, [0.9] * 2], np.ones((2, 2)))
        empty = make_trace(np.zeros((2, 0)), np.zeros((2, 0)))
        # One draft each: the second token of a trace ends it.
        counts = simulate([one, empty, one], TWO)
        assert totals(counts) == (4, 2 * (2 + 8), 2, 2, 2, 2)

    def test_an_exit_that_is_off_is_passed_by(self) -> None:
        trace = make_trace([[0.9] * 3, [0.9] * 3], [[0] * 3, [1] * 3])
        counts = simulate([trace], Setting((1.0, 0.5), max_drafts=2))
        assert totals(counts) == (3, 4 + 4 + 8, 2, 1, 2, 2)
        assert counts.exits[0] == ExitCounts()

    def test_behind_the_last_exit_in_use_there_is_none(self) -> None:
        trace = make_trace([[0.1] * 2, [0.9] * 2], np.ones((2, 2)))
        counts = simulate([trace], Setting((0.5, 1.0), max_drafts=2))
        assert totals(counts) == (2, 16, 1, 2, 0, 0)

    def test_off_is_plain_decoding(self) -> None:
        trace = make_trace(np.ones((2, 5)), np.ones((2, 5)))
        assert totals(simulate([trace], Setting.off(2))) == (5, 40, 0, 5, 0, 0)

    def test_a_closed_gate_saves_the_head(self) -> None:
        confidence, right = np.full((2, 3), 0.9), np.ones((2, 3))
        trace = make_trace(confidence, right, gate=[[0.2, 0.9, 0.2], [0.9, 0.9, 0.2]])
        counts = simulate([trace], Setting((0.5, 0.5), 5, gate_thresholds=(0.5, 0.5)))
        # Position 0: gate 1 closed, head 2 drafts. Position 1: head 1 drafts. 2: the last token.
        assert counts.exits == (ExitCounts(2, 1, 1, 1), ExitCounts(1, 1, 1, 1))
        assert (counts.layers_executed, counts.generated_tokens) == (4 + 2 + 8, 3)
        # All gates closed: every round asks both gates and ends, but for the last token's.
        counts = simulate([trace], Setting((0.5, 0.5), 5, gate_thresholds=(0.95, 0.95)))
        evaluated = (counts.heads_evaluated, counts.gates_evaluated)
        assert (*evaluated, counts.layers_executed) == (0, 4, 24)

    def test_gate_threshold_zero_asks_no_gate(self) -> None:
        # A gate can round to 0.
        trace = make_trace(np.full((2, 4), 0.9), np.ones((2, 4)), gate=np.zeros((2, 4)))
        setting = Setting((0.5, 0.5), 5, gate_thresholds=(0.0, 0.0))
        assert simulate([trace], setting) == simulate([trace], Setting((0.5, 0.5), 5))

    def test_nan_is_never_confident(self) -> None:
        trace = make_trace([[np.nan] * 3, [np.nan] * 3], np.ones((2, 3)))
        assert simulate([trace], Setting((0.0, 0.0), 5)).draft_tokens == 0


def plain_rules(trace: Trace, setting: Setting) -> list[int]:
    """host_loop.py and verify/forward.py for one request, pass by pass."""
    ends, start, emitted = len(trace.generated), 0, 0
    spans = [b - a for a, b in zip((0, *trace.exit_layers), (*trace.exit_layers, 8), strict=True)]
    num_used = max((i + 1 for i, use in enumerate(setting.used) if use), default=0)
    passes = heads_evaluated = gates_evaluated = steps = drafts = kept = 0
    while start < ends:
        depths, right = [0], []
        limit = min(setting.max_drafts, ends - start - 1) if num_used else 0
        for offset in range(limit):
            extended = False
            for e in range(num_used):
                passes += spans[e]  # one pass for the newest token and all at its depth
                depths = [max(d, e + 1) for d in depths]
                if not setting.used[e]:
                    continue
                at = start + offset
                if setting.gate_thresholds and setting.gate_thresholds[e] > 0:
                    gates_evaluated += 1
                    if not trace.gate[e, at] > np.float32(setting.gate_thresholds[e]):
                        continue
                heads_evaluated += 1
                if trace.confidence[e, at] > np.float32(setting.thresholds[e]):
                    right.append(bool(trace.correct[e, at]))
                    depths.append(0)
                    extended = True
                    break
            if not extended:
                break
        passes += sum(n for span, n in enumerate(spans) if min(depths) <= span)
        accepted = right.index(False) if False in right else len(right)
        steps, drafts, kept = steps + 1, drafts + len(right), kept + accepted
        emitted += accepted + 1
        start += accepted + 1
    return [emitted, passes, heads_evaluated, steps, drafts, kept, gates_evaluated]


@pytest.mark.parametrize("seed", range(12))
def test_counts_are_those_of_the_plain_rules(seed: int) -> None:
    rng = np.random.default_rng(seed)
    traces = [random_trace(100 * seed + i, int(rng.integers(0, 40))) for i in range(5)]
    for _ in range(5):
        thresholds = tuple(rng.choice([0.0, 0.3, 0.5, 0.9, 1.0], 3).tolist())
        gates = tuple(rng.choice([0.0, 0.2, 0.6], 3).tolist()) if rng.random() < 0.5 else None
        setting = Setting(thresholds, int(rng.integers(1, 8)), gates)
        counts = Simulator(traces).run(setting)
        expected = np.sum([plain_rules(t, setting) for t in traces], axis=0).tolist()
        assert [*totals(counts), counts.gates_evaluated] == expected, setting


class TestBadInput:
    def test_no_traces(self) -> None:
        with pytest.raises(AdaDecodeError, match="no traces"):
            Simulator([])

    def test_traces_of_two_targets(self) -> None:
        traces = [random_trace(0, 3), random_trace(0, 3, exit_layers=(2, 4))]
        with pytest.raises(AdaDecodeError, match="different exit layers"):
            Simulator(traces)

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            (Setting((0.5,)), "thresholds must be 3 numbers"),
            (Setting((0.5, 0.5, 1.5)), "thresholds must be 3 numbers"),
            (Setting((0.5,) * 3, 5, (0.1,)), "gate_thresholds must be 3 numbers"),
            (Setting((0.5,) * 3, 0), "K must be at least 1"),
        ],
    )
    def test_settings(self, setting: Setting, message: str) -> None:
        with pytest.raises(AdaDecodeError, match=message):
            simulate([random_trace(0, 3)], setting)
