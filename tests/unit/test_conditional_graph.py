"""IF nodes without a GPU: what is asked of PyTorch, in which order. tests/gpu has the real ones."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.engine.test_device_loop import DeviceRuns
from vllm_adadecode.draft.conditional_graph import IfNode, check_conditional_nodes
from vllm_adadecode.draft.device_loop import Steps
from vllm_adadecode.draft.step_guard import RunAlways
from vllm_adadecode.errors import AdaDecodeError


class RecordingGraph:
    """Stands for the graph that is captured."""

    def __init__(self) -> None:
        self.conditions: list[torch.Tensor] = []
        self.depth = self.deepest = 0

    def begin_capture_to_if_node(self, condition: torch.Tensor) -> None:
        assert condition.dtype == torch.bool
        assert condition.dim() == 0
        self.conditions.append(condition)
        self.depth += 1
        self.deepest = max(self.deepest, self.depth)

    def end_capture_to_conditional_node(self) -> None:
        self.depth -= 1
        assert self.depth >= 0


def capturing(graph: RecordingGraph) -> Any:
    """While this is entered, PyTorch captures ``graph``."""
    stand_in = type("CUDAGraph", (), {"get_currently_capturing_graph": staticmethod(lambda: graph)})
    return patch.object(torch.cuda, "CUDAGraph", stand_in)


def test_a_captured_loop_guards_every_step() -> None:
    recording = RecordingGraph()
    runs = DeviceRuns(RunAlways())
    # No row drafts: on a device nothing would run, in a capture everything does.
    runs.draft(lambda *_: 0.9, [0, 0, 0], [1, 2, 3])
    round_ = runs.loop.buffers.first(4, 3)
    runs.loop.capturing = IfNode()
    with capturing(recording):
        runs.loop.run_steps(round_, 5, Steps(runs.loop, round_, runs.thresholds, None, None).run)
    # Five drafts, each with two promotions inside of one another; the first needs no question.
    assert len(recording.conditions) == 5 * 3 - 1
    assert (recording.depth, recording.deepest) == (0, 3)


def test_a_step_that_fails_ends_its_node() -> None:
    recording = RecordingGraph()

    def fail() -> None:
        raise ValueError("out of memory")

    with capturing(recording), pytest.raises(ValueError, match="out of memory"):
        IfNode().when(torch.tensor(True), fail)
    assert recording.depth == 0


def test_pytorch_names_them_so() -> None:
    """PyTorch for CPUs has none; its own use of them is the same file everywhere."""
    used = Path(torch.__file__).parent / "_higher_order_ops" / "cudagraph_conditional_nodes.py"
    for name in (
        "torch.cuda.CUDAGraph.get_currently_capturing_graph()",
        ".begin_capture_to_if_node(pred)",
        ".end_capture_to_conditional_node()",
    ):
        assert name in used.read_text()


@pytest.mark.parametrize(
    ("graph", "cuda", "ranks", "words"),
    [
        (object, "13.0", 1, "has no conditional nodes"),
        (RecordingGraph, None, 1, "CUDA 12.4"),
        (RecordingGraph, "12.1", 1, "12.1"),
        (RecordingGraph, "13.0", 2, "tensor parallelism"),
    ],
)
def test_where_there_are_none(graph: type, cuda: str | None, ranks: int, words: str) -> None:
    with (
        patch.object(torch.cuda, "CUDAGraph", graph),
        patch.object(torch.version, "cuda", cuda),
        pytest.raises(AdaDecodeError, match=words) as error,
    ):
        check_conditional_nodes(ranks)
    assert "\n" not in str(error.value)


def test_those_of_an_earlier_pytorch_are_not_used() -> None:
    """They fail after some ten bodies."""
    with (
        patch.object(torch.cuda, "CUDAGraph", RecordingGraph),
        patch.object(torch.version, "cuda", "13.0"),
        patch.object(torch, "__version__", "2.12.1+cu130"),
        pytest.raises(AdaDecodeError, match=r"2\.12\.1.*2\.13 has them"),
    ):
        check_conditional_nodes(1)


def test_where_there_are_some() -> None:
    with (
        patch.object(torch.cuda, "CUDAGraph", RecordingGraph),
        patch.object(torch.version, "cuda", "12.8"),
    ):
        check_conditional_nodes(1)
