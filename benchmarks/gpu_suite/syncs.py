"""Calls for which the host waits for the device, counted round by round in a worker.

Owns what counts as one. On a GPU: what PyTorch's sync debug mode warns of (an item, a nonzero, a
copy from or to pageable memory), and waits for the device, a stream or an event. On a CPU, where
nothing waits: the calls that would on a GPU, with two errors: reads of tensors that are the host's
own are counted, of which vanilla's rounds have some, and `nonzero` inside other operators is not.
Only the thread that runs rounds counts; vLLM reads outputs in another one, which waits beside it.
"""

from __future__ import annotations

import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

WARNING = "called a synchronizing"
WAITS = (
    *((torch.cuda, name) for name in ("synchronize",)),
    *((torch.accelerator, name) for name in ("synchronize",)),
    *((torch.cuda.Stream, name) for name in ("synchronize",)),
    *((torch.cuda.Event, name) for name in ("synchronize",)),
)
# Calls that read a tensor on the host, or whose result's size does.
READS = (
    *("cpu", "item", "nonzero", "unique", "masked_select"),
    *("__bool__", "__int__", "__float__", "__index__"),
)
SELF = Path(__file__)

Note = Callable[[], None]


class RoundCounter:
    """Counts in every round of a worker from now on, until `remove`.

    A round is a call of `execute_model` that has tokens, and the `sample_tokens` after it; rounds
    in which a request is new are left out.

    Args:
        worker: vLLM's; its two methods are replaced.
        device_type: "cuda", or "cpu" for calls that would wait on a GPU.
    """

    def __init__(self, worker: Any, device_type: str) -> None:
        self.worker = worker
        self.watch = cuda_syncs if device_type == "cuda" else cpu_syncs
        self.rounds = 0
        self.sites: Counter[str] = Counter()
        self._counting = False
        execute, sample = worker.execute_model, worker.sample_tokens

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            has_tokens = scheduler_output.total_num_scheduled_tokens > 0
            self._counting = has_tokens and not scheduler_output.scheduled_new_reqs
            self.rounds += self._counting
            with self._watched():
                return execute(scheduler_output, *args, **kwargs)

        def sample_tokens(*args: Any, **kwargs: Any) -> Any:
            with self._watched():
                return sample(*args, **kwargs)

        worker.execute_model, worker.sample_tokens = execute_model, sample_tokens

    def remove(self) -> None:
        """Give the worker its methods back."""
        del self.worker.execute_model, self.worker.sample_tokens

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; the places are those of the calls, most frequent first."""
        syncs = sum(self.sites.values())
        return {
            "rounds": self.rounds,
            "syncs": syncs,
            "syncs_per_round": syncs / self.rounds if self.rounds else None,
            "places": dict(self.sites.most_common(20)),
        }

    @contextmanager
    def _watched(self) -> Iterator[None]:
        if not self._counting:
            yield
            return
        thread = threading.get_ident()

        def note() -> None:
            if threading.get_ident() == thread:
                self.sites[place(traceback.extract_stack())] += 1

        with self.watch(note):
            yield


def place(stack: traceback.StackSummary) -> str:
    """The innermost frame that is neither PyTorch's nor of this module."""
    for frame in reversed(stack):
        parts = Path(frame.filename).parts
        foreign = ("torch", "unittest", "warnings.py", "contextlib.py")
        if Path(frame.filename) != SELF and not any(name in parts for name in foreign):
            return f"{_short(frame.filename)}:{frame.lineno} {frame.name}"
    return "unknown"


def _short(file: str) -> str:
    """As it is called inside its package or this checkout."""
    _, found, inside = file.rpartition("/site-packages/")
    if found:
        return inside
    path = Path(file)
    if path.is_relative_to(SELF.parents[2]):
        return str(path.relative_to(SELF.parents[2]))
    return "/".join(path.parts[-3:])


@contextmanager
def cuda_syncs(note: Note) -> Iterator[None]:
    """Calls ``note`` for everything that the host waits for on a GPU."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if WARNING in str(message):
            note()

    def counted(wait: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            note()
            return wait(*args, **kwargs)

        return call

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # "once" would hide all but the first of each place.
        warnings.simplefilter("always")
        warnings.showwarning = show
        for owner, name in WAITS:
            stack.enter_context(patch.object(owner, name, counted(getattr(owner, name))))
        stack.enter_context(_debug_mode())
        yield


@contextmanager
def _debug_mode() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def cpu_syncs(note: Note) -> AbstractContextManager[Any]:
    """Calls ``note`` for every call that a GPU's host would wait for."""

    class Reads(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if getattr(func, "__name__", "") in READS or _is_blocking_copy(func, args, kwargs):
                note()
            return func(*args, **kwargs)

    return Reads()


def _is_blocking_copy(func: Any, args: Any, kwargs: Any) -> bool:
    """To a device, which all are the CPU here; in either direction."""
    if getattr(func, "__name__", "") != "to" or kwargs.get("non_blocking"):
        return False
    wanted = [*args[1:2], kwargs.get("device")]
    return any(isinstance(w, str | torch.device) and str(w) == "cpu" for w in wanted)
