"""What a verification is planned from: the batch that vLLM made, and the windows at hand."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_adadecode.draft.windows import PendingWindow
from vllm_adadecode.verify.plan import make_plan


def batch(num_tokens: dict[str, int], prefilling: str = "") -> InputBatch:
    """Requests named by letters, with the tokens that are scheduled of each."""
    counts = np.array(list(num_tokens.values()), dtype=np.int32)
    fields: dict[str, Any] = {
        "req_ids": list(num_tokens),
        "num_reqs": len(counts),
        "num_tokens": int(counts.sum()),
        "num_scheduled_tokens": counts,
        "query_start_loc_np": np.append(0, np.cumsum(counts)).astype(np.int32),
        "idx_mapping_np": 7 - np.arange(len(counts), dtype=np.int32),
        "is_prefilling_np": np.array([req_id in prefilling for req_id in num_tokens]),
        # The buffer is longer than the batch.
        "seq_lens_cpu_upper_bound": torch.arange(10, 20, dtype=torch.int32),
    }
    return cast(InputBatch, SimpleNamespace(**fields))


def window(*depths: int) -> PendingWindow:
    return PendingWindow(np.array(depths), np.zeros(len(depths) - 1, dtype=np.int64))


def test_deferred_tokens_keep_their_depths_beside_prefill() -> None:
    windows = {"a": window(3, 1, 1), "b": window(2, 0)}
    plan = make_plan(batch({"a": 3, "b": 2, "c": 1, "d": 4}, prefilling="d"), windows)
    assert plan is not None
    assert plan.is_mixed
    assert plan.depths.tolist() == [3, 1, 1, 2, 0, 0, 0, 0, 0, 0]
    assert plan.rows.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 3]
    assert plan.offsets.tolist() == [0, 1, 2, 0, 1, 0, 0, 1, 2, 3]
    assert plan.slots.tolist() == [7, 6, 5, 4]
    assert plan.is_prefilling.tolist() == [False, False, False, True]
    assert plan.seq_lens_upper.tolist() == [10, 11, 12, 13]


def test_decoding_alone_is_not_mixed() -> None:
    plan = make_plan(batch({"a": 2}), {"a": window(1, 0)})
    assert plan is not None
    assert not plan.is_mixed


def test_a_window_that_is_scheduled_in_part() -> None:
    plan = make_plan(batch({"a": 2, "b": 8}, prefilling="b"), {"a": window(3, 2, 1, 0)})
    assert plan is not None
    assert plan.depths[:2].tolist() == [3, 2]


def test_what_can_not_be_a_window_starts_at_the_first_layer() -> None:
    """A request that prefills, again perhaps, and one with more tokens than were pending."""
    windows = {"a": window(2, 1), "b": window(2, 1), "c": window(1)}
    plan = make_plan(batch({"a": 2, "b": 3, "c": 1}, prefilling="a"), windows)
    assert plan is not None
    assert plan.depths.tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("num_tokens", "prefilling", "windows"),
    [
        ({"a": 2, "b": 1}, "", {}),
        ({"a": 2, "b": 1}, "b", {}),
        ({"a": 2, "b": 1}, "", {"a": window(0, 0), "b": window(0)}),
        ({"a": 2, "b": 1}, "a", {"a": window(2, 1), "b": window(0)}),
        ({"a": 3}, "", {"a": window(3, 2)}),
    ],
    ids=["no windows", "prefill alone", "depth 0", "prefilling", "too many tokens"],
)
def test_no_plan(
    num_tokens: dict[str, int], prefilling: str, windows: dict[str, PendingWindow]
) -> None:
    assert make_plan(batch(num_tokens, prefilling), windows) is None
