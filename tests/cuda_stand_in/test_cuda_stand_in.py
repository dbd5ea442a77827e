"""vLLM's GPU worker with the method, on a CPU taken for a CUDA device (tests/cuda_stand_in).

What other tests leave out: start-up as on a GPU (memory profiling, which has the KV caches and all
graphs made twice; vLLM's warm-up), FlashAttention's schedules, Triton's kernels in vLLM's batches.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def served() -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.cuda_stand_in.serve"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def test_output_is_vanillas(served: dict[str, Any]) -> None:
    """With prompts in chunks beside requests that decode, from replays."""
    assert served["tokens"] == served["vanilla"]
    stats = served["stats"]
    assert stats["accepted_tokens"] > 10
    assert stats["mixed_steps"] > 0


def test_runs_as_on_a_gpu(served: dict[str, Any]) -> None:
    assert "vllm.v1.worker.gpu.model_runner" in served["runner"]
    assert not any("cpu" in module for module in served["runner"])
    assert served["draft_loop"] == "device"
    assert served["fused_heads"]
    assert served["async_scheduling"]
    # The next batch is prepared while a round still drafts.
    assert served["stats"]["overlapped_steps"] > 10


def test_graphs_are_captured_at_the_start_alone(served: dict[str, Any]) -> None:
    assert served["captured"] > 0
    assert served["captured_while_serving"] == 0
    assert served["replayed"] > served["stats"]["deferred_steps"]


def test_attention_is_scheduled_for_its_batch(served: dict[str, Any]) -> None:
    """In every call: the stand-in refuses a schedule that is not of the lengths it is given."""
    assert set(served["attention"]) == {"scheduled"}


def test_a_stale_schedule_is_noticed(served: dict[str, Any]) -> None:
    """Negative control: replays that keep the schedule of their capture."""
    assert served["stale_schedule_noticed"]


def test_says_what_was_chosen(served: dict[str, Any]) -> None:
    """In one line, and nothing was given up."""
    (line,) = served["log"]
    for words in (
        "draft loop device (a GPU with full CUDA graphs)",
        "heads by fused kernels",
        "verification passes and ",
        "adaptive draft length off",
        "after layers [2, 4, 6] of ",
    ):
        assert words in line


LEFT = {
    "none": ([True, True, True, True], []),
    "failing kernel": ([True, False, True, True], ["kernels failed: out of resource: shared"]),
    "wrong state": ([False, True, False, True], ["differs by "]),
    "wrong token": ([True, False, False, True], ["draft token 1 of request "]),
    "failing capture": ([True, True, False, True], ["operation not permitted when stream"]),
    "failing capture of verifications": ([True, True, True, False], ["operation not permitted"]),
    "stale replays": ([True, True, False, False], [" of request ", "all layers'"]),
}


@pytest.mark.parametrize("fault", LEFT)
def test_a_fault_is_told_and_costs_no_more_than_must_be(served: dict[str, Any], fault: str) -> None:
    """Whether the loop is on the device, heads are fused, steps and verifications captured."""
    way, words = LEFT[fault]
    found = served["faults"][fault]
    assert found["way"] == way
    assert len(found["lines"]) == len(words)
    for line, said in zip(found["lines"], words, strict=True):
        assert line.startswith("AdaDecode falls back: ")
        assert said in line
        assert "\n" not in line
    assert found["tokens"] == served["vanilla"][:2]
