"""Its graphs: operations and launches of kernels are recorded as they run; a replay repeats them.

As in tests/support/recorded_graphs.py, whose kernels are references in PyTorch and whose attention
is a CPU's; here they are Triton's, and FlashAttention's schedule is recorded like everything else.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import vllm.compilation.cuda_graph
import vllm.v1.worker.gpu.cudagraph_utils
from triton.runtime.interpreter import InterpretedFunction
from vllm.forward_context import (
    get_forward_context,
    is_forward_context_available,
    override_forward_context,
)

from tests.support.op_trace import tensors_in
from tests.support.recorded_graphs import Record, Refuse


class Graph:
    """In place of `torch.cuda.CUDAGraph`."""

    captured = replayed = 0
    # Negative control: operations that replays leave out.
    left_out: frozenset[str] = frozenset()

    def __init__(self, *_: Any, **__: Any) -> None:
        self.operations: list[tuple[str, Callable[[], None]]] = []
        # An address that is used again would be another tensor's.
        self._kept: list[Any] = []

    def replay(self) -> None:
        Graph.replayed += 1
        for name, operation in self.operations:
            if name not in Graph.left_out:
                operation()

    def reset(self) -> None:
        self.operations.clear()

    def run(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Do it, and keep how to do it again."""
        made = function(*args, **kwargs)
        results = list(tensors_in(made))
        # vLLM's own operators find their metadata in the context of their time.
        of_vllm = name.startswith("vllm::") and is_forward_context_available()
        context = get_forward_context() if of_vllm else None
        self._kept.append((args, kwargs, made))

        def again() -> None:
            with override_forward_context(context) if of_vllm else nullcontext():
                found = function(*args, **kwargs)
            for before, after in zip(results, tensors_in(found), strict=True):
                if before.data_ptr() != after.data_ptr():
                    before.copy_(after)

        if not name.split("::")[-1].startswith(("empty", "new_empty")):
            self.operations.append((name, again))
        return made


@contextmanager
def _captured(graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
    """In place of `torch.cuda.graph`."""
    record, launch = Record(graph), InterpretedFunction.run

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return record.run(self.__name__, lambda *a, **k: launch(self, *a, **k), args, kwargs)

    Graph.captured += 1
    InterpretedFunction.run = launched
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        with Refuse(record), record:
            yield
    finally:
        InterpretedFunction.run = launch
        torch.cuda.is_current_stream_capturing = lambda: False


def install() -> None:
    """For all that is captured from now on."""
    torch.cuda.CUDAGraph = Graph
    torch.cuda.graph = _captured
    for module in (vllm.compilation.cuda_graph, vllm.v1.worker.gpu.cudagraph_utils):
        if hasattr(module, "weak_ref_tensors"):
            module.weak_ref_tensors = lambda tensors: tensors
