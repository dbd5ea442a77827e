"""What a piece of code asks of the device: every operation in order, with shapes and addresses.

Owns the recording, and what counts as a synchronisation: an operation whose result the host needs
before it goes on. Launches of kernels are one operation each: what their torch references do in
their place happens on the device where there are kernels.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.utils.torch_utils import LayerName

from benchmarks.gpu_suite.syncs import place

# Operations whose output has a shape that depends on data, or that is a number of Python's.
SYNCHRONISING = {
    "_local_scalar_dense",
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "is_nonzero",
}
# Reading a tensor on a CPU passes no dispatcher: these are seen as they are called.
READS = {
    "cpu",
    "item",
    "tolist",
    "numpy",
    "nonzero",
    "__array__",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__contains__",
}
# vLLM's CPU attention plans its work on the host; the plan's size, and nothing else, follows from
# the lengths. On a GPU its place is taken by a launch.
PLANS = {"get_scheduler_metadata"}


@dataclass
class OpTrace:
    """Operations between start and end.

    Attributes:
        operations: name, arguments and results; tensors as address or number, shape and strides.
        synchronisations: names.
        places: of these, file and line that called.
        allocated: bytes of every new tensor, in order.
    """

    operations: list[tuple[Any, ...]] = field(default_factory=list)
    synchronisations: list[str] = field(default_factory=list)
    allocated: list[int] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    _paused: bool = False
    # Memory made here, by address: its number, None for a plan. Kept, so that no address is reused.
    _made: dict[int, int | None] = field(default_factory=dict)
    _kept: list[torch.Tensor] = field(default_factory=list)

    def operation(self, name: str, run: Callable[[], Any], args: Any) -> Any:
        """Run and record one operation."""
        given = self._describe(args)
        before = {address_of(t) for t in tensors_in(args)}
        paused, self._paused = self._paused, True
        try:
            result = run()
        finally:
            self._paused = paused
        for tensor in tensors_in(result):
            address = address_of(tensor)
            if address not in before and address not in self._made:
                is_plan = name in PLANS
                self._made[address] = None if is_plan else len(self.allocated)
                self._kept.append(tensor)
                if not is_plan:
                    self.allocated.append(tensor.untyped_storage().nbytes())
        self.operations.append((name, given, self._describe(result)))
        return result

    def waits(self, name: str) -> None:
        """Note an operation that the host waits for."""
        self.synchronisations.append(name)
        here = [f for f in traceback.extract_stack() if f.filename != __file__]
        self.places.append(place(traceback.StackSummary.from_list(here)))

    def _describe(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            address = address_of(value)
            place = self._made.get(address, hex(address))
            if place is None:
                return "plan"
            offset, shape = value.storage_offset(), tuple(value.shape)
            return (place, offset, shape, value.stride(), value.dtype)
        if isinstance(value, list | tuple):
            return tuple(self._describe(v) for v in value)
        if isinstance(value, dict):
            return tuple((k, self._describe(v)) for k, v in sorted(value.items()))
        if isinstance(value, LayerName):
            return value.value
        return value if isinstance(value, int | float | bool | str | None) else repr(value)


class _Dispatched(TorchDispatchMode):
    def __init__(self, trace: OpTrace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.trace._paused:
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        by_mask = name.startswith(("index", "_index")) and any(
            t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1:2])
        )
        if name in SYNCHRONISING or by_mask:
            self.trace.waits(name)
        return self.trace.operation(name, lambda: func(*args, **kwargs), (args, kwargs))


class _Called(TorchFunctionMode):
    def __init__(self, trace: OpTrace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        to_host = name == "to" and "cpu" in map(str, (*args[1:], kwargs.get("device")))
        if not self.trace._paused and (
            name in READS or (to_host and not kwargs.get("non_blocking"))
        ):
            self.trace.waits(name)
        return func(*args, **kwargs)


@contextmanager
def traced() -> Iterator[OpTrace]:
    """Record what happens inside."""
    trace = OpTrace()
    launch = KernelOverride._launch

    def recorded(self: KernelOverride, *args: Any, **kwargs: Any) -> Any:
        if trace._paused:
            return launch(self, *args, **kwargs)
        return trace.operation(
            f"kernel {self.__name__}", lambda: launch(self, *args, **kwargs), (args, kwargs)
        )

    with ExitStack() as stack:
        stack.enter_context(patch.object(KernelOverride, "_launch", recorded))
        stack.enter_context(_Called(trace))
        stack.enter_context(_Dispatched(trace))
        yield trace


def first_difference(one: list[Any], other: list[Any]) -> str:
    """Where two lists of operations part, in a line; empty if they are equal."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return f"operation {i}: {str(a)[:400]} != {str(b)[:400]}"
    return "" if len(one) == len(other) else f"{len(one)} != {len(other)} operations"


def address_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for v in value:
            yield from tensors_in(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from tensors_in(v)
