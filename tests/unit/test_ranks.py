"""What tensor-parallel ranks tell each other, with one rank's side of it; both: see
tests/engine/test_tensor_parallel.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_adadecode.adaptive import profile, ranks
from vllm_adadecode.adaptive.ranks import LateFactors, on_all_ranks
from vllm_adadecode.adaptive.step_times import Factors
from vllm_adadecode.heads.thresholds import ExitThresholds


@pytest.fixture
def second_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    group = SimpleNamespace(world_size=2, ranks=[4, 5], cpu_group=None)
    monkeypatch.setattr(ranks, "get_tp_group", lambda: group)


def test_nobody_waits_for_what_was_just_sent(
    monkeypatch: pytest.MonkeyPatch, second_rank: None
) -> None:
    sent = iter([(1.5, torch.nan), (2.0, 3.0), (9.0, 9.0), (4.0, 4.0)])
    under_way: list[torch.Tensor] = []

    def broadcast(values: torch.Tensor, src: int, group: Any, async_op: bool) -> Any:
        assert (src, async_op) == (4, True)
        under_way.append(values)
        of_rank_0 = torch.tensor(next(sent))

        def wait() -> None:
            assert values is not under_way[-1], "it can't have come yet"
            values.copy_(of_rank_0)

        return SimpleNamespace(wait=wait)

    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    late, own = LateFactors(), Factors(7.0, 7.0)
    assert late(1, own) == Factors(None, None)
    assert late(1, own) == Factors(1.5, None)
    assert late(3, own) == Factors(None, None), "another batch size"
    assert late(1, own) == Factors(2.0, 3.0)


def test_one_rank_has_nobody_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "get_tp_group", lambda: SimpleNamespace(world_size=1))
    assert LateFactors()(1, Factors(7.0, None)) == Factors(7.0, None)
    with pytest.raises(ValueError, match="out of memory"), on_all_ranks():
        raise ValueError("out of memory")


@pytest.mark.parametrize("failed", ["nobody", "the other", "this"])
def test_a_step_that_fails_on_one_rank_fails_on_all(
    monkeypatch: pytest.MonkeyPatch, second_rank: None, failed: str
) -> None:
    told: list[str | None] = []

    def all_gather_object(errors: list[str | None], own: str | None, group: Any) -> None:
        told.append(own)
        errors[:] = ["ValueError('on rank 0')" if failed == "the other" else None, own]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)

    def step() -> None:
        with on_all_ranks():
            if failed == "this":
                raise ValueError("here")

    if failed == "nobody":
        step()
    elif failed == "the other":
        with pytest.raises(RuntimeError, match="on rank 0"):
            step()
    else:
        with pytest.raises(ValueError, match="here"):
            step()
    assert told == ["ValueError('here')" if failed == "this" else None]


def test_requests_of_the_profile_end_whatever_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "get_tp_group", lambda: SimpleNamespace(world_size=1))
    seen: list[SchedulerOutput] = []

    def execute_model(output: SchedulerOutput) -> None:
        seen.append(output)
        if output.total_num_scheduled_tokens:
            raise ValueError("out of memory")

    runner = SimpleNamespace(
        max_model_len=64,
        num_speculative_steps=3,
        speculator=SimpleNamespace(
            ledger=SimpleNamespace(), block_tables=SimpleNamespace(block_sizes=[16])
        ),
    )
    worker = SimpleNamespace(model_runner=runner, execute_model=execute_model)
    with pytest.raises(ValueError, match="out of memory"):
        profile._timed(worker, 4, ExitThresholds((), ()), rounds=2)
    first, last = seen
    assert last.finished_req_ids == {r.req_id for r in first.scheduled_new_reqs}
    assert len(last.finished_req_ids) == 4
