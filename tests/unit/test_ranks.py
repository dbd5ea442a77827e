"""What tensor-parallel ranks tell each other, with one rank's side of it; both: see
tests/engine/test_tensor_parallel.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_adadecode.adaptive import profile, ranks
from vllm_adadecode.adaptive.ranks import LateFactors
from vllm_adadecode.adaptive.step_times import Factors
from vllm_adadecode.engine import worker
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


def test_requests_of_the_profile_end_whatever_fails() -> None:
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
    ours = SimpleNamespace(model_runner=runner, execute_model=execute_model)
    with pytest.raises(ValueError, match="out of memory"):
        profile._timed(ours, 4, ExitThresholds((), ()), rounds=2)
    first, last = seen
    assert last.finished_req_ids == {r.req_id for r in first.scheduled_new_reqs}
    assert len(last.finished_req_ids) == 4


@pytest.mark.parametrize(("num_ranks", "error"), [(1, ValueError), (2, SystemExit)])
def test_a_rank_that_fails_ends(num_ranks: int, error: type[BaseException]) -> None:
    """The others wait for it, where no error of its own would reach them."""

    def run(_: Any) -> None:
        raise ValueError("out of memory")

    parallel = SimpleNamespace(tensor_parallel_size=num_ranks)
    this: Any = SimpleNamespace(
        model_runner=SimpleNamespace(kv_connector=None),
        vllm_config=SimpleNamespace(parallel_config=parallel),
    )
    with pytest.raises(error):
        worker.AdaDecodeGPUWorker._run_own_rounds(this, run)
