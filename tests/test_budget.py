"""The draft budget: on made-up costs and windows, does it choose what the arithmetic says?"""

from __future__ import annotations

import numpy as np
import pytest

from vllm_adadecode import budget
from vllm_adadecode.budget import DraftBudget, DraftStatistics, RoundCosts

# A round of 10; a failed attempt adds 1, a draft at the first exit 3, at the second 6.
CHEAP = RoundCosts((1, 16), (10.0, 10.0), (1.0, 1.0), ((3.0, 6.0),) * 2, (0.0, 0.0))
# Large batches are bound by arithmetic: drafts cost what their tokens cost.
DEAR = RoundCosts((1, 16), (10.0, 40.0), (1.0, 16.0), ((3.0, 6.0), (50.0, 100.0)), (0.0, 0.0))


def fill(
    made: DraftBudget, exit_index: int | None, kept: float, drafts: int, windows: int = 64
) -> None:
    """Windows with ``drafts`` drafts from one exit, ``kept`` of them accepted as a whole."""
    k = made.max_drafts
    for i in range(windows):
        exits = np.full((1, k), exit_index or 0)
        found = made.statistics
        checks = drafts if exit_index is None else drafts * (1 + exit_index)
        found.add_round(np.array([k]), np.array([drafts]), exits, checks)
        found.add_window(k, drafts, drafts if i < kept * windows else 0)


def test_nothing_known_means_trying() -> None:
    made = DraftBudget(CHEAP, 5, 2)
    assert made.choose(1) == 5


def test_rates_are_tokens_over_seconds() -> None:
    made = DraftBudget(CHEAP, 2, 2)
    fill(made, exit_index=0, kept=1.0, drafts=2)
    # Two drafts at the first exit, always kept: 1, 2, 3 tokens for 10, 13, 16.
    np.testing.assert_allclose(made.rates(1), [1 / 10, 2 / 13, 3 / 16], rtol=1e-6)
    assert made.best(1) == 2
    deeper = DraftBudget(CHEAP, 2, 2)
    fill(deeper, exit_index=1, kept=1.0, drafts=2)
    np.testing.assert_allclose(deeper.rates(1), [1 / 10, 2 / 16, 3 / 22], rtol=1e-6)


def test_drafts_that_are_never_made_cost_the_attempt() -> None:
    made = DraftBudget(CHEAP, 2, 2)
    fill(made, exit_index=0, kept=0.0, drafts=0)
    # The first attempt fails; there is no second one.
    np.testing.assert_allclose(made.rates(1), [1 / 10, 1 / 11, 1 / 11], rtol=1e-6)
    assert made.best(1) == 0


def test_drafts_that_are_dropped_do_not_pay() -> None:
    made = DraftBudget(CHEAP, 4, 2)
    fill(made, exit_index=0, kept=0.05, drafts=4)
    assert made.best(1) == 0
    fill(made, exit_index=0, kept=1.0, drafts=4, windows=2000)
    assert made.best(1) == 4


def test_the_batch_decides() -> None:
    made = DraftBudget(DEAR, 3, 2)
    fill(made, exit_index=0, kept=0.9, drafts=3)
    assert made.best(1) == 3
    assert made.best(16) == 0
    assert [made.best(n) for n in range(1, 17)] == sorted(
        (made.best(n) for n in range(1, 17)), reverse=True
    )


def test_only_the_drafts_that_pay() -> None:
    made = DraftBudget(CHEAP, 4, 2)
    for _ in range(64):
        made.statistics.add_round(np.array([4]), np.array([4]), np.zeros((1, 4), dtype=int), 4)
        # The first two are always kept, the others never.
        made.statistics.add_window(4, 4, 2)
    assert made.best(1) == 2


def test_checks_in_vain_cost_what_gates_let_pass() -> None:
    gated = RoundCosts((1,), (10.0,), (0.5,), ((3.0, 6.0),), (2.0,))
    made = DraftBudget(gated, 1, 2)
    for _ in range(64):
        made.statistics.add_round(np.array([1]), np.array([0]), np.zeros((1, 1), dtype=int), 2)
        made.statistics.add_window(1, 0, 0)
    # One attempt that fails, with both heads asked.
    np.testing.assert_allclose(made.rates(1), [1 / 10, 1 / 14.5], rtol=1e-6)


def test_drafting_is_tried_again_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "PROBE_EVERY", 10)
    made = DraftBudget(CHEAP, 4, 2)
    fill(made, exit_index=0, kept=0.0, drafts=4)
    chosen = [made.choose(1) for _ in range(40)]
    assert set(chosen) == {0, budget.PROBE_DRAFTS}
    assert chosen.count(budget.PROBE_DRAFTS) == 4


def test_a_choice_follows_what_happens() -> None:
    made = DraftBudget(CHEAP, 4, 2)
    fill(made, exit_index=0, kept=0.0, drafts=4)
    assert made.choose(1) == 0
    fill(made, exit_index=0, kept=1.0, drafts=4, windows=4 * budget.HALF_LIFE)
    # The last choice holds for a while.
    chosen = [made.choose(1) for _ in range(2 * budget.REUSE)]
    assert chosen[0] == 0
    assert chosen[-1] == 4


def test_ranks_that_count_the_same_choose_the_same() -> None:
    rng = np.random.default_rng(0)
    ranks = [DraftBudget(DEAR, 5, 2) for _ in range(2)]
    for _ in range(500):
        n = int(rng.integers(1, 17))
        chosen = {rank.choose(n) for rank in ranks}
        assert len(chosen) == 1
        limit = chosen.pop()
        drafts = rng.integers(0, limit + 1, n)
        exits = rng.integers(0, 2, (n, 5))
        accepted = [int(rng.integers(0, d + 1)) for d in drafts]
        for rank in ranks:
            rank.statistics.add_round(np.full(n, limit), drafts, exits, int(drafts.sum()))
            for d, a in zip(drafts, accepted, strict=True):
                rank.statistics.add_window(limit, int(d), a)


def test_old_windows_fade_where_newer_ones_take_their_place() -> None:
    found = DraftStatistics(2, 1)
    for _ in range(20 * budget.HALF_LIFE):
        found.add_window(2, 2, 2)
    full = budget.HALF_LIFE / np.log(2)
    assert found.windows == pytest.approx(full, rel=0.01)
    for _ in range(20 * budget.HALF_LIFE):
        found.add_window(1, 0, 0)
        found.add_window(0, 0, 0)
    assert found.windows == pytest.approx(full, rel=0.01)
    assert found.drafted[1] < 0.01
    assert found.drafted[2] == pytest.approx(full, rel=0.01)


def test_rounds_without_drafts_do_not_make_it_forget() -> None:
    made = DraftBudget(CHEAP, 4, 2)
    fill(made, exit_index=0, kept=0.0, drafts=4)
    none, exits = np.zeros(1, dtype=int), np.zeros((1, 4), dtype=int)
    for _ in range(20 * budget.HALF_LIFE):
        made.statistics.add_round(none, none, exits, 0)
        made.statistics.add_window(0, 0, 0)
    assert made.best(1) == 0
