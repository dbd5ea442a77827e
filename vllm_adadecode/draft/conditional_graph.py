"""IF nodes of CUDA graphs: in a captured draft loop, the device skips the steps that nobody needs.

**This has not been run on a GPU**: see docs/gpu-loop.md for what is to be measured first. Owns the
guard that makes an IF node of a step while a loop is captured (draft_graphs.py), and where there
are such nodes.

The nodes are PyTorch's (CUDA 12.4 and later, `torch.cond` is made of them): it also has the kernel
that hands the condition to the node, and gives what is allocated in a body to the graph's memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from packaging.version import Version

from vllm_adadecode.errors import AdaDecodeError


def check_conditional_nodes(num_ranks: int) -> None:
    """Refuse what IF nodes can't be had for.

    Args:
        num_ranks: of tensor parallelism. Bodies of IF nodes may hold kernels, copies and nodes like
            themselves; a collective of NCCL waits for an event, which none may
            (pytorch/pytorch#180960).

    Raises:
        AdaDecodeError: one line that says what is missing.
    """
    if num_ranks > 1:
        raise AdaDecodeError("conditional nodes can't hold the collectives of tensor parallelism")
    # Those of 2.12 end after some ten bodies (pytorch/pytorch#187893).
    has_nodes = hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node")
    if not has_nodes or Version(torch.__version__).release < (2, 13):
        raise AdaDecodeError(
            f"PyTorch {torch.__version__} has no conditional nodes: 2.13 has them, for CUDA 12.4"
        )
    if torch.version.cuda is None or tuple(map(int, torch.version.cuda.split("."))) < (12, 4):
        raise AdaDecodeError(
            f"conditional nodes need PyTorch for CUDA 12.4 or later, not {torch.version.cuda}"
        )


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
