"""The draft loop as one CUDA graph whose steps the device skips: IF nodes around them.

**This has not been run on a GPU, and nothing uses it yet**: see docs/gpu-loop.md for what is to be
measured first. Owns the guard that makes an IF node of a step, and the capture of a loop with it.

The nodes are PyTorch's (CUDA 12.4 and later, `torch.cond` is made of them): it also has the kernel
that hands the condition to the node, and gives what is allocated in a body to the graph's memory.
"""

from collections.abc import Callable
from typing import Any

import torch

from vllm_adadecode.device_loop import DeviceLoop
from vllm_adadecode.draws import Draws
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.fused_head import FusedHeads
from vllm_adadecode.loop_buffers import LoopBuffers
from vllm_adadecode.policy import DraftPolicy


def check_conditional_nodes(num_ranks: int) -> None:
    """Refuse what IF nodes can't be had for.

    Args:
        num_ranks: of tensor parallelism. Bodies of IF nodes may hold kernels, copies and nodes like
            themselves; a collective of NCCL waits for an event, which none may
            (pytorch/pytorch#180960).

    Raises:
        AdaDecodeError: one line that says what is missing.
    """
    if not hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node"):
        raise AdaDecodeError(f"PyTorch {torch.__version__} has no conditional nodes, 2.13 has them")
    if torch.version.cuda is None or tuple(map(int, torch.version.cuda.split("."))) < (12, 4):
        raise AdaDecodeError(
            f"conditional nodes need PyTorch for CUDA 12.4 or later, not {torch.version.cuda}"
        )
    if num_ranks > 1:
        raise AdaDecodeError("conditional nodes can't hold the collectives of tensor parallelism")


class IfNode:
    """While a graph is captured: a step becomes the body of an IF node.

    The device looks at the condition when it gets there. What a step leaves behind must be in
    buffers that are there without it.
    """

    def when(self, condition: torch.Tensor, step: Callable[[], None]) -> None:
        # Inside of a body, the graph that all of it belongs to.
        graph: Any = torch.cuda.CUDAGraph.get_currently_capturing_graph()
        graph.begin_capture_to_if_node(condition)
        try:
            step()
        finally:
            graph.end_capture_to_conditional_node()


def capture_loop(
    loop: DeviceLoop,
    round_: LoopBuffers,
    policy: DraftPolicy,
    max_drafts: int,
    draws: Draws | None,
    fused: FusedHeads | None,
    pool: Any = None,
) -> torch.cuda.CUDAGraph:
    """Capture `DeviceLoop.draft` for a batch size; a replay drafts for what `begin` has loaded.

    The graph keeps the addresses of the round's buffers, of the temperatures and seeds in
    ``draws`` and of the weights, and the policy's thresholds. Every kernel must have run before:
    call `DeviceLoop.draft` once with `RunAlways`.

    Args:
        pool: memory shared with other graphs that never run at the same time.
    """
    guard, loop.guard = loop.guard, IfNode()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            loop.draft(round_, policy, max_drafts, draws, fused)
    finally:
        loop.guard = guard
    return graph
