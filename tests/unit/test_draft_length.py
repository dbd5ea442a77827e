"""Adaptive draft length: on made-up costs and windows, does it choose what the arithmetic says?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_adadecode.adaptive import draft_length
from vllm_adadecode.adaptive import step_times as round_times
from vllm_adadecode.adaptive.acceptance import HALF_LIFE, AcceptanceStatistics
from vllm_adadecode.adaptive.draft_length import AdaptiveDraftLength, Choice, RoundCosts
from vllm_adadecode.adaptive.step_times import Factors
from vllm_adadecode.engine.ledger import RoundLedger

# A round of 10; a failed attempt adds 1, a draft at the first exit 3, at the second 6.
CHEAP = RoundCosts((1, 16), (10.0, 10.0), (1.0, 1.0), ((3.0, 6.0),) * 2, (0.0, 0.0))
# Large batches are bound by arithmetic: drafts cost what their tokens cost.
DEAR = RoundCosts((1, 16), (10.0, 40.0), (1.0, 16.0), ((3.0, 6.0), (50.0, 100.0)), (0.0, 0.0))


def count(
    made: AdaptiveDraftLength, exits: list[int], kept: int, asked: list[int] | None = None
) -> None:
    """A round of one request with drafts from these exits, all exits in use."""
    most, found = made.most, made.statistics
    by_draft = np.zeros((1, most.drafts), dtype=int)
    by_draft[0, : len(exits)] = exits
    tries = min(len(exits) + 1, most.drafts)
    reached = [tries - sum(e < exit_index for e in exits) for exit_index in range(most.exits)]
    found.add_round(
        np.array([most.drafts]),
        np.array([most.exits]),
        np.array([len(exits)]),
        by_draft,
        np.array(reached if asked is None else asked),
    )
    found.add_window(most.drafts, most.exits, np.array(exits, dtype=int), kept)


def fill(made: AdaptiveDraftLength, exits: list[int], kept: float, windows: int = 64) -> None:
    """Windows with drafts from these exits, ``kept`` of them accepted as a whole."""
    for i in range(windows):
        count(made, exits, len(exits) if i < kept * windows else 0)


def test_nothing_known_means_trying() -> None:
    made = AdaptiveDraftLength(CHEAP, 5, 2)
    assert made.choose(1) == (5, 2)


def test_trying_ends_as_soon_as_something_is_known() -> None:
    """A large batch must not go on for the rounds that a choice holds."""
    made = AdaptiveDraftLength(DEAR, 3, 2)
    assert made.choose(16) == (3, 2)
    fill(made, [0] * 3, kept=0.5)
    assert made.choose(16).drafts == 0


def test_rates_are_tokens_over_seconds() -> None:
    made = AdaptiveDraftLength(CHEAP, 2, 2)
    fill(made, [0] * 2, kept=1.0)
    # Two drafts at the first exit, always kept: 1, 2, 3 tokens for 10, 13, 16.
    np.testing.assert_allclose(made.rates(1), [[1 / 10, 2 / 13, 3 / 16]] * 2, rtol=1e-6)
    assert made.best(1) == (2, 2), "as good, and tells more"
    deeper = AdaptiveDraftLength(CHEAP, 2, 2)
    fill(deeper, [1] * 2, kept=1.0)
    # With the first exit alone, a try in vain with half of the exits' checks.
    in_vain = [1 / 10, 1 / 10.5, 1 / 10.5]
    expected = [in_vain, [1 / 10, 2 / 16, 3 / 22]]
    np.testing.assert_allclose(deeper.rates(1), expected, rtol=1e-6)
    assert deeper.best(1) == (2, 2)


def test_drafts_that_are_never_made_cost_the_attempt() -> None:
    made = AdaptiveDraftLength(CHEAP, 2, 2)
    fill(made, [], kept=0.0)
    # The first attempt fails; there is no second one.
    np.testing.assert_allclose(made.rates(1)[1], [1 / 10, 1 / 11, 1 / 11], rtol=1e-6)
    assert made.best(1).drafts == 0


def test_drafts_that_are_dropped_do_not_pay() -> None:
    made = AdaptiveDraftLength(CHEAP, 4, 2)
    fill(made, [0] * 4, kept=0.05)
    assert made.best(1).drafts == 0
    fill(made, [0] * 4, kept=1.0, windows=2000)
    assert made.best(1).drafts == 4


def test_the_batch_decides() -> None:
    made = AdaptiveDraftLength(DEAR, 3, 2)
    fill(made, [0] * 3, kept=0.9)
    assert made.best(1).drafts == 3
    assert made.best(16).drafts == 0
    assert [made.best(n).drafts for n in range(1, 17)] == sorted(
        (made.best(n).drafts for n in range(1, 17)), reverse=True
    )


def test_only_the_drafts_that_pay() -> None:
    made = AdaptiveDraftLength(CHEAP, 4, 2)
    for _ in range(64):
        # The first two are always kept, the others never.
        count(made, [0] * 4, kept=2)
    assert made.best(1).drafts == 2


def test_checks_in_vain_cost_what_gates_let_pass() -> None:
    gated = RoundCosts((1,), (10.0,), (0.5,), ((3.0, 6.0),), (2.0,))
    made = AdaptiveDraftLength(gated, 1, 2)
    for _ in range(64):
        count(made, [], kept=0)
    # One attempt that fails, with one head asked, or both.
    expected = [[1 / 10, 1 / 12.25], [1 / 10, 1 / 14.5]]
    np.testing.assert_allclose(made.rates(1), expected, rtol=1e-6)


def _chosen(made: AdaptiveDraftLength, rounds: int) -> list[int]:
    return [made.choose(1).drafts for _ in range(rounds)]


def test_drafting_is_tried_again_now_and_then() -> None:
    made = AdaptiveDraftLength(CHEAP, 4, 2)
    fill(made, [0] * 4, kept=0.0)
    chosen = _chosen(made, 4 * draft_length.PROBE_EVERY)
    assert set(chosen) == {0, 4}
    # Such a round takes 12 more than the 10 of others: every 360, and the first one sooner.
    assert chosen.count(4) == 3 * draft_length.PROBE_ROUNDS
    assert chosen.index(4) < draft_length.PROBE_EVERY


def test_so_is_decoding_without_drafts_and_with_more() -> None:
    made = AdaptiveDraftLength(CHEAP, 4, 2)
    fill(made, [1] * 4, kept=1.0)
    chosen = _chosen(made, 3 * draft_length.PROBE_EVERY)
    assert set(chosen) == {0, 4}
    assert chosen.count(0) == 3 * draft_length.PROBE_ROUNDS
    some = AdaptiveDraftLength(CHEAP, 8, 2)
    for _ in range(64):
        count(some, [0] * 8, kept=2)
    assert set(_chosen(some, 3 * draft_length.PROBE_EVERY)) == {0, 2, 4}


def test_drafting_that_pays_again_is_soon_taken_up() -> None:
    """After other text, or sampling, that made it stop for long."""
    made = AdaptiveDraftLength(CHEAP, 4, 2)
    fill(made, [0] * 4, kept=0.0, windows=20 * HALF_LIFE)
    rounds = 0
    while made.best(1).drafts == 0:
        choice = made.choose(1)
        rounds += 1
        if choice.drafts:
            exits = np.zeros(choice.drafts, dtype=int)
            made.statistics.add_window(choice.drafts, choice.exits, exits, choice.drafts)
        assert rounds < 8 * draft_length.PROBE_EVERY
    assert rounds > draft_length.FIRST_PROBE


def test_dear_probes_are_rare() -> None:
    costs = RoundCosts((1, 16), (10.0,) * 2, (20.0,) * 2, ((30.0, 60.0),) * 2, (0.0,) * 2)
    made = AdaptiveDraftLength(costs, 4, 2)
    fill(made, [0] * 4, kept=0.0)
    chosen = _chosen(made, 20 * draft_length.PROBE_EVERY)
    # Four drafts take twelve rounds more and bring nothing.
    lost = 12.0 * sum(drafts > 0 for drafts in chosen)
    assert 0 < lost < 1.2 * draft_length.PROBE_SHARE * len(chosen)


def test_a_few_windows_do_not_rule_out_more_drafts() -> None:
    made = AdaptiveDraftLength(CHEAP, 8, 2)
    for kept in (1, 1, 2, 2, 2, 1, 2, 2, 2, 2):
        count(made, [0] * (kept + 1 if kept == 1 else kept), kept)
    tokens, _ = made.expected(1)
    assert (np.diff(tokens[1]) > 0.01).all()
    # Where they are many, they do.
    for _ in range(400):
        count(made, [0] * 3, kept=2)
    tokens, _ = made.expected(1)
    assert np.diff(tokens[1])[2:].max() < 0.02


def _serve(
    made: AdaptiveDraftLength, monkeypatch: pytest.MonkeyPatch, plain: float, each: float
) -> int:
    """Rounds of 4 requests that take ``plain`` seconds and ``each`` for every draft more."""
    now = 0.0
    monkeypatch.setattr(round_times.time, "perf_counter", lambda: now)
    drafts = 0
    for _ in range(4 * draft_length.PROBE_EVERY):
        drafts = made.choose(4).drafts
        now += plain + each * drafts
        made.round_ended(["a", "b", "c", "d"])
    # What holds, whatever was tried in the last round.
    return made.best(4).drafts


def test_rounds_set_costs_right(monkeypatch: pytest.MonkeyPatch) -> None:
    made = AdaptiveDraftLength(CHEAP, 4, 2)
    fill(made, [0] * 4, kept=0.6)
    assert made.best(4).drafts == 4
    # The machine was busy when rounds without drafts were timed.
    assert _serve(made, monkeypatch, plain=3.0, each=3.0) == 0
    assert made.best(1).drafts == 4, "another batch size"
    # And the other way round.
    assert _serve(made, monkeypatch, plain=30.0, each=3.0) == 4


def test_the_first_rank_says_how_long_rounds_take(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = AdaptiveDraftLength(CHEAP, 4, 2, share=lambda size, own: Factors(0.1, 1.0))
    fill(slow, [0] * 4, kept=0.6)
    assert _serve(slow, monkeypatch, plain=30.0, each=3.0) == 0


def test_a_round_is_timed_if_it_is_like_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(round_times.time, "perf_counter", lambda: now)
    clock = round_times.RoundClock()
    found = []
    for at, requests, drafts in (
        (1.0, ["a"], 4),
        (3.0, ["a"], 4),
        (6.0, ["a"], 0),
        (7.0, ["a"], 0),
        (9.0, ["a", "b"], 0),
        (10.0, None, 0),
        (11.0, ["a", "b"], 0),
        (15.0, ["a", "b"], 0),
    ):
        now = at
        found.append(clock.ended(requests, drafts))
    assert found == [None, 2.0, None, 1.0, None, None, None, 4.0]


def test_a_round_that_was_held_up_counts_little() -> None:
    times = round_times.StepTimes()
    for _ in range(20):
        times.add(1, drafting=False, expected=1.0, taken=2.0)
    times.add(1, drafting=False, expected=1.0, taken=1000.0)
    factors = times.factors(1)
    assert factors.plain is not None
    assert 2.0 < factors.plain < 2.5
    assert factors.drafting is None
    assert factors.of(drafting=True) == factors.of(drafting=False) == factors.plain
    for _ in range(1000):
        times.add(1, drafting=False, expected=1.0, taken=1000.0)
    assert times.factors(1).plain == pytest.approx(1000.0, rel=0.01), "slow for good"


def test_what_is_not_known_is_like_what_is() -> None:
    for factors, expected in (
        (Factors(None, None), [1.0, 1.0]),
        (Factors(None, 3.0), [3.0, 3.0]),
        (Factors(2.0, None), [2.0, 2.0]),
        (Factors(2.0, 1.5), [2.0, 1.5]),
    ):
        assert [factors.of(drafting) for drafting in (False, True)] == expected


def test_a_choice_follows_what_happens() -> None:
    made = AdaptiveDraftLength(CHEAP, 4, 2)
    fill(made, [0] * 4, kept=0.0)
    assert made.choose(1).drafts == 0
    fill(made, [0] * 4, kept=1.0, windows=4 * HALF_LIFE)
    # The last choice holds for a while.
    chosen = _chosen(made, draft_length.REUSE + 1)
    assert chosen[0] == 0
    assert chosen[-1] == 4


def test_ranks_that_count_the_same_choose_the_same() -> None:
    rng = np.random.default_rng(0)
    ranks = [AdaptiveDraftLength(DEAR, 5, 2) for _ in range(2)]
    for _ in range(500):
        n = int(rng.integers(1, 17))
        chosen = {rank.choose(n) for rank in ranks}
        assert len(chosen) == 1
        limit, used = chosen.pop()
        drafts = rng.integers(0, limit + 1, n)
        exits = rng.integers(0, used, (n, 5))
        accepted = [int(rng.integers(0, d + 1)) for d in drafts]
        asked = np.array([int(drafts.sum()), 0])
        for rank in ranks:
            each = np.full(n, limit), np.full(n, used)
            rank.statistics.add_round(*each, drafts, exits, asked)
            for row, (d, a) in enumerate(zip(drafts, accepted, strict=True)):
                rank.statistics.add_window(limit, used, exits[row, :d], a)


def test_large_batches_use_the_first_exits() -> None:
    """As likely one of many is not confident as one alone is confident: all go deep for it."""
    costs = RoundCosts((1, 16), (10.0,) * 2, (0.0,) * 2, ((3.0, 8.0),) * 2, (0.0,) * 2)
    made = AdaptiveDraftLength(costs, 4, 2)
    for i in range(256):
        count(made, ([0], [1, 0], [], [0, 1])[i % 4], kept=2)
    assert made.best(1).exits == 2
    many = made.best(16)
    assert (many.drafts > 0, many.exits) == (True, 1)


def test_a_window_tells_about_fewer_exits() -> None:
    found = AcceptanceStatistics(4, 3)
    found.add_window(4, 3, np.array([0, 0, 1, 0]), accepted=3)
    found.add_window(4, 3, np.array([2]), accepted=1)
    found.add_window(2, 1, np.array([0]), accepted=0)
    # By exits in use; the last window might have used the first exit only, twice.
    np.testing.assert_allclose(found.windows, [[3, 3, 3, 2, 2], [2] * 5, [2] * 5], rtol=0.02)
    np.testing.assert_allclose(
        found.drafted, [[3, 2, 1, 0, 0], [2, 1, 1, 1, 1], [2, 2, 1, 1, 1]], rtol=0.02
    )
    np.testing.assert_allclose(
        found.accepted, [[3, 1, 1, 0, 0], [2, 1, 1, 1, 0], [2, 2, 1, 1, 0]], rtol=0.02
    )


def test_a_round_counts_tries_by_exit() -> None:
    found = AcceptanceStatistics(3, 3)
    exits = np.array([[0, 2, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]])
    limits, used = np.array([3, 3, 3, 0]), np.array([3, 3, 1, 3])
    found.add_round(limits, used, np.array([2, 1, 1, 0]), exits, np.array([7, 3, 2]))
    # The third could use the first exit alone, the fourth drafted nothing.
    np.testing.assert_allclose(found.reached, [7, 4, 3], rtol=0.02)
    np.testing.assert_allclose(found.confident, [2, 1, 1], rtol=0.02)
    np.testing.assert_allclose(found.chances(), [2 / 7, 1 / 4, 1 / 3], rtol=0.02)
    np.testing.assert_allclose(found.evaluated_in_vain(), [5 / 7, 2 / 4, 1 / 3], rtol=0.02)


def test_tries_fade_at_exits_that_were_used() -> None:
    """A request that may not draft, as in mid-prefill, uses none."""
    found = AcceptanceStatistics(1, 2)
    drafted, exits, asked = np.array([0, 0]), np.zeros((2, 1), dtype=int), np.zeros(2)
    found.add_round(np.array([1, 0]), np.array([2, 2]), drafted, exits, asked)
    before = found.reached.copy()
    for _ in range(20 * HALF_LIFE):
        found.add_round(np.array([1, 0]), np.array([1, 2]), drafted, exits, asked)
    assert found.reached[1] == before[1]
    assert found.reached[0] == pytest.approx(HALF_LIFE / np.log(2), rel=0.01)


def test_old_windows_fade_where_newer_ones_take_their_place() -> None:
    found, none = AcceptanceStatistics(2, 1), np.array([], dtype=int)
    for _ in range(20 * HALF_LIFE):
        found.add_window(2, 1, np.array([0, 0]), 2)
    full = HALF_LIFE / np.log(2)
    assert found.windows[0] == pytest.approx(full, rel=0.01)
    for _ in range(20 * HALF_LIFE):
        found.add_window(1, 1, none, 0)
        found.add_window(0, 1, none, 0)
    assert found.windows[0] == pytest.approx(full, rel=0.01)
    assert found.drafted[0, 1] < 0.01
    assert found.drafted[0, 2] == pytest.approx(full, rel=0.01)


def test_rounds_without_drafts_do_not_make_it_forget() -> None:
    made = AdaptiveDraftLength(CHEAP, 4, 2)
    fill(made, [0] * 4, kept=0.0)
    none, exits = np.zeros(1, dtype=int), np.zeros((1, 4), dtype=int)
    for _ in range(20 * HALF_LIFE):
        made.statistics.add_round(none, np.array([2]), none, exits, np.zeros(2))
        made.statistics.add_window(0, 2, exits[0, :0], 0)
    assert made.best(1).drafts == 0


def test_the_choice_names_all_exits_where_it_names_no_drafts() -> None:
    made = AdaptiveDraftLength(DEAR, 3, 2)
    fill(made, [0] * 3, kept=0.5)
    assert made.best(16) == Choice(0, 2)


def test_requests_with_a_seed_are_in_the_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round runs all requests: what pays for one alone need not pay beside fifteen that draft."""
    spec = SimpleNamespace(
        num_speculative_tokens=3,
        confidence_threshold=[0.5, 0.5],
        gate_threshold=None,
        exit_layers=[2, 4],
    )
    model = SimpleNamespace(get_total_num_hidden_layers=lambda: 6)
    config: Any = SimpleNamespace(speculative_config=spec, model_config=model)
    req_states: Any = None
    ledger = RoundLedger(config, req_states)
    made = ledger.draft_length = AdaptiveDraftLength(DEAR, 3, 2)
    fill(made, [0] * 3, kept=0.9)
    timed: list[Any] = []
    monkeypatch.setattr(made, "round_ended", lambda requests, _: timed.append(requests))

    def drafts(req_ids: list[str], may_draft: list[bool] | None = None) -> list[int]:
        may = np.array(may_draft or [True] * len(req_ids))
        caps, _ = ledger.allowed(req_ids, may, 3)
        batch: Any = SimpleNamespace(req_ids=req_ids, has_prefill=False)
        ledger.round_ended(batch)
        return caps[may].tolist()

    seeded = [f"seeded-{i}" for i in range(15)]
    ledger.seeded = set(seeded)
    assert drafts(["a"]) == [3]
    assert drafts(["a", *seeded]) == [0, *[3] * 15]
    # One that is in the midst of its prompt does not draft.
    assert drafts(["a", *seeded], [True, *[False] * 15]) == [3]
    assert timed == [["a"], None, ["a", *seeded]]
