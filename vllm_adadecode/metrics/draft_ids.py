"""The way of draft tokens from the worker to the scheduler: with the output of their step.

Owns what is attached to that output and how the scheduler takes it. vLLM asks the worker for draft
tokens in a call of its own after every step, unless scheduling is asynchronous: where the worker is
another process, as in servers, that is a round trip between processes in every step, whether there
are any or not. Put in vLLM's place by vllm_patches/scheduler_and_metrics.py.
"""

from typing import Any

from vllm.v1.outputs import DraftTokenIds


def attach_drafts(model_runner_output: Any, drafts: DraftTokenIds) -> None:
    """Send ``drafts`` along with a worker's `ModelRunnerOutput`, with which they are pickled."""
    model_runner_output.adadecode_drafts = drafts


def hand_over(scheduler: Any, model_runner_output: Any) -> None:
    """Give the scheduler the draft tokens that came with an output it has dealt with."""
    drafts = getattr(model_runner_output, "adadecode_drafts", None)
    scheduler.adadecode_drafts_taken = drafts is not None
    if drafts is not None:
        scheduler.update_draft_token_ids(drafts)


def has_taken(scheduler: Any) -> bool:
    """Whether the scheduler has the draft tokens of the last step."""
    return getattr(scheduler, "adadecode_drafts_taken", False)
