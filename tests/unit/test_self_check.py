"""What the check at the start takes for a fault, without an engine."""

import multiprocessing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from tests.support.fake_target import HALF, FakeTarget
from vllm_adadecode.draft.head_evaluation import StoredHeads
from vllm_adadecode.engine import self_check
from vllm_adadecode.engine.self_check import (
    PLAIN,
    Drafted,
    WatchedHeads,
    Way,
    difference,
    tolerance,
)

ALLOWED = 0.01


def drafted() -> Drafted:
    """Two requests, K = 3: the first has two draft tokens, the other one, from the second exit."""
    return Drafted(
        tokens=np.array([[7, 11, 12, 0], [8, 21, 0, 0]]),
        depths=np.array([[2, 2, 2, 0], [2, 2, 0, 0]]),
        exits=np.array([[0, 1, -1], [1, -1, -1]]),
        states=torch.arange(1.0, 2 * 4 * 5 + 1).view(2, 4, 5),
        close=np.zeros((2, 3), dtype=bool),
    )


def with_states(row: int, token: int, factor: float) -> Drafted:
    found = drafted()
    found.states[row, token] *= factor
    return found


def test_rounding_is_no_fault() -> None:
    assert difference(drafted(), drafted(), ALLOWED) is None
    assert difference(with_states(0, 1, 1 + ALLOWED / 2), drafted(), ALLOWED) is None
    # What has been through no span has no state.
    assert difference(with_states(0, 3, float("nan")), drafted(), ALLOWED) is None


@pytest.mark.parametrize("factor", [1.02, 0.0, -1.0, float("nan")])
def test_a_wrong_state_is_one(factor: float) -> None:
    fault = difference(with_states(1, 1, factor), drafted(), ALLOWED)
    assert fault is not None
    assert fault.startswith("the state of token 1 of request 1 differs by ")
    assert fault.endswith("of its norm, of which 0.01 is rounding")


def test_other_draft_tokens_are_one_unless_it_was_close() -> None:
    other = drafted()
    other.tokens[0, 1] = 13
    fault = difference(other, drafted(), ALLOWED)
    assert fault == "draft token 1 of request 0 is 13 of exit 0 instead of 11 of exit 0"
    plain = drafted()
    plain.close[0, 1] = True
    assert difference(other, plain, ALLOWED) == fault
    plain.close[0, 0] = True
    # Whatever has followed from it: other tokens, exits, depths and states.
    other.tokens[0, 2], other.exits[0, 1], other.depths[0] = 14, -1, [1, 1, 0, 0]
    other.states[0, 1:] = 0
    assert difference(other, plain, ALLOWED) is None
    # Not what came before, at the same depth.
    other.depths[0, 0], other.states[0, 0] = 2, 0
    fault = difference(other, plain, ALLOWED)
    assert fault is not None
    assert fault.startswith("the state of token 0 of request 0 differs by 1 of")


def test_other_exits_and_depths_are_one() -> None:
    stopped = replace(drafted(), exits=np.array([[0, -1, -1], [1, -1, -1]]))
    fault = difference(stopped, drafted(), ALLOWED)
    assert fault == "draft token 2 of request 0 is 12 of exit -1 instead of 12 of exit 1"
    shallow = replace(drafted(), depths=np.array([[2, 2, 2, 0], [2, 1, 0, 0]]))
    fault = difference(shallow, drafted(), ALLOWED)
    assert fault == "the depths of request 1 are [2, 1, 0, 0] instead of [2, 2, 0, 0]"


def test_close_decisions_are_seen() -> None:
    """By confidence, gate, and between tokens, of each row alone."""
    confidences = {0: 0.9, 1: 0.5 + 1e-5, 2: 0.5 - 1e-5, 3: 0.3}
    gates = {0: 0.9, 1: 0.9, 2: 0.9, 3: 0.6 - 1e-5}
    target = FakeTarget(
        lambda slot, *_: confidences[slot], {s: 7 for s in range(4)}, gate=lambda s, *_: gates[s]
    )
    hidden = torch.tensor([[0.0, slot, 2.0, 1.0] for slot in range(4)])

    def close(gate: float | None, rows: list[int]) -> list[list[int]]:
        close = torch.zeros(4, 3, dtype=torch.bool)
        watched = WatchedHeads(StoredHeads(target, None, True), HALF, close)  # type: ignore[arg-type]
        where = {"slots": torch.tensor(rows), "positions": torch.full((len(rows),), 9)}
        states = hidden[rows], -hidden[rows]
        found = watched.check(0, *states, draft=2, gate_threshold=gate, **where)
        assert watched.seen == {0: found.p.tolist()}
        return close.nonzero().tolist()

    assert close(None, [0, 1, 2, 3]) == [[1, 2], [2, 2]]
    assert close(None, [0, 3]) == []
    assert close(0.6, [0, 1, 2, 3]) == [[1, 2], [2, 2], [3, 2]]
    # As likely as all others.
    confidences[0] = 1 / 2000
    assert close(None, [0]) == [[0, 2]]


def test_what_may_be_used_instead() -> None:
    assert PLAIN.simpler() == []
    assert Way(fused=True).simpler() == [PLAIN]
    assert Way(True, True, True).simpler() == [
        Way(on_device=True, fused=True),
        Way(on_device=True),
        Way(fused=True),
        PLAIN,
    ]
    # Without kernels, captured are steps with heads in torch.
    assert Way(on_device=True, captured=True).simpler() == [Way(on_device=True), PLAIN]


def test_half_of_the_digits() -> None:
    found = [tolerance(d) for d in (torch.float32, torch.float16, torch.bfloat16)]
    assert [round(t, 5) for t in found] == [0.00035, 0.03125, 0.08839]


def rank(rank: int, file: str, fault: str | None, alone: bool, told: Any) -> None:
    """One of two: what both agree on, then what becomes of a fault that the other waits with."""
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    group = SimpleNamespace(world_size=2, cpu_group=torch.distributed.group.WORLD)
    with patch.object(self_check, "get_tp_group", lambda: group):
        told.send(self_check.anywhere(fault))
        if not alone:
            told.recv()
            return
        with patch.object(self_check, "WAIT", timedelta(seconds=0.5)):
            try:
                self_check.anywhere("raised")
            except SystemExit as error:
                told.send(str(error))


def test_ranks_agree_and_none_waits_forever(tmp_path: Path) -> None:
    # Not forked: this process may be in a group of its own.
    context = multiprocessing.get_context("spawn")
    file, ranks, pipes = str(tmp_path / "group"), [], []
    for number, fault in enumerate((None, "a wrong state")):
        mine, its = context.Pipe()
        pipes.append(mine)
        args = number, file, fault, fault is not None, its
        ranks.append(context.Process(target=rank, args=args))
        ranks[-1].start()
    try:
        assert [pipe.recv() for pipe in pipes] == ["a wrong state"] * 2
        assert pipes[1].recv() == "adadecode failed on one rank alone at the start: raised"
        pipes[0].send(None)
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
