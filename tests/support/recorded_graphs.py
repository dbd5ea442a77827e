"""CUDA graphs on a CPU: what would be captured is recorded, and a replay does it again.

Owns the stand-in for `torch.cuda.CUDAGraph`. As in a graph, a replay is the same operations with
the same numbers on the same memory: nothing that Python would decide anew is decided, and a tensor
made while it was recorded is the one that all replays write. As while a stream is captured,
whatever the host would have to wait for is an error. Unlike it, operations also run while they are
recorded.

A launch of a kernel is one operation, as is an operator of vLLM's that is made in Python; the
latter reads the forward context of its time. vLLM's CPU attention plans its work on the host, at a
size that depends on lengths: the plan of a replay takes the place of the recorded one.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from vllm.forward_context import (
    get_forward_context,
    is_forward_context_available,
    override_forward_context,
)
from vllm.platforms import current_platform
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.v1.worker.gpu import cudagraph_utils

from tests.support.op_trace import PLANS, READS, SYNCHRONISING, address_of, tensors_in

Operation = Callable[[dict[int, torch.Tensor]], None]


class RecordedGraph:
    """Operations in order."""

    replays = 0
    # Of the batch that vLLM's own graphs run: its plans are made outside of them.
    outer_metadata: dict[str, Any] | None = None

    def __init__(self, *_: Any, **__: Any) -> None:
        self.operations: list[Operation] = []
        # An address that is used again would be another tensor's.
        self._kept: list[Any] = []

    def replay(self) -> None:
        type(self).replays += 1
        plans: dict[int, torch.Tensor] = {}
        for operation in self.operations:
            operation(plans)

    def run(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Do it, and keep how to do it again."""
        results = list(tensors_in(made := function(*args, **kwargs)))
        context = get_forward_context() if is_forward_context_available() else None
        metadata = context.attn_metadata if context is not None else None
        planned = {
            layer: address_of(data.scheduler_metadata)
            for layer, data in (metadata or {}).items()
            if data.scheduler_metadata is not None
        }
        self._kept.append((args, kwargs, made, metadata))
        of_vllm = name.startswith("vllm::")

        def again(plans: dict[int, torch.Tensor]) -> None:
            def now(value: Any) -> Any:
                if isinstance(value, torch.Tensor):
                    return plans.get(address_of(value), value)
                return value

            if of_vllm and metadata:
                outer = RecordedGraph.outer_metadata or {}
                for layer, address in planned.items():
                    if address in plans:
                        metadata[layer].scheduler_metadata = plans[address]
                    else:
                        metadata[layer].scheduler_metadata = outer[layer].scheduler_metadata
            with override_forward_context(context) if of_vllm else nullcontext():
                found = function(*tree_map(now, args), **tree_map(now, kwargs))
            for before, after in zip(results, tensors_in(found), strict=True):
                if name.split("::")[-1].split(".")[0] in PLANS:
                    plans[address_of(before)] = after
                elif before.data_ptr() != after.data_ptr():
                    before.copy_(after)

        if not name.split("::")[-1].startswith(("empty", "new_empty")):
            self.operations.append(again)
        return made


class Record(TorchDispatchMode):
    """Hands every operation to the ``run`` of a graph; whatever it runs in turn is part of it."""

    def __init__(self, graph: Any) -> None:
        super().__init__()
        self.graph, self.paused = graph, False

    def run(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.paused:
            return function(*args, **kwargs)
        self.paused = True
        try:
            return self.graph.run(name, function, args, kwargs)
        finally:
            self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        by_mask = "index" in name and any(
            t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1:2])
        )
        waits = name.split("::")[-1] in SYNCHRONISING or by_mask
        assert self.paused or not waits, f"{name} waits for the device"
        return self.run(name, func, args, kwargs or {})


class Refuse(TorchFunctionMode):
    """Reading a tensor on a CPU passes no dispatcher."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert self.record.paused or name not in READS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded(graph: RecordedGraph, *_: Any, **__: Any) -> Iterator[None]:
    """In place of `torch.cuda.graph`."""
    launch, record = KernelOverride._launch, Record(graph)

    def launched(self: KernelOverride, *args: Any, **kwargs: Any) -> Any:
        return record.run(self.__name__, lambda *a, **k: launch(self, *a, **k), args, kwargs)

    with ExitStack() as stack:
        stack.enter_context(patch.object(KernelOverride, "_launch", launched))
        stack.enter_context(Refuse(record))
        stack.enter_context(record)
        yield


@contextmanager
def graphs_are_recorded() -> Iterator[None]:
    """vLLM's managers, and ours, capture by recording."""
    with ExitStack() as stack:
        for holder, name, value in (
            (torch.cuda, "CUDAGraph", RecordedGraph),
            (torch.cuda, "graph", recorded),
            (cudagraph_utils, "graph_capture", lambda device: nullcontext()),
            (cudagraph_utils, "capture_pool", lambda pool, config: nullcontext()),
            (cudagraph_utils, "current_stream", lambda: None),
            (type(current_platform), "get_global_graph_pool", lambda self: None),
        ):
            stack.enter_context(patch.object(holder, name, value))
        yield
