"""Drafts reach the scheduler with the output of a step; nobody asks the worker for them."""

import pickle
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from tests.support.engines import EnginePool, generate, greedy, speculative, stats
from vllm_adadecode.metrics.draft_ids import attach_drafts, hand_over, has_taken
from vllm_adadecode.vllm_patches.scheduler_and_metrics import _post_step

DRAFTS = DraftTokenIds(["a", "b"], [[5, 6], []])


class FakeScheduler:
    def __init__(self) -> None:
        self.given: list[DraftTokenIds] = []

    def update_draft_token_ids(self, drafts: DraftTokenIds) -> None:
        self.given.append(drafts)


def output() -> ModelRunnerOutput:
    return ModelRunnerOutput(req_ids=["a", "b"], req_id_to_index={"a": 0, "b": 1})


def test_they_cross_processes_with_the_output() -> None:
    sent, scheduler = output(), FakeScheduler()
    attach_drafts(sent, DRAFTS)
    hand_over(scheduler, pickle.loads(pickle.dumps(sent)))
    assert [(d.req_ids, d.draft_token_ids) for d in scheduler.given] == [
        (DRAFTS.req_ids, DRAFTS.draft_token_ids)
    ]


@pytest.mark.parametrize("executed", [True, False])
def test_the_worker_is_asked_where_none_have_come(executed: bool) -> None:
    """As after a step of another method, or of an asynchronous engine."""
    asked: list[bool] = []
    engine = SimpleNamespace(scheduler=FakeScheduler())
    post_step = _post_step(lambda self, model_executed: asked.append(model_executed))
    # Before the first output, after one without drafts, with them, and without again.
    post_step(engine, executed)
    for with_drafts in (False, True, False):
        step = output()
        if with_drafts:
            attach_drafts(step, DRAFTS)
        hand_over(engine.scheduler, step)
        assert has_taken(engine.scheduler) == with_drafts
        post_step(engine, executed)
    assert asked == [executed, executed, False, executed]


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_an_engine_never_asks(
    engines: EnginePool, prompts: list[str], async_scheduling: bool
) -> None:
    engine = engines.get(
        speculative_config=speculative(num_speculative_tokens=5), async_scheduling=async_scheduling
    )
    core: Any = engine.llm_engine.engine_core
    executor = core.engine_core.model_executor
    stats(engine, reset=True)
    with patch.object(type(executor), "take_draft_token_ids", side_effect=AssertionError):
        generate(engine, prompts[:4], greedy())
    assert stats(engine)["accepted_tokens"] > 20
